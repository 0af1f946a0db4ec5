"""Which modules a config selects, against HF peft on models and configs that hypothesis makes up."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import bert, hf_model, llama, run, twins
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors
from peftk.methods.adapter import ModuleToSave
from peftk.methods.attach import wrappers
from peftk.methods.lora_linear import LoraLinear

NAMES = ("q", "v", "q_proj", "kq_proj", "norm", "input_norm", "attn", "self_attn", "mlp", "gate", "head", "a_b")
LISTS = ("layers", "h", "experts")
Tree = Any  # None: a linear layer; a dict: modules by name; a list: a ModuleList


def built(tree: Tree) -> nn.Module:
    if tree is None:
        return nn.Linear(2, 2, device="meta")
    if isinstance(tree, list):
        return nn.ModuleList(map(built, tree))
    module = nn.Module()
    for name, part in tree.items():
        module.add_module(name, built(part))
    return module


def modules(parts: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    named = st.dictionaries(st.sampled_from(NAMES), parts, min_size=1, max_size=4)
    lists = st.dictionaries(st.sampled_from(LISTS), st.lists(parts, min_size=1, max_size=3), max_size=2)
    return st.builds(lambda a, b: {**a, **b}, named, lists)


LEAF = st.none()
TREES = modules(st.one_of(LEAF, modules(st.one_of(LEAF, LEAF, modules(LEAF)))))


@st.composite
def configs(draw: st.DrawFn, model: nn.Module) -> dict[str, Any]:
    """Fields, mostly about what there is."""

    def ends_of(kind: type[nn.Module]) -> st.SearchStrategy[str]:
        paths = [path for path, m in model.named_modules() if path and isinstance(m, kind)]
        return st.sampled_from([".".join(path.split(".")[-n:]) for path in paths for n in (1, 2, 9)])

    def names(ends: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
        return st.lists(ends, min_size=1, max_size=3)

    def expressions(ends: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return ends.flatmap(lambda end: st.sampled_from([rf".*\.{end}", rf".*{end}", end, r".*(q|v|_proj)", rf".*\.\d+\.{end}"]))

    linear, anything = ends_of(nn.Linear), ends_of(nn.Module)
    shorthand = st.sampled_from(["all-linear", "ALL-Linear"])
    wanted = draw(st.one_of(names(linear), names(linear), names(anything), expressions(linear), shorthand))
    fields: dict[str, Any] = {"target_modules": wanted}
    if draw(st.booleans()):
        fields["exclude_modules"] = draw(st.one_of(names(anything), expressions(anything)))
    if draw(st.booleans()) and not isinstance(wanted, str):
        fields["layers_to_transform"] = draw(st.one_of(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2)))
        patterns = st.sampled_from(LISTS)
        fields["layers_pattern"] = draw(st.one_of(st.none(), st.just(""), patterns, st.lists(patterns, max_size=2)))
    if draw(st.booleans()):
        fragments = linear.flatmap(lambda end: st.integers(0, len(end) - 1).map(lambda at: end[at:].lstrip(".") or end))
        fields["modules_to_save"] = draw(st.lists(st.one_of(linear, anything, fragments), min_size=1, max_size=2))
    return fields


def outermost(paths: set[str]) -> set[str]:
    return {path for path in paths if not any(path.startswith(f"{other}.") for other in paths)}


def chosen_by_hf(model: nn.Module, fields: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Paths with adapters, and of modules trained whole; what stands in another one of these is trained with it."""
    import peft as hf
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf.get_peft_model(model, hf.LoraConfig(**fields)).base_model.model
    found = {kind: {p for p, m in theirs.named_modules() if isinstance(m, kind)} for kind in (LoraLayer, ModulesToSaveWrapper)}
    return found[LoraLayer], outermost(found[ModulesToSaveWrapper])


def chosen(model: nn.Module, fields: dict[str, Any]) -> tuple[set[str], set[str]]:
    peftk.attach(model, peftk.LoraConfig(**fields))
    return {path for path, _ in wrappers(model, LoraLinear)}, {path for path, _ in wrappers(model, ModuleToSave)}


