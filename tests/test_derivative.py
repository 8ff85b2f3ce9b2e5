"""Total derivatives by Taylor mode, their integrals along solutions, and the penalties made of them."""

from __future__ import annotations

import pytest
import torch
from helpers import CONTROLS, DENSE, EXACT, SOLVERS, options, refused
from torch import nn
from torch.nn import functional

import neuralde as nde
import regularizers as reg
from regularizers import taylor_rules
from regularizers.taylor import NoTaylorRule, derivatives, nested_derivatives

CONTROL = pytest.mark.parametrize("control", CONTROLS)
MODE = pytest.mark.parametrize("mode", ["taylor", "jvp"])


def start(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- closed forms --------------------------------------------------------------------------------------------------

# f(t, z), the solution through (0.3, its value there) as a function of t, made so that autograd differentiates it.
A = torch.tensor([[-0.5, 2.0], [-2.0, 0.3]], dtype=torch.float64)
SYSTEMS = {
    "linear": (lambda t, z: z @ A.T, lambda t: torch.matrix_exp(A * t) @ torch.tensor([1.0, -0.5]).double()),
    "logistic": (lambda t, z: z * (1 - z), lambda t: torch.stack([1 / (1 + 3 * torch.exp(-t)), torch.sigmoid(t)])),
    "Riccati": (lambda t, z: 1 + z**2, lambda t: torch.stack([torch.tan(t), torch.tan(t + 0.5)])),
    "separable": (
        lambda t, z: 2 * z * torch.cos(2 * t),
        lambda t: torch.stack([torch.exp(torch.sin(2 * t)), 3 * torch.exp(torch.sin(2 * t))]),
    ),
    "a root": (lambda t, z: z.sqrt(), lambda t: torch.stack([(t + 1) ** 2 / 4, (t + 2) ** 2 / 4])),
    "a quotient": (lambda t, z: -2 * t * z**2, lambda t: torch.stack([1 / (1 + t**2), 1 / (2 + t**2)])),
    "an exponential": (lambda t, z: torch.exp(-z), lambda t: torch.stack([torch.log(1 + t), torch.log(2 + t)])),
    "a polynomial": (lambda t, z: 3 * t**2 - 2 * t + 0 * z, lambda t: torch.stack([t**3 - t**2, 1 + t**3 - t**2])),
    "a sine": (lambda t, z: torch.sin(z), lambda t: 2 * torch.atan(torch.stack([torch.exp(t), 2 * torch.exp(t)]))),
    "tanh": (lambda t, z: 1 / torch.cosh(z), lambda t: torch.stack([torch.asinh(t), torch.asinh(t + 1)])),
}  # fmt: skip


def exact(solution, t, order):
    """The derivatives of a function of time, by autograd of each component."""
    t = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    found = []
    for x in solution(t):
        row = []
        for _ in range(order):
            x = x if x.requires_grad else x + 0 * t
            (x,) = torch.autograd.grad(x, t, create_graph=True, allow_unused=True, materialize_grads=True)
            row.append(x)
        found.append(torch.stack(row))
    return torch.stack(found, dim=1).detach()  # [order, components]


@MODE
@pytest.mark.parametrize("system", SYSTEMS)
def test_against_closed_forms(system, mode):
    """The derivatives 1 to 4, to 1e-8; two times as two samples."""
    f, solution = SYSTEMS[system]
    times = (0.3, 0.7)
    t = torch.tensor(times, dtype=torch.float64)[:, None]
    z = torch.stack([solution(x) for x in t[:, 0]])
    found = {"taylor": derivatives, "jvp": nested_derivatives}[mode](f, t, z, 4)
    expected = torch.stack([exact(solution, x, 4) for x in times], dim=1)
    assert len(found) == 4
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_any_order():
    found = derivatives(lambda t, z: 1 + z**2, None, torch.zeros(1, 1, dtype=torch.float64), 9)
    # tan(t) = t + t³/3 + 2t⁵/15 + 17t⁷/315 + 62t⁹/2835
    expected = [1, 0, 2, 0, 16, 0, 272, 0, 7936]
    torch.testing.assert_close(torch.stack(found).flatten(), torch.tensor(expected).double(), rtol=1e-12, atol=1e-12)


def test_f_is_called_once():
    calls = []

    def f(t, z):
        calls.append(None)
        return torch.tanh(z) * t

    derivatives(f, torch.ones(2, 1), torch.ones(2, 3), 4)
    assert len(calls) == 1


@pytest.mark.parametrize("f", [lambda t, z: torch.ones(2, 3), lambda t, z: 0.0 * z, lambda t, z: z.detach() * 0 + 1.0])
def test_a_constant_slope_has_no_further_derivatives(f):
    first, *others = derivatives(f, torch.ones(2, 1), torch.ones(2, 3), 3)
    assert first.shape == (2, 3) and all((x == 0).all() and x.shape == (2, 3) for x in others)


# -- every rule ----------------------------------------------------------------------------------------------------


def fit(x):
    """Whatever it is, in the state's shape."""
    x = x.reshape(-1)
    return torch.cat([x] * -(-12 // x.numel()))[:12].reshape(3, 4)


W = start(4, 4, seed=6)
INDEX = torch.tensor([2, 0, 1])
COLUMNS = torch.tensor([[0, 1], [3, 2], [1, 1]])
IMAGE = start(2, 3, 3, 3, seed=7)
# The name of a rule: expressions in z [3, 4] and t [3, 1] that need it, compared with nested forward mode.
EXPRESSIONS = {
    "add": ["z + t", "z.add(t, alpha=2)", "torch.add(z, 3.0)"],
    "radd": ["1.0 + z * z"],
    "sub": ["z - t", "torch.sub(z * z, t, alpha=0.5)"],
    "subtract": ["torch.subtract(z, t)"],
    "rsub": ["1.0 - z * z", "torch.rsub(t, z, alpha=2)"],
    "mul": ["z * t", "z * 2", "W[:3] * z"],
    "rmul": ["2 * z * z"],
    "multiply": ["torch.multiply(z, t)"],
    "matmul": ["z @ W", "fit(z.T @ z)", "torch.matmul(z, W)"],
    "rmatmul": ["W[:3, :3] @ z"],
    "mm": ["torch.mm(z, W)"],
    "bmm": ["fit(torch.bmm(z[:, :, None], z[:, None]))"],
    "mv": ["fit(torch.mv(z, z[0]))"],
    "dot": ["z * torch.dot(z[0], z[1])"],
    "outer": ["fit(torch.outer(z[0], t[:, 0]))"],
    "inner": ["fit(torch.inner(z, W))"],
    "ger": ["fit(torch.ger(z[0], z[1]))"],
    "tensordot": ["torch.tensordot(z, W, 1)"],
    "kron": ["fit(torch.kron(z[:1], t))"],
    "einsum": ["torch.einsum('bi,ij->bj', z, W)", "torch.einsum('bi,bi->b', z, z)[:, None] * z"],
    "addmm": ["torch.addmm(z, z, W, beta=0.5, alpha=2)"],
    "baddbmm": ["torch.baddbmm(z[None], z[None], W[None])[0]"],
    "addmv": ["fit(torch.addmv(t[:, 0], z, W[0]))"],
    "linear": ["F.linear(z, W, W[0])", "F.linear(z, W)", "F.linear(W[:3], fit(z * z)[:, :4].T @ z)[:, :4] * z"],
    "conv1d": [
        "F.conv1d(z[None], W[:3, :3, None], W[:3, 0])[0]",
        "F.conv1d(z[:, None], W[:1, None, :3], padding=1)[:, 0]",
    ],
    "conv2d": ["fit(F.conv2d(z.reshape(1, 1, 3, 4), IMAGE[:, :1], IMAGE[0, 0, 0, :2], padding=1))"],
    "conv3d": ["fit(F.conv3d(z.reshape(1, 1, 3, 2, 2), IMAGE[:, :1, :2, :2, None], padding=1))"],
    "conv_transpose1d": ["fit(F.conv_transpose1d(z[:, None], W[:1, None, :3]))"],
    "conv_transpose2d": ["fit(F.conv_transpose2d(z.reshape(1, 1, 3, 4), IMAGE[:1, :1]))"],
    "conv_transpose3d": ["fit(F.conv_transpose3d(z.reshape(1, 1, 3, 2, 2), IMAGE[:1, :1, :, :, None]))"],
    "div": ["z / t", "z / 2", "z / (2 + z * z)"],
    "divide": ["torch.divide(z, 1 + t)"],
    "true_divide": ["torch.true_divide(1 + t, 2 + z * z)"],
    "rdiv": ["1 / (2 + z * z)"],
    "pow": [
        "z**2",
        "z**3",
        "z**5",
        "z**0 * t",
        "(2 + z * z) ** 0.5",
        "(2 + z * z) ** -1.5",
        "(2 + z) ** -2",
        "z ** torch.tensor(3.0)",
        "(2 + z * z) ** t",
        "torch.tensor(2.0).double() ** t * z",
    ],
    "float_power": ["torch.float_power(z, 2)"],
    "rpow": ["2.0 ** z"],
    "square": ["torch.square(z)"],
    "exp": ["torch.exp(-z)"],
    "exp2": ["torch.exp2(z)"],
    "special_exp2": ["torch.special.exp2(z)"],
    "expm1": ["torch.expm1(z)"],
    "special_expm1": ["torch.special.expm1(z)"],
    "tanh": ["torch.tanh(z * t)", "F.tanh(z)"],
    "tan": ["torch.tan(0.3 * z)"],
    "sigmoid": ["torch.sigmoid(3 * z)"],
    "special_expit": ["torch.special.expit(z)"],
    "sqrt": ["torch.sqrt(2 + z * z)"],
    "rsqrt": ["torch.rsqrt(2 + z * z)"],
    "reciprocal": ["torch.reciprocal(2 + z * z)"],
    "log": ["torch.log(2 + z * z)"],
    "log2": ["torch.log2(2 + z * z)"],
    "log10": ["torch.log10(2 + z * z)"],
    "log1p": ["torch.log1p(z * z)"],
    "special_log1p": ["torch.special.log1p(z * z)"],
    "atan": ["torch.atan(z)"],
    "arctan": ["torch.arctan(z)"],
    "asin": ["torch.asin(0.3 * z)"],
    "arcsin": ["torch.arcsin(0.3 * z)"],
    "acos": ["torch.acos(0.3 * z)"],
    "arccos": ["torch.arccos(0.3 * z)"],
    "asinh": ["torch.asinh(z)"],
    "arcsinh": ["torch.arcsinh(z)"],
    "erf": ["torch.erf(z)"],
    "special_erf": ["torch.special.erf(z)"],
    "erfc": ["torch.erfc(z)"],
    "special_erfc": ["torch.special.erfc(z)"],
    "log_sigmoid": ["F.logsigmoid(z)"],
    "sin": ["torch.sin(z * t)"],
    "cos": ["torch.cos(z * t)"],
    "sinh": ["torch.sinh(z)"],
    "cosh": ["torch.cosh(z)"],
    "softplus": ["F.softplus(z)", "F.softplus(z, beta=2.0)"],
    "relu": ["F.relu(z) * z", "z.relu()"],
    "leaky_relu": ["F.leaky_relu(z, 0.1) * t"],
    "prelu": ["F.prelu(z, W[0]) * t", "F.prelu(z, W[0, :1]) * t"],
    "abs": ["z.abs() * t", "abs(z)"],
    "absolute": ["torch.absolute(z)"],
    "clamp": ["z.clamp(-0.5, 0.5) * t", "z.clamp(min=0.1) * z", "torch.clamp(z, max=t) * z"],
    "clip": ["z.clip(-0.5, 0.5) * t"],
    "clamp_min": ["z.clamp_min(0.1) * z"],
    "clamp_max": ["z.clamp_max(0.1) * z"],
    "hardtanh": ["F.hardtanh(z) * t"],
    "relu6": ["F.relu6(9 * z) * t"],
    "hardswish": ["F.hardswish(z)"],
    "maximum": ["torch.maximum(z, t.expand_as(z)) * t"],
    "minimum": ["torch.minimum(z, t.expand_as(z)) * t"],
    "elu": ["F.elu(z, 0.7)"],
    "celu": ["F.celu(z)"],
    "selu": ["F.selu(z)"],
    "silu": ["F.silu(z)"],
    "mish": ["F.mish(z)"],
    "softsign": ["F.softsign(z)"],
    "tanhshrink": ["F.tanhshrink(z)"],
    "gelu": ["F.gelu(z)", "F.gelu(z, approximate='tanh')"],
    "addcmul": ["torch.addcmul(z, z, t, value=2)"],
    "addcdiv": ["torch.addcdiv(z, t, 2 + z * z, value=2)"],
    "lerp": ["torch.lerp(z, t, 0.3)", "torch.lerp(z, W[:3], z)"],
    "softmax": ["torch.softmax(z * z, 1)", "F.softmax(z * z, dim=0)"],
    "special_softmax": ["torch.special.softmax(z * z, 1)"],
    "log_softmax": ["F.log_softmax(z * z, dim=1)"],
    "special_log_softmax": ["torch.special.log_softmax(z * z, 1)"],
    "logsumexp": ["torch.logsumexp(z * z, 1, keepdim=True) * z", "fit(torch.logsumexp(z, 1))"],
    "norm": ["z * z.norm()", "z * z.norm(dim=1, keepdim=True)", "z * torch.norm(z, dim=1, keepdim=True)"],
    "linalg_norm": ["z * torch.linalg.norm(z)"],
    "linalg_vector_norm": ["z * torch.linalg.vector_norm(z, dim=1, keepdim=True)"],
    "normalize": ["t * F.normalize(z, dim=1)"],
    "layer_norm": ["F.layer_norm(z, (4,), W[0], W[1]) * t", "F.layer_norm(z, (4,)) * t"],
    "group_norm": ["F.group_norm(z, 2, W[0], W[1]) * t"],
    "batch_norm": [
        "F.batch_norm(z, W[0], W[1] ** 2, W[2], W[3]) * t",
        "F.batch_norm(z, None, None, training=True) * t",
    ],
    "dropout": ["F.dropout(z, 0.5, training=False) * z"],
    "scaled_dot_product_attention": [
        "F.scaled_dot_product_attention(z[None], z[None] * t, z[None], is_causal=True)[0]",
        "F.scaled_dot_product_attention(z[None], z[None], z[None], attn_mask=W[:3, :3])[0]",
    ],
    "neg": ["-z * z", "torch.neg(z)"],
    "positive": ["torch.positive(z)", "+z * z"],
    "negative": ["torch.negative(z)"],
    "sum": ["z * z.sum()", "z * z.sum(1, keepdim=True)", "z + torch.sum(z, dim=0)"],
    "mean": ["z * z.mean()", "z * z.mean(dim=1, keepdim=True)"],
    "cumsum": ["z.cumsum(1)"],
    "diff": ["fit(z.diff(dim=1))"],
    "trace": ["z * torch.trace(z)"],
    "clone": ["z.clone() * z"],
    "contiguous": ["z.T.contiguous().T * z"],
    "to": ["z.to(torch.float64) * z"],
    "type": ["z.type(torch.float64)"],
    "double": ["z.double() * z"],
    "cpu": ["z.cpu() * z"],
    "type_as": ["z.type_as(W)"],
    "view": ["fit((z * z).view(2, 6))"],
    "view_as": ["(z * z).view_as(z)"],
    "reshape": ["fit(z.reshape(6, 2))"],
    "reshape_as": ["z.reshape_as(z)"],
    "flatten": ["fit(z.flatten())"],
    "unflatten": ["fit(z.unflatten(1, (2, 2)))"],
    "ravel": ["fit(z.ravel())"],
    "permute": ["fit(z.permute(1, 0))"],
    "transpose": ["fit(z.transpose(0, 1))"],
    "swapaxes": ["fit(z.swapaxes(0, 1))"],
    "swapdims": ["fit(z.swapdims(0, 1))"],
    "movedim": ["fit(z.movedim(0, 1))"],
    "moveaxis": ["fit(z.moveaxis(0, 1))"],
    "t": ["fit(z.t())"],
    "adjoint": ["fit(z.adjoint())"],
    "squeeze": ["z[None].squeeze(0) * z"],
    "unsqueeze": ["z.unsqueeze(0)[0] * z"],
    "expand": ["t.expand(3, 4) * z"],
    "expand_as": ["t.expand_as(z) * z"],
    "broadcast_to": ["torch.broadcast_to(t, (3, 4)) * z"],
    "repeat": ["t.repeat(1, 4) * z"],
    "tile": ["torch.tile(t, (1, 4)) * z"],
    "repeat_interleave": ["fit(z.repeat_interleave(2, dim=0))"],
    "flip": ["z.flip(1) * z"],
    "roll": ["z.roll(1, 1) * z"],
    "rot90": ["fit(torch.rot90(z))"],
    "getitem": ["z[:, [1, 0, 3, 2]] * z", "z[INDEX] * t", "fit(z[z > 0])", "fit(z[..., 0])"],
    "select": ["z.select(1, 2)[:, None] * z"],
    "narrow": ["fit(z.narrow(1, 1, 2))"],
    "index_select": ["z.index_select(0, INDEX) * z"],
    "gather": ["fit(z.gather(1, COLUMNS))"],
    "take": ["fit(z.take(COLUMNS))"],
    "take_along_dim": ["fit(torch.take_along_dim(z, COLUMNS, 1))"],
    "masked_select": ["fit(z.masked_select(W[:3] > 0))"],
    "diagonal": ["fit(z.diagonal())"],
    "diag": ["fit(z.diag())"],
    "diag_embed": ["fit(z.diag_embed())"],
    "tril": ["z.tril() * z"],
    "triu": ["z.triu() * z"],
    "unbind": ["torch.stack([x * x for x in z.unbind(1)], 1)", "torch.stack([x * x for x in z])"],
    "split": ["torch.cat(z.split(2, dim=1)[::-1], 1) * z"],
    "chunk": ["torch.cat(z.chunk(2, dim=1)[::-1], 1) * z"],
    "tensor_split": ["torch.cat(z.tensor_split(3, dim=1), 1)"],
    "split_with_sizes": ["torch.cat(z.split_with_sizes([1, 3], 1), 1)"],
    "unsafe_chunk": ["z.unsafe_chunk(1)[0] * z"],
    "hsplit": ["torch.cat(z.hsplit(2), 1) * z"],
    "vsplit": ["torch.cat(z.vsplit(3)) * z"],
    "avg_pool1d": ["fit(F.avg_pool1d(z[None], 2))"],
    "avg_pool2d": ["fit(F.avg_pool2d(z[None, None], 2))"],
    "avg_pool3d": ["fit(F.avg_pool3d(z.reshape(1, 1, 3, 2, 2), 2))"],
    "adaptive_avg_pool1d": ["fit(F.adaptive_avg_pool1d(z[None], 2))"],
    "adaptive_avg_pool2d": ["fit(F.adaptive_avg_pool2d(z[None, None], 2))"],
    "adaptive_avg_pool3d": ["fit(F.adaptive_avg_pool3d(z.reshape(1, 1, 3, 2, 2), 1))"],
    "interpolate": ["fit(F.interpolate(z[None, None], scale_factor=2.0, mode='bilinear'))"],
    "pixel_shuffle": ["fit(F.pixel_shuffle(z.T.reshape(1, 4, 3, 1), 2))"],
    "pixel_unshuffle": ["fit(F.pixel_unshuffle(z.reshape(1, 1, 6, 2), 2))"],
    "unfold": ["fit(z.unfold(1, 2, 1))", "fit(F.unfold(z[None, None], 2))"],
    "fold": ["fit(F.fold(z.reshape(1, 4, 3), (2, 4), 2))"],
    "broadcast_tensors": ["torch.broadcast_tensors(t, z)[0] * z"],
    "cat": ["torch.cat([z[:, :2], t, t * z[:, :1]], 1)", "torch.cat([z[:, :3], W[:3, :1]], dim=1) * z"],
    "concat": ["torch.concat([z[:, :2], z[:, :2]], 1)"],
    "concatenate": ["torch.concatenate([z[:, :2], z[:, :2]], 1)"],
    "stack": ["torch.stack([z[0], z[1] * z[1], W[0]])"],
    "hstack": ["torch.hstack([z[:, :2], z[:, :2]])"],
    "vstack": ["torch.vstack([z[:1], z[:2]])"],
    "where": ["torch.where(z > 0, z * z, t)", "torch.where(z > 0, z, 0.5)", "torch.where(W[:3] > 0, 1.0, z)"],
    "masked_fill": ["z.masked_fill(W[:3] > 0, 0.5) * z"],
    "index_copy": ["z.index_copy(0, INDEX, z * z)", "W[:3].index_copy(0, INDEX[:2], (z * z)[:2])"],
    "index_add": ["z.index_add(0, INDEX, z * z, alpha=2)"],
    "scatter": ["z.scatter(1, COLUMNS, (z * z)[:, :2])"],
    "scatter_add": ["z.scatter_add(1, COLUMNS, W[:3, :2])"],
    "pad": [
        "fit(F.pad(z, (1, 1)))",
        "fit(F.pad(z, (1, 1), value=2.0)) * z",
        "fit(F.pad(z[None], (1, 1), mode='circular'))",
    ],
    "numel": ["z * z.numel()"],
    "is_floating_point": ["z * z.is_floating_point()"],
    "eq": ["torch.where(z == 0, t, z)"],
    "ne": ["torch.where(z != 0, t, z)"],
    "lt": ["torch.where(z < t, t, z)"],
    "le": ["torch.where(z <= t, t, z)"],
    "gt": ["torch.where(z > t, t, z)"],
    "ge": ["torch.where(z >= t, t, z)"],
    "isfinite": ["torch.where(z.isfinite(), z * z, t)"],
    "isnan": ["torch.where(z.isnan(), t, z * z)"],
    "any": ["torch.where((z > 9).any() | z.any(), z * z, t)"],
    "argmax": ["z * z.argmax()"],
    "floor": ["z * z.floor()"],
    "sign": ["z * z.sign()"],
    "zeros_like": ["torch.zeros_like(z) + z * z"],
    "ones_like": ["torch.ones_like(z) * z"],
    "new_zeros": ["z * z + z.new_zeros(4)"],
    "new_tensor": ["z * z.new_tensor(2.0)"],
    "full_like": ["z * torch.full_like(z, 2)"],
}
CASES = [(name, text) for name, texts in EXPRESSIONS.items() for text in texts]


def function(text):
    scope = {"torch": torch, "F": functional, "fit": fit, "W": W, "INDEX": INDEX, "COLUMNS": COLUMNS, "IMAGE": IMAGE}
    return eval(f"lambda t, z: {text}", scope)


def test_every_rule(monkeypatch):
    """Each against nested forward mode, orders 1 to 4, and each is used by the expressions that stand for it."""
    used = set()

    class Watched(dict):
        def __getitem__(self, name):
            used.add(name)
            return super().__getitem__(name)

    monkeypatch.setattr(taylor_rules, "RULES", Watched(taylor_rules.RULES))
    t, z = start(3, 1).abs() + 0.5, start(3, 4, seed=8)
    for name, text in CASES:
        f = function(text)
        used.clear()
        found = derivatives(f, t, z, 4)
        # Which of the two an operator with a number on its left calls depends on torch's version.
        assert name in used or name.removeprefix("r") in used, f"{text} does not use the rule of {name}"
        for k, (mine, theirs) in enumerate(zip(found, nested_derivatives(f, t, z, 4), strict=True), start=1):
            torch.testing.assert_close(
                mine, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, text=text, k=k: f"{text}, order {k}: {m}"
            )


# Differ from those that are tested by a word, by the precision or by what they ask for.
ALIKE = """
    float half bfloat16 cuda conj view_as_real view_as_complex real imag as_tensor alias resolve_conj resolve_neg
    div truediv rtruediv pos iter identity nelement ndimension logsigmoid
    dropout1d dropout2d dropout3d alpha_dropout feature_dropout stride element_size
    is_contiguous is_complex is_same_size get_device result_type repr format equal allclose isclose isinf isreal
    logical_not logical_and logical_or all argmin argsort searchsorted bucketize nonzero count_nonzero ceil round trunc
    sgn heaviside empty_like rand_like randn_like randint_like bernoulli new_ones new_empty new_full
"""


def test_every_rule_has_a_test():
    others = {name for name, _, _ in SAME}
    assert set(taylor_rules.RULES) - set(EXPRESSIONS) - others - set(ALIKE.split()) == set()


# What torch's forward mode can't do or does otherwise, and the same in other words.
SAME = [
    ("hardsigmoid", "F.hardsigmoid(z) * t", "(z / 6 + 0.5).clamp(0, 1) * t"),
    ("detach", "z.detach() * z", "z * z"),
    ("getitem", "fit(z.T) + fit(z.mT) + {z: z * z}[z]", "2 * fit(z.t()) + z * z"),
    ("mul", "torch.nn.Identity()(z) * z", "z * z"),
    ("mul", "z.size(1) * z.size()[0] * z.shape[-1] * z", "48 * z"),
    ("mul", "z.dim() * z.ndim * len(z) * z", "12 * z"),
]


@pytest.mark.parametrize(("name", "text", "same"), SAME, ids=[text for _, text, _ in SAME])
def test_the_same_in_other_words(name, text, same):
    t, z = start(3, 1).abs() + 0.5, start(3, 4, seed=8)
    for a, b in zip(*(derivatives(function(x), t, z, 4) for x in (text, same)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_detached_changes_in_time_without_a_gradient():
    w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    z = start(2, 3)
    found = derivatives(lambda t, z: (w * z).detach() + z, None, z, 2)
    torch.testing.assert_close(found[1], 2.5 * 2.5 * z)
    assert not found[1].requires_grad
    with refused(NotImplementedError, "detach", "mode='taylor'"):
        nested_derivatives(lambda t, z: z.detach() * z, None, z, 2)


def net(d=3, seed=0):
    torch.manual_seed(seed)
    return nde.TimeChain(
        nde.AppendTime(nn.Linear(d + 1, 8)), nn.GELU(), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, d)
    ).double()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_gradients_of_derivatives(order):
    """Reverse mode through Taylor mode, to the parameters, the state and the time."""
    f, t, z = net(), start(2, 1).requires_grad_(), start(2, 3).requires_grad_()
    inputs = [*f.parameters(), z, t]
    mine, theirs = (
        torch.autograd.grad(sum((x**2).sum() for x in made(f, t, z, order)), inputs, allow_unused=True)
        for made in (derivatives, nested_derivatives)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_complex_states():
    z = torch.complex(start(3, 2), start(3, 2, seed=6))
    found = derivatives(lambda t, z: 1j * z * t, torch.full((3, 1), 0.5).double(), z, 3)
    # z = z0·exp(i·t²/2): z' = i·t·z, z'' = (i - t²)·z, z''' = (-3t - i·t³)·z
    for mine, factor in zip(found, (0.5j, 1j - 0.25, -1.5 - 0.125j), strict=True):
        torch.testing.assert_close(mine, factor * z, rtol=1e-12, atol=1e-12)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return 2 * z

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda t, z: torch.special.bessel_j0(z), "bessel_j0"),
        (lambda t, z: z.clone().mul_(2.0), "mul_"),
        (lambda t, z: functional.relu(z + 1, inplace=True), "relu"),
        (lambda t, z: z * float(t[0, 0]), "__float__"),
        (lambda t, z: z * t[0, 0].item(), "item"),
        (lambda t, z: z if z.sum() else -z, "__bool__"),
        (lambda t, z: Double.apply(z) * z, "Double"),
        (lambda t, z: Double.apply(z), "Double"),
        (lambda t, z: torch.norm(z, p=1), "norm"),
        (lambda t, z: torch.div(z, 2, rounding_mode="floor"), "round"),
    ],
)
def test_what_has_no_rule_is_named(f, name):
    z = start(2, 3).requires_grad_()
    with pytest.raises(NoTaylorRule) as caught:
        derivatives(f, torch.ones(2, 1).double(), z, 3)
    assert name in str(caught.value) and "mode='jvp'" in str(caught.value)


def test_the_other_mode_takes_what_has_no_rule():
    f = nde.ODE(lambda t, z: torch.special.i0e(z) * t)
    solution = nde.solve(f, start(3, 2), (0.0, 1.0))
    with pytest.raises(NoTaylorRule, match="i0e"):
        reg.TaylorDerivative(2)(solution)
    assert reg.TaylorDerivative(1)(solution) > 0
    with refused(ValueError, "mode", "'taylor'"):
        reg.TaylorDerivative(2, mode="nested")
    for order in (0, -1, 2.0, True):
        with refused(ValueError, "order"):
            reg.TaylorDerivative(order)


# -- integrals along a solution ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "control", "horizon"),
    [(s, "per_sample", (0.0, 2.0)) for s in SOLVERS]
    + [(s, c, (2.0, 0.0)) for s in ("tsit5", "vcab3") for c in CONTROLS],
)
def test_the_integrals_are_those_of_an_augmented_state(solver, control, horizon):
    """∫‖z'‖², ∫‖z''‖², ∫‖z'''‖² as states that are solved for beside z."""
    torch.manual_seed(1)
    f, z0 = nde.TimeChain(nde.AppendTime(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 2)).double(), start(3, 2)

    def augmented(t, state):
        found = derivatives(f, t, state[0], 3)
        return found[0], torch.stack([(x**2).sum(1) for x in found], dim=1)

    with torch.no_grad():
        solution = nde.solve(nde.ODE(f), z0, horizon, control=control, rtol=1e-5, atol=1e-5, **options(solver, 0.1))
        precise = nde.solve(
            nde.ODE(augmented), (z0, z0.new_zeros(3, 3)), horizon, solver="dopri8", rtol=1e-8, atol=1e-8
        )
        expected = precise.final[1].abs()
        found = [reg.KineticEnergy(), reg.TaylorDerivative(2), reg.TaylorDerivative(3)]
        found = torch.stack([penalty.figure(solution) for penalty in found], dim=1)
    torch.testing.assert_close(found, expected, rtol=0.1 if solver == "euler" else 1e-2, atol=1e-4)


def test_the_rule_is_exact_for_cubics():
    """z = t⁴/4, whose ‖z''‖² is of degree 4 in t, has z''' = 6t, whose square is of degree 2."""
    f = nde.ODE(lambda t, z: t**3 + 0 * z)
    solution = nde.solve(f, torch.zeros(2, 1).double(), (0.0, 2.0), rtol=1e-2)
    third = reg.TaylorDerivative(3).figure(solution)
    torch.testing.assert_close(third, torch.full((2,), 96.0).double(), rtol=1e-12, atol=0)
    both = nde.solve(
        nde.ODE(lambda t, z: t**3 + torch.zeros_like(z)), torch.zeros(2, 5).double(), (0.0, 2.0), rtol=1e-2
    )
    torch.testing.assert_close(reg.TaylorDerivative(3, reduce="mean").figure(both), third, rtol=1e-12, atol=0)
    torch.testing.assert_close(reg.TaylorDerivative(3).figure(both), 5 * third, rtol=1e-12, atol=0)


def test_jumps_are_taken_on_either_side():
    f = nde.ODE(lambda t, z: torch.where(t < 0.7, 1.0, 3.0) + torch.zeros_like(z))
    solution = nde.solve(f, torch.zeros(2, 1).double(), (0.0, 1.0), jump_times=[0.7])
    energy = reg.KineticEnergy().figure(solution)
    torch.testing.assert_close(energy, torch.full((2,), 0.7 + 9 * 0.3, dtype=torch.float64), rtol=1e-12, atol=0)


@CONTROL
def test_the_integral_ends_with_a_terminal_event(control):
    """z = exp(t) reaches 2 at ln 2 of its start: ∫ z² dt from z0 to 2 is (4 - z0²)/2."""
    z0 = torch.tensor([[1.0], [1.5], [0.1]], dtype=torch.float64)
    event = nde.Event(lambda t, z: z[:, 0] - 2.0, terminal=True)
    solution = nde.solve(nde.ODE(lambda t, z: z), z0, (0.0, 2.0), events=event, control=control, rtol=1e-8, atol=1e-10)
    ends = torch.minimum(z0[:, 0] * torch.exp(torch.tensor(2.0)), torch.tensor(2.0))
    energy = reg.KineticEnergy().figure(solution)
    torch.testing.assert_close(energy, (ends**2 - z0[:, 0] ** 2) / 2, rtol=1e-5, atol=0)


def test_samples_with_horizons_and_args_of_their_own():
    rate = torch.tensor([[1.0], [2.0], [8.0]], dtype=torch.float64)
    horizon = (torch.zeros(3), torch.tensor([1.0, 0.5, 2.0]))
    f = nde.ODE(lambda t, z, rate: -rate * z)
    solution = nde.solve(f, torch.ones(3, 1).double(), horizon, args=rate, rtol=1e-8, atol=1e-10)
    for order in (1, 2):
        k = rate[:, 0]
        expected = k ** (2 * order - 1) / 2 * (1 - torch.exp(-2 * k * horizon[1]))
        torch.testing.assert_close(reg.TaylorDerivative(order).figure(solution), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("adjoint", DENSE)
@CONTROL
@pytest.mark.parametrize("penalty", [reg.TaylorDerivative(2), reg.KineticEnergy()], ids=["taylor", "kinetic"])
def test_gradients(penalty, adjoint, control):
    """Those of the frozen grid, by finite differences."""
    f, z0 = net(2), start(3, 2).requires_grad_()
    solution = nde.solve(nde.ODE(f), z0, (0.0, 1.0), adjoint=adjoint, control=control, rtol=1e-7, atol=1e-7)
    inputs = [z0, *f.parameters()]
    gradients = torch.autograd.grad(penalty(solution), inputs)
    directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype) for x in inputs]

    @torch.no_grad()
    def at(h):
        for x, d in zip(inputs, directions, strict=True):
            x.data += h * d
        value = penalty(nde.introspection.replay(solution, z0=z0))
        for x, d in zip(inputs, directions, strict=True):
            x.data -= h * d
        return value

    h = 1e-4
    expected = (8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h)
    found = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-7 if adjoint in EXACT else 1e-5, atol=0)


