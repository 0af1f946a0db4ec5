// y = x W^T for one to kFewDenseRows rows of x and a dense W: each row of W is read once and used at once, lanes run along k, no
// panel is written. Knows no op.
#pragma once
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/scratch.h"

namespace peftk::PEFTK_TIER {

inline constexpr std::int64_t kFewDenseRows = 4;
inline constexpr int kFewDenseOutputs = 4;  // rows of W at once: they share the loads of x and keep enough sums in flight

// Vectors that one chain of sums runs over, as in product.h.
inline constexpr std::int64_t kFewDenseChain = 32;

// Sums of one vector of a row: 16 products in fp32, or 32 of bf16 pairs.
template <class Cell, class T>
struct FewDense {
  static constexpr int kReach = kLanes;
  using Vector = F32;
  static Vector read(const DenseRows<T>& rows, std::int64_t row, std::int64_t position, int count) {
    F32 v;
    rows.template read<1>(row, position, count, &v);
    return v;
  }
  static F32 add(F32 sum, Vector a, Vector b) { return multiply_add(a, b, sum); }
};
#ifdef PEFTK_TIER_IS_AVX512_BF16
template <>
struct FewDense<PairCell, Bf16> {
  static constexpr int kReach = 2 * kLanes;
  using Vector = __m512i;
  static Vector read(const DenseRows<Bf16>& rows, std::int64_t row, std::int64_t position, int count) {
    return _mm512_maskz_loadu_epi16(first_words(count), rows.data + row * rows.stride + position);
  }
  static F32 add(F32 sum, Vector a, Vector b) { return {multiply_add(PairCell{}, sum.v, a, b)}; }
};
#endif

// out(first, count, row of x, sums) for rows [first, first + count) of W.
template <int M, class T, class Out>
void few_dense_dots(const DenseRows<T>& w, std::int64_t k, const DenseRows<T>& x, std::int64_t first, int count, Out& out) {
  using Few = FewDense<CellOf<T>, T>;
  constexpr int R = Few::kReach;
  F32 sum[kFewDenseOutputs][M];
  for (auto& row : sum)
    for (F32& s : row) s = broadcast(0.0f);
  for (std::int64_t chain = 0; chain < k; chain += kFewDenseChain * R) {
    F32 part[kFewDenseOutputs][M];
    for (auto& row : part)
      for (F32& p : row) p = broadcast(0.0f);
    const std::int64_t end = std::min(chain + kFewDenseChain * R, k);
    const auto step = [&](std::int64_t position, int here) {
      typename Few::Vector factor[M];
      for (int i = 0; i < M; i++) factor[i] = Few::read(x, i, position, here);
      for (int o = 0; o < kFewDenseOutputs; o++) {
        const auto weight = Few::read(w, first + std::min(o, count - 1), position, here);  // the last one again: not stored
        for (int i = 0; i < M; i++) part[o][i] = Few::add(part[o][i], weight, factor[i]);
      }
    };
    std::int64_t position = chain;
    for (; position + R <= end; position += R) step(position, R);
    if (position < end) step(position, static_cast<int>(end - position));
    for (int o = 0; o < kFewDenseOutputs; o++)
      for (int i = 0; i < M; i++) sum[o][i] = sum[o][i] + part[o][i];
  }
  for (int i = 0; i < M; i++) {
    float lanes[kLanes] = {};
    for (int o = 0; o < count; o++) lanes[o] = reduce_sum(sum[o][i]);
    out(first, count, i, load(lanes));
  }
}

// The same with a W that lies as (k, n): its rows are scaled by x and added up, lanes run along n. Sums stay in the first-level
// cache; kTurnedCols columns at once, so that a row of W is read in runs that the hardware sees coming.
inline constexpr std::int64_t kTurnedCols = 512, kTurnedRows = 4;

template <int M, class T, class Out>
void few_turned_block(const DenseRows<T>& w, std::int64_t k, const float* x, std::int64_t first, std::int64_t cols, Out& out) {
  float sum[M][kTurnedCols] = {};
  for (std::int64_t chain = 0; chain < k; chain += kTurnedRows * kFewDenseChain) {
    float part[M][kTurnedCols] = {};
    const std::int64_t end = std::min(chain + kTurnedRows * kFewDenseChain, k);
    for (std::int64_t row = chain; row < end; row += kTurnedRows)
      for (std::int64_t col = 0; col < cols; col += kLanes) {
        const int here = static_cast<int>(std::min<std::int64_t>(cols - col, kLanes));
        F32 weight[kTurnedRows];
        for (int p = 0; p < kTurnedRows; p++)
          __builtin_prefetch(w.data + std::min(row + kTurnedRows + p, k - 1) * w.stride + first + col);
        for (int p = 0; p < kTurnedRows; p++)
          if (row + p < end && here == kLanes)
            w.template read_whole<1>(row + p, first + col, weight + p);
          else
            w.template read<1>(std::min(row + p, end - 1), first + col, row + p < end ? here : 0, weight + p);
        for (int i = 0; i < M; i++) {
          F32 s = load(part[i] + col);
          for (int p = 0; p < kTurnedRows; p++) s = multiply_add(weight[p], broadcast(x[i * (k + kTurnedRows) + row + p]), s);
          store(part[i] + col, s);
        }
      }
    for (int i = 0; i < M; i++)
      for (std::int64_t col = 0; col < cols; col += kLanes) store(sum[i] + col, load(sum[i] + col) + load(part[i] + col));
  }
  for (std::int64_t col = 0; col < cols; col += kLanes)
    for (int i = 0; i < M; i++)
      out(first + col, static_cast<int>(std::min<std::int64_t>(cols - col, kLanes)), i, load(sum[i] + col));
}

template <class T, class Out>
void few_turned_product(const DenseRows<T>& w, std::int64_t n, std::int64_t k, const T* x, std::int64_t stride, std::int64_t m,
                        int threads, Out out) {
  const std::int64_t wide = k + kTurnedRows;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(m * wide));
  auto* const factors = memory.as<float>();
  std::fill(factors, factors + m * wide, 0.0f);
  for (std::int64_t i = 0; i < m; i++)
    for (std::int64_t j = 0; j < k; j++) factors[i * wide + j] = widen(x[i * stride + j]);
  parallel_for((n + kTurnedCols - 1) / kTurnedCols, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kTurnedCols; first < std::min(end * kTurnedCols, n); first += kTurnedCols) {
      const std::int64_t cols = std::min(n - first, kTurnedCols);
      switch (m) {
        case 1: few_turned_block<1>(w, k, factors, first, cols, out); break;
        case 2: few_turned_block<2>(w, k, factors, first, cols, out); break;
        case 3: few_turned_block<3>(w, k, factors, first, cols, out); break;
        default: few_turned_block<4>(w, k, factors, first, cols, out);
      }
    }
  });
}

template <class T, class Out>
void few_dense_product(const DenseRows<T>& w, std::int64_t n, std::int64_t k, const T* x, std::int64_t stride, std::int64_t m,
                       int threads, Out out) {
  const DenseRows<T> rows{x, stride};
  parallel_for((n + kFewDenseOutputs - 1) / kFewDenseOutputs, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kFewDenseOutputs; first < std::min(end * kFewDenseOutputs, n); first += kFewDenseOutputs) {
      const int count = static_cast<int>(std::min<std::int64_t>(n - first, kFewDenseOutputs));
      switch (m) {
        case 1: few_dense_dots<1>(w, k, rows, first, count, out); break;
        case 2: few_dense_dots<2>(w, k, rows, first, count, out); break;
        case 3: few_dense_dots<3>(w, k, rows, first, count, out); break;
        default: few_dense_dots<4>(w, k, rows, first, count, out);
      }
    }
  });
}

}  // namespace peftk::PEFTK_TIER
