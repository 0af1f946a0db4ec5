// The one place where a kernel meets its grid, its stream and the bytes of its parameters. Nothing here allocates or waits, so
// ops can be captured in a CUDA graph.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernel.cuh"

namespace peftk::cuda {

template <class T>
struct AsDeclared {
  using Type = T;
};

#ifdef PEFTK_CUDA_HOST
using cuda_host::capability;
using cuda_host::launch;
using cuda_host::multiprocessors;
#else
inline constexpr std::size_t kSharedWithoutAsking = 48 << 10;  // bytes of shared memory that every launch may take

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline const char* name_of([[maybe_unused]] const void* kernel) {
#if CUDART_VERSION >= 12030
  const char* name = nullptr;
  if (cudaFuncGetName(&name, kernel) == cudaSuccess && name) return name;
#endif
  return "a kernel whose name CUDA does not tell";
}

// Of the current device.
inline int attribute(cudaDeviceAttr which, const char* what) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&value, which, device), what);
  return value;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, "the device's multiprocessors"); }
inline int capability() {  // 80: sm_80
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, "the device's capability") +
         attribute(cudaDevAttrComputeCapabilityMinor, "the device's capability");
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...),                              // __global__
            dim3 blocks,                                                // of the grid
            dim3 threads,                                               // of a block
            std::size_t shared_bytes,                                   // dynamic shared memory of a block
            void* stream,                                               // cudaStream_t
            const typename AsDeclared<Parameters>::Type&... arguments)  // converted to what the kernel declares
{
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, blocks, threads, pointers, shared_bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) check(error, name_of(function));
}
#endif

// Blocks for `units` of work, so many a block, where each block takes more than one once the device is full.
inline unsigned blocks_for(std::int64_t units, std::int64_t units_a_block, int blocks_a_multiprocessor) {
  const std::int64_t wanted = (units + units_a_block - 1) / units_a_block;
  const std::int64_t resident = static_cast<std::int64_t>(multiprocessors()) * blocks_a_multiprocessor;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < resident ? wanted : resident);
}

}  // namespace peftk::cuda
