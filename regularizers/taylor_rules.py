"""How power series go through the operations that vector fields are made of.

A rule takes the function that f called and its arguments, computes the value, and returns a `Series` that knows its
further coefficients. `RULES` has them by the function's name ("add" for `a + b`, `a.add(b)` and `torch.add(a, b)`).

Source of the recurrences: Griewank & Walther 2008, Evaluating Derivatives, tables 13.1 and 13.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from neuralde import transforms

from .taylor import Coefficient, NoTaylorRule, Series, made_by_autograd

RULES: dict[str, Callable] = {}
# What Python's operators call. Conversions to numbers (__float__, __bool__, ...) are none of these: they have no rule.
_OPERATOR_NAMES = """
    add radd sub rsub mul rmul matmul rmatmul truediv rtruediv div rdiv pow rpow neg pos abs
    eq ne lt le gt ge getitem iter len repr format
"""
_OPERATORS = {f"__{name}__": name for name in _OPERATOR_NAMES.split()}


def apply(func: Callable, args: tuple, kwargs: dict):
    """What f gets when it calls a function with series among the arguments."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return _attribute(func.__self__.__name__, args[0])
    made_by_autograd(_among(args, kwargs))
    if name == "__set__":
        raise NoTaylorRule(f"an assignment to .{func.__self__.__name__} of a tensor")
    name = _OPERATORS.get(name, name)
    if kwargs.get("out") is not None or kwargs.get("inplace"):
        raise NoTaylorRule(f"{name} with its result in place of another tensor")
    if name not in RULES:
        raise NoTaylorRule(f"{name}, in place" if name.endswith("_") else name)
    kwargs = {key: x for key, x in kwargs.items() if key not in ("out", "inplace")}
    return RULES[name](func, args, kwargs)


def _among(args: tuple, kwargs: dict) -> list[Series]:
    """The series among arguments, in them or in sequences of them."""
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Series):
            found.append(x)
        elif isinstance(x, tuple | list):
            found.extend(y for y in x if isinstance(y, Series))
    return found


class Composed(TorchFunctionMode):
    """Has f's normalizations and attention made of their sums and products.

    torch's third derivatives of layer_norm and batch_norm are wrong (found in 2.15, by differences), and attention has
    none.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("layer_norm", "batch_norm", "scaled_dot_product_attention"):
            return RULES[name](func, args, kwargs or {})
        if name == "detach" and transforms.wrapped(args[0]):
            raise NotImplementedError(
                "f detaches what depends on the state, which forward mode takes for a constant in time; take "
                "mode='taylor'"
            )
        return func(*args, **(kwargs or {}))


def _attribute(name: str, x: Series):
    if name in ("T", "mT", "H", "mH", "real", "imag"):
        return _linear(lambda x: getattr(x, name), (x,), {})
    if name in ("data", "grad", "grad_fn"):
        raise NoTaylorRule(f".{name} of a tensor")
    return getattr(x.value, name)


def _rule(*names: str):
    """Registers a rule that takes (func, args, kwargs)."""

    def register(rule: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _made_of(*names: str):
    """Registers a function as what others are made of; it takes their arguments."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, lambda func, args, kwargs: function(*args, **kwargs)))
        return function

    return register


# -- coefficients --------------------------------------------------------------------------------------------------


def _value(x):
    return x.value if isinstance(x, Series) else x


def _at(x, k: int) -> Coefficient:
    """Coefficient k of a series, or of something that does not change."""
    if isinstance(x, Series):
        return x.coefficients[k]
    return x if k == 0 else None


def _sum(terms: list[Coefficient]) -> Coefficient:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _series(operands, value, rule: Callable[[int], Coefficient]) -> Series:
    operands = [x for x in operands if isinstance(x, Series)]
    return Series(operands[0].tape, [value], rule, operands)


# -- linear operations ---------------------------------------------------------------------------------------------

