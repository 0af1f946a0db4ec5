// Dropout by Philox: whether an element stays is a function of the seed and of its flat index. A pass over a matrix makes the
// bits of all its elements first, since tiles and panels meet them in pieces of every shape. Knows no op.
#pragma once
#include "cpu/panel_pairs.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace peftk::PEFTK_TIER {

struct Dropout {
  std::uint32_t drop_below = 0;  // p * 2^32; 0: no dropout
  float keep_scale = 1.0f;
  std::uint64_t seed = 0;
};

inline constexpr std::int64_t kKeepBits = 64;  // elements of one call

// Bit i: element 64 * word + i stays.
inline std::uint64_t keep_bits(const Dropout& dropout, std::int64_t word) {
  constexpr int kCounters = kKeepBits / 4;
  std::uint64_t lanes[4] = {};
  for (int first = 0; first < kCounters; first += kLanes) {
    const PhiloxWords random = philox(static_cast<std::uint64_t>(word * kCounters + first), dropout.seed);
    for (int w = 0; w < 4; w++) lanes[w] |= std::uint64_t{not_below(random.word[w], dropout.drop_below)} << first;
  }
  std::uint64_t bits = 0;
  for (int w = 0; w < 4; w++) {
    std::uint64_t spread = lanes[w];
    spread = (spread | spread << 24) & 0x000000ff000000ffu;  // bit i to bit 4 i
    spread = (spread | spread << 12) & 0x000f000f000f000fu;
    spread = (spread | spread << 6) & 0x0303030303030303u;
    spread = (spread | spread << 3) & 0x1111111111111111u;
    bits |= spread << w;
  }
  return bits;
}

// The bits of a matrix (m, columns), m * columns / 8 bytes.
class KeepBits {
 public:
  KeepBits(const Dropout& dropout, std::int64_t m, std::int64_t columns, int threads)
      : dropout_(dropout),
        columns_(columns),
        words_(dropout.drop_below ? (m * columns + kKeepBits - 1) / kKeepBits : 0),
        memory_(sizeof(std::uint64_t) * static_cast<std::size_t>(words_ + 1)) {
    auto* const words = memory_.as<std::uint64_t>();
    parallel_for(words_, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t word = begin; word < end; word++) words[word] = keep_bits(dropout_, word);
    });
    words[words_] = 0;  // read together with the last one
  }
  bool all_stay() const { return words_ == 0; }
  float scale() const { return dropout_.keep_scale; }

  // Bit i: element (row, position + i) stays; 57 bits, those past the matrix are anything.
  std::uint64_t bits(std::int64_t row, std::int64_t position) const {
    const std::int64_t flat = row * columns_ + position;
    std::uint64_t bits;
    std::memcpy(&bits, memory_.as<char>() + flat / 8, sizeof bits);
    return bits >> flat % 8;
  }

 private:
  Dropout dropout_;
  std::int64_t columns_, words_;
  Scratch memory_;
};

// Any source with what doesn't stay set to zero. What stays is not scaled: whoever multiplies it scales the sums, which costs
// less and rounds nothing.
template <class Rows>
struct DroppedRows {
  const Rows& rows;
  const KeepBits& keep;

  bool aligned() const { return rows.aligned(); }
  template <int N>
  void read_whole(std::int64_t row, std::int64_t position, F32* v) const {
    rows.template read_whole<N>(row, position, v);
    for (int j = 0; j < N; j++) v[j] = where(static_cast<std::uint32_t>(keep.bits(row, position + j * kLanes)), v[j]);
  }
  template <int N>
  void read(std::int64_t row, std::int64_t position, int count, F32* v) const {
    rows.template read<N>(row, position, count, v);
    for (int j = 0; j < N; j++)
      if (lanes_left(count, j)) v[j] = where(static_cast<std::uint32_t>(keep.bits(row, position + j * kLanes)), v[j]);
  }
};

#ifdef PEFTK_TIER_IS_AVX512_BF16
template <>
inline constexpr bool kLiesInCells<PairCell, DroppedRows<DenseRows<Bf16>>> = true;
inline const DenseRows<Bf16>& dense_rows(const DroppedRows<DenseRows<Bf16>>& dropped) { return dropped.rows; }
inline __mmask32 pair_words(const DroppedRows<DenseRows<Bf16>>& dropped, std::int64_t row, std::int64_t position,
                            std::int64_t count) {
  return first_words(count) & static_cast<__mmask32>(dropped.keep.bits(row, position));
}
#endif

}  // namespace peftk::PEFTK_TIER
