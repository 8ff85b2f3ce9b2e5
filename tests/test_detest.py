"""The DETEST problems: the error at the end of the horizon, of every adaptive solver that suits."""

import pytest
from detest import END, PROBLEMS, TOLERANCES, suits

import neuralde as nde

SUITED = {t: [name for name, solver in nde.solvers.SOLVERS.items() if suits(solver, t)] for t in TOLERANCES}

# Order 2 doesn't suit (rosenbrock23 would miss B4 at 1e-3, by 429 tolerances), nor order 3 at 1e-9 (bs3 would miss B1).
# Known to be over the bound, and why. Strict: what meets it after all fails, and is to be deleted here.
_ORDER_3 = "150 tolerances; the bound is for order 5: SciPy's RK23, of order 3, is 317 off, and RK45 28"
_ADAMS = "an Adams method without corrector has the largest error constant of its order: up to 3.7 times the bound"
_PI = "571 and 377 tolerances; Hairer's DOPRI5, controlled alike, 499 and 393; RK45's phase error is 0 near 1e-6"
MISSES = {
    ("bs3", "B1", 1e-6): _ORDER_3,
    ("dopri5", "D3", 1e-6): _PI,
    ("dopri5", "D4", 1e-6): _PI,
    ("vcab3", "D4", 1e-3): _ADAMS,
} | {("vcab3", problem, 1e-6): _ADAMS for problem in ("B1", "B5", "D3", "D4", "D5")}


def cases():
    for tolerance, names in SUITED.items():
        for solver in names:
            for problem in PROBLEMS:
                missed = MISSES.get((solver, problem, tolerance))
                marks = [] if missed is None else [pytest.mark.xfail(reason=missed, strict=True)]
                yield pytest.param(solver, tolerance, problem, marks=marks)


def require_global_error(solver, tolerance, problem, **options):
    problem = PROBLEMS[problem]
    solution = nde.solve(
        nde.ODE(problem.f),
        problem.z0,
        (0.0, END),
        solver=solver,
        rtol=tolerance,
        atol=tolerance,
        max_steps=10**6,
        **options,
    )
    error = problem.error(solution.final)
    assert error <= problem.bound(tolerance), f"{error / tolerance:.3g} tolerances"


@pytest.mark.parametrize(("solver", "tolerance", "problem"), cases())
def test_global_error(solver, tolerance, problem):
    require_global_error(solver, tolerance, problem)


# The default safety of 0.9 is that of the papers' code, whose step counts it reproduces. A smaller one moves a method
# along its own line of work and precision: then nothing is missed.
CAUTIOUS = nde.StepControl(safety=0.7)


@pytest.mark.parametrize(
    ("solver", "problem", "tolerance"),
    [pytest.param(*at, marks=[pytest.mark.slow] if at[0] == "vcab3" and at[2] < 1e-3 else []) for at in MISSES],
)
def test_what_the_default_safety_misses_holds_with_a_smaller_one(solver, problem, tolerance):
    require_global_error(solver, tolerance, problem, control=CAUTIOUS)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("tolerance", "solver"), [(t, name) for t, names in SUITED.items() for name in names])
def test_nothing_is_missed_with_a_smaller_safety(solver, tolerance, problem):
    require_global_error(solver, tolerance, problem, control=CAUTIOUS)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_reference(problem):
    """The states at the end, found in another way: by a method of order 8 at the smallest tolerance it takes."""
    assert problem.error(problem.scipy("DOP853", 1e-13, 1e-14).y[:, -1]) < 2e-11


def test_every_solver_of_high_order_is_covered():
    high = {"dopri5", "tsit5", "dopri8", "rodas5p", "auto"}
    assert all(high <= set(names) for names in SUITED.values())
    assert all({"bs3", "vcab3"} <= set(SUITED[tolerance]) for tolerance in (1e-3, 1e-6))
    assert len(PROBLEMS) == 25
