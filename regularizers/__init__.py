"""Penalties that make differential equations cheaper to solve."""

from .attach import attach
from .base import Regularizer
from .recorded import record
from .schedules import constant, cosine, exponential, linear
from .solver import GlobalError, GlobalStiffness, LocalError, LocalStiffness

# Every penalty by name: the tests run over it, and so does the command line.
REGULARIZERS = {cls.__name__: cls for cls in (GlobalError, GlobalStiffness, LocalError, LocalStiffness)}

__all__ = [
    "REGULARIZERS",
    "GlobalError",
    "GlobalStiffness",
    "LocalError",
    "LocalStiffness",
    "Regularizer",
    "attach",
    "constant",
    "cosine",
    "exponential",
    "linear",
    "record",
]
