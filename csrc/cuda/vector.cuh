// 128-bit accesses past the cache (evict first): what is read or written once must not push out what is used again.
#pragma once
#include "cuda/convert.cuh"

namespace peftk::cuda {

inline constexpr int kVectorBytes = 16;
template <class T>
inline constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));  // elements of one access

// Whether every element group of `bytes` from `data` on is where an access of that width must be.
inline bool is_aligned(const void* data, int bytes) { return reinterpret_cast<std::uintptr_t>(data) % bytes == 0; }

// kPerVector<T> elements from an aligned address.
template <class T>
__device__ __forceinline__ void load_vector(const T* data, float* values) {
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(data));
  const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      values[2 * i] = to_float(T{static_cast<std::uint16_t>(words[i])});
      values[2 * i + 1] = to_float(T{static_cast<std::uint16_t>(words[i] >> 16)});
    }
  }
}

// kPerVector<T> elements as they lie in memory.
template <class T>
__device__ __forceinline__ uint4 round_vector(const float* values) {
  if constexpr (sizeof(T) == 4)
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]), __float_as_uint(values[3])};
  else
    return {round_pair<T>(values[0], values[1]), round_pair<T>(values[2], values[3]), round_pair<T>(values[4], values[5]),
            round_pair<T>(values[6], values[7])};
}

// kPerVector<T> elements to an aligned address.
template <class T>
__device__ __forceinline__ void store_vector(T* data, const float* values) {
  __stcs(reinterpret_cast<uint4*>(data), round_vector<T>(values));
}

// Words in one access.
template <int n>
__device__ __forceinline__ void load_words(const std::uint32_t* data, std::uint32_t (&words)[n]) {
  static_assert(n == 1 || n == 2);
  if constexpr (n == 1) {
    words[0] = __ldcs(data);
  } else {
    const uint2 v = __ldcs(reinterpret_cast<const uint2*>(data));
    words[0] = v.x, words[1] = v.y;
  }
}

template <int n>
__device__ __forceinline__ void store_words(std::uint32_t* data, const std::uint32_t (&words)[n]) {
  static_assert(n == 1 || n == 2 || n == 4);
  if constexpr (n == 1)
    __stcs(data, words[0]);
  else if constexpr (n == 2)
    __stcs(reinterpret_cast<uint2*>(data), uint2{words[0], words[1]});
  else
    __stcs(reinterpret_cast<uint4*>(data), uint4{words[0], words[1], words[2], words[3]});
}

}  // namespace peftk::cuda
