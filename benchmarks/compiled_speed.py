"""Compiled solves, forward and with their gradients, against the eager ones, torchdiffeq, torchdyn and diffrax.

diffrax is no dependency: without it (pip install diffrax), its rows are left out. Its solve is one jitted function, and
its gradient that of its default adjoint, recursive checkpointing. Compilation is not in any time but its own.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torchdiffeq
from common import (
    MATCHED,
    Workload,
    deviation,
    in_turns,
    median_ratio,
    medium,
    parser,
    reference,
    small,
    spread,
    verdict,
    write,
)
from torch import Tensor

import neuralde as nde
import regularizers as reg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchdyn.numerics import odeint as torchdyn_odeint

OURS = {
    "dopri5 joint, integral": ("dopri5", MATCHED),
    "dopri5 per_sample": ("dopri5", "per_sample"),
    "tsit5 joint, integral": ("tsit5", MATCHED),
}
FIRST = next(iter(OURS))
PENALTY = "GlobalError + GlobalStiffness"
PEERS = ("torchdiffeq", "torchdyn", "diffrax")
DIFFRAX = importlib.util.find_spec("diffrax") is not None

# (workload, pass, contender, peer, largest ratio that we want)
CLAIMS = (
    ("S", "forward", "torchdiffeq", 1 / 10),
    ("S", "forward", "torchdyn", 1 / 7),
    ("S", "forward", "diffrax", 2.5),
    ("S", "forward and backward", "torchdiffeq", 1 / 6),
    ("S", "forward and backward", "diffrax", 2.5),
    ("M", "forward", "f", 1.15),
    ("M", "forward", "diffrax", 1.0),
    ("M", "forward and backward", "torchdyn", 1.3),
)


class Contender:
    """What solves from z0: a function of z0 that returns z(1), and one that returns the loss to be differentiated."""

    def __init__(self, solve: Callable[[Tensor], Tensor], work: Workload, loss: Callable | None = None):
        self.solve, self.work = solve, work
        self.loss = loss or (lambda z0: 0.5 * solve(z0).square().sum())
        self.z0 = work.z0.clone().requires_grad_()

    def forward(self) -> Tensor:
        """z(1), without a gradient."""
        with torch.no_grad():
            return self.solve(self.work.z0)

    def both(self) -> list[Tensor]:
        """The gradients by z0 and the parameters."""
        return list(torch.autograd.grad(self.loss(self.z0), [self.z0, *self.work.f.parameters()]))


def ours(work: Workload, solver: str, control, compile: bool, penalized: bool = False) -> Contender:
    """A solve of neuralde."""
    options = {"solver": solver, "control": control, "rtol": work.tolerance, "atol": work.tolerance}
    equation = nde.ODE(work.f)

    def solve(z0):
        return nde.solve(equation, z0, (0.0, 1.0), compile=compile, **options)

    def loss(z0):
        solution = solve(z0)
        penalty = reg.GlobalError()(solution) + reg.GlobalStiffness()(solution)
        return 0.5 * solution.final.square().sum() + 1e-3 * penalty

    return Contender(lambda z0: solve(z0).final, work, loss if penalized else None)


def theirs(work: Workload) -> dict[str, Contender]:
    """dopri5 of torchdiffeq and torchdyn, differentiated through the solver."""
    ts, options = torch.tensor([0.0, 1.0]), {"rtol": work.tolerance, "atol": work.tolerance}
    return {
        "torchdiffeq": Contender(lambda z0: torchdiffeq.odeint(work.f, z0, ts, method="dopri5", **options)[-1], work),
        "torchdyn": Contender(lambda z0: torchdyn_odeint(work.f, z0, ts, solver="dopri5", **options)[1][-1], work),
    }


class Diffrax:
    """diffrax's Dopri5 with its integral controller, jitted."""

    def __init__(self, work: Workload):
        import diffrax
        import jax
        import jax.numpy as jnp

        net = work.f.net
        weights = [jnp.asarray(p.detach().numpy()) for p in net.parameters()]
        z0 = jnp.asarray(work.z0.numpy())
        control = diffrax.PIDController(rtol=work.tolerance, atol=work.tolerance)
        term = diffrax.ODETerm(lambda t, z, w: jnp.tanh(z @ w[0].T + w[1]) @ w[2].T + w[3])

        def solve(z0, w):
            found = diffrax.diffeqsolve(
                term, diffrax.Dopri5(), 0.0, 1.0, None, z0, w, stepsize_controller=control, max_steps=256
            )
            return found.ys[-1], found.stats["num_steps"]

        def loss(z0, w):
            return 0.5 * (solve(z0, w)[0] ** 2).sum()

        once, gradient = jax.jit(solve), jax.jit(jax.grad(loss, argnums=(0, 1)))
        self.forward = lambda: jax.block_until_ready(once(z0, weights))
        self.both = lambda: jax.block_until_ready(gradient(z0, weights))
        final, self.steps = self.forward()
        self.final = torch.tensor(jax.device_get(final))


