// Sources of matrix elements, as fp32 vectors along a row: what panels and packed left sides are made from. Knows no op.
//   read<N>(row, position, count, v)   v[0..N) = elements [position, position + count), count <= N * kLanes, then zeros
//   aligned()                          whether read_whole may be used, at positions that are multiples of kLanes
//   read_whole<N>(row, position, v)    the same for count = N * kLanes, without a branch
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace peftk::PEFTK_TIER {

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

}  // namespace peftk::PEFTK_TIER