def selects_the_same(data: st.DataObject) -> None:
    tree = {"model": data.draw(TREES, "model")}
    model = built(tree)
    fields = data.draw(configs(model), "config")
    try:
        ours = chosen(model, fields)
    except ValueError as error:
        assume(not re.match("modules_to_save: expected names of modules", str(error)))  # HF peft ignores these
        if "also selects" in str(error):  # HF peft refuses some of them, and trains the others twice
            return
        with pytest.raises((ValueError, TypeError)):
            chosen_by_hf(built(tree), fields)
        return
    assert ours == chosen_by_hf(built(tree), fields)


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.full)])
def test_hf_peft_selects_the_same(examples: int):
    pytest.importorskip("peft")
    settings(max_examples=examples, deadline=None, derandomize=True)(given(st.data())(selects_the_same))()


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.input_layernorm", "head"]}),
        (bert, {"target_modules": ["query"], "modules_to_save": ["embeddings"]}),
    ],
    ids=["by the end of a name", "by the end of a path", "with what is inside"],
)
def test_trained_whole_as_in_hf_peft(make: Any, fields: dict[str, Any]):
    """Names, files and outputs."""
    torch.manual_seed(0)
    kind, model = make.__name__, make().eval()
    if fields["modules_to_save"] == ["embeddings"]:  # HF peft fails on such a file of its own: KeyError
        from peft import get_peft_model_state_dict

        theirs = hf_model(model, fields)
        ours = peftk.attach(model, peftk.LoraConfig(**fields))
        assert set(get_peft_model_state_dict(theirs)) == set(adapter_tensors(ours, "default"))
    else:
        ours, theirs = twins(model, fields)
    expected = {path for path, m in theirs.base_model.model.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"}
    whole = {path for path, _ in wrappers(ours, ModuleToSave)}
    assert whole == outermost(expected) and len(whole) == (5 if fields["modules_to_save"] == ["norm"] else len(whole))
    torch.testing.assert_close(run(ours, kind), run(theirs.eval(), kind), rtol=1e-5, atol=1e-5)


def test_the_kept_config_selects_the_same(tmp_path):
    """A path stays a path in the file: its last component would select more."""
    torch.manual_seed(0)
    model = peftk.attach(llama(), peftk.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1.input_layernorm"]))
    peftk.save_adapter(model, tmp_path)
    assert sorted(path for path, _ in wrappers(peftk.load_adapter(llama(), tmp_path), ModuleToSave)) == [
        "model.layers.1.input_layernorm"
    ]


def test_a_list_at_the_top():
    """HF peft finds no number in these paths, and refuses."""
    fields = {"target_modules": ["q"], "layers_to_transform": [1]}
    model = built({"layers": [{"q": None, "experts": [{"q": None}, {"q": None}]}, {"q": None}]})
    assert chosen_by_hf(copy.deepcopy(model), fields)[0] == {"layers.0.experts.1.q"}
    assert chosen(model, fields)[0] == {"layers.0.experts.1.q", "layers.1.q"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"modules_to_save": ["proj"]},
            r"modules_to_save: \['proj'\] also selects model\.layers\.0\.self_attn\.q_proj, by the end",
        ),
        (
            {"modules_to_save": ["attn"]},
            r"also selects model\.layers\.0\.self_attn, .* model\.layers\.0\.self_attn\.q_proj: a module",
        ),
        ({"modules_to_save": ["yers"]}, r"modules_to_save: expected modules that are called, model\.layers is a ModuleList"),
        ({"modules_to_save": ["head("]}, r"modules_to_save: expected names, which are read as regular expressions, got 'head\('"),
        ({"layers_to_transform": 0, "layers_pattern": "["}, r"layers_pattern: expected names, .* got '\['"),
    ],
    ids=str,
)
def test_refusals(fields: dict[str, Any], message: str):
    model = llama()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        peftk.attach(model, peftk.LoraConfig(target_modules=["q_proj"], **fields))
    assert [type(m) for m in model.modules()] == before


def test_qlora_keeps_what_is_trained_whole_dense():
    model = peftk.qlora(
        llama(), peftk.qlora_config(r=2, target_modules=["q_proj"], modules_to_save=["up_proj", "head"]), progress=False
    )
    paths = {path for path, _ in wrappers(model, ModuleToSave)}
    assert paths == {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    model = peftk.qlora(llama(), peftk.qlora_config(r=2, target_modules=["q_proj"], modules_to_save=["p_proj"]), progress=False)
    assert {path for path, _ in wrappers(model, ModuleToSave)} == paths - {"lm_head"}
    assert all(type(module.original_module) is nn.Linear for _, module in wrappers(model, ModuleToSave))
