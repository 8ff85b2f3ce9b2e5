"""Sensitivity methods, and the registry that gives them names."""

from __future__ import annotations

import difflib

from .base import Adjoint
from .checkpointed import Checkpointed
from .direct import Direct

__all__ = ["ADJOINTS", "Adjoint", "Checkpointed", "Direct", "get", "register"]

ADJOINTS: dict[str, Adjoint] = {}


def register(adjoint: Adjoint) -> Adjoint:
    """Adds an adjoint under its name.

    Raises:
        ValueError: the name is taken.
    """
    if adjoint.name in ADJOINTS:
        raise ValueError(f"an adjoint named {adjoint.name!r} is registered already; choose another name")
    ADJOINTS[adjoint.name] = adjoint
    return adjoint


def get(adjoint: str | Adjoint) -> Adjoint:
    """The adjoint of that name, or the adjoint itself.

    Raises:
        ValueError: unknown name; the message has the nearest one. TypeError: neither a name nor an adjoint.
    """
    if isinstance(adjoint, Adjoint):
        return adjoint
    if not isinstance(adjoint, str):
        raise TypeError(f"adjoint must be a name or a neuralde adjoint, got {type(adjoint).__name__}")
    if adjoint not in ADJOINTS:
        near = difflib.get_close_matches(adjoint.lower(), ADJOINTS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown adjoint {adjoint!r}; {hint}Known adjoints: {', '.join(ADJOINTS)}")
    return ADJOINTS[adjoint]


for _adjoint in (Direct(), Checkpointed()):
    register(_adjoint)