def test_the_solve_is_the_same_with_and_without():
    f, z0 = net(2), start(3, 2)
    layer = nde.NeuralODE(f)
    before = layer(z0)
    reg.TaylorDerivative(2)(layer)
    assert torch.equal(layer(z0), before)


def test_a_field_of_the_whole_batch():
    """f that holds tensors of all samples, some of which have finished: it is called with all of them."""
    control = start(4, 1).abs() * torch.tensor([[0.1], [1.0], [3.0], [9.0]]).double()
    f = nde.ODE(lambda t, z: -control * z)
    solution = nde.solve(f, torch.ones(4, 1).double(), (0.0, 1.0), rtol=1e-8, atol=1e-10)
    assert not solution.steps.mask.all()
    k = control[:, 0]
    expected = k**3 / 2 * (1 - torch.exp(-2 * k))
    torch.testing.assert_close(reg.TaylorDerivative(2).figure(solution), expected, rtol=1e-5, atol=0)


def test_random_fields_keep_their_draw():
    """Dropout in f is drawn once per solve, and what is looked at afterwards has that draw."""
    layer = nde.NeuralODE(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2)).double())
    solution = layer.solve(start(3, 2))
    energy = reg.KineticEnergy()(solution)
    assert torch.equal(reg.KineticEnergy()(solution), energy)
    torch.testing.assert_close(reg.TaylorDerivative(1)(solution), energy)
    curved, nested = (reg.TaylorDerivative(2, mode=mode)(solution) for mode in ("taylor", "jvp"))
    torch.testing.assert_close(curved, nested, rtol=1e-9, atol=0)


