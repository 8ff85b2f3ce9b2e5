"""Sensitivity methods, and the registry that gives them names."""

from __future__ import annotations

from ..registry import Registry
from .base import Adjoint
from .checkpointed import Checkpointed
from .direct import Direct

__all__ = ["ADJOINTS", "Adjoint", "Checkpointed", "Direct", "get", "register"]

ADJOINTS: Registry[Adjoint] = Registry("adjoint", Adjoint)
register, get = ADJOINTS.register, ADJOINTS.find

for _adjoint in (Direct(), Checkpointed()):
    register(_adjoint)
