"""Forward solves against torchdiffeq and torchdyn: time per evaluation of f, and in all."""

from __future__ import annotations

import functools
import statistics
import warnings

import torch
import torchdiffeq
from common import (
    MATCHED,
    Counted,
    Workload,
    deviation,
    in_turns,
    median_ratio,
    medium,
    parser,
    reference,
    small,
    spread,
    verdict,
    write,
)
from torch import Tensor

import neuralde as nde

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchdyn.numerics import odeint as torchdyn_odeint

OURS = {
    "neuralde dopri5 joint, integral": ("dopri5", MATCHED),
    "neuralde dopri5 joint": ("dopri5", "joint"),
    "neuralde dopri5 per_sample": ("dopri5", "per_sample"),
    "neuralde tsit5 joint": ("tsit5", "joint"),
    "neuralde tsit5 per_sample": ("tsit5", "per_sample"),
}
PEERS = ("torchdiffeq", "torchdyn")

# (workload, peer, largest ratio of the time per evaluation that we promise)
CLAIMS = (("S", "torchdiffeq", 0.6), ("M", "torchdiffeq", 0.5), ("M", "torchdyn", 1.0))


def ours(f, work: Workload, solver: str, control) -> Tensor:
    """The state at t = 1."""
    options = {"solver": solver, "control": control, "rtol": work.tolerance, "atol": work.tolerance}
    return nde.solve(nde.ODE(f), work.z0, (0.0, 1.0), **options).final


def theirs(f, work: Workload, peer: str, ts: Tensor) -> Tensor:
    """The state at t = 1, by a peer's dopri5."""
    if peer == "torchdiffeq":
        return torchdiffeq.odeint(f, work.z0, ts, rtol=work.tolerance, atol=work.tolerance, method="dopri5")[-1]
    return torchdyn_odeint(f, work.z0, ts, solver="dopri5", rtol=work.tolerance, atol=work.tolerance)[1][-1]


def solvers_of(work: Workload) -> dict:
    """Contender -> a function of f that solves."""
    ts = torch.tensor([0.0, 1.0])
    made = {name: functools.partial(ours, work=work, solver=s, control=c) for name, (s, c) in OURS.items()}
    made |= {f"{peer} dopri5": functools.partial(theirs, work=work, peer=peer, ts=ts) for peer in PEERS}
    return made


def count(solve, f) -> int:
    """Batched calls of f in one solve; not in the first one, in which neuralde also checks f (once for every f)."""
    counted = Counted(f)
    solve(counted)
    counted.calls = 0
    solve(counted)
    return counted.calls


def measure(work: Workload, rounds: int) -> tuple[list[dict], list[str]]:
    """The rows of a workload, and whether the claims hold."""
    torch.set_num_threads(work.threads)
    solvers, exact, t = solvers_of(work), reference(work), torch.tensor(0.0)
    off = {name: deviation(solve(work.f), exact, work) for name, solve in solvers.items()}
    for name, x in off.items():
        if not x < 300:
            raise AssertionError(f"{work.name}: {name} is {x:.0f} tolerances off the reference")
    calls = {name: count(solve, work.f) for name, solve in solvers.items()}
    raw = "f alone"
    contenders = {name: functools.partial(solve, work.f) for name, solve in solvers.items()}
    seconds = in_turns(contenders | {raw: lambda: work.f(t, work.z0)}, rounds)
    per_call = {name: [s / calls[name] for s in seconds[name]] for name in solvers} | {raw: seconds[raw]}

    rows = []
    for name, per in per_call.items():
        row = {
            "workload": work.name,
            "contender": name,
            "NFE": calls.get(name, 1),
            "ms": statistics.median(seconds[name]) * 1e3,
            "µs per NFE": statistics.median(per) * 1e6,
            "µs around f": statistics.median(a - b for a, b in zip(per, per_call[raw], strict=True)) * 1e6,
        }
        for peer in PEERS:
            row[f"per NFE / {peer}"] = median_ratio(per, per_call[f"{peer} dopri5"])
        for peer in PEERS:
            row[f"total / {peer}"] = median_ratio(seconds[name], seconds[f"{peer} dopri5"])
        row["spread"] = spread(seconds[name])
        row["error / tolerance"] = off.get(name)
        rows.append(row)
    verdicts = [
        verdict(f"{work.name}, {name}, time per NFE over {peer}'s", row[f"per NFE / {peer}"], limit)
        for name, row in zip(per_call, rows, strict=True)
        for where, peer, limit in CLAIMS
        if name in OURS and where == work.name
    ]
    return rows, verdicts


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=25, help="measurements of every contender, at least 7")
    options.add_argument("--workloads", nargs="+", choices=("S", "M"), default=("S", "M"))
    given = options.parse_args()
    if given.rounds < 7:
        options.error("--rounds must be at least 7")
    works = [work for work in (small(), medium()) if work.name in given.workloads]
    rows, verdicts = [], []
    with torch.no_grad():
        for work in works:
            more, judged = measure(work, given.rounds)
            rows += more
            verdicts += judged
    notes = [
        *(f"{work.name}: {work.what}; t from 0 to 1, rtol = atol = {work.tolerance}" for work in works),
        f"{given.rounds} rounds; ms and µs are medians over them, ratios the medians of the ratios of every round, "
        "spread the interquartile range over the median; µs around f: µs per NFE less the time of f in the same round",
        *verdicts,
    ]
    threads = ", ".join(f"{work.threads} ({work.name})" for work in works)
    write(given.results, "eager_speed", rows, threads, notes, PEERS)


if __name__ == "__main__":
    main()
