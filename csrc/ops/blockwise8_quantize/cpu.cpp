// code = the value of the dynamic code nearest to x * (1 / absmax), the lower one on a tie: thresholds as in format/dynamic8.h.
#include "cpu/code8.h"
#include "cpu/parallel.h"
#include "ops/blockwise8_quantize/op.h"

namespace peftk::PEFTK_TIER {
namespace {

// What lies beyond the end is zeros, which change neither the maximum nor the codes of the others.
template <class T>
F32 load_some(const T* x, std::int64_t count) {
  if (count >= kLanes) return load(x);
  T padded[kLanes] = {};
  if (count > 0) std::memcpy(padded, x, sizeof(T) * count);
  return load(padded);
}

template <class T>
float block_absmax(const T* x, std::int64_t count) {
  U32 best = zero_bits();
  for (std::int64_t i = 0; i < count; i += kLanes) best = max_magnitude_bits(best, load_some(x + i, count - i));
  std::uint32_t bits = reduce_max(best);
  if (bits > 0x7f800000u) bits = 0x7fc00000u;
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  return absmax;
}

// The code of a number of any size; 0 for NaN.
std::uint8_t searched_code(float x, const Code8& code) {
  std::uint32_t rank = 0;
  for (std::uint32_t step = 128; step; step >>= 1) rank += x > code.threshold[rank + step - 1] ? step : 0;
  return static_cast<std::uint8_t>(rank);
}

template <class T>
void encode_block(const T* x, std::int64_t count, float absmax, const Nearest8& nearest, std::uint8_t* out) {
  constexpr float largest = 0x1.fffffep127f;
  if (absmax == 0.0f) {
    std::memset(out, nearest.code->zero, count);
    return;
  }
  const float factor = 1.0f / absmax;
  const bool is_within_one = absmax <= largest && factor <= largest;
  for (std::int64_t i = 0; i < count; i += kGroup8) {
    const std::int64_t here = count - i < kGroup8 ? count - i : kGroup8;
    F32 scaled[kGroupVectors8];
    for (int j = 0; j < kGroupVectors8; j++) scaled[j] = load_some(x + i + j * kLanes, here - j * kLanes) * broadcast(factor);
    std::uint8_t codes[kGroup8];
    if (is_within_one) {
      encode8(nearest, scaled, codes);
    } else {
      float each[kGroup8];
      for (int j = 0; j < kGroupVectors8; j++) store(each + j * kLanes, scaled[j]);
      for (int j = 0; j < kGroup8; j++) codes[j] = searched_code(each[j], *nearest.code);
    }
    std::memcpy(out + i, codes, here);
  }
}

}  // namespace

void blockwise8_quantize(const void* x, int dtype, std::int64_t count, std::int64_t block_size, bool is_signed,
                         std::uint8_t* codes, float* absmax, int threads) {
  const Nearest8& nearest = nearest8(is_signed);
  with_type(x, dtype, [&](const auto* values) {
    parallel_for((count + block_size - 1) / block_size, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; block++) {
        const std::int64_t start = block * block_size, length = count - start < block_size ? count - start : block_size;
        absmax[block] = block_absmax(values + start, length);
        encode_block(values + start, length, absmax[block], nearest, codes + start);
      }
    });
  });
}

}  // namespace peftk::PEFTK_TIER
