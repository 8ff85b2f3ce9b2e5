"""The drift and the diffusion of an SDE as the engine sees them, and what drives a step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import transforms
from .brownian import BrownianTree, Foreign, Noise, Paths, resolution
from .equations import ODE, SDE, Autonomous
from .errors import BiasWarning
from .field import Between, Field, Part
from .state import Layout

# By what a diffusion is, or is a method of, and by its name: whether it mixes components where it was first looked at.
_MIXING: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class NoisyField(Field):
    """An SDE's coefficients on [batch, features] tensors: called, the drift; and the diffusion beside it.

    Args:
        equation, layout, args, joint: as `Field`'s.
        start, span: t0 and t1 - t0, [groups].
        brownian: where the noise comes from.

    Attributes:
        source: `brownian`.
        mixing: what is done where a component's diagonal noise answers to another component: raises or warns. Or None.
        paths: the Brownian paths of the samples, known after the first evaluation; it tells how many each has.
    """

    def __init__(
        self, equation: SDE, layout: Layout, args, joint: bool, start: Tensor, span: Tensor, brownian: BrownianTree
    ):
        super().__init__(equation, layout, args, joint)
        self.diagonal = equation.noise_type == "diagonal"
        self.mixing: Callable[[], None] | None = None
        self._horizon, self.source = (start, span), brownian
        self.paths: Paths | None = None

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """The drift, [batch, features]."""
        return self._evaluate(t, z, self.args)

    def _evaluate(self, t, z: Tensor, args) -> Tensor:
        x = self.layout.tip(z)
        drift = self._call(t, x, args, self.equation.f.drift)
        return self.like(z, drift if self._plain else self.layout.pack(drift))

    def like(self, z: Tensor, value: Tensor) -> Tensor:
        """A value at one approximation of the state for all that z holds."""
        return value if z.shape[1] == value.shape[1] else self.layout.copied(value)

    def fill(self, t: Tensor, z: Tensor, other: Tensor | None = None):
        """See `Field.fill`."""
        super().fill(t, self.layout.tip(z), other)

    def diffusion(self, t: Tensor, z: Tensor) -> Tensor:
        """The diffusion: [batch, features] of diagonal noise, else [batch, features, channels]."""
        return self.diffusion_with(t, z, self.args)

    def diffusion_with(self, t, z: Tensor, args) -> Tensor:
        """The diffusion, with args for these samples."""
        diffusion = self._call(t, self.layout.tip(z), args, self.equation.f.diffusion)
        return self.like(z, diffusion if self._plain else self._pack(diffusion))

    def _pack(self, diffusion) -> Tensor:
        if self.diagonal:
            return self.layout.pack(diffusion)
        leaves = pytree.tree_leaves(diffusion)
        return torch.cat([x.reshape(len(x), -1, x.shape[-1]) for x in leaves], dim=1)

    def spread(self, t: Tensor, z: Tensor) -> Tensor:
        """Three standard deviations of what the noise does in unit time, component by component, [batch, features]."""
        return spread(self.diffusion(t, z), self.diagonal)

    def pure_diffusion(self, f, t, z: Tensor, args) -> Tensor:
        """The diffusion by another f; see `Field.pure`."""
        diffusion = self._apply(t, z, args, f)
        return diffusion if self._plain else self._pack(diffusion)

    def signature(self) -> NoisyField:
        """See `Field.signature`."""
        field = super().signature()
        field._horizon = field.source = field.paths = None
        return field

    def _everything(self, t, z: Tensor, args) -> Tensor:
        return torch.cat([self._evaluate(t, z, args), self.diffusion_with(t, z, args).flatten(1)], dim=1)

    def _checked(self, t, z: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layout.tip(z)
        drift = self._call(t, x, self.args, self.equation.f.drift)
        drift = self.layout.pack_derivative(drift, len(z), self._autocast is not None, "drift").clone()
        diffusion = self._call(t, x, self.args, self.equation.f.diffusion)
        channels = self._check_diffusion(diffusion, len(z))
        diffusion = self._pack(diffusion)
        if self.equation.noise_type == "additive":
            self._check_additive(t, x.detach(), diffusion.detach())
        if self.mixing is not None and self.diagonal:
            self._check_separate(t, x.detach())
        self.bind(channels)
        drift = self.like(z, drift)
        return drift, torch.cat([drift, self.like(z, diffusion).flatten(1)], dim=1)

    def _check_diffusion(self, diffusion, batch: int) -> int:
        """Raises TypeError or ValueError unless the diffusion is as its noise_type says. Returns the channels."""
        layout, kind = self.layout, self.equation.noise_type
        if self.diagonal:
            layout.pack_derivative(diffusion, batch, self._autocast is not None, "diffusion")
            return sum(shape.numel() for shape in layout.shapes)
        leaves, tree = ([diffusion], None) if layout.tree is None else pytree.tree_flatten(diffusion)
        if tree != layout.tree or not all(isinstance(x, Tensor) for x in leaves):
            raise TypeError(f"diffusion must return tensors in the structure of z0, got {type(diffusion).__name__}")
        channels = leaves[0].shape[-1] if leaves[0].dim() else 0
        for leaf, shape in zip(leaves, layout.shapes, strict=True):
            wanted = (batch, *shape, 1 if kind == "scalar" else channels)
            if leaf.shape != wanted:
                last = "1" if kind == "scalar" else "channels"
                shown = ", ".join(map(str, (batch, *shape)))
                raise ValueError(
                    f"the diffusion of {kind} noise must return [{shown}, {last}], got {tuple(leaf.shape)}; "
                    f"noise_type='diagonal' takes one in the shape of z{self._given_z()}"
                )
            if leaf.dtype != layout.dtype and not (self._autocast is not None and leaf.is_floating_point()):
                raise TypeError(f"diffusion must return the dtype of z, {layout.dtype}, got {leaf.dtype}")
            if leaf.device != layout.device:
                raise ValueError(f"diffusion must return tensors on {layout.device}, got {leaf.device}")
        return channels

    def _given_z(self) -> str:
        """What a message adds where the diffusion has one argument, which may have been meant as t."""
        if not isinstance(self.equation.f.diffusion, Autonomous):
            return ""
        return ". It is a function of one argument, which is given z: write one of t as lambda t, z: ..."

    @torch.no_grad()
    def _check_additive(self, t, z: Tensor, diffusion: Tensor):
        """Raises ValueError where an additive diffusion answers to z: its solvers would leave terms out."""
        try:
            other = self.diffusion_with(t, 2.0 * z + 1.0, self.args)
        except Exception:  # it refuses states that it would not meet
            return
        if not torch.equal(other, diffusion) and not bool((other.isnan() | diffusion.isnan()).any()):
            raise ValueError(
                "noise_type='additive' is for a diffusion of t alone, but this one changes with z; "
                f"use noise_type='general', or 'scalar' or 'diagonal' where it is of that kind{self._given_z()}"
            )

    def _check_separate(self, t, z: Tensor):
        """Lets `mixing` speak where a component's diffusion answers to another component; looked at once per f."""
        f, known = self.equation.diffusion, {}
        with contextlib.suppress(TypeError):  # what can't be referred to weakly is looked at in every solve
            known = _MIXING.setdefault(getattr(f, "__self__", f), known)
        name = getattr(f, "__name__", None)
        if name not in known:
            known[name] = self._mixes(t, z)
        if known[name]:
            self.mixing()

    def _mixes(self, t, z: Tensor) -> bool:
        """Whether a component's diffusion answers to another component here."""
        with torch.inference_mode(False), torch.enable_grad():
            z = z.clone().requires_grad_()
            diffusion = self.diffusion(t, z)
            if not diffusion.requires_grad:
                return False
            # With numbers r_i that all differ, Σ_i J_ij (r_i - r_j) is 0 where the Jacobian J is diagonal.
            numbers = torch.linspace(1.0, 2.0, z.shape[1], dtype=z.dtype, device=z.device)
            sums = [
                torch.autograd.grad(diffusion, z, r.expand_as(z), retain_graph=True, allow_unused=True)[0]
                for r in (torch.ones_like(numbers), numbers)
            ]
        if sums[0] is None:
            return False
        off = (sums[1] - sums[0] * numbers).abs()
        return bool((off > 1e3 * torch.finfo(z.dtype).eps * sums[0].abs().amax()).any())

    def bind(self, channels: int) -> Paths:
        """The paths, of so many motions for each sample."""
        if self.paths is None:
            self.paths = self._bind(channels)
        return self.paths

    def _bind(self, channels: int) -> Paths:
        layout = self.layout
        if isinstance(self.source, BrownianTree):
            return self.source.bind(*self._horizon, layout.batch, channels, layout.work_dtype)
        shape = tuple(self.source.shape)
        if shape != (layout.batch, channels):
            raise ValueError(
                f"brownian must have the shape (batch, channels) = {(layout.batch, channels)}, got {shape}"
            )
        paths, (start, span) = Foreign(self.source), self._horizon
        begin, end = float(start), float(start + span)
        room = 4.0 * torch.finfo(start.dtype).eps * max(abs(begin), abs(end))
        if begin < paths.horizon[0] - room or end > paths.horizon[1] + room:
            raise ValueError(
                "brownian must be known on the horizon of the solve, from {:g} to {:g}; it was made for {:g} to {:g}, "
                "and stands still beyond".format(begin, end, *paths.horizon)
            )
        return paths

    @property
    def resolution(self) -> float:
        """The length of the shortest intervals on which all samples' paths are known."""
        if not isinstance(self.source, BrownianTree):
            return 0.0
        start, span = self._horizon
        return resolution(start, span)

    def on(self, rows: Tensor | None) -> NoisyField | NoisyPart:
        """The coefficients for the samples `rows` (ascending indices) only."""
        return self if rows is None else NoisyPart(self, rows, padded=not self.can_shrink())


