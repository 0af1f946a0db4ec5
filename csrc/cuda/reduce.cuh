// Maxima over warps, parts of them, and several of them.
#pragma once
#include "cuda/kernel.cuh"

namespace peftk::cuda {

inline constexpr int kMostWarps = 32;  // of a block

// |x| as bits, an order in which NaN > Inf > every number: so the maximum tells whether all are finite.
__device__ __forceinline__ std::uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Over 2^log_lanes neighbouring threads, in all of them. Above a warp every thread of the block must come here. `partial`:
// kMostWarps numbers in shared memory.
__device__ __forceinline__ std::uint32_t group_max(std::uint32_t value, int log_lanes, std::uint32_t* partial) {
  constexpr int kLogWarp = 5;
#pragma unroll
  for (int step = 0; step < kLogWarp; step++)
    if (step < log_lanes) value = max(value, __shfl_xor_sync(kWholeWarp, value, 1 << step));
  if (log_lanes <= kLogWarp) return value;
  const int warp = threadIdx.x / kWarp, warps = 1 << (log_lanes - kLogWarp), first = warp & ~(warps - 1);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarp == 0) partial[warp] = value;
  __syncthreads();
  for (int i = 0; i < warps; i++) value = max(value, partial[first + i]);
  return value;
}

// Over a whole warp, in all lanes: one instruction since sm_80.
__device__ __forceinline__ std::uint32_t warp_max(std::uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return group_max(value, 5, nullptr);
#else
  return __reduce_max_sync(kWholeWarp, value);
#endif
}

}  // namespace peftk::cuda
