// dx (m, k) = sum over a list of dy (m, n) W (n, k) + D(t a): the contraction runs through the rows of all W of the list, each
// decoded in registers. Operands are swapped: columns of W are an MMA's 16 rows, tokens its 8 columns. A block has kColumns
// columns, a warp 32 of them, and every warp all tokens; a step is kStep rows of one W, copied packed. The trick: a transposed
// ldmatrix of packed bytes gives lane 4 g + t, out of rows n = 2t and n + 1, four neighbouring columns from 4 g on, so that
// one register holds the four pairs (n, n+1) that the lane owes the MMAs, and its sums are four neighbours of a row of dx.
// W is scaled in fp32 and rounded once, so products are those of a dense W. (Scaling pairs by a constant in two 16-bit parts
// takes as many instructions and rounds twice more; scaling dy instead takes, with 128 tokens, two HMUL2 a weight.)
#include "cuda/launch.h"
#include "cuda/partial_sums.cuh"
#include "ops/nf4_linear/cuda_dx_low_rank.cuh"
#include "ops/nf4_linear/op.h"

namespace peftk::cuda {
namespace nf4_linear_dx_tile_kernels {

__device__ __forceinline__ void fill_pairs(float2 (*pair)[kCopies], const Tables& tables, int quant_type) {
  for (int i = threadIdx.x; i < 256 * kCopies; i += kThreads) {
    const int byte = i / kCopies;
    pair[byte][i % kCopies] = {tables.value4[quant_type][byte >> 4], tables.value4[quant_type][byte & 15]};
  }
}

// What a lane reads of shared memory.
template <int kTokens>
struct Places {
  int packed, dy;  // the chunk of a stage that it gives to ldmatrix; of the first 16 tokens and rows
  int scales;      // its eight constants
  int pairs;       // its copy of the table's first row: an address in shared memory, since bases aren't free from sm_90 on

