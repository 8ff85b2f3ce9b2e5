"""Penalties that make differential equations cheaper to solve."""

from .base import Regularizer
from .equilibrium import Contraction, EquilibriumJacobian, Skip
from .schedules import constant, cosine, exponential, linear
from .solver import GlobalError, GlobalStiffness, LocalError, LocalStiffness

# Every penalty by name: the tests run over it, and so does the command line.
REGULARIZERS = {
    cls.__name__: cls
    for cls in (GlobalError, GlobalStiffness, LocalError, LocalStiffness, EquilibriumJacobian, Skip, Contraction)
}

__all__ = [
    "REGULARIZERS",
    "Contraction",
    "EquilibriumJacobian",
    "GlobalError",
    "GlobalStiffness",
    "LocalError",
    "LocalStiffness",
    "Regularizer",
    "Skip",
    "constant",
    "cosine",
    "exponential",
    "linear",
]
