"""The 25 nonstiff DETEST problems A1 to E5, on 0 ≤ t ≤ 20, with their states at t = 20.

Source: Hull, Enright, Fellen & Sedgwick, Comparing numerical methods for ordinary differential equations, SIAM Journal
on Numerical Analysis 9(4), 1972. Everything is float64.

torchdiffeq's tests have other constants in C5 and E4 and other forces in C5, diffrax's other last rows in C3 and C4.

21 problems have closed solutions; the four that have none (`_COMPUTED`) were integrated by Taylor series of order 40 in
40-digit arithmetic, with steps of two sizes that agree to 35 digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import integrate, optimize, special
from torch import Tensor

END = 20.0
TOLERANCES = (1e-3, 1e-6, 1e-9)  # rtol = atol


def suits(solver, tolerance: float) -> bool:
    """Whether a solver is for such tolerances: order p takes about tolerance^(-1/p) steps per unit of t."""
    return solver.adaptive and solver.order >= 3 and tolerance ** (-1.0 / solver.order) < 200


@dataclass(frozen=True, eq=False)
class Problem:
    """dz/dt = f(t, z) on [0, END].

    Attributes:
        name: A1 to E5. what: in words.
        f: (t, z) -> dz/dt, for z [batch, d] and t a scalar or [batch, 1].
        z0: the initial state, [1, d].
        end: z(END), [1, d], to about 1e-14 relative to its largest component.
    """

    name: str
    what: str
    f: Callable = field(repr=False)
    z0: Tensor = field(repr=False)
    end: Tensor = field(repr=False)

    def error(self, z) -> float:
        """The largest |z - z(END)| over the components; inf where z is not finite."""
        off = float((torch.as_tensor(z, dtype=torch.float64).reshape(1, -1) - self.end).abs().max())
        return off if math.isfinite(off) else math.inf

    def scipy(self, method: str, rtol: float, atol: float, f: Callable | None = None):
        """SciPy's result; f: in place of the problem's own, to count its calls."""
        f = f or self.f

        def rhs(t, y):
            return f(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y)[None])[0].numpy()

        return integrate.solve_ivp(rhs, (0.0, END), self.z0[0].numpy(), method=method, rtol=rtol, atol=atol)

    @functools.cache  # the 25 problems live as long as the process
    def bound(self, tolerance: float) -> float:
        """What `error` may be: 100 tolerances, or three times the error of SciPy's RK45 where that is more."""
        return max(100 * tolerance, 3 * self.error(self.scipy("RK45", tolerance, tolerance).y[:, -1]))


def _f64(values) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


# -- A: single equations -----------------------------------------------------------------------------------------------


def _spiral_end() -> float:
    """A5: r = 4·exp(π/2 - θ) in the polar coordinates of (t, y)."""
    angle = optimize.brentq(
        lambda a: 4 * math.exp(math.pi / 2 - a) * math.cos(a) - END, -math.pi / 4, math.pi / 2, xtol=1e-16, rtol=1e-15
    )
    return END * math.tan(angle)


def _class_a():
    yield "A1", "negative exponential", lambda t, z: -z, [1], [math.exp(-END)]
    yield "A2", "a special Riccati equation", lambda t, z: -(z**3) / 2, [1], [1 / math.sqrt(END + 1)]
    yield "A3", "an oscillation", lambda t, z: z * torch.cos(t), [1], [math.exp(math.sin(END))]
    yield "A4", "a logistic curve", lambda t, z: z / 4 * (1 - z / 20), [1], [20 / (1 + 19 * math.exp(-END / 4))]
    yield "A5", "a spiral", lambda t, z: (z - t) / (z + t), [4], [_spiral_end()]


# -- B: small systems --------------------------------------------------------------------------------------------------


def _b1(t, z):
    prey, hunters = z.unbind(1)
    return torch.stack([2 * (prey - prey * hunters), prey * hunters - hunters], 1)


def _b3(t, z):
    a, b, _ = z.unbind(1)
    return torch.stack([-a, a - b**2, b**2], 1)


def _b3_end() -> list[float]:
    """b = u'/u makes the Riccati equation u'' = exp(-t)·u, of modified Bessel functions of s = 2·exp(-t/2)."""
    i, k, s = special.iv, special.kv, 2 * math.exp(-END / 2)
    b = s / 2 * (i(1, 2) * k(1, s) - k(1, 2) * i(1, s)) / (k(1, 2) * i(0, s) + i(1, 2) * k(0, s))
    a = math.exp(-END)
    return [a, b, 1 - a - b]


