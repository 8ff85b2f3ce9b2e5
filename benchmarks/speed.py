"""Speed of solves, eager and compiled, beside torchdiffeq, torchdyn, torchode and diffrax: tables and scaling plots.

Every part checks all answers against a reference first, and writes files of its own. Peers that are not installed
(pip install torchode, diffrax) are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from common import (
    Workload,
    deviation,
    in_turns,
    median_ratio,
    medium,
    oscillators,
    parser,
    reference,
    small,
    spread,
    verdict,
    write,
)
from contenders import PEERS, PENALTY, Ours, installed, ours, peers, penalized
from matplotlib.figure import Figure

loop = importlib.import_module("neuralde.discover")
FORWARD, BOTH = "forward", "forward and backward"
LARGEST = 3000  # tolerances that an answer may be off: an error of phase is large where x jumps


class Table(NamedTuple):
    """A workload with all contenders.

    Attributes:
        make: the workload. controls: ours to measure. passes: what of them.
        threads: settings of torch's threads; of several, each contender gets its better one.
    """

    make: Callable[[], Workload]
    controls: tuple[str, ...]
    passes: tuple[str, ...]
    threads: tuple[int, ...]


TABLES = {
    "S": Table(small, ("joint, integral", "per_sample"), (FORWARD, BOTH), (1,)),
    "M": Table(medium, ("joint, integral", "per_sample"), (FORWARD, BOTH), (2,)),
    "V": Table(oscillators, ("per_sample",), (FORWARD,), (1, 2)),
}

# (workload, pass, contender, column, largest figure that we want)
JOINT, OWN = "dopri5 joint, integral", "dopri5 per_sample"
CLAIMS = (
    ("S", FORWARD, f"compiled {JOINT}", "/ torchdiffeq", 1 / 10),
    ("S", FORWARD, f"compiled {JOINT}", "/ torchdyn", 1 / 7),
    ("S", FORWARD, f"compiled {JOINT}", "/ diffrax", 2.5),
    ("S", FORWARD, f"eager {JOINT}", "/ torchdyn", 0.8),
    ("S", BOTH, f"compiled {JOINT}", "/ torchdiffeq", 1 / 6),
    ("S", BOTH, f"compiled {JOINT}", "/ diffrax", 2.5),
    ("S", BOTH, f"compiled {JOINT}, {PENALTY}", "/ without", 1.1),
    ("M", FORWARD, f"compiled {JOINT}", "/ NFE x f", 1.15),
    ("M", FORWARD, f"compiled {JOINT}", "/ diffrax", 1.0),
    ("M", BOTH, f"compiled {JOINT}", "/ torchdyn", 1.3),
    ("M", BOTH, f"compiled {JOINT}, {PENALTY}", "/ without", 1.1),
    *(
        ("V", FORWARD, f"{kind} {OWN}", column, limit)
        for kind in ("eager", "compiled")
        for column, limit in (("/ torchdiffeq", 1 / 8), ("/ torchode", 1 / 3), ("rows / needed", 1.5))
    ),
)

LABELS = {"/ without": "time / that without penalties", "rows / needed": "rows of f / what the samples need alone"}


class Curve(NamedTuple):
    """A family of workloads.

    Attributes:
        make: the workload of a value. values: along the curve. control: ours.
        axis: what the values are. title: of the picture.
    """

    make: Callable[..., Workload]
    values: tuple[float, ...]
    control: str
    axis: str
    title: str


CURVES = {
    "precision": Curve(
        lambda tolerance: small(tolerance=tolerance),
        tuple(10.0**-k for k in range(2, 7)),
        "joint, integral",
        "rtol = atol",
        "work and precision: S at other tolerances",
    ),
    "batch": Curve(
        lambda batch: small(batch=batch),
        tuple(2**k for k in range(4, 17, 2)),
        "joint, integral",
        "batch",
        "S with other batches",
    ),
    "width": Curve(
        lambda width: small(width=width),
        tuple(2**k for k in range(4, 13, 2)),
        "joint, integral",
        "width of the hidden layer",
        "S with other widths",
    ),
    "steps": Curve(
        lambda t1: oscillators(mu=1.0, t1=t1, batch=64),
        (2.5, 5.0, 10.0, 20.0, 40.0),
        "joint, integral",
        "horizon",
        "longer and longer solves: Van der Pol, μ = 1",
    ),
    "spread": Curve(
        lambda spread: oscillators(spread=spread),
        (0.5, 1.0, 1.5, 2.0),
        "per_sample",
        "spread of the initial states, and so of the stiffness",
        "V from other initial states",
    ),
}


# -- measurements ------------------------------------------------------------------------------------------------------


def wanted(name: str, only: list[str] | None) -> bool:
    """Whether a contender's name begins with one of those; None for all."""
    return only is None or name.startswith(tuple(only))


