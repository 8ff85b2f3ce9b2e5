"""Deep equilibria: against torchdeq; the backward pass of a continuous one against its Neural ODE's; and compiled."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import in_turns, median_ratio, parser, revision, spread, verdict, write
from torch import Tensor, nn
from torchdeq import get_deq

import neuralde as nde
from neuralde.experiments.equilibria import Injected
from neuralde.experiments.mnist_deq_fc import Config

BATCH, WIDTH, TOLERANCE, THREADS = 512, 128, 1e-3, 2
# What neuralde's solver is called in torchdeq, and how many times as fast it is to be, forward and forward+backward.
SOLVERS = {"broyden": ("broyden", 2.0), "anderson": ("anderson", 2.0), "fixed_point": ("fixed_point_iter", 1.0)}
PAPER, COMPILED = 4.7, 1.5
RECIPE = Config()


class Map(nn.Module):
    """f(z, x) = tanh(W z + U x).

    Args:
        scale: what W's default initialisation is multiplied by.
    """

    def __init__(self, scale: float):
        super().__init__()
        torch.manual_seed(0)
        self.state, self.input = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.state.weight.mul_(scale)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x)."""
        return torch.tanh(self.state(z) + self.input(x))


class CountedMap(Map):
    """The same with a count of its calls, which no compiler would let pass."""

    calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """f(z, x)."""
        self.calls += 1
        return super().forward(z, x)


@dataclass(frozen=True)
class Layer:
    """x -> z*, in one of the packages.

    Attributes:
        name: of the package and the solver. f: its map. call: x -> z*.
    """

    name: str
    f: Map
    call: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """z*, without a tape."""
        with torch.no_grad():
            return self.call(x)

    def both(self, x: Tensor) -> list[Tensor]:
        """The gradients of Σ z*² of W, U and x."""
        return torch.autograd.grad(self.call(x).square().sum(), [*self.f.parameters(), x])


def ours(solver: str, f: Map, compile: bool = False, tolerance: float = TOLERANCE) -> Layer:
    """neuralde's, which stops sample by sample, with the same solver in the backward pass."""
    termination = nde.Termination("relative", rtol=tolerance, norm="l2")
    adjoint = nde.adjoints.Implicit(solver, rtol=tolerance)
    layer = nde.DeepEquilibrium(f, solver=solver, termination=termination, adjoint=adjoint, compile=compile)
    return Layer("neuralde, compiled" if compile else "neuralde", f, layer)


def theirs(solver: str, f: Map) -> Layer:
    """torchdeq's, with the same solver in the backward pass, as it does it."""
    options = {"f_max_iter": 100, "b_max_iter": 100, "f_tol": TOLERANCE, "b_tol": TOLERANCE, "ift": True}
    options |= {"f_stop_mode": "rel", "b_stop_mode": "rel"}
    name = SOLVERS[solver][0]
    deq = get_deq(f_solver=name, b_solver=name, **options)

    def call(x: Tensor) -> Tensor:
        return deq(lambda z: f(z, x), torch.zeros_like(x))[0][-1]

    return Layer("torchdeq", f, call)


def residual(layer: Layer, x: Tensor) -> float:
    """The largest ‖f(z) - z‖ / ‖f(z)‖ of a sample at what the layer gives."""
    z = layer.forward(x)
    with torch.no_grad():
        image = layer.f(z, x)
    return float(((image - z).norm(dim=1) / image.norm(dim=1)).max())


def exact(scale: float, x: Tensor) -> list[Tensor]:
    """The gradients, in float64."""
    f = Map(scale).double()
    tight = {"rtol": 1e-12, "atol": 1e-12, "adjoint": nde.adjoints.Implicit(rtol=1e-12)}
    x = x.detach().double().requires_grad_()
    return Layer("exact", f, nde.DeepEquilibrium(f, solver="anderson", **tight)).both(x)


