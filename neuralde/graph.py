"""Autograd's graph, as those walk it who look for what a value depends on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


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
