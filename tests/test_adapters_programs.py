"""`regularizers.torchdiffeq` in programs: tuples, several solves, events, autocast, DDP."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import torchdiffeq
from adapters import FUNCTIONS, LOOSE, TIMES, Net, gradients, solved, start
from helpers import refused
from torch import nn

import regularizers as reg
from regularizers import recorded
from regularizers import torchdiffeq as adapter

FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture(autouse=True)
def _times():
    """The same sampled times in every run, whatever ran before."""
    with reg.record(torch.Generator().manual_seed(0)):
        yield


@FUNCTION
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_tuples(function, method):
    f = Net()

    class Augmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = f

        def forward(self, t, y):
            return self.f(t, y[0]), y[1] * t + y[0].square().sum(dim=1, keepdim=True)

    y0, t = (start(), torch.zeros(5, 1, dtype=torch.float64)), TIMES["forwards"]
    theirs = getattr(torchdiffeq, function)(Augmented(), y0, t, method=method, **LOOSE)
    ours = getattr(adapter, function)(Augmented(), y0, t, method=method, **LOOSE)
    assert isinstance(ours, tuple) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(gradients(ours[1], f), gradients(theirs[1], f), strict=True):
        assert torch.equal(a, b)
    for sampling in ("unbiased", "biased"):
        value = reg.LocalError(sampling)(getattr(adapter, function).solution)
        assert float(value) > 0
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, list(f.parameters())))


class Block(nn.Module):
    """As programs have it: a Module that calls odeint."""

    def __init__(self, f, function):
        super().__init__()
        self.f, self.function = f, function

    def forward(self, y):
        return self.function(self.f, y, torch.tensor([0.0, 1.0], dtype=y.dtype), **LOOSE)[-1]


@FUNCTION
def test_several_solves_shared_fields_and_sequential(function):
    f, g = Net(), Net(gain=1.0)
    model = nn.Sequential(*(Block(x, getattr(adapter, function)) for x in (f, g, f)))
    plain = nn.Sequential(*(Block(x, getattr(torchdiffeq, function)) for x in (f, g, f)))
    penalty = reg.LocalError()
    with reg.record() as outer, reg.record() as solutions:
        ours = model(start())
    model(start())
    assert torch.equal(ours, plain(start()))
    assert len(solutions) == 3 and outer == solutions
    value = penalty(solutions)
    assert torch.equal(value, sum(penalty(s) for s in solutions))
    value.backward()
    assert all(bool(p.grad.abs().sum() > 0) for x in (f, g) for p in x.net[0].parameters())
    with reg.record() as nothing:
        pass
    with refused(ValueError, "record"):
        penalty(nothing)


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_compiled_model():
    block = Block(Net(), adapter.odeint)
    compiled = torch.compile(block, backend="eager")
    assert torch.equal(compiled(start()), block(start()))
    with reg.record() as solutions:
        compiled(start())
    assert len(solutions) == 1 and bool(reg.LocalError()(adapter.odeint.solution) > 0)


@FUNCTION
def test_batch_norm_and_dropout(function):
    """Recording leaves statistics and random numbers as they were; a penalty's evaluations are calls like any other."""

    def made(module):
        f = Net()
        f.net = nn.Sequential(*f.net, nn.BatchNorm1d(3), nn.Dropout(0.1)).double()
        torch.manual_seed(1)
        solved(module, function, f, method="rk4")
        return f, [torch.get_rng_state(), f.net[3].running_mean.clone()]

    (f, ours), (_, theirs) = made(adapter), made(torchdiffeq)
    assert all(map(torch.equal, ours, theirs))
    reg.LocalStiffness()(getattr(adapter, function).solution)
    after = [torch.get_rng_state(), f.net[3].running_mean]
    assert not any(map(torch.equal, ours, after))


@FUNCTION
def test_no_penalty_no_cost_without_gradients_and_in_eval_mode(function, monkeypatch):
    f, ours = Net(), getattr(adapter, function)
    accepted = []
    f.callback_accept_step = lambda t, y, dt: accepted.append(t)
    monkeypatch.setattr(recorded, "_WARNED", set())
    with reg.record() as solutions:
        with torch.no_grad():
            _, without = solved(adapter, function, f)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                reg.LocalError()(ours.solution)  # nobody asks for a gradient here
        with pytest.warns(UserWarning, match=rf"{function} is 0 .* made without gradients"):
            assert float(reg.LocalError()(ours.solution)) == 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reg.LocalError()(ours.solution)  # said once
        f.eval()
        solved(adapter, function, f)
    calls = f.calls
    assert float(reg.LocalStiffness(weight=3.0)(solutions)) == 0.0
    assert f.calls == calls == without and len(solutions) == 2


