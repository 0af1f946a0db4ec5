// Kernels whose SASS is known: what bench/static must read out of it.
#include <cuda_fp16.h>

#include <cstdint>

// 32 bytes a thread, all by 128-bit accesses.
extern "C" __global__ void __launch_bounds__(256) copy(const uint4* __restrict__ x, uint4* __restrict__ y) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  y[i] = x[i];
}

// 16 bytes by one access, 16 by four.
extern "C" __global__ void __launch_bounds__(128) unpack(const uint4* __restrict__ x, uint32_t* __restrict__ y) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  const uint4 four = x[i];
  y[i] = four.x;
  y[i + 128] = four.y;
  y[i + 256] = four.z;
  y[i + 384] = four.w;
}

// A hot loop: one 128-bit load and four additions a round. 1024 bytes of shared memory.
extern "C" __global__ void __launch_bounds__(256) sum(const float4* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float of_thread[256];
  float total = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    const float4 four = x[i];
    total += four.x;
    total += four.y;
    total += four.z;
    total += four.w;
  }
  of_thread[threadIdx.x] = total;
  __syncthreads();
  y[threadIdx.x] = of_thread[255 - threadIdx.x];
}

// Whole tiles by 128-bit accesses, the last one byte by byte.
extern "C" __global__ void __launch_bounds__(64) copy_ragged(const uint8_t* __restrict__ x, uint8_t* __restrict__ y, int n) {
  const int first = (blockIdx.x * 64 + threadIdx.x) * 16;
  if (first + 16 <= n) {
    *reinterpret_cast<uint4*>(y + first) = *reinterpret_cast<const uint4*>(x + first);
    return;
  }
#pragma unroll 1
  for (int i = first; i < n; i++) y[i] = x[i];
}

// 2048 threads a multiprocessor leave 32 registers, too few for 64 sums.
extern "C" __global__ void __launch_bounds__(1024, 65536 / 1024 / 32)
    spilling(const float* __restrict__ x, float* __restrict__ y, int n) {
  float sums[64] = {};
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int j = 0; j < 64; j++) sums[j] = sums[j] * x[i * 64 + j] + x[i + j * n];
#pragma unroll
  for (int j = 0; j < 64; j++) y[threadIdx.x * 64 + j] = sums[j];
}

// An index that the compiler doesn't know: the array has to lie in memory.
extern "C" __global__ void __launch_bounds__(64) local_array(const int* __restrict__ at, float* __restrict__ y, int n) {
  float values[64];
  for (int i = 0; i < 64; i++) values[i] = y[i];
  for (int i = 0; i < n; i++) values[at[i] & 63] += values[at[i + 1] & 63];
  y[threadIdx.x] = values[threadIdx.x & 63];
}

// Two MMAs a round.
extern "C" __global__ void __launch_bounds__(32)
    multiply(const uint32_t* __restrict__ a, const uint32_t* __restrict__ b, float* __restrict__ c, int rounds) {
  float sums[8] = {};
#pragma unroll 1
  for (int i = 0; i < rounds; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float* s = sums + 4 * half;
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                   : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
                   : "r"(a[i * 64 + threadIdx.x]), "r"(a[i * 64 + 32 + threadIdx.x]), "r"(b[(2 * i + half) * 32 + threadIdx.x]));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) c[i * 32 + threadIdx.x] = sums[i];
}

// No bound on the threads of a block.
extern "C" __global__ void unbounded(float* __restrict__ y) { y[threadIdx.x] = 0; }
