// out (m, r) = scale * D(wide) factor: wide (m, c) is read once, factor (c, r) is small. The trick: any order of the inner
// dimension is right, so a lane takes 8 neighbours of a row of wide in one 128-bit load and uses them, as they lie, as MMA's b of
// two steps (its column 8 t + i, where MMA's order has 2 t + …). The factor, in that order, is a: a factor whose columns are
// contiguous (A^T) is loaded likewise, one whose rows are (B) in pairs of rows that a byte permute interleaves. No operand goes
// through shared memory. Warps of a block divide rows and c. Products that share wide without dropout are one group, whose
// factors stand side by side. fp32, GPUs before sm_80 and odd strides: cuda_thin_fma.cuh.
#include "cuda/partial_sums.cuh"
#include "ops/nf4_lora_linear/cuda_thin_fma.cuh"
#include "ops/nf4_lora_linear/op.h"

namespace peftk::cuda {
namespace thin_kernels {  // a kernel needs a name that other files can see

constexpr int kRowTiles = 4;                   // of 8 rows, of a warp: all use the factor's registers
constexpr int kRowWarps = 2, kInnerWarps = 2;  // of a block; warps that share rows divide c
constexpr int kStep = 32, kSteps = 2;          // columns that four lanes' loads cover; steps whose loads are under way together
constexpr int kRound = kStep * kSteps;         // columns of wide a warp takes at a time: 128 bytes of a row
constexpr int kTurn = kRound * kInnerWarps;    // … and goes on by
constexpr int kShrinkWarps = kRowWarps * kInnerWarps, kShrinkThreads = kShrinkWarps * kWarp;
static_assert(8 * kRowTiles * kRowWarps == kBlockExtent);

// How a lane loads its share of the factor: 8 of a column; kTiles of a row at once; as many one by one; not (fp32 units do it).
enum class Factor { columns, rows, scalar_rows, strided };

struct ShrinkProduct {
  const void* wide;  // (m, c)
  std::int64_t stride;
  int c, r;
  const void* factor;  // (c, r)
  std::int64_t factor_row, factor_column;
  float scale;  // with keep_scale
  Dropout dropout;
  Target out;
};

struct ShrinkList {
  int count, groups;
  int first[kMostProducts + 1];       // product of a group
  int first_pass[kMostProducts + 1];  // of a group: kTiles eights of its factors' columns
  ShrinkProduct of[kMostProducts];
};

// A column of a product's factor. One from r on isn't there: column 0 stands in, and its sums are not stored.
struct Column {
  int product, column;
};

// Column n of eight `j`. Products of a group stand side by side, each in eights of its own; by rows there is one product, and a
// lane's kTiles neighbours are a column of each eight.
template <Factor kFactor, int kTiles>
__device__ __forceinline__ Column column_of(const ShrinkList& list, int group, int pass, int j, int n) {
  int product = list.first[group];
  if constexpr (kFactor != Factor::columns) return {product, (8 * pass + n) * kTiles + j};
  int tile = pass * kTiles + j;
  for (; product + 1 < list.first[group + 1]; product++) {
    const int tiles = (list.of[product].r + 7) / 8;
    if (tile < tiles) break;
    tile -= tiles;
  }
  return {product, 8 * tile + n};
}

// Where a lane reads the factor next: 8 rows of its column of each eight, or by rows of its kTiles.
template <class T, Factor kFactor, int kTiles>
struct FactorLane {
  static constexpr bool kByRow = kFactor != Factor::columns;
  const T* at[kByRow ? 1 : kTiles];
  int row;      // elements from row to row
  int columns;  // that are there, by rows

  __device__ __forceinline__ FactorLane(const ShrinkList& list, int group, int pass, int g, int first) {
#pragma unroll
    for (int j = 0; j < (kByRow ? 1 : kTiles); j++) {
      const Column own = column_of<kFactor, kTiles>(list, group, pass, j, g);
      const ShrinkProduct& product = list.of[own.product];
      const int column = own.column < product.r ? own.column : 0;
      at[j] = static_cast<const T*>(product.factor) + first * product.factor_row + column * product.factor_column;
      row = static_cast<int>(product.factor_row);
      columns = product.r - column;
    }
  }

