"""What the benchmarks share: workloads, timing in turns, peak memory, and files with the results."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import neuralde as nde

HERE = Path(__file__).resolve().parent


# -- workloads ---------------------------------------------------------------------------------------------------------


class TimeFree(nn.Module):
    """f(t, z) = net(z).

    Args:
        net: a Module of z alone.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, t, z: Tensor) -> Tensor:
        """net(z)."""
        return self.net(z)


class Counted(nn.Module):
    """f with a count of its batched calls in `calls`, and of the samples in them in `rows`.

    Args:
        f: (t, z) -> dz/dt.
    """

    def __init__(self, f: Callable):
        super().__init__()
        self.f, self.calls, self.rows = f, 0, 0

    def forward(self, t, z: Tensor) -> Tensor:
        """f(t, z)."""
        self.calls += 1
        self.rows += len(z)
        return self.f(t, z)


class VanDerPol(nn.Module):
    """x' = v, v' = μ·(1 - x²)·v - x; z = (x, v).

    Args:
        mu: μ.
    """

    def __init__(self, mu: float):
        super().__init__()
        self.mu = mu

    def forward(self, t, z: Tensor) -> Tensor:
        """dz/dt."""
        x, v = z.unbind(-1)
        return torch.stack([v, self.mu * (1 - x * x) * v - x], dim=-1)


@dataclass(frozen=True)
class Workload:
    """dz/dt = f(t, z) on [0, t1] from z0.

    Attributes:
        name: S, M, V, or that of a variation of one of them.
        f, z0: the vector field, and the initial state [batch, features].
        tolerance: rtol and atol.
        threads: of torch's operations.
        what: one line for the results.
        t1: where it ends.
    """

    name: str
    f: nn.Module
    z0: Tensor
    tolerance: float
    threads: int
    what: str
    t1: float = 1.0


def small(batch: int = 64, width: int = 50, tolerance: float = 1e-6) -> Workload:
    """S: the overhead around f decides."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.mul_(3.0)
    what = f"2-{width}-2 tanh network with weights x 3, batch {batch} of randn, float32"
    return Workload("S", TimeFree(net), torch.randn(batch, 2), tolerance, 1, what)


def medium() -> Workload:
    """M: MNIST-sized; memory traffic around f counts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 784))
    what = "784-100-784 tanh network, default initialisation, batch 512 of rand, float32"
    return Workload("M", TimeFree(net), torch.rand(512, 784), 1e-6, 2, what)


def oscillators(mu: float = 10.0, t1: float = 20.0, spread: float = 1.0, batch: int = 256) -> Workload:
    """V: samples that need small steps at different times, and some more of them than others."""
    torch.manual_seed(0)
    what = f"Van der Pol, μ = {mu:g}, from {spread:g} · randn, batch {batch}, float32, t from 0 to {t1:g}"
    return Workload("V", VanDerPol(mu), spread * torch.randn(batch, 2), 1e-5, 1, what, t1)


# One step size for the batch and a plain integral controller, as the peers have it: the same steps.
MATCHED = nde.StepControl(per_sample=False, beta1=0.2, beta2=0.0)


def reference(work: Workload) -> Tensor:
    """The state at the end, in float64 at tolerance 1e-12."""
    f, z0, options = work.f.double(), work.z0.double(), {"solver": "dopri8", "rtol": 1e-12, "atol": 1e-12}
    with torch.no_grad():
        final = nde.solve(nde.ODE(f), z0, (0.0, work.t1), max_steps=10**6, **options).final
    work.f.float()
    return final


def deviation(z: Tensor, exact: Tensor, work: Workload) -> float:
    """The largest |z - exact| / (atol + rtol·|exact|)."""
    z = z.to(exact)
    return float(((z - exact).abs() / (work.tolerance * (1 + exact.abs()))).max())


# -- time --------------------------------------------------------------------------------------------------------------


def in_turns(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    least: float = 0.02,
    warmup: int = 3,
    device: str = "cpu",
    best_of: int = 1,
) -> dict[str, list[float]]:
    """Times contenders against each other: every round has one measurement of each.

    A machine that slows down, for a second or for good, slows all contenders of a round, and the ratio of two of them
    within a round stays what it is. The order rotates from round to round, so that nobody always follows the same one.

    Args:
        contenders: what to call.
        rounds: measurements of each.
        least: seconds that one measurement takes at least: quick contenders are called several times. 0: all of them
            once, without a call to find out how quick they are.
        warmup: calls before anything is measured.
        device: "cuda" has every measurement wait for the device, at its start and at its end.
        best_of: a round's measurement is the shortest of so many, which take turns as the contenders do: what lasts
            milliseconds and is not the contender's (interrupts, other machines on the same processor) is in some of
            them, hardly in all.

    Returns:
        Seconds per call, one number per round; index r of all contenders belongs to round r.
    """
    names, repeats = list(contenders), {}
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for name, call in contenders.items():
        for _ in range(warmup):
            call()
        repeats[name] = 1
        if least:
            wait()
            start = time.perf_counter()
            call()
            wait()
            repeats[name] = max(1, round(least / (time.perf_counter() - start)))
    seconds = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what the imports brought need not be gone through before every measurement
    for r in range(rounds):
        shift = r % len(names)
        found = dict.fromkeys(names, math.inf)
        for name in best_of * (names[shift:] + names[:shift]):
            call, n = contenders[name], repeats[name]
            gc.collect()
            wait()
            start = time.perf_counter()
            for _ in range(n):
                call()
            wait()
            found[name] = min(found[name], (time.perf_counter() - start) / n)
        for name, value in found.items():
            seconds[name].append(value)
    gc.unfreeze()
    return seconds


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    """The median over the rounds of mine / theirs."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def spread(values: list[float]) -> float:
    """The interquartile range over the median: how noisy a measurement was."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


