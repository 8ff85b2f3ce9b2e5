"""What every test starts from."""

import matplotlib
import pytest
import torch

matplotlib.use("Agg")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The states in the tests are small: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(_one_thread):
    torch.manual_seed(0)


# The continuous adjoints share their backward solve: in the ordinary run "backsolve" stands for them in the tests over
# all adjoints, and their own tests (test_continuous_adjoints.py) have all of them.
_LIKE_BACKSOLVE = ("interpolating", "quadrature")


def pytest_collection_modifyitems(items):
    for item in items:
        adjoint = getattr(item, "callspec", None) and item.callspec.params.get("adjoint")
        if adjoint in _LIKE_BACKSOLVE and item.path.name != "test_continuous_adjoints.py":
            item.add_marker(pytest.mark.slow)
