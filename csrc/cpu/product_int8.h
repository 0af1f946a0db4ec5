// y = x W^T with x in 8 bits (int8.h) and a 4-bit W whose table is rounded to 8 bits: integer dots by vpdpbusd, the constants of
// both sides scale them in fp32. Any number of rows of x; needs k and the blocks of W to be multiples of 64. Knows no op.
//
// vpdpbusd takes unsigned bytes on one side: the table is stored + 128, and 128 * (sum of q over a run) is taken off at the
// start of each dot. vpermb reads bits 5:0 of an index, so a table repeated four times needs no masks: the low nibbles of 64
// bytes (odd elements) are looked up as they lie, the high ones (even elements) after one shift.
#pragma once
#include "cpu/int8.h"

namespace peftk::PEFTK_TIER {

inline bool int8_fits(const Matrix4& w) {
#ifdef PEFTK_TIER_IS_AVX512_BF16
  return w.k > 0 && in_runs(w);
#else
  (void)w;
  return false;
#endif
}

}  // namespace peftk::PEFTK_TIER

#ifdef PEFTK_TIER_IS_AVX512_BF16
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace peftk::PEFTK_TIER {

inline constexpr int kInt8Group = 128;  // weights in 64 bytes of a row
inline constexpr std::int64_t kInt8Offset = 128;

inline __m512i offset_table(const Table8& table) {
  std::uint8_t bytes[16];
  for (int code = 0; code < 16; code++) bytes[code] = static_cast<std::uint8_t>(table.value[code] + kInt8Offset);
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// ---- strips: 16 rows of W are turned as packed dwords, so lanes are rows of W and x is broadcast 4 bytes at a time

// Rows of x at once, as many chains of vpdpbusd: 376 Gop/s at m = 128 where 8 give 348 and 24 give 375.
inline constexpr int kInt8StripRows = 16;
// Rows of x that a strip meets at most: 344 Gop/s with 32, 366 with 64, 380 with 256.
inline constexpr int kInt8Rows = 128;
inline constexpr std::int64_t kInt8Bytes = 512 << 10;  // of them, so that they stay in the second-level cache

// M rows of x: cells [k / 8][odd, even][M] of 4 bytes, then for each run M starts of the dots and M scales
// in units of the table.
template <int M>
struct Int8Pass {
  std::int32_t* cells;
  std::int32_t* starts;
  float* scales;

  static std::int64_t size(std::int64_t k) { return M * (k / 4 + 2 * (k / kRun)); }
  Int8Pass(std::int32_t* memory, std::int64_t k)
      : cells(memory), starts(memory + M * (k / 4)), scales(reinterpret_cast<float*>(starts + M * (k / kRun))) {}
};

template <int M, class T>
void pack_pass(const T* x, std::int64_t stride, std::int64_t count, std::int64_t k, float unit, Int8Pass<M> pass) {
  const __m512i odd_even = _mm512_set4_epi32(0x0e0c0a08, 0x0f0d0b09, 0x06040200, 0x07050301);
  for (std::int64_t run = 0; run < k / kRun; run++)
    for (int i = 0; i < M; i++) {
      alignas(64) std::int8_t q[kRun] = {};
      const float scale = i < count ? quantize_run(x + i * stride + run * kRun, kRun, q) : 0.0f;
      const __m512i bytes = _mm512_load_si512(q);
      const __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
      pass.starts[run * M + i] = -static_cast<std::int32_t>(kInt8Offset) * _mm512_reduce_add_epi32(fours);
      pass.scales[run * M + i] = scale / unit;
      alignas(64) std::int32_t dwords[kLanes];
      _mm512_store_si512(dwords, _mm512_shuffle_epi8(bytes, odd_even));
      for (int d = 0; d < kLanes; d++) pass.cells[(run * kLanes + d) * M + i] = dwords[d];
    }
}

// sum + 4 products in each dword, x broadcast. GCC 12 makes a copy of each sum and a load of its own for x from the intrinsic.
inline void add_dots(__m512i& sum, __m512i weights, const std::int32_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*x));
}

// sums[i] (16 rows of W) += 64 weights x M rows of x, from 8 turned dwords. Decoded again for each M rows: stores and loads of
// decoded weights cost 5 % more at m = 128, and twice that at m = 8, where they can't run beside the dots.
template <int M>
inline void int8_run(const U32* turned, const std::int32_t* cells, const std::int32_t* starts, const float* scales,
                     __m512 constants, __m512i table, __m512* sums) {
  __m512i dot[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) dot[i] = _mm512_set1_epi32(starts[i]);
#pragma GCC unroll 4
  for (int d = 0; d < kLanes / 2; d++) {
    const __m512i odd = _mm512_permutexvar_epi8(turned[d].v, table);
    const __m512i even = _mm512_permutexvar_epi8(_mm512_srli_epi32(turned[d].v, 4), table);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) add_dots(dot[i], odd, cells + 2 * d * M + i);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) add_dots(dot[i], even, cells + (2 * d + 1) * M + i);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
    sums[i] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot[i]), constants), _mm512_set1_ps(scales[i]), sums[i]);
}

