"""torch.func's transforms and forward-mode AD around a solve with adjoint="direct"."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch
from helpers import ADAPTIVE, ADJOINTS, CONTROLS, FIXED, SOLVERS, close, options, refused
from problems import van_der_pol
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import neuralde as nde
import regularizers as reg
from neuralde import transforms
from neuralde.solvers.rosenbrock import _abscissae
from neuralde.solvers.runge_kutta import _coefficients

OTHERS = [name for name in ADJOINTS if not nde.adjoints.ADJOINTS[name].transforms]
STIFF = ["rosenbrock23", "rodas5p", "implicit_euler"]


def f(t, z, args):
    """Nonlinear, and depends on t."""
    return torch.tanh(z @ args["w"]) * (1.0 + 0.3 * torch.cos(3.0 * t)) - 0.2 * z


def case(batch=3):
    z0 = torch.randn(batch, 3, dtype=torch.float64)
    return z0, {"w": torch.randn(3, 3, dtype=torch.float64)}


def solved(z0, args, solver="tsit5", control="per_sample", t=(0.0, 0.4, 1.0), **more):
    rtol = 3e-2 if solver == "implicit_euler" else 1e-3  # few steps
    known = {**options(solver, 0.125), "control": control, "adjoint": "direct", "rtol": rtol, **more}
    return nde.solve(nde.ODE(f), z0, t, args=args, **known)


def quantities(solution, errors=True, stiffness=True):
    """What a solution has with gradients, as one dict."""
    found = {"zs": solution.zs, "final": solution.final, "z": solution.steps.z}
    if errors and solution.solver.error_order is not None:
        found["error"] = solution.error
    if stiffness and solution.solver.reports_stiffness:
        found["stiffness"] = solution.stiffness
    return found


def along(x, direction, size):
    return torch.utils._pytree.tree_map(lambda a, b: a + size * b, x, direction)


def random_like(x):
    return torch.utils._pytree.tree_map(torch.randn_like, x)


# -- forward mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_jvp_is_that_of_the_frozen_grid(solver, control):
    """Against finite differences of the replay, which keeps the steps; and against reverse mode."""
    inputs = case()
    direction = random_like(inputs)
    plain = solved(*inputs, solver, control)
    value, rate = jvp(lambda *x: quantities(solved(*x, solver, control)), inputs, direction)
    step, moved = 2.5e-4, {}
    for n in (-2, -1, 1, 2):
        moved[n] = quantities(nde.introspection.replay(plain, *along(inputs, direction, n * step)))
    leaves = [x.requires_grad_() for x in torch.utils._pytree.tree_leaves(inputs)]
    for name, exact in quantities(solved(*inputs, solver, control)).items():
        # The steps' sizes agree up to rounding of the error estimate, a small difference.
        close(value[name], exact, 1e-8)
        if name not in ("error", "stiffness"):  # norms of small differences: too rough for these
            near, far = (moved[n][name] - moved[-n][name] for n in (1, 2))
            close(rate[name], (8 * near - far) / (12 * step), 1e-8)
        cotangent = random_like(exact)
        back = torch.autograd.grad((exact * cotangent).sum(), leaves, retain_graph=True, allow_unused=True)
        pulled = sum(
            (b * d).sum()
            for b, d in zip(back, torch.utils._pytree.tree_leaves(direction), strict=True)
            if b is not None
        )
        scale = float((rate[name] * cotangent).abs().sum())
        assert float(pulled) == pytest.approx(float((rate[name] * cotangent).sum()), rel=0.0, abs=1e-8 * scale), name


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "rk4", *STIFF, "vcab3", "auto"])
def test_plain_forward_mode(solver, control, graph):
    """Dual tensors, also where grad mode is off, give what torch.func.jvp gives."""
    inputs = case()
    direction = random_like(inputs)
    _, rate = jvp(lambda *x: quantities(solved(*x, solver, control)), inputs, direction)
    with torch.set_grad_enabled(graph), forward_ad.dual_level():
        dual = torch.utils._pytree.tree_map(forward_ad.make_dual, inputs, direction)
        found = quantities(solved(*dual, solver, control))
        for name, x in found.items():
            close(forward_ad.unpack_dual(x).tangent, rate[name], 1e-12)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "heun", "vcab3", "rodas5p", "implicit_euler"])
def test_jacobians_and_hessians(solver, control):
    """Forward over reverse, reverse over reverse, and finite differences of the gradient."""
    z0, args = case(batch=2)

    def final(z0):
        return solved(z0, args, solver, control).final

    forward, reverse = jacfwd(final)(z0), jacrev(final)(z0)
    close(forward, reverse, 1e-12)
    tape = torch.autograd.functional.jacobian(final, z0)
    close(forward, tape, 1e-12)

    plain = solved(z0, args, solver, control)
    cotangent, direction, step = random_like(z0), random_like(z0), 2.5e-4

    def loss(z0):
        return (final(z0) * cotangent).sum().square()

    second = hessian(loss)(z0)
    close(jacrev(jacrev(loss))(z0), second, 1e-10)
    moved = {}
    for n in (-2, -1, 1, 2):
        z = (z0 + n * step * direction).requires_grad_()
        value = (nde.introspection.replay(plain, z).final * cotangent).sum().square()
        (moved[n],) = torch.autograd.grad(value, z)
    difference = (8 * (moved[1] - moved[-1]) - (moved[2] - moved[-2])) / (12 * step)
    close(torch.einsum("bfcg,cg->bf", second, direction), difference, 1e-8)


@pytest.mark.parametrize("control", CONTROLS)
def test_times_in_forward_mode(control):
    """Outputs move with their times along f, and with the start, as in reverse mode."""
    z0, args = case()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)

    def outputs(t):
        return solved(z0, args, control=control, t=t).zs

    expected = torch.autograd.functional.jacobian(outputs, t)
    assert expected[-1, ..., -1].abs().min() > 0.0
    close(jacfwd(outputs)(t), expected, 1e-12)
    close(jacrev(outputs)(t), expected, 1e-12)
    rates = [jvp(lambda a, b: outputs((a, b)), (t[0], t[2]), pair)[1] for pair in ((t[2], t[0]), (t[0], t[2]))]
    close(torch.stack(rates, dim=-1)[-1], expected[-1][..., [0, 2]], 1e-4)  # another horizon's steps


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("control", CONTROLS)
def test_the_interpolant_in_forward_mode(control, dense):
    """Stages that were kept have no derivatives: they must not be used."""
    inputs, times = case(), torch.tensor([0.1, 0.55, 0.9])
    direction = random_like(inputs)
    _, rate = jvp(lambda *x: solved(*x, control=control, dense=dense)(times), inputs, direction)
    plain, step = solved(*inputs, control=control), 2.5e-4
    near, far = (
        nde.introspection.replay(plain, *along(inputs, direction, n * step))(times)
        - nde.introspection.replay(plain, *along(inputs, direction, -n * step))(times)
        for n in (1, 2)
    )
    close(rate, (8 * near - far) / (12 * step), 1e-8)


def test_half_precision_in_forward_mode():
    z0, args = (torch.utils._pytree.tree_map(lambda x: x.bfloat16(), x) for x in case())
    _, rate = jvp(lambda z: solved(z, args, rtol=1e-2).final, (z0,), (torch.ones_like(z0),))
    exact = jvp(
        lambda z: solved(z, {"w": args["w"].float()}, rtol=1e-2).final, (z0.float(),), (torch.ones_like(z0).float(),)
    )[1]
    assert rate.dtype == torch.bfloat16
    close(rate.float(), exact, 16 * torch.finfo(torch.bfloat16).eps)


# -- vmap --------------------------------------------------------------------------------------------------------------


def copies(batch=3, count=4):
    """States and args with a leading dimension to be mapped; the copies differ in how fast they change."""
    z0, args = case(batch)
    scale = torch.linspace(0.2, 3.0, count, dtype=torch.float64)[:, None, None]
    return z0 * torch.ones_like(scale) + 0.1 * torch.randn(count, batch, 3, dtype=torch.float64), {
        "w": scale * args["w"]
    }


MAPPED = {"both": (0, 0), "z0": (0, None), "args": (None, 0)}


def chosen(z0, args, mapped):
    """The copies with what isn't mapped being the first one's."""
    in_z, in_args = MAPPED[mapped]
    return (z0 if in_z == 0 else z0[0]), (args if in_args == 0 else {"w": args["w"][0]})


def copy_of(z0, args, mapped, i):
    in_z, in_args = MAPPED[mapped]
    return (z0[i] if in_z == 0 else z0), ({"w": args["w"][i]} if in_args == 0 else args)


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_vmap_with_fixed_steps_is_a_loop(solver, control, mapped):
    inputs = chosen(*copies(), mapped)
    fixed = nde.StepControl(per_sample=control == "per_sample", adaptive=False)

    def outputs(z0, args):
        return quantities(solved(z0, args, solver, fixed, dt0=0.125))

    found = vmap(outputs, in_dims=MAPPED[mapped])(*inputs)
    with torch.no_grad():
        again = vmap(outputs, in_dims=MAPPED[mapped])(*inputs)
    for i in range(4):
        expected = outputs(*copy_of(*inputs, mapped, i))
        for name, x in expected.items():
            tolerance = 1e-6 if name in ("error", "stiffness") else 1e-11  # rounding of small differences
            close(found[name][i], x, tolerance)
            close(again[name][i], x, tolerance)


def largest(scaled):
    """A norm under which a joint batch is judged by the worst of its samples."""
    return torch.linalg.vector_norm(scaled, dim=1).max() / scaled.shape[1] ** 0.5


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_the_worst_copy_decides(solver, control):
    """Copies of one sample step as a joint batch does whose norm is the largest among its samples.

    (Without the control's memory: the two controls begin with another one.)
    """
    z0, args = copies(batch=1, count=5)
    z0 = z0.flip(0)  # so that the first one is not the worst of all steps, with any solver
    args, rtol = {"w": args["w"][2]}, 1e-4 if solver == "implicit_euler" else 1e-6

    def outputs(z0):
        solution = solved(z0, args, solver, nde.StepControl(per_sample=control == "per_sample", beta2=0.0), rtol=rtol)
        stats = solution.stats
        return solution.zs, solution.steps.dt, solution.steps.error, stats.accepted, stats.rejected, stats.nfe

    zs, dt, error, *counts = vmap(outputs)(z0)
    joint = solved(z0[:, 0], args, solver, nde.StepControl(per_sample=False, norm=largest, beta2=0.0), rtol=rtol)
    for found, expected in zip(counts, (joint.stats.accepted, joint.stats.rejected, joint.stats.nfe), strict=True):
        assert torch.equal(found[:, 0], expected)
    # An error estimate is a small difference: its rounding is what is left between them.
    close(dt[..., 0], joint.steps.dt.T, 1e-6)
    close(zs[:, :, 0], joint.zs.movedim(1, 0), 1e-7)
    close(error[..., 0].amax(dim=0), joint.steps.error[:, 0], 1e-4)
    assert (error <= 1.0).all() and (error[0] < error.amax(dim=0)).any()


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_every_copy_passes_its_error_test(solver, control, mapped):
    inputs = chosen(*copies(), mapped)

    def outputs(z0, args):
        solution = solved(z0, args, solver, control)
        mask = solution.steps.mask
        return solution.final, torch.where(mask, solution.steps.error, 0.0), solution.steps.dt, solution.status

    final, error, dt, status = vmap(outputs, in_dims=MAPPED[mapped])(*inputs)
    assert (error <= 1.0).all() and (status == 0).all()
    assert (dt == dt[:1]).all(), "copies share their steps"
    for i in range(4):
        precise = solved(*copy_of(*inputs, mapped, i), "dopri8", rtol=1e-10, atol=1e-10).final
        alone = solved(*copy_of(*inputs, mapped, i), solver, control).final
        off, usual = (final[i] - precise).abs().max(), (alone - precise).abs().max()
        # The copy that decides is as good as alone; the others are better.
        assert off <= 3.0 * usual + 1e-6


def test_samples_have_their_own_steps_under_vmap():
    """Copies of a sample share its steps; samples don't."""
    z0, args = case(batch=2)
    z0 = torch.stack([z0, z0 + 0.1]) * torch.tensor([1.0, 40.0])[:, None]
    accepted = vmap(lambda z: solved(z, args, t=(0.0, 8.0), rtol=1e-8).stats.accepted)(z0)
    alone = [vmap(lambda z: solved(z, args, t=(0.0, 8.0), rtol=1e-8).stats.accepted)(z0[:, [i]]) for i in (0, 1)]
    assert torch.equal(accepted, torch.cat(alone, dim=1)) and accepted[0, 0] != accepted[0, 1]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))

    def forward(self, t, z):
        return self.inner(z) - 0.5 * z


