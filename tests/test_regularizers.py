"""Penalties made of the solver's heuristics: values, gradients, where they may be taken, and that they work."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
from helpers import (
    ADAPTIVE,
    ADJOINTS,
    CONTROLS,
    DENSE,
    EXACT,
    SOLVERS,
    WITH_ERROR,
    WITH_STIFFNESS,
    close,
    options,
    refused,
)
from scipy import stats
from torch import nn

import neuralde as nde
import regularizers as reg

PENALTIES = {name: cls for name, cls in reg.REGULARIZERS.items() if not cls.of_steady}
NAMES = list(PENALTIES)
EVERY = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=NAMES)
GLOBAL = [reg.GlobalError, reg.GlobalStiffness]
LOCAL = [reg.LocalError, reg.LocalStiffness]
ALONG = [reg.TaylorDerivative, reg.KineticEnergy, reg.JacobianFrobenius]
ADJOINT = pytest.mark.parametrize("adjoint", ADJOINTS)
CONTROL = pytest.mark.parametrize("control", CONTROLS)


def able(penalty):
    """The adjoints under which a penalty has gradients.

    The figures of the solve's own steps have none under a continuous adjoint, nor have states that were not kept.
    """
    return EXACT if penalty in GLOBAL else DENSE if penalty in ALONG else ADJOINTS


PENALTY_AND_ADJOINT = pytest.mark.parametrize(
    ("penalty", "adjoint"),
    [pytest.param(cls, a, id=f"{n}-{a}") for n, cls in PENALTIES.items() for a in able(cls)],
)
BATCH = 4


def net(seed=0, d=2, gain=2.0):
    """A vector field with something to regularize."""
    torch.manual_seed(seed)
    f = nde.TimeChain(nde.AppendTime(nn.Linear(d + 1, 8)), nn.Tanh(), nn.Linear(8, d)).double()
    with torch.no_grad():
        for p in f.parameters():
            p *= gain
    return f


def start(batch=BATCH, d=2):
    return torch.randn(batch, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def solve(f=None, z0=None, t=(0.0, 2.0), **how):
    return nde.solve(nde.ODE(net() if f is None else f), start() if z0 is None else z0, t, **how)


def seeded(cls, **given):
    """The penalty, with times drawn from a generator of its own where it draws any."""
    if "generator" in inspect.signature(cls).parameters:
        given["generator"] = torch.Generator().manual_seed(9)
    return cls(**given)


# -- schedules -----------------------------------------------------------------------------------------------------


def test_schedules():
    assert [reg.constant(0.3)(k) for k in (0, 5, 10**6)] == [0.3] * 3
    decay = reg.exponential(1.0, 0.01, 10)
    assert [decay(k) for k in (0, 5, 10, 11, 1000)] == pytest.approx([1.0, 0.1, 0.01, 0.01, 0.01], rel=1e-12)
    assert decay(4) / decay(3) == pytest.approx(decay(8) / decay(7), rel=1e-12)
    line = reg.linear(1.0, 3.0, 4)
    assert [line(k) for k in range(6)] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.0], rel=1e-12)
    wave = reg.cosine(2.0, 0.0, 4)
    expected = [1 + math.cos(math.pi * k / 4) for k in range(5)]
    assert [wave(k) for k in (*range(5), 9)] == pytest.approx([*expected, 0.0], abs=1e-12)
    assert [reg.linear(0.0, 1.0, 1)(k) for k in (0, 1, 2)] == [0.0, 1.0, 1.0]
    assert reg.exponential(0.5, 2.0, 2)(1) == pytest.approx(1.0)  # it may grow


@pytest.mark.parametrize("make", [reg.exponential, reg.linear, reg.cosine])
def test_bad_schedules(make):
    for steps in (0, -3):
        with refused(ValueError, "steps"):
            make(1.0, 0.1, steps)
    for value in (math.nan, math.inf):
        with refused(ValueError, "start"):
            make(value, 0.1, 5)
        with refused(ValueError, "end"):
            make(1.0, value, 5)


def test_bad_weights():
    for start, end in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)):
        with refused(ValueError, "positive"):
            reg.exponential(start, end, 5)
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            reg.GlobalError(weight)
        with refused(ValueError, "value"):
            reg.constant(weight)
    for cls in (reg.GlobalError, reg.GlobalStiffness, reg.KineticEnergy, reg.JacobianFrobenius):
        with refused(TypeError, "weight", "'biased'", cls.__name__):
            cls("biased")
    for cls in LOCAL:
        for weight in (0.1, reg.constant(0.1)):
            with refused(ValueError, "sampling", f"{cls.__name__}(weight=...)"):
                cls(weight)
    for cls in reg.REGULARIZERS.values():
        with refused(TypeError, "weight must be a number or a schedule", "'0.1'"):
            cls(weight="0.1")
        with refused(ValueError, "weight must not be negative", "-0.1"):
            cls(weight=-0.1)


@EVERY
def test_weight_and_step(penalty):
    fixed = penalty(weight=0.25)
    for _ in range(3):
        assert fixed.weight == 0.25
        fixed.step()
    annealed = penalty(weight=reg.linear(1.0, 0.0, 4))
    seen = []
    for _ in range(6):
        seen.append(annealed.weight)
        annealed.step()
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert "weight=0" in repr(annealed) and "weight=0.25" in repr(fixed)
    custom = penalty(weight=lambda step: 10.0 + step)
    custom.step()
    assert custom.weight == 11.0
    assert penalty().weight == 1.0


@EVERY
def test_state_dict_round_trip(penalty):
    """A run that is resumed goes on where its schedule was."""
    first, second = (penalty(weight=reg.linear(1.0, 0.0, 10)) for _ in range(2))
    for _ in range(7):
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.weight == first.weight == pytest.approx(0.3)
    model = nn.ModuleDict({"f": nn.Linear(2, 2), "penalty": first})
    assert any(name.startswith("penalty.") for name in model.state_dict())
    assert not list(first.parameters())
    again = copy.deepcopy(first)
    again.step()
    assert again.weight == pytest.approx(0.2) and first.weight == pytest.approx(0.3)


@EVERY
@pytest.mark.parametrize(
    "weight", [0.3, reg.constant(0.3), *(f(1.0, 0.1, 10) for f in (reg.exponential, reg.linear, reg.cosine))]
)
def test_penalties_can_be_pickled(penalty, weight):
    """With a model that is saved whole, or sent to the processes of a data-parallel run."""
    first = penalty(weight=weight)
    first.step()
    again = pickle.loads(pickle.dumps(first))
    assert again.weight == first.weight and repr(again) == repr(first)
    again.step()
    assert int(again.steps) == 2 and int(first.steps) == 1


# -- sources -------------------------------------------------------------------------------------------------------


@EVERY
def test_solution_layer_and_model(penalty):
    """The same scalar of each; a model's is the sum over its layers."""
    z0 = start()
    first, second = nde.NeuralODE(net(1), (0.0, 2.0)), nde.NeuralODE(net(2), (1.0, 0.0), solver="dopri5")
    model = nn.Sequential(first, nn.ModuleDict({"inner": nn.Sequential(nn.Tanh(), second)})["inner"])
    model(z0)

    def value(source, **given):
        out = seeded(penalty, **given)(source)
        assert out.shape == () and out.requires_grad and out.isfinite() and out > 0
        return out

    assert torch.equal(value(first), value(first.solution))
    figure = seeded(penalty).figure(first.solution)
    assert figure.shape == (BATCH,)
    torch.testing.assert_close(value(first), figure.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(value(first, weight=2.5), 2.5 * figure.mean(), rtol=1e-12, atol=0)
    generator_apart = seeded(penalty)
    expected = generator_apart(first) + generator_apart(second)
    torch.testing.assert_close(value(model), expected, rtol=1e-12, atol=0)
    # Its gradients reach both.
    value(model).backward()
    for layer in (first, second):
        assert all((p.grad != 0).any() for p in layer.parameters() if p.dim() == 2)


@EVERY
def test_a_layer_that_was_not_called_has_no_part(penalty):
    used, unused = nde.NeuralODE(net(1)), nde.NeuralODE(net(2))
    model = nn.ModuleList([used, unused])
    with refused(ValueError, "ModuleList", "call"):
        penalty()(model)
    with refused(ValueError, "NeuralODE", "call"):
        penalty()(unused)
    used(start())
    assert torch.equal(seeded(penalty)(model), seeded(penalty)(used))


@EVERY
@pytest.mark.parametrize("source", [None, 3.0, torch.ones(3), [nde.NeuralODE(nn.Linear(2, 2))]])
def test_a_wrong_source(penalty, source):
    with refused(TypeError, "Solution", type(source).__name__):
        penalty()(source)


@EVERY
def test_a_model_without_a_layer(penalty):
    with refused(ValueError, "Sequential", "Solution"):
        penalty()(nn.Sequential(nn.Linear(2, 2)))


@PENALTY_AND_ADJOINT
@pytest.mark.parametrize("failing", ["at once", "later"])
def test_a_failed_sample_does_not_spoil_the_penalty(penalty, adjoint, failing):
    """Training goes on with the others (`on_failure="ignore"`), and so must its loss."""
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    z0 = torch.tensor([[1.0], [-1.0], [2.0], [0.5]], dtype=torch.float64)
    until = torch.tensor([[2.0], [3.0], [0.4], [2.0]], dtype=torch.float64)
    f = {"at once": lambda t, z, c: torch.sqrt(w * z), "later": lambda t, z, c: torch.sqrt(c - t) * w * z}[failing]
    solution = nde.solve(nde.ODE(f), z0, (0.0, 1.0), args=until, on_failure="ignore", adjoint=adjoint)
    assert (~solution.converged).sum() == 1
    watched = seeded(penalty)
    for _ in range(4):  # a local one draws other times
        value = watched(solution)
        assert value.isfinite() and torch.autograd.grad(value, w, retain_graph=True)[0].isfinite()


@EVERY
@ADJOINT
def test_a_batch_in_which_every_sample_fails_has_no_penalty(penalty, adjoint):
    w = torch.tensor(1.0, requires_grad=True)
    f = nde.ODE(lambda t, z: torch.sqrt(w * z))
    solution = nde.solve(f, -torch.ones(3, 1), (0.0, 1.0), on_failure="ignore", adjoint=adjoint)
    reductions = ("sum", "mean", "max") if penalty in GLOBAL else ("sum", "mean")
    variants = [{}, {"sampling": "biased"}] if penalty in LOCAL else [{"reduce": r} for r in reductions]
    for given in variants:
        assert seeded(penalty, **given)(solution) == 0.0


def test_bad_options():
    for cls in GLOBAL:
        with refused(ValueError, "reduce", "'sum'", "'mean'", "'max'"):
            cls(reduce="median")
    for cls in ALONG:
        with refused(ValueError, "reduce", "'sum'", "'mean'"):
            cls(reduce="max")
    for cls in LOCAL:
        with refused(ValueError, "sampling", "'unbiased'", "'biased'"):
            cls(sampling="random")
        with refused(ValueError, "unknown solver", "tsit5"):
            cls(solver="tsit")(solve())


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_without_the_estimate(solver):
    """A global penalty has nothing to sum, and says which solvers would; a local one probes with another method."""
    solution = solve(**options(solver, 0.1))
    for cls, local, able in (
        (reg.GlobalError, reg.LocalError, WITH_ERROR),
        (reg.GlobalStiffness, reg.LocalStiffness, WITH_STIFFNESS),
    ):
        name = "error" if cls is reg.GlobalError else "stiffness"
        if solver in able:
            assert cls()(solution) > 0
            continue
        with refused(ValueError, f"{solver!r} has no {name} estimate", *able):
            cls()(solution)
        with refused(ValueError, f"{solver!r} has no {name} estimate"):
            cls(reduce="mean", times_dt=False)(solution)
        assert torch.equal(seeded(local)(solution), seeded(local, solver="tsit5")(solution))


# -- values --------------------------------------------------------------------------------------------------------


def probes(solution, f, control):
    """error, raw error and stiffness of every accepted step, [step, batch], each step probed alone."""
    steps, how = solution.steps, {"solver": solution.solver, "rtol": solution.rtol, "atol": solution.atol}
    out = torch.zeros(3, *steps.t.shape, dtype=torch.float64)
    for j in range(len(steps)):
        if control == "joint":
            found = nde.probe(f, steps.t[j, 0], steps.z[j], steps.dt[j, 0], control="joint", **how)
            out[:, j] = torch.stack([found.error, found.raw_error, found.stiffness])
            continue
        rows = steps.mask[j]
        found = nde.probe(f, steps.t[j, rows], steps.z[j, rows], steps.dt[j, rows], **how)
        out[:, j, rows] = torch.stack([found.error, found.raw_error, found.stiffness])
    return out


REDUCTIONS = {
    "sum": lambda x, counts: x.sum(0),
    "mean": lambda x, counts: x.sum(0) / counts,
    "max": lambda x, counts: x.max(0).values,
}


@CONTROL
@ADJOINT
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("times_dt", [True, False])
@pytest.mark.parametrize("horizon", [(0.0, 2.0), (2.0, 0.0)])
def test_global_values(control, adjoint, reduce, times_dt, horizon):
    f = net()
    solution = solve(f, t=horizon, control=control, adjoint=adjoint)
    steps = solution.steps
    if control == "per_sample":
        assert not steps.mask.all(), "the samples must differ in their number of steps"
    with torch.no_grad():
        error, raw, stiffness = probes(solution, f, control)
    factor = steps.dt.abs() if times_dt else 1.0

    def by_hand(figure):
        return REDUCTIONS[reduce](figure * factor, steps.mask.sum(0))

    how = {"reduce": reduce, "times_dt": times_dt}
    # The estimate is a difference of nearly equal numbers: it has some digits less than the state.
    for penalty, expected in (
        (reg.GlobalError(**how), by_hand(error)),
        (reg.GlobalError(scaled=False, **how), by_hand(raw)),
        (reg.GlobalStiffness(**how), by_hand(stiffness)),
        (reg.GlobalStiffness(relative=True, **how), by_hand(stiffness) / solution.solver.stability_size),
    ):
        torch.testing.assert_close(penalty.figure(solution), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(penalty(solution), expected.mean(), rtol=1e-6, atol=0)


def test_defaults_are_the_thesis():
    """Σ error·|Δt| and Σ stiffness·|Δt|: what the solution itself reports."""
    solution = solve()
    assert torch.equal(reg.GlobalError().figure(solution), solution.error)
    torch.testing.assert_close(reg.GlobalStiffness().figure(solution), solution.stiffness, rtol=1e-12, atol=0)
    rate = torch.tensor([[1.0], [3.0], [10.0]], dtype=torch.float64)
    linear = nde.solve(nde.ODE(lambda t, z: -rate * z), torch.ones(3, 1, dtype=torch.float64), (0.0, 2.0))
    torch.testing.assert_close(reg.GlobalStiffness().figure(linear), 2 * rate[:, 0], rtol=1e-9, atol=0)
    highest = reg.GlobalStiffness(reduce="max", times_dt=False, relative=True).figure(linear)
    torch.testing.assert_close(highest, rate[:, 0] / linear.solver.stability_size, rtol=1e-9, atol=0)
    local = reg.LocalStiffness().figure(linear)
    torch.testing.assert_close(local, rate[:, 0], rtol=1e-6, atol=0)


@CONTROL
def test_the_raw_error_does_not_move_with_the_tolerance_it_is_not_divided_by(control):
    """On one grid: scaled goes as 1/tolerance, raw stays."""
    f = net()
    fixed = nde.StepControl(per_sample=control == "per_sample", adaptive=False)
    loose, tight = (solve(f, solver="tsit5", dt0=0.1, control=fixed, rtol=1e-2 * k, atol=1e-3 * k) for k in (1.0, 0.1))
    torch.testing.assert_close(reg.GlobalError()(tight), 10 * reg.GlobalError()(loose), rtol=1e-6, atol=0)
    raw = reg.GlobalError(scaled=False)
    torch.testing.assert_close(raw(tight), raw(loose), rtol=1e-9, atol=0)


class _At:
    """Makes a local penalty look at given times instead of drawn ones."""

    times = None

    def sample(self, solution):
        return self.times


class ErrorAt(_At, reg.LocalError):
    pass


class StiffnessAt(_At, reg.LocalStiffness):
    pass


def looking_at(cls, times, **given):
    penalty = cls(**given)
    penalty.times = times
    return penalty


def times_for(control, t=(0.0, 2.0)):
    share = [0.3] * BATCH if control == "joint" else [0.11, 0.52, 0.77, 0.9]
    return t[0] + (t[1] - t[0]) * torch.tensor(share, dtype=torch.float64)


def frozen_probe(f, solution, times, control, z, dt=None, solver=None):
    """The probe from (times, z), with the step size given, or that with which a solve from there to t1 would begin."""
    one = slice(0, 1) if control == "joint" else slice(None)
    end = {"t1": float(solution.ts[-1])} if dt is None else {"dt": dt[one].squeeze() if control == "joint" else dt}
    t = times[0] if control == "joint" else times
    how = {"rtol": solution.rtol, "atol": solution.atol, "control": control}
    return nde.probe(f, t, z, solver=solver or solution.solver, **how, **end)


@CONTROL
@ADJOINT
@pytest.mark.parametrize("horizon", [(0.0, 2.0), (2.0, 0.0)])
def test_local_values(control, adjoint, horizon):
    """Those of one probe from the solution at the sampled times, of the automatic step towards the end."""
    f, times = net(), times_for(control, horizon)
    solution = solve(f, t=horizon, control=control, adjoint=adjoint)
    with torch.no_grad():
        z = torch.stack([solution(t)[b] for b, t in enumerate(times)])
        for solver in (None, "bs3", "dopri5"):
            probe = frozen_probe(f, solution, times, control, z, solver=solver)
            assert (probe.dt * (horizon[1] - horizon[0]) > 0).all()
            size = nde.solvers.get(solver or "tsit5").stability_size
            for penalty, expected in (
                (looking_at(ErrorAt, times, solver=solver), probe.error * probe.dt.abs()),
                (looking_at(ErrorAt, times, solver=solver, scaled=False), probe.raw_error * probe.dt.abs()),
                (looking_at(StiffnessAt, times, solver=solver), probe.stiffness),
                (
                    looking_at(StiffnessAt, times, solver=solver, relative=True),
                    None if probe.stiffness is None else probe.stiffness / size,
                ),
            ):
                if expected is not None:
                    torch.testing.assert_close(penalty.figure(solution), expected, rtol=1e-6, atol=0)


# -- gradients -----------------------------------------------------------------------------------------------------

OPTIONS = {
    "error": lambda: reg.GlobalError(),
    "mean error": lambda: reg.GlobalError(reduce="mean"),
    "largest error": lambda: reg.GlobalError(reduce="max", times_dt=False),
    "raw error": lambda: reg.GlobalError(scaled=False),
    "stiffness": lambda: reg.GlobalStiffness(),
    "largest stiffness": lambda: reg.GlobalStiffness(reduce="max", times_dt=False, relative=True),
    "mean stiffness": lambda: reg.GlobalStiffness(reduce="mean"),
}


def fourth_order(value, h=1e-4):
    """The derivative at 0.

    Norms and maxima have kinks, and error estimates are small differences: the smooth, short steps of a mild f
    (gain=1), at a tolerance that lets the estimates be large, keep truncation and rounding below 3e-7 of the result.
    """
    with torch.no_grad():
        return (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)


class Moved:
    """The parameters and z0, a step along a random direction away; put back afterwards."""

    def __init__(self, f, z0):
        self.tensors = [z0, *f.parameters()]
        generator = torch.Generator().manual_seed(2)
        self.direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in self.tensors]

    def along(self, gradients):
        return sum((g * d).sum() for g, d in zip(gradients, self.direction, strict=True) if g is not None)

    def evaluated(self, value):
        """shift -> value() there."""

        def at(shift):
            kept = [x.detach().clone() for x in self.tensors]
            try:
                for x, d in zip(self.tensors, self.direction, strict=True):
                    x.data += shift * d
                return value()
            finally:
                for x, k in zip(self.tensors, kept, strict=True):
                    x.data.copy_(k)

        return at


@CONTROL
@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_global_gradients(control, adjoint, make):
    """Those of the frozen grid, by finite differences."""
    f, z0, penalty = net(gain=1.0), start().requires_grad_(), make()
    solution = solve(f, z0, adjoint=adjoint, control=control)
    moved = Moved(f, z0)
    gradients = torch.autograd.grad(penalty(solution), moved.tensors)
    assert all(g.isfinite().all() for g in gradients)
    at = moved.evaluated(lambda: penalty(nde.introspection.replay(solution, z0=z0)))
    torch.testing.assert_close(moved.along(gradients), fourth_order(at, 2e-5), rtol=1e-6, atol=0)


@CONTROL
@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("solver", [s for s in ADAPTIVE if s != "tsit5"])
def test_global_gradients_of_other_solvers(control, adjoint, solver):
    f, z0, penalty = net(gain=1.0), start().requires_grad_(), reg.GlobalError()
    tolerances = {"rtol": 1e-1, "atol": 1e-2} if solver == "dopri8" else {}
    solution = solve(f, z0, adjoint=adjoint, control=control, solver=solver, **tolerances)
    moved = Moved(f, z0)
    gradients = torch.autograd.grad(penalty(solution), moved.tensors)
    at = moved.evaluated(lambda: penalty(nde.introspection.replay(solution, z0=z0)))
    # Among the many steps of a method of low order is one at a kink, where a state passes through zero.
    h = 2e-5 if solution.solver.order > 3 else 3e-7
    torch.testing.assert_close(moved.along(gradients), fourth_order(at, h), rtol=1e-6, atol=0)


@CONTROL
@pytest.mark.parametrize("adjoint", EXACT)
def test_step_sizes_are_constants_to_the_gradient(control, adjoint):
    """The convention: the derivative with steps that are found anew is another one, by far."""
    f, z0, penalty = net(), start().requires_grad_(), reg.GlobalError()
    how = {"adjoint": adjoint, "control": control, "rtol": 1e-5}
    solution = solve(f, z0, **how)
    moved = Moved(f, z0)
    mine = moved.along(torch.autograd.grad(penalty(solution), moved.tensors))
    at = moved.evaluated(lambda: penalty(solve(f, z0, **how)))
    h = 1e-6  # so small that no sample's number of steps changes
    with torch.no_grad():
        assert at(h) != at(-h)
        rediscovered = (at(h) - at(-h)) / (2 * h)
    assert (rediscovered - mine).abs() > 0.1 * mine.abs()


@CONTROL
@pytest.mark.parametrize(
    ("adjoint", "through_state"),
    [(a, through) for a in ADJOINTS for through in (False, True) if a in DENSE or not through],
)
@pytest.mark.parametrize("cls", [ErrorAt, StiffnessAt])
@pytest.mark.parametrize("given", [{}, {"other": True}])
def test_local_gradients(control, adjoint, through_state, cls, given):
    """The step size is a constant, and so is the state unless `through_state`: then it is the solution's."""
    f, z0, times = net(gain=1.0), start().requires_grad_(), times_for(control)
    given = {} if not given else {"scaled": False} if cls is ErrorAt else {"relative": True}
    penalty = looking_at(cls, times, through_state=through_state, **given)
    solution = solve(f, z0, adjoint=adjoint, control=control, rtol=0.1, atol=0.1)
    assert len(solution.steps) > 1
    moved = Moved(f, z0)
    gradients = torch.autograd.grad(penalty(solution), moved.tensors, allow_unused=True)
    if through_state:
        assert (gradients[0] != 0).any(dim=1).all(), "every sample's state had a part"
    else:
        assert gradients[0] is None or (gradients[0] == 0).all()

    def state(source):
        return torch.stack([source(t)[b] for b, t in enumerate(times)])

    with torch.no_grad():
        there = state(solution)
        dt = frozen_probe(f, solution, times, control, there).dt

    def by_hand():
        z = state(nde.introspection.replay(solution, z0=z0)) if through_state else there
        probe = frozen_probe(f, solution, times, control, z, dt)
        if cls is ErrorAt:
            return ((probe.raw_error if given else probe.error) * dt.abs()).mean()
        return probe.stiffness.mean() / (solution.solver.stability_size if given else 1.0)

    torch.testing.assert_close(by_hand(), penalty(solution), rtol=1e-9, atol=0)
    difference = fourth_order(moved.evaluated(by_hand))
    torch.testing.assert_close(moved.along(gradients), difference, rtol=1e-6, atol=0)


@EVERY
@CONTROL
def test_gradients_agree_between_adjoints(penalty, control):
    f, z0 = net(), start().requires_grad_()

    def gradients(adjoint):
        tight = {} if penalty in GLOBAL else {"rtol": 1e-5, "atol": 1e-7}
        solution = solve(f, z0, (0.0, 0.5, 2.0), adjoint=adjoint, control=control, **tight)
        loss = (solution.zs**2).sum() + 3.0 * seeded(penalty)(solution)
        return torch.autograd.grad(loss, [z0, *f.parameters()])

    expected = gradients("direct")
    for adjoint in able(penalty):
        for a, b in zip(gradients(adjoint), expected, strict=True):
            close(a, b, 1e-8 if adjoint in EXACT else 1e-4)


@PENALTY_AND_ADJOINT
@CONTROL
def test_args_get_gradients_from_penalties(penalty, control, adjoint):
    rate = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64, requires_grad=True)
    f = nde.ODE(lambda t, z, rate: -rate * torch.sin(z) * (1 + t))
    solution = nde.solve(f, start(), (0.0, 1.0), args=rate, control=control, adjoint=adjoint)
    gradient = torch.autograd.grad(seeded(penalty)(solution), rate)[0]
    assert gradient.isfinite().all() and (gradient != 0).all()


