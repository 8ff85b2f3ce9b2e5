"""Compiled solves: the same as others, made by few programs; and what can't be compiled is solved all the same."""

import copy
import functools
import gc
import os
import shutil
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, SOLVERS, close, options, refused
from torch import nn

import neuralde as nde
import regularizers as reg
from neuralde.compiled import decompositions, records, stepping
from neuralde.solvers.runge_kutta import RungeKutta

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
BATCH, SIZE = 5, 3
METHODS = [name for name in SOLVERS if isinstance(nde.solvers.get(name), RungeKutta)]  # what is compiled
BETWEEN = torch.linspace(0.0, 1.5, 9, dtype=torch.float64)


class F(nn.Module):
    """A vector field with parameters, time, and args of every sample and of all."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.inner, self.outer = nn.Linear(SIZE, 7).double(), nn.Linear(7, SIZE).double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)

    def forward(self, t, z, args):
        return self.outer(torch.tanh(self.inner(z))) * args["rate"] * torch.cos(t) - args["decay"] * z


FIELD = F()  # one for all tests: its programs are made once


class Case:
    """A solve of `FIELD`, compiled or not, with its loss."""

    def __init__(self, batch=BATCH, field=FIELD, **how):
        generator = torch.Generator().manual_seed(9)
        self.z0 = torch.randn(batch, SIZE, generator=generator, dtype=torch.float64).requires_grad_()
        self.args = {
            "rate": torch.linspace(0.5, 2.0, batch, dtype=torch.float64)[:, None].requires_grad_(),
            "decay": torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
        }
        self.how = {"solver": "bs3", "control": "joint", "rtol": 1e-6, "atol": 1e-6, "t": (0.0, 1.5)} | how
        self.field, self.inputs = field, [self.z0, *self.args.values(), *field.parameters()]

    def solve(self, compile, **more):
        return nde.solve(nde.ODE(self.field), self.z0, args=self.args, compile=compile, **(self.how | more))


def same(x, y, within):
    for a, b in zip(x, y, strict=True):
        close(a, b, within * max(1.0, float(b.detach().abs().max())))


# (Error ratios are differences of nearly equal numbers: last digits show.)
PENALTIES = {
    "final": lambda s: 0.0,
    "steps": lambda s: (s.steps.error * s.steps.dt).sum() + 1e-3 * (s.steps.stiffness**2).sum(),
    "error": lambda s: reg.GlobalError()(s),
    "figures": lambda s: reg.GlobalError()(s) + 1e-3 * reg.GlobalStiffness()(s),
    "states": lambda s: (s.steps.z**2).sum() + (s(0.3) ** 2).sum(),
    "outputs": lambda s: (s.zs**2).sum() + (s.steps.z**2).sum(),
}


def compiled_and_not(case, penalty):
    found = []
    for compile in (True, False):
        solution = case.solve(compile)
        loss = (solution.final**2).sum() + PENALTIES[penalty](solution)
        found.append((solution, torch.autograd.grad(loss, case.inputs)))
    return found


def agree(case, penalty="final"):
    (mine, gradients), (theirs, expected) = compiled_and_not(case, penalty)
    close(mine.final, theirs.final, 1e-11)
    assert str(mine.stats).split(", function")[0] == str(theirs.stats).split(", function")[0]
    for name in ("accepted", "rejected", "nfe"):
        assert torch.equal(getattr(mine.stats, name), getattr(theirs.stats, name))
    for name in ("t", "dt", "z"):  # the last digits of error estimates show in the step sizes
        close(getattr(mine.steps, name).nan_to_num(), getattr(theirs.steps, name).nan_to_num(), 1e-6)
    same(gradients, expected, 1e-9 if penalty == "final" else 1e-6)
    return mine


@COMPILER
@pytest.mark.parametrize(
    ("penalty", "solver"),
    [
        ("error", "bs3"),
        *(pytest.param(x, "dopri5", marks=pytest.mark.slow) for x in ("final", "figures", "steps", "states")),
    ],
)
def test_a_compiled_solve_is_the_same(silent, penalty, solver):
    agree(Case(solver=solver), penalty)


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=[pytest.mark.slow, COMPILER])])
def field(request, monkeypatch, silent):
    """One whose programs are run line by line by Python, which takes no compiler; or one that is compiled."""
    if request.param == "compiled":
        return FIELD

    def loop(more, step, carried, buffers):
        while more(*carried):
            carried = step(buffers, *carried)
        return carried

    monkeypatch.setattr(stepping, "program", lambda function, **options: function)
    monkeypatch.setattr(stepping, "overwriting_loop", loop)
    return F()


@pytest.mark.parametrize(
    ("penalty", "solver"),
    [
        *((x, "bs3") for x in ("final", "error", "outputs")),
        ("figures", "tsit5"),
        *(pytest.param(x, "tsit5", marks=pytest.mark.slow) for x in ("states", "steps")),
    ],
)
def test_samples_that_have_ended_leave_the_batch(field, penalty, solver):
    """Most end within one log, some in the second, a few later: their args, horizons and gradients stay theirs."""
    from torch._dynamo.utils import counters

    batch, (long, least) = 256, {"bs3": (1.0, 32), "tsit5": (9.0, 64)}[solver]
    ends = torch.linspace(0.4, 0.6, batch, dtype=torch.float64)
    ends[::3], ends[::10] = 1.4 * long, torch.linspace(4.0, 5.0, 26, dtype=torch.float64) * long
    times = [torch.zeros_like(ends), *([0.7 * ends] if penalty == "outputs" else []), ends]
    case = Case(batch=batch, field=field, solver=solver, control="per_sample", t=torch.stack(times, dim=1), rtol=1e-7)
    mine = agree(case, penalty)
    pages = mine._outcome.trajectory.pages
    assert [page.log.s.shape[1] for page in pages[:3]] == [256, 128, least]
    assert set(range(0, batch, 10)) <= set(pages[2].rows.tolist()) <= set(pages[1].rows.tolist())
    made = counters["stats"]["unique_graphs"]
    assert torch.equal(case.solve(True).final, mine.final)
    assert counters["stats"]["unique_graphs"] == made


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=[pytest.mark.slow, COMPILER])])
def test_a_table_of_as_many_rows_as_samples_is_not_cut(compile):
    """An oscillator that starts at rest reads nothing of its stiffness there, which is all samples' at later times."""
    samples = 100
    knots = 1 + torch.linspace(0, 9, samples, dtype=torch.float64).sin() ** 2

    def f(t, z, table):
        place = (t / 10 * (len(table) - 1)).clamp(0, len(table) - 1 - 1e-9)
        low = place.long()
        rest, high = place - low, (low + 1).clamp(max=len(table) - 1)
        stiffness = table[low] * (1 - rest) + table[high] * rest
        return torch.cat([z[:, 1:], torch.sin(2 * t) - stiffness * z[:, :1] - 0.2 * z[:, 1:]], dim=1)

    ends = torch.linspace(0.4, 0.6, samples, dtype=torch.float64)
    ends[:5] = torch.linspace(6.0, 10.0, 5, dtype=torch.float64)
    t, z0 = torch.stack([torch.zeros_like(ends), ends], dim=1), torch.zeros(samples, 2, dtype=torch.float64)
    how = {"solver": "bs3", "rtol": 1e-6, "atol": 1e-8}
    truth = nde.solve(nde.ODE(lambda t, z: f(t, z, knots)), z0, t, **how).final
    close(nde.solve(nde.ODE(f), z0, t, args=knots, compile=compile, **how).final, truth, 1e-9)


