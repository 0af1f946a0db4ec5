// Tiles on AVX-512: fp32 by FMA, bf16 pairs by vdpbf16ps.
#pragma once
#include <immintrin.h>

namespace peftk::PEFTK_TIER {

// 24 sums + 3 of the panel + 1 broadcast of 32 registers; 11 loads for 24 products. 12 x 2 is as fast, 14 x 2 waits for its
// loads.
inline constexpr int kTileRows = 8, kTileVectors = 3;

inline U32 load_cells(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline U32 load_cells(const void* p, int count) {
  return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), p)};
}
inline void store_cells(std::uint32_t* p, U32 x) { _mm512_storeu_si512(p, x.v); }
inline U32 as_cells(F32 x) { return {_mm512_castps_si512(x.v)}; }

inline __m512 multiply_add(FloatCell, __m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

#ifdef PEFTK_TIER_IS_AVX512_BF16
inline __m512 multiply_add(PairCell, __m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
template <class T>
void store_sum(T* p, F32 x) {
  if constexpr (std::is_same_v<T, Bf16>)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
  else
    store(p, x);
}
// 32 neighbours along the depth -> 16 cells.
inline U32 pair_neighbours(F32 first, F32 second) { return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v))}; }
// Cell i = (low[i], high[i]).
inline U32 pair_lanes(F32 low, F32 high) {
  alignas(64) static constexpr std::uint16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {_mm512_permutexvar_epi16(_mm512_load_si512(kZip), pair_neighbours(low, high).v)};
}
#endif

inline void transpose(U32 (&r)[16]) {
  __m512i t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_epi32(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // u[i + j]: column j of each 128-bit quarter, rows i .. i + 3
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {  // quarters of rows 0-7 and 8-15, then of all
    const __m512i even_low = _mm512_shuffle_i32x4(u[j], u[j + 4], 0x88), odd_low = _mm512_shuffle_i32x4(u[j], u[j + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(u[j + 8], u[j + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(u[j + 8], u[j + 12], 0xdd);
    r[j].v = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    r[j + 8].v = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    r[j + 4].v = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    r[j + 12].v = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// Lane i: the sum of the lanes of rows[i], fp32.
inline F32 sum_lanes(U32 (&rows)[16]) {
  transpose(rows);
  __m512 sum[16];
  for (int i = 0; i < 16; i++) sum[i] = _mm512_castsi512_ps(rows[i].v);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) sum[i] = _mm512_add_ps(sum[i], sum[i + half]);
  return {sum[0]};
}

template <int V, class Cell>
void multiply_tile(Cell, const std::uint32_t* left, const std::uint32_t* panel, std::int64_t steps, int, bool add, float* tile,
                   const std::uint32_t*) {
  __m512 sum[kTileRows][V];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) sum[i][v] = _mm512_setzero_ps();
  for (std::int64_t step = 0; step < steps; step++, left += kTileRows, panel += V * kLanes) {
    __m512i right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) right[v] = _mm512_loadu_si512(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; i++) {
      const __m512i factor = _mm512_set1_epi32(static_cast<int>(left[i]));
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) sum[i][v] = multiply_add(Cell{}, sum[i][v], factor, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
      float* const p = tile + (i * V + v) * kLanes;
      _mm512_storeu_ps(p, add ? _mm512_add_ps(_mm512_loadu_ps(p), sum[i][v]) : sum[i][v]);
    }
}

}  // namespace peftk::PEFTK_TIER
