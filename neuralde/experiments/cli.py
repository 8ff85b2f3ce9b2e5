"""The command line. Imports nothing heavy before it knows what to do, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import NoReturn

from .._version import __version__


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
    demo.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("neuralde-demo"), metavar="DIR", help="where to save to"
    )
    demo.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
    )
    demo.set_defaults(run=lambda options: _demo(demo, options))
    return parser


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
