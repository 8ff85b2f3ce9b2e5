"""Autograd's graph: a walk through it, and the places where it ends with an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .errors import NeuralDEError


def behind(values: Iterable[Tensor], stops: Iterable = ()) -> Iterator:
    """The nodes of the graph behind some tensors, each once; neither the nodes `stops` nor what is behind them."""
    seen, todo = {None, *stops}, [x.grad_fn for x in values]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(parent for parent, _ in node.next_functions)


def depends(value: Tensor, leaf: Tensor) -> bool:
    """Whether a gradient of the value reaches anything but one leaf, from which it is computed."""
    nodes = behind([value])
    return any(not any(n for n, _ in x.next_functions) and getattr(x, "variable", None) is not leaf for x in nodes)


def without_gradient(value: Tensor, like: Sequence[Tensor], message: str) -> Tensor:
    """The value, as a part of the graph that some tensors belong to; to differentiate it raises NeuralDEError.

    A gradient that can't be had must not look like one that is zero.
    """
    return _WithoutGradient.apply(value, message, *like) if any(x.requires_grad for x in like) else value


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, message: str, *like: Tensor) -> Tensor:
        ctx.message = message
        return value.detach()

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        raise NeuralDEError(ctx.message)
