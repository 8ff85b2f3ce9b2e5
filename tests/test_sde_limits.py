"""Neural SDEs at their limits: noise that mixes components, trajectories with options of their own, other laws."""

import warnings

import pytest
import torch
from helpers import close, refused
from scipy import stats

import neuralde as nde

FIXED = nde.StepControl(adaptive=False)
HASTY = {"safety": 1.0, "factor_max": 5.0, "beta1": 0.6, "beta2": 0.0}  # fails as often as it succeeds


def crossed(sense="ito"):
    """dz = (z2 dW1, z1 dW2)."""
    return nde.SDE(lambda t, z: 0.0 * z, lambda t, z: z.flip(1), "diagonal", sense)


# -- noise that mixes components ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sosri", "sosri2", "srk", "milstein"])
def test_adaptive_steps_say_that_they_are_biased(solver):
    z0, how = torch.ones(2, 2, dtype=torch.float64), {"solver": solver, "rtol": 0.2, "atol": 0.2, "seed": 1}
    with pytest.warns(nde.BiasWarning, match=f"mixes components.*{solver!r}"):
        nde.solve(crossed(), z0, (0.0, 0.1), **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nde.solve(crossed(), z0, (0.0, 0.1), control=FIXED, dt0=0.05, **how)
        nde.solve(nde.SDE(lambda t, z: -z, lambda t, z: z.sin()), z0, (0.0, 0.1), **how)
        nde.solve(crossed("stratonovich"), z0, (0.0, 0.1), **how | {"solver": "heun"})


@pytest.mark.slow
def test_the_bias_is_there():
    """There is no drift: the mean stays where it was, and it does with fixed steps."""
    z0, how = torch.ones(100_000, 2, dtype=torch.float64), {"solver": "sosri", "seed": 2}
    with pytest.warns(nde.BiasWarning):
        adaptive = nde.solve(crossed(), z0, (0.0, 1.0), rtol=0.1, atol=0.1, **how).final
    fixed = nde.solve(crossed(), z0, (0.0, 1.0), control=FIXED, dt0=1 / 32, **how).final

    def off(z):  # in standard errors: E z = 1
        return float((z.mean() - 1.0).abs() / (z.mean(dim=1).std() / len(z) ** 0.5))

    assert off(fixed) < 4 < off(adaptive)


# -- the law, where steps are rejected ---------------------------------------------------------------------------------


def hasty(equation, solver, tolerance, samples, features=2):
    z0 = torch.ones(samples, features, dtype=torch.float64)
    control, how = nde.StepControl(**HASTY), {"rtol": tolerance, "atol": tolerance, "dt0": 0.25, "seed": 11}
    solution = nde.solve(equation, z0, (0.0, 1.0), solver=solver, control=control, **how)
    assert float(solution.stats.rejected.double().mean()) > 0.3 * float(solution.stats.accepted.double().mean())
    return solution.final


def require_normal(x, mean, covariance, room):
    """Means, covariances and each component's law; room: for the method's own error."""
    chance = 4 / len(x) ** 0.5
    scale = covariance.diagonal().sqrt()
    y = (x - mean) / scale
    assert float(y.mean(dim=0).abs().max()) < chance + room
    assert float((y.T @ y / len(y) - covariance / scale / scale[:, None]).abs().max()) < 1.5 * chance + room
    for column in y.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3


SAMPLES = [2000, pytest.param(100_000, marks=pytest.mark.slow)]
MU, SIGMA = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.6, 0.4]).double()


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
def test_rejections_leave_the_law_of_two_components(noise, samples):
    shape = (lambda g: g) if noise == "diagonal" else (lambda g: g[..., None])
    z = hasty(nde.SDE(lambda t, z: MU * z, lambda t, z: shape(SIGMA * z), noise), "sosri", 0.1, samples)
    covariance = torch.diag(SIGMA**2) if noise == "diagonal" else torch.outer(SIGMA, SIGMA)
    require_normal(z.clamp(min=1e-9).log(), MU - 0.5 * SIGMA**2, covariance, 0.01)


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("solver, tolerance", [("sosra", 0.1), ("srk", 3e-3)])
def test_rejections_leave_the_law_of_additive_noise(solver, tolerance, samples):
    rate = torch.tensor([1.5, 0.5]).double()
    spread = torch.tensor([[0.6, -0.2, 0.3], [0.1, 0.5, 0.4]]).double()
    equation = nde.SDE(lambda t, z: -rate * z, lambda t, z: spread.expand(len(z), -1, -1), "additive")
    both = rate + rate[:, None]
    covariance = spread @ spread.T * -torch.expm1(-both) / both
    require_normal(hasty(equation, solver, tolerance, samples), torch.exp(-rate), covariance, 0.02)


@pytest.mark.slow
def test_rejections_leave_the_law_of_noise_that_does_not_commute():
    """dx = dW1, dy = x dW2 from (1, 1): x has W1's law, y mean 1 and variance ∫ E x² = 3/2; they are not correlated."""

    def diffusion(t, z):
        one, zero = torch.ones_like(z[:, 0]), torch.zeros_like(z[:, 0])
        return torch.stack([torch.stack([one, zero], dim=1), torch.stack([zero, z[:, 0]], dim=1)], dim=1)

    equation = nde.SDE(lambda t, z: 0.0 * z, diffusion, "general", "stratonovich")
    x, y = hasty(equation, "heun", 0.02, 100_000).unbind(dim=1)
    assert stats.kstest((x - 1).numpy(), "norm").pvalue > 1e-3
    chance = 4 / len(x) ** 0.5
    assert abs(float(y.mean()) - 1) < 1.5 * chance
    assert abs(float(y.var()) / 1.5 - 1) < 4 * chance + 0.02
    assert abs(float(((x - 1) * (y - 1)).mean())) < 3 * chance


