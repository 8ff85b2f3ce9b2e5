"""adjoint="backsolve" of SDEs: against the exact gradient, against torchsde's own, and what it can't do."""

import pytest
import torch
from helpers import CONTINUOUS, close, refused
from sde_problems import Net

import neuralde as nde
import regularizers as reg
from neuralde.interop.torchsde import brownian_interval

FIXED = nde.StepControl(per_sample=False, adaptive=False)
NOISE = ["diagonal", "scalar", "additive", "general"]
TIMES = [0.0, 0.3125, 0.75]


def start(batch=4):
    return torch.linspace(-1, 1, 3 * batch, dtype=torch.float64).reshape(batch, 3)


def gradients(adjoint, noise="diagonal", t=TIMES, look=None, **options):
    """Of a loss over all outputs, by z0, args and the parameters of drift and diffusion, in one row."""
    torch.manual_seed(1)
    model, z0 = Net(noise).double(), start().requires_grad_()
    args = torch.tensor([0.8, -0.5, 1.2], dtype=torch.float64, requires_grad=True)
    options = {"seed": 5, "solver": "midpoint", "control": FIXED} | options
    solution = nde.solve(model.equation("stratonovich"), z0, t, args=args, adjoint=adjoint, **options)
    weights = torch.linspace(1, 2, solution.zs.numel(), dtype=torch.float64).view_as(solution.zs)
    loss = (solution.zs * weights).sum() if look is None else look(solution)
    loss.backward()
    return torch.cat([z0.grad.flatten(), args.grad, *(p.grad.flatten() for p in model.parameters())])


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("method", ["midpoint", "heun"])
def test_gradients_approach_the_exact_ones_as_steps_fall(noise, method):
    errors = []
    for n in (8, 128):
        options = {"noise": noise, "solver": method, "dt0": 1 / n}
        exact, found = gradients("direct", **options), gradients("backsolve", **options)
        errors.append(float((found - exact).norm() / exact.norm()))
    # The noise of the general one does not commute: order 0.5 there, 1 elsewhere, of which chance leaves something.
    assert errors[1] < (0.5 if noise == "general" else 0.2) * errors[0] and errors[0] < 2e-3


@pytest.mark.parametrize("noise", NOISE)
def test_reversible_heun_is_undone_exactly(noise):
    for how in ({"dt0": 0.125}, {"dt0": 0.2, "control": "joint", "rtol": 1e-2, "atol": 1e-2}):
        options = {"noise": noise, "solver": "reversible_heun"} | how
        close(gradients("backsolve", **options), gradients("direct", **options), 1e-12)


def test_adaptive_steps_and_each_sample_s_own_outputs():
    times = torch.tensor(TIMES, dtype=torch.float64).repeat(4, 1)
    times[:, 1] += torch.tensor([0.0, 0.1, 0.1, 0.23])
    options = {"t": times, "control": "joint", "rtol": 1e-3, "atol": 1e-3, "dt0": 0.1}
    exact = gradients("direct", **options)
    assert float((gradients("backsolve", **options) - exact).norm()) < 1e-3 * float(exact.norm())
    options["solver"] = "reversible_heun"
    close(gradients("backsolve", **options), gradients("direct", **options), 1e-11)


def test_a_loss_that_does_not_look_at_the_end():
    def look(solution):
        return solution.zs[1].square().sum()

    options = {"solver": "reversible_heun", "dt0": 0.125, "look": look}
    close(gradients("backsolve", **options), gradients("direct", **options), 1e-12)


@pytest.mark.parametrize("method, back", [("midpoint", "midpoint"), ("reversible_heun", "adjoint_reversible_heun")])
def test_torchsde_s_own_adjoint_has_the_same_gradients(method, back):
    import torchsde

    class Theirs(Net):
        noise_type, sde_type = "diagonal", "stratonovich"
        one = torch.ones(3, dtype=torch.float64)

        def f(self, t, z):
            return super().f(t, z, self.one)

        def g(self, t, z):
            return super().g(t, z, self.one)

    torch.manual_seed(1)
    sde, found = Theirs().double(), []

    def interval():
        return brownian_interval(0.0, 1.0, (4, 3), 0.125, seed=4, dtype=torch.float64)

    for ours in (True, False):
        sde.zero_grad()
        z0, ts = start().requires_grad_(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        if ours:
            equation, options = nde.SDE(sde.f, sde.g, sde_type="stratonovich"), {"control": FIXED, "dt0": 0.125}
            zs = nde.solve(equation, z0, ts, method, adjoint="backsolve", brownian=interval(), **options).zs
        else:
            how = {"method": method, "adjoint_method": back, "dt": 0.125}
            zs = torchsde.sdeint_adjoint(sde, z0, ts, bm=interval(), **how)
        zs[1:].square().sum().backward()
        found.append(torch.cat([z0.grad.flatten(), *(p.grad.flatten() for p in sde.parameters())]))
    close(*found, 1e-12)


def test_states_of_any_structure_and_precision():
    weight = torch.tensor(0.7, requires_grad=True)
    equation = nde.SDE(
        lambda t, z: {name: -weight.to(x.dtype) * x for name, x in z.items()},
        lambda t, z: {name: 0.3 * torch.cos(x) for name, x in z.items()},
        sde_type="stratonovich",
    )
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight.grad = None
        z0 = {"a": torch.ones(4, 3, dtype=dtype), "b": torch.ones(4, 2, 2, dtype=dtype)}
        solution = nde.solve(equation, z0, (0.0, 1.0), control=FIXED, dt0=1 / 64, adjoint="backsolve", seed=1)
        sum(x.float().square().sum() for x in solution.final.values()).backward()
        found.append(float(weight.grad))
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=0.05)


