// What nf4_linear_dx_tile reads of a list of weights: packed bytes and dy by asynchronous copies, constants through registers,
// kAhead steps before they are used.
#pragma once
#include "cuda/async_copy.cuh"
#include "cuda/mma.cuh"
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"
#include "cuda/weight4.cuh"

namespace peftk::cuda::nf4_linear_dx_tile_kernels {

constexpr int kThreads = 256;
constexpr int kWarpColumns = 32;  // 16 bytes of a packed row: one ldmatrix takes all rows of a step
constexpr int kColumns = kThreads / kWarp * kWarpColumns;
constexpr int kStep = 32;           // rows of W
constexpr int kMostRows = 1 << 30;  // of a W
constexpr int kLogScaleColumns = 6;
constexpr int kScaleColumns = 1 << kLogScaleColumns;        // that share a constant: blocks are multiples of it
constexpr int kScaleBlocks = kColumns / kScaleColumns;      // of a row of the tile
constexpr int kPackedChunks = kColumns / 2 / kVectorBytes;  // of a row and step
constexpr int kDyChunks = kStep * 2 / kVectorBytes;         // of a token and step
constexpr int kCopies = 16;   // of the table of pairs: a 64-bit access is served half a warp at a time
constexpr int kNoCode = 256;  // of constants that are not double quantised; its value is 1
static_assert(kStep * kPackedChunks == kThreads, "each thread copies one packed chunk a step");

// With 128 tokens a thread has 128 sums, and a block a multiprocessor to itself. Shared memory: 54, 58, 58 and 70 KB.
template <int kTokens>
inline constexpr int kResidentBlocks = kTokens == 128 ? 1 : 2;

// Steps from a fetch to its use. Constants on their way take registers, of which many tokens leave none; but then steps are long.
template <int kTokens>
inline constexpr int kAhead = kTokens >= 64 ? 2 : 3;

// A block's constant is value8[code] * factor + offset; the constant itself is the factor where there are no codes.
struct Constants {
  const std::uint8_t* codes;  // (blocks,) or nullptr
  const float* factors;       // (blocks >> log_factor,)
  const float* offset;        // (1,)
  int log_block;              // of kScaleColumns columns
  int log_factor;
};

struct Gradient {
  const std::uint8_t* packed;
  Constants constants;
  int n;
  const void* dy;
  std::int64_t dy_stride;  // elements
  const void* t;           // (m, r) or nullptr
  const void* a;           // (r, k)
  std::int64_t r;
  Dropout dropout;
  int begin, end;  // steps of this weight among those of the list
};

struct GradientList {  // nf4 before fp4
  int count;
  int steps;
  int fp4_from;  // the first step of an fp4 weight
  Gradient of[kMostWeights];
};

// Chunks of a stage are swizzled: eight rows of an ldmatrix must lie in eight different groups of four banks.
template <int kTokens>
struct Stage {
  uint4 packed[kStep * kPackedChunks];
  uint4 dy[kTokens * kDyChunks];

  static __device__ __forceinline__ int packed_at(int row, int chunk) { return row * kPackedChunks + (chunk ^ row % 8); }
  static __device__ __forceinline__ int dy_at(int token, int chunk) { return token * kDyChunks + (chunk ^ token / 2 % 4); }
};

struct Tile {
  std::int64_t token, column;  // the first ones
  int tokens, columns;         // that dx has of them
};

template <int kTokens>
struct Shared {
  float2 pair[256][kCopies];             // of a packed byte: high nibble, low nibble
  float value8[kNoCode + 4];             // the dynamic 8-bit code, and 1
  float scales[2][kScaleBlocks][kStep];  // of this step and the next; a block's in the order of scale_at
  Stage<kTokens> stages[kAhead<kTokens> + 1];
};

// Where a row's constant lies: lane 4 g + t reads those of its rows 8 q + 2 t and 8 q + 2 t + 1 as eight neighbours.
__device__ __forceinline__ int scale_at(int row) { return row % 8 / 2 * 8 + row / 8 * 2 + row % 2; }

// `value` in a register: what comes out of a shuffle ptxas can't compute again from threadIdx each step, as it likes to.
__device__ __forceinline__ int held(int value) { return __shfl_sync(kWholeWarp, value, threadIdx.x % kWarp); }

// A constant as it comes from memory; it is decoded a step before it is used.
struct RawScale {
  int code;
  float factor, offset;
};

__device__ __forceinline__ float decoded(const RawScale& raw, const float* value8) {
  return nested_scale(value8[raw.code], raw.factor, raw.offset);
}

// A thread's share of the copies of a step: a chunk of packed bytes, chunks of dy, and of half the threads a constant. Its rows
// are kOutside where its columns are.
template <class T, int kTokens>
struct Feed {
  static constexpr int kDyThreads = kTokens * kDyChunks < kThreads ? kTokens * kDyChunks : kThreads;
  static constexpr int kDyRows = kDyThreads / kDyChunks;  // tokens that the threads copy at once
  static constexpr int kDyCopies = kTokens / kDyRows;
  static constexpr int kOutside = kMostRows;

