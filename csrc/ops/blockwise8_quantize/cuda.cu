// code = the value of the dynamic code nearest to x * (1 / absmax), the lower one on a tie: thresholds as in format/dynamic8.h.
// One pass: a block's elements stay in registers between the maximum and the codes. The thresholds are searched as a heap: node
// k's children are 2k and 2k + 1, so that neighbours of a level lie in different banks and the leaf's number ends in the code.
#include "cuda/block_absmax.cuh"
#include "format/dynamic8.h"
#include "ops/blockwise8_quantize/op.h"

namespace peftk::cuda {
namespace blockwise8_quantize_kernels {  // a kernel needs a name that other files can see

constexpr int kThreads = 512;

struct Heap {            // a kernel parameter
  float threshold[256];  // [0] is not used
  std::uint32_t zero;    // code of a block of zeros
};

Heap make_heap(const Code8& code) {
  Heap heap{};
  for (int level = 0; level < 8; level++)
    for (int i = 0; i < 1 << level; i++) heap.threshold[(1 << level) + i] = code.threshold[((2 * i + 1) << (7 - level)) - 1];
  heap.zero = static_cast<std::uint32_t>(code.zero);
  return heap;
}

// NaN exceeds no threshold and gets code 0.
__device__ __forceinline__ std::uint32_t code_of(const float* heap, float scaled) {
  std::uint32_t node = 1;
#pragma unroll
  for (int level = 0; level < 8; level++) node = 2 * node + (scaled > heap[node]);
  return node & 255u;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    blockwise8_quantize_kernel(const T* __restrict__ x, const Blocks blocks, const Heap thresholds,
                               std::uint8_t* __restrict__ codes, float* __restrict__ absmax) {
  PEFTK_SHARED(float, heap, [256]);
  PEFTK_SHARED(std::uint32_t, partial, [kMostWarps]);
  for (int i = threadIdx.x; i < 256; i += kThreads) heap[i] = thresholds.threshold[i];
  __syncthreads();

  // Threads beyond the last whole block look at its elements once more, for the reductions' sake.
  const std::int64_t owners = blocks.whole << blocks.log_lanes, stride = gridDim.x * static_cast<std::int64_t>(kThreads);
  for (std::int64_t base = blockIdx.x * static_cast<std::int64_t>(kThreads); base < owners; base += stride) {
    const bool mine = base + threadIdx.x < owners;
    const std::int64_t owner = mine ? base + threadIdx.x : owners - 1, first = owner * kOwn<T>;
    float own[kOwn<T>];
    load_own(x + first, own);
    const float most = __uint_as_float(group_max(own_max(own), blocks.log_lanes, partial));
    if (!mine) continue;
    if ((owner & ((1 << blocks.log_lanes) - 1)) == 0) absmax[owner >> blocks.log_lanes] = most;
    const float reciprocal = reciprocal_of(most);
    std::uint32_t words[kOwn<T> / 4];
#pragma unroll
    for (int i = 0; i < kOwn<T>; i++) {
      const std::uint32_t code = code_of(heap, __fmul_rn(own[i], reciprocal));
      words[i / 4] = i % 4 ? words[i / 4] | code << 8 * (i % 4) : code;
    }
#pragma unroll
    for (int i = 0; i < kOwn<T> / 4; i++) words[i] = most == 0.0f ? thresholds.zero * 0x01010101u : words[i];
    store_words(reinterpret_cast<std::uint32_t*>(codes + first), words);
  }

  const int lane = threadIdx.x % kWarp;
  const std::int64_t warp = blockIdx.x * static_cast<std::int64_t>(kThreads / kWarp) + threadIdx.x / kWarp;
  for (std::int64_t block = blocks.whole + warp; block * blocks.size < blocks.count; block += gridDim.x * (kThreads / kWarp)) {
    const std::int64_t start = block * blocks.size, left = blocks.count - start, length = left < blocks.size ? left : blocks.size;
    const float most = __uint_as_float(warp_absmax(x + start, lane, length)), reciprocal = reciprocal_of(most);
    if (lane == 0) absmax[block] = most;
    for (std::int64_t i = start + lane; i < start + length; i += kWarp) {
      const std::uint32_t code = most == 0.0f ? thresholds.zero : code_of(heap, __fmul_rn(to_float(x[i]), reciprocal));
      codes[i] = static_cast<std::uint8_t>(code);
    }
  }
}

}  // namespace blockwise8_quantize_kernels

void blockwise8_quantize(const void* x, int dtype, std::int64_t count, std::int64_t block_size, bool is_signed,
                         std::uint8_t* codes, float* absmax, void* stream) {
  using namespace blockwise8_quantize_kernels;
  if (count == 0) return;
  const Heap heap = make_heap(code8(is_signed));
  with_type(x, dtype, [&](const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    const Blocks blocks = make_blocks(values, count, block_size, kThreads, is_aligned(codes, kOwn<T>));
    launch(blockwise8_quantize_kernel<T>, grid_of<T>(blocks, kThreads), kThreads, 0, stream, values, blocks, heap, codes, absmax);
  });
}

}  // namespace peftk::cuda
