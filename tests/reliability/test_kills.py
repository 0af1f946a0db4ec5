"""A few kills of every scenario; the long run is ``python -m tests.reliability.kills``."""

from __future__ import annotations

import pytest
import torch

import peftk

pytest.importorskip("transformers")

from tests.reliability import kills, no_room  # noqa: E402


@pytest.mark.parametrize("name", ["finetune", "save", "quantize", "merge", "paged"])
def test_killed_at_random(name):
    kills.kill_often(name, 2, seed=1)


def test_what_a_kill_left_is_cleared(tmp_path):
    """Of a file under way, and of a run that had only its checkpoints to remove."""
    kills.make_inputs(tmp_path)
    out, checkpoint = tmp_path / "out", tmp_path / "out" / "checkpoints" / "step-000006"
    no_room.stopped_run(tmp_path, out)
    (out / ".run.json.0123abcd.tmp").write_text("{")
    (out / ".adapter.saved.0123abcd.tmp").mkdir()
    no_room.finetune(tmp_path, out)
    finished = sorted(path.name for path in out.iterdir())
    assert not [name for name in finished if name.endswith(".tmp")]
    checkpoint.mkdir(parents=True)
    no_room.finetune(tmp_path, out)
    assert sorted(path.name for path in out.iterdir()) == finished


def test_a_mixture_is_told(tmp_path):
    """A folder whose tensors are of two rounds."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    peftk.attach(model, peftk.LoraConfig(r=8, target_modules=["0", "1"]))
    peftk.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(kills.Broken, match="of several rounds"):
        kills.check_save(tmp_path / "adapter")
