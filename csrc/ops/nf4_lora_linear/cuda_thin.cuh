// Words of the thin products, in which one matrix (m, c) is wide and read once and the other has a few columns: elements in
// registers, dropout on them, sums over a block's warps in a fixed order, and where sums go. A block takes 64 rows or columns of
// the wide matrix, and a run of the inner dimension.
#pragma once
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"
#include "cuda/weight4.cuh"

namespace peftk::cuda {

inline constexpr int kMostProducts = kMostWeights;  // of one launch: they are kernel parameters
inline constexpr int kBlockExtent = 64;             // rows or columns of the wide matrix a block takes

// ---- elements -----------------------------------------------------------------------------------------------------------------

// n neighbouring 16-bit elements, the first in the low half of word 0.
template <int n>
struct Elements {
  std::uint32_t word[n / 2];
};

// n elements from `first` on, of which `left` are there (none where it is ≤ 0); the rest are zeros. kVector: all or none are
// there, on as many bytes as they have.
template <int n, bool kVector, class T>
__device__ __forceinline__ Elements<n> load_elements(const T* first, int left) {
  Elements<n> e{};
  if constexpr (!kVector) {
#pragma unroll
    for (int i = 0; i < n; i++)
      if (i < left) e.word[i / 2] |= static_cast<std::uint32_t>(first[i].bits) << 16 * (i % 2);
  } else if (left > 0) {
    if constexpr (n == 8) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(first));
      e.word[0] = v.x, e.word[1] = v.y, e.word[2] = v.z, e.word[3] = v.w;
    } else if constexpr (n == 4) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(first));
      e.word[0] = v.x, e.word[1] = v.y;
    } else {
      e.word[0] = __ldg(reinterpret_cast<const std::uint32_t*>(first));
    }
  }
  return e;
}

// Element i of two rows as a pair, `upper` in the low half: what MMA wants where the inner dimension goes from row to row.
template <int n>
__device__ __forceinline__ void pair_rows(const Elements<n>& upper, const Elements<n>& lower, std::uint32_t (&pairs)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) pairs[i] = __byte_perm(upper.word[i / 2], lower.word[i / 2], i % 2 ? 0x7632 : 0x5410);
}

// ---- dropout ------------------------------------------------------------------------------------------------------------------

// Bit i: whether element 4 * counter + i stays.
__device__ __forceinline__ std::uint32_t kept_by(const Dropout& dropout, std::uint64_t counter) {
  const uint4 words = philox(counter, dropout.seed);
  return (words.x >= dropout.drop_below ? 1u : 0u) | (words.y >= dropout.drop_below ? 2u : 0u) |
         (words.z >= dropout.drop_below ? 4u : 0u) | (words.w >= dropout.drop_below ? 8u : 0u);
}

// Likewise eight elements.
__device__ __forceinline__ std::uint32_t eight_kept_by(const Dropout& dropout, std::uint64_t counter) {
  return kept_by(dropout, counter) | kept_by(dropout, counter + 1) << 4;
}

// Zeros where bits 0 … 7 of `keep` are 0.
__device__ __forceinline__ void drop(Elements<8>& elements, std::uint32_t keep) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    elements.word[i] &= (keep >> 2 * i & 1 ? 0xffffu : 0u) | (keep >> (2 * i + 1) & 1 ? 0xffff0000u : 0u);
}

// ---- sums ---------------------------------------------------------------------------------------------------------------------

// Warps w, w + kLeft, w + 2 kLeft, … of a block: their sums end up in w, added in a fixed order. Powers of two.
template <int kWarps, int kLeft, int kFragments>
__device__ __forceinline__ void add_over_warps(float (&sums)[kFragments][4],
                                               float4* exchange /* [kWarps / 2][kFragments][32] */) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = kWarps / 2; half >= kLeft; half /= 2) {
    float4* const mine = exchange + (warp % half) * (kFragments * kWarp) + lane;
    if (warp >= half && warp < 2 * half)
#pragma unroll
      for (int f = 0; f < kFragments; f++) mine[f * kWarp] = {sums[f][0], sums[f][1], sums[f][2], sums[f][3]};
    __syncthreads();
    if (warp < half)
#pragma unroll
      for (int f = 0; f < kFragments; f++) {
        const float4 other = mine[f * kWarp];
        sums[f][0] = __fadd_rn(sums[f][0], other.x), sums[f][1] = __fadd_rn(sums[f][1], other.y);
        sums[f][2] = __fadd_rn(sums[f][2], other.z), sums[f][3] = __fadd_rn(sums[f][3], other.w);
      }
    __syncthreads();
  }
}

// A share of an inner dimension, [first, end).
struct Run {
  int first, end;
};

// The index-th of `runs`, in multiples of kUnit; empty where the others have taken all.
template <int kUnit>
__device__ __forceinline__ Run run_of(int depth, int runs, int index) {
  const int units = (depth - 1) / kUnit / runs + 1;
  const std::int64_t first = static_cast<std::int64_t>(index) * units * kUnit, end = first + units * kUnit;
  return {static_cast<int>(first < depth ? first : depth), static_cast<int>(end < depth ? end : depth)};
}

// Where sums go: the result, or a matrix of fp32 for each run.
struct Target {
  void* data;
  std::int64_t row, column;  // elements from one to the next
  std::int64_t run;          // elements from one run's matrix to the next one's
  int dtype;
};

__device__ __forceinline__ void store(const Target& target, std::int64_t at, float sum) {
  if (target.dtype == static_cast<int>(DType::f32))
    static_cast<float*>(target.data)[at] = sum;
  else if (target.dtype == static_cast<int>(DType::bf16))
    static_cast<Bf16*>(target.data)[at] = round_to<Bf16>(sum);
  else
    static_cast<F16*>(target.data)[at] = round_to<F16>(sum);
}

__device__ __forceinline__ void store(const Target& target, int run, std::int64_t row, std::int64_t column, float sum) {
  store(target, run * target.run + row * target.row + column * target.column, sum);
}

// ---- lists --------------------------------------------------------------------------------------------------------------------

// Sizes of one dimension are 32 bits in these kernels; offsets are 64.
inline int extent(std::int64_t size, const char* expected) {
  if (size < 0 || size > INT32_MAX / 2) refuse(expected, size);
  return static_cast<int>(size);
}

inline int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

}  // namespace peftk::cuda
