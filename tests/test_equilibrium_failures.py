"""Steady states that are not reached: said sample by sample, and no harm to the other samples."""

import warnings

import pytest
import torch
from helpers import EQUILIBRIUM, SOLVERS, STEADY, options, refused

import neuralde as nde
import regularizers as reg
from neuralde import Status

D = torch.float64


def troubled(z, args):
    """Sample by sample: a contraction, no fixed point, an expanding map, NaN beyond 1, ten thousand iterations.

    args: [batch, 2], the kind of the sample and a parameter, 1 times which is added.
    """
    kind, shift = args[:, :1], args[:, 1:]
    kinds = [
        0.5 * z + shift,
        z + shift,
        2.0 * z + shift,
        torch.where(z > 1.0, float("nan"), 0.5 * z + 1.0) + shift,
        0.999 * z + 1e-3 * shift,
    ]
    out = torch.zeros_like(z)
    for i, value in enumerate(kinds):
        out = torch.where(kind == i, value, out)
    return out


def everyone():
    kinds = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 0.0], dtype=D)
    return torch.stack([kinds, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -2.0], dtype=D)], dim=1)


def test_each_is_reported_with_its_residual_and_advice():
    args = everyone()
    given = {"solver": "fixed_point", "args": args, "rtol": 1e-6, "atol": 1e-9, "max_steps": 200}
    with pytest.warns(nde.SolveWarning) as caught:
        solution = nde.solve(nde.SteadyState(troubled), torch.zeros(6, 1, dtype=D), **given)
    assert solution.status.tolist() == [
        Status.SUCCESS, Status.MAX_STEPS, Status.DIVERGED, Status.NON_FINITE, Status.MAX_STEPS, Status.SUCCESS
    ]  # fmt: skip
    assert solution.converged.tolist() == [True, False, False, False, False, True]
    assert bool(torch.isfinite(solution.final).all()) and bool(torch.isfinite(solution.residual).all())
    close = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(solution.final[[0, 5], 0], torch.tensor([2.0, -4.0], dtype=D), **close)
    text = str(caught[0].message)
    assert "4 of 6 samples did not reach a steady state with solver 'fixed_point'" in text
    for i in (1, 2, 3, 4):
        status = Status(int(solution.status[i])).name.lower()
        assert f"sample {i}: {status} after {int(solution.depth[i])} steps" in text
        assert f"residual = {float(solution.residual[i]):.4g}" in text
    for word in ("anderson", "damping", "log or square root", "max_steps", "EquilibriumJacobian"):
        assert word in text
    with refused(nde.NotConverged, "sample 2: diverged") as raised:
        nde.solve(nde.SteadyState(troubled), torch.zeros(6, 1, dtype=D), on_failure="raise", **given)
    assert raised.value.samples == [1, 2, 3, 4]
    assert raised.value.residual == pytest.approx(solution.residual[1:5].tolist()) and raised.value.tolerance == 1e-6


@pytest.mark.parametrize("solver", [s for s in EQUILIBRIUM if s != "newton"] + ["tsit5", "vcab3"])
def test_warned_of_by_default_and_never_silent(solver):
    """No fixed point at all: tanh has none above 1 beside a shift that grows."""
    equation = nde.SteadyState(lambda z: z + 1.0 + 0.1 * torch.tanh(z))
    given = {"solver": solver, "max_steps": 50}
    with pytest.warns(nde.SolveWarning, match="2 of 2 samples"):
        solution = nde.solve(equation, torch.zeros(2, 1, dtype=D), **given)
    assert not bool(solution.converged.any())
    with pytest.raises(nde.NotConverged):
        nde.solve(equation, torch.zeros(2, 1, dtype=D), on_failure="raise", **given)


@pytest.mark.parametrize("adjoint", STEADY)
@pytest.mark.parametrize("bad", ["state", "input"])
def test_training_continues_on_the_others(adjoint, bad):
    """Gradients are those of a batch without the samples that got lost, whether z or their input makes NaN of f."""

    def f(z, x, w):
        value = torch.tanh(w * z + 0.5 * x)
        return torch.where((z > 0.5) & (x > 5.0), torch.log(-z.abs()), value) if bad == "state" else value

    def gradients(x):
        w = torch.tensor(0.7, dtype=D, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nde.SolveWarning)
            solution = nde.solve(
                nde.SteadyState(lambda z, x: f(z, x, w)), torch.zeros(len(x), 1, dtype=D), args=x,
                solver="fixed_point", adjoint=adjoint, rtol=1e-9, atol=1e-10,
            )  # fmt: skip
        fine = solution.converged
        return solution.status.tolist(), torch.autograd.grad(solution.final[fine].square().sum(), w)[0]

    good = torch.tensor([[0.3], [-1.0], [0.8]], dtype=D)
    lost = torch.tensor([[30.0 if bad == "state" else float("nan")]], dtype=D)
    statuses, together = gradients(torch.cat([good[:1], lost, good[1:]]))
    assert statuses == [Status.SUCCESS, Status.NON_FINITE, Status.SUCCESS, Status.SUCCESS]
    _, alone = gradients(good)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "newton", "tsit5"])
