// y = x W^T for one to kFewRows rows of x: each weight is decoded in registers and used at once, lanes run along k, no panel is
// written. Knows no op.
#pragma once
#include <algorithm>

#include "cpu/few_rows_avx2.h"
#include "cpu/matrix4.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/strips_bf16.h"

namespace peftk::PEFTK_TIER {

inline constexpr std::int64_t kFewRows = 4;
inline constexpr int kFewOutputs = 4;  // rows of W at once: they share the loads of x and keep enough sums in flight

inline constexpr std::int64_t kFewChain = 32 * kLanes;  // elements that one chain of sums runs over

struct FewOutputs {
  std::int64_t first;  // row of W
  int count;           // of kFewOutputs
};

// dots[o][i] = W[first + o] . x[i], x (M, x_stride) fp32 with zeros from k to the next multiple of kLanes.
template <int M>
void few_dots(const Rows4<const float*>& w, std::int64_t k, const float* x, std::int64_t x_stride, FewOutputs outputs,
              float (&dots)[kFewOutputs][M]) {
  F32 sum[kFewOutputs][M];
  for (auto& row : sum)
    for (F32& s : row) s = broadcast(0.0f);
  const std::int64_t whole = w.aligned() && outputs.count == kFewOutputs ? k : 0;
  F32 factor[M], weight[kFewOutputs];
  for (std::int64_t chain = 0; chain < whole; chain += kFewChain) {
    F32 part[kFewOutputs][M];
    for (auto& row : part)
      for (F32& p : row) p = broadcast(0.0f);
    for (std::int64_t position = chain; position < std::min(chain + kFewChain, whole); position += kLanes) {
      for (int i = 0; i < M; i++) factor[i] = load(x + i * x_stride + position);
      for (int o = 0; o < kFewOutputs; o++) w.template read_whole<1>(outputs.first + o, position, weight + o);
      for (int o = 0; o < kFewOutputs; o++)
        for (int i = 0; i < M; i++) part[o][i] = multiply_add(weight[o], factor[i], part[o][i]);
    }
    for (int o = 0; o < kFewOutputs; o++)
      for (int i = 0; i < M; i++) sum[o][i] = sum[o][i] + part[o][i];
  }
  for (std::int64_t position = whole; position < k; position += kLanes) {
    const int here = static_cast<int>(std::min<std::int64_t>(k - position, kLanes));
    for (int i = 0; i < M; i++) factor[i] = load(x + i * x_stride + position);
    for (int o = 0; o < outputs.count; o++) {
      w.template read<1>(outputs.first + o, position, here, weight);
      for (int i = 0; i < M; i++) sum[o][i] = multiply_add(weight[0], factor[i], sum[o][i]);
    }
  }
  for (int o = 0; o < kFewOutputs; o++)
    for (int i = 0; i < M; i++) dots[o][i] = reduce_sum(sum[o][i]);
}

// out(first row of W, rows of W, row of x, their sums) for all of them.
template <int M, class Out>
void few_rows(const Matrix4& w, const float* x, std::int64_t x_stride, int threads, Out out) {
  const std::int64_t units = (w.rows + kFewOutputs - 1) / kFewOutputs;
  const std::int64_t slab = w.blocks_until(kFewOutputs) + 2;
  const Scratch constants(sizeof(float) * static_cast<std::size_t>(slab * std::max(threads, 1)));
  parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    float* const decoded = constants.as<float>() + slab * thread;
    for (std::int64_t unit = begin; unit < end; unit++) {
      const std::int64_t first = unit * kFewOutputs;
      const FewOutputs outputs{first, static_cast<int>(std::min<std::int64_t>(w.rows - first, kFewOutputs))};
      const std::int64_t block = w.blocks_before(first);
      decode_constants(w.absmax, block, w.blocks_until(first + outputs.count), decoded);
      float dots[kFewOutputs][M];
      few_dots<M>(Rows4<const float*>(w, decoded - block), w.k, x, x_stride, outputs, dots);
      for (int i = 0; i < M; i++) {
        float lanes[kLanes] = {};
        for (int o = 0; o < outputs.count; o++) lanes[o] = dots[o][i];
        out(first, outputs.count, i, load(lanes));
      }
    }
  });
}

// Whether few_product is the way for m rows of x.
template <class T>
bool few_fits(const Matrix4& w, std::int64_t m) {
#ifdef PEFTK_TIER_IS_AVX512_BF16
  if (std::is_same_v<T, Bf16> && few_bf16_fits(w, m)) return true;
#endif
#ifdef PEFTK_TIER_IS_AVX2
  if (side_by_side_fits(w, m)) return true;
#endif
  (void)w;
  return m <= kFewRows;
}

// out(first row of W, rows of W, row of x, their sums); x is widened to fp32 once, where its products are fp32 ones.
template <class T, class Out>
void few_product(const Matrix4& w, const T* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
#ifdef PEFTK_TIER_IS_AVX512_BF16
  if constexpr (std::is_same_v<T, Bf16>)
    if (few_bf16_fits(w, m)) return few_product_bf16(w, x, stride, m, threads, out);
#endif
#ifdef PEFTK_TIER_IS_AVX2
  if (side_by_side_fits(w, m)) return side_by_side(w, x, stride, m, threads, out);
#endif
  const std::int64_t wide_stride = (w.k + kLanes - 1) / kLanes * kLanes;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(m * wide_stride));
  float* const wide = memory.as<float>();
  for (std::int64_t i = 0; i < m; i++)
    for (std::int64_t j = 0; j < w.k; j += kLanes) {
      F32 v;
      DenseRows<T>{x, stride}.template read<1>(i, j, static_cast<int>(std::min<std::int64_t>(w.k - j, kLanes)), &v);
      store(wide + i * wide_stride + j, v);
    }
  switch (m) {
    case 1: return few_rows<1>(w, wide, wide_stride, threads, out);
    case 2: return few_rows<2>(w, wide, wide_stride, threads, out);
    case 3: return few_rows<3>(w, wide, wide_stride, threads, out);
    default: return few_rows<4>(w, wide, wide_stride, threads, out);
  }
}

}  // namespace peftk::PEFTK_TIER
