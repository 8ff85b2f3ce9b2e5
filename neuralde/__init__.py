"""Layers that are differential equations: solve them, differentiate them, look inside them."""

from . import adjoints, introspection, solvers
from ._version import __version__
from .brownian import BrownianTree
from .control import StepControl
from .diagnose import Diagnosis, diagnose
from .equations import ODE, SDE, SteadyState
from .equilibrium import Equilibrium
from .errors import (
    BiasWarning,
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
from .layers import AppendTime, DeepEquilibrium, NeuralODE, NeuralSDE, TimeChain, VariationalDropout, compile
from .solution import Solution, Statistics, Steps
from .solve import solve
from .termination import Termination

__all__ = [
    "ODE",
    "SDE",
    "AppendTime",
    "BiasWarning",
    "BrownianTree",
    "DeepEquilibrium",
    "Diagnosis",
    "Equilibrium",
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
    "SteadyState",
    "StepControl",
    "StepSizeUnderflow",
    "Steps",
    "Termination",
    "TimeChain",
    "VariationalDropout",
    "__version__",
    "adjoints",
    "compile",
    "diagnose",
    "introspection",
    "probe",
    "solve",
    "solvers",
]
