"""The speed benchmark runs: it checks the answers first, and writes its tables and pictures."""

import csv
import importlib
import sys
import timeit
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def once(calls, *_, **__):
    """In place of `in_turns`: no test is about the times."""
    return {name: [timeit.timeit(call, number=1) for _ in range(2)] for name, call in calls.items()}


@pytest.fixture
def speed(monkeypatch):
    """The command as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("common", "contenders", "speed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("speed")
    monkeypatch.setattr(module, "in_turns", once)
    return module


def command(speed, monkeypatch, folder, *words):
    """Runs it with few contenders; returns the rows of the last part's table."""
    only = ("--only", "eager", "torchdiffeq")
    monkeypatch.setattr(sys, "argv", ["speed.py", *words, *only, "--results", str(folder)])
    speed.main()
    with (folder / f"speed_{words[-1]}.csv").open() as file:
        return list(csv.DictReader(file))


def test_table(speed, monkeypatch, tmp_path):
    rows = command(speed, monkeypatch, tmp_path, "S")
    forward = {row["contender"]: row for row in rows if row["pass"] == speed.FORWARD}
    assert set(forward) == {"torchdiffeq", "eager dopri5 joint, integral", "eager dopri5 per_sample"}
    for row in forward.values():
        assert 0.0 < float(row["error / tolerance"]) < 300.0
        assert int(row["NFE"]) % 6 == 2
    # The same controller takes the same steps.
    assert forward["torchdiffeq"]["NFE"] == forward["eager dopri5 joint, integral"]["NFE"]
    assert 1.0 <= float(forward["eager dopri5 per_sample"]["rows / needed"]) < 1.5
    assert {row["contender"] for row in rows if row["pass"] == speed.BOTH} > set(forward)


def test_curve(speed, monkeypatch, tmp_path):
    rows = command(speed, monkeypatch, tmp_path, "precision")
    for name in {row["contender"] for row in rows}:
        own = [row for row in rows if row["contender"] == name]
        assert len(own) == len(speed.CURVES["precision"].values)
        errors, calls = [float(row["error"]) for row in own], [int(row["NFE"]) for row in own]
        assert errors[0] > errors[-1] and calls == sorted(calls)
    assert (tmp_path / "speed_precision.png").stat().st_size > 10_000


def test_wrong_answers_are_not_measured(speed):
    work = speed.small()
    name = "eager dopri5 joint, integral"
    made = {name: speed.ours(work, "joint, integral")[name]}
    exact = speed.reference(work)
    assert set(speed.agreeing(made, work, exact)[0]) == set(made)
    with pytest.raises(AssertionError, match=f"{name} is"):
        speed.agreeing(made, work, exact + 0.1)
