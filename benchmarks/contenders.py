"""Who is measured for speed: neuralde, eager and compiled, and its peers, each with its dopri5."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import MATCHED, Counted, TimeFree, VanDerPol, Workload
from torch import Tensor

import neuralde as nde
import regularizers as reg

PEERS = ("torchdiffeq", "torchdyn", "torchode", "diffrax")
CONTROLS = {"joint, integral": MATCHED, "per_sample": "per_sample"}
PENALTY = "GlobalError + GlobalStiffness"


class Work(NamedTuple):
    """What one solve evaluates.

    Attributes:
        nfe: batched calls of f.
        attempts: steps attempted one after the other.
        rows: samples in all calls of f, those that had finished included.
        needed: evaluations that the samples need alone, or None where they don't step alone.
    """

    nfe: int
    attempts: int
    rows: int
    needed: int | None = None


class Contender:
    """What solves a workload.

    Args:
        work: the workload.
        solve: (f, z0) -> z(t1).
        loss: (f, z0) -> what is differentiated; None for half the sum of squares of z(t1).
    """

    def __init__(self, work: Workload, solve: Callable, loss: Callable | None = None):
        self.work, self.solve = work, solve
        self.loss = loss or (lambda f, z0: 0.5 * solve(f, z0).square().sum())
        self.z0 = work.z0.clone().requires_grad_()

    def forward(self) -> Tensor:
        """z(t1), without a gradient."""
        with torch.no_grad():
            return self.solve(self.work.f, self.work.z0)

    def both(self) -> list[Tensor]:
        """The gradients by z0 and the parameters."""
        return list(torch.autograd.grad(self.loss(self.work.f, self.z0), [self.z0, *self.work.f.parameters()]))

    def counted(self) -> Work:
        """Of a second solve: neuralde checks every f once."""
        f = Counted(self.work.f)
        with torch.no_grad():
            self.solve(f, self.work.z0)
            f.calls = f.rows = 0
            self.solve(f, self.work.z0)
        # Two evaluations before the first step, six for every attempt.
        return Work(f.calls, round((f.calls - 2) / 6), f.rows)


class Ours(Contender):
    """neuralde.

    Args:
        work: the workload. solver, control: of `solve`.
        compile: whether programs solve it.
        penalized: whether the loss has the penalties on error and stiffness.
    """

    def __init__(self, work: Workload, solver: str, control, compile: bool, penalized: bool = False):
        self.options = {"solver": solver, "control": control, "rtol": work.tolerance, "atol": work.tolerance}
        self.compile = compile
        self._equation = nde.ODE(work.f)
        error, stiffness = reg.GlobalError(1e-3), reg.GlobalStiffness(1e-3)

        def loss(f, z0):
            solution = self.solution(f, z0)
            return 0.5 * solution.final.square().sum() + error(solution) + stiffness(solution)

        super().__init__(work, lambda f, z0: self.solution(f, z0).final, loss if penalized else None)

    def solution(self, f, z0: Tensor) -> nde.Solution:
        """The solve."""
        equation = self._equation if f is self.work.f else nde.ODE(f)
        return nde.solve(equation, z0, (0.0, self.work.t1), compile=self.compile, max_steps=10**5, **self.options)

    def counted(self) -> Work:
        """See `Contender.counted`. A program's calls of f can't be seen: its log says how many, and for whom."""
        with torch.no_grad():
            solution = self.solution(self.work.f, self.work.z0)
        stats = solution.stats
        attempts, calls = int((stats.accepted + stats.rejected).max()), stats.function_calls
        rows = _logged(solution._outcome.trajectory, calls) if self.compile else super().counted().rows
        alone = self.options["control"] == "per_sample"
        return Work(calls, attempts, rows, int(stats.nfe.sum()) if alone else None)


def _logged(trajectory, calls: int) -> int:
    """Samples in all calls of f of a compiled solve."""
    steps = [(page.filled, len(trajectory.final) if page.rows is None else len(page.rows)) for page in trajectory.pages]
    if len({size for _, size in steps}) == 1:  # a log need not have all attempts of a batch that steps together
        return calls * steps[0][1]
    stages = trajectory.problem.solver.calls_per_step
    before = calls - stages * sum(filled for filled, _ in steps)
    return before * len(trajectory.final) + stages * sum(filled * size for filled, size in steps)


class Diffrax:
    """diffrax, jitted; the batch is one state, or every sample a solve of its own (`alone`)."""

    def __init__(self, work: Workload, alone: bool):
        import diffrax
        import jax
        import jax.numpy as jnp

        weights = [jnp.asarray(p.detach().cpu().numpy()) for p in work.f.parameters()]
        z0 = jnp.asarray(work.z0.cpu().numpy())
        control = diffrax.PIDController(rtol=work.tolerance, atol=work.tolerance)
        term, batch = diffrax.ODETerm(_in_jax(work.f)), len(work.z0)
        # A checkpointed gradient needs a bound on the steps, and its time grows with it; a forward solve does not.
        options = {"stepsize_controller": control, "max_steps": 256 if work.t1 == 1.0 else 10**5}

        def one(z0, w):
            found = diffrax.diffeqsolve(term, diffrax.Dopri5(), 0.0, work.t1, None, z0, w, **options)
            return found.ys[-1], found.stats["num_steps"]

        solve = jax.vmap(one, in_axes=(0, None)) if alone else one

        def loss(z0, w):
            return 0.5 * (solve(z0, w)[0] ** 2).sum()

        once, gradient = jax.jit(solve), jax.jit(jax.grad(loss, argnums=(0, 1)))

        def forward():
            final, steps = jax.block_until_ready(once(z0, weights))
            self.steps = steps
            return final

        self._forward, self.both = forward, lambda: jax.block_until_ready(gradient(z0, weights))
        self._get, self._alone, self._batch = jax.device_get, alone, batch

    def forward(self):
        """z(t1), an array of JAX's."""
        return self._forward()

    def counted(self) -> Work:
        """See `Contender.counted`; by the number of its steps."""
        self._forward()
        steps = self._get(self.steps)
        attempts = int(steps.max())
        calls = 6 * attempts + 2
        return Work(calls, attempts, calls * self._batch, int((6 * steps + 2).sum()) if self._alone else None)


