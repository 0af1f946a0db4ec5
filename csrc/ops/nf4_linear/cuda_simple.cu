// y = x W^T + bias + scale s b^T and dx = sum of dy W + D(t a) for every shape, format, dtype and target: fp32 units alone.
// One kernel for both: a result tile (rows of x, columns) sums over a depth, which is W's columns for y and W's rows for dx. A
// step puts kDepth of it into shared memory as fp32, W decoded; a thread owns 4 x 4 of the result. Tiles of few rows give the
// threads slices of the depth instead of rows, and add the slices at the end. The trick: every kRun steps are summed by
// themselves, since one long fp32 sum is further from the truth than the plain product that this kernel is held to.
#include "cuda/launch.h"
#include "cuda/partial_sums.cuh"
#include "cuda/philox.cuh"
#include "cuda/weight4.cuh"
#include "ops/nf4_linear/op.h"

namespace peftk::cuda {
namespace nf4_linear_simple_kernels {

constexpr int kThreads = 256;
constexpr int kColumns = 64;                  // of a result tile
constexpr int kDepth = 32;                    // of a step: 16 packed bytes of a row of W, a 32-bit word a thread
constexpr int kOwnRows = 4, kOwnColumns = 4;  // of a thread: 8 128-bit reads of shared memory for 64 FMAs; 8 x 4 spills
constexpr int kRun = 8;                       // steps; k = 4096: error 0.33e-6, plain product 0.28e-6, one long sum 1.44e-6
constexpr int kFew = 8, kMany = 64;           // rows of a result tile
constexpr int kFewUpTo = 32;  // rows of x: a weight costs 5 instructions to decode and 1 FMA for each row of a tile
constexpr int kWord = 8;      // neighbouring weights of a row of W that a thread decodes at once
constexpr int kLanes = kColumns / kOwnColumns;  // threads side by side
constexpr int kPitch = kDepth + 4;  // floats between rows of x in shared memory: two rows, read at once, in other banks

enum class Over { kColumns, kRows };  // of W: what the depth is

struct Term {  // what one weight adds to a result
  DeviceWeight4 weight;
  const void* input;    // x | dy (m, depth)
  std::int64_t stride;  // elements from row to row of it
  const void* thin;     // s | t (m, r) or nullptr
  const void* factor;   // b (n, r) | a (r, k)
  std::int64_t r;
  Dropout start_dropout;  // of the low-rank start; for y it keeps all and keep_scale is `scale`
};

struct Result {
  void* out;         // (m, columns), or partial sums (split, m, columns) fp32
  const void* bias;  // (columns,) or nullptr; nullptr where out is partial
  std::int64_t columns;
  std::int64_t run_steps;  // of a split
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

template <int kRows>
struct Shape {
  static constexpr int kRowGroups = kRows / kOwnRows;               // thread g owns rows g, g + kRowGroups, …
  static constexpr int kSlices = kThreads / (kRowGroups * kLanes);  // of a step's depth
  static constexpr int kSliceDepth = kDepth / kSlices;
};

struct SharedTables {
  float value4[2][16];  // 32 banks: whatever the codes, no two lanes meet in one
  float value8[256];
};

template <int kRows>
struct Step {  // what a step multiplies
  alignas(16) float x[kRows][kPitch];
  alignas(16) float w[kDepth][kColumns];  // by place_of
};

// Where a column of the tile lies in its row of Step::w, so that neither the stores of decoded words nor the reads of four
// neighbours conflict: a warp stores 8 columns x 4 words along the depth, or 4 rows x 8 words along the columns.
template <Over over>
__device__ __forceinline__ int place_of(int depth, int column) {
  return over == Over::kColumns ? column ^ (depth & 24) : column ^ (column >> 3 & 4);
}

struct Thread {
  int lane, group, slice;
};

template <int kRows>
__device__ __forceinline__ Thread this_thread() {
  const int i = threadIdx.x;
  return {i % kLanes, i / kLanes / Shape<kRows>::kSlices, i / kLanes % Shape<kRows>::kSlices};
}

using Sums = float[kOwnRows][kOwnColumns];

// ---- into shared memory -----------------------------------------------------------------------------------------------------

// Rows [row, row + kRows) and columns [first, first + kDepth) of a matrix (m, depth); zeros outside.
template <class T, int kRows>
__device__ __forceinline__ void stage_input(Step<kRows>& step, const T* input, std::int64_t stride, std::int64_t row,
                                            std::int64_t m, std::int64_t first, std::int64_t depth) {
  constexpr int kTogether = kThreads / kDepth;  // rows
  const int d = threadIdx.x % kDepth, line = threadIdx.x / kDepth;
  const int rows = first + d < depth ? static_cast<int>(min(m - row, std::int64_t{kRows})) : 0;
  const T* from = input + (row + line) * stride + first + d;
#pragma unroll
  for (int i = 0; i < kRows; i += kTogether, from += kTogether * stride)
    step.x[line + i][d] = line + i < rows ? to_float(*from) : 0.0f;
}

// The codes of elements [first, first + count) of W, count ≤ 8, the first in the highest nibble.
__device__ __forceinline__ std::uint32_t codes_at(const std::uint8_t* packed, std::uint64_t first, int count, bool aligned) {
  if (aligned) return __byte_perm(__ldg(reinterpret_cast<const std::uint32_t*>(packed + first / 2)), 0, 0x0123);
  const int odd = static_cast<int>(first & 1), bytes = (count + odd + 1) / 2;
  std::uint64_t codes = 0;
#pragma unroll
  for (int i = 0; i < kWord / 2 + 1; i++) codes = codes << 8 | (i < bytes ? __ldg(packed + first / 2 + i) : 0);
  return static_cast<std::uint32_t>(codes >> (odd ? 4 : 8));
}

__device__ __forceinline__ float scale_at(const DeviceWeight4& weight, std::uint64_t block, float offset,
                                          const SharedTables& tables) {
  const auto value8 = [&](std::uint8_t code) { return tables.value8[code]; };
  return weight.scales.scales ? scale_of<true>(weight.scales, block, offset, value8)
                              : scale_of<false>(weight.scales, block, offset, value8);
}

// W, of which no more than one other block begins inside a word.
struct Weights {
  const DeviceWeight4& weight;
  const SharedTables& tables;
  std::int64_t k;
  float offset;
  bool aligned;  // words are aligned 32-bit ones, each of one block

