// dx (m, k) = sum over a list of dy (m, n) W (n, k) + D(t a): the contraction runs through the rows of all W of the list, each
// decoded in registers. Operands are swapped: columns of W are an MMA's 16 rows, tokens its 8 columns. A block has kColumns
// columns, a warp 32 of them, and every warp all tokens; a step is kStep rows of one W, copied packed. The trick: a transposed
// ldmatrix of packed bytes gives lane 4 g + t, out of rows n = 2t and n + 1, four neighbouring columns from 4 g on, so that
// one register holds the four pairs (n, n+1) that the lane owes the MMAs, and its sums are four neighbours of a row of dx.
// W is scaled in fp32 and rounded once, so products are those of a dense W. (Scaling pairs by a constant in two 16-bit parts
// takes as many instructions and rounds twice more; scaling dy for each block of 64 columns takes one HMUL2 a pair of it.)
#include "cuda/async_copy.cuh"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/partial_sums.cuh"
#include "cuda/philox.cuh"
#include "cuda/vector.cuh"
#include "cuda/weight4.cuh"
#include "ops/nf4_linear/op.h"

namespace peftk::cuda {
namespace nf4_linear_dx_tile_kernels {

constexpr int kThreads = 256;
constexpr int kWarpColumns = 32;                           // 16 bytes of a packed row: one ldmatrix takes all rows of a step
constexpr int kColumns = kThreads / kWarp * kWarpColumns;  // of a block: 128 bytes of a packed row
constexpr int kStep = 32;                                  // rows of W
constexpr int kStages = 4;                                 // with 128 tokens 82 KB of shared memory; 64 rows a step would be 130
constexpr int kLogScaleColumns = 6;
constexpr int kScaleColumns = 1 << kLogScaleColumns;        // that share a constant: blocks are multiples of it
constexpr int kScaleBlocks = kColumns / kScaleColumns;      // of a row of the tile
constexpr int kCopies = 16;                                 // of the table: a 64-bit access is served half a warp at a time
constexpr int kPackedChunks = kColumns / 2 / kVectorBytes;  // of a row and step
constexpr int kDyChunks = kStep * 2 / kVectorBytes;         // of a token and step
static_assert(kStep * kPackedChunks == kThreads, "each thread copies one packed chunk a step");

// 128 tokens: 128 sums a thread, so one block a multiprocessor; below, two.
template <int kTokens>
inline constexpr int kResidentBlocks = kTokens == 128 ? 1 : 2;

struct Gradient {
  DeviceWeight4 weight;
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

template <int kTokens>
struct Shared {
  float2 pair[256][kCopies];             // of a packed byte: high nibble, low nibble
  float value8[256];                     // the dynamic 8-bit code
  float scales[2][kScaleBlocks][kStep];  // of this step and the next; a block's in the order of scale_at
  Stage<kTokens> stages[kStages];
};

// Where a row's constant lies: lane 4 g + t reads those of its rows 8 q + 2 t and 8 q + 2 t + 1 as eight neighbours.
__device__ __forceinline__ int scale_at(int row) { return row % 8 / 2 * 8 + row / 8 * 2 + row % 2; }

struct Tile {
  std::int64_t m, k;
  std::int64_t token, column;  // the first ones
};

__device__ __forceinline__ void fill_pairs(float2 (*pair)[kCopies], const Tables& tables, int quant_type) {
  for (int i = threadIdx.x; i < 256 * kCopies; i += kThreads) {
    const int byte = i / kCopies;
    pair[byte][i % kCopies] = {tables.value4[quant_type][byte >> 4], tables.value4[quant_type][byte & 15]};
  }
}

// ---- what a step needs, brought on its way kStages - 1 steps ahead ---------------------------------------------------------

// A constant as it comes from memory; it is decoded two steps later.
struct RawScale {
  float factor;  // what the 8-bit value is multiplied by; the constant itself where not double quantised
  float offset;
  int code;  // below 0: not double quantised
};
constexpr RawScale kNoScale{0.0f, 0.0f, -1};  // of rows and columns that W doesn't have

__device__ __forceinline__ float decoded(const RawScale& raw, const float* value8) {
  return raw.code < 0 ? raw.factor : __fadd_rn(__fmul_rn(value8[raw.code], raw.factor), raw.offset);
}

// A thread's share of the copies of a step: a chunk of packed bytes, chunks of dy, and of half the threads a constant.
template <class T, int kTokens>
struct Feed {
  static constexpr int kDyThreads = kTokens * kDyChunks < kThreads ? kTokens * kDyChunks : kThreads;
  static constexpr int kDyRows = kDyThreads / kDyChunks;  // tokens that the threads copy at once
  static constexpr int kDyCopies = kTokens / kDyRows;

