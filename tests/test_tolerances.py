"""Tolerances of single components, and norms of one's own."""

import math

import pytest
import torch
from helpers import ADAPTIVE, CONTROLS, EXACT, close, refused

import neuralde as nde
import regularizers as reg

INF = float("inf")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def circle(t, z):
    return torch.stack([z[:, 1], -z[:, 0]], dim=1)


def mixed(t, z):
    """A slow component and a fast one."""
    return torch.stack([-z[:, 0], -8 * torch.sin(8 * z[:, 1]) + z[:, 0]], dim=1)


def start():
    return double([1.0, 0.3], [2.0, 0.1], [0.5, -0.2])


def by_definition(solution, rtol, atol, joint, norm=None):
    """The error ratios of a solve's steps from solves of one step each, [step, batch]: a fixed step, error by hand.

    The estimate itself is read off with tolerances that don't depend on the state, one component at a time.
    """
    steps, ratios = solution.steps, torch.zeros_like(solution.steps.error)
    options = {"solver": solution.solver, "control": nde.StepControl(adaptive=False)}
    f = solution._problem.field.equation
    for j in range(len(steps)):
        for b in range(steps.mask.shape[1]) if not joint else (None,):
            rows = slice(None) if joint else slice(b, b + 1)
            if not joint and not steps.mask[j, b]:
                continue
            t, dt = (float(x[j, 0 if joint else b]) for x in (steps.t, steps.dt))
            z = steps.z[j, rows].detach()
            parts = []
            for i in range(z.shape[1]):
                alone = torch.full((z.shape[1],), INF, dtype=torch.float64)
                alone[i] = 1.0
                one = nde.solve(f, z, (t, t + dt), dt0=abs(dt), rtol=torch.zeros(()), atol=alone, **options)
                assert len(one.steps) == 1
                parts.append(one.steps.error[0] * z.shape[1] ** 0.5)
                end = one.final
            error = torch.stack(parts, dim=1)
            size = torch.maximum(z.abs(), end.abs())
            scaled = error / (
                (atol if not isinstance(atol, torch.Tensor) or len(atol) == 1 else atol[rows])
                + (rtol if not isinstance(rtol, torch.Tensor) or len(rtol) == 1 else rtol[rows]) * size
            )
            if norm is not None:
                ratios[j, rows] = norm(scaled)
            else:
                ratios[j, rows] = (scaled**2).mean().sqrt() if joint else (scaled**2).mean(dim=1).sqrt()
    return ratios


