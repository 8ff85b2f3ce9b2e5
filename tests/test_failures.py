"""A solve that fails says which samples, where and why; and leaves the other samples as they would be alone."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import (
    ADAPTIVE,
    ADJOINTS,
    CONTROLS,
    DENSE,
    EXACT,
    FIXED,
    SOLVERS,
    WITH_ERROR,
    WITH_STIFFNESS,
    close,
    options,
)
from torch import Tensor

import neuralde as nde
from neuralde.errors import Status


@dataclass
class Case:
    """A batch in which some samples fail. f(w) is the vector field with the parameter w, which is 1."""

    f: Callable
    z0: list
    failing: dict[int, float]  # sample -> the time where it fails
    error: type[nde.NeuralDEError]
    status: Status
    solve: dict = field(default_factory=dict)
    t: tuple[float, float] = (0.0, 1.0)
    within: float = 1e-6  # how well the time is known

    def state(self) -> Tensor:
        return torch.tensor(self.z0, dtype=torch.float64)

    @property
    def good(self) -> list[int]:
        return [i for i in range(len(self.z0)) if i not in self.failing]


def until_its_time(w):
    """Samples (x, c) with dx/dt = w·√(c - t)·x, which is NaN once t > c; so is its derivative with respect to w."""

    def f(t, z):
        x, c = z.unbind(1)
        return torch.stack([w * torch.sqrt(c - t.squeeze()) * x, torch.zeros_like(c)], 1)

    return f


CASES = {
    # √z of a negative state: NaN from the first evaluation on.
    "nan at the start": Case(
        lambda w: lambda t, z: w * torch.sqrt(z),
        [[1.0], [-1.0], [2.0], [0.5], [-3.0]],
        {1: 0.0, 4: 0.0},
        nde.NonFiniteState,
        Status.NON_FINITE,
    ),
    "nan later": Case(
        until_its_time,
        [[1.0, 2.0], [0.5, 0.25], [-1.0, 1.5], [1.0, 0.5]],
        {1: 0.25, 3: 0.5},
        nde.NonFiniteState,
        Status.NON_FINITE,
    ),
    # dz/dt = w z² ends at t = 1/(w z0); a solver's own solution ends somewhat beside it.
    "blow-up": Case(
        lambda w: lambda t, z: w * z**2,
        [[0.1], [4.0], [-3.0], [2.0], [0.5]],
        {1: 0.25, 3: 0.5},
        nde.StepSizeUnderflow,
        Status.STEP_SIZE_UNDERFLOW,
        {"rtol": 1e-4},
        within=1e-4,
    ),
    # dz/dt = -w sign(z) can't pass through zero, and at this atol no step across it is small enough.
    "discontinuity": Case(
        lambda w: lambda t, z: -w * torch.sign(z),
        [[3.0], [0.75], [-2.0], [-0.25]],
        {1: 0.75, 3: 0.25},
        nde.StepSizeUnderflow,
        Status.STEP_SIZE_UNDERFLOW,
        {"atol": 1e-30},
    ),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def solve(case: Case, w=1.0, rows=None, **changes):
    z0 = changes.pop("z0", case.state())
    z0 = z0 if rows is None else z0[rows]
    return nde.solve(nde.ODE(case.f(w)), z0, **{"t": case.t, **case.solve, **changes})


def raised(case: Case, **changes) -> nde.NeuralDEError:
    with pytest.raises(nde.NeuralDEError) as caught:
        solve(case, **changes)
    return caught.value


# -- raise ---------------------------------------------------------------------------------------------------------


@CASE
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_the_error_is_about_the_samples_that_failed(case, solver):
    """A failure ends the solve; the error is about whoever has failed by then, and no healthy sample."""
    method = nde.solvers.get(solver)
    error = raised(case, solver=solver, max_steps=10000)
    # Nothing solves z₁ = z - dt·sign(z₁) across zero: Newton's iteration does not converge, however small the step.
    unsolvable = case is CASES["discontinuity"] and solver == "implicit_euler"
    assert type(error) is (nde.NonFiniteState if unsolvable else case.error)
    assert error.samples and set(error.samples) <= set(case.failing)
    for column in (error.t, error.dt, error.error, error.stiffness):
        assert len(column) == len(error.samples)
        assert all(isinstance(x, float) for x in column)
    expected = [case.failing[i] for i in error.samples]
    # A method of lower order than its estimate is less accurate than the tolerance.
    within = case.within ** min(1.0, method.order / method.error_order)
    assert error.t == pytest.approx(expected, abs=within)
    assert "is stiff for" not in str(error)
    if case.status is Status.STEP_SIZE_UNDERFLOW:
        # The last attempt: as small as the precision of t allows, if it was for an error above the tolerance.
        assert all(0 < dt < 1e-14 for dt in error.dt)
        if case is CASES["discontinuity"] and not unsolvable:
            assert all(ratio > 1 for ratio in error.error)
        if solver in WITH_STIFFNESS:
            flat = method.parts[0].linearizes and case is CASES["discontinuity"]  # the derivative of sign is 0
            assert all(stiff == 0 if flat else stiff > 0 for stiff in error.stiffness)
    elif expected[0] > 0:
        assert all(0 < dt < 1e-14 for dt in error.dt)
    if case.status is Status.NON_FINITE:
        assert not any(math.isfinite(ratio) for ratio in error.error)
        if not method.parts[0].linearizes:  # which may have a Jacobian where the attempt started
            assert not any(math.isfinite(stiff) for stiff in error.stiffness), "no number can be made of NaN"
    if solver not in WITH_STIFFNESS:
        assert all(math.isnan(stiff) for stiff in error.stiffness)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_time_moves_in_every_accepted_step(solver):
    """Before a blow-up, steps get smaller than the precision of t: accepting them would solve at a time that stands."""
    solution = solve(CASES["blow-up"], solver=solver, on_failure="ignore")
    steps = solution.steps
    both = steps.mask[1:]
    assert (steps.t.diff(dim=0)[both] > 0).all()


@CASE
def test_the_message_has_what_the_error_has(case):
    error = raised(case)
    message = str(error)
    assert f"{len(error.samples)} of {len(case.z0)} samples" in message
    for sample, t in zip(error.samples, error.t, strict=True):
        assert f"sample {sample}: {case.status.name.lower()} at t = {t:.9g}" in message
    assert "dt = " in message and "error ratio = " in message and "stiffness = " in message
    assert case.status.message in message
    assert "Try" in message


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s not in WITH_ERROR])
def test_the_message_of_a_solver_without_an_error_estimate_shows_none(solver):
    message = str(raised(CASES["nan later"], **options(solver)))
    assert "error ratio = no estimate" in message


@pytest.mark.parametrize("name", ["nan at the start", "nan later"])
def test_nan_is_not_taken_for_a_missing_estimate(name):
    message = str(raised(CASES[name], solver="tsit5"))
    assert "stiffness = not finite" in message


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", ["nan at the start", "nan later"])
@pytest.mark.parametrize("solver", FIXED)
def test_fixed_steps_do_not_go_on_with_nan(solver, name, control):
    case = CASES[name]
    dt = 0.06
    error = raised(case, control=control, **options(solver, dt))
    assert type(error) is nde.NonFiniteState
    first = min(case.failing.values())
    if control == "per_sample":
        assert error.samples == list(case.failing)
    # The last steps that are finite end before f is NaN, or just behind, where all stages lie before.
    ends = list(case.failing.values()) if control == "per_sample" else [first] * len(error.t)
    assert all(abs(t - end) < dt for t, end in zip(error.t, ends, strict=True))
    if first:
        assert error.dt == pytest.approx([dt] * len(error.dt))


@pytest.mark.parametrize("solver", FIXED)
def test_fixed_steps_that_overflow(solver):
    case = CASES["blow-up"]
    error = raised(case, solver=solver, dt0=0.01)
    assert type(error) is nde.NonFiniteState
    assert error.samples == list(case.failing)


@CASE
@pytest.mark.parametrize("solver", ["tsit5", "bs3"])
def test_joint_control_fails_as_a_whole(case, solver):
    error = raised(case, control="joint", solver=solver)
    assert type(error) is case.error
    first = min(case.failing.values())
    # One step size for all: no sample got further than this.
    assert error.samples == list(range(len(case.z0)))
    assert error.t == pytest.approx([first] * len(case.z0), abs=case.within)
    assert "joint" in str(error) and case.status.message in str(error)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_max_steps(control, solver):
    """One sample is too stiff for the steps that it may take: the error knows how stiff."""
    rate = torch.tensor([[1.0], [5000.0], [2.0]], dtype=torch.float64)
    equation, z0 = nde.ODE(lambda t, z: -rate * z), torch.ones(3, 1, dtype=torch.float64)
    size, budget = nde.solvers.get(solver).stability_size, 60
    if size is None:  # stiffness costs no steps but those of the fast transient: no more than the others need
        calm = nde.solve(nde.ODE(lambda t, z: -rate[::2] * z), z0[::2], (0.0, 1.0), solver=solver).stats
        budget = int((calm.accepted + calm.rejected).max())
    with pytest.raises(nde.MaxStepsReached) as caught:
        nde.solve(equation, z0, (0.0, 1.0), solver=solver, control=control, max_steps=budget)
    error = caught.value
    assert "the step budget ran out" in str(error) and "raise max_steps" in str(error)
    limited = size is not None and solver in WITH_STIFFNESS
    assert (f"The problem is stiff for solver {solver!r}" in str(error)) is limited
    assert (Status.MAX_STEPS.message in str(error)) is not limited
    assert all(0.0 < t < 0.5 for t in error.t)
    assert all(0 < dt * 5000.0 < 4 * (size or math.inf) for dt in error.dt)
    if control == "per_sample":
        assert error.samples == [1]
        if solver in WITH_STIFFNESS:
            assert error.stiffness == pytest.approx([5000.0], rel=1e-6)
    if solver not in WITH_STIFFNESS:
        assert all(math.isnan(x) for x in error.stiffness)


@pytest.mark.parametrize("solver", SOLVERS)
def test_max_steps_counts_attempts(solver):
    """Exactly as many as are needed suffice, one less does not."""
    equation, z0 = nde.ODE(lambda t, z: -20.0 * torch.sin(9 * t) * z), torch.ones(1, 1, dtype=torch.float64)
    rtol = 1e-5 if nde.solvers.get(solver).order > 1 or solver not in ADAPTIVE else 1e-2
    needed = nde.solve(equation, z0, (0.0, 2.0), dt0=0.1, solver=solver, rtol=rtol).stats
    if solver in ADAPTIVE:
        assert needed.rejected > 0
    attempts = int(needed.accepted + needed.rejected)
    more = {"dt0": 0.1, "solver": solver, "rtol": rtol}
    assert nde.solve(equation, z0, (0.0, 2.0), max_steps=attempts, **more).converged.all()
    with pytest.raises(nde.MaxStepsReached):
        nde.solve(equation, z0, (0.0, 2.0), max_steps=attempts - 1, **more)


def test_healthy_samples_are_not_blamed():
    """The others go on when a sample fails, and arrive: only those that did fail are named."""
    case = CASES["nan later"]
    slow = torch.cat([case.state(), torch.tensor([[1.0, 3.0]], dtype=torch.float64)])
    error = raised(case, z0=slow, solver="rk4", dt0=1 / 64)
    assert type(error) is nde.NonFiniteState
    assert error.samples == list(case.failing)
    assert "2 of 5 samples" in str(error) and "max_steps" not in str(error)


def test_many_failures_are_counted():
    z0 = -torch.ones(9, 1)
    z0[4] = 1.0
    with pytest.raises(nde.NonFiniteState) as caught:
        nde.solve(nde.ODE(lambda t, z: torch.sqrt(z)), z0, (0.0, 1.0))
    assert caught.value.samples == [0, 1, 2, 3, 5, 6, 7, 8]
    assert "8 of 9 samples" in str(caught.value) and "and 3 more" in str(caught.value)


def test_failing_backwards_in_time():
    """t and dt are those of the user's time, dt negative."""
    f = nde.ODE(lambda t, z: -(z**2))  # in reversed time dz/ds = z²
    z0 = torch.tensor([[0.1], [4.0]], dtype=torch.float64)
    with pytest.raises(nde.StepSizeUnderflow) as caught:
        nde.solve(f, z0, (3.0, 2.0), rtol=1e-6)
    assert caught.value.samples == [1]
    assert caught.value.t == pytest.approx([2.75], abs=1e-5)
    assert -1e-14 < caught.value.dt[0] < 0