# -- memory ------------------------------------------------------------------------------------------------------------


class AliveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside of it: alive now (`alive`), and at most (`peak`).

    Args:
        apart: which tensors to count on their own as well (`alive_apart`, and `peak_apart` for their part of the peak),
            judged as they are made; none without it.

    Every operation's results are seen as they are made, in the forward and in the backward pass, and a storage is
    counted once, whatever views it has, until it is freed. The numbers are those of the program alone: the same on
    every machine, in every run, whatever the allocator hands back to the system. What a kernel allocates and frees
    inside itself is not seen.
    """

    def __init__(self, apart: Callable[[Tensor], bool] = lambda x: False):
        super().__init__()
        self.alive = self.peak = self.alive_apart = self.peak_apart = 0
        self._apart = apart
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operation, and counts what it made."""
        given = {id(x.untyped_storage()) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf, given)
        return out

    def _count(self, made: Tensor, given: set[int]):
        storage = made.untyped_storage()
        key = id(storage)
        # What an operation returns of its arguments (views, in-place results) was there before: if it is not known,
        # it was made outside.
        if key in self._seen or key in given:
            return
        size = storage.nbytes()
        size_apart = size if self._apart(made) else 0

        def freed(_):
            del self._seen[key]
            self.alive -= size
            self.alive_apart -= size_apart

        self._seen[key] = weakref.ref(storage, freed)
        self.alive += size
        self.alive_apart += size_apart
        if self.alive > self.peak:
            self.peak, self.peak_apart = self.alive, self.alive_apart


class PeakResident:
    """Growth of the process's peak resident memory since the object was made.

    Linux resets the peak (VmHWM) on request; elsewhere the peak is the process's of all time (`ru_maxrss`), which says
    the same as long as nothing before was larger: measure in a process of its own.
    """

    def __init__(self):
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory; it would be used again without growth
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self._peak()

    def growth(self) -> int:
        """In bytes."""
        return self._peak() - self.start

    @staticmethod
    def _peak() -> int:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- results -----------------------------------------------------------------------------------------------------------


def parser(text: str) -> argparse.ArgumentParser:
    """A command line with the option that every benchmark has."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--results", type=Path, default=HERE / "results", help="where to write the .csv and the .md")
    return made


def write(
    folder: Path,
    name: str,
    rows: list[dict],
    threads: str,
    notes: list[str],
    peers: tuple[str, ...] = (),
    fine: list[dict] | None = None,
):
    """Writes NAME.csv, every digit, and NAME.md, for people; and prints the latter.

    Args:
        folder: where to.
        rows: of the table, all with the same keys, the columns' titles.
        threads: how many, in words.
        notes: lines to go under the table.
        peers: distributions whose versions matter, beside torch.
        fine: rows of the .csv, where the table is a summary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fine = rows if fine is None else fine
    with (folder / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(fine[0]))
        table.writeheader()
        table.writerows(fine)
    lines = [f"# {name}", "", *_header(threads, peers), "", *_table(rows), "", *(f"- {note}" for note in notes)]
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.md").write_text(text)
    print(text)


# A measurement of time that spreads more than this was not alone on the machine.
NOISY = 0.3


def verdict(claim: str, value: float, limit: float, least: bool = False, noise: float = 0.0) -> str:
    """'PASS' or 'FAIL', the claim, and the number that was found: at most the limit, or at least.

    Args:
        claim, value, limit, least: see above.
        noise: the largest `spread` of the times that the number was made of. Above `NOISY` it shows nothing, and the
            verdict is 'UNSURE'.
    """
    holds = value >= limit if least else value <= limit
    word = "UNSURE" if noise > NOISY else "PASS" if holds else "FAIL"
    off = f", at a spread of {noise:.2f}: measure again" if noise > NOISY else ""
    return f"{word}: {claim}: at {'least' if least else 'most'} {limit}, found {value:.3f}{off}"


def _header(threads: str, peers: tuple[str, ...]) -> Iterator[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *peers))
    yield f"- command: `{_command()}`"
    yield f"- machine: {_machine()}; threads: {threads}"
    yield f"- software: neuralde {revision()}, {versions}, Python {platform.python_version()}, {platform.system()}"


def _command() -> str:
    # A folder of this machine says nothing on another one.
    words = ["DIR" if os.sep in word else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def _machine() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores{gpu}"


def revision() -> str:
    """The version, with the commit where this is a checkout; a + where the package was changed since."""
    version = importlib.metadata.version("neuralde")
    try:
        commit, changed = (
            subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "neuralde", "regularizers"))
        )
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version} ({commit}{'+' if changed else ''})"


def _table(rows: list[dict]) -> Iterator[str]:
    titles = list(rows[0])
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "|".join("---" if isinstance(rows[0][title], str) else "---:" for title in titles) + "|"
    for row in rows:
        yield "| " + " | ".join(_cell(row[title]) for title in titles) + " |"


def _cell(value) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
