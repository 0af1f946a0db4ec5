// out (r, c) = scale * thin^T D(wide): wide (m, c) is read once, thin (m, r) is small. MMA's inner dimension is m, so registers
// hold pairs of rows. The trick: no operand goes through shared memory; a lane loads 8 neighbours of each of four rows and
// interleaves them with byte permutes. Columns are MMA's 16-row side, in an order of their own (a lane's neighbours are spread
// over four fragments), rows its inner side in another (a lane's four are neighbours), of which thin's fragments follow the
// second. Warps of a block share 64 columns and divide m. Only sums are put in order, in shared memory, so that stores run along
// the result's contiguous dimension. fp32, GPUs before sm_80 and odd strides: cuda_thin_fma.cuh.
#include "ops/nf4_lora_linear/cuda_thin_fma.cuh"
#include "ops/nf4_lora_linear/op.h"

namespace peftk::cuda {
namespace thin_kernels {  // a kernel needs a name that other files can see

constexpr int kOuterWarps = 4, kOuterThreads = kOuterWarps * kWarp;
constexpr int kStepRows = 16;             // of wide, of one MMA
constexpr int kSets = kBlockExtent / 16;  // of 16 columns: column 8 g + i of a block is row g of set i, 8 g + 4 + i its row g + 8
constexpr int kSumRow = kBlockExtent + 4;  // floats from one of thin's columns to the next where sums are put in order

struct OuterProduct {
  const void* thin;  // (m, r)
  const void* wide;  // (m, c)
  std::int64_t stride;
  int r, c;
  float scale;  // with keep_scale
  Dropout dropout;
  Target out;  // (r, c)
};

struct OuterList {
  int count;
  OuterProduct of[kMostProducts];
};

// Where a lane reads next: rows 4 t … + 3 of a step, 8 columns of wide and kTiles of thin.
template <class T, int kTiles>
struct OuterLane {
  const T *wide, *thin;
  std::int64_t stride;
  int r, columns;  // of thin: from row to row, and that are there
  bool there;      // whether the columns of wide are

  // `left` rows are there.
  template <bool kVector>
  __device__ __forceinline__ void load(int left, Elements<8> (&wide_rows)[4], Elements<kTiles> (&thin_rows)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      wide_rows[i] = load_elements<8, true>(wide + i * stride, there && i < left);
      thin_rows[i] = load_elements<kTiles, kVector>(thin + i * r, i >= left ? 0 : kVector ? kTiles : columns);
    }
  }

  __device__ __forceinline__ void advance(int rows) { wide += rows * stride, thin += static_cast<std::int64_t>(rows) * r; }
};

__device__ __forceinline__ void drop_rows(const Dropout& dropout, std::int64_t c, std::int64_t row, int column,
                                          Elements<8> (&rows)[4]) {
  std::uint32_t keep = 0;
#pragma unroll 1
  for (int i = 0; i < 4; i++) keep |= eight_kept_by(dropout, ((row + i) * c + column) / 4) << 8 * i;
#pragma unroll
  for (int i = 0; i < 4; i++) drop(rows[i], keep >> 8 * i);
}

// A step as MMA takes it: the 16 columns of a set, eights of thin's columns.
template <int kTiles>
struct Fragments {
  std::uint32_t a[kSets][4], b[kTiles][2];

  __device__ __forceinline__ Fragments(const Elements<8> (&wide)[4], const Elements<kTiles> (&thin)[4]) {
    std::uint32_t pairs[8], thin_pairs[kTiles];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      pair_rows(wide[2 * half], wide[2 * half + 1], pairs);
      pair_rows(thin[2 * half], thin[2 * half + 1], thin_pairs);
#pragma unroll
      for (int i = 0; i < 8; i++) a[i % kSets][2 * half + i / kSets] = pairs[i];
#pragma unroll
      for (int j = 0; j < kTiles; j++) b[j][half] = thin_pairs[j];
    }
  }
};

