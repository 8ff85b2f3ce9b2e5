"""Brownian paths: their law, at shared times and at each sample's own, and that they are one path whoever asks."""

import itertools
import math

import pytest
import torch
from helpers import close, refused
from scipy import stats

import neuralde as nde
from neuralde import hashing

DTYPES = [torch.float64, torch.float32]
POINTS = {
    "few digits": [0.0, 0.125, 0.25, 0.5, 0.75, 1.0],
    "any": [0.0, 0.1, 0.2534, 0.3333, 0.50001, 0.8, 1.0],
    "late": [100.0, 100.3, 100.301, 101.7, 102.0],
    "close": [0.3, 0.3 + 1e-6, 0.3 + 3e-6],
}


def bound(batch, channels=1, seed=3, start=0.0, span=1.0, dtype=torch.float64, paths="independent"):
    horizon = (torch.full((1,), x, dtype=dtype) for x in (start, span))
    return nde.BrownianTree(seed, paths).bind(*horizon, batch, channels, dtype)


def numbers(noise, dt):
    """W and H of consecutive intervals as what should be independent standard normal numbers, [figures, values]."""
    rows = []
    for x, size in zip(noise, dt, strict=True):
        rows += [(x.w / size[:, None].sqrt()).flatten(), (x.h * (12 / size[:, None]).sqrt()).flatten()]
    return torch.stack(rows).double()


def same(x, y):
    """Up to rounding, which differs with the place in a vector register."""
    torch.testing.assert_close(x, y, rtol=0, atol=8 * torch.finfo(x.dtype).eps)


def require_standard_normal(rows, sigmas=4.5):
    """Means 0, covariances the identity, and each row's whole law normal."""
    count = rows.shape[1]
    assert float(rows.mean(dim=1).abs().max()) < sigmas / math.sqrt(count)
    off = rows @ rows.T / count - torch.eye(len(rows), dtype=rows.dtype)
    spread = torch.ones_like(off).fill_diagonal_(math.sqrt(2.0))  # of a product, and of a square
    assert float((off / spread).abs().max()) < sigmas / math.sqrt(count)
    for row in rows:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("points", list(POINTS))
def test_increments_and_areas_are_normal_and_independent(points, dtype):
    if points == "close":
        dtype = torch.float64  # float32 has no such times
    start, end = POINTS[points][0], POINTS[points][-1]
    times = torch.tensor(POINTS[points], dtype=dtype)
    paths = bound(6000, 2, start=start, span=max(1.0, end - start), dtype=dtype)
    noise = paths.between(times[:, None])
    assert noise[0].w.dtype == noise[0].h.dtype == dtype
    require_standard_normal(numbers(noise, times.double().diff()[:, None].to(dtype)))


def test_the_same_under_per_sample_times():
    times = torch.rand(5, 20000, dtype=torch.float64).sort(dim=0).values
    noise = bound(20000).between(times)
    require_standard_normal(numbers(noise, times.diff(dim=0)))


