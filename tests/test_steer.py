"""Steer: random end times in training; and sums of penalties."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, refused
from scipy import stats
from torch import nn

import neuralde as nde
import regularizers as reg

MANY = 2000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(t=(0.0, 1.0), **how):
    torch.manual_seed(0)
    return nde.NeuralODE(nde.TimeChain(nde.AppendTime(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 2)), t, **how)


def start(batch=3):
    return torch.randn(batch, 2, generator=generator(5))


def uniform(values, low, high):
    return stats.kstest(torch.as_tensor(values).double().numpy(), stats.uniform(low, high - low).cdf).pvalue > 0.01


# -- the times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [(0.0, 1.0), (2.0, -1.0), [1, 4], torch.tensor([0.0, 2.0])])
@pytest.mark.parametrize("b", [None, 0.3])
def test_the_end_is_uniform(t, b):
    steer = reg.Steer(b, generator=generator())
    drawn = [steer.sample(t) for _ in range(MANY)]
    assert type(drawn[0]) is (torch.Tensor if isinstance(t, torch.Tensor) else tuple)
    assert all(float(x[0]) == float(t[0]) and len(x) == 2 for x in drawn)
    half = abs(float(t[1] - t[0])) / 2 if b is None else b
    assert uniform([float(x[1]) for x in drawn], float(t[1]) - half, float(t[1]) + half)


@pytest.mark.parametrize("training", [True, False])
def test_times_that_are_none(training):
    steer = reg.Steer().train(training)
    for t in (torch.zeros(1), torch.zeros(0), torch.zeros(3, 1), torch.zeros(()), torch.zeros(2, 2, 2), (0.0,), []):
        with refused(ValueError, "t must have", "(t0, t1)", "got"):
            steer.sample(t)
    with refused(TypeError, "(t0, t1)", "1.0"):
        steer.sample(1.0)
    with refused(TypeError, "b must", "'1'"):
        reg.Steer("1")


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("b", [None, 0.15])
def test_output_times_are_uniform_around_where_they_were(sign, b):
    times = sign * torch.tensor([0.0, 1.0, 1.4, 3.0], dtype=torch.float64)
    steer = reg.Steer(b, generator=generator())
    drawn = torch.stack([steer.sample(times) for _ in range(MANY)])
    assert ((drawn.diff(dim=1) * sign) > 0).all(), "in their order"
    assert (drawn[:, 0] == times[0]).all()
    room = [0.2, 0.2, 0.8] if b is None else [b] * 3  # half of the shorter interval beside
    for i, half in enumerate(room, start=1):
        assert uniform(drawn[:, i], times[i] - half, times[i] + half)
    correlation = torch.corrcoef(drawn[:, 1:].T) - torch.eye(3)
    assert correlation.abs().max() < 0.1, "each has a draw of its own"


def test_samples_with_times_of_their_own_share_the_draws():
    times = torch.tensor([[0.0, 1.0], [1.0, 5.0], [0.0, -2.0]])
    drawn = reg.Steer(generator=generator()).sample(times)
    share = (drawn[:, 1] - times[:, 0]) / (times[:, 1] - times[:, 0])
    assert (share - share[0]).abs().max() < 1e-6 and share[0] != 1
    tuples = reg.Steer(generator=generator()).sample((times[:, 0], times[:, 1]))
    torch.testing.assert_close(tuples, drawn)


def test_bad_half_widths():
    for b in (0.0, -1.0, float("nan"), float("inf")):
        with refused(ValueError, "b must be positive"):
            reg.Steer(b)
    with refused(ValueError, "less than the horizon", "got 1"):
        reg.Steer(1.0).sample((0.0, 1.0))
    with refused(ValueError, "half of every interval"):
        reg.Steer(0.3).sample(torch.tensor([0.0, 1.0, 1.5]))
    reg.Steer(0.25).sample(torch.tensor([0.0, 1.0, 1.5]))


def test_a_schedule_of_the_half_width():
    steer = reg.Steer(reg.linear(0.5, 0.1, 2), generator=generator())
    spreads = []
    for _ in range(3):
        spreads.append(max(abs(steer.sample((0.0, 1.0))[1] - 1.0) for _ in range(500)))
        steer.step()
    assert spreads == pytest.approx([0.5, 0.3, 0.1], rel=0.05) and max(spreads[1:]) < 0.3
    other = reg.Steer(reg.linear(0.5, 0.1, 2))
    other.load_state_dict(steer.state_dict())
    assert other.weight == steer.weight == pytest.approx(0.1)
    assert "b=0.1" in repr(steer) and "half" in repr(reg.Steer())


def test_eval_mode_of_the_steer_itself():
    steer = reg.Steer().eval()
    assert steer.sample((0.0, 1.0)) == (0.0, 1.0)
    assert steer.train().sample((0.0, 1.0)) != (0.0, 1.0)


# -- on layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_training_ends_elsewhere_and_eval_does_not(adjoint, control):
    model = nn.Sequential(layer(adjoint=adjoint, control=control), nn.Linear(2, 2))
    z0 = start()
    expected = model(z0)
    steer = reg.Steer(0.4, generator=generator()).prepare(model)
    ends = []
    for _ in range(20):
        out = model(z0)
        solution = model[0].solution
        ends.append(float(solution.ts[-1]))
        torch.testing.assert_close(solution.final, layer((0.0, ends[-1]))(z0), rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert len(set(ends)) == 20 and all(0.6 <= x <= 1.4 for x in ends)
    assert torch.equal(model.eval()(z0), expected) and float(model[0].solution.ts[-1]) == 1.0
    assert not torch.equal(model.train()(z0), expected)
    steer.release(model)
    assert torch.equal(model(z0), expected)


def test_every_way_to_call_a_layer():
    one = layer()
    reg.Steer(generator=generator()).prepare(one)
    times = torch.linspace(0, 1, 5)
    one.trajectory(start(), times)
    assert (one.solution.ts[1:] != times[1:]).all() and one.solution.ts[0] == 0
    one.solve(start())
    assert one.solution.ts[-1] != 1
    one.solve(start(), t=(1.0, 3.0))
    assert 2.0 <= one.solution.ts[-1] <= 4.0 and one.solution.ts[-1] != 3.0


def test_as_a_penalty():
    """The value is zero, and the first call sets it to work: the training loop is that of every penalty."""
    model, z0 = nn.Sequential(layer()), start()
    steer = reg.Steer(generator=generator())
    model(z0)
    assert model[0].solution.ts[-1] == 1
    value = steer(model)
    assert value.shape == () and value == 0 and not value.requires_grad
    model(z0)
    assert model[0].solution.ts[-1] != 1
    assert steer(model[0].solution) == 0
    with refused(ValueError, "prepare", "sample"):
        reg.Steer()(model[0].solution)
    with refused(TypeError, "Solution", "int"):
        steer(3)
    with refused(ValueError, "no layer", "attach"):
        steer.prepare(nn.Linear(2, 2))
    with refused(TypeError, "layer"):
        steer.prepare(3)


def test_a_model_with_a_steer_is_saved_and_copied():
    model = layer()
    names = set(model.state_dict())
    reg.Steer().prepare(model)
    assert set(model.state_dict()) == names
    model(start())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(start())
        assert other.solution.ts[-1] != 1


def test_other_solvers_get_their_times_from_it():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    steer = reg.Steer(generator=generator())
    times = steer.sample(torch.tensor([0.0, 1.0]))
    z = torchdiffeq.odeint(lambda t, z: -z, torch.ones(2, 1), times)
    torch.testing.assert_close(z[-1], torch.exp(-times[-1]).expand(2, 1), rtol=1e-4, atol=1e-4)


def test_a_sum_on_another_librarys_solve():
    """The times are drawn for the solve, the other part looks at it."""
    pytest.importorskip("torchdiffeq")
    from regularizers.torchdiffeq import odeint

    f, steer = nn.Linear(2, 2), reg.Steer(generator=generator())
    penalty = steer + reg.LocalError()
    with reg.record() as solutions:
        z = odeint(lambda t, z: f(z), start(), steer.sample(torch.tensor([0.0, 1.0])))
    (z[-1].sum() + penalty(solutions)).backward()
    assert penalty(solutions) == penalty.parts[1](solutions) > 0 and f.weight.grad.isfinite().all()


def test_the_effect_of_the_paper():
    """A fit under random end times has a solution that stays near its end: its slope there is smaller."""
    z0 = start(16)
    target = torch.stack([z0[:, 0] * z0[:, 1], z0.sum(1)], 1).tanh()
    slopes = []
    for steer in (None, reg.Steer(generator=generator())):
        model = layer()
        if steer is not None:
            steer.prepare(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            ((model(z0) - target) ** 2).mean().backward()
            optimizer.step()
        final = model.eval()(z0)
        slopes.append(float(model.f(torch.ones(16, 1), final).norm().detach()))
    assert slopes[1] < 0.8 * slopes[0]


# -- sums ----------------------------------------------------------------------------------------------------------


def parts():
    return reg.GlobalError(2.0), reg.KineticEnergy(reg.linear(1.0, 0.0, 4)), reg.GlobalStiffness(0.5, reduce="mean")


def test_a_sum_is_the_sum():
    model = nn.Sequential(layer(), nn.Linear(2, 2), layer(t=(1.0, 0.0)))
    model(start())
    a, b, c = parts()
    alone = [x(model) for x in (a, b, c)]
    for penalty, expected in (
        (a + b, alone[0] + alone[1]),
        (a + b + c, sum(alone)),
        (a + (b + c), sum(alone)),
        (sum([a, b, c]), sum(alone)),
        (0.1 * a, 0.1 * alone[0]),
        (a * 3 + 0.5 * (b + 2 * c), 3 * alone[0] + 0.5 * alone[1] + alone[2]),
        (reg.Sum([a, b], [2.0, -1.0]), 2 * alone[0] - alone[1]),
    ):
        assert isinstance(penalty, reg.Regularizer)
        torch.testing.assert_close(penalty(model), expected, rtol=1e-6, atol=0)
        figure = penalty.figure(model[0].solution)
        torch.testing.assert_close(figure.mean(), penalty(model[0].solution), rtol=1e-5, atol=0)
    gradients = torch.autograd.grad((a + b)(model), model[0].f.layers[2].weight, retain_graph=True)
    expected = torch.autograd.grad(alone[0] + alone[1], model[0].f.layers[2].weight)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)


def test_a_sum_of_a_steer_and_others():
    """The thesis' STEER + ERNODE."""
    model, z0 = layer(), start()
    error = reg.GlobalError()
    penalty = (reg.Steer(generator=generator()) + error).prepare(model)
    model(z0)
    assert model.solution.ts[-1] != 1
    assert torch.equal(penalty(model), error(model)) and penalty(model).requires_grad
    assert torch.equal(penalty(model.solution), error(model.solution))


