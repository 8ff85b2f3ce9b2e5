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

    Shapes:
        Input and output: [batch, features], or [batch, channels, ...] whose channels are kept or zeroed as a whole.

    Raises:
        ValueError: p is out of range.

    Source: Gal & Ghahramani 2016, "A theoretically grounded application of dropout in recurrent neural networks".
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x with some of its channels zeroed, in training mode."""
        if not self.training or self.p == 0.0:
            return x
        mask = torch.rand(*x.shape[:2], *(1,) * (x.dim() - 2), device=x.device) >= self.p
        return x * mask / (1.0 - self.p)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p:g}"
