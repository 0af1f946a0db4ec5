"""What of other packages peftk has replaced: ``peftk.info()`` lists it, and each replacement can be put back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

_hooks: dict[str, Callable[[], str]] = {}  # by package
_replacements: dict[str, Replacements] = {}  # by package; those that are in force


class Replacements:
    """The functions and kernels of one package that peftk stands in for, from ``hold`` to ``put_back``."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.names: list[str] = []  # in the order in which they were replaced
        self.left: dict[str, str] = {}  # what was asked for and isn't replaced: why
        self._originals: list[tuple[Any, str, Any]] = []
        self._library: torch.library.Library | None = None

    def attribute(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """``owner.name`` becomes ``make(owner.name)``."""
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self._originals.append((owner, name, original))
        self.names.append(f"{owner.__name__}.{name}")

    def kernel(self, op: str, run: Callable[..., Any], key: str = "CPU") -> None:
        """``run`` becomes the kernel of ``<package>::<op>`` for a dispatch key. The dispatcher keeps the one before beneath it,
        and it is back as soon as ours is gone."""
        if self._library is None:
            self._library = torch.library.Library(self.package, "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*previously registered kernel")
            over(self._library, op, run, key)
        self.names.append(self.name(op, key))

    def leave(self, op: str, key: str, reason: str) -> None:
        """The op's kernel stays the package's own: ``peftk.info()`` says why."""
        self.left[self.name(op, key)] = reason

    def name(self, op: str, key: str) -> str:
        return f"torch.ops.{self.package}.{op} ({key})"

    def hold(self) -> None:
        """All of them are in force: ``listed`` names them."""
        _replacements[self.package] = self

    def put_back(self) -> None:
        """Everything as it was before."""
        if self._library is not None:
            self._library._destroy()
            self._library = None
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()
        self.names.clear()
        self.left.clear()
        _replacements.pop(self.package, None)


def over(library: torch.library.Library, op: str, run: Callable[..., Any], key: str) -> None:
    """Register over a kernel that Python registered before. Where torch has no argument that allows it (before 2.9 or so), its
    list of Python kernels is what refuses a second one, so ours is left out of it."""
    if "allow_override" in inspect.signature(library.impl).parameters:
        library.impl(op, run, key, allow_override=True)
        return
    entry, listed = f"{library.ns}/{op}/{key}", torch.library._impls
    was_there = entry in listed
    listed.discard(entry)
    library.impl(op, run, key)
    library._op_impls.discard(entry)  # what the library takes off the list when it goes: the first kernel's entry stays
    if not was_there:
        listed.discard(entry)


def held(package: str) -> Replacements | None:
    """What is replaced of a package, if anything is."""
    return _replacements.get(package)


def tell(package: str, status: Callable[[], str]) -> None:
    """``hooks`` has the package from now on, by what ``status()`` says then."""
    _hooks[package] = status


def hooks() -> dict[str, str]:
    """By package, of those of which nothing is replaced: what peftk does with it, or why it doesn't, and how to change that."""
    return {package: status() for package, status in _hooks.items()}


def listed() -> dict[str, tuple[str, ...]]:
    """Dotted names of what is replaced, by package."""
    return {package: tuple(held.names) for package, held in _replacements.items()}


def left() -> dict[str, dict[str, str]]:
    """Dotted names of what was asked for and isn't replaced, with the reasons, by package."""
    return {package: dict(held.left) for package, held in _replacements.items() if held.left}
