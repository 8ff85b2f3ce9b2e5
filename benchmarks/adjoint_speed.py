"""Forward and backward against torchdiffeq, torchdyn and torchode: time in all, and the gradients' errors.

A gradient is that of the parameters and of z0. torchode's is taken with the step sizes as constants, as all others have
them; it is quicker that way too. torchode is no dependency: without it (pip install torchode), its row is left out.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable

import torch
import torchdiffeq
from common import Counted, TimeFree, Workload, in_turns, median_ratio, parser, spread, verdict, write
from contenders import in_torch, installed
from torch import Tensor, nn

import neuralde as nde

TOLERANCE, SCALES = 1e-5, (1.0, 3.0)
ADJOINTS, SOLVERS, CONTROLS = ("backsolve", "checkpointed", "direct"), ("dopri5", "tsit5"), ("joint", "per_sample")
PEERS = (
    "torchdiffeq odeint_adjoint",
    "torchdiffeq odeint_adjoint, seminorm",
    "torchdiffeq odeint",
    "torchdyn NeuralODE",
    "torchdyn odeint",
    "torchode",
)
# Whom an adjoint is compared with: a time of at most theirs is claimed, with the same method.
CLAIMS = {"backsolve": PEERS[:2], "direct": PEERS[3:]}

Solve = Callable[[nn.Module, Tensor], Tensor]  # f, z0 -> z(1)


def workload(scale: float) -> Workload:
    """A 64-128-64 network whose weights are `scale` times those of the default initialisation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.mul_(scale)
    what = f"64-128-64 tanh network, weights x {scale:g}, batch 128 of randn, float32"
    return Workload(f"x {scale:g}", TimeFree(net), torch.randn(128, 64), TOLERANCE, 1, what)


# -- contenders --------------------------------------------------------------------------------------------------------


def ours() -> dict[str, tuple[str, Solve]]:
    """Name -> (adjoint, solve), of the adjoints that there are."""

    def solve(f, z0, adjoint, solver, control):
        options = {"solver": solver, "control": control, "adjoint": adjoint, "rtol": TOLERANCE, "atol": TOLERANCE}
        return nde.solve(nde.ODE(f), z0, (0.0, 1.0), **options).final

    return {
        f"neuralde {adjoint}, {solver} {control}": (
            adjoint,
            functools.partial(solve, adjoint=adjoint, solver=solver, control=control),
        )
        for adjoint in ADJOINTS
        if adjoint in nde.adjoints.ADJOINTS
        for solver in SOLVERS
        for control in CONTROLS
    }


def theirs(work: Workload) -> dict[str, Solve]:
    """The peers that are installed, in the order of `PEERS`."""
    found = adjoints_of_torchdiffeq()
    for name, made in in_torch(work).items():
        if name == "torchdyn":
            found["torchdyn NeuralODE"] = layer_of_torchdyn()
        found[name if name == "torchode" else f"{name} odeint"] = made.solve
    return found


def adjoints_of_torchdiffeq() -> dict[str, Solve]:
    """odeint_adjoint with and without the seminorm."""
    ts, options = torch.tensor([0.0, 1.0]), {"rtol": TOLERANCE, "atol": TOLERANCE, "method": "dopri5"}
    adjoint = torchdiffeq.odeint_adjoint
    return {
        PEERS[0]: lambda f, z0: adjoint(f, z0, ts, **options)[-1],
        PEERS[1]: lambda f, z0: adjoint(f, z0, ts, **options, adjoint_options={"norm": "seminorm"})[-1],
    }


class WithArgs(nn.Module):
    """f as torchdyn's layer calls it."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, t, x: Tensor, args=None) -> Tensor:
        """f(t, x)."""
        return self.f(t, x)


def layer_of_torchdyn() -> Solve:
    """Its NeuralODE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdyn.core import NeuralODE
    ts, options = torch.tensor([0.0, 1.0]), {"solver": "dopri5", "rtol": TOLERANCE, "atol": TOLERANCE}
    made = functools.cache(lambda f: NeuralODE(WithArgs(f), sensitivity="autograd", **options))
    return lambda f, z0: made(f)(z0, ts)[1][-1]


# -- measurements ------------------------------------------------------------------------------------------------------


def gradients(f: nn.Module, z0: Tensor, solve: Solve) -> list[Tensor]:
    """Of half the sum of squares of z(1), with respect to z0 and the parameters."""
    z0 = z0.detach().requires_grad_()
    return list(torch.autograd.grad(0.5 * solve(f, z0).square().sum(), [z0, *f.parameters()]))