@EVERY
@CONTROL
@ADJOINT
def test_without_gradients(penalty, control, adjoint):
    """The same number, for monitoring: of a solve without gradients, or of any solve when none are wanted."""
    f = net()
    with torch.no_grad():
        plain = seeded(penalty)(solve(f, control=control, adjoint=adjoint))
    assert not plain.requires_grad and plain.isfinite()
    solution = solve(f, control=control, adjoint=adjoint)
    torch.testing.assert_close(seeded(penalty)(solution).detach(), plain, rtol=1e-7, atol=0)
    with torch.no_grad():
        assert not seeded(penalty)(solution).requires_grad


@EVERY
def test_penalties_of_a_structure_in_float32(penalty):
    linear = nn.Linear(3, 3)

    def f(t, state):
        z, _ = state
        dz = torch.tanh(linear(z)) * torch.cos(t)
        return dz, dz.square().sum(1)

    solution = nde.solve(nde.ODE(f), (torch.randn(5, 3), torch.zeros(5)), (0.0, 2.0))
    value = seeded(penalty)(solution)
    assert value.shape == () and value > 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, list(linear.parameters())))


# -- sampled times -------------------------------------------------------------------------------------------------

MANY = 4000


def many(t, control="per_sample", rows=MANY):
    with torch.no_grad():
        z0 = torch.full((rows, 1), 1.5, dtype=torch.float64)
        return nde.solve(nde.ODE(lambda t, z: torch.sin(8 * t) * z), z0, t, control=control, rtol=1e-4)