# -- the Jacobian's norm -------------------------------------------------------------------------------------------


def test_jacobian_frobenius():
    """The mean over many draws of noise is the norm; f = A·z has the same Jacobian everywhere."""
    count = 20_000
    solution = nde.solve(nde.ODE(lambda t, z: z @ A.T), start(count, 2), (0.0, 2.0), rtol=1e-1)
    generator = torch.Generator().manual_seed(1)
    figure = reg.JacobianFrobenius(generator=generator).figure(solution)
    expected = 2.0 * (A**2).sum()
    error = figure.std() / count**0.5
    assert (figure.mean() - expected).abs() < 3 * error and error < 0.02 * expected
    # One draw for the whole of a solve: the same noise at every time gives 2·‖εᵀA‖² exactly.
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(figure, 2.0 * ((noise @ A) ** 2).sum(1), rtol=1e-9, atol=0)
    half = reg.JacobianFrobenius(reduce="mean", generator=torch.Generator().manual_seed(1)).figure(solution)
    torch.testing.assert_close(half, figure / 2, rtol=1e-9, atol=0)


def test_the_gradient_of_jacobian_frobenius():
    weight = nn.Parameter(A.clone())
    solution = nde.solve(nde.ODE(lambda t, z: torch.sin(z @ weight.T)), start(4, 2), (0.0, 1.0), rtol=1e-6)
    penalty = reg.JacobianFrobenius()

    def value():
        penalty.generator = torch.Generator().manual_seed(1)
        return penalty(nde.introspection.replay(solution))

    (found,) = torch.autograd.grad(value(), weight)
    h, expected = 1e-6, torch.zeros(2, 2).double()
    with torch.no_grad():
        for i in range(2):
            for j in range(2):
                values = []
                for sign in (1, -1):
                    weight[i, j] += sign * h
                    values.append(value())
                    weight[i, j] -= sign * h
                expected[i, j] = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_slope_that_looks_at_nothing():
    solution = nde.solve(nde.ODE(lambda t, z: torch.ones(2, 1).double()), torch.zeros(2, 1).double(), (0.0, 1.0))
    assert (reg.JacobianFrobenius().figure(solution) == 0).all()