  __device__ __forceinline__ Places(const Shared<kTokens>& shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    packed = held(Stage<kTokens>::packed_at(lane, warp));
    dy = held(Stage<kTokens>::dy_at(lane / 16 * 8 + lane % 8, lane / 8 % 2));
    scales = held(warp * kWarpColumns / kScaleColumns * kStep + scale_at(lane % 4 * 2));
    pairs = held(static_cast<int>(__cvta_generic_to_shared(&shared.pair[0][lane % kCopies])));
  }
};

// dp4a picks a byte of `word` and makes an address of it in one go.
__device__ __forceinline__ float2 pair_at(int pairs, std::uint32_t word, int byte) {
  const std::uint32_t at =
      __dp4a(word, static_cast<std::uint32_t>(kCopies * sizeof(float2)) << 8 * byte, static_cast<std::uint32_t>(pairs));
  return *static_cast<const float2*>(__cvta_shared_to_generic(at));
}

// Half a step, 16 rows of W, out of the two words that hold rows 2 t and 2 t + 1, and the 8 behind them.
template <class T>
__device__ __forceinline__ void decode(int pairs, const std::uint32_t (&words)[2], const float4& scales, Fragments& w) {
#pragma unroll
  for (int q = 0; q < 2; q++) {
    const float s0 = q ? scales.z : scales.x, s1 = q ? scales.w : scales.y;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float2 first = pair_at(pairs, words[q], c), second = pair_at(pairs, words[q], c + 2);
      w[c][2 * q] = round_pair<T>(__fmul_rn(first.x, s0), __fmul_rn(second.x, s1));
      w[c][2 * q + 1] = round_pair<T>(__fmul_rn(first.y, s0), __fmul_rn(second.y, s1));
    }
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void multiply(const Fragments& w, const uint4* dy, Sums<kTokens>& sums) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; j += 2) {
    std::uint32_t tokens[4];
    load_matrices(tokens, dy + j * 8 * kDyChunks);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int c = 0; c < 2; c++) mma<T>(sums[j + i][c], w[c], {tokens[2 * i], tokens[2 * i + 1]});
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void add_step(const Shared<kTokens>& shared, const Stage<kTokens>& stage, int step,
                                         const Places<kTokens>& places, Sums<kTokens>& sums) {
  std::uint32_t words[4];
  load_matrices_transposed(words, &stage.packed[places.packed]);
  const float4* scales = reinterpret_cast<const float4*>(&shared.scales[step & 1][0][0] + places.scales);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    Fragments w;
    decode<T>(places.pairs, {words[2 * half], words[2 * half + 1]}, scales[half], w);
    multiply<T, kTokens>(w, &stage.dy[places.dy ^ 2 * half], sums);
  }
}

// A lane's four neighbours of each of its tokens, to dx, or in fp32 to a run's partial sums.
template <class T, int kTokens>
__device__ __forceinline__ void store(const Tile& tile, std::int64_t k, const Sums<kTokens>& sums, T* dx, float* partial) {
  const int thread = held(static_cast<int>(threadIdx.x)), t = thread % 4, column = column_of(thread);
  if (column >= tile.columns) return;
  std::int64_t at = (tile.token + 2 * t) * k + tile.column + column;
#pragma unroll
  for (int j = 0; j < kTokens / 8; j++, at += 6 * k)
#pragma unroll
    for (int e = 0; e < 2; e++, at += k) {
      const float sum[4] = {sums[j][0][e], sums[j][0][2 + e], sums[j][1][e], sums[j][1][2 + e]};
      if (8 * j + 2 * t + e >= tile.tokens) continue;
      if (partial)
        store_vector(partial + at, sum);
      else
        store_words(reinterpret_cast<std::uint32_t*>(dx + at), {round_pair<T>(sum[0], sum[1]), round_pair<T>(sum[2], sum[3])});
    }
}

// Tiles of columns follow each other: they share dy, which takes four times the bytes of W.
template <int kTokens>
__device__ __forceinline__ Tile tile_of(unsigned block, std::int64_t m, std::int64_t k) {
  const unsigned across = static_cast<unsigned>((k + kColumns - 1) / kColumns);
  const std::int64_t token = static_cast<std::int64_t>(block / across) * kTokens;
  const std::int64_t column = static_cast<std::int64_t>(block % across) * kColumns;
  return {token, column, static_cast<int>(min(m - token, static_cast<std::int64_t>(kTokens))),
          static_cast<int>(min(k - column, static_cast<std::int64_t>(kColumns)))};
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kTokens>)
    nf4_linear_dx_tile_kernel(const GradientList list, const Tables tables, std::int64_t m, std::int64_t k, T* dx,
                              float* partial) {  // (runs, m, k), or nullptr where there is one run
  if constexpr (kHasSm80) {
    PEFTK_DYNAMIC_SHARED(Shared<kTokens>, shared);
    static_assert(sizeof(Shared<kTokens>) <= 99 << 10, "what every GPU since sm_80 gives a block");
    PEFTK_SHARED(Tile, tile, );  // here, so that it takes no registers through the loop
    const unsigned run = blockIdx.y, runs = gridDim.y;
    const int begin = static_cast<int>(static_cast<std::int64_t>(list.steps) * run / runs);
    const int end = static_cast<int>(static_cast<std::int64_t>(list.steps) * (run + 1) / runs);
    fill_pairs(shared->pair, tables, begin >= list.fp4_from);
    shared->value8[threadIdx.x] = tables.value8[threadIdx.x];
    if (threadIdx.x == 0) {
      shared->value8[kNoCode] = 1.0f;
      tile = tile_of<kTokens>(blockIdx.x, m, k);
    }
    __syncthreads();
    // The step from which on the warp has something to do: none where its columns are dx's no more.
    const int first_own = held(static_cast<int>(threadIdx.x) / kWarp * kWarpColumns < tile.columns ? begin : end);

    const Places<kTokens> places(*shared);
    Feed<T, kTokens> feed(tile);
    constexpr int kAway = kAhead<kTokens>;
    RawScale raw[kAway] = {};  // of this step and those to come
    Sums<kTokens> sums = {};
    int at = 1;  // this step's stage
    for (int step = begin - kAway; step < end; step++) {
      wait_copies<kAway - 1>();
      __syncthreads();  // the stage has landed, and nobody reads the one before any more
      if (step == list.fp4_from) {
        fill_pairs(shared->pair, tables, 1);
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i + 1 < kAway; i++) raw[i] = raw[i + 1];
      feed.publish(raw[0], step + 1, *shared);
      feed.fetch(list, tile, k, step + kAway, end, shared->stages[at == 0 ? kAway : at - 1], raw[kAway - 1]);
      if (step >= first_own) add_step<T, kTokens>(*shared, shared->stages[at], step, places, sums);
      at = at == kAway ? 0 : at + 1;
    }

    auto& low_rank = *reinterpret_cast<LowRank<T, kTokens>*>(shared->stages);
    static_assert(sizeof(low_rank) <= sizeof(shared->stages));
    if (run == 0) add_low_rank<T, kTokens>(list, tile, k, low_rank, sums);
    store<T, kTokens>(tile, k, sums, dx, partial ? partial + run * m * k : nullptr);
  }
}

Constants constants_of(const DeviceWeight4& weight) {
  const auto& [values, scales, offset] = weight.scales;
  const int log_block = weight.log_block - kLogScaleColumns;
  if (!scales) return {nullptr, static_cast<const float*>(values), nullptr, log_block, 0};
  return {static_cast<const std::uint8_t*>(values), scales, offset, log_block, __builtin_ctz(kNestedBlock)};
}

GradientList make_list(const std::vector<LinearGradient>& gradients) {
  check_count(gradients.size());
  GradientList list{};
  for (int type = 0; type < 2; type++) {
    if (type == 1) list.fp4_from = list.steps;
    for (const auto& [weight, dy, dy_stride, t, a, r, drop_below, keep_scale, seed] : gradients) {
      const DeviceWeight4 own = device_weight(weight);
      if (own.quant_type != type) continue;
      const int n = static_cast<int>(own.n), begin = list.steps;
      list.steps += (n + kStep - 1) / kStep;
      list.of[list.count++] = {own.packed, constants_of(own), n, dy, dy_stride, t, a, r, {drop_below, keep_scale, seed},
                               begin,      list.steps};
    }
  }
  return list;
}

void check_aligned(const char* expected, const void* data) {
  if (!is_aligned(data, kVectorBytes)) refuse(expected, static_cast<long>(reinterpret_cast<std::uintptr_t>(data)));
}

void check_limits(const std::vector<LinearGradient>& gradients, std::int64_t k, int split) {
  if (k % kScaleColumns) refuse("k: expected a multiple of 64", k);
  if (k >> 31) refuse("k: expected less than 2^31", k);
  if (split < 1 || split >> 16) refuse("split: expected 1 to 65535", split);
  for (const LinearGradient& gradient : gradients) {
    const auto& [packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type] = std::get<Weight4>(gradient);
    const std::int64_t dy_stride = std::get<2>(gradient);
    if (n >= kMostRows) refuse("n: expected less than 2^30", n);
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