def test_one_hierarchy():
    for kind in (nde.StepSizeUnderflow, nde.NonFiniteState, nde.MaxStepsReached, nde.NotConverged):
        assert issubclass(kind, nde.NeuralDEError)
    assert not issubclass(nde.NeuralDEError, ValueError | TypeError)


def test_an_error_survives_pickling():
    """As it must between the processes of a data-parallel run."""
    error = raised(CASES["blow-up"])
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)
    assert (copy.samples, copy.t, copy.dt) == (error.samples, error.t, error.dt)


# -- warn and ignore -----------------------------------------------------------------------------------------------


def warned(case: Case, **changes):
    with pytest.warns(nde.SolveWarning) as caught:
        solution = solve(case, on_failure="warn", **changes)
    assert len(caught) == 1, "one solve warns once"
    return solution, str(caught[0].message)


def line_of(message: str, sample: int) -> str:
    found = [line for line in message.splitlines() if line.strip().startswith(f"sample {sample}:")]
    assert len(found) == 1, message
    return found[0].split(":", 1)[1]


@CASE
@pytest.mark.parametrize("solver", ["tsit5", "bs3"])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_other_samples_are_as_if_alone(case, solver, adjoint):
    t = torch.linspace(*case.t, 6, dtype=torch.float64)
    how = {"solver": solver, "adjoint": adjoint, "t": t}
    solution, message = warned(case, **how)
    expected = [case.status if i in case.failing else Status.SUCCESS for i in range(len(case.z0))]
    assert solution.status.tolist() == expected
    assert solution.converged.tolist() == [i not in case.failing for i in range(len(case.z0))]
    for i in case.good:
        alone = solve(case, rows=[i], **how)
        # Matrix products may sum in another order in a larger batch, so not bit for bit.
        torch.testing.assert_close(solution.zs[:, [i]], alone.zs, rtol=1e-12, atol=1e-14)
        for name in ("nfe", "accepted", "rejected"):
            assert getattr(solution.stats, name)[i] == getattr(alone.stats, name)[0]
    for i, end in case.failing.items():
        assert solution.final[i].isnan().all()
        values = solution.zs[1:, i]
        beyond = t[1:] > end + case.within
        assert values[beyond].isnan().all()
        # Up to there, the outputs are what they were.
        assert values[t[1:] < end - case.within].isfinite().all()
        assert torch.equal(solution.zs[0, i], case.state()[i])
    assert case.status.message in message


