"""SDEs whose solutions along a given Brownian path are known, and a network."""

from __future__ import annotations

import torch
from torch import Tensor

import neuralde as nde
from neuralde.brownian import Noise

MU, SIGMA = (0.6, -0.4), (0.7, 0.5)


def _t(*values):
    return torch.tensor(values, dtype=torch.float64)


def _along(solution: nde.Solution, times: Tensor) -> list[Noise]:
    """The noise between consecutive times; of many samples, one interval after the other: they share the way there."""
    paths = solution._problem.field.paths
    if len(solution.final) < 1000:
        return paths.between(times[:, None])
    return [paths.between(pair[:, None])[0] for pair in times.unfold(0, 2, 1)]


def geometric(sde_type: str) -> nde.SDE:
    """Two geometric Brownian motions, each with its noise."""
    return nde.SDE(lambda t, z: _t(*MU) * z, lambda t, z: _t(*SIGMA) * z, "diagonal", sde_type)


def geometric_common(sde_type: str) -> nde.SDE:
    """The same with one noise for both."""
    return nde.SDE(lambda t, z: _t(*MU) * z, lambda t, z: (_t(*SIGMA) * z)[..., None], "scalar", sde_type)


def geometric_exact(solution: nde.Solution, sde_type: str) -> Tensor:
    w = solution.brownian([1.0])[-1]
    growth = _t(*MU) - (0.5 * _t(*SIGMA) ** 2 if sde_type == "ito" else 0.0)
    return torch.exp(growth + _t(*SIGMA) * w)


RATE = (1.5, 0.5)
MIX = ((0.6, -0.2, 0.3), (0.1, 0.5, 0.4))


def ornstein_uhlenbeck(sde_type: str) -> nde.SDE:
    """Two of them with three noises whose strength changes with t."""

    def diffusion(t, z):
        return (1.0 + 0.5 * torch.sin(3.0 * t).reshape(-1, 1, 1)) * _t(*MIX).expand(len(z), -1, -1)

    return nde.SDE(lambda t, z: -_t(*RATE) * z, diffusion, "additive", sde_type)


def ornstein_uhlenbeck_exact(solution: nde.Solution, sde_type: str, intervals: int = 128) -> Tensor:
    """z(1) = e^(-r) z(0) + ∫ e^(-r(1 - s)) g(s) dW, the integrand taken as linear on each of many intervals."""
    times = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    noise = _along(solution, times)
    h, middle = 1.0 / intervals, 0.5 * (times[1:] + times[:-1])

    def weight(s):
        return (
            torch.exp(-_t(*RATE) * (1 - s[:, None]))[..., None] * (1 + 0.5 * torch.sin(3 * s))[:, None, None] * _t(*MIX)
        )

    slope = (weight(times[1:]) - weight(times[:-1])) / h
    w, area = torch.stack([x.w for x in noise]), torch.stack([x.h for x in noise])
    forced = torch.einsum("sfm,sbm->bf", weight(middle), w) - h * torch.einsum("sfm,sbm->bf", slope, area)
    return torch.exp(-_t(*RATE)) + forced


def heisenberg(sde_type: str) -> nde.SDE:
    """dx = dW₁, dy = x dW₂: the noises do not commute."""

    def diffusion(t, z):
        x = z[:, 0]
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        return torch.stack([torch.stack([one, zero], dim=1), torch.stack([zero, x], dim=1)], dim=1)

    return nde.SDE(lambda t, z: torch.zeros_like(z), diffusion, "general", sde_type)


def heisenberg_exact(solution: nde.Solution, sde_type: str, intervals: int = 512) -> Tensor:
    """(1 + W₁, 1 + W₂ + ∫ W₁ dW₂), the integral as a sum over many intervals. In both senses: x has its own noise."""
    noise = _along(solution, torch.linspace(0, 1, intervals + 1, dtype=torch.float64))
    w = torch.stack([x.w for x in noise])
    area = torch.stack([x.h for x in noise])
    path = w.cumsum(0) - w
    # The part of the iterated integral that W and H on an interval tell; the rest has mean 0 and variance h²/12.
    inner = 0.5 * w[..., 0] * w[..., 1] + area[..., 0] * w[..., 1] - w[..., 0] * area[..., 1]
    end = w.sum(0)
    return torch.stack([1 + end[:, 0], 1 + end[:, 1] + (path[..., 0] * w[..., 1] + inner).sum(0)], dim=1)


class Net(torch.nn.Module):
    """Drift and diffusion with parameters, z and args in them, for every type of noise."""

    def __init__(self, noise="diagonal", features=3):
        super().__init__()
        self.noise = noise
        self.drift = torch.nn.Linear(features, features)
        self.spread = torch.nn.Parameter(0.3 + 0.2 * torch.rand(features, 2))

    def f(self, t, z, args):
        return torch.tanh(self.drift(z)) * args + 0.1 * t

    def g(self, t, z, args):
        if self.noise == "additive":
            return (self.spread * (1 + 0.3 * t[..., None]) * args.mean()).expand(len(z), -1, -1)
        base = 0.4 + 0.3 * torch.sin(z) * args
        if self.noise == "diagonal":
            return base * self.spread[:, 0]
        matrix = base[..., None] * self.spread
        return matrix[..., :1] if self.noise == "scalar" else matrix

    def equation(self, sense="ito"):
        return nde.SDE(self.f, self.g, self.noise, sense)


PROBLEMS = {
    "diagonal": (geometric, geometric_exact),
    "scalar": (geometric_common, geometric_exact),
    "additive": (ornstein_uhlenbeck, ornstein_uhlenbeck_exact),
    "general": (heisenberg, heisenberg_exact),
}