def ensemble(count=3, **more):
    """(a layer, the stacked parameters of an ensemble of it)."""
    layer = nde.NeuralODE(Net(), **{"adjoint": "direct", **more}).double()
    members = [nde.NeuralODE(Net(), **{"adjoint": "direct", **more}).double() for _ in range(count)]
    return layer, torch.func.stack_module_state(members)[0]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "rk4", "dopri8", "vcab3", "rodas5p", "implicit_euler", "auto"])
def test_ensembles(solver, control):
    """vmap over stacked parameters, with gradients: the members' own ones, by the tape, on the same steps."""
    step = nde.StepControl(per_sample=control == "per_sample", adaptive=False)
    layer, stacked = ensemble(solver=solver, control=step, dt0=0.125)
    z0 = torch.randn(4, 3, dtype=torch.float64)

    def loss(parameters, z0):
        return functional_call(layer, parameters, (z0,)).square().sum()

    values = vmap(loss, in_dims=(0, None))(stacked, z0)
    gradients = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(stacked, z0)
    for i in range(3):
        member = {name: x[i].detach().requires_grad_() for name, x in stacked.items()}
        start = z0.clone().requires_grad_()
        value = loss(member, start)
        close(values[i], value, 1e-12)
        *expected, by_z0 = torch.autograd.grad(value, [*member.values(), start])
        for found, x in zip(gradients[0].values(), expected, strict=True):
            close(found[i], x, 1e-11)
        close(gradients[1][i], by_z0, 1e-11)


