"""Time-dependent vector fields from ordinary layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AppendTime(nn.Module):
    """A layer that sees t as one more feature or channel: (t, z) -> layer(cat([z, t], dim=1)).

    torchdyn's `DepthCat` does this for layers inside its `DEFunc`; here t is an argument, and images work too.

    Args:
        layer: takes one feature (Linear) or channel (Conv) more than z has in dimension 1.

    Shapes:
        t: [batch, 1, ..., 1], or without dimensions. z: [batch, channels, ...].
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """layer(cat([z, t], dim=1)), t spread over z's positions."""
        t, shape = torch.as_tensor(t, dtype=z.dtype, device=z.device), (len(z), 1, *z.shape[2:])
        if t.shape != shape:
            if t.dim():  # [batch, 1, ...] of the state that f was given, whose rank z may have left behind
                t = t.reshape(-1, *(1,) * (z.dim() - 1))
            t = t.expand(shape)
        return self.layer(torch.cat([z, t], dim=1))


class TimeChain(nn.Module):
    """Layers applied in turn, (t, z) -> z, t handed to those that take it (`AppendTime`, `TimeChain`).

    The papers' MNIST Neural ODE is
    `TimeChain(AppendTime(nn.Linear(785, 100)), nn.Tanh(), AppendTime(nn.Linear(101, 784)))`.

    Args:
        *layers: modules.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """All layers in turn."""
        for layer in self.layers:
            z = layer(t, z) if isinstance(layer, AppendTime | TimeChain) else layer(z)
        return z
