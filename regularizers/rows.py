"""Which samples of another library's solve a penalty can look at, where others are not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from neuralde.introspection import Probe
from neuralde.state import all_finite


class Rows:
    """The finite samples among those of a batch that another library steps together.

    The others are kept out of the step: they stand still, where a finite one is, so that f sees the batch that it saw
    in the solve, and no gradient of theirs is NaN.

    Args:
        z: a state, tensors with samples in the first dimension; else all of it is one sample.
        end: the last state of the solve: who failed on the way there counts as failed. None, or of other samples than
            z: not looked at.

    Attributes:
        finite: which are finite, [batch], or [1] for one sample; None for all.
    """

    def __init__(self, z, end=None):
        leaves = pytree.tree_leaves(z)
        sizes = {x.shape[:1] for x in leaves}
        beside = [x for x in pytree.tree_leaves(end) if isinstance(x, Tensor)]
        if {x.shape[:1] for x in beside} == sizes:
            leaves = leaves + beside
        self.finite = None
        if not all(map(all_finite, leaves)):
            alone = len(sizes) > 1 or sizes == {torch.Size()}
            rows = [torch.isfinite(x.detach()).reshape(1 if alone else len(x), -1).all(dim=1) for x in leaves]
            self.finite = torch.stack(rows).all(dim=0)

    @property
    def none(self) -> bool:
        """Whether all failed."""
        return self.finite is not None and not bool(self.finite.any())

    def state(self, z):
        """z, with a finite sample in place of each that failed."""
        if self.finite is None:
            return z
        first = int(self.finite.int().argmax())
        return pytree.tree_map(lambda x: torch.where(self._like(x), x, x[first].detach()), z)

    def still(self, f: Callable) -> Callable:
        """f, whose values for those that failed are 0."""
        if self.finite is None:
            return f
        return lambda *args: self.without(f(*args))

    def without(self, x):
        """x, [batch, ...] each, with 0 for those that failed."""
        if self.finite is None:
            return x
        return pytree.tree_map(lambda x: torch.where(self._like(x), x, torch.zeros_like(x)), x)

    def averaged(self, probe: Probe) -> Probe:
        """A probe whose errors, roots of means over all samples, are those over the finite ones."""
        if self.finite is None:
            return probe

        def scaled(x):
            return x if x is None else x * (len(self.finite) / self.finite.sum().to(x)) ** 0.5

        return dataclasses.replace(probe, error=scaled(probe.error), raw_error=scaled(probe.raw_error))

    def _like(self, x: Tensor) -> Tensor:
        return self.finite.reshape(-1, *[1] * (x.dim() - 1))
