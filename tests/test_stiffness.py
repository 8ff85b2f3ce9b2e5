"""The stiffness estimate: exact where it must be, and the method's stability size."""

import pytest
import torch
from helpers import SOLVERS

import neuralde as nde

REPORTING = [n for n, s in nde.solvers.SOLVERS.items() if s.reports_stiffness]


def options(name):
    return {} if nde.solvers.get(name).adaptive else {"dt0": 0.07}


def test_methods_with_two_stages_at_one_abscissa_report():
    assert {"rk4", "dopri5", "tsit5"} <= set(REPORTING)


@pytest.mark.parametrize("name", REPORTING)
@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("rate", [-0.3, -2.5, -40.0, 1.7])
@pytest.mark.parametrize("horizon", [(0.0, 1.3), (1.0, 0.2)])
def test_equals_the_rate_of_a_linear_problem(name, control, rate, horizon):
    z0 = torch.tensor([[1.2345], [0.5], [-3.0]], dtype=torch.float64)
    solution = nde.solve(nde.ODE(lambda t, z: rate * z), z0, horizon, solver=name, control=control, **options(name))
    steps = solution.steps
    assert len(steps) > 1
    relative = (steps.stiffness[steps.mask] / abs(rate) - 1).abs()
    assert relative.max() < 1e-10


def test_every_sample_has_its_own():
    rate = torch.tensor([[-1.0], [-10.0], [-3.0]], dtype=torch.float64)
    z0 = torch.ones(3, 1, dtype=torch.float64)
    solution = nde.solve(nde.ODE(lambda t, z, rate: rate * z), z0, (0.0, 1.0), args=rate)
    steps = solution.steps
    assert ((steps.stiffness / rate.abs().T - 1).abs()[steps.mask] < 1e-10).all()
    # Σ stiffness·|dt| over the horizon of length 1 is the rate.
    torch.testing.assert_close(solution.stiffness, rate.abs()[:, 0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", REPORTING)
def test_joint_is_the_rms_quotient_of_the_batch(name):
    """Two samples with rates 1 and 9: the estimate lies between, and is one number."""
    rate = torch.tensor([[-1.0], [-9.0]], dtype=torch.float64)
    z0 = torch.ones(2, 1, dtype=torch.float64)
    solution = nde.solve(nde.ODE(lambda t, z: rate * z), z0, (0.0, 1.0), solver=name, control="joint", **options(name))
    stiffness = solution.steps.stiffness
    assert stiffness.shape[1] == 2
    assert torch.equal(stiffness[:, 0], stiffness[:, 1])
    assert (stiffness > 1.0).all() and (stiffness < 9.0 + 1e-9).all()


def test_zero_where_the_stages_coincide():
    solution = nde.solve(nde.ODE(lambda t, z: torch.zeros_like(z)), torch.ones(2, 3), (0.0, 1.0))
    assert torch.equal(solution.stiffness, torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "size"), [("tsit5", 3.5068), ("dopri5", 3.3066), ("rk4", 2.7853), ("bs3", 2.5127), ("euler", 2.0)]
)
def test_stability_size_is_the_published_one(name, size):
    assert nde.solvers.get(name).stability_size == pytest.approx(size, abs=1e-4)


@pytest.mark.parametrize("name", [n for n, s in nde.solvers.SOLVERS.items() if s.stability_size is not None])
def test_stability_size_is_where_the_method_stops_decaying(name):
    size = nde.solvers.get(name).stability_size
    for factor, grows in ((0.999, False), (1.001, True)):
        probe = nde.probe(lambda t, z: -z, 0.0, torch.ones(1, 1, dtype=torch.float64), dt=size * factor, solver=name)
        assert (abs(float(probe.z)) > 1.0) is grows


@pytest.mark.parametrize("name", [n for n in SOLVERS if nde.solvers.get(n).parts[0].stability_size is None])
def test_a_method_without_a_stability_size_is_stable_on_the_left_half_plane_and_damps_what_is_stiff(name):
    start = torch.ones(1, 1, dtype=torch.complex128)
    for angle in (0.501, 0.6, 0.8, 1.0):
        for size in 10.0 ** torch.arange(-3, 9):
            rate = torch.polar(size, torch.tensor(angle * torch.pi)).to(start)
            z = abs(complex(nde.probe(lambda t, z: rate * z, 0.0, start, dt=1.0, solver=name).z))
            assert z < 1.0 and (size < 1e6 or z < 1e-4)


def test_dopri8_pairs_are_rounding_error():
    """Why dopri8 reports no stiffness though three of its stages share an abscissa."""
    import dataclasses

    from neuralde.solvers import RungeKutta, tableaus

    solver = RungeKutta("paired", dataclasses.replace(tableaus.DOPRI8, pair=(11, 12)), adaptive=True)
    probe = nde.probe(lambda t, z: -1.7 * z, 0.0, torch.ones(1, 1, dtype=torch.float64), dt=0.03, solver=solver)
    assert abs(float(probe.stiffness) / 1.7 - 1) > 1e-9
