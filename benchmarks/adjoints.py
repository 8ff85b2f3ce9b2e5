"""Every adjoint beside the others: memory, time and gradients of a training step through 20, 100 and 500 steps.

Memory is that of one forward and backward pass, in a process of its own:

- peak: bytes of tensors alive at the peak, counted by a TorchDispatchMode (`common.AliveBytes`). It depends on the
  program alone, so this is the one to compare and to claim. The profiler's record of the CPU allocator has the same
  peak to the kilobyte, but no public list of its events.
- kept: the bytes alive between the two passes, which is what the forward pass holds for the backward one.
- figures: the part of the peak that is no state: times, step sizes, errors and the like, a few numbers per sample and
  step, which every adjoint keeps for `solution.steps`.
- resident, with --resident: growth of the process's peak resident memory, which is what a machine runs out of. It
  varies from run to run, and has the kernels' scratch memory and the allocator's gaps in it.
- allocated, with --device cuda: the allocator's own peak, torch.cuda.max_memory_allocated.

Time is taken in turns, in one process. Gradients, those of the parameters and of z0, are compared in float64 on a small
problem of the same kind with finite differences of an accurate solve, in some random directions, and with "direct" on
the same steps.
"""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import AliveBytes, PeakResident, in_turns, parser, verdict, write
from torch import Tensor, nn

import neuralde as nde
import regularizers as reg

SOLVER, TOLERANCE, CHECKPOINTS = "tsit5", 1e-5, 10
FIXED = nde.StepControl(adaptive=False)
STEPS, ROUNDS = (20, 100, 500), {20: 5, 100: 3, 500: 1}
PARTS = ("memory", "time", "gradients")


@dataclass(frozen=True)
class Contender:
    """An adjoint with its options, and what is claimed of its memory.

    Attributes:
        kind, options: the class in `neuralde.adjoints`, and its arguments.
        growth: states per step that the peak grows by at most; None: nothing is claimed, or, of "direct", the least.
        bare: whether the figures are left out of that. Where no state is kept they are all that grows.
        discrete: whether its gradient is that of the steps made, and may go through a global penalty.
    """

    kind: str
    options: dict = field(default_factory=dict)
    growth: float | None = None
    bare: bool = False
    discrete: bool = False

    def make(self) -> nde.adjoints.Adjoint:
        """The adjoint."""
        return getattr(nde.adjoints, self.kind)(**self.options)


def contenders(backward: str = "same") -> dict[str, Contender]:
    """Those to compare, by name.

    Args:
        backward: how the adjoint equations are solved: "adaptive", or with the "same" steps as the equation.
    """
    # A backward solve inherits the fixed steps, unless it is given a solver of its own.
    own = {"solver": SOLVER} if backward == "adaptive" else {}
    few = {"checkpoints": CHECKPOINTS}
    # With checkpoints, the steps between two of them are made again, and their states are there at the same time.
    return {
        "direct": Contender("Direct", discrete=True),
        "checkpointed": Contender("Checkpointed", growth=1.6, discrete=True),
        f"checkpointed ({CHECKPOINTS})": Contender("Checkpointed", few, growth=0.2, bare=True, discrete=True),
        "backsolve": Contender("Backsolve", own, growth=0.1, bare=True),
        f"backsolve ({CHECKPOINTS})": Contender("Backsolve", own | few, growth=0.1, bare=True),
        "interpolating": Contender("Interpolating", own, growth=1.6),
        f"interpolating ({CHECKPOINTS})": Contender("Interpolating", own | few, growth=0.2, bare=True),
        "quadrature": Contender("Quadrature", own),
    }


def penalty(loss: str) -> reg.Regularizer | None:
    """The penalty that the loss has beside it; a local one draws the same times whenever it is made."""
    if loss == "plain":
        return None
    return reg.GlobalError() if loss == "GlobalError" else reg.LocalError(generator=torch.Generator().manual_seed(0))


LOSSES = ("plain", "LocalError", "GlobalError")


@dataclass(frozen=True)
class Size:
    """Of a problem: `features`-`width`-`width`-`features` network, weights times `scale`, `batch` samples."""

    batch: int
    features: int
    width: int
    dtype: torch.dtype
    scale: float = 1.0

    @property
    def state(self) -> int:
        """The bytes of one state of the batch."""
        return self.batch * self.features * self.dtype.itemsize