_LINEAR = """
    neg pos positive negative sum mean cumsum diff trace clone contiguous detach to type float double half bfloat16
    cpu cuda type_as view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims
    movedim moveaxis
    t adjoint squeeze unsqueeze expand expand_as broadcast_to repeat tile repeat_interleave flip roll rot90
    getitem select narrow index_select gather take take_along_dim masked_select diagonal diag diag_embed tril triu
    unbind split chunk tensor_split split_with_sizes unsafe_chunk hsplit vsplit
    conj view_as_real view_as_complex real imag
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate
    pixel_shuffle pixel_unshuffle unfold fold identity as_tensor alias resolve_conj resolve_neg
"""


@_rule(*_LINEAR.split())
def _linear(func, args, kwargs):
    operands = _among(args, kwargs)
    if len(operands) == 1 and operands[0] is args[0]:
        rest = args[1:]

        def call(pick):
            return func(pick(operands[0]), *rest, **kwargs)

    else:
        leaves, tree = pytree.tree_flatten((args, kwargs))

        def call(pick):
            args, kwargs = pytree.tree_unflatten([pick(x) if isinstance(x, Series) else x for x in leaves], tree)
            return func(*args, **kwargs)

    value = call(_value)
    memo: dict[int, object] = {}

    def at(k: int):
        if k not in memo:
            memo.clear()
            none = all(_at(x, k) is None for x in operands)
            memo[k] = None if none else call(lambda x: torch.zeros_like(x.value) if _at(x, k) is None else _at(x, k))
        return memo[k]

    if isinstance(value, Tensor):
        return _series(operands, value, at) if _varies(value) else value

    def of(i):
        return lambda k: None if at(k) is None else at(k)[i]

    return type(value)([_series(operands, x, of(i)) for i, x in enumerate(value)])


def _varies(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


@_rule("iter")
def _iter(func, args, kwargs):
    return iter(args[0].unbind(0))


@_rule("broadcast_tensors")
def _broadcast_tensors(func, args, kwargs):
    tensors = args[0] if isinstance(args[0], tuple | list) else args
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)


@_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _joined(func, args, kwargs):
    tensors, *rest = args if args else (kwargs.pop("tensors"),)
    tensors = list(tensors)

    def at(k: int) -> Coefficient:
        found = [_at(x, k) for x in tensors]
        if all(x is None for x in found):
            return None
        pieces = [torch.zeros_like(_value(x)) if c is None else c for x, c in zip(tensors, found, strict=True)]
        return func(pieces, *rest, **kwargs)

    return _series(tensors, func([_value(x) for x in tensors], *rest, **kwargs), at)


@_rule("where")
def _where(func, args, kwargs):
    condition, a, b = args

    def at(k: int) -> Coefficient:
        x, y = _at(a, k), _at(b, k)
        return (
            None
            if x is None and y is None
            else torch.where(condition, 0.0 if x is None else x, 0.0 if y is None else y)
        )

    if not any(isinstance(x, Series) for x in (a, b)):
        return torch.where(_value(condition), a, b)
    return _series((a, b), torch.where(condition, _value(a), _value(b)), at)


@_rule("masked_fill")
def _masked_fill(func, args, kwargs):
    x, mask, value = args
    return torch.where(mask, value, x)


@_rule("index_copy", "index_add", "scatter", "scatter_add")
def _written(func, args, kwargs):
    x, dim, index, source = args

    def at(k: int) -> Coefficient:
        found = [_at(x, k), _at(source, k)]
        if all(c is None for c in found):
            return None
        found = [torch.zeros_like(_value(y)) if c is None else c for y, c in zip((x, source), found, strict=True)]
        return func(found[0], dim, index, found[1], **kwargs)

    return _series((x, source), func(_value(x), dim, index, _value(source), **kwargs), at)


@_rule("pad")
def _pad(func, args, kwargs):
    def padded(x, pad, mode="constant", value=None):
        moved = _linear(lambda x: func(x, pad, mode), (x,), {})
        return moved if not value else moved + func(torch.zeros_like(_value(x)), pad, mode, value)

    return padded(*args, **kwargs)


# -- sums and products ---------------------------------------------------------------------------------------------


