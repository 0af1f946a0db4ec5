// out[i][j] = scale * sum over k of D(wide)(i, k) thin[k][j] by fp32 units, for every shape, dtype and target: both thin products
// have this form, i along the rows of wide (m, c) and k along its columns, or the other way round. Tiles of both operands stand
// in shared memory as fp32; four groups of threads divide a tile's k, and their sums are added at the end. Sums go two levels
// deep: a tile's own, then over tiles, so that errors do not grow with k as they would in one long chain.
#pragma once
#include "ops/nf4_lora_linear/cuda_thin.cuh"

namespace peftk::cuda {

struct FmaProduct {
  const void* wide;  // (m, c)
  std::int64_t stride;
  int m, c;
  const void* thin;  // (count of k, columns)
  std::int64_t thin_row, thin_column;
  int columns;
  float scale;  // with keep_scale
  Dropout dropout;
  Target out;         // (count of i, columns)
  bool quads_vector;  // four neighbours of a row of wide can be loaded at once
};

struct FmaList {
  int count;
  FmaProduct of[kMostProducts];
};

namespace thin_kernels {

constexpr int kFmaThreads = 256, kFmaWarps = kFmaThreads / kWarp;
constexpr int kGroups = 4, kGroup = kFmaThreads / kGroups;  // threads of one have the same k, and the whole tile of sums
constexpr int kDepth = 64, kGroupDepth = kDepth / kGroups;  // k of a tile
constexpr int kQuads = kBlockExtent * kDepth / 4;           // runs of four of a row of wide, of a tile

// A thread's own sums: kI rows 64 / kI apart, kJ neighbouring columns.
template <int kColumns>
struct FmaTile {
  static constexpr int kJ = kColumns == 16 ? 4 : 8, kI = kColumns == 16 ? 4 : 8;
  static constexpr int kThreadsI = kBlockExtent / kI;
  static_assert(kThreadsI * (kColumns / kJ) == kGroup);
  static constexpr int kFragments = kI * kJ / 4;  // as add_over_warps takes them
};

template <bool kAlongRow, int kColumns>
struct FmaShared {
  // Elements from k to k + 1. Along a row, four neighbours go to four rows of this: an odd distance keeps them in banks of their
  // own.
  static constexpr int kWideRow = kAlongRow ? kBlockExtent + 1 : kBlockExtent + 4, kThinRow = kColumns + 4;
  static constexpr int kWide = (kDepth * kWideRow + 3) / 4 * 4, kThin = kDepth * kThinRow;
  static constexpr int kExchange = kFmaWarps / 2 * FmaTile<kColumns>::kFragments * kWarp * 4;
  static constexpr int kFloats = kWide + kThin > kExchange ? kWide + kThin : kExchange;
};

// `left` elements are there (none where it is ≤ 0), the rest are zeros.
template <class T>
__device__ __forceinline__ void load_quad(const T* first, int left, bool vector, float (&quad)[4]) {
  if (vector && left >= 4) {
    if constexpr (sizeof(T) == 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(first));
      quad[0] = __uint_as_float(v.x), quad[1] = __uint_as_float(v.y), quad[2] = __uint_as_float(v.z),
      quad[3] = __uint_as_float(v.w);
    } else {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(first));
      quad[0] = to_float(T{static_cast<std::uint16_t>(v.x)}), quad[1] = to_float(T{static_cast<std::uint16_t>(v.x >> 16)});
      quad[2] = to_float(T{static_cast<std::uint16_t>(v.y)}), quad[3] = to_float(T{static_cast<std::uint16_t>(v.y >> 16)});
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++) quad[e] = e < left ? to_float(first[e]) : 0.0f;
  }
}