@pytest.mark.parametrize("solver", ["tsit5", "bs3", "rodas5p"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_error_ratio_by_definition(solver, rows):
    rtol, atol = (
        double([1e-3, 1e-5], [1e-4, 1e-3], [1e-2, 1e-6])[:rows],
        double([1e-4, 1e-6], [1e-3, 1e-5], [1e-5, 1e-3])[:rows],
    )
    solution = nde.solve(nde.ODE(mixed), start(), (0.0, 1.0), solver=solver, rtol=rtol, atol=atol)
    expected = by_definition(solution, rtol, atol, joint=False)
    torch.testing.assert_close(solution.steps.error, expected, rtol=1e-6, atol=1e-10)
    # In the joint norm every number counts alike; the error's parts of one component are RMS over the batch there.
    again = nde.introspection.replay(solution)
    # An estimate is a sum of slopes (8 here, times a step) that cancels down to it: what rounding leaves, some 1e-15,
    # is over the smallest tolerance here.
    torch.testing.assert_close(again.steps.error, solution.steps.error, rtol=1e-9, atol=1e-14 / float(atol.min()))


SHAPES = {
    "number": lambda x: x,
    "0-d": lambda x: torch.tensor(x),
    "features": lambda x: torch.full((2,), x),
    "row": lambda x: torch.full((1, 2), x),
    "one per sample": lambda x: torch.full((3, 1), x),
    "full": lambda x: torch.full((3, 2), x, dtype=torch.float64),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_constant_tensors_are_numbers(solver, control, shape):
    given = {"solver": solver, "control": control}
    one = nde.solve(nde.ODE(circle), start(), (0.0, 2.0), rtol=2.0**-9, atol=2.0**-12, **given)
    two = nde.solve(nde.ODE(circle), start(), (0.0, 2.0), rtol=shape(2.0**-9), atol=shape(2.0**-12), **given)
    assert torch.equal(one.stats.nfe, two.stats.nfe) and torch.equal(one.stats.rejected, two.stats.rejected)
    torch.testing.assert_close(one.final, two.final, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.steps.error, two.steps.error, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("control", CONTROLS)
def test_structures(control):
    def f(t, z):
        return {"a": -z["a"], "b": -8 * torch.sin(8 * z["b"]) + z["a"][:, :, None]}

    def flat(t, z):
        return torch.stack([-z[:, 0], *(-8 * torch.sin(8 * z[:, i]) + z[:, 0] for i in (1, 2))], dim=1)

    z = torch.cat([start(), 0.1 + start()[:, 1:]], dim=1)
    z0 = {"a": z[:, :1], "b": z[:, None, 1:]}
    own = double([1e-3], [1e-4], [1e-6])
    given = {"t": (0.0, 1.0), "control": control}
    one = nde.solve(nde.ODE(f), z0, rtol={"a": 1e-2, "b": 1e-5}, atol={"a": own, "b": double(1e-6, 1e-4)}, **given)
    two = nde.solve(
        nde.ODE(flat),
        z,
        rtol=double(1e-2, 1e-5, 1e-5),
        atol=torch.cat([own, double(1e-6, 1e-4).expand(3, 2)], dim=1),
        **given,
    )
    assert torch.equal(one.stats.nfe, two.stats.nfe)
    torch.testing.assert_close(one.final["b"].flatten(1), two.final[:, 1:], rtol=1e-10, atol=1e-12)

    def pair(t, z):
        return tuple(f(t, dict(zip("ab", z, strict=True))).values())

    three = nde.solve(nde.ODE(pair), tuple(z0.values()), rtol=(1e-2, 1e-5), atol=(own, double(1e-6, 1e-4)), **given)
    torch.testing.assert_close(three.final[1], one.final["b"], rtol=0, atol=0)
    number = nde.solve(nde.ODE(f), z0, rtol=1e-2, atol={"a": own, "b": 1e-4}, **given)
    assert bool((number.stats.nfe <= one.stats.nfe).all()) and int(number.stats.nfe[0]) < int(one.stats.nfe[0])


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_infinity_takes_a_component_out(solver, control):
    """The rest is solved as if it were alone."""
    given = {"solver": solver, "control": control, "rtol": 1e-3, "dt0": 0.01}
    both = nde.solve(nde.ODE(mixed), start(), (0.0, 1.0), atol=double(1e-6, INF), **given)
    alone = nde.solve(nde.ODE(lambda t, z: -z), start()[:, :1], (0.0, 1.0), atol=1e-6, **given)
    # RMS over two components, of which one counts: the tolerance is √2 larger.
    half = nde.solve(
        nde.ODE(lambda t, z: -z), start()[:, :1], (0.0, 1.0), atol=1e-6 * 2**0.5, **{**given, "rtol": 1e-3 * 2**0.5}
    )
    if not nde.solvers.get(solver).linearizes and solver != "auto":
        assert torch.equal(both.stats.nfe, half.stats.nfe)
        torch.testing.assert_close(both.final[:, :1], half.final, rtol=1e-9, atol=0)
    assert bool((both.stats.accepted <= alone.stats.accepted).all())
    strict = nde.solve(nde.ODE(mixed), start(), (0.0, 1.0), atol=double(1e-6, 1e-6), **given)
    assert int(strict.stats.accepted.sum()) > int(both.stats.accepted.sum())


def test_nothing_in_the_test():
    solution = nde.solve(nde.ODE(circle), start(), (0.0, 1.0), atol=torch.tensor(INF))
    assert not solution.stats.rejected.any() and not solution.steps.error.any()


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_rows_of_tolerances_go_with_their_samples(solver):
    """Samples leave at very different times; each has its own tolerances until its end."""
    batch = 24
    generator = torch.Generator().manual_seed(1)
    z0 = torch.randn(batch, 2, generator=generator, dtype=torch.float64)
    loose = 2 if nde.solvers.get(solver).order < 3 else 4
    rtol = 10.0 ** (-1 - loose * torch.rand(batch, 1, generator=generator, dtype=torch.float64))
    atol = rtol * double(1.0, 0.01)
    together = nde.solve(nde.ODE(circle), z0, (0.0, 12.0), solver=solver, rtol=rtol, atol=atol)
    nfe = together.stats.nfe
    assert int(nfe.max()) > 1.5 * int(nfe.min())
    for i in range(0, batch, 5):
        one = slice(i, i + 1)
        alone = nde.solve(nde.ODE(circle), z0[one], (0.0, 12.0), solver=solver, rtol=rtol[one], atol=atol[one])
        assert nfe[i] == alone.stats.nfe[0]
        torch.testing.assert_close(together.final[one], alone.final, rtol=1e-10, atol=1e-12)
        n = len(alone.steps)
        torch.testing.assert_close(together.steps.error[:n, one], alone.steps.error, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "vcab3", "rosenbrock23", "auto"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_the_error(solver, control, adjoint, norm):
    """By finite differences on the frozen grid, through the penalty and through steps.error."""
    rtol, atol = double([1e-3, 1e-2], [1e-2, 1e-3], [1e-3, 1e-3]), double([1e-3, INF], [1e-3, 1e-2], [1e-2, 1e-4])

    def strange(scaled):
        return (scaled**2).sum().sqrt() / 2 if control == "joint" else scaled.abs().pow(4).sum(dim=1).pow(0.25)

    chosen = nde.StepControl(per_sample=control == "per_sample", norm=strange if norm else None)
    k = double(1.0, 0.7).requires_grad_()
    # The largest |z| decides over the scale: away from where that is another one.
    solution = nde.solve(
        nde.ODE(lambda t, z, k: 2 * circle(t, z) * k + 0.3 * torch.cos(2 * z)),
        start(),
        (0.0, 1.0),
        args=k,
        rtol=rtol,
        atol=atol,
        solver=solver,
        control=chosen,
        adjoint=adjoint,
    )

    def values(s):
        return torch.stack([(s.steps.error**2).sum(), s.error.sum()])

    found = torch.stack([torch.autograd.grad(v, k, retain_graph=True)[0] for v in values(solution)])
    step, differences = 5e-5, []
    for i in range(2):
        moved = {}
        for n in (-2, -1, 1, 2):
            with torch.no_grad():
                other = k.detach().clone()
                other[i] += n * step
                moved[n] = values(nde.introspection.replay(solution, args=other))
        differences.append((8 * (moved[1] - moved[-1]) - (moved[2] - moved[-2])) / (12 * step))
    close(found, torch.stack(differences, dim=1), 1e-6)
    penalty = reg.GlobalError()
    (g,) = torch.autograd.grad(penalty(solution), k, retain_graph=True)
    assert float(g.abs().min()) > 0 and bool(torch.isfinite(g).all())


# -- norms -------------------------------------------------------------------------------------------------------------


def first_only(scaled):
    return scaled[:, 0].abs()


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_seminorm(solver):
    """|error| of the first component over its tolerance: the same as a solve of it alone."""
    given = {"solver": solver, "rtol": 1e-3, "atol": 1e-6, "dt0": 0.01}
    both = nde.solve(nde.ODE(mixed), start(), (0.0, 1.0), control=nde.StepControl(norm=first_only), **given)
    alone = nde.solve(nde.ODE(lambda t, z: -z), start()[:, :1], (0.0, 1.0), **given)
    if not nde.solvers.get(solver).linearizes and solver != "auto":
        assert torch.equal(both.stats.nfe, alone.stats.nfe)
        torch.testing.assert_close(both.final[:, :1], alone.final, rtol=1e-9, atol=0)
        torch.testing.assert_close(both.steps.error, alone.steps.error, rtol=1e-6, atol=1e-12)
    usual = nde.solve(nde.ODE(mixed), start(), (0.0, 1.0), **given)
    assert int(both.stats.accepted.sum()) < int(usual.stats.accepted.sum())


def test_a_norm_by_definition():
    def largest(scaled):
        return scaled.abs().amax(dim=1)

    solution = nde.solve(
        nde.ODE(mixed), start(), (0.0, 1.0), control=nde.StepControl(norm=largest), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(
        solution.steps.error, by_definition(solution, 1e-3, 1e-5, joint=False, norm=largest), rtol=1e-6, atol=1e-10
    )
    torch.testing.assert_close(nde.introspection.replay(solution).steps.error, solution.steps.error, rtol=1e-9, atol=0)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_rms_as_a_norm_of_ones_own(solver, control):
    joint = control == "joint"

    def rms(scaled):
        x = torch.cat([scaled["a"].flatten(1), scaled["b"]], dim=1)
        return (x**2).mean().sqrt() if joint else (x**2).mean(dim=1, keepdim=True).sqrt()

    z0 = {"a": start()[:, None], "b": start()}
    f = nde.ODE(lambda t, z: {"a": -z["a"], "b": circle(t, z["b"])})
    one = nde.solve(f, z0, (0.0, 2.0), solver=solver, control=control)
    two = nde.solve(f, z0, (0.0, 2.0), solver=solver, control=nde.StepControl(per_sample=not joint, norm=rms))
    assert torch.equal(one.stats.nfe, two.stats.nfe)
    torch.testing.assert_close(one.final["b"], two.final["b"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.steps.error, two.steps.error, rtol=1e-6, atol=1e-10)


def test_probes_have_them_too():
    rtol, atol = double([1e-3, 1e-5], [1e-4, 1e-3], [1e-2, 1e-6]), double(1e-4, INF)
    raw = nde.probe(mixed, 0.0, start(), dt=0.1, rtol=torch.zeros(()), atol=double(1.0, INF))
    probe = nde.probe(mixed, 0.0, start(), dt=0.1, rtol=rtol, atol=atol)
    size = torch.maximum(start().abs(), probe.z.abs())[:, 0]
    close(probe.error, raw.error / (1e-4 + rtol[:, 0] * size), 1e-12)
    close(raw.raw_error, nde.probe(mixed, 0.0, start(), dt=0.1).raw_error, 1e-12)
    probe = nde.probe(mixed, 0.0, start(), dt=0.1, atol=1e-4, control=nde.StepControl(norm=first_only))
    close(probe.error, raw.error * 2**0.5 / (1e-4 + 1e-3 * size), 1e-12)
    solution = nde.solve(nde.ODE(mixed), start(), (0.0, 1.0), rtol=rtol, atol=atol)
    later = nde.introspection.probe_solution(solution, torch.full((3,), 0.5, dtype=torch.float64))
    again = nde.probe(mixed, 0.5, solution(0.5), dt=later.dt, rtol=rtol, atol=atol)
    # (Rounding of an estimate, which is a sum that cancels, over the smallest tolerance: see above.)
    torch.testing.assert_close(later.error, again.error, rtol=1e-10, atol=1e-17 / 1e-4)


# -- validation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_wrong_tolerances(name):
    def solve(value, z0=None):
        z0 = start() if z0 is None else z0
        f = nde.ODE(lambda t, z: torch.utils._pytree.tree_map(torch.neg, z))
        nde.solve(f, z0, (0.0, 1.0), **{name: value})

    with refused(ValueError, name, "(4,)"):
        solve(torch.full((4,), 1e-3))
    with refused(ValueError, name, "3 rows", "got 2"):
        solve(torch.full((2, 2), 1e-3))
    with refused(ValueError, name):
        solve(torch.full((3, 2, 1), 1e-3))
    for bad in (-1e-3, math.nan):
        with refused(ValueError, name, "at least 0"):
            solve(double(1e-3, bad))
    with refused(TypeError, name, "complex"):
        solve(torch.full((2,), 1e-3 + 0j))
    for wrong in ("1e-3", object(), True):
        with refused(TypeError, name):
            solve(wrong)
    with refused(ValueError, name, "structure"):
        solve({"a": 1e-3}, {"a": start(), "b": start()})
    with refused(TypeError, name, "str"):
        solve({"a": 1e-3, "b": "1e-3"}, {"a": start(), "b": start()})
    if name == "rtol":
        with refused(ValueError, name, "finite"):
            solve(double(1e-3, INF))


def test_wrong_norms():
    with refused(TypeError, "norm", "str"):
        nde.StepControl(norm="rms")
    for per_sample, wrong in (
        (True, lambda x: x),
        (True, lambda x: x.sum()),
        (True, lambda x: 1.0),
        (True, lambda x: x[:, 0] + 0j),
        (False, lambda x: x[:, 0]),
    ):
        with refused(ValueError, "norm must return"):
            nde.solve(nde.ODE(circle), start(), (0.0, 1.0), control=nde.StepControl(per_sample=per_sample, norm=wrong))
