"""The layer, and what it has to live with: DDP, autocast, checkpointing, dropout, weight norms; and its penalties."""

import copy
import io
import warnings

import pytest
import torch
from helpers import EQUILIBRIUM, SOLVERS, STEADY, close, refused
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import neuralde as nde
import regularizers as reg

BATCH, D = 6, 8
SOLVER = pytest.mark.parametrize("solver", [*EQUILIBRIUM, "tsit5", "vcab3", "rosenbrock23"])


class Block(nn.Module):
    """tanh(W z + U x), optionally with more between; counts its evaluations."""

    def __init__(self, between=None, normed=None, scale=0.6):
        super().__init__()
        self.w, self.u, self.calls = nn.Linear(D, D), nn.Linear(D, D), 0
        nn.init.orthogonal_(self.w.weight, scale)
        self.between = between or nn.Identity()
        if normed is not None:
            normed(self.w)

    def forward(self, z, x):
        self.calls += 1
        return torch.tanh(self.between(self.w(z)) + self.u(x))


def inputs(dtype=torch.float32):
    return torch.randn(BATCH, D, generator=torch.Generator().manual_seed(4)).to(dtype)


@SOLVER
@pytest.mark.parametrize("initial", ["zeros", "first_step", "module"])
def test_layer(solver, initial):
    f = Block()
    layer = nde.DeepEquilibrium(
        f, solver=solver, initial=nn.Linear(D, D) if initial == "module" else initial, rtol=1e-4
    )
    x = inputs()
    z = layer(x)
    assert isinstance(z, torch.Tensor) and z.shape == x.shape
    close(z, f(z, x), 3e-3)
    assert layer.solution.final is z or torch.equal(layer.solution.final, z)
    assert bool(layer.solution.converged.all())
    start = {"zeros": torch.zeros_like(x), "first_step": f(torch.zeros_like(x), x)}.get(initial)
    torch.testing.assert_close(layer.solution.zs[0], layer.initial(x) if start is None else start)
    z.square().sum().backward()
    assert all(bool(p.grad.abs().max() > 0) for p in f.parameters())
    if initial == "module":  # the steady state does not depend on where its search began; its own loss does
        assert not any(bool(p.grad.any()) for p in layer.initial.parameters())
        reg.Skip(detach_target=True)(layer).backward()
        assert all(bool(p.grad.abs().max() > 0) for p in layer.initial.parameters())
    assert f"solver={solver}" in repr(layer) and "rtol=0.0001" in repr(layer)
    twin = copy.deepcopy(layer)
    assert twin.solution is None
    torch.testing.assert_close(twin(x), z)


def test_options_are_checked_at_construction():
    for given, error, words in (
        ({"solver": "andersn"}, ValueError, ["did you mean 'anderson'"]),
        ({"events": None}, TypeError, ["events", "rtol"]),
        ({"initial": "ones"}, ValueError, ["initial", "first_step"]),
        ({"initial": 3}, TypeError, ["initial"]),
        ({"pretrain_depth": 0}, ValueError, ["pretrain_depth"]),
        ({"pretrain_depth": 1.5}, TypeError, ["pretrain_depth"]),
        ({"adjoint": "backsolve"}, ValueError, ["backsolve", "implicit"]),
        ({"solver": "broyden", "adjoint": "direct"}, ValueError, ["direct", "broyden"]),
        ({"rtol": -1.0}, ValueError, ["rtol"]),
        ({"termination": "never"}, ValueError, ["mode"]),
        ({"f": Block(nn.BatchNorm1d(D))}, ValueError, ["between", "joint"]),
    ):
        with refused(error, *words):
            nde.DeepEquilibrium(**({"f": Block()} | given))
    with refused(TypeError, "initial", "tensor"):
        nde.DeepEquilibrium(Block())({"x": inputs()})


class Mixed:
    """A block with batch normalization, its steady state and the Jacobian of the whole batch there."""

    def __init__(self):
        torch.manual_seed(0)
        self.f, self.x = Block(nn.BatchNorm1d(D)).double(), inputs(torch.float64).requires_grad_()
        nn.init.constant_(self.f.between.weight, 0.3)
        self.leaves = [*self.f.parameters(), self.x]
        z = torch.zeros_like(self.x)
        with torch.no_grad():
            for _ in range(200):
                z = self.f(z, self.x)
        self.z = z
        jacobian = torch.autograd.functional.jacobian(lambda z: self.f(z, self.x.detach()), z)
        self.jacobian = jacobian.reshape(BATCH * D, BATCH * D)
        self.v = torch.randn(BATCH, D, generator=torch.Generator().manual_seed(7), dtype=z.dtype)
        eye = torch.eye(BATCH * D, dtype=z.dtype)
        costate = torch.linalg.solve((eye - self.jacobian).mT, self.v.flatten()).reshape(BATCH, D)
        self.gradients = torch.autograd.grad(self.f(z, self.x), self.leaves, costate)

    def solve(self, **given):
        layer = nde.DeepEquilibrium(self.f, control="joint", **({"rtol": 1e-10, "atol": 1e-12} | given))
        return layer.solve(self.x)


