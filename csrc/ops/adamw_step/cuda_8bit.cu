// AdamW with moments in 8 bits, a list of tensors a launch: a warp takes a block of 256, 8 neighbours a lane, so that new moments
// wait in registers for their absmax, an exact maximum. Codes are looked up both ways: their values, and, by exponent and leading
// mantissa bits, the nearest code (cuda/code_buckets.cuh).
#include "cuda/code_buckets.cuh"
#include "cuda/reduce.cuh"
#include "format/dynamic8.h"
#include "ops/adamw_step/cuda_tensors.cuh"

namespace peftk::cuda {
namespace adamw_step_kernels {

constexpr int kThreads8 = 512, kBlocks8 = 2;  // 64 registers a thread
constexpr int kOwn8 = kStateBlock / kWarp;    // elements of a lane
constexpr int kChunk8 = kThreads8 / kWarp * kStateBlock;
constexpr int kTableWords = sizeof(CodeTables) / 4;

struct Place8 {
  void* param;
  const void* grad;
  std::uint8_t *state1, *state2;
  float *absmax1, *absmax2;
  std::int64_t count;

  __device__ __forceinline__ bool is_wide() const {
    const auto bits = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at); };
    return ((bits(param) | bits(grad)) % kVectorBytes | (bits(state1) | bits(state2)) % kOwn8) == 0;
  }
};
using List8 = TensorList<Place8>;
static_assert(sizeof(List8) + sizeof(Coefficients) + sizeof(void*) <= kMostParameterBytes);

// A lane's elements; of a block that isn't `whole`, the first `left` of them, the others zeros.
template <bool kWhole, class T>
__device__ __forceinline__ void load_own(const T* from, int left, float (&values)[kOwn8]) {
#pragma unroll
  for (int i = 0; i < kOwn8; i += kWhole ? kPerVector<T> : 1)
    if constexpr (kWhole)
      load_vector(from + i, values + i);
    else
      values[i] = i < left ? to_float(from[i]) : 0.0f;
}

template <bool kWhole, class T>
__device__ __forceinline__ void store_own(T* to, int left, const float (&values)[kOwn8]) {
#pragma unroll
  for (int i = 0; i < kOwn8; i += kWhole ? kPerVector<T> : 1)
    if constexpr (kWhole)
      store_vector(to + i, values + i);
    else if (i < left)
      to[i] = round_to<T>(values[i]);
}

using Codes = std::uint32_t[kOwn8 / 4];

template <bool kWhole>
__device__ __forceinline__ void load_codes(const std::uint8_t* from, int left, std::uint32_t zero, Codes& codes) {
  if constexpr (kWhole) {
    load_words(reinterpret_cast<const std::uint32_t*>(from), codes);
  } else {
#pragma unroll
    for (int i = 0; i < kOwn8; i++) {
      const std::uint32_t code = i < left ? from[i] : zero;
      codes[i / 4] = i % 4 ? codes[i / 4] | code << 8 * (i % 4) : code;
    }
  }
}

template <bool kWhole>
__device__ __forceinline__ void store_codes(std::uint8_t* to, int left, const Codes& codes) {
  if constexpr (kWhole) {
    store_words(reinterpret_cast<std::uint32_t*>(to), codes);
  } else {
#pragma unroll
    for (int i = 0; i < kOwn8; i++)
      if (i < left) to[i] = static_cast<std::uint8_t>(codes[i / 4] >> 8 * (i % 4));
  }
}

__device__ __forceinline__ void decode(const float* values, const Codes& codes, float absmax, float (&x)[kOwn8]) {
#pragma unroll
  for (int i = 0; i < kOwn8; i++) x[i] = __fmul_rn(values[codes[i / 4] >> 8 * (i % 4) & 255u], absmax);
}

struct Absmax {
  float value, reciprocal;
};

// A block's constant: of nothing above the denormals it is 0, since 1 / absmax may be infinite there. No constructor: nvcc leaves
// its initializers in the code for the host, which has no __frcp_rn.
__device__ __forceinline__ Absmax absmax_of(std::uint32_t most) {
  const float value = most < 0x00800000u ? 0.0f : __uint_as_float(most);
  return {value, value == 0.0f ? 0.0f : __frcp_rn(value)};
}

template <bool kSigned>
__device__ __forceinline__ void encode(const CodeTables& tables, const float (&x)[kOwn8], float reciprocal, Codes& codes) {
#pragma unroll
  for (int i = 0; i < kOwn8; i += 4) {
    float scaled[4];
#pragma unroll
    for (int j = 0; j < 4; j++) scaled[j] = __fmul_rn(x[i + j], reciprocal);
    if constexpr (kSigned)
      codes[i / 4] = nearest_signed(tables.signed_bucket, scaled, tables.signed_value[0]);
    else
      codes[i / 4] = nearest_unsigned(tables.unsigned_bucket, scaled);
  }
}

