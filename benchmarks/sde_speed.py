"""Forward and backward of a Neural SDE against torchsde's adaptive srk at equal strong error; and 10⁶ steps.

Both solve along the same Brownian paths when their errors are measured, ours from a neuralde.BrownianTree, torchsde's
from the same tree behind its interface. Then each has its own noise, and is timed.

A linear diffusion that mixes the components, as the papers' has, is no diagonal noise in the strict sense: the noise
does not commute, and all methods, some of strong order 1.5 where it does, have order 0.5. So
Euler-Maruyama is a contender.
"""

from __future__ import annotations

import functools
import math
import resource
import signal
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchsde
from common import in_turns, median_ratio, parser, spread, verdict, write
from torch import Tensor, nn

import neuralde as nde

FEATURES, HIDDEN, BATCH = 32, 64, 512
TOLERANCES = (1e-1, 1e-2)  # of torchsde
SOLVERS = ("sosri", "sosri2")
COMPILED = ("sosri", "sosri2")  # those that are measured with compile=True as well
FINE = 1024  # steps of the reference
EAGER = 10_000  # steps at most without compiling
LIMIT = 30.0  # seconds of the processor that a solve of torchsde's has for a long horizon


class Coefficients(nn.Module):
    """The SDE in torchsde's form: f and g of (t, y)."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self):
        super().__init__()
        self.drift = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES))
        self.diffusion = nn.Linear(FEATURES, FEATURES)

    def f(self, t, y: Tensor) -> Tensor:
        """The drift."""
        return self.drift(y)

    def g(self, t, y: Tensor) -> Tensor:
        """The diffusion."""
        return self.diffusion(y)

    def equation(self) -> nde.SDE:
        """The same as one of neuralde's."""
        return nde.SDE(self.f, self.g)


class Shared:
    """A neuralde tree as torchsde asks for noise: W, and the integral of the path over the interval.

    Args:
        tree: bound paths. z0: of the solve.
    """

    levy_area_approximation = "space-time"

    def __init__(self, tree, z0: Tensor):
        self.tree, self.shape, self.dtype, self.device = tree, z0.shape, z0.dtype, z0.device

    def __call__(self, ta, tb, return_U: bool = False, return_A: bool = False):
        """The increment, or the increment and the integral."""
        times = torch.tensor([[float(ta)], [float(tb)]], dtype=torch.float64)
        w, h = self.tree.between(times)[0]
        return (w, (float(tb) - float(ta)) * (h + 0.5 * w)) if return_U else w


# -- solves ------------------------------------------------------------------------------------------------------------


def ours(sde: Coefficients, z0: Tensor, solver: str, tolerance: float, brownian=None, compile: bool = False) -> Tensor:
    """z(1) by neuralde, one step size for the batch, as torchsde has it."""
    options = {"solver": solver, "control": "joint", "rtol": tolerance, "atol": tolerance, "compile": compile}
    options |= {} if compile else {"adjoint": "direct"}
    return nde.solve(sde.equation(), z0, (0.0, 1.0), brownian=brownian, **options).final


def stepping(sde: Coefficients, z0: Tensor, steps: int, brownian=None, compile: bool = False) -> Tensor:
    """z(1) by neuralde's euler_maruyama in so many equal steps."""
    control = nde.StepControl(per_sample=False, adaptive=False)
    options = {"solver": "euler_maruyama", "dt0": 1 / steps, "control": control, "compile": compile}
    options |= {} if compile else {"adjoint": "direct"}
    return nde.solve(sde.equation(), z0, (0.0, 1.0), brownian=brownian, **options).final


def theirs_stepping(sde: Coefficients, z0: Tensor, steps: int) -> Tensor:
    """The same by torchsde."""
    brownian = torchsde.BrownianInterval(0.0, 1.0, size=tuple(z0.shape), dtype=z0.dtype, dt=1 / steps, cache_size=None)
    ts = torch.tensor([0.0, 1.0], dtype=z0.dtype)
    return torchsde.sdeint(sde, z0, ts, bm=brownian, method="euler", dt=1 / steps)[-1]


