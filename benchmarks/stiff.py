"""Work and error on Robertson's reactions to t = 1e11 and Van der Pol's oscillator, beside SciPy's Radau and BDF."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import scipy.integrate
import torch
from common import Counted, parser, verdict, write
from matplotlib.figure import Figure

import neuralde as nde

TOLERANCES = 1e-4, 1e-6
SOLVERS = "rosenbrock23", "rodas5p", "auto", "implicit_euler"
METHODS = "Radau", "BDF"
LIMIT = 10.0  # tolerances that a component may be off, as in tests/test_stiff.py
STEPS = 10**5
FIRST_ORDER = 1e-4  # the smallest tolerance for implicit_euler: its steps grow with 1/√tolerance


def robertson(t, z):
    """Three substances; rates from 0.04 to 3e7."""
    a, b, c = z.unbind(dim=-1)
    first, second, third = 0.04 * a, 1e4 * b * c, 3e7 * b**2
    return torch.stack([second - first, first - second - third, third], dim=-1)


def van_der_pol(t, z):
    """x'' = μ(1 - x²)x' - x, μ = 1000."""
    x, v = z.unbind(dim=-1)
    return torch.stack([v, 1000.0 * (1 - x**2) * v - x], dim=-1)


class Problem:
    """An equation whose solution at its end is published.

    Args:
        name: of the table.
        f, z0, end: dz/dt = f(t, z) on [0, end] from z0.
        reference: z(end). Source: Mazzia & Magherini, Test Set for Initial Value Problem Solvers.
        floor: atol for the tolerance 1, one per component or for all.
    """

    def __init__(self, name: str, f, z0, end: float, reference, floor):
        self.name, self.f, self.end = name, f, end
        self.z0, self.reference, self.floor = (torch.tensor(x, dtype=torch.float64) for x in (z0, reference, floor))

    def error(self, z, tolerance: float) -> float:
        """The largest error over atol + rtol·|z| at the end."""
        scale = tolerance * (self.floor + self.reference.abs())
        return float(((torch.as_tensor(z) - self.reference).abs() / scale).max())


PROBLEMS = (
    Problem(
        "Robertson to 1e11",
        robertson,
        [1.0, 0.0, 0.0],
        1e11,
        [0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050],
        [1e-14] * 3,
    ),
    # The test set has v a thousand times larger, and time a thousand times faster.
    Problem(
        "Van der Pol, μ = 1000",
        van_der_pol,
        [2.0, 0.0],
        2000.0,
        [0.1706167732170483e1, -0.8928097010247975e-3],
        [1.0, 1e-3],
    ),
)


def ours(problem: Problem, f, tolerance: float, solver: str) -> tuple:
    """(the end, accepted, rejected, Jacobians) by a solver of the registry."""
    options = {"solver": solver, "rtol": tolerance, "atol": problem.floor * tolerance, "max_steps": STEPS}
    solution = nde.solve(nde.ODE(f), problem.z0[None], (0.0, problem.end), **options)
    stats = solution.stats
    return solution.final[0], *(int(x) for x in (stats.accepted, stats.rejected, stats.jacobians))


def scipys(problem: Problem, f, tolerance: float, method: str) -> tuple:
    """The same by SciPy, which does not count rejected attempts; the Jacobian by one backward pass per component."""
    z0 = problem.z0.numpy()

    def jacobian(t, z):
        return torch.autograd.functional.jacobian(lambda x: problem.f(t, x), torch.from_numpy(z)).numpy()

    solution = scipy.integrate.solve_ivp(
        lambda t, z: f(t, torch.from_numpy(z)).numpy(),
        (0.0, problem.end),
        z0,
        method,
        rtol=tolerance,
        atol=problem.floor.numpy() * tolerance,
        jac=jacobian,
    )
    return solution.y[:, -1], len(solution.t) - 1, None, solution.njev


def contenders() -> dict:
    """Name -> a function of problem, f and tolerance that solves."""
    return {f"neuralde {name}": functools.partial(ours, solver=name) for name in SOLVERS} | {
        f"SciPy {name}": functools.partial(scipys, method=name) for name in METHODS
    }


