"""The main job: a Neural ODE on scanned digits, trained with and without solver regularization.

The model is the thesis' MNIST classifier (section 6.3.1.1) at the size of 8×8 digits. Tolerances are tight enough for
the solver to have work to do, and float64, so that its error estimates are not the rounding errors of float32. The
penalties' weights were chosen on these digits; it is a demonstration, not a benchmark.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

import neuralde as nde
import regularizers as reg

from .data import Split, digits
from .recipe import Column, console_for, mean_and_spread, progress, versions
from .training import History, prediction_seconds, train


@dataclass(frozen=True)
class Config:
    """What is trained, and how.

    Attributes:
        device: where. seeds: runs of each variant. epochs, batch, rate: of training, Adam with a cosine schedule.
        hidden: width of the vector field. tolerance: rtol and atol.
    """

    device: str = "cpu"
    seeds: int = 3
    epochs: int = 8
    batch: int = 128
    rate: float = 1e-2
    hidden: int = 64
    tolerance: float = 1e-6


# Each penalty's weight falls exponentially over training, as in the thesis, whose global weights fall tenfold and local
# ones 2.5-fold. The error is relative to the tolerance and a local penalty sees one step of many, hence the sizes.
VARIANTS: dict[str, Callable[[int], reg.Regularizer] | None] = {
    "vanilla": None,
    "GlobalError": lambda steps: reg.GlobalError(reg.exponential(30.0, 3.0, steps)),
    "GlobalStiffness": lambda steps: reg.GlobalStiffness(1.0),
    "LocalError (unbiased)": lambda steps: reg.LocalError("unbiased", reg.exponential(1e6, 4e5, steps)),
    "LocalError (biased)": lambda steps: reg.LocalError("biased", reg.exponential(1e6, 4e5, steps)),
}


@dataclass
class Trial:
    """One training run and what came of it.

    Attributes:
        accuracy: on the test samples, from 0 to 1. nfe: mean per test sample.
        training_seconds: of the whole run. prediction_seconds: of the test samples as one batch.
        history: per epoch. solution: of the test samples, for the picture.
    """

    accuracy: float
    nfe: float
    training_seconds: float
    prediction_seconds: float
    history: History
    solution: nde.Solution


# What a row of the table has.
COLUMNS = {
    "accuracy": Column("accuracy (%)", 100.0),
    "nfe": Column("NFE"),
    "training_seconds": Column("training (s)"),
    "prediction_seconds": Column("predict (ms)", 1e3),
}


@dataclass
class Result:
    """All trials, by variant."""

    config: Config
    trials: dict[str, list[Trial]]

    def rows(self) -> list[dict]:
        """One row per variant: the mean and the spread (sample standard deviation) over seeds of every column."""
        return [
            mean_and_spread(name, [vars(trial) for trial in trials], COLUMNS) for name, trials in self.trials.items()
        ]

    def summary(self) -> dict:
        """What is saved and what `--json` prints."""
        rows = self.rows()
        return {
            "config": {**asdict(self.config), "seeds": list(range(self.config.seeds)), "penalties": _weights()},
            "rows": rows,
            "finding": finding(rows),
            "versions": versions(),
            "history": {name: [asdict(t.history) for t in trials] for name, trials in self.trials.items()},
        }


def _weights() -> dict[str, list[float] | None]:
    """Every variant's weight before the first and after the last step; None without a penalty."""
    found: dict[str, list[float] | None] = {}
    for name, make_penalty in VARIANTS.items():
        found[name] = None
        if make_penalty is not None:
            penalty = make_penalty(1)  # a schedule of one step: its start, and then its end
            first = penalty.weight
            penalty.step()
            found[name] = [first, penalty.weight]
    return found


def make_model(config: Config) -> nn.Sequential:
    """f(t, z) = W₂[tanh(W₁[z; t] + b₁); t] + b₂ on [0, 1] by tsit5, then a linear classifier."""
    f = nde.TimeChain(
        nde.AppendTime(nn.Linear(65, config.hidden)), nn.Tanh(), nde.AppendTime(nn.Linear(config.hidden + 1, 64))
    )
    layer = nde.NeuralODE(f, t=(0.0, 1.0), solver="tsit5", rtol=config.tolerance, atol=config.tolerance)
    return nn.Sequential(layer, nn.Linear(64, 10)).to(device=config.device, dtype=torch.float64)


