"""What `import regularizers` takes beside `import torch`, in fresh processes in turns."""

from __future__ import annotations

import statistics
import subprocess
import sys

from common import parser, spread, verdict, write

CONTENDERS = ("torch", "neuralde", "regularizers")
MOST = 0.3
# What no import of ours may bring before its adapter is used.
ADAPTED = ("torchdiffeq", "torchdyn", "torchsde")
SCRIPT = """
import sys, time
start = time.perf_counter()
import {name}
print(time.perf_counter() - start, len(sys.modules), *[name for name in {adapted} if name in sys.modules])
"""


def imported(name: str) -> tuple[float, int, list[str]]:
    """(seconds, modules afterwards, adapted libraries among them) of an import in a process of its own."""
    script = SCRIPT.format(name=name, adapted=ADAPTED)
    words = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    return float(words[0]), int(words[1]), words[2:]


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15, help="processes for every import, at least 9")
    given = options.parse_args()
    if given.rounds < 9:
        options.error("--rounds must be at least 9")
    counts = {}
    for name in CONTENDERS:  # once before, with everything read from the disk and compiled
        _, counts[name], adapted = imported(name)
        if adapted:
            raise AssertionError(f"import {name} imports {', '.join(adapted)}")
    seconds = {name: [] for name in CONTENDERS}
    for r in range(given.rounds):
        shift = r % len(CONTENDERS)
        for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
            seconds[name].append(imported(name)[0])
    rows, more = [], {}
    for name, taken in seconds.items():
        more[name] = statistics.median(a - b for a, b in zip(taken, seconds["torch"], strict=True))
        row = {"import": name, "s": statistics.median(taken), "more than torch, s": more[name]}
        rows.append(row | {"spread": spread(taken), "modules": counts[name]})
    noise = max(spread(seconds["regularizers"]), spread(seconds["torch"]))
    notes = [
        f"{given.rounds} rounds of a fresh process for each; s are medians over them, and what is more than torch's is "
        "the median of the differences of every round",
        f"none of {', '.join(ADAPTED)} is among the modules",
        verdict("seconds that import regularizers takes beside import torch", more["regularizers"], MOST, noise=noise),
    ]
    write(given.results, "import_time", rows, "as torch chooses", notes)


if __name__ == "__main__":
    main()
