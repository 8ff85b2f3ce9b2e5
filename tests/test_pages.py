"""What the pages show works: the notebooks run, and so does the code of README and docs."""

import pathlib
import re
import subprocess

import pytest
import torch

import neuralde as nde

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))


BRIEF = ("01", "04")  # of the others each takes up to a minute


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[] if p.stem.startswith(BRIEF) else [pytest.mark.slow]) for p in NOTEBOOKS],
    ids=lambda p: p.stem,
)
def test_notebook_runs(path, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_executed_with_pictures(path):
    nbformat = pytest.importorskip("nbformat")
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code)
    assert sum("image/png" in o.get("data", {}) for c in code for o in c.outputs) >= 2
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]


def code_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_readme_code_runs(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    scope = {}
    blocks = code_of("README.md")
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, scope)
    assert scope["solution"].zs.shape == (11, 8, 2)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in scope["model"].parameters())


def test_interop_code_runs():
    pytest.importorskip("torchdyn.core")
    scope = {}
    for block in code_of("docs/interop.md"):
        exec(block, scope)
    assert scope["y"].shape == (11, 8, 2) and scope["z"].shape == (8, 2)
    assert all(p.grad is not None for p in (*scope["f"].parameters(), *scope["correction"].parameters()))


def test_deep_equilibria_page_runs(monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *args: None)
    scope = {}
    for block in code_of("docs/deep-equilibria.md"):
        exec(block, scope)
    assert bool(scope["solution"].converged.all())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in scope["model"].parameters())


def test_existing_code_page_runs():
    pytest.importorskip("torchdyn.core")
    scope = {}
    for block in code_of("docs/regularize-existing-code.md"):
        exec(block, scope)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in scope["f"].parameters())
    assert all(bool(p.grad.any()) for p in scope["sde"].parameters())


def test_a_side_output_is_a_component_of_the_state():
    w = torch.tensor(0.7, requires_grad=True)
    scope = {"nde": nde, "f": lambda t, z: -w * z, "z0": torch.ones(8, 2)}
    (block,) = code_of("docs/which-adjoint.md")
    exec(block, scope)
    energy = w * (1 - torch.exp(-2 * w))  # ∫ |w·z|² dt from 0 to 1, with z = exp(-w·t) twice
    torch.testing.assert_close(scope["penalty"], energy, rtol=1e-3, atol=0)
    gradients = (torch.autograd.grad(x, w)[0] for x in (scope["penalty"], energy))
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=0)


def test_interop_page_names_every_method():
    from neuralde.interop._methods import METHODS

    page = (ROOT / "docs" / "interop.md").read_text()
    assert all(f"`{name}`" in page for name in METHODS)


def test_ci_runs_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m 1 -E '([^']*)'", script).group(1)
    found = [line for line in readme.splitlines() if re.search(pattern, line)]
    assert found == ["pip install '.[test]' && pytest -n 2"]
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