  const Tile tile;
  const bool has_packed = tile.column + packed_chunk() * kWarpColumns < tile.k;
  const bool has_scale = threadIdx.x < kScaleBlocks * kStep && tile.column + scale_block() * kScaleColumns < tile.k;
  int weight = 0;         // of the list
  int row = 0, rows = 0;  // of it: the next step's first, and all
  const T* dy[kDyCopies];

  static __device__ int packed_row() { return threadIdx.x / kPackedChunks; }
  static __device__ int packed_chunk() { return threadIdx.x % kPackedChunks; }
  static __device__ int dy_token() { return threadIdx.x / kDyChunks; }
  static __device__ int dy_chunk() { return threadIdx.x % kDyChunks; }
  static __device__ int scale_row() { return threadIdx.x % kStep; }
  static __device__ int scale_block() { return threadIdx.x / kStep; }

  __device__ __forceinline__ bool has_token(int copy) const { return tile.token + dy_token() + copy * kDyRows < tile.m; }

  // Finds the weight of a step.
  __device__ __forceinline__ void enter(const GradientList& list, int step) {
    while (step >= list.of[weight].end) weight++;
    const Gradient& gradient = list.of[weight];
    rows = static_cast<int>(gradient.weight.n);
    row = (step - gradient.begin) * kStep;
#pragma unroll
    for (int i = 0; i < kDyCopies; i++)
      dy[i] =
          static_cast<const T*>(gradient.dy) + (has_token(i) ? (tile.token + dy_token() + i * kDyRows) * gradient.dy_stride : 0);
  }

  __device__ __forceinline__ void copy_packed(const DeviceWeight4& w4, Stage<kTokens>& stage) const {
    const int own = row + packed_row();
    const std::int64_t at = own < rows ? own * (tile.k / 2) + tile.column / 2 + packed_chunk() * kVectorBytes : 0;
    copy_async(&stage.packed[Stage<kTokens>::packed_at(packed_row(), packed_chunk())], w4.packed + at,
               has_packed && own < rows ? kVectorBytes : 0);
  }

  // Zeros beyond n and m: whatever W holds there, 0 * NaN must not come out of it.
  __device__ __forceinline__ void copy_dy(Stage<kTokens>& stage) const {
    if (threadIdx.x >= kDyThreads) return;
    const int own = row + dy_chunk() * kPerVector<T>, left = rows - own;
    const int bytes = left < 0 ? 0 : left < kPerVector<T> ? left * 2 : kVectorBytes;
#pragma unroll
    for (int i = 0; i < kDyCopies; i++)
      copy_async(&stage.dy[Stage<kTokens>::dy_at(dy_token() + i * kDyRows, dy_chunk())], dy[i] + (left > 0 ? own : 0),
                 has_token(i) ? bytes : 0);
  }

  __device__ __forceinline__ RawScale load_scale(const DeviceWeight4& w4) const {
    const BlockScales& scales = w4.scales;
    RawScale raw = kNoScale;
    const int own = row + scale_row();
    if (!has_scale || own >= rows) return raw;
    const std::uint32_t unit = own * static_cast<std::uint32_t>(tile.k / kScaleColumns) +
                               static_cast<std::uint32_t>(tile.column / kScaleColumns) + scale_block();
    const std::uint32_t block = unit >> (w4.log_block - kLogScaleColumns);
    if (scales.scales) raw.code = static_cast<const std::uint8_t*>(scales.values)[block], raw.offset = *scales.offset;
    raw.factor = scales.scales ? scales.scales[block / kNestedBlock] : static_cast<const float*>(scales.values)[block];
    return raw;
  }