@COMPILER
@pytest.mark.slow
def test_a_batch_that_f_wants_whole_stays_whole(silent):
    """A function that holds something of every sample can't be called for some of them."""
    shift = torch.linspace(-1.0, 1.0, 70, dtype=torch.float64)[:, None]

    def f(t, z):
        return torch.tanh(z) * shift - z

    ends = torch.linspace(0.4, 0.6, 70, dtype=torch.float64)
    ends[3] = 30.0
    t, z0 = torch.stack([torch.zeros_like(ends), ends], dim=1), torch.ones(70, 2, dtype=torch.float64)
    mine, theirs = (nde.solve(nde.ODE(f), z0, t, "bs3", rtol=1e-7, compile=compile) for compile in (True, False))
    close(mine.final, theirs.final, 1e-11)
    pages = mine._outcome.trajectory.pages
    assert len(pages) > 1 and all(page.rows is None for page in pages)


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", METHODS)
def test_every_method_and_control(silent, solver, control):
    case = Case(control=control, rtol=1e-5, **options(solver))
    mine = agree(case)
    if control == "per_sample" and mine.solver.adaptive:
        assert len(mine.stats.accepted.unique()) > 1
    if mine.solver.error_order is not None and mine.solver.reports_stiffness:
        agree(case, "figures")
    # With output times, steps are closed: other programs.
    mine = agree(Case(control=control, rtol=1e-5, **options(solver), t=BETWEEN), "outputs")
    close(mine.zs[-1], mine.final, 1e-15)
    with torch.no_grad():
        dense, not_dense = (Case(**case.how).solve(compile, dense=True) for compile in (True, False))
    close(dense(BETWEEN), not_dense(BETWEEN), 1e-11)


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROLS)
def test_output_times(silent, control):
    """Their values, their gradients, and those of their times; also against the direction of time."""
    for t in (BETWEEN, -BETWEEN):
        found = []
        for compile in (True, False):
            times = t.clone().requires_grad_()
            case = Case(control=control, t=times)
            solution = case.solve(compile)
            found.append([solution.zs, *torch.autograd.grad((solution.zs**2).sum(), [times, *case.inputs])])
        same(*found, 1e-9)