def test_per_sample_times_are_the_sample_s_own():
    times = torch.rand(3, 40, dtype=torch.float64).sort(dim=0).values
    together = bound(40, 2).between(times)
    for i in (0, 17, 39):
        alone = bound(40, 2).between(times[:, i : i + 1])
        for one, both in zip(alone, together, strict=True):
            same(one.w[i], both.w[i])
            same(one.h[i], both.h[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("points", ["few digits", "any", "late"])
def test_consistent_under_subdivision(points, dtype):
    times = torch.tensor(POINTS[points], dtype=dtype)
    paths = bound(50, 3, start=POINTS[points][0], span=2.0, dtype=dtype)
    (whole,) = paths.between(times[[0, -1]][:, None])
    w, j = torch.zeros_like(whole.w), torch.zeros_like(whole.h)
    for x, dt in zip(paths.between(times[:, None]), times.diff(), strict=True):
        j = j + dt * w + dt * (x.h + 0.5 * x.w)
        w = w + x.w
    tolerance = 20 * torch.finfo(dtype).eps * (100 if points == "late" and dtype == torch.float32 else 1)
    torch.testing.assert_close(w, whole.w, rtol=0, atol=tolerance)
    torch.testing.assert_close(j / (times[-1] - times[0]) - 0.5 * w, whole.h, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("points", ["few digits", "any", "late"])
def test_one_step_after_the_other_sees_the_path_of_all_at_once(points, dtype):
    start, end = POINTS[points][0], POINTS[points][-1]
    times = torch.tensor(POINTS[points], dtype=dtype)[:, None]
    paths = bound(5, 3, start=start, span=max(1.0, end - start), dtype=dtype, paths="shared")
    together = paths.between(times)
    order = [0, 1, 2, 0, *reversed(range(len(times) - 1)), 1]  # forward, again after a rejection, backward
    for j in order:
        for x, y in zip(paths.between(times[j : j + 2])[0], together[j], strict=True):
            same(x, y)


def test_every_pair_of_times_sees_one_path():
    times = torch.tensor([0.05, 0.2, 0.21, 0.6, 0.99], dtype=torch.float64)
    paths = bound(4)
    origin = torch.zeros(1, dtype=torch.float64)
    value = [paths.between(torch.stack([origin, t[None]]))[0].w for t in times]
    for (a, start), (b, end) in itertools.combinations(zip(value, times, strict=True), 2):
        (step,) = paths.between(torch.stack([start[None], end[None]]))
        torch.testing.assert_close(step.w, b - a, rtol=0, atol=1e-14)


def test_a_short_interval_is_as_exact_as_a_long_one():
    # Values of the path are of size 1 there; a difference of them would leave nothing of H.
    start, step = 0.7, 2.0**-30
    times = torch.tensor([start, start + step], dtype=torch.float64)[:, None]
    (noise,) = bound(20000).between(times)
    require_standard_normal(numbers([noise], times.diff(dim=0)))


def test_no_time_no_noise():
    times = torch.tensor([0.3, 0.3, 0.5, 0.5], dtype=torch.float64)[:, None]
    first, _, last = bound(3).between(times)
    assert not bool(first.w.any() or first.h.any() or last.w.any() or last.h.any())


def test_the_path_of_a_sample_is_its_own():
    (small,), (large,) = (bound(n, 2).between(torch.tensor([[0.1], [0.4]])) for n in (3, 50))
    same(small.w, large.w[:3])
    rows = torch.tensor([4, 30])
    (part,) = bound(50, 2).on(rows).between(torch.tensor([[0.1], [0.4]]))
    same(part.w, large.w[rows])
    (other,) = bound(50, 2, seed=4).between(torch.tensor([[0.1], [0.4]]))
    assert not bool((other.w == large.w).any())


def test_chained_horizons_go_on_with_new_noise():
    (first,) = bound(4000, start=0.0).between(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    (second,) = bound(4000, start=1.0).between(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    assert abs(float(torch.corrcoef(torch.stack([first.w[:, 0], second.w[:, 0]]))[0, 1])) < 4 / math.sqrt(4000)
    (both,) = bound(4000, start=0.5).between(torch.tensor([[0.5], [1.5]], dtype=torch.float64))
    require_standard_normal(numbers([both], torch.ones(1, 1, dtype=torch.float64)))


def test_antithetic_and_shared_paths():
    times = torch.tensor([[0.0], [0.7]])
    (pairs,) = bound(8, 2, paths="antithetic").between(times)
    same(pairs.w[:4], -pairs.w[4:])
    same(pairs.h[:4], -pairs.h[4:])
    (shared,) = bound(8, 2, paths="shared").between(times)
    same(shared.w, shared.w[:1].expand(8, -1))
    (chosen,) = bound(2, 2, paths=[5, 0]).between(times)
    (all_of_them,) = bound(8, 2).between(times)
    same(chosen.w, all_of_them.w[[5, 0]])


def test_seeds():
    one, two = (nde.BrownianTree().drawn().seed for _ in range(2))
    assert one != two
    torch.manual_seed(5)
    first = nde.BrownianTree().drawn().seed
    torch.manual_seed(5)
    assert nde.BrownianTree().drawn().seed == first
    (a,), (b,) = (bound(2, seed=s).between(torch.tensor([[0.0], [1.0]])) for s in (-1, 2**64 - 1))
    assert torch.equal(a.w, b.w)


def test_bad_trees():
    with refused(TypeError, "seed", "float"):
        nde.BrownianTree(1.5)
    with refused(ValueError, "paths", "'antithetic'", "'mirrored'"):
        nde.BrownianTree(1, "mirrored")
    with refused(ValueError, "paths", "integers"):
        nde.BrownianTree(1, torch.rand(3))
    with refused(ValueError, "paths", "one entry per sample, 3"):
        bound(3, paths=[1, 2])
    with refused(ValueError, "antithetic", "even"):
        bound(3, paths="antithetic")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_paths_on_a_gpu():
    times = torch.tensor([[0.1], [0.125], [0.9]], dtype=torch.float64)
    tree = nde.BrownianTree(3)
    here = tree.bind(times[0], times[2], 5, 2, torch.float64).between(times)
    there = tree.bind(times[0].cuda(), times[2].cuda(), 5, 2, torch.float64).between(times.cuda())
    for x, y in zip(here, there, strict=True):
        torch.testing.assert_close(x.w, y.w.cpu(), rtol=0, atol=1e-13)
        torch.testing.assert_close(x.h, y.h.cpu(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_hash_makes_an_infinite_number(monkeypatch, dtype):
    """One in 2²⁶ of them did in float32: its radius was the logarithm of a number that was rounded to 0."""
    from neuralde import hashing

    monkeypatch.setattr(hashing, "mix_in_place", lambda x: x)
    ends = [2**31, 2**31 + 1, 2**31 + 60, 2**31 - 1, 0, 2**32 - 1]  # of the half that is the radius
    found = hashing.normals(torch.tensor(ends), dtype)
    assert found.dtype == dtype and bool(found.isfinite().all())
    assert 5.5 < float(found.norm(dim=0).max()) <= (2 * 33 * math.log(2)) ** 0.5 + 1e-6


def test_horizons_of_other_lengths_have_other_numbers():
    def ends(start, end):
        horizon = torch.tensor([start], dtype=torch.float64), torch.tensor([end - start], dtype=torch.float64)
        paths = nde.BrownianTree(5).bind(*horizon, 4000, 1, torch.float64)
        return paths.between(torch.tensor([[start], [end]], dtype=torch.float64))[0].w[:, 0]

    first = ends(0.0, 1.0)
    for start, end in ((1.0, 2.0), (1.0, 3.0), (0.0, 2.0), (1.0, 5.0)):
        correlation = torch.corrcoef(torch.stack([first, ends(start, end)]))[0, 1]
        assert correlation.abs() < 4 / 4000**0.5


def test_the_paths_of_a_solution_end_with_its_horizon():
    solution = nde.solve(nde.SDE(lambda t, z: -z, lambda t, z: z), torch.ones(2, 1), (0.0, 1.0), rtol=0.1, seed=1)
    close(solution.brownian(1.0), solution.brownian([0.5, 1.0])[1], 1e-6)
    for t in (1.5, [0.5, 2.0], -0.1):
        with refused(ValueError, "t must lie on the horizon", "from 0 to 1"):
            solution.brownian(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_programs_draw_the_same_numbers(dtype):
    integers = torch.randint(-(2**62), 2**62, (20000,), generator=torch.Generator().manual_seed(1))
    found = torch.stack(hashing.traced_normals(integers, dtype))
    same_to = {torch.float32: 3e-6, torch.float64: 1e-14}[dtype]  # float32 has polynomials there
    torch.testing.assert_close(found, hashing.normals(integers.clone(), dtype), rtol=0, atol=same_to)
    ends = torch.tensor([2.0**-33, 1e-3, 0.75, 1.0 - 2.0**-24, 1.0])  # the least and the largest that there are
    torch.testing.assert_close(hashing._log(ends), ends.log(), rtol=3e-7, atol=0)
