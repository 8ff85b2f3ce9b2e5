"""The synthetic experiment of the paper on Jacobian regularization: a DEQ of one number."""

from __future__ import annotations

import itertools
import math
import pathlib
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import neuralde as nde
import regularizers as reg

from .recipe import Column, Finding, Result, option, progress

# Of one number, one difference says all that there is to say.
_ANDERSON = nde.solvers.Anderson(memory=1)
_SEEDS_THAT_TELL = 5
_LIMIT = 200  # steps of the solves that are counted: few would hide what they are to show


@dataclass(frozen=True)
class Config:
    """The paper's numbers, but for `max_steps` (6) and the initialization.

    That is torch's: the paper's N(0, 0.01) hardly moves at first. Without the penalty 6 steps don't always lead to the
    steady state, and then it is something else that is trained. At ten times the rate, to save epochs, one run in
    twenty does not learn.

    Source: Bai, Koltun & Kolter 2021, "Stabilizing equilibrium models by Jacobian regularization", section 5.1 and
    table 4. Its section 5.1 has -5x in the target, its appendix +5x; this is the former.
    """

    gammas: tuple[float, ...] = option((0.0, 2.0, 4.0), "weights of the penalty on the Jacobian, in rising order")
    seeds: int = option(10, "runs of each")
    epochs: int = option(50, "passes over the training data")
    batch: int = option(64, "samples per step")
    rate: float = option(1e-3, "of Adam, at the start of a cosine")
    hidden: int = option(50, "width of the map")
    probability: float = option(0.4, "with which a step has the penalty")
    max_steps: int = option(20, "to the steady state in training")
    device: str = option("cpu", "where to train")

    def __post_init__(self):
        for name in ("seeds", "epochs", "batch", "hidden", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be from 0 to 1, got {self.probability}")
        if min(self.gammas) < 0 or list(self.gammas) != sorted(set(self.gammas)):
            raise ValueError(f"gammas must be at least 0 and in rising order, got {self.gammas}")


class Map(nn.Module):
    """f(z, x) = W₂ relu(W₁ z + U x + b), z and x numbers.

    Args:
        hidden: the width.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.state = nn.Linear(1, hidden, bias=False)
        self.input = nn.Linear(1, hidden)
        self.out = nn.Linear(hidden, 1, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x), [batch, 1]."""
        return self.out((self.state(z) + self.input(x)).relu())


def target(x: Tensor) -> Tensor:
    """3/2·x³ + x² - 5x + 2·sin(x) - 3."""
    return 1.5 * x**3 + x**2 - 5 * x + 2 * x.sin() - 3


def samples(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y of 4,096 samples for training and of 1,000 for the test: x uniform on [-1, 1], noise of deviation 0.05."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(5096, 1, generator=generator) - 1
    y = target(x) + 0.05 * torch.randn(5096, 1, generator=generator)
    return tuple(
        part.to(device) for pair in zip(x.split((4096, 1000)), y.split((4096, 1000)), strict=True) for part in pair
    )


def run(config: Config) -> Result:
    """Trains a DEQ at every γ with every seed. Shows its progress on standard error."""
    x, y, test_x, test_y = samples(config.device)
    trials: dict[str, list[dict]] = {f"γ = {gamma:g}": [] for gamma in config.gammas}
    maps = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    try:
        with progress(len(config.gammas) * config.seeds * config.epochs) as bar:
            for seed in range(config.seeds):
                for gamma, (name, runs) in zip(config.gammas, trials.items(), strict=True):
                    bar.say(f"{name}, seed {seed}")
                    f = trained(config, gamma, seed, x, y, bar.advance)
                    runs.append(measured(f, test_x, test_y))
                    maps.setdefault(name, f)
    finally:
        torch.set_num_threads(threads)
    columns = {
        "loss": Column("squared error (1e-3)", 1e3, 2),
        "slope": Column("mean size of ∂f/∂z", 1.0, 3),
        "fixed_point": Column("NFE, fixed_point", 1.0, 2),
        "fixed_point_converged": Column("at rest (%)", 100.0, 1),
        "anderson": Column("NFE, anderson", 1.0, 2),
        "anderson_converged": Column("at rest (%)", 100.0, 1),
    }
    title = f"A DEQ of one number under Jacobian regularization: {config.epochs} epochs, {config.seeds} seeds"
    result = Result(title, columns, trials, picture=maps)
    result.findings += findings(result)
    return result


def trained(config: Config, gamma: float, seed: int, x: Tensor, y: Tensor, after_epoch) -> Map:
    """A map whose steady state is y, nearly."""
    torch.manual_seed(seed)
    layer = nde.DeepEquilibrium(
        Map(config.hidden),
        solver=_ANDERSON,
        termination=nde.Termination("relative", rtol=1e-3),
        max_steps=config.max_steps,
        adjoint=nde.adjoints.Implicit(_ANDERSON, rtol=1e-4, max_iter=config.max_steps),
        on_failure="ignore",  # stops after so many steps, wherever they have led
    ).to(x.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=config.rate)
    steps = config.epochs * -(-len(x) // config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    penalty = reg.EquilibriumJacobian(gamma, probability=config.probability) if gamma else None
    for _ in range(config.epochs):
        for index in torch.randperm(len(x), device=x.device).split(config.batch):
            loss = nn.functional.mse_loss(layer(x[index]), y[index])
            if penalty is not None:
                loss = loss + penalty(layer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        after_epoch()
    return layer.f


def measured(f: Map, x: Tensor, y: Tensor) -> dict[str, float]:
    """What it costs to get to a relative residual of 1e-3 from 0, and the map's slope there.

    A sample that does not get there costs all the steps that it may make: one that is lost at once is not cheap.
    """
    figures = {}
    for name, solver in (("fixed_point", "fixed_point"), ("anderson", _ANDERSON)):
        solution = steady(f, x, solver)
        nfe = torch.where(solution.converged, solution.stats.nfe, 1 + _LIMIT)
        figures[name] = nfe.double().mean().item()
        figures[f"{name}_converged"] = solution.converged.double().mean().item()
    return figures | {
        "loss": nn.functional.mse_loss(solution.final, y).item(),
        "slope": slope(f, solution.final, x).abs().mean().item(),
    }


@torch.no_grad()
def steady(f: Map, x: Tensor, solver: str | nde.solvers.Solver) -> nde.Solution:
    """z* from z = 0."""
    termination = nde.Termination("relative", rtol=1e-3)
    options = {"termination": termination, "max_steps": _LIMIT, "on_failure": "ignore", "dense": True}
    return nde.solve(nde.SteadyState(f), torch.zeros_like(x), args=x, solver=solver, **options)


def slope(f: Map, z: Tensor, x: Tensor) -> Tensor:
    """∂f/∂z of every sample."""
    z = z.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(f(z, x).sum(), z)[0]


def findings(result: Result) -> list[Finding]:
    """What the paper found: the larger γ, the flatter the surface and the fewer the evaluations; the fit stays.

    Runs of one seed are compared with each other. The evaluations are those of the fixed-point iteration, whose way the
    paper's figure 5 shows, and of Anderson's, with which it trains. The latter is the secant method here, in one
    dimension, which needs some four evaluations however flat the map is: from one large γ to the next there is little
    to save.
    """
    figures = {
        "slope": "mean size of ∂f/∂z",
        "fixed_point": "NFE of the fixed-point iteration",
        "anderson": "NFE of Anderson's",
    }
    pairs = list(itertools.pairwise(result.trials))
    found = [falls(result, column, what, *pair) for column, what in figures.items() for pair in pairs]
    losses = ", ".join(f"{row['loss']:.2e}" for row in result.rows())
    found.append(Finding(f"squared errors on the test samples: {losses} (the noise has 2.50e-03)"))
    return found


def falls(result: Result, column: str, what: str, before: str, after: str) -> Finding:
    """Whether a figure is smaller in another row, in more seeds than chance would explain.

    By the signs of the differences of runs of one seed (sign test, one-sided, 5 %): one run without a penalty may cost
    a hundred times another, and decides every mean. Less than five seeds can't tell.
    """
    pairs = zip(result.trials[before], result.trials[after], strict=True)
    change = [b[column] - a[column] for a, b in pairs]
    runs, fewer = len(change), sum(x < 0 for x in change)
    chance = sum(math.comb(runs, k) for k in range(fewer, runs + 1)) / 2**runs
    text = f"{what}, {before} to {after}: smaller in {fewer} of {runs} seeds, median {statistics.median(change):+.3g}"
    return Finding(f"{text} (by chance: {chance:.2g})", chance < 0.05 if runs >= _SEEDS_THAT_TELL else None)


def draw(result: Result, path: pathlib.Path) -> None:
    """The surface f(z, x) with the steady states on it; and the way to the one at x = -1, as a cobweb."""
    from matplotlib.figure import Figure

    maps = result.picture
    figure = Figure(figsize=(4 * len(maps), 7), layout="constrained")
    line = torch.linspace(-1, 1, 60)
    for i, (name, f) in enumerate(maps.items()):
        device = f.out.weight.device
        ends = steady(f, line[:, None].to(device), _ANDERSON).final.cpu()[:, 0]
        low, high = float(ends.min()) - 1, float(ends.max()) + 1
        states = torch.linspace(low, high, 60)
        z, x = torch.meshgrid(states, line, indexing="ij")
        with torch.no_grad():
            values = f(z.reshape(-1, 1).to(device), x.reshape(-1, 1).to(device)).cpu().reshape(z.shape)
        axes = figure.add_subplot(2, len(maps), i + 1, projection="3d")
        axes.plot_surface(x, z, values, cmap="viridis", alpha=0.75, linewidth=0)
        axes.plot(line, ends, ends, color="red", linewidth=2)
        axes.set(xlabel="x", ylabel="z", zlabel="f(z, x)", title=name)
        _cobweb(figure.add_subplot(2, len(maps), len(maps) + i + 1), f, states)
    figure.savefig(path, dpi=110)


def _cobweb(axes, f: Map, states: Tensor) -> None:
    x = torch.full((1, 1), -1.0, device=f.out.weight.device)
    solution = steady(f, x, "fixed_point")
    way = [0.0, *solution.steps.z.flatten().tolist(), float(solution.final)]
    with torch.no_grad():
        values = f(states[:, None].to(x.device), x.expand(len(states), 1)).cpu()[:, 0]
    axes.plot(states, values, label="f(z, -1)")
    axes.plot(states, states, color="grey", linewidth=0.8, label="z")
    corners = [(a, b) for a, c in itertools.pairwise(way) for b in (a, c)]
    axes.plot(*zip(*corners, strict=True), color="C3", linewidth=0.9, marker=".", label=f"{int(solution.depth)} steps")
    axes.set_xlim(float(states[0]), float(states[-1]))  # without the penalty the way may leave the picture
    axes.set_ylim(float(states[0]), float(states[-1]))
    axes.set_xlabel("z")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
