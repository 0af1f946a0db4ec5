// Kernels with one bug each, and beside it the kernel as it should be: WRONG is 1 or 0.
#include <cuda_pipeline.h>

#include <cstdint>

template <bool WRONG>
__device__ void reverse_block(const int* x, int* y) {
  __shared__ int tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!WRONG) __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
extern "C" __global__ void missing_barrier(const int* x, int* y) { reverse_block<true>(x, y); }
extern "C" __global__ void with_barrier(const int* x, int* y) { reverse_block<false>(x, y); }

// The second round overwrites what slower threads may still read.
template <bool WRONG>
__device__ void two_rounds(const int* x, int* y) {
  __shared__ int tile[128];
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = x[threadIdx.x] + round;
    __syncthreads();
    sum += tile[127 - threadIdx.x];
    if (!WRONG) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
extern "C" __global__ void overwritten_too_soon(const int* x, int* y) { two_rounds<true>(x, y); }
extern "C" __global__ void overwritten_in_time(const int* x, int* y) { two_rounds<false>(x, y); }

// Threads of one warp exchange values.
template <bool WRONG>
__device__ void swap_in_warp(const int* x, int* y) {
  __shared__ volatile int tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!WRONG) __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}
extern "C" __global__ void missing_syncwarp(const int* x, int* y) { swap_in_warp<true>(x, y); }
extern "C" __global__ void with_syncwarp(const int* x, int* y) { swap_in_warp<false>(x, y); }

extern "C" __global__ void off_by_one(const int* x, int* y) { y[threadIdx.x + 1] = x[threadIdx.x]; }
extern "C" __global__ void in_bounds(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x]; }

extern "C" __global__ void misaligned_vector(const int* x, int* y) {
  *(int4*)(y + 4 * (threadIdx.x % 16)) = *(const int4*)(x + 1);
}
extern "C" __global__ void aligned_vector(const int* x, int* y) { *(int4*)(y + 4 * (threadIdx.x % 16)) = *(const int4*)(x + 4); }

template <bool WRONG>
__device__ void partly_written(const int* x, int* y) {
  __shared__ int tile[128];
  if (!WRONG || threadIdx.x != 77) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
extern "C" __global__ void uninitialised_shared(const int* x, int* y) { partly_written<true>(x, y); }
extern "C" __global__ void initialised_shared(const int* x, int* y) { partly_written<false>(x, y); }

template <bool WAITS, bool SYNCS>
__device__ void copied_in_flight(const int* x, int* y) {
  __shared__ __align__(16) int tile[128];
  if (threadIdx.x < 32) __pipeline_memcpy_async(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, 16);
  __pipeline_commit();
  if (WAITS) __pipeline_wait_prior(0);
  if (SYNCS) __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
extern "C" __global__ void missing_wait(const int* x, int* y) { copied_in_flight<false, true>(x, y); }
extern "C" __global__ void wait_without_barrier(const int* x, int* y) { copied_in_flight<true, false>(x, y); }
extern "C" __global__ void with_wait(const int* x, int* y) { copied_in_flight<true, true>(x, y); }

extern "C" __global__ void divergent_barrier(const int* x, int* y) {
  __shared__ int tile[128];
  if (threadIdx.x < 40) {
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[39 - threadIdx.x];
  }
}
extern "C" __global__ void missing_lane(const int* x, int* y) {
  int value = x[threadIdx.x];
  if (threadIdx.x < 16)
    y[threadIdx.x] = __shfl_xor_sync(~0u, value, 1);
  else
    __syncthreads();
}
extern "C" __global__ void beyond_shared(const int* x, int* y) {
  extern __shared__ int tile[];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void traps(const int* x, int* y) {
  if (x[threadIdx.x] == 5) __trap();
  y[threadIdx.x] = x[threadIdx.x];
}
extern "C" __global__ void two_writers(const int* x, int* y) { y[threadIdx.x / 2] = x[threadIdx.x]; }
extern "C" __global__ void two_writers_of_one_value(const int* x, int* y) { y[threadIdx.x / 2] = x[threadIdx.x / 2]; }
extern "C" __global__ void blocks_meet(const int* x, int* y) { y[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x]; }