def theirs(sde: Coefficients, z0: Tensor, tolerance: float, dt: float, brownian=None) -> Tensor:
    """z(1) by torchsde: its interval with the hint and the cache that make it quick."""
    if brownian is None:
        options = {"dt": dt, "cache_size": None, "levy_area_approximation": "space-time"}
        brownian = torchsde.BrownianInterval(0.0, 1.0, size=tuple(z0.shape), dtype=z0.dtype, **options)
    ts = torch.tensor([0.0, 1.0], dtype=z0.dtype)
    options = {"method": "srk", "adaptive": True, "rtol": tolerance, "atol": tolerance, "dt": dt}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchsde.sdeint(sde, z0, ts, bm=brownian, **options)[-1]


@dataclass
class Trial:
    """Paths to measure errors on: the SDE in float64, a seed of the noise, and where the paths end."""

    sde: Coefficients
    z0: Tensor
    seed: int
    exact: Tensor

    def brownian(self) -> nde.BrownianTree:
        """A tree that nobody has asked yet."""
        return nde.BrownianTree(self.seed)

    def error(self, z: Tensor) -> float:
        """The strong error: the root of the mean square over paths and components."""
        return (z - self.exact).square().mean().sqrt().item()

    def of_ours(self, solver: str, tolerance: float) -> float:
        """See `error`."""
        return self.error(ours(self.sde, self.z0, solver, tolerance, self.brownian()))

    def of_theirs(self, tolerance: float, dt: float) -> float:
        """See `error`."""
        horizon = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        tree = self.brownian().bind(*horizon, BATCH, FEATURES, torch.float64)
        return self.error(theirs(self.sde, self.z0, tolerance, dt, Shared(tree, self.z0)))


@torch.no_grad()
def trial(seed: int) -> Trial:
    """A random network and its paths, with a reference in steps of 1/1024."""
    torch.manual_seed(seed)
    sde, z0 = Coefficients().double(), torch.randn(BATCH, FEATURES, dtype=torch.float64)
    options = {"solver": "sosri", "dt0": 1 / FINE, "control": nde.StepControl(per_sample=False, adaptive=False)}
    exact = nde.solve(sde.equation(), z0, (0.0, 1.0), brownian=nde.BrownianTree(seed), **options).final
    return Trial(sde, z0, seed, exact)


@torch.no_grad()
def matched(trials: list[Trial], solver: str, goal: float) -> tuple[float, float]:
    """The loosest of the tolerances 2^(k/2) whose error is at most `goal`, and that error."""

    def error(k: int) -> float:
        return statistics.fmean(x.of_ours(solver, 2.0 ** (k / 2)) for x in trials)

    low, high = -12, 10  # bisection: the error falls with the tolerance
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(middle) <= goal else (low, middle)
    return 2.0 ** (low / 2), error(low)


@torch.no_grad()
def matched_steps(trials: list[Trial], goal: float) -> tuple[int, float]:
    """The fewest of 4, 8, 16, ... steps of euler_maruyama whose error is at most `goal`, and that error."""
    steps = 4
    while True:
        found = statistics.fmean(x.error(stepping(x.sde, x.z0, steps, x.brownian())) for x in trials)
        if found <= goal:
            return steps, found
        steps *= 2


# -- the comparison ----------------------------------------------------------------------------------------------------


def counted(sde: Coefficients, solve: Callable[[], Tensor]) -> int:
    """Evaluations of drift and diffusion in a solve."""
    calls = []
    handles = [x.register_forward_hook(lambda *_: calls.append(1)) for x in (sde.drift, sde.diffusion)]
    solve()
    for handle in handles:
        handle.remove()
    return len(calls)