@pytest.mark.parametrize("control", CONTROLS)
def test_ensembles_on_the_tape(control):
    """A backward pass through vmap, as a training loop has it, and vmap of jvp and of a Jacobian."""
    layer, stacked = ensemble(control=control)
    z0 = torch.randn(4, 3, dtype=torch.float64)

    def final(parameters, z0):
        return functional_call(layer, parameters, (z0,))

    def loss(parameters):
        return final(parameters, z0).square().sum()

    stacked = {name: x.detach().requires_grad_() for name, x in stacked.items()}
    tape = torch.autograd.grad(vmap(loss)(stacked).sum(), list(stacked.values()))
    for found, expected in zip(vmap(grad(loss))(stacked).values(), tape, strict=True):
        close(found, expected, 1e-12)
    direction = random_like(stacked)
    rate = vmap(lambda p, d: jvp(loss, (p,), (d,))[1])(stacked, direction)
    pulled = sum((x * d).flatten(1).sum(dim=1) for x, d in zip(tape, direction.values(), strict=True))
    close(rate, pulled, 1e-10)
    forward, reverse = (vmap(lambda p, j=j: j(lambda z: final(p, z))(z0))(stacked) for j in (jacfwd, jacrev))
    close(forward, reverse, 1e-12)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["tsit5", "rodas5p"])