def test_no_states_are_kept_and_the_backward_solve_is_counted():
    equation = nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z, sde_type="stratonovich")
    z0 = start().requires_grad_()
    solution = nde.solve(equation, z0, (0.0, 1.0), control=FIXED, dt0=0.1, adjoint="backsolve", seed=1)
    assert not solution._outcome.trajectory.grid.held.z
    solution.final.sum().backward()
    counts = solution._outcome.backward()
    assert counts.accepted.tolist() == [10] * 4
    # Two evaluations of drift and diffusion a step; and one look whether all is as it was.
    assert counts.nfe.tolist() == [10 * 4 + 3] * 4


def test_outputs_before_a_failure_have_gradients():
    equation = nde.SDE(lambda t, z: z**3, lambda t, z: 0.1 * z, sde_type="stratonovich")
    found = []
    for adjoint in ("backsolve", "direct"):
        z0 = torch.full((2, 1), 1.2, dtype=torch.float64, requires_grad=True)
        options = {"control": FIXED, "dt0": 0.01, "adjoint": adjoint, "seed": 1, "on_failure": "ignore"}
        options["solver"] = "reversible_heun"
        solution = nde.solve(equation, z0, [0.0, 0.1, 0.2, 3.0], **options)
        assert not bool(solution.converged.any())
        solution.zs[1:3].sum().backward()
        found.append(z0.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_a_layer():
    torch.manual_seed(0)
    drift, diffusion = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    options = {"sde_type": "stratonovich", "control": "joint", "adjoint": "backsolve", "rtol": 0.1, "atol": 0.1}
    layer = nde.NeuralSDE(drift, diffusion, **options).double()
    value = layer(start(), trajectories=2).square().mean()
    (value + 0.1 * reg.LocalError()(layer)).backward()  # a local penalty makes a step of its own
    assert all(bool((p.grad != 0).any()) and bool(p.grad.isfinite().all()) for p in layer.parameters())
    with refused(ValueError, "'backsolve'", "control='joint'", "'checkpointed'"):
        nde.NeuralSDE(drift, diffusion, sde_type="stratonovich", adjoint="backsolve")


def test_what_it_can_t_do():
    z0 = start().requires_grad_()

    def solve(**options):
        given = {"adjoint": "backsolve", "control": "joint", "rtol": 0.1, "atol": 0.1, "seed": 1} | options
        sense = given.pop("sense", "stratonovich")
        return nde.solve(nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z, sde_type=sense), z0, (0.0, 1.0), **given)

    with refused(ValueError, "sde_type='stratonovich'", "½ g ∂g/∂z", "'checkpointed'"):
        solve(sense="ito")
    with refused(ValueError, "one time for the whole batch", "control='joint'"):
        solve(control="per_sample")
    with refused(ValueError, "rtol=0.001", "adjoint='backsolve'"):
        solve(adjoint=nde.adjoints.Backsolve(rtol=1e-3))
    with refused(nde.NeuralDEError, "solution.error", "'checkpointed'", "LocalError"):
        (solve().error.sum() + solve().final.sum()).backward()
    with refused(nde.NeuralDEError, "solution(t)", "'checkpointed'", "'direct'"):
        solve()(0.5).sum().backward()
    with refused(nde.NeuralDEError, "double backward"):
        torch.autograd.grad(solve().final.sum(), z0, create_graph=True)


@pytest.mark.parametrize("adjoint", [name for name in CONTINUOUS if name != "backsolve"])
def test_other_continuous_adjoints_are_those_of_odes(adjoint):
    equation = nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z, sde_type="stratonovich")
    with refused(ValueError, repr(adjoint), "'checkpointed'", "'direct'", "'backsolve'"):
        nde.solve(equation, start(), (0.0, 1.0), adjoint=adjoint, control="joint")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    found = []
    for device in ("cpu", "cuda"):
        z0 = start().to(device).requires_grad_()
        equation = nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z, sde_type="stratonovich")
        nde.solve(equation, z0, (0.0, 1.0), control=FIXED, dt0=0.1, adjoint="backsolve", seed=1).final.sum().backward()
        found.append(z0.grad.cpu())
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)