@pytest.mark.parametrize("adjoint", ["implicit", "implicit-anderson", "implicit-broyden", "neumann", "phantom"])
def test_the_gradient_of_a_batch_that_is_one_system(adjoint):
    """Under joint control f may mix samples: J is of the batch, and has blocks beside its diagonal."""
    mixed = Mixed()
    how = {"neumann": nde.adjoints.Neumann(60), "phantom": nde.adjoints.Phantom(60, damping=1.0)}
    solution = mixed.solve(solver="anderson", adjoint=how.get(adjoint, adjoint))
    close(solution.final, mixed.z, 1e-8)
    found = torch.autograd.grad((solution.final * mixed.v).sum(), mixed.leaves)
    for g, e in zip(found, mixed.gradients, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6 * float(mixed.gradients[-1].norm()))
    if adjoint.startswith("implicit"):
        products = solution.backward_stats.linear_solves
        assert products.shape == (BATCH,) and bool((products == products[0]).all()) and int(products[0]) > 5


def test_newton_and_the_radius_of_a_batch_that_is_one_system():
    """Not from zeros: of a batch whose samples are all equal, batch normalization's derivative is hundreds."""
    mixed = Mixed()
    for observer in (None, object()):
        solution = mixed.solve(solver="newton", observer=observer, initial="first_step", max_steps=20)
        close(solution.final, mixed.z, 1e-8)
        assert int(solution.depth.max()) <= 10 and int(solution.stats.nfe.max()) < 150
    expected = torch.linalg.eigvals(mixed.jacobian).abs().max()
    found = nde.introspection.spectral_radius(solution, 400, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, expected.expand(BATCH), rtol=2e-2, atol=0.0)


def test_a_gradient_that_is_not_finite_stays_with_its_sample_under_joint_control():
    x = torch.ones(3, 2, requires_grad=True)
    solution = nde.solve(nde.SteadyState(lambda z, x: 0.5 * z + x), torch.zeros(3, 2), args=x, control="joint")
    (gradient,) = torch.autograd.grad(solution.final, x, torch.tensor([[1.0], [torch.nan], [2.0]]).expand(3, 2))
    assert gradient.isnan().all(dim=1).tolist() == [False, True, False]
    torch.testing.assert_close(gradient[[0, 2], 0], torch.tensor([2.0, 4.0]))


def test_states_of_another_shape_than_x():
    f = lambda z, x: {"a": 0.5 * torch.tanh(z["b"]) + x["u"][:, :2], "b": 0.5 * z["a"]}  # noqa: E731
    start = lambda x: {"a": torch.zeros(BATCH, 2), "b": torch.zeros(BATCH, 2)}  # noqa: E731
    layer = nde.DeepEquilibrium(f, solver="broyden", initial=start)
    found = layer({"u": inputs()})
    close(found["b"], 0.5 * found["a"], 5e-3)


# -- pretraining ---------------------------------------------------------------------------------------------------


def test_pretraining_unrolls_and_ends():
    f, x = Block(), inputs()
    layer = nde.DeepEquilibrium(f, solver="anderson", pretrain_depth=3, initial="first_step")
    z = layer(x)
    expected = f(torch.zeros_like(x), x)
    for _ in range(3):
        expected = f(expected, x)
    torch.testing.assert_close(z, expected)
    found = torch.autograd.grad(z.square().sum(), list(f.parameters()))
    for g, e in zip(found, torch.autograd.grad(expected.square().sum(), list(f.parameters())), strict=True):
        torch.testing.assert_close(g, e)
    solution = layer.solution
    assert bool((solution.depth == 3).all()) and not bool(solution.converged.any())
    residual = (f(z, x) - z).square().mean(dim=1).sqrt() / f(z, x).square().mean(dim=1).sqrt()
    close(solution.residual, residual.detach(), 1e-5)
    for penalty in (reg.Skip(), reg.EquilibriumJacobian(), reg.Contraction()):
        assert bool(penalty(layer) > 0)
    assert solution.steps.residual.shape[0] == 3

    memory = io.BytesIO()
    torch.save(layer.state_dict(), memory)
    layer.end_pretraining()
    layer(x)
    assert bool(layer.solution.converged.all())
    ended = layer.state_dict()
    again = nde.DeepEquilibrium(Block(), solver="anderson", pretrain_depth=3, initial="first_step")
    again.load_state_dict(ended)
    again(x)
    assert bool(again.solution.converged.all())
    memory.seek(0)
    again.load_state_dict(torch.load(memory))
    again.eval()
    again(x)
    assert bool((again.solution.depth == 3).all())


