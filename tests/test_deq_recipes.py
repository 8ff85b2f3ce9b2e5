"""The recipes on deep equilibria, at sizes that a test can afford."""

import json
import warnings

import pytest
import torch
from helpers import refused

import neuralde as nde
from neuralde.experiments import cli, equilibria, mnist_deq_fc, polynomial, recipe, synthetic_deq

TINY = {
    "polynomial": ["--epochs", "2", "--batch", "256", "--width", "8", "--seeds", "2"],
    "synthetic-deq": ["--epochs", "1", "--batch", "1024", "--seeds", "5"],
    "mnist-deq-fc": ["--epochs", "1", "--batch", "64", "--width", "32", "--seeds", "1"],
}


@pytest.mark.parametrize("name", TINY)
def test_runs_and_saves(name, tmp_path, capsys):
    assert cli.main(["run", name, *TINY[name], "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "result.png").stat().st_size > 10_000
    assert len(found["rows"]) == (3 if name == "synthetic-deq" else 6)
    for row in found["rows"]:
        assert all(row[what] is not None for what in row if not what.endswith("_spread"))
        shares = [row[what] for what in row if what.endswith("converged")]
        assert shares and all(0.0 <= share <= 1.0 for share in shares)
    assert all(len(found["trials"][row["model"]]) == row["runs"] for row in found["rows"])
    assert any(x["holds"] is not None for x in found["findings"])
    if name != "synthetic-deq":
        assert {len(run["nfe"]) for runs in found["history"].values() for run in runs} == {found["config"]["epochs"]}


def test_a_run_is_reproducible():
    config = polynomial.Config(seeds=1, epochs=1, batch=256, width=16)
    first, second = (polynomial.run(config).trials for _ in range(2))
    for row in first:
        assert first[row][0]["loss"] == second[row][0]["loss"] and first[row][0]["nfe"] == second[row][0]["nfe"]
    assert first["DEQ"][0]["loss"] != first["DEQ, Jacobian"][0]["loss"]


def test_rows_are_what_they_say():
    config = mnist_deq_fc.Config()
    models = {row: equilibria.make_model(config, each, 784, 10) for row, each in equilibria.VARIANTS.items()}
    count = {row: sum(p.numel() for p in model.parameters()) for row, model in models.items()}
    # Table 1 of the paper: 134K and 151K (the exact numbers are those of its code).
    assert count["DEQ"] == count["Skip Reg. DEQ"] == 134_538 and count["Skip DEQ"] == 151_050
    for row, each in equilibria.VARIANTS.items():
        penalty, layer = equilibria.make_penalty(config, each), models[row][2]
        names = [] if penalty is None else [type(part).__name__ for part in penalty.parts]
        assert ("Skip" in names) == ("Skip" in row) and ("EquilibriumJacobian" in names) == ("Jacobian" in row)
        x = torch.rand(4, 784)
        loss = models[row](x).square().mean()
        if penalty is not None:
            loss = loss + penalty(layer)
        loss.backward()
        assert all(p.grad is not None for p in models[row].parameters())


def test_nfe_counts_the_first_step():
    layers = {
        row: equilibria.make_model(mnist_deq_fc.Config(), each, 4, 2) for row, each in equilibria.VARIANTS.items()
    }
    for row in ("DEQ", "Skip Reg. DEQ"):
        model, calls = layers[row], []
        handle = model[2].f.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            model(torch.rand(3, 4))
        handle.remove()
        assert model[2].solution.stats.nfe.double().mean() == model[2].solution.stats.function_calls == len(calls)


def test_synthetic_slope_and_steady_state():
    f = synthetic_deq.Map(50)
    assert sum(p.numel() for p in f.parameters()) == 200  # as the paper says
    with torch.no_grad():
        f.state.weight.fill_(1.0)
        f.input.weight.fill_(1.0)
        f.input.bias.fill_(0.0)
        f.out.weight.fill_(0.01)  # f(z, x) = relu(z + x) / 2, at rest at z = x > 0
    x = torch.rand(16, 1) + 0.5
    figures = synthetic_deq.measured(f, x, x)
    assert figures["slope"] == pytest.approx(0.5) and figures["loss"] < 1e-4
    assert figures["anderson_converged"] == figures["fixed_point_converged"] == 1.0
    assert figures["anderson"] < figures["fixed_point"]  # linear: a secant is exact


def test_backward_systems_that_are_not_solved_are_counted():
    config = mnist_deq_fc.Config(epochs=1, batch=32, width=8, max_steps=5)
    x, y = torch.rand(64, 4), torch.randint(2, (64,))
    task = equilibria.Task(x, y, x, y, 2, torch.nn.functional.cross_entropy, mnist_deq_fc.accuracy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures, _ = equilibria._trial(config, task, equilibria.VARIANTS["DEQ"], 0, "accuracy", lambda: None)
    assert 0.0 <= figures["unsolved"] <= 1.0

    def backward():
        warnings.warn("systems were not solved", nde.SolveWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="something else") as caught:
        assert equilibria._inaccurate(backward)
    assert len(caught) == 1 and not equilibria._inaccurate(lambda: None)


def test_a_sample_that_does_not_get_there_costs_the_limit():
    f = synthetic_deq.Map(2)
    with torch.no_grad():
        f.state.weight.fill_(1.0)
        f.input.weight.fill_(0.0)
        f.input.bias.fill_(1.0)
        f.out.weight.fill_(1.0)  # f(z, x) = 2 relu(z + 1): runs away from 0
    figures = synthetic_deq.measured(f, torch.zeros(3, 1), torch.zeros(3, 1))
    assert figures["fixed_point"] == 201.0 and figures["fixed_point_converged"] == 0.0


def test_pairs_of_runs_are_compared():
    def result(values):
        rows = {"a": [0.0] * len(values), "b": values}
        return recipe.Result("", {}, {row: [{"x": v} for v in runs] for row, runs in rows.items()})

    def holds(*values):
        return synthetic_deq.falls(result(values), "x", "x", "a", "b").holds

    assert holds(-1, -1, -1, -1, -100) is True and holds(-1, -1, -1, 1, -100) is False
    assert holds(-1, -1, -1) is None


def test_collapsed_layers_are_named():
    rows = {"DEQ": [{"depth": 9.0}], "Skip Reg. DEQ": [{"depth": 0.2}]}
    (remark,) = equilibria.collapsed(recipe.Result("", {"depth": recipe.Column("depth")}, rows))
    assert remark.holds is None and "collapsed: Skip Reg. DEQ." in remark.text
    del rows["Skip Reg. DEQ"]
    assert not equilibria.collapsed(recipe.Result("", {"depth": recipe.Column("depth")}, rows))


def test_findings_can_fail():
    columns = {"nfe": recipe.Column("NFE"), "loss": recipe.Column("loss"), "depth": recipe.Column("depth")}
    rows = {"DEQ": 20.0, "Skip DEQ": 9.0, "Skip Reg. DEQ": 18.0}
    result = recipe.Result(
        "", columns, {row: [{"nfe": nfe, "loss": 1.0, "depth": 1.0, "converged": 1.0}] for row, nfe in rows.items()}
    )
    assert [x.holds for x in polynomial.findings(result)] == [True, False, None]
    # A solve that gave up is not what others save against; and what makes no step saves nothing.
    result.trials["DEQ"].append({"nfe": 300.0, "loss": 1.0, "depth": 100.0, "converged": 0.0})
    saved, failed, _ = polynomial.findings(result)
    assert saved.holds and not failed.holds and "1 of 2 runs of DEQ" in saved.text
    result.trials["Skip DEQ"][0]["depth"] = 0.4
    saved = polynomial.findings(result)[0]
    assert not saved.holds and "collapsed" in saved.text


@pytest.mark.parametrize(
    ("module", "given", "said"),
    [
        (polynomial, {"epochs": 0}, "epochs must be at least 1, got 0"),
        (mnist_deq_fc, {"tolerance": 0.0}, "tolerance must be positive, got 0.0"),
        (mnist_deq_fc, {"skip": -1.0}, "skip must be at least 0, got -1.0"),
        (synthetic_deq, {"gammas": (2.0, 0.0)}, "gammas must be at least 0 and in rising order"),
        (synthetic_deq, {"probability": 1.5}, "probability must be from 0 to 1, got 1.5"),
    ],
    ids=lambda x: getattr(x, "__name__", "").rpartition(".")[2] or ("said" if isinstance(x, str) else "-".join(x)),
)
def test_refuses(module, given, said):
    with refused(ValueError, said):
        module.Config(**given)
