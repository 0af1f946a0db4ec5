"""bitsandbytes with peftk in its place, for one test."""

from __future__ import annotations

import pytest

from peftk.integrations import bitsandbytes as backend
from peftk.native import native, why_not_native


@pytest.fixture
def bnb():
    """The package, taken over while the test runs, and as it was afterwards."""
    package = pytest.importorskip("bitsandbytes")
    if native() is None:
        pytest.skip(why_not_native())
    backend.enable()
    yield package
    backend.disable()
