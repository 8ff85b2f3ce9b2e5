"""The command line and its main job."""

import json
import subprocess
import sys

import pytest

from neuralde.experiments import cli


def program(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "neuralde", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    where = tmp_path_factory.mktemp("demo")
    done = program("demo", "--epochs", 2, "--seeds", 1, "--json", "--out", where / "out", cwd=where)
    assert done.returncode == 0, done.stderr
    return done, where / "out"


def test_json_is_all_of_standard_output(short_run):
    done, out = short_run
    result = json.loads(done.stdout)
    assert result == json.loads((out / "result.json").read_text())
    assert "seed 0" in done.stderr, "the progress bar belongs on standard error"
    assert "Warning" not in done.stderr and "INFO" not in done.stderr


def test_rows_are_measured(short_run):
    result = json.loads(short_run[0].stdout)
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == [
        "vanilla",
        "GlobalError",
        "GlobalStiffness",
        "LocalError (unbiased)",
        "LocalError (biased)",
    ]
    for name, row in rows.items():
        assert 0.5 < row["accuracy"] <= 1.0
        assert row["nfe"] > 8 and row["training_seconds"] > 0 and row["prediction_seconds"] > 0
        (history,) = result["history"][name]
        assert len(history["nfe"]) == 2 and history["nfe"][-1] == row["nfe"]
        assert history["training_seconds"][0] < history["training_seconds"][1] == row["training_seconds"]
    assert len({row["nfe"] for row in rows.values()}) == 5
    assert rows["GlobalError"]["nfe"] < 0.75 * rows["vanilla"]["nfe"]
    assert result["finding"].startswith(("GlobalError", "LocalError", "GlobalStiffness", "No penalty"))
    assert result["config"]["seeds"] == [0]
    weights = result["config"]["penalties"]
    assert weights["vanilla"] is None and weights["GlobalError"][0] > weights["GlobalError"][1] > 0
    assert result["config"]["epochs"] == 2 and {"python", "torch", "neuralde"} <= set(result["versions"])


def test_picture_is_saved(short_run):
    assert (short_run[1] / "result.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--epochs", "0"], "--epochs"),
        (["demo", "--seeds", "two"], "--seeds"),
        (["demo", "--device", "nowhere"], "--device"),
        (["demo", "--device", "meta"], "--device"),
        (["demo", "--device", "cuda:999"], "--device cpu"),
        (["demo", "--out", __file__], "--out"),
        (["demo", "--out", f"{__file__}/below"], "--out"),
        (["demo", "--colour"], "--colour"),
        ([], "COMMAND"),
        (["dmeo"], "dmeo"),
    ],
)
def test_bad_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1 and not printed.out


def test_failed_training_is_one_line(monkeypatch, capsys, tmp_path):
    from neuralde.errors import NonFiniteState
    from neuralde.experiments import demo

    def diverge(config):
        raise NonFiniteState("sample 3 is not finite at t = 0.5")

    monkeypatch.setattr(demo, "run", diverge)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "neuralde demo: training failed: sample 3 is not finite at t = 0.5\n"


def test_help_and_version_answer_without_torch(tmp_path):
    code = "import sys; from neuralde.experiments import cli; cli._parser(); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert program("--version", cwd=tmp_path).stdout.startswith("neuralde 0.")


def rows(*values):
    names = ("vanilla", "GlobalError", "LocalError (biased)")
    return [{"model": n, "accuracy": a, "nfe": e} for n, (a, e) in zip(names, values, strict=True)]


def test_finding_says_which_penalty_helped():
    from neuralde.experiments.demo import finding

    text = finding(rows((0.95, 100.0), (0.945, 40.0), (0.96, 60.0)))
    assert text.startswith("GlobalError") and "from 100.0 to 40.0" in text and "0.40" in text
    assert "0.5 points of accuracy lost" in text and "too: LocalError (biased)" in text


def test_finding_passes_over_a_penalty_that_costs_accuracy():
    from neuralde.experiments.demo import finding

    text = finding(rows((0.95, 100.0), (0.90, 20.0), (0.955, 80.0)))
    assert text.startswith("LocalError (biased)") and "gained" in text
    assert "GlobalError" not in text.split(".")[0]


def test_finding_admits_that_none_helped():
    from neuralde.experiments.demo import finding

    assert finding(rows((0.95, 100.0), (0.95, 120.0), (0.5, 30.0))).startswith("No penalty")
