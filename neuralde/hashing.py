"""Normal numbers by a hash: of the same integers the same ones, in any order."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def signed(x: int) -> int:
    """An integer modulo 2⁶⁴, as torch.int64 has it."""
    x %= 2**64
    return x - 2**64 if x >= 2**63 else x


GOLDEN, ODD = signed(0x9E3779B97F4A7C15), signed(0xD1342543DE82EF95)


def mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers whose every output bit depends on every input bit.

    Source: Evensen 2020, "moremur", with the form of Stafford's and SplitMix64's finalizers.
    """
    return mix_in_place(x.clone())


_ROUNDS = ((27, 0x3C79AC492BA7B653), (33, 0x1C69B3F74AC4AE35), (27, None))


def mix_in_place(x: Tensor) -> Tensor:
    """`mix`, written over x."""
    for shift, factor in _ROUNDS:
        # A logical shift: torch's keeps the sign.
        x ^= (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        if factor is not None:
            x *= signed(factor)
    return x


def normals(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Pairs of independent standard normal numbers, [2, ...], from integers that are written over.

    By the Box-Muller transform: the halves of their hashes are a radius and an angle.
    """
    halves = mix_in_place(numbers).view(torch.int32).unflatten(-1, (-1, 2)).to(dtype)
    # In float32 the least of the halves, and those next to it, are rounded to 0, whose logarithm is infinite.
    uniform = halves[..., 0].mul(2.0**-32).add_(0.5 + 2.0**-33).clamp_(min=2.0**-33)
    radius = uniform.log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    angle = halves[..., 1] * (2.0 * math.pi * 2.0**-32)
    pair = torch.empty(2, *angle.shape, dtype=dtype, device=angle.device)
    torch.cos(angle, out=pair[0])
    torch.sin(angle, out=pair[1])
    return pair.mul_(radius)


# -- the same for programs, which compilers fuse -----------------------------------------------------------------------


def mixed(x: Tensor) -> Tensor:
    """`mix` as programs have it."""
    for shift, factor in _ROUNDS:
        x = x ^ ((x >> shift) & (2 ** (64 - shift) - 1))
        x = x if factor is None else x * signed(factor)
    return x


# For Box and Muller's functions in float32: the library's logarithm alone would be a quarter of a draw.
# Chebyshev fits, of log(1 + x)/x on [-1/4, 1/2], of sin(πt)/(t - t³) and of cos(πt)/(1 - 4t²), in t², on [-1, 1].
_LOG = (0.99999999, -0.50000066, 0.33333603, -0.24993264, 0.19975554, -0.16822814, 0.14996832, -0.12091521, 0.054259425)
_SIN = (3.1415926, -2.0261195, 0.52403615, -0.075187264, 0.0068601885, -0.00038593821)
_COS = (0.99999999, -0.9348014, 0.31949395, -0.057209166, 0.0062539686, -0.00040402038)


def traced_normals(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`normals` as programs have them; in float32 off by rounding, 3e-7, of the functions in it."""
    found = mixed(numbers)
    low, high = ((found << 32) >> 32).to(dtype), (found >> 32).to(dtype)
    uniform = (low * 2.0**-32 + (0.5 + 2.0**-33)).clamp(min=2.0**-33)
    single = dtype == torch.float32
    radius = ((_log(uniform) if single else uniform.log()) * -2.0).clamp(min=0.0).sqrt()
    if single:
        t = high * 2.0**-31
        square = t * t
        cos, sin = _polynomial(_COS, square) * (1.0 - 4.0 * square), _polynomial(_SIN, square) * (t - t * square)
    else:
        angle = high * (2.0 * math.pi * 2.0**-32)
        cos, sin = angle.cos(), angle.sin()
    return cos * radius, sin * radius


def _log(x: Tensor) -> Tensor:
    """Of positive, normal float32."""
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F400000) >> 23  # x is 2^exponent times a number from 3/4 to 3/2
    rest = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return rest * _polynomial(_LOG, rest) + exponent.to(torch.float32) * math.log(2.0)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Σ_i coefficients_i xⁱ."""
    *rest, total = coefficients
    for coefficient in reversed(rest):
        total = total * x + coefficient
    return total
