// y = x W^T for a few rows of bf16 x: codes become bf16 in registers by vpermw, vdpbf16ps multiplies, the constants of the blocks
// scale fp32 sums and are never rounded. Needs k and the blocks to be multiples of 64. Knows no op.
//
// 64 bytes of a row are 128 weights: dword l holds elements 8l .. 8l + 7, and nibble s (bits 4s and up) of its low half belongs
// to element 8l + kOrder[s], that of its high half to the element 4 further. x is permuted once to match, lanes run along k.
#pragma once
#include "cpu/tile.h"

#ifdef PEFTK_TIER_IS_AVX512_BF16
#include <algorithm>

#include "cpu/matrix4.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace peftk::PEFTK_TIER {

inline constexpr int kFewSums = 16;               // rows of W times rows of x at once: their sums are reduced by one transpose
inline constexpr std::int64_t kFewBf16Rows = 32;  // beyond, a panel costs less than decoding again for each 8 rows of x
inline constexpr int kGroup = 128;                // weights a step
inline constexpr int kOrder[4] = {1, 0, 3, 2};

// Here the table value is rounded to bf16, not table times absmax: in a huge block that error is coherent (1.6x the bound at
// 4096).
inline bool few_bf16_fits(const Matrix4& w, std::int64_t m) {
  return m <= kFewBf16Rows && w.k % 64 == 0 && w.block_shift >= 6 && w.block_shift <= 10;
}

// One row of x as cells [group][nibble][lane], zeros beyond k.
inline void permute_row(const Bf16* x, std::int64_t k, std::uint32_t* cells) {
  for (std::int64_t start = 0; start < k; start += kGroup) {
    const int lanes = static_cast<int>(std::min<std::int64_t>(k - start, kGroup)) / 8;
    for (int s = 0; s < 4; s++, cells += kLanes)
      for (int lane = 0; lane < kLanes; lane++) {
        const Bf16* p = x + start + 8 * lane + kOrder[s];
        cells[lane] = lane < lanes ? static_cast<std::uint32_t>(p[4].bits) << 16 | p[0].bits : 0;
      }
  }
}

inline __m512i bf16_table(const float* values) {
  const F32 v = load(values);
  const __m256i words = to_bf16(v);
  return _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);  // twice: vpermw reads five bits
}

// The sums of R = kFewSums / M rows of W with M rows of x, row-major. scales[r]: the constant of each 64 weights of the row.
template <int M>
F32 few_sums(const std::uint8_t* const* rows, const float* const* scales, std::int64_t k, __m512i table, const std::uint32_t* x,
             std::int64_t x_stride, std::int64_t ahead) {
  constexpr int R = kFewSums / M;
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  __m512 sum[kFewSums];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  const auto step = [&](std::int64_t group, __mmask64 bytes, __mmask16 lanes) {
    const std::uint32_t* factor = x + group * (4 * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const std::uint8_t* p = rows[r] + group * (kGroup / 2);
      _mm_prefetch(reinterpret_cast<const char*>(p + ahead), _MM_HINT_T0);
      const __m512i codes = _mm512_maskz_loadu_epi8(bytes, p);
      const float* pair = scales[r] + 2 * group;
      const __m512 scale = _mm512_permutexvar_ps(
          halves, _mm512_castpd_ps(_mm512_castsi512_pd(_mm512_set1_epi64(*reinterpret_cast<const long long*>(pair)))));
      __m512i weight[4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) weight[s] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * s), table);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) {
        __m512 part = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++)
          part = multiply_add(PairCell{}, part, weight[s], _mm512_loadu_si512(factor + i * x_stride + s * kLanes));
        sum[r * M + i] = _mm512_mask3_fmadd_ps(part, scale, sum[r * M + i], lanes);
      }
    }
  };
  const std::int64_t groups = k / kGroup;
  for (std::int64_t group = 0; group < groups; group++) step(group, ~__mmask64{0}, 0xffff);
  if (k % kGroup) step(groups, 0xffffffff, 0x00ff);
  U32 square[kFewSums];
  for (int i = 0; i < kFewSums; i++) square[i] = as_cells(F32{sum[i]});
  transpose(square);
  for (int half = kFewSums / 2; half; half /= 2)
    for (int i = 0; i < half; i++)
      square[i].v = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(square[i].v), _mm512_castsi512_ps(square[i + half].v)));
  return {_mm512_castsi512_ps(square[0].v)};
}