  __device__ __forceinline__ void advance(int rows) {
#pragma unroll
    for (int j = 0; j < (kByRow ? 1 : kTiles); j++) at[j] += kByRow ? rows * row : rows;
  }

  // a[j][i]: of eight j the pair of rows 2 i, 2 i + 1 from `ahead` on, if they are there.
  __device__ __forceinline__ void load(int ahead, bool there, std::uint32_t (&a)[kTiles][4]) const {
    if constexpr (kByRow) {
      constexpr bool kVector = kFactor == Factor::rows;
      const int left = !there ? 0 : kVector ? kTiles : columns;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const auto upper = load_elements<kTiles, kVector>(at[0] + (ahead + 2 * i) * row, left);
        const auto lower = load_elements<kTiles, kVector>(at[0] + (ahead + 2 * i + 1) * row, left);
        std::uint32_t pairs[kTiles];
        pair_rows(upper, lower, pairs);
#pragma unroll
        for (int j = 0; j < kTiles; j++) a[j][i] = pairs[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        const auto eight = load_elements<8, true>(at[j] + ahead, there);
#pragma unroll
        for (int i = 0; i < 4; i++) a[j][i] = eight.word[i];
      }
    }
  }
};

// Where a lane reads wide next: 8 columns of rows g + 8 i of its warp's.
template <class T>
struct WideLane {
  const T* at[kRowTiles];
  bool there[kRowTiles];

  __device__ __forceinline__ WideLane(const ShrinkProduct& product, int m, int first_row, int first) {
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
      const std::int64_t row = first_row + 8 * i;
      at[i] = static_cast<const T*>(product.wide) + row * product.stride + first;
      there[i] = row < m;
    }
  }

  __device__ __forceinline__ void advance(int columns) {
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) at[i] += columns;
  }
};

// Bits 8 (kRowTiles * step + tile) …: which of a lane's elements of a round stay. A loop that stays one: unrolled it would be a
// thousand instructions.
__device__ __forceinline__ std::uint64_t kept_of_round(const Dropout& dropout, std::int64_t c, int row, int column) {
  std::uint64_t keep = 0;
#pragma unroll 1
  for (int i = 0; i < kSteps * kRowTiles; i++) {
    const std::uint64_t element = (row + i % kRowTiles * 8) * c + column + i / kRowTiles * kStep;
    keep |= static_cast<std::uint64_t>(eight_kept_by(dropout, element / 4)) << 8 * i;
  }
  return keep;
}

// sums[kRowTiles * j / 2 + tile] += eights j and j + 1 of the factor's columns times the eight rows of `tile`.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_step(const std::uint32_t (&factor)[kTiles][4], const Elements<8> (&wide)[kRowTiles],
                                              float (&sums)[kTiles / 2 * kRowTiles][4]) {
#pragma unroll
  for (int half = 0; half < 4; half += 2)
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      const std::uint32_t a[4] = {factor[j][half], factor[j + 1][half], factor[j][half + 1], factor[j + 1][half + 1]};
#pragma unroll
      for (int tile = 0; tile < kRowTiles; tile++)
        mma<T>(sums[kRowTiles * j / 2 + tile], a, {wide[tile].word[half], wide[tile].word[half + 1]});
    }
}

// The warp's rounds of a run of c. All lanes take part in each, whether their columns are there or not.
template <bool kDropout, class T, Factor kFactor, int kTiles>
__device__ __forceinline__ void multiply_run(const ShrinkProduct& product, int row, int round, int end, WideLane<T>& wide_lane,
                                             FactorLane<T, kFactor, kTiles>& factor, float (&sums)[kTiles / 2 * kRowTiles][4]) {
#pragma unroll 1
  for (; round < end; round += kTurn) {
    const int column = round + 8 * (threadIdx.x % 4);
    std::uint64_t keep = 0;
    if constexpr (kDropout) keep = kept_of_round(product.dropout, product.c, row, column);
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const int ahead = step * kStep;
      Elements<8> wide[kRowTiles];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; tile++) {
        wide[tile] = load_elements<8, true>(wide_lane.at[tile] + ahead, wide_lane.there[tile] && column + ahead < end);
        if constexpr (kDropout) drop(wide[tile], static_cast<std::uint32_t>(keep >> 8 * (step * kRowTiles + tile)));
      }
      std::uint32_t a[kTiles][4];
      factor.load(ahead, column + ahead < end, a);
      multiply_step<T>(a, wide, sums);
    }
    wide_lane.advance(kTurn);
    factor.advance(kTurn);
  }
}