def draws(cls, solution, sampling, seed=1):
    return cls(sampling, generator=torch.Generator().manual_seed(seed)).sample(solution)


@pytest.mark.parametrize("cls", LOCAL)
@pytest.mark.parametrize("t", [(0.0, 2.0), (3.0, -1.0)])
def test_unbiased_times_are_uniform_on_the_horizon(cls, t):
    times = draws(cls, many(t), "unbiased")
    assert times.shape == (MANY,)
    assert len(times.unique()) > 0.99 * MANY, "every sample has a time of its own"
    low, high = min(t), max(t)
    assert stats.kstest(times.numpy(), stats.uniform(low, high - low).cdf).pvalue > 0.01


def test_unbiased_times_are_uniform_on_each_samples_own_horizon():
    starts = torch.linspace(0.0, 5.0, MANY)
    lengths = torch.linspace(0.1, 2.0, MANY) * torch.where(torch.arange(MANY) % 2 == 0, 1.0, -1.0)
    times = draws(reg.LocalError, many((starts, starts + lengths)), "unbiased")
    share = ((times - starts) / lengths).double()
    assert stats.kstest(share.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("cls", LOCAL)
@pytest.mark.parametrize("t", [(0.0, 2.0), (3.0, -1.0)])
def test_biased_times_are_uniform_over_the_accepted_steps(cls, t):
    solution = many(t)
    steps = solution.steps
    assert len(steps) > 8 and steps.dt.abs().std() > 0.1 * steps.dt.abs().mean(), "steps must differ in size"
    times = draws(cls, solution, "biased")
    hits = torch.tensor([int((times == s).sum()) for s in steps.t[:, 0]])
    assert hits.sum() == MANY, "every time is the start of a step"
    assert stats.chisquare(hits.numpy()).pvalue > 0.01


def test_biased_times_are_uniform_over_each_samples_own_steps():
    """Where half of the samples have many steps and half have few."""
    rate = torch.where(torch.arange(MANY) % 2 == 0, 12.0, 2.0)[:, None].double()
    with torch.no_grad():
        f = nde.ODE(lambda t, z, rate: -rate * z * torch.cos(t))
        solution = nde.solve(f, torch.ones(MANY, 1, dtype=torch.float64), (0.0, 2.0), args=rate)
    steps, times = solution.steps, draws(reg.LocalError, solution, "biased")
    many_steps, few_steps = (int(steps.mask[:, b].sum()) for b in (0, 1))
    assert many_steps > 1.5 * few_steps > 6
    for first, count in ((0, many_steps), (1, few_steps)):
        hits = [int((times[first::2] == s).sum()) for s in steps.t[:count, first]]
        assert sum(hits) == MANY // 2 and stats.chisquare(hits).pvalue > 0.01


def test_biased_times_are_those_of_the_samples_own_steps():
    solution = solve(z0=start(64))
    steps = solution.steps
    assert not steps.mask.all()
    for seed in range(20):
        times = draws(reg.LocalError, solution, "biased", seed)
        assert ((steps.t == times) & steps.mask).any(dim=0).all()


def figures_at(cls, times, t):
    """A local penalty's figure at given times of one solution (every sample of `many` is the same)."""
    watched = cls()
    watched.sample = lambda solution: times
    with torch.no_grad():
        return watched.figure(many(t, rows=len(times)))


@pytest.mark.parametrize("cls", LOCAL)
@pytest.mark.parametrize("t", [(0.0, 2.0), (3.0, -1.0)])
def test_the_unbiased_expectation_is_the_integral(cls, t):
    """Over 20,000 sampled times, within 3 standard errors of the mean of the figure over the horizon."""
    count, fine = 20_000, 8_001
    with torch.no_grad():
        sampled = cls("unbiased", generator=torch.Generator().manual_seed(4)).figure(many(t, rows=count))
    along = figures_at(cls, torch.linspace(*t, fine, dtype=torch.float64), t)
    integral = (along[1:] + along[:-1]).mean() / 2
    error = sampled.std() / count**0.5
    assert error < 0.04 * integral, "precise enough to see a bias"
    assert (sampled.mean() - integral).abs() < 3 * error


@pytest.mark.parametrize("cls", LOCAL)
def test_the_biased_expectation_is_the_mean_over_the_steps(cls):
    """Over 20,000 sampled times; the mean over the horizon is another number."""
    count, t = 20_000, (0.0, 2.0)
    solution = many(t, rows=count)
    starts = solution.steps.t[:, 0]
    with torch.no_grad():
        penalty = cls("biased", generator=torch.Generator().manual_seed(4))
        sampled = penalty.figure(solution)
        times = cls("biased", generator=torch.Generator().manual_seed(4)).sample(solution)
    hits = [int((times == s).sum()) for s in starts]
    assert sum(hits) == count and stats.chisquare(hits).pvalue > 0.01
    mean = figures_at(cls, starts, t).mean()
    error = sampled.std() / count**0.5
    assert (sampled.mean() - mean).abs() < 3 * error
    horizon = figures_at(cls, torch.linspace(*t, 2001, dtype=torch.float64), t).mean()
    assert (mean - horizon).abs() > 6 * error


@pytest.mark.parametrize("cls", LOCAL)
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_joint_control_draws_one_time(cls, sampling):
    solution = many((0.0, 2.0), control="joint", rows=8)
    penalty = cls(sampling, generator=torch.Generator().manual_seed(3))
    drawn = []
    for _ in range(400):
        times = penalty.sample(solution)
        assert times.shape == (8,) and (times == times[0]).all()
        drawn.append(float(times[0]))
    if sampling == "unbiased":
        assert stats.kstest(drawn, stats.uniform(0.0, 2.0).cdf).pvalue > 0.01
    else:
        hits = [sum(abs(x - s) < 1e-12 for x in drawn) for s in solution.steps.t[:, 0].tolist()]
        assert sum(hits) == 400 and stats.chisquare(hits).pvalue > 0.01


@pytest.mark.parametrize("cls", LOCAL)
def test_the_generator(cls):
    """Given one, the global one is left alone; else that one is used, and every call draws anew."""
    solution = solve()
    state = torch.get_rng_state()
    first, again = (seeded(cls)(solution) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    penalty = seeded(cls)
    assert not torch.equal(penalty(solution), penalty(solution))
    torch.manual_seed(1)
    one = cls()(solution)
    other = cls()(solution)
    torch.manual_seed(1)
    assert torch.equal(cls()(solution), one) and not torch.equal(one, other)


# -- they work -----------------------------------------------------------------------------------------------------


@PENALTY_AND_ADJOINT
@CONTROL
def test_training_reduces_the_figure(penalty, control, adjoint):
    layer = nde.NeuralODE(net(3, gain=3.0), (0.0, 1.0), control=control, adjoint=adjoint, rtol=1e-2, atol=1e-3)
    z0 = start(8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    learned = seeded(penalty)

    @torch.no_grad()
    def measured():
        layer(z0)
        # A local figure depends on the times: the mean over some, the same before and after.
        watcher = seeded(penalty)
        return float(sum(watcher(layer) for _ in range(8)))

    before = measured()
    for _ in range(30):
        optimizer.zero_grad()
        layer(z0)
        learned(layer).backward()
        optimizer.step()
    assert measured() < 0.8 * before


def test_a_penalty_beside_a_task_makes_the_solve_cheaper():
    """What it is all for: the same fit, fewer evaluations of f."""
    z0 = start(32)
    target = torch.stack([z0[:, 0] * z0[:, 1], z0.sum(1)], 1).tanh()
    cost, fit = {}, {}
    for weight in (0.0, 0.1):
        layer = nde.NeuralODE(net(4, gain=2.5), rtol=1e-4, atol=1e-5)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        penalty = reg.GlobalStiffness(weight)
        for _ in range(60):
            optimizer.zero_grad()
            loss = ((layer(z0) - target) ** 2).mean() + penalty(layer)
            loss.backward()
            optimizer.step()
        fit[weight] = float(((layer(z0) - target) ** 2).mean().detach())
        cost[weight] = float(layer.solution.stats.nfe.double().mean())
    assert cost[0.1] < 0.85 * cost[0.0]
    assert fit[0.1] < 0.5 * float(target.var())
