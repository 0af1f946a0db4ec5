// out = T(value8[code] * absmax + 0), as in nf4_dequantize. A thread's turn is what one 128-bit store holds.
#include "cuda/block_scale.cuh"
#include "cuda/launch.h"
#include "cuda/vector.cuh"
#include "ops/blockwise8_dequantize/op.h"

namespace peftk::cuda {
namespace blockwise8_dequantize_kernels {  // a kernel needs a name that other files can see

constexpr int kThreads = 256;

__device__ __forceinline__ float decode(const float* value8, std::uint32_t code, float scale) {
  return __fadd_rn(__fmul_rn(value8[code], scale), 0.0f);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    blockwise8_dequantize_kernel(const std::uint8_t* __restrict__ codes, const float* __restrict__ absmax,
                                 const std::int64_t count, const std::int64_t block_size,
                                 const int log_block,        // of a power of two
                                 const std::int64_t chunks,  // stores of 128 bits, from the first element on, each of one block
                                 const Values8 table, T* __restrict__ out) {
  constexpr int kChunk = kPerVector<T>;
  PEFTK_SHARED(float, value8, [256]);
  for (int i = threadIdx.x; i < 256; i += kThreads) value8[i] = table.value[i];
  __syncthreads();
  const std::int64_t thread = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x;
  const std::int64_t threads = gridDim.x * static_cast<std::int64_t>(kThreads);

  for (std::int64_t chunk = thread; chunk < chunks; chunk += threads) {
    std::uint32_t words[kChunk / 4];
    load_words(reinterpret_cast<const std::uint32_t*>(codes + chunk * kChunk), words);
    const float scale = absmax[chunk * kChunk >> log_block];
    float values[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i++) values[i] = decode(value8, words[i / 4] >> 8 * (i % 4) & 255u, scale);
    store_vector(out + chunk * kChunk, values);
  }
  for (std::int64_t i = chunks * kChunk + thread; i < count; i += threads)
    out[i] = round_to<T>(decode(value8, codes[i], absmax[i / block_size]));
}

}  // namespace blockwise8_dequantize_kernels

void blockwise8_dequantize(const std::uint8_t* codes, const float* absmax, std::int64_t count, std::int64_t block_size,
                           bool is_signed, void* out, int dtype, void* stream) {
  using namespace blockwise8_dequantize_kernels;
  if (count == 0) return;
  with_type(out, dtype, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    constexpr int kChunk = kPerVector<T>;
    const bool fits = block_size % kChunk == 0 && (block_size & (block_size - 1)) == 0;
    const std::int64_t chunks = fits && is_aligned(codes, kChunk) && is_aligned(values, kVectorBytes) ? count / kChunk : 0;
    launch(blockwise8_dequantize_kernel<T>, blocks_for(count, kThreads * kChunk, kResidentThreads / kThreads), kThreads, 0,
           stream, codes, absmax, count, block_size, __builtin_ctzll(block_size), chunks, values8(is_signed), values);
  });
}

}  // namespace peftk::cuda
