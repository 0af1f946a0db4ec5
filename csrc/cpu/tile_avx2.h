// Tiles on AVX2 with FMA: fp32 only.
#pragma once
#include <immintrin.h>

namespace peftk::PEFTK_TIER {

inline constexpr int kTileRows = 6, kTileVectors = 2;  // 12 sums + 2 of the panel + 1 broadcast of 16 registers

inline U32 load_cells(const std::uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
inline U32 load_cells(const void* p, int count) {
  std::uint32_t few[kLanes] = {};
  std::memcpy(few, p, sizeof(std::uint32_t) * static_cast<std::size_t>(count));
  return load_cells(few);
}
inline void store_cells(std::uint32_t* p, U32 x) { _mm256_storeu_si256((__m256i*)p, x.v); }
inline U32 as_cells(F32 x) { return {_mm256_castps_si256(x.v)}; }

inline void transpose(U32 (&r)[8]) {
  __m256i t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_epi32(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    r[j].v = _mm256_permute2x128_si256(u[j], u[j + 4], 0x20);
    r[j + 4].v = _mm256_permute2x128_si256(u[j], u[j + 4], 0x31);
  }
}

template <int V, class Cell>
void multiply_tile(Cell, const std::uint32_t* left_cells, const std::uint32_t* panel_cells, std::int64_t steps, int, bool add,
                   float* tile, const std::uint32_t*) {
  static_assert(std::is_same_v<Cell, FloatCell>);
  const float *left = reinterpret_cast<const float*>(left_cells), *panel = reinterpret_cast<const float*>(panel_cells);
  __m256 sum[kTileRows][V];
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[i][v] = _mm256_setzero_ps();
  for (std::int64_t step = 0; step < steps; step++, left += kTileRows, panel += V * kLanes) {
    __m256 right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) right[v] = _mm256_loadu_ps(panel + v * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; i++) {
      const __m256 factor = _mm256_broadcast_ss(left + i);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[i][v] = _mm256_fmadd_ps(factor, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      float* const p = tile + (i * V + v) * kLanes;
      _mm256_storeu_ps(p, add ? _mm256_add_ps(_mm256_loadu_ps(p), sum[i][v]) : sum[i][v]);
    }
}

}  // namespace peftk::PEFTK_TIER
