"""Which layers go into 4 bits: those that quantize_model takes, where the checkpoint has them and transformers can tell."""

from __future__ import annotations

import tiny_models
import torch

import peftk
from peftk.streaming.skeleton import Names, dense_layers, layers_to_quantise, skeleton, tied


def names_of(model):
    return dict(model.named_parameters(remove_duplicate=False))


def test_the_layers_that_quantize_model_takes():
    for kind in ("llama", "gpt2", "bert"):
        made = tiny_models.MODELS[kind]()
        made.config.architectures = [type(made).__name__]
        model = skeleton(made.config)
        assert type(model) is type(made) and all(p.is_meta for p in model.parameters())
        found = layers_to_quantise(model, ("classifier",), names_of(model))
        peftk.quantize_model(made, skip=("lm_head", "classifier"), progress=False)
        assert found == [path for path, module in made.named_modules() if isinstance(module, peftk.nn.NF4Linear)]


def test_what_stays_dense_is_listed():
    model = skeleton(tiny_models.mixtral().config)
    found = layers_to_quantise(model, ("layers.0",), names_of(model))
    assert found and all(".layers.1.self_attn." in path for path in found)
    dense = dense_layers(model, found)
    assert "model.layers.1.mlp.experts" in dense and "lm_head" in dense and "model.layers.0.self_attn.q_proj" in dense
    without = [name for name in names_of(model) if not name.endswith("1.self_attn.k_proj.weight")]
    assert "model.layers.1.self_attn.k_proj" not in layers_to_quantise(model, (), without)


def test_a_name_that_hides_another_keeps_it_dense():
    """transformers matches ends of paths: to it "proj" among the dense ones means "q_proj" too."""
    model = torch.nn.Module()
    model.proj, model.q_proj, model.up = (torch.nn.Linear(4, 4) for _ in range(3))
    assert layers_to_quantise(model, ("proj",), names_of(model)) == ["up"]


def test_names_and_ties():
    model = skeleton(tiny_models.gpt2().config)
    names = Names.of(model)
    assert names.of_model("h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"
    assert names.of_model("transformer.h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"
    assert names.of_model("stranger") == "stranger"
    assert tied(model)["lm_head.weight"] == ["transformer.wte.weight", "lm_head.weight"]
