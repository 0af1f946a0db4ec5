// Sources of matrix elements, as fp32 vectors along a row: what panels and packed left sides are made from. Knows no op.
//   read<N>(row, position, count, v)   v[0..N) = elements [position, position + count), count <= N * kLanes, then zeros
//   aligned()                          whether read_whole may be used, at positions that are multiples of kLanes
//   read_whole<N>(row, position, v)    the same for count = N * kLanes, without a branch
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/philox.h"
#include "cpu/simd.h"

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

}  // namespace peftk::PEFTK_TIER
