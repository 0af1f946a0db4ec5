// What a block of cuda_tile.cu works on, and how it comes from global memory: packed bytes and x by copies past the registers,
// constants a step ahead.
#pragma once
#include "cuda/async_copy.cuh"
#include "cuda/pairs.cuh"
#include "cuda/shared.cuh"
#include "cuda/weight4.cuh"

namespace peftk::cuda::nf4_linear_tile_kernels {

constexpr int kRows = 128;                                  // of W, a tile
constexpr int kDepth = 64;                                  // of k, a step
constexpr int kPackedRow = kDepth / 2;                      // bytes of W's row in a step
constexpr std::int64_t kMostDepth = std::int64_t{1} << 29;  // a tile's constants count by 32 bits
constexpr int kXRow = 2 * kDepth;                           // bytes of a token in a step
constexpr int kFragments = 2;  // of 16 rows, a warp: a byte is decoded by as many warps as share its row
constexpr int kWarpRows = 16 * kFragments;
constexpr int kTogether = 8;  // tiles of tokens that go through all of W together: what L2 holds of x

// At 128 tokens a thread holds 64 sums of the result, 32 of a step, 32 registers of W and 32 of x. Shared memory then works 1009
// passes a step (counted in the emulator: 512 to read x, 256 of look-ups, 160 of copies), tensor cores of sm_80 1024 clocks;
// warps of 16 rows read x twice as often, and of 64 rows do not fit the registers. Stages: what 99 KB hold; two or three are
// under way.
template <int kTokens>
struct Tile {
  static constexpr int kTokenWarps = kTokens > 64 ? 2 : 1;
  static constexpr int kThreads = kRows / kWarpRows * kTokenWarps * kWarp;
  static constexpr int kWarpTokens = kTokens / kTokenWarps;
  static constexpr int kColumns = kWarpTokens / 8;  // MMAs side by side
  static constexpr int kStages = kTokens == 128 ? 3 : 4;
  static constexpr int kXBytes = kTokens * kXRow;
  static constexpr int kStageBytes = kXBytes + kRows * kPackedRow;
  static constexpr int kValue8Bytes = 256 * sizeof(float);
  static constexpr int kSharedBytes = kPairBytes + kValue8Bytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 << 10, "what every GPU since sm_80 gives a block");
};

struct Output {
  DeviceWeight4 weight;
  const void* bias;  // (n,) or nullptr
  void* y;           // (m, n)
  const void* s;     // (m, r) or nullptr
  const void* b;     // (n, r)
  std::int64_t r;
  float* partial;  // (split, m, n), or nullptr where split is 1
  float scale;
  int split;
  int row_tiles;
  bool wide_y;         // 128-bit stores fit its rows
  bool wide_low_rank;  // 64-bit loads fit those of s and b
};

struct Outputs {
  int count;
  int columns;  // of tiles: sum of row_tiles * split
  Output of[kMostWeights];
};

struct Inputs {
  const void* x;          // (m, k)
  std::int64_t x_stride;  // elements from row to row
  std::int64_t m;
  int steps;  // of k
};

// What a block does: steps [begin, end) of a tile of an output.
struct Work {
  const Output& output;
  std::int64_t row;    // of W, the tile's first
  std::int64_t token;  // the tile's first
  int run;             // of the output's split
  int begin, end;
};

template <int kTokens>
__device__ __forceinline__ Work find_work(const Outputs& outputs, const Inputs& inputs) {
  const std::uint32_t tiles = static_cast<std::uint32_t>((inputs.m + kTokens - 1) / kTokens), columns = outputs.columns;
  const std::uint32_t first = blockIdx.x / (kTogether * columns) * kTogether, at = blockIdx.x - first * columns;
  const std::uint32_t together = min(tiles - first, static_cast<std::uint32_t>(kTogether));
  int column = at / together, i = 0;
  while (column >= outputs.of[i].row_tiles * outputs.of[i].split) column -= outputs.of[i].row_tiles * outputs.of[i].split, i++;
  const Output& output = outputs.of[i];
  const int run = column / output.row_tiles;
  const auto edge = [&](std::int64_t r) { return static_cast<int>(inputs.steps * r / output.split); };
  return {output,
          static_cast<std::int64_t>(column % output.row_tiles) * kRows,
          static_cast<std::int64_t>(first + at % together) * kTokens,
          run,
          edge(run),
          edge(run + 1)};
}

// A thread's part of the copies: 16 bytes of every kXApart-th token and of every kPackedApart-th row, beyond the last one that
// one again: what comes of it is not stored. In a stage, tokens come first, neighbouring 16 bytes of odd ones changed with each
// other, so that the eight lanes of a pass read from eight places (see multiply).
template <class T, int kTokens>
struct Source {
  using Shape = Tile<kTokens>;
  static constexpr int kXApart = Shape::kThreads / (kXRow / 16), kXParts = kTokens / kXApart;
  static constexpr int kPackedApart = Shape::kThreads / (kPackedRow / 16), kPackedParts = kRows / kPackedApart;

