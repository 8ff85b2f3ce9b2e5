"""Per-sample control: what a sample gets does not depend on who else is in the batch."""

import pytest
import torch
from helpers import ADAPTIVE, CONTINUOUS, EXACT
from problems import van_der_pol

import neuralde as nde

BATCH, CALM = 64, 17  # the sample that is compared sits among 63 stiffer ones


def crowd():
    generator = torch.Generator().manual_seed(3)
    mu = 20 + 30 * torch.rand(BATCH, generator=generator, dtype=torch.float64)
    mu[CALM] = 1.0
    z0 = torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)
    return z0, mu


def pendulum(t, z, rate):
    """Not stiff, only fast: the stiff one can't be solved backwards, as "backsolve" does."""
    x, v = z.unbind(dim=1)
    return rate[:, None] * torch.stack([v, -torch.sin(x)], dim=1)


def outcome(f, z0, mu, t, solver, adjoint):
    """The solution and the gradients of a loss that uses the state, and the figures where they have gradients."""
    z0, mu = z0.clone().requires_grad_(), mu.clone().requires_grad_()
    rtol = 1e-5 if nde.solvers.get(solver).order > 1 else 1e-3
    solution = nde.solve(nde.ODE(f), z0, t, solver=solver, adjoint=adjoint, args=mu, rtol=rtol, atol=1e-2 * rtol)
    loss = (solution.zs**2).sum()
    if adjoint in EXACT:
        loss = loss + solution.error.sum()
        loss = loss + solution.stiffness.sum() if solution.solver.reports_stiffness else loss
    return solution, *torch.autograd.grad(loss, [z0, mu])


def same_alone_and_together(f, z0, mu, t, solver, adjoint):
    one = slice(CALM, CALM + 1)
    together, *gradients = outcome(f, z0, mu, t, solver, adjoint)
    alone, *own = outcome(f, z0[one], mu[one], t, solver, adjoint)
    others = together.stats.accepted.double().mean()
    assert others > 2 * alone.stats.accepted[0], "the others must be harder for this test to say anything"
    counted = [(together.stats, alone.stats)]
    if adjoint in CONTINUOUS:
        counted.append((together.backward_stats, alone.backward_stats))
        assert together.backward_stats.nfe.double().mean() > 2 * alone.backward_stats.nfe[0]
    for both, single in counted:
        for name in ("nfe", "accepted", "rejected"):
            assert getattr(both, name)[CALM] == getattr(single, name)[0]
    n = int(alone.stats.accepted[0])
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(together.zs[:, one], alone.zs, **close)
    # Step sizes follow error estimates, in which rounding is larger than in the state.
    torch.testing.assert_close(together.steps.t[:n, one], alone.steps.t, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(together.error[one], alone.error, rtol=1e-8, atol=0)
    for g, mine in zip(gradients, own, strict=True):
        torch.testing.assert_close(g[one], mine, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("adjoint", EXACT)
def test_alone_and_in_a_batch_of_stiffer_ones(solver, adjoint):
    t = torch.linspace(0.0, 1.5, 5, dtype=torch.float64)
    same_alone_and_together(van_der_pol(None), *crowd(), t, solver, adjoint)


@pytest.mark.parametrize("solver", ["tsit5", "rodas5p", "vcab3", "auto"])
@pytest.mark.parametrize("adjoint", CONTINUOUS)
def test_alone_and_in_a_batch_of_faster_ones(solver, adjoint):
    """Where the backward solve has steps of its own, and its batch is compacted in turn."""
    z0, rate = crowd()
    t = torch.linspace(0.0, 0.5, 4, dtype=torch.float64)
    same_alone_and_together(pendulum, z0, rate, t, solver, adjoint)


def test_the_batch_is_compacted():
    """Rows of f evaluated stay near what the samples need alone, though one of them needs many more steps."""
    rows = 0

    def f(t, z, mu):
        nonlocal rows
        rows += len(z)
        return van_der_pol(None)(t, z, mu)

    mu = torch.full((BATCH,), 1.0, dtype=torch.float64)
    mu[5] = 200.0
    z0 = torch.tensor([2.0, 0.0], dtype=torch.float64).expand(BATCH, 2)
    solution = nde.solve(nde.ODE(f), z0, (0.0, 2.0), args=mu, rtol=1e-6, atol=1e-8)
    needed = int(solution.stats.nfe.sum())
    assert int(solution.stats.nfe.max()) > 10 * int(solution.stats.nfe.min())
    assert rows < 1.5 * needed


def test_different_horizons_directions_and_outputs_in_one_batch():
    generator = torch.Generator().manual_seed(0)
    batch, points = 12, 4
    start = torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    gaps = 0.1 + torch.rand(batch, points, generator=generator, dtype=torch.float64)
    direction = torch.where(torch.arange(batch) % 3 == 0, -1.0, 1.0)[:, None]
    t = torch.cat([start, start + direction * gaps.cumsum(1)], dim=1)
    z0 = torch.randn(batch, 2, generator=generator, dtype=torch.float64)
    equation = nde.ODE(lambda t, z: torch.cat([z[:, 1:], -torch.sin(3 * z[:, :1]) * (1 + t)], dim=1))
    together = nde.solve(equation, z0, t, rtol=1e-6, atol=1e-8)
    assert together.ts.shape == (points + 1, batch)
    for i in range(batch):
        alone = nde.solve(equation, z0[i : i + 1], t[i], rtol=1e-6, atol=1e-8)
        assert together.stats.nfe[i] == alone.stats.nfe[0]
        torch.testing.assert_close(together.zs[:, i], alone.zs[:, 0], rtol=1e-11, atol=1e-12)


def test_joint_control_does_depend_on_the_batch():
    """The control of the control: what per-sample control is for."""
    z0, mu = crowd()
    solve = {"control": "joint", "rtol": 1e-5, "atol": 1e-7}
    together = nde.solve(nde.ODE(van_der_pol(None)), z0, (0.0, 1.5), args=mu, **solve)
    alone = nde.solve(nde.ODE(van_der_pol(None)), z0[CALM : CALM + 1], (0.0, 1.5), args=mu[CALM : CALM + 1], **solve)
    assert together.stats.accepted[CALM] > 2 * alone.stats.accepted[0]


def test_a_table_is_no_samples_own_beside_stiff_ones():
    """args with as many rows as the batch: small against the stiff samples' derivatives, not against the others'."""
    rate = torch.ones(BATCH, 1)
    rate[[7, 20, 41]] = 300.0
    table = torch.linspace(-1.0, 1.1, BATCH)[:, None]

    def f(t, z, args):
        return -args[0] * z + 0.02 * args[1].mean()

    z0 = torch.ones(BATCH, 1)
    together = nde.solve(nde.ODE(f), z0, (0.0, 8.0), args=(rate, table), rtol=1e-5, atol=1e-7)
    steady = 0.02 * table.mean() / rate
    expected = steady + (1 - steady) * torch.exp(-8 * rate)
    torch.testing.assert_close(together.final, expected, rtol=0, atol=1e-5)


def test_an_optional_parameter_is_not_the_time():
    rate = 2.0
    solution = nde.solve(
        nde.ODE(lambda z, k=rate: -k * z), torch.ones(1, 1, dtype=torch.float64), (0.0, 1.0), rtol=1e-8
    )
    assert float(solution.final) == pytest.approx(0.1353353, rel=1e-5)
