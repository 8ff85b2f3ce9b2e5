"""Penalties that make differential equations cheaper to solve."""

import importlib

from .attach import attach
from .base import Regularizer, Sum
from .derivative import JacobianFrobenius, KineticEnergy, TaylorDerivative
from .equilibrium import Contraction, EquilibriumJacobian, Skip
from .recorded import record
from .schedules import constant, cosine, exponential, linear
from .solver import GlobalError, GlobalStiffness, LocalError, LocalStiffness
from .temporal import Steer

# Every penalty on a solution by name: the tests run over it. `Steer` is none: it acts on solves.
REGULARIZERS = {
    cls.__name__: cls
    for cls in (
        GlobalError,
        GlobalStiffness,
        LocalError,
        LocalStiffness,
        TaylorDerivative,
        KineticEnergy,
        JacobianFrobenius,
        EquilibriumJacobian,
        Skip,
        Contraction,
    )
}

__all__ = [
    "REGULARIZERS",
    "Contraction",
    "EquilibriumJacobian",
    "GlobalError",
    "GlobalStiffness",
    "JacobianFrobenius",
    "KineticEnergy",
    "LocalError",
    "LocalStiffness",
    "Regularizer",
    "Skip",
    "Steer",
    "Sum",
    "TaylorDerivative",
    "attach",
    "constant",
    "cosine",
    "exponential",
    "linear",
    "record",
]


def __getattr__(name: str):
    """The adapters, imported when they are asked for: each needs its library."""
    if name in ("torchdiffeq", "torchdyn", "torchsde"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
