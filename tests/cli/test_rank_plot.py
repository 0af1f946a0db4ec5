"""The picture of ranks: each matrix and each change is in it."""

from __future__ import annotations

import pytest

from peftk.cli import rank_plot

HISTORY = [
    (0, {"layers.0.q": 4, "layers.0.v": 4}),
    (3, {"layers.0.q": 4, "layers.0.v": 2}),
    (7, {"layers.0.q": 3, "layers.0.v": 1}),
]


def test_what_is_drawn(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    made = []

    class Kept(figure_module.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figure_module, "Figure", Kept)
    rank_plot.draw_ranks(tmp_path / "ranks.png", HISTORY, "a title", last_step=12)
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    ranks, total = made[0].axes[:2]
    assert ranks.get_title() == "a title" and [t.get_text() for t in ranks.get_yticklabels()] == ["layers.0.q", "layers.0.v"]
    mesh = ranks.collections[0]
    assert mesh.get_array().reshape(2, 3).tolist() == [[4, 4, 3], [4, 2, 1]]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 3, 7, 12] and mesh.get_clim() == (0, 4)
    assert total.lines[0].get_xydata().tolist() == [[0, 8], [3, 6], [7, 4], [12, 4]]


@pytest.mark.full
def test_many_matrices_still_fit(tmp_path):
    pytest.importorskip("matplotlib")
    rank_plot.draw_ranks(tmp_path / "ranks.png", [(0, {f"layers.{i}.q": 8 for i in range(400)})])
    assert (tmp_path / "ranks.png").stat().st_size > 10_000


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rank_plot, "find_spec", lambda name: None)
    rank_plot.draw_ranks(tmp_path / "ranks.png", HISTORY)
    assert "no ranks.png: matplotlib is not installed" in caplog.text and not list(tmp_path.iterdir())


def test_an_empty_history_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="history: expected .* got none"):
        rank_plot.draw_ranks(tmp_path / "ranks.png", [])
