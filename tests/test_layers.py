"""The layers as parts of a network: what they return, hold, show, save, and survive."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, DENSE, EXACT, FIXED, SOLVERS, close, options, refused
from torch import nn
from torch.utils import _pytree as pytree

import neuralde as nde


def net(d=3, dtype=torch.float32):
    return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, d)).to(dtype)


def decay(t, z):
    return pytree.tree_map(torch.neg, z)


# -- what a call gives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_layer_is_solve_with_its_options(solver, control, adjoint):
    f, z0 = net(), torch.randn(4, 3)
    how = {"control": control, "adjoint": adjoint, "rtol": 1e-4, "atol": 1e-5, **options(solver)}
    out = nde.NeuralODE(f, (0.2, 1.5), **how)(z0)
    assert type(out) is torch.Tensor and out.requires_grad
    assert torch.equal(out, nde.solve(nde.ODE(f), z0, (0.2, 1.5), **how).final)


@pytest.mark.parametrize(
    "z0",
    [
        torch.ones(4, 3),
        (torch.ones(4, 3), torch.zeros(4)),
        {"x": torch.ones(4, 1, 2), "y": torch.ones(4)},
        [torch.ones(4), (torch.ones(4, 2),)],
    ],
)
def test_a_call_returns_the_structure_it_was_given(z0):
    out = nde.NeuralODE(decay)(z0)
    assert pytree.tree_structure(out) == pytree.tree_structure(z0)
    for leaf, start in zip(pytree.tree_leaves(out), pytree.tree_leaves(z0), strict=True):
        assert type(leaf) is torch.Tensor and leaf.shape == start.shape
        torch.testing.assert_close(leaf, start * torch.exp(torch.tensor(-1.0)), rtol=1e-3, atol=0)


def test_solve_and_trajectory():
    layer, z0 = nde.NeuralODE(net()), torch.randn(4, 3)
    solution = layer.solve(z0)
    assert type(solution) is nde.Solution and torch.equal(solution.final, layer(z0))
    ts = torch.linspace(0.0, 2.0, 5)
    zs = layer.trajectory(z0, ts)
    assert zs.shape == (5, 4, 3)
    assert torch.equal(zs, nde.solve(nde.ODE(layer.f), z0, ts).zs)
    assert torch.equal(layer.solve(z0, t=ts).ts, ts)
    each = torch.stack([ts, ts + 1, ts * 2, -ts])
    assert torch.equal(layer.trajectory(z0, each), nde.solve(nde.ODE(layer.f), z0, each).zs)
    # The layer's own horizon is as it was.
    assert torch.equal(layer(z0), solution.final)


def test_args():
    layer, z0 = nde.NeuralODE(lambda t, z, rate: -rate * z), torch.ones(4, 3)
    rate = torch.rand(4, 1, requires_grad=True)
    expected = nde.solve(layer.equation, z0, (0.0, 1.0), args=rate)
    for final in (layer(z0, rate), layer(z0, args=rate), layer.solve(z0, args=rate).final):
        assert torch.equal(final, expected.final)
    assert torch.equal(layer.trajectory(z0, (0.0, 1.0), args=rate), expected.zs)
    layer(z0, rate).sum().backward()
    assert (rate.grad != 0).all()


@pytest.mark.parametrize("t", [(0.0, 2.0), [0.0, 2.0], torch.tensor([0.0, 1.0, 2.0]), (0.0, torch.full((4,), 2.0))])
def test_horizons(t):
    z0 = torch.ones(4, 3)
    torch.testing.assert_close(nde.NeuralODE(decay, t)(z0), z0 * torch.exp(torch.tensor(-2.0)), rtol=1e-3, atol=0)


# -- the solution it holds -----------------------------------------------------------------------------------------


def test_the_solution_is_that_of_the_last_call():
    layer = nde.NeuralODE(net())
    assert layer.solution is None
    first = layer(torch.randn(4, 3))
    held = layer.solution
    assert torch.equal(held.final, first)
    second = layer(torch.randn(2, 3))
    assert layer.solution is not held and torch.equal(layer.solution.final, second)
    assert layer.solve(torch.randn(5, 3)) is layer.solution
    layer.trajectory(torch.randn(5, 3), torch.tensor([0.0, 0.5, 1.0]))
    assert layer.solution.zs.shape == (3, 5, 3)


def test_a_failed_call_leaves_no_solution():
    layer = nde.NeuralODE(lambda t, z: torch.sqrt(z))
    layer(torch.ones(2, 1))
    with pytest.raises(nde.NonFiniteState):
        layer(-torch.ones(2, 1))
    assert layer.solution is None


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_last_calls_graph_is_released(adjoint, backward):
    """At the next call, and without the garbage collector: memory must not wait for it in a training loop."""
    layer = nde.NeuralODE(net(), adjoint=adjoint)
    gc.collect()
    gc.disable()
    try:
        z0 = torch.randn(4, 3, requires_grad=True)
        out = layer(z0)
        # z0 is a leaf of the graph, and lives as long as the graph does.
        solution, leaf = weakref.ref(layer.solution), weakref.ref(z0)
        looks = {"error": layer.solution.error.sum(), "between": layer.solution(0.5).sum()}
        if backward:
            loss = out.sum()
            loss = loss + looks["error"] if adjoint in EXACT else loss
            loss = loss + looks["between"] if adjoint in DENSE else loss
            loss.backward()
            del loss
        del out, z0, looks
        assert solution() is not None and leaf() is not None, "a layer holds its last solution"
        layer(torch.randn(4, 3))
        assert solution() is None and leaf() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_last_calls_graph_is_released_before_the_next_is_built(adjoint):
    """Two graphs at once would be twice the memory."""
    inner, kept = net(), []

    def f(t, z):
        assert not kept or kept[0]() is None
        return inner(z)

    layer = nde.NeuralODE(f, adjoint=adjoint)
    layer(torch.randn(4, 3)).sum().backward()
    kept.append(weakref.ref(layer.solution))
    layer(torch.randn(4, 3))


def test_without_gradients_no_graph_is_held():
    layer = nde.NeuralODE(net())
    with torch.no_grad():
        assert not layer(torch.randn(4, 3)).requires_grad
    assert not layer.solution.zs.requires_grad and not layer.solution.error.requires_grad
    layer.requires_grad_(False)
    assert not layer(torch.randn(4, 3)).requires_grad


# -- what it shows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_repr_names_the_solver_and_what_steers_it(solver):
    how = {"rtol": 0.012, "atol": 3.4e-5, **options(solver, 0.0625)}
    text = repr(nde.NeuralODE(net(), **how))
    assert text.startswith("NeuralODE(") and f"solver={solver}" in text and "Linear" in text
    shown = ["dt0=0.0625"] if solver in FIXED else ["rtol=0.012", "atol=3.4e-05"]
    assert all(word in text for word in shown)


def test_repr_has_the_defaults_and_the_horizon():
    text = repr(nde.NeuralODE(decay, (0.0, 2.5)))
    assert all(word in text for word in ("t=(0.0, 2.5)", "solver=tsit5", "rtol=0.001", "atol=1e-06"))
    assert "control=joint" in repr(nde.NeuralODE(decay, control="joint"))
    assert "solver=dopri5" in repr(nde.NeuralODE(decay, solver=nde.solvers.get("dopri5")))
    assert "t=given" in repr(nde.NeuralODE(decay, torch.tensor([0.0, 1.0])))


# -- saving, copying, moving ---------------------------------------------------------------------------------------


def test_state_dict_is_that_of_f():
    layer = nde.NeuralODE(net())
    layer(torch.randn(4, 3))
    state = layer.state_dict()
    assert set(state) == {f"f.{name}" for name in layer.f.state_dict()}
    assert [name for name, _ in layer.named_parameters()] == [f"f.{name}" for name, _ in layer.f.named_parameters()]
    other = nde.NeuralODE(net())
    other.load_state_dict(state)
    z0 = torch.randn(4, 3)
    assert torch.equal(other(z0), layer(z0))
    assert nde.NeuralODE(decay).state_dict() == {}


def by_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def by_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_copies_after_a_call(duplicate, adjoint, solver):
    """As an exponential moving average, a checkpoint, or a worker process makes them. A graph can't be copied."""
    layer = nde.NeuralODE(net(), (0.0, 1.5), adjoint=adjoint, **options(solver))
    z0 = torch.randn(4, 3)
    out = layer(z0)
    other = duplicate(layer)
    assert other.solution is None and layer.solution is not None
    assert repr(other) == repr(layer)
    assert torch.equal(other(z0), out)
    # They share nothing: training one leaves the other.
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0)
    assert torch.equal(layer(z0), out) and not torch.equal(other(z0), out)
    other(z0).sum().backward()
    assert all(p.grad is None for p in layer.parameters()) and all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_copies_of_a_model_and_of_a_solver_object(duplicate):
    layer = nde.NeuralODE(net(), solver=nde.solvers.get("bs3"), control=nde.StepControl(safety=0.8))
    model = nn.Sequential(nn.Linear(3, 3), layer)
    x = torch.randn(4, 3)
    assert torch.equal(duplicate(model)(x), model(x))