SCRIPT = """
import sys, torch, neuralde as nde
from torch._dynamo.utils import counters
kind, factor = sys.argv[1], float(sys.argv[2])
z0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
def f(t, z):
    return torch.tanh(factor * z)
def g(z):
    return torch.tanh(factor * z + 0.3)
def solved(compile):
    if kind == "ode":
        return nde.solve(nde.ODE(f), z0, (0.0, 1.0), compile=compile)
    if kind == "sde":
        equation = nde.SDE(f, lambda t, z: 0.1 * torch.ones_like(z))
        return nde.solve(equation, z0, (0.0, 1.0), solver="sosri2", seed=1, compile=compile)
    return nde.solve(nde.SteadyState(g), z0, solver=kind, rtol=1e-10, atol=1e-10, compile=compile)
mine, theirs = (solved(x).final for x in (True, False))
print(float((mine - theirs).abs().max()) < 1e-8, counters["inductor"]["fxgraph_cache_hit"] > 0)
"""


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ode", "sde", "bs3", "anderson"])
def test_programs_are_kept_between_processes(tmp_path, kind):
    """The second process finds what the first one made; one with another constant in f does not take it for its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = []
    for factor in ("0.5", "0.5", "0.7"):
        command = [sys.executable, "-W", "error::UserWarning:neuralde", "-c", SCRIPT, kind, factor]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said.append(run.stdout.split())
    assert said == [["True", "False"], ["True", "True"], ["True", "False"]]


@COMPILER
@pytest.mark.parametrize(
    "how",
    [
        {"t": (1.5, -0.3)},
        pytest.param({"dt0": 0.9}, marks=pytest.mark.slow),  # that dt0 is given makes other programs
        {"rtol": 1e-7, "atol": 1e-7, "t": (0.0, 3.0)},
        pytest.param({"batch": 7}, marks=pytest.mark.slow),
        pytest.param({"batch": 11}, marks=pytest.mark.slow),
    ],
    ids=["backwards", "rejected", "many attempts", "another batch", "and another"],
)
def test_the_same_programs_serve_other_solves(silent, how):
    mine = agree(Case(**how))
    if "dt0" in how:
        assert int(mine.stats.rejected.max()) > 0
    if "rtol" in how:
        assert int(mine.stats.accepted.max()) > 128  # more than twice what a log holds


@COMPILER
def test_few_programs_for_a_training_run(silent):
    """Step counts, tolerances, horizons, parameters and batch sizes change; programs are made in the first steps."""
    from torch._dynamo.utils import counters

    before = copy.deepcopy(FIELD.state_dict())
    optimizer = torch.optim.Adam(FIELD.parameters(), lr=1e-2)
    made, accepted = [], set()
    for step in range(200):
        case = Case(batch=(6, 8, 9, 13)[step % 4])
        how = {"rtol": 10.0 ** -(1 + step % 4), "t": (0.0, 1.0 + 0.01 * step), "atol": 1e-4}
        solution = case.solve(True, **how)
        accepted.add(int(solution.stats.accepted[0]))
        optimizer.zero_grad()
        (solution.final**2).mean().backward()
        optimizer.step()
        made.append(counters["stats"]["unique_graphs"])
    FIELD.load_state_dict(before)
    assert len(accepted) > 4
    assert made[2] > 0 and made[-1] == made[2]


@COMPILER
@pytest.mark.slow
def test_a_function_made_anew_is_compiled_once(silent):
    """Also one of a tuple of tensors, whose Module it closes over; parameters are exchanged in place."""
    from torch._dynamo.utils import counters

    net, made = nn.Linear(2, 2).double(), []
    for scale in (1.0, 0.5, 0.3):
        with torch.no_grad():
            net.weight.mul_(scale)
        z0 = tuple(torch.ones(4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        found = []
        for compile in (True, False):
            equation = nde.ODE(lambda t, z: (z[1], net(torch.sin(z[0]))))
            solution = nde.solve(equation, z0, (0.0, 1.0), control="joint", rtol=1e-6, atol=1e-6, compile=compile)
            found.append(torch.autograd.grad((solution.final[0] ** 2).sum(), [*z0, *net.parameters()]))
        same(*found, 1e-9)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == made[-1]


@COMPILER
def test_a_failing_solve_says_the_same():
    case = Case()
    with torch.no_grad():
        for more, kind in (({"max_steps": 5}, nde.MaxStepsReached), ({"t": (0.0, 1e6)}, nde.MaxStepsReached)):
            said = []
            for compile in (True, False):
                with pytest.raises(kind) as caught:
                    case.solve(compile, **more)
                said.append((str(caught.value), caught.value.t))
            assert said[0] == said[1]


@COMPILER
def test_nothing_is_kept_of_a_model_that_is_gone():
    layer = nde.NeuralODE(nn.Linear(2, 2), compile=True)
    layer(torch.ones(3, 2))
    gone = weakref.ref(layer.f)
    del layer
    gc.collect()
    assert gone() is None


@COMPILER
def test_second_derivatives(silent):
    case, found = Case(rtol=1e-4), []
    for compile in (True, False):
        (first,) = torch.autograd.grad(case.solve(compile).final.sum(), case.z0, create_graph=True)
        found.append(torch.autograd.grad((first**2).sum(), case.z0))
    same(*found, 1e-8)


@COMPILER
def test_changes_of_f_before_the_backward_pass_are_noticed():
    case = Case()
    solution = case.solve(True)
    with torch.no_grad():
        FIELD.inner.weight.data.mul_(1.5)
    try:
        with refused(nde.NeuralDEError, "another result in the backward pass"):
            solution.final.sum().backward()
    finally:
        FIELD.inner.weight.data.div_(1.5)


class Scaled(nn.Module):
    """f with parameters, one of which may be passed again in args."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2).double()

    def forward(self, t, z, args):
        return torch.tanh(self.linear(z)) * args[0] - args[1] * z