// The warp's steps of a run of m. All lanes take part in each, whether their rows are there or not; a step's elements are under
// way while the one before is multiplied.
template <bool kDropout, bool kVector, class T, int kTiles>
__device__ __forceinline__ void multiply_rows(const OuterProduct& product, int step, int end, int column,
                                              OuterLane<T, kTiles>& lane, float (&sums)[kSets * kTiles][4]) {
  constexpr int kTurn = kStepRows * kOuterWarps;
  const int own = 4 * (threadIdx.x % 4);
  Elements<8> wide[4];
  Elements<kTiles> thin[4];
  lane.template load<kVector>(end - step - own, wide, thin);
#pragma unroll 1
  for (; step < end; step += kTurn) {
    if constexpr (kDropout) drop_rows(product.dropout, product.c, step + own, column, wide);
    const Fragments<kTiles> now(wide, thin);
    lane.advance(kTurn);
    lane.template load<kVector>(end - step - kTurn - own, wide, thin);
#pragma unroll
    for (int set = 0; set < kSets; set++)
#pragma unroll
      for (int j = 0; j < kTiles; j++) mma<T>(sums[kTiles * set + j], now.a[set], now.b[j]);
  }
}

// kVector: kTiles neighbours of thin can be loaded at once; kTiles: of thin's columns, in eights, of one pass over wide.
template <class T, bool kVector, int kTiles>
__global__ void __launch_bounds__(kOuterThreads, kTiles == 8   ? 2
                                                 : kTiles == 4 ? 3
                                                               : 4)
    outer_kernel(const OuterList list, int m,
                 int passes)  // of all products; blockIdx.x: 64 columns * passes + pass; blockIdx.y: run of m
{
  if constexpr (kHasSm80) {
    constexpr int kColumns = 8 * kTiles, kFragments = kSets * kTiles;
    PEFTK_SHARED(float4, exchange, [kOuterWarps / 2 * kFragments * kWarp]);
    static_assert(sizeof(float4) * kOuterWarps / 2 * kFragments * kWarp <= 48 << 10);
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    int pass = blockIdx.x % passes, number = 0;
    for (; pass >= (list.of[number].r - 1) / kColumns + 1; number++) pass -= (list.of[number].r - 1) / kColumns + 1;
    const OuterProduct& product = list.of[number];
    const int first_column = blockIdx.x / passes * kBlockExtent, first_thin = pass * kColumns;
    if (first_column >= product.c) return;  // another product is wider

    const Run run = run_of<kStepRows>(m, gridDim.y, blockIdx.y);
    const int step = run.first + warp * kStepRows, row = step + 4 * t, column = first_column + 8 * g,
              own = first_thin + kTiles * g;
    const int thin_column = own < product.r ? own : 0;  // stands in for one that isn't there; its sums are not stored
    OuterLane<T, kTiles> lane{static_cast<const T*>(product.wide) + row * product.stride + column,
                              static_cast<const T*>(product.thin) + static_cast<std::int64_t>(row) * product.r + thin_column,
                              product.stride,
                              product.r,
                              product.r - thin_column,
                              column < product.c};
    float sums[kFragments][4] = {};
    if (product.dropout.drop_below)
      multiply_rows<true, kVector>(product, step, run.end, column, lane, sums);
    else
      multiply_rows<false, kVector>(product, step, run.end, column, lane, sums);

    add_over_warps<kOuterWarps, 1>(sums, exchange);
    float* const ordered = reinterpret_cast<float*>(exchange);  // [kColumns][kSumRow]
    static_assert(kColumns * kSumRow <= 4 * kOuterWarps / 2 * kFragments * kWarp);
    if (warp == 0)
#pragma unroll
      for (int f = 0; f < kFragments; f++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          ordered[((2 * t + i % 2) * kTiles + f % kTiles) * kSumRow + 8 * g + i / 2 * 4 + f / kTiles] = sums[f][i];
    __syncthreads();
    const bool along_column = product.out.column == 1;
    for (int i = threadIdx.x; i < kColumns * kBlockExtent; i += kOuterThreads) {
      const int y = along_column ? i / kBlockExtent : i % kColumns, x = along_column ? i % kBlockExtent : i / kColumns;
      if (first_thin + y < product.r && first_column + x < product.c)
        store(product.out, blockIdx.y, first_thin + y, first_column + x, __fmul_rn(ordered[y * kSumRow + x], product.scale));
    }
  }
}

// ---- the second stage ---------------------------------------------------------------------------------------------------------

struct OuterSums {
  const float* partial;  // (splits, rows, columns): out's dimensions, the contiguous one last
  std::int64_t rows, columns;
  Target out;
};

struct OuterSumsList {
  OuterSums of[kMostProducts];
};

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) outer_sums_kernel(const OuterSumsList list, int splits) {  // blockIdx.y: which
  const OuterSums& sums = list.of[blockIdx.y];
  const std::int64_t count = sums.rows * sums.columns, step = static_cast<std::int64_t>(gridDim.x) * kSumThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; i < count; i += step) {
    float sum = sums.partial[i];
    for (int split = 1; split < splits; split++) sum = __fadd_rn(sum, sums.partial[split * count + i]);
    store(sums.out, 0, i / sums.columns, i % sums.columns, sum);
  }
}