def test_steps_and_state_of_a_sum():
    a, b, c = parts()
    penalty = a + 2.0 * b + b
    for _ in range(3):
        penalty.step()
    assert b.weight == pytest.approx(0.25), "once per step, however often it is in the sum"
    assert (a.weight, c.weight) == (2.0, 0.5) and int(c.steps) == 0
    fresh = reg.GlobalError(2.0) + 2.0 * reg.KineticEnergy(reg.linear(1.0, 0.0, 4))
    fresh.load_state_dict((a + b).state_dict())
    assert fresh.parts[1].weight == pytest.approx(0.25)
    again = pickle.loads(pickle.dumps(penalty))
    assert repr(again) == repr(penalty) and again.factors == [1.0, 2.0, 1.0]
    assert "GlobalError" in repr(penalty) and "factors" in repr(penalty)


def test_bad_sums():
    a, b, _ = parts()
    with pytest.raises(TypeError):
        a + 1.0
    with pytest.raises(TypeError):
        a * b
    with pytest.raises(TypeError):
        a + torch.ones(())
    with refused(ValueError, "finite"):
        float("nan") * a
    with refused(TypeError, "Linear"):
        reg.Sum([a, nn.Linear(2, 2)])
    with refused(ValueError, "parts"):
        reg.Sum([])
    with refused(ValueError, "factor"):
        reg.Sum([a, b], [1.0])


def test_a_penalty_over_a_number_and_differences():
    a, b, _ = parts()
    assert (a / 4).factors == [0.25] and isinstance(a / 4, reg.Sum)
    with refused(TypeError, "(-1.0) * b"):
        a - b
    with pytest.raises(TypeError):
        a / b


# -- one's own -----------------------------------------------------------------------------------------------------


def test_the_pages_own_penalty():
    """docs/regularizers.md: a penalty in ten lines, alone and in a sum."""
    import pathlib
    import re

    page = pathlib.Path(__file__).parent.parent / "docs" / "regularizers.md"
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(block, scope)
    own = scope["ArcLength"]
    solution = nde.solve(nde.ODE(lambda t, z: torch.stack([z[:, 1], -z[:, 0]], 1)), torch.eye(2), (0.0, 2.0), rtol=1e-6)
    torch.testing.assert_close(own()(solution), torch.tensor(2.0), rtol=1e-2, atol=0)  # an arc of two radians