def same_as_without(solve, inputs):
    """Gradients by `inputs`, with whatever warnings."""
    found = []
    for compile in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(torch.autograd.grad(solve(compile).final.square().sum(), inputs))
    same(*found, 1e-9)


@COMPILER
@pytest.mark.slow
def test_what_changes_between_solves_is_seen():
    f, z0 = Scaled(), torch.ones(3, 2, dtype=torch.float64)
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.4))
    how = {"t": (0.0, 1.0), "control": "joint", "rtol": 1e-6, "atol": 1e-6}

    def solve(compile, args):
        return nde.solve(nde.ODE(f), z0, args=args, compile=compile, **how)

    weights = list(f.parameters())
    same_as_without(lambda compile: solve(compile, (a, b)), [a, b, *weights])
    same_as_without(lambda compile: solve(compile, (a, a)), [a, *weights])
    same_as_without(lambda compile: solve(compile, (f.linear.bias, b)), [b, *weights])
    handle = f.linear.register_forward_hook(lambda module, inputs, out: 2.0 * out)
    same_as_without(lambda compile: solve(compile, (a, b)), [a, b, *weights])
    handle.remove()
    f.linear.bias.requires_grad_(False)
    same_as_without(lambda compile: solve(compile, (a, b)), [a, b, f.linear.weight])
    f.linear.bias.requires_grad_(True)
    f.linear.weight = nn.Parameter(0.5 * f.linear.weight.detach())
    same_as_without(lambda compile: solve(compile, (a, b)), [a, b, *f.parameters()])
    # A parameter that is another one in the backward pass is no missing gradient.
    solution, old = solve(True, (a, b)), f.linear.weight
    f.linear.weight = nn.Parameter(old.detach().clone())
    with refused(nde.NeuralDEError, "another result in the backward pass"):
        torch.autograd.grad(solution.final.sum(), [old, a])


FACTOR = 1.5


class Reading(nn.Module):
    """A function of numbers that stand in three places."""

    def __init__(self):
        super().__init__()
        self.rate, self.part = 0.5, nn.Identity()

    def forward(self, t, z):
        return -FACTOR * self.rate * self.part(z)


