"""torchdyn's building blocks, unchanged, as vector fields: each has the result and gradients of torchdiffeq."""

from __future__ import annotations

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, close, refused
from torch import nn

import neuralde as nde

pytest.importorskip("torchdyn")

# torchdyn's Chebychev basis makes numbers of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def as_torchdyn_does(net):
    """What torchdyn.core.NeuralODE makes of a net that takes the state alone: every module that wants t is given it."""
    from torchdyn.core.defunc import DEFunc, DEFuncBase

    return DEFunc(DEFuncBase(net, has_time_arg=False))


def reference(f, z0, t=(0.0, 1.0)):
    """The final state, by torchdiffeq, with one t for the whole batch, in 100 steps of fourth order.

    Their steps are fixed, for torchdiffeq's automatic ones are on its tape: gradients go through dt, and are wrong
    where a block cuts the gradient of t.
    """
    from torchdiffeq import odeint

    t = torch.tensor(t, dtype=z0.dtype)
    return odeint(f, z0, t, method="rk4", options={"step_size": float((t[-1] - t[0]).abs()) / 100})[-1]


def same_as_reference(f, z0, watched, control, adjoint, tolerance=1e-6, t=(0.0, 1.0), how=TIGHT):
    """The final state and the gradients with respect to z0 and what is watched; all of them reach it."""
    start = z0.clone().requires_grad_()
    final = nde.solve(nde.ODE(f), start, t, control=control, adjoint=adjoint, **how).final
    mine = torch.autograd.grad((final**2).sum(), [start, *watched])
    start = z0.clone().requires_grad_()
    expected = reference(f, start, t)
    theirs = torch.autograd.grad((expected**2).sum(), [start, *watched])
    close(final, expected, tolerance)
    for own, other in zip(mine, theirs, strict=True):
        assert (other != 0).any(), "the reference must depend on it"
        close(own, other, 10 * tolerance)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_defunc(control, adjoint):
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    f = as_torchdyn_does(net)
    z0 = torch.randn(5, 3, dtype=torch.float64)
    same_as_reference(f, z0, list(net.parameters()), control, adjoint)
    # Its counter counts what we say was called.
    f.nfe = 0
    assert nde.solve(nde.ODE(f), z0, (0.0, 1.0), control=control).stats.function_calls == f.nfe > 0


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, -0.5)])
def test_depth_cat_for_vectors(control, adjoint, t):
    from torchdyn.nn import DepthCat

    net = nn.Sequential(DepthCat(1), nn.Linear(4, 16), nn.Tanh(), DepthCat(1), nn.Linear(17, 3)).double()
    z0 = torch.randn(5, 3, dtype=torch.float64)
    same_as_reference(as_torchdyn_does(net), z0, list(net.parameters()), control, adjoint, t=t)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_depth_cat_for_images(control, adjoint):
    from torchdyn.nn import DepthCat

    net = nn.Sequential(
        DepthCat(1), nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), DepthCat(1), nn.Conv2d(5, 2, 3, padding=1)
    ).double()
    z0 = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    same_as_reference(as_torchdyn_does(net), z0, list(net.parameters()), control, adjoint)


def test_depth_cat_with_a_time_for_each_sample():
    """Samples at different times at once: each is what it is alone."""
    from torchdyn.nn import DepthCat

    net = nn.Sequential(DepthCat(1), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    f = as_torchdyn_does(net)
    z0 = torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-3.0, 2.0], [0.5, 0.6]], dtype=torch.float64)
    final = nde.solve(nde.ODE(f), z0, t, **TIGHT).final
    for i in range(4):
        close(final[[i]], reference(f, z0[[i]], t[i].tolist()), 1e-6)


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("control", CONTROLS)
def test_augmenter_before_the_layer(order, control):
    from torchdyn.nn import Augmenter

    f = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    augmenter, head = Augmenter(augment_dims=2, order=order), nn.Linear(5, 1).double()
    model = nn.Sequential(augmenter, nde.NeuralODE(f, control=control, **TIGHT), head)
    x = torch.randn(6, 3, dtype=torch.float64)
    out = model(x)
    expected = head(reference(lambda t, z: f(z), augmenter(x)))
    close(out, expected, 1e-6)
    for own, other in zip(
        torch.autograd.grad(out.sum(), list(model.parameters())),
        torch.autograd.grad(expected.sum(), list(model.parameters())),
        strict=True,
    ):
        close(own, other, 1e-5)