def test_nested_vmap(solver, control):
    step = nde.StepControl(per_sample=control == "per_sample", adaptive=False)
    layer, stacked = ensemble(2, solver=solver, control=step, dt0=0.25)
    z0 = torch.randn(3, 4, 3, dtype=torch.float64)

    def final(parameters, z0):
        return functional_call(layer, parameters, (z0,))

    each = vmap(vmap(final, in_dims=(None, 0)), in_dims=(0, None))(stacked, z0)
    other = vmap(vmap(final, in_dims=(0, None), out_dims=1), in_dims=(None, 0), out_dims=2)(stacked, z0)
    for i in range(2):
        member = {name: x[i] for name, x in stacked.items()}
        for j in range(3):
            expected = final(member, z0[j])
            close(each[i, j], expected, 1e-12)
            close(other[:, i, j], expected, 1e-12)
    adaptive, stacked = ensemble(2, solver=solver, control=control)

    def worst_error(parameters, z0):
        functional_call(adaptive, parameters, (z0,))
        return adaptive.solution.steps.error.amax()

    errors = vmap(vmap(worst_error, in_dims=(None, 0)), in_dims=(0, None))(stacked, z0)
    assert errors.shape == (2, 3) and (errors <= 1.0).all() and len(errors.unique()) == 6


