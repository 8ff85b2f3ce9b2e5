"""What a local penalty adds to a training step of existing code: forward and backward, with and without it."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable

import torch
import torchdiffeq
from common import Counted, TimeFree, Workload, in_turns, median_ratio, parser, small, spread, verdict, write
from torch import nn

import regularizers as reg
from regularizers import torchdiffeq as recorded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchdyn.core import NeuralODE
    from torchdyn.numerics import odeint as torchdyn_odeint

# Name -> the penalty; None is a step without one.
PENALTIES: dict[str, reg.Regularizer | None] = {"none": None} | {
    f"{kind.__name__}, {sampling}": kind(sampling, weight=1e-3)
    for kind in (reg.LocalError, reg.LocalStiffness)
    for sampling in ("unbiased", "biased")
}
LEAST_NFE = 100
# What is measured is a tenth of a step: a round's time is the shortest of so many.
BEST_OF = 5
PEERS = ("torchdiffeq", "torchdyn")


def digits_sized() -> Workload:
    """D: what fits scikit-learn's digits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 64))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.mul_(3.0)
    what = "64-100-64 tanh network with weights x 3, batch 128 of rand, float32"
    return Workload("D", TimeFree(net), torch.rand(128, 64), 1e-6, 1, what)


def through_torchdiffeq(name: str, work: Workload, ts, penalty: reg.Regularizer | None):
    """A step of a program that calls torchdiffeq's function of that name."""
    function = getattr(torchdiffeq if penalty is None else recorded, name)
    y = function(work.f, work.z0, ts, method="dopri5", rtol=work.tolerance, atol=work.tolerance)[-1]
    loss = y.square().mean()
    if penalty is not None:
        loss = loss + penalty(function.solution)
    loss.backward()


def through_torchdyn(layer, work: Workload, ts, penalty: reg.Regularizer | None):
    """A step of a program with a torchdyn layer."""
    loss = layer(work.z0, ts)[1][-1].square().mean()
    if penalty is not None:
        loss = loss + penalty(layer)
    loss.backward()


def programs(work: Workload, ts) -> dict[str, dict[str, Callable]]:
    """Program -> name in PENALTIES -> a training step."""
    made = {}
    for name in ("odeint", "odeint_adjoint"):
        step = functools.partial(through_torchdiffeq, name, work, ts)
        made[f"torchdiffeq {name}"] = {which: functools.partial(step, penalty) for which, penalty in PENALTIES.items()}
    options = {"solver": "dopri5", "atol": work.tolerance, "rtol": work.tolerance}
    plain, attached = NeuralODE(work.f.net, **options), reg.attach(NeuralODE(work.f.net, **options))
    made["torchdyn NeuralODE"] = {
        which: functools.partial(through_torchdyn, plain if penalty is None else attached, work, ts, penalty)
        for which, penalty in PENALTIES.items()
    }
    return made


def count(program: str, work: Workload, ts) -> int:
    """Calls of f in the forward solve."""
    f, tolerances = Counted(work.f), {"rtol": work.tolerance, "atol": work.tolerance}
    with torch.no_grad():
        if program.startswith("torchdyn"):
            torchdyn_odeint(f, work.z0, ts, solver="dopri5", **tolerances)
        else:
            torchdiffeq.odeint(f, work.z0, ts, method="dopri5", **tolerances)
    if f.calls < LEAST_NFE:
        raise AssertionError(f"{work.name}, {program} takes {f.calls} evaluations, and is to take {LEAST_NFE}")
    return f.calls


def measure(work: Workload, ts, rounds: int) -> tuple[list[dict], list[str]]:
    """The rows of a workload, and whether the claims hold."""
    torch.set_num_threads(work.threads)
    rows, verdicts = [], []
    for program, steps in programs(work, ts).items():
        nfe = count(program, work, ts)
        seconds = in_turns(steps, rounds, best_of=BEST_OF)
        for penalty in list(PENALTIES)[1:]:
            ratio, limit = median_ratio(seconds[penalty], seconds["none"]), 1.0 + 12.0 / nfe
            rows.append(
                {
                    "workload": work.name,
                    "program": program,
                    "penalty": penalty,
                    "NFE": nfe,
                    "ms without": statistics.median(seconds["none"]) * 1e3,
                    "ms with": statistics.median(seconds[penalty]) * 1e3,
                    "with / without": ratio,
                    "1 + 12/NFE": limit,
                    "spread": spread(seconds[penalty]),
                }
            )
            noise = max(spread(seconds["none"]), spread(seconds[penalty]))
            verdicts.append(verdict(f"{work.name}, {program}, {penalty}", ratio, round(limit, 3), noise=noise))
    return rows, verdicts


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9, help="measurements of every program, at least 7")
    given = options.parse_args()
    if given.rounds < 7:
        options.error("--rounds must be at least 7")
    rows, verdicts, works = [], [], {"S": (small(), 6.0), "D": (digits_sized(), 4.0)}
    for work, end in works.values():
        more, judged = measure(work, torch.tensor([0.0, end]), given.rounds)
        rows += more
        verdicts += judged
    notes = [
        *(f"{w.name}: {w.what}; t from 0 to {end}, rtol = atol = {w.tolerance}, dopri5" for w, end in works.values()),
        "ms of forward and backward pass together, of the library's own function and of the recorded one with the "
        "penalty; NFE of the forward solve",
        f"{given.rounds} rounds, each the shortest of {BEST_OF} measurements; ms are medians over them, ratios the "
        "medians of the ratios of every round, spread the interquartile range over the median",
        *verdicts,
    ]
    threads = ", ".join(f"{w.threads} ({w.name})" for w, _ in works.values())
    write(given.results, "penalty_cost", rows, threads, notes, PEERS)


if __name__ == "__main__":
    main()