@_rule("add", "radd", "sub", "subtract", "rsub")
def _add(func, args, kwargs):
    a, b = args
    name = func.__name__.strip("_")
    scale = kwargs.get("alpha", 1)
    if name == "rsub":
        a, b = b, a
    sign = scale if name in ("add", "radd") else -scale
    value = torch.add(_tensor(_value(a), b), _value(b), alpha=sign)

    def at(k: int) -> Coefficient:
        x, y = _at(a, k), _at(b, k)
        if y is not None and sign != 1:
            y = sign * y
        total = _sum([x, y])
        return None if total is None else total.expand(value.shape)

    return _series((a, b), value, at)


def _tensor(x, like):
    """A number as a tensor without dimensions, which takes part in type promotion as a number does."""
    return x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=_value(like).dtype, device=_value(like).device)


def _bilinear(product: Callable, a, b, elementwise: bool = False) -> Series:
    """Σ_i product(a_i, b_{k-i})."""

    def at(k: int) -> Coefficient:
        if not isinstance(b, Series):
            return None if _at(a, k) is None else product(_at(a, k), b)
        if not isinstance(a, Series):
            return None if _at(b, k) is None else product(a, _at(b, k))
        pairs = [(_at(a, i), _at(b, k - i)) for i in range(k + 1)]
        return _sum([product(x, y) for x, y in pairs if x is not None and y is not None])

    def square(k: int) -> Coefficient:
        pairs = [(a.coefficients[i], a.coefficients[k - i]) for i in range((k + 1) // 2)]
        total = _sum([x * y for x, y in pairs if x is not None and y is not None])
        middle = None if k % 2 else a.coefficients[k // 2]
        return _sum([None if total is None else 2.0 * total, None if middle is None else middle * middle])

    rule = square if a is b and elementwise else at
    return _series((a, b), product(_value(a), _value(b)), rule)


@_rule(
    "mul",
    "rmul",
    "multiply",
    "matmul",
    "rmatmul",
    "mm",
    "bmm",
    "mv",
    "dot",
    "outer",
    "inner",
    "ger",
    "tensordot",
    "kron",
)
def _product(func, args, kwargs):
    a, b, *rest = args
    elementwise = func.__name__.strip("_") in ("mul", "rmul", "multiply")
    return _bilinear(lambda x, y: func(x, y, *rest, **kwargs), a, b, elementwise)


@_rule("einsum")
def _einsum(func, args, kwargs):
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    where = [i for i, x in enumerate(operands) if isinstance(x, Series)]
    if len(where) > 2:
        raise NoTaylorRule("einsum of more than two tensors that depend on the state")

    def product(*varying):
        full = list(operands)
        for i, x in zip(where, varying, strict=True):
            full[i] = x
        return func(equation, *full)

    if len(where) == 1:
        return _linear(product, (operands[where[0]],), {})
    return _bilinear(product, operands[where[0]], operands[where[1]])


@_made_of("addmm", "baddbmm", "addmv")
def _addmm(x, a, b, beta=1, alpha=1):
    product = a @ b
    return beta * x + alpha * product


@_rule("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _affine(func, args, kwargs):
    def affine(input, weight, bias=None, *rest, **options):
        if isinstance(bias, Series):
            raise NoTaylorRule(f"{func.__name__} with a bias that depends on the state")
        made = _bilinear(lambda x, w: func(x, w, None, *rest, **options), input, weight)
        # The value is f's own, whose rounding errors are another's.
        made.coefficients[0] = func(_value(input), _value(weight), bias, *rest, **options)
        return made

    return affine(*args, **kwargs)


@_rule("div", "divide", "true_divide", "truediv", "rtruediv", "rdiv")
def _div(func, args, kwargs):
    if kwargs.get("rounding_mode") is not None:
        raise NoTaylorRule("a division that rounds")
    a, b = args if func.__name__ not in ("__rtruediv__", "__rdiv__") else args[::-1]
    if not isinstance(b, Series):
        return _linear(lambda x: x / b, (a,), {})
    value = _value(a) / b.value
    quotient = _series((a, b), value, lambda k: at(k))

    def at(k: int) -> Coefficient:
        pairs = [(_at(b, j), quotient.coefficients[k - j]) for j in range(1, k + 1)]
        rest = _sum([x * q for x, q in pairs if x is not None and q is not None])
        top = _sum([_at(a, k), None if rest is None else -rest])
        return None if top is None else (top / b.value).expand(value.shape)

    return quotient


# -- functions of one number, by their differential equations ------------------------------------------------------


def _integral(x: Series, value: Tensor, rate) -> Series:
    """Y with dy = rate·dx: k·y_k = Σ_j j·x_j·rate_{k-j}. rate may be made of y, after this."""

    def at(k: int) -> Coefficient:
        slope = y.rate
        pairs = [(j, x.coefficients[j], _at(slope, k - j)) for j in range(1, k + 1)]
        total = None
        for j, a, b in pairs:
            if a is not None and b is not None:
                a = a if j == k else (j / k) * a
                total = a * b if total is None else torch.addcmul(total, a, b)
        return total

    y = _series((x,), value, at)
    y.rate = rate
    return y


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


_by_value(lambda y: y, "exp")
_by_value(lambda y: math.log(2.0) * y, "exp2", "special_exp2")
_by_value(lambda y: y + 1.0, "expm1", "special_expm1")
_by_value(lambda y: 1.0 - y * y, "tanh")
_by_value(lambda y: 1.0 + y * y, "tan")
_by_value(lambda y: y - y * y, "sigmoid", "special_expit")
_by_value(lambda y: 0.5 / y, "sqrt")
_by_value(lambda y: -(y * y), "reciprocal")
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


@_made_of("square")
def _square(x):
    return x * x


@_rule("pow", "float_power", "rpow")
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


@_made_of("softplus")
def _softplus(x, beta=1.0, threshold=20.0):
    return _integral(x, functional.softplus(x.value, beta, threshold), torch.sigmoid(beta * x))


# -- functions with kinks: on either side they are what they are there ---------------------------------------------


@_made_of("relu")
def _relu(x):
    return torch.where(x > 0, x, 0.0)


@_made_of("leaky_relu")
def _leaky_relu(x, negative_slope=0.01):
    return torch.where(x > 0, x, negative_slope * x)


@_made_of("prelu")
def _prelu(x, weight):
    shape = [1, -1] + [1] * (x.dim() - 2) if weight.numel() > 1 else [1] * x.dim()
    return torch.where(x > 0, x, weight.reshape(shape) * x)


@_made_of("abs", "absolute")
def _abs(x):
    if x.is_complex():
        raise NoTaylorRule("abs of complex numbers")
    return torch.where(x >= 0, x, -x)


@_made_of("clamp", "clip", "hardtanh")
def _clamp(x, min=None, max=None, min_val=-1.0, max_val=1.0):
    if min is None and max is None:
        min, max = min_val, max_val
    x = x if min is None else torch.where(x < min, min, x)
    return x if max is None else torch.where(x > max, max, x)


@_made_of("relu6")
def _relu6(x):
    return x.clamp(0.0, 6.0)


@_made_of("clamp_min")
def _clamp_min(x, min):
    return x.clamp(min=min)


@_made_of("clamp_max")
def _clamp_max(x, max):
    return x.clamp(max=max)


@_made_of("hardsigmoid")
def _hardsigmoid(x):
    return (x / 6.0 + 0.5).clamp(0.0, 1.0)


@_made_of("hardswish")
def _hardswish(x):
    return x * (x / 6.0 + 0.5).clamp(0.0, 1.0)


@_made_of("maximum")
def _maximum(a, b):
    return torch.where(a >= b, a, b)


@_made_of("minimum")
def _minimum(a, b):
    return torch.where(a <= b, a, b)


@_made_of("elu", "celu")
def _elu(x, alpha=1.0):
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0.0)))


@_made_of("selu")
def _selu(x):
    scale, alpha = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, section 2
    return scale * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0.0)))


