"""A few kills of every scenario; the long run is ``python -m tests.reliability.kills``."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.reliability import kills  # noqa: E402


@pytest.mark.parametrize("name", ["finetune", "save", "quantize", "merge", "paged"])
def test_killed_at_random(name):
    kills.kill_often(name, 2, seed=1)


def test_a_broken_state_is_told(tmp_path):
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000003" / "training.pt").write_bytes(b"half")
    with pytest.raises(Exception, match="training.pt|pickle|corrupt|magic|Weights only"):
        kills.check_finetune(tmp_path)
