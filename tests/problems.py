"""Problems with known solutions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotating(t: Tensor, z: Tensor) -> Tensor:
    """A non-autonomous, nonlinear, coupled system of four components whose solution `rotating_exact` is."""
    x, y, u, v = z.unbind(dim=1)
    t = t.expand(len(z), 1)[:, 0] if t.dim() else t.expand(len(z))
    speed = 3 + torch.cos(2 * t)
    return torch.stack(
        [
            2 * x * torch.cos(2 * t),
            -2 * t * y**2 * (u**2 + v**2),
            -speed * v * x * torch.exp(-torch.sin(2 * t)),
            speed * u,
        ],
        dim=1,
    )


def rotating_exact(t) -> Tensor:
    """[..., 4] in float64."""
    t = torch.as_tensor(t, dtype=torch.float64)
    phase = 3 * t + torch.sin(2 * t) / 2
    return torch.stack([torch.exp(torch.sin(2 * t)), 1 / (1 + t**2), torch.cos(phase), torch.sin(phase)], dim=-1)


def van_der_pol(mu):
    """The Van der Pol oscillator, stiff for large mu (a number, or [batch] for each sample its own)."""

    def f(t, z, args=mu):
        x, v = z.unbind(dim=1)
        return torch.stack([v, args * (1 - x**2) * v - x], dim=1)

    return f