  const T* x[kXParts];  // of a round's first step
  const std::uint8_t* packed[kPackedParts];
  SharedAddress x_to, packed_to;  // in stage 0

  __device__ __forceinline__ Source(const Work& work, const Inputs& inputs, unsigned char* stages) {
    const int token = threadIdx.x / (kXRow / 16), x_part = threadIdx.x % (kXRow / 16);
    const int row = threadIdx.x / (kPackedRow / 16), packed_part = threadIdx.x % (kPackedRow / 16);
    const std::int64_t row_bytes = static_cast<std::int64_t>(inputs.steps) * kPackedRow;
#pragma unroll
    for (int i = 0; i < kXParts; i++)
      x[i] = static_cast<const T*>(inputs.x) + min(work.token + token + i * kXApart, inputs.m - 1) * inputs.x_stride +
             work.begin * kDepth + x_part * 8;
#pragma unroll
    for (int i = 0; i < kPackedParts; i++)
      packed[i] = work.output.weight.packed + min(work.row + row + i * kPackedApart, work.output.weight.n - 1) * row_bytes +
                  work.begin * kPackedRow + packed_part * 16;
    x_to = held(shared_address(stages + token * kXRow + (x_part ^ (token & 1)) * 16));
    packed_to = held(shared_address(stages + Shape::kXBytes + row * kPackedRow + packed_part * 16));
  }

  // Of the step so many behind the round's first.
  __device__ __forceinline__ void fetch(int behind) const {
    const int stage = behind % Shape::kStages * Shape::kStageBytes;
#pragma unroll
    for (int i = 0; i < kXParts; i++)
      copy_async(shared_pointer<void>(x_to + stage + i * kXApart * kXRow), x[i] + behind * kDepth);
#pragma unroll
    for (int i = 0; i < kPackedParts; i++)
      copy_async_of_line(shared_pointer<void>(packed_to + stage + i * kPackedApart * kPackedRow),
                         packed[i] + behind * kPackedRow);
  }
  __device__ __forceinline__ void next_round() {
#pragma unroll
    for (int i = 0; i < kXParts; i++) x[i] += Shape::kStages * kDepth;
#pragma unroll
    for (int i = 0; i < kPackedParts; i++) packed[i] += Shape::kStages * kPackedRow;
  }
};

// The constant of a lane's own row, loaded a step before it is decoded. Blocks are counted from one that is first of its 256.
struct RowScale {
  const unsigned char* values;  // 8-bit codes where there are scales, else fp32
  const float* scales;          // of 256 blocks each, or nullptr
  float offset;
  bool nested;
  std::uint32_t value_bytes;
  std::uint32_t ahead;      // bytes of values before those of step 0
  int log_steps;            // of a block
  std::uint32_t step;       // from the start of the tile's first block on
  std::uint32_t last_step;  // of the work
  std::uint32_t bits;       // as loaded
  float scale;

  // The next step's; after the last one that again.
  __device__ __forceinline__ void load() {
    const std::uint32_t at = (step >> log_steps) * value_bytes + ahead;
    if (nested) {
      bits = values[at];
      scale = scales[at / kNestedBlock];
    } else {
      bits = *reinterpret_cast<const std::uint32_t*>(values + at);
    }
    step = min(step + 1, last_step);
  }
  __device__ __forceinline__ float decode(const float* value8) const {
    return nested ? nested_scale(value8[bits], scale, offset) : __uint_as_float(bits);
  }
};

__device__ __forceinline__ RowScale row_scale(const Work& work, const Inputs& inputs, int row) {
  const DeviceWeight4& weight = work.output.weight;
  const auto& [values, scales, offset] = weight.scales;
  const bool nested = scales != nullptr;
  const int log_steps = weight.log_block - 6, value_bytes = nested ? 1 : 4;
  const std::int64_t first = work.row * inputs.steps, block = first >> log_steps, origin = block & -kNestedBlock;
  const std::uint32_t existing = static_cast<std::uint32_t>(min(weight.n - work.row - 1, static_cast<std::int64_t>(row)));
  const std::uint32_t of_row = static_cast<std::uint32_t>(first - (block << log_steps)) + existing * inputs.steps;
  return {static_cast<const unsigned char*>(values) + origin * value_bytes,
          nested ? scales + origin / kNestedBlock : nullptr,
          nested ? *offset : 0.0f,
          nested,
          static_cast<std::uint32_t>(value_bytes),
          static_cast<std::uint32_t>(block - origin) * value_bytes,
          log_steps,
          of_row + work.begin,
          of_row + work.end - 1,
          0,
          0.0f};
}

}  // namespace peftk::cuda::nf4_linear_tile_kernels