def backward(sde: Coefficients, z0: Tensor, solve: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Forward, and the gradients of half the sum of squares of z(1)."""
    z0 = z0.detach().requires_grad_()
    return list(torch.autograd.grad(0.5 * solve(z0).square().sum(), [z0, *sde.parameters()]))


def compare(trials: list[Trial], tolerance: float, rounds: int) -> tuple[list[dict], list[str]]:
    """The rows of one tolerance of torchsde's, and whether the claims hold."""
    dt = 0.5 * math.sqrt(tolerance)
    with torch.no_grad():
        goal = statistics.fmean(x.of_theirs(tolerance, dt) for x in trials)
    errors, tolerances = {"torchsde srk": goal}, {"torchsde srk": tolerance}
    sde, z0 = trials[0].sde.float(), trials[0].z0.float()
    solves = {"torchsde srk": functools.partial(theirs, sde, tolerance=tolerance, dt=dt)}
    trials[0].sde.double()
    for solver in SOLVERS:
        name = f"neuralde {solver}"
        tolerances[name], errors[name] = matched(trials, solver, goal)
        solves[name] = functools.partial(ours, sde, solver=solver, tolerance=tolerances[name])
    steps, found = matched_steps(trials, goal)
    for name, solve in (
        (f"neuralde euler_maruyama, {steps} steps", stepping),
        (f"torchsde euler, {steps} steps", theirs_stepping),
    ):
        tolerances[name], errors[name] = None, found
        solves[name] = functools.partial(solve, sde, steps=steps)
    sde.float()
    with torch.no_grad():
        calls = {name: counted(sde, functools.partial(solve, z0)) for name, solve in solves.items()}
    plain = [*(f"neuralde {solver}" for solver in COMPILED), f"neuralde euler_maruyama, {steps} steps"]
    for name in plain:  # the same solves
        for found in (tolerances, errors, calls):
            found[f"{name}, compiled"] = found[name]
        solves[f"{name}, compiled"] = functools.partial(solves[name], compile=True)

    def forward(solve):
        with torch.no_grad():
            return solve(z0)

    seconds = {
        "forward": in_turns({name: functools.partial(forward, x) for name, x in solves.items()}, rounds, 0.0, 1),
        "forward+backward": in_turns(
            {name: functools.partial(backward, sde, z0, x) for name, x in solves.items()}, rounds, 0.0, 1
        ),
    }
    sde.double()
    rows, best = [], {}
    for what, times in seconds.items():
        for name in solves:
            ratio = median_ratio(times["torchsde srk"], times[name])
            if name.startswith("neuralde"):
                adaptive = any(solver in name.split() or f"{solver}," in name.split() for solver in SOLVERS)
                for kind in ["methods", *["adaptive methods"] * adaptive]:
                    best[kind, what] = max(best.get((kind, what), 0.0), ratio)
            rows.append(
                {
                    "pass": what,
                    "contender": name,
                    "tolerance": tolerances[name],
                    "strong error": errors[name],
                    "evaluations": calls[name],
                    "ms": 1e3 * statistics.median(times[name]),
                    "torchsde's time over this": ratio,
                    "spread": spread(times[name]),
                }
            )
    claim = "torchsde at {}, {}: its time over that of the best of neuralde's {}"
    verdicts = [
        verdict(claim.format(tolerance, what, kind), ratio, 2.0, least=True) for (kind, what), ratio in best.items()
    ]
    for what, times in seconds.items():
        for name in plain:
            ratio = median_ratio(times[name], times[f"{name}, compiled"])
            claim = f"{name} at the error of torchsde at {tolerance}, {what}: its time over that of the same, compiled"
            verdicts.append(verdict(claim, ratio, 1.5, least=True))
    return rows, verdicts


# -- long horizons -----------------------------------------------------------------------------------------------------


class Decay(nn.Module):
    """dz = -z dt + 0.3 dW, one path of one component."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y: Tensor) -> Tensor:
        """The drift."""
        return -y

    def g(self, t, y: Tensor) -> Tensor:
        """The diffusion."""
        return torch.full_like(y, 0.3)


DECAY = Decay()


def long_ours(steps: int, compile: bool = False) -> nde.Solution:
    """So many steps of 1/20 by neuralde's euler_maruyama, with all states to be asked for."""
    z0, control = torch.ones(1, 1, dtype=torch.float64), nde.StepControl(per_sample=False, adaptive=False)
    options = {"solver": "euler_maruyama", "dt0": 0.05, "control": control, "max_steps": 2 * steps, "seed": 1}
    solution = nde.solve(nde.SDE(DECAY.f, DECAY.g), z0, (0.0, steps / 20), compile=compile, **options)
    if int(solution.stats.accepted[0]) != steps:
        raise AssertionError(f"{steps} steps were asked for, and {solution.stats.accepted[0]} made")
    return solution


def long_theirs(steps: int) -> Tensor:
    """So many steps of 1/20 by torchsde's euler, all else its default."""
    ts = torch.tensor([0.0, steps / 20], dtype=torch.float64)
    return torchsde.sdeint(Decay(), torch.ones(1, 1, dtype=torch.float64), ts, method="euler", dt=0.05)


@torch.no_grad()
def processor_seconds(solve: Callable[[int], object], steps: int, limit: float) -> tuple[float, float] | None:
    """Of the processor, for one solve, and the bytes by which the process grew with what the solve keeps.

    None where it takes more than the limit, and is given up.
    """

    def stop(*_):
        raise TimeoutError

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    began, before = time.process_time(), resident()
    try:
        kept = solve(steps)
        took = time.process_time() - began
        grown = resident() - before
        del kept
        return took, grown
    except TimeoutError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, old)