def _b4(t, z):
    x, y, w = z.unbind(1)
    r = torch.sqrt(x**2 + y**2)
    return torch.stack([-y - x * w / r, x - y * w / r, x / r], 1)


def _b5(t, z):
    x, y, w = z.unbind(1)
    return torch.stack([y * w, -x * w, -0.51 * x * y], 1)


def _class_b():
    yield "B1", "two populations in conflict", _b1, [1, 3], _COMPUTED["B1"]
    chain = _f64([[-1, 1, 0], [1, -2, 1], [0, 1, -1]])
    fast, slow = math.exp(-3 * END) / 2, math.exp(-END) / 2
    yield "B2", "a linear reaction", _linear(chain), [2, 0, 1], [1 + slow + fast, 1 - 2 * fast, 1 - slow + fast]
    yield "B3", "a nonlinear reaction", _b3, [1, 0, 0], _b3_end()
    c, s = math.cos(END), math.sin(END)
    yield "B4", "an integral curve on a torus", _b4, [3, 0, 0], [(2 + c) * c, (2 + c) * s, s]
    yield "B5", "Euler's equations of a rigid body", _b5, [0, 1, 1], special.ellipj(END, 0.51)[:3]


# -- C: moderate systems -----------------------------------------------------------------------------------------------


def _linear(matrix: Tensor) -> Callable:
    transposed = matrix.T.contiguous()
    return lambda t, z: z @ transposed


def _decay(rates) -> Tensor:
    """Each species decays into the next; the last one stays."""
    rates = _f64(rates)
    return torch.diag(torch.cat([-rates, rates.new_zeros(1)])) + torch.diag(rates, -1)


def _diffusion(n: int) -> Tensor:
    return torch.diag(-2 * torch.ones(n, dtype=torch.float64)) + sum(
        torch.diag(torch.ones(n - 1, dtype=torch.float64), k) for k in (-1, 1)
    )


def _diffusion_end(n: int) -> np.ndarray:
    """Sine waves are the eigenvectors."""
    k = np.arange(1, n + 1) * math.pi / (n + 1)
    return 2 / (n + 1) * np.sin(np.outer(np.arange(1, n + 1), k)) @ (np.sin(k) * np.exp((2 * np.cos(k) - 2) * END))


_SQUARED_GAUSS = 2.95912208286  # the constant of gravity, in the paper's units
_SUN = 1.00000597682  # with the inner planets
_MASSES = _f64([0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778])
_PLACES = [
    *(3.42947415189, 3.35386959711, 1.35494901715),  # Jupiter
    *(6.64145542550, 5.97156957878, 2.18231499728),  # Saturn
    *(11.2630437207, 14.6952576794, 6.27960525067),  # Uranus
    *(-30.1552268759, 1.65699966404, 1.43785752721),  # Neptune
    *(-21.1238353380, 28.4465098142, 15.3882659679),  # Pluto
]
_SPEEDS = [
    *(-0.557160570446, 0.505696783289, 0.230578543901),
    *(-0.415570776342, 0.365682722812, 0.169143213293),
    *(-0.325325669158, 0.189706021964, 0.0877265322780),
    *(-0.0240476254170, -0.287659532608, -0.117219543175),
    *(-0.176860753121, -0.216393453025, -0.0148647893090),
]
_ITSELF = torch.eye(5, dtype=torch.float64)[:, :, None]


def _c5(t, z):
    """Heliocentric, so that the pull of each planet on the sun counts too. z is places, then speeds, of [5, 3]."""
    places, speeds = z.view(-1, 2, 5, 3).unbind(1)
    cubed = places.square().sum(2, keepdim=True) ** 1.5
    gaps = places[:, None] - places[:, :, None]  # [batch, of, towards, 3]
    pull = gaps / (gaps.square().sum(3, keepdim=True) + _ITSELF) ** 1.5
    attraction = ((pull - (places / cubed)[:, None]) * (1 - _ITSELF) * _MASSES[:, None]).sum(2)
    force = _SQUARED_GAUSS * (attraction - (_SUN + _MASSES)[:, None] * places / cubed)
    return torch.stack([speeds, force], 1).flatten(1)


def _class_c():
    first, decayed = [1] + [0] * 9, -math.expm1(-END)
    poisson = [math.exp(-END) * END**i / math.factorial(i) for i in range(9)]
    rest = math.exp(-END) * math.fsum(END**i / math.factorial(i) for i in range(9, 120))
    yield "C1", "a radioactive decay chain", _linear(_decay([1] * 9)), first, [*poisson, rest]
    geometric = [math.exp(-END) * decayed**i for i in range(9)]
    yield "C2", "another decay chain", _linear(_decay(range(1, 10))), first, [*geometric, decayed**9]
    yield "C3", "a parabolic equation, 10 points", _linear(_diffusion(10)), first, _diffusion_end(10)
    yield "C4", "a parabolic equation, 51 points", _linear(_diffusion(51)), [1] + [0] * 50, _diffusion_end(51)
    yield "C5", "the five outer planets", _c5, _PLACES + _SPEEDS, _COMPUTED["C5"]


