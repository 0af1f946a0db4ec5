// What every kernel file includes: CUDA's own words, and shared memory. Under PEFTK_CUDA_HOST the same words come from
// tests/emulation/cuda_host, where g++ builds the kernels and each thread is a fiber.
#pragma once
#include <cstdint>

#ifdef PEFTK_CUDA_HOST
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Shared memory of a block: PEFTK_SHARED(float, table, [256]); the launch's own bytes: PEFTK_DYNAMIC_SHARED(float, rows).
#define PEFTK_SHARED(Type, name, extent) __shared__ Type name extent
#define PEFTK_DYNAMIC_SHARED(Type, name)                                \
  extern __shared__ __align__(16) unsigned char peftk_dynamic_shared[]; \
  Type* const name = reinterpret_cast<Type*>(peftk_dynamic_shared)
#endif

namespace peftk::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// Threads that a multiprocessor should hold at once; registers are shared out for so many. Consumer GPUs hold no more than that.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr int kResidentThreads = 1024;
#else
inline constexpr int kResidentThreads = 1536;
#endif

}  // namespace peftk::cuda