def run(config: Config) -> Result:
    """Trains every variant with every seed. Shows its progress on standard error."""
    data = digits(torch.float64, config.device)
    steps = config.epochs * -(-len(data.train_x) // config.batch)
    trials: dict[str, list[Trial]] = {name: [] for name in VARIANTS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    try:
        with progress(len(VARIANTS) * config.seeds * config.epochs) as bar:
            for seed in range(config.seeds):
                for name, make_penalty in VARIANTS.items():
                    bar.say(f"{name}, seed {seed}")
                    trials[name].append(_trial(config, data, make_penalty, steps, seed, bar.advance))
    finally:
        torch.set_num_threads(threads)
    return Result(config, trials)


def _trial(config: Config, data: Split, make_penalty, steps: int, seed: int, after_epoch) -> Trial:
    torch.manual_seed(seed)
    model = make_model(config)
    penalty = None if make_penalty is None else make_penalty(steps)
    history = train(model, model[0], penalty, data, config.epochs, config.batch, config.rate, after_epoch)
    model.eval()
    seconds = prediction_seconds(model, data.test_x)
    return Trial(
        accuracy=history.accuracy[-1],
        nfe=history.nfe[-1],
        training_seconds=history.training_seconds[-1],
        prediction_seconds=seconds,
        history=history,
        solution=model[0].solution,
    )


def best(rows: list[dict]) -> dict | None:
    """The penalty with the fewest evaluations among those that lose at most one point of accuracy, if it saves any."""
    vanilla = rows[0]
    able = [r for r in rows[1:] if r["accuracy"] >= vanilla["accuracy"] - 0.01 and r["nfe"] < vanilla["nfe"]]
    return min(able, key=lambda r: r["nfe"], default=None)


def finding(rows: list[dict]) -> str:
    """What the table shows, in a sentence or two."""
    vanilla, winner = rows[0], best(rows)
    if winner is None:
        return (
            f"No penalty brought the test NFE below the vanilla model's {vanilla['nfe']:.1f} at no more than one point "
            "of accuracy lost."
        )
    ratio, change = winner["nfe"] / vanilla["nfe"], 100 * (winner["accuracy"] - vanilla["accuracy"])
    direction = "gained" if change >= 0 else "lost"
    sentence = (
        f"{winner['model']} brought the test NFE from {vanilla['nfe']:.1f} to {winner['nfe']:.1f}, {ratio:.2f} of the "
        f"vanilla model's, with {abs(change):.1f} points of accuracy {direction}."
    )
    others = [
        r["model"]
        for r in rows[1:]
        if r is not winner and r["nfe"] <= 0.75 * vanilla["nfe"] and r["accuracy"] >= vanilla["accuracy"] - 0.01
    ]
    if others:
        sentence += f" At most 0.75 of it at no more than one point lost, too: {', '.join(others)}."
    return sentence


def show(result: Result) -> None:
    """Prints the table and the finding on standard output."""
    from rich.table import Table

    rows = result.rows()
    table = Table(title=f"Neural ODE on scanned digits: mean ± spread over {result.config.seeds} seeds")
    tested = len(result.trials["vanilla"][0].solution.status)
    table.caption = f"accuracy, NFE and prediction on the {tested} test digits"
    table.add_column("model", no_wrap=True)
    for column in COLUMNS.values():
        table.add_column(column.heading, justify="right")
    for row in rows:
        table.add_row(row["model"], *(c.cell(row[name], row[f"{name}_spread"]) for name, c in COLUMNS.items()))
    console = console_for(table)
    console.print(table)
    console.print(finding(rows), highlight=False, soft_wrap=True)


def save(result: Result, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes result.json and result.png into a directory, and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    numbers, picture = out / "result.json", out / "result.png"
    numbers.write_text(json.dumps(result.summary(), indent=2) + "\n")
    draw(result, picture)
    return [numbers, picture]


def draw(result: Result, path: pathlib.Path) -> None:
    """NFE and accuracy over training, and one test digit's steps with and without the best penalty."""
    from matplotlib.figure import Figure

    rows = result.rows()
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
    top, bottom = left.subplots(2, 1, sharex=True)
    epochs = range(1, result.config.epochs + 1)
    for axis, what, factor in ((top, "nfe", 1.0), (bottom, "accuracy", 100.0)):
        for i, (name, trials) in enumerate(result.trials.items()):
            runs = torch.tensor([getattr(t.history, what) for t in trials], dtype=torch.float64) * factor
            axis.plot(epochs, runs.mean(0), color=f"C{i}", label=name, marker=".")
            axis.fill_between(epochs, runs.amin(0), runs.amax(0), color=f"C{i}", alpha=0.15, linewidth=0)
        axis.grid(alpha=0.3)
    top.set_ylabel("mean NFE on the test digits")
    bottom.legend(fontsize="small", loc="lower right")
    bottom.set_ylabel("test accuracy (%)")
    bottom.set_xlabel("epoch")
    left.suptitle("over training (band: range over seeds)")

    winner = best(rows) or min(rows[1:], key=lambda r: r["nfe"])
    shown = {"vanilla": result.trials["vanilla"][0], winner["model"]: result.trials[winner["model"]][0]}
    axes = right.subplots(3, 2, sharex=True, sharey="row")
    for column, (name, trial) in enumerate(shown.items()):
        trial.solution.plot(sample=0, axes=axes[:, column])
        axes[0, column].set_title(f"{name}\n{axes[0, column].get_title()}", fontsize="small")
    for axis in axes[:, 1]:
        axis.set_ylabel("")
    right.suptitle("the steps of one test digit")
    figure.savefig(path, dpi=130)