// out(row of W, row of x, sum) for all of them; m <= kFewBf16Rows.
template <int M, class Out>
void few_rows_bf16(const Matrix4& w, const Bf16* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
  constexpr int R = kFewSums / M;
  const std::int64_t cells = (w.k + kGroup - 1) / kGroup * (4 * kLanes), padded = (m + M - 1) / M * M;
  const std::int64_t per_row = w.k / 64, slab = R * per_row + 2, units = (w.rows + R - 1) / R;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(padded * cells + slab * std::max(threads, 1)));
  auto* const factors = memory.as<std::uint32_t>();
  for (std::int64_t i = 0; i < m; i++) permute_row(x + i * stride, w.k, factors + i * cells);
  std::memset(factors + m * cells, 0, sizeof(std::uint32_t) * static_cast<std::size_t>((padded - m) * cells));
  const __m512i table = bf16_table(w.values);
  parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    float* const constants = memory.as<float>() + padded * cells + slab * thread;
    constants[slab - 2] = constants[slab - 1] = 0.0f;
    for (std::int64_t unit = begin; unit < end; unit++) {
      const std::uint8_t* rows[R];
      const float* scales[R];
      for (int r = 0; r < R; r++) {
        const std::int64_t row = std::min(unit * R + r, w.rows - 1), flat = row * w.k;  // the last one again where none is left
        rows[r] = w.packed + flat / 2;
        scales[r] = constants + r * per_row;
        for (std::int64_t j = 0; j < per_row; j++) constants[r * per_row + j] = w.absmax[(flat + 64 * j) >> w.block_shift];
      }
      for (std::int64_t first = 0; first < m; first += M) {
        float sums[kFewSums];
        store(sums, few_sums<M>(rows, scales, w.k, table, factors + first * cells, cells, R * w.k / 2));
        for (int r = 0; r < R && unit * R + r < w.rows; r++)
          for (int i = 0; i < M && first + i < m; i++) out(unit * R + r, first + i, sums[r * M + i]);
      }
    }
  });
}

// ---- 5 .. kFewBf16Rows rows: strips of 16 rows of W are turned as packed dwords, so lanes are rows of W and x is broadcast. One
// turn of 64 shuffles serves 2048 weights; x is read 4 bytes at a time, where lanes along k would read 64.

inline constexpr int kStripRows = 8;  // rows of x at once: 8 chains of vdpbf16ps hide its latency

// x as cells [8 weights][nibble][kStripRows] of rows [first, first + kStripRows), zeros where there is no row.
inline void interleave_rows(const Bf16* x, std::int64_t stride, std::int64_t count, std::int64_t k, std::uint32_t* cells) {
  for (std::int64_t start = 0; start < k; start += 8)
    for (int s = 0; s < 4; s++)
      for (int i = 0; i < kStripRows; i++, cells++) {
        const Bf16* p = x + i * stride + start + kOrder[s];
        *cells = i < count ? static_cast<std::uint32_t>(p[4].bits) << 16 | p[0].bits : 0;
      }
}

// sums[i] (16 rows of W) += constants of the block * (64 weights x kStripRows), from 8 turned dwords.
inline void strip_block(const U32* turned, const std::uint32_t* x, __m512 constants, __m512i table, __m512 (&sums)[kStripRows]) {
  __m512 part[kStripRows];
  for (__m512& p : part) p = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int dword = 0; dword < 8; dword++, x += 4 * kStripRows)
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) {
      const __m512i weight = _mm512_permutexvar_epi16(_mm512_srli_epi16(turned[dword].v, 4 * s), table);
#pragma GCC unroll 8
      for (int i = 0; i < kStripRows; i++)
        part[i] = multiply_add(PairCell{}, part[i], weight, _mm512_set1_epi32(static_cast<int>(x[s * kStripRows + i])));
    }
