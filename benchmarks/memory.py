"""Peak memory of forward and backward through many steps: adjoint "direct" against "checkpointed".

Every figure is of a process of its own. Two are taken on the CPU, in separate runs so that neither disturbs the other:

- tensors: bytes of tensors alive at the peak, counted by a TorchDispatchMode (`common.AliveBytes`). It depends on the
  program alone, so this is the one to compare and to claim. The profiler's record of the CPU allocator has the same
  peak to the kilobyte, but no public list of its events.
- resident: growth of the process's peak resident memory, which is what a machine runs out of. It varies from run to
  run, and has the kernels' scratch memory and the allocator's gaps in it: glibc's make "direct" up to 1.7 times as
  large as its tensors.

On CUDA there is one, the allocator's own peak: torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from common import AliveBytes, PeakResident, parser, verdict, write
from torch import Tensor, nn

import neuralde as nde
import regularizers as reg

ADJOINTS = ("direct", "checkpointed")
BATCH, FEATURES, WIDTH = 512, 64, 256


def problem(adjoint: str, steps: int, device: str) -> tuple[nde.NeuralODE, Tensor]:
    """A layer that takes so many Tsit5 steps on [0, 1], and its input."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, FEATURES)
    )
    fixed = nde.StepControl(adaptive=False)
    layer = nde.NeuralODE(net, solver="tsit5", control=fixed, dt0=1.0 / steps, adjoint=adjoint).to(device)
    return layer, torch.randn(BATCH, FEATURES, device=device)


def train_step(layer: nde.NeuralODE, z0: Tensor, penalty: reg.Regularizer | None):
    """Forward and backward. Gradients are there already, so that they belong to the state before."""
    loss = layer(z0).square().mean()
    if penalty is not None:
        loss = loss + penalty(layer)
    loss.backward()


def peak(adjoint: str, steps: int, regularized: bool, what: str) -> int:
    """Bytes at the peak of one training step over those just before it. what: "tensors", "resident" or "cuda"."""
    torch.set_num_threads(1)
    device = "cuda" if what == "cuda" else "cpu"
    penalty = reg.GlobalError() if regularized else None
    # Two steps first: libraries load and take their own memory when they are first used.
    train_step(*problem(adjoint, 2, device), penalty)
    layer, z0 = problem(adjoint, steps, device)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if what == "tensors":
        with AliveBytes() as alive:
            train_step(layer, z0, penalty)
        found = alive.peak
    elif what == "resident":
        resident = PeakResident()
        train_step(layer, z0, penalty)
        found = resident.growth()
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_step(layer, z0, penalty)
        found = torch.cuda.max_memory_allocated() - before
    if int(layer.solution.stats.accepted[0]) != steps:
        raise AssertionError(f"{steps} steps were asked for, {layer.solution.stats} were made")
    return found


def apart(*arguments) -> int:
    """`peak` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring {arguments} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def main():
    """Measures, prints a table and writes it to results/."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, nargs="+", default=[20, 100, 500])
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--one", help="one measurement, for the process that this script starts")
    given = options.parse_args()
    if given.one:
        print(peak(*json.loads(given.one)))
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        options.error("there is no CUDA device here")
    figures = ("cuda",) if given.device == "cuda" else ("tensors", "resident")
    rows, notes = [], []
    for regularized in (False, True):
        loss = "with GlobalError" if regularized else "plain"
        for steps in given.steps:
            row = {"loss": loss, "steps": steps}
            for what in figures:
                direct, checkpointed = (apart(adjoint, steps, regularized, what) for adjoint in ADJOINTS)
                row |= {
                    f"{what}, direct, MiB": direct / 2**20,
                    f"{what}, checkpointed, MiB": checkpointed / 2**20,
                    f"{what}, ratio": checkpointed / direct,
                }
                if steps == 100:
                    claim = f"{loss}, 100 steps, {what}, checkpointed over direct"
                    notes.append(verdict(claim, checkpointed / direct, 0.2))
            rows.append(row)
    notes.insert(0, f"{FEATURES}-{WIDTH}-{WIDTH}-{FEATURES} tanh network, batch {BATCH}, float32, Tsit5, fixed steps")
    state = BATCH * FEATURES * 4 / 2**20
    notes.insert(1, f"one state is {state:.3g} MiB; checkpointed keeps one per step, and one step's tape at a time")
    write(given.results, "memory", rows, "1", notes)


if __name__ == "__main__":
    main()
