// One step of nf4_linear_simple: kDepth of the inner dimension in shared memory as fp32, W decoded, and its product in registers.
#pragma once
#include "cuda/convert.cuh"
#include "cuda/weight4.cuh"

namespace peftk::cuda::nf4_linear_simple_kernels {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;                    // that must fit a multiprocessor: for three, ptxas spills; left alone, too
constexpr int kColumns = 64;                  // of a result tile
constexpr int kOwnRows = 4, kOwnColumns = 4;  // of a thread: 8 128-bit reads of shared memory for 64 FMAs; 8 x 4 spills
constexpr int kRunDepth = 64;                 // k = 4096: error 0.21e-6, of 256 0.29e-6, a plain product 0.28e-6, one sum 1.4e-6
constexpr int kFew = 8, kMany = 64;           // rows of a result tile
constexpr int kFewUpTo = 32;                  // rows of x: a weight takes 22 instructions for 8 of them, 92 for 64
constexpr int kWord = 8;                      // neighbouring weights of a row of W that a thread decodes at once
constexpr int kLanes = kColumns / kOwnColumns;  // threads side by side

enum class Over { kColumns, kRows };  // of W: what the depth is

template <int kRows>
struct Shape {
  static constexpr int kRowGroups = kRows / kOwnRows;               // thread g owns rows g, g + kRowGroups, …
  static constexpr int kSlices = kThreads / (kRowGroups * kLanes);  // of a step's depth
  static constexpr int kDepth = kSlices == 1 ? 32 : 64;             // of a step: 16 or 32 packed bytes of a row of W
  static constexpr int kSliceDepth = kDepth / kSlices;
  static constexpr int kRunSteps = kRunDepth / kSliceDepth;
  static constexpr int kPitch = kDepth + 4;  // floats from row to row of x: two rows, read at once, are in other banks
};

struct SharedTables {
  float value4[2 * 16];  // 32 banks: whatever the codes, no two lanes meet in one
  float value8[256];
  float offset[kMostWeights];  // of the terms' double quantisation
};

template <int kRows>
struct Step {  // what a step multiplies
  alignas(16) float x[kRows][Shape<kRows>::kPitch];
  alignas(16) float w[Shape<kRows>::kDepth][kColumns];  // by place_of
};

// Where a column of the tile lies in its row of Step::w, so that neither the stores of decoded words nor the reads of four
// neighbours conflict: a warp stores words along the depth of some columns, or 4 rows x 8 words along the columns.
template <Over over, int kRows>
__device__ __forceinline__ int place_of(int depth, int column) {
  constexpr int kColumnsAWarp = kWarp / (Shape<kRows>::kDepth / kWord);
  return over == Over::kColumns ? column ^ depth / kWord * kColumnsAWarp : column ^ (column >> 3 & 4);
}

struct Tile {  // of the result, and what of it a thread owns
  std::int64_t row, column;
  int lane, group, slice;
};

using Sums = float[kOwnRows][kOwnColumns];

// ---- into shared memory -----------------------------------------------------------------------------------------------------

// The tile's rows and columns [first, first + kDepth) of a matrix (m, depth); zeros outside.
template <class T, int kRows>
__device__ __forceinline__ void stage_input(Step<kRows>& step, const T* input, std::int64_t stride, const Tile& tile,
                                            std::int64_t m, std::int64_t first, std::int64_t depth) {
  constexpr int kDepth = Shape<kRows>::kDepth, kTogether = kThreads / kDepth;  // rows
  const int d = threadIdx.x % kDepth, line = threadIdx.x / kDepth;
  const int rows = first + d < depth ? static_cast<int>(min(m - tile.row, std::int64_t{kRows})) : 0;
  const T* from = input + (tile.row + line) * stride + first + d;
#pragma unroll
  for (int i = 0; i < kRows; i += kTogether, from += kTogether * stride)
    step.x[line + i][d] = line + i < rows ? to_float(*from) : 0.0f;
}

// The codes of elements [first, first + count) of W, count ≤ 8, the first in the highest nibble.
template <bool kAligned>
__device__ __forceinline__ std::uint32_t codes_at(const std::uint8_t* packed, std::uint64_t first, int count) {
  if constexpr (kAligned) return __byte_perm(__ldg(reinterpret_cast<const std::uint32_t*>(packed + first / 2)), 0, 0x0123);
  const int odd = static_cast<int>(first & 1), bytes = (count + odd + 1) / 2;
  std::uint64_t codes = 0;
#pragma unroll
  for (int i = 0; i < kWord / 2 + 1; i++) codes = codes << 8 | (i < bytes ? __ldg(packed + first / 2 + i) : 0);
  return static_cast<std::uint32_t>(codes >> (odd ? 4 : 8));
}

// kAligned: every word is an aligned one, of one block; else one more block may begin inside.
template <bool kAligned>
struct Weights {
  const DeviceWeight4& weight;
  const SharedTables& tables;
  std::int64_t k;
  float offset;

