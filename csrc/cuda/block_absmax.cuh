// Quantisation blocks over a grid. Main path: kOwn neighbouring elements a thread (two 128-bit loads), size / kOwn threads a
// block; all else, the last partial block among it: a warp a block, element by element.
#pragma once
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace peftk::cuda {

template <class T>
inline constexpr int kOwn = 2 * kPerVector<T>;

struct Blocks {
  std::int64_t count;  // elements
  std::int64_t size;   // elements a block
  std::int64_t whole;  // blocks of the main path, the first ones
  int log_lanes;       // neighbouring threads that share a block there, log2: at most the threads of a thread block
};

// Where `wide` says that outputs are aligned as well.
template <class T>
Blocks make_blocks(const T* data, std::int64_t count, std::int64_t size, int threads, bool wide) {
  const std::int64_t lanes = size / kOwn<T>;
  const bool fits = size % kOwn<T> == 0 && lanes <= threads && (lanes & (lanes - 1)) == 0;
  if (!fits || !wide || !is_aligned(data, kVectorBytes)) return {count, size, 0, 0};
  return {count, size, count / size, __builtin_ctzll(lanes)};
}

// Thread blocks of `threads` for all of it.
template <class T>
unsigned grid_of(const Blocks& blocks, int threads) {
  return blocks_for(blocks.count, static_cast<std::int64_t>(kOwn<T>) * threads, kResidentThreads / threads);
}

template <class T>
__device__ __forceinline__ void load_own(const T* data, float (&values)[kOwn<T>]) {
  load_vector(data, values);
  load_vector(data + kPerVector<T>, values + kPerVector<T>);
}

// Of a thread's elements, as magnitude_bits.
template <int n>
__device__ __forceinline__ std::uint32_t own_max(const float (&values)[n]) {
  std::uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < n; i++) most = max(most, magnitude_bits(values[i]));
  return most;
}

// Of `length` elements that a whole warp looks at, in all lanes.
template <class T>
__device__ __forceinline__ std::uint32_t warp_absmax(const T* data, int lane, std::int64_t length) {
  std::uint32_t most = 0;
  for (std::int64_t i = lane; i < length; i += kWarp) most = max(most, magnitude_bits(to_float(data[i])));
  return group_max(most, 5, nullptr);
}

// 1 / absmax in one rounding; x * it is what codes are made of. Infinite where absmax is 0 or below 2^-128, 0 or NaN where absmax
// is not finite.
__device__ __forceinline__ float reciprocal_of(float absmax) { return __frcp_rn(absmax); }

}  // namespace peftk::cuda