# -- what networks are made of -------------------------------------------------------------------------------------


@_made_of("silu")
def _silu(x):
    return x * torch.sigmoid(x)


@_made_of("mish")
def _mish(x):
    return x * torch.tanh(functional.softplus(x))


@_made_of("softsign")
def _softsign(x):
    return x / (1.0 + x.abs())


@_made_of("tanhshrink")
def _tanhshrink(x):
    return x - torch.tanh(x)


@_made_of("gelu")
def _gelu(x, approximate="none"):
    if approximate == "tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


@_made_of("addcmul")
def _addcmul(x, a, b, value=1):
    return x + value * (a * b)


@_made_of("addcdiv")
def _addcdiv(x, a, b, value=1):
    return x + value * (a / b)


@_made_of("lerp")
def _lerp(a, b, weight):
    return a + weight * (b - a)


def _shifted(x, dim):
    """X minus its largest entry, which is a constant."""
    return x - x.value.detach().amax(dim, keepdim=True)


@_made_of("softmax", "special_softmax")
def _softmax(x, dim=None, _stacklevel=3, dtype=None):
    e = torch.exp(_shifted(x if dtype is None else x.to(dtype), dim))
    return e / e.sum(dim, keepdim=True)


@_made_of("log_softmax", "special_log_softmax")
def _log_softmax(x, dim=None, _stacklevel=3, dtype=None):
    x = _shifted(x if dtype is None else x.to(dtype), dim)
    return x - torch.log(torch.exp(x).sum(dim, keepdim=True))