def off(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative deviation of a gradient."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def against_torchdeq(scale: float, rounds: int) -> tuple[list[dict], list[str]]:
    """The rows of one map, and the verdicts."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    layers = {}
    for solver in SOLVERS:
        other = theirs(solver, Map(scale))
        # torchdeq ends with its worst sample, and with an evaluation more: its residuals are below the tolerance.
        level = min(TOLERANCE, residual(other, x))
        mine = (ours(solver, Map(scale), compile, level) for compile in (False, True))
        layers[solver] = (*mine, other)
    probe, state = Map(scale), torch.randn(BATCH, WIDTH)

    def raw():
        with torch.no_grad():
            probe(state, x)

    contenders = {("raw", "", "f"): raw}
    for solver, trio in layers.items():
        for layer in trio:
            contenders[solver, layer.name, "forward"] = lambda layer=layer: layer.forward(x)
            contenders[solver, layer.name, "forward + backward"] = lambda layer=layer: layer.both(x)
    seconds = in_turns(contenders, rounds)
    raw_seconds = statistics.median(seconds["raw", "", "f"])
    wanted, rows, verdicts = exact(scale, x), [], []
    for solver, trio in layers.items():
        for what in ("forward", "forward + backward"):
            times = [seconds[solver, layer.name, what] for layer in trio]
            for layer, taken in zip(trio, times, strict=True):
                rows.append(_row(scale, solver, what, layer, x, taken, raw_seconds, wanted))
            for layer, taken in zip(trio[:2], times, strict=False):
                claim = f"W × {scale:g}, {solver}, {what}: torchdeq's time / {layer.name}'s"
                verdicts.append(verdict(claim, median_ratio(times[2], taken), SOLVERS[solver][1], least=True))
        *found, other = (residual(layer, x) for layer in trio)
        claim = f"W × {scale:g}, {solver}: residual / torchdeq's"
        verdicts.append(verdict(claim, max(found) / other, 1.0))
    return rows, verdicts


def _row(scale: float, solver: str, what: str, layer: Layer, x: Tensor, taken, raw: float, wanted) -> dict:
    calls, middle = _calls(scale, solver, layer, x), statistics.median(taken)
    backward = what != "forward"
    return {
        "W ×": scale,
        "solver": solver,
        "what": what,
        "package": layer.name,
        "ms": 1e3 * middle,
        "spread": spread(taken),
        "calls of f": calls,
        "own share (ms)": None if backward else 1e3 * (middle - calls * raw),
        "residual": residual(layer, x),
        "gradient off by": off(layer.both(x), wanted) if backward else None,
    }


def _calls(scale: float, solver: str, layer: Layer, x: Tensor) -> int:
    """Of f in a forward pass."""
    if layer.name != "torchdeq":
        layer.forward(x)
        return layer.call.solution.stats.function_calls
    counted = theirs(solver, CountedMap(scale))
    counted.forward(x)
    return counted.f.calls


def compiled(rounds: int) -> tuple[list[dict], list[str]]:
    """The fully connected DEQ of the recipe mnist-deq-fc, and with an iteration in place of its solver, at its
    tolerance: one step of training.
    """
    torch.set_num_threads(1)  # as the recipe
    torch.manual_seed(0)
    layers, classes, x = {}, torch.randint(10, (RECIPE.batch,)), torch.randn(RECIPE.batch, 784)
    termination = nde.Termination("relative", rtol=RECIPE.tolerance, norm="l2")
    systems = {RECIPE.solver: "gmres"} | dict.fromkeys(SOLVERS, "anderson")
    for solver, system in systems.items():
        f, adjoint = Injected(RECIPE.width), nde.adjoints.Implicit(system, rtol=RECIPE.tolerance, max_iter=30)
        ends = nn.Sequential(nn.Linear(784, RECIPE.width), nn.ReLU()), nn.Linear(RECIPE.width, 10)
        for compile in (False, True):
            how = {"control": RECIPE.control, "termination": termination, "adjoint": adjoint, "compile": compile}
            how |= {"rtol": RECIPE.tolerance, "atol": RECIPE.tolerance}
            layers[solver, compile] = nn.Sequential(ends[0], nde.DeepEquilibrium(f, solver=solver, **how), ends[1])

    def step(model: nn.Module) -> list[Tensor]:
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), classes), list(model.parameters()))

    seconds = in_turns({key: lambda model=model: step(model) for key, model in layers.items()}, rounds)
    rows, verdicts = [], []
    for solver in systems:
        eager, fast = (step(layers[solver, compile]) for compile in (False, True))
        for compile in (False, True):
            taken, solution = seconds[solver, compile], layers[solver, compile][1].solution
            row = {"W ×": "fc DEQ", "solver": solver, "what": "forward + backward"}
            row |= {"package": "neuralde, compiled" if compile else "neuralde", "ms": 1e3 * statistics.median(taken)}
            row |= {"spread": spread(taken), "calls of f": solution.stats.function_calls, "own share (ms)": None}
            rows.append(row | {"residual": float(solution.residual.max()), "gradient off by": off(fast, eager)})
        ratio = median_ratio(seconds[solver, False], seconds[solver, True])
        verdicts.append(verdict(f"fc DEQ, {solver}: eager time / compiled", ratio, COMPILED, least=True))
    return rows, verdicts


def against_neural_ode(scale: float, rounds: int) -> tuple[list[dict], str]:
    """The backward passes alone: of z* = f(z*, x) by tsit5, and of dz/dt = f(z, x) - z on [0, 1] by "interpolating"."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    f = Map(scale)
    wanted = [*f.parameters(), x]
    adjoint = nde.adjoints.Implicit(rtol=TOLERANCE)
    termination = nde.Termination("relative", rtol=TOLERANCE, norm="l2")
    deq = nde.DeepEquilibrium(f, solver="tsit5", control="joint", termination=termination, adjoint=adjoint)
    ode = nde.ODE(lambda t, z, x: f(z, x) - z)
    path = nde.solve(ode, torch.zeros_like(x), (0.0, 1.0), args=x, control="joint", adjoint="interpolating")
    losses = {"continuous DEQ": deq(x).square().sum(), 'Neural ODE, "interpolating"': path.final.square().sum()}
    contenders = {
        name: lambda loss=loss: torch.autograd.grad(loss, wanted, retain_graph=True) for name, loss in losses.items()
    }
    seconds = in_turns(contenders, rounds)
    rows = [
        {"W ×": scale, "solver": "tsit5", "what": "backward", "package": name, "ms": 1e3 * statistics.median(taken)}
        | {
            "spread": spread(taken),
            "calls of f": None,
            "own share (ms)": None,
            "residual": None,
            "gradient off by": None,
        }
        for name, taken in seconds.items()
    ]
    mine, other = seconds.values()
    return rows, verdict(
        f"W × {scale:g}: Neural ODE's backward time / the DEQ's", median_ratio(other, mine), PAPER, True
    )


PARTS = ("torchdeq", "neural_ode", "compiled")


def measured(part: str, scale: float, rounds: int) -> tuple[list[dict], list[str]]:
    """The rows of a part, and its verdicts."""
    if part == "compiled":
        return compiled(rounds)
    torch.set_num_threads(THREADS)
    if part == "torchdeq":
        return against_torchdeq(scale, rounds)
    rows, claim = against_neural_ode(scale, rounds)
    return rows, [claim]


def joined(folder: Path) -> tuple[list[dict], list[str], int]:
    """The rows and the verdicts of the parts that were put into a folder, and the fewest rounds of one.

    Raises:
        ValueError: they are of different commits.
    """
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("equilibria-*.json"))]
    commits = {part["software"] for part in parts}
    if len(commits) != 1 or commits != {revision()}:
        raise ValueError(f"the parts in {folder} must be of the commit that is here, {revision()}, got {commits}")
    rows, verdicts = ([x for part in parts for x in part[name]] for name in ("rows", "verdicts"))
    return rows, verdicts, min(part["rounds"] for part in parts)