  int weight;                  // of the list
  int row, rows;               // of it: the next step's first, and all
  int tokens;                  // that dx has from the thread's first on
  int packed_row, scale_row;   // of a step
  int packed_place, dy_place;  // in a stage
  int scale_place;             // among a step's
  const std::uint8_t* packed;  // row 0
  const T* dy[kDyCopies];      // of tokens that m has not: any
  std::uint32_t unit;          // scale_row's kScaleColumns are its so many-th of the row

  static __device__ __forceinline__ int packed_chunk() { return threadIdx.x % kPackedChunks; }
  static __device__ __forceinline__ int dy_token() { return threadIdx.x / kDyChunks; }
  static __device__ __forceinline__ int dy_chunk() { return threadIdx.x % kDyChunks; }

  __device__ __forceinline__ Feed(const Tile& tile) : weight(0), row(0), rows(0) {
    const int scale_block = threadIdx.x / kStep;
    tokens = held(tile.tokens - dy_token());
    packed_row = held(packed_chunk() * kWarpColumns < tile.columns ? threadIdx.x / kPackedChunks : kOutside);
    scale_row = held(scale_block * kScaleColumns < tile.columns ? threadIdx.x % kStep : kOutside);
    packed_place = held(Stage<kTokens>::packed_at(threadIdx.x / kPackedChunks, packed_chunk()));
    dy_place = held(Stage<kTokens>::dy_at(dy_token(), dy_chunk()));
    scale_place = held(scale_block * kStep + scale_at(threadIdx.x % kStep));
    unit = held(static_cast<int>(tile.column / kScaleColumns) + scale_block);
  }

  // Finds the weight of a step.
  __device__ __forceinline__ void enter(const GradientList& list, const Tile& tile, int step) {
    while (step >= list.of[weight].end) weight++;
    const Gradient& gradient = list.of[weight];
    rows = gradient.n;
    row = (step - gradient.begin) * kStep;
    packed = gradient.packed + tile.column / 2 + packed_chunk() * kVectorBytes;
#pragma unroll
    for (int i = 0; i < kDyCopies; i++)
      dy[i] = static_cast<const T*>(gradient.dy) + dy_chunk() * kPerVector<T> +
              (i * kDyRows < tokens ? (tile.token + dy_token() + i * kDyRows) * gradient.dy_stride : 0);
  }

  __device__ __forceinline__ void copy_packed(std::int64_t k, Stage<kTokens>& stage) const {
    const int own = row + packed_row;
    const std::uint32_t there = own < rows ? own : 0;
    copy_async(&stage.packed[packed_place], packed + static_cast<std::uint64_t>(there) * static_cast<std::uint32_t>(k / 2),
               own < rows ? kVectorBytes : 0);
  }

  // Zeros beyond n and m: whatever W holds there, 0 * NaN must not come out of it.
  template <bool kWhole>
  __device__ __forceinline__ void copy_dy(Stage<kTokens>& stage) const {
    if (threadIdx.x >= kDyThreads) return;
    const int left = rows - row - dy_chunk() * kPerVector<T>;
    const int bytes = kWhole || left > kPerVector<T> ? kVectorBytes : max(left, 0) * 2;
#pragma unroll
    for (int i = 0; i < kDyCopies; i++)
      copy_async(&stage.dy[dy_place + i * kDyRows * kDyChunks], dy[i] + (kWhole || left > 0 ? row : 0),
                 i * kDyRows < tokens ? bytes : 0);
  }

  // Rows and columns that W doesn't have get the constant 0.
  __device__ __forceinline__ RawScale load_scale(std::int64_t k, const Constants& constants) const {
    RawScale raw{kNoCode, 0.0f, 0.0f};
    const int own = row + scale_row;
    if (own >= rows) return raw;
    const std::uint32_t block = (own * static_cast<std::uint32_t>(k / kScaleColumns) + unit) >> constants.log_block;
    raw.factor = constants.factors[block >> constants.log_factor];
    if (constants.codes) raw.code = constants.codes[block], raw.offset = *constants.offset;
    return raw;
  }

  __device__ __forceinline__ void publish(const RawScale& raw, int step, Shared<kTokens>& shared) const {
    if (threadIdx.x < kScaleBlocks * kStep) (&shared.scales[step & 1][0][0])[scale_place] = decoded(raw, shared.value8);
  }

  // `raw` is left alone beyond the last step.
  __device__ __forceinline__ void fetch(const GradientList& list, const Tile& tile, std::int64_t k, int step, int end,
                                        Stage<kTokens>& stage, RawScale& raw) {
    if (step < end) {
      if (row >= rows) enter(list, tile, step);
      copy_packed(k, stage);
      if (row + kStep <= rows)
        copy_dy<true>(stage);
      else
        copy_dy<false>(stage);
      raw = load_scale(k, list.of[weight].constants);
      row += kStep;
    }
    commit_copies();
  }
};

}  // namespace peftk::cuda::nf4_linear_dx_tile_kernels
