"""torchdyn's layers after `regularizers.attach`: their results to the bit, what a penalty takes, and another engine."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import random

import pytest
import torch
from adapters import check_gradient
from helpers import close, refused
from programs import neural_sde
from torch import nn

import neuralde as nde
import regularizers as reg
from regularizers import recorded
from regularizers.recorded import Recorded
from regularizers.torchdyn import _Eye

# torchdyn takes seconds to import: only where these tests run.
core = pytest.importorskip("torchdyn.core")
layers = pytest.importorskip("torchdyn.nn")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting tolerances has no effect"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
]
SOLVERS = ["dopri5", "tsit5", "rk4", "euler"]
SENSITIVITIES = ["autograd", "adjoint", "interpolated_adjoint"]
SPANS = {
    "forwards": torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64),
    "backwards": torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64),
}


@pytest.fixture(autouse=True)
def _times():
    """The same sampled times in every run, whatever ran before."""
    with reg.record(torch.Generator().manual_seed(0)):
        yield


def layer(solver="dopri5", sensitivity="autograd", control=False, **how):
    """A NeuralODE with something to regularize, and data control where asked for."""
    torch.manual_seed(0)
    first = layers.DataControl() if control else layers.DepthCat(1)
    f = nn.Sequential(first, nn.Linear(4 if control else 3, 12), nn.Tanh(), nn.Linear(12, 2))
    for p in f.parameters():
        p.data *= 1.5
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it wraps f
        made = core.NeuralODE(f, solver=solver, sensitivity=sensitivity, **{"atol": 1e-4, "rtol": 1e-4} | how)
    return made.double()


def start():
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)


def same(one, other):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("direction", SPANS)
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_bit_for_bit(solver, sensitivity, direction):
    span, ours, theirs = SPANS[direction], reg.attach(layer(solver, sensitivity)), layer(solver, sensitivity)
    t, zs = ours(start(), span)
    t_theirs, zs_theirs = theirs(start(), span)
    assert torch.equal(t, t_theirs) and torch.equal(zs, zs_theirs) and ours.vf.nfe == theirs.vf.nfe
    assert same(gradients(zs[-1].square().sum(), ours), gradients(zs_theirs[-1].square().sum(), theirs))
    for sampling in ("unbiased", "biased"):
        place = ours.solution.place(sampling)
        assert 0 <= float(place.t) <= 1 and float(place.dt) * float(span[-1] - span[0]) > 0
        found = [g for g in gradients(reg.LocalError(sampling)(ours), ours) if g is not None]
        assert found and all(bool(g.isfinite().all()) for g in found) and any(bool(g.any()) for g in found)
    # Their solution, with one more output time where the step begins that is made up to it.
    at = ours.solution.place("unbiased")
    low, high = span[span <= at.t].max(), span[span > at.t].min()
    if solver in ("rk4", "euler"):
        between = [low, at.t] if direction == "forwards" else [high, at.t]
        before = zs_theirs[int((span == between[0]).nonzero())]
        close(at.state(False), theirs.trajectory(before, torch.stack(between))[-1], 1e-12)
    else:
        exact = nde.solve(nde.ODE(theirs.vf), start(), torch.stack([span[0], at.t]), control="joint", rtol=1e-10).final
        close(at.state(False), exact, 2e-3)


def test_biased_is_a_step_of_theirs():
    ours, seen = reg.attach(layer("tsit5")), []
    step = ours.solver.step
    ours.solver.step = lambda f, x, t, dt, **how: seen.append((t.item(), dt.item())) or step(f, x, t, dt, **how)
    ours(start(), SPANS["forwards"])
    for solver in ("tsit5", "dopri5"):
        ours = reg.attach(layer(solver, interpolator="4th" if solver == "dopri5" else None))
        ours(start(), SPANS["forwards"])
        place = ours.solution.place("biased")
        if solver == "tsit5":
            assert (float(place.t), float(place.dt)) in seen
        ratio = reg.LocalError("biased").look(ours.solution).error
        assert ratio.shape == (1,) and bool((ratio > 0).all()) and bool((ratio <= 1 + 1e-9).all())


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_gradients_against_finite_differences(sensitivity):
    ours = reg.attach(layer(sensitivity=sensitivity))
    ours(start(), SPANS["forwards"])
    # The first step, and what is left of the horizon at its end, may be so short that their errors are rounding.
    while any(float(ours.solution.place(x).dt) < 0.4 for x in ("unbiased", "biased")):
        ours(start(), SPANS["forwards"])
    solution, parameters = ours.solution, list(ours.vf.parameters())
    for penalty in (reg.LocalError(), reg.LocalError("biased"), reg.LocalStiffness()):
        check_gradient(penalty, solution, parameters)


def test_gradients_through_the_state():
    x = start().requires_grad_()
    ours = reg.attach(layer())
    ours(x, SPANS["forwards"])
    whole = reg.LocalError(through_state=True)(ours)
    assert bool(torch.autograd.grad(whole, x, retain_graph=True)[0].any())
    # The state at a fixed time, whose gradient is that of the solution itself, however the steps move.
    for solver in SOLVERS[:2]:
        ours = reg.attach(layer(solver, atol=1e-8, rtol=1e-8))
        ours(x, SPANS["forwards"])
        place = ours.solution.place("unbiased")
        exact = nde.solve(nde.ODE(ours.vf), x, (0.0, float(place.t)), control="joint", rtol=1e-10, atol=1e-10).final
        found, expected = (torch.autograd.grad(z.sum(), x)[0] for z in (place.state(True), exact))
        close(found, expected, 1e-5)
    ours = reg.attach(layer())
    ours(x, SPANS["forwards"])
    assert torch.autograd.grad(reg.LocalError()(ours), x, allow_unused=True)[0] is None
    ours = reg.attach(layer(sensitivity="adjoint"))
    ours(x, SPANS["forwards"])
    with refused(ValueError, "through_state=True", "adjoint", "autograd"):
        reg.LocalError(through_state=True)(ours)


def test_data_control_of_an_earlier_call():
    """A layer's control belongs to the call, and is there again when its penalty is taken."""
    ours = reg.attach(layer(control=True, return_t_eval=False))
    with reg.record() as solutions:
        ours(start(), SPANS["forwards"])
        first = reg.LocalError()(solutions[0])
        ours(start()[:3], SPANS["forwards"])
    control = ours.vf.vf.vf[0]._control
    assert torch.equal(reg.LocalError()(solutions[0]), first)
    assert ours.vf.vf.vf[0]._control is control


