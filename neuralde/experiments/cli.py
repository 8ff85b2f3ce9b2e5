"""The command line. Imports nothing heavy before it knows what to do, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    demo.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1, ...")
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


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is a file; name a directory")
    import torch

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {options.device!r} can't be used here ({str(error).splitlines()[0]})")

    from . import demo

    config = demo.Config(device=options.device, seeds=options.seeds, epochs=options.epochs)
    result = demo.run(config)
    files = demo.save(result, options.out)
    if options.json:
        json.dump(result.summary(), sys.stdout, indent=2)
        print()
    else:
        demo.show(result)
        print("Saved: " + ", ".join(map(str, files)))
    return 0
