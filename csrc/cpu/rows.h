// Sources of matrix elements, as fp32 vectors along a row: what panels and packed left sides are made from. Knows no op.
//   read<N>(row, position, count, v)   v[0..N) = elements [position, position + count), count <= N * kLanes, then zeros
//   aligned()                          whether read_whole may be used, at positions that are multiples of kLanes
//   read_whole<N>(row, position, v)    the same for count = N * kLanes, without a branch
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/philox.h"
#include "cpu/simd.h"
#include "format/absmax.h"
#include "format/nf4.h"

namespace peftk::PEFTK_TIER {

inline F32 load_few(const float* p, int count) {
  float few[kLanes] = {};
  std::memcpy(few, p, sizeof(float) * static_cast<std::size_t>(count));
  return load(few);
}

// How many of `count` elements the vector j of a run gets.
inline int lanes_left(int count, int j) {
  const int left = count - j * kLanes;
  return left < 0 ? 0 : left < kLanes ? left : kLanes;
}

// A plain matrix, row-major, with a factor for all of it.
template <class T>
struct DenseRows {
  const T* data;
  std::int64_t stride;  // elements from row to row
  float scale = 1.0f;

  bool aligned() const { return true; }
  template <int N>
  void read_whole(std::int64_t row, std::int64_t position, F32* v) const {
    for (int j = 0; j < N; j++) v[j] = load(data + row * stride + position + j * kLanes) * broadcast(scale);
  }
  template <int N>
  void read(std::int64_t row, std::int64_t position, int count, F32* v) const {
    const T* p = data + row * stride + position;
    for (int j = 0; j < N; j++) {
      const int here = lanes_left(count, j);
      T few[kLanes] = {};
      if (here < kLanes && here > 0) std::memcpy(few, p + j * kLanes, sizeof(T) * static_cast<std::size_t>(here));
      v[j] = load(here == kLanes ? p + j * kLanes : few) * broadcast(scale);
    }
  }
};

// Dropout by Philox: a function of the seed and the flat index of an element in a matrix of `columns` columns.
struct Dropout {
  std::uint32_t drop_below = 0;  // p * 2^32; 0: no dropout
  float keep_scale = 1.0f;
  std::uint64_t seed = 0;
  std::int64_t columns = 0;

  static constexpr int kReach = 4 * kPhiloxLanes - 3;  // elements that one call of mask() can serve, whatever its start

  // factor[0 .. kReach) for the elements from (row, position) on.
  void mask(std::int64_t row, std::int64_t position, float* factor) const {
    const std::uint64_t first = static_cast<std::uint64_t>(row * columns + position);
    const PhiloxWords words = philox(first / 4, seed);
    float all[4 * kPhiloxLanes];
    for (int i = 0; i < kPhiloxLanes; i++)
      for (int w = 0; w < 4; w++) all[4 * i + w] = words.word[w][i] < drop_below ? 0.0f : keep_scale;
    std::memcpy(factor, all + first % 4, sizeof(float) * kReach);
  }
};

// Any source, dropped out.
template <class Rows>
struct DroppedRows {
  const Rows& rows;
  const Dropout& dropout;

  bool aligned() const { return true; }
  template <int N>
  void read_whole(std::int64_t row, std::int64_t position, F32* v) const {
    read<N>(row, position, N * kLanes, v);
  }
  template <int N>
  void read(std::int64_t row, std::int64_t position, int count, F32* v) const {
    static_assert(N * kLanes <= Dropout::kReach);
    float factor[Dropout::kReach + kLanes];
    rows.template read<N>(row, position, count, v);
    dropout.mask(row, position, factor);
    for (int j = 0; j < N; j++) v[j] = v[j] * load(factor + j * kLanes);
  }
};

// A matrix in 4 bits: (rows, k) codes in flat order, blocks of a power of two of elements that may straddle rows.
struct Matrix4 {
  const std::uint8_t* packed;
  Absmax absmax;
  std::int64_t rows, k;
  int block_shift;      // log2(elements a block)
  const float* values;  // 16, by code

  std::int64_t blocks_before(std::int64_t row) const { return (row * k) >> block_shift; }
  std::int64_t blocks_until(std::int64_t row) const { return (row * k + (std::int64_t{1} << block_shift) - 1) >> block_shift; }
};

inline Matrix4 make_matrix4(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                            std::int64_t rows, std::int64_t k, std::int64_t block_size, int quant_type) {
  if (block_size < kLanes || (block_size & (block_size - 1)))
    throw std::invalid_argument("block_size: expected a power of two from 16 on, got " + std::to_string(block_size));
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(block_size));
  return {packed, make_absmax(absmax, absmax_scale, absmax_offset), rows, k, shift, code4(quant_type).value};
}

// fp32 constants of the blocks [first, last). One by one: a gather of 16 costs more than 16 loads on Zen 4.
inline void decode_constants(const Absmax& absmax, std::int64_t first, std::int64_t last, float* out) {
  for (std::int64_t block = first; block < last; block++) out[block - first] = absmax[block];
}

// `Constants`: Absmax itself, or a pointer p to decoded ones with p[block] valid where it is read.
template <class Constants>
struct Rows4 {
  const Matrix4& matrix;
  Constants constants;
  Table16 table;

  Rows4(const Matrix4& m, Constants c) : matrix(m), constants(c), table(load_table16(m.values)) {}

  // Vectors that start at a multiple of their length lie in one block and in whole bytes.
  bool aligned() const { return matrix.k % kLanes == 0; }
  template <int N>
  void read_whole(std::int64_t row, std::int64_t position, F32* v) const {
    const std::int64_t flat = row * matrix.k + position;
    for (int j = 0; j < N; j++) v[j] = whole(flat + j * kLanes);
  }
  template <int N>
  void read(std::int64_t row, std::int64_t position, int count, F32* v) const {
    const std::int64_t flat = row * matrix.k + position;
    const bool whole_bytes = flat % kLanes == 0;
    for (int j = 0; j < N; j++) {
      const int here = lanes_left(count, j);
      v[j] = whole_bytes && here == kLanes ? whole(flat + j * kLanes) : few(flat + j * kLanes, here);
    }
  }

  F32 whole(std::int64_t flat) const {
    return lookup(table, nibbles(matrix.packed + flat / 2)) * broadcast(constants[flat >> matrix.block_shift]);
  }

  // Any start, any count up to kLanes: elements before `flat` that share its byte, or a block's end inside, are minded.
  F32 few(std::int64_t flat, int count) const {
    float out[kLanes] = {};
    for (int i = 0; i < count; i++) {
      const std::int64_t at = flat + i;
      const int byte = matrix.packed[at / 2];
      out[i] = matrix.values[at & 1 ? byte & 15 : byte >> 4] * constants[at >> matrix.block_shift];
    }
    return load(out);
  }
};

}  // namespace peftk::PEFTK_TIER
