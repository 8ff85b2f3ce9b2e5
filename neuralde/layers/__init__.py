"""Layers: nn.Modules over `solve`."""

from .deep_equilibrium import DeepEquilibrium
from .dropout import VariationalDropout
from .neural_ode import NeuralODE, compile
from .time import AppendTime, TimeChain

__all__ = ["AppendTime", "DeepEquilibrium", "NeuralODE", "TimeChain", "VariationalDropout", "compile"]
