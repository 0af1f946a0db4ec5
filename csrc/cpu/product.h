// The blocked product: sums[row, col] = start + left * right, panel of columns by panel of columns. A panel of the right side is
// made once in the second-level cache and multiplied with every group of rows; the whole right side never exists. Knows no op.
//
//   result = finish(sum over the lows of between(low.left * low.panel) + main.left * main.panel)
//
// A `low` is a factor pair of small depth; sums start from the lows' products, from zero where there is none. Threads split
// columns and rows, never a sum, so results don't depend on their number.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/panel.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace peftk::PEFTK_TIER {

// How much of the right side is made at once: so many panels at least, and steps of all panels together.
template <class Cell>
struct Unit {
  static constexpr std::int64_t kPanels = 1;
  static constexpr std::int64_t kSteps = 2560;  // kCols * 4 bytes each, 480 KB on AVX-512, half of a 1 MB second-level cache
};
#ifdef PEFTK_TIER_IS_AMX_BF16
template <>
struct Unit<PairCell> {  // a group's 256 steps, 32 KB, stay in the first level while 8 panels pass; panels and sums in the second
  static constexpr std::int64_t kPanels = 8, kSteps = kPanels * 256;
};
#endif

// Panels made and used together where their bytes are neighbours in a cache line (Panel::kTogether); else one. With four, a
// chunk of the depth is a quarter as long: dx gains 1 %, y would lose as much.
template <class Panel>
constexpr auto panels_together(const Panel*) -> decltype(Panel::kTogether) {
  return Panel::kTogether;
}
constexpr std::int64_t panels_together(const void*) { return 1; }

// Rows of the left side packed at once, for a right side of this depth: 4 MB of them, or kRowBlock. The right side is decoded
// once for each block of rows, 2 % of the time of 512.
inline constexpr std::int64_t kRowBlock = 512, kLeftBytes = 4 << 20;

// Steps summed in registers before they are added to the tile: one long chain of fp32 sums would lose twice the digits at
// k = 4096 that a library's product loses. 1 % of the time.
inline constexpr std::int64_t kChainSteps = 256;
// In fp32 a small depth needs shorter ones: plain products of small shapes sum many lanes side by side. 4 % of the time.
inline constexpr std::int64_t kShortChainSteps = 32, kSmallDepth = 512;

// `panel(span, cells)` makes the right side's cells; `left` as pack_left writes it for `depth`, groups of it `line` steps apart
// (0: as many as the depth has).
template <class Panel>
struct Factors {
  const std::uint32_t* left;
  std::int64_t depth;
  Panel panel;
  std::int64_t line;
};
template <class Panel>
Factors<Panel> factors(const std::uint32_t* left, std::int64_t depth, Panel panel, std::int64_t line = 0) {
  return {left, depth, panel, line};
}
inline auto no_factors() {
  return factors(nullptr, 0, [](const Span&, std::uint32_t*) {});
}

// Sums of rows [row, row + rows) and columns [col, col + cols), `stride` floats from row to row.
struct Tile {
  float* sums;
  std::int64_t row;
  int rows;
  std::int64_t col;
  int cols, stride;
};

// between(tile, low) meets the product of one low by itself.
inline auto nothing_between() {
  return [](const Tile&, std::size_t) {};
}

template <class Cell>
std::int64_t groups_of(std::int64_t rows) {
  return (rows + TileOf<Cell>::kRows - 1) / TileOf<Cell>::kRows;
}

// Cells that a left side of `rows` rows takes.
template <class Cell>
std::int64_t left_cells(std::int64_t rows, std::int64_t depth) {
  return groups_of<Cell>(rows) * TileOf<Cell>::kRows * steps_of<Cell>(depth);
}

template <class Cell, class Rows>
void pack_all(const Rows& rows, std::int64_t first, std::int64_t count, std::int64_t depth, std::uint32_t* out, int threads,
              std::int64_t line = 0) {
  if (line == 0) line = steps_of<Cell>(depth);
  parallel_for(groups_of<Cell>(count), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t group = begin; group < end; group++) {
      const std::int64_t row = group * TileOf<Cell>::kRows;
      pack_left<Cell>(rows, first + row, count - row, depth, out + row * line);
    }
  });
}

