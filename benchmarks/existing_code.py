"""Programs of torchdiffeq, torchdyn and torchsde on scikit-learn's digits, with and without a penalty: two lines."""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchdiffeq
import torchsde
from common import parser, verdict, write
from torch import Tensor, nn

import regularizers as reg
from neuralde.experiments.data import Split, digits
from regularizers import torchdiffeq as recorded_odes
from regularizers import torchsde as recorded_sdes

LEAST_SAVED, MOST_LOST = 0.25, 1.0
TIMES = torch.tensor([0.0, 1.0])


def with_time(t: Tensor, y: Tensor) -> Tensor:
    """y, [batch, ...], with t as one more feature or channel."""
    return torch.cat([y, torch.ones_like(y[:, :1]) * t], dim=1)


# -- the programs, as their libraries' users write them ----------------------------------------------------------------


class Field(nn.Module):
    """64-100-64 with t beside the input of either layer, and a count of its evaluations."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.nfe = nn.Linear(65, 100), nn.Linear(101, 64), 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        self.nfe += 1
        return self.second(with_time(t, torch.tanh(self.first(with_time(t, y)))))


class Perceptron(nn.Module):
    """A Neural ODE of the pixels and a linear layer, by torchdiffeq's odeint.

    Args:
        recorded: whether odeint is the one that shows its solves. tolerance: rtol and atol.
    """

    def __init__(self, recorded: bool, tolerance: float = 1e-5):
        super().__init__()
        self.odeint, self.tolerance = (recorded_odes if recorded else torchdiffeq).odeint, tolerance
        self.f, self.head = Field(), nn.Linear(64, 10)

    @property
    def penalized(self):
        """What a penalty is taken of."""
        return self.odeint.solution

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.odeint(self.f, x, TIMES, rtol=self.tolerance, atol=self.tolerance)[-1])


class Convolutions(nn.Module):
    """The MNIST example's vector field: norm, relu, convolution, twice, and a norm; t is a channel."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, width), width) for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(width + 1, width, 3, padding=1) for _ in range(2))
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        self.nfe += 1
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            y = convolution(with_time(t, torch.relu(norm(y))))
        return self.norms[2](y)


