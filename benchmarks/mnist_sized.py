"""The papers' MNIST Neural ODE at the papers' tolerance: solves without underflow, and its NFE beside theirs.

Two networks, 784-100-784 with t appended to the input of both layers: "tanh" has a tanh at its end and was trained with
Momentum (thesis Table 5.1), "linear" has none and was trained with Adam (thesis Table 6.2). The tolerance, 1.4e-8, lies
below the rounding of float32; on random data the figures show that the solve bears it, on the real digits (--data) they
can be compared with the papers'.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import parser, write
from torch import Tensor, nn

import neuralde as nde
from neuralde.experiments.data import mnist

TOLERANCE, BATCH, CLASSES = 1.4e-8, 512, 10
FIGURES = ("NFE", "accepted", "rejected", "accuracy %")
SOLVED = "solved"
# NFE of the vanilla Neural ODE, and after what.
PAPERS = {
    "tanh": ("253.0 ± 3.5", "thesis Table 5.1, after 75 epochs of Momentum"),
    "linear": ("303.6 ± 3.2", "thesis Table 6.2, after 7500 steps of Adam"),
}


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], [n, 784] float32, with their classes, [n] int64: to train with, and to measure on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def random_digits(device: str) -> Digits:
    """Noise with random classes: four batches to train with, one to measure on."""

    def draw(n):
        return torch.rand(n, 784).to(device), torch.randint(CLASSES, (n,)).to(device)

    return Digits(draw(4 * BATCH), draw(BATCH))


def real_digits(folder: Path, device: str) -> Digits:
    """MNIST from its four idx files: see `neuralde.experiments.data.mnist`."""
    split = mnist(folder, device=device)
    return Digits((split.train_x, split.train_y), (split.test_x, split.test_y))


def batches(n: int, device: str) -> Iterator[Tensor]:
    """Indices of full batches, shuffled anew for every epoch, without end."""
    while True:
        yield from torch.randperm(n).to(device)[: n - n % BATCH].split(BATCH)


def classifier(network: str, init: str) -> nn.Sequential:
    """The Neural ODE and its linear head."""
    torch.manual_seed(0)
    layers = [nde.AppendTime(nn.Linear(785, 100)), nn.Tanh(), nde.AppendTime(nn.Linear(101, 784))]
    f = nde.TimeChain(*layers, *([nn.Tanh()] if network == "tanh" else []))
    ode = nde.NeuralODE(f, solver="tsit5", rtol=TOLERANCE, atol=TOLERANCE, control="joint", adjoint="checkpointed")
    model = nn.Sequential(ode, nn.Linear(784, CLASSES))
    if init == "glorot":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    return model


def optimizer(network: str, model: nn.Module):
    """The papers', with its schedule: Momentum with inverse decay, or Adam."""
    if network == "linear":
        made = torch.optim.Adam(model.parameters(), lr=1e-3)
        return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + 1e-5 * step))


@torch.no_grad()
def measure(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> dict:
    """NFE and steps, means over the batches, and accuracy."""
    found, right = [], 0
    for x, y in zip(*(part.split(BATCH) for part in data), strict=True):
        right += int((model(x).argmax(dim=1) == y).sum())
        stats = model[0].solution.stats
        found.append([float(count[0]) for count in (stats.nfe, stats.accepted, stats.rejected)])
    means = np.mean(found, axis=0).tolist()
    return dict(zip(FIGURES, [*means, 100 * right / len(data[1])], strict=True))


def train(model: nn.Sequential, network: str, digits: Digits, steps: int, device: str):
    """The papers' classifier, without a penalty."""
    images, labels = digits.train
    optimize, schedule = optimizer(network, model)
    indices, start = batches(len(images), device), time.perf_counter()
    for step in range(1, steps + 1):
        index = next(indices)
        loss = nn.functional.cross_entropy(model(images[index]), labels[index])
        optimize.zero_grad()
        loss.backward()
        optimize.step()
        schedule.step()
        if step % max(steps // 20, 1) == 0:
            spent, nfe = time.perf_counter() - start, int(model[0].solution.stats.nfe[0])
            print(f"{network}, step {step}: loss {loss.item():.4f}, NFE {nfe}, {spent:.0f} s", flush=True)


def run(network: str, digits: Digits, given: argparse.Namespace) -> list[dict]:
    """The rows of one network: at initialisation, and after training. A solve that fails leaves its error's name."""
    model, rows = classifier(network, given.init).to(given.device), []
    for steps in (0, given.train) if given.train else (0,):
        row = {"network": network, "training steps": steps, "status": SOLVED} | dict.fromkeys(FIGURES)
        try:
            if steps:
                train(model, network, digits, steps, given.device)
            row |= measure(model, digits.test)
        except nde.NeuralDEError as error:
            print(error)
            row["status"] = type(error).__name__
        rows.append(row | {"papers' NFE, trained": PAPERS[network][0]})
    return rows


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, help="folder with the four MNIST idx .gz files; random values without it")
    options.add_argument("--train", type=int, default=0, metavar="STEPS", help="optimizer steps before the second row")
    options.add_argument("--networks", nargs="+", choices=tuple(PAPERS), default=tuple(PAPERS))
    options.add_argument("--init", choices=("torch", "glorot"), default="torch", help="glorot: the papers' library's")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--device", default="cpu")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    digits = real_digits(given.data, given.device) if given.data else random_digits(given.device)
    rows = [row for network in given.networks for row in run(network, digits, given)]
    solved = all(row["status"] == SOLVED for row in rows)
    notes = [
        f"{'MNIST' if given.data else 'random values and classes'}, batches of {BATCH}; NFE and steps are means over "
        f"{len(digits.test[0])} {'test' if given.data else 'held-out'} samples, one batch after the other",
        f"Tsit5, joint control, rtol = atol = {TOLERANCE}, t from 0 to 1, float32, initialisation: {given.init}'s",
        *(f"{network}: the papers' NFE is {nfe}: {source}" for network, (nfe, source) in PAPERS.items()),
        *([] if given.data else ["random data: the NFE after training can't be compared with the papers'"]),
        f"{'PASS' if solved else 'FAIL'}: every batch was solved, without underflow of the step size",
    ]
    name = "mnist_sized" + ("_digits" if given.data else "")
    write(given.results, name, rows, str(given.threads), notes)


if __name__ == "__main__":
    main()
