// out = T(code8[c] * absmax + 0), as in nf4_dequantize.
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "format/dynamic8.h"
#include "ops/blockwise8_dequantize/op.h"

namespace peftk::PEFTK_TIER {

void blockwise8_dequantize(const std::uint8_t* codes, const float* absmax, std::int64_t count, std::int64_t block_size,
                           bool is_signed, void* out, int dtype, int threads) {
  const float* table = code8(is_signed).value;
  with_type(out, dtype, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    parallel_for((count + block_size - 1) / block_size, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; block++) {
        const std::int64_t stop = (block + 1) * block_size < count ? (block + 1) * block_size : count;
        const F32 scale = broadcast(absmax[block]), zero = broadcast(0.0f);
        std::int64_t i = block * block_size;
        for (; i + kLanes <= stop; i += kLanes) store(values + i, lookup256(table, codes + i) * scale + zero);
        if (i < stop) {
          std::uint8_t few[kLanes] = {};
          T decoded[kLanes];
          std::memcpy(few, codes + i, stop - i);
          store(decoded, lookup256(table, few) * scale + zero);
          std::memcpy(values + i, decoded, sizeof(T) * (stop - i));
        }
      }
    });
  });
}

}  // namespace peftk::PEFTK_TIER