def agreeing(made: dict, work: Workload, exact: torch.Tensor) -> tuple[dict, dict, dict]:
    """Solves once with each contender.

    Returns:
        Those that work here; how many tolerances they are off; seconds of the first call, of those that compile.

    Raises:
        AssertionError: an answer is not the reference's.
    """
    able, off, first = {}, {}, {}
    for name, contender in made.items():
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            final = contender.forward()
        if any("compile=True has no effect" in str(x.message) for x in told):
            print(f"{work.name}: {name} is left out: {told[-1].message}")
            continue
        if name.startswith(("compiled", "diffrax")):
            first[name] = time.perf_counter() - start
        final = final if isinstance(final, torch.Tensor) else torch.tensor(np.asarray(final))
        able[name], off[name] = contender, deviation(final, exact, work)
        if not off[name] < LARGEST:
            raise AssertionError(f"{work.name}: {name} is {off[name]:.0f} tolerances off the reference")
    return able, off, first


def table(part: str, given: argparse.Namespace) -> tuple[list[dict], list[str], str]:
    """The rows of a workload with all contenders, the notes, and the threads in words."""
    make, controls, passes, settings = TABLES[part]
    work = on_device(make(), given.device)
    torch.set_num_threads(settings[0])
    keep = functools.partial(wanted, only=given.only)
    made = peers(work, "joint, integral" not in controls, keep)
    for control in controls:
        made |= ours(work, control)
    more = penalized(work, controls[0]) if BOTH in passes else {}
    made, more = ({name: x for name, x in some.items() if keep(name)} for some in (made, more))
    made, off, first = agreeing(made, work, reference(work))
    counts = {name: contender.counted() for name, contender in made.items()}
    rows = []
    for what in passes:
        seconds = {}
        for threads in settings:
            torch.set_num_threads(threads)
            if what == FORWARD:
                calls = {name: contender.forward for name, contender in made.items()}
            else:
                calls = {name: contender.both for name, contender in (made | more).items()}
            calls["f"] = functools.partial(raw, work)
            found = in_turns(calls, given.rounds, warmup=1, device=given.device)
            seconds = {k: best(seconds.get(k), (found[k], threads)) for k in found}
        rows += [row(work, what, name, seconds, counts, off, first) for name in seconds if name != "f"]
    notes = [
        f"{work.what}; rtol = atol = {work.tolerance}" + ("" if work.t1 != 1.0 else "; t from 0 to 1"),
        f"{given.rounds} rounds; ms are medians over them; ratios the medians of the ratios of every round, or ratios "
        "of medians where the threads differ; spread the interquartile range over the median",
        "NFE x f: calls of f in one solve, times a raw call; µs around an attempt: what is left of the time without "
        "these, by the attempts; rows / needed: samples in all calls of f, by what the samples need alone",
        "peers with their dopri5, differentiated through the solver; ours with the default adjoint, checkpointed",
        "first call: with its compilation, or with what the compiler had in its cache",
        *(f"{peer} is not installed, left out" for peer in PEERS if not installed(peer)),
        *claims(part, rows),
    ]
    return rows, notes, " or ".join(map(str, settings))


def on_device(work: Workload, device: str) -> Workload:
    """The workload there."""
    return dataclasses.replace(work, f=work.f.to(device), z0=work.z0.to(device))


def raw(work: Workload):
    """One call of f."""
    with torch.no_grad():
        work.f(work.z0.new_zeros(()), work.z0)


def best(a: tuple[list[float], int] | None, b: tuple[list[float], int]) -> tuple[list[float], int]:
    """Of two measurements (seconds, threads) the one with the lower median."""
    return b if a is None or statistics.median(b[0]) < statistics.median(a[0]) else a


def ratio(mine: tuple[list[float], int], theirs: tuple[list[float], int]) -> float:
    """Mine / theirs, of (seconds, threads)."""
    if mine[1] == theirs[1]:
        return median_ratio(mine[0], theirs[0])
    return statistics.median(mine[0]) / statistics.median(theirs[0])