// ---- launches -----------------------------------------------------------------------------------------------------------------

// It depends on nothing but the product, and sums do not depend on what stands beside it: a list's results are those of single
// calls.
template <class T>
bool mma_takes(const OuterProduct& p) {
  return sizeof(T) == 2 && capability() >= 80 && p.c % 8 == 0 && p.stride % 8 == 0 && is_aligned(p.wide, kVectorBytes) &&
         p.r < INT32_MAX / kStepRows;
}

template <class T, int kTiles>
void launch_outer(const OuterList& list, int m, int split, void* stream) {
  bool whole = true;
  int passes = 0, most = 0;
  for (int i = 0; i < list.count; i++) {
    const OuterProduct& p = list.of[i];
    whole &= p.r % kTiles == 0 && is_aligned(p.thin, kTiles * sizeof(T));
    passes += ceil_div(p.r, 8 * kTiles);
    most = p.c > most ? p.c : most;
  }
  const auto kernel = whole ? outer_kernel<T, true, kTiles> : outer_kernel<T, false, kTiles>;
  const dim3 blocks(static_cast<unsigned>(passes) * ceil_div(most, kBlockExtent), static_cast<unsigned>(split));
  launch(kernel, blocks, kOuterThreads, 0, stream, list, m, passes);
}

template <class T>
void outer_by_mma(const OuterList& list, int m, int split, void* stream) {
  int r = 0;
  for (int i = 0; i < list.count; i++) r = list.of[i].r > r ? list.of[i].r : r;
  const auto go = r <= 16 ? launch_outer<T, 2> : r <= 32 ? launch_outer<T, 4> : launch_outer<T, 8>;
  go(list, m, split, stream);
}

template <class T>
void outer_by_fma(const OuterList& list, int m, int split, void* stream) {
  FmaList fma{list.count, {}};
  for (int i = 0; i < list.count; i++) {
    const OuterProduct& p = list.of[i];
    const Target turned{p.out.data, p.out.column, p.out.row, p.out.run, p.out.dtype};
    fma.of[i] = {p.wide, p.stride, m, p.c, p.thin, p.r, 1, p.r, p.scale, p.dropout, turned, false};
  }
  launch_thin_fma<T, false>(fma, split, stream);
}

}  // namespace thin_kernels

void nf4_lora_linear_outer(const std::vector<Outer>& products, std::int64_t m, int dtype, int split, float* partial,
                           void* stream) {
  using namespace thin_kernels;
  check_count(products.size());
  const int rows = extent(m, "m: expected at most 2^30 rows");
  with_type(static_cast<void*>(nullptr), dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    OuterList by_mma{}, by_fma{};
    OuterSumsList second{};
    std::int64_t most = 0;
    int count = 0;
    for (const auto& [thin, r, wide, stride, c, scale, drop_below, keep_scale, seed, out, row, column, out_dtype] : products) {
      const bool along_column = column == 1;
      Target sums{out, row, column, 0, out_dtype};
      if (split > 1) {
        const Target turned{out, column, row, 0, out_dtype};
        second.of[count++] = {partial, along_column ? r : c, along_column ? c : r, along_column ? sums : turned};
        sums = {partial, along_column ? c : 1, along_column ? 1 : r, r * c, static_cast<int>(DType::f32)};
        partial += split * r * c;
      }
      const OuterProduct product{thin,
                                 wide,
                                 stride,
                                 extent(r, "r: expected at most 2^30"),
                                 extent(c, "c: expected at most 2^30 columns"),
                                 scale * keep_scale,
                                 {drop_below, keep_scale, seed},
                                 sums};
      most = r * c > most ? r * c : most;
      OuterList& list = mma_takes<T>(product) ? by_mma : by_fma;
      list.of[list.count++] = product;
    }
    if constexpr (sizeof(T) == 2)
      if (by_mma.count) outer_by_mma<T>(by_mma, rows, split, stream);
    if (by_fma.count) outer_by_fma<T>(by_fma, rows, split, stream);
    if (count) {
      const dim3 blocks(blocks_for(most, kSumThreads, kResidentThreads / kSumThreads), static_cast<unsigned>(count));
      launch(outer_sums_kernel, blocks, kSumThreads, 0, stream, second, split);
    }
  });
}

}  // namespace peftk::cuda