def measure() -> list[dict]:
    """One row for every problem, tolerance and contender."""
    rows = []
    for problem in PROBLEMS:
        for tolerance in TOLERANCES:
            for name, solve in contenders().items():
                if "implicit_euler" in name and tolerance < FIRST_ORDER:
                    continue
                f = Counted(problem.f)
                start = time.perf_counter()
                z, accepted, rejected, jacobians = solve(problem, f, tolerance)
                row = {"problem": problem.name, "tolerance": f"{tolerance:.0e}", "contender": name}
                row |= {"steps": accepted, "rejected": rejected, "NFE": f.calls, "Jacobians": jacobians}
                row["error / tolerance"] = problem.error(z, tolerance)
                row["seconds"] = time.perf_counter() - start
                rows.append(row)
    return rows


def judge(rows: list[dict]) -> list[str]:
    """Whether every solver of ours of order 2 or more ends within 10 tolerances of the published solutions."""
    verdicts = []
    for solver in SOLVERS:
        own = [row for row in rows if row["contender"] == f"neuralde {solver}"]
        if nde.solvers.get(solver).order >= 2:
            worst = max(own, key=lambda row: row["error / tolerance"])
            claim = f"neuralde {solver}, error / tolerance, largest on {worst['problem']} at {worst['tolerance']}"
            verdicts.append(verdict(claim, worst["error / tolerance"], LIMIT))
    return verdicts


def draw(path: Path):
    """Robertson's solution by rodas5p with a line for every step, and the share of the steps by that of the time."""
    problem = PROBLEMS[0]
    options = {"solver": "rodas5p", "rtol": 1e-6, "atol": 1e-6 * problem.floor}
    steps = nde.solve(nde.ODE(problem.f), problem.z0[None], (0.0, problem.end), **options).steps
    t, z = steps.t[1:, 0], steps.z[1:, 0]  # without t = 0, which a logarithmic axis does not have
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.vlines(t, 0, 1, color="grey", linewidth=0.3, alpha=0.6)
    left.semilogx(t, z * torch.tensor([1.0, 1e4, 1.0]), label=["A", "B · 10⁴", "C"])
    left.set(xlabel="t", ylabel="amount", title=f"Robertson by rodas5p at 1e-6: {len(steps)} steps")
    left.legend(loc="center left")
    share = torch.arange(1, len(steps)) / len(steps)
    right.semilogx(t / problem.end, share)
    early = float((steps.t < 0.05 * problem.end).double().mean())
    right.plot([0.05], [early], "o", color="black", markersize=4)
    right.annotate(f"{early:.0%} of the steps in\n5 % of the time span", (0.05, early), (1e-12, 0.8))
    right.set(xlabel="share of the time span", ylabel="share of the steps")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    """Measures, prints a table and writes it to results/."""
    given = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    for problem in PROBLEMS:  # nothing is timed that happens once
        for solve in contenders().values():
            short = Problem(problem.name, problem.f, problem.z0.tolist(), 1e-3, [0.0], problem.floor.tolist())
            solve(short, short.f, 1e-3)
    rows = measure()
    notes = [
        "error: the largest one over the components at the end, against the published solution, over atol + rtol·|z|",
        "rtol = tolerance; atol = tolerance · 1e-14 on Robertson (the second substance ends at 8e-14) and tolerance · "
        "(1, 1e-3) on Van der Pol (v is as small while x creeps), the same for all",
        "one initial state, float64; NFE are calls of f without those inside of a Jacobian of SciPy's, and with the "
        "one that comes with every Jacobian of ours; SciPy does not count rejected attempts",
        "implicit_euler is of order 1 and is given the larger tolerance alone",
        "the seconds are those of one run, and tell the order of magnitude; the rest is the same in every run",
        *judge(rows),
    ]
    write(given.results, "stiff", rows, "1", notes, ("scipy",))
    draw(given.results / "stiff.png")


if __name__ == "__main__":
    main()
