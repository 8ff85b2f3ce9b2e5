"""The command line. Imports nothing heavy before it knows what to do, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from typing import NoReturn

from .._version import __version__
from . import recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    return options.run(options)


class _Parser(argparse.ArgumentParser):
    """Its errors are one line; the usage is what `--help` is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="neuralde", description="Layers that are differential equations: experiments from the command line."
    )
    parser.add_argument("--version", action="version", version=f"neuralde {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a Neural ODE on scanned digits, with and without solver regularization, and compare",
        description=(
            "Trains the thesis' Neural ODE classifier on scikit-learn's scanned digits: without a penalty and with "
            "each of four, over several seeds. Prints a table and what it shows, and saves it with a picture."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--device", default="cpu", type=_device, help="where to train: cpu, cuda, cuda:1, ...")
    demo.add_argument("--seeds", type=_positive, default=3, metavar="N", help="how many runs of each model")
    demo.add_argument("--epochs", type=_positive, default=8, metavar="N", help="passes over the training data")
    _add_output(demo, "neuralde-demo")
    demo.set_defaults(run=lambda options: _demo(demo, options))
    run = commands.add_parser(
        "run",
        help="run an experiment of the papers, and check what they found",
        description="Runs an experiment of the papers. `neuralde run NAME --help` tells its options.",
        epilog="experiments:\n" + "\n".join(f"  {name:16} {what}" for name, (_, what) in recipe.RECIPES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("name", choices=recipe.RECIPES, metavar="NAME", help="of the experiment")
    run.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its options")
    run.set_defaults(run=_run)
    _add_diagnose(commands)
    return parser


def _add_diagnose(commands) -> None:
    diagnose = commands.add_parser(
        "diagnose",
        help="say where a model's solvers work hard, and which penalty or solver that suggests",
        description=(
            "Runs a Python file, calls the model that it defines, and prints what its solvers did: evaluations, steps, "
            "rejections, the hardest samples, stiffness, the share of time in f, and what stands out."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    diagnose.add_argument(
        "target",
        type=_target,
        metavar="FILE.py:MODEL",
        help="the file, and the name of the model (or of what makes it)",
    )
    diagnose.add_argument(
        "--input",
        default="x",
        metavar="NAME",
        help="what the model is called with, in the file; a tuple is several things",
    )
    diagnose.add_argument("--json", action="store_true", help="print JSON on standard output, and nothing else there")
    diagnose.set_defaults(run=lambda options: _diagnose(diagnose, options))


def _add_output(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out), metavar="DIR", help="where to save to")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
    )


def _run(options: argparse.Namespace) -> int:
    module_name, what = recipe.RECIPES[options.name]
    module = importlib.import_module(module_name)
    parser = _Parser(
        prog=f"neuralde run {options.name}",
        description=f"{what[0].upper()}{what[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    recipe.add_options(parser, module.Config)
    _add_output(parser, f"neuralde-{options.name}")
    given = parser.parse_args(options.rest)
    try:
        config = recipe.configured(module.Config, given)
    except ValueError as error:
        parser.error(str(error))
    if hasattr(config, "device"):
        _check_device(parser, config.device)
    _check_out(parser, given.out)

    from ..errors import NeuralDEError

    command = shlex.join(["neuralde", "run", options.name, *options.rest])
    try:
        result = module.run(config)
    except FileNotFoundError as error:
        parser.error(str(error))
    except NeuralDEError as error:
        print(f"{parser.prog}: the experiment failed: {error}", file=sys.stderr)
        return 1
    files = recipe.save(options.name, config, result, command, given.out)
    if given.json:
        json.dump(recipe.summary(options.name, config, result, command), sys.stdout, indent=2)
        print()
    else:
        recipe.show(result)
        print("Saved: " + ", ".join(map(str, files)))
    return 0


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return text


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    _check_device(parser, options.device)
    _check_out(parser, options.out)

    from ..errors import NeuralDEError
    from . import demo

    config = demo.Config(device=options.device, seeds=options.seeds, epochs=options.epochs)
    try:
        result = demo.run(config)
    except NeuralDEError as error:
        print(f"{parser.prog}: training failed: {error}", file=sys.stderr)
        return 1
    files = demo.save(result, options.out)
    if options.json:
        json.dump(result.summary(), sys.stdout, indent=2)
        print()
    else:
        demo.show(result)
        print("Saved: " + ", ".join(map(str, files)))
    return 0


def _target(text: str) -> tuple[pathlib.Path, str]:
    path, colon, name = text.rpartition(":")
    if not colon or not path or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be FILE.py:MODEL, got {text!r}")
    if not pathlib.Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path!r}")
    return pathlib.Path(path), name


def _diagnose(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    import contextlib
    import runpy

    path, name = options.target
    sys.path.insert(0, str(path.resolve().parent))  # what the file imports may stand beside it
    # What the file prints is not the diagnosis.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            scope = runpy.run_path(str(path), run_name="__diagnosed__")
        except Exception as error:
            print(f"{parser.prog}: {path} failed: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    for wanted in (name, options.input):
        if wanted not in scope:
            parser.error(f"{path} defines no {wanted!r}")

    from torch import nn

    from ..diagnose import diagnose
    from ..errors import NeuralDEError

    model, inputs = scope[name], scope[options.input]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            if not isinstance(model, nn.Module) and callable(model):
                model = model()
            diagnosis = diagnose(model, *inputs, show=False)
        except (TypeError, ValueError, RuntimeError, NeuralDEError) as error:
            print(f"{parser.prog}: {name} of {path} can't be diagnosed: {error}", file=sys.stderr)
            return 1
    if options.json:
        json.dump(diagnosis.summary(), sys.stdout, indent=2)
        print()
    else:
        print(diagnosis)
    return 0


def _check_device(parser: argparse.ArgumentParser, device: str) -> None:
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"argument --device: {device!r} can't be used here ({reason}); --device cpu always works")


def _check_out(parser: argparse.ArgumentParser, out: pathlib.Path) -> None:
    """Makes the directory and writes into it, so that minutes of training are not lost for want of a place."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except FileExistsError:
        parser.error(f"argument --out: {out} is a file; name a directory")
    except OSError as error:
        parser.error(f"argument --out: can't write to {out} ({error.strerror})")
