// Tiles in plain C++: eight lanes of fp32 that a compiler may or may not vectorise.
#pragma once
#include <utility>

namespace peftk::PEFTK_TIER {

inline constexpr int kTileRows = 4, kTileVectors = 1;

inline U32 load_cells(const std::uint32_t* p) {
  U32 x;
  std::memcpy(x.lane, p, sizeof x.lane);
  return x;
}
inline U32 load_cells(const void* p, int count) {
  U32 x{};
  std::memcpy(x.lane, p, sizeof(std::uint32_t) * static_cast<std::size_t>(count));
  return x;
}
inline void store_cells(std::uint32_t* p, U32 x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline U32 as_cells(F32 x) {
  U32 bits;
  std::memcpy(bits.lane, x.lane, sizeof bits.lane);
  return bits;
}

inline void transpose(U32 (&r)[kLanes]) {
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < i; j++) std::swap(r[i].lane[j], r[j].lane[i]);
}

template <int V, class Cell>
void multiply_tile(Cell, const std::uint32_t* left, const std::uint32_t* panel, std::int64_t steps, int, bool add, float* tile,
                   const std::uint32_t*) {
  static_assert(std::is_same_v<Cell, FloatCell> && V == 1);
  float sum[kTileRows][kLanes] = {};
  for (std::int64_t step = 0; step < steps; step++, left += kTileRows, panel += kLanes) {
    float right[kLanes];
    std::memcpy(right, panel, sizeof right);
    for (int i = 0; i < kTileRows; i++) {
      const float factor = float_of(left[i]);
      for (int lane = 0; lane < kLanes; lane++) sum[i][lane] += factor * right[lane];
    }
  }
  for (int i = 0; i < kTileRows; i++)
    for (int lane = 0; lane < kLanes; lane++) {
      float& cell = tile[i * kLanes + lane];
      cell = add ? cell + sum[i][lane] : sum[i][lane];
    }
}

}  // namespace peftk::PEFTK_TIER
