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

inline constexpr int kFewSums = 16;  // rows of W times rows of x at once: their sums are reduced by one transpose
inline constexpr int kGroup = 128;   // weights a step
inline constexpr int kOrder[4] = {1, 0, 3, 2};

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

// sum[r * M + i] = rows[r] . x[i], 16 lanes yet to be added. scales[r]: the constant of each 64 weights of the row.
template <int M, int R>
void few_lanes(const std::uint8_t* const* rows, const float* const* scales, std::int64_t k, __m512i table, const std::uint32_t* x,
               std::int64_t x_stride, U32* sums) {
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  __m512 sum[R * M];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  const auto step = [&](std::int64_t group, __mmask64 bytes, __mmask16 lanes) {
    const std::uint32_t* factor = x + group * (4 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      ask_ahead<R>(rows[0], k, group * R + r);
      const __m512i codes = _mm512_maskz_loadu_epi8(bytes, rows[r] + group * (kGroup / 2));
      long long pair;
      std::memcpy(&pair, scales[r] + 2 * group, sizeof pair);
      const __m512 scale = _mm512_permutexvar_ps(halves, _mm512_castsi512_ps(_mm512_set1_epi64(pair)));
      __m512i weight[4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) weight[s] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * s), table);
#pragma GCC unroll 4
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
  for (int i = 0; i < R * M; i++) sums[i] = as_cells(F32{sum[i]});
}

constexpr int few_at_once(int rows) { return rows < 8 ? rows : 8; }  // 16 rows at once spill registers: 5 % slower

// The sums of kFewSums / M rows of W with M rows of x, row-major.
template <int M>
F32 few_sums(const std::uint8_t* const* rows, const float* const* scales, std::int64_t k, __m512i table, const std::uint32_t* x,
             std::int64_t x_stride) {
  constexpr int kRows = kFewSums / M, kAtOnce = few_at_once(kRows);
  U32 square[kFewSums];
  for (int r = 0; r < kRows; r += kAtOnce) few_lanes<M, kAtOnce>(rows + r, scales + r, k, table, x, x_stride, square + r * M);
  return sum_lanes(square);
}

// out(first row of W, rows of W, row of x, their sums) for all of them; m any.
template <int M, class Out>
void few_rows_bf16(const Matrix4& w, const Bf16* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
  constexpr int R = kFewSums / M;
  // Rows of x a whole number of pages apart would meet in the same sets of the first-level cache.
  const std::int64_t cells = (w.k + kGroup - 1) / kGroup * (4 * kLanes) + 5 * kLanes, padded = (m + M - 1) / M * M;
  const std::int64_t per_row = w.k / 64, slab = R * per_row + 2, units = (w.rows + R - 1) / R;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(padded * cells + slab * std::max(threads, 1)));
  auto* const factors = memory.as<std::uint32_t>();
  for (std::int64_t i = 0; i < m; i++) permute_row(x + i * stride, w.k, factors + i * cells);
  std::memset(factors + m * cells, 0, sizeof(std::uint32_t) * static_cast<std::size_t>((padded - m) * cells));
  const __m512i table = bf16_table(w.values);
  parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    float* const constants = memory.as<float>() + padded * cells + slab * thread;
    constants[slab - 2] = constants[slab - 1] = 0.0f;
    ask_first<few_at_once(R)>(w.packed + begin * R * w.k / 2, w.k);
    for (std::int64_t unit = begin; unit < end; unit++) {
      const std::uint8_t* rows[R];
      const float* scales[R];
      for (int r = 0; r < R; r++) {
        const std::int64_t row = std::min(unit * R + r, w.rows - 1), flat = row * w.k;  // the last one again where none is left
        rows[r] = w.packed + flat / 2;
        scales[r] = constants + r * per_row;
        if (w.block_shift != 6 || row != unit * R + r) run_constants(w, row, 0, per_row, constants + r * per_row);
      }
      const std::int64_t whole = std::min<std::int64_t>(R, w.rows - unit * R) * per_row, block = unit * R * per_row;
      if (w.block_shift == 6) decode_constants(w.absmax, block, block + whole, constants);
      for (std::int64_t first = 0; first < m; first += M) {
        float sums[kFewSums];
        store(sums, few_sums<M>(rows, scales, w.k, table, factors + first * cells, cells));
        const int count = static_cast<int>(std::min<std::int64_t>(R, w.rows - unit * R));
        for (int i = 0; i < M && first + i < m; i++) {
          float lanes[kLanes] = {};
          for (int r = 0; r < R; r++) lanes[r] = sums[r * M + i];
          out(unit * R, count, first + i, load(lanes));
        }
      }
    }
  });
}

}  // namespace peftk::PEFTK_TIER
#endif
