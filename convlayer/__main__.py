"""The command line: convlayer compare | explain | doctor, or python -m convlayer."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from convlayer import __version__
from convlayer.command_line import doctor
from convlayer.command_line.load import WANTED, LoadError, load_layer

OPTIONAL = ("matplotlib", "tqdm")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the status with which the process should end."""
    options = _parser().parse_args(arguments)
    return {"compare": _compare, "explain": _explain, "doctor": _doctor}[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convlayer", description="CVXPY problems as differentiable torch layers."
    )
    parser.add_argument("--version", action="version", version=f"convlayer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare", help="the kernels against the cone program: time, agreement, memory, a picture"
    )
    compare.add_argument(
        "--quick",
        action="store_true",
        help="smaller problems, fewer runs: seconds in place of a minute",
    )
    compare.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    compare.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    compare.add_argument(
        "--out", default="out", help="folder for compare.png and compare.json (default: out)"
    )
    explain = commands.add_parser(
        "explain", help="which path a problem takes and why, and what it costs"
    )
    explain.add_argument(
        "target",
        metavar="FILE:PROBLEM",
        help=f"a Python file, and in it {WANTED}",
    )
    explain.add_argument(
        "--batch", type=int, default=1, help="rows for which the cost is given (default: 1)"
    )
    commands.add_parser(
        "doctor", help="versions, devices, and whether everything computes what it should"
    )
    return parser


def _compare(options: argparse.Namespace) -> int:
    try:
        compare = import_module("convlayer.command_line.compare")
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in OPTIONAL:
            raise
        return _refuse(f"compare needs {missing.name}: pip install 'convlayer[examples]'")
    return compare.compare(
        quick=options.quick, device=options.device, dtype=options.dtype, out=options.out
    )


def _explain(options: argparse.Namespace) -> int:
    if options.batch < 1:
        return _refuse(f"--batch must be at least 1; got {options.batch}.")
    try:
        layer = load_layer(options.target)
    except LoadError as error:
        return _refuse(str(error))
    print(layer.explain(batch=options.batch))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    return doctor.examine()


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