class NoisyPart(Part):
    """A `NoisyField` on some of the samples."""

    @property
    def diagonal(self) -> bool:
        """Whether every component has a Brownian motion of its own."""
        return self.field.diagonal

    @property
    def paths(self) -> Paths:
        """The Brownian paths of the samples."""
        return self.field.paths.on(self.rows)

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """The drift of the rows, [rows, features]."""
        if not self.padded:
            return self.field._evaluate(t, z, self.args)
        return self.field.like(z, self.field(t, self._everyone(z)).index_select(0, self.rows))

    def diffusion(self, t: Tensor, z: Tensor) -> Tensor:
        """See `NoisyField.diffusion`."""
        if not self.padded:
            return self.field.diffusion_with(t, z, self.args)
        return self.field.like(z, self.field.diffusion(t, self._everyone(z)).index_select(0, self.rows))

    def _everyone(self, z: Tensor) -> Tensor:
        return self.field._filler[1].index_copy(0, self.rows, self.layout.tip(z))

    def spread(self, t: Tensor, z: Tensor) -> Tensor:
        """See `NoisyField.spread`."""
        return spread(self.diffusion(t, z), self.diagonal)


def spread(diffusion: Tensor, diagonal: bool) -> Tensor:
    """Three standard deviations of what the noise does in unit time, [batch, features]; see `NoisyField.diffusion`."""
    return 3.0 * (diffusion.abs() if diagonal else torch.linalg.vector_norm(diffusion, dim=2))


