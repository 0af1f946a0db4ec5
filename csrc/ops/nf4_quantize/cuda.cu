// code = code_of_rank[#{t : x * (1 / absmax) > t}], absmax = max |x| over the block; formats as in format/nf4.h.
// One pass: a block's elements stay in registers between the maximum and the codes.
// The trick: no interval [i/16, (i+1)/16) has numbers on both sides of two thresholds, so one comparison with its own gives the
// rank. Its number is the integer part of 16x + 17, which a sum that rounds down leaves in the mantissa's upper bits.
#include "cuda/block_absmax.cuh"
#include "format/nf4.h"
#include "ops/nf4_quantize/op.h"

namespace peftk::cuda {
namespace nf4_quantize_kernels {  // a kernel needs a name that other files can see

constexpr int kThreads = 512;     // 4096 fp32 elements are 512 threads' own
constexpr int kIntervals = 64;    // 34 used: x * (1 / absmax) may be an ulp beyond 1
constexpr int kCopies = 16;       // a 64-bit access is served half a warp at a time: no two lanes meet in a bank
constexpr int kIntervalBits = 7;  // bytes of an interval's row, log2
constexpr float kShift = static_cast<float>(1 << (23 - kIntervalBits)) + 17.0f;  // its ulp is 2^-kIntervalBits
constexpr int kPerWord = 8;                                                      // codes of a packed 32-bit word
constexpr float kLeastNormal = 0x1p-126f;  // 1 / absmax is finite from there on, and beside it

struct Interval {
  float threshold;     // the only one that numbers of the interval may exceed
  std::uint32_t rank;  // of those that don't
};
struct Row {
  Interval copy[kCopies];
};
static_assert(sizeof(Row) == 1 << kIntervalBits, "interval_of counts on it");

struct Code {  // Code4 as a kernel parameter
  float threshold[16];
  std::uint64_t code_of_rank;  // 4 bits a rank
  std::uint32_t code_of_zero;
};
constexpr std::uint64_t kRanksAreCodes = 0xfedcba9876543210u;

__device__ __forceinline__ std::uint32_t rank_of(const Code& code, float x) {
  std::uint32_t rank = 0;
#pragma unroll
  for (int i = 0; i < 15; i++) rank += x > code.threshold[i];
  return rank;
}

__device__ __forceinline__ void fill(Row* rows, const Code& code) {
  for (int i = threadIdx.x; i < kIntervals * kCopies; i += kThreads) {
    const float start = static_cast<float>(i / kCopies - 17) / 16.0f;
    std::uint32_t rank = 0;
    float threshold = code.threshold[0];
#pragma unroll
    for (int t = 0; t < 15; t++) {
      const bool below = code.threshold[t] < start;
      rank += below;
      threshold = below ? code.threshold[t + 1] : threshold;
    }
    rows[i / kCopies].copy[i % kCopies] = {threshold, rank};
  }
  __syncthreads();
}

// Finite x, |x| <= 1 and an ulp. `at` is the lane's own place in a row, in bytes.
__device__ __forceinline__ Interval interval_of(const Row* rows, float x, std::uint32_t at) {
  const std::uint32_t row = __float_as_uint(__fmaf_rd(x, 16.0f, kShift)) & (kIntervals - 1) << kIntervalBits;
  return *reinterpret_cast<const Interval*>(reinterpret_cast<const char*>(rows) + (row | at));
}

__device__ __forceinline__ std::uint32_t code_of(const Code& code, std::uint32_t rank) {
  return static_cast<std::uint32_t>(code.code_of_rank >> 4 * rank) & 15u;
}

// kPerWord codes as they lie in memory, the first in the highest nibble of the lowest byte.
__device__ __forceinline__ std::uint32_t in_memory(std::uint32_t first_on_top) { return __byte_perm(first_on_top, 0, 0x0123); }

__device__ __forceinline__ std::uint32_t encode(const Row* rows, const Code& code, const float* x, float reciprocal,
                                                std::uint32_t at) {
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kPerWord; i++) {
    const float scaled = __fmul_rn(x[i], reciprocal);
    const Interval interval = interval_of(rows, scaled, at);
    word = (word << 4) + interval.rank;
    if (scaled > interval.threshold) word++;
  }
  if (code.code_of_rank != kRanksAreCodes) {
    std::uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < kPerWord; i++) codes |= code_of(code, word >> 4 * i & 15u) << 4 * i;
    word = codes;
  }
  return in_memory(word);
}

