"""bench/models/bench_checkpoint.py on a narrow model: both write the same codes."""

import pytest
import torch
from safetensors.torch import load_file

from bench.limits import Limits
from bench.models import bench_checkpoint as bench


def test_both_write_the_same_codes(tmp_path, monkeypatch: pytest.MonkeyPatch):
    for package in ("transformers", "bitsandbytes"):
        pytest.importorskip(package)
    monkeypatch.setattr(bench, "VOCABULARY", 64)
    monkeypatch.setattr(bench, "LAYERS", 1)
    seen = []
    for candidate in bench.candidates(tmp_path, 64):
        candidate.run()
        found = {key: t for file in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(file).items()}
        seen.append({key: t for key, t in found.items() if key.endswith("proj.weight")})
    assert len(seen[0]) == 7
    for key, codes in seen[0].items():
        assert torch.equal(codes.view(-1), seen[1][key].view(-1)), key
    limits = Limits(1e9, 1e9, 1e9, {torch.bfloat16: 1e9, torch.float32: 1e9})
    (rows,) = bench.rows(256, 1, limits)
    assert [row.who for row in rows] == [bench.OURS, bench.THEIRS]
