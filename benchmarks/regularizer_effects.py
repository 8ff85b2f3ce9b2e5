"""What every regularizer does to the digits classifier: NFE and accuracy after training, time and memory of a step."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import AliveBytes, in_turns, median_ratio, parser, revision, spread, write
from torch import nn

import regularizers as reg
from neuralde.experiments import demo
from neuralde.experiments.data import digits
from neuralde.experiments.training import train

# The weights of errors and stiffness are the demo's, chosen on these digits; the others are first guesses, not tuned.
ERROR = functools.partial(reg.exponential, 30.0, 3.0)
LOCAL = functools.partial(reg.exponential, 1e6, 4e5)
VARIANTS: dict[str, Callable[[int], reg.Regularizer] | None] = {
    "none": None,
    "GlobalError (ER)": lambda steps: reg.GlobalError(ERROR(steps)),
    "GlobalStiffness (SR)": lambda steps: reg.GlobalStiffness(1.0),
    "LocalError, unbiased": lambda steps: reg.LocalError("unbiased", LOCAL(steps)),
    "LocalError, biased": lambda steps: reg.LocalError("biased", LOCAL(steps)),
    "LocalStiffness, unbiased": lambda steps: reg.LocalStiffness("unbiased", 0.3),
    "LocalStiffness, biased": lambda steps: reg.LocalStiffness("biased", 0.3),
    "Steer": lambda steps: reg.Steer(0.5),
    "TaylorDerivative(2)": lambda steps: reg.TaylorDerivative(2, 1e-2),
    "TaylorDerivative(3)": lambda steps: reg.TaylorDerivative(3, 1e-3),
    "KineticEnergy": lambda steps: reg.KineticEnergy(1e-2),
    "JacobianFrobenius": lambda steps: reg.JacobianFrobenius(1e-2),
    "KineticEnergy + JacobianFrobenius": lambda steps: reg.KineticEnergy(1e-2) + reg.JacobianFrobenius(1e-2),
    "Steer + ER": lambda steps: reg.Steer(0.5) + reg.GlobalError(ERROR(steps)),
    "Steer + SR": lambda steps: reg.Steer(0.5) + reg.GlobalStiffness(1.0),
    "SR + ER": lambda steps: reg.GlobalStiffness(1.0) + reg.GlobalError(ERROR(steps)),
}
THREADS = 1
PARTS = ("steps", "trainings")


def trained(config: demo.Config, name: str, seed: int) -> dict:
    """Accuracy and NFE on the test digits after training."""
    data = digits(torch.float64)
    torch.manual_seed(seed)
    model = demo.make_model(config)
    steps = config.epochs * -(-len(data.train_x) // config.batch)
    make = VARIANTS[name]
    penalty = None if make is None else make(steps).prepare(model)
    history = train(model, model[0], penalty, data, config.epochs, config.batch, config.rate, lambda: None)
    found = {"accuracy": history.accuracy[-1], "nfe": history.nfe[-1]}
    return {"regularizer": name, "seed": seed, "epochs": config.epochs, **found}


def steps_of(config: demo.Config, names: list[str], backward: bool = True) -> dict[str, Callable[[], None]]:
    """One training step of every variant, of the same model on the same batch; or the forward half of it."""
    data = digits(torch.float64)
    x, y = data.train_x[: config.batch], data.train_y[: config.batch]

    def made(name: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = demo.make_model(config)
        penalty = None if VARIANTS[name] is None else VARIANTS[name](1).prepare(model)

        seeds = itertools.count()  # other end times, times and noise in every round, and the same for all variants

        def step():
            torch.manual_seed(next(seeds))
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss = loss if penalty is None else loss + penalty(model)
            if backward:
                loss.backward()

        return step

    return {name: made(name) for name in names}


def peak(step: Callable[[], None]) -> int:
    """Bytes that a step has alive at most."""
    step()
    gc.collect()
    with AliveBytes() as counted:
        step()
    return counted.peak


# -- the parts ---------------------------------------------------------------------------------------------------------


def steps_measured(config: demo.Config, names: list[str], rounds: int) -> list[dict]:
    """Time and memory of a step of every variant: what needs a quiet machine."""
    steps = steps_of(config, names)
    seconds = in_turns(steps, rounds, least=0.0)
    memory = {name: peak(step) for name, step in steps.items()}
    ahead = {name: peak(step) for name, step in steps_of(config, names, backward=False).items()}
    return [
        {
            "regularizer": name,
            "ms per step": 1e3 * statistics.median(seconds[name]),
            "times none's": median_ratio(seconds[name], seconds["none"]),
            "spread": spread(seconds[name]),
            "peak of a step (MB)": memory[name] / 1e6,
            "of its forward half (MB)": ahead[name] / 1e6,
        }
        for name in names
    ]


def all_trained(config: demo.Config, names: list[str], seeds: int) -> list[dict]:
    """The trainings, whose numbers don't depend on who else computes."""
    runs = []
    for seed in range(seeds):
        for name in names:
            runs.append(trained(config, name, seed))
            print(runs[-1], file=sys.stderr)
    return runs


