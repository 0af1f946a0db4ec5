// y = x W^T + bias + scale s b^T and dx = sum of dy W + D(t a) for every shape, format, dtype and target: fp32 units alone.
// One kernel for both: a result tile (rows of x, columns) sums over a depth, which is W's columns for y and W's rows for dx, a
// step in shared memory at a time. A thread owns 4 x 4 of the result; tiles of few rows give the threads slices of the depth
// instead of rows, and add the slices at the end. The trick: runs of kRunDepth are summed by themselves, since one long fp32 sum
// is further from the truth than the plain product that this kernel is held to.
#include "cuda/launch.h"
#include "cuda/partial_sums.cuh"
#include "cuda/philox.cuh"
#include "ops/nf4_linear/cuda_simple_step.cuh"
#include "ops/nf4_linear/op.h"

namespace peftk::cuda {
namespace nf4_linear_simple_kernels {

struct Term {  // what one weight adds to a result
  DeviceWeight4 weight;
  const void* input;    // x | dy (m, depth)
  std::int64_t stride;  // elements from row to row of it
  const void* thin;     // s | t (m, r) or nullptr
  const void* factor;   // b (n, r) | a (r, k)
  std::int64_t r;
  Dropout dropout;  // of the low-rank start; for y it keeps all and keep_scale is `scale`
};

struct Result {
  void* out;         // (m, columns), or partial sums (split, m, columns) fp32
  const void* bias;  // (columns,) or nullptr; nullptr where out is partial
  std::int64_t columns;
  std::int64_t split_steps;  // of a split
  int split;
  int first_term, terms;  // it is the sum of
  unsigned first_block;   // of the grid
};

struct Work {
  std::int64_t m, k;
  unsigned row_tiles;
  int results;
  Result result[kMostWeights];
  Term term[kMostWeights];
};
static_assert(sizeof(Work) + sizeof(Tables) <= 4096, "kernel parameters");

template <Over over>
__host__ __device__ std::int64_t depth_of(const Term& term, std::int64_t k) {
  return over == Over::kColumns ? k : term.weight.n;
}

template <Over over, int kRows>
__host__ __device__ std::int64_t steps_of(const Term& term, std::int64_t k) {
  return (depth_of<over>(term, k) + Shape<kRows>::kDepth - 1) / Shape<kRows>::kDepth;
}

// The tile's columns by depth [first, first + kDepth) of b or a; zeros outside.
template <Over over, class T, int kRows>
__device__ __forceinline__ void stage_factor(Step<kRows>& step, const Term& term, std::int64_t columns, const Tile& tile,
                                             std::int64_t first) {
  const T* const factor = static_cast<const T*>(term.factor);
  const std::int64_t by_depth = over == Over::kColumns ? 1 : columns, by_column = over == Over::kColumns ? term.r : 1;
  const int c = threadIdx.x % kColumns;
#pragma unroll 2
  for (int d = threadIdx.x / kColumns; d < Shape<kRows>::kDepth; d += kThreads / kColumns) {
    const bool inside = first + d < term.r && tile.column + c < columns;
    step.w[d][place_of<over, kRows>(d, c)] =
        inside ? to_float(factor[(first + d) * by_depth + (tile.column + c) * by_column]) : 0.0f;
  }
}

// What the low-rank start's elements [element, element + 4) are multiplied by.
__device__ __forceinline__ void start_factors(const Dropout& dropout, std::uint64_t element, float (&factors)[kOwnColumns]) {
  const unsigned skip = element % 4;
  const uint4 words = philox(element / 4, dropout.seed);
  const uint4 next = skip ? philox(element / 4 + 1, dropout.seed) : words;
#pragma unroll
  for (unsigned i = 0; i < kOwnColumns; i++) {
    const std::uint32_t word = word_of(skip + i < 4 ? words : next, (skip + i) % 4);
    factors[i] = word >= dropout.drop_below ? dropout.keep_scale : 0.0f;
  }
}

// sum += D(thin factor).
template <Over over, class T, int kRows>
__device__ __forceinline__ void add_start(Step<kRows>& step, const Term& term, std::int64_t m, std::int64_t columns,
                                          const Tile& tile, Sums& sum) {
  using S = Shape<kRows>;
  Sums run = {};
  for (std::int64_t first = 0; first < term.r; first += S::kDepth) {
    __syncthreads();
    stage_input(step, static_cast<const T*>(term.thin), term.r, tile, m, first, term.r);
    stage_factor<over, T>(step, term, columns, tile, first);
    __syncthreads();
    multiply<over>(step, tile, run);
  }
  const Dropout& dropout = term.dropout;
#pragma unroll
  for (int i = 0; i < kOwnRows; i++) {
    float factors[kOwnColumns] = {dropout.keep_scale, dropout.keep_scale, dropout.keep_scale, dropout.keep_scale};
    const std::int64_t row = tile.row + tile.group + i * S::kRowGroups;
    if (over == Over::kRows && dropout.drop_below)
      start_factors(dropout, row * columns + tile.column + tile.lane * kOwnColumns, factors);
#pragma unroll
    for (int j = 0; j < kOwnColumns; j++) run[i][j] = __fmul_rn(run[i][j], factors[j]);
  }
  close_run(run, sum);
}

// Steps [begin, end) of a term's depth.
template <Over over, class T, int kRows, bool kAligned>
__device__ __forceinline__ void add_product(Step<kRows>& step, const Term& term, const Weights<kAligned>& w, std::int64_t m,
                                            std::int64_t begin, std::int64_t end, const Tile& tile, Sums& sum) {
  using S = Shape<kRows>;
  const T* const input = static_cast<const T*>(term.input);
  const std::int64_t depth = depth_of<over>(term, w.k);
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t stop = min(i + S::kRunSteps, end);
    Sums run = {};
    for (; i < stop; i++) {
      __syncthreads();
      stage_input(step, input, term.stride, tile, m, i * S::kDepth, depth);
      stage_weights<over>(step, w, tile, i * S::kDepth);
      __syncthreads();
      multiply<over>(step, tile, run);
    }
    close_run(run, sum);
  }
}

template <class T>
__device__ __forceinline__ void finish(const Result& result, unsigned split, std::int64_t m, std::int64_t row,
                                       std::int64_t column, float sum) {
  if (row >= m || column >= result.columns) return;
  const std::int64_t at = row * result.columns + column;
  if (result.split > 1) {
    static_cast<float*>(result.out)[split * m * result.columns + at] = sum;
    return;
  }
  if (result.bias) sum = __fadd_rn(sum, to_float(static_cast<const T*>(result.bias)[column]));
  static_cast<T*>(result.out)[at] = round_to<T>(sum);
}

// Slices are added in pairs, in the room of step.w.
template <class T, int kRows>
__device__ __forceinline__ void finish_tile(Step<kRows>& step, const Result& result, unsigned split, std::int64_t m,
                                            const Tile& tile, const Sums& sum) {
  using S = Shape<kRows>;
  const int column = tile.lane * kOwnColumns;
  if constexpr (S::kSlices == 1) {
#pragma unroll
    for (int i = 0; i < kOwnRows; i++)
#pragma unroll
      for (int j = 0; j < kOwnColumns; j++)
        finish<T>(result, split, m, tile.row + tile.group + i * S::kRowGroups, tile.column + column + j, sum[i][j]);
  } else {
    static_assert(S::kSlices * kRows <= S::kDepth);
    auto& partial = reinterpret_cast<float (&)[S::kSlices][kRows][kColumns]>(step.w);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwnRows; i++) store_four(&partial[tile.slice][tile.group + i * S::kRowGroups][column], sum[i]);
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      float sums[S::kSlices];
#pragma unroll
      for (int slice = 0; slice < S::kSlices; slice++) sums[slice] = partial[slice][i / kColumns][i % kColumns];
#pragma unroll
      for (int half = S::kSlices / 2; half; half /= 2)
#pragma unroll
        for (int slice = 0; slice < half; slice++) sums[slice] = __fadd_rn(sums[slice], sums[slice + half]);
      finish<T>(result, split, m, tile.row + i / kColumns, tile.column + i % kColumns, sums[0]);
    }
  }
}

