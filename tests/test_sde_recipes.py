"""The experiments on Neural SDEs at a tiny size: what they train, what they count and what they find."""

import json

import pytest
import torch
from helpers import refused

import neuralde as nde
from neuralde.experiments import cli, mnist_nsde, recipe, spiral_sde

SPIRAL = [
    "--seeds",
    "1",
    "--iterations",
    "2",
    "--trajectories",
    "4",
    "--predictions",
    "2",
    "--paths",
    "50",
    "--times",
    "3",
]
DIGITS = ["--epochs", "1", "--batch", "16", "--train-samples", "32", "--test-samples", "10", "--trajectories", "2"]


@pytest.mark.parametrize(
    ("name", "given", "variants"),
    [("spiral-sde", SPIRAL, spiral_sde.VARIANTS), ("mnist-nsde", DIGITS, mnist_nsde.VARIANTS)],
    ids=["spiral-sde", "mnist-nsde"],
)
def test_recipe_runs(name, given, variants, tmp_path, capsys):
    assert cli.main(["run", name, *given, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["rows"]] == list(variants)
    for row in found["rows"]:
        assert row["nfe"] >= 8 and row["training_seconds"] > 0 and row["prediction_seconds"] > 0
    if name == "spiral-sde":  # shorter than the thesis'
        assert all(x["holds"] is None for x in found["findings"])
        assert sum(x["text"].startswith("not judged at this length") for x in found["findings"]) == 2
    else:
        assert any(x["holds"] is not None for x in found["findings"])
    assert (tmp_path / "result.png").stat().st_size > 10_000
    assert f"neuralde run {name} --" in (tmp_path / "result.md").read_text()


def test_the_spiral_is_learned():
    config = spiral_sde.Config(iterations=20, trajectories=10, paths=200, times=3, tolerance=1.0)
    data = spiral_sde.truth(config)
    torch.manual_seed(0)
    layer = spiral_sde.make_layer(config)
    before = spiral_sde._evaluate(config, layer, data)[0]["loss"]
    nfe, _ = spiral_sde._train(config, layer, None, data, lambda: None)
    assert len(nfe) == 20
    assert spiral_sde._evaluate(config, layer, data)[0]["loss"] < 0.7 * before


def test_the_spiral_s_moments():
    """At small t, mean and variance are those of one Euler-Maruyama step, up to O(t)."""
    z0, t = spiral_sde.starts(4000, "cpu"), 1e-3
    zs = nde.solve(spiral_sde.spiral(), z0, torch.tensor([0.0, t], dtype=z0.dtype), seed=1, rtol=0.1, atol=0.1).zs
    found = spiral_sde.moments(zs)
    mean = torch.tensor([2.0 - 0.8 * t, -16.0 * t], dtype=z0.dtype)
    # Three standard deviations of the estimates: of the mean 0.4·√(t/4000), of the variance relative √(2/4000).
    assert (found.mean[1] - mean).abs().max() < 3 * 0.4 * (t / 4000) ** 0.5 + 20 * t**2
    assert found.variance[1, 0].item() == pytest.approx(0.16 * t, rel=3 * (2 / 4000) ** 0.5 + 10 * t)
    assert found.variance[1, 1] < 0.01 * found.variance[1, 0]


def test_adabelief_is_the_paper_s():
    p = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = spiral_sde.AdaBelief([p], lr=0.1)
    q, m, s = p.detach().clone(), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(1, 4):
        optimizer.zero_grad()
        (p**3).sum().backward()
        optimizer.step()
        g = 3 * q**2
        m = 0.9 * m + 0.1 * g
        s = 0.999 * s + 0.001 * (g - m) ** 2 + 1e-8
        q = q - 0.1 * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), q)


def test_predictions_are_means_over_trajectories_in_evaluation_alone():
    torch.manual_seed(0)
    model, x = mnist_nsde.Classifier(6, "sosri", 0.5, trajectories=3), torch.rand(4, 6)
    assert model(x).shape == (4, 10) and len(model.layer.solution.status) == 4
    model.eval()
    torch.manual_seed(1)
    logits = model(x)
    assert len(model.layer.solution.status) == 12
    torch.manual_seed(1)
    zs = model.layer(model.encoder(x), trajectories=3)
    torch.testing.assert_close(logits, model.head(zs).mean(dim=0))


def test_the_classifier_is_the_papers_size():
    assert sum(p.numel() for p in mnist_nsde.Classifier(784, "sosri", 0.14, 10).parameters()) == 30_698


@pytest.mark.parametrize(
    ("nfe", "accuracy", "holds"),
    [
        ({"local unbiased": 75.0, "local biased": 90.0}, 0.95, True),
        ({"local unbiased": 85.0, "local biased": 90.0}, 0.95, False),
        ({"local unbiased": 75.0, "local biased": 75.0}, 0.93, False),
    ],
    ids=["fewer", "too many", "too inaccurate"],
)
def test_the_finding_is_checked(nfe, accuracy, holds):
    trials = {name: [{"nfe": 100.0, "accuracy": 0.95}] for name in mnist_nsde.VARIANTS}
    trials |= {name: [{"nfe": value, "accuracy": accuracy}] for name, value in nfe.items()}
    found = mnist_nsde.findings(recipe.Result("", mnist_nsde.COLUMNS, trials), 10)
    assert found[0].holds is holds and "local unbiased" in found[0].text


@pytest.mark.parametrize(
    ("config", "argument"),
    [(spiral_sde.Config, "seeds"), (spiral_sde.Config, "paths"), (mnist_nsde.Config, "train_samples")],
    ids=["seeds", "paths", "train_samples"],
)
def test_sizes_are_checked(config, argument):
    with refused(ValueError, argument, "got 0"):
        config(**{argument: 0})
