"""Linear systems of a batch of samples."""

import pytest
import torch

from neuralde.linear import gmres

BATCH, N = 5, 12


def matrices(condition=20.0):
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(BATCH, N, N, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(BATCH, N, N, generator=generator, dtype=torch.float64))
    conditions = torch.linspace(1.0, condition, BATCH, dtype=torch.float64)
    scales = torch.stack([torch.linspace(1.0, float(c), N, dtype=torch.float64) for c in conditions])
    return (u * scales[:, None]) @ v


def right():
    return torch.randn(BATCH, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def product(a):
    return lambda x: (a @ x[..., None])[..., 0]


@pytest.mark.parametrize(("restart", "max_iter"), [(N, N), (8, 4000), (30, 40)])
def test_solves_as_dense_algebra_does(restart, max_iter):
    a, b = matrices(condition=4.0 if restart < N else 20.0), right()
    a = a @ a.mT if restart < N else a  # restarts may stagnate, but not where A is definite
    found = gmres(product(a), b, 1e-10, restart, max_iter)
    assert bool(found.converged.all())
    assert bool(((b - product(a)(found.x)).norm(dim=1) <= 2e-10 * b.norm(dim=1)).all())
    torch.testing.assert_close(found.x, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-7)


def test_samples_are_alone():
    a, b = matrices() + 3 * torch.eye(N, dtype=torch.float64), right()
    together = gmres(product(a), b, 1e-6)
    assert len(together.iterations.unique()) > 1
    for i in range(BATCH):
        alone = gmres(product(a[i : i + 1]), b[i : i + 1], 1e-6)
        assert alone.iterations[0] == together.iterations[i]
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-9, atol=1e-11)


def test_the_first_direction_may_be_all_there_is():
    a = torch.stack([torch.eye(N, dtype=torch.float64) * k for k in (1.0, -2.0, 3.0, 0.5, 10.0)])
    found = gmres(product(a), right(), 1e-12)
    assert found.iterations.tolist() == [1] * BATCH and bool(found.converged.all())


def test_nothing_to_solve_and_nothing_to_be_solved():
    """A right side of zero, one not finite, a singular A, and one with NaN: each beside a sample that is fine."""
    a, b = torch.eye(N, dtype=torch.float64).repeat(BATCH, 1, 1), right()
    a[0] = matrices()[1]
    b[1], b[2, 3] = 0.0, float("inf")
    a[3] = torch.diag(torch.cat([torch.zeros(2, dtype=torch.float64), torch.ones(N - 2, dtype=torch.float64)]))
    a[4, 0, 0] = float("nan")
    found = gmres(product(a), b, 1e-10, restart=N, max_iter=3 * N)
    assert found.converged.tolist() == [True, True, True, False, False]
    torch.testing.assert_close(found.x[0], torch.linalg.solve(a[0], b[0]))
    assert not bool(found.x[1].any()) and found.iterations[1] == 0
    assert torch.equal(found.x[2], b[2])
    assert bool(torch.isfinite(found.x[3]).all()) and float(found.residual[3]) < 1.0  # as far as it goes
    assert not bool(found.x[4].any())


def test_no_more_products_than_allowed():
    a, b, made = matrices(condition=1e4), right(), 0

    def counted(x):
        nonlocal made
        made += 1
        return product(a)(x)

    for restart in (3, 20):
        made = 0
        found = gmres(counted, b, 1e-12, restart, max_iter=10)
        assert made <= 10 and int(found.iterations.max()) == made
        assert bool((found.residual <= 1.0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_does_not_matter(dtype):
    a, b = matrices().to(dtype), right().to(dtype)
    plain = gmres(product(a), b, 1e-4)
    scaled = gmres(product(a), b * 2.0**60, 1e-4)
    assert torch.equal(plain.x * 2.0**60, scaled.x) and torch.equal(plain.iterations, scaled.iterations)
