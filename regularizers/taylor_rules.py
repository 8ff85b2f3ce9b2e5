"""How power series go through the operations that vector fields are made of.

A rule takes the function that f called and its arguments, computes the value, and returns a `Series` that knows its
further coefficients. `RULES` has them by the function's name ("add" for `a + b`, `a.add(b)` and `torch.add(a, b)`).

Functions are in `taylor_functions.py`: what networks apply to numbers, and what they are made of.

Source of the recurrences: Griewank & Walther 2008, Evaluating Derivatives, tables 13.1 and 13.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from neuralde import transforms

from .taylor import Coefficient, NoTaylorRule, Series, made_by_autograd

RULES: dict[str, Callable] = {}
# What Python's operators call. Conversions to numbers (__float__, __bool__, ...) are none of these: they have no rule.
_OPERATOR_NAMES = """
    add radd sub rsub mul rmul matmul rmatmul truediv rtruediv div rdiv pow rpow neg pos abs
    eq ne lt le gt ge getitem iter repr format
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


def rule(*names: str):
    """Registers a rule that takes (func, args, kwargs)."""

    def register(rule: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def made_of(*names: str):
    """Registers a function as what others are made of; it takes their arguments."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, lambda func, args, kwargs: function(*args, **kwargs)))
        return function

    return register


# -- coefficients --------------------------------------------------------------------------------------------------


def _value(x):
    return x.value if isinstance(x, Series) else x


def at_order(x, k: int) -> Coefficient:
    """Coefficient k of a series, or of something that does not change."""
    if isinstance(x, Series):
        return x.coefficients[k]
    return x if k == 0 else None


def total(terms: Iterable[tuple[int, Coefficient]]) -> Coefficient:
    """Σ factor·term."""
    found = None
    for factor, term in terms:
        if found is not None and term is not None:
            found = torch.add(found, term, alpha=factor)
        elif term is not None:
            found = term if factor == 1 else factor * term
    return found


def leibniz(k: int, a: Series, b: Series, product: Callable = torch.mul, first: int = 0) -> Coefficient:
    """Coefficient k of a product, of the terms with a's coefficients from the first one on."""
    terms = []
    for i in range(first, k + 1):
        x, y = a.coefficients[i], b.coefficients[k - i]
        if x is not None and y is not None:
            terms.append((math.comb(k, i), product(x, y)))
    return total(terms)


def series(operands, value, rule: Callable[[int], Coefficient]) -> Series:
    """The result of an operation.

    Args:
        operands: of which some are series. value: its coefficient 0. rule: k -> its coefficient k.
    """
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


def _filled(x: Series, k: int) -> Tensor:
    """Coefficient k as a tensor."""
    found = at_order(x, k)
    return torch.zeros_like(x.value) if found is None else found


@rule(*_LINEAR.split())
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
    if len(operands) == 1 and value is operands[0].value:  # to a dtype that it has, contiguous, ...
        return operands[0]
    memo: dict[int, object] = {}

    def at(k: int):
        if k not in memo:
            memo.clear()
            none = all(at_order(x, k) is None for x in operands)
            memo[k] = None if none else call(lambda x: _filled(x, k))
        return memo[k]

    if isinstance(value, Tensor):
        return series(operands, value, at) if _varies(value) else value

    def of(i):
        return lambda k: None if at(k) is None else at(k)[i]

    return type(value)([series(operands, x, of(i)) for i, x in enumerate(value)])


def _varies(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


@rule("iter")
def _iter(func, args, kwargs):
    return iter(args[0].unbind(0))


@rule("broadcast_tensors")
def _broadcast_tensors(func, args, kwargs):
    tensors = args[0] if isinstance(args[0], tuple | list) else args
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _joined(func, args, kwargs):
    tensors, *rest = args if args else (kwargs.pop("tensors"),)
    tensors = list(tensors)

    def at(k: int) -> Coefficient:
        found = [at_order(x, k) for x in tensors]
        if all(x is None for x in found):
            return None
        pieces = [torch.zeros_like(_value(x)) if c is None else c for x, c in zip(tensors, found, strict=True)]
        return func(pieces, *rest, **kwargs)

    return series(tensors, func([_value(x) for x in tensors], *rest, **kwargs), at)


@rule("where")
def _where(func, args, kwargs):
    condition, a, b = args

    def at(k: int) -> Coefficient:
        x, y = at_order(a, k), at_order(b, k)
        return (
            None
            if x is None and y is None
            else torch.where(condition, 0.0 if x is None else x, 0.0 if y is None else y)
        )

    if not any(isinstance(x, Series) for x in (a, b)):
        return torch.where(_value(condition), a, b)
    return series((a, b), torch.where(condition, _value(a), _value(b)), at)


@rule("masked_fill")
def _masked_fill(func, args, kwargs):
    x, mask, value = args
    return torch.where(mask, value, x)


@rule("index_copy", "index_add", "scatter", "scatter_add")
def _written(func, args, kwargs):
    x, dim, index, source = args

    def at(k: int) -> Coefficient:
        found = [at_order(x, k), at_order(source, k)]
        if all(c is None for c in found):
            return None
        found = [torch.zeros_like(_value(y)) if c is None else c for y, c in zip((x, source), found, strict=True)]
        return func(found[0], dim, index, found[1], **kwargs)

    return series((x, source), func(_value(x), dim, index, _value(source), **kwargs), at)


@rule("pad")
def _pad(func, args, kwargs):
    def padded(x, pad, mode="constant", value=None):
        moved = _linear(lambda x: func(x, pad, mode), (x,), {})
        return moved if not value else moved + func(torch.zeros_like(_value(x)), pad, mode, value)

    return padded(*args, **kwargs)


# -- sums and products ---------------------------------------------------------------------------------------------


@rule("add", "radd", "sub", "subtract", "rsub")
def _add(func, args, kwargs):
    a, b = args
    name = func.__name__.strip("_")
    scale = kwargs.get("alpha", 1)
    if name == "rsub":
        a, b = b, a
    sign = scale if name in ("add", "radd") else -scale
    value = torch.add(_tensor(_value(a), b), _value(b), alpha=sign)

    def at(k: int) -> Coefficient:
        found = total([(1, at_order(a, k)), (sign, at_order(b, k))])
        return None if found is None else found.expand(value.shape)

    return series((a, b), value, at)


def _tensor(x, like):
    """A number as a tensor without dimensions, which takes part in type promotion as a number does."""
    return x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=_value(like).dtype, device=_value(like).device)


def _bilinear(product: Callable, a, b, value: Tensor | None = None, elementwise: bool = False) -> Series:
    """Σ_i binomial(k, i)·product(a_i, b_{k-i}).

    Args:
        value: of the result, where it is not product(a_0, b_0).
    """

    def at(k: int) -> Coefficient:
        if not isinstance(b, Series):
            return None if a.coefficients[k] is None else product(a.coefficients[k], b)
        if not isinstance(a, Series):
            return None if b.coefficients[k] is None else product(a, b.coefficients[k])
        return square_at(a, k) if a is b and elementwise else leibniz(k, a, b, product)

    return series((a, b), product(_value(a), _value(b)) if value is None else value, at)


def square_at(x: Series, k: int, first: int = 0) -> Coefficient:
    """Coefficient k of x·x, of the terms where both have coefficients from the first one on."""
    terms = []
    for i in range(first, k // 2 + 1):
        a, b = x.coefficients[i], x.coefficients[k - i]
        if a is not None and b is not None:
            terms.append((math.comb(k, i) * (1 if 2 * i == k else 2), a * b))
    return total(terms)


@rule(
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
    return _bilinear(lambda x, y: func(x, y, *rest, **kwargs), a, b, elementwise=elementwise)


@rule("einsum")
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


@made_of("addmm", "baddbmm", "addmv")
def _addmm(x, a, b, beta=1, alpha=1):
    product = a @ b
    return beta * x + alpha * product


@rule("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _affine(func, args, kwargs):
    def affine(input, weight, bias=None, *rest, **options):
        if isinstance(bias, Series):
            raise NoTaylorRule(f"{func.__name__} with a bias that depends on the state")
        value = func(_value(input), _value(weight), bias, *rest, **options)
        return _bilinear(lambda x, w: func(x, w, None, *rest, **options), input, weight, value)

    return affine(*args, **kwargs)


@rule("div", "divide", "true_divide", "truediv", "rtruediv", "rdiv")
def _div(func, args, kwargs):
    if kwargs.get("rounding_mode") is not None:
        raise NoTaylorRule("a division that rounds")
    a, b = args if func.__name__ not in ("__rtruediv__", "__rdiv__") else args[::-1]
    if not isinstance(b, Series):
        return _linear(lambda x: x / b, (a,), {})
    value = _value(a) / b.value
    quotient = series((a, b), value, lambda k: at(k))

    def at(k: int) -> Coefficient:
        top = total([(1, at_order(a, k)), (-1, leibniz(k, b, quotient, first=1))])
        return None if top is None else (top / b.value).expand(value.shape)

    return quotient


# -- what does not change in time, or only in jumps ----------------------------------------------------------------

_CONSTANT = """
    numel nelement ndimension stride element_size is_contiguous is_floating_point is_complex is_same_size
    get_device result_type repr format
    eq ne lt le gt ge equal allclose isclose isnan isinf isfinite isreal logical_not logical_and logical_or any all
    argmax argmin argsort searchsorted bucketize nonzero count_nonzero
    floor ceil round trunc sign sgn heaviside
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli
    new_zeros new_ones new_empty new_full new_tensor
"""


@rule(*_CONSTANT.split())
def _constant(func, args, kwargs):
    return func(*map(_value, args), **{key: _value(x) for key, x in kwargs.items()})