// kTiles: columns of factors, in eights, of one pass over wide. Blocks: as many as registers let a multiprocessor hold.
template <class T, Factor kFactor, int kTiles>
__global__ void __launch_bounds__(kShrinkThreads, kTiles == 8   ? 2
                                                  : kTiles == 4 ? 3
                                                                : 4)
    shrink_kernel(const ShrinkList list, int m,
                  int passes)  // of all groups; blockIdx.x: 64 rows * passes + pass; blockIdx.y: run of c
{
  if constexpr (kHasSm80) {
    constexpr int kFragments = kTiles / 2 * kRowTiles;
    PEFTK_SHARED(float4, exchange, [kShrinkWarps / 2 * kFragments * kWarp]);
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    int pass = blockIdx.x % passes, group = 0;
    while (pass >= list.first_pass[group + 1]) group++;
    pass -= list.first_pass[group];
    const ShrinkProduct& lead = list.of[list.first[group]];

    const int first_row = blockIdx.x / passes * kBlockExtent + warp % kRowWarps * 8 * kRowTiles;
    const Run run = run_of<kRound>(lead.c, gridDim.y, blockIdx.y);
    const int round = run.first + warp / kRowWarps * kRound;
    WideLane<T> wide(lead, m, first_row + g, round + 8 * t);
    FactorLane<T, kFactor, kTiles> factor(list, group, pass, g, round + 8 * t);
    float sums[kFragments][4] = {};
    if (kFactor == Factor::columns && lead.dropout.drop_below)
      multiply_run<kFactor == Factor::columns>(lead, first_row + g, round, run.end, wide, factor, sums);
    else
      multiply_run<false>(lead, first_row + g, round, run.end, wide, factor, sums);

    add_over_warps<kShrinkWarps, kRowWarps>(sums, exchange);
    if (warp >= kRowWarps) return;
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
      const Column at = column_of<kFactor, kTiles>(list, group, pass, j, g);
      const ShrinkProduct& product = list.of[at.product];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; i++) {
        const int row = first_row + i / 2 * 8 + 2 * t + i % 2;
        const float sum = __fmul_rn(sums[j / 2 * kRowTiles + i / 2][j % 2 * 2 + i % 2], product.scale);
        if (row < m && at.column < product.r) store(product.out, blockIdx.y, row, at.column, sum);
      }
    }
  }
}

// ---- launches -----------------------------------------------------------------------------------------------------------------

// It depends on nothing but the product, and sums do not depend on what stands beside it: a list's results are those of single
// calls.
template <class T>
Factor factor_kind(const ShrinkProduct& p) {
  if (sizeof(T) != 2 || capability() < 80) return Factor::strided;
  if (p.c % 8 || p.stride % 8 || !is_aligned(p.wide, kVectorBytes)) return Factor::strided;
  if (p.factor_row == 1 && (p.r == 1 || p.factor_column % 8 == 0) && is_aligned(p.factor, kVectorBytes)) return Factor::columns;
  const bool near = p.factor_row >= 0 && p.factor_row < INT32_MAX / kTurn;  // a lane counts a turn's rows in 32 bits
  return p.factor_column == 1 && near && !p.dropout.drop_below ? Factor::rows : Factor::strided;  // T has no dropout
}

inline bool shares_wide(const ShrinkProduct& a, const ShrinkProduct& b) {
  return a.wide == b.wide && a.stride == b.stride && a.c == b.c && !a.dropout.drop_below && !b.dropout.drop_below;
}

inline int tiles_of(const ShrinkList& list, int group) {
  int tiles = 0;
  for (int i = list.first[group]; i < list.first[group + 1]; i++) tiles += ceil_div(list.of[i].r, 8);
  return tiles;
}

