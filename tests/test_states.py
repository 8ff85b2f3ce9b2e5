"""States of every shape, structure and precision; times in either direction; outputs of the right shape."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, EXACT, SOLVERS, close, options
from torch import nn
from torch.utils import _pytree as pytree

import neuralde as nde

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def spread(t, leaf):
    """t as f receives it, in a shape that broadcasts to a leaf of any rank."""
    return t if t.dim() == 0 else t.reshape(-1, *(1,) * (leaf.dim() - 1))


def swing(t, z):
    """dz/dt = -sin(z)·(1 + t) + cos(3t), for every number of the state alone."""
    return pytree.tree_map(lambda leaf: -torch.sin(leaf) * (1 + spread(t, leaf)) + torch.cos(3 * spread(t, leaf)), z)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


STATES = {
    "b": lambda: normal(4),
    "b d": lambda: normal(4, 3),
    "b t d": lambda: normal(4, 3, 2),
    "image": lambda: normal(4, 2, 5, 3),
    "tuple": lambda: (normal(4, 3), normal(4, 2)),
    "flow": lambda: (normal(4, 3), normal(4)),
    "log-density first": lambda: (normal(4), normal(4, 3)),
    "ranks": lambda: (normal(4, 2, 3, 3), normal(4, 5), normal(4)),
    "dict": lambda: {"x": normal(4, 3), "energy": normal(4), "image": normal(4, 1, 2, 2)},
    "list": lambda: [normal(4, 2), normal(4)],
    "nested": lambda: {"body": (normal(4, 3), {"v": normal(4, 2, 2)}), "cost": [normal(4), normal(4, 1)]},
    "one leaf": lambda: (normal(4, 3),),
    "one sample": lambda: (normal(1, 3), normal(1)),
    "empty leaf": lambda: (normal(4, 3), normal(4, 0)),
}
STATE = pytest.mark.parametrize("make", STATES.values(), ids=STATES)


def flatten(z):
    """[batch, numbers]"""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in pytree.tree_leaves(z)], dim=1)


def flat_times(zs):
    """[times, batch, numbers]"""
    return torch.cat([leaf.reshape(*leaf.shape[:2], -1) for leaf in pytree.tree_leaves(zs)], dim=2)


@STATE
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_any_structure_is_solved_as_the_flat_vector_it_holds(make, control, adjoint):
    """The same steps, states, figures and gradients as the concatenation of the leaves."""
    t = torch.tensor([0.0, 0.4, 1.1], dtype=torch.float64)
    how = {"control": control, "adjoint": adjoint, "rtol": 1e-5, "atol": 1e-7}
    z0 = pytree.tree_map(lambda leaf: leaf.requires_grad_(), make())
    leaves = pytree.tree_leaves(z0)
    flat = flatten(z0).detach().requires_grad_()
    solution = nde.solve(nde.ODE(swing), z0, t, **how)
    reference = nde.solve(nde.ODE(swing), flat, t, **how)

    assert pytree.tree_structure(solution.zs) == pytree.tree_structure(z0)
    for z, leaf in zip(pytree.tree_leaves(solution.zs), leaves, strict=True):
        assert z.shape == (3, *leaf.shape) and z.dtype == leaf.dtype
    for z, leaf in zip(pytree.tree_leaves(solution.final), leaves, strict=True):
        assert z.shape == leaf.shape
    torch.testing.assert_close(flat_times(solution.zs), reference.zs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(flatten(solution.final), reference.final, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(solution.steps.dt, reference.steps.dt, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat_times(solution.steps.z), reference.steps.z, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solution.error, reference.error, rtol=1e-8, atol=0)
    torch.testing.assert_close(solution.stiffness, reference.stiffness, rtol=1e-8, atol=0)
    assert torch.equal(solution.stats.nfe, reference.stats.nfe)

    inside = solution(torch.tensor([0.2, 0.9]))
    assert pytree.tree_structure(inside) == pytree.tree_structure(z0)
    torch.testing.assert_close(flat_times(inside), reference(torch.tensor([0.2, 0.9])), rtol=1e-12, atol=1e-12)

    loss, known = (flat_times(solution.zs) ** 2).sum(), (reference.zs**2).sum()
    if adjoint in EXACT:
        loss, known = loss + solution.error.sum(), known + reference.error.sum()
    expected = torch.autograd.grad(known, flat)[0]
    gradients = torch.autograd.grad(loss, leaves)
    close(torch.cat([g.reshape(len(g), -1) for g in gradients], dim=1), expected, 1e-9)


@STATE
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_leaves_of_a_structure_are_what_they_are_alone(make, control, adjoint):
    z0 = make()
    together = nde.solve(nde.ODE(swing), z0, (0.0, 1.1), control=control, adjoint=adjoint, **TIGHT).final
    for leaf, final in zip(pytree.tree_leaves(z0), pytree.tree_leaves(together), strict=True):
        if not leaf.numel():
            continue
        alone = nde.solve(nde.ODE(swing), leaf, (0.0, 1.1), control=control, adjoint=adjoint, **TIGHT).final
        # Each within its global error, some multiple of the tolerance: the steps differ.
        torch.testing.assert_close(final, alone, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_a_structure(solver):
    z0 = STATES["flow"]()
    final = nde.solve(nde.ODE(swing), z0, (0.0, 1.0), **options(solver)).final
    flat = nde.solve(nde.ODE(swing), flatten(z0), (0.0, 1.0), **options(solver)).final
    torch.testing.assert_close(flatten(final), flat, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_density_that_flows_with_its_samples(control):
    """dz/dt = A z, d(log p)/dt = -tr A: the leaves may depend on each other within a sample."""
    a = torch.tensor([[-0.3, 1.0], [-2.0, 0.1]], dtype=torch.float64)
    z0, log_density = normal(5, 2), normal(5)

    def f(t, state):
        z, _ = state
        return z @ a.T, -torch.trace(a).expand(len(z))

    z, log_p = nde.solve(nde.ODE(f), (z0, log_density), (0.0, 1.5), control=control, **TIGHT).final
    torch.testing.assert_close(z, z0 @ torch.matrix_exp(1.5 * a).T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_p, log_density - 1.5 * torch.trace(a), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("atol", [0.0, 1e-6])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_component_that_stays_zero(atol, control, adjoint):
    """As augmented dimensions may: also where atol is 0, so that its tolerance is 0, it has no error."""
    z0 = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    solution = nde.solve(nde.ODE(lambda t, z: -z), z0, (0.0, 1.0), atol=atol, control=control, adjoint=adjoint)
    torch.testing.assert_close(solution.final, z0.detach() * math.exp(-1), rtol=1e-3, atol=0)
    loss = solution.final.sum() + (0.0 * solution.error.sum() if adjoint in EXACT else 0.0)
    gradient = torch.autograd.grad(loss, z0, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.full_like(gradient, math.exp(-1)), rtol=1e-3, atol=0)
    # Nor has a component of the loss's gradient that stays zero.
    gradient = torch.autograd.grad(solution.final[:, 0].sum(), z0)[0]
    expected = torch.tensor([math.exp(-1), 0.0], dtype=torch.float64).expand(2, 2)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=0)


# -- what f sees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2), (4, 2, 5, 3)])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("control", CONTROLS)
def test_shapes_that_f_sees(shape, solver, control):
    seen = set()

    def f(t, z):
        seen.add((tuple(t.shape), tuple(z.shape), t.dtype, z.dtype))
        assert (t * torch.ones_like(z)).shape == z.shape
        return -z

    solution = nde.solve(nde.ODE(f), normal(*shape), (0.0, 1.0), control=control, **options(solver))
    solution(0.3)
    time = () if control == "joint" else (4, *(1,) * (len(shape) - 1))
    assert seen == {(time, shape, torch.float64, torch.float64)}


@pytest.mark.parametrize("make", [STATES["flow"], STATES["ranks"], STATES["log-density first"]])
@pytest.mark.parametrize("control", CONTROLS)
def test_time_has_the_rank_of_the_first_leaf(make, control):
    z0 = make()
    first = pytree.tree_leaves(z0)[0]
    seen = set()

    def f(t, z):
        seen.add(tuple(t.shape))
        return pytree.tree_map(torch.neg, z)

    nde.solve(nde.ODE(f), z0, (0.0, 1.0), control=control)
    assert seen == {() if control == "joint" else (4, *(1,) * (first.dim() - 1))}


# -- precisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "time"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("control", CONTROLS)
def test_dtypes(dtype, time, control):
    """f sees t and z in the state's precision, and gives and gets nothing else."""
    seen = set()

    def f(t, z):
        seen.add((t.dtype, z.dtype))
        return -z * (1 + t)

    z0 = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    solution = nde.solve(nde.ODE(f), z0, (0.0, 0.5, 1.0), control=control)
    assert seen == {(time, dtype)}
    assert solution.zs.dtype == solution.final.dtype == solution.steps.z.dtype == solution(0.3).dtype == dtype
    for figure in (solution.ts, solution.error, solution.stiffness, solution.steps.t, solution.steps.dt):
        assert figure.dtype == (torch.float64 if time == torch.float64 else torch.float32)
    gradient = torch.autograd.grad(solution.final.abs().sum(), z0)[0]
    assert gradient.dtype == dtype and gradient.abs().isfinite().all()