def test_samples_leave_the_batch_under_vmap():
    """Finished samples are left out, with their rows of mapped args."""
    rates = torch.tensor([1.0, 1.0, 1.0, 300.0], dtype=torch.float64)[:, None]
    rows = []

    def decay(t, z, args):
        rows.append(len(z))
        return -args * (z - torch.cos(t))

    def final(args):
        z0 = torch.ones(4, 2, dtype=torch.float64)
        return nde.solve(nde.ODE(decay), z0, (0.0, 1.0), args=args, adjoint="direct", rtol=1e-8).final

    args = torch.stack([rates, 1.5 * rates])
    found = vmap(final)(args)
    assert min(rows) == 1, "no sample left the batch"
    for i in range(2):
        close(found[i], final(args[i]), 1e-6)


def test_an_attempt_that_overflows_in_one_copy():
    """It is rejected for all, made again without it on the tape, and leaves no NaN in a gradient."""

    def steep(t, z, args):
        return -args * z**9

    def loss(z0, args):
        more = {"adjoint": "direct", "dt0": 1.0, "args": args, "rtol": 1e-6}
        return nde.solve(nde.ODE(steep), z0, (0.0, 1.0), **more).final.sum()

    z0 = torch.tensor([[[0.5], [0.6]], [[0.5], [80.0]]], dtype=torch.float32)
    args = torch.tensor(1.0)
    by_z0, by_args = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(z0, args)
    assert torch.isfinite(by_z0).all() and torch.isfinite(by_args).all()
    # z⁻⁸ grows by 8·args·t.
    assert float(by_z0[0, 0, 0]) == pytest.approx(float((1 + 8 * 0.5**8) ** (-9 / 8)), rel=1e-3)


# -- failures and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
def test_a_copy_that_fails_ends_its_sample(control):
    """The status is shared, like the steps; other samples go on."""

    def explode(t, z):
        return torch.where(z.abs() > 3.0, float("nan"), z**3)

    z0 = torch.tensor([[[0.1], [0.2]], [[0.2], [2.0]]], dtype=torch.float64)

    def final(z, on_failure):
        solution = nde.solve(nde.ODE(explode), z, (0.0, 1.0), control=control, adjoint="direct", on_failure=on_failure)
        return solution.final, solution.status

    with refused(nde.NonFiniteState, "sample 1" if control == "per_sample" else "batch"):
        vmap(lambda z: final(z, "raise"))(z0)
    found, status = vmap(lambda z: final(z, "ignore"))(z0)
    failed = torch.tensor([control == "joint", True])
    assert torch.equal(status != 0, failed.expand(2, 2))
    assert torch.equal(found[..., 0].isnan(), failed.expand(2, 2))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_figures_of_a_failure_are_the_worst_copy_s(solver, control):
    """A solve of equal copies fails as one of them does, and a copy that stands still changes nothing."""
    mu = torch.tensor([5.0, 50.0], dtype=torch.float64)

    def failing(solve):
        with pytest.raises(nde.MaxStepsReached) as caught:
            solve()
        return torch.tensor([caught.value.t, caught.value.dt, caught.value.error, caught.value.stiffness])

    def final(z, moving=1.0):
        f = van_der_pol(mu)
        how = {"solver": solver, "control": control, "adjoint": "direct", "max_steps": 20, "dt0": 1e-3}
        return nde.solve(nde.ODE(lambda t, z: moving * f(t, z)), z, (0.0, 20.0), **how).final

    z0 = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    expected = failing(lambda: final(z0))
    for moving in (torch.ones(2), torch.tensor([0.0, 1.0])):
        found = failing(lambda moving=moving: vmap(final, in_dims=(None, 0))(z0, moving.double()))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("control", CONTROLS)
def test_auto_goes_where_the_stiff_copy_needs_it(control):
    mu = torch.tensor([300.0], dtype=torch.float64)

    def parts(z, moving):
        f = van_der_pol(mu)
        how = {"solver": "auto", "control": control, "adjoint": "direct", "dt0": 1e-3}
        steps = nde.solve(nde.ODE(lambda t, z: moving * f(t, z)), z, (0.0, 5.0), **how).steps
        return steps.part, steps.dt

    z0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        expected, dt = parts(z0, 1.0)
        assert expected.any() and not expected.all()
        found, sizes = vmap(parts, in_dims=(None, 0))(z0, torch.tensor([0.0, 1.0], dtype=torch.float64))
    for part, size in zip(found, sizes, strict=True):
        assert torch.equal(part, expected)
        close(size, dt, 1e-4)


