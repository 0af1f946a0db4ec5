"""Files made to do harm: a pickle that runs something, names that lead out of the folder, sizes that no file has."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import time
import zipfile

import pytest
import torch
from tiny_models import net

import peftk
from peftk.atomic import write_folder
from peftk.checkpoint import CONFIG, OLD_TENSORS, TENSORS
from peftk.cli.errors import UserError
from peftk.cli.resume import STATE, restore
from peftk.files import read_json, read_tensors, read_torch
from peftk.integrations.adapter_state import read_state
from tests.reliability.child import limits


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def in_zip(payload: Payload) -> bytes:
    made = io.BytesIO()
    torch.save({"base_model.model.layers.0.q.lora_A.weight": payload}, made)
    return made.getvalue()


def in_global(path) -> bytes:
    """The same by opcodes of protocol 0, in a zip as torch's: no class of ours is named."""
    program = f"cposix\nsystem\n(Vtouch {path}\ntR.".encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/version", "3\n")
    return made.getvalue()


FORMS = {
    "zip": in_zip,
    "plain pickle": pickle.dumps,
    "legacy": lambda payload: (
        pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps({}) + pickle.dumps(payload)
    ),
    "opcodes": lambda payload: in_global(payload.path),
}


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    peftk.save_adapter(peftk.attach(net(), peftk.LoraConfig(r=2, target_modules=["q"])), folder)
    return folder