LARGE, SMALL = Size(512, 64, 256, torch.float32), Size(8, 4, 32, torch.float64, scale=4.0)
LAYERS = 3


def problem(
    adjoint, steps: int, size: Size = LARGE, device: str = "cpu", solver=SOLVER
) -> tuple[nde.NeuralODE, Tensor]:
    """A layer that takes so many steps on [0, 1], and its input."""
    torch.manual_seed(0)
    ends = size.features, size.width, size.width, size.features
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(ends)]
    for p in itertools.chain(*(x.parameters() for x in linear)):
        p.data *= size.scale
    net = nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2]).to(size.dtype)
    options = {"solver": solver, "control": FIXED, "dt0": 1.0 / steps, "rtol": TOLERANCE, "atol": TOLERANCE}
    layer = nde.NeuralODE(net, adjoint=adjoint, **options).to(device)
    return layer, torch.randn(size.batch, size.features, dtype=size.dtype).to(device).requires_grad_()


def loss_of(layer: nde.NeuralODE, z0: Tensor, added: reg.Regularizer | None) -> Tensor:
    """The loss. A sum: the cotangents of the states are of the size of the states, whatever the batch."""
    loss = 0.5 * layer(z0).square().sum()
    return loss if added is None else loss + added(layer)


# -- memory ------------------------------------------------------------------------------------------------------------


def figure(x: Tensor) -> bool:
    """Whether a tensor has numbers of samples, but no features: [..., batch] or, of all steps, [steps·batch].

    A state may be flat too, which looks the same where the steps are a multiple of the features: 64, 128, ...
    """
    last = x.shape[-1] if x.dim() else 0
    return last > 0 and last % LARGE.batch == 0 and last % (LARGE.batch * LARGE.features) > 0


def memory(name: str, loss: str, steps: int, device: str, backward: str, what: str) -> dict[str, int]:
    """Bytes of one training step over those just before it.

    Args:
        name, loss, steps, device, backward: of the training step.
        what: "tensors" (peak, kept and figures), "resident" or "allocated".
    """
    torch.set_num_threads(1)
    adjoint, added = contenders(backward)[name].make(), penalty(loss)
    # Two steps first: libraries load and take their own memory when they are first used.
    layer, z0 = problem(adjoint, 2, device=device)
    loss_of(layer, z0, added).backward()
    layer, z0 = problem(adjoint, steps, device=device)
    for x in (z0, *layer.parameters()):
        x.grad = torch.zeros_like(x)  # gradients are there already, so that they belong to the state before
    if what == "tensors":
        with AliveBytes(apart=figure) as alive:
            value = loss_of(layer, z0, added)
            kept = alive.alive
            value.backward()
        found = {"peak": alive.peak, "kept": kept, "figures": alive.peak_apart}
    elif what == "resident":
        resident = PeakResident()
        loss_of(layer, z0, added).backward()
        found = {what: resident.growth()}
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(layer, z0, added).backward()
        found = {what: torch.cuda.max_memory_allocated() - before}
    if int(layer.solution.stats.accepted[0]) != steps:
        raise AssertionError(f"{steps} steps were asked for, {layer.solution.stats} were made")
    return found