def resident() -> int:
    """The bytes that the process has now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def long(counts: list[int]) -> tuple[list[dict], list[str]]:
    """The rows of the long horizons, and whether the time is linear in the steps."""
    rows, each = [], []
    compiled = functools.partial(long_ours, compile=True)
    with torch.no_grad():
        compiled(200)  # makes the programs
    contenders = [("neuralde euler_maruyama, compiled", compiled, count, math.inf) for count in counts]
    contenders += [("neuralde euler_maruyama", long_ours, count, math.inf) for count in counts if count <= EAGER]
    contenders += [("torchsde euler", long_theirs, count, LIMIT) for count in (100, 1000, 10_000)]
    for name, solve, count, limit in contenders:
        seconds, grown = processor_seconds(solve, count, min(limit, 1e7)) or (None, None)
        found, grown = None if seconds is None else 1e6 * seconds / count, None if grown is None else grown / count
        rows.append(
            {"contender": name, "steps": count, "seconds": seconds, "µs per step": found, "bytes per step": grown}
        )
        if solve is compiled:
            each.append(found)
        print(rows[-1], flush=True)
    claim = f"{counts[-1]} steps, time per step over that of {counts[0]} steps"
    return rows, [verdict(claim, each[-1] / each[0], 1.5)]


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7, help="measurements of every contender, at least 7")
    options.add_argument("--long", type=int, nargs="*", help="numbers of steps: the long horizons, and nothing else")
    given = options.parse_args()
    if given.rounds < 7:
        options.error("--rounds must be at least 7")
    torch.set_num_threads(1)
    if given.long is not None:
        rows, verdicts = long(given.long or [1000, 10_000, 100_000, 1_000_000])
        notes = [
            "seconds of the processor, not of the clock: other programs may run; one path of one component, float64, "
            "no gradients; each measured once, the programs being made; bytes: what the solution keeps",
            f"torchsde with its defaults: no seconds where it had not ended after {LIMIT:.0f}",
            *verdicts,
        ]
        return write(given.results, "sde_long", rows, "1", notes, ("torchsde",))
    trials, rows, verdicts = [trial(0)], [], []
    for tolerance in TOLERANCES:
        more, judged = compare(trials, tolerance, given.rounds)
        rows += more
        verdicts += judged
    notes = [
        f"drift a {FEATURES}-{HIDDEN}-{FEATURES} tanh network, diffusion linear, default initialisation, diagonal Itô "
        f"noise, batch {BATCH} of randn, t from 0 to 1; loss: half the sum of squares of z(1)",
        "strong error: root mean square over paths and components in float64, against "
        f"sosri with {FINE} steps on the same paths; neuralde's tolerance is the loosest 2^(k/2) with at most "
        "torchsde's error; timed in float32, each with noise of its own",
        f"{given.rounds} rounds; ms are medians over them, ratios the medians of the ratios of every round, spread the "
        "interquartile range over the median",
        "euler_maruyama makes the fewest of 4, 8, 16, ... equal steps with at most torchsde's error; torchsde's euler, "
        "in as many, is there for comparison",
        *verdicts,
    ]
    return write(given.results, "sde_speed", rows, "1", notes, ("torchsde",))


if __name__ == "__main__":
    main()