// 16 rows of W with `passes` times M rows of x. constants [run][16 rows]; sums (passes * M) vectors.
template <int M>
void int8_strip(const std::uint8_t* const* rows, std::int64_t k, const float* constants, __m512i table, std::int32_t* x,
                int passes, __m512* sums) {
  for (int i = 0; i < passes * M; i++) sums[i] = _mm512_setzero_ps();
  for (std::int64_t start = 0; start < k; start += kInt8Group) {
    const int runs = k - start < kInt8Group ? 1 : 2;
    const __mmask64 bytes = runs == 1 ? 0xffffffff : ~__mmask64{0};
    U32 square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      ask_ahead<kLanes>(rows[0], k, start / kInt8Group * kLanes + i);
      square[i].v = _mm512_maskz_loadu_epi8(bytes, rows[i] + start / 2);
    }
    transpose(square);
    for (int r = 0; r < runs; r++) {
      const std::int64_t run = start / kRun + r;
      const __m512 of_run = _mm512_loadu_ps(constants + run * kLanes);
      for (int pass = 0; pass < passes; pass++) {
        const Int8Pass<M> of(x + pass * Int8Pass<M>::size(k), k);
        int8_run<M>(square + 8 * r, of.cells + run * (kLanes * M), of.starts + run * M, of.scales + run * M, of_run, table,
                    sums + pass * M);
      }
    }
  }
}

template <int M, class T, class Out>
void strips_int8(const Matrix4& w, const Table8& table8, const T* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
  const std::int64_t size = Int8Pass<M>::size(w.k), runs = w.k / kRun, slab = runs * kLanes;
  const std::int64_t units = (w.rows + kLanes - 1) / kLanes, all = (m + M - 1) / M;
  const int most = static_cast<int>(std::max<std::int64_t>(std::min<std::int64_t>(kInt8Rows, kInt8Bytes / w.k) / M, 1));
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(all * size + slab * std::max(threads, 1)));
  auto* const cells = memory.as<std::int32_t>();
  parallel_for(all, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t pass = begin; pass < end; pass++)
      pack_pass<M>(x + pass * M * stride, stride, m - pass * M, w.k, table8.scale, Int8Pass<M>(cells + pass * size, w.k));
  });
  const __m512i table = offset_table(table8);
  for (std::int64_t pass = 0; pass < all; pass += most) {
    const int passes = static_cast<int>(std::min<std::int64_t>(most, all - pass));
    parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
      float* const constants = memory.as<float>() + all * size + slab * thread;
      for (std::int64_t unit = begin; unit < end; unit++) {
        const std::int64_t first = unit * kLanes;
        const std::uint8_t* rows[kLanes];
        for (int i = 0; i < kLanes; i++) {
          const std::int64_t row = std::min(first + i, w.rows - 1);  // the last one again where none is left
          rows[i] = w.packed + row * w.k / 2;
        }
        turn_constants(w, first, 0, runs, constants, kLanes);
        __m512 sums[kInt8Rows];
        int8_strip<M>(rows, w.k, constants, table, cells + pass * size, passes, sums);
        const int count = static_cast<int>(std::min<std::int64_t>(kLanes, w.rows - first));
        for (std::int64_t i = 0; i < passes * M && pass * M + i < m; i++) out(first, count, pass * M + i, F32{sums[i]});
      }
    });
  }
}

// ---- one row of x: lanes run along k, nothing is turned, x is read 64 bytes at a time. Two rows take as long as in strips.

// Rows of W at once, which share the loads of x: 0.27 ms for 4096 x 4096, 0.31 with 2, 0.29 with 8.
inline constexpr int kInt8Quad = 4;

// For each kInt8Group of k: 64 odd elements, 64 even ones, and the starts of the 16 dots; then the scales of
// the runs in units of the table.
struct Int8Row {
  std::int32_t* groups;
  float* scales;

  static constexpr int kStep = 3 * kLanes;
  static std::int64_t count(std::int64_t k) { return (k + kInt8Group - 1) / kInt8Group; }
  static std::int64_t size(std::int64_t k) { return count(k) * (kStep + kInt8Group / kRun); }
  Int8Row(std::int32_t* memory, std::int64_t k) : groups(memory), scales(reinterpret_cast<float*>(memory + count(k) * kStep)) {}
};

