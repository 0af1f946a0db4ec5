// out = T(table[code] * scale + 0): the sum turns -0 into +0, so a block of zeros comes back as +0 whatever its stored constant.
// A large result is streamed past the cache: a plain store would first read every line from memory.
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "format/absmax.h"
#include "format/nf4.h"
#include "ops/nf4_dequantize/op.h"

namespace peftk::PEFTK_TIER {
namespace {

constexpr std::int64_t kStreamFrom = 4 << 20;  // bytes of result; below that the reader probably finds it in the cache

struct Source {
  const std::uint8_t* packed;
  Absmax absmax;
  std::int64_t block_size;
  Table16 table;
};

F32 decode(const Source& source, const std::uint8_t* packed, F32 scale) {
  return lookup(source.table, nibbles(packed)) * scale + broadcast(0.0f);
}

// Fewer than a vector, or from an odd element on.
template <class T>
void decode_few(const Source& source, std::int64_t first, std::int64_t count, float scale, T* out) {
  for (std::int64_t i = first & ~std::int64_t{1}; i < first + count; i += kLanes) {
    std::uint8_t bytes[kLanes / 2] = {};
    T values[kLanes];
    const std::int64_t left = first + count - i, here = left < kLanes ? left : kLanes;
    std::memcpy(bytes, source.packed + i / 2, (here + 1) / 2);
    store(values, decode(source, bytes, broadcast(scale)));
    const std::int64_t skip = i < first ? first - i : 0;
    std::memcpy(out + (i + skip - first), values + skip, sizeof(T) * (here - skip));
  }
}

// Whole groups of kWideCodes elements to bf16; returns how many elements. The machine's own conversion flushes denormals, so
// blocks with a tiny scale, and NaN and Inf, are left to the general loop.
template <bool kStream, class T>
std::int64_t decode_wide_groups([[maybe_unused]] const Source& source, [[maybe_unused]] const std::uint8_t* packed,
                                [[maybe_unused]] std::int64_t count, [[maybe_unused]] float scale, [[maybe_unused]] T* out) {
  std::int64_t i = 0;
#ifdef PEFTK_HAS_WIDE_CODES
  if constexpr (std::is_same_v<T, Bf16>) {
    const float magnitude = scale < 0 ? -scale : scale;
    if (!(magnitude >= 0x1p-100f && magnitude <= 0x1p+120f)) return 0;
    for (; i + kWideCodes <= count; i += kWideCodes) {
      const auto values = decode_wide(source.table, packed + i / 2, broadcast(scale));
      if constexpr (kStream)
        stream_wide(out + i, values);
      else
        store_wide(out + i, values);
    }
  }
#endif
  return i;
}

// Elements [first, first + count), all of one block.
template <bool kStream, class T>
void decode_run(const Source& source, std::int64_t first, std::int64_t count, float scale, T* out) {
  if (first & 1) return decode_few(source, first, count, scale, out);
  const F32 scales = broadcast(scale);
  const std::uint8_t* packed = source.packed + first / 2;
  std::int64_t i = decode_wide_groups<kStream>(source, packed, count, scale, out);
  for (; i + kLanes <= count; i += kLanes) {
    if constexpr (kStream)
      stream(out + i, decode(source, packed + i / 2, scales));
    else
      store(out + i, decode(source, packed + i / 2, scales));
  }
  if (i < count) decode_few(source, first + i, count - i, scale, out + i);
}

template <bool kStream, class T>
void decode_blocks(const Source& source, std::int64_t first, std::int64_t count, T* out, int threads) {
  const std::int64_t first_block = first / source.block_size;
  const std::int64_t last_block = (first + count - 1) / source.block_size;
  parallel_for(last_block - first_block + 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = first_block + begin; block < first_block + end; block++) {
      const std::int64_t start = block * source.block_size, stop = start + source.block_size;
      const std::int64_t from = start < first ? first : start, to = stop > first + count ? first + count : stop;
      decode_run<kStream>(source, from, to - from, source.absmax[block], out + (from - first));
    }
    stream_fence();
  });
}

}  // namespace

void nf4_dequantize(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                    std::int64_t first, std::int64_t count, std::int64_t block_size, int quant_type, void* out, int dtype,
                    int threads) {
  if (count == 0) return;
  const Source source{packed, make_absmax(absmax, absmax_scale, absmax_offset), block_size,
                      load_table16(code4(quant_type).value)};
  with_type(out, dtype, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    const bool aligned = reinterpret_cast<std::uintptr_t>(values) % 64 == 0 && first % block_size == 0;
    if (aligned && count * static_cast<std::int64_t>(sizeof(T)) >= kStreamFrom)
      decode_blocks<true>(source, first, count, values, threads);
    else
      decode_blocks<false>(source, first, count, values, threads);
  });
}

}  // namespace peftk::PEFTK_TIER
