from __future__ import annotations

import json

import pytest
import torch

from peftk.planner.geometries import GEOMETRIES, config_of, is_uniform, skeleton

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-7b", 6.738), ("llama-13b", 13.016), ("llama-33b", 32.529), ("llama-65b", 65.286), ("gpt3-175b", 174.6)]
    + [("tinyllama-1.1b", 1.100), ("smollm2-135m", 0.1345)],
)
def test_parameters(name: str, billions: float):
    model = skeleton(config_of(name), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters()) and is_uniform(model.config)


def test_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**GEOMETRIES["smollm2-135m"], "num_hidden_layers": 3}))
    assert config_of(tmp_path).num_hidden_layers == 3


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="llama-8b: expected a folder with a config.json or one of llama-7b, llama-13b"):
        config_of("llama-8b")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path}: "):
        config_of(tmp_path)
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="expected the config of a causal language model, got one of whisper"):
        skeleton(transformers.WhisperConfig(), torch.bfloat16)
