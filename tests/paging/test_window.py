"""The policy alone: what leaves, what stays."""

from __future__ import annotations

import weakref

import pytest

from peftk.paging.window import Chunk, Window


class Owner:
    pass


OWNER = Owner()


def chunks(count: int) -> list[Chunk]:
    return [Chunk(i, i, weakref.ref(OWNER)) for i in range(count)]


def walk(window: Window, order: list[Chunk], steps: int) -> int:
    """Use each in turn, ``steps`` times over; how many had to be brought in in the last step."""
    brought = 0
    for _ in range(steps):
        brought = 0
        for chunk in order:
            if not chunk.resident:
                window.expel(window.victims(1, {chunk}))
                window.admit([chunk])
                brought += 1
            window.use([chunk])
            assert len(window.chunks) <= window.most
    return brought


@pytest.mark.parametrize(("count", "most", "least"), [(10, 5, 5), (10, 9, 1), (10, 10, 0), (30, 10, 20), (7, 1, 7)])
def test_a_step_that_repeats_brings_in_little_more_than_has_no_room(count: int, most: int, least: int):
    """LRU would bring in all of them, every time."""
    brought = walk(Window(most), chunks(count), 6)
    assert least <= brought <= least + 1 + count // most


def test_before_a_period_is_known_the_least_recently_used_leaves():
    window, (a, b, c) = Window(2), chunks(3)
    for chunk in (a, b, a):
        window.admit([chunk])
        window.use([chunk])
    a.period = 0
    assert window.victims(1, {c}) == [b]


def test_what_is_no_longer_used_leaves():
    window, many = Window(4), chunks(6)
    gone, rest = many[0], many[1:]
    walk(window, [gone, *rest[:3]], 3)
    walk(window, rest, 4)
    assert not gone.resident


def test_chunks_in_use_or_protected_stay():
    window, (a, b, c) = Window(2), chunks(3)
    window.admit([a, b])
    a.in_use = 1
    assert window.victims(1, {b, c}) is None
    assert window.victims(1, {c}) == [b]
    assert window.victims(2, {c}) is None
    assert Window(None).victims(100, set()) == []
