// Shared memory by 32-bit addresses: their sums with constants cost nothing in a load or a store.
#pragma once
#include "cuda/kernel.cuh"

namespace peftk::cuda {

#ifdef PEFTK_CUDA_HOST
using SharedAddress = unsigned char*;
template <class T>
SharedAddress shared_address(T* at) {
  return reinterpret_cast<SharedAddress>(at);
}
template <class T>
T* shared_pointer(SharedAddress at) {
  return reinterpret_cast<T*>(at);
}
inline SharedAddress held(SharedAddress at) { return at; }
inline uint4 load_in_order(SharedAddress at) { return *shared_pointer<uint4>(at); }
#else
using SharedAddress = std::uint32_t;

template <class T>
__device__ __forceinline__ SharedAddress shared_address(T* at) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(at));
}
template <class T>
__device__ __forceinline__ T* shared_pointer(SharedAddress at) {
  return static_cast<T*>(__cvta_shared_to_generic(at));
}

// The same, kept in a register: an address that can be made out of threadIdx ptxas makes again in every round of a loop. By whole
// warps.
__device__ __forceinline__ SharedAddress held(SharedAddress at) { return __shfl_sync(kWholeWarp, at, threadIdx.x % kWarp); }

// 128 bits, loads in the order in which they are written down: ptxas begins a long round with all of its loads, until registers
// run out and it spills.
__device__ __forceinline__ uint4 load_in_order(SharedAddress at) {
  uint4 v;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}
#endif

}  // namespace peftk::cuda
