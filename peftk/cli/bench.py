"""peftk bench: `python -m bench` of a checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import peftk
from peftk.cli.errors import UserError

SUMMARY = "time every op and a training step beside the peers, in a checkout"
DESCRIPTION = "Passes everything after its name on to `python -m bench`."
PASSES_ON = True  # flags that this program doesn't know are the command's own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(arguments: argparse.Namespace) -> int:
    """The benches' exit status. UserError where the package stands without them."""
    root = checkout()
    if root is None:
        raise UserError(
            f"the benches belong to a checkout, and the peftk in {Path(peftk.__file__).parent} is an installed one without them:"
            " clone peftk's repository and run  pip install -e '.[test]'  and then  python -m bench  there"
        )
    return subprocess.run([sys.executable, "-m", "bench", *arguments.rest], cwd=root).returncode


def checkout() -> Path | None:
    """The folder that holds this package and its benches."""
    root = Path(peftk.__file__).resolve().parents[1]
    return root if (root / "bench" / "__main__.py").is_file() and (root / "setup.py").is_file() else None