// Neighbours are a group; the most tiles of one.
inline int make_groups(ShrinkList& list, bool may_share) {
  for (int i = 0; i < list.count; i++)
    if (i == 0 || !may_share || !shares_wide(list.of[i - 1], list.of[i])) list.first[list.groups++] = i;
  list.first[list.groups] = list.count;
  int most = 0;
  for (int i = 0; i < list.groups; i++) most = tiles_of(list, i) > most ? tiles_of(list, i) : most;
  return most;
}

template <class T, Factor kFactor, int kTiles>
void launch_shrink(ShrinkList& list, int m, int split, void* stream) {
  for (int i = 0; i < list.groups; i++) list.first_pass[i + 1] = list.first_pass[i] + ceil_div(tiles_of(list, i), kTiles);
  const int passes = list.first_pass[list.groups];
  const dim3 blocks(static_cast<unsigned>(passes) * ceil_div(m, kBlockExtent), static_cast<unsigned>(split));
  launch(shrink_kernel<T, kFactor, kTiles>, blocks, kShrinkThreads, 0, stream, list, m, passes);
}

template <class T, int kTiles>
void launch_shrink_of(Factor kind, ShrinkList& list, int m, int split, void* stream) {
  if (kind == Factor::columns) return launch_shrink<T, Factor::columns, kTiles>(list, m, split, stream);
  bool whole = true;
  for (int i = 0; i < list.count; i++) {
    const ShrinkProduct& p = list.of[i];
    whole &= p.r % kTiles == 0 && p.factor_row % kTiles == 0 && is_aligned(p.factor, kTiles * sizeof(T));
  }
  whole ? launch_shrink<T, Factor::rows, kTiles>(list, m, split, stream)
        : launch_shrink<T, Factor::scalar_rows, kTiles == 2 ? 2 : 4>(list, m, split, stream);  // 8: its single loads spill
}

template <class T>
void launch_kind(Factor kind, ShrinkList& list, int m, int split, void* stream) {
  if (kind == Factor::strided) {
    FmaList fma{list.count, {}};
    for (int i = 0; i < list.count; i++) {
      const ShrinkProduct& p = list.of[i];
      fma.of[i] = {p.wide, p.stride, m, p.c, p.factor, p.factor_row, p.factor_column, p.r, p.scale, p.dropout, p.out, false};
    }
    return launch_thin_fma<T, true>(fma, split, stream);
  }
  if constexpr (sizeof(T) == 2) {
    const int tiles = make_groups(list, kind == Factor::columns);
    const auto go = tiles <= 2 ? launch_shrink_of<T, 2> : tiles <= 4 ? launch_shrink_of<T, 4> : launch_shrink_of<T, 8>;
    go(kind, list, m, split, stream);
  }
}

}  // namespace thin_kernels

void nf4_lora_linear_shrink(const std::vector<Shrink>& products, std::int64_t m, int dtype, int split, float* partial,
                            void* stream) {
  using namespace thin_kernels;
  check_count(products.size());
  const int rows = extent(m, "m: expected at most 2^30 rows");
  if (rows == 0) return;
  with_type(static_cast<void*>(nullptr), dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    ShrinkList lists[4] = {};  // by kind
    PartialSumsList second{};
    for (const auto& [wide, stride, c, factor, factor_row, factor_column, r, scale, drop_below, keep_scale, seed, out] :
         products) {
      const Target sums = split > 1 ? Target{partial, r, 1, m * r, static_cast<int>(DType::f32)} : Target{out, r, 1, 0, dtype};
      const ShrinkProduct product{wide,
                                  stride,
                                  extent(c, "c: expected at most 2^30 columns"),
                                  extent(r, "r: expected at most 2^30"),
                                  factor,
                                  factor_row,
                                  factor_column,
                                  scale * keep_scale,
                                  {drop_below, keep_scale, seed},
                                  sums};
      ShrinkList& list = lists[static_cast<int>(factor_kind<T>(product))];
      list.of[list.count++] = product;
      second.of[second.count++] = {partial, nullptr, out, r, split};
      if (split > 1) partial += split * m * r;
    }
    for (const Factor kind : {Factor::columns, Factor::rows, Factor::strided})
      if (ShrinkList& list = lists[static_cast<int>(kind)]; list.count) launch_kind<T>(kind, list, rows, split, stream);
    if (split > 1) sum_partials<T>(second, m, stream);
  });
}

}  // namespace peftk::cuda