  __device__ __forceinline__ RawScale fetch(const GradientList& list, int step, int end, Stage<kTokens>& stage) {
    RawScale raw = kNoScale;
    if (step < end) {
      if (row >= rows) enter(list, step);
      const DeviceWeight4& w4 = list.of[weight].weight;
      copy_packed(w4, stage);
      copy_dy(stage);
      raw = load_scale(w4);
      row += kStep;
    }
    commit_copies();
    return raw;
  }
};

// ---- the product of a step ---------------------------------------------------------------------------------------------------

// Columns of a warp's two MMA tiles: row g + 8 h of tile c is column 4 g + 2 c + h. So a lane's sums [j][c][2 h + e] are those of
// token 8 j + 2 t + e and its own column 2 c + h.
template <int kTokens>
using Sums = float[kTokens / 8][2][4];

using Fragments = std::uint32_t[kStep / 16][2][4];  // by 16 rows of W and tile

// `copy`: the bytes from a row's start to the lane's copy of the pair. dp4a picks a byte of `word` and multiplies in one go.
__device__ __forceinline__ float2 pair_at(const float2 (*pair)[kCopies], std::uint32_t word, int byte, std::uint32_t copy) {
  const std::uint32_t at = __dp4a(word, static_cast<std::uint32_t>(sizeof(*pair)) << 8 * byte, copy);
  return *reinterpret_cast<const float2*>(reinterpret_cast<const char*>(pair) + at);
}

template <class T, int kTokens>
__device__ __forceinline__ void decode(const Shared<kTokens>& shared, const Stage<kTokens>& stage, const float* scales,
                                       Fragments& w) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::uint32_t copy = lane % kCopies * sizeof(float2);
  std::uint32_t words[4];  // of rows 8 q + 2 t, in the low half, and 8 q + 2 t + 1
  load_matrices_transposed(words, &stage.packed[Stage<kTokens>::packed_at(lane, warp)]);
  const float4* mine = reinterpret_cast<const float4*>(scales + lane % 4 * 8);
  const float4 low = mine[0], high = mine[1];
  const float scale[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const float s0 = scale[2 * q], s1 = scale[2 * q + 1];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float2 first = pair_at(shared.pair, words[q], c, copy), second = pair_at(shared.pair, words[q], c + 2, copy);
      w[q / 2][c][q % 2 * 2] = round_pair<T>(__fmul_rn(first.x, s0), __fmul_rn(second.x, s1));
      w[q / 2][c][q % 2 * 2 + 1] = round_pair<T>(__fmul_rn(first.y, s0), __fmul_rn(second.y, s1));
    }
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void multiply(const Fragments& w, const Stage<kTokens>& stage, Sums<kTokens>& sums) {
  const int lane = threadIdx.x % kWarp;
  const uint4* row = &stage.dy[Stage<kTokens>::dy_at(lane % 8, lane / 8)];
#pragma unroll
  for (int j = 0; j < kTokens / 8; j++) {
    std::uint32_t dy[4];
    load_matrices(dy, row + j * 8 * kDyChunks);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int c = 0; c < 2; c++) mma<T>(sums[j][c], w[half][c], {dy[2 * half], dy[2 * half + 1]});
  }
}

// ---- the start ---------------------------------------------------------------------------------------------------------------

// Two 16-bit elements as a register of an MMA; 0 for those that a matrix doesn't have.
template <class T>
__device__ __forceinline__ std::uint32_t pair_of(const T* first, bool has_first, const T* second, bool has_second) {
  return (has_first ? first->bits : 0u) | (has_second ? second->bits : 0u) << 16;
}

// A lane's mask of D on the tile: bit 4 (2 (j % 4) + e) + i of word j / 4 for token 8 j + 2 t + e and the lane's column i.
template <int kTokens>
using Mask = std::uint32_t[(kTokens + 31) / 32];

template <int kTokens>
__device__ __forceinline__ void make_mask(const Dropout& dropout, const Tile& tile, std::int64_t column, Mask<kTokens>& mask) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int word = 0; word < (kTokens + 31) / 32; word++) {
    mask[word] = dropout.drop_below ? 0 : ~0u;
#pragma unroll 1
    for (int group = 0; group < (kTokens < 32 ? kTokens / 4 : 8) && dropout.drop_below; group++) {
      const std::int64_t token = tile.token + 32 * word + group / 2 * 8 + 2 * t + group % 2;
      const uint4 random = philox(static_cast<std::uint64_t>(token * tile.k + column) / 4, dropout.seed);
      const std::uint32_t below = dropout.drop_below;
      mask[word] |= ((random.x >= below) | (random.y >= below) << 1 | (random.z >= below) << 2 | (random.w >= below) << 3)
                    << 4 * group;
    }
  }
}

// sums += D(t a), a's columns as an MMA's rows. `column`: the lane's first.
template <class T, int kTokens>
__device__ __forceinline__ void add_low_rank(const Gradient& gradient, const Tile& tile, std::int64_t column,
                                             Sums<kTokens>& sums) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const std::int64_t r = gradient.r;
  Mask<kTokens> mask;
  make_mask<kTokens>(gradient.dropout, tile, column, mask);
  const float keep_scale = gradient.dropout.drop_below ? gradient.dropout.keep_scale : 1.0f;
