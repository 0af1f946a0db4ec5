// y = x W^T for more rows of bf16 x: strips of 16 rows of W are turned as packed dwords, so lanes are rows of W and x is
// broadcast. One turn of 64 shuffles serves 2048 weights, a look-up 32 weights times up to 16 rows of x; no panel is written.
// Constants scale fp32 sums, as in few_rows_bf16.h. Knows no op.
#pragma once
#include "cpu/few_rows_bf16.h"

#ifdef PEFTK_TIER_IS_AVX512_BF16
namespace peftk::PEFTK_TIER {

// On Zen 4 shifts, look-ups and dot products of 512 bits share one issue a cycle. 128 weights take 4 for the turn, 7 for each
// pass and 4 a row of x; as a panel 35 and 4 a row. At 48 rows both took 8.3 ms (4096 x 4096, one thread).
#ifdef PEFTK_TIER_IS_AMX_BF16
inline constexpr std::int64_t kStripsUpTo = 4;  // m = 8: tiles 3.6 ms, strips 3.8; m = 16: 3.8 and 6.5 (4096 x 4096, one thread)
#else
inline constexpr std::int64_t kStripsUpTo = 48;
#endif
inline constexpr int kQuad = 4, kQuadsAtOnce = 4;  // rows of x at once: with 5 and 6 quads the compiler spills sums

// x as cells [8 weights][nibble][rows] of `rows` rows, of which `count` are there and the others are zero.
inline void interleave_rows(const Bf16* x, std::int64_t stride, std::int64_t count, int rows, std::int64_t k,
                            std::uint32_t* cells) {
  for (std::int64_t start = 0; start < k; start += 8)
    for (int s = 0; s < 4; s++)
      for (int i = 0; i < rows; i++, cells++) {
        const Bf16* p = x + i * stride + start + kOrder[s];
        *cells = i < count ? static_cast<std::uint32_t>(p[4].bits) << 16 | p[0].bits : 0;
      }
}

// sums[i] (16 rows of W) += constants of the run * (64 weights x N rows of x), from 8 turned dwords.
template <int N>
void strip_run(const U32* turned, const std::uint32_t* x, __m512 constants, __m512i table, F32* sums) {
  constexpr int kChains = N < 8 ? 2 : 1;  // vdpbf16ps takes 6 cycles
  __m512 part[kChains][N];
  for (auto& chain : part)
    for (__m512& p : chain) p = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int dword = 0; dword < 8; dword++, x += 4 * N)
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) {
      const __m512i weight = _mm512_permutexvar_epi16(_mm512_srli_epi16(turned[dword].v, 4 * s), table);
#pragma GCC unroll 16
      for (int i = 0; i < N; i++) {
        __m512& p = part[s % kChains][i];
        p = multiply_add(PairCell{}, p, weight, _mm512_set1_epi32(static_cast<int>(x[s * N + i])));
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) {
    if constexpr (kChains == 2) part[0][i] = _mm512_add_ps(part[0][i], part[1][i]);
    sums[i].v = _mm512_fmadd_ps(part[0][i], constants, sums[i].v);
  }
}

// Rows of x in passes of at most kQuadsAtOnce * kQuad, as equal as can be.
struct Passes {
  int quads, count;
  explicit Passes(std::int64_t m)
      : quads(static_cast<int>((m + kQuad - 1) / kQuad)), count((quads + kQuadsAtOnce - 1) / kQuadsAtOnce) {}
  int first_row(int pass) const { return quads * pass / count * kQuad; }
  int rows(int pass) const { return first_row(pass + 1) - first_row(pass); }
};

// Calls body(std::integral_constant<int, rows>).
template <class Body>
void with_pass_rows(int rows, Body&& body) {
  switch (rows) {
    case 4: return body(std::integral_constant<int, 4>{});
    case 8: return body(std::integral_constant<int, 8>{});
    case 12: return body(std::integral_constant<int, 12>{});
    default: return body(std::integral_constant<int, 16>{});
  }
}