def test_shallow_copies_hold_no_solution():
    layer = nde.NeuralODE(net())
    layer(torch.randn(4, 3))
    assert copy.copy(layer).solution is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_to_another_precision(dtype):
    layer = nde.NeuralODE(net(), rtol=1e-2, atol=1e-3)
    z0 = torch.randn(4, 3)
    before = layer(z0)
    layer.to(dtype)
    after = layer(z0.to(dtype))
    assert after.dtype == dtype
    close(after.float(), before.detach(), 2e-2)


@pytest.mark.parametrize("t", [torch.tensor([0.0, 1.0]), (0.0, torch.tensor(1.0))])
def test_a_horizon_of_tensors_follows_the_state(t):
    layer = nde.NeuralODE(net(), t).double()
    assert layer(torch.randn(4, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("t", [(0.0, 1.0), torch.tensor([0.0, 1.0])])
def test_moving_to_a_gpu(t):
    layer, z0 = nde.NeuralODE(net(), t), torch.randn(4, 3)
    before = layer(z0)
    after = layer.cuda()(z0.cuda())
    torch.testing.assert_close(after.cpu(), before, rtol=1e-4, atol=1e-4)


# -- inside a network ----------------------------------------------------------------------------------------------


def test_exchanging_f():
    z0 = torch.randn(4, 3)
    layer, other = nde.NeuralODE(net()), net()
    layer(z0)
    layer.f = other
    assert torch.equal(layer(z0), nde.NeuralODE(other)(z0))
    assert set(layer.state_dict()) == {f"f.{name}" for name in other.state_dict()}
    # From an f of z alone to one of t and z, and between functions.
    layer.f = nde.TimeChain(nde.AppendTime(nn.Linear(4, 3)))
    assert torch.equal(layer(z0), nde.NeuralODE(layer.f)(z0))
    plain = nde.NeuralODE(decay)
    plain(z0)
    plain.f = lambda t, z: 2 * decay(t, z)
    torch.testing.assert_close(plain(z0), z0 * torch.exp(torch.tensor(-2.0)), rtol=1e-3, atol=1e-5)
    plain.f = other
    assert torch.equal(plain(z0), nde.NeuralODE(other)(z0))
    assert list(plain.parameters()) == list(other.parameters())


def test_exchanging_f_for_one_that_mixes_samples():
    layer = nde.NeuralODE(net())
    layer.f = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with refused(ValueError, "BatchNorm1d", 'control="joint"'):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_inside_a_network(control, adjoint):
    """Encoder, two layers that share their f, and a head: gradients reach everything, by finite differences."""
    f = net(dtype=torch.float64)
    how = {"control": control, "adjoint": adjoint, "rtol": 1e-9, "atol": 1e-10}
    model = nn.Sequential(
        nn.Linear(2, 3).double(),
        nde.NeuralODE(f, **how),
        nn.Tanh(),
        nde.NeuralODE(f, (1.0, 0.5), **how),
        nn.Linear(3, 1).double(),
    )
    x = torch.randn(5, 2, dtype=torch.float64)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(x).sum(), parameters)
    direction = [torch.randn_like(p) for p in parameters]

    @torch.no_grad()
    def shifted(step):
        for p, d in zip(parameters, direction, strict=True):
            p += step * d
        value = model(x).sum()
        for p, d in zip(parameters, direction, strict=True):
            p -= step * d
        return value

    # Fourth order differences: truncation about 1e-11, solver error 1e-9 over 1e-3.
    h = 1e-3
    difference = (8 * (shifted(h) - shifted(-h)) - (shifted(2 * h) - shifted(-2 * h))) / (12 * h)
    expected = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    torch.testing.assert_close(difference, expected, rtol=1e-5, atol=1e-7)


def test_modules_tell_apart_training_and_evaluation():
    layer = nde.NeuralODE(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    z0 = torch.randn(4, 3)
    assert not torch.equal(layer(z0), layer(z0))
    layer.eval()
    assert torch.equal(layer(z0), layer(z0))


def test_training_a_layer_fits_a_rotation():
    """It learns: Adam takes the loss to a twentieth."""
    a = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    z0 = torch.randn(64, 2)
    target = z0 @ torch.matrix_exp(a).T
    layer = nde.NeuralODE(nn.Linear(2, 2), rtol=1e-2, atol=1e-2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((layer(z0) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


# -- time-dependent layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 5])
def test_append_time_to_vectors(d):
    layer = nde.AppendTime(nn.Linear(d + 1, 4))
    z, t = torch.randn(3, d), torch.rand(3, 1)
    torch.testing.assert_close(layer(t, z), layer.layer(torch.cat([z, t], 1)), rtol=0, atol=0)
    for scalar in (torch.tensor(0.7), 0.7):
        expected = layer.layer(torch.cat([z, torch.full((3, 1), 0.7)], 1))
        torch.testing.assert_close(layer(scalar, z), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 2, 3, padding=1), (4, 2, 5)),
        (nn.Conv2d(3, 2, 3, padding=1), (4, 2, 5, 6)),
        (nn.Conv3d(3, 2, 1), (4, 2, 3, 2, 2)),
    ],
)
def test_append_time_to_images(layer, shape):
    append, z = nde.AppendTime(layer), torch.randn(*shape)
    t = torch.rand(4, *(1,) * (z.dim() - 1))
    channel = torch.ones(4, 1, *shape[2:])
    torch.testing.assert_close(append(t, z), layer(torch.cat([z, t * channel], 1)), rtol=0, atol=0)
    torch.testing.assert_close(append(torch.tensor(0.7), z), layer(torch.cat([z, 0.7 * channel], 1)), rtol=0, atol=0)


def test_append_time_takes_the_precision_of_z():
    layer = nde.AppendTime(nn.Linear(4, 3)).bfloat16()
    assert layer(torch.rand(2, 1), torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_append_time_differentiates_with_respect_to_time():
    layer = nde.AppendTime(nn.Linear(4, 3))
    t = torch.tensor(0.3, requires_grad=True)
    gradient = torch.autograd.grad(layer(t, torch.randn(2, 3)).sum(), t)[0]
    torch.testing.assert_close(gradient, 2 * layer.layer.weight[:, -1].sum(), rtol=1e-6, atol=1e-7)


def test_time_chain_hands_time_to_those_that_take_it():
    inner = nde.TimeChain(nde.AppendTime(nn.Linear(6, 4)), nn.Tanh())
    chain = nde.TimeChain(nn.Linear(3, 5), inner, nde.AppendTime(nn.Linear(5, 3)))
    z, t = torch.randn(2, 3), torch.rand(2, 1)
    hidden = torch.tanh(inner.layers[0](t, chain.layers[0](z)))
    assert torch.equal(chain(t, z), chain.layers[2](t, hidden))
    assert len(list(chain.parameters())) == 6


def test_time_chain_from_an_image_to_a_vector():
    """t has the rank of the state, z another one further down."""
    chain = nde.TimeChain(nde.AppendTime(nn.Conv2d(2, 1, 3)), nn.Flatten(), nde.AppendTime(nn.Linear(10, 4)))
    z, t = torch.randn(5, 1, 5, 5), torch.rand(5, 1, 1, 1)
    each = torch.cat([chain(t[i].squeeze(), z[[i]]) for i in range(5)])
    torch.testing.assert_close(chain(t, z), each, rtol=1e-5, atol=1e-6)


MNIST_LIKE = {
    "vectors": lambda: (
        nde.TimeChain(nde.AppendTime(nn.Linear(4, 8)), nn.Tanh(), nde.AppendTime(nn.Linear(9, 3))),
        (5, 3),
    ),
    "images": lambda: (
        nde.TimeChain(
            nde.AppendTime(nn.Conv2d(3, 4, 3, padding=1)), nn.Tanh(), nde.AppendTime(nn.Conv2d(5, 2, 3, padding=1))
        ),
        (5, 2, 4, 4),
    ),
}


@pytest.mark.parametrize("make", MNIST_LIKE.values(), ids=MNIST_LIKE)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_time_chains_as_vector_fields(make, adjoint):
    """The same under both controls, which hand them t in different shapes."""
    f, shape = make()
    f, z0 = f.double(), torch.randn(*shape, dtype=torch.float64)
    found = []
    for control in CONTROLS:
        final = nde.NeuralODE(f, control=control, adjoint=adjoint, rtol=1e-9, atol=1e-10)(z0)
        found.append([final, *torch.autograd.grad((final**2).sum(), list(f.parameters()))])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-7)
    moved = nde.NeuralODE(f, (1.0, 2.0), rtol=1e-9, atol=1e-10)(z0)
    assert (moved - found[0][0]).abs().max() > 1e-3, "f must depend on t"