template <Over over, class T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks)
    nf4_linear_simple_kernel(const __grid_constant__ Work work, const __grid_constant__ Tables constants) {
  using S = Shape<kRows>;
  PEFTK_SHARED(Step<kRows>, step, );
  PEFTK_SHARED(SharedTables, tables, );

  int which = 0;
  while (which + 1 < work.results && blockIdx.x >= work.result[which + 1].first_block) which++;
  const Result& result = work.result[which];
  const unsigned block = blockIdx.x - result.first_block, over_rows = block / work.row_tiles;  // neighbours share W's bytes
  const unsigned split = over_rows % result.split;
  const int i = threadIdx.x;
  const Tile tile{static_cast<std::int64_t>(block % work.row_tiles) * kRows,
                  static_cast<std::int64_t>(over_rows / result.split) * kColumns, i % kLanes, i / kLanes / S::kSlices,
                  i / kLanes % S::kSlices};

  tables.value8[i] = constants.value8[i];
  if (i < 32) tables.value4[i] = constants.value4[i / 16][i % 16];
  if (i < result.terms) {
    const BlockScales& scales = work.term[result.first_term + i].weight.scales;
    tables.offset[i] = scales.scales ? *scales.offset : 0.0f;
  }

  Sums sum = {};
  if (split == 0)
    for (int t = 0; t < result.terms; t++)
      if (const Term& term = work.term[result.first_term + t]; term.thin)
        add_start<over, T>(step, term, work.m, result.columns, tile, sum);
  __syncthreads();  // the tables are there

  std::int64_t begin = split * result.split_steps, end = begin + result.split_steps;  // counted from the term at hand on
  for (int t = 0; t < result.terms; t++) {
    const Term& term = work.term[result.first_term + t];
    const Weights<kAligned> w{term.weight, tables, work.k, tables.offset[t]};
    const std::int64_t steps = steps_of<over, kRows>(term, work.k);
    add_product<over, T>(step, term, w, work.m, max(begin, std::int64_t{0}), min(end, steps), tile, sum);
    begin -= steps, end -= steps;
  }
  finish_tile<T>(step, result, split, work.m, tile, sum);
}