#pragma unroll 1
  for (std::int64_t rank = 2 * t; rank < r + 2 * t; rank += 16) {
    std::uint32_t factor[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {  // the lane's column i / 2, ranks of half i % 2
      const std::int64_t at = rank + i % 2 * 8;
      const T* first = static_cast<const T*>(gradient.a) + at * tile.k + column + i / 2;
      factor[i / 4][i % 2 * 2 + i / 2 % 2] = pair_of(first, at < r, first + tile.k, at + 1 < r);
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; j++) {
      const std::int64_t token = tile.token + 8 * j + g;
      const T* own = static_cast<const T*>(gradient.t) + token * r + rank;
      const bool inside = token < tile.m;
      const std::uint32_t thin[2] = {pair_of(own, inside && rank < r, own + 1, inside && rank + 1 < r),
                                     pair_of(own + 8, inside && rank + 8 < r, own + 9, inside && rank + 9 < r)};
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float product[4] = {};
        mma<T>(product, factor[c], thin);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const bool kept = mask[j / 4] >> (4 * (j % 4 * 2 + i % 2) + 2 * c + i / 2) & 1;
          sums[j][c][i] = __fmaf_rn(kept ? product[i] : 0.0f, keep_scale, sums[j][c][i]);
        }
      }
    }
  }
}

// ---- the end -----------------------------------------------------------------------------------------------------------------

// A lane's four neighbours of each of its tokens, to dx, or in fp32 to a run's partial sums.
template <class T, int kTokens>
__device__ __forceinline__ void store(const Tile& tile, std::int64_t column, const Sums<kTokens>& sums, T* dx, float* partial) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTokens / 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const std::int64_t token = tile.token + 8 * j + 2 * t + e, at = token * tile.k + column;
      const float sum[4] = {sums[j][0][e], sums[j][0][2 + e], sums[j][1][e], sums[j][1][2 + e]};
      if (token >= tile.m) continue;
      if (partial)
        store_vector(partial + at, sum);
      else
        store_words(reinterpret_cast<std::uint32_t*>(dx + at), {round_pair<T>(sum[0], sum[1]), round_pair<T>(sum[2], sum[3])});
    }
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kTokens>)
    nf4_linear_dx_tile_kernel(const GradientList list, const Tables tables, std::int64_t m, std::int64_t k, T* dx,
                              float* partial) {  // (runs, m, k), or nullptr where there is one run
  if constexpr (kHasSm80) {
    PEFTK_DYNAMIC_SHARED(Shared<kTokens>, shared);
    const unsigned across = static_cast<unsigned>((k + kColumns - 1) / kColumns), run = blockIdx.y, runs = gridDim.y;
    const Tile tile{m, k, static_cast<std::int64_t>(blockIdx.x / across) * kTokens,
                    static_cast<std::int64_t>(blockIdx.x % across) * kColumns};
    const int begin = static_cast<int>(static_cast<std::int64_t>(list.steps) * run / runs);
    const int end = static_cast<int>(static_cast<std::int64_t>(list.steps) * (run + 1) / runs);
    const int warp = threadIdx.x / kWarp;
    const std::int64_t column = tile.column + warp * kWarpColumns + threadIdx.x % kWarp / 4 * 4;
    const bool has_columns = tile.column + warp * kWarpColumns < k;

    Feed<T, kTokens> feed{tile};
    RawScale now = feed.fetch(list, begin, end, shared->stages[0]);
    RawScale next = feed.fetch(list, begin + 1, end, shared->stages[1]);
    RawScale after = feed.fetch(list, begin + 2, end, shared->stages[2]);
    fill_pairs(shared->pair, tables, begin >= list.fp4_from);
    shared->value8[threadIdx.x] = tables.value8[threadIdx.x];
    __syncthreads();
    const auto publish = [&](const RawScale& raw, int step) {
      if (threadIdx.x < kScaleBlocks * kStep)
        shared->scales[step % 2][feed.scale_block()][scale_at(feed.scale_row())] = decoded(raw, shared->value8);
    };
    publish(now, begin);

    Sums<kTokens> sums = {};
    if (run == 0 && has_columns)
      for (int i = 0; i < list.count; i++)
        if (list.of[i].t) add_low_rank<T, kTokens>(list.of[i], tile, column, sums);

    for (int step = begin; step < end; step++) {
      const Stage<kTokens>& stage = shared->stages[(step - begin) % kStages];
      wait_copies<kStages - 2>();
      __syncthreads();  // the stage has landed, and nobody reads the one before any more
      if (step == list.fp4_from && step > begin) {
        fill_pairs(shared->pair, tables, 1);
        __syncthreads();
      }
      publish(next, step + 1);
      next = after;
      after = feed.fetch(list, step + kStages - 1, end, shared->stages[(step - begin + kStages - 1) % kStages]);
      if (has_columns) {
        Fragments w;
        decode<T>(*shared, stage, shared->scales[step % 2][warp / 2], w);
        multiply<T>(w, stage, sums);
      }
    }
    if (has_columns) store<T, kTokens>(tile, column, sums, dx, partial ? partial + run * m * k : nullptr);
  }
}

