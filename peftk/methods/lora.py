"""LoRA (Hu et al. 2021): y = W x + scale * B A dropout(x), W frozen, A (r, k) and B (n, r) trained.

scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). A is Kaiming-uniform and B zero, so that training starts at W.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftk.methods.adapter import AdapterLayer, ModuleToSave, Wrapper
from peftk.methods.targets import names_match, pattern_value, select
from peftk.nn import base_layer, is_adaptable
from peftk.nn.dense_linear import add_low_rank

# Fields of HF peft's file that say nothing about what is computed, or only together with a field that is refused below.
_INFORMATIVE = {
    "peft_type", "peft_version", "auto_mapping", "revision", "runtime_config", "qalora_group_size", "loftq_config",
    "megatron_core", "corda_config", "eva_config",
}  # fmt: skip


@dataclass
class LoraConfig:
    """HF peft's field names, so that an adapter_config.json is readable both ways."""

    r: int = 8  # rank
    lora_alpha: float = 8
    lora_dropout: float = 0.0  # on the branch's input, in training
    target_modules: list[str] | str | None = None  # names, a regular expression, "all-linear"; None: q and v by architecture
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False  # recorded for HF peft; a Conv1D is recognised by itself
    bias: str = "none"  # "none" | "all" | "lora_only": which biases of the base are trained
    modules_to_save: list[str] | None = None  # trained whole, beside the adapters
    init_lora_weights: bool | str = True  # True: Kaiming A, zero B; "gaussian": N(0, 1/r) A, zero B; False: B Kaiming as well
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regular expression for the end of a path -> rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False

    peft_type = "LORA"

    def __post_init__(self) -> None:
        checks = {
            "r": (isinstance(self.r, int) and self.r > 0, "a positive integer"),
            "lora_dropout": (0.0 <= self.lora_dropout < 1.0, "a probability in [0, 1)"),
            "bias": (self.bias in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
            "init_lora_weights": (self.init_lora_weights in (True, False, "gaussian"), 'True, False or "gaussian"'),
            "rank_pattern": (all(isinstance(v, int) and v > 0 for v in self.rank_pattern.values()), "positive ranks"),
        }
        for name, (fits, expected) in checks.items():
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(value := getattr(self, name), set | tuple):
                setattr(self, name, sorted(value))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LoraConfig:
        """From an adapter_config.json. A field that asks for what is not done here is refused, never ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        asked = {k: v for k, v in fields.items() if k not in known | _INFORMATIVE and v not in (None, False, [], {}, "")}
        if asked:
            raise ValueError(f"adapter_config.json asks for {', '.join(f'{k}={v!r}' for k, v in asked.items())}: not supported")
        given = {k: v for k, v in fields.items() if k in known}
        return cls(**{k: v for k, v in given.items() if v is not None or k not in ("rank_pattern", "alpha_pattern")})

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        return {**dataclasses.asdict(self), "peft_type": self.peft_type, "inference_mode": True}

    def inject(self, model: nn.Module, name: str) -> None:
        """Put adapters called ``name`` on the modules that this config selects."""
        for path in select(model, self, is_supported, lambda module: isinstance(module, Wrapper)):
            layer = model.get_submodule(path)
            if not isinstance(layer, AdapterLayer):
                layer = replace(model, path, wrap(layer))
            rank = pattern_value(self.rank_pattern, path, self.r)
            alpha = pattern_value(self.alpha_pattern, path, self.lora_alpha)
            layer.add_adapter(name, rank, alpha / (math.sqrt(rank) if self.use_rslora else rank), self)
        for path in [p for p, _ in model.named_modules() if p and self.modules_to_save and names_match(p, self.modules_to_save)]:
            module = model.get_submodule(path)
            if not isinstance(module, ModuleToSave):
                module = replace(model, path, ModuleToSave(module))
            module.add_adapter(name)


def is_supported(module: nn.Module) -> bool:
    """Whether LoRA can stand on this module."""
    return is_adaptable(module) or type(module) is nn.Embedding or isinstance(module, LoraLinear | LoraEmbedding)


def wrap(module: nn.Module) -> AdapterLayer:
    """The LoRA layer for a linear layer or an embedding."""
    return LoraEmbedding(module) if isinstance(module, nn.Embedding) else LoraLinear(module)


def replace(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Put ``new`` where ``path`` points; returns it."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return new


class LoraLinear(AdapterLayer):
    """A linear base layer, dense or in 4 bits, with low-rank branches."""

    def __init__(self, module: nn.Module):
        super().__init__(base_layer(module), module)
        self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # (r, k) and (n, r), fp32
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.train(module.training)

    def adapter_names(self) -> list[str]:
        return list(self.lora_A)

    def add_adapter(self, name: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors: A Kaiming-uniform (a = sqrt 5) or Gaussian, B zero."""
        device = self.base_layer.weight.device
        self.lora_A[name] = nn.Parameter(torch.zeros(r, self.in_features, device=device))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A[name], std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B[name], a=math.sqrt(5))
        self.scaling[name], self.dropout[name] = scaling, config.lora_dropout

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_A, self.lora_B, self.scaling, self.dropout):
            del table[name]

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_A[name], self.lora_B[name]]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """HF peft's keys below the module's path."""
        return {"lora_A.weight": self.lora_A[name], "lora_B.weight": self.lora_B[name]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = self.running()
        if not names:
            return self.base_layer(x)
        first, *others = ((self.lora_A[n], self.lora_B[n], self.scaling[n], self._dropout(n)) for n in names)
        y = self.base_layer.forward_low_rank(x, *first[:3], dropout=first[3])
        for A, B, scale, dropout in others:
            y = add_low_rank(y, x, A, B, scale, None, dropout, None)
        return y

    def _dropout(self, name: str) -> float:
        return self.dropout[name] if self.training else 0.0

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        return self.scaling[name] * (self.lora_B[name].float() @ self.lora_A[name].float())


class LoraEmbedding(AdapterLayer):
    """An embedding with low-rank branches: rows of A^T, then B. A (r, tokens) is zero at first and B (d, r) Gaussian."""

    def __init__(self, module: nn.Embedding):
        super().__init__(module, module)
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    def adapter_names(self) -> list[str]:
        return list(self.lora_embedding_A)

    def add_adapter(self, name: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors; dropout does not apply to token ids."""
        device = self.base_layer.weight.device
        self.lora_embedding_A[name] = nn.Parameter(torch.zeros(r, self.num_embeddings, device=device))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn(self.embedding_dim, r, device=device))
        if config.init_lora_weights is False:
            nn.init.normal_(self.lora_embedding_A[name])
        self.scaling[name] = scaling

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_embedding_A, self.lora_embedding_B, self.scaling):
            del table[name]

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_embedding_A[name], self.lora_embedding_B[name]]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """HF peft's keys below the module's path."""
        return {"lora_embedding_A": self.lora_embedding_A[name], "lora_embedding_B": self.lora_embedding_B[name]}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(ids)
        for name in self.running():
            rows = functional.embedding(ids, self.lora_embedding_A[name].T)
            y = y + (self.scaling[name] * (rows @ self.lora_embedding_B[name].T)).to(y.dtype)
        return y

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        """(tokens, d) fp32."""
        return self.scaling[name] * (self.lora_embedding_B[name].float() @ self.lora_embedding_A[name].float()).T

    def dense_weight(self) -> torch.Tensor:
        return self.base_layer.weight.detach()

    @torch.no_grad()
    def set_dense_weight(self, w: torch.Tensor) -> None:
        self.base_layer.weight.copy_(w)

    def weight_snapshot(self) -> torch.Tensor:
        return self.base_layer.weight.detach().clone()

    def restore_weight(self, snapshot: torch.Tensor) -> None:
        self.set_dense_weight(snapshot)
