"""Layers: nn.Modules over `solve`."""

from .neural_ode import NeuralODE, compile
from .neural_sde import NeuralSDE
from .time import AppendTime, TimeChain

__all__ = ["AppendTime", "NeuralODE", "NeuralSDE", "TimeChain", "compile"]
