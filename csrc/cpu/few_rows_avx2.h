// y = x W^T for a few rows of x on AVX2, fp32 and exact: vpshufb looks the four bytes of a weight up in four tables, three rounds
// of unpacking join them. Needs k and the blocks to be multiples of 64. Knows no op.
//
// 32 bytes of a row are 64 weights. After the unpacking, lane l of vector j of a nibble holds the weight of byte
// 16 (l / 4) + 4 j + l % 4; x is widened and permuted once to match: [64 weights][row of x][high nibble, low nibble][j][lane].
#pragma once
#include "cpu/matrix4.h"

#ifdef PEFTK_TIER_IS_AVX2
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace peftk::PEFTK_TIER {

inline constexpr std::int64_t kSideBySideUpTo = 16;  // rows of x; at 32 panels take 12 % less time
inline constexpr int kTogetherX = 4;                 // rows of x at once
inline constexpr int kTogetherW = 2 * kLanes;        // rows of W that a piece of x in the first-level cache meets
inline constexpr std::int64_t kPieces = 4096;        // elements of x in a piece: 16 KB

inline bool side_by_side_fits(const Matrix4& w, std::int64_t m) { return m <= kSideBySideUpTo && in_runs(w); }

// Byte b of each of the 16 values, in both halves.
struct BytePlanes {
  __m256i plane[4];
};
inline BytePlanes byte_planes(const float* values) {
  BytePlanes planes;
  for (int b = 0; b < 4; b++) {
    alignas(32) std::uint8_t bytes[32];
    for (int i = 0; i < 32; i++) {
      std::uint32_t bits;
      std::memcpy(&bits, values + i % 16, sizeof bits);
      bytes[i] = static_cast<std::uint8_t>(bits >> 8 * b);
    }
    planes.plane[b] = _mm256_load_si256((const __m256i*)bytes);
  }
  return planes;
}

// 32 nibbles, one a byte, as fp32.
inline void decode(const BytePlanes& planes, __m256i nibbles, F32 (&weight)[4]) {
  __m256i byte[4];
  for (int b = 0; b < 4; b++) byte[b] = _mm256_shuffle_epi8(planes.plane[b], nibbles);
  const __m256i low[2] = {_mm256_unpacklo_epi8(byte[0], byte[1]), _mm256_unpackhi_epi8(byte[0], byte[1])};
  const __m256i high[2] = {_mm256_unpacklo_epi8(byte[2], byte[3]), _mm256_unpackhi_epi8(byte[2], byte[3])};
  for (int j = 0; j < 2; j++) {
    weight[2 * j].v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[j], high[j]));
    weight[2 * j + 1].v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[j], high[j]));
  }
}

// A row of x as one of `rows`, fp32, in the order of `decode`.
template <class T>
void permute_for_planes(const T* x, std::int64_t k, std::int64_t rows, float* out) {
  for (std::int64_t run = 0; run < k; run += kRun, out += (rows - 1) * kRun) {
    float wide[kRun];
    for (int j = 0; j < kRun; j += kLanes) store(wide + j, load(x + run + j));
    for (int half = 0; half < 2; half++)
      for (int j = 0; j < 4; j++)
        for (int lane = 0; lane < kLanes; lane++) *out++ = wide[2 * (16 * (lane / 4) + 4 * j + lane % 4) + half];
  }
}

// sums[i] += (W[row, piece] . x[i, piece]), lanes yet to be added; `runs` of 64 weights, a constant each. `next`: the bytes that
// come after these, asked for meanwhile.
template <int M>
void add_piece(const BytePlanes& planes, const std::uint8_t* packed, const std::uint8_t* next, const float* constants,
               std::int64_t runs, const float* x, F32* sums) {
  const __m256i mask = _mm256_set1_epi8(15);
  F32 sum[M];
  for (int i = 0; i < M; i++) sum[i] = sums[i];
  for (std::int64_t run = 0; run < runs; run++, x += M * kRun) {
    const __m256i codes = _mm256_loadu_si256((const __m256i*)(packed + run * (kRun / 2)));
    __builtin_prefetch(next + run * (kRun / 2));
    F32 part[M], weight[4];
    decode(planes, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), weight);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      part[i] = weight[0] * load(x + i * kRun);
#pragma GCC unroll 3
      for (int j = 1; j < 4; j++) part[i] = multiply_add(weight[j], load(x + i * kRun + j * kLanes), part[i]);
    }
    decode(planes, _mm256_and_si256(codes, mask), weight);
    const F32 constant = broadcast(constants[run]);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) part[i] = multiply_add(weight[j], load(x + i * kRun + (4 + j) * kLanes), part[i]);
      sum[i] = multiply_add(part[i], constant, sum[i]);
    }
  }
  for (int i = 0; i < M; i++) sums[i] = sum[i];
}

