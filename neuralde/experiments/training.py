"""Training a classifier with a Neural ODE inside, with or without a penalty. Lightning runs the loop."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from regularizers import Regularizer

from .data import Split


@dataclass
class History:
    """What one training run showed, per epoch.

    Attributes:
        nfe: mean evaluations of f per test sample. accuracy: on the test samples, from 0 to 1.
        training_seconds: spent in training so far, evaluation left out.
    """

    nfe: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    training_seconds: list[float] = field(default_factory=list)


class _Classifier(lightning.LightningModule):
    """Cross-entropy plus a penalty on the model's layers; Adam with a cosine schedule or an inverse decay."""

    def __init__(self, model: nn.Module, penalty: Regularizer | None, rate: float, steps: int, decay: float | None):
        super().__init__()
        self.model, self.penalty, self.rate, self.steps, self.decay = model, penalty, rate, steps, decay

    def training_step(self, batch, _):
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.penalty is not None:
            loss = loss + self.penalty(self.model)
            self.penalty.step()
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.rate)
        if self.decay is None:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        else:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + self.decay * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Watch(lightning.Callback):
    """Measures the model on the test data after every epoch, outside of the training time."""

    def __init__(self, data: Split, layer, after_epoch: Callable[[], None]):
        self.data, self.layer, self.after_epoch = data, layer, after_epoch
        self.history = History()
        self._spent = 0.0

    def on_train_epoch_start(self, trainer, module):
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer, module):
        self._spent += time.perf_counter() - self._began
        accuracy, nfe = evaluate(module.model, self.layer, self.data)
        self.history.nfe.append(nfe)
        self.history.accuracy.append(accuracy)
        self.history.training_seconds.append(self._spent)
        self.after_epoch()


def train(
    model: nn.Module,
    layer: nn.Module,
    penalty: Regularizer | None,
    data: Split,
    epochs: int,
    batch: int,
    rate: float,
    after_epoch: Callable[[], None],
    decay: float | None = None,
) -> History:
    """Trains a model in place.

    Args:
        model: x -> logits. layer: the Neural ODE inside it.
        penalty: to add to the loss, or None. Its schedule advances once per batch.
        data: training and test samples, on the device to train on.
        epochs, batch, rate: of Adam, the rate following a cosine to 0.
        after_epoch: called after every epoch, for a progress bar.
        decay: instead of the cosine, the rate over 1 + decay·step.

    Returns:
        The `History`.
    """
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), batch_size=batch, shuffle=True)
    watch = _Watch(data, layer, after_epoch)
    device = data.train_x.device
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1 if device.index is None else [device.index],
            max_epochs=epochs,
            callbacks=[watch],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(_Classifier(model, penalty, rate, epochs * len(loader), decay), loader)
    return watch.history


@torch.no_grad()
def evaluate(model: nn.Module, layer: nn.Module, data: Split) -> tuple[float, float]:
    """Test accuracy from 0 to 1, and mean NFE per test sample."""
    training = model.training
    model.eval()
    found = model(data.test_x).argmax(dim=1)
    model.train(training)
    return (found == data.test_y).double().mean().item(), layer.solution.stats.nfe.double().mean().item()


@torch.no_grad()
def prediction_seconds(model: nn.Module, x: Tensor, runs: int = 5) -> float:
    """Median time of a prediction of one batch."""
    times = []
    for _ in range(runs + 1):
        _synchronize(x)
        began = time.perf_counter()
        model(x)
        _synchronize(x)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[runs // 2]


def _synchronize(x: Tensor):
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


class _quiet(warnings.catch_warnings):  # noqa: N801  (a context manager, named as it is used)
    """Lightning without its advice on loaders, devices and loggers: none of it is about what the user asked for."""

    def __enter__(self):
        super().__enter__()
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|lightning_utilities")
        warnings.filterwarnings("ignore", message=".*(num_workers|isinstance.treespec|lightning).*")
        self._loggers = [logging.getLogger(n) for n in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
        self._loggers += [logging.getLogger(f"pytorch_lightning.{n}") for n in ("utilities.rank_zero", "accelerators")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *exception):
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
        super().__exit__(*exception)
