"""bench/layers/bench_compile.py on a narrow layer."""

import pytest
import torch

from bench.layers import bench_compile as bench


@pytest.mark.full
@pytest.mark.parametrize("who", [bench.OURS, bench.ON_BITSANDBYTES])
def test_compiled_is_the_same_step(who: str):
    for package in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    told: dict[str, str] = {}
    if who == bench.ON_BITSANDBYTES:
        with pytest.raises(Exception, match="."):  # noqa: B017
            bench.compiled(who, 256, told, "aot_eager")
        return
    expected = bench.step_of(bench.layer_of(who, 256))()
    got = bench.compiled(who, 256, told, "aot_eager")()
    assert len(got) == len(expected) == 2 + 2 * 7
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert "2 graphs for batches of 4, 2, 3, 6, 5" in told[bench.COMPILED]
