// From rows (rows.h) to cells (tile.h). Knows no op.
//   panel_along    the rows become columns of the panel, the depth runs along them (W in y = x W^T): a square transpose each
//   panel_across   the rows are steps of the depth (W in dx = dy W)
//   make_panel     one of these, with the zeros up to whole squares
//   pack_left      the left side, group by group of a tile's rows
#pragma once
#include <algorithm>

#include "cpu/panel_pairs.h"
#include "cpu/rows.h"
#include "cpu/tile.h"

namespace peftk::PEFTK_TIER {

inline U32 cell_along(FloatCell, const F32* v) { return as_cells(v[0]); }
inline U32 cell_across(FloatCell, const F32* v, int) { return as_cells(v[0]); }
#ifdef PEFTK_TIER_IS_AVX512_BF16
inline U32 cell_along(PairCell, const F32* v) { return pair_neighbours(v[0], v[1]); }
inline U32 cell_across(PairCell, const F32* v, int next_row) { return pair_lanes(v[0], v[next_row]); }
#endif

// One vector of a panel: rows [first, first + used) become its lanes; `line` cells from step to step.
template <class Cell, class Rows>
void lanes_along(const Rows& rows, std::int64_t first, int used, std::int64_t depth, std::int64_t count, std::int64_t line,
                 std::uint32_t* out) {
  constexpr int D = Cell::kDepth, kReach = D * kLanes;  // depth of a square
  const std::int64_t steps = steps_of<Cell>(count), whole = used == kLanes && rows.aligned() ? count / kReach * kReach : 0;
  U32 square[kLanes];
  F32 wide[D];
  for (std::int64_t d = 0; d < whole; d += kReach, out += kLanes * line) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      rows.template read_whole<D>(first + i, depth + d, wide);
      square[i] = cell_along(Cell{}, wide);
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) store_cells(out + i * line, square[i]);
  }
  for (std::int64_t d = whole; d < count; d += kReach, out += kLanes * line) {
    for (U32& row : square) row = zero_bits();
    for (int i = 0; i < used; i++) {
      rows.template read<D>(first + i, depth + d, static_cast<int>(std::min<std::int64_t>(count - d, kReach)), wide);
      square[i] = cell_along(Cell{}, wide);
    }
    transpose(square);
    for (int i = 0; i < kLanes && d / D + i < steps; i++) store_cells(out + i * line, square[i]);
  }
}

template <class Cell, class Rows>
void panel_along(const Rows& rows, const Span& span, std::uint32_t* panel) {
  if constexpr (kLiesInCells<Cell, Rows>)
    if (dense_rows(rows).scale == 1.0f) return pairs_along(rows, span, panel);
  for (int v = 0; v < span.vectors; v++)
    lanes_along<Cell>(rows, span.col + v * kLanes, lanes_left(span.cols, v), span.depth, span.count, span.vectors * kLanes,
                      panel + v * kLanes);
}

template <class Cell, int V, class Rows>
void panel_across(const Rows& rows, const Span& span, std::uint32_t* panel) {
  if constexpr (kLiesInCells<Cell, Rows>)
    if (dense_rows(rows).scale == 1.0f) return pairs_across<V>(rows, span, panel);
  constexpr int D = Cell::kDepth;
  const std::int64_t whole = span.cols == V * kLanes && rows.aligned() ? span.count / D * D : 0;
  F32 wide[D * V];
  for (std::int64_t d = 0; d < whole; d += D, panel += V * kLanes) {
    for (int i = 0; i < D; i++) rows.template read_whole<V>(span.depth + d + i, span.col, wide + i * V);
    for (int v = 0; v < V; v++) store_cells(panel + v * kLanes, cell_across(Cell{}, wide + v, V));
  }
  for (std::int64_t d = whole; d < span.count; d += D, panel += V * kLanes) {
    for (F32& v : wide) v = broadcast(0.0f);
    for (int i = 0; i < D && d + i < span.count; i++)
      rows.template read<V>(span.depth + d + i, span.col, span.cols, wide + i * V);
    for (int v = 0; v < V; v++) store_cells(panel + v * kLanes, cell_across(Cell{}, wide + v, V));
  }
}

// `panel(span, cells)`, and zeros for the steps that the depth lacks.
template <class Cell, class Panel>
void make_panel(const Panel& panel, const Span& span, std::uint32_t* cells) {
  panel(span, cells);
  if (!TileOf<Cell>::kSquares) return;
  const std::int64_t line = span.vectors * kLanes, made = (span.count + Cell::kDepth - 1) / Cell::kDepth;
  std::fill(cells + made * line, cells + steps_of<Cell>(span.count) * line, 0u);
}

// A group of the left side: rows [row, row + count), those past a tile's rows left out, zeros for those that a tile lacks.
template <class Cell, class Rows>
void pack_left(const Rows& rows, std::int64_t row, std::int64_t count, std::int64_t depth, std::uint32_t* out) {
  if constexpr (kLiesInCells<Cell, Rows>)
    if (dense_rows(rows).scale == 1.0f) return pairs_left(rows, row, count, depth, out);
  constexpr int D = Cell::kDepth, kReach = D * kLanes;
  constexpr int R = TileOf<Cell>::kRows;
  std::uint32_t cells[R][kLanes];
  for (std::int64_t d = 0; d < depth; d += kReach) {
    const int here = static_cast<int>(depth - d < kReach ? depth - d : kReach);
    for (int i = 0; i < R; i++) {
      F32 wide[D];
      if (i < count) {
        rows.template read<D>(row + i, d, here, wide);
        store_cells(cells[i], cell_along(Cell{}, wide));
      } else {
        store_cells(cells[i], zero_bits());
      }
    }
    if constexpr (TileOf<Cell>::kSquares) {
      std::memcpy(out, cells, sizeof cells);
      out += R * kLanes;
    } else {
      const int steps = static_cast<int>(steps_of<Cell>(here));
      for (int step = 0; step < steps; step++, out += R)
        for (int i = 0; i < R; i++) out[i] = cells[i][step];
    }
  }
}

// The left side whose depth runs down `rows`: columns [0, count) become its rows.
template <class Cell, class Rows>
void pack_left_across(const Rows& rows, std::int64_t count, std::int64_t depth, std::uint32_t* out) {
  constexpr int D = Cell::kDepth, R = TileOf<Cell>::kRows;
  const std::int64_t steps = steps_of<Cell>(depth), padded = (count + R - 1) / R * R;
  for (std::int64_t col = 0; col < padded; col += kLanes) {
    const int used = static_cast<int>(std::clamp<std::int64_t>(count - col, 0, kLanes));
    const std::int64_t kept = std::min<std::int64_t>(padded - col, kLanes);
    for (std::int64_t step = 0; step < steps; step++) {
      F32 wide[D];
      for (F32& v : wide) v = broadcast(0.0f);
      for (int i = 0; i < D && step * D + i < depth && used; i++) rows.template read<1>(step * D + i, col, used, wide + i);
      std::uint32_t cells[kLanes];
      store_cells(cells, cell_across(Cell{}, wide, 1));
      for (std::int64_t j = 0; j < kept; j++) out[left_index<Cell>(col + j, step, steps)] = cells[j];
    }
  }
}

}  // namespace peftk::PEFTK_TIER