@CASE
def test_the_warning_tells_of_a_sample_what_its_own_error_would(case):
    """Also of one that failed long before the others were finished."""
    how = {"solver": "bs3", "rtol": 1e-6}
    _, message = warned(case, **how)
    for i in case.failing:
        alone = raised(case, rows=[i], **how)
        assert line_of(message, i) == line_of(str(alone), 0)


@pytest.mark.parametrize("solver", ["tsit5", "bs3", "rk4"])
def test_the_figures_of_a_failure_are_those_of_its_last_attempt(solver):
    """Though a slower sample goes on for a hundred attempts more."""
    z0 = torch.tensor([[1.0, 2.0], [1.0, 0.1]], dtype=torch.float64)
    rate = torch.tensor([[200.0], [1.0]], dtype=torch.float64)
    inner = until_its_time(1.0)

    def run(rows, **changes):
        f = nde.ODE(lambda t, z, rate: -rate * inner(t, z))
        return nde.solve(f, z0[rows], (0.0, 1.0), args=rate[rows], **options(solver, 1 / 128), **changes)

    with pytest.raises(nde.NonFiniteState) as alone:
        run([1])
    assert alone.value.dt[0] > 0
    with pytest.warns(nde.SolveWarning) as caught:
        solution = run([0, 1], on_failure="warn")
    assert solution.stats.accepted[0] > 60
    assert line_of(str(caught[0].message), 1) == line_of(str(alone.value), 0)