def test_pretraining_is_not_warned_of_but_of_what_is_lost():
    layer = nde.DeepEquilibrium(lambda z, x: 0.5 * z + x, pretrain_depth=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.zeros(3, 2))  # at rest from the start: unrolled all the same
    assert layer.solution.depth.tolist() == [2, 2, 2]
    x = torch.tensor([[1.0], [torch.nan]])
    with pytest.warns(nde.SolveWarning, match="sample 1: non_finite"):
        layer(x)


def test_a_missing_batch_dimension_is_named():
    f, x = Block(), inputs()
    for solver in ("anderson", "tsit5"):
        with refused(ValueError, "sample alone", f"{D} samples of one number", "z0[None]"):
            nde.DeepEquilibrium(f, solver=solver)(x[0])
    with refused(ValueError, "z0[None]"):
        nde.NeuralODE(nn.Linear(D, D))(x[0])
    if hasattr(Exception, "add_note"):
        with pytest.raises(IndexError) as caught:
            nde.NeuralODE(lambda t, z: z[:, 0])(x[0])
        assert any("z0[None]" in note for note in caught.value.__notes__)


# -- what layers live with -----------------------------------------------------------------------------------------


def test_ddp(tmp_path):
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("needs torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(D, D), nde.DeepEquilibrium(Block(), solver="anderson"), nn.Linear(D, 2))
        plain, x = copy.deepcopy(model), inputs()
        parallel = nn.parallel.DistributedDataParallel(model)
        for m in (parallel, plain):
            m(x).square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    finally:
        dist.destroy_process_group()


def _rank(rank, file, states, x, saved):
    """A process of the test below: two steps of a model on its half of the batch."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        model = skip_model()
        model.load_state_dict(states)
        parallel = nn.parallel.DistributedDataParallel(model)
        half = x.chunk(2)[rank]
        for _ in range(2):
            model.zero_grad()
            parallel(half).square().mean().backward()
        if rank == 0:
            torch.save([p.grad for p in model.parameters()], saved)
    finally:
        dist.destroy_process_group()


def skip_model():
    layer = nde.DeepEquilibrium(Block(), solver="anderson", initial=nn.Linear(D, D), rtol=1e-5)
    return nn.Sequential(nn.Linear(D, D), layer, nn.Linear(D, 2))


@pytest.mark.slow
def test_ddp_of_two_processes(tmp_path):
    """Gradients are those of the whole batch; a start that nothing trains does not keep anybody waiting."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    model, x = skip_model(), inputs()
    given = (str(tmp_path / "rendezvous"), model.state_dict(), x, str(tmp_path / "gradients"))
    torch.multiprocessing.spawn(_rank, given, nprocs=2)
    model(x).square().mean().backward()
    for p, g in zip(model.parameters(), torch.load(given[-1]), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adjoint", STEADY)
@pytest.mark.parametrize("solver", ["fixed_point", "tsit5"])
def test_autocast(solver, adjoint):
    f, x = Block(), inputs()
    layer = nde.DeepEquilibrium(f, solver=solver, adjoint=adjoint, rtol=2e-2)
    sharp = nde.DeepEquilibrium(f, solver=solver, adjoint=adjoint, rtol=1e-4)(x)
    expected = torch.autograd.grad(sharp.square().sum(), f.w.weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
    assert z.dtype == torch.float32 and bool(layer.solution.converged.all())
    close(z, sharp, 5e-2)
    close(torch.autograd.grad(z.square().sum(), f.w.weight)[0], expected, 0.15)


@pytest.mark.parametrize("adjoint", [x for x in STEADY if x.startswith("implicit")])
def test_gradients_under_autocast_are_as_accurate_as_it(adjoint):
    """To the square root of bfloat16's precision they would be off by six per cent."""
    f, x = Block(), inputs()
    sharp, layer = (nde.DeepEquilibrium(f, solver="fixed_point", adjoint=adjoint, rtol=x) for x in (1e-5, 5e-3))
    expected = torch.autograd.grad(sharp(x).square().sum(), f.w.weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).square().sum()
    (found,) = torch.autograd.grad(loss, f.w.weight)
    # The tolerance of the system over 1 less the contraction.
    assert float((found - expected).norm() / expected.norm()) < 0.01 / (1 - 0.6)


def test_what_f_does_to_its_args_in_place_is_refused():
    class Drifting(Block):
        def forward(self, z, x):
            x += 0.01
            return super().forward(z, x)

    for options in ({"solver": "fixed_point"}, {"solver": "tsit5"}, {"solver": "anderson", "control": "joint"}):
        layer = nde.DeepEquilibrium(Drifting(), **options)
        refused(ValueError, ["args", "in place", "x + "], lambda layer=layer: layer(inputs()))


def test_a_start_of_another_shape_is_told():
    f = nn.Linear(D, 3)
    for initial, shape in (("zeros", (BATCH, D)), (nn.Linear(D, 5), (BATCH, 5))):
        layer = nde.DeepEquilibrium(lambda z, x: f(x) + z @ torch.eye(3), initial=initial)
        with pytest.raises(RuntimeError) as caught:
            layer(inputs())
        if hasattr(caught.value, "__notes__"):
            assert "initial" in caught.value.__notes__[-1] and str(shape) in caught.value.__notes__[-1]

    def own(z, x):
        raise RuntimeError("no more of this")

    with pytest.raises(RuntimeError) as caught:
        nde.DeepEquilibrium(own)(inputs())
    assert not getattr(caught.value, "__notes__", [])


def test_a_count_among_the_args_may_change():
    """It is no part of what f gives back."""
    count = torch.zeros((), dtype=torch.int64)

    def f(t, z, args):
        args["count"].add_(1)
        return -args["rate"] * z

    rate = torch.ones(3, 1)
    nde.solve(nde.ODE(f), torch.ones(3, 2), (0.0, 1.0), args={"rate": rate, "count": count})
    assert int(count) > 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "tsit5"])
def test_low_precision(solver, dtype):
    f = Block().to(dtype)
    layer = nde.DeepEquilibrium(f, solver=solver, rtol=2e-2)
    z = layer(inputs(dtype))
    assert z.dtype == dtype and bool(layer.solution.converged.all())
    z.sum().backward()
    assert bool(torch.isfinite(f.w.weight.grad).all())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adjoint", STEADY)
def test_inside_of_a_checkpoint(adjoint, reentrant):
    """Same gradients, and the solve is not made again for every product of the linear system."""
    f, x = Block(), inputs().requires_grad_()
    layer = nde.DeepEquilibrium(f, solver="fixed_point", adjoint=adjoint)
    layer(x).square().sum().backward()
    expected, x.grad = [p.grad.clone() for p in (*f.parameters(), x)], None
    f.zero_grad()
    f.calls = 0
    z = checkpoint(layer, x, use_reentrant=reentrant)
    forward = f.calls
    z.square().sum().backward()
    assert f.calls <= 2 * forward + 12
    for p, e in zip((*f.parameters(), x), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nde.VariationalDropout(0.5)])