def test_autocast():
    f = Net(d=8).float()
    y0, t = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0.0, 0.4])
    how = {"rtol": 1e-1, "atol": 1e-1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = torchdiffeq.odeint(f, y0, t, **how)
        ours = adapter.odeint(f, y0, t, **how)
        inside = reg.LocalError()(adapter.odeint.solution)
    seen = []
    f.net[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    outside = reg.LocalError()(adapter.odeint.solution)
    assert torch.equal(ours, theirs) and torch.equal(inside, outside) and set(seen) == {torch.bfloat16}
    outside.backward()
    adapter.odeint(f, y0, t, **how)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reg.LocalError()(adapter.odeint.solution)
    assert set(seen) == {torch.float32}


def test_distributed(tmp_path):
    def gradients_of(wrap):
        model = nn.Sequential(nn.Linear(3, 3).double(), Block(Net(), adapter.odeint_adjoint))
        torch.manual_seed(1)
        nn.init.normal_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        wrapped = wrap(model)
        with reg.record(torch.Generator().manual_seed(0)) as solutions:
            loss = wrapped(start()).square().mean()
        (loss + reg.LocalError()(solutions)).backward()
        return [p.grad for p in model.parameters()]

    alone = gradients_of(lambda model: model)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        together = gradients_of(nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def test_replicas_of_data_parallel_keep_their_gradients():
    f = Net()
    f._is_replica = True
    f.net._is_replica = True
    weights = [p.detach().clone().requires_grad_() for p in f.net[0].parameters()]
    for name, p in zip(("weight", "bias"), weights, strict=True):
        del f.net[0]._parameters[name]
        f.net[0].__dict__[name] = p
    ours = adapter.odeint_adjoint(f, start(), TIMES["forwards"], **LOOSE)
    theirs = torchdiffeq.odeint_adjoint(f, start(), TIMES["forwards"], **LOOSE)
    for a, b in zip(*(torch.autograd.grad(y[-1].sum(), weights) for y in (ours, theirs)), strict=True):
        assert torch.equal(a, b) and bool(a.abs().sum() > 0)


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@FUNCTION
@pytest.mark.parametrize(("method", "options"), [("dopri5", None), ("rk4", {"step_size": 0.05})])
def test_events(method, options, function, reverse):
    class Fall(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.tensor(9.81, dtype=torch.float64))

        def forward(self, t, y):
            return y[1], (-self.g + 0.1 * torch.sin(9 * t)).expand_as(y[1])

    f, sign = Fall(), -1.0 if reverse else 1.0
    y0 = tuple(torch.tensor([x], dtype=torch.float64) for x in (10.0, 0.0))
    how = {"event_fn": lambda t, y: y[0], "reverse_time": reverse, "method": method, "options": options, **LOOSE}
    t0 = torch.tensor([0.0], dtype=torch.float64)
    results = []
    for module in (torchdiffeq, adapter):
        t, y = module.odeint_event(f, y0, t0, odeint_interface=getattr(module, function), **how)
        results.append((t, *y, *torch.autograd.grad(t + y[1][-1].sum(), [f.g])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    solution, end = adapter.odeint_event.solution, float(results[0][0])
    assert solution is getattr(adapter, function).solution
    for sampling in ("unbiased", "biased"):
        place = solution.place(sampling)
        assert 0 <= sign * float(place.t) <= abs(end) and sign * float(place.dt) > 0
        # Free fall, nearly.
        expected = 10 - 0.5 * 9.81 * float(place.t) ** 2
        assert abs(float(place.state(False)[0]) - expected) < 0.1
        assert float(reg.LocalError(sampling)(solution)) > 0


def test_imports_stay_light():
    """Of the three libraries none is imported before its adapter is used, and by that only its own."""
    script = (
        "import sys, regularizers\n"
        "def found(): print(*({'torchdiffeq', 'torchdyn', 'torchsde'} & set(sys.modules)), sep=',')\n"
        "found()\nimport regularizers.torchdiffeq\nfound()\n"
        "regularizers.torchsde.sdeint\nregularizers.torchdyn.attach\n"
        "print('torchdyn' in sys.modules, hasattr(regularizers, 'jax'))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:3] == ["", "torchdiffeq", "False False"]


def test_no_warnings_of_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("dopri5", "euler"):
            for function in FUNCTIONS:
                solved(adapter, function, Net(), method=method)
                reg.LocalError()(getattr(adapter, function).solution).backward()