def apart(*arguments) -> dict[str, int]:
    """`memory` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# -- time --------------------------------------------------------------------------------------------------------------


class Timed:
    """A training step; the seconds of every call's forward pass in `forward`."""

    def __init__(self, contender: Contender, loss: str, steps: int, device: str):
        self.layer, self.z0 = problem(contender.make(), steps, device=device)
        self.added, self.device = penalty(loss), device
        self.forward: list[float] = []

    def __call__(self):
        """Forward and backward."""
        start = time.perf_counter()
        loss = loss_of(self.layer, self.z0, self.added)
        self._wait()
        self.forward.append(time.perf_counter() - start)
        loss.backward()
        self.layer.solution = None
        self._wait()

    def _wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def times(some: dict[str, Contender], loss: str, steps: int, device: str) -> dict[str, dict[str, float]]:
    """Name -> median seconds of the forward and of the backward pass."""
    for contender in some.values():
        Timed(contender, loss, 2, device)()
    calls = {name: Timed(contender, loss, steps, device) for name, contender in some.items()}
    seconds = in_turns(calls, ROUNDS.get(steps, 3), least=0, warmup=0)  # one call each, as `forward` has it
    return {
        name: {
            "forward, s": statistics.median(call.forward),
            "backward, s": statistics.median(a - b for a, b in zip(seconds[name], call.forward, strict=True)),
        }
        for name, call in calls.items()
    }


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradient(contender: Contender, loss: str, steps: int) -> list[Tensor]:
    """With respect to z0 and the parameters, of the small problem."""
    layer, z0 = problem(contender.make(), steps, SMALL)
    return list(torch.autograd.grad(loss_of(layer, z0, penalty(loss)), [z0, *layer.parameters()]))


def directions(count: int = 8) -> Iterator[list[Tensor]]:
    """Random changes of z0 and the parameters, of norm 1."""
    layer, z0 = problem("direct", 1, SMALL)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        drawn = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (z0, *layer.parameters())]
        yield [x / norm(drawn) for x in drawn]


@torch.no_grad()
def differences(h: float = 5e-4) -> Tensor:
    """Derivatives of the plain loss in the `directions`, by fourth-order central differences of an accurate solve.

    Its steps are fixed: the loss is a smooth function then.
    """
    layer, z0 = problem("direct", 64, SMALL, solver="dopri8")
    points = [z0, *layer.parameters()]
    origin = [x.clone() for x in points]

    def value(direction: list[Tensor], by: float) -> Tensor:
        for x, start, change in zip(points, origin, direction, strict=True):
            x.copy_(start + by * change)
        return loss_of(layer, z0, None)

    found = []
    for direction in directions():
        far, near = (value(direction, n * h) - value(direction, -n * h) for n in (2, 1))
        found.append((8 * near - far) / (12 * h))
    return torch.stack(found)


def norm(tensors: list[Tensor]) -> Tensor:
    """Of all of their numbers."""
    return torch.stack([x.norm() for x in tensors]).norm()


def errors(
    some: dict[str, Contender], loss: str, steps: int, exact: Tensor | None
) -> dict[str, dict[str, float | None]]:
    """Name -> relative errors of the gradient against finite differences (`exact`) and against "direct"."""
    direct = gradient(contenders()["direct"], loss, steps)
    found = {}
    for name, contender in some.items():
        mine = gradient(contender, loss, steps)
        along = torch.stack([sum((a * b).sum() for a, b in zip(mine, d, strict=True)) for d in directions()])
        off = [a - b for a, b in zip(mine, direct, strict=True)]
        found[name] = {
            # A penalty on the steps made is no function of the continuous solution.
            "error, differences": None if exact is None else float((along - exact).norm() / exact.norm()),
            "error, direct": float(norm(off) / norm(direct)),
        }
    return found


# -- claims ------------------------------------------------------------------------------------------------------------


def growth(rows: dict[tuple, dict], name: str, figure_too: bool, loss: str = "plain") -> float:
    """States per step that the peak grows by: a straight line through all step counts."""
    points = {steps: row for (other, steps, at), row in rows.items() if other == loss and at == name}
    peaks = [row["peak"] - (0 if figure_too else row["figures"]) for row in points.values()]
    return statistics.linear_regression(list(points), peaks).slope / LARGE.state


