"""`diagnose`: the right advice on problems whose trouble is known, and the program around it."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import ADJOINTS, CONTROLS, SOLVERS, close, options, refused
from problems import van_der_pol
from torch import nn

import neuralde as nde
import regularizers as reg
from neuralde.experiments import cli
from neuralde.findings import find_jump


def ones(batch=3, d=1):
    return torch.ones(batch, d, dtype=torch.float64)


def kinds(diagnosis):
    # How long f takes depends on the machine.
    return [finding.kind for finding in diagnosis.findings if finding.kind != "overhead"]


def examine(f, z0, t=(0.0, 1.0), **how):
    with torch.no_grad():
        solution = nde.solve(nde.ODE(f), z0, t, max_steps=20_000, on_failure="ignore", **how)
    return nde.diagnose(solution, show=False)


RATES = torch.tensor([[1.0], [1.0], [1.0], [1.0], [40.0]], dtype=torch.float64)


def turning(t, z, rate=1.0):
    return rate * torch.stack([z[:, 1], -z[:, 0]], dim=1)


def relaxing(t, z):
    return -300 * (z - torch.cos(t))


def kinked():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4)).double()


# (f, z0, t, options), what must be found, and words of the advice.
TROUBLES = {
    "stiff": (relaxing, ones(), (0.0, 2.0), {}, ["stiff"], ["GlobalStiffness", "rodas5p"]),
    "stiff oscillator": (van_der_pol(50.0), 2 * ones(2, 2), (0.0, 20.0), {}, ["stiff"], ["auto"]),
    "stiff and bs3": (relaxing, ones(), (0.0, 2.0), {"solver": "bs3"}, ["stiff"], ["rodas5p"]),
    "stiff and large": (relaxing, ones(1, 200), (0.0, 2.0), {}, ["stiff"], ["200 components"]),
    "a sharp transient": (
        lambda t, z: torch.exp(-(((t - 0.5) / 0.003) ** 2)) / 0.003 - z,
        ones(),
        (0.0, 1.0),
        {"rtol": 1e-8, "atol": 1e-8},
        ["transient", "tolerance"],
        ["biased", "GlobalError"],
    ),
    "a jump in t": (
        lambda t, z: torch.where(t < 0.37, 1.0, -3.0) - z,
        ones(),
        (0.0, 1.0),
        {},
        ["jump"],
        ["jump_times=[0.37]"],
    ),
    "a jump in z": (
        lambda t, z: torch.where(z < 1.5, 1.0, 0.3) * z,
        0.6 * ones(),
        (0.0, 2.0),
        {"rtol": 1e-6},
        ["jump"],
        ["in z", "nde.Event"],
    ),
    "kinks": (
        kinked(),
        torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double(),
        (0.0, 4.0),
        {"rtol": 1e-7, "atol": 1e-7},
        ["rejections"],
        ["smooth activation"],
    ),
    "one slow sample": (
        turning,
        ones(5, 2),
        (0.0, 3.0),
        {"args": RATES},
        ["slow samples", "tolerance"],
        ["look at these"],
    ),
    "one slow sample, joint": (
        turning,
        ones(5, 2),
        (0.0, 3.0),
        {"args": RATES, "control": "joint"},
        ["slow samples", "tolerance"],
        ["per_sample"],
    ),
    "a tight tolerance": (
        turning,
        ones(3, 2),
        (0.0, 6.0),
        {"rtol": 1e-11, "atol": 1e-11},
        ["tolerance"],
        ["dopri8", "loosen"],
    ),
    "tight for float32": (
        turning,
        ones(3, 2).float(),
        (0.0, 1.0),
        {"rtol": 1e-6, "atol": 1e-6},
        ["precision"],
        ["float64"],
    ),
    "an easy one": (turning, ones(3, 2), (0.0, 1.0), {}, [], []),
    "a pole": (lambda t, z: z**2, ones(), (0.0, 2.0), {}, ["failed"], ["on_failure='raise'"]),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_right_advice(trouble):
    f, z0, t, how, expected, words = TROUBLES[trouble]
    found = examine(f, z0, t, **how)
    assert set(expected) <= set(kinds(found)), str(found)
    # What is not there is not found; a pole has a transient before it.
    if trouble != "a pole":
        assert set(kinds(found)) <= set(expected), str(found)
    for word in words:
        assert any(word in finding.advice for finding in found.findings), str(found)


class Contracting(torch.nn.Module):
    """z -> rate·z + x."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, z, x):
        return self.rate * z + x