def measure(work: Workload, rounds: int) -> tuple[list[dict], list[str]]:
    """The rows of a workload, and whether the claims hold."""
    torch.set_num_threads(work.threads)
    exact = reference(work)
    made: dict = theirs(work)
    if DIFFRAX:
        made["diffrax"] = Diffrax(work)
    for name, (solver, control) in OURS.items():
        for compile in (False, True):
            made[f"{'compiled' if compile else 'eager'} {name}"] = ours(work, solver, control, compile)
    for compile in (False, True):
        kind = "compiled" if compile else "eager"
        made[f"{kind} {FIRST}, {PENALTY}"] = ours(work, *OURS[FIRST], compile, penalized=True)
    compiling = {}
    for name, contender in made.items():
        start = time.perf_counter()
        final = contender.forward()
        middle = time.perf_counter()
        contender.both()
        compiling[name] = middle - start, time.perf_counter() - middle
        final = contender.final if isinstance(contender, Diffrax) else final
        off = deviation(final, exact, work)
        if not off < 300:
            raise AssertionError(f"{work.name}: {name} is {off:.0f} tolerances off the reference")
    with torch.no_grad():
        solution = nde.solve(nde.ODE(work.f), work.z0, (0.0, 1.0), solver="dopri5", control=MATCHED,
                             rtol=work.tolerance, atol=work.tolerance)  # fmt: skip
        nfe = int(solution.stats.nfe[0])
    rows, verdicts, t = [], [], torch.tensor(0.0)

    def alone():
        with torch.no_grad():
            work.f(t, work.z0)

    for index, what in enumerate(("forward", "forward and backward")):
        calls = {k: (c.both if index else c.forward) for k, c in made.items() if index or PENALTY not in k}
        seconds = in_turns(calls | {"f": alone}, rounds)
        for name in calls:
            row = {"workload": work.name, "pass": what, "contender": name}
            row["ms"] = statistics.median(seconds[name]) * 1e3
            for peer in PEERS:
                row[f"/ {peer}"] = median_ratio(seconds[name], seconds[peer]) if peer in seconds else None
            row["/ NFE x f"] = median_ratio(seconds[name], [nfe * s for s in seconds["f"]]) if FIRST in name else None
            row["spread"] = spread(seconds[name])
            row["first call, s"] = compiling[name][index] if name.startswith("compiled") or name == "diffrax" else None
            rows.append(row)
            if name == f"compiled {FIRST}":
                for where, which, peer, limit in CLAIMS:
                    found = row["/ NFE x f"] if peer == "f" else row[f"/ {peer}"]
                    if (where, which) == (work.name, what) and found is not None:
                        verdicts.append(verdict(f"{where}, {what}, compiled {FIRST}, time over {peer}'s", found, limit))
        if index:
            over = median_ratio(seconds[f"compiled {FIRST}, {PENALTY}"], seconds[f"compiled {FIRST}"])
            verdicts.append(verdict(f"{work.name}, {PENALTY} compiled, time over that without", over, 1.1))
    return rows, verdicts


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=15, help="measurements of every contender, at least 7")
    options.add_argument("--workloads", nargs="+", choices=("S", "M"), default=("S", "M"))
    given = options.parse_args()
    if given.rounds < 7:
        options.error("--rounds must be at least 7")
    works = [work for work in (small(), medium()) if work.name in given.workloads]
    rows, verdicts = [], []
    for work in works:
        more, judged = measure(work, given.rounds)
        rows += more
        verdicts += judged
    notes = [
        *(f"{work.name}: {work.what}; t from 0 to 1, rtol = atol = {work.tolerance}" for work in works),
        f"{given.rounds} rounds; ms are medians over them, ratios the medians of the ratios of every round, spread the "
        "interquartile range over the median; first call: with its compilation; NFE x f: those of the eager solve",
        "peers with their dopri5, differentiated through the solver; ours with the default adjoint, checkpointed",
        *verdicts,
    ]
    threads = ", ".join(f"{work.threads} ({work.name})" for work in works)
    write(given.results, "compiled_speed", rows, threads, notes, ("torchdiffeq", "torchdyn"))


if __name__ == "__main__":
    main()
