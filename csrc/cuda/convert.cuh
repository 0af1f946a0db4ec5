// fp32 from and to the element types, rounded to nearest even as the hardware does it.
#pragma once
#include <cstring>

#include "cuda/kernel.cuh"
#include "format/dtype.h"

namespace peftk::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(F16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Two elements as they lie in memory, the first in the low half.
template <class T>
__device__ __forceinline__ std::uint32_t round_pair(float first, float second);
template <>
__device__ __forceinline__ std::uint32_t round_pair<Bf16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  std::uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
template <>
__device__ __forceinline__ std::uint32_t round_pair<F16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  std::uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <class T>
__device__ __forceinline__ T round_to(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return T{static_cast<std::uint16_t>(round_pair<T>(x, 0.0f))};
}

}  // namespace peftk::cuda
