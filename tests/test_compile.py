"""torch.compile and torch.export: whole graphs, forward and backward, and no recompiling for every batch size."""

from __future__ import annotations

import copy

import pytest
import torch
from distributed.models import TOKENS, adamw, decoder, train
from torch._dynamo.utils import counters

import peftk

# Older torch breaks the graph at the number that is drawn for a seed, without this.
SEED_IN_GRAPH = {} if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else {"capture_scalar_outputs": True}
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def ids(rows: int, columns: int = 9) -> torch.Tensor:
    return torch.randint(0, TOKENS, (rows, columns), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["nf4", pytest.param("dense", marks=pytest.mark.full)])
def test_training_step_is_one_graph(backend, base):
    """QLoRA with dropout, whose seed is drawn inside the graph, and gradient checkpointing."""
    config = peftk.LoraConfig(r=8, target_modules="all-linear", exclude_modules="head", lora_dropout=0.2)
    model = decoder(config, base)
    model.checkpointing = True
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    losses = []
    with torch._inductor.config.patch(fallback_random=True), torch._dynamo.config.patch(SEED_IN_GRAPH):
        for run, owner in ((model, model), (compiled, twin)):
            torch.manual_seed(5)
            losses.append(train(run, ids(2), adamw(owner), 2))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_third_batch_size_compiles_nothing():
    model = decoder()
    compiled, graphs = torch.compile(model, backend="aot_eager", fullgraph=True), []
    for rows in (2, 3, 4, 6, 7):
        compiled(ids(rows)).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2, 2]


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.logits(tokens)


def test_export_of_an_inference_model(tmp_path):
    model = Logits(decoder().eval())
    sizes = {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("columns", min=2, max=64)}
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (ids(2),), dynamic_shapes=(sizes,)), tmp_path / "model.pt2")
        exported = torch.export.load(tmp_path / "model.pt2").module()
        assert torch.equal(exported(ids(5, 13)), model(ids(5, 13)))


def llama(checkpointing: bool = False) -> torch.nn.Module:
    tf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": TOKENS}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, max_position_embeddings=32, initializer_range=0.2, use_cache=False))
    config = peftk.LoraConfig(r=8, target_modules="all-linear")
    peftk.qlora(model, config, gradient_checkpointing=checkpointing, progress=False)
    with torch.no_grad():
        for parameter in peftk.trainable_parameters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model.train()


def steps(model: torch.nn.Module) -> torch.Tensor:
    return train(lambda tokens: model(input_ids=tokens, labels=tokens).loss, ids(2), adamw(model), 2)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_decoder_layers_of_transformers(backend):
    """Each layer one graph, checkpointing inside it."""
    model = llama(checkpointing=True)
    expected = steps(copy.deepcopy(model))
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(steps(model), expected, rtol=1e-5, atol=0)
    assert not counters["graph_break"]


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_model_of_transformers(backend):
    """Loss and checkpointing inside one graph; for this peftk.qlora keeps transformers' hooks on the embeddings out of it."""
    model = llama(checkpointing=True)
    expected = steps(copy.deepcopy(model))
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    torch.testing.assert_close(steps(model), expected, rtol=1e-5, atol=0)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_generation(backend):
    """transformers' generate with a static cache: prompt and single tokens are two graphs, whatever the length."""
    model, prompt = llama().eval(), ids(2, 5)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True)
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    options = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static", "use_cache": True}
    assert torch.equal(model.generate(prompt, max_new_tokens=6, **options), expected)
    assert counters["stats"]["unique_graphs"] == 2