def test_a_copy_that_starts_at_nan_is_named():
    z0 = torch.ones(2, 3, 1)
    z0[1, 2] = float("nan")
    with refused(ValueError, "z0", "samples 2"):
        vmap(lambda z: nde.solve(nde.ODE(lambda t, z: -z), z, (0.0, 1.0), adjoint="direct").final)(z0)


def test_mixing_in_one_copy_is_found():
    """The samples of the second copy depend on each other."""

    def f(t, z, args):
        return -z + args * z.mean(dim=0)

    def final(args):
        return nde.solve(nde.ODE(f), torch.randn(3, 2), (0.0, 1.0), args=args, adjoint="direct").final

    with refused(ValueError, "joint"):
        vmap(final, randomness="same")(torch.tensor([0.0, 1.0]))


TRANSFORMS = {
    "grad": lambda f, z: grad(lambda z: f(z).sum())(z),
    "vjp": lambda f, z: vjp(f, z),
    "jvp": lambda f, z: jvp(f, (z,), (z,)),
    "vmap": lambda f, z: vmap(f)(z[None]),
    "jacrev": lambda f, z: jacrev(f)(z),
}


@pytest.mark.parametrize("adjoint", OTHERS)
@pytest.mark.parametrize("transform", [*TRANSFORMS, "forward mode"])
@pytest.mark.parametrize("graph", [True, False])
def test_other_adjoints_say_what_is_needed(transform, adjoint, graph):
    z0 = torch.randn(2, 3)

    final = nde.NeuralODE(torch.nn.Linear(3, 3), adjoint=adjoint)

    with torch.set_grad_enabled(graph), refused(nde.NeuralDEError, "torch.func", "adjoint='direct'", repr(adjoint)):
        if transform == "forward mode":
            with forward_ad.dual_level():
                final(forward_ad.make_dual(z0, z0))
        else:
            TRANSFORMS[transform](final, z0)


