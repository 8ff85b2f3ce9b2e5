"""attach(): penalties for the layers of a model that exists."""

from __future__ import annotations

import sys

from torch import nn

from neuralde import NeuralODE


def attach(model: nn.Module, engine: str | None = None, **solve_options) -> nn.Module:
    """Makes every torchdyn NeuralODE and NeuralSDE inside a model show its solves to penalties: `penalty(model)`.

    The layers' solver, tolerances, sensitivity and results stay what they were, bit for bit. From the next call on a
    layer holds its last solve in `.solution`, and `penalty(model)` is the sum over the layers, those of neuralde
    included. Attaching twice changes nothing.

    Args:
        model: a Module, or such a layer itself.
        engine: None leaves the solves to torchdyn. "neuralde" has `neuralde.solve` make them, in place, with the
            layer's solver, tolerances and output times: then the global penalties work too, and so does all else that
            takes a `Solution`. Results agree to the tolerances, not to the bit; a weight of `LocalError` does not carry
            over (see there). None, later, gives them back.
        **solve_options: with engine="neuralde": of `neuralde.solve`, instead of what the layer's arguments say: adjoint
            ("direct" for sensitivity="autograd", else "checkpointed"), control ("joint"), rtol, solver, ...

    Returns:
        The model itself.

    Raises:
        ValueError: it has no such layer, or one that neuralde can't solve; or engine is unknown.
    """
    if engine not in (None, "neuralde"):
        raise ValueError(f"engine must be None or 'neuralde', got {engine!r}")
    if solve_options and engine is None:
        raise ValueError(f"{', '.join(solve_options)}: options of neuralde.solve need engine='neuralde'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach takes a Module, got {type(model).__name__}")
    found = any(isinstance(m, NeuralODE) for m in model.modules())
    # Whoever has a layer of torchdyn's has imported it; nobody else should have to.
    if "torchdyn.core.neuralde" in sys.modules:
        from . import torchdyn

        found |= torchdyn.attach(model, engine, solve_options)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has neither a torchdyn NeuralODE or NeuralSDE nor a neuralde layer inside. Calls "
            "of torchdiffeq and torchsde are recorded where their functions come from here: from "
            "regularizers.torchdiffeq import odeint"
        )
    return model
