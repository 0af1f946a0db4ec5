// out = T(x * (word i % 4 of Philox counter i / 4 >= drop_below ? keep_scale : 0)): x * 0 where dropped, so that NaN stays NaN
// and zeros keep x's sign, as in the definition. One 128-bit access a thread and round: one counter for 4 fp32, two for 8
// elements of 16 bits.
#include "cuda/launch.h"
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"
#include "ops/philox_dropout/op.h"

namespace peftk::cuda {
namespace philox_dropout_kernels {

constexpr int kThreads = 256;

// Four neighbours, the first of them element 4 * counter.
__device__ __forceinline__ void drop_four(const Dropout& dropout, std::uint64_t counter, float* values) {
  const uint4 words = philox(counter, dropout.seed);
  values[0] = __fmul_rn(values[0], words.x >= dropout.drop_below ? dropout.keep_scale : 0.0f);
  values[1] = __fmul_rn(values[1], words.y >= dropout.drop_below ? dropout.keep_scale : 0.0f);
  values[2] = __fmul_rn(values[2], words.z >= dropout.drop_below ? dropout.keep_scale : 0.0f);
  values[3] = __fmul_rn(values[3], words.w >= dropout.drop_below ? dropout.keep_scale : 0.0f);
}

// `wide`: x and out are where 128-bit accesses must be.
template <class T>
__global__ void __launch_bounds__(kThreads)
    philox_dropout_kernel(const T* __restrict__ x, std::int64_t count, const Dropout dropout, bool wide, T* __restrict__ out) {
  constexpr int kOwn = kPerVector<T>;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads * kOwn;
  std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kOwn;
  for (; first < count; first += step) {
    const bool whole = wide && first + kOwn <= count;
    float values[kOwn];
    if (whole)
      load_vector(x + first, values);
    else
#pragma unroll
      for (int i = 0; i < kOwn; i++) values[i] = first + i < count ? to_float(x[first + i]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) drop_four(dropout, (first + i) / 4, values + i);
    if (whole)
      store_vector(out + first, values);
    else
#pragma unroll
      for (int i = 0; i < kOwn; i++)
        if (first + i < count) out[first + i] = round_to<T>(values[i]);
  }
}

}  // namespace philox_dropout_kernels

void philox_dropout(const void* x, int dtype, std::int64_t count, std::uint32_t drop_below, float keep_scale, std::uint64_t seed,
                    void* out, void* stream) {
  using namespace philox_dropout_kernels;
  if (count == 0) return;
  with_type(x, dtype, [&](const auto* values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    const bool wide = is_aligned(x, kVectorBytes) && is_aligned(out, kVectorBytes);
    const unsigned blocks = blocks_for(count, kThreads * kPerVector<T>, kResidentThreads / kThreads);
    launch(philox_dropout_kernel<T>, blocks, kThreads, 0, stream, values, count, Dropout{drop_below, keep_scale, seed}, wide,
           static_cast<T*>(out));
  });
}

}  // namespace peftk::cuda