# -- D: orbits ---------------------------------------------------------------------------------------------------------


def orbit(t, z):
    """The two-body problem, f of D1 to D5."""
    place, speed = z[:, :2], z[:, 2:]
    return torch.cat([speed, -place / place.square().sum(1, keepdim=True) ** 1.5], 1)


def _orbit_end(e: float) -> list[float]:
    """By Kepler's equation u - e·sin u = t."""
    u = optimize.brentq(lambda u: u - e * math.sin(u) - END, END - 1, END + 1, xtol=1e-15, rtol=1e-15)
    c, s, flat = math.cos(u), math.sin(u), math.sqrt(1 - e**2)
    return [c - e, flat * s, -s / (1 - e * c), flat * c / (1 - e * c)]


def _class_d():
    for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), 1):
        start = [1 - e, 0, 0, math.sqrt((1 + e) / (1 - e))]
        yield f"D{i}", f"an orbit of eccentricity {e}", orbit, start, _orbit_end(e)


# -- E: higher-order equations -----------------------------------------------------------------------------------------


def _e1(t, z):
    y, v = z.split(1, 1)
    return torch.cat([v, -v / (t + 1) - (1 - 0.25 / (t + 1) ** 2) * y], 1)


def _e2(t, z):
    y, v = z.unbind(1)
    return torch.stack([v, (1 - y**2) * v - y], 1)


def _e3(t, z):
    y, v = z.split(1, 1)
    return torch.cat([v, y**3 / 6 - y + 2 * torch.sin(2.78535 * t)], 1)


def _e4(t, z):
    v = z[:, 1]
    return torch.stack([v, 0.032 - 0.4 * v**2], 1)


def _e5(t, z):
    v = z[:, 1:]
    return torch.cat([v, torch.sqrt(1 + v**2) / (25 - t)], 1)


def _bessel(x: float) -> list[float]:
    """J½(x) and its derivative."""
    return [math.sqrt(2 / (math.pi * x)) * y for y in (math.sin(x), math.cos(x) - math.sin(x) / (2 * x))]


def _class_e():
    yield "E1", "Bessel's equation of order ½", _e1, _bessel(1.0), _bessel(END + 1)
    yield "E2", "Van der Pol's equation", _e2, [2, 0], _COMPUTED["E2"]
    yield "E3", "Duffing's equation", _e3, [0, 0], _COMPUTED["E3"]
    rate, limit = math.sqrt(0.4 * 0.032), math.sqrt(0.032 / 0.4)
    fallen = [30 + math.log(math.cosh(rate * END)) / 0.4, limit * math.tanh(rate * END)]
    yield "E4", "a falling body", _e4, [30, 0], fallen
    left = 1 - END / 25
    pursued = [-12.5 * math.log(left) - 6.25 * (1 - left**2), (1 / left - left) / 2]
    yield "E5", "a curve of pursuit", _e5, [0, 0], pursued


_COMPUTED = {
    "B1": [0.676187600857660661, 0.18608160996400298],
    "C5": [
        *(-4.7927302243236349, -2.42055072544902206, -0.921250930601511868),
        *(-4.21731040403521339, 7.35620294749896997, 3.22378598542121177),
        *(4.03555944326227056, 17.1986552867055496, 7.47891079423370276),
        *(-29.9875932632484422, -4.10731093755092956, -0.92770083217544083),
        *(-24.4212530251848277, 23.8145904574655445, 14.9209630695135881),
        *(0.349920896306399729, -0.574848768791280274, -0.255169402087914438),
        *(-0.523704097890332546, -0.249300046357966173, -0.0804534164204446571),
        *(-0.387528923733410953, 0.0564860328876789208, 0.03023606472143343),
        *(0.0413385654671244617, -0.286239302984137931, -0.118303240513620702),
        *(-0.151198645735920561, -0.246006889431876563, -0.0318968741132387709),
    ],
    "E2": [2.00814976217494859, -0.042508875273202147],
    "E3": [-0.100417885864724071, 0.241140013209595558],
}

PROBLEMS = {
    name: Problem(name, what, f, _f64(z0)[None], _f64(end)[None])
    for group in (_class_a, _class_b, _class_c, _class_d, _class_e)
    for name, what, f, z0, end in group()
}