  __device__ __forceinline__ float scale(std::uint64_t block) const {
    const auto value8 = [&](std::uint8_t code) { return tables.value8[code]; };
    return weight.scales.scales ? scale_of<true>(weight.scales, block, offset, value8)
                                : scale_of<false>(weight.scales, block, offset, value8);
  }

  // Elements [first, first + kWord) of W; behind the first `count` of them, numbers made of the same scales.
  __device__ __forceinline__ void load(std::uint64_t first, int count, float (&values)[kWord]) const {
    const std::uint32_t codes = codes_at<kAligned>(weight.packed, first, count);
    const float here = scale(first >> weight.log_block);
    float next = here;
    int until = kWord;  // elements of the first block
    if constexpr (!kAligned) {
      const std::uint64_t last = first + count - 1;
      if ((first ^ last) >> weight.log_block) {
        next = scale(last >> weight.log_block);
        until = static_cast<int>((last >> weight.log_block << weight.log_block) - first);
      }
    }
#pragma unroll
    for (int i = 0; i < kWord; i++) {
      const float value = tables.value4[(codes >> (28 - 4 * i) & 15) | weight.quant_type << 4];
      values[i] = __fmul_rn(value, i < until ? here : next);
    }
  }
};

__device__ __forceinline__ void load_four(const float* from, float (&values)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}

__device__ __forceinline__ void store_four(float* to, const float* values) {
  *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
}

// The tile's columns by depth [first, first + kDepth) of W; zeros where W has no such row. Behind a row's end lies something
// finite unless the row is spoiled itself: zeros of x meet it (Over::kColumns), or nobody stores it.
template <Over over, int kRows, bool kAligned>
__device__ __forceinline__ void stage_weights(Step<kRows>& step, const Weights<kAligned>& w, const Tile& tile,
                                              std::int64_t first) {
  constexpr bool kByColumn = over == Over::kColumns;
  constexpr int kDepth = Shape<kRows>::kDepth, kWords = (kByColumn ? kDepth : kColumns) / kWord;  // of a row of W
#pragma unroll
  for (int i = 0; i < kDepth * kColumns / (kThreads * kWord); i++) {
    const int line = threadIdx.x / kWords + i * (kThreads / kWords), at = threadIdx.x % kWords * kWord;
    const std::int64_t row = (kByColumn ? tile.column : first) + line, along = (kByColumn ? first : tile.column) + at;
    const int count = row < w.weight.n ? static_cast<int>(min(w.k - along, std::int64_t{kWord})) : 0;
    float values[kWord] = {};
    if (count > 0) w.load(row * w.k + along, count, values);
    if constexpr (kByColumn) {
#pragma unroll
      for (int j = 0; j < kWord; j++) step.w[at + j][place_of<over, kRows>(at, line)] = values[j];
    } else {
#pragma unroll
      for (int j = 0; j < kWord; j += 4) store_four(&step.w[line][place_of<over, kRows>(line, at + j)], values + j);
    }
  }
}

// ---- out of it, into sums
// -------------------------------------------------------------------------------------------------------------------

template <Over over, int kRows>
__device__ __forceinline__ void multiply(const Step<kRows>& step, const Tile& tile, Sums& run) {
  using S = Shape<kRows>;
#pragma unroll
  for (int i = 0; i < S::kSliceDepth; i += 4) {
    const int depth = tile.slice * S::kSliceDepth + i;
    float w[4][kOwnColumns];
#pragma unroll
    for (int d = 0; d < 4; d++) load_four(&step.w[depth + d][place_of<over, kRows>(depth, tile.lane * kOwnColumns)], w[d]);
#pragma unroll
    for (int row = 0; row < kOwnRows; row++) {
      float x[4];
      load_four(&step.x[tile.group + row * S::kRowGroups][depth], x);
#pragma unroll
      for (int d = 0; d < 4; d++)
#pragma unroll
        for (int column = 0; column < kOwnColumns; column++) run[row][column] = __fmaf_rn(x[d], w[d][column], run[row][column]);
    }
  }
}

__device__ __forceinline__ void close_run(Sums& run, Sums& sum) {
#pragma unroll
  for (int row = 0; row < kOwnRows; row++)
#pragma unroll
    for (int column = 0; column < kOwnColumns; column++) {
      sum[row][column] = __fadd_rn(sum[row][column], run[row][column]);
      run[row][column] = 0.0f;
    }
}

}  // namespace peftk::cuda::nf4_linear_simple_kernels
