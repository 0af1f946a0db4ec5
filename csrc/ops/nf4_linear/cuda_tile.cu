// y = x W^T + bias + scale * s b^T on tensor cores, for any number of rows of x (tokens): a block makes kRows columns of y for
// kTokens tokens, a list of weights in one launch. W (n, k) stays packed up to the registers.
// The trick: the operands are swapped. Rows of W are the MMA's 16, so that a packed byte is a register of its operand, through a
// table of pairs; tokens are its 8 columns. A step is 64 of k, one constant a row, in an order that suits the bytes: lane t of a
// row takes elements 16 t to 16 t + 15, 8 packed bytes of W and two 128-bit loads of x. A step has sums of its own, multiplied by
// the rows' constants when it is done: before the result is, nothing but the 4-bit code is rounded.
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/partial_sums.cuh"
#include "cuda/vector.cuh"
#include "ops/nf4_linear/cuda_tile_input.cuh"
#include "ops/nf4_linear/op.h"

namespace peftk::cuda {
namespace nf4_linear_tile_kernels {

constexpr int kSideBySide = 4;  // MMAs of 8 tokens: with 2 fragments 8 chains of them hide their latency

// Elements at … at + 3 of a row of a (rows, r) matrix as pairs, zeros where there are none.
template <class T>
__device__ __forceinline__ uint2 load_four(const void* matrix, std::int64_t row, std::int64_t rows, std::int64_t r,
                                           std::int64_t at, bool wide) {
  uint2 pairs = {0, 0};
  if (row >= rows || at >= r) return pairs;
  const T* const from = static_cast<const T*>(matrix) + row * r + at;
  if (wide) return *reinterpret_cast<const uint2*>(from);
  pairs.x = from[0].bits;
  if (at + 1 < r) pairs.x |= static_cast<std::uint32_t>(from[1].bits) << 16;
  if (at + 2 < r) pairs.y = from[2].bits;
  if (at + 3 < r) pairs.y |= static_cast<std::uint32_t>(from[3].bits) << 16;
  return pairs;
}

// ---- a warp's tile ----------------------------------------------------------------------------------------------------------

template <int kColumns>
using Sums = float[kFragments][kColumns][4];

struct Lane {
  int g, t;            // as in cuda/mma.cuh
  int row, token;      // of the block's tile, the warp's first
  std::uint32_t lane;  // 4 g + t
};

template <int kTokens>
__device__ __forceinline__ Lane this_lane() {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row_warps = kRows / kWarpRows;
  return {lane / 4, lane % 4, warp % row_warps * kWarpRows, warp / row_warps * Tile<kTokens>::kWarpTokens,
          static_cast<std::uint32_t>(lane)};
}

// sums = factor * s b^T, the order of r like that of k: lane t takes elements 4 t to 4 t + 3 of sixteen.
template <class T, int kColumns>
__device__ __forceinline__ void start(Sums<kColumns>& sums, const Work& work, std::int64_t m, const Lane& lane, float factor) {
  const Output& output = work.output;
  const std::int64_t row = work.row + lane.row + lane.g, token = work.token + lane.token + lane.g;
  for (std::int64_t at = 4 * lane.t; at < output.r + 4 * lane.t; at += 16) {
    std::uint32_t a[kFragments][4];
#pragma unroll
    for (int i = 0; i < 2 * kFragments; i++) {
      const uint2 pairs = load_four<T>(output.b, row + 8 * i, output.weight.n, output.r, at, output.wide_low_rank);
      a[i / 2][i % 2] = pairs.x, a[i / 2][2 + i % 2] = pairs.y;
    }
#pragma unroll
    for (int column = 0; column < kColumns; column++) {
      const uint2 pairs = load_four<T>(output.s, token + 8 * column, m, output.r, at, output.wide_low_rank);
      const std::uint32_t b[2] = {pairs.x, pairs.y};
#pragma unroll
      for (int f = 0; f < kFragments; f++) mma<T>(sums[f][column], a[f], b);
    }
  }
#pragma unroll
  for (int f = 0; f < kFragments; f++)
#pragma unroll
    for (int column = 0; column < kColumns; column++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[f][column][i] = __fmul_rn(sums[f][column][i], factor);
}

// A step of the warp's rows as operands of its four MMAs, without their constants.
using Operand = std::uint32_t[kDepth / 16][kFragments][4];

__device__ __forceinline__ void decode(Operand& a, SharedAddress packed, SharedAddress pairs) {
#pragma unroll
  for (int i = 0; i < 2 * kFragments; i++) {  // rows g + 8 i
    const uint2 words = *shared_pointer<const uint2>(packed + i * 8 * kPackedRow);
#pragma unroll
    for (int byte = 0; byte < 8; byte++)
      a[byte / 2][i / 2][byte % 2 * 2 + i % 2] = pair_of(pairs, byte < 4 ? words.x : words.y, byte % 4);
  }
}

// Constants of rows g + 8 i, out of each lane's own row's.
__device__ __forceinline__ void share(float (&constants)[2 * kFragments], float own, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 2 * kFragments; i++) constants[i] = __shfl_sync(kWholeWarp, own, lane.g + 8 * i);
}

// sums += constants * (a x^T) from column `first` on; x_first and x_second are the halves of a lane's 16 elements of the warp's
// first token.
template <class T, int kColumns>
__device__ __forceinline__ void multiply(Sums<kColumns>& sums, int first, const Operand& a, SharedAddress x_first,
                                         SharedAddress x_second, const float (&constants)[2 * kFragments]) {
  constexpr int kSide = kColumns < kSideBySide ? kColumns : kSideBySide;
  float of_step[kFragments][kSide][4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    std::uint32_t b[kSide][2][2];
#pragma unroll
    for (int i = 0; i < kSide; i++) {
      const uint4 v = load_in_order((half ? x_second : x_first) + (first + i) * 8 * kXRow);
      b[i][0][0] = v.x, b[i][0][1] = v.y, b[i][1][0] = v.z, b[i][1][1] = v.w;
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < kSide; i++)
#pragma unroll
        for (int f = 0; f < kFragments; f++) mma<T>(of_step[f][i], a[2 * half + j][f], b[i][j]);
  }
#pragma unroll
  for (int f = 0; f < kFragments; f++)
#pragma unroll
    for (int i = 0; i < kSide; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float& sum = sums[f][first + i][j];
        sum = __fmaf_rn(of_step[f][i][j], constants[2 * f + j / 2], sum);
      }
}

// ---- results ----------------------------------------------------------------------------------------------------------------

// Of a run of the split inner dimension, as they lie in registers: eight lanes fill a sector.
template <int kColumns>
__device__ __forceinline__ void store_partial(const Sums<kColumns>& sums, const Work& work, std::int64_t m, const Lane& lane,
                                              float unit) {
  const std::int64_t n = work.output.weight.n;
  float* const partial = work.output.partial + work.run * m * n;
#pragma unroll
  for (int f = 0; f < kFragments; f++)
#pragma unroll
    for (int column = 0; column < kColumns; column++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const std::int64_t row = work.row + lane.row + 16 * f + lane.g + i / 2 * 8;
        const std::int64_t token = work.token + lane.token + 8 * column + 2 * lane.t + i % 2;
        if (row < n && token < m) partial[token * n + row] = __fmul_rn(sums[f][column][i], unit);
      }
}

// A token's row of results in shared memory; 16 bytes apart, so that four tokens' eight rows of W meet 16 banks.
constexpr int kPitch = kRows + 8;

template <class T, int kColumns>
__device__ __forceinline__ void round_to_shared(T* results, const Sums<kColumns>& sums, const Work& work, const Lane& lane,
                                                float unit) {
  const T* const bias = static_cast<const T*>(work.output.bias);
#pragma unroll
  for (int i = 0; i < 2 * kFragments; i++) {
    const int row = lane.row + lane.g + 8 * i;
    const float plus = bias && work.row + row < work.output.weight.n ? to_float(bias[work.row + row]) : 0.0f;
#pragma unroll
    for (int column = 0; column < kColumns; column++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int token = lane.token + 8 * column + 2 * lane.t + j;
        results[token * kPitch + row] = round_to<T>(__fmaf_rn(sums[i / 2][column][i % 2 * 2 + j], unit, plus));
      }
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void store_results(const T* results, const Work& work, std::int64_t m) {
  constexpr int kThreads = Tile<kTokens>::kThreads, kParts = kRows / kPerVector<T>;
  const std::int64_t n = work.output.weight.n;
  T* const y = static_cast<T*>(work.output.y) + work.token * n + work.row;
  const int tokens = static_cast<int>(min(m - work.token, std::int64_t{kTokens}));
  const int rows = static_cast<int>(min(n - work.row, std::int64_t{kRows}));
  if (work.output.wide_y) {
    for (int i = threadIdx.x; i < tokens * kParts; i += kThreads) {
      const int token = i / kParts, row = i % kParts * kPerVector<T>;
      if (row < rows)
        *reinterpret_cast<uint4*>(y + token * n + row) = *reinterpret_cast<const uint4*>(results + token * kPitch + row);
    }
  } else {
    for (int i = threadIdx.x; i < tokens * kRows; i += kThreads) {
      const int token = i / kRows, row = i % kRows;
      if (row < rows) y[token * n + row] = results[token * kPitch + row];
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------------------------

template <class T, int kTokens>
__device__ __forceinline__ void make_tile(const Outputs& outputs, const Inputs& inputs, const Tables& tables) {
  using Shape = Tile<kTokens>;
  PEFTK_DYNAMIC_SHARED(unsigned char, shared);
  auto* const pairs = reinterpret_cast<std::uint32_t*>(shared);
  auto* const value8 = reinterpret_cast<float*>(shared + kPairBytes);
  unsigned char* const stages = shared + kPairBytes + Shape::kValue8Bytes;

  const Work work = find_work<kTokens>(outputs, inputs);
  const Lane lane = this_lane<kTokens>();
  const int quant_type = work.output.weight.quant_type;
  const float factor = pair_factor<T>(quant_type), unit = __frcp_rn(factor);

  Source<T, kTokens> source(work, inputs, stages);
#pragma unroll
  for (int i = 0; i < Shape::kStages - 1; i++) {
    if (work.begin + i < work.end) source.fetch(i);
    commit_copies();
  }
  RowScale scale = row_scale(work, inputs, lane.row + lane.lane);
  if (work.begin < work.end) scale.load();
  fill_pairs<T>(pairs, tables.value4[quant_type], factor, Shape::kThreads);
  for (int i = threadIdx.x; i < 256; i += Shape::kThreads) value8[i] = tables.value8[i];

  Sums<Shape::kColumns> sums = {};
  if (work.output.s && work.run == 0) start<T, Shape::kColumns>(sums, work, inputs.m, lane, work.output.scale * factor);

  const SharedAddress own_pairs = held(lane_pairs(pairs, lane.lane));
  unsigned char* const x = stages + (lane.token + lane.g) * kXRow;
  const int part = 2 * lane.t ^ (lane.g & 1);
  const SharedAddress x_first = held(shared_address(x + part * 16)), x_second = held(shared_address(x + (part ^ 1) * 16));
  const SharedAddress packed = held(shared_address(stages + Shape::kXBytes + (lane.row + lane.g) * kPackedRow + lane.t * 8));
  for (int left = work.end - work.begin; left > 0; left -= Shape::kStages) {
#pragma unroll
    for (int i = 0; i < Shape::kStages; i++) {
      if (i >= left) break;
      wait_copies<Shape::kStages - 2>();
      __syncthreads();  // all have the step's tiles, and are done with those of the step before
      if (i + Shape::kStages - 1 < left) source.fetch(i + Shape::kStages - 1);
      commit_copies();
      const int stage = i * Shape::kStageBytes;
      float constants[2 * kFragments];
      share(constants, scale.decode(value8), lane);
      scale.load();
      Operand a;
      decode(a, packed + stage, own_pairs);
#pragma unroll
      for (int column = 0; column < Shape::kColumns; column += kSideBySide)
        multiply<T, Shape::kColumns>(sums, column, a, x_first + stage, x_second + stage, constants);
    }
    source.next_round();
  }

  if (work.output.partial) return store_partial<Shape::kColumns>(sums, work, inputs.m, lane, unit);
  T* const results = reinterpret_cast<T*>(stages);
  static_assert(kTokens * kPitch * sizeof(T) <= Shape::kStages * Shape::kStageBytes);
  __syncthreads();  // all are done with the stages
  round_to_shared<T, Shape::kColumns>(results, sums, work, lane, unit);
  __syncthreads();
  store_results<T, kTokens>(results, work, inputs.m);
}

// The 1: without it ptxas takes 184 registers for 128 tokens, has two chains of MMAs at a time and a bubble behind each pair.
template <class T, int kTokens>
__global__ void __launch_bounds__(Tile<kTokens>::kThreads, 1)
    nf4_linear_tile_kernel(const Outputs outputs, const Inputs inputs, const Tables tables) {
  if constexpr (kHasSm80) make_tile<T, kTokens>(outputs, inputs, tables);
}

template <class T>
Outputs make_outputs(const std::vector<LinearOutput>& list, std::int64_t m, float* partial) {
  Outputs outputs{};
  for (const auto& [weight, bias, y, s, b, r, scale, split] : list) {
    Output& output = outputs.of[outputs.count++];
    output = {device_weight(weight), bias, y, s, b, r, split > 1 ? partial : nullptr, scale, split};
    const std::int64_t n = output.weight.n;
    if (split < 1) refuse("split: expected 1 or more", split);
    if (split > 1 && !partial && m * n > 0) refuse("split: expected 1 where there is no room for partial sums", split);
    if (output.weight.log_block < 6) refuse("block_size: expected 64 or more", 1L << output.weight.log_block);
    output.row_tiles = static_cast<int>((n + kRows - 1) / kRows);
    output.wide_y = n % kPerVector<T> == 0 && is_aligned(y, kVectorBytes);
    output.wide_low_rank = r % 4 == 0 && is_aligned(s, 8) && is_aligned(b, 8);
    if (split > 1) partial += split * m * n;
    outputs.columns += output.row_tiles * split;
  }
  return outputs;
}

template <class T, int kTokens>
void launch_tiles(const Outputs& outputs, const Inputs& inputs, void* stream) {
  const std::int64_t blocks = (inputs.m + kTokens - 1) / kTokens * outputs.columns;
  if (blocks)
    launch(nf4_linear_tile_kernel<T, kTokens>, static_cast<unsigned>(blocks), Tile<kTokens>::kThreads,
           Tile<kTokens>::kSharedBytes, stream, outputs, inputs, make_tables());
}

template <class T>
void launch_all(const std::vector<LinearOutput>& list, const Inputs& inputs, int tokens, float* partial, void* stream) {
  const Outputs outputs = make_outputs<T>(list, inputs.m, partial);
  switch (tokens) {
    case 16: launch_tiles<T, 16>(outputs, inputs, stream); break;
    case 32: launch_tiles<T, 32>(outputs, inputs, stream); break;
    case 64: launch_tiles<T, 64>(outputs, inputs, stream); break;
    case 128: launch_tiles<T, 128>(outputs, inputs, stream); break;
    default: refuse("tokens: expected 16, 32, 64 or 128", tokens);
  }
  PartialSumsList sums{};
  for (int i = 0; i < outputs.count; i++) {
    const Output& output = outputs.of[i];
    if (output.partial) sums.of[sums.count++] = {output.partial, output.bias, output.y, output.weight.n, output.split};
  }
  sum_partials<T>(sums, inputs.m, stream);
}

}  // namespace nf4_linear_tile_kernels

void nf4_linear_tile(const std::vector<LinearOutput>& outputs, std::int64_t k, const void* x, std::int64_t x_stride,
                     std::int64_t m, int dtype, int tokens, float* partial, void* stream) {
  using namespace nf4_linear_tile_kernels;
  check_count(outputs.size());
  if (k % kDepth || k >= kMostDepth) refuse("k: expected a multiple of 64 below 2^29", k);
  const Inputs inputs{x, x_stride, m, static_cast<int>(k / kDepth)};
  with_type(x, dtype, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (sizeof(T) == 2)
      launch_all<T>(outputs, inputs, tokens, partial, stream);
    else
      refuse("dtype: expected 1 (bf16) or 2 (fp16)", dtype);
  });
}

}  // namespace peftk::cuda