def memory_claims(rows: dict[tuple, dict], names: list[str], steps: list[int]) -> Iterator[str]:
    """What is claimed of the peaks in `rows`, (loss, steps, name) -> `memory`."""
    least, most = min(steps), max(steps)
    if least < most:
        span = f"states per step between {least} and {most} steps"
        for name in names:
            contender, bare, all_of_it = contenders()[name], growth(rows, name, False), growth(rows, name, True)
            if name == "direct":
                stages = nde.solvers.get(SOLVER).calls_per_step
                yield verdict(f"{name}, {span}: stages x layers", all_of_it, stages * LAYERS, least=True)
            elif contender.growth is not None:
                what = f", without the figures, {all_of_it - bare:.3f}" if contender.bare else ""
                yield verdict(f"{name}, {span}{what}", bare if contender.bare else all_of_it, contender.growth)
            else:
                yield f"{name}, {span}: {bare:.3f}, and {all_of_it - bare:.3f} of figures"
        for name in names:
            if ("LocalError", most, name) not in rows:
                continue
            extra = {
                n: bare_peak(rows["LocalError", n, name]) - bare_peak(rows["plain", n, name]) for n in (least, most)
            }
            claim = f"{name}, states that LocalError adds at {most} steps over those at {least}, without the figures"
            yield verdict(claim, (extra[most] - extra[least]) / LARGE.state, 1.0)
    for name in names:
        if name == "direct" or ("GlobalError", most, name) not in rows:
            continue
        ratio = max(rows["GlobalError", n, name]["peak"] / rows["plain", n, name]["peak"] for n in (least, most))
        yield verdict(f"{name}, peak with GlobalError over the plain one, {least} or {most} steps", ratio, 1.3)
    for loss in LOSSES:
        direct, checkpointed = (rows.get((loss, most, name)) for name in ("direct", "checkpointed"))
        if direct and checkpointed and most >= 100:  # with few steps the tape of one of them counts
            for what in sorted({"peak", "resident", "allocated"} & set(direct)):
                claim = f"{loss}, {most} steps, {what}, checkpointed over direct"
                yield verdict(claim, checkpointed[what] / direct[what], 0.2)


def bare_peak(row: dict) -> int:
    """The peak without the figures."""
    return row["peak"] - row["figures"]


def gradient_claims(rows: dict[tuple, dict], names: list[str]) -> Iterator[str]:
    """What is claimed of the errors in `rows`, (loss, steps, name) -> `errors`."""
    for name in names:
        mine = [row for (_, _, at), row in rows.items() if at == name]
        off = [row["error, differences"] for row in mine if row["error, differences"] is not None]
        if off:
            claim = f"{name}, error against finite differences, over the tolerance, at most over the steps"
            yield verdict(claim, max(off) / TOLERANCE, 10.0)
        if contenders()[name].discrete and name != "direct":
            claim = f"{name}, error against direct, at most over losses and steps"
            yield verdict(claim, max(row["error, direct"] for row in mine), 1e-10)


# -- all of it ---------------------------------------------------------------------------------------------------------


def read(results: Path) -> dict[str, dict[tuple, dict]]:
    """The parts in the .csv of an earlier run: memory depends on the program alone, time needs a quiet machine."""
    found: dict[str, dict[tuple, dict]] = {part: {} for part in PARTS}
    with results.open(newline="") as file:
        for row in csv.DictReader(file):
            case = row["loss"], int(row["steps"]), row["adjoint"]
            for title, value in row.items():
                if title.endswith(", MiB") and value:
                    found["memory"].setdefault(case, {})[title.removesuffix(", MiB")] = round(float(value) * 2**20)
                elif title.endswith(", s") and value:
                    found["time"].setdefault(case, {})[title] = float(value)
                elif title.startswith("error, ") and row["error, direct"]:
                    found["gradients"].setdefault(case, {})[title] = float(value) if value else None
    return found


def mib(value: int | None) -> float | None:
    """Bytes as MiB."""
    return None if value is None else value / 2**20


def table(measured: dict[str, dict[tuple, dict]], cases: list[tuple[str, int, str]]) -> list[dict]:
    """One row per (loss, steps, name), with a column for all that was measured of any."""
    columns = {part: list(dict.fromkeys(c for row in rows.values() for c in row)) for part, rows in measured.items()}
    made = []
    for case in cases:
        row = dict(zip(("loss", "steps", "adjoint"), case, strict=True))
        for part, titles in columns.items():
            found = measured[part].get(case, {})
            if part == "memory":
                row |= {f"{title}, MiB": mib(found.get(title)) for title in titles}
            else:
                row |= {title: found.get(title) for title in titles}
        made.append(row)
    return made