template <class Cell>
std::int64_t row_block(std::int64_t m, std::int64_t depth) {
  const std::int64_t fit = kLeftBytes / static_cast<std::int64_t>(sizeof(std::uint32_t)) / steps_of<Cell>(depth + 1);
  return std::min(m, std::max(kRowBlock, fit / TileOf<Cell>::kRows * TileOf<Cell>::kRows));
}

// The depth cut into equal chunks of `most` steps at most; each starts at a multiple of 64 steps, as read_whole and runs of
// 64 weights want it.
template <class Cell>
struct Chunks {
  std::int64_t count, steps;
  Chunks(std::int64_t depth, std::int64_t most) {
    const std::int64_t all = steps_of<Cell>(depth);
    count = all > most ? (all + most - 1) / most : 1;
    steps = ((all + count - 1) / count + 63) / 64 * 64;
  }
};

template <class Cell, class Low, class Main, class Between, class Finish>
class Product {
 public:
  Product(std::int64_t m, std::int64_t cols, const Low* lows, std::size_t low_count, const Main& main, const Between& between,
          const Finish& finish)
      : m_(m),
        cols_(cols),
        lows_(lows),
        low_count_(low_count),
        main_(main),
        between_(between),
        finish_(finish),
        chunks_(main.depth, Unit<Cell>::kSteps / kUnitPanels) {
    for (std::size_t i = 0; i < low_count; i++) low_steps_ += steps_of<Cell>(lows[i].depth);
  }

  void run(int threads) const {
    const std::int64_t panels = (cols_ + kTileCols - 1) / kTileCols, groups = groups_of<Cell>(m_);
    if (panels == 0 || groups == 0) return;
    threads = threads_worth(m_ * cols_ * ((low_steps_ + steps_of<Cell>(main_.depth)) * Cell::kDepth), threads);
    // Few columns: the rows are split too, and each part makes the panel for itself.
    std::int64_t parts = threads / panels < 1 ? 1 : threads / panels;
    parts = parts < groups ? parts : groups;
    const int team = static_cast<int>(threads < panels * parts ? threads : panels * parts);
    const std::int64_t slab = slab_cells(groups);
    const Scratch memory(sizeof(std::uint32_t) * static_cast<std::size_t>(slab * team));
    parallel_for_threads(panels * parts, team, [&](std::int64_t begin, std::int64_t end, int thread) {
      const TileRegisters<Cell> registers;
      std::uint32_t* const own = memory.as<std::uint32_t>() + slab * thread;
      if (parts > 1) {
        for (std::int64_t unit = begin; unit < end; unit++) {
          const std::int64_t part = unit % parts;
          one_unit(unit / parts, unit / parts + 1, groups * part / parts, groups * (part + 1) / parts, own);
        }
      } else {
        for (; begin < end; begin += kUnitPanels) one_unit(begin, std::min(begin + kUnitPanels, end), 0, groups, own);
      }
    });
  }

 private:
  static constexpr int kTileRows = TileOf<Cell>::kRows, kTileCols = TileOf<Cell>::kCols, kTileSums = TileOf<Cell>::kSums;
  static constexpr std::int64_t kTogether = panels_together(static_cast<const decltype(Main::panel)*>(nullptr));
  static constexpr std::int64_t kUnitPanels = std::max(kTogether, Unit<Cell>::kPanels);
  // Panels whose bytes are neighbours are made a few rows of W at a time, which stay in the second-level cache from panel to
  // panel: those of a whole chunk, 2 KB apart, meet in few of its sets. 2.2 ms instead of 2.9 for all of 4096 x 4096.
  static constexpr bool kSliced = kTogether > 1 && TileOf<Cell>::kSquares;

  template <class Factors>
  static std::int64_t line_of(const Factors& f) {
    return f.line ? f.line : steps_of<Cell>(f.depth);
  }
  std::int64_t slab_cells(std::int64_t groups) const {
    return kUnitPanels * (low_steps_ + chunks_.steps) * kTileCols + (chunks_.count > 1 ? kUnitPanels * groups : 1) * kTileSums;
  }