@pytest.mark.parametrize("adjoint", ["implicit", "phantom", "direct"])
def test_dropout_is_drawn_once_per_solve(dropout, adjoint):
    f, x = Block(copy.deepcopy(dropout)), inputs()
    layer = nde.DeepEquilibrium(f, solver="fixed_point", adjoint=adjoint, rtol=1e-5, atol=1e-7)
    torch.manual_seed(3)
    z = layer(x)
    assert bool(layer.solution.converged.all())  # a mask that changed would leave nothing to converge to
    torch.manual_seed(3)
    close(z, f(z, x), 1e-4)  # the same mask
    other = layer(x)
    assert bool((other - z).abs().max() > 1e-2)  # the next solve draws another one
    other.sum().backward()
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x))


def test_variational_dropout_zeroes_channels():
    drop = nde.VariationalDropout(0.4)
    y = drop(torch.ones(50, 8, 3, 3))
    assert bool((y == y[..., :1, :1]).all())
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    assert 0.3 < float((y == 0).float().mean()) < 0.5
    with refused(ValueError, "p must"):
        nde.VariationalDropout(1.0)


@pytest.mark.parametrize("dim", [-1, 2])
def test_variational_dropout_of_sequences_zeroes_features(dim):
    y = nde.VariationalDropout(0.4, dim)(torch.ones(50, 7, 8))
    assert bool((y == y[:, :1]).all()) and 0.3 < float((y == 0).float().mean()) < 0.5
    assert not bool((y == y[..., :1]).all())
    for wrong, error in ((0, ValueError), ("channels", TypeError)):
        with refused(error, "dim"):
            nde.VariationalDropout(0.4, wrong)
    with refused(ValueError, "dim=2", "(5, 3)"):
        nde.VariationalDropout(0.4, 2)(torch.ones(5, 3))


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nde.VariationalDropout(0.5)])
def test_the_first_step_is_of_the_same_network(dropout):
    """f(0, x) has the masks of the solve, and is counted: Skip compares two states of one network."""
    f, x = Block(copy.deepcopy(dropout), scale=0.05), inputs()
    layer = nde.DeepEquilibrium(f, solver="fixed_point", initial="first_step", rtol=1e-6)
    plain = nde.DeepEquilibrium(f, solver="fixed_point", rtol=1e-6)
    torch.manual_seed(3)
    z = layer(x)
    own = torch.rand(3)
    torch.manual_seed(3)
    torch.testing.assert_close(plain(x), z, rtol=1e-4, atol=1e-5)
    assert torch.equal(own, torch.rand(3))  # as many numbers drawn
    close(plain.solution.steps.z[1], layer.solution.zs[0], 1e-6)
    assert torch.equal(plain.solution.stats.nfe, layer.solution.stats.nfe)
    layer.eval()
    before = f.calls
    with torch.no_grad():
        layer(x)
    assert layer.solution.stats.function_calls == f.calls - before


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_penalties_and_lenses_have_the_weights_of_the_solve(norm):
    f, x = Block(normed=norm), inputs()
    layer = nde.DeepEquilibrium(f, solver="tsit5")
    layer(x).sum().backward()  # frees the graph of the weights
    buffers = {name: b.clone() for name, b in f.named_buffers()}
    layer.eval()
    weight = f.w.weight.detach().clone()
    layer.train()
    seen = []
    f.w.parametrizations.weight.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    looks = [reg.EquilibriumJacobian(), reg.Contraction(), reg.LocalError()]
    for look in [*looks, lambda layer: nde.introspection.spectral_radius(layer.solution)]:
        seen.clear()
        value = look(layer)
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], weight)
        if value.requires_grad:
            value.backward()
    assert all(torch.equal(b, buffers[name]) for name, b in f.named_buffers())
    assert f.w.parametrizations.training


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_norms_of_weights_are_computed_once_per_solve(norm):
    f, x, made = Block(normed=norm, scale=0.6), inputs(), 0

    def count(module, args, output):
        nonlocal made
        made += 1

    f.w.parametrizations.weight[0].register_forward_hook(count)
    layer = nde.DeepEquilibrium(f, solver="fixed_point", initial="first_step", max_steps=200, on_failure="ignore")
    z = layer(x)
    assert made == 1 and f.calls > 10
    z.sum().backward()
    assert made == 1
    assert all(bool(p.grad.abs().max() > 0) for p in f.w.parametrizations.parameters())
    layer(x)
    assert made == 2


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_norms_that_are_hooks_are_computed_once_too(norm, monkeypatch):
    f, x, made = Block(normed=norm).double(), inputs(torch.float64), 0
    (hook,) = f.w._forward_pre_hooks.values()
    compute = type(hook).compute_weight

    def counted(self, *args, **how):
        nonlocal made
        made += 1
        return compute(self, *args, **how)

    monkeypatch.setattr(type(hook), "compute_weight", counted)
    layer = nde.DeepEquilibrium(f, solver="fixed_point", max_steps=5000, rtol=1e-10, atol=1e-10)
    z = layer(x)
    assert made == 1 and f.calls > 10
    weight = f.w.weight.detach().clone()
    computed = {name: p for name, p in f.named_parameters() if name.startswith("w.weight")}
    gradients = torch.autograd.grad(z.sum(), computed.values())
    assert made == 1 and all(bool(g.abs().max() > 0) for g in gradients)
    buffers = {name: b.clone() for name, b in f.named_buffers()}
    reg.EquilibriumJacobian()(layer).backward()
    assert made == 2 and torch.equal(f.w.weight, weight) and f.w.training
    assert all(torch.equal(b, buffers[name]) for name, b in f.named_buffers())
    assert list(f.w._forward_pre_hooks.values()) == [hook]
    # The same steady state and gradients as with the weight as it was.
    plain = Block().double()
    plain.load_state_dict(
        {"w.weight": weight, "w.bias": f.w.bias, **{k: v for k, v in f.state_dict().items() if "w." not in k}}
    )
    close(nde.DeepEquilibrium(plain, solver="fixed_point", max_steps=5000, rtol=1e-10, atol=1e-10)(x), z, 1e-8)