def row(work: Workload, what: str, name: str, seconds: dict, counts: dict, off: dict, first: dict) -> dict:
    """A contender's figures."""
    own, plain = seconds[name], name.removesuffix(f", {PENALTY}")
    made = {"workload": work.name, "pass": what, "contender": name, "threads": own[1]}
    made["ms"] = statistics.median(own[0]) * 1e3
    for peer in PEERS:
        made[f"/ {peer}"] = ratio(own, seconds[peer]) if peer in seconds else None
    made["/ without"] = ratio(own, seconds[plain]) if plain != name else None
    count = counts.get(name) if what == FORWARD else None
    made["NFE"] = count and count.nfe
    made["/ NFE x f"] = count and ratio(own, ([count.nfe * s for s in seconds["f"][0]], seconds["f"][1]))
    f = statistics.median(seconds["f"][0])
    made["µs around an attempt"] = count and (statistics.median(own[0]) - count.nfe * f) / count.attempts * 1e6
    made["rows / needed"] = count.rows / count.needed if count and count.needed else None
    made["spread"] = spread(own[0])
    made["error / tolerance"] = off.get(name) if what == FORWARD else None
    made["first call, s"] = first.get(name) if what == FORWARD else None
    return made


def claims(part: str, rows: list[dict]) -> list[str]:
    """Whether they hold, of those that were measured."""
    found = {(r["pass"], r["contender"]): r for r in rows}
    made = []
    for where, what, name, column, limit in CLAIMS:
        row = found.get((what, name), {})
        if where != part or row.get(column) is None:
            continue
        label, noise = LABELS.get(column), 0.0
        if label is None:
            label, noise = f"time {column}", row["spread"]
        made.append(verdict(f"{part}, {what}, {name}, {label}", row[column], limit, noise=noise))
    return made


# -- compaction ------------------------------------------------------------------------------------------------------


def compaction(part: str, given: argparse.Namespace) -> tuple[list[dict], list[str], str]:
    """When finished samples should leave the batch: rows of V and of wider ones, the notes, the threads in words."""
    torch.set_num_threads(1)
    works = [on_device(oscillators(spread=s, batch=n), given.device) for s in (1.0, 2.0) for n in (256, 4096)]
    settings = {(share, after): None for share in (0.0, 0.25, 0.5, 0.75, 0.9) for after in (0, 16, 64)}
    settings = {(share, after): None for share, after in settings if share or not after}
    kept, rows = (loop._COMPACT_FRACTION, loop._COMPACT_AFTER), []
    for work in works:
        contender = Ours(work, "dopri5", "per_sample", compile=False)

        def solve(share, after, contender=contender):
            loop._COMPACT_FRACTION, loop._COMPACT_AFTER = share, after
            return contender.forward()

        try:
            seconds = in_turns({key: functools.partial(solve, *key) for key in settings}, given.rounds, 0.0, warmup=1)
            for key in settings:
                solve(*key)
                count, middle = contender.counted(), statistics.median(seconds[key])
                made = {
                    "workload": work.what,
                    "unfinished share": key[0],
                    "attempts between": key[1],
                    "ms": middle * 1e3,
                }
                made["/ now"] = median_ratio(seconds[key], seconds[kept])
                rows.append(made | {"rows / needed": count.rows / count.needed, "spread": spread(seconds[key])})
        finally:
            loop._COMPACT_FRACTION, loop._COMPACT_AFTER = kept
    notes = [
        "finished samples leave the batch once at most the unfinished share of it is left, and some attempts have "
        "passed since they did last; 0: never",
        f"now: {kept[0]} and {kept[1]}; forward, eager, {given.rounds} rounds: medians, and those of their ratios",
    ]
    return rows, notes, "1"


# -- curves ------------------------------------------------------------------------------------------------------------


