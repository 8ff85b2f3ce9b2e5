"""What the experiments of the papers are made of: a configuration, a table, and what the table shows.

A recipe is a module with a dataclass `Config`, whose fields are the options on its command line, a function
`run(config) -> Result`, and, where there is a picture, `draw(result, path)`. `RECIPES` gives it its name.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import pathlib
import platform
import statistics
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

# name -> (module, what it shows)
RECIPES: dict[str, tuple[str, str]] = {
    "mnist-deq-fc": (
        "neuralde.experiments.mnist_deq_fc",
        "fully connected DEQs on digits or MNIST, the papers' Table 1",
    ),
    "mnist-nsde": ("neuralde.experiments.mnist_nsde", "the thesis' Neural SDE classifier, regularized every way"),
    "polynomial": ("neuralde.experiments.polynomial", "polynomial regression with DEQs, Skip DEQs and Skip Reg. DEQs"),
    "spiral-sde": ("neuralde.experiments.spiral_sde", "a Neural SDE fitted to the moments of the thesis' spiral SDE"),
    "synthetic-deq": ("neuralde.experiments.synthetic_deq", "Jacobian regularization of a DEQ of one number"),
}


def option(default, help: str, choices: Sequence | None = None):
    """A field of a `Config`.

    Args:
        default: its value where the command line says nothing. help: what it is, for `--help`.
        choices: the values that it may have, or None for any.
    """
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Column:
    """How a figure is shown: its heading, the factor that it is shown with, and the number of decimals."""

    heading: str
    factor: float = 1.0
    places: int = 1

    def cell(self, mean: float | None, spread: float | None = None) -> str:
        """The figure as text, with its spread where there is one."""
        if mean is None:
            return ""
        text = f"{self.factor * mean:.{self.places}f}"
        return text if spread is None else f"{text} ± {self.factor * spread:.{self.places}f}"


@dataclass(frozen=True)
class Finding:
    """A sentence about the table.

    Attributes:
        text: with the numbers. holds: whether what a paper found holds here; None for a plain remark.
    """

    text: str
    holds: bool | None = None

    def __str__(self) -> str:
        return self.text if self.holds is None else f"{'PASS' if self.holds else 'FAIL'}: {self.text}"


@dataclass
class Result:
    """What a recipe found.

    Attributes:
        title: of the table. columns: its figures by name, in their order.
        trials: row -> the figures of every run of it, as a rule one per seed. A figure may be missing or None.
        findings: what the table shows. details: what else is saved, as JSON has it.
        picture: what `draw` needs and nobody saves.
    """

    title: str
    columns: dict[str, Column]
    trials: dict[str, list[dict[str, float | None]]]
    findings: list[Finding] = field(default_factory=list)
    details: dict = field(default_factory=dict)
    picture: object = None

    def rows(self) -> list[dict]:
        """One row per model: the mean and the spread over its runs of every column. See `mean_and_spread`."""
        return [mean_and_spread(name, trials, self.columns) for name, trials in self.trials.items()]

    def row(self, name: str) -> dict:
        """The row of that name."""
        return mean_and_spread(name, self.trials[name], self.columns)


def mean_and_spread(name: str, trials: Sequence[dict], columns: Sequence[str]) -> dict:
    """A row of a table: {"model": name, "runs": ..., column: mean, column_spread: sample standard deviation, ...}.

    Either is None where there are too few numbers.
    """
    row: dict = {"model": name, "runs": len(trials)}
    for column in columns:
        values = [trial[column] for trial in trials if trial.get(column) is not None]
        row[column] = statistics.fmean(values) if values else None
        row[f"{column}_spread"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def versions() -> dict[str, str]:
    """Of what the numbers depend on, as far as it is imported."""
    found = {"python": platform.python_version()}
    for name in ("torch", "neuralde", "torchsde", "torchdiffeq", "torchdyn"):
        module = sys.modules.get(name)
        if getattr(module, "__version__", None):
            found[name] = module.__version__
    return found


class Bar(typing.NamedTuple):
    """A progress bar: `say` what comes next, `advance` when a part is done."""

    say: Callable[[str], None]
    advance: Callable[[], None]


@contextlib.contextmanager
def progress(total: int) -> Iterator[Bar]:
    """A progress bar of so many parts, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<30}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=total)
        yield Bar(lambda text: bar.update(task, description=text), lambda: bar.advance(task))


# -- what is shown and saved ------------------------------------------------------------------------------------------


def console_for(table):
    """Standard output, where it is no terminal as wide as the table: a figure that is cut is none."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        wide = console.options.update(max_width=10_000)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    return console


def show(result: Result) -> None:
    """Prints the table and the findings on standard output."""
    from rich.table import Table

    table = Table(title=result.title)
    table.add_column("model", no_wrap=True)
    for column in result.columns.values():
        table.add_column(column.heading, justify="right")
    for cells in _cells(result):
        table.add_row(*cells)
    console = console_for(table)
    console.print(table)
    for finding in result.findings:
        console.print(str(finding), highlight=False, markup=False, soft_wrap=True)


def _cells(result: Result) -> Iterator[list[str]]:
    for row in result.rows():
        yield [row["model"], *(c.cell(row[name], row[f"{name}_spread"]) for name, c in result.columns.items())]


def summary(name: str, config, result: Result, command: str) -> dict:
    """What is saved and what `--json` prints."""
    return {
        "recipe": name,
        "command": command,
        "config": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(config).items()},
        "rows": result.rows(),
        "trials": result.trials,
        "findings": [dataclasses.asdict(finding) for finding in result.findings],
        "versions": versions(),
        **result.details,
    }


def save(name: str, config, result: Result, command: str, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes result.json, result.md and, if the recipe draws one, result.png into a directory; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    numbers, page, picture = (out / f"result.{ending}" for ending in ("json", "md", "png"))
    found = summary(name, config, result, command)
    numbers.write_text(json.dumps(found, indent=2) + "\n")
    heads = ["model", *(column.heading for column in result.columns.values())]
    lines = [f"# {result.title}", "", f"`{command}`", "", _line(heads), _line(["---"] * len(heads))]
    lines += [_line(cells) for cells in _cells(result)]
    lines += ["", *(f"- {finding}" for finding in result.findings), ""]
    used = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [f"Mean ± sample standard deviation over the runs. {used}; {platform.machine()}."]
    page.write_text("\n".join(lines) + "\n")
    draw = getattr(importlib.import_module(RECIPES[name][0]), "draw", None)
    if draw is None:
        return [numbers, page]
    draw(result, picture)
    return [numbers, page, picture]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# -- the command line -------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Makes every field of a `Config` an option: numbers, words, switches, paths, and tuples of numbers or words."""
    kinds = typing.get_type_hints(config)
    for each in dataclasses.fields(config):
        how: dict = {"default": each.default, "help": each.metadata["help"], "choices": each.metadata["choices"]}
        kind = kinds[each.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        if typing.get_origin(kind) is tuple:
            how |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": each.name.rstrip("s").upper()}
        elif kind is bool:
            how = {"default": each.default, "help": each.metadata["help"], "action": argparse.BooleanOptionalAction}
        else:
            how |= {"type": kind, "metavar": None if how["choices"] else each.name.upper()}
        parser.add_argument("--" + each.name.replace("_", "-"), **how)


def configured(config: type, options: argparse.Namespace):
    """The `Config` that the options give.

    Raises:
        ValueError: the configuration refuses them.
    """
    given = {each.name: getattr(options, each.name) for each in dataclasses.fields(config)}
    return config(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()})