@COMPILER
@pytest.mark.slow
def test_other_numbers_and_methods_of_f_are_seen(monkeypatch):
    """Programs don't look at what neuralde is made of at every call; at what f is made of they do."""
    f, z0 = Reading(), torch.ones(3, 2, dtype=torch.float64)
    changes = [
        lambda: None,
        lambda: setattr(f, "rate", 0.7),
        lambda: monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.5),
        lambda: setattr(f.part, "forward", lambda z: 0.25 * z),
        lambda: setattr(f, "part", nn.Tanh()),
    ]
    seen = []
    for change in changes:
        change()
        mine, theirs = (nde.solve(nde.ODE(f), z0, (0.0, 1.0), "bs3", compile=x).final for x in (True, False))
        close(mine, theirs, 1e-12)
        seen.append(float(mine[0, 0]))
    assert len(set(seen)) == len(changes)


@COMPILER
@pytest.mark.slow
def test_numbers_of_a_function_without_a_module_are_seen():
    scope = {"__name__": "nowhere", "FACTOR": 1.5}
    exec("def f(t, z):\n    return -FACTOR * z", scope)
    z0 = torch.ones(3, 2, dtype=torch.float64)
    for factor in (1.5, 2.5):
        scope["FACTOR"] = factor
        mine, theirs = (nde.solve(nde.ODE(scope["f"]), z0, (0.0, 1.0), "bs3", compile=x).final for x in (True, False))
        close(mine, theirs, 1e-12)


class Elsewhere:
    """Where inspection does not look."""

    scale = torch.tensor(0.5, dtype=torch.float64)


class Hidden(nn.Module):
    def forward(self, t, z):
        return -Elsewhere.scale * z


@COMPILER
@pytest.mark.slow
def test_a_tensor_out_of_sight_that_wants_a_gradient_later_gets_it():
    f, z0 = Hidden(), torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    for wanted in (False, True):
        Elsewhere.scale.requires_grad_(wanted)
        inputs = [z0, Elsewhere.scale] if wanted else [z0]
        same_as_without(lambda compile: nde.solve(nde.ODE(f), z0, (0.0, 1.0), control="joint", compile=compile), inputs)


# -- what is not compiled ----------------------------------------------------------------------------------------------