@_made_of("logsumexp")
def _logsumexp(x, dim, keepdim=False):
    total = x.value.detach().amax(dim, keepdim=True) + torch.log(torch.exp(_shifted(x, dim)).sum(dim, keepdim=True))
    return total if keepdim else total.squeeze(dim)


@_made_of("norm", "linalg_norm", "linalg_vector_norm")
def _norm(x, p=2, dim=None, keepdim=False, ord=None, dtype=None):
    p = p if ord is None else ord
    if p not in (2, 2.0, "fro", None) or x.is_complex() or dtype is not None:
        raise NoTaylorRule(f"a norm with p = {p!r}, or of complex numbers")
    square = x * x
    return torch.sqrt(square.sum() if dim is None else square.sum(dim, keepdim=keepdim))


@_made_of("normalize")
def _normalize(x, p=2.0, dim=1, eps=1e-12):
    return x / _norm(x, p, dim, keepdim=True).clamp(min=eps)


def _standardized(x, dims, eps):
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)


@_made_of("layer_norm")
def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    x = _standardized(x, tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(x, weight, bias):
    shape = [1, -1] + [1] * (x.dim() - 2)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


@_made_of("group_norm")
def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    groups = x.reshape(len(x), num_groups, -1)
    return _per_channel(_standardized(groups, (2,), eps).reshape(x.shape), weight, bias)


@_made_of("batch_norm")
def _batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    # Running statistics are left alone: a look at f is no training step.
    if training or mean is None:
        return _per_channel(_standardized(x, tuple(i for i in range(x.dim()) if i != 1), eps), weight, bias)
    scale = torch.rsqrt(var + eps)
    return _per_channel(_per_channel(x, scale, -mean * scale), weight, bias)


@_rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
def _dropout(func, args, kwargs):
    def dropout(x, p=0.5, training=True):
        if not training or p == 0:
            return x
        if func.__name__ == "alpha_dropout":
            raise NoTaylorRule("alpha_dropout")
        return x * func(torch.ones_like(x.value), p, training)  # the same draw: it looks at the shape alone

    return dropout(*args, **kwargs)


@_made_of("scaled_dot_product_attention")
def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if dropout_p or enable_gqa:
        raise NoTaylorRule("scaled_dot_product_attention with dropout or grouped queries")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


# -- what does not change in time, or only in jumps ----------------------------------------------------------------

_CONSTANT = """
    size dim numel nelement ndimension stride element_size is_contiguous is_floating_point is_complex is_same_size
    get_device result_type len repr format
    eq ne lt le gt ge equal allclose isclose isnan isinf isfinite isreal logical_not logical_and logical_or any all
    argmax argmin argsort searchsorted bucketize nonzero count_nonzero
    floor ceil round trunc sign sgn heaviside
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli
    new_zeros new_ones new_empty new_full new_tensor
"""


@_rule(*_CONSTANT.split())
def _constant(func, args, kwargs):
    return func(*map(_value, args), **{key: _value(x) for key, x in kwargs.items()})