def arguments(known: dict[str, Contender]):
    """The command line."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, nargs="+", default=STEPS)
    options.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    options.add_argument("--adjoints", nargs="+", choices=known, default=list(known), metavar="NAME")
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    options.add_argument(
        "--backward",
        choices=("adaptive", "same"),
        default="same",
        help="steps of the adjoint equations: the same as the equation's, or by their own error",
    )
    options.add_argument("--resident", action="store_true", help="the process's resident memory too")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--earlier", type=Path, metavar="CSV", help="results that have what is not measured now")
    options.add_argument("--jobs", type=int, default=2, help="processes at a time, for the memory")
    options.add_argument("--one", help="one measurement, for the process that this script starts")
    given = options.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        options.error("there is no CUDA device here")
    return given


def main():
    """Measures, prints a table and writes it to results/."""
    given = arguments(contenders())
    known = contenders(given.backward)
    if given.one:
        print(json.dumps(memory(*json.loads(given.one))))
        return
    torch.set_num_threads(1)
    names, steps = given.adjoints, sorted(given.steps)
    ends = sorted({steps[0], steps[-1]})
    cases = [
        (loss, n, name)
        for loss in given.losses
        for n in (steps if loss == "plain" else ends)
        for name in names
        if loss != "GlobalError" or known[name].discrete
    ]
    measured: dict[str, dict[tuple, dict]] = {part: {} for part in PARTS if part in given.only}
    if given.earlier is not None:
        measured |= {part: rows for part, rows in read(given.earlier).items() if part not in given.only and rows}
    measured = {part: measured[part] for part in PARTS if part in measured}
    claims = []
    if "memory" in given.only:
        kinds = ["tensors"] + ["resident"] * given.resident + ["allocated"] * (given.device == "cuda")
        setting = given.device, given.backward
        with ThreadPoolExecutor(given.jobs) as pool:
            tasks = {
                (loss, n, name): [pool.submit(apart, name, loss, n, *setting, what) for what in kinds]
                for loss, n, name in cases
            }
            for case, parts in tasks.items():
                measured["memory"][case] = {k: v for part in parts for k, v in part.result().items()}
    if "memory" in measured and "plain" in given.losses:
        claims += memory_claims(measured["memory"], names, steps)
    for loss in given.losses:
        exact = differences() if "gradients" in given.only and loss == "plain" else None
        # A round of 500 steps takes minutes, and a penalty's part of the time is seen with few.
        for n in steps if loss == "plain" else steps[:1]:
            here = {name: known[name] for other, at, name in cases if (other, at) == (loss, n)}
            if "time" in given.only:
                measured["time"] |= {(loss, n, k): v for k, v in times(here, loss, n, given.device).items()}
            if "gradients" in given.only:
                measured["gradients"] |= {(loss, n, k): v for k, v in errors(here, loss, n, exact).items()}
    if "gradients" in measured:
        claims += gradient_claims(measured["gradients"], names)
    notes = [*described(measured, given.device, given.backward), *claims]
    title = "adjoints" if given.backward == "same" else "adjoints_adaptive"
    write(given.results, title, table(measured, cases), "1", notes)


def described(measured: dict, device: str, backward: str) -> Iterator[str]:
    """What was measured, and how."""
    steps = f"adaptive, rtol = atol = {TOLERANCE}" if backward == "adaptive" else "the same ones"
    net = "{0.features}-{0.width}-{0.width}-{0.features} tanh network, batch {0.batch}"
    yield f"{SOLVER}, fixed steps on [0, 1]; the steps of the adjoint equations: {steps}"
    yield "a number in brackets: of checkpoints; loss: half the sum of squares of z(1), with weight 1 the penalty"
    yield "with a penalty: memory at the fewest and the most steps, the others at the fewest"
    if "memory" in measured:
        yield f"memory: {net.format(LARGE)}, float32, {device}; one state is {mib(LARGE.state):.3g} MiB"
    if "time" in measured:
        rounds = ", ".join(f"{k} at {n} steps" for n, k in ROUNDS.items())
        yield f"time: the same problem, {device}; medians over rounds: {rounds}"
    if "gradients" in measured:
        yield (
            f"gradients, of the parameters and z0: {net.format(SMALL)}, float64, weights times {SMALL.scale:g}; "
            "relative errors: in random directions against fourth-order central differences of an accurate solve, "
            "and in norm against direct, the same steps"
        )


if __name__ == "__main__":
    main()
