"""Table 1 of the papers on continuous and Skip DEQs: fully connected, on scanned digits or on MNIST."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from torch import Tensor, nn

from . import data as _data
from . import equilibria
from .recipe import Column, Finding, Result, option

draw = equilibria.draw


@dataclass(frozen=True)
class Config:
    """The papers' numbers, but for the epochs (25) and for `skip`: they print 0.01, and their code had 5.

    Source: Pal et al. 2022, "Mixing implicit and explicit deep learning with skip DEQs and infinite time neural ODEs
    (continuous DEQs)", section 6.1.1; Pal et al. 2023, "Continuous deep equilibrium models", section 4.1.
    """

    data: pathlib.Path | None = option(None, "directory with MNIST's four idx files; without it scikit-learn's digits")
    seeds: int = option(3, "runs of each variant")
    epochs: int = option(8, "passes over the training data")
    batch: int = option(32, "samples per step")
    rate: float = option(1e-3, "of Adam, constant")
    width: int = option(128, "of the state")
    solver: str = option("tsit5", "for ODEs, or an iteration")
    control: str = option("joint", "of the steps and of the end", choices=("joint", "per_sample"))
    tolerance: float = option(5e-3, "relative, of the steady state; and of the steps to it")
    max_steps: int = option(100, "to the steady state")
    skip: float = option(5.0, "weight of the penalty on the start, ‖z0 - z*‖₁ / d")
    jacobian: float = option(1.0, "weight of the penalty on the Jacobian, ‖J‖²_F / d")
    device: str = option("cpu", "where to train")

    def __post_init__(self):
        equilibria.check(self)


def run(config: Config) -> Result:
    """Trains the six rows of the table."""
    if config.data is None:
        name, parts = "scikit-learn's digits", _data.digits(device=config.device)
    else:
        name, parts = "MNIST", _data.mnist(config.data, device=config.device)
    task = equilibria.Task(*_in_order(parts), 10, nn.functional.cross_entropy, accuracy)
    budget = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''} at batch {config.batch}"
    title = f"Fully connected DEQs on {name}: {budget}, {config.seeds} seeds"
    result = equilibria.compare(config, task, {"accuracy": Column("accuracy (%)", 100.0, 2)}, "accuracy", title)
    result.findings += findings(result)
    return result


def _in_order(parts: _data.Split) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return parts.train_x, parts.train_y, parts.test_x, parts.test_y


def accuracy(found: Tensor, y: Tensor) -> float:
    """From 0 to 1."""
    return (found.argmax(dim=1) == y).double().mean().item()


def findings(result: Result) -> list[Finding]:
    """What the papers found."""
    best, plain = (result.row(row)["accuracy"] for row in ("Skip Reg. DEQ", "DEQ"))
    return [
        equilibria.saving(result, "Skip Reg. DEQ", "nfe", 2.0, "NFE"),
        equilibria.saving(result, "Skip Reg. DEQ", "training_seconds", 2.0, "training seconds"),
        equilibria.saving(result, "Skip Reg. DEQ", "prediction_seconds", 2.0, "seconds per prediction"),
        Finding(
            f"Skip Reg. DEQ: accuracy {best:.4f} against {plain:.4f} (DEQ); half a point less at most",
            best >= plain - 0.005,
        ),
    ]
