"""The memory that the adjoints promise, counted in bytes that autograd holds on to: the same on every machine."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

import neuralde as nde
import regularizers as reg
from regularizers.taylor import derivatives


def held_bytes(adjoint, steps, penalty=None):
    """Bytes of distinct storages that a forward pass leaves behind for its backward pass."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 64))
    layer = nde.NeuralODE(f, (0.0, 1.0), adjoint=adjoint, control=nde.StepControl(adaptive=False), dt0=1.0 / steps)
    z0 = torch.randn(512, 64, requires_grad=True)
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = layer(z0).square().mean()
        if penalty is not None:
            loss = loss + penalty(layer)
    grid = layer.solution._outcome.trajectory.grid
    kept = {z.untyped_storage().data_ptr(): z.untyped_storage().nbytes() for z in grid.z}
    loss.backward()
    assert all(p.grad is not None for p in f.parameters())
    return sum(n for n, _ in storages.values()) + sum(n for p, n in kept.items() if p not in storages)


def test_checkpointed_holds_at_most_a_fifth_of_direct():
    assert held_bytes("checkpointed", 100) < held_bytes("direct", 100) / 5


def test_checkpointed_grows_by_one_state_per_step():
    state = 512 * 64 * 4
    growth = (held_bytes("checkpointed", 60) - held_bytes("checkpointed", 20)) / 40
    assert growth == pytest.approx(state, rel=0.05)


def test_a_global_penalty_keeps_the_checkpointed_memory():
    plain, regularized = (held_bytes("checkpointed", 50, p) for p in (None, reg.GlobalError()))
    assert regularized < 1.1 * plain


@pytest.mark.parametrize(
    "penalty",
    [
        reg.KineticEnergy(),
        reg.TaylorDerivative(3),
        pytest.param(reg.TaylorDerivative(3, mode="jvp"), marks=pytest.mark.slow),
        pytest.param(reg.JacobianFrobenius(), marks=pytest.mark.slow),
    ],
    ids=["KineticEnergy", "TaylorDerivative", "TaylorDerivative-jvp", "JacobianFrobenius"],
)
def test_penalties_along_the_solution_keep_some_states_per_step(penalty):
    """Not the layers of f: those are eight states wide. Counted while they are alive, whoever refers to them."""
    state = 512 * 64 * 4
    with gc_off():
        growth = (held_bytes("checkpointed", 8, penalty) - held_bytes("checkpointed", 3, penalty)) / 5
    assert growth < 8 * state


@contextlib.contextmanager
def gc_off():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_taylor_mode_leaves_nothing_to_the_collector():
    alive = weakref.WeakSet()

    def f(t, z):
        out = torch.tanh(z * t) / (1 + torch.exp(z))
        alive.update([z, out])
        return out

    with gc_off():
        derivatives(f, torch.ones(2, 1), torch.ones(2, 3), 4)
        assert not len(alive)