@pytest.mark.parametrize("engine", [None, "neuralde"])
@pytest.mark.parametrize(("solver", "sensitivity"), [("dopri5", "autograd"), ("tsit5", "adjoint"), ("rk4", "autograd")])
def test_steer(solver, sensitivity, engine):
    """In training a layer solves to the times drawn, in eval mode to its own; a penalty beside it is of that solve."""
    ours, theirs = reg.attach(layer(solver, sensitivity), engine), layer(solver, sensitivity)
    plain = theirs if engine is None else reg.attach(layer(solver, sensitivity), engine)
    steer, mirror = (reg.Steer(0.2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    with refused(ValueError, "attach", "steer.sample"):
        reg.Steer().prepare(theirs)
    penalty = (steer + reg.LocalError()).prepare(ours)
    for span in (SPANS["forwards"], SPANS["backwards"], None):
        drawn = mirror.sample(torch.linspace(0, 1, 2) if span is None else span)
        t, zs = ours(start(), span)
        # torchdyn gives the times of a solve backwards as it counts them.
        assert torch.equal(t.abs(), drawn) and torch.equal(zs, plain(start(), drawn)[1])
        assert float(penalty(ours).detach()) > 0
    with refused(ValueError, "save_at"):
        ours(start(), SPANS["forwards"], save_at=SPANS["forwards"][1:])
    t, zs = ours.eval()(start(), SPANS["forwards"])
    assert torch.equal(t, SPANS["forwards"]) and torch.equal(zs, plain(start(), SPANS["forwards"])[1])


def test_models(monkeypatch):
    inner = layer(return_t_eval=False)
    model = nn.Sequential(nn.Linear(2, 2).double(), inner, nn.Flatten(0), nn.Unflatten(0, (2, 6, 2)))
    with refused(ValueError, "attach"):
        reg.LocalError()(model)
    assert reg.attach(reg.attach(model)) is model
    with refused(ValueError, "call the model"):
        reg.LocalError()(model)
    mixed = nn.ModuleList([model, nde.NeuralODE(nn.Linear(2, 2).double())])
    reg.attach(mixed)
    mixed[1](start())
    model(start())
    penalty = reg.LocalError("biased", generator=None)
    torch.manual_seed(0)
    both = penalty(mixed)
    torch.manual_seed(0)
    assert torch.equal(both, penalty(model) + penalty(mixed[1]))
    # In eval mode and without gradients: no penalty.
    monkeypatch.setattr(recorded, "_WARNED", set())
    model.eval()
    model(start())
    with pytest.warns(UserWarning, match=r"is 0 .* NeuralODE in eval mode .* call \.train"):
        assert float(penalty(model)) == 0.0
    model.train()
    with torch.no_grad():
        model(start())
    assert float(penalty(model)) == 0.0
    # What is drawn elsewhere, and what a copy has.
    model(start())
    other = pickle.loads(pickle.dumps(model))
    assert other[1].solution is None
    before = model[1].solution
    assert torch.equal(other(start()), model(start())) and other[1].solution is not None
    assert other[1].solution is not before
    assert set(model.state_dict()) == set(other.state_dict())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("engine", [None, "neuralde"])
def test_compiled_models(engine):
    """torch.compile works on what stands around a layer, whichever of it and attach() comes first."""

    def made():
        return nn.Sequential(layer(sensitivity="adjoint", return_t_eval=False), nn.Flatten(1))

    plain = reg.attach(made(), engine)
    expected = plain(start())
    for compiled in (
        torch.compile(reg.attach(made(), engine), backend="eager"),
        reg.attach(torch.compile(made(), backend="eager"), engine),
    ):
        assert torch.equal(compiled(start()), expected)
        with reg.record(torch.Generator().manual_seed(5)) as solutions:
            compiled(start())
        value = reg.LocalStiffness()(compiled)
        assert float(value.detach()) > 0 and len(solutions) == 1
        assert any(bool(g.any()) for g in gradients(value, compiled) if g is not None)
    # What is made of the layer itself holds the layer's solve, which counts once.
    alone = torch.compile(plain[0], backend="eager")
    alone(start())
    assert len(reg.base.solutions(alone)) == 1
    if engine is not None:
        assert len(nde.diagnose(alone, start(), show=False).layers) == 1


def test_what_watches_a_solver_can_be_copied():
    solver = layer().solver
    eye = copy.copy(_Eye(solver, random.Random(0)))
    assert eye._solver is solver and eye.order == solver.order


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_samples_that_are_not_finite_have_no_part(sensitivity):
    ours, x = reg.attach(layer("rk4", sensitivity)), start()
    found = []
    for one in (x.clone(), x[[0, 2, 3, 4, 5]], torch.full_like(x, torch.nan)):
        if len(one) == len(x) and not found:
            one[1] = torch.nan
        with reg.record(torch.Generator().manual_seed(3)):  # away from the end, where the step is short
            ours(one, SPANS["forwards"])
        found.append([penalty(ours) for penalty in (reg.LocalError(), reg.LocalError("biased"), reg.LocalStiffness())])
    for value, alone, nothing in zip(*found, strict=True):
        close(value, alone, 1e-10)
        assert float(value.detach()) > 0 == float(nothing)


def test_trajectories_and_shared_solvers():
    a, b = reg.attach(layer()), layer()
    b.solver = a.solver
    zs = a.trajectory(start(), SPANS["forwards"])
    assert torch.equal(zs, layer().trajectory(start(), SPANS["forwards"]))
    assert bool(reg.LocalError(through_state=True)(a) > 0)
    assert a.solver is b.solver and "solver" not in a.__dict__
    solution = a.solution
    b(start(), SPANS["forwards"])
    assert a.solution is solution and not hasattr(b, "solution")


def test_what_a_black_box_cannot_give_and_the_engine_that_can():
    x, span = start(), torch.linspace(0, 1, 4, dtype=torch.float64)
    for solver, tolerance in (("dopri5", 1e-4), ("tsit5", 1e-4), ("euler", 1e-12)):
        model = reg.attach(nn.Sequential(layer(solver, return_t_eval=False)))
        theirs = model[0](x, span)
        with refused(TypeError, "Recorded", "NeuralODE(f"):
            nde.diagnose(model[0].solution)
        with refused(TypeError, "GlobalError", "neuralde's", 'attach(model, engine="neuralde")'):
            reg.GlobalError()(model)
        (seen,) = nde.diagnose(model, x, show=False).layers
        model[0](x)
        assert seen.name == "0.vf" and len(seen.solution.status) == len(x) and isinstance(model[0].solution, Recorded)
        reg.attach(model, engine="neuralde")
        ours = model[0](x, span)
        close(ours, theirs, tolerance)
        assert isinstance(model[0].solution, nde.Solution)
        assert [one.name for one in nde.diagnose(model, x, show=False).layers] == ["0"]
        model[0](x, span)
        if solver != "euler":
            found = gradients(reg.GlobalError()(model) + reg.GlobalStiffness()(model), model)
            assert any(bool(g.any()) for g in found if g is not None)
        assert pickle.loads(pickle.dumps(model))[0].solution is None
        reg.attach(model)
        assert torch.equal(model[0](x, span), theirs)


def test_the_engines_options():
    model, x = layer("tsit5", "adjoint"), start()
    reg.attach(model, engine="neuralde", control="per_sample", rtol=1e-8, atol=1e-8)
    t, zs = model(x, SPANS["backwards"])
    assert torch.equal(t, SPANS["backwards"]) and model.solution.rtol == 1e-8 and model.solution.control.per_sample
    exact = layer("tsit5", atol=1e-9, rtol=1e-9)(x, SPANS["backwards"])[1]
    close(zs, exact, 1e-6)
    reg.GlobalStiffness()(model).backward()
    with refused(TypeError, "nonsense"):
        reg.attach(model, engine="neuralde", nonsense=1)
    with refused(ValueError, "engine", "'julia'"):
        reg.attach(model, engine="julia")
    with refused(ValueError, "rtol", "engine"):
        reg.attach(model, rtol=1e-3)
    with refused(ValueError, "torchdyn", "regularizers.torchdiffeq"):
        reg.attach(nn.Linear(2, 2))
    with refused(TypeError, "Module", "int"):
        reg.attach(3)


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_neural_sdes(sensitivity):
    model = neural_sde(sensitivity, True, torch.float64).model
    model(start())
    place = model[0].solution.place("biased")
    assert abs(float(place.dt) - 0.05) < 1e-3
    with refused(ValueError, "NeuralSDE", "engine='neuralde'"):
        reg.attach(model, engine="neuralde")
    path = model[0].trajectory(start(), torch.linspace(0, 1, 3, dtype=torch.float64))
    assert path.shape == (3, 6, 2) and bool(reg.LocalError(through_state=True)(model) > 0)
    model.eval()
    model(start())
    assert float(reg.LocalError()(model)) == 0.0


@pytest.mark.parametrize("engine", [None, "neuralde"])
def test_replicas_of_data_parallel_are_watched_as_themselves(engine):
    """What nn.DataParallel makes of a layer on every device: a copy whose parameters are attributes."""
    ours = reg.attach(layer(), engine=engine)
    replica = ours._replicate_for_data_parallel()
    replica._modules["vf"] = copy.deepcopy(ours.vf)
    z = replica(start(), SPANS["forwards"])[1]
    assert ours.solution is None and replica.solution is not None
    value = z[-1].square().sum() + reg.LocalStiffness()(replica)
    assert all(g is None for g in gradients(value, ours))
    assert any(g is not None and bool(g.any()) for g in gradients(value, replica.vf))
    # Its own copies are its own too, and the layer's calls still the layer's.
    assert replica.forward.layer is replica and ours.forward.layer is ours


def test_who_is_lost_after_the_last_output_is_left_out():
    """The rows that save_at asks for may lie before the time that is looked at."""

    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, t, x, args=None):
            return self.rate * x + torch.where((t > 0.1) & (x > 5.0), torch.inf, 0.0)

    core = pytest.importorskip("torchdyn.core")
    ours = reg.attach(core.NeuralODE(Exploding(), solver="euler", sensitivity="autograd"))
    x = torch.tensor([[1.0], [10.0]], dtype=torch.float64)
    for sampling in ("unbiased", "biased"):
        for _ in range(4):
            y = ours(
                x, torch.linspace(0, 1, 21, dtype=torch.float64), save_at=torch.tensor([0.1], dtype=torch.float64)
            )[1]
            assert bool(y.isfinite().all())
            penalty = reg.LocalStiffness(sampling)(ours)
            (gradient,) = torch.autograd.grad(penalty, list(ours.vf.parameters()))
            assert bool(penalty.isfinite()) and bool(gradient.isfinite())