  __device__ std::int64_t rows() const { return weight.n; }
  __device__ std::int64_t row_length() const { return k; }
  __device__ __forceinline__ void load(std::int64_t row, std::int64_t column, int count, float (&values)[kWord]) const {
    const std::uint64_t first = row * k + column;
    const std::uint32_t codes = codes_at(weight.packed, first, count, aligned);
    const std::uint64_t block = first >> weight.log_block;
    const float scale = scale_at(weight, block, offset, tables);
    float next = scale;
    int until = kWord;  // elements of the first block
    if (!aligned) {
      const std::uint64_t rest = ((block + 1) << weight.log_block) - first;
      if (rest < static_cast<std::uint64_t>(count))
        next = scale_at(weight, block + 1, offset, tables), until = static_cast<int>(rest);
    }
    const float* value4 = tables.value4[weight.quant_type];
#pragma unroll
    for (int i = 0; i < kWord; i++) {
      const float value = __fmul_rn(value4[codes >> (28 - 4 * i) & 15], i < until ? scale : next);
      values[i] = i < count ? value : 0.0f;
    }
  }
};

// b or a.
template <class T>
struct Dense {
  const T* data;
  std::int64_t count, length;

  __device__ std::int64_t rows() const { return count; }
  __device__ std::int64_t row_length() const { return length; }
  __device__ __forceinline__ void load(std::int64_t row, std::int64_t column, int here, float (&values)[kWord]) const {
#pragma unroll
    for (int i = 0; i < kWord; i++) values[i] = i < here ? to_float(data[row * length + column + i]) : 0.0f;
  }
};

// Columns [column, column + kColumns) of the result by depth [first, first + kDepth) out of a matrix whose rows are the columns
// of the result (Over::kColumns) or the depth; zeros outside, so that what is not there spoils nothing.
template <Over over, int kRows, class Matrix>
__device__ __forceinline__ void stage_matrix(Step<kRows>& step, const Matrix& matrix, std::int64_t column, std::int64_t first) {
  constexpr bool kByColumn = over == Over::kColumns;
  constexpr int kWords = (kByColumn ? kDepth : kColumns) / kWord;  // of a row
  static_assert(kDepth * kColumns == kThreads * kWord, "a word a thread");
  const int line = threadIdx.x / kWords, at = threadIdx.x % kWords * kWord;
  const std::int64_t row = (kByColumn ? column : first) + line, along = (kByColumn ? first : column) + at;
  const std::int64_t rest = row < matrix.rows() ? matrix.row_length() - along : 0;
  float values[kWord] = {};
  if (rest > 0) matrix.load(row, along, rest < kWord ? static_cast<int>(rest) : kWord, values);
  if constexpr (kByColumn) {
#pragma unroll
    for (int i = 0; i < kWord; i++) step.w[at + i][place_of<over>(at, line)] = values[i];
  } else {
#pragma unroll
    for (int i = 0; i < kWord; i += 4)
      *reinterpret_cast<float4*>(&step.w[line][place_of<over>(line, at + i)]) = {values[i], values[i + 1], values[i + 2],
                                                                                 values[i + 3]};
  }
}

// ---- sums -------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_four(const float* from, float (&values)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}

template <Over over, int kRows>
__device__ __forceinline__ void multiply(const Step<kRows>& step, const Thread& thread, Sums& run) {
  using S = Shape<kRows>;
#pragma unroll
  for (int i = 0; i < S::kSliceDepth; i += 4) {
    const int depth = thread.slice * S::kSliceDepth + i;
    float w[4][kOwnColumns];
#pragma unroll
    for (int d = 0; d < 4; d++) load_four(&step.w[depth + d][place_of<over>(depth, thread.lane * kOwnColumns)], w[d]);
#pragma unroll
    for (int row = 0; row < kOwnRows; row++) {
      float x[4];
      load_four(&step.x[thread.group + row * S::kRowGroups][depth], x);
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

// ---- the kernel -------------------------------------------------------------------------------------------------------------

template <Over over>
__host__ __device__ std::int64_t depth_of(const Term& term, std::int64_t k) {
  return over == Over::kColumns ? k : term.weight.n;
}

// A term has one at least, which its low-rank start belongs to.
__host__ __device__ inline std::int64_t steps_of(std::int64_t depth) {
  return depth > kDepth ? (depth + kDepth - 1) / kDepth : 1;
}

// run = D(thin factor), into sum.
template <Over over, class T, int kRows>
__device__ __forceinline__ void add_start(Step<kRows>& step, const Term& term, const Work& work, const Result& result,
                                          std::int64_t row, std::int64_t column, const Thread& thread, Sums& run, Sums& sum) {
  const bool by_column = over == Over::kColumns;
  const T* factor = static_cast<const T*>(term.factor);
  const Dense<T> matrix{factor, by_column ? result.columns : term.r, by_column ? term.r : result.columns};
  for (std::int64_t first = 0; first < term.r; first += kDepth) {
    __syncthreads();
    stage_input(step, static_cast<const T*>(term.thin), term.r, row, work.m, first, term.r);
    stage_matrix<over>(step, matrix, column, first);
    __syncthreads();
    multiply<over>(step, thread, run);
  }
  const Dropout& dropout = term.start_dropout;
#pragma unroll
  for (int i = 0; i < kOwnRows; i++) {
    float factors[kOwnColumns] = {dropout.keep_scale, dropout.keep_scale, dropout.keep_scale, dropout.keep_scale};
    const std::uint64_t element =
        (row + thread.group + i * Shape<kRows>::kRowGroups) * result.columns + column + thread.lane * kOwnColumns;
    if (over == Over::kRows && dropout.drop_below) start_factors(dropout, element, factors);
#pragma unroll
    for (int j = 0; j < kOwnColumns; j++) run[i][j] = __fmul_rn(run[i][j], factors[j]);
  }
  close_run(run, sum);
}

// Steps [begin, end) of a term's depth.
template <Over over, class T, int kRows>
__device__ __forceinline__ void add_product(Step<kRows>& step, const SharedTables& tables, const Term& term, const Work& work,
                                            std::int64_t begin, std::int64_t end, std::int64_t row, std::int64_t column,
                                            const Thread& thread, Sums& run, Sums& sum) {
  const DeviceWeight4& weight = term.weight;
  const bool aligned = work.k % kWord == 0 && reinterpret_cast<std::uintptr_t>(weight.packed) % 4 == 0;
  const Weights matrix{weight, tables, work.k, weight.scales.scales ? *weight.scales.offset : 0.0f, aligned};
  for (std::int64_t i = begin; i < end; i++) {
    __syncthreads();
    stage_input(step, static_cast<const T*>(term.input), term.stride, row, work.m, i * kDepth, depth_of<over>(term, work.k));
    stage_matrix<over>(step, matrix, column, i * kDepth);
    __syncthreads();
    multiply<over>(step, thread, run);
    if ((i - begin) % kRun == kRun - 1) close_run(run, sum);
  }
  close_run(run, sum);
}

// The result's element in the tile of `row` and `column`.
template <class T>
__device__ __forceinline__ void finish(const Work& work, const Result& result, unsigned split, std::int64_t row,
                                       std::int64_t column, float sum) {
  if (row >= work.m || column >= result.columns) return;
  const std::int64_t at = row * result.columns + column;
  if (result.split > 1) {
    static_cast<float*>(result.out)[split * work.m * result.columns + at] = sum;
    return;
  }
  if (result.bias) sum = __fadd_rn(sum, to_float(static_cast<const T*>(result.bias)[column]));
  static_cast<T*>(result.out)[at] = round_to<T>(sum);
}

template <Over over, class T, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    nf4_linear_simple_kernel(const __grid_constant__ Work work, const __grid_constant__ Tables constants) {
  using S = Shape<kRows>;
  PEFTK_SHARED(Step<kRows>, step, );
  PEFTK_SHARED(SharedTables, tables, );
  for (int i = threadIdx.x; i < 256; i += kThreads) tables.value8[i] = constants.value8[i];
  if (threadIdx.x < 32) tables.value4[threadIdx.x / 16][threadIdx.x % 16] = constants.value4[threadIdx.x / 16][threadIdx.x % 16];

  int which = 0;
  while (which + 1 < work.results && blockIdx.x >= work.result[which + 1].first_block) which++;
  const Result& result = work.result[which];
  const unsigned block = blockIdx.x - result.first_block, of_rows = block / work.row_tiles;  // neighbours share W's bytes
  const unsigned split = of_rows % result.split;
  const std::int64_t row = static_cast<std::int64_t>(block % work.row_tiles) * kRows;
  const std::int64_t column = static_cast<std::int64_t>(of_rows / result.split) * kColumns;

  const Thread thread = this_thread<kRows>();
  Sums sum = {}, run = {};
  std::int64_t begin = split * result.run_steps, end = begin + result.run_steps;  // counted from the term at hand on
  for (int i = 0; i < result.terms && end > 0; i++) {
    const Term& term = work.term[result.first_term + i];
    const std::int64_t steps = steps_of(depth_of<over>(term, work.k));
    if (begin <= 0 && term.thin) add_start<over, T>(step, term, work, result, row, column, thread, run, sum);
    const std::int64_t first = begin > 0 ? begin : 0, last = end < steps ? end : steps;
    if (first < last) add_product<over, T>(step, tables, term, work, first, last, row, column, thread, run, sum);
    begin -= steps, end -= steps;
  }

  if constexpr (S::kSlices == 1) {
#pragma unroll
    for (int i = 0; i < kOwnRows; i++)
#pragma unroll
      for (int j = 0; j < kOwnColumns; j++)
        finish<T>(work, result, split, row + thread.group + i * S::kRowGroups, column + thread.lane * kOwnColumns + j, sum[i][j]);
  } else {
    constexpr int kPairs = S::kSlices / 2;  // a warp has two slices
    static_assert(kWarp == 2 * kLanes && kPairs * kRows * kColumns <= kDepth * kColumns);
    auto& partial = reinterpret_cast<float (&)[kPairs][kRows][kColumns]>(step.w);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwnRows; i++)
#pragma unroll
      for (int j = 0; j < kOwnColumns; j++) {
        const float both = __fadd_rn(sum[i][j], __shfl_xor_sync(kWholeWarp, sum[i][j], kLanes));
        if (thread.slice % 2 == 0)
          partial[thread.slice / 2][thread.group + i * S::kRowGroups][thread.lane * kOwnColumns + j] = both;
      }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      float total = partial[0][i / kColumns][i % kColumns];
      for (int pair = 1; pair < kPairs; pair++) total = __fadd_rn(total, partial[pair][i / kColumns][i % kColumns]);
      finish<T>(work, result, split, row + i / kColumns, column + i % kColumns, total);
    }
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------------------

// Adds a result of terms [first_term, first_term + terms), whose columns' count is `columns`; where it is split its sums go to
// `partial`, which moves on, and to `second`.
template <Over over>
void add_result(Work& work, PartialSumsList& second, void* out, const void* bias, std::int64_t columns, int split, int first_term,
                int terms, float*& partial, unsigned& blocks) {
  std::int64_t steps = 0;
  for (int i = 0; i < terms; i++) steps += steps_of(depth_of<over>(work.term[first_term + i], work.k));
  Result& result = work.result[work.results++];
  result = {out, bias, columns, (steps + split - 1) / split, split, first_term, terms, blocks};
  if (split > 1) {
    second.of[second.count++] = {partial, bias, out, columns, split};
    result.out = partial, result.bias = nullptr;
    partial += split * work.m * columns;
  }
  blocks += static_cast<unsigned>((columns + kColumns - 1) / kColumns * split) * work.row_tiles;
}

Work make_work(std::int64_t m, std::int64_t k) {
  Work work{};
  const int rows = m <= kFewUpTo ? kFew : kMany;
  work.m = m, work.k = k, work.row_tiles = static_cast<unsigned>((m + rows - 1) / rows);
  return work;
}

template <Over over>
void run(const Work& work, const PartialSumsList& second, unsigned blocks, int dtype, void* stream) {
  if (!blocks) return;
  with_type(work.result[0].out, dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const auto kernel = work.m <= kFewUpTo ? nf4_linear_simple_kernel<over, T, kFew> : nf4_linear_simple_kernel<over, T, kMany>;
    launch(kernel, blocks, kThreads, 0, stream, work, make_tables());
    sum_partials<T>(second, work.m, stream);
  });
}

}  // namespace nf4_linear_simple_kernels

void nf4_linear_simple(const std::vector<LinearOutput>& outputs, std::int64_t k, const void* x, std::int64_t x_stride,
                       std::int64_t m, int dtype, float* partial, void* stream) {
  using namespace nf4_linear_simple_kernels;
  check_count(outputs.size());
  Work work = make_work(m, k);
  PartialSumsList second{};
  unsigned blocks = 0;
  for (const auto& [weight, bias, y, s, b, r, scale, split] : outputs) {
    const int i = work.results;
    work.term[i] = {device_weight(weight), x, x_stride, s, b, r, {0, scale, 0}};
    add_result<Over::kColumns>(work, second, y, bias, work.term[i].weight.n, split, i, 1, partial, blocks);
  }
  run<Over::kColumns>(work, second, blocks, dtype, stream);
}

void nf4_linear_dx_simple(const std::vector<LinearGradient>& gradients, std::int64_t k, std::int64_t m, int dtype, int split,
                          void* dx, float* partial, void* stream) {
  using namespace nf4_linear_simple_kernels;
  check_count(gradients.size());
  Work work = make_work(m, k);
  PartialSumsList second{};
  unsigned blocks = 0;
  int terms = 0;
  for (const auto& [weight, dy, stride, t, a, r, drop_below, keep_scale, seed] : gradients)
    work.term[terms++] = {device_weight(weight), dy, stride, t, a, r, {drop_below, keep_scale, seed}};
  add_result<Over::kRows>(work, second, dx, nullptr, k, split, 0, terms, partial, blocks);
  run<Over::kRows>(work, second, blocks, dtype, stream);
}

}  // namespace peftk::cuda
