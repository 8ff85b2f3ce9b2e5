"""Public programs of torchdiffeq, torchdyn and torchsde, rewritten from their documentation at small size."""

# ruff: noqa: NPY002  (torchsde draws its seeds from numpy's global generator)

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest
import torch
import torchdiffeq
import torchsde
from torch import Tensor, nn

import regularizers as reg
from neuralde.experiments.data import digits
from regularizers import torchdiffeq as ode_adapter
from regularizers import torchsde as sde_adapter


@dataclass
class Program:
    """A program that is ready to train.

    Attributes:
        model: what is trained. descent: by which optimizer.
        forward: of the next batch, (loss, what the library returned).
        penalized: what a penalty is taken of, after a forward pass.
        parts: the modules that the vector field is made of, where the model is more that moves with its parameters.
        step: of finite differences: short, where a relu has kinks.
    """

    model: nn.Module
    descent: torch.optim.Optimizer
    forward: Callable[[], tuple[Tensor, Tensor]]
    penalized: Callable[[], object]
    parts: list[nn.Module] = field(default_factory=list)
    step: float = 1e-4

    @property
    def parameters(self) -> list[Tensor]:
        """What a penalty's gradient goes to, while the sampled state is a constant."""
        return [p for part in self.parts or [self.model] for p in part.parameters()]


def seeded():
    """Every program begins with the same random numbers."""
    np.random.seed(0)
    torch.manual_seed(0)


@functools.cache
def spiral(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(times, states) of the ODE demo's truth."""
    t, matrix = torch.linspace(0.0, 25.0, 200, dtype=dtype), torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=dtype)
    with torch.no_grad():
        return t, torchdiffeq.odeint(lambda t, y: y**3 @ matrix, torch.tensor([[2.0, 0.0]], dtype=dtype), t)


def ode_demo(recorded: bool, dtype: torch.dtype) -> Program:
    """torchdiffeq's ODE demo: a cubic spiral, learned from pieces of it."""

    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2))

        def forward(self, t, y):
            return self.net(y**3)

    odeint = (ode_adapter if recorded else torchdiffeq).odeint
    (t, path), f = spiral(dtype), Cubic().to(dtype)

    def forward():
        first = torch.randint(0, 190, (8,))
        ys = odeint(f, path[first], t[:10])
        return (ys - torch.stack([path[first + i] for i in range(10)])).abs().mean(), ys

    return Program(f, torch.optim.RMSprop(f.parameters(), lr=1e-3), forward, lambda: odeint.solution)


class Convolutions(nn.Module):
    """The MNIST example's vector field, with t as a channel."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, 8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(9, 8, 3, padding=1) for _ in range(2))

    def forward(self, t, z):
        for norm, conv in zip(self.norms, self.convs, strict=False):
            z = torch.relu(norm(z))
            z = conv(torch.cat([z, torch.ones_like(z[:, :1]) * t], dim=1))
        return self.norms[2](z)


def mnist_example(function: str, recorded: bool, dtype: torch.dtype) -> Program:
    """torchdiffeq's MNIST example, on scikit-learn's digits: convolutions with an ODE block."""
    odeint = getattr(ode_adapter if recorded else torchdiffeq, function)
    data = digits(dtype)
    x, y = data.train_x[:16].reshape(-1, 1, 8, 8), data.train_y[:16]
    f, before = Convolutions(), nn.Conv2d(1, 8, 3, stride=2)
    after = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model = nn.ModuleList([before, f, after]).to(dtype)

    def forward():
        zs = odeint(f, before(x), torch.tensor([0.0, 1.0], dtype=dtype), rtol=1e-3, atol=1e-3)
        return nn.functional.cross_entropy(after(zs[1]), y), zs

    descent = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Program(model, descent, forward, lambda: odeint.solution, step=1e-6)


def neural_ode(recorded: bool, dtype: torch.dtype) -> Program:
    """torchdyn's first tutorial: two rings, a NeuralODE with the adjoint, and a linear layer."""
    core = pytest.importorskip("torchdyn.core")
    angle, y = torch.rand(64, dtype=dtype) * 6.3, torch.arange(64) % 2
    x = torch.stack([angle.cos(), angle.sin()], dim=1) * (1.0 + y)[:, None]
    f = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it wraps f
        ode = core.NeuralODE(f, sensitivity="adjoint", solver="dopri5", atol=1e-3, rtol=1e-3)
    model = nn.Sequential(ode, nn.Linear(2, 2)).to(dtype)
    if recorded:
        reg.attach(model)

    def forward():
        _, zs = model[0](x, torch.linspace(0, 1, 2, dtype=dtype))
        return nn.functional.cross_entropy(model[1](zs[-1]), y), zs

    return Program(model, torch.optim.Adam(model.parameters(), lr=1e-2), forward, lambda: model)