class Residual(nn.Module):
    """The MNIST example for 8 x 8 pixels: convolutions, an ODE block by odeint, a linear layer.

    Args:
        recorded: whether odeint is the one that shows its solves. width: channels; the example has 64.
    """

    def __init__(self, recorded: bool, width: int = 16):
        super().__init__()
        self.odeint, self.f = (recorded_odes if recorded else torchdiffeq).odeint, Convolutions(width)
        groups = min(32, width)
        self.before = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.GroupNorm(groups, width), nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1)
        )
        self.after = nn.Sequential(
            nn.GroupNorm(groups, width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
        )

    @property
    def penalized(self):
        """What a penalty is taken of."""
        return self.odeint.solution

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y = self.before(x.reshape(-1, 1, 8, 8))
        return self.after(self.odeint(self.f, y, TIMES, rtol=1e-3, atol=1e-3)[1])


class Layered(nn.Module):
    """torchdyn's NeuralODE, with its DepthCat for t, and a linear layer.

    Args:
        recorded: whether the model is attached.
    """

    def __init__(self, recorded: bool):
        super().__init__()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            from torchdyn.core import NeuralODE
            from torchdyn.nn import DepthCat

            f = nn.Sequential(DepthCat(1), nn.Linear(65, 100), nn.Tanh(), DepthCat(1), nn.Linear(101, 64))
            how = {"solver": "dopri5", "atol": 1e-5, "rtol": 1e-5, "sensitivity": "autograd", "return_t_eval": False}
            self.layer, self.head = NeuralODE(f, **how), nn.Linear(64, 10)
        if recorded:
            reg.attach(self)

    @property
    def f(self) -> nn.Module:
        """The vector field, which counts its evaluations."""
        return self.layer.vf

    @property
    def penalized(self) -> nn.Module:
        """What a penalty is taken of."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.layer(x, TIMES)[-1])


class Noisy(nn.Module):
    """A Neural SDE of the pixels, 64-100-64 with diagonal noise, and a linear layer, by torchsde's adaptive sdeint.

    Args:
        recorded: whether sdeint is the one that shows its solves.
    """

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, recorded: bool):
        super().__init__()
        self.sdeint = (recorded_sdes if recorded else torchsde).sdeint
        self.drift, self.noise, self.head = Field(), nn.Linear(64, 64), nn.Linear(64, 10)

    @property
    def f(self) -> nn.Module:
        """The drift, which counts its evaluations."""
        return self.drift

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """The diffusion."""
        return 0.1 * torch.sigmoid(self.noise(y))

    @property
    def penalized(self):
        """What a penalty is taken of."""
        return self.sdeint.solution

    def forward(self, x: Tensor) -> Tensor:
        """Logits of one path."""
        how = {"method": "milstein", "adaptive": True, "rtol": 1e-3, "atol": 1e-3, "dt": 0.1, "dt_min": 1e-4}
        return self.head(self.sdeint(self, x, TIMES, **how)[-1])


# -- what is compared --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """One of them, and how it is trained.

    Attributes:
        make: make(recorded) is its model. epochs, rate: of Adam. what: one line for the results.
        penalties: name -> a new one. The weights are round numbers, one for all seeds.
    """

    make: Callable[[bool], nn.Module]
    epochs: int
    rate: float
    what: str
    penalties: dict[str, Callable[[], reg.Regularizer]]


PROGRAMS = {
    "torchdiffeq": Program(
        Perceptron,
        30,
        3e-3,
        "torchdiffeq's odeint: 64-100-64 tanh Neural ODE of the pixels and a linear layer; dopri5, rtol = atol = 1e-5; "
        "LocalError's weight was chosen on seed 100",
        {
            "LocalError(unbiased, 10)": lambda: reg.LocalError("unbiased", weight=10.0),
            "LocalStiffness(unbiased, 1)": lambda: reg.LocalStiffness("unbiased", weight=1.0),
        },
    ),
    "mnist": Program(
        Residual,
        15,
        1e-2,
        "torchdiffeq's MNIST example, 16 channels: convolutions before and in the ODE block; dopri5 at 1e-3; the "
        "penalty's weight was chosen on seed 100",
        {
            "LocalError(unbiased, 30)": lambda: reg.LocalError("unbiased", weight=30.0),
        },
    ),
    "torchdyn": Program(
        Layered,
        30,
        3e-3,
        "torchdyn's NeuralODE, 64-100-64 tanh of the pixels, and a linear layer; dopri5, rtol = atol = 1e-5; the "
        "penalty's weight is that of torchdiffeq's",
        {
            "LocalError(unbiased, 10)": lambda: reg.LocalError("unbiased", weight=10.0),
        },
    ),
    "torchsde": Program(
        Noisy,
        15,
        3e-3,
        "torchsde's sdeint: 64-100-64 tanh drift, diagonal diffusion 0.1 sigmoid(linear), a linear layer; milstein, "
        "adaptive, rtol = atol = 1e-3; the penalties' weight was chosen on seed 100",
        {
            "LocalError(unbiased, 2)": lambda: reg.LocalError("unbiased", weight=2.0),
            "LocalError(biased, 2)": lambda: reg.LocalError("biased", weight=2.0),
        },
    ),
}


def run(program: Program, penalty: reg.Regularizer | None, data: Split, seed: int) -> tuple[int, float]:
    """(evaluations of f for the test data, accuracy in percent) after training."""
    torch.manual_seed(seed)
    model, order = program.make(penalty is not None), torch.Generator().manual_seed(seed)
    descent = torch.optim.Adam(model.parameters(), lr=program.rate)
    times = torch.Generator().manual_seed(seed)  # the penalties' are the same, whatever ran before
    for _ in range(program.epochs):
        for rows in torch.randperm(len(data.train_x), generator=order).split(128):
            with reg.record(times):
                loss = nn.functional.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            if penalty is not None:
                loss = loss + penalty(model.penalized)
            descent.zero_grad()
            loss.backward()
            descent.step()
    model.eval()
    model.f.nfe = 0
    with torch.no_grad():
        right = model(data.test_x).argmax(dim=1) == data.test_y
    return model.f.nfe, 100.0 * float(right.double().mean())


def compared(name: str, data: Split, seeds: int, folder: Path):
    """Trains a program without and with each of its penalties, and writes a table."""
    program, rows, fine = PROGRAMS[name], [], []
    for penalty, make in {"none": None, **program.penalties}.items():
        found = [run(program, make and make(), data, seed) for seed in range(seeds)]
        for seed, (nfe, accuracy) in enumerate(found):
            fine.append({"penalty": penalty, "seed": seed, "test NFE": nfe, "test accuracy, %": accuracy})
        nfe, accuracy = (statistics.fmean(x) for x in zip(*found, strict=True))
        plain = rows[0] if rows else {"test NFE": nfe, "test accuracy, %": accuracy}
        rows.append(
            {
                "penalty": penalty,
                "test NFE": nfe,
                "test accuracy, %": accuracy,
                "NFE saved": 1.0 - nfe / plain["test NFE"],
                "accuracy lost, points": plain["test accuracy, %"] - accuracy,
            }
        )
        print(rows[-1], file=sys.stderr)
    verdicts = []
    for row in rows[1:]:
        verdicts.append(verdict(f"{row['penalty']}, NFE saved", row["NFE saved"], LEAST_SAVED, least=True))
        verdicts.append(verdict(f"{row['penalty']}, points lost", row["accuracy lost, points"], MOST_LOST))
    notes = [
        program.what,
        f"scikit-learn's digits, batches of 128, {program.epochs} epochs of Adam at {program.rate:g}; means over "
        f"{seeds} seeds; the penalties' weights are round numbers, one for all seeds",
        "test NFE: evaluations of f (of an SDE: its drift) in the solve of the whole test set, one step size for all",
        *verdicts,
    ]
    peers = ("torchdiffeq", "torchdyn", "torchsde", "scikit-learn")
    write(folder, f"existing_code_{name}", rows, "1", notes, peers, fine)


def main():
    """Trains, prints tables and writes them to results/."""
    options = parser(__doc__)
    options.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}; none: all")
    options.add_argument("--seeds", type=int, default=3)
    given = options.parse_args()
    if unknown := set(given.programs) - set(PROGRAMS):
        options.error(f"no program is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for name in given.programs or PROGRAMS:
        compared(name, digits(), given.seeds, given.results)


if __name__ == "__main__":
    main()