def kept(folder: Path, part: str, made: list[dict]):
    """Writes a part beside the results, with the commit that it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"regularizer_effects_{part}.json").open("w") as file:
        json.dump({"software": revision(), "rows": made}, file, indent=1)


def joined(folder: Path) -> tuple[list[dict], list[dict]]:
    """(steps, trainings) of the parts that were made before.

    Raises:
        ValueError: a part is of another commit.
    """
    found = []
    for part in PARTS:
        held = json.loads((folder / f"regularizer_effects_{part}.json").read_text())
        if held["software"] != revision():
            raise ValueError(f"the {part} are of {held['software']}, and this is {revision()}: make them again")
        found.append(held["rows"])
    return tuple(found)


def table(steps: list[dict], runs: list[dict]) -> list[dict]:
    """A row of both parts for every variant."""
    rows = []
    for measured in steps:
        mine = [run for run in runs if run["regularizer"] == measured["regularizer"]]
        accuracy, nfe = ([run[what] for run in mine] for what in ("accuracy", "nfe"))
        rows.append(
            {
                "regularizer": measured["regularizer"],
                "test NFE": statistics.fmean(nfe),
                "± NFE": statistics.stdev(nfe) if len(nfe) > 1 else None,
                "accuracy (%)": f"{100 * statistics.fmean(accuracy):.1f}",
                "± points": 100 * statistics.stdev(accuracy) if len(accuracy) > 1 else None,
                **{what: value for what, value in measured.items() if what != "regularizer"},
            }
        )
    return rows


def main():
    """Trains, measures, prints a table and writes it to results/."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="trainings of each variant")
    options.add_argument("--epochs", type=int, default=8, help="of each training")
    options.add_argument("--rounds", type=int, default=41, help="measurements of the time of a step, at least 7")
    options.add_argument(
        "--part",
        choices=("all", *PARTS, "table"),
        default="all",
        help="steps: times alone, a minute on a quiet machine; trainings: on any; table: of both, at the same commit",
    )
    options.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    given = options.parse_args()
    if given.rounds < 7:
        options.error("--rounds must be at least 7")
    torch.set_num_threads(THREADS)
    config = demo.Config(epochs=given.epochs)
    names = list(dict.fromkeys(["none", *given.only]))
    if given.part in ("all", "steps"):
        kept(given.results, "steps", steps_measured(config, names, given.rounds))
    if given.part in ("all", "trainings"):
        kept(given.results, "trainings", all_trained(config, names, given.seeds))
    if given.part not in ("all", "table"):
        return
    steps, runs = joined(given.results)
    epochs, seeds = ({run[what] for run in runs} for what in ("epochs", "seed"))
    notes = [
        f"The demo's classifier of scikit-learn's digits: 65-{config.hidden}-64 tanh field with time, tsit5 at rtol = "
        f"atol = {config.tolerance}, float64, checkpointed adjoint; {epochs.pop()} epochs of Adam, batch "
        f"{config.batch}; mean and sample standard deviation over {len(seeds)} seeds.",
        "A step is the forward pass, the penalty and the backward pass of a fresh model on one batch: the same NFE for "
        "all but Steer, which draws another end time in every round. Training gets faster as NFE falls.",
        "Memory is that of the tensors alive at once. Where it is the same for several penalties, the solve's own "
        "backward pass has the peak; the forward half, the penalty's included, tells them apart.",
        "`--part steps` and `--part trainings` make the parts at different times, the steps on a quiet machine; "
        "`--part table` joins them if they are of one commit.",
    ]
    per_step = {row["regularizer"]: row["ms per step"] for row in steps}
    fine = [run | {"ms_per_step": per_step[run["regularizer"]]} for run in runs]
    write(given.results, "regularizer_effects", table(steps, runs), str(THREADS), notes, fine=fine)
    for part in PARTS:
        (given.results / f"regularizer_effects_{part}.json").unlink()


if __name__ == "__main__":
    main()