def _in_jax(f: TimeFree | VanDerPol) -> Callable:
    """F as diffrax wants it: (t, z, weights) -> dz/dt."""
    import jax.numpy as jnp

    if isinstance(f, VanDerPol):

        def field(t, z, w):
            x, v = z[..., 0], z[..., 1]
            return jnp.stack([v, f.mu * (1 - x * x) * v - x], axis=-1)

        return field
    return lambda t, z, w: jnp.tanh(z @ w[0].T + w[1]) @ w[2].T + w[3]


def _torchdiffeq(work: Workload) -> Contender:
    import torchdiffeq

    ts, options = _times(work), {"rtol": work.tolerance, "atol": work.tolerance, "method": "dopri5"}
    return Contender(work, lambda f, z0: torchdiffeq.odeint(f, z0, ts, **options)[-1])


def _torchdyn(work: Workload) -> Contender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdyn.numerics import odeint
    ts, options = _times(work), {"rtol": work.tolerance, "atol": work.tolerance, "solver": "dopri5"}
    return Contender(work, lambda f, z0: odeint(f, z0, ts, **options)[1][-1])


def _torchode(work: Workload) -> Contender:
    """With the step sizes as constants, as all others have them."""
    import torchode

    start = torch.zeros(len(work.z0), device=work.z0.device)

    @functools.cache
    def made(f):
        term = torchode.ODETerm(f)
        control = torchode.IntegralController(atol=work.tolerance, rtol=work.tolerance, term=term)
        return torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control, backprop_through_step_size_control=False)

    return Contender(
        work, lambda f, z0: made(f).solve(torchode.InitialValueProblem(z0, start, start + work.t1)).ys[:, -1]
    )


def _times(work: Workload) -> Tensor:
    return torch.tensor([0.0, work.t1], device=work.z0.device)


def installed(peer: str) -> bool:
    """Whether a peer can be measured."""
    return importlib.util.find_spec(peer) is not None


def in_torch(work: Workload, wanted: Callable[[str], bool] = installed) -> dict[str, Contender]:
    """The peers in PyTorch that are installed; wanted: of these."""
    made = {"torchdiffeq": _torchdiffeq, "torchdyn": _torchdyn, "torchode": _torchode}
    return {name: make(work) for name, make in made.items() if installed(name) and wanted(name)}


def peers(work: Workload, alone: bool, wanted: Callable[[str], bool] = installed) -> dict[str, Contender | Diffrax]:
    """The peers that are installed; alone: whether diffrax steps every sample on its own, as torchode always does."""
    made = in_torch(work, wanted)
    return made | {"diffrax": Diffrax(work, alone)} if installed("diffrax") and wanted("diffrax") else made


def ours(work: Workload, control: str, solver: str = "dopri5") -> dict[str, Contender]:
    """neuralde, eager and compiled; control: one of `CONTROLS`."""
    return {
        f"{kind} {solver} {control}": Ours(work, solver, CONTROLS[control], kind == "compiled")
        for kind in ("eager", "compiled")
    }


def penalized(work: Workload, control: str) -> dict[str, Contender]:
    """The same with both penalties in the loss."""
    return {
        f"{kind} dopri5 {control}, {PENALTY}": Ours(work, "dopri5", CONTROLS[control], kind == "compiled", True)
        for kind in ("eager", "compiled")
    }