// The sums of kTogetherW rows of W (the last row again where none is left) with M rows of x.
template <int M, class Out>
void side_by_side_unit(const Matrix4& w, const BytePlanes& planes, std::int64_t first, const float* constants, const float* x,
                       std::int64_t first_x, Out out) {
  const std::int64_t all_runs = w.k / kRun;
  F32 sums[kTogetherW][M];
  for (auto& row : sums)
    for (F32& s : row) s = broadcast(0.0f);
  constexpr std::int64_t kPiece = kPieces / M / kRun * kRun;
  const auto bytes = [&](int r, std::int64_t start) { return w.packed + (std::min(first + r, w.rows - 1) * w.k + start) / 2; };
  for (std::int64_t start = 0; start < w.k; start += kPiece) {
    const std::int64_t run = start / kRun, runs = std::min(kPiece / kRun, all_runs - run);
    for (int r = 0; r < kTogetherW; r++) {
      const std::uint8_t* next = r + 1 < kTogetherW ? bytes(r + 1, start) : bytes(0, start + kPiece);
      add_piece<M>(planes, bytes(r, start), next, constants + r * all_runs + run, runs, x + start * M, sums[r]);
    }
  }
  for (int r = 0; r < kTogetherW && first + r < w.rows; r += kLanes)
    for (int i = 0; i < M; i++) {
      float lanes[kLanes];
      for (int l = 0; l < kLanes; l++) lanes[l] = reduce_sum(sums[r + l][i]);
      out(first + r, static_cast<int>(std::min<std::int64_t>(w.rows - first - r, kLanes)), first_x + i, load(lanes));
    }
}

// out(first row of W, rows of W, row of x, their sums) for all of them.
template <class T, class Out>
void side_by_side(const Matrix4& w, const T* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
  const std::int64_t runs = w.k / kRun, slab = kTogetherW * runs;
  const std::int64_t units = (w.rows + kTogetherW - 1) / kTogetherW;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(m * w.k + slab * std::max(threads, 1)));
  float* const wide = memory.as<float>();
  for (std::int64_t i = 0; i < m; i++) {
    const std::int64_t first = i / kTogetherX * kTogetherX, rows = std::min<std::int64_t>(m - first, kTogetherX);
    permute_for_planes(x + i * stride, w.k, rows, wide + first * w.k + (i - first) * kRun);
  }
  const BytePlanes planes = byte_planes(w.values);
  parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    float* const constants = wide + m * w.k + slab * thread;
    for (std::int64_t unit = begin; unit < end; unit++) {
      const std::int64_t first = unit * kTogetherW;
      for (int r = 0; r < kTogetherW; r++) run_constants(w, std::min(first + r, w.rows - 1), 0, runs, constants + r * runs);
      for (std::int64_t i = 0; i < m; i += kTogetherX) {
        const auto some = [&](auto rows) {
          side_by_side_unit<decltype(rows)::value>(w, planes, first, constants, wide + i * w.k, i, out);
        };
        switch (std::min<std::int64_t>(m - i, kTogetherX)) {
          case 1: some(std::integral_constant<int, 1>{}); break;
          case 2: some(std::integral_constant<int, 2>{}); break;
          case 3: some(std::integral_constant<int, 3>{}); break;
          default: some(std::integral_constant<int, kTogetherX>{});
        }
      }
    }
  });
}

}  // namespace peftk::PEFTK_TIER
#endif