class WithArgs(nn.Module):
    """torchdyn's SDEFunc hands on an argument that no layer of torch's takes."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, args):
        return self.net(x)


def _init(self, func, order, sensitivity, s_span, solver, atol, rtol):
    """A NeuralSDE's base as its own code means it: in torchdyn 1.0.6 it can't be made."""
    nn.Module.__init__(self)
    self.defunc, self.order, self.sensitivity, self.s_span = func, order, sensitivity, s_span
    self.solver, self.atol, self.rtol = solver, atol, rtol


def neural_sde(sensitivity: str, recorded: bool, dtype: torch.dtype) -> Program:
    """torchdyn's tutorial on SDEs: a NeuralSDE with diagonal noise, and a linear layer."""
    core = pytest.importorskip("torchdyn.core")
    drift, diffusion = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)), nn.Linear(2, 2)
    how = {"sensitivity": sensitivity, "solver": "euler", "ds": 0.05}
    with mock.patch.object(pytest.importorskip("torchdyn.core.problems").SDEProblem, "__init__", _init):
        sde = core.NeuralSDE(WithArgs(drift), WithArgs(diffusion), "diagonal", "ito", **how)
    model, x = nn.Sequential(sde, nn.Linear(2, 1)).to(dtype), torch.randn(16, 2, dtype=dtype)
    if recorded:
        reg.attach(model)

    def forward():
        z = model[0](x)
        return (model[1](z) - x.prod(dim=1, keepdim=True)).square().mean(), z

    return Program(model, torch.optim.Adam(model.parameters(), lr=1e-2), forward, lambda: model)


class Latent(nn.Module):
    """torchsde's latent SDE: an encoder, a posterior and a prior drift, and the same noise for both."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self):
        super().__init__()
        self.encoder, self.start = nn.GRU(1, 8), nn.Linear(8, 4)
        self.posterior = nn.Sequential(nn.Linear(2 + 8, 16), nn.Softplus(), nn.Linear(16, 2))
        self.prior = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 2))
        self.noises, self.decoder = nn.ModuleList(nn.Linear(1, 1) for _ in range(2)), nn.Linear(2, 1)

    def f(self, t, z):
        return self.posterior(torch.cat([z, self.context], dim=1))

    def h(self, t, z):
        return self.prior(z)

    def g(self, t, z):
        columns = zip(self.noises, z.split(1, dim=1), strict=True)
        return torch.cat([torch.sigmoid(noise(column)) for noise, column in columns], dim=1)


def latent_sde(function: str, recorded: bool, dtype: torch.dtype) -> Program:
    """torchsde's latent SDE, with the relative entropy of its path."""
    sdeint, model = getattr(sde_adapter if recorded else torchsde, function), Latent().to(dtype)
    ts = torch.linspace(0.0, 1.0, 6, dtype=dtype)
    xs = torch.stack([torch.sin(4 * ts + shift) for shift in torch.linspace(0, 1, 8)], dim=1)[..., None]

    def forward():
        _, last = model.encoder(xs.flip(0))
        model.context = last[0]
        mean, logs = model.start(model.context).chunk(2, dim=1)
        z0 = mean + logs.exp() * torch.randn_like(mean)
        zs, entropy = sdeint(model, z0, ts, dt=0.05, logqp=True, method="euler")
        fit = (model.decoder(zs) - xs).square().mean()
        loss = fit + 0.01 * entropy.sum(dim=0).mean() + 0.01 * (mean.square() - logs).mean()
        return loss, torch.cat([zs.flatten(), entropy.flatten()])

    # The context, too, moves with the encoder.
    parts = [model.posterior, model.prior, model.noises]
    return Program(model, torch.optim.Adam(model.parameters(), lr=1e-2), forward, lambda: sdeint.solution, parts)


# name -> made(recorded, dtype): without or with line one
PROGRAMS: dict[str, Callable[[bool, torch.dtype], Program]] = {
    "torchdiffeq ODE demo": ode_demo,
    "torchdiffeq MNIST odeint": functools.partial(mnist_example, "odeint"),
    "torchdiffeq MNIST odeint_adjoint": functools.partial(mnist_example, "odeint_adjoint"),
    "torchdyn NeuralODE": neural_ode,
    "torchdyn NeuralSDE autograd": functools.partial(neural_sde, "autograd"),
    "torchdyn NeuralSDE adjoint": functools.partial(neural_sde, "adjoint"),
    "torchsde latent SDE sdeint": functools.partial(latent_sde, "sdeint"),
    "torchsde latent SDE sdeint_adjoint": functools.partial(latent_sde, "sdeint_adjoint"),
}