def test_what_is_looked_at_without_a_tape_has_its_gradient_later():
    layer = nde.DeepEquilibrium(Block(), solver="anderson")
    layer(inputs())
    with torch.no_grad():
        layer.solution.zs[-1].norm(), layer.solution.final.norm()
    assert layer.solution.zs.requires_grad and layer.solution.final.requires_grad
    layer(inputs())
    with torch.inference_mode():
        layer.solution.zs[-1].norm(), layer.solution.final.norm(), layer.solution.ts.sum()
    (layer.solution.zs * layer.f.w.weight.sum() * layer.solution.ts[..., None]).sum().backward(retain_graph=True)
    layer.solution.final.retain_grad()
    layer.solution.final.sum().backward()
    assert layer.solution.final.grad is not None


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_end_is_the_users_to_change(compile):
    """Also where a sample starts at rest."""
    x = torch.ones(2, 3)
    for f, start in ((lambda z: z, x), (lambda z: 0.5 * z, x)):
        solution = nde.solve(nde.SteadyState(f), start, solver="fixed_point", compile=compile)
        end = solution.zs[-1].clone()
        solution.final.add_(7.0)
        assert torch.equal(solution.initial, torch.ones(2, 3)) and torch.equal(start, torch.ones(2, 3))
        assert torch.equal(solution.zs[0], torch.ones(2, 3)) and torch.equal(solution.zs[-1], end)