@pytest.mark.parametrize("big", [torch.inf, 1e38])
def test_a_sample_that_overflows_at_once_is_reported_alone(solver, big):
    x = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)
    x[2] = big
    x.requires_grad_()
    with pytest.warns(nde.SolveWarning, match="1 of 6 samples"):
        solution = nde.solve(
            nde.SteadyState(lambda z, x: 10.0 * (0.05 * z + x)), torch.zeros(6, 2), args=x, solver=solver
        )
    others = [0, 1, 3, 4, 5]
    assert solution.status[2] == Status.NON_FINITE and bool(solution.converged[others].all())
    torch.testing.assert_close(solution.final[others], 20.0 * x[others], rtol=5e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(solution.final[others].sum(), x)
    torch.testing.assert_close(gradient[others], torch.full((5, 2), 20.0), rtol=1e-3, atol=0.0)
    assert not bool(gradient[2].any())


def test_a_lost_sample_hands_no_gradient_on():
    args = everyone().requires_grad_()
    with pytest.warns(nde.SolveWarning):
        solution = nde.solve(
            nde.SteadyState(troubled), torch.zeros(6, 1, dtype=D), args=args, solver="fixed_point", max_steps=100
        )
    with pytest.warns(nde.SolveWarning, match="linear systems of samples 1 were"):  # 1 - ∂f/∂z = 0 there
        (gradient,) = torch.autograd.grad(solution.final.sum(), args)
    assert bool(torch.isfinite(gradient).all())
    assert gradient[[0, 5], 1].tolist() == pytest.approx([2.0, 2.0], rel=1e-6)
    assert gradient[[2, 3], 1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("adjoint", [a for a in STEADY if a != "direct"])
def test_a_batch_that_is_lost_as_a_whole_hands_zeros_on(adjoint):
    """Not nothing: a parameter without a gradient would stop torch's DistributedDataParallel."""
    f, x = torch.nn.Linear(1, 1).double(), torch.full((2, 1), float("nan"), dtype=D).requires_grad_()
    given = {"args": x, "solver": "fixed_point", "adjoint": adjoint, "on_failure": "ignore"}
    solution = nde.solve(nde.SteadyState(lambda z, x: f(z) + x), torch.zeros(2, 1, dtype=D), **given)
    assert solution.status.tolist() == [Status.NON_FINITE] * 2
    solution.final.sum().backward()
    assert all(p.grad is not None and not bool(p.grad.any()) for p in (*f.parameters(), x))


def test_a_linear_system_that_is_not_solved_warns():
    matrix = torch.diag(torch.linspace(0.1, 0.99, 12, dtype=D))[None].requires_grad_()
    equation = nde.SteadyState(lambda z, a: (a @ z[..., None])[..., 0] + 1.0)
    given = {"args": matrix, "solver": "newton", "rtol": 1e-8}
    solution = nde.solve(equation, torch.zeros(1, 12, dtype=D), adjoint=nde.adjoints.Implicit(max_iter=3), **given)
    with pytest.warns(nde.SolveWarning, match="linear systems of samples 0"):
        torch.autograd.grad(solution.final.square().sum(), matrix)
    assert solution.backward_stats.linear_solves.tolist() == [3]
    solution = nde.solve(
        equation, torch.zeros(1, 12, dtype=D), adjoint=nde.adjoints.Implicit(restart=4, max_iter=500), **given
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(solution.final.square().sum(), matrix)


def test_a_stall_is_seen():
    """The residual stays at twice the tolerance: the original test, max < 1.3·min, ends it."""
    equation = nde.SteadyState(lambda z: z + 2e-3 * torch.sign(torch.sin(1e6 * z) + 2.0))
    termination = nde.Termination("absolute", atol=1e-3)
    given = {"solver": "fixed_point", "on_failure": "ignore"}
    solution = nde.solve(equation, torch.zeros(1, 1, dtype=D), termination=termination, **given)
    assert solution.status.tolist() == [Status.NOT_CONVERGED] and 30 <= int(solution.depth) <= 40
    patient = nde.Termination("absolute", atol=1e-3, patience=None)
    solution = nde.solve(equation, torch.zeros(1, 1, dtype=D), termination=patient, max_steps=100, **given)
    assert solution.status.tolist() == [Status.MAX_STEPS] and int(solution.depth) == 100


@pytest.mark.parametrize("observer", [None, object()])
def test_a_residual_that_falls_slowly_is_no_stall(observer):
    """By 2 % in the 30 steps that are looked at; the papers' own test ends it."""
    equation, z0 = nde.SteadyState(lambda z: 0.9993 * z + 1e-3), torch.zeros(1, 1, dtype=D)
    given = {"solver": "fixed_point", "observer": observer}
    solution = nde.solve(equation, z0, termination=nde.Termination("absolute", atol=7e-4), **given)
    assert solution.converged.tolist() == [True] and int(solution.depth) == 510
    of_papers = nde.Termination("absolute", atol=7e-4, fall=0.25)
    with pytest.warns(nde.SolveWarning, match="patience=None"):
        ended = nde.solve(equation, z0, termination=of_papers, **given)
    assert ended.status.tolist() == [Status.NOT_CONVERGED] and int(ended.depth) == 32


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden", "tsit5"])
def test_a_residual_that_does_not_fall_ends_a_sample(solver):
    """z + 1 has no fixed point; the sample beside it does not notice."""
    equation = nde.SteadyState(lambda z, step: torch.where(step > 0, z + step, 0.5 * z + 1.0))
    step, z0 = torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1)
    with pytest.warns(nde.SolveWarning, match="no residual was a new least one in 80 steps.* no fixed point"):
        solution = nde.solve(equation, z0, args=step, solver=solver, termination=nde.Termination(patience=8))
    assert solution.status.tolist() == [Status.NOT_CONVERGED, Status.SUCCESS]
    assert 80 <= int(solution.stats.accepted[0] + solution.stats.rejected[0]) <= 130


@pytest.mark.parametrize("solver", [*EQUILIBRIUM, "tsit5", "rodas5p"])
def test_no_solver_is_told_to_be_taken_that_was(solver):
    def advice(f, **given):
        with pytest.warns(nde.SolveWarning) as caught:
            nde.solve(nde.SteadyState(f), torch.zeros(1, 1, dtype=D), solver=solver, **given)
        return str(caught[0].message).partition("\n")[2]

    some = {s for s in (*EQUILIBRIUM, "tsit5") if s != solver}
    near = nde.Termination(rtol=0.5, patience=4)
    for text in (
        advice(lambda z: z + 1.0, max_steps=5),
        advice(lambda z: z + 1.0, termination=nde.Termination(patience=4)),
        advice(lambda z: z + 1.0, termination=near),
    ):
        asked = text[text.lower().index("take ") :]
        assert any(s in asked for s in some) and repr(solver) not in asked
    assert "patience=None" in text


def test_a_tolerance_below_the_precision_of_f_is_said():
    equation = nde.SteadyState(lambda z: torch.where(z > 1.0, 1.0, 1.0 + 2**-7).to(z.dtype))
    with pytest.warns(nde.SolveWarning, match="torch.bfloat16, whose precision is 0.0078"):
        nde.solve(equation, torch.zeros(1, 1, dtype=torch.bfloat16), solver="fixed_point", max_steps=20)


def test_the_best_iterate_is_kept():
    equation = nde.SteadyState(lambda z: -1.2 * z + 1.0)
    given = {"solver": "fixed_point", "max_steps": 9, "on_failure": "ignore"}
    z0 = torch.tensor([[0.5]], dtype=D)
    best = nde.solve(equation, z0, termination="absolute", **given)
    assert torch.equal(best.final, z0) and float(best.residual) == pytest.approx(0.1)
    last = nde.solve(equation, z0, termination=nde.Termination("absolute", best=False), **given)
    assert float((last.final - 1 / 2.2).detach().abs()) == pytest.approx(1.2**9 * (0.5 - 1 / 2.2))


def test_what_does_not_go_together():
    steady, ode, z = nde.SteadyState(lambda z: 0.5 * z), nde.ODE(lambda t, z: -z), torch.ones(1, 1)
    for solver in EQUILIBRIUM:
        with refused(ValueError, solver, "nde.SteadyState", *SOLVERS):
            nde.solve(ode, z, (0.0, 1.0), solver=solver)
        with refused(ValueError, solver, "tsit5"):
            nde.probe(lambda t, z: -z, 0.0, z, solver=solver)
        with refused(ValueError, solver, "tsit5"):
            nde.adjoints.Backsolve(solver=solver)
        with refused(ValueError, "dt0", solver):
            nde.solve(steady, z, solver=solver, dt0=0.5)
    for adjoint in nde.adjoints.ADJOINTS:
        if adjoint not in STEADY:
            with refused(ValueError, adjoint, "steady state", *STEADY):
                nde.solve(steady, z, adjoint=adjoint)
        elif adjoint != "direct":
            with refused(ValueError, adjoint, "horizon", "checkpointed"):
                nde.solve(ode, z, (0.0, 1.0), adjoint=adjoint)
    for solver in ("anderson", "broyden", "newton"):
        with refused(ValueError, "direct", solver, "implicit", "fixed_point"):
            nde.solve(steady, z, solver=solver, adjoint="direct")
    for name, value in {"jump_times": [0.5], "step_times": [0.5], "events": nde.Event(lambda t, z: z[:, 0])}.items():
        with refused(ValueError, name, "steady state"):
            nde.solve(steady, z, **{name: value})
    with refused(ValueError, "termination", "horizon"):
        nde.solve(ode, z, (0.0, 1.0), termination="norm")
    with refused(TypeError, "atol", "nde.Termination"):
        nde.solve(steady, z, atol=torch.ones(1))
    nde.solve(steady, z, atol=torch.full((1,), 1e-6), termination=nde.Termination(atol=1e-6))
    with refused(TypeError, "SteadyState.of"):
        nde.SteadyState(ode)
    with refused(ValueError, "shape of z", "(1, 1)"):
        nde.solve(nde.SteadyState(lambda z: z[0]), z)
    with refused(nde.NeuralDEError, "torch.func", "euler"):
        torch.func.grad(lambda z: nde.solve(steady, z).final.sum())(z)
    with pytest.warns(UserWarning, match="compile"):
        nde.solve(steady, z, solver="newton", compile=True)
    for t in (0.0, -1.0, (1.0, 1.0)):
        with refused(ValueError, "t must"):
            nde.solve(steady, z, t)
    with refused(TypeError, "t must"):
        nde.solve(steady, z, "long")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"mode": "abs"}, ValueError), ({"norm": "l1"}, ValueError), ({"rtol": 0.0}, ValueError),
        ({"atol": -1.0}, ValueError), ({"rtol": "tight"}, TypeError), ({"best": 1}, TypeError),
        ({"divergence": 0.5}, ValueError), ({"divergence": "far"}, TypeError), ({"patience": 1}, ValueError),
        ({"patience": 2.5}, TypeError), ({"fall": 1.0}, ValueError), ({"fall": None}, TypeError),
    ],
)  # fmt: skip
def test_termination_names_what_is_wrong(given, error):
    (name,) = given
    with refused(error, name):
        nde.Termination(**given)