// A launch in the making: kernel parameters, and what is left for sum_partials.
struct Plan {
  Work work{};
  PartialSumsList second{};
  float* partial;  // where the next partial sums go
  unsigned blocks = 0;
  bool aligned = true;

  Plan(std::int64_t m, std::int64_t k, float* partial) : partial(partial) {
    work.m = m, work.k = k;
    work.row_tiles = static_cast<unsigned>((m + rows() - 1) / rows());
  }
  bool is_few() const { return work.m <= kFewUpTo; }
  int rows() const { return is_few() ? kFew : kMany; }
};

// A result (m, columns) of the terms [first, first + terms) of plan.work.
template <Over over>
void add_result(Plan& plan, int first, int terms, std::int64_t columns, const void* bias, void* out, int split) {
  Work& work = plan.work;
  std::int64_t steps = 0;
  for (int i = first; i < first + terms; i++) {
    const Term& term = work.term[i];
    steps += plan.is_few() ? steps_of<over, kFew>(term, work.k) : steps_of<over, kMany>(term, work.k);
    plan.aligned &= work.k % kWord == 0 && reinterpret_cast<std::uintptr_t>(term.weight.packed) % 4 == 0;
  }
  Result& result = work.result[work.results++];
  result = {out, bias, columns, (steps + split - 1) / split, split, first, terms, plan.blocks};
  if (split > 1) {
    plan.second.of[plan.second.count++] = {plan.partial, bias, out, columns, split};
    result.out = plan.partial, result.bias = nullptr;
    plan.partial += split * work.m * columns;
  }
  plan.blocks += static_cast<unsigned>((columns + kColumns - 1) / kColumns * split) * work.row_tiles;
}

template <Over over, class T, int kRows>
void run_tiles(const Plan& plan, void* stream) {
  const auto kernel =
      plan.aligned ? nf4_linear_simple_kernel<over, T, kRows, true> : nf4_linear_simple_kernel<over, T, kRows, false>;
  launch(kernel, plan.blocks, kThreads, 0, stream, plan.work, make_tables());
  sum_partials<T>(plan.second, plan.work.m, stream);
}

template <Over over>
void run(const Plan& plan, int dtype, void* stream) {
  if (!plan.blocks) return;
  with_type(plan.work.result[0].out, dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    plan.is_few() ? run_tiles<over, T, kFew>(plan, stream) : run_tiles<over, T, kMany>(plan, stream);
  });
}

}  // namespace nf4_linear_simple_kernels

void nf4_linear_simple(const std::vector<LinearOutput>& outputs, std::int64_t k, const void* x, std::int64_t x_stride,
                       std::int64_t m, int dtype, float* partial, void* stream) {
  using namespace nf4_linear_simple_kernels;
  check_count(outputs.size());
  Plan plan(m, k, partial);
  for (const auto& [weight, bias, y, s, b, r, scale, split] : outputs) {
    const int i = plan.work.results;
    plan.work.term[i] = {device_weight(weight), x, x_stride, s, b, r, {0, scale, 0}};
    add_result<Over::kColumns>(plan, i, 1, plan.work.term[i].weight.n, bias, y, split);
  }
  run<Over::kColumns>(plan, dtype, stream);
}

void nf4_linear_dx_simple(const std::vector<LinearGradient>& gradients, std::int64_t k, std::int64_t m, int dtype, int split,
                          void* dx, float* partial, void* stream) {
  using namespace nf4_linear_simple_kernels;
  check_count(gradients.size());
  Plan plan(m, k, partial);
  int terms = 0;
  for (const auto& [weight, dy, stride, t, a, r, drop_below, keep_scale, seed] : gradients)
    plan.work.term[terms++] = {device_weight(weight), dy, stride, t, a, r, {drop_below, keep_scale, seed}};
  add_result<Over::kRows>(plan, 0, terms, k, nullptr, dx, split);
  run<Over::kRows>(plan, dtype, stream);
}

}  // namespace peftk::cuda
