"""Layers: nn.Modules over `solve`."""

from .neural_ode import NeuralODE, compile
from .time import AppendTime, TimeChain

__all__ = ["AppendTime", "NeuralODE", "TimeChain", "compile"]