// Tile (i from first_i on, k from first_k to the run's end) of wide; neighbouring threads read along its rows.
template <class T, bool kAlongRow, int kRow>
__device__ __forceinline__ void stage_wide(const FmaProduct& product, int first_i, int first_k, int end_k, float* tile) {
  const int first_row = kAlongRow ? first_i : first_k, first_column = kAlongRow ? first_k : first_i;
  const int rows = kAlongRow ? product.m : end_k, columns = kAlongRow ? end_k : product.c;
  constexpr int kPerRow = kBlockExtent / 4;
  static_assert(kBlockExtent == kDepth, "a tile is square");
#pragma unroll
  for (int q = 0; q < kQuads / kFmaThreads; q++) {
    const int number = q * kFmaThreads + threadIdx.x, y = number / kPerRow, x = number % kPerRow * 4;
    const int row = first_row + y, column = first_column + x;
    float quad[4];
    load_quad(static_cast<const T*>(product.wide) + row * product.stride + column, row < rows ? columns - column : 0,
              product.quads_vector, quad);
    if (product.dropout.drop_below) {
      const std::uint64_t element = static_cast<std::uint64_t>(row) * product.c + column;
      std::uint32_t keep = kept_by(product.dropout, element / 4);
      if (const unsigned shift = element % 4) keep = (keep | kept_by(product.dropout, element / 4 + 1) << 4) >> shift;
#pragma unroll
      for (int e = 0; e < 4; e++) quad[e] = keep >> e & 1 ? quad[e] : 0.0f;
    }
    if constexpr (kAlongRow) {
#pragma unroll
      for (int e = 0; e < 4; e++) tile[(x + e) * kRow + y] = quad[e];
    } else {
      *reinterpret_cast<float4*>(tile + y * kRow + x) = {quad[0], quad[1], quad[2], quad[3]};
    }
  }
}

// Tile (k, j) of the thin matrix; neighbouring threads read along its contiguous dimension.
template <class T, int kColumns, int kRow>
__device__ __forceinline__ void stage_thin(const FmaProduct& product, int first_k, int end_k, int first_j, float* tile) {
  for (int number = threadIdx.x; number < kDepth * kColumns; number += kFmaThreads) {
    const bool by_row = product.thin_column == 1;
    const int k = by_row ? number / kColumns : number % kDepth, j = by_row ? number % kColumns : number / kDepth;
    const bool there = first_k + k < end_k && first_j + j < product.columns;
    const T* at = static_cast<const T*>(product.thin) + (first_k + k) * product.thin_row + (first_j + j) * product.thin_column;
    tile[k * kRow + j] = there ? to_float(*at) : 0.0f;
  }
}

