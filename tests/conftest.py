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