@pytest.mark.parametrize(
    ("rate", "how", "expected", "words", "shown"),
    [
        (0.3, {"solver": "fixed_point"}, [], [], ["median contraction", "residual"]),
        (0.97, {"solver": "fixed_point"}, ["contraction", "depth"], ["anderson", "reg.Skip"], ["median contraction"]),
        (0.9, {"solver": "tsit5"}, ["depth"], ["solver='anderson'", "reg.Skip"], ["residual"]),
        (0.9, {"solver": "fixed_point", "max_steps": 9}, ["failed", "contraction"], ["raise max_steps"], ["MAX_STEPS"]),
        (2.0, {"solver": "fixed_point"}, ["failed", "contraction"], ["the map expands"], ["DIVERGED"]),
        (0.5, {"solver": "fixed_point", "control": "joint"}, [], [], ["median contraction"]),
        (0.9, {"solver": "tsit5", "control": "joint"}, ["depth"], ["solver='anderson'"], ["residual"]),
    ],
)
def test_a_steady_state(rate, how, expected, words, shown):
    absolute = nde.Termination("absolute", atol=1e-3)
    layer = nde.DeepEquilibrium(Contracting(rate), on_failure="ignore", termination=absolute, **how)
    found = nde.diagnose(layer, torch.ones(4, 2, dtype=torch.float64), show=False)
    assert set(expected) <= set(kinds(found)) <= {*expected, "depth"}, str(found)
    assert all(any(word in finding.advice for finding in found.findings) for word in words), str(found)
    assert all(word in str(found) for word in shown), str(found)
    assert "error ratio" not in str(found) or how["solver"] == "tsit5"
    assert "per unit of t" not in str(found)
    contraction = found.summary()[0]["contraction"]
    assert contraction is None if how["solver"] == "tsit5" else contraction == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    ("how", "compiles"),
    [
        ({"solver": "anderson"}, True),
        ({"solver": "tsit5"}, True),
        ({"solver": "newton"}, False),
        ({"solver": "rodas5p"}, False),
        ({"solver": "anderson", "t": 100.0}, False),
    ],
)
def test_compilation_is_advised_where_it_is_possible(how, compiles):
    layer = nde.DeepEquilibrium(Contracting(0.5), **how)
    found = nde.diagnose(layer, torch.ones(4, 2, dtype=torch.float64), show=False)
    (advice,) = [x.advice for x in found.findings if x.kind == "overhead"]
    assert ("nde.compile" in advice) is compiles


def test_steady_states_that_were_not_asked_for_or_are_not_finite():
    x = torch.ones(4, 2, dtype=torch.float64)
    found = nde.diagnose(nde.DeepEquilibrium(Contracting(0.5), pretrain_depth=3), x, show=False)
    assert kinds(found) == [] and "at rest" not in str(found)
    x[1] = float("nan")
    found = nde.diagnose(nde.DeepEquilibrium(Contracting(0.5), on_failure="ignore"), x, show=False)
    assert kinds(found)[0] == "failed" and "at most (at rest up to 0.001), of 3 samples" in str(found)


def test_the_advice_helps():
    """Each piece of it, followed: fewer evaluations at the same tolerance."""
    cases = [
        ("stiff", {"solver": "rodas5p"}),
        ("a jump in t", {"jump_times": [0.37]}),
        ("a tight tolerance", {"solver": "dopri8"}),
    ]
    for trouble, change in cases:
        f, z0, t, how, _, _ = TROUBLES[trouble]
        before, after = (nde.solve(nde.ODE(f), z0, t, **{**how, **x}).stats.nfe.max() for x in ({}, change))
        assert after < 0.8 * before, trouble


