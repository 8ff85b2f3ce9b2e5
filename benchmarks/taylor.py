"""Third total derivatives along a solution: Taylor mode against nested forward and nested reverse mode."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from common import in_turns, median_ratio, parser, spread, verdict, write
from torch import Tensor, nn

import neuralde as nde
from regularizers.taylor import derivatives, nested_derivatives

ORDERS = (1, 2, 3, 4)
# What is claimed: Taylor mode at that order is so many times as fast as nested reverse mode.
ORDER, LEAST = 3, 2.0
# S takes less than a millisecond, as long as what disturbs it: a round's time is the shortest of so many.
BEST_OF = 5


def nested_reverse(f: Callable, t: Tensor, z: Tensor, order: int) -> list[Tensor]:
    """As `derivatives`, by torch.autograd.grad alone: a total derivative is a vector-Jacobian product's derivative."""
    t, z = t.detach().requires_grad_(), z if z.requires_grad else z.detach().requires_grad_()

    def total(g: Callable) -> Callable:
        def derivative(t, z):
            out = g(t, z)
            v = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(out, (t, z), v, create_graph=True)
            return torch.autograd.grad(pulled, v, (torch.ones_like(t), f(t, z)), create_graph=True)[0]

        return derivative

    found = [f]
    for _ in range(order - 1):
        found.append(total(found[-1]))
    return [g(t, z) for g in found[-1:]]


def highest(f: Callable, t: Tensor, z: Tensor, order: int) -> list[Tensor]:
    """The highest derivative by nested forward mode, without the others for themselves."""
    return nested_derivatives(f, t, z, order)[-1:]


MODES = {"taylor": derivatives, "nested jvp": highest, "nested autograd.grad": nested_reverse}


def workloads() -> dict[str, tuple[nn.Module, Tensor, str]]:
    """Name -> (f, z, what it is)."""
    torch.manual_seed(0)
    made = {}
    for name, d, hidden, batch in (("S", 2, 50, 64), ("M", 784, 100, 100)):
        f = nde.TimeChain(nde.AppendTime(nn.Linear(d + 1, hidden)), nn.Tanh(), nde.AppendTime(nn.Linear(hidden + 1, d)))
        made[name] = (f, torch.rand(batch, d), f"{d}-{hidden}-{d} tanh network with time, batch {batch}, float32")
    return made


def step(make: Callable, f: nn.Module, t: Tensor, z: Tensor, order: int) -> Tensor:
    """The mean square of the highest derivative, and its gradient by the parameters."""
    value = (make(f, t, z, order)[-1] ** 2).mean()
    torch.autograd.grad(value, list(f.parameters()), allow_unused=True)
    return value.detach()


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15, help="measurements of every contender, at least 7")
    given = options.parse_args()
    if given.rounds < 7:
        options.error("--rounds must be at least 7")
    torch.set_num_threads(1)
    rows, verdicts, notes = [], [], []
    for name, (f, z, what) in workloads().items():
        t = torch.full((len(z), 1), 0.3)
        for order in ORDERS:
            contenders = {mode: functools.partial(step, make, f, t, z, order) for mode, make in MODES.items()}
            values = {mode: call() for mode, call in contenders.items()}
            for value in values.values():
                torch.testing.assert_close(value, values["taylor"], rtol=1e-4, atol=0)
            seconds = in_turns(contenders, given.rounds, best_of=BEST_OF)
            for mode, measured in seconds.items():
                row = {"workload": name, "order": order, "mode": mode, "ms": 1e3 * statistics.median(measured)}
                row["times taylor's"] = median_ratio(measured, seconds["taylor"])
                row["spread"] = spread(measured)
                rows.append(row)
            if order == ORDER:
                theirs, ours = seconds["nested autograd.grad"], seconds["taylor"]
                claim, noise = (
                    f"{name}, nested autograd.grad over Taylor mode, order 3",
                    max(map(spread, (theirs, ours))),
                )
                verdicts.append(verdict(claim, median_ratio(theirs, ours), LEAST, least=True, noise=noise))
        notes.append(f"{name}: {what}")
    notes += [
        "The derivative of that order along the solution, its mean square, and the gradient of that by the parameters; "
        f"{given.rounds} rounds, each the shortest of {BEST_OF} measurements of 20 ms; medians over the rounds, ratios "
        "the medians of the ratios of every round.",
        *verdicts,
    ]
    write(given.results, "taylor", rows, "1", notes)


if __name__ == "__main__":
    main()
