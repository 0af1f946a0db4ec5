// From global to shared memory past the registers, sm_80 and later: copies are under way until their group was waited for, and
// other threads see them after a barrier behind that wait.
#pragma once
#include "cuda/kernel.cuh"

namespace peftk::cuda {

#ifdef PEFTK_CUDA_HOST
using cuda_host::commit_copies;
using cuda_host::copy_async;
inline void copy_async_of_line(void* shared, const void* global) { copy_async(shared, global); }
using cuda_host::wait_copies;
#else

// 16 bytes between aligned addresses, kept out of L1. The first `bytes` of them are read, the rest become zeros: with 0 the
// source is not touched, but must be a valid address all the same.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes = 16) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "r"(bytes)
      : "memory");
}

// 16 bytes of a 128-byte line whose others are wanted soon: L2 fetches them as well.
__device__ __forceinline__ void copy_async_of_line(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
}

// What this thread has copied since the last commit becomes a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the newest `kUnderWay` groups of this thread are under way.
template <int kUnderWay>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kUnderWay) : "memory");
}
#endif

}  // namespace peftk::cuda