def test_the_payload_works_where_somebody_unpickles_it(tmp_path):
    """Otherwise the tests below could not fail."""
    pickle.loads(FORMS["plain pickle"](Payload(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()
    torch.load(io.BytesIO(in_zip(Payload(tmp_path / "too"))), weights_only=False)
    assert (tmp_path / "too").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", ["read_torch", "load_adapter", "restore", "read_state"])
def test_no_pickle_is_run(form, reader, adapter, tmp_path):
    content, ran = FORMS[form](Payload(tmp_path / "ran")), tmp_path / "ran"
    model = net()
    if reader == "load_adapter":
        (adapter / TENSORS).unlink()
        path = adapter / OLD_TENSORS
        path.write_bytes(content)
        call = lambda: peftk.load_adapter(model, adapter)  # noqa: E731
    else:
        path = tmp_path / STATE
        path.write_bytes(content)
        peftk.attach(model, peftk.LoraConfig(r=2, target_modules=["q"]))
        optimizer = torch.optim.AdamW(peftk.trainable_parameters(model))
        call = {
            "read_torch": lambda: read_torch(path),
            "restore": lambda: restore(tmp_path, optimizer),
            "read_state": lambda: read_state(model, path),
        }[reader]
    with pytest.raises((ValueError, UserError), match=str(path)):
        call()
    assert not ran.exists()


def test_safetensors_win_over_a_pickle_beside_them(adapter, tmp_path):
    (adapter / OLD_TENSORS).write_bytes(in_zip(Payload(tmp_path / "ran")))
    peftk.load_adapter(net(), adapter)
    assert not (tmp_path / "ran").exists()


def test_a_zip_that_unfolds_is_refused_unread(tmp_path):
    """torch writes none that is compressed; 20 MB of zeros are 20 KB."""
    made = io.BytesIO()
    torch.save({"x": torch.zeros(5 << 20)}, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    del made, old
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 17
    with pytest.raises(ValueError, match=r"bomb\.pt: expected a file of torch\.save .*compressed parts"), limits():
        read_torch(tmp_path / "bomb.pt")


def test_a_header_that_claims_more_than_the_file_holds(tmp_path):
    path = tmp_path / "a.safetensors"
    huge = {"x": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}
    for length, header in ((None, huge), (1 << 62, {}), (99_000_000, {})):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", length or len(text)) + text)
        with pytest.raises(ValueError, match=r"a\.safetensors: expected a safetensors file"), limits():
            read_tensors(path)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (peftk.LoraConfig(r=2, target_modules=["q"]), {"r": 10**12}),
        (peftk.LoraConfig(r=2, target_modules=["q"]), {"rank_pattern": {"q": 10**12}}),
        (peftk.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["q"]), {"init_r": 10**12}),
    ],
)
def test_an_adapter_takes_no_memory_that_its_tensors_do_not_have(config, fields, tmp_path):
    peftk.save_adapter(peftk.attach(net(), config), tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*expected a size of at most 32, .*got 1000000000000"), limits():
        peftk.load_adapter(net(), tmp_path)


@pytest.mark.parametrize("field", ["num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_prompt_neither(field, is_trainable, tmp_path):
    """Without training its encoder is not even made, whatever the config says of it."""
    pytest.importorskip("transformers")
    from tiny_models import llama

    config = peftk.PTuningConfig(num_virtual_tokens=2, encoder_reparameterization_type="LSTM", encoder_hidden_size=4)
    peftk.save_adapter(peftk.attach(llama(max_position_embeddings=10**8 + 1), config), tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 10**8}))
    model = llama(max_position_embeddings=10**8 + 1)
    if field != "num_virtual_tokens" and not is_trainable:
        with limits():
            peftk.load_adapter(model, tmp_path)
        return
    with pytest.raises(ValueError, match=rf"{field}: expected a size of at most \d+, .*got 100000000"), limits():
        peftk.load_adapter(model, tmp_path, is_trainable=is_trainable)


@pytest.mark.parametrize("expression", [r"(.+)+x", r"(.*.*)*x", r"(a?){40}x", r"(layers|l.*)*x", ".*.*.*.*.*.*.*x"])
def test_an_expression_that_searches_for_ever_is_refused(expression, adapter):
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": expression}))
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"adapter_config\.json: target_modules: expected names or a regular expression"):
        peftk.load_adapter(net(), adapter)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a": 1, "a": 2}', '{"a": ', "\ufeff", "9" * 10**5, '{"\x00": 1}'])
def test_json_that_is_none(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: expected JSON, got"):
        read_json(tmp_path / "a.json")


def test_an_adapter_that_is_saved_writes_through_no_link(tmp_path, adapter):
    """A folder whose files are links to somebody's own: they are replaced, and what they led to stays."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (CONFIG, TENSORS):
        (adapter / name).unlink()
        (adapter / name).symlink_to(precious)
    peftk.save_adapter(peftk.attach(net(), peftk.LoraConfig(r=2, target_modules=["q"])), adapter)
    assert precious.read_text() == "mine" and not (adapter / TENSORS).is_symlink()


def test_a_folder_with_links_is_replaced_and_their_targets_stay(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    with write_folder(folder) as new:
        (new / "file").write_text("new")
    assert (outside / "kept").read_text() == "mine" and not (folder / "link").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a.b", "", "__x", ".."])
def test_an_adapters_name_is_no_path(name):
    with pytest.raises(ValueError, match="adapter_name: expected a name"):
        peftk.attach(net(), peftk.LoraConfig(r=2, target_modules=["q"]), name)


def test_a_models_index_leads_nowhere_else(tmp_path):
    """A folder's shards lie in it: an index that names another place is refused before anything is read."""
    transformers = pytest.importorskip("transformers")
    from tiny_models import llama

    from peftk.cli.models import open_model

    secret = tmp_path / "elsewhere.safetensors"
    llama().save_pretrained(tmp_path / "good")
    shutil.copy(tmp_path / "good" / "model.safetensors", secret)
    backend = __import__("tokenizers").Tokenizer(__import__("tokenizers").models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b").save_pretrained(tmp_path / "good")
    names = read_tensors(secret)
    (tmp_path / "good" / "model.safetensors").unlink()
    for place in ("../elsewhere.safetensors", str(secret)):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (tmp_path / "good" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: expected files of the folder, got"):
            open_model(str(tmp_path / "good"))