def reference(work: Workload) -> list[Tensor]:
    """The gradients in float64 at tolerance 1e-12."""
    options = {"solver": "dopri8", "rtol": 1e-12, "atol": 1e-12, "adjoint": "direct"}
    found = gradients(
        work.f.double(), work.z0.double(), lambda f, z0: nde.solve(nde.ODE(f), z0, (0.0, 1.0), **options).final
    )
    work.f.float()
    return found


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The relative error in norm: of z0's gradient, or of the parameters', whichever is larger."""

    def flat(tensors):
        return torch.cat([x.double().flatten() for x in tensors])

    parts = ((flat(a), flat(b)) for a, b in ((found[:1], exact[:1]), (found[1:], exact[1:])))
    return max(float((a - b).norm() / b.norm()) for a, b in parts)


def count(work: Workload, solve: Solve) -> tuple[int, int]:
    """Batched calls of f in the forward and in the backward pass; not of the first solve, in which f is checked."""
    f, forward = Counted(work.f), 0

    def counted(f, z0):
        nonlocal forward
        final = solve(f, z0)
        forward = f.calls
        return final

    gradients(f, work.z0, counted)
    f.calls = 0
    gradients(f, work.z0, counted)
    return forward, f.calls - forward


def measure(work: Workload, rounds: int) -> tuple[list[dict], list[str]]:
    """The rows of a workload, and whether the claims hold."""
    torch.set_num_threads(work.threads)
    mine, peers = ours(), theirs(work)
    solves = {name: solve for name, (_, solve) in mine.items()} | peers
    exact = reference(work)
    off = {name: error(gradients(work.f, work.z0, solve), exact) for name, solve in solves.items()}
    for name, x in off.items():
        if not x < 1e-2:
            raise AssertionError(f"{work.name}: the gradient of {name} is off by {x:.2g}")
    calls = {name: count(work, solve) for name, solve in solves.items()}
    steps = {name: functools.partial(gradients, work.f, work.z0, solve) for name, solve in solves.items()}
    seconds = in_turns(steps, rounds)
    rows = []
    for name in solves:
        row = {
            "workload": work.name,
            "contender": name,
            "NFE forward": calls[name][0],
            "NFE backward": calls[name][1],
            "ms": statistics.median(seconds[name]) * 1e3,
        }
        row |= {f"/ {peer}": median_ratio(seconds[name], seconds[peer]) for peer in peers}
        rows.append(row | {"spread": spread(seconds[name]), "gradient error": off[name]})
    return rows, claims(work, mine, peers, seconds, off)


def claims(work: Workload, mine: dict, peers: dict, seconds: dict, off: dict) -> list[str]:
    """With the peers' method: no more time, and a gradient that is no worse."""
    made = []
    for name, (adjoint, _) in mine.items():
        rivals = [peer for peer in CLAIMS.get(adjoint, ()) if peer in peers]
        if not rivals or "dopri5" not in name:
            continue
        for peer in rivals:
            ratio = median_ratio(seconds[name], seconds[peer])
            noise = max(spread(seconds[name]), spread(seconds[peer]))
            made.append(verdict(f"{work.name}, {name}, time over that of {peer}", ratio, 1.0, noise=noise))
        # Nobody needs an error below the tolerance.
        bar = max(1.1 * min(off[peer] for peer in rivals), TOLERANCE)
        claim = f"{work.name}, {name}, gradient error over 1.1 of the best of these, or over the tolerance if larger"
        made.append(verdict(claim, off[name] / bar, 1.0))
    return made


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=15, help="measurements of every contender, at least 5")
    options.add_argument("--scales", type=float, nargs="+", default=SCALES, help="factors of the initial weights")
    given = options.parse_args()
    if given.rounds < 5:
        options.error("--rounds must be at least 5")
    works, rows, verdicts = [workload(scale) for scale in given.scales], [], []
    for work in works:
        more, judged = measure(work, given.rounds)
        rows += more
        verdicts += judged
    notes = [
        *(f"{work.name}: {work.what}" for work in works),
        f"t from 0 to 1, rtol = atol = {TOLERANCE}, adjoint equations too; loss: half the sum of squares of z(1)",
        f"forward and backward, {given.rounds} rounds; ms are medians over them, ratios the medians of the ratios of "
        "every round, spread the interquartile range over the median; peers with their dopri5",
        "gradient error: relative, in norm, of z0's gradient or the parameters', whichever is larger, against float64 "
        "at tolerance 1e-12",
        *verdicts,
    ]
    missing = [name for name in ADJOINTS if name not in nde.adjoints.ADJOINTS]
    if missing:
        notes.append(f"not registered yet, left out: {', '.join(missing)}")
    torchode = installed("torchode")
    if not torchode:
        notes.append("torchode is not installed, left out")
    write(given.results, "adjoint_speed", rows, "1", notes, ("torchdiffeq", "torchdyn", *["torchode"] * torchode))


if __name__ == "__main__":
    main()
