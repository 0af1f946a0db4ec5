"""A picture of AdaLoRA's ranks over time: a line for each matrix, a column for each step, the rank as colour."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from peftk.atomic import write_file

logger = logging.getLogger("peftk.cli")

History = Sequence[tuple[int, dict[str, int]]]
_LINE_INCHES, _MOST_INCHES = 0.14, 40.0


def draw_ranks(path: Path, history: History, title: str = "AdaLoRA's ranks", last_step: int | None = None) -> None:
    """Write ``path``, a PNG, from an allocator's ``history``: (step, {path: rank}) for the start and each change. The last ranks
    hold up to ``last_step``. Without matplotlib one log line instead. ValueError for an empty history."""
    if not history:
        raise ValueError("history: expected (step, ranks) of at least the start, got none")
    if find_spec("matplotlib") is None:
        logger.warning("no %s: matplotlib is not installed (pip install 'peftk[plot]')", path.name)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrices = list(history[0][1])
    steps = [step for step, _ in history]
    end = max(steps[-1] + 1, last_step or 0)
    height = min(2.8 + _LINE_INCHES * len(matrices), _MOST_INCHES)
    figure = Figure(figsize=(9, height), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(height - 2.2, 1.2))
    ranks, total = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    table = [[at[matrix] for _, at in history] for matrix in matrices]
    mesh = ranks.pcolormesh([*steps, end], range(len(matrices) + 1), table, vmin=0, vmax=max(map(max, table)), cmap="viridis")
    ranks.set_yticks([i + 0.5 for i in range(len(matrices))], matrices, fontsize=6)
    ranks.invert_yaxis()
    ranks.set(title=title, xlim=(0, end))
    figure.colorbar(mesh, ax=ranks, label="rank")
    totals = [sum(at.values()) for _, at in history]
    total.step([*steps, end], [*totals, totals[-1]], where="post")
    total.set(xlabel="step", ylabel="sum of ranks", xlim=(0, end), ylim=(0, None))
    total.grid(alpha=0.3)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_file(path, picture.getvalue())