def main():
    """Measures, and writes the results."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9, help="measurements of each")
    options.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5], help="of W")
    options.add_argument("--part", choices=PARTS, help="measure this alone, and keep it for --join")
    options.add_argument("--join", action="store_true", help="write the table of the parts that there are")
    given = options.parse_args()
    rows, notes, rounds = joined(given.results) if given.join else ([], [], given.rounds)
    for part in () if given.join else PARTS if given.part is None else (given.part,):
        for scale in given.scales if part != "compiled" else given.scales[:1]:
            found = measured(part, scale, given.rounds)
            rows, notes = rows + found[0], notes + found[1]
            if given.part is not None:
                name = f"equilibria-{PARTS.index(part)}-{part}-{scale:g}.json"
                text = json.dumps({"software": revision(), "rounds": rounds, "rows": found[0], "verdicts": found[1]})
                given.results.mkdir(parents=True, exist_ok=True)
                (given.results / name).write_text(text)
    if given.part is not None:
        print("\n".join([*map(str, rows), *notes]))
        return
    told = [
        f"f(z, x) = tanh(W z + U x), {WIDTH} wide, torch's initialisation of a Linear with W multiplied as said, batch "
        f"{BATCH} of randn, float32. torchdeq ends by the samples' relative residuals, at most {TOLERANCE}, neuralde "
        "where they are at most the largest that torchdeq ends with; both solve the linear system of the backward pass "
        "(torchdeq: ift=True) with the same solver, to the same tolerances. "
        f"Medians of {rounds} rounds in turns; ratios are medians of the rounds' ratios. torchdeq runs as it is "
        "(eager is all that it offers); compiled is compile=True, which makes the solver's loop one program.",
        "own share: the time less that of so many calls of f alone; compiled, U x is computed once, so that it may be "
        "less than nothing. gradient off by: from float64's, at worst of W, U and x.",
    ]
    if any(row["W ×"] == "fc DEQ" for row in rows):
        told.append(
            f"fc DEQ: 784-{RECIPE.width}-10, f(z, x) = relu(W z) + relu(U x), batch {RECIPE.batch}, relative tolerance "
            f"{RECIPE.tolerance} over the batch, cross-entropy of random inputs, one thread. {RECIPE.solver} with "
            "GMRES is the recipe mnist-deq-fc; the iterations have their systems solved by anderson. The gradient "
            "there is off by so much between compiled and eager."
        )
    else:
        told.append("The fully connected DEQ, compiled against eager (--part compiled), was not measured in this run.")
    notes = [*told, *notes]
    write(given.results, "equilibria", rows, f"{THREADS}", notes, ("torchdeq",))


if __name__ == "__main__":
    main()
