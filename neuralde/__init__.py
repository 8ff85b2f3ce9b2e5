"""Layers that are differential equations: solve them, differentiate them, look inside them."""

from . import adjoints, introspection, solvers
from ._version import __version__
from .brownian import BrownianTree
from .control import StepControl
from .diagnose import Diagnosis, diagnose
from .equations import ODE, SDE
from .errors import (
    MaxStepsReached,
    NeuralDEError,
    NonFiniteState,
    NotConverged,
    SolveWarning,
    Status,
    StepSizeUnderflow,
)
from .events import Event, Occurrences
from .introspection import probe
from .layers import AppendTime, NeuralODE, NeuralSDE, TimeChain, compile
from .solution import Solution, Statistics, Steps
from .solve import solve

__all__ = [
    "ODE",
    "SDE",
    "AppendTime",
    "BrownianTree",
    "Diagnosis",
    "Event",
    "MaxStepsReached",
    "NeuralDEError",
    "NeuralODE",
    "NeuralSDE",
    "NonFiniteState",
    "NotConverged",
    "Occurrences",
    "Solution",
    "SolveWarning",
    "Statistics",
    "Status",
    "StepControl",
    "StepSizeUnderflow",
    "Steps",
    "TimeChain",
    "__version__",
    "adjoints",
    "compile",
    "diagnose",
    "introspection",
    "probe",
    "solve",
    "solvers",
]
