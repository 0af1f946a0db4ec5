// The low-rank share of nf4_linear_dx_tile: sums += D(t a), added when the steps are done: before and during them registers are
// short.
#pragma once
#include "ops/nf4_linear/cuda_dx_feed.cuh"

namespace peftk::cuda::nf4_linear_dx_tile_kernels {

// Columns of a warp's two MMA tiles: row g + 8 h of tile c is column 4 g + 2 c + h. So a lane's sums [j][c][2 h + e] are those of
// token 8 j + 2 t + e and its own column 2 c + h.
template <int kTokens>
using Sums = float[kTokens / 8][2][4];

using Fragments = std::uint32_t[2][4];  // of 16 rows of W, by tile

// The lane's first in the block's tile.
__device__ __forceinline__ int column_of(int thread) { return thread / 4 * 4; }

constexpr int kRanks = 16;  // one MMA takes

// In the place of the stages, once they are used up; rows padded against bank conflicts. Zeros where a matrix ends.
template <class T, int kTokens>
struct LowRank {
  static_assert(kColumns == kThreads, "each thread loads a column");
  static constexpr int kThinPitch = kRanks + 8, kFactorPitch = kColumns + 8;
  T t[kTokens][kThinPitch];
  T a[kRanks][kFactorPitch];

  __device__ __forceinline__ void load(int thread, const Gradient& gradient, const Tile& tile, std::int64_t k,
                                       std::int64_t rank) {
    const int ranks = static_cast<int>(min(gradient.r - rank, static_cast<std::int64_t>(kRanks)));
    constexpr int kTogether = kThreads / kRanks;  // tokens
    const int token = thread / kRanks, own = thread % kRanks, column = thread;
    const T* from = static_cast<const T*>(gradient.t) + (tile.token + token) * gradient.r + rank + own;
#pragma unroll 4
    for (int i = 0; i < kTokens / kTogether; i++, from += kTogether * gradient.r)
      t[token + i * kTogether][own] = token + i * kTogether < tile.tokens && own < ranks ? *from : T{};
    from = static_cast<const T*>(gradient.a) + rank * k + tile.column + column;
#pragma unroll 4
    for (int i = 0; i < kRanks; i++, from += k) a[i][column] = i < ranks && column < tile.columns ? *from : T{};
  }

  // Ranks 2 t and 2 t + 1, and the 8 behind them, of the lane's four columns.
  __device__ __forceinline__ void factor(int thread, Fragments& fragments) const {
    const int t = thread % 4, column = column_of(thread);
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const uint2 first = *reinterpret_cast<const uint2*>(&a[8 * q + 2 * t][column]);
      const uint2 second = *reinterpret_cast<const uint2*>(&a[8 * q + 2 * t + 1][column]);
      fragments[0][2 * q] = __byte_perm(first.x, second.x, 0x5410);
      fragments[0][2 * q + 1] = __byte_perm(first.x, second.x, 0x7632);
      fragments[1][2 * q] = __byte_perm(first.y, second.y, 0x5410);
      fragments[1][2 * q + 1] = __byte_perm(first.y, second.y, 0x7632);
    }
  }
};

// A lane's mask of D on the tile: bit 4 (2 (j % 4) + e) + i of word j / 4 for token 8 j + 2 t + e and the lane's column i.
template <int kTokens>
using Mask = std::uint32_t[(kTokens + 31) / 32];

template <int kTokens>
__device__ __forceinline__ void make_mask(int thread, const Dropout& dropout, const Tile& tile, std::int64_t k,
                                          Mask<kTokens>& mask) {
#pragma unroll
  for (int word = 0; word < (kTokens + 31) / 32; word++) {
    mask[word] = dropout.drop_below ? 0 : ~0u;
#pragma unroll 1
    for (int group = 0; group < (kTokens < 32 ? kTokens / 4 : 8) && dropout.drop_below; group++) {
      const std::int64_t token = tile.token + 32 * word + group / 2 * 8 + thread % 4 * 2 + group % 2;
      const std::uint64_t element = static_cast<std::uint64_t>(token * k + tile.column + column_of(thread));
      // A seed that the loop doesn't know: else all of its keys stay in registers.
      const std::uint64_t low = static_cast<std::uint32_t>(held(static_cast<int>(dropout.seed)));
      const std::uint64_t high = static_cast<std::uint32_t>(held(static_cast<int>(dropout.seed >> 32)));
      const uint4 random = philox(element / 4, high << 32 | low);
      const std::uint32_t below = dropout.drop_below;
      mask[word] |= ((random.x >= below) | (random.y >= below) << 1 | (random.z >= below) << 2 | (random.w >= below) << 3)
                    << 4 * group;
    }
  }
}

// sums += D(t a) over kRanks ranks, a's columns as an MMA's rows.
template <class T, int kTokens>
__device__ __forceinline__ void add_ranks(int thread, const LowRank<T, kTokens>& low_rank, const Mask<kTokens>& mask,
                                          float keep_scale, Sums<kTokens>& sums) {
  const int lane = thread % kWarp;
  Fragments factor;
  low_rank.factor(thread, factor);
  std::uint32_t thin[4];  // of two tiles of tokens
#pragma unroll
  for (int j = 0; j < kTokens / 8; j++) {
    if (j % 2 == 0) {
      __syncwarp();  // or ptxas does so many at once that registers spill
      load_matrices(thin, &low_rank.t[8 * j + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float product[4] = {};
      mma<T>(product, factor[c], {thin[j % 2 * 2], thin[j % 2 * 2 + 1]});
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const bool kept = mask[j / 4] >> (4 * (j % 4 * 2 + i % 2) + 2 * c + i / 2) & 1;
        sums[j][c][i] = __fmaf_rn(kept ? product[i] : 0.0f, keep_scale, sums[j][c][i]);
      }
    }
  }
}

// One loop over the ranks of all weights: what is the same for those of one would be kept in registers that aren't there.
template <class T, int kTokens>
__device__ __forceinline__ void add_low_rank(const GradientList& list, const Tile& tile, std::int64_t k,
                                             LowRank<T, kTokens>& low_rank, Sums<kTokens>& sums) {
  Mask<kTokens> mask = {};
  for (int i = 0, rank = 0; i < list.count;) {
    const Gradient& gradient = list.of[i];
    if (!gradient.t || rank >= gradient.r) {
      i++, rank = 0;
      continue;
    }
    const int thread = held(static_cast<int>(threadIdx.x));  // anew each round: what follows from it takes no registers meanwhile
    const Dropout& dropout = gradient.dropout;
    if (rank == 0) make_mask<kTokens>(thread, dropout, tile, k, mask);
    __syncthreads();  // nobody reads what lay there any more
    low_rank.load(thread, gradient, tile, k, rank);
    __syncthreads();
    add_ranks<T, kTokens>(thread, low_rank, mask, dropout.drop_below ? dropout.keep_scale : 1.0f, sums);
    rank += kRanks;
  }
}

}  // namespace peftk::cuda::nf4_linear_dx_tile_kernels
