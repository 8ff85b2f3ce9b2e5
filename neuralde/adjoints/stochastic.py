"""The stochastic adjoint: the costate of a Stratonovich SDE, solved for backwards along the path of the solve.

For dz = f dt + g ∘ dW, a loss that looks at z at some times, and a = ∂loss/∂z(t),

    da = -aᵀ ∂f/∂z dt - aᵀ ∂g/∂z ∘ dW,    dloss/dθ = ∫ aᵀ ∂f/∂θ dt + ∫ aᵀ ∂g/∂θ ∘ dW,

and a jumps by the loss's own gradient at every time it looks at. Stratonovich integrals obey the chain rule, so that
this is the adjoint equation of an ODE with one more driver; an Itô integral backwards in time is another integral.

The equation, whose state is z, a and the parameters' integrals, and the methods that step it are torchsde's. The steps
are those of the solve, from the last to the first, so that the noise is asked for where it was asked for before.

Source: Li, Wong, Chen & Duvenaud, Scalable gradients for stochastic differential equations (2020); for
reversible_heun, whose steps are undone instead of solved back, Kidger et al. (2021), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..brownian import Paths
from ..dense import Dense
from ..equations import SDE
from ..errors import NeuralDEError
from ..problem import Problem
from ..retrace import Cursor
from ..state import all_finite
from ..stochastic import NoisyField
from ..trajectory import Counts, Trajectory
from .dependencies import Dependencies, added, complain_of_change


def require(adjoint, equation: SDE, per_sample: bool) -> None:
    """Raises ValueError where the stochastic adjoint can't differentiate a solve.

    Args:
        adjoint: a `Backsolve`; its options are those of an ODE's backward solve.
        equation, per_sample: what is solved, and whether every sample has its own steps.
    """
    exact = "or take adjoint='checkpointed' or 'direct', which are exact and take any SDE"
    if equation.sde_type != "stratonovich" and equation.noise_type != "additive":
        raise ValueError(
            "adjoint='backsolve' needs an SDE with sde_type='stratonovich': an Itô integral backwards in time is "
            "another integral. The same process in that sense has a drift less by ½ Σ_j (∂g_j/∂z) g_j, g_j being the "
            f"columns of the diffusion (½ g ∂g/∂z for diagonal noise): write it so, {exact}"
        )
    if per_sample:
        raise ValueError(
            "adjoint='backsolve' of an SDE is torchsde's, which has one time for the whole batch: pass "
            f"control='joint' (or StepControl(per_sample=False, adaptive=False) with dt0), {exact}"
        )
    if vars(adjoint) != vars(type(adjoint)()):
        raise ValueError(
            f"the options of {adjoint!r} are of the backward solve of an ODE; that of an SDE makes the steps of the "
            f"solve again, from the last to the first: pass adjoint='backsolve', {exact}"
        )


class StochasticBackward:
    """One backward pass; see `continuous.Backward`, whose place it takes.

    Attributes:
        problem, trajectory: of the solve. z0: where it started.
        field, ends: the drift and the diffusion, and the tensors that they depend on, as ends of their graphs.
        counts: what the backward solve cost.
    """

    def __init__(self, adjoint, problem: Problem, uses: Dependencies, plan, trajectory: Trajectory, z0: Tensor):
        self.problem, self.uses, self.trajectory, self.z0 = problem, uses, trajectory, z0.detach()
        self.field, self.ends, self._substitute = uses.ends()
        self.counts: Counts | None = None

    def run(self, final: Tensor | None, interior: Tensor | None, states: None) -> list[Tensor | None]:
        """The gradients of z0 and of the tensors that f depends on, from the outputs' cotangents."""
        problem, calls, steps = self.problem, self.field.calls, 0
        outputs = set() if interior is None else set(problem.interior.flatten().tolist())
        begin, z = self._begin(outputs)
        costate = torch.zeros_like(self.z0) if final is None or not self.trajectory.complete else final
        with self._substitute():
            self._require_same()
            sweep = (_Solved if problem.solver.copies == 1 else _Undone)(self, begin, z, costate)
            for t, t_end in self._steps(begin):
                if t_end.item() in outputs:
                    sweep.strike(*self._output(t_end, interior))
                sweep.step(t, t_end)
                steps += 1
            gradients = [x.to(like.dtype) for x, like in zip(sweep.gradients(), (z, *self.ends), strict=True)]
        wanted = [x for x in (costate, interior) if x is not None]
        if all(map(all_finite, wanted)) and not all(map(all_finite, gradients)):
            raise NeuralDEError(
                "the backward solve of adjoint='backsolve' became NaN or infinite: where the drift contracts forwards "
                "the state expands backwards, or a derivative of the drift or the diffusion is infinite. Use "
                "adjoint='checkpointed' or 'direct', which have no backward solve, or smaller steps"
            )
        zero = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        self.counts = Counts(zero + steps, zero, zero + (self.field.calls - calls), zero, zero, zero)
        return gradients

    def _begin(self, outputs: set[float]) -> tuple[Tensor, Tensor]:
        """Where the backward solve begins, [1], and the state there: the end, or the last output before a failure."""
        problem, trajectory = self.problem, self.trajectory
        if trajectory.complete:
            return problem.end, trajectory.final
        reached = [t for t in outputs if t <= float(trajectory.reached)]
        begin = torch.full_like(problem.start, max(reached)) if reached else problem.start
        if not reached:
            return begin, self.z0
        grid = trajectory.grid
        step, theta = grid.locate(begin[None], problem.span.sign())
        with torch.no_grad():
            return begin, Dense(problem, grid, Cursor(problem, grid, self.z0)).at(step, theta)[0]

    def _steps(self, begin: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The ends of the steps, from the last one before `begin` to the first; of doubled ones, the halves'."""
        grid, halved = self.trajectory.grid, self.problem.control.adaptive
        for j in reversed(range(len(grid))):
            t, t_end = grid.t[j], grid.t_end[j]
            if bool(t_end > begin):
                continue
            middle = t + 0.5 * (t_end - t)  # as the noise was asked for
            yield from ((middle, t_end), (t, middle)) if halved else ((t, t_end),)

    def _output(self, t: Tensor, interior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs at t: which samples have one, [batch, 1], their states, and the loss's gradient there."""
        here = (self.problem.interior == t)[..., None]
        value, cotangent = (torch.where(here, x, 0.0).sum(dim=0) for x in (self.trajectory.interior, interior))
        return here.any(dim=0), value, cotangent

    def _require_same(self):
        """Makes sure that f is what it was, and that nothing was missed that wants a gradient."""
        problem, known = self.problem, self.uses.slope
        again = self.field(self.field.times(problem.first_instant)[0], self.z0).detach()
        if bool((again - known).abs().max() > torch.finfo(known.dtype).eps ** 0.5 * known.abs().max()):
            complain_of_change(self.uses.adjoint)
        z, time = self.field.layout.tip(self.z0).clone().requires_grad_(), self.field.times(problem.end)[0]

        def values():
            with torch.inference_mode(False), torch.enable_grad():
                return [self.field(time, z), self.field.diffusion(time, z)]

        found = values()
        self.uses.require_no_other(found, [z, *self.ends], values)
        able = [x for x in found if x.requires_grad]
        if able and self.ends:
            weights = [torch.ones_like(x) for x in able]
            self.uses.require_all(torch.autograd.grad(able, self.ends, weights, allow_unused=True))


class _Sweep:
    """torchsde's adjoint equation, its state, and the method that steps it.

    Args:
        work: the backward pass. method: torchsde's name of it.
        parts: of the state, but for the parameters' integrals. extra: what the method carries beside.
    """

    def __init__(self, work: StochasticBackward, method: str, parts: list[Tensor], extra: tuple):
        # Its `sdeint_adjoint` makes steps of one size on a Brownian object of its own: what is inside of it is used.
        from torchsde._core import methods
        from torchsde._core.adjoint_sde import AdjointSDE
        from torchsde._core.base_sde import ForwardSDE

        self.work, self.extra = work, extra
        parts = [*parts, *(torch.zeros_like(x) for x in work.ends)]
        self.shapes = [x.shape for x in parts]
        self.state = _flat(parts)
        equation = AdjointSDE(ForwardSDE(_Theirs(work.field)), work.ends, self.shapes)
        options = {"dt": None, "adaptive": False, "rtol": None, "atol": None, "dt_min": None, "options": {}}
        self.solver = methods.select(method, "stratonovich")(equation, bm=_Reversed(work.field.paths), **options)

    def step(self, t: Tensor, t_end: Tensor):
        """Goes back from t_end to t, [1] each."""
        self.state, self.extra = self.solver.step(-t_end[0], -t[0], self.state, self.extra)

    def parts(self) -> list[Tensor]:
        """The state, the parameters' integrals at its end."""
        parts = self.state[0].split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class _Solved(_Sweep):
    """The state is solved for again, along with the costate."""

    def __init__(self, work: StochasticBackward, t: Tensor, z: Tensor, costate: Tensor):
        super().__init__(work, "midpoint", [z, costate], ())

    def strike(self, here: Tensor, value: Tensor, cotangent: Tensor):
        """Takes in the states that are known, and what the loss wants there."""
        z, costate, *sums = self.parts()
        self.state = _flat([torch.where(here, value, z), costate + cotangent, *sums])

    def gradients(self) -> list[Tensor]:
        """Of z0 and of what f depends on."""
        return self.parts()[1:]


class _Undone(_Sweep):
    """The steps of reversible_heun are undone, and differentiated one by one: the exact gradient, to rounding."""

    def __init__(self, work: StochasticBackward, t: Tensor, z: Tensor, costate: Tensor):
        (y, x), (a, b), field = z.chunk(2, dim=1), costate.chunk(2, dim=1), work.field
        time = field.times(t)[0]
        extra = field(time, x).to(x.dtype), field.diffusion(time, x).to(x.dtype), x
        parts = [y, a, torch.zeros_like(extra[0]), torch.zeros_like(extra[1]), b]
        super().__init__(work, "adjoint_reversible_heun", parts, extra)

    def strike(self, here: Tensor, value: Tensor, cotangent: Tensor):
        """Takes in what the loss wants; the states are known up to rounding."""
        y, a, f, g, b, *sums = self.parts()
        more, beside = cotangent.chunk(2, dim=1)
        self.state = _flat([y, a + more, f, g, b + beside, *sums])

    def gradients(self) -> list[Tensor]:
        """Of z0 and of what f depends on."""
        _, a, f, g, b, *sums = self.parts()
        work = self.work
        time, x = work.field.times(work.problem.start)[0], work.field.layout.tip(work.z0).clone()
        with torch.inference_mode(False), torch.enable_grad():
            x.requires_grad_()
            pairs = [(work.field(time, x), f), (work.field.diffusion(time, x), g)]
        pairs = [(value, weight.to(value.dtype)) for value, weight in pairs if value.requires_grad]
        back = [None] * (1 + len(work.ends))
        if pairs:
            values, weights = zip(*pairs, strict=True)
            back = torch.autograd.grad(values, [x, *work.ends], weights, allow_unused=True)
        b, *sums = added([b, *sums], back)
        return [torch.cat([a, b], dim=1), *sums]


class _Theirs:
    """The drift and the diffusion as torchsde calls them."""

    sde_type = "stratonovich"  # of additive noise, both integrals are one

    def __init__(self, field: NoisyField):
        self.field, self.noise_type = field, field.equation.noise_type

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field(self.field.times(t.reshape(1))[0], y).to(y.dtype)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field.diffusion(self.field.times(t.reshape(1))[0], y).to(y.dtype)


class _Reversed:
    """A Brownian object of torchsde's kind that answers, in reversed time, from the solve's own paths."""

    levy_area_approximation = "none"

    def __init__(self, paths: Paths):
        self.paths = paths
        self.shape = (1, 1)  # its second number is looked at where the noise is scalar

    def __call__(self, t: Tensor, t_end: Tensor) -> Tensor:
        return self.paths.between(torch.stack([-t_end, -t])[:, None])[0].w


def _flat(parts: list[Tensor]) -> Tensor:
    """One row, as torchsde has it."""
    return torch.cat([x.reshape(-1) for x in parts])[None]
