"""A torchdiffeq program on scikit-learn's digits, with and without a penalty: two changed lines."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torchdiffeq
from common import parser, verdict, write
from torch import Tensor, nn

import regularizers as reg
from neuralde.experiments.data import Split, digits
from regularizers import torchdiffeq as recorded

# (name, penalty): the weights are round numbers, chosen once for all seeds.
PENALTIES: dict[str, Callable[[], reg.Regularizer] | None] = {
    "none": None,
    "LocalError(unbiased, 0.3)": lambda: reg.LocalError("unbiased", weight=0.3),
    "LocalError(biased, 0.3)": lambda: reg.LocalError("biased", weight=0.3),
    "LocalStiffness(unbiased, 1)": lambda: reg.LocalStiffness("unbiased", weight=1.0),
    "LocalStiffness(biased, 1)": lambda: reg.LocalStiffness("biased", weight=1.0),
}
LEAST_SAVED, MOST_LOST = 0.25, 1.0


class Field(nn.Module):
    """64-100-64 with t beside the input of either layer, and a count of its evaluations."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.nfe = nn.Linear(65, 100), nn.Linear(101, 64), 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        self.nfe += 1
        t = torch.ones_like(y[:, :1]) * t
        return self.second(torch.cat([torch.tanh(self.first(torch.cat([y, t], dim=1))), t], dim=1))


class Classifier(nn.Module):
    """A Neural ODE and a linear layer, as torchdiffeq's users write it.

    Args:
        odeint: of torchdiffeq, or the recorded one. tolerance: rtol and atol.
    """

    def __init__(self, odeint: Callable, tolerance: float):
        super().__init__()
        self.odeint, self.tolerance = odeint, tolerance
        self.f, self.head = Field(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        t = torch.tensor([0.0, 1.0])
        return self.head(self.odeint(self.f, x, t, rtol=self.tolerance, atol=self.tolerance)[-1])


def run(penalty: reg.Regularizer | None, data: Split, seed: int, epochs: int, tolerance: float) -> tuple[int, float]:
    """(evaluations of f for the test data, accuracy in percent) after training."""
    torch.manual_seed(seed)
    odeint = torchdiffeq.odeint if penalty is None else recorded.odeint
    model = Classifier(odeint, tolerance)
    descent = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x), generator=order).split(128):
            loss = nn.functional.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            if penalty is not None:
                loss = loss + penalty(odeint.solution)
            descent.zero_grad()
            loss.backward()
            descent.step()
    model.eval()
    model.f.nfe = 0
    with torch.no_grad():
        right = model(data.test_x).argmax(dim=1) == data.test_y
    return model.f.nfe, 100.0 * float(right.double().mean())


def main():
    """Trains, prints a table and writes it to results/."""
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, default=30)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--tolerance", type=float, default=1e-5)
    given = options.parse_args()
    torch.set_num_threads(1)
    data, fine, rows = digits(), [], []
    for name, make in PENALTIES.items():
        found = []
        for seed in range(given.seeds):
            nfe, accuracy = run(make and make(), data, seed, given.epochs, given.tolerance)
            found.append((nfe, accuracy))
            fine.append({"penalty": name, "seed": seed, "test NFE": nfe, "test accuracy, %": accuracy})
        nfe, accuracy = (statistics.fmean(x) for x in zip(*found, strict=True))
        rows.append({"penalty": name, "test NFE": nfe, "test accuracy, %": accuracy})
    plain = rows[0]
    for row in rows:
        row["NFE saved"] = 1.0 - row["test NFE"] / plain["test NFE"]
        row["accuracy lost, points"] = plain["test accuracy, %"] - row["test accuracy, %"]
    verdicts = []
    for row in rows:
        if row["penalty"] != "none":
            verdicts.append(verdict(f"{row['penalty']}, NFE saved", row["NFE saved"], LEAST_SAVED, least=True))
            verdicts.append(verdict(f"{row['penalty']}, points lost", row["accuracy lost, points"], MOST_LOST))
    notes = [
        f"64-100-64 Neural ODE by torchdiffeq's odeint (dopri5, rtol = atol = {given.tolerance:g}) and a linear layer, "
        f"on scikit-learn's digits, batches of 128, {given.epochs} epochs of Adam at 3e-3; "
        f"means over {given.seeds} seeds",
        "test NFE: evaluations of f in the solve of the whole test set, one step size for all of it",
        *verdicts,
    ]
    write(given.results, "existing_code", rows, "1", notes, ("torchdiffeq", "scikit-learn"), fine)


if __name__ == "__main__":
    main()
