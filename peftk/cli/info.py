"""peftk info: which implementations run on this machine, and why the others don't."""

from __future__ import annotations

import argparse

import peftk

SUMMARY = "what runs on this machine, and why not"
DESCRIPTION = "Lists the implementations of peftk's operations that run on this machine and the reasons against the others."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def run(arguments: argparse.Namespace) -> None:
    """Print ``peftk.info()``."""
    print(peftk.info())
