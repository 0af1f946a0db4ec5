"""A sample of every way in which there is no room; the long run is ``python -m tests.reliability.no_room``."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("transformers")

from tests.reliability import no_room, places  # noqa: E402

COMBINATIONS = [(n, way) for n, way in itertools.product(no_room.WRITERS, no_room.WAYS) if way in no_room.WRITERS[n].ways]
QUICK = [("save_adapter", way) for way in no_room.WAYS[:3]] + [("paged", way) for way in no_room.WAYS[1:]]


@pytest.mark.parametrize(("name", "way"), QUICK)
def test_refused_whole_and_gone_on(name, way):
    _try(name, way, (0,))


@pytest.mark.full
@pytest.mark.parametrize(("name", "way"), COMBINATIONS)
def test_from_no_room_to_enough(name, way):
    _try(name, way, no_room.LITTLE_MEMORY if way == "memory limit" else no_room.LITTLE)


def _try(name, way, rooms):
    if way in ("full disk", "read-only") and (why := places.why_no_mounts()):
        pytest.skip(f"no mounts here: {why}")
    no_room.try_all(name, way, rooms)


def test_a_writer_that_leaves_half_a_file_is_told(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.1234.tmp").write_text("half")
    with pytest.raises(AssertionError, match="left behind"):
        no_room.check_left(no_room.WRITERS["save_adapter"], tmp_path / "out")