// Any absmax: zero, so small that its reciprocal is infinite, not finite. NaN exceeds no threshold.
__device__ __forceinline__ std::uint32_t encode_one(const Code& code, float x, float absmax) {
  return absmax == 0.0f ? code.code_of_zero : code_of(code, rank_of(code, __fmul_rn(x, reciprocal_of(absmax))));
}

template <class T>
__device__ __forceinline__ void encode_own(const Row* rows, const Code& code, const float (&x)[kOwn<T>], float absmax,
                                           std::uint32_t at, std::uint8_t* packed) {
  const float reciprocal = reciprocal_of(absmax);
  std::uint32_t words[kOwn<T> / kPerWord];
#pragma unroll
  for (int i = 0; i < kOwn<T> / kPerWord; i++) words[i] = encode(rows, code, x + i * kPerWord, reciprocal, at);
  store_words(reinterpret_cast<std::uint32_t*>(packed), words);
}

// Elements [first, first + length) of w, in steps of `stride` pairs.
template <class T>
__device__ __forceinline__ void encode_pairs(const Code& code, const T* w, std::int64_t first, std::int64_t length,
                                             std::int64_t stride, float absmax, std::uint8_t* packed) {
#pragma unroll 1
  for (std::int64_t i = 0; i < length; i += 2 * stride) {
    const std::uint32_t high = encode_one(code, to_float(w[first + i]), absmax);
    const std::uint32_t low = i + 1 < length ? encode_one(code, to_float(w[first + i + 1]), absmax) : code.code_of_zero;
    packed[(first + i) / 2] = static_cast<std::uint8_t>(high << 4 | low);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    nf4_quantize_kernel(const T* __restrict__ w, const Blocks blocks, const Code code, std::uint8_t* __restrict__ packed,
                        float* __restrict__ absmax) {
  PEFTK_SHARED(Row, rows, [kIntervals]);
  PEFTK_SHARED(std::uint32_t, partial, [kMostWarps]);
  fill(rows, code);
  const int lane = threadIdx.x % kWarp;
  const std::uint32_t at = lane % kCopies * sizeof(Interval);

  // Threads beyond the last whole block look at its elements once more, for the reductions' sake.
  const std::int64_t owners = blocks.whole << blocks.log_lanes, stride = gridDim.x * static_cast<std::int64_t>(kThreads);
  for (std::int64_t base = blockIdx.x * static_cast<std::int64_t>(kThreads); base < owners; base += stride) {
    const bool mine = base + threadIdx.x < owners;
    const std::int64_t owner = mine ? base + threadIdx.x : owners - 1, first = owner * kOwn<T>;
    float x[kOwn<T>];
    load_own(w + first, x);
    const float most = __uint_as_float(group_max(own_max(x), blocks.log_lanes, partial));
    if (!mine) continue;
    if ((owner & ((1 << blocks.log_lanes) - 1)) == 0) absmax[owner >> blocks.log_lanes] = most;
    if (most >= kLeastNormal && most < kInfinity)
      encode_own<T>(rows, code, x, most, at, packed + first / 2);
    else
      encode_pairs(code, w, first, kOwn<T>, 1, most, packed);
  }

  const std::int64_t warp = blockIdx.x * static_cast<std::int64_t>(kThreads / kWarp) + threadIdx.x / kWarp;
  for (std::int64_t block = blocks.whole + warp; block * blocks.size < blocks.count; block += gridDim.x * (kThreads / kWarp)) {
    const std::int64_t start = block * blocks.size, left = blocks.count - start, length = left < blocks.size ? left : blocks.size;
    const float most = __uint_as_float(warp_absmax(w + start, lane, length));
    if (lane == 0) absmax[block] = most;
    encode_pairs(code, w, start + 2 * lane, length - 2 * lane, kWarp, most, packed);
  }
}

}  // namespace nf4_quantize_kernels

void nf4_quantize(const void* w, int dtype, std::int64_t count, std::int64_t block_size, int quant_type, std::uint8_t* packed,
                  float* absmax, void* stream) {
  using namespace nf4_quantize_kernels;
  if (count == 0) return;
  const Code4& code4s = code4(quant_type);
  Code code{{}, 0, code4s.code_of_zero};
  for (int i = 0; i < 16; i++) {
    code.threshold[i] = code4s.threshold[i];
    code.code_of_rank |= static_cast<std::uint64_t>(code4s.code_of_rank[i]) << 4 * i;
  }
  with_type(w, dtype, [&](const auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    const Blocks blocks = make_blocks(x, count, block_size, kThreads, is_aligned(packed, kOwn<T> / 2));
    launch(nf4_quantize_kernel<T>, grid_of<T>(blocks, kThreads), kThreads, 0, stream, x, blocks, code, packed, absmax);
  });
}

}  // namespace peftk::cuda