@pytest.mark.parametrize("adjoint", [x.name for x in nde.adjoints.ADJOINTS.values() if x.of_steady])
def test_an_end_that_is_changed_in_place_is_not_the_penalties(adjoint):
    """An nn.ReLU(inplace=True) behind the layer is one way to change it."""
    layer = nde.DeepEquilibrium(Block(), solver="fixed_point", adjoint=adjoint, initial="first_step")
    penalties = [reg.EquilibriumJacobian(generator=torch.Generator()), reg.Skip()]
    found = []
    for changed in (False, True):
        end = layer(inputs())
        total = end.mul_(-3.0).sum() / -3.0 if changed else end.sum()
        penalties[0].generator.manual_seed(0)
        total = total + sum(penalty(layer) for penalty in penalties) + layer.solution.zs.sum()
        found.append(torch.autograd.grad(total, list(layer.parameters())))
    for wanted, gradient in zip(*found, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_no_gradient_no_tape():
    f, x = Block(), inputs()
    layer = nde.DeepEquilibrium(f, solver="fixed_point")
    with torch.no_grad():
        layer(x)
    assert f.calls == layer.solution.stats.function_calls
    with torch.inference_mode():
        for solver in ("newton", "tsit5", "rosenbrock23"):
            assert bool(nde.DeepEquilibrium(f, solver=solver)(x).isfinite().all())


def test_a_changed_parameter_is_noticed():
    f = Block()
    z = nde.DeepEquilibrium(f, solver="fixed_point")(inputs())
    with torch.no_grad():
        f.w.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="in place"):
        z.sum().backward()


def test_second_derivatives():
    f = Block().double()
    x = inputs(torch.float64)
    for adjoint in ("implicit", "jfb", "neumann"):
        z = nde.DeepEquilibrium(f, solver="fixed_point", adjoint=adjoint)(x)
        with refused(nde.NeuralDEError, adjoint, "phantom", "direct"):
            torch.autograd.grad(z.sum(), f.w.weight, create_graph=True)
    z = nde.DeepEquilibrium(f, solver="fixed_point", adjoint="phantom")(x)
    (first,) = torch.autograd.grad(z.sum(), f.w.weight, create_graph=True)
    assert bool(torch.autograd.grad(first.square().sum(), f.w.weight)[0].abs().max() > 0)


# -- penalties -----------------------------------------------------------------------------------------------------