RATE = 0.4 - 2.0j


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.complex64, 1e-5), (torch.complex128, 1e-8)])
@pytest.mark.parametrize("solver", ["tsit5", "bs3", "dopri8"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_complex(dtype, rounding, solver, control, adjoint):
    """dz/dt = -λz: the solution, |λ| as its stiffness, and the derivatives of |z(T)|²."""
    rtol = 1e-5 if dtype == torch.complex64 else 1e-8 if solver == "bs3" else 1e-9
    rate = torch.tensor(RATE, dtype=dtype, requires_grad=True)
    z0 = torch.randn(3, 2, dtype=dtype, requires_grad=True)
    how = {"solver": solver, "control": control, "adjoint": adjoint, "rtol": rtol, "atol": 1e-3 * rtol}
    solution = nde.solve(nde.ODE(lambda t, z: -rate * z), z0, (0.0, 1.5), **how)
    # The global error is a small multiple of the tolerance here.
    allowed = {"rtol": 10 * max(rtol, rounding), "atol": 0.0}
    torch.testing.assert_close(solution.final, (z0 * torch.exp(-1.5 * rate)).detach(), **allowed)
    size = (solution.final.abs() ** 2).sum()
    gradient, towards = torch.autograd.grad(size, [z0, rate])
    torch.testing.assert_close(gradient, (2 * z0 * math.exp(-3 * RATE.real)).detach(), **allowed)
    # |z(T)|² = |z0|² exp(-2 T Re λ): no gradient along the imaginary axis.
    expected = torch.tensor(-3.0 * float(size.detach()), dtype=dtype)
    assert (towards - expected).abs() < 10 * max(rtol, rounding) * expected.abs() * 3
    if solution.solver.reports_stiffness:
        measured = solution.steps.stiffness[solution.steps.mask]
        # In complex64 the difference of two close stages loses digits; in complex128 it keeps enough.
        if dtype == torch.complex128:
            torch.testing.assert_close(measured, torch.full_like(measured, abs(RATE)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_complex_in_fixed_steps(control, adjoint):
    z0 = torch.randn(3, 2, dtype=torch.complex128)
    how = {"solver": "rk4", "control": control, "adjoint": adjoint, "dt0": 0.01}
    solution = nde.solve(nde.ODE(lambda t, z: -RATE * z), z0, (0.0, 1.5), **how)
    torch.testing.assert_close(solution.final, z0 * cmath.exp(-1.5 * RATE), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_low_precision_states_lose_only_what_f_and_the_output_round(dtype, control, adjoint):
    """The engine's own arithmetic is float32: dz/dt = -z keeps z within two roundings, however many steps are made.

    f rounds z to within a relative u, so that |d log z/dt + 1| ≤ u, and over T = 1 the relative error is at most u; the
    output is rounded once more. The solver's own error is below 1e-4.
    """
    unit = torch.finfo(dtype).eps / 2
    z0 = torch.linspace(0.5, 2.0, 12).view(6, 2).to(dtype)
    results = {}
    for kind in (dtype, torch.float32):
        start = z0.to(kind).requires_grad_()
        how = {"control": control, "adjoint": adjoint, "solver": "rk4", "dt0": 0.01}
        solution = nde.solve(nde.ODE(lambda t, z: -z), start, (0.0, 1.0), **how)
        results[kind] = solution.final.detach().float(), torch.autograd.grad(solution.final.sum(), start)[0].float()
    for low, exact in zip(results[dtype], results[torch.float32], strict=True):
        assert ((low - exact) / exact).abs().max() <= 2 * unit + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["tsit5", "bs3", "dopri5", "dopri8"])
def test_low_precision_states_with_error_control(dtype, solver):
    """The rounding of f is an error to the controller, which must not run out of steps for it."""
    z0 = torch.linspace(0.5, 2.0, 12).view(6, 2)
    f = nde.ODE(lambda t, z: torch.tanh(z) * torch.cos(2 * t))
    low = nde.solve(f, z0.to(dtype), (0.0, 2.0), solver=solver, rtol=1e-2, atol=1e-3)
    exact = nde.solve(f, z0, (0.0, 2.0), solver=solver, rtol=1e-5, atol=1e-6).final
    unit = torch.finfo(dtype).eps / 2
    # f rounds its argument, t and its value, each within u relatively, in 2 units of time, with |∂f/∂z| ≤ 1; the
    # output is rounded once; the tolerance adds up to a few times 1e-2·|z|, whatever the precision.
    assert ((low.final.float() - exact).abs() <= 3e-2 * exact.abs() + 8 * unit * (1 + exact.abs())).all()


# -- autocast ------------------------------------------------------------------------------------------------------


def autocast_case():
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    return net, torch.randn(6, 4)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("t", [(0.0, 1.0), (0.0, 0.3, 0.6, 1.0)])
def test_autocast(control, adjoint, t):
    """f computes in bfloat16, the engine in float32, also in the backward pass outside of the autocast region."""
    net, z0 = autocast_case()
    inside = set()
    net[1].register_forward_hook(lambda module, inputs, out: inside.add(out.dtype))
    results = []
    for enabled in (True, False):
        start = z0.clone().requires_grad_()
        how = {"control": control, "adjoint": adjoint, "rtol": 1e-2, "atol": 1e-2}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            inside.clear()
            solution = nde.solve(nde.ODE(lambda t, z: net(z)), start, t, **how)
        assert inside == {torch.bfloat16 if enabled else torch.float32}
        assert solution.zs.dtype == torch.float32
        inside.clear()
        gradients = torch.autograd.grad((solution.zs[1:] ** 2).sum(), [start, *net.parameters()])
        assert inside <= {torch.bfloat16 if enabled else torch.float32}, "the replay must compute as the solve did"
        results.append((solution.zs.detach(), *gradients))
    for low, full in zip(*results, strict=True):
        assert low.dtype == full.dtype
        # A handful of roundings (inputs, weights, products of two layers) of relative size 2⁻⁸, and the tolerance.
        close(low, full, 0.05)
        assert not torch.equal(low[1:], full[1:])


def test_autocast_gradients_agree_between_adjoints():
    """Both differentiate the same bfloat16 computation."""
    net, z0 = autocast_case()
    found = []
    for adjoint in ADJOINTS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            final = nde.solve(
                nde.ODE(lambda t, z: net(z)), z0, (0.0, 1.0), adjoint=adjoint, solver="rk4", dt0=0.1
            ).final
            loss = (final**2).mean()
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            # bfloat16 gradients of one weight are summed over the evaluations in another order.
            close(a, b, 2e-2)


def test_the_interpolant_under_autocast_is_float32():
    """What is between the steps is the engine's arithmetic, not f's."""
    z0 = torch.randn(6, 4)
    f = nde.ODE(lambda t, z: -z)
    times = torch.linspace(0.0, 1.0, 7)
    plain = nde.solve(f, z0, times, dense=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nde.solve(f, z0, times, dense=True)
        inside = cast(0.37)
    torch.testing.assert_close(cast.zs, plain.zs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inside, plain(0.37), rtol=1e-6, atol=1e-6)


# -- times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("control", CONTROLS)
def test_decreasing_times_are_the_mirrored_problem(solver, control):
    """dz/dt = f(t, z) from 1 to -0.5 is dz/ds = -f(-s, z) from -1 to 0.5."""
    z0 = normal(4, 3)
    t = torch.tensor([1.0, 0.3, -0.1, -0.5], dtype=torch.float64)
    how = {"control": control, **options(solver)}
    back = nde.solve(nde.ODE(swing), z0, t, **how)
    mirrored = nde.solve(nde.ODE(lambda s, z: -swing(-s, z)), z0, -t, **how)
    torch.testing.assert_close(back.zs, mirrored.zs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(back.steps.dt, -mirrored.steps.dt, rtol=1e-9, atol=1e-12)
    assert (back.steps.dt[back.steps.mask] < 0).all()
    assert torch.equal(back.stats.nfe, mirrored.stats.nfe)
    torch.testing.assert_close(back(0.1), mirrored(-0.1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("control", CONTROLS)
def test_there_and_back(adjoint, control):
    z0 = normal(4, 3).requires_grad_()
    how = {"adjoint": adjoint, "control": control, **TIGHT}
    there = nde.solve(nde.ODE(swing), z0, (0.0, 1.0), **how).final
    back = nde.solve(nde.ODE(swing), there, (1.0, 0.0), **how).final
    torch.testing.assert_close(back, z0.detach(), rtol=1e-7, atol=1e-7)
    weights = normal(4, 3)
    gradient = torch.autograd.grad((back * weights).sum(), z0)[0]
    torch.testing.assert_close(gradient, weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_each_sample_its_own_times_and_direction(adjoint, solver):
    z0 = normal(3, 2)
    t = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.2, -1.0], [2.0, 2.1, 4.0]], dtype=torch.float64)
    how = {"adjoint": adjoint, **options(solver)}
    start = z0.clone().requires_grad_()
    together = nde.solve(nde.ODE(swing), start, t, **how)
    assert together.ts.shape == (3, 3) and torch.equal(together.ts, t.T)
    gradients = torch.autograd.grad((together.zs**2).sum(), start)[0]
    for i in range(3):
        own = z0[[i]].clone().requires_grad_()
        alone = nde.solve(nde.ODE(swing), own, t[i], **how)
        torch.testing.assert_close(together.zs[:, [i]], alone.zs, rtol=1e-12, atol=1e-13)
        close(gradients[[i]], torch.autograd.grad((alone.zs**2).sum(), own)[0], 1e-11)


@pytest.mark.parametrize(
    "t",
    [
        (0, 2),
        [0.0, 2.0],
        (0.0, torch.tensor(2.0)),
        (torch.tensor(0), torch.tensor(2)),
        torch.tensor([0, 2]),
        torch.tensor([0.0, 2.0], dtype=torch.float16),
        (0.0, torch.full((3,), 2.0)),
        (torch.zeros(3), 2.0),
        (torch.zeros(3), torch.full((3,), 2.0)),
        torch.tensor([[0.0, 2.0]] * 3),
    ],
)
@pytest.mark.parametrize("control", CONTROLS)
def test_ways_to_say_a_horizon(t, control):
    z0 = normal(3, 2)
    solution = nde.solve(nde.ODE(swing), z0, t, control=control)
    expected = nde.solve(nde.ODE(swing), z0, (0.0, 2.0), control=control)
    assert torch.equal(solution.final, expected.final)
    each = (isinstance(t, torch.Tensor) and t.dim() == 2) or (
        isinstance(t, tuple) and any(isinstance(x, torch.Tensor) and x.dim() for x in t)
    )
    assert solution.ts.shape == ((2, 3) if each else (2,))
    assert solution.ts.dtype == torch.float64


def test_a_horizon_of_tensors_per_sample():
    z0 = normal(3, 2)
    ends = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
    solution = nde.solve(nde.ODE(swing), z0, (0.0, ends))
    for i, end in enumerate(ends.tolist()):
        alone = nde.solve(nde.ODE(swing), z0[[i]], (0.0, end))
        torch.testing.assert_close(solution.final[[i]], alone.final, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_horizon_that_is_learned(control, adjoint):
    """dz(t1)/dt1 = f(t1, z(t1)), and moving both ends of an autonomous problem changes nothing."""
    z0 = normal(3, 2)
    start, end = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    start.requires_grad_(), end.requires_grad_()
    final = nde.solve(
        nde.ODE(lambda t, z: torch.sin(z)), z0, (start, end), control=control, adjoint=adjoint, **TIGHT
    ).final
    to_start, to_end = torch.autograd.grad(final.sum(), [start, end])
    torch.testing.assert_close(to_end, torch.sin(final).sum().detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(to_start, -to_end, rtol=1e-6, atol=0)


@pytest.mark.parametrize("points", [2, 3, 20])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_outputs(points, control, solver):
    """The first is z0 itself, the last the final state; those between cost nothing and are no steps."""
    z0 = normal(3, 2)
    t = torch.linspace(0.0, 1.3, points, dtype=torch.float64)
    solution = nde.solve(nde.ODE(swing), z0, t, control=control, **options(solver))
    ends = nde.solve(nde.ODE(swing), z0, (0.0, 1.3), control=control, **options(solver))
    assert solution.zs.shape == (points, 3, 2) and solution.ts.shape == (points,)
    assert torch.equal(solution.zs[0], z0) and torch.equal(solution.zs[-1], solution.final)
    torch.testing.assert_close(solution.final, ends.final, rtol=1e-12, atol=1e-13)
    assert torch.equal(solution.stats.accepted, ends.stats.accepted)
    # Interpolation closes the last step of a method that is not FSAL: one evaluation more.
    assert (solution.stats.nfe - ends.stats.nfe <= 1).all()