  Span span_of(std::int64_t panel, std::int64_t depth, std::int64_t count) const {
    const std::int64_t col = panel * kTileCols;
    const int cols = static_cast<int>(std::min<std::int64_t>(cols_ - col, kTileCols));
    return {col, cols, (cols + kLanes - 1) / kLanes, depth, count};
  }

  // Panels [first, last) with groups [first_group, last_group) of the left side.
  void one_unit(std::int64_t first, std::int64_t last, std::int64_t first_group, std::int64_t last_group,
                std::uint32_t* slab) const {
    std::uint32_t* const low_panels = slab;
    std::uint32_t* const panels = low_panels + kUnitPanels * low_steps_ * kTileCols;
    float* const sums = reinterpret_cast<float*>(panels + kUnitPanels * chunks_.steps * kTileCols);
    const std::int64_t main_steps = steps_of<Cell>(main_.depth);
    for (std::int64_t panel = first; panel < last; panel++)
      make_lows(panel, low_panels + (panel - first) * low_steps_ * kTileCols);
    for (std::int64_t chunk = 0; chunk < chunks_.count; chunk++) {
      const std::int64_t step = chunk * chunks_.steps, steps = std::min(chunks_.steps, main_steps - step);
      const std::int64_t depth = step * Cell::kDepth, count = std::min(steps * Cell::kDepth, main_.depth - depth);
      const std::int64_t slice = kSliced ? kLanes * Cell::kDepth : count;
      for (std::int64_t at = 0; at < count; at += slice)
        for (std::int64_t panel = first; panel < last; panel++) {
          const Span span = span_of(panel, depth + at, std::min(slice, count - at));
          make_panel<Cell>(main_.panel, span,
                           panels + (panel - first) * chunks_.steps * kTileCols + at / Cell::kDepth * span.vectors * kLanes);
        }
      for (std::int64_t group = first_group; group < last_group; group++)
        for (std::int64_t panel = first; panel < last; panel++) {
          const std::int64_t row = group * kTileRows, at = panel - first;
          const Span span = span_of(panel, depth, count);
          const int rows = static_cast<int>(std::min<std::int64_t>(m_ - row, kTileRows));
          const Tile tile{sums + (chunks_.count > 1 ? (group - first_group) * kUnitPanels + at : 0) * kTileSums,
                          row,
                          rows,
                          span.col,
                          span.cols,
                          span.vectors * kLanes};
          with_vectors<Cell>(span.vectors, [&](auto vectors) {
            constexpr int V = decltype(vectors)::value;
            const bool add = chunk > 0 || start<V>(tile, low_panels + at * low_steps_ * kTileCols);
            const std::uint32_t* const left = main_.left + row * line_of(main_) + step * kTileRows;
            const std::uint32_t* const next = left + (line_of(main_) + steps * at / kUnitPanels) * kTileRows;  // its share of it
            multiply<V>(left, panels + at * chunks_.steps * kTileCols, steps, rows, add, tile.sums, next);
          });
          if (chunk + 1 == chunks_.count) finish_(tile);
        }
    }
  }

  void make_lows(std::int64_t panel, std::uint32_t* low_panels) const {
    for (std::size_t i = 0; i < low_count_; i++) {
      const Span span = span_of(panel, 0, lows_[i].depth);
      make_panel<Cell>(lows_[i].panel, span, low_panels);
      low_panels += steps_of<Cell>(lows_[i].depth) * span.vectors * kLanes;
    }
  }

  // The sums of a tile before the first step of the main product; false: there are none, the product begins.
  template <int V>
  bool start(const Tile& tile, const std::uint32_t* low_panel) const {
    constexpr int kSums = kTileRows * V * kLanes;
    alignas(64) float more[kSums];
    for (std::size_t i = 0; i < low_count_; i++) {
      const Low& low = lows_[i];
      const std::int64_t steps = steps_of<Cell>(low.depth);
      Tile own = tile;
      if (i > 0) own.sums = more;
      multiply<V>(low.left + tile.row * line_of(low), low_panel, steps, tile.rows, false, own.sums, low_panel);
      between_(own, i);
      for (int j = 0; i > 0 && j < kSums; j += kLanes) store(tile.sums + j, load(tile.sums + j) + load(more + j));
      low_panel += steps * V * kLanes;
    }
    return low_count_ > 0;
  }

