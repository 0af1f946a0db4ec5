// Right sides of products (product.h) from a 4-bit weight. Knows no op.
//   weight_rows<Cell>(w)                  W^T: panels of rows of W, the depth is k
//   weight_columns<Cell>(w, constants)    W: panels of columns of W, the depth is n
// A dword of a row holds 8 neighbours along k, element e at bit 4 * (e ^ 1).
#pragma once
#include "cpu/matrix4.h"
#include "cpu/panel.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace peftk::PEFTK_TIER {

inline constexpr int kDwordCodes = 8;

template <int Element>
F32 element_of(const Table16& table, U32 dwords, F32 scale) {
  return lookup(table, shift_right(dwords, 4 * (Element ^ 1))) * scale;
}
template <int First>
U32 cell_of(FloatCell, const Table16& table, U32 dwords, F32 scale) {
  return as_cells(element_of<First>(table, dwords, scale));
}
#ifdef PEFTK_TIER_IS_AVX512_BF16
template <int First>
U32 cell_of(PairCell, const Table16& table, U32 dwords, F32 scale) {
  return pair_lanes(element_of<First>(table, dwords, scale), element_of<First + 1>(table, dwords, scale));
}
#endif

// The cells of 8 neighbours along k in each lane, step after step.
template <class Cell, int First = 0>
void store_codes(const Table16& table, U32 dwords, F32 scale, std::int64_t line, std::uint32_t* out) {
  store_cells(out, cell_of<First>(Cell{}, table, dwords, scale));
  if constexpr (First + Cell::kDepth < kDwordCodes)
    store_codes<Cell, First + Cell::kDepth>(table, dwords, scale, line, out + line);
}

// kLanes whole rows of W in runs, turned as packed dwords: a square of 32-bit moves serves 8 times as many weights as one of
// decoded numbers. constants [run][kLanes], from the run at `depth` on.
template <class Cell>
void strip_along(const Matrix4& w, const float* constants, std::int64_t first_row, std::int64_t depth, std::int64_t count,
                 std::int64_t line, std::uint32_t* out) {
  constexpr std::int64_t kReach = kDwordCodes * kLanes, kDwordsOfRun = kRun / kDwordCodes;
  const Table16 table = load_table16(w.values);
  for (std::int64_t d = 0; d < count; d += kReach) {
    const int dwords = static_cast<int>(std::min(count - d, kReach) / kDwordCodes);
    const std::uint8_t* p = w.packed + (first_row * w.k + depth + d) / 2;
    U32 square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      square[i] = load_cells(p + i * w.k / 2, dwords);
      __builtin_prefetch(p + i * w.k / 2 + kReach);
    }
    transpose(square);
    for (int j = 0; j < dwords; j++, out += kDwordCodes / Cell::kDepth * line)
      store_codes<Cell>(table, square[j], load(constants + (d / kRun + j / kDwordsOfRun) * kLanes), line, out);
  }
}

template <class Cell>
auto weight_rows(const Matrix4& w) {
  return [&w](const Span& span, std::uint32_t* panel) {
    const std::int64_t line = span.vectors * kLanes;
    for (int v = 0; v < span.vectors; v++, panel += kLanes) {
      const std::int64_t first_row = span.col + v * kLanes;
      const int used = lanes_left(span.cols, v);
      if (used == kLanes && in_runs(w)) {
        const std::int64_t first = span.depth / kRun, last = (span.depth + span.count) / kRun;
        const Scratch constants(sizeof(float) * static_cast<std::size_t>((last - first) * kLanes));
        turn_constants(w, first_row, first, last, constants.as<float>(), kLanes);
        strip_along<Cell>(w, constants.as<float>(), first_row, span.depth, span.count, line, panel);
      } else {
        const std::int64_t first = w.blocks_before(first_row), last = w.blocks_until(first_row + used);
        const Scratch constants(sizeof(float) * static_cast<std::size_t>(last - first));
        decode_constants(w.absmax, first, last, constants.as<float>());
        lanes_along<Cell>(Rows4<const float*>(w, constants.as<float>() - first), first_row, used, span.depth, span.count, line,
                          panel);
      }
    }
  };
}

// The constants of all of W as [run][row], decoded once for all panels of columns; nothing where W isn't in runs.
class ColumnConstants {
 public:
  ColumnConstants(const Matrix4& w, int threads)
      : rows_(in_runs(w) ? (w.rows + kLanes - 1) / kLanes * kLanes : 0),
        memory_(sizeof(float) * static_cast<std::size_t>(w.k / kRun * rows_)) {
    parallel_for(rows_ / kLanes, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t strip = begin; strip < end; strip++)
        turn_constants(w, strip * kLanes, 0, w.k / kRun, memory_.as<float>() + strip * kLanes, rows_);
    });
  }
  bool empty() const { return rows_ == 0; }
  const float* of_column(std::int64_t col) const { return memory_.as<float>() + col / kRun * rows_; }  // by row

 private:
  std::int64_t rows_;
  Scratch memory_;
};

inline constexpr std::int64_t kWeightRowsAhead =
    16;  // a panel takes 24 bytes of each row of 2 KB: no hardware prefetcher sees that

