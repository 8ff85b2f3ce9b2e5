"""Solves inside of torch.utils.checkpoint, which makes them once more in the backward pass."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_KEPT = 1024  # seeds, a number each
# Of newer versions of torch: (whether those of a tracer count) -> the hooks that a saved tensor gets, or None.
_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def again() -> int:
    """The backward pass that runs now, -1 where none does: what is solved in one has been solved before."""
    return torch._C._current_graph_task_id()


def hooked() -> bool:
    """Whether something takes in what the tape keeps, as a checkpoint does, which expects the same ones once more."""
    return _hooked_by_trial() if _HOOKS is None else _HOOKS(False) is not None


def _hooked_by_trial() -> bool:
    with torch.enable_grad():
        node = torch.ones((), requires_grad=True).exp().grad_fn  # held, for what it keeps is gone with it
    try:
        node._raw_saved_result.register_hooks(lambda x: x, lambda x: x)
    except RuntimeError:  # it has some already
        return True
    return False


class Last(threading.local):
    """The last solve of a thread; a recomputation has one of its own, and leaves that of the forward pass alone."""

    def __init__(self):
        self._solutions = {}

    @property
    def solution(self):
        """Of the pass that runs now."""
        return self._solutions.get(again() >= 0)

    @solution.setter
    def solution(self, solution):
        self._solutions[again() >= 0] = solution


class Seeds:
    """What a checkpointed solve drew, so that its recomputation draws the same.

    A solve is known by its function and its start. Of two alike in one forward pass the later one counts: then the
    gradient of a penalty inside of the checkpoint is that at another time, as likely as the first.
    """

    def __init__(self):
        self._seeds, self._lock = {}, threading.Lock()

    def of(self, f, start, fresh) -> int:
        """The seed for a solve.

        Args:
            f, start: its function and its start. fresh: fresh() is a new one.
        """
        if not hooked():  # nothing will be made once more
            return fresh()
        key = _key(f, start)
        with self._lock:
            if again() >= 0 and key in self._seeds:
                return self._seeds[key]
        seed = fresh()
        with self._lock:
            self._seeds.pop(key, None)
            self._seeds[key] = seed
            while len(self._seeds) > _KEPT:
                del self._seeds[next(iter(self._seeds))]
        return seed


def _key(f, start) -> tuple:
    """f, where it is an object that stays, and the size and sums of the start."""
    leaves = [x.detach() for x in pytree.tree_leaves(start) if isinstance(x, Tensor)]
    with torch.no_grad():
        sums = [str(y.double().sum().item()) for x in leaves for y in (x.real, x.real.square(), x.real.flatten()[::2])]
    return (id(f) if isinstance(f, nn.Module) else None, *(x.shape for x in leaves), *sums)