@SOLVER
@pytest.mark.parametrize("penalty", [n for n, cls in reg.REGULARIZERS.items() if cls.of_steady])
def test_penalties(penalty, solver):
    """A number with gradients, and a few steps against it make it smaller."""
    f = Block(scale=0.9)
    layer = nde.DeepEquilibrium(f, solver=solver, initial="first_step")
    x, cls = inputs(), reg.REGULARIZERS[penalty]

    def value():
        layer(x)
        given = (
            {"samples": 8, "generator": torch.Generator().manual_seed(1)} if penalty == "EquilibriumJacobian" else {}
        )
        twice, once = cls(weight=2.0, **given), cls(**given)
        if given:
            once.generator = torch.Generator().manual_seed(1)
        found = twice(layer)
        torch.testing.assert_close(found, 2.0 * once.figure(layer.solution).mean())
        return found

    before = value()
    assert before.shape == () and float(before.detach()) > 0
    optimizer = torch.optim.SGD(f.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        value().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in f.parameters())
        assert all(p.grad is None or float(p.grad.abs().max()) < 100.0 for p in f.parameters())
        optimizer.step()
    # Where the last step begins changes from solve to solve, and the heuristics of an accelerated one with it.
    if penalty != "Contraction" or solver in ("fixed_point", "newton"):
        assert float(value().detach()) < float(before.detach())


@pytest.mark.parametrize("control", ["per_sample", "joint"])
@pytest.mark.parametrize("solver", [s for s in SOLVERS if nde.solvers.SOLVERS[s].error_order is not None])
def test_contraction_is_of_the_last_step(solver, control):
    """Of the figures that the solve reported; vcab3's is that of the method that it starts with."""
    x = inputs(torch.float64)
    layer = nde.DeepEquilibrium(Block().double(), solver=solver, control=control)
    solution = layer.solve(x)
    steps, everyone = solution.steps, torch.arange(BATCH)
    last = solution.depth - 1
    if solver == "vcab3":
        assert nde.introspection.probe_last(solution).solver.name == "bs3"
        assert bool((reg.Contraction().figure(solution) < steps.error[last, everyone] * steps.dt[last, everyone]).all())
        return
    for names, how in (
        (("error",), {"stiffness": False}),
        (("stiffness",), {"error": False}),
        (("error", "stiffness"), {}),
    ):
        figures = {name: getattr(steps, name) for name in names}
        wanted = [x * steps.dt if name == "error" else x for name, x in figures.items() if x is not None]
        if wanted:
            torch.testing.assert_close(reg.Contraction(**how).figure(solution), sum(wanted)[last, everyone])


@pytest.mark.parametrize("penalty", [n for n, cls in reg.REGULARIZERS.items() if cls.of_steady])
def test_penalties_count_where_the_steps_ran_out(penalty):
    """There they are wanted most; samples that got lost are left out."""
    f = Block(scale=0.9).double()
    layer = nde.DeepEquilibrium(f, solver="fixed_point", max_steps=3, rtol=1e-9, on_failure="ignore")
    x = inputs(torch.float64)
    layer(x)
    assert not bool(layer.solution.converged.any()) and bool(layer.solution.usable.all())
    penalty = reg.REGULARIZERS[penalty]()
    value = penalty(layer)
    value.backward()
    assert float(value.detach()) > 0 and bool(f.w.weight.grad.any())
    layer(torch.cat([x[:2], torch.full_like(x[:1], float("nan"))]))
    assert layer.solution.usable.tolist() == [True, True, False]
    assert float(penalty(layer).detach()) > 0