def test_objects_name_what_is_wrong():
    s, a = nde.solvers, nde.adjoints
    for make, name, value in (
        (s.FixedPoint, "damping", 0.0), (s.FixedPoint, "damping", 1.5), (s.Anderson, "memory", 0),
        (s.Anderson, "beta", 2.0), (s.Anderson, "regularization", -1.0), (s.Broyden, "memory", 0),
        (s.Newton, "forcing", 0.0), (s.Newton, "restart", 0), (a.Implicit, "max_iter", 0), (a.Implicit, "rtol", 0.0),
        (a.Implicit, "solver", "tsit5"), (a.Implicit, "solver", "cg"), (a.Neumann, "terms", 0), (a.Phantom, "steps", 0),
        (a.Phantom, "damping", 0.0),
        (reg.EquilibriumJacobian, "probability", 1.5), (reg.EquilibriumJacobian, "samples", 0),
    ):  # fmt: skip
        with refused(ValueError, name):
            make(**{name: value})
    for make, name in ((s.Broyden, "line_search"), (s.Newton, "line_search"), (reg.Skip, "detach_target")):
        with refused(TypeError, name):
            make(**{name: "yes"})


@pytest.mark.parametrize("solver", ["euler", "bs3", "auto"])
def test_joint_control_fails_as_one(solver):
    equation = nde.SteadyState(lambda z: 2.0 * z + 1.0)
    with pytest.warns(nde.SolveWarning, match="the batch"):
        solution = nde.solve(
            equation, torch.zeros(3, 1, dtype=D), **options(solver, dt0=0.5), control="joint", max_steps=300
        )
    assert solution.status.tolist() == [Status.DIVERGED] * 3


def test_advice_is_given_once():
    """A training warns at every step: the numbers are of the step, what to try stays the same."""

    def f(z):
        return 2.0 * z + 1.0

    def warned(max_steps, solver="fixed_point", **options):
        options = {"max_steps": max_steps, "solver": solver, **options}
        with pytest.warns(nde.SolveWarning) as caught:
            nde.solve(nde.SteadyState(f), torch.zeros(3, 1, dtype=D), **options)
        return str(caught[0].message)

    first, again, other, known = warned(3), warned(4), warned(100), warned(5)
    assert "raise max_steps" in first and "sample 0: max_steps after 3 steps" in first
    assert "sample 2: max_steps after 4 steps, residual = 1" in again and "raise max_steps" not in again
    assert "diverged" in other and "start nearer" in other
    assert "after 5 steps" in known and "raise max_steps" not in known
    # What another solver is advised is other advice.
    assert "Take solver='broyden'" in warned(1, "anderson", termination="absolute")