  template <int V>
  static void multiply(const std::uint32_t* left, const std::uint32_t* panel, std::int64_t steps, int rows, bool add, float* sums,
                       const std::uint32_t* next) {
    constexpr int S = TileOf<Cell>::kSquares ? kLanes : 1;
    const std::int64_t most = Cell::kDepth == 1 && steps <= kSmallDepth ? kShortChainSteps : kChainSteps;
    const std::int64_t chains = std::max<std::int64_t>((steps + most / 2 - 1) / most, 1);  // of 3/2 of `most` at most
    for (std::int64_t chain = 0; chain < chains; chain++) {
      const std::int64_t from = steps / S * chain / chains * S, to = steps / S * (chain + 1) / chains * S;
      multiply_tile<V>(Cell{}, left + from * kTileRows, panel + from * V * kLanes, to - from, rows, add || chain, sums, next);
    }
  }

  std::int64_t m_, cols_, low_steps_ = 0;
  const Low* lows_;
  std::size_t low_count_;
  const Main& main_;
  const Between& between_;
  const Finish& finish_;
  Chunks<Cell> chunks_;
};

template <class Cell, class Low, class Main, class Between, class Finish>
void product(std::int64_t m, std::int64_t cols, const Low& low, const Main& main, const Between& between, const Finish& finish,
             int threads) {
  Product<Cell, Low, Main, Between, Finish>(m, cols, &low, low.depth > 0, main, between, finish).run(threads);
}
template <class Cell, class Panel, class Main, class Between, class Finish>
void product(std::int64_t m, std::int64_t cols, const std::vector<Factors<Panel>>& lows, const Main& main, const Between& between,
             const Finish& finish, int threads) {
  Product<Cell, Factors<Panel>, Main, Between, Finish>(m, cols, lows.data(), lows.size(), main, between, finish).run(threads);
}

// out[0 .. count) = T(sums), `count` any.
template <class T>
void store_row(T* out, const float* sums, int count) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store_sum(out + i, load(sums + i));
  if (i == count) return;
  T few[kLanes];
  store_sum(few, load(sums + i));
  std::memcpy(out + i, few, sizeof(T) * static_cast<std::size_t>(count - i));
}

// Asks for the memory of the tile below as well: each of its rows lies in a page of its own, and its stores would wait. 1 % of
// the time of 512 x 4096 x 4096 in bf16.
template <class T>
void store_tile(T* out, std::int64_t stride, const Tile& tile) {
  for (int i = 0; i < tile.rows; i++) {
    T* const row = out + (tile.row + i) * stride + tile.col;
    store_row(row, tile.sums + i * tile.stride, tile.cols);
    const auto below = reinterpret_cast<std::uintptr_t>(row) + sizeof(T) * static_cast<std::size_t>(tile.rows * stride);
    for (std::size_t byte = 0; byte < sizeof(T) * static_cast<std::size_t>(tile.stride); byte += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(below + byte), 1);
  }
}

// One number as T, and back.
template <class T>
T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  T lanes[kLanes];
  store(lanes, broadcast(x));
  return lanes[0];
}
template <class T>
float widen(T x) {
  T lanes[kLanes] = {x};
  float wide[kLanes];
  store(wide, load(lanes));
  return wide[0];
}

// y[0 .. count) = sums + bias[0 .. count), count <= kLanes; bias may be nullptr.
template <class T>
void store_sums(T* y, F32 sums, int count, const T* bias) {
  if (bias) {
    F32 part;
    DenseRows<T>{bias, 0}.template read<1>(0, 0, count, &part);
    sums = sums + part;
  }
  float lanes[kLanes];
  store(lanes, sums);
  store_row(y, lanes, count);
}

template <class T>
void add_bias(const Tile& tile, const T* bias) {
  for (int j = 0; j < tile.cols; j += kLanes) {
    F32 part;
    DenseRows<T>{bias, 0}.template read<1>(0, tile.col + j, lanes_left(tile.cols - j, 0), &part);
    for (int i = 0; i < tile.rows; i++) {
      float* const sums = tile.sums + i * tile.stride + j;
      store(sums, load(sums) + part);
    }
  }
}

}  // namespace peftk::PEFTK_TIER