# -- trajectories ------------------------------------------------------------------------------------------------------


def layer(**options):
    torch.manual_seed(0)
    drift = torch.nn.Linear(3, 3).double()
    return nde.NeuralSDE(lambda t, z: drift(z), lambda t, z: 0.3 * z, **{"rtol": 0.2, "atol": 0.2, "seed": 2} | options)


def inputs(batch=4):
    return torch.linspace(-1, 1, 3 * batch, dtype=torch.float64).reshape(batch, 3)


def test_tolerances_of_every_input_are_those_of_its_trajectories():
    tolerance = torch.logspace(-2, 0, 4, dtype=torch.float64)[:, None].expand(4, 3).contiguous()
    several = layer(rtol=tolerance, atol=tolerance)
    several(inputs(), trajectories=2)
    accepted = several.solution.stats.accepted.reshape(4, 2)
    assert bool((accepted[0] > accepted[3]).all())
    one = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)  # of the components, of which there are as many as inputs
    assert layer(rtol=one, atol=one)(inputs(3), trajectories=2).shape == (2, 3, 3)


def test_paths_of_trajectories():
    shared = layer(brownian=nde.BrownianTree(1, "shared"), seed=None)
    shared(inputs(2), trajectories=3)
    w = shared.solution.brownian([1.0])[-1].reshape(2, 3, 3)
    assert torch.equal(w[0], w[1]) and not torch.equal(w[0, 0], w[0, 1])
    given = layer(brownian=nde.BrownianTree(1, [0, 1, 2, 0, 1, 2]), seed=None)
    given(inputs(2), trajectories=3)
    close(given.solution.brownian([1.0])[-1].reshape(2, 3, 3), w, 0.0)
    with refused(ValueError, "paths", "8 (4 inputs times 2)", "got 4"):
        layer(brownian=nde.BrownianTree(1, [0, 1, 2, 3]), seed=None)(inputs(), trajectories=2)


def test_shared_args_of_trajectories():
    drift, z0 = lambda t, z, args: z @ args, inputs(3)
    several = nde.NeuralSDE(drift, lambda t, z, args: 0.1 * z, rtol=0.2, atol=0.2, seed=1, control="joint")
    with refused(ValueError, "args", "first size is the batch, 3", "x[None]"):
        several(z0, args=torch.eye(3).double(), trajectories=2)
    shared = nde.NeuralSDE(lambda t, z, args: z * args, lambda t, z, args: 0.1 * z, rtol=0.2, atol=0.2, seed=1)
    assert shared(z0, args=torch.ones(1, 3).double(), trajectories=2).shape == (2, 3, 3)


def test_the_horizon_of_a_layer_increases():
    for t in ((1.0, 0.0), torch.tensor([1.0, 0.5])):
        with refused(ValueError, "t must increase"):
            layer(t=t)


# -- messages ----------------------------------------------------------------------------------------------------------


def test_messages_name_what_is_wrong():
    z0 = inputs()
    with refused(ValueError, "additive", "one argument", "lambda t, z"):
        nde.solve(nde.SDE(lambda t, z: -z, lambda t: t[..., None] * torch.ones(2).double(), "additive"), z0, (0.0, 1.0))
    with refused(ValueError, "'sosra' does not solve", "ito and stratonovich"):
        nde.solve(crossed("stratonovich"), z0, (0.0, 1.0), solver="sosra")
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    with refused(ValueError, "it is 3 samples of one number each", "z0[None]"):
        nde.solve(nde.SDE(lambda t, z: z @ weight, lambda t, z: 0.1 * z), z0[0], (0.0, 1.0))


def test_a_brownian_interval_covers_the_horizon():
    from neuralde.interop.torchsde import brownian_interval

    brownian = brownian_interval(0.0, 0.5, size=(4, 3), dt=0.1, seed=1, dtype=torch.float64)
    how = {"control": "joint", "rtol": 0.2, "atol": 0.2}
    equation = nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z)
    with refused(ValueError, "brownian", "from 0 to 1", "for 0 to 0.5"):
        nde.solve(equation, inputs(), (0.0, 1.0), brownian=brownian, **how)
    nde.solve(equation, inputs(), (0.0, 0.5), brownian=brownian, **how)


def test_a_drawn_seed_can_be_read():
    equation, how = nde.SDE(lambda t, z: -z, lambda t, z: 0.1 * z), {"rtol": 0.2, "atol": 0.2}
    first = nde.solve(equation, inputs(), (0.0, 1.0), **how)
    again = nde.solve(equation, inputs(), (0.0, 1.0), seed=first.seed, **how)
    assert torch.equal(first.final, again.final)
    assert nde.solve(nde.ODE(lambda t, z: -z), inputs(), (0.0, 1.0)).seed is None
