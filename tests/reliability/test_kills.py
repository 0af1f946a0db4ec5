"""A few kills of every scenario; the long run is ``python -m tests.reliability.kills``."""

from __future__ import annotations

import pytest
import torch

import peftk

pytest.importorskip("transformers")

from tests.reliability import kills  # noqa: E402


@pytest.mark.parametrize("name", ["finetune", "save", "quantize", "merge", "paged"])
def test_killed_at_random(name):
    kills.kill_often(name, 2, seed=1)


def test_a_mixture_is_told(tmp_path):
    """A folder whose tensors are of two rounds."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    peftk.attach(model, peftk.LoraConfig(r=8, target_modules=["0", "1"]))
    peftk.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(kills.Broken, match="of several rounds"):
        kills.check_save(tmp_path / "adapter")