// A group's share of a tile, added to `sums` as one number each.
template <int kColumns, int kWideRow, int kThinRow>
__device__ __forceinline__ void multiply_tile(const float* wide,  // of the group's first k and the thread's first i
                                              const float* thin,  // of the thread's first j
                                              float (&sums)[FmaTile<kColumns>::kFragments][4]) {
  using Tile = FmaTile<kColumns>;
  float part[Tile::kI][Tile::kJ] = {};
#pragma unroll(kColumns == 16 ? 4 : 2)
  for (int k = 0; k < kGroupDepth; k++) {
    float left[Tile::kI], right[Tile::kJ];
#pragma unroll
    for (int i = 0; i < Tile::kI; i++) left[i] = wide[k * kWideRow + i * Tile::kThreadsI];
#pragma unroll
    for (int j = 0; j < Tile::kJ; j += 4) {
      const float4 v = *reinterpret_cast<const float4*>(thin + k * kThinRow + j);
      right[j] = v.x, right[j + 1] = v.y, right[j + 2] = v.z, right[j + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < Tile::kI; i++)
#pragma unroll
      for (int j = 0; j < Tile::kJ; j++) part[i][j] = __fmaf_rn(left[i], right[j], part[i][j]);
  }
#pragma unroll
  for (int i = 0; i < Tile::kI; i++)
#pragma unroll
    for (int j = 0; j < Tile::kJ; j++) {
      float& sum = sums[(i * Tile::kJ + j) / 4][j % 4];
      sum = __fadd_rn(sum, part[i][j]);
    }
}

// kAlongRow: k along wide's rows, so i numbers them; kColumns: of thin in one pass over wide.
template <class T, bool kAlongRow, int kColumns>
__global__ void __launch_bounds__(kFmaThreads, kColumns == 16 ? 3 : 1)
    thin_fma_kernel(const FmaList list,
                    int passes)  // of all products; blockIdx.x: 64 of i * passes + pass; blockIdx.y: run of k
{
  using Tile = FmaTile<kColumns>;
  using Shared = FmaShared<kAlongRow, kColumns>;
  PEFTK_SHARED(float4, shared, [Shared::kFloats / 4]);
  float* const wide = reinterpret_cast<float*>(shared);
  float* const thin = wide + Shared::kWide;

  int pass = blockIdx.x % passes, number = 0;
  for (; pass >= (list.of[number].columns - 1) / kColumns + 1; number++) pass -= (list.of[number].columns - 1) / kColumns + 1;
  const FmaProduct& product = list.of[number];
  const int first_i = blockIdx.x / passes * kBlockExtent, first_j = pass * kColumns;
  const Run run = run_of<kDepth>(kAlongRow ? product.c : product.m, gridDim.y, blockIdx.y);
  const int count_i = kAlongRow ? product.m : product.c;
  if (first_i >= count_i) return;  // another product has more of them

  const int group = threadIdx.x / kGroup, i = threadIdx.x % Tile::kThreadsI,
            j = threadIdx.x % kGroup / Tile::kThreadsI * Tile::kJ;
  const float* const my_wide = wide + group * kGroupDepth * Shared::kWideRow + i;
  const float* const my_thin = thin + group * kGroupDepth * Shared::kThinRow + j;
  float sums[Tile::kFragments][4] = {};
  for (int k = run.first; k < run.end; k += kDepth) {
    stage_wide<T, kAlongRow, Shared::kWideRow>(product, first_i, k, run.end, wide);
    stage_thin<T, kColumns, Shared::kThinRow>(product, k, run.end, first_j, thin);
    __syncthreads();
    multiply_tile<kColumns, Shared::kWideRow, Shared::kThinRow>(my_wide, my_thin, sums);
    __syncthreads();
  }

  add_over_warps<kFmaWarps, kGroup / kWarp>(sums, shared);
  if (group > 0) return;
#pragma unroll
  for (int f = 0; f < Tile::kFragments; f++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int row = first_i + i + 4 * f / Tile::kJ * Tile::kThreadsI, column = first_j + j + 4 * f % Tile::kJ + e;
      if (row < count_i && column < product.columns)
        store(product.out, blockIdx.y, row, column, __fmul_rn(sums[f][e], product.scale));
    }
}

template <class T, bool kAlongRow>
void launch_thin_fma(FmaList& list, int split, void* stream) {
  int columns = 0, extent = 0, passes = 0;
  for (int i = 0; i < list.count; i++) {
    FmaProduct& p = list.of[i];
    p.quads_vector = p.stride % 4 == 0 && is_aligned(p.wide, 4 * sizeof(T));
    columns = p.columns > columns ? p.columns : columns;
    extent = (kAlongRow ? p.m : p.c) > extent ? (kAlongRow ? p.m : p.c) : extent;
  }
  const int at_once = columns > 16 ? 64 : 16;
  for (int i = 0; i < list.count; i++) passes += ceil_div(list.of[i].columns, at_once);
  const auto kernel = columns > 16 ? thin_fma_kernel<T, kAlongRow, 64> : thin_fma_kernel<T, kAlongRow, 16>;
  const dim3 blocks(static_cast<unsigned>(passes) * ceil_div(extent, kBlockExtent), static_cast<unsigned>(split));
  launch(kernel, blocks, kFmaThreads, 0, stream, list, passes);
}

}  // namespace thin_kernels
}  // namespace peftk::cuda
