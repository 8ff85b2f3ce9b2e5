"""The method that carries a second approximation of the state: what is seen of it, and what is not."""

import pytest
import torch
from helpers import CONTROLS, close

import neuralde as nde
import regularizers as reg
from neuralde.solvers.doubling import reversible_heun

FIXED = nde.StepControl(adaptive=False)


class Field:
    """Drift and diffusion of a step, as the method calls them."""

    @staticmethod
    def diffusion(t, z):
        return 0.5 + 0.2 * torch.cos(z + t)

    @staticmethod
    def times_noise(diffusion, noise):
        return diffusion * noise

    def __call__(self, t, z):
        return torch.sin(z) - t


def start(batch=4):
    return torch.linspace(-1, 1, 3 * batch, dtype=torch.float64).reshape(batch, 3)


def equation():
    return nde.SDE(lambda t, z: torch.sin(z), lambda t, z: 0.4 + 0.1 * z, sde_type="stratonovich")


def solved(z0=None, **options):
    options = {"rtol": 1e-2, "atol": 1e-2, "seed": 3, "solver": "reversible_heun", "dt0": 0.2} | options
    return nde.solve(equation(), start() if z0 is None else z0, (0.0, 1.0), **options)


def test_a_step_can_be_undone():
    f, z, h = Field(), torch.randn(4, 6, dtype=torch.float64), torch.full((4, 1), 0.1, dtype=torch.float64)
    noise = nde.solvers.doubling.Noise(0.3 * torch.randn(4, 3, dtype=torch.float64), None)

    def step(times, h, z, noise):
        x = z[:, 3:]
        return reversible_heun(f, times, h, z, noise, (f(times[0], x), f.diffusion(times[0], x)))

    after = step((0.2, 0.3), h, z, noise)
    before = step((0.3, 0.2), -h, after, noise._replace(w=-noise.w))
    torch.testing.assert_close(before, z, rtol=0, atol=1e-14)
    assert float((after - z).abs().min()) > 0


@pytest.mark.parametrize("control", CONTROLS)
def test_what_is_carried_beside_the_solution_is_not_seen(control):
    z0, plain = start(), solved(control=control)
    assert plain.zs.shape == (2, 4, 3) and plain.steps.z.shape[1:] == (4, 3) and plain(0.3).shape == (4, 3)
    split = {"a": z0[:, :1], "b": z0[:, 1:, None]}

    def spread(t, z):
        return {name: 0.4 + 0.1 * x for name, x in z.items()}

    made = nde.SDE(lambda t, z: {k: torch.sin(x) for k, x in z.items()}, spread, sde_type="stratonovich")
    options = {"rtol": 1e-2, "atol": 1e-2, "seed": 3, "solver": "reversible_heun", "control": control, "dt0": 0.2}
    found = nde.solve(made, split, (0.0, 1.0), **options).final
    torch.testing.assert_close(torch.cat([found["a"], found["b"][..., 0]], dim=1), plain.final, rtol=0, atol=1e-13)
    each = solved(rtol=torch.full((3,), 1e-2).double(), atol=torch.full((4, 3), 1e-2).double(), control=control)
    torch.testing.assert_close(each.final, plain.final, rtol=0, atol=1e-13)


def test_samples_leave_the_batch_and_fields_of_the_whole_batch_are_padded():
    rate, turn = (
        torch.logspace(0, 1.3, 8, dtype=torch.float64)[:, None],
        torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(),
    )
    options = {"solver": "reversible_heun", "rtol": 1e-2, "atol": 1e-2, "dt0": 0.05, "seed": 1, "args": rate}

    def solve(drift):
        made = nde.SDE(drift, lambda t, z, a: 0.02 * z, sde_type="stratonovich")
        return nde.solve(made, start(8)[:, :2].contiguous(), (0.0, 2.0), **options)

    own, held = solve(lambda t, z, a: a * (z @ turn)), solve(lambda t, z, a: rate * (z @ turn))
    assert own.stats.function_calls * 8 > own.stats.nfe.sum()  # some were left out
    torch.testing.assert_close(held.final, own.final, rtol=0, atol=1e-11)


def test_penalties_and_probes():
    torch.manual_seed(0)
    options = {
        "sde_type": "stratonovich",
        "rtol": 1e-2,
        "atol": 1e-2,
        "solver": "reversible_heun",
        "seed": 2,
        "dt0": 0.2,
    }
    layer = nde.NeuralSDE(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), **options).double()
    generator = torch.Generator().manual_seed(3)
    for penalty in (
        reg.GlobalError(),
        reg.LocalError(through_state=True, generator=generator),
        reg.LocalError("biased", generator=generator),
        reg.JacobianFrobenius(generator=generator),
        reg.KineticEnergy(),
    ):
        layer.zero_grad()
        layer(start())
        value = penalty(layer)
        value.backward()
        assert float(value.detach()) > 0
        assert float(layer.drift.weight.grad.abs().max()) > 0
    other = layer.solution.steps
    energy = (layer.drift(other.z).square().sum(dim=2) * other.dt * other.mask).sum(dim=0).mean().detach()
    assert 0.7 < float(value.detach() / energy) < 1.4  # of one approximation of the state, not of two
    found = nde.introspection.probe(equation(), 0.0, start(), 0.1, "reversible_heun", rtol=1e-2, atol=1e-2, seed=1)
    assert found.z.shape == (4, 3) and bool((found.error > 0).all())


def test_another_method_s_probe_of_its_solution():
    """The stiffness of sosra2, of a solution with additive noise."""
    field = nde.SDE(lambda t, z: -7.0 * z, lambda t, z: torch.full((len(z), 3, 1), 0.1).double(), "additive")
    solution = nde.solve(
        field, start(), (0.0, 1.0), solver="reversible_heun", rtol=1e-2, atol=[1e-2] * 3, seed=1, dt0=0.2
    )
    value = reg.LocalStiffness(generator=torch.Generator().manual_seed(1)).figure(solution)
    close(value, torch.full_like(value, 7.0), 1e-9)
