"""The frame of the experiments: options from a configuration, what is saved, and the data that they read."""

import gzip
import hashlib
import json
import pathlib
import re
import sys
import types
from dataclasses import dataclass

import pytest
from helpers import refused

from neuralde.experiments import cli, data, recipe


@dataclass(frozen=True)
class Config:
    epochs: int = recipe.option(3, "passes over the data")
    rate: float = recipe.option(0.5, "step size")
    kind: str = recipe.option("plain", "what is trained", choices=("plain", "other"))
    widths: tuple[int, ...] = recipe.option((4, 8), "of the layers")
    shuffle: bool = recipe.option(True, "whether the order changes")
    data: pathlib.Path | None = recipe.option(None, "where the data are")

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")


def run(config):
    if config.data is not None:
        data.mnist(config.data)
    trials = {"a": [{"nfe": 1.0}, {"nfe": 2.0}], "b": [{"nfe": float(config.epochs), "loss": 0.25}]}
    columns = {"nfe": recipe.Column("NFE"), "loss": recipe.Column("loss (%)", 100.0, 2)}
    with recipe.progress(2) as bar:
        bar.say("half")
        bar.advance()
    findings = [recipe.Finding("a uses 1.5", True), recipe.Finding("b uses more", False), recipe.Finding("so be it")]
    return recipe.Result("Two models", columns, trials, findings, {"seeds": [0, 1]})


@pytest.fixture
def tiny(monkeypatch):
    module = types.ModuleType("tiny_recipe")
    module.Config, module.run = Config, run
    module.draw = lambda result, path: path.write_bytes(b"picture")
    monkeypatch.setitem(sys.modules, "tiny_recipe", module)
    monkeypatch.setitem(recipe.RECIPES, "tiny", ("tiny_recipe", "two models and their figures"))
    return module


def test_options_are_the_fields_of_the_configuration(tiny, tmp_path, capsys):
    given = ["--epochs", "7", "--kind", "other", "--widths", "1", "2", "3", "--no-shuffle", "--json"]
    assert cli.main(["run", "tiny", *given, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "result.json").read_text())
    assert found["config"] == {
        "epochs": 7, "rate": 0.5, "kind": "other", "widths": [1, 2, 3], "shuffle": False, "data": None,
    }  # fmt: skip
    assert found["command"].startswith("neuralde run tiny --epochs 7 --kind other")
    assert found["rows"][0] == {
        "model": "a", "runs": 2, "nfe": 1.5, "nfe_spread": pytest.approx(0.5**0.5), "loss": None, "loss_spread": None,
    }  # fmt: skip
    assert found["rows"][1]["loss"] == 0.25 and found["rows"][1]["nfe"] == 7.0
    assert found["seeds"] == [0, 1] and "torch" in found["versions"]
    assert [x["holds"] for x in found["findings"]] == [True, False, None]


def test_table_and_files(tiny, tmp_path, capsys):
    assert cli.main(["run", "tiny", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1.5 ± 0.7" in said and "25.00" in said
    assert "PASS: a uses 1.5" in said and "FAIL: b uses more" in said and "so be it" in said
    page = (tmp_path / "result.md").read_text()
    assert "| a | 1.5 ± 0.7 |  |" in page and "`neuralde run tiny" in page and "FAIL: b uses more" in page
    assert (tmp_path / "result.png").read_bytes() == b"picture"
    del tiny.draw
    assert cli.main(["run", "tiny", "--out", str(tmp_path / "other")]) == 0
    assert not (tmp_path / "other" / "result.png").exists()


def test_a_wide_table_is_whole_where_nobody_looks(capsys):
    columns = {name: recipe.Column(f"a long heading {name}", 1.0, 3) for name in "abcdefgh"}
    trials = {"model": [dict.fromkeys(columns, 577.125 + k) for k in range(2)]}
    findings = [recipe.Finding("a sentence that goes on " * 9)]
    recipe.show(recipe.Result("title", columns, trials, findings))
    said = capsys.readouterr().out
    assert said.count("577.625 ± 0.707") == 8 and "…" not in said
    assert findings[0].text.strip() in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "unknown"], "invalid choice: 'unknown'"),
        (["run", "tiny", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["run", "tiny", "--epochs", "many"], "invalid int value"),
        (["run", "tiny", "--kind", "third"], "invalid choice"),
        (["run", "tiny", "--speed", "9"], "unrecognized arguments"),
        (["run", "tiny", "--data", "nowhere"], "name the directory with MNIST's four idx files"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "said",
)
def test_mistakes_are_one_line(tiny, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert re.match("neuralde run.*: error: ", last) and said in last


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_mnist_is_checked(tmp_path, monkeypatch, zipped):
    files = {
        "train-images-idx3-ubyte": bytes(16) + bytes(range(256)) * 49,  # 16 images
        "train-labels-idx1-ubyte": bytes(8) + bytes(range(16)),
        "t10k-images-idx3-ubyte": bytes(16) + bytes([255]) * 784,
        "t10k-labels-idx1-ubyte": bytes(8) + bytes([9]),
    }
    for name, content in files.items():
        monkeypatch.setitem(data._MNIST, name, hashlib.sha256(content).hexdigest())
        path = tmp_path / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    split = data.mnist(tmp_path)
    assert split.train_x.shape == (16, 784) and split.train_x[0, 255] == 1.0 and split.train_x[0, 51] == 0.2
    assert split.train_y.tolist() == list(range(16)) and split.test_y.tolist() == [9]
    assert bool((split.test_x == 1.0).all())
    monkeypatch.setitem(data._MNIST, "t10k-labels-idx1-ubyte", "0" * 64)
    with refused(ValueError, "is not MNIST's t10k-labels-idx1-ubyte", "SHA-256"):
        data.mnist(tmp_path)
