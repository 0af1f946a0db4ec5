// Small kernels that the PTX emulator runs against numpy: control flow, shared and local memory, atomics, structs.
#include <cuda_fp16.h>

#include <cstdint>

struct Affine {
  int n;            // elements
  float slope;      //
  const float* x;   // (n,)
  float shifts[3];  // added by i % 3
};

extern "C" __global__ void affine(Affine p,
                                  float* y  // (p.n,)
) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) y[i] = p.slope * p.x[i] + p.shifts[i % 3];
}

extern "C" __global__ void collatz(const uint32_t* x,  // (n,)
                                   uint32_t* steps,    // (n,)
                                   int n               // elements
) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint32_t value = x[i], count = 0;
  while (value != 1) {
    value = value & 1 ? 3 * value + 1 : value / 2;
    ++count;
  }
  steps[i] = count;
}

extern "C" __global__ void sum_rows(const float* x,  // (gridDim.x, n)
                                    float* sums,     // (gridDim.x,)
                                    int n            // columns
) {
  __shared__ float of_warp[32];
  float sum = 0;
  for (int j = threadIdx.x; j < n; j += blockDim.x) sum += x[(int64_t)blockIdx.x * n + j];
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.f;
    for (int distance = 16; distance; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

extern "C" __global__ void histogram(const uint8_t* x,  // (n,)
                                     unsigned* counts,  // (256,)
                                     int n              // elements
) {
  __shared__ unsigned here[256];
  for (int j = threadIdx.x; j < 256; j += blockDim.x) here[j] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&here[x[i]], 1u);
  __syncthreads();
  for (int j = threadIdx.x; j < 256; j += blockDim.x) atomicAdd(&counts[j], here[j]);
}

// A stack in local memory: reverses each group of `depth` numbers.
extern "C" __global__ void reverse_groups(const int* x,  // (threads, depth)
                                          int* y,        // (threads, depth)
                                          int depth      // at most 16
) {
  int stack[16];
  int64_t first = (int64_t)(blockIdx.x * blockDim.x + threadIdx.x) * depth;
  for (int j = 0; j < depth; ++j) stack[j] = x[first + j];
  for (int j = 0; j < depth; ++j) y[first + j] = stack[depth - 1 - j];
}

extern "C" __global__ void choose(const int* which,  // (n,)
                                  int* y,            // (n,)
                                  int n              // elements
) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int value;
  switch (which[i]) {
    case 0: value = i * 3; break;
    case 1: value = -i; break;
    case 2: value = i * i; break;
    case 3: value = i / 7; break;
    case 4: value = i % 5; break;
    case 5: value = i ^ 0x55; break;
    default: value = 77;
  }
  y[i] = value;
}

__constant__ float weights[4] = {0.5f, 1.f, 2.f, 4.f};
__device__ int launches;

extern "C" __global__ void weighted(const float4* x,  // (n,)
                                    float* y,         // (n,)
                                    int n             // vectors
) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i == 0) ++launches;
  if (i >= n) return;
  float4 v = x[i];
  y[i] = v.x * weights[0] + v.y * weights[1] + v.z * weights[2] + v.w * weights[3] + launches - launches;
  y[i] += weights[i % 4];
}

// Each thread in turn adds to one number under a lock that the others wait for in a loop.
extern "C" __global__ void locked_sum(int* lock,   // 0: free
                                      int* total,  //
                                      int* order   // (threads,)
) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      order[threadIdx.x] = *(volatile int*)total;
      *(volatile int*)total += 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}

extern "C" __global__ void warp_words(const unsigned* x,  // (threads,)
                                      unsigned* y         // (5, threads)
) {
  unsigned i = threadIdx.x, n = blockDim.x, value = x[i];
  y[i] = __ballot_sync(~0u, value & 1);
  y[n + i] = __any_sync(~0u, value > 90) + 2 * __all_sync(~0u, value < 98);
  y[2 * n + i] = __match_any_sync(~0u, value & 3);
  y[3 * n + i] = __reduce_add_sync(~0u, value);
  y[4 * n + i] = i % 32 < 20 ? __shfl_sync(0xFFFFF, value, (i + 3) % 20) : 5u;
}

extern "C" __global__ void special_functions(const float* x,  // (n,)
                                             float* y,        // (6, n)
                                             int n            // elements
) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  y[i] = expf(v);
  y[n + i] = logf(fabsf(v));
  y[2 * n + i] = sinf(v * 100.f);
  y[3 * n + i] = tanhf(v);
  y[4 * n + i] = 1.f / (1.f + __expf(-v));
  y[5 * n + i] = (float)(sqrt((double)fabsf(v)) / 3.0);
}