class Driven:
    """The coefficients for one step, with the noise between its ends.

    Args:
        field: drift and diffusion of the samples. diagonal: whether the noise is.
        paths: of the same samples. t, t_end: the step's ends, [groups].
    """

    def __init__(self, field: NoisyField | NoisyPart | Between, diagonal: bool, paths: Paths, t: Tensor, t_end: Tensor):
        self.field, self.diagonal, self.paths, self.ends = field, diagonal, paths, (t, t_end)
        self.layout, self.joint, self.times, self.diffusion = field.layout, field.joint, field.times, field.diffusion
        self._noise: Noise | None = None  # (no cached_property: programs are traced from this)

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """The drift, [samples, features]."""
        return self.field(t, z)

    @property
    def noise(self) -> Noise:
        """Over the step."""
        if self._noise is None:
            self._noise = self.paths.between(torch.stack(self.ends))[0]
        return self._noise

    @property
    def halves(self) -> list[Noise]:
        """Over the step's first half, and over its second one."""
        t, t_end = self.ends
        return self.paths.between(torch.stack([t, t + 0.5 * (t_end - t), t_end]))

    def times_noise(self, diffusion: Tensor, noise: Tensor) -> Tensor:
        """The product of the diffusion with noise [samples, channels], [samples, features]."""
        return diffusion * noise if self.diagonal else torch.einsum("bfm,bm->bf", diffusion, noise)


# -- a solve of an SDE -------------------------------------------------------------------------------------------------


