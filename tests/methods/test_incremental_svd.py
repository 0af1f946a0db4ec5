"""Principal components batch by batch against a whole SVD, and against HF peft's."""

from __future__ import annotations

import pytest
import torch

from peftk.methods.incremental_svd import IncrementalSVD


def rows(m: int, k: int = 48) -> torch.Tensor:
    """A spectrum that falls, around a mean that isn't zero."""
    return torch.randn(m, k) * torch.logspace(1, -1, k) @ torch.linalg.qr(torch.randn(k, k))[0] + torch.randn(k) * 3


@pytest.mark.parametrize("sizes", [[200], [64, 64, 72], [5, 3, 192]])
def test_is_the_whole_svd_where_all_components_are_kept(sizes):
    x, svd = rows(sum(sizes)), IncrementalSVD(48)
    for part in x.split(sizes):
        svd.update(part, 0.99)
    centred = (x - x.mean(0)).double()
    _, values, vt = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(svd.values.double(), values, rtol=1e-4, atol=1e-3)
    cosines = (svd.components.double() * vt).sum(1).abs()
    assert cosines[:20].min() > 0.9999
    torch.testing.assert_close(svd.shares().sum(), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_equals_hf():
    pca = pytest.importorskip("peft.utils.incremental_pca").IncrementalPCA(n_components=6, copy=True)
    svd = IncrementalSVD(6)
    for part in rows(300).split(100):
        pca.partial_fit(part)
        svd.update(part, 0.9)
    torch.testing.assert_close(svd.values, pca.singular_values_.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close((svd.components * pca.components_.float()).sum(1).abs(), torch.ones(6), rtol=1e-3, atol=0)
    torch.testing.assert_close(svd.shares(), pca.explained_variance_ratio_.float(), rtol=1e-3, atol=0)


def test_the_randomised_one_finds_the_same(monkeypatch):
    x = rows(400)
    exact, random = IncrementalSVD(6), IncrementalSVD(6)
    exact.update(x, 0.9)
    monkeypatch.setattr("peftk.methods.incremental_svd._EXACT", 0)
    state = torch.get_rng_state()
    random.update(x, 0.9)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(random.values, exact.values, rtol=1e-3, atol=0)
    assert (random.components * exact.components).sum(1).abs().min() > 0.99


def test_settles():
    svd, x = IncrementalSVD(4), rows(100)
    svd.update(x, 0.999)
    assert not svd.settled.any()
    svd.update(x, 0.999)
    assert svd.settled.all()
    svd.update(rows(300), 0.999)
    assert not svd.settled.all()
