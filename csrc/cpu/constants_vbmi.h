// Constants of many blocks at once where VBMI looks up bytes: 0.6 cycles each, where one by one they take 2. Knows no op.
//
// The four bytes of the dynamic code's 256 fp32 values are four tables of bytes; vpermi2b looks 64 codes up in 128 of them.
#pragma once
#include "cpu/rows.h"
#include "cpu/tile.h"

#ifdef PEFTK_TIER_IS_AVX512_BF16
#include <algorithm>

namespace peftk::PEFTK_TIER {

class Constants {
 public:
  explicit Constants(const Absmax& absmax) : absmax_(absmax) {
    if (!absmax.scales) return;
    for (int i = 0; i < 256; i++) {
      std::uint8_t bytes[4];
      std::memcpy(bytes, absmax.code + i, 4);
      for (int b = 0; b < 4; b++) table_[b][i] = bytes[b];
    }
  }

  // out[0 .. last - first) = absmax of the blocks [first, last).
  void read(std::int64_t first, std::int64_t last, float* out) const {
    if (!absmax_.scales) {
      std::memcpy(out, static_cast<const float*>(absmax_.values) + first, sizeof(float) * static_cast<std::size_t>(last - first));
      return;
    }
    for (std::int64_t block = first; block < last;) {
      const std::int64_t one_scale = kNestedBlock - block % kNestedBlock;
      const int count = static_cast<int>(std::min({std::int64_t{64}, last - block, one_scale}));
      decode(block, count, out + (block - first));
      block += count;
    }
  }

 private:
  static __m512i look_up(const std::uint8_t* table, __m512i codes, __mmask64 upper) {
    const auto quarter = [&](int i) { return _mm512_load_si512(table + 64 * i); };
    const __m512i low = _mm512_permutex2var_epi8(quarter(0), codes, quarter(1));
    return _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(quarter(2), codes, quarter(3)));
  }

  // count <= 64 blocks that share a scale.
  void decode(std::int64_t block, int count, float* out) const {
    const std::uint8_t* p = static_cast<const std::uint8_t*>(absmax_.values) + block;
    __m512i codes = _mm512_maskz_loadu_epi8(~std::uint64_t{0} >> (64 - count), p);
    // The unpacking below works in 128-bit quarters: quarter q of part j has to be codes 16 j + 4 q and on.
    codes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), codes);
    const __mmask64 upper = _mm512_movepi8_mask(codes);
    const __m512i b0 = look_up(table_[0], codes, upper), b1 = look_up(table_[1], codes, upper);
    const __m512i b2 = look_up(table_[2], codes, upper), b3 = look_up(table_[3], codes, upper);
    const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), low23 = _mm512_unpacklo_epi8(b2, b3);
    const __m512i high01 = _mm512_unpackhi_epi8(b0, b1), high23 = _mm512_unpackhi_epi8(b2, b3);
    const __m512i parts[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                              _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    const __m512 scale = _mm512_set1_ps(absmax_.scales[block / kNestedBlock]), offset = _mm512_set1_ps(absmax_.offset);
    for (int j = 0; j < 4; j++) {
      const int here = lanes_left(count, j);
      const __m512 value = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(parts[j]), scale), offset);
      _mm512_mask_storeu_ps(out + kLanes * j, static_cast<__mmask16>((1u << here) - 1u), value);
    }
  }

  Absmax absmax_;
  alignas(64) std::uint8_t table_[4][256];
};

}  // namespace peftk::PEFTK_TIER
#endif
