"""What every test starts from, and which tests the ordinary run has."""

import collections
import warnings

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


@pytest.fixture
def silent():
    """Nothing may be solved otherwise than compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


# The continuous adjoints share their backward solve: in the ordinary run "backsolve" stands for them in the tests over
# all adjoints, and their own tests (test_continuous_adjoints.py) have all of them.
_LIKE_BACKSOLVE = ("interpolating", "quadrature")
# Explicit methods with fixed steps are one class with other numbers: in tests over solvers and something else, "euler"
# and "rk4" stand for them, but where the numbers are what is tested.
_LIKE_RK4 = ("midpoint", "heun", "ralston", "heun3", "rk4_38")
_NUMBERS = ("test_orders.py", "test_gradients.py", "test_stiffness.py")
# Backward Euler takes many small steps: in tests over solvers and something else, the other stiff methods stand for it,
# but where the numbers are what is tested.
_LIKE_ROSENBROCK = ("implicit_euler",)
# What takes longest of the tests over solvers and controls, and shows the same under per-sample control.
_LONG_JOINT = ("test_against_direct", "test_gradients", "test_error_follows_the_tolerance")
_LONG = ("implicit_euler", "rosenbrock23", "rodas5p", "auto", "vcab3")


def pytest_collection_modifyitems(items):
    tests = collections.defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None) is not None:
            tests[item.path, item.cls, item.originalname].append(item)
    for combinations in tests.values():
        for item in _every_other(combinations):
            item.add_marker(pytest.mark.slow)
        for item in combinations:
            given, where = item.callspec.params, item.path.name
            if given.get("adjoint") in _LIKE_BACKSOLVE and where != "test_continuous_adjoints.py":
                item.add_marker(pytest.mark.slow)
            # Methods for SDEs have these names too.
            noisy = "sense" in given and not {"control", "adjoint"} & given.keys()
            if (
                given.get("solver") in (*_LIKE_RK4, *_LIKE_ROSENBROCK)
                and len(given) > 1
                and where not in _NUMBERS
                and not noisy
            ):
                item.add_marker(pytest.mark.slow)
            long = given.get("solver", given.get("name")) in _LONG and given.get("control") == "joint"
            if long and item.originalname in _LONG_JOINT:
                item.add_marker(pytest.mark.slow)


def _every_other(combinations):
    """Half of the combinations of three and more parameters: the other half meets every pair of their values.

    (Whatever two of them are, a third one has values of both parities.)
    """
    places = [0] * len(combinations)
    several = 0
    for mark in combinations[0].iter_markers("parametrize"):
        names = mark.args[0]
        name = names.split(",")[0].strip() if isinstance(names, str) else names[0]
        values = [id(item.callspec.params[name]) for item in combinations]
        order = {value: i for i, value in enumerate(dict.fromkeys(values))}
        several += len(order) > 1
        places = [place + order[value] for place, value in zip(places, values, strict=True)]
    return [item for item, place in zip(combinations, places, strict=True) if several >= 3 and place % 2]
