"""How power series go through functions: elementary ones, those with kinks, normalizations, attention.

An elementary function y = g(x) follows from its differential equation dy = g'(x)·dx, the others are made of these.

Source of the recurrences: Griewank & Walther 2008, Evaluating Derivatives, tables 13.1 and 13.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .taylor import Coefficient, NoTaylorRule, Series
from .taylor_rules import RULES, at_order, made_of, rule, series, square_at, total

# -- functions of one number, by their differential equations ------------------------------------------------------


def _integral(x: Series, value: Tensor, rate) -> Series:
    """Y with dy = rate·dx: y_k = Σ_j binomial(k - 1, j - 1)·x_j·rate_{k-j}. rate may be made of y, after this."""

    def at(k: int) -> Coefficient:
        return _chain(x, k, lambda j: at_order(y.rate, j))

    y = series((x,), value, at)
    y.rate = rate
    return y


def _chain(x: Series, k: int, rate: Callable[[int], Coefficient]) -> Coefficient:
    """Coefficient k of the function of x whose derivative by it has the coefficients rate(0), ..., rate(k - 1)."""
    found = None
    for j in range(k, 0, -1):
        a, b = x.coefficients[j], rate(k - j)
        if a is None or b is None:
            continue
        factor = math.comb(k - 1, j - 1)
        if found is None:
            found = a * b if factor == 1 else factor * (a * b)
        else:
            found = torch.addcmul(found, a, b, value=factor)
    return found


def _by_polynomial(c0: float, c1: float, c2: float, *names: str):
    """A function y of x whose derivative is c0 + c1·y + c2·y²: as `_by_value`, in few operations."""

    def rule(func, args, kwargs):
        x = args[0]
        y = series((x,), func(x.value), lambda k: _chain(x, k, rates.at))
        rates = _Rates(y, c0, c1, c2)
        return y

    RULES.update(dict.fromkeys(names, rule))


class _Rates:
    """The coefficients of c0 + c1·y + c2·y², each made when it is asked for."""

    def __init__(self, y: Series, c0: float, c1: float, c2: float):
        self.y, self.c = y, (c0, c1, c2)
        self.known: list[Coefficient] = []

    def at(self, k: int) -> Coefficient:
        """Coefficient k, of which those before are known."""
        while len(self.known) <= k:
            self.known.append(self._next(len(self.known)))
        return self.known[k]

    def _next(self, k: int) -> Coefficient:
        (c0, c1, c2), y = self.c, self.y.coefficients
        if k == 0:
            return _quadratic(y[0], c0, c1, c2)
        if not c2:
            return total([(c1, y[k])])
        if k == 1:  # of the polynomial's derivative by y, which the next ones have, too
            self.slope = _quadratic(y[0], c1, 2.0 * c2, 0.0)
        linear = None if y[k] is None else self.slope * y[k]
        return total([(1, linear), (c2, square_at(self.y, k, first=1))])


def _quadratic(y: Tensor, c0: float, c1: float, c2: float) -> Tensor:
    """c0 + c1·y + c2·y²."""
    linear = y if c1 == 1 else c1 * y if c1 else None
    if c2 and c0:
        found = torch.addcmul(y.new_full((), c0), y, y, value=c2)
        return found if linear is None else found + linear
    found = linear if not c2 else total([(c2, y * y), (1, linear)])
    return found + c0 if c0 else found


def _by_value(rate: Callable, *names: str):
    """A function y of x whose derivative is rate(y)."""

    def rule(func, args, kwargs):
        y = _integral(args[0], func(args[0].value), None)
        y.rate = rate(y)
        return y

    RULES.update(dict.fromkeys(names, rule))


def _by_argument(rate: Callable, *names: str):
    """A function y of x whose derivative is rate(x)."""
    RULES.update(
        dict.fromkeys(names, lambda func, args, kwargs: _integral(args[0], func(args[0].value), rate(args[0])))
    )


_by_polynomial(0.0, 1.0, 0.0, "exp")
_by_polynomial(0.0, math.log(2.0), 0.0, "exp2", "special_exp2")
_by_polynomial(1.0, 1.0, 0.0, "expm1", "special_expm1")
_by_polynomial(1.0, 0.0, -1.0, "tanh")
_by_polynomial(1.0, 0.0, 1.0, "tan")
_by_polynomial(0.0, 1.0, -1.0, "sigmoid", "special_expit")
_by_polynomial(0.0, 0.0, -1.0, "reciprocal")
_by_value(lambda y: 0.5 / y, "sqrt")
_by_value(lambda y: -0.5 * (y * y * y), "rsqrt")
_by_argument(lambda x: 1.0 / x, "log")
_by_argument(lambda x: 1.0 / (math.log(2.0) * x), "log2")
_by_argument(lambda x: 1.0 / (math.log(10.0) * x), "log10")
_by_argument(lambda x: 1.0 / (1.0 + x), "log1p", "special_log1p")
_by_argument(lambda x: 1.0 / (1.0 + x * x), "atan", "arctan")
_by_argument(lambda x: torch.rsqrt(1.0 - x * x), "asin", "arcsin")
_by_argument(lambda x: -torch.rsqrt(1.0 - x * x), "acos", "arccos")
_by_argument(lambda x: torch.rsqrt(1.0 + x * x), "asinh", "arcsinh")
_by_argument(lambda x: (2.0 / math.sqrt(math.pi)) * torch.exp(-(x * x)), "erf", "special_erf")
_by_argument(lambda x: (-2.0 / math.sqrt(math.pi)) * torch.exp(-(x * x)), "erfc", "special_erfc")
_by_argument(lambda x: torch.sigmoid(-x), "log_sigmoid", "logsigmoid")


def _pair(first: Callable, second: Callable, sign: float):
    """Two functions, each the other's derivative, up to the sign of the second's."""

    def rule(which):
        def apply(func, args, kwargs):
            x = args[0]
            a, b = _integral(x, first(x.value), None), _integral(x, second(x.value), None)
            a.rate, b.rate = b, (a if sign > 0 else -a)
            return (a, b)[which]

        return apply

    RULES[first.__name__], RULES[second.__name__] = rule(0), rule(1)


_pair(torch.sin, torch.cos, -1.0)
_pair(torch.sinh, torch.cosh, 1.0)


@made_of("square")
def _square(x):
    return x * x


@rule("pow", "float_power", "rpow")
def _pow(func, args, kwargs):
    x, power = args if func.__name__ != "__rpow__" else args[::-1]
    if isinstance(power, Series) or (isinstance(power, Tensor) and power.numel() > 1):
        return torch.exp(power * (torch.log(x) if isinstance(x, Tensor) else math.log(x)))
    power = power.item() if isinstance(power, Tensor) else power
    if power == int(power):
        return _whole_power(x, int(power))
    y = _integral(x, x.value**power, None)
    y.rate = power * y / x
    return y


def _whole_power(x: Series, power: int):
    """By multiplications, which know what to do at 0."""
    if power < 0:
        return torch.reciprocal(_whole_power(x, -power))
    if power == 0:
        return torch.ones_like(x.value)
    half = _whole_power(x, power // 2) if power > 1 else None
    square = None if half is None else half * half
    return square if power % 2 == 0 else x if square is None else square * x


@made_of("softplus")
def _softplus(x, beta=1.0, threshold=20.0):
    return _integral(x, functional.softplus(x.value, beta, threshold), torch.sigmoid(beta * x))


# -- functions with kinks: on either side they are what they are there ---------------------------------------------


@made_of("relu")
def _relu(x):
    return torch.where(x > 0, x, 0.0)


@made_of("leaky_relu")
def _leaky_relu(x, negative_slope=0.01):
    return torch.where(x > 0, x, negative_slope * x)


@made_of("prelu")
def _prelu(x, weight):
    shape = [1, -1] + [1] * (x.dim() - 2) if weight.numel() > 1 else [1] * x.dim()
    return torch.where(x > 0, x, weight.reshape(shape) * x)


@made_of("abs", "absolute")
def _abs(x):
    if x.is_complex():
        raise NoTaylorRule("abs of complex numbers")
    return torch.where(x >= 0, x, -x)


@made_of("clamp", "clip", "hardtanh")
def _clamp(x, min=None, max=None, min_val=-1.0, max_val=1.0):
    if min is None and max is None:
        min, max = min_val, max_val
    x = x if min is None else torch.where(x < min, min, x)
    return x if max is None else torch.where(x > max, max, x)


@made_of("relu6")
def _relu6(x):
    return x.clamp(0.0, 6.0)


@made_of("clamp_min")
def _clamp_min(x, min):
    return x.clamp(min=min)


@made_of("clamp_max")
def _clamp_max(x, max):
    return x.clamp(max=max)


@made_of("hardsigmoid")
def _hardsigmoid(x):
    return (x / 6.0 + 0.5).clamp(0.0, 1.0)


@made_of("hardswish")
def _hardswish(x):
    return x * (x / 6.0 + 0.5).clamp(0.0, 1.0)


@made_of("maximum")
def _maximum(a, b):
    return torch.where(a >= b, a, b)


@made_of("minimum")
def _minimum(a, b):
    return torch.where(a <= b, a, b)


@made_of("elu", "celu")
def _elu(x, alpha=1.0):
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0.0)))


@made_of("selu")
def _selu(x):
    scale, alpha = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, section 2
    return scale * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0.0)))


# -- what networks are made of -------------------------------------------------------------------------------------


@made_of("silu")
def _silu(x):
    return x * torch.sigmoid(x)


@made_of("mish")
def _mish(x):
    return x * torch.tanh(functional.softplus(x))


@made_of("softsign")
def _softsign(x):
    return x / (1.0 + x.abs())


@made_of("tanhshrink")
def _tanhshrink(x):
    return x - torch.tanh(x)


@made_of("gelu")
def _gelu(x, approximate="none"):
    if approximate == "tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


@made_of("addcmul")
def _addcmul(x, a, b, value=1):
    return x + value * (a * b)


@made_of("addcdiv")
def _addcdiv(x, a, b, value=1):
    return x + value * (a / b)


@made_of("lerp")
def _lerp(a, b, weight):
    return a + weight * (b - a)


def _shifted(x, dim):
    """X minus its largest entry, which is a constant."""
    return x - x.value.detach().amax(dim, keepdim=True)


@made_of("softmax", "special_softmax")
def _softmax(x, dim=None, _stacklevel=3, dtype=None):
    e = torch.exp(_shifted(x if dtype is None else x.to(dtype), dim))
    return e / e.sum(dim, keepdim=True)


@made_of("log_softmax", "special_log_softmax")
def _log_softmax(x, dim=None, _stacklevel=3, dtype=None):
    x = _shifted(x if dtype is None else x.to(dtype), dim)
    return x - torch.log(torch.exp(x).sum(dim, keepdim=True))


@made_of("logsumexp")
def _logsumexp(x, dim, keepdim=False):
    total = x.value.detach().amax(dim, keepdim=True) + torch.log(torch.exp(_shifted(x, dim)).sum(dim, keepdim=True))
    return total if keepdim else total.squeeze(dim)


@made_of("norm", "linalg_norm", "linalg_vector_norm")
def _norm(x, p=2, dim=None, keepdim=False, ord=None, dtype=None):
    p = p if ord is None else ord
    if p not in (2, 2.0, "fro", None) or x.is_complex() or dtype is not None:
        raise NoTaylorRule(f"a norm with p = {p!r}, or of complex numbers")
    square = x * x
    return torch.sqrt(square.sum() if dim is None else square.sum(dim, keepdim=keepdim))


@made_of("normalize")
def _normalize(x, p=2.0, dim=1, eps=1e-12):
    return x / _norm(x, p, dim, keepdim=True).clamp(min=eps)


def _standardized(x, dims, eps):
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)


@made_of("layer_norm")
def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    x = _standardized(x, tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(x, weight, bias):
    shape = [1, -1] + [1] * (x.dim() - 2)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


@made_of("group_norm")
def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    groups = x.reshape(len(x), num_groups, -1)
    return _per_channel(_standardized(groups, (2,), eps).reshape(x.shape), weight, bias)


@made_of("batch_norm")
def _batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    # Running statistics are left alone: a look at f is no training step.
    if training or mean is None:
        return _per_channel(_standardized(x, tuple(i for i in range(x.dim()) if i != 1), eps), weight, bias)
    scale = torch.rsqrt(var + eps)
    return _per_channel(_per_channel(x, scale, -mean * scale), weight, bias)


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
def _dropout(func, args, kwargs):
    def dropout(x, p=0.5, training=True):
        if not training or p == 0:
            return x
        if func.__name__ == "alpha_dropout":
            raise NoTaylorRule("alpha_dropout")
        return x * func(torch.ones_like(x.value), p, training)  # the same draw: it looks at the shape alone

    return dropout(*args, **kwargs)


@made_of("scaled_dot_product_attention")
def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if dropout_p or enable_gqa:
        raise NoTaylorRule("scaled_dot_product_attention with dropout or grouped queries")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value