// sums += one strip of W times all rows of x, a vector each. constants [run][16 rows].
inline void strip(const Matrix4& w, std::int64_t first_row, const float* constants, __m512i table, const std::uint32_t* x,
                  const Passes& passes, F32* sums) {
  for (std::int64_t start = 0; start < w.k; start += kGroup) {
    const int runs = w.k - start < kGroup ? 1 : 2;
    const __mmask64 bytes = runs == 1 ? 0xffffffff : ~__mmask64{0};
    U32 square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      const std::int64_t row = std::min(first_row + i, w.rows - 1);
      ask_ahead<kLanes>(w.packed + first_row * w.k / 2, w.k, start / kGroup * kLanes + i);
      square[i].v = _mm512_maskz_loadu_epi8(bytes, w.packed + (row * w.k + start) / 2);
    }
    transpose(square);
    for (int pass = 0; pass < passes.count; pass++)
      with_pass_rows(passes.rows(pass), [&](auto rows) {
        constexpr int N = decltype(rows)::value;
        const int first = passes.first_row(pass);
        for (int run = 0; run < runs; run++)
          strip_run<N>(square + 8 * run, x + first * w.k / 2 + (start + 64 * run) / 2 * N,
                       _mm512_loadu_ps(constants + (start / 64 + run) * kLanes), table, sums + first);
      });
  }
}

// start(first row of W, rows of W, sums) sets the m sums of a strip, a vector for each row of x; then
// out(first row of W, rows of W, row of x, sums).
template <class Start, class Out>
void strips_bf16(const Matrix4& w, const Bf16* x, std::int64_t stride, std::int64_t m, int threads, Start start, Out out) {
  const Passes passes(m);
  const std::int64_t cells = passes.quads * kQuad * w.k / 2, slab = w.k / kRun * kLanes, units = (w.rows + kLanes - 1) / kLanes;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(cells + slab * std::max(threads, 1)));
  auto* const factors = memory.as<std::uint32_t>();
  parallel_for(passes.count, threads, [&](std::int64_t begin, std::int64_t end) {
    for (int pass = static_cast<int>(begin); pass < end; pass++) {
      const int first = passes.first_row(pass);
      interleave_rows(x + first * stride, stride, m - first, passes.rows(pass), w.k, factors + first * w.k / 2);
    }
  });
  const __m512i table = bf16_table(w.values);
  parallel_for_threads(units, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
    float* const constants = memory.as<float>() + cells + slab * thread;
    for (std::int64_t unit = begin; unit < end; unit++) {
      const std::int64_t first = unit * kLanes;
      turn_constants(w, first, 0, w.k / kRun, constants, kLanes);
      const int count = static_cast<int>(std::min<std::int64_t>(kLanes, w.rows - first));
      F32 sums[kStripsUpTo];
      for (F32& s : sums) s = broadcast(0.0f);
      start(first, count, sums);
      strip(w, first, constants, table, factors, passes, sums);
      for (std::int64_t i = 0; i < m; i++) out(first, count, i, sums[i]);
    }
  });
}

// Here the table value is rounded to bf16, not table times absmax: in a huge block that error is coherent (1.6x the bound at
// 4096).
inline bool few_bf16_fits(const Matrix4& w, std::int64_t m) {
  return m <= kStripsUpTo && w.k % 64 == 0 && w.block_shift >= 6 && w.block_shift <= 10;
}

template <class Out>
void few_product_bf16(const Matrix4& w, const Bf16* x, std::int64_t stride, std::int64_t m, int threads, Out out) {
  if (m == 1) return few_rows_bf16<1>(w, x, stride, m, threads, out);
  if (m == 2) return few_rows_bf16<2>(w, x, stride, m, threads, out);
  if (m <= 4) return few_rows_bf16<4>(w, x, stride, m, threads, out);
  return strips_bf16(w, x, stride, m, threads, [](std::int64_t, int, F32*) {}, out);
}

}  // namespace peftk::PEFTK_TIER
#endif
