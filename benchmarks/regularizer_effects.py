"""What every regularizer does to the digits classifier: NFE and accuracy after training, time and memory of a step."""

from __future__ import annotations

import csv
import functools
import gc
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import AliveBytes, in_turns, median_ratio, parser, spread, write
from torch import nn

import regularizers as reg
from neuralde.experiments import demo
from neuralde.experiments.data import digits
from neuralde.experiments.training import train

# The weights of errors and stiffness are the demo's, chosen on these digits; the others are first guesses, not tuned.
ERROR = functools.partial(reg.exponential, 30.0, 3.0)
LOCAL = functools.partial(reg.exponential, 1e6, 4e5)
VARIANTS: dict[str, Callable[[int], reg.Regularizer] | None] = {
    "none": None,
    "GlobalError (ER)": lambda steps: reg.GlobalError(ERROR(steps)),
    "GlobalStiffness (SR)": lambda steps: reg.GlobalStiffness(1.0),
    "LocalError, unbiased": lambda steps: reg.LocalError("unbiased", LOCAL(steps)),
    "LocalError, biased": lambda steps: reg.LocalError("biased", LOCAL(steps)),
    "LocalStiffness, unbiased": lambda steps: reg.LocalStiffness("unbiased", 0.3),
    "LocalStiffness, biased": lambda steps: reg.LocalStiffness("biased", 0.3),
    "Steer": lambda steps: reg.Steer(0.5),
    "TaylorDerivative(2)": lambda steps: reg.TaylorDerivative(2, 1e-2),
    "TaylorDerivative(3)": lambda steps: reg.TaylorDerivative(3, 1e-3),
    "KineticEnergy": lambda steps: reg.KineticEnergy(1e-2),
    "JacobianFrobenius": lambda steps: reg.JacobianFrobenius(1e-2),
    "KineticEnergy + JacobianFrobenius": lambda steps: reg.KineticEnergy(1e-2) + reg.JacobianFrobenius(1e-2),
    "Steer + ER": lambda steps: reg.Steer(0.5) + reg.GlobalError(ERROR(steps)),
    "Steer + SR": lambda steps: reg.Steer(0.5) + reg.GlobalStiffness(1.0),
    "SR + ER": lambda steps: reg.GlobalStiffness(1.0) + reg.GlobalError(ERROR(steps)),
}
THREADS = 1


def trained(config: demo.Config, name: str, seed: int) -> dict:
    """Accuracy and NFE on the test digits after training."""
    data = digits(torch.float64)
    torch.manual_seed(seed)
    model = demo.make_model(config)
    steps = config.epochs * -(-len(data.train_x) // config.batch)
    make = VARIANTS[name]
    penalty = None if make is None else make(steps).prepare(model)
    history = train(model, model[0], penalty, data, config.epochs, config.batch, config.rate, lambda: None)
    return {"regularizer": name, "seed": seed, "accuracy": history.accuracy[-1], "nfe": history.nfe[-1]}


def steps_of(config: demo.Config, names: list[str], backward: bool = True) -> dict[str, Callable[[], None]]:
    """One training step of every variant, of the same model on the same batch; or the forward half of it."""
    data = digits(torch.float64)
    x, y = data.train_x[: config.batch], data.train_y[: config.batch]

    def made(name: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = demo.make_model(config)
        penalty = None if VARIANTS[name] is None else VARIANTS[name](1).prepare(model)

        seeds = itertools.count()  # other end times, times and noise in every round, and the same for all variants

        def step():
            torch.manual_seed(next(seeds))
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss = loss if penalty is None else loss + penalty(model)
            if backward:
                loss.backward()

        return step

    return {name: made(name) for name in names}


def peak(step: Callable[[], None]) -> int:
    """Bytes that a step has alive at most."""
    step()
    gc.collect()
    with AliveBytes() as counted:
        step()
    return counted.peak


def earlier(folder: Path) -> dict[tuple[str, int], dict]:
    """The trainings of a run before, by regularizer and seed."""
    with (folder / "regularizer_effects.csv").open(newline="") as file:
        rows = [
            {"regularizer": row["regularizer"], "seed": int(row["seed"])}
            | {what: float(row[what]) for what in ("accuracy", "nfe")}
            for row in csv.DictReader(file)
        ]
    return {(row["regularizer"], row["seed"]): row for row in rows}


def main():
    """Trains, measures, prints a table and writes it to results/."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="trainings of each variant")
    options.add_argument("--epochs", type=int, default=8, help="of each training")
    options.add_argument(
        "--rounds", type=int, default=9, help="measurements of the time of a step, at least 7; 0: none"
    )
    options.add_argument("--join", action="store_true", help="keep the trainings that the results have already")
    options.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    given = options.parse_args()
    torch.set_num_threads(THREADS)
    config = demo.Config(epochs=given.epochs)
    names = list(dict.fromkeys(["none", *given.only]))
    steps = steps_of(config, names)
    seconds = in_turns(steps, given.rounds, least=0.0) if given.rounds else None
    memory = {name: peak(step) for name, step in steps.items()}
    ahead = {name: peak(step) for name, step in steps_of(config, names, backward=False).items()}
    print("steps measured; training", file=sys.stderr)
    known = earlier(given.results) if given.join else {}
    runs = []
    for seed in range(given.seeds):
        for name in names:
            runs.append(known.get((name, seed)) or trained(config, name, seed))
            print(runs[-1], file=sys.stderr)
    rows = []
    for name in names:
        mine = [run for run in runs if run["regularizer"] == name]
        accuracy, nfe = ([run[what] for run in mine] for what in ("accuracy", "nfe"))
        rows.append(
            {
                "regularizer": name,
                "test NFE": statistics.fmean(nfe),
                "± NFE": statistics.stdev(nfe) if len(nfe) > 1 else None,
                "accuracy (%)": f"{100 * statistics.fmean(accuracy):.1f}",
                "± points": 100 * statistics.stdev(accuracy) if len(accuracy) > 1 else None,
                "ms per step": 1e3 * statistics.median(seconds[name]) if seconds else None,
                "times none's": median_ratio(seconds[name], seconds["none"]) if seconds else None,
                "spread": spread(seconds[name]) if seconds else None,
                "peak of a step (MB)": memory[name] / 1e6,
                "of its forward half (MB)": ahead[name] / 1e6,
            }
        )
    per_step = {name: statistics.median(seconds[name]) if seconds else None for name in names}
    fine = [run | {"seconds_per_step": per_step[run["regularizer"]]} for run in runs]
    notes = [
        f"The demo's classifier of scikit-learn's digits: 65-{config.hidden}-64 tanh field with time, tsit5 at rtol = "
        f"atol = {config.tolerance}, float64, checkpointed adjoint; {config.epochs} epochs of Adam, batch "
        f"{config.batch}; mean and sample standard deviation over {given.seeds} seeds.",
        "A step is the forward pass, the penalty and the backward pass of a fresh model on one batch: the same NFE for "
        "all but Steer, which draws another end time in every round. Training gets faster as NFE falls.",
        "Memory is that of the tensors alive at once. Where it is the same for several penalties, the solve's own "
        "backward pass has the peak; the forward half, the penalty's included, tells them apart.",
    ]
    if known:
        notes.append("NFE and accuracy are, in part or all, of trainings that an earlier run made (--join).")
    write(given.results, "regularizer_effects", rows, str(THREADS), notes, fine=fine)


if __name__ == "__main__":
    main()
