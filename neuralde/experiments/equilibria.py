"""What the experiments on deep equilibria share: the network, its six variants, its training, and a picture of it.

The network is that of the papers' fully connected experiments: z* = relu(W z*) + relu(U x) between a layer that makes x
of the input and one that reads z*.
"""

from __future__ import annotations

import pathlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import neuralde as nde
import regularizers as reg

from .recipe import Column, Finding, Result, progress
from .training import prediction_seconds


@dataclass(frozen=True)
class Variant:
    """A row of the papers' table.

    Attributes:
        start: where the solve starts: "zeros", "network" (of x; Skip) or "first_step" (Skip Reg.).
        jacobian: whether the Jacobian at the steady state is penalized.
    """

    start: str
    jacobian: bool


VARIANTS = {
    "DEQ": Variant("zeros", False),
    "Skip DEQ": Variant("network", False),
    "Skip Reg. DEQ": Variant("first_step", False),
    "DEQ, Jacobian": Variant("zeros", True),
    "Skip DEQ, Jacobian": Variant("network", True),
    "Skip Reg. DEQ, Jacobian": Variant("first_step", True),
}


class Injected(nn.Module):
    """f(z, x) = relu(W z) + relu(U x), without biases.

    Args:
        width: of z and of x.
    """

    def __init__(self, width: int):
        super().__init__()
        self.state = nn.Linear(width, width, bias=False)
        self.input = nn.Linear(width, width, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x), [batch, width]."""
        return self.state(z).relu() + self.input(x).relu()


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        train_x, train_y, test_x, test_y: the samples, [samples, ...]. outputs: of the network.
        loss: (what the network says, y) -> a scalar. score: the same for the test, a number.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]


def check(config) -> None:
    """Refuses numbers that no training can have.

    Args:
        config: with seeds, epochs, batch, rate, tolerance, max_steps, skip and jacobian.

    Raises:
        ValueError: one of them is out of range.
    """
    for name in ("seeds", "epochs", "batch", "max_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in ("rate", "tolerance"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
    for name in ("skip", "jacobian"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(config, name)}")


def make_model(config, variant: Variant, inputs: int, outputs: int) -> nn.Sequential:
    """Linear, relu, the layer, and a linear layer.

    The tolerance is that of the steady state, of the steps to it and of the linear systems. In the papers' code it was
    that of the first alone: the steps were made at 1e-3 and 1e-6. A start by a network has one layer: relu(V x + b).
    """
    starts = {"network": lambda: nn.Sequential(nn.Linear(config.width, config.width), nn.ReLU())}
    layer = nde.DeepEquilibrium(
        Injected(config.width),
        solver=config.solver,
        initial=starts[variant.start]() if variant.start in starts else variant.start,
        control=config.control,
        rtol=config.tolerance,
        atol=config.tolerance,
        termination=nde.Termination("relative", rtol=config.tolerance, norm="l2"),
        max_steps=config.max_steps,
        adjoint=nde.adjoints.Implicit(rtol=config.tolerance, max_iter=30),
        on_failure="ignore",  # the table says how many did not get there
    )
    return nn.Sequential(nn.Linear(inputs, config.width), nn.ReLU(), layer, nn.Linear(config.width, outputs))


def make_penalty(config, variant: Variant) -> reg.Regularizer | None:
    """What a variant adds to its loss."""
    parts = [] if variant.start == "zeros" else [reg.Skip(config.skip)]
    if variant.jacobian:
        parts.append(reg.EquilibriumJacobian(weight=config.jacobian))
    return sum(parts) if parts else None


def compare(config, task: Task, columns: dict[str, Column], name: str, title: str) -> Result:
    """Trains every variant with every seed. Shows its progress on standard error.

    Args:
        config: see `check`, with width, solver, control and device.
        task: what is learned.
        columns: the score's, by its name. name: of the score. title: of the table.

    Returns:
        A `Result` without findings. `details["history"]` has the score and the NFE after every epoch.
    """
    trials: dict[str, list[dict]] = {row: [] for row in VARIANTS}
    history: dict[str, list[dict]] = {row: [] for row in VARIANTS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    try:
        with progress(len(VARIANTS) * config.seeds * config.epochs) as bar:
            for seed in range(config.seeds):
                for row, variant in VARIANTS.items():
                    bar.say(f"{row}, seed {seed}")
                    figures, epochs = _trial(config, task, variant, seed, name, bar.advance)
                    trials[row].append(figures)
                    history[row].append(epochs)
    finally:
        torch.set_num_threads(threads)
    columns = columns | {
        "nfe": Column("NFE", 1.0, 1),
        "depth": Column("depth", 1.0, 1),
        "converged": Column("at rest (%)", 100.0, 1),
        "unsolved": Column("backward unsolved (% of steps)", 100.0, 1),
        "training_seconds": Column("training (s)", 1.0, 1),
        "prediction_seconds": Column(f"predict {config.batch} (ms)", 1e3, 2),
        "parameters": Column("parameters", 1.0, 0),
    }
    return Result(title, columns, trials, [], {"history": history}, picture=(name, columns[name], history))


def _trial(config, task: Task, variant: Variant, seed: int, name: str, after_epoch) -> tuple[dict, dict]:
    torch.manual_seed(seed)
    model = make_model(config, variant, task.train_x.shape[1], task.outputs).to(task.train_x)
    layer, penalty = model[2], make_penalty(config, variant)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.rate)
    history: dict[str, list[float]] = {name: [], "nfe": []}
    spent, unsolved, made = 0.0, 0, 0
    for _ in range(config.epochs):
        began = time.perf_counter()
        for index in torch.randperm(len(task.train_x), device=task.train_x.device).split(config.batch):
            loss = task.loss(model(task.train_x[index]), task.train_y[index])
            if penalty is not None:
                loss = loss + penalty(layer)
            optimizer.zero_grad()
            unsolved, made = unsolved + _inaccurate(loss.backward), made + 1
            optimizer.step()
        loss.item()  # waits for the device
        spent += time.perf_counter() - began
        figures = _measured(config, model, task, name)
        for what, values in history.items():
            values.append(figures[what])
        after_epoch()
    figures["unsolved"] = unsolved / made
    figures["training_seconds"] = spent
    figures["prediction_seconds"] = prediction_seconds(model, task.test_x[: config.batch])
    if not seed:
        figures["parameters"] = sum(x.numel() for x in model.parameters())
    return figures, history


def _inaccurate(backward: Callable[[], None]) -> bool:
    """Whether the linear system of a backward pass was not solved: counted, not printed at every step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", nde.SolveWarning)
        backward()
    for other in caught:
        if not issubclass(other.category, nde.SolveWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return any(issubclass(each.category, nde.SolveWarning) for each in caught)


@torch.no_grad()
def _measured(config, model: nn.Sequential, task: Task, name: str) -> dict[str, float]:
    """On the test samples, in batches as in training: under joint control a batch has one NFE."""
    found, figures, layer = [], {"nfe": 0.0, "depth": 0.0, "converged": 0.0}, model[2]
    model.eval()
    for x in task.test_x.split(config.batch):
        found.append(model(x))
        share = len(x) / len(task.test_x)
        figures["nfe"] += share * layer.solution.stats.nfe.double().mean().item()
        figures["depth"] += share * layer.solution.depth.double().mean().item()
        figures["converged"] += share * layer.solution.converged.double().mean().item()
    model.train()
    return figures | {name: task.score(torch.cat(found), task.test_y)}


def saving(result: Result, row: str, column: str, least: float, what: str, of: str = "DEQ") -> Finding:
    """Whether a row has at most 1/least of another one's figure, and is an equilibrium still.

    A solve that gave up is no measure of what one costs: where some runs of the other row came to rest, they count.
    """
    mine = result.row(row)[column]
    runs = result.trials[of]
    fine = [run for run in runs if run["converged"] > 0.999] or runs
    theirs = sum(run[column] for run in fine) / len(fine)
    ratio = theirs / mine
    which = of if len(fine) == len(runs) else f"{len(fine)} of {len(runs)} runs of {of}, those at rest"
    text = f"{row}: {what} {mine:.4g}, 1/{ratio:.2f} of {theirs:.4g} ({which}); at most 1/{least:g} was to be shown"
    if hollow := result.row(row)["depth"] < 1.0:
        text += "; but the layer has collapsed"
    return Finding(text, ratio >= least and not hollow)


def collapsed(result: Result) -> list[Finding]:
    """A remark on the rows whose layers hardly make a step: what has come to be cheap is no equilibrium any more."""
    rows = [row["model"] for row in result.rows() if row["depth"] < 1.0]
    if not rows:
        return []
    text = f"collapsed: {', '.join(rows)}. Less than one step on average: the start is at rest to the tolerance"
    return [Finding(f"{text}, and a network without the solve would give as much; a smaller weight --skip may help")]


def draw(result: Result, path: pathlib.Path) -> None:
    """The score and the NFE over the epochs."""
    from matplotlib.figure import Figure

    name, column, history = result.picture
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, (row, runs) in enumerate(history.items()):
        style = {"color": f"C{i % 3}", "linestyle": "--" if VARIANTS[row].jacobian else "-"}
        for axis, what, factor in ((axes[0], name, column.factor), (axes[1], "nfe", 1.0)):
            values = torch.tensor([run[what] for run in runs], dtype=torch.float64) * factor
            epochs = range(1, values.shape[1] + 1)
            axis.plot(epochs, values.mean(0), label=row, marker="." if len(epochs) < 20 else "", **style)
            axis.fill_between(epochs, values.amin(0), values.amax(0), color=style["color"], alpha=0.1, linewidth=0)
    axes[0].set_ylabel(f"test {column.heading}")
    if name == "loss":
        axes[0].set_yscale("log")
    axes[1].set_ylabel("NFE on the test samples")
    axes[1].set_yscale("log")
    axes[1].legend(fontsize="small")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{result.title} (band: range over the runs)")
    figure.savefig(path, dpi=120)