template <class T>
void pack_row(const T* x, std::int64_t k, float unit, Int8Row row) {
  for (std::int64_t start = 0; start < k; start += kInt8Group, row.groups += Int8Row::kStep, row.scales += 2) {
    std::int8_t q[kInt8Group] = {};
    row.scales[0] = quantize_run(x + start, kRun, q) / unit;
    row.scales[1] = start + kRun < k ? quantize_run(x + start + kRun, kRun, q + kRun) / unit : 0.0f;
    auto* const bytes = reinterpret_cast<std::int8_t*>(row.groups);
    for (int j = 0; j < kInt8Group / 2; j++) bytes[j] = q[2 * j + 1], bytes[kInt8Group / 2 + j] = q[2 * j];
    for (int l = 0; l < kLanes; l++) {
      int sum = 0;
      for (int j = 0; j < 8; j++) sum += q[8 * l + j];
      row.groups[2 * kLanes + l] = -static_cast<std::int32_t>(kInt8Offset) * sum;
    }
  }
}

// sums[r] = lanes along k of kInt8Quad rows of W with x. factors[r]: absmax * scale of each run, zeros beyond k.
inline void quad_int8(const std::uint8_t* const* rows, std::int64_t k, const float* const* factors, __m512i table,
                      const std::int32_t* x, U32* sums) {
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  __m512 sum[kInt8Quad];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  const auto step = [&](std::int64_t group, __mmask64 bytes) {
    const std::int32_t* q = x + group * Int8Row::kStep;
    const __m512i x_odd = _mm512_load_si512(q), x_even = _mm512_load_si512(q + kLanes);
    const __m512i starts = _mm512_load_si512(q + 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kInt8Quad; r++) {
      ask_ahead<kInt8Quad>(rows[0], k, group * kInt8Quad + r);
      const __m512i codes = _mm512_maskz_loadu_epi8(bytes, rows[r] + group * (kInt8Group / 2));
      __m512i dot = _mm512_dpbusd_epi32(starts, _mm512_permutexvar_epi8(codes, table), x_odd);
      dot = _mm512_dpbusd_epi32(dot, _mm512_permutexvar_epi8(_mm512_srli_epi32(codes, 4), table), x_even);
      const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(factors[r] + 2 * group));
      const __m512 factor = _mm512_permutexvar_ps(halves, _mm512_castsi512_ps(_mm512_broadcastq_epi64(pair)));
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sum[r]);
    }
  };
  const std::int64_t groups = k / kInt8Group;
  for (std::int64_t group = 0; group < groups; group++) step(group, ~__mmask64{0});
  if (k % kInt8Group) step(groups, 0xffffffff);
  for (int r = 0; r < kInt8Quad; r++) sums[r] = as_cells(F32{sum[r]});
}

template <class T, class Out>
void row_int8(const Matrix4& w, const Table8& table8, const T* x, int threads, Out out) {
  const std::int64_t runs = w.k / kRun, padded = runs + runs % 2, units = (w.rows + kLanes - 1) / kLanes;
  const std::int64_t size = Int8Row::size(w.k), slab = kInt8Quad * padded;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(size + slab * std::max(threads, 1)));
  const Int8Row row(memory.as<std::int32_t>(), w.k);
  pack_row(x, w.k, table8.scale, row);
  const __m512i table = offset_table(table8);
  parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    float* const products = memory.as<float>() + size + slab * thread;
    std::memset(products, 0, sizeof(float) * static_cast<std::size_t>(slab));
    for (std::int64_t unit = begin; unit < end; unit++) {
      const std::int64_t first = unit * kLanes, last = std::min(first + kLanes, w.rows);
      U32 sums[kLanes];
      for (int quad = 0; quad < kLanes; quad += kInt8Quad) {
        const std::uint8_t* rows[kInt8Quad];
        const float* factors[kInt8Quad];
        for (int r = 0; r < kInt8Quad; r++) {
          const std::int64_t from = std::min(first + quad + r, last - 1);  // the last one again where none is left
          float* const product = products + r * padded;
          run_constants(w, from, 0, runs, product);
          for (std::int64_t run = 0; run < runs; run++) product[run] *= row.scales[run];
          rows[r] = w.packed + from * w.k / 2;
          factors[r] = product;
        }
        quad_int8(rows, w.k, factors, table, row.groups, sums + quad);
      }
      out(first, static_cast<int>(last - first), 0, sum_lanes(sums));
    }
  });
}

// out(first row of W, rows of W, row of x, sums of the rows of W) for all of them.
template <class T, class Out>
void product_int8(const Matrix4& w, const Table8& table, const T* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
  if (m == 1) return row_int8(w, table, x, threads, out);
  if (m == 2) return strips_int8<2>(w, table, x, stride, m, threads, out);
  if (m <= 4) return strips_int8<4>(w, table, x, stride, m, threads, out);
  if (m <= 64 && (m - 1) % kInt8StripRows < 8)
    return strips_int8<8>(w, table, x, stride, m, threads, out);  // 16 would waste more
  return strips_int8<kInt8StripRows>(w, table, x, stride, m, threads, out);
}

}  // namespace peftk::PEFTK_TIER
#endif
