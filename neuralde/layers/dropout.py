"""Dropout for vector fields."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VariationalDropout(nn.Module):
    """Dropout with one mask per sample and channel, the same at every evaluation of a solve.

    A solve draws the randomness of f once (see docs/design.md), so that the mask is new in the next solve, and the same
    in the backward pass. In an f that is called outside of a solve every call draws its own.

    Args:
        p: probability of a channel to be zeroed, in [0, 1). The others are scaled by 1 / (1 - p).
        dim: where the channels are; each is kept or zeroed as a whole, at all places and times. -1 for sequences
            [batch, time, features], as in the source: 1 would drop whole tokens of theirs.

    Shapes:
        Input and output: [batch, features], or [batch, channels, ...]; any shape with the channels at dim.

    Raises:
        TypeError, ValueError: p or dim is none, or the input has no such dimension.

    Source: Gal & Ghahramani 2016, "A theoretically grounded application of dropout in recurrent neural networks".
    """

    def __init__(self, p: float = 0.5, dim: int = 1):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be in [0, 1), got {p}")
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"dim must be an integer, got {dim!r}")
        if dim == 0:
            raise ValueError("dim must be that of the channels, got 0, which is the batch's")
        self.p, self.dim = p, dim

    def forward(self, x: Tensor) -> Tensor:
        """x with some of its channels zeroed, in training mode."""
        if not self.training or self.p == 0.0:
            return x
        if x.dim() > 1 and not -x.dim() < self.dim < x.dim():
            raise ValueError(f"dim={self.dim} is no dimension of channels of an input of shape {tuple(x.shape)}")
        shape = [1] * x.dim()
        for kept in {0, self.dim if x.dim() > 1 else 0}:
            shape[kept] = x.shape[kept]
        mask = torch.rand(shape, device=x.device) >= self.p
        return x * mask / (1.0 - self.p)

    def extra_repr(self) -> str:
        """The options."""
        return f"p={self.p:g}, dim={self.dim}"