def curve(part: str, given: argparse.Namespace) -> tuple[list[dict], list[str], str]:
    """The rows of a family of workloads, the notes, and the threads in words; draws the picture."""
    make, values, control, axis, title = CURVES[part]
    keep = functools.partial(wanted, only=given.only)
    torch.set_num_threads(1)
    works, made, off, counts, calls = {}, {}, {}, {}, {}
    for value in values:
        work = works[value] = on_device(make(value), given.device)
        found = peers(work, control == "per_sample", keep)
        found |= {name: x for name, x in ours(work, control).items() if keep(name)}
        made[value], off[value], _ = agreeing(found, work, reference(work))
        counts[value] = {name: contender.counted() for name, contender in made[value].items()}
        calls |= {(value, name): contender.forward for name, contender in made[value].items()}
        calls[value, "f"] = functools.partial(raw, work)
    # All of the curve in every round: a machine that slows down for a while bends no curve.
    seconds = in_turns(calls, given.rounds, warmup=1, device=given.device)
    rows = []
    for value, work in works.items():
        f = statistics.median(seconds[value, "f"])
        for name in made[value]:
            middle, count = statistics.median(seconds[value, name]), counts[value][name]
            rows.append(
                {
                    axis: value,
                    "contender": name,
                    "NFE": count.nfe,
                    "attempts": count.attempts,
                    "ms": middle * 1e3,
                    "µs around an attempt": (middle - count.nfe * f) / count.attempts * 1e6,
                    "rows / needed": count.rows / count.needed if count.needed else None,
                    "spread": spread(seconds[value, name]),
                    "error / tolerance": off[value][name],
                    "error": off[value][name] * work.tolerance,
                }
            )
    first, *_, last = works.values()
    notes = [
        f"first: {first.what}, rtol = atol = {first.tolerance}; last: {last.what}, rtol = atol = {last.tolerance}",
        f"forward, {given.rounds} rounds, medians; error: the largest |z - z(t1)| / (1 + |z(t1)|)",
        *(f"{peer} is not installed, left out" for peer in PEERS if not installed(peer)),
        *linear(part, rows, axis),
    ]
    draw(rows, part, axis, title, given.results / f"{stem(part, given)}.png")
    return rows, notes, "1"


def linear(part: str, rows: list[dict], axis: str) -> list[str]:
    """Whether time is linear in the attempts, and in the batch beyond saturation."""
    found = []
    for name in dict.fromkeys(row["contender"] for row in rows if row["contender"].startswith(("eager", "compiled"))):
        own = [row for row in rows if row["contender"] == name]
        ms = np.array([row["ms"] for row in own])
        if part == "steps":
            x = np.array([row["attempts"] for row in own])
            slope, start = np.polyfit(x, ms, 1, w=1 / ms)
            off = float(np.abs((start + slope * x) / ms - 1).max())
            line = f"{start:.2f} ms + {slope * 1e3:.0f} µs per attempt"
            found.append(verdict(f"{name}, time off the line {line}", off, 0.15))
        if part == "batch":
            per = ms / np.array([row["NFE"] * row[axis] for row in own])
            found.append(
                verdict(f"{name}, time per sample and NFE, the largest batch's over the next", per[-1] / per[-2], 1.1)
            )
    return found


def draw(rows: list[dict], part: str, axis: str, title: str, path):
    """Time along the curve, and against evaluations of f or against the error."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    other = "error" if part == "precision" else "NFE"
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        style = "-" if name.startswith("compiled") else "--" if name.startswith("eager") else ":"
        for panel, x in zip(panels, (axis, other), strict=True):
            panel.loglog([row[x] for row in own], [row["ms"] for row in own], style, marker="o", label=name)
    for panel, x in zip(panels, (axis, other), strict=True):
        panel.set_xlabel(x)
        panel.set_ylabel("ms")
    panels[0].legend(fontsize=7)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def stem(part: str, given: argparse.Namespace) -> str:
    """What a part's files are called."""
    return f"speed_{part}" if given.device == "cpu" else f"speed_{part}_{given.device}"


def main():
    """Measures, prints tables and writes them to results/."""
    options = parser(__doc__.splitlines()[0])
    parts = dict.fromkeys(TABLES, table) | {"compaction": compaction} | dict.fromkeys(CURVES, curve)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all without it")
    options.add_argument("--rounds", type=int, default=7, help="measurements of every contender, at least 7")
    options.add_argument("--only", nargs="+", metavar="NAME", help="the contenders whose names begin like that")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = options.parse_args()
    if given.rounds < 7:
        options.error("--rounds must be at least 7")
    if not parts.keys() >= set(given.parts):
        options.error(f"parts are {', '.join(parts)}")
    for part in given.parts or parts:
        rows, notes, threads = parts[part](part, given)
        empty = [column for column in rows[0] if all(row[column] is None for row in rows)]
        rows = [{column: x for column, x in row.items() if column not in empty} for row in rows]
        versions = tuple(peer for peer in PEERS if installed(peer))
        write(given.results, stem(part, given), rows, threads, notes, versions)


if __name__ == "__main__":
    main()
