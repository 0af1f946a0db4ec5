from __future__ import annotations

import pytest

from peftk.cli.loss import LanguageModelLoss
from peftk.planner import Machine, Step, plan
from peftk.planner.narrow import config_of_part


@pytest.mark.parametrize(
    ("facts", "gpus", "message"),
    [
        ({}, 4, "gpus: expected a divisor of num_key_value_heads = 2 with tensor parallelism, got 4"),
        ({}, 2, "rows are whole blocks of 64 elements, got 96 columns in model.layers.0.mlp.down_proj"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 256}, 4, "got 32 columns in .*o_proj"),
    ],
)
def test_what_cannot_be_split(blueprint, facts: dict, gpus: int, message: str):
    with pytest.raises(ValueError, match=message):
        plan(blueprint(**facts), LanguageModelLoss, Step(2, 32), Machine(gpus=gpus, sharding="tp"))


def test_heads_keep_their_size(blueprint):
    part = config_of_part(blueprint().config, 2)
    assert (part.num_attention_heads, part.num_key_value_heads, part.intermediate_size, part.head_dim) == (2, 1, 96, 32)
    assert part.hidden_size == 128 and blueprint().config.num_attention_heads == 4
    part.base_model_tp_plan = None
    with pytest.raises(ValueError, match="a plan for tensor parallelism"):
        config_of_part(part, 2)
