"""Tiny random models that the tests of the methods share, and their twins in HF peft with the same adapter weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors


class Net(nn.Module):
    """An embedding, two linear blocks with different names, and a head; no transformers."""

    def __init__(self, width: int = 32, tokens: int = 11):
        super().__init__()
        self.embed = nn.Embedding(tokens, width, padding_idx=0)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(width, width), "v": nn.Linear(width, 48)}) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(48, width, bias=False) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer, out in zip(self.layers, self.out, strict=True):
            x = x + out(torch.tanh(layer["v"](torch.tanh(layer["q"](x)))))
        return self.head(self.norm(x))


def net_batch() -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))}


def _transformers():
    return pytest.importorskip("transformers")


def llama(**changes) -> nn.Module:
    """Grouped-query attention: 4 heads, 2 of keys and values."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    facts = {"num_key_value_heads": 2, "max_position_embeddings": 32, "attention_bias": True, "initializer_range": 0.2, **changes}
    tf = _transformers()
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **facts))


def gpt2() -> nn.Module:
    tf = _transformers()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32, "initializer_range": 0.2}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def bert() -> nn.Module:
    tf = _transformers()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            **sizes,
            num_labels=3,
            initializer_range=0.2,
            max_position_embeddings=32,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
    )


def t5() -> nn.Module:
    tf = _transformers()
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, dropout_rate=0, decoder_start_token_id=0, pad_token_id=0))


def mixtral() -> nn.Module:
    """A mixture of four fused experts, two a token; 3-D weights (experts, n, k)."""
    tf = _transformers()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    facts = {"num_key_value_heads": 2, "max_position_embeddings": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **facts, initializer_range=0.2))


def gpt_oss() -> nn.Module:
    """The same with 3-D weights (experts, k, n), biases, and gate and up interleaved."""
    tf = _transformers()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    facts = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "num_local_experts": 4, "pad_token_id": 0}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = tf.GptOssForCausalLM(
        tf.GptOssConfig(**sizes, **facts, num_experts_per_tok=2, initializer_range=0.2, rope_parameters=rope)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                parameter.normal_(0, 0.2)  # zero, as transformers makes them, would hide a mistake
    return model


MIXTURES = {"mixtral": mixtral, "gpt_oss": gpt_oss}
MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "net": Net}


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Inputs for one of MODELS."""
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": torch.tensor([0, 2]) if kind == "bert" else ids}
    return net_batch() if kind == "net" else inputs


def run(model: nn.Module, kind: str) -> torch.Tensor:
    """The model's logits."""
    y = model(**batch(kind))
    return y if isinstance(y, torch.Tensor) else y.logits


def weight_grads(model: nn.Module, kind: str) -> torch.Tensor:
    """Backward from a loss in which every logit has a weight of its own; returns the logits."""
    y = run(model, kind)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach()


def net(base: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    return peftk.quantize_model(model, skip=("head",), progress=False) if base == "nf4" else model


def trained(model: nn.Module) -> nn.Module:
    """As after some steps: every trainable parameter moved."""
    with torch.no_grad():
        for parameter in peftk.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return run(model, "net")


def fill(model: nn.Module, name: str = "default", scale: float = 0.1, seed: int = 3) -> nn.Module:
    """Random values into everything that the adapter trains: a zero B would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def state_of(model: nn.Module) -> tuple:
    """All that must be as before when something failed: modules, bytes, flags, mode."""
    modules = [(path, id(module), module.training) for path, module in model.named_modules()]
    return modules, snapshot(model), [(n, p.requires_grad) for n, p in model.named_parameters()], "_peftk_adapters" in vars(model)


def assert_same_state(before: tuple, after: tuple) -> None:
    assert before[0] == after[0] and before[2:] == after[2:]
    assert before[1].keys() == after[1].keys()
    for key, value in before[1].items():
        assert torch.equal(value, after[1][key]), key


def hf_model(model: nn.Module, fields: dict, config: str = "LoraConfig") -> nn.Module:
    """HF peft's model on a copy of ``model``."""
    hf = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.get_peft_model(copy.deepcopy(model), getattr(hf, config)(**fields))


def twins(model: nn.Module, fields: dict, config: str = "LoraConfig") -> tuple[nn.Module, nn.Module]:
    """(ours, HF peft's) with equal, random adapter weights; the keys of the files must be equal for that."""
    hf = pytest.importorskip("peft")
    theirs = hf_model(model, fields, config)
    ours = fill(peftk.attach(model, getattr(peftk, config)(**fields)))
    tensors = {key: value.detach().clone() for key, value in adapter_tensors(ours, "default").items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = set(hf.get_peft_model_state_dict(theirs, save_embedding_layers=False))
        assert {key for key in saved if ".original_module." not in key} == set(tensors)
        hf.set_peft_model_state_dict(theirs, tensors)
    return ours, theirs


def gradients_of_hf(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """By the keys of the file, of the parameters that are trained."""
    return {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
