"""Layers: nn.Modules over `solve`."""

from .deep_equilibrium import DeepEquilibrium
from .dropout import VariationalDropout
from .neural_ode import NeuralODE, compile
from .neural_sde import NeuralSDE
from .time import AppendTime, TimeChain

__all__ = [
    "AppendTime",
    "DeepEquilibrium",
    "NeuralODE",
    "NeuralSDE",
    "TimeChain",
    "VariationalDropout",
    "compile",
]