def test_augmenter_that_learns():
    from torchdyn.nn import Augmenter

    f = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
    augmenter = Augmenter(augment_func=nn.Linear(3, 2).double())
    x = torch.randn(6, 3, dtype=torch.float64)
    model = nn.Sequential(augmenter, nde.NeuralODE(f, **TIGHT))
    mine = torch.autograd.grad((model(x) ** 2).sum(), list(augmenter.parameters()))
    expected = torch.autograd.grad(
        (reference(lambda t, z: f(z), augmenter(x)) ** 2).sum(), list(augmenter.parameters())
    )
    for own, other in zip(mine, expected, strict=True):
        close(own, other, 1e-5)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_data_control(control, adjoint):
    """Its control input is set for every batch, as torchdyn does, and gets a gradient."""
    from torchdyn.nn import DataControl

    holder = DataControl()
    net = nn.Sequential(holder, nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    f = as_torchdyn_does(net)
    for batch in (4, 7):
        z0 = torch.randn(batch, 3, dtype=torch.float64)
        holder._control = torch.randn(batch, 2, dtype=torch.float64, requires_grad=True)
        same_as_reference(f, z0, [holder._control, *net.parameters()], control, adjoint)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_data_control_with_samples_that_finish_at_different_steps(adjoint):
    """The control input is of the whole batch, whoever is still unfinished."""
    from torchdyn.nn import DataControl

    class Stiffened(nn.Module):
        """dz/dt = rate(c)·(net - z), the rate being the control's first number."""

        def __init__(self):
            super().__init__()
            self.control = DataControl()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, z):
            both = self.control(z)
            return both[:, 3:4] * (self.net(both / both[:, 3:4]) - z)

    net = Stiffened().double()
    z0 = torch.randn(64, 3, dtype=torch.float64)
    given = 1.0 + torch.rand(64, 2, dtype=torch.float64)
    given[[2, 31, 32, 63], 0] = 100.0

    def run(rows):
        start = z0[rows].clone().requires_grad_()
        net.control._control = held = given[rows].clone().requires_grad_()
        solution = nde.solve(nde.ODE(as_torchdyn_does(net)), start, (0.0, 1.0), adjoint=adjoint, rtol=1e-4)
        loss = (solution.final**2).sum()
        return solution, torch.autograd.grad(loss, [start, held, *net.parameters()])

    solution, gradients = run(list(range(64)))
    assert solution.stats.accepted.max() > 4 * solution.stats.accepted.min(), "too even to say anything"
    total = [torch.zeros_like(g) for g in gradients[2:]]
    for i in range(64):
        alone, own = run([i])  # every one: the parameters' gradients are the sum of all
        assert alone.stats.nfe[0] == solution.stats.nfe[i]
        torch.testing.assert_close(solution.final[[i]], alone.final, rtol=1e-10, atol=1e-11)
        for mine, other in zip(gradients[:2], own[:2], strict=True):
            torch.testing.assert_close(mine[[i]], other, rtol=1e-7, atol=1e-9)
        total = [a + b for a, b in zip(total, own[2:], strict=True)]
    for mine, other in zip(gradients[2:], total, strict=True):
        close(mine, other, 1e-8)


# -- Galerkin layers: one t for the whole batch ----------------------------------------------------------------------

BASES = ["Fourier", "Polynomial", "Chebychev", "VanillaRBF", "MultiquadRBF", "GaussianRBF"]
# They compute in float32 whatever the dtype of their parameters.
FLOAT32 = {"rtol": 1e-6, "atol": 1e-7}


def galerkin_net(basis, d=3, init=True):
    """DepthCat hands the layer its t. The coefficients are zero when a layer is made: nothing would be tested."""
    import torchdyn.nn

    layer = torchdyn.nn.GalLinear(d, d, expfunc=getattr(torchdyn.nn, basis)(4))
    if init:
        nn.init.normal_(layer.coeffs, std=0.1)
    net = nn.Sequential(nn.Linear(d, d), nn.Tanh(), torchdyn.nn.DepthCat(1), layer)
    f = as_torchdyn_does(net)
    try:
        f(torch.tensor(0.5), torch.randn(2, d)).sum().backward()
    except RuntimeError as error:
        pytest.skip(f"torchdyn's {basis} does not work on torch {torch.__version__}: {error}")
    return f, layer


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_galerkin_linear(basis, adjoint):
    f, layer = galerkin_net(basis)
    z0 = torch.randn(4, 3)
    watched = [layer.coeffs, *f.vf.vf[0].parameters()]
    if basis not in ("Chebychev",):  # which cuts the gradient of t itself
        watched += [layer.shift]
    # Not from t = 0, where the radial bases have a kink, at which autograd's derivative with respect to the shift is 0.
    same_as_reference(f, z0, watched, "joint", adjoint, tolerance=2e-5, t=(0.1, 1.0), how=FLOAT32)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_galerkin_convolution(adjoint):
    from torchdyn.nn import DepthCat, GalConv2d

    layer = GalConv2d(2, 2, kernel_size=3, padding=1)
    nn.init.normal_(layer.coeffs, std=0.05)
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), DepthCat(1), layer)
    f, z0 = as_torchdyn_does(net), torch.randn(3, 2, 5, 5)
    watched = [layer.coeffs, layer.dilation, layer.shift, *net[0].parameters()]
    same_as_reference(f, z0, watched, "joint", adjoint, tolerance=2e-5, how=FLOAT32)
    with refused(ValueError, 'control="joint"'):
        nde.solve(nde.ODE(f), z0, (0.0, 1.0), adjoint=adjoint)


@pytest.mark.parametrize("basis", BASES)
def test_galerkin_layers_are_refused_under_per_sample_control(basis):
    f, _ = galerkin_net(basis)
    with refused(ValueError, 'control="joint"'):
        nde.NeuralODE(f)(torch.randn(4, 3))


def test_galerkin_layers_are_refused_as_soon_as_they_depend_on_time():
    """They are made with zero coefficients, and mix nothing until the first optimizer step."""
    f, galerkin = galerkin_net("Fourier", init=False)
    layer = nde.NeuralODE(f)
    z0 = torch.randn(4, 3)
    layer(z0)
    nn.init.normal_(galerkin.coeffs, std=0.1)
    with refused(ValueError, 'control="joint"'):
        layer(z0)


@pytest.mark.parametrize("control", CONTROLS)
def test_second_order_defunc(control):
    """DEFunc's own higher-order form: [position, velocity] side by side."""
    from torchdyn.core.defunc import DEFunc, DEFuncBase

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    f = DEFunc(DEFuncBase(lambda t, x, args=None: net(x), has_time_arg=True), order=2)
    z0 = torch.randn(5, 4, dtype=torch.float64)
    same_as_reference(f, z0, list(net.parameters()), control, "checkpointed")