def source(seed: int | None, brownian, equation: ODE | SDE, solver, control) -> BrownianTree | None:
    """Where the noise of a solve comes from: a `BrownianTree` with a seed, or torchsde's object. None for an ODE.

    Raises:
        TypeError, ValueError: seed and brownian are no such things, or don't go with the other arguments.
    """
    if not isinstance(equation, SDE):
        for name, x in (("seed", seed), ("brownian", brownian)):
            if x is not None:
                raise ValueError(f"{name} is for SDEs: an ODE has no noise; leave it out")
        return None
    if brownian is None:
        return BrownianTree(seed).drawn()
    if seed is not None:
        raise ValueError("seed and brownian were both given; give the seed to the BrownianTree")
    if isinstance(brownian, BrownianTree):
        return brownian.drawn()
    if not (callable(brownian) and hasattr(brownian, "levy_area_approximation") and hasattr(brownian, "shape")):
        raise TypeError(
            "brownian must be a BrownianTree, or a Brownian object of torchsde's such as a BrownianInterval, got "
            f"{type(brownian).__name__}"
        )
    if control.per_sample:
        raise ValueError(
            "a Brownian object of torchsde's answers for the whole batch at one time: use control='joint', or a "
            "nde.BrownianTree"
        )
    if solver.uses_area and brownian.levy_area_approximation == "none":
        raise ValueError(
            f"solver {solver.name!r} uses the space-time Lévy area of the noise: make the Brownian object with "
            "levy_area_approximation='space-time'"
        )
    return brownian


def check_noisy(layout: Layout, times: Tensor, timed: bool, events) -> None:
    """Raises where a solve of an SDE is asked for what it can't do.

    Args:
        times: [times, groups]. timed: whether they want gradients.
    """
    if layout.work_dtype.is_complex:
        raise TypeError("z0 must be real: the noise of an SDE is; write a complex state as two real ones")
    if bool((times[-1] < times[0]).any()):
        raise ValueError("t must increase: an SDE is solved forward in time")
    if timed:
        raise ValueError("t must not require a gradient: a path of an SDE has no derivative with respect to time")
    if events:
        raise ValueError(
            "events are for ODEs: between two steps a path may cross any level unseen; look for them in solution.zs"
        )


def with_noise(problem):
    """A problem with what an SDE's steps need: they end at the outputs, and stay above what its paths resolve.

    Between the ends of steps a path is rough: the state there has another law than any interpolant.

    Raises:
        ValueError: dt0 is below that.
    """
    problem.field.mixing = _answer_to_mixing(problem)
    stops = problem.stops
    if problem.interior is not None:
        outputs = problem.interior.flatten()[:, None] if problem.joint else problem.interior
        stops = outputs if stops is None else torch.cat([outputs, stops])
    least = 4.0 * problem.field.resolution
    if problem.dt0 is not None and problem.dt0 < least:
        raise ValueError(f"dt0 must be at least {least:.3g}, below which the noise is not resolved, got {problem.dt0}")
    if not problem.control.adaptive:
        return dataclasses.replace(problem, stops=stops)
    return dataclasses.replace(problem, stops=stops, dt_min=max(least, problem.dt_min or 0.0))


def _answer_to_mixing(problem) -> Callable[[], None] | None:
    """See `NoisyField.mixing`."""
    if problem.solver.separate:
        return _refuse_mixing
    # What is left out of mixed noise has mean zero over all steps, but not over those that pass an error test.
    biased = problem.control.adaptive and problem.field.equation.sde_type == "ito" and not transforms.active()
    return functools.partial(_tell_of_bias, problem.solver.name) if biased else None


def _refuse_mixing():
    raise ValueError(
        "solver 'milstein' solves a Stratonovich SDE with noise_type='diagonal' only where every component of "
        "the diffusion depends on that component of z alone, and this one mixes them: its limit would be "
        "another equation's; use solver='heun', 'midpoint', 'euler_heun' or 'reversible_heun'"
    )


def _tell_of_bias(solver: str):
    warnings.warn(
        f"the diffusion mixes components, though noise_type='diagonal': adaptive steps of solver {solver!r} leave out "
        "terms whose mean is zero over all steps, but not over those that pass an error test, so that the mean of the "
        "end is off by a little that does not fall with the tolerance. Where laws matter take fixed steps "
        "(control=nde.StepControl(adaptive=False) with dt0), or, in the sense of Stratonovich, solver='heun'; where "
        "they don't, warnings.simplefilter('ignore', nde.BiasWarning) is the answer",
        BiasWarning,
        stacklevel=2,
    )