// A lane's part of a block, `first` elements into the tensor.
template <bool kWhole, class T>
__device__ __forceinline__ void step_block(const CodeTables& tables, const Coefficients& c, const Place8& at, std::int64_t first,
                                           int left) {
  T* const param = static_cast<T*>(at.param) + first;
  const T* const grad = static_cast<const T*>(at.grad) + first;
  float *const absmax1 = at.absmax1 + first / kStateBlock, *const absmax2 = at.absmax2 + first / kStateBlock;
  float p[kOwn8], g[kOwn8], m[kOwn8], v[kOwn8];
  Codes codes1, codes2;
  load_codes<kWhole>(at.state1 + first, left, 127, codes1);
  load_codes<kWhole>(at.state2 + first, left, 0, codes2);
  load_own<kWhole>(param, left, p);
  load_own<kWhole>(grad, left, g);
  decode(tables.signed_value, codes1, *absmax1, m);
  decode(tables.unsigned_value, codes2, *absmax2, v);

  std::uint32_t most1 = 0, most2 = 0;
#pragma unroll
  for (int i = 0; i < kOwn8; i++) {
    update(c, g[i], p[i], m[i], v[i]);
    most1 = max(most1, magnitude_bits(m[i])), most2 = max(most2, magnitude_bits(v[i]));
  }
  store_own<kWhole>(param, left, p);

  const Absmax new1 = absmax_of(warp_max(most1)), new2 = absmax_of(warp_max(most2));
  encode<true>(tables, m, new1.reciprocal, codes1);
  encode<false>(tables, v, new2.reciprocal, codes2);
  store_codes<kWhole>(at.state1 + first, left, codes1);
  store_codes<kWhole>(at.state2 + first, left, codes2);
  if (threadIdx.x % kWarp == 0) *absmax1 = new1.value, *absmax2 = new2.value;
}

template <class T>
__global__ void __launch_bounds__(kThreads8, kBlocks8)
    adamw_step8_kernel(const __grid_constant__ List8 list, const __grid_constant__ Coefficients c,
                       const std::uint32_t* __restrict__ tables_there) {  // CodeTables
  PEFTK_SHARED(CodeTables, tables, [1]);
  for (int i = threadIdx.x; i < kTableWords; i += kThreads8)
    reinterpret_cast<std::uint32_t*>(tables)[i] = __ldg(tables_there + i);
  __syncthreads();

  std::uint32_t number = 0, begin = 0, end = 0;  // tensor at hand, its chunks
  for (std::uint32_t chunk = blockIdx.x; chunk < list.chunks(); chunk += gridDim.x) {
    if (chunk >= end) number = list.find(chunk), begin = list.first[number], end = list.first[number + 1];
    const Place8& at = list.of[number];
    const std::int64_t block = (chunk - begin) * static_cast<std::int64_t>(kChunk8) + threadIdx.x / kWarp * kStateBlock;
    const std::int64_t left = at.count - block;
    const int own = threadIdx.x % kWarp * kOwn8;
    if (left >= kStateBlock && at.is_wide())
      step_block<true, T>(tables[0], c, at, block + own, kOwn8);
    else if (left > 0)  // of a whole warp
      step_block<false, T>(tables[0], c, at, block + own, left < kStateBlock ? static_cast<int>(left) - own : kOwn8);
  }
}

}  // namespace adamw_step_kernels

void adamw_step8(const std::vector<AdamTensor8>& tensors, int dtype, const std::vector<float>& coefficients,
                 const std::int32_t* tables, void* stream) {
  using namespace adamw_step_kernels;
  const Coefficients c = make_coefficients(coefficients);
  with_type(static_cast<void*>(nullptr), dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const auto place = [](const AdamTensor8& tensor) {
      const auto& [param, grad, state1, state2, absmax1, absmax2, count] = tensor;
      return Place8{param, grad, state1, state2, absmax1, absmax2, count};
    };
    for_each_list<Place8>(tensors, kChunk8, place, [&](const List8& list) {
      launch(adamw_step8_kernel<T>, blocks_for(list.first[list.count], 1, kBlocks8), kThreads8, 0, stream, list, c,
             reinterpret_cast<const std::uint32_t*>(tables));
    });
  });
}

}  // namespace peftk::cuda