#pragma GCC unroll 8
  for (int i = 0; i < kStripRows; i++) sums[i] = _mm512_fmadd_ps(part[i], constants, sums[i]);
}

// One strip of W with all rows of x: sums (passes * kStripRows) vectors. constants [64 weights][16 rows].
inline void strip(const Matrix4& w, std::int64_t first_row, const float* constants, __m512i table, const std::uint32_t* x,
                  std::int64_t x_cells, int passes, __m512 (*sums)[kStripRows]) {
  for (int pass = 0; pass < passes; pass++)
    for (__m512& s : sums[pass]) s = _mm512_setzero_ps();
  for (std::int64_t start = 0; start < w.k; start += kGroup) {
    const int blocks = w.k - start < kGroup ? 1 : 2;
    const __mmask64 bytes = blocks == 1 ? 0xffffffff : ~__mmask64{0};
    U32 square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      const std::int64_t row = std::min(first_row + i, w.rows - 1);
      const std::uint8_t* p = w.packed + (row * w.k + start) / 2;
      _mm_prefetch(reinterpret_cast<const char*>(p + kLanes * w.k / 2), _MM_HINT_T0);  // the next strip
      square[i].v = _mm512_maskz_loadu_epi8(bytes, p);
    }
    transpose(square);
    for (int pass = 0; pass < passes; pass++)
      for (int block = 0; block < blocks; block++)
        strip_block(square + 8 * block, x + pass * x_cells + (start + 64 * block) / 2 * kStripRows,
                    _mm512_loadu_ps(constants + (start / 64 + block) * kLanes), table, sums[pass]);
  }
}

template <class Out>
void strips_bf16(const Matrix4& w, const Bf16* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
  const int passes = static_cast<int>((m + kStripRows - 1) / kStripRows);
  const std::int64_t cells = w.k / 2 * kStripRows, slab = w.k / 64 * kLanes, units = (w.rows + kLanes - 1) / kLanes;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(passes * cells + slab * std::max(threads, 1)));
  auto* const factors = memory.as<std::uint32_t>();
  parallel_for(passes, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t pass = begin; pass < end; pass++)
      interleave_rows(x + pass * kStripRows * stride, stride, m - pass * kStripRows, w.k, factors + pass * cells);
  });
  const __m512i table = bf16_table(w.values);
  parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    float* const constants = memory.as<float>() + passes * cells + slab * thread;
    for (std::int64_t unit = begin; unit < end; unit++) {
      const std::int64_t first = unit * kLanes;
      for (int i = 0; i < kLanes; i++) {
        const std::int64_t flat = std::min(first + i, w.rows - 1) * w.k;
        for (std::int64_t j = 0; j < w.k / 64; j++) constants[j * kLanes + i] = w.absmax[(flat + 64 * j) >> w.block_shift];
      }
      __m512 sums[kFewBf16Rows / kStripRows][kStripRows];
      strip(w, first, constants, table, factors, cells, passes, sums);
      float lanes[kLanes];
      for (std::int64_t i = 0; i < m; i++) {
        _mm512_storeu_ps(lanes, sums[i / kStripRows][i % kStripRows]);
        for (int row = 0; row < kLanes && first + row < w.rows; row++) out(first + row, i, lanes[row]);
      }
    }
  });
}

template <class Out>
void few_product_bf16(const Matrix4& w, const Bf16* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
  if (m == 1) return few_rows_bf16<1>(w, x, stride, m, threads, out);
  if (m == 2) return few_rows_bf16<2>(w, x, stride, m, threads, out);
  if (m <= 4) return few_rows_bf16<4>(w, x, stride, m, threads, out);
  return strips_bf16(w, x, stride, m, threads, out);
}

}  // namespace peftk::PEFTK_TIER
#endif
