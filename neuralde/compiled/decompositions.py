"""What some operations become inside of a program, where what Inductor makes of them costs more than a small f.

A product with a thin matrix is a call of a library that takes longer than its arithmetic, and ends the kernel that it
stands in; written as sums it is fused with what is around it.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

THIN, LONG = 4, 128  # up to THIN columns (or rows, or terms) a product is written as sums, of up to LONG terms


class _Table(dict):
    """Known by its name to Inductor's cache on disk, which can't make a key of what is in it: see `version`."""

    def __reduce__(self):
        return table, ()


@functools.cache
def version() -> str:
    """Of this file: programs that were made with another one are not these."""
    return hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()


@functools.cache
def table() -> dict:
    """Inductor's own decompositions, and these."""
    from torch._inductor.decomposition import select_decomp_table

    found, aten = _Table(select_decomp_table()), torch.ops.aten
    found[aten.mm.default] = functools.partial(_mm, found.get(aten.mm.default))
    found[aten.addmm.default] = functools.partial(_addmm, found.get(aten.addmm.default))
    return found


def _mm(otherwise: Callable | None, x: Tensor, y: Tensor, *rest, **options) -> Tensor:
    found = NotImplemented if rest or options else _thin(x, y)
    if found is NotImplemented and otherwise is not None:
        return otherwise(x, y, *rest, **options)
    return found


def _addmm(otherwise: Callable | None, bias: Tensor, x: Tensor, y: Tensor, *rest, beta=1, alpha=1) -> Tensor:
    found = _thin(x, y) if not rest and beta == alpha == 1 else NotImplemented
    if found is NotImplemented:
        return found if otherwise is None else otherwise(bias, x, y, *rest, beta=beta, alpha=alpha)
    return found + bias


def _thin(x: Tensor, y: Tensor) -> Tensor:
    """x @ y as sums; NotImplemented where neither factor is thin."""
    if x.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    (rows, terms), columns = x.shape, y.shape[1]
    if _up_to(THIN, terms):
        return sum(column[:, None] * y[k] for k, column in enumerate(_columns(x)))
    if _up_to(THIN, columns) and _up_to(LONG, terms):
        return torch.stack([(x * y[:, j]).sum(dim=1) for j in range(columns)], dim=1)
    if _up_to(THIN, rows) and _up_to(LONG, terms):
        return torch.stack([(x[i][:, None] * y).sum(dim=0) for i in range(rows)])
    return NotImplemented


def _columns(x: Tensor) -> tuple[Tensor, ...]:
    """The columns of a thin matrix, each in one piece, so that a vector register loads it.

    Inductor would write what x is made of into the loop over all products, where it is computed again for each; of
    what as_strided looks at it makes a tensor first.
    """
    rows, columns = x.shape
    return torch.as_strided(x.t().contiguous(), (columns, rows), (rows, 1)).unbind()


def _up_to(most: int, size) -> bool:
    """Whether a size is known to be one of 1, 2, ..., most: one that may change from call to call is not."""
    return isinstance(size, int) and 0 < size <= most