def test_a_jump_is_told_from_what_is_smooth():
    """A transient has its steps fall too; its change is gone at the resolution of t."""
    with torch.no_grad():
        f, z0, t, how, *_ = TROUBLES["a sharp transient"]
        assert find_jump(nde.solve(nde.ODE(f), z0, t, **how), 0) is None
        f, z0, t, how, *_ = TROUBLES["a jump in t"]
        where, in_time = find_jump(nde.solve(nde.ODE(f), z0, t, **how), 1)
        assert where == pytest.approx(0.37, abs=1e-12) and in_time
        backwards, _ = find_jump(nde.solve(nde.ODE(f), z0, t[::-1], rtol=1e-6), 1)
        assert backwards == pytest.approx(0.37, abs=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("control", CONTROLS)
def test_every_solver(solver, control):
    torch.manual_seed(0)
    f = nde.TimeChain(nde.AppendTime(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 2)).double()
    found = examine(f, ones(3, 2), control=control, **options(solver, 0.1)).layers[0]
    assert found.nfe > 0 and found.accepted >= 1 and found.steps_per_time.shape == (3,)
    assert 0 < found.f_share <= 1 and found.seconds > 0
    assert (found.error_ratio is not None) == (nde.solvers.get(solver).error_order is not None)
    json.dumps(found.summary())


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_model(adjoint, capsys):
    """Its layers by their names, in the mode it is in, without gradients; and what was set is set again."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model = nn.Sequential(
        nde.NeuralODE(f, adjoint=adjoint), nn.ModuleDict({"inner": nde.NeuralODE(f, rtol=1e-6)})["inner"]
    )
    before = [dict(layer.solve_options) for layer in model]
    found = nde.diagnose(model, ones(3, 2))
    assert [layer.name for layer in found.layers] == ["0", "1"]
    assert [layer.solve_options for layer in model] == before and model.training
    assert not any(layer.solution.final.requires_grad for layer in found.layers)
    assert model[0].solution is found.layers[0].solution
    printed = capsys.readouterr().out
    assert printed == f"{found}\n" and "evaluations of f" in printed and "hardest" in printed


def test_samples_are_told_apart_under_joint_control():
    f, z0, t, how, *_ = TROUBLES["one slow sample, joint"]
    layer = examine(f, z0, t, **how).layers[0]
    assert layer.closer == "tsit5, control='per_sample'" and int(layer.hardest[0]) == 4
    mixing = nn.BatchNorm1d(2).double()
    layer = examine(mixing, torch.randn(6, 2).double(), control="joint").layers[0]
    assert layer.closer is None


def test_a_failing_model_is_diagnosed():
    model = nde.NeuralODE(lambda t, z: z**2, t=(0.0, 2.0))
    found = nde.diagnose(model, torch.tensor([[1.0], [0.1]]), show=False)
    assert "1 of 2 samples (0)" in found.findings[0].what and "on_failure" not in model.solve_options


def test_slow_f_and_cheap_f():
    def slow(t, z):
        w = torch.ones(400, 400)
        return -z + 0 * (w @ w).sum()

    assert "overhead" not in [x.kind for x in nde.diagnose(nde.NeuralODE(slow), torch.ones(2, 1), show=False).findings]
    cheap = nde.diagnose(nde.NeuralODE(lambda t, z: -z), torch.ones(2, 1), show=False)
    assert "overhead" in [x.kind for x in cheap.findings]


def test_bad_input():
    with refused(TypeError, "Module or a Solution", "function", "NeuralODE(f"):
        nde.diagnose(lambda x: x, torch.ones(2, 1))
    with refused(ValueError, "nothing in Linear", "regularizers.torchdiffeq", "attach(model)", "NeuralODE(f"):
        nde.diagnose(nn.Linear(1, 1), torch.ones(2, 1))
    idle = nn.Sequential(nn.Linear(1, 1))
    idle[0].inner = nde.NeuralODE(nn.Linear(1, 1))
    with refused(ValueError, "no layer of Sequential solved"):
        nde.diagnose(idle, torch.ones(2, 1))
    with refused(ValueError, "no inputs"):
        nde.diagnose(nde.solve(nde.ODE(lambda t, z: -z), torch.ones(2, 1), (0.0, 1.0)), torch.ones(2, 1))


# -- what others solve -------------------------------------------------------------------------------------------------


class Turning(nn.Module):
    """A vector field that counts its evaluations, as in torchdiffeq's examples."""

    def __init__(self):
        super().__init__()
        self.net, self.nfe = nn.Linear(2, 2, bias=False).double(), 0
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[-0.1, 8.0], [-8.0, -0.1]]))

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y)


class Theirs(nn.Module):
    """A program of another library's user: solve(f, y)."""

    def __init__(self, solve):
        super().__init__()
        self.f, self.solve = Turning(), solve

    def forward(self, y):
        return self.solve(self.f, y)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_a_program_of_torchdiffeqs(method):
    """Line one, and diagnose sees what torchdiffeq solves, in about its steps (the last ones share what is left)."""
    torchdiffeq, adapter = pytest.importorskip("torchdiffeq"), reg.torchdiffeq
    how = {"rtol": 1e-5, "atol": 1e-5, "method": method, "options": {"step_size": 0.05} if method == "rk4" else {}}

    def model(odeint):
        times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
        return Theirs(lambda f, y: odeint(f, y, times, **how)[-1])

    theirs = model(torchdiffeq.odeint)
    y = torch.randn(4, 2, dtype=torch.float64)
    expected = theirs(y)
    for odeint in (adapter.odeint, adapter.odeint_adjoint):
        ours = model(odeint)
        found = nde.diagnose(ours, y, show=False)
        assert [layer.name for layer in found.layers] == ["f"]
        assert found.layers[0].nfe == pytest.approx(theirs.f.nfe, rel=0.1) and len(found.layers[0].hardest) == 4
        # The same equation: rk4's steps are equal, the others are to the tolerance.
        close(found.layers[0].solution.final, expected, 1e-12 if method == "rk4" else 5e-3)
        if method != "rk4":
            assert any("LocalError" in finding.advice for finding in found.findings)
        # Afterwards all is as before.
        assert torch.equal(ours(y), expected)
    with refused(ValueError, "nothing in Theirs", "regularizers.torchdiffeq"):
        nde.diagnose(theirs, y)


