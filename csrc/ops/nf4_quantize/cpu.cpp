// code = code_of_rank[#{t : x * (1 / absmax) > t}], absmax = max |x| over the block; formats as in format/nf4.h.
// The maximum is taken over the bits of |x|, an order in which NaN > Inf > every number: so absmax tells whether a block is
// finite.
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "format/nf4.h"
#include "ops/nf4_quantize/op.h"

namespace peftk::PEFTK_TIER {
namespace {

template <class T>
std::uint32_t block_max_bits(const T* x, std::int64_t count) {
  U32 best = zero_bits();
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) best = max_magnitude_bits(best, load(x + i));
  if (i < count) {
    T tail[kLanes] = {};
    std::memcpy(tail, x + i, sizeof(T) * (count - i));
    best = max_magnitude_bits(best, load(tail));
  }
  return reduce_max(best);
}

float absmax_of(std::uint32_t bits) {
  if (bits > 0x7f800000u) bits = 0x7fc00000u;  // one NaN for all payloads
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  return absmax;
}

template <class T>
void encode_block(const T* x, std::int64_t count, float absmax, const Code4& code, Thresholds16 thresholds,
                  std::uint8_t* packed) {
  if (absmax == 0.0f) {
    std::memset(packed, code.code_of_zero * 0x11, (count + 1) / 2);
    return;
  }
  const F32 reciprocal = broadcast(1.0f / absmax);
  const auto codes = [&](F32 values) { return lookup_bits(code.code_of_rank, rank16(thresholds, values * reciprocal)); };
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) pack_nibbles(packed + i / 2, codes(load(x + i)));
  if (i < count) {
    T tail[kLanes] = {};
    std::uint8_t bytes[kLanes / 2];
    std::memcpy(tail, x + i, sizeof(T) * (count - i));
    pack_nibbles(bytes, codes(load(tail)));
    if (count & 1) bytes[(count - i) / 2] = static_cast<std::uint8_t>((bytes[(count - i) / 2] & 0xf0) | code.code_of_zero);
    std::memcpy(packed + i / 2, bytes, (count - i + 1) / 2);
  }
}

}  // namespace

void nf4_quantize(const void* w, int dtype, std::int64_t count, std::int64_t block_size, int quant_type, std::uint8_t* packed,
                  float* absmax, int threads) {
  const Code4& code = code4(quant_type);
  with_type(w, dtype, [&](const auto* x) {
    parallel_for((count + block_size - 1) / block_size, threads, [&](std::int64_t begin, std::int64_t end) {
      const Thresholds16 thresholds = load_thresholds16(code.threshold);
      for (std::int64_t block = begin; block < end; block++) {
        const std::int64_t start = block * block_size, length = count - start < block_size ? count - start : block_size;
        absmax[block] = absmax_of(block_max_bits(x + start, length));
        encode_block(x + start, length, absmax[block], code, thresholds, packed + start / 2);
      }
    });
  });
}

}  // namespace peftk::PEFTK_TIER
