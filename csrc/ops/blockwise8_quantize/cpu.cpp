// code = the value of the dynamic code nearest to x * (1 / absmax), the lower one on a tie: thresholds as in format/dynamic8.h.
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "format/dynamic8.h"
#include "ops/blockwise8_quantize/op.h"

namespace peftk::PEFTK_TIER {
namespace {

// A short last vector is completed with zeros, which change neither the maximum nor the codes of the others.
template <class T>
F32 load_some(const T* x, std::int64_t count) {
  if (count >= kLanes) return load(x);
  T padded[kLanes] = {};
  std::memcpy(padded, x, sizeof(T) * count);
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

template <class T>
void encode_block(const T* x, std::int64_t count, float absmax, const Code8& code, std::uint8_t* out) {
  if (absmax == 0.0f) {
    std::memset(out, code.zero, count);
    return;
  }
  const F32 reciprocal = broadcast(1.0f / absmax);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    std::uint8_t bytes[kLanes];
    store_bytes(bytes, rank256(code.threshold, load_some(x + i, count - i) * reciprocal));
    std::memcpy(out + i, bytes, count - i < kLanes ? count - i : kLanes);
  }
}

}  // namespace

void blockwise8_quantize(const void* x, int dtype, std::int64_t count, std::int64_t block_size, bool is_signed,
                         std::uint8_t* codes, float* absmax, int threads) {
  const Code8& code = code8(is_signed);
  with_type(x, dtype, [&](const auto* values) {
    parallel_for((count + block_size - 1) / block_size, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; block++) {
        const std::int64_t start = block * block_size, length = count - start < block_size ? count - start : block_size;
        absmax[block] = block_absmax(values + start, length);
        encode_block(values + start, length, absmax[block], code, codes + start);
      }
    });
  });
}

}  // namespace peftk::PEFTK_TIER