def test_a_new_adjoint_says_so_by_default():
    assert not nde.adjoints.Adjoint.transforms and nde.adjoints.ADJOINTS["direct"].transforms


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", ["tsit5", "rodas5p"])
def test_transforms_inside_of_f_are_nobodys_business(solver, adjoint):
    """Only those around the solve matter, and what f does inside gets its gradients under every adjoint."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    encoder = torch.nn.Linear(3, 3).double()
    z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for name in (adjoint, "direct"):
        code = encoder(z0.detach())  # closed over, and computed outside of f

        def f(t, z, code=code):
            energy = vmap(grad(lambda x: net(x).sum()))(z)
            return energy * code + 0.1 * jvp(net, (z,), (torch.ones_like(z),))[1]

        found = nde.solve(nde.ODE(f), z0, (0.0, 1.0), solver=solver, adjoint=name, rtol=1e-8).final
        parameters = [p for p in (*net.parameters(), *encoder.parameters()) if p is not net[2].bias]
        gradients.append(torch.autograd.grad(found.square().sum(), (z0, *parameters)))
    for x, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0.0
        close(x, expected, 1e-6)


def test_a_solver_that_cannot_be_transformed_says_so():
    class Theirs:
        order, stepping_class = 1, "fixed"

        def sync_device_dtype(self, x, t):
            return x, t

        def step(self, f, x, t, dt, k1=None, args=None):
            return None, x + dt * f(t, x), None

    def final(z):
        more = {"solver": Theirs(), "dt0": 0.25, "adjoint": "direct", "control": "joint"}
        return nde.solve(nde.ODE(lambda t, z: -z), z, (0.0, 1.0), **more).final

    z0 = torch.ones(2, 3)
    close(final(z0), z0 * 0.75**4, 1e-6)
    for transform in TRANSFORMS.values():
        with refused(nde.NeuralDEError, "Theirs", "torch.func"):
            transform(final, z0)


def test_events_say_that_they_cannot():
    event = nde.Event(lambda t, z: z[:, 0] - 0.5)
    with refused(nde.NeuralDEError, "events", "torch.func"):
        vmap(lambda z: nde.solve(nde.ODE(lambda t, z: -z), z, (0.0, 1.0), adjoint="direct", events=event).final)(
            torch.ones(2, 1, 1)
        )


@pytest.mark.parametrize("name", ["t", "rtol", "atol", "dt0", "dt_max", "jump_times", "step_times"])
def test_what_steps_are_made_of_cannot_be_mapped(name):
    values = {"t": [[0.0, 1.0], [0.0, 2.0]], "jump_times": [[0.1], [0.2]], "step_times": [[0.1], [0.2]]}
    mapped = torch.tensor(values.get(name, [0.1, 0.2]))

    def final(x):
        more = {"t": (0.0, 1.0), "adjoint": "direct", name: x}
        return nde.solve(nde.ODE(lambda t, z: -z), torch.ones(2, 1), **more).final

    with refused(ValueError, name, "vmap"):
        vmap(final)(mapped)
    assert torch.isfinite(vmap(lambda z: final(mapped[0]) * z)(torch.ones(2))).all(), "not mapped, it may be a tensor"


# -- what stays outside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nothing_of_a_transform_is_kept(transform):
    """Coefficients that are made inside of a transform serve the solves after it."""
    z0 = torch.randn(2, 3)
    for solver in ("bs3", "rodas5p"):
        _coefficients.cache_clear()
        _abscissae.cache_clear()

        def final(z, solver=solver):
            return nde.solve(nde.ODE(lambda t, z: torch.sin(z)), z, (0.0, 1.0), solver=solver, adjoint="direct").final

        TRANSFORMS[transform](final, z0)
        for plain in (final(z0), torch.no_grad()(final)(z0)):
            assert not transforms.wrapped(plain)
            close(plain, final(z0), 1e-6)
        tableau, what = nde.solvers.SOLVERS[solver].tableau, (torch.float32, torch.device("cpu"))
        if solver == "bs3":
            made = _coefficients(tableau, torch.float32, *what)
            kept = [made.c, made.b.tensor, made.error.tensor, made.interpolant, *(row.tensor for row in made.a)]
        else:
            kept = [_abscissae(tableau, *what)]
        assert not any(map(transforms.wrapped, kept))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    "penalty", [reg.GlobalError(1.0), reg.GlobalError(1.0, scaled=False), reg.GlobalStiffness(1.0)]
)
def test_penalties_under_transforms(penalty, control):
    """The gradient of a penalty in forward mode, and by vmap of grad, is the tape's."""
    inputs = case()
    direction = random_like(inputs)

    def value(z0, args):
        return penalty(solved(z0, args, control=control))

    _, rate = jvp(value, inputs, direction)
    leaves = [x.requires_grad_() for x in torch.utils._pytree.tree_leaves(inputs)]
    expected = torch.autograd.grad(value(*inputs), leaves)
    pulled = sum((x * d).sum() for x, d in zip(expected, torch.utils._pytree.tree_leaves(direction), strict=True))
    assert float(rate) == pytest.approx(float(pulled), rel=1e-8)
    by_z0 = vmap(grad(value), in_dims=(0, None))(inputs[0].detach()[None].expand(2, -1, -1), inputs[1])
    close(by_z0, expected[0].expand(2, -1, -1), 1e-8)


def test_dropout_under_vmap():
    """Each copy's own mask, or one for all, as vmap's randomness says; the same at every evaluation."""
    layer = nde.NeuralODE(torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Tanh()), adjoint="direct", rtol=1e-6)
    z0 = torch.ones(3, 2, 64)
    for randomness, alike in (("different", False), ("same", True)):
        found = vmap(layer, randomness=randomness)(z0)
        assert bool((found[0] == found[1]).all()) == alike
        assert int(layer.solution.stats.accepted.max()) < 20, "error control chased noise"
        # dz/dt = tanh(2z) where a mask keeps z, else 0.
        assert len(found.unique()) < 8


def test_without_the_private_names_nothing_is_active(monkeypatch):
    """A torch that renames them can still solve."""
    monkeypatch.delattr(torch._C._functorch, "peek_interpreter_stack")
    spec = importlib.util.spec_from_file_location("again", inspect.getfile(transforms))
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert not again.active() and not again.wrapped(torch.ones(1)) and again.worst(torch.ones(1)) == 1.0


@pytest.mark.parametrize("fixed", FIXED[:1])
def test_forward_mode_far_from_the_solve_changes_nothing(fixed):
    """A level of forward-mode AD without a tangent in the solve: the same numbers."""
    inputs = case()
    expected = solved(*inputs, fixed).final
    with forward_ad.dual_level():
        found = solved(*inputs, fixed).final
        assert forward_ad.unpack_dual(found).tangent is None
    close(found, expected, 1e-14)