GradientList make_list(const std::vector<LinearGradient>& gradients) {
  check_count(gradients.size());
  GradientList list{};
  for (int type = 0; type < 2; type++) {
    if (type == 1) list.fp4_from = list.steps;
    for (const auto& [weight, dy, dy_stride, t, a, r, drop_below, keep_scale, seed] : gradients) {
      const DeviceWeight4 own = device_weight(weight);
      if (own.quant_type != type) continue;
      const int begin = list.steps;
      list.steps += static_cast<int>((own.n + kStep - 1) / kStep);
      list.of[list.count++] = {own, dy, dy_stride, t, a, r, {drop_below, keep_scale, seed}, begin, list.steps};
    }
  }
  return list;
}

void check_aligned(const char* expected, const void* data) {
  if (!is_aligned(data, kVectorBytes)) refuse(expected, static_cast<long>(reinterpret_cast<std::uintptr_t>(data)));
}

void check_limits(const std::vector<LinearGradient>& gradients, std::int64_t k, int split) {
  if (k % kScaleColumns) refuse("k: expected a multiple of 64", k);
  if (split < 1) refuse("split: expected 1 or more", split);
  for (const LinearGradient& gradient : gradients) {
    const auto& [packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type] = std::get<Weight4>(gradient);
    const std::int64_t dy_stride = std::get<2>(gradient);
    if (n >> 31) refuse("n: expected less than 2^31", n);
    if (n * (k / kScaleColumns) >> 32) refuse("n * k: expected less than 2^38", n * k);
    if (block_size % kScaleColumns) refuse("block_size: expected a multiple of 64", block_size);
    if (quant_type >> 1) refuse("quant_type: expected 0 (nf4) or 1 (fp4)", quant_type);
    if (dy_stride % kPerVector<Bf16>) refuse("dy: expected rows that are a multiple of 8 elements apart", dy_stride);
    check_aligned("packed: expected an address that is a multiple of 16", packed);
    check_aligned("dy: expected an address that is a multiple of 16", std::get<1>(gradient));
  }
}

template <class T, int kTokens>
void launch_tile(const GradientList& list, std::int64_t k, std::int64_t m, int split, T* dx, float* partial, void* stream) {
  const std::int64_t tiles = (m + kTokens - 1) / kTokens * ((k + kColumns - 1) / kColumns);
  const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(split));
  launch(nf4_linear_dx_tile_kernel<T, kTokens>, blocks, kThreads, sizeof(Shared<kTokens>), stream, list, make_tables(), m, k, dx,
         split > 1 ? partial : nullptr);
  if (split > 1) sum_partials<T>({1, {{partial, nullptr, dx, k, split}}}, m, stream);
}

}  // namespace nf4_linear_dx_tile_kernels

void nf4_linear_dx_tile(const std::vector<LinearGradient>& gradients, std::int64_t k, std::int64_t m, int dtype, int tokens,
                        int split, void* dx, float* partial, void* stream) {
  using namespace nf4_linear_dx_tile_kernels;
  check_limits(gradients, k, split);
  const GradientList list = make_list(gradients);
  if (m * k == 0) return;
  with_type(dx, dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    if constexpr (sizeof(T) == 4) {
      refuse("dtype: expected 1 (bf16) or 2 (fp16)", dtype);
    } else {
      switch (tokens) {
        case 16: return launch_tile<T, 16>(list, k, m, split, typed, partial, stream);
        case 32: return launch_tile<T, 32>(list, k, m, split, typed, partial, stream);
        case 64: return launch_tile<T, 64>(list, k, m, split, typed, partial, stream);
        case 128: return launch_tile<T, 128>(list, k, m, split, typed, partial, stream);
      }
      refuse("tokens: expected 16, 32, 64 or 128", tokens);
    }
  });
}

}  // namespace peftk::cuda