def test_solves_of_a_program_by_the_names_of_their_fields():
    """Of one that is solved again and again the last solve; what is one sample, and what has no batch."""
    adapter, t = reg.torchdiffeq, torch.tensor([0.0, 1.0])
    f, g = nn.Linear(2, 2), nn.Linear(2, 2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"f": f})
            self.layer = nde.NeuralODE(nn.Linear(2, 2))

        def forward(self, y):
            once = adapter.odeint(self.by_f, y, t)
            y = adapter.odeint(self.inner["f"] if once is None else self.by_f, once[-1], t)[-1]
            y, _ = adapter.odeint(self.pair, (y, y[:, :1]), t, rtol=1e-3, atol=1e-3)
            with torch.no_grad():
                nde.solve(nde.ODE(lambda t, y: g(y)), y[-1], (0.0, 1.0))
            return self.layer(y[-1])

        def by_f(self, t, y):
            return self.inner["f"](y)

        def pair(self, t, y):
            return f(y[0]), y[1]

    found = nde.diagnose(Model(), torch.randn(3, 2), show=False)
    names = {layer.name: len(layer.solution.status) for layer in found.layers}
    assert names == {"layer": 3, "by_f": 3, "pair": 1, "<lambda>": 3}


# -- the command -------------------------------------------------------------------------------------------------------

PROGRAM = """
import torch, neuralde as nde
from beside import width
print("the program's own words")
model = nde.NeuralODE(torch.nn.Linear(width, width))
make = lambda: model
x = torch.ones(2, width)
pair = (x,)
broken = torch.ones(2, width + 1)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "beside.py").write_text("width = 3\n")
    path = tmp_path / "slow.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("arguments", [["model"], ["make"], ["model", "--input", "pair"]])
def test_the_command(program, arguments, capsys):
    name, *rest = arguments
    assert cli.main(["diagnose", f"{program}:{name}", *rest]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("layer: tsit5, 2 samples") and "own words" in printed.err


def test_the_command_in_json(program, capsys):
    assert cli.main(["diagnose", f"{program}:model", "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)
    assert layer["solver"] == "tsit5" and layer["samples"] == 2 and layer["nfe"] > 0 and "findings" in layer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["FILE"], "FILE.py:MODEL"),
        (["FILE:3"], "FILE.py:MODEL"),
        (["nowhere.py:model"], "no file 'nowhere.py'"),
        (["FILE:other"], "defines no 'other'"),
        (["FILE:model", "--input", "z"], "defines no 'z'"),
    ],
)
def test_bad_arguments_of_the_command(program, arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["diagnose", *(x.replace("FILE", str(program)) for x in arguments)])
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_a_program_that_fails_is_one_line(program, capsys):
    assert cli.main(["diagnose", f"{program}:model", "--input", "broken"]) == 1
    assert "can't be diagnosed" in capsys.readouterr().err
    program.write_text("raise KeyError('no such thing')")
    assert cli.main(["diagnose", f"{program}:model"]) == 1
    assert capsys.readouterr().err == f"neuralde diagnose: {program} failed: KeyError: 'no such thing'\n"


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ["sosri2", "reversible_heun"])
def test_a_neural_sde(method, control):
    """A stiff drift: what helps is a penalty, and no method that SDEs don't have."""
    sense = nde.solvers.SDE_SOLVERS[method].sde_types[0]
    how = {"solver": method, "control": control, "rtol": 0.3, "atol": 0.3, "seed": 1, "sde_type": sense}
    rate = 400.0 if method == "sosri2" else 1.0
    layer = nde.NeuralSDE(lambda t, z: rate * (torch.cos(t) - z), lambda t, z: 0.01 * z, **how)
    diagnosis = nde.diagnose(layer, ones(3, 2), show=False)
    (found,) = diagnosis.layers
    assert found.nfe > 0 and 0 < found.f_share < 1
    stiff = [finding for finding in diagnosis.findings if finding.kind == "stiff"]
    assert bool(stiff) is (method == "sosri2")
    for finding in stiff:
        assert "LocalStiffness" in finding.advice and "rodas5p" not in finding.advice