def test_the_jacobian_is_estimated_without_bias():
    f, x = Block(scale=0.9).double(), inputs(torch.float64)
    layer = nde.DeepEquilibrium(f, solver="newton", rtol=1e-10)
    z = layer(x).detach()
    jacobian = (1 - torch.tanh(f.w(z) + f.u(x)) ** 2)[:, :, None] * f.w.weight
    exact = jacobian.square().sum(dim=(1, 2)) / D
    penalty = reg.EquilibriumJacobian(samples=800, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(penalty.figure(layer.solution), exact.detach(), rtol=0.2, atol=0)
    penalty(layer).backward()
    (by_hand,) = torch.autograd.grad(exact.mean(), f.w.weight)
    close(f.w.weight.grad, by_hand, 0.2)


@pytest.mark.parametrize("penalty", [reg.EquilibriumJacobian, reg.Skip, reg.Contraction])
def test_the_weight_is_the_first_argument(penalty):
    assert penalty(0.1).weight == 0.1 and penalty().weight == 1.0
    if penalty is reg.EquilibriumJacobian:
        assert penalty(0.1).probability == 1.0
        with refused(TypeError, "positional"):
            penalty(0.1, 0.5)


@pytest.mark.parametrize("penalty", [reg.EquilibriumJacobian(), reg.Skip(), reg.Contraction()])
def test_what_is_of_steady_states_refuses_others(penalty):
    layer = nde.NeuralODE(nn.Linear(D, D))
    layer(inputs())
    with refused(ValueError, "horizon"):
        penalty(layer)
    with refused(ValueError, "horizon"):
        nde.introspection.spectral_radius(layer.solution)


def test_the_jacobian_is_applied_with_a_probability():
    layer = nde.DeepEquilibrium(Block(), solver="anderson")
    layer(inputs())
    penalty = reg.EquilibriumJacobian(probability=0.25, generator=torch.Generator().manual_seed(0))
    calls, applied = layer.f.calls, 0
    for _ in range(200):
        applied += bool(penalty(layer) > 0)
    assert 25 < applied < 75
    assert layer.f.calls - calls == applied
    assert float(reg.EquilibriumJacobian(probability=0.0)(layer)) == 0.0


@pytest.mark.parametrize("detach", [False, True])
def test_skip(detach):
    start = nn.Linear(D, D)
    layer = nde.DeepEquilibrium(Block(), solver="anderson", initial=start)
    z = layer(inputs())
    penalty = reg.Skip(detach_target=detach)
    expected = (start(inputs()) - z.detach()).abs().mean()
    torch.testing.assert_close(penalty(layer), expected)
    penalty(layer).backward()
    assert (layer.f.w.weight.grad is None) == detach
    assert bool(start.weight.grad.any())


def test_steps_have_no_gradient_to_lose():
    layer = nde.DeepEquilibrium(Block(), solver="tsit5")
    layer(inputs())
    with refused(nde.NeuralDEError, "implicit", "direct", "EquilibriumJacobian"):
        reg.GlobalError()(layer).backward()
    assert bool(reg.LocalStiffness()(layer) > 0)
    layer = nde.DeepEquilibrium(Block(), solver="anderson")
    layer(inputs())
    for penalty in (reg.GlobalError(), reg.GlobalStiffness()):
        with refused(nde.NeuralDEError, "EquilibriumJacobian", "Contraction"):
            penalty(layer).backward()


def test_spectral_radius():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 4, 4, generator=generator, dtype=torch.float64)
    expected = torch.linalg.eigvals(matrix).abs().amax(dim=1)
    matrix = matrix / expected[:, None, None] * torch.linspace(0.2, 0.95, 5, dtype=torch.float64)[:, None, None]
    equation = nde.SteadyState(lambda z, a: (a @ z[..., None])[..., 0] + 1.0)
    solution = nde.solve(equation, torch.zeros(5, 4, dtype=torch.float64), solver="newton", args=matrix)
    found = nde.introspection.spectral_radius(solution, iterations=600, generator=generator)
    torch.testing.assert_close(found, torch.linspace(0.2, 0.95, 5, dtype=torch.float64), rtol=1e-2, atol=0)
    with refused(ValueError, "iterations"):
        nde.introspection.spectral_radius(solution, iterations=1)


@pytest.mark.parametrize("solver", ["anderson", "tsit5"])
def test_plot(solver):
    layer = nde.DeepEquilibrium(Block(), solver=solver)
    layer(inputs())
    axes = layer.solution.plot(sample=2)
    assert len(axes.lines[0].get_ydata()) == int(layer.solution.depth[2]) + 1
    assert "converged" in axes.get_title() and solver in axes.get_title()
    with refused(ValueError, "sample"):
        layer.solution.plot(sample=BATCH)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("solver", ["anderson", "broyden", "tsit5"])
@pytest.mark.parametrize("adjoint", ["implicit", "implicit-anderson", "phantom"])
def test_cuda(solver, adjoint):
    f, x = Block(nde.VariationalDropout(0.2)).cuda(), inputs().cuda()
    layer = nde.DeepEquilibrium(f, solver=solver, adjoint=adjoint, initial="first_step")
    penalties = [cls()(layer) for cls in reg.REGULARIZERS.values() if cls.of_steady] if layer(x) is not None else []
    (layer.solution.final.sum() + sum(penalties)).backward()
    assert layer.solution.final.is_cuda and layer.solution.residual.is_cuda and layer.solution.steps.residual.is_cuda
    assert all(bool(torch.isfinite(p.grad).all()) for p in f.parameters())
    assert nde.introspection.spectral_radius(layer.solution).is_cuda