F_PLAIN = nn.Linear(2, 2)
Z0 = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("cause", "how"),
    [
        ("explicit Runge-Kutta", {"solver": "vcab3"}),
        ("explicit Runge-Kutta", {"solver": "rodas5p"}),
        ("events", {"events": nde.Event(lambda t, z: z[:, 0] - 9.0)}),
        ("jump_times", {"jump_times": [0.5]}),
        ("observer", {"observer": object()}),
        ("dt_min or dt_max", {"dt_max": 0.5}),
        ("tolerance per component", {"rtol": torch.tensor([1e-3, 1e-4])}),
        ("checkpoints=k", {"adjoint": nde.adjoints.Checkpointed(3)}),
        ("bfloat16", {"z0": Z0.bfloat16(), "f": lambda t, z: -z}),
        ("other than tensors", {"args": (1.0, Z0), "f": lambda t, z, args: -z * args[0]}),
        ("only nn.Modules and functions", {"f": functools.partial(lambda k, t, z: -k * z, 0.5)}),
        ("only nn.Modules and functions", {"f": F_PLAIN.forward}),
        ("random numbers", {"f": lambda t, z: -z + 0.0 * torch.rand(())}),
        *(("is not compiled", {"adjoint": name}) for name in ADJOINTS if not nde.adjoints.get(name).compiles),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_what_is_not_compiled_says_why_once_and_is_solved(cause, how):
    f, z0 = how.get("f", copy.deepcopy(F_PLAIN)), how.get("z0", Z0)
    how = {"t": (0.0, 1.0), "control": "joint"} | {k: x for k, x in how.items() if k not in ("f", "z0")}
    with pytest.warns(UserWarning, match="compile=True has no effect.*" + cause):
        mine = nde.solve(nde.ODE(f), z0, compile=True, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = nde.solve(nde.ODE(f), z0, compile=True, **how)
    theirs = nde.solve(nde.ODE(f), z0, **how)
    assert torch.equal(mine.zs, theirs.zs) and torch.equal(again.zs, theirs.zs)


@pytest.mark.parametrize(
    "solver", [s if s not in METHODS else pytest.param(s, marks=pytest.mark.slow) for s in SOLVERS]
)
def test_what_is_compiled_is_known_for_every_solver(solver):
    """A new solver shows in `METHODS`, or warns."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            nde.solve(nde.ODE(copy.deepcopy(F_PLAIN)), Z0, (0.0, 0.1), compile=True, control="joint", **options(solver))
        finally:
            warned = any("compile=True has no effect" in str(w.message) for w in said)
    if shutil.which("g++"):
        assert warned is (solver not in METHODS)


@COMPILER
def test_f_that_the_compiler_refuses():
    f = lambda t, z: -z if float(z.detach().sum()) > -1e9 else z  # noqa: E731
    z0 = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="the compiler failed"):
        solution = nde.solve(nde.ODE(f), z0, (0.0, 1.0), compile=True, control="joint")
    solution.final.sum().backward()
    theirs = nde.solve(nde.ODE(f), z0, (0.0, 1.0), control="joint")
    assert torch.equal(solution.final, theirs.final)


@COMPILER
def test_a_closed_over_tensor_has_its_gradient_all_the_same():
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    z0 = torch.ones(2, 2, dtype=torch.float64)
    found = []
    for compile in (True, False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            solution = nde.solve(nde.ODE(lambda t, z: -w * z), z0, (0.0, 1.0), compile=compile, control="joint")
        causes = [str(x.message) for x in said]
        assert any("closes over a tensor" in x and "through args" in x for x in causes) is compile
        found.append(torch.autograd.grad(solution.final.sum(), w))
    same(*found, 1e-10)


# -- nde.compile -------------------------------------------------------------------------------------------------------


def test_compile_turns_the_option_on():
    assert nde.compile({"rtol": 1e-4}) == {"rtol": 1e-4, "compile": True}
    model = nn.Sequential(nn.Linear(2, 2), nde.NeuralODE(nn.Linear(2, 2)), nn.Linear(2, 1))
    assert nde.compile(model) is model
    assert model[1].solve_options["compile"] is True
    with refused(ValueError, "no NeuralODE"):
        nde.compile(nn.Linear(2, 2))
    with refused(TypeError, "a Module or a dict"):
        nde.compile("model")
    with refused(TypeError, "compile must be True or False"):
        nde.solve(nde.ODE(F_PLAIN), Z0, (0.0, 1.0), compile="yes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(64, 2, 50), (64, 50, 2), (2, 64, 50), (1, 1, 1), (3, 128, 4)], ids=str)
def test_thin_products(dtype, shape):
    rows, terms, columns = shape
    x, y = torch.randn(rows, terms, dtype=dtype), torch.randn(columns, terms, dtype=dtype).t()
    bias = torch.randn(columns, dtype=dtype)
    mm, addmm = (decompositions.table()[op] for op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default))
    scale = torch.finfo(dtype).eps * (x.abs() @ y.abs() + bias.abs())
    assert ((mm(x, y) - x @ y).abs() <= terms * scale).all()
    assert ((addmm(bias, x, y) - (bias + x @ y)).abs() <= terms * scale).all()


def test_other_products_are_left_to_the_library():
    x, y = torch.randn(8, 200), torch.randn(200, 2)
    addmm = decompositions.table()[torch.ops.aten.addmm.default]
    assert addmm(torch.zeros(2), x, y) is NotImplemented  # more terms than pay
    assert addmm(torch.zeros(50), x[:, :2], torch.randn(2, 50), beta=2) is NotImplemented


def test_the_integrals_of_figures_are_one_node():
    figures = torch.rand(5, 3, 2, dtype=torch.float64) + 0.5
    figures[1, 2, 0] = 0.0  # a step that did not move: its stiffness counts as 0
    taken = torch.tensor([[True, True], [True, False], [False, True], [True, True], [True, True]])
    sizes = torch.rand(5, 2, dtype=torch.float64)
    figures[2, :, 0] = torch.nan  # a rejected attempt's

    def sums(free):
        at = figures.clone().index_put((torch.tensor([0, 3, 4]),), free)
        return records._Integrals.apply(at, sizes, taken, True, True)

    free = figures[[0, 3, 4]].requires_grad_()
    error, stiffness = sums(free)
    steps = torch.where(taken, figures[:, 0] * sizes, 0.0)
    close(error, steps.sum(dim=0), 1e-12)
    ratios = torch.where(taken & (figures[:, 2] != 0), figures[:, 1] / figures[:, 2], 0.0)
    close(stiffness, ratios.sum(dim=0), 1e-12)
    assert torch.autograd.gradcheck(sums, free) and torch.autograd.gradgradcheck(sums, free)
