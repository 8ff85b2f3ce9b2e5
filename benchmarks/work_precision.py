"""Error against evaluations of f on the 25 DETEST problems, beside torchdiffeq's dopri5 and SciPy's solve_ivp."""

from __future__ import annotations

import functools
import importlib
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torchdiffeq
from common import HERE, Counted, parser, verdict, write
from matplotlib.figure import Figure

import neuralde as nde

sys.path.append(str(HERE.parent / "tests"))
detest = importlib.import_module("detest")  # the problems are the tests'

TOLERANCES = tuple(10.0**-k for k in range(3, 10))
PEERS = ("scipy", "torchdiffeq")


def ours(problem, f, tolerance: float, solver: str):
    """The state at the end, by a solver of the registry."""
    options = {"solver": solver, "rtol": tolerance, "atol": tolerance, "max_steps": 10**6}
    return nde.solve(nde.ODE(f), problem.z0, (0.0, detest.END), **options).final


def torchdiffeqs(problem, f, tolerance: float):
    """The state at the end, by torchdiffeq's dopri5."""
    ts = torch.tensor([0.0, detest.END], dtype=torch.float64)
    return torchdiffeq.odeint(f, problem.z0, ts, rtol=tolerance, atol=tolerance, method="dopri5")[-1]


def scipys(problem, f, tolerance: float, method: str):
    """The state at the end, by SciPy."""
    return problem.scipy(method, tolerance, tolerance, f).y[:, -1]


def contenders() -> dict:
    """Name -> a function of problem, f and tolerance that solves."""
    names = [name for name, solver in nde.solvers.SOLVERS.items() if detest.suits(solver, 1e-6)]
    return (
        {f"neuralde {name}": functools.partial(ours, solver=name) for name in names}
        | {"torchdiffeq dopri5": torchdiffeqs}
        | {f"SciPy {method}": functools.partial(scipys, method=method) for method in ("RK45", "DOP853")}
    )


def measure(tolerances) -> list[dict]:
    """One row for every tolerance, contender and problem."""
    rows = []
    for name, solve in contenders().items():
        for problem in detest.PROBLEMS.values():
            solve(problem, problem.f, tolerances[0])  # nothing is timed that happens once
            for tolerance in tolerances:
                f = Counted(problem.f)
                start = time.perf_counter()
                z = solve(problem, f, tolerance)
                row = {"tolerance": tolerance, "contender": name, "problem": problem.name, "NFE": f.calls}
                row["seconds"] = time.perf_counter() - start
                row["error"] = problem.error(z)
                row["bound"] = problem.bound(tolerance)
                rows.append(row)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """One row for every tolerance and contender, over the problems."""
    groups: dict = {}
    for row in rows:
        groups.setdefault((row["tolerance"], row["contender"]), []).append(row)
    made = []
    for (tolerance, name), group in sorted(groups.items(), key=lambda item: -item[0][0]):  # stable: contenders in turn
        worst = max(group, key=lambda row: row["error"])
        made.append(
            {
                "tolerance": f"{tolerance:.0e}",
                "contender": name,
                "NFE": sum(row["NFE"] for row in group),
                "median error / tolerance": statistics.median(row["error"] for row in group) / tolerance,
                "largest error / tolerance": worst["error"] / tolerance,
                "on": worst["problem"],
                "over the bound": ", ".join(row["problem"] for row in group if row["error"] > row["bound"]) or "none",
                "seconds": sum(row["seconds"] for row in group),
            }
        )
    return made


def judge(rows: list[dict]) -> list[str]:
    """Whether every solver of ours keeps the bound."""
    verdicts = []
    for name in contenders():
        own = [row for row in rows if row["contender"] == name and row["tolerance"] in detest.TOLERANCES]
        if name.startswith("neuralde") and own:
            worst = max(own, key=lambda row: row["error"] / row["bound"])
            where = f"largest on {worst['problem']} at {worst['tolerance']:.0e}"
            verdicts.append(verdict(f"{name}, error over bound, {where}", worst["error"] / worst["bound"], 1.0))
    return verdicts


def draw(rows: list[dict], path: Path):
    """A panel for every class of problems: geometric mean of the errors against evaluations of f."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    names = list(contenders())
    for panel, letter in zip(panels, "ABCDE", strict=False):
        for name in names:
            own = [row for row in rows if row["contender"] == name and row["problem"][0] == letter]
            points = []
            for tolerance in dict.fromkeys(row["tolerance"] for row in own):
                group = [row for row in own if row["tolerance"] == tolerance]
                mean = statistics.fmean(math.log10(max(row["error"], 1e-17)) for row in group)
                points.append((sum(row["NFE"] for row in group), 10**mean))
            line = {"neuralde": "-", "torchdiffeq": "--", "SciPy": ":"}[name.split()[0]]
            panel.loglog(*zip(*points, strict=True), line, marker=".", label=name)
        panel.set(title=f"{letter}1 to {letter}5", xlabel="evaluations of f", ylabel="error at t = 20 (geometric mean)")
        panel.grid(alpha=0.3)
    last = list(figure.axes)[-1]
    last.axis("off")
    last.legend(*figure.axes[0].get_legend_handles_labels(), loc="center", title="tolerances 1e-3 to 1e-9")
    figure.savefig(path, dpi=110)


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="the tolerances of the table alone")
    given = options.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = measure(detest.TOLERANCES if given.quick else TOLERANCES)
    notes = [
        "the 25 problems of Hull, Enright, Fellen & Sedgwick (1972) on [0, 20], rtol = atol = tolerance, float64, one "
        "initial state at a time; NFE and seconds are sums over the problems, medians and maxima are over them",
        "error: the largest |z - z(20)| over the components, z(20) known to 14 digits; the bound is 100 tolerances, or "
        "three times the error of SciPy's RK45 at the same tolerance where that is more",
        "all call the same f, a torch function (SciPy through a conversion); the seconds are those of one run, and "
        "tell the order of magnitude; the other columns are the same in every run",
        "the .csv has every problem, and the picture every decade of tolerance between",
        *judge(rows),
    ]
    table = summary([row for row in rows if row["tolerance"] in detest.TOLERANCES])
    write(given.results, "work_precision", table, "1", notes, PEERS, fine=rows)
    draw(rows, given.results / "work_precision.png")


if __name__ == "__main__":
    main()