@CASE
@pytest.mark.parametrize("control", CONTROLS)
def test_ignore_is_silent_and_equals_warn(case, control):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ignored = solve(case, on_failure="ignore", control=control)
    reported, _ = warned(case, control=control)
    torch.testing.assert_close(ignored.zs, reported.zs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ignored.status, reported.status)


@CASE
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_joint_control_fails_for_all(case, adjoint):
    z0 = case.state().requires_grad_()
    solution, message = warned(case, z0=z0, control="joint", adjoint=adjoint)
    assert solution.status.tolist() == [case.status] * len(case.z0)
    assert not solution.converged.any()
    assert solution.final.isnan().all()
    assert torch.equal(solution.zs[0], z0)
    assert "joint" in message


def test_a_warning_is_an_error_where_the_project_says_so():
    with pytest.raises(nde.SolveWarning):
        solve(CASES["blow-up"], on_failure="warn")


@pytest.mark.parametrize("control", CONTROLS)
def test_success_does_not_warn(control):
    case = CASES["blow-up"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve(case, rows=case.good, on_failure="warn", control=control).converged.all()


@CASE
def test_dense_output_of_a_failed_sample(case):
    solution = solve(case, on_failure="ignore")
    torch.testing.assert_close(solution(case.t[0]), case.state(), rtol=0, atol=0)
    for i, end in case.failing.items():
        times = torch.tensor([end - 2 * case.within, end + 2 * case.within], dtype=torch.float64)
        before, after = solution(times.clamp(min=0.0))[:, i]
        assert before.isfinite().all() and after.isnan().all()
    torch.testing.assert_close(solution(case.t[1])[case.good], solution.final[case.good], rtol=1e-12, atol=1e-12)


def test_samples_fail_for_different_reasons():
    rate = torch.tensor([[1.0], [5000.0], [1.0], [1.0]], dtype=torch.float64)
    z0 = torch.tensor([[1.0], [1.0], [-1.0], [2.0]], dtype=torch.float64)
    f = nde.ODE(lambda t, z: -rate * torch.sqrt(z) * torch.sqrt(z))
    with pytest.warns(nde.SolveWarning) as caught:
        solution = nde.solve(f, z0, (0.0, 1.0), max_steps=50, on_failure="warn")
    assert solution.status.tolist() == [Status.SUCCESS, Status.MAX_STEPS, Status.NON_FINITE, Status.SUCCESS]
    message = str(caught[0].message)
    assert "sample 1: max_steps" in message and "sample 2: non_finite" in message
    assert Status.MAX_STEPS.message in message and Status.NON_FINITE.message in message


@pytest.mark.parametrize("on_failure", ["raise", "warn", "ignore"])
def test_a_layer_does_the_same(on_failure):
    case = CASES["blow-up"]
    layer = nde.NeuralODE(case.f(1.0), case.t, on_failure=on_failure, **case.solve)
    if on_failure == "raise":
        with pytest.raises(nde.StepSizeUnderflow):
            layer(case.state())
        assert layer.solution is None
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        final = layer(case.state())
    assert len(caught) == (on_failure == "warn")
    assert final.isnan().any(dim=1).nonzero().flatten().tolist() == list(case.failing)


# -- gradients -----------------------------------------------------------------------------------------------------


def gradients(case: Case, rows, adjoint, loss, how):
    """Those of the given samples' loss, with respect to z0 and w."""
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    z0 = case.state().requires_grad_()
    solution = solve(case, w, rows, z0=z0, adjoint=adjoint, on_failure="ignore", **how)
    kept = list(range(len(z0))) if rows is None else rows
    good = [k for k, i in enumerate(kept) if i in case.good]
    return torch.autograd.grad(loss(solution, good), [z0, w])


LOSSES = {
    "final": lambda s, good: (s.final[good] ** 2).sum(),
    "outputs": lambda s, good: (s.zs[1:, good] ** 2).sum(),
    "figures": lambda s, good: s.error[good].sum() + s.stiffness[good].sum(),
}


@CASE
@pytest.mark.parametrize(
    ("adjoint", "name"), [(a, name) for a in ADJOINTS for name in LOSSES if a in EXACT or name != "figures"]
)
def test_gradients_of_the_good_samples_do_not_notice_the_others(case, adjoint, name):
    loss, how = LOSSES[name], {"t": torch.linspace(*case.t, 4, dtype=torch.float64)}
    z0, w = gradients(case, None, adjoint, loss, how)
    alone_z0, alone_w = gradients(case, case.good, adjoint, loss, how)
    assert w.isfinite() and z0.isfinite().all()
    close(z0, alone_z0, 1e-9)
    close(w, alone_w, 1e-9)
    assert (z0[list(case.failing)] == 0).all()


# Fixed steps do not notice a discontinuity.
@pytest.mark.parametrize(
    ("case", "solver"),
    [
        pytest.param(case, solver, id=f"{name}-{solver}")
        for name, case in CASES.items()
        for solver in [*FIXED, "bs3", "dopri8"]
        if name != "discontinuity" or solver in ADAPTIVE
    ],
)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_gradients_of_the_good_samples_with_other_solvers(case, adjoint, solver):
    # (At 1e-3 a step of bs3 ends just where f stays finite and its derivative does not: its own sample has NaN then.)
    how = options(solver, 0.06) | {"rtol": 1e-4}
    loss = LOSSES["final"]
    z0, w = gradients(case, None, adjoint, loss, how)
    alone_z0, alone_w = gradients(case, case.good, adjoint, loss, how)
    close(z0, alone_z0, 1e-9)
    close(w, alone_w, 1e-9)


@pytest.mark.parametrize("name", ["nan at the start", "nan later"])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_gradients_where_f_holds_a_tensor_of_the_whole_batch(name, adjoint):
    """Then f can't be called on the good samples alone, and the failed ones are in every evaluation."""
    case = CASES[name]
    control = torch.linspace(0.5, 1.0, len(case.z0), dtype=torch.float64)[:, None]

    def run(rows):
        w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        z0 = case.state()[rows].requires_grad_()
        held = control[rows]
        inner = case.f(w)
        f = nde.ODE(lambda t, z: inner(t, z) * held)
        solution = nde.solve(f, z0, case.t, adjoint=adjoint, on_failure="ignore")
        return solution.final, torch.autograd.grad((solution.final[solution.converged] ** 2).sum(), [z0, w])

    final, (z0, w) = run(list(range(len(case.z0))))
    alone, (alone_z0, alone_w) = run(case.good)
    torch.testing.assert_close(final[case.good], alone, rtol=1e-11, atol=1e-12)
    close(z0[case.good], alone_z0, 1e-9)
    close(w, alone_w, 1e-9)


@pytest.mark.parametrize("adjoint", ADJOINTS)
# (Where f holds the whole batch's tensors itself, it can't be called without a sample that is NaN from the start.)
@pytest.mark.parametrize(("given", "end"), [("args", -0.1), ("args", 0.4), ("closed over", 0.4)])
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_gradients_where_the_samples_own_tensors_say_how_far_f_goes(adjoint, given, solver, end):
    """A failed sample can be evaluated at no other sample's time or state: with its own c, √(c - t) is NaN there."""
    until = torch.tensor([[2.0], [end], [1.5]], dtype=torch.float64)

    def run(rows):
        w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        z0 = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)[rows].requires_grad_()
        held = until[rows]

        def f(t, z, c=held):
            return torch.sqrt(c - t) * w * z

        args = held if given == "args" else None
        how = {"adjoint": adjoint, "args": args, "on_failure": "ignore", **options(solver, 0.06)}
        solution = nde.solve(nde.ODE(f), z0, (0.0, 1.0), **how)
        between = [solution(0.3)] if adjoint in DENSE else []
        out = torch.stack([solution.final, *between])[:, solution.converged]
        return out, torch.autograd.grad((out**2).sum(), [z0, w])

    out, (z0, w) = run([0, 1, 2])
    alone, (alone_z0, alone_w) = run([0, 2])
    torch.testing.assert_close(out, alone, rtol=1e-11, atol=1e-12)
    close(z0[[0, 2]], alone_z0, 1e-9)
    close(w, alone_w, 1e-9)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_gradients_where_the_samples_go_in_different_directions(adjoint):
    """Nor at another's time run backwards: √t is NaN at -t."""
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    z0 = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.5, 2.0], [2.0, 0.5]], dtype=torch.float64)
    f = nde.ODE(lambda t, z: w * torch.sqrt(t) * torch.sqrt(z))
    final = nde.solve(f, z0, t, adjoint=adjoint, on_failure="ignore").final[0]
    mine = torch.autograd.grad(final.sum(), [z0, w])
    alone = nde.solve(f, z0[:1], t[:1], adjoint=adjoint).final[0]
    expected = torch.autograd.grad(alone.sum(), [z0, w])
    for a, b in zip(mine, expected, strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_when_nobody_makes_a_step(adjoint, control, dense, solver):
    """Everything can still be asked for, and is empty, zero or NaN."""
    w = torch.tensor(1.0, requires_grad=True)
    z0 = -torch.ones(3, 2)
    how = {"adjoint": adjoint, "control": control, "dense": dense, **options(solver)}
    solution = nde.solve(nde.ODE(lambda t, z: w * torch.sqrt(z)), z0, (0.0, 0.5, 1.0), on_failure="ignore", **how)
    steps = solution.steps
    assert len(steps) == 0
    assert steps.t.shape == steps.dt.shape == steps.mask.shape == steps.stiffness.shape == (0, 3)
    assert steps.z.shape == (0, 3, 2)
    assert torch.equal(solution.stiffness, torch.zeros(3))
    if solver == "tsit5":
        assert steps.error.shape == (0, 3) and torch.equal(solution.error, torch.zeros(3))
    assert torch.equal(solution(0.0), z0) and solution(0.7).isnan().all()
    assert torch.equal(solution.zs[0], z0) and solution.zs[1:].isnan().all()
    assert "3 of 3 samples failed" in repr(solution)
    axes = solution.plot(sample=1)
    assert "0 steps" in axes[0].get_title()
    plt.close(axes[0].figure)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_gradients_when_every_sample_fails(adjoint):
    """Nothing is left to learn from, and nothing is NaN."""
    case = CASES["nan later"]
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    z0 = case.state()[list(case.failing)].requires_grad_()
    solution = solve(case, w, z0=z0, adjoint=adjoint, on_failure="ignore")
    assert not solution.converged.any()
    loss = (solution.final[solution.converged] ** 2).sum() + (w * z0).sum()
    grad_z0, grad_w = torch.autograd.grad(loss, [z0, w])
    assert torch.equal(grad_z0, torch.ones_like(z0)) and grad_w == z0.sum()