template <class Cell, int V>
void strip_across(const Matrix4& w, const ColumnConstants& constants, const Span& span, std::uint32_t* panel) {
  constexpr int D = Cell::kDepth;
  const Table16 table = load_table16(w.values);
  const float* scale[V];
  for (int v = 0; v < V; v++) scale[v] = constants.of_column(span.col + v * kLanes) + span.depth;
  const std::uint8_t* p = w.packed + (span.depth * w.k + span.col) / 2;
  F32 wide[D * V];
  const auto decode = [&](std::int64_t d, int i) {
    __builtin_prefetch(p + kWeightRowsAhead * w.k / 2);
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) wide[i * V + v] = lookup(table, nibbles(p + v * kLanes / 2)) * broadcast(scale[v][d + i]);
    p += w.k / 2;
  };
  const std::int64_t whole = span.count / D * D;
  for (std::int64_t d = 0; d < whole; d += D, panel += V * kLanes) {
#pragma GCC unroll 2
    for (int i = 0; i < D; i++) decode(d, i);
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) store_cells(panel + v * kLanes, cell_across(Cell{}, wide + v, V));
  }
  if (whole == span.count) return;
  for (F32& v : wide) v = broadcast(0.0f);
  for (int i = 0; whole + i < span.count; i++) decode(whole, i);
  for (int v = 0; v < V; v++) store_cells(panel + v * kLanes, cell_across(Cell{}, wide + v, V));
}

#ifdef PEFTK_TIER_IS_AMX_BF16
// The same for 32 columns by tables of bf16: one of 32 words holds the 16 numbers times the constant of a row, then of the next
// row, so that one look-up of words weaves the two. 8 operations on the shuffling port for 64 weights where the above takes 14.
template <>
inline void strip_across<PairCell, 2>(const Matrix4& w, const ColumnConstants& constants, const Span& span,
                                      std::uint32_t* panel) {
  const __m512 values = _mm512_loadu_ps(w.values);
  const float* scale = constants.of_column(span.col) + span.depth;
  const std::uint8_t* p = w.packed + (span.depth * w.k + span.col) / 2;
  const std::int64_t line = w.k / 2;
  const __m512i code = _mm512_set1_epi32(0x000f000f), upper = _mm512_set1_epi32(0x00100000);
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (std::int64_t d = 0; d < span.count; d += 2, p += 2 * line, scale += 2, panel += 2 * kLanes) {
    const bool last = d + 1 == span.count;  // half a cell: the other row is this one with a constant of zero
    for (int row = 0; row < 2; row++) {
      _mm_prefetch(reinterpret_cast<const char*>(p + (row + 32) * line), _MM_HINT_T1);  // from memory, for the panels beside it
      _mm_prefetch(reinterpret_cast<const char*>(p + (row + 8) * line), _MM_HINT_T0);
    }
    const __m512 low = _mm512_mul_ps(values, _mm512_set1_ps(scale[0]));
    const __m512 high = last ? _mm512_setzero_ps() : _mm512_mul_ps(values, _mm512_set1_ps(scale[1]));
    const __m512i table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    const auto bytes = [](const std::uint8_t* row) {
      return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    };
    const __m512i both = _mm512_or_si512(bytes(p), _mm512_slli_epi32(bytes(last ? p : p + line), 16));
    constexpr int kAndOr = 0xea;  // (a & b) | c
    const __m512i even =
        _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_srli_epi32(both, 4), code, upper, kAndOr), table);
    const __m512i odd = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(both, code, upper, kAndOr), table);
    _mm512_storeu_si512(panel, _mm512_permutex2var_epi32(even, first, odd));
    _mm512_storeu_si512(panel + kLanes, _mm512_permutex2var_epi32(even, second, odd));
  }
}
#endif

template <class Cell>
class WeightColumns {
 public:
  static constexpr std::int64_t kTogether = 4;  // a panel takes 24 bytes of each row of W

  WeightColumns(const Matrix4& w, const ColumnConstants& constants) : w_(w), constants_(constants) {}

  void operator()(const Span& span, std::uint32_t* panel) const {
    with_vectors<Cell>(span.vectors, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      if (constants_.empty())
        panel_across<Cell, V>(Rows4<Absmax>(w_, w_.absmax), span, panel);
      else
        strip_across<Cell, V>(w_, constants_, span, panel);
    });
  }

 private:
  const Matrix4& w_;
  const ColumnConstants& constants_;
};
template <class Cell>
WeightColumns<Cell> weight_columns(const Matrix4& w, const ColumnConstants& constants) {
  return {w, constants};
}

// The same two from any other rows.
template <class Cell, class Rows>
auto rows_as_columns(const Rows& rows) {
  return [&rows](const Span& span, std::uint32_t* panel) { panel_along<Cell>(rows, span, panel); };
}
template <class Cell, class Rows>
auto rows_as_depth(const Rows& rows) {
  return [&rows](const Span& span, std::uint32_t* panel) {
    with_vectors<Cell>(span.vectors, [&](auto vectors) { panel_across<Cell, decltype(vectors)::value>(rows, span, panel); });
  };
}

}  // namespace peftk::PEFTK_TIER
