"""The libraries' own programs with line one, and with both: nothing changes, and then what is asked for does."""

# ruff: noqa: NPY002  (torchsde draws its seeds from numpy's global generator)

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import check_gradient
from programs import PROGRAMS, seeded

import regularizers as reg

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting tolerances has no effect"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
]
PROGRAM = pytest.mark.parametrize("program", PROGRAMS)


@pytest.fixture
def _times():
    """The same sampled times in every run. (The recording keeps every solve, which is too much for a training.)"""
    with reg.record(torch.Generator().manual_seed(0)):
        yield


def trained(make, recorded, penalty=None, steps=2):
    """All that a training makes: losses, outputs, parameters, and the random numbers that come next; and penalties."""
    seeded()
    program, made, extras = make(recorded, torch.float32), [], []
    for _ in range(steps):
        loss, output = program.forward()
        made += [loss.detach(), output.detach()]
        if penalty is not None:
            extras.append(penalty(program.penalized()))
            loss = loss + extras[-1]
        program.descent.zero_grad()
        loss.backward()
        program.descent.step()
    made += [p.detach() for p in program.model.parameters()]
    return [*made, torch.rand(2), torch.tensor(np.random.rand(2))], extras


@PROGRAM
@pytest.mark.usefixtures("_times")
def test_line_one_changes_nothing_and_line_two_does(program):
    make = PROGRAMS[program]
    theirs, _ = trained(make, False)
    ours, _ = trained(make, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # In float32, an error ratio at the ODE demo's tolerance of 1e-9 is rounding noise; stiffness is not.
    sde = "SDE" in program
    penalty = reg.LocalError(scaled=False, weight=10.0) if sde else reg.LocalStiffness(weight=0.1)
    regularized, extras = trained(make, True, penalty)
    assert all(bool(extra > 0) for extra in extras)
    assert torch.equal(regularized[1], theirs[1])
    assert not all(torch.equal(a, b) for a, b in zip(regularized, theirs, strict=True))


@PROGRAM
@pytest.mark.usefixtures("_times")
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_the_penaltys_gradient(program, sampling):
    """In float64, at the sampled time, along a random direction of all parameters of the vector field."""
    seeded()
    made = PROGRAMS[program](True, torch.float64)
    made.forward()
    while reg.LocalError(sampling)(made.penalized()).item() < 1e-6:  # that of a cautious first step may be rounding
        made.forward()
    for penalty in (reg.LocalError(sampling), reg.LocalStiffness(sampling)):
        check_gradient(penalty, made.penalized(), made.parameters, made.step)


@pytest.fixture(scope="module")
def existing_code():
    """The benchmark of that name as a module: classifiers of digits by the three libraries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        yield importlib.import_module("existing_code")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["torchdiffeq", "mnist", "torchdyn", "torchsde"])
def test_two_lines_save_a_quarter_of_the_evaluations_on_digits(existing_code, program):
    """After training on real digits, at no more than a point of the accuracy: one seed of the benchmark's."""
    data, program = existing_code.digits(), existing_code.PROGRAMS[program]
    plain, accuracy = existing_code.run(program, None, data, 0)
    penalty = next(iter(program.penalties.values()))()
    nfe, regularized = existing_code.run(program, penalty, data, 0)
    assert nfe <= (1 - existing_code.LEAST_SAVED) * plain
    assert regularized >= accuracy - existing_code.MOST_LOST
