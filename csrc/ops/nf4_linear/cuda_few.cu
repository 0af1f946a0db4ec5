// y = x W^T + bias + scale * s b^T for at most 8 rows of x: W's rows are the rows of an MMA and x's its columns, so that 1 to 8
// of them cost the same. A warp takes 64 columns of 32 rows of W a step: lane 4 g + t reads the 8 packed bytes from column 16 t
// on of rows g, g + 8, … and the same 16 columns of row g of x. The MMA wants other columns of a lane, but any order of the
// inner dimension is right as long as both have it. The trick: one packed byte is one register of the MMA, out of a table in
// shared memory that has it once for each lane, so that no two lanes meet in a bank; one dp4a picks the byte out of its word and
// makes the address. A step's sums are scaled by the rows' constants in fp32: nothing is rounded but the table.
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/pairs.cuh"
#include "cuda/partial_sums.cuh"
#include "cuda/weight4.cuh"
#include "ops/nf4_linear/op.h"

namespace peftk::cuda {
namespace nf4_linear_few_kernels {

// Blocks a multiprocessor, for which registers are shared out: as many as its shared memory holds, 43 KB each.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 3;
#endif
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Of W's rows a block: two MMAs share what is read of x. For one alone that would take L1 as long as the look-ups.
constexpr int kOctets = 4;
constexpr int kRows = 8 * kOctets;  // of W a block
constexpr int kColumns = 8;         // of an MMA: the most rows of x
constexpr int kLogDepth = 6;
constexpr int kDepth = 1 << kLogDepth;  // columns of W a step; they lie in one block of it
constexpr int kStepBytes = kDepth / 2;  // packed
constexpr int kSteps = 4;               // a round, for which each lane of a quad decodes the constants of one step
constexpr int kAhead = 2;  // steps whose packed bytes are under way: 2 KB a warp, 48 KB a multiprocessor; 4 take 128 registers
constexpr int kSumStride = kRows + 4;  // so that a warp's fragments of the sums lie in different banks
static_assert(kSteps == 4, "a constant goes from lane t of a quad to the others in step t");

struct Output {
  DeviceWeight4 weight;
  const void* bias;  // (n,) or nullptr
  void* y;           // (m, n)
  const void* s;     // (m, r) or nullptr
  const void* b;     // (n, r)
  std::int64_t r;
  float scale;
  int split;
  float* partial;       // (split, m, n)
  unsigned first_item;  // a block's: kRows of W, one run of k
};

struct Outputs {
  int count;
  unsigned items;
  Output of[kMostWeights];
};

template <class T>
struct Input {
  const T* x;  // (m, k)
  std::int64_t stride;
  int m;
  int steps;  // k / kDepth
};

struct Shared {
  std::uint32_t pairs[256 * kPairRow];
  float value8[256];  // of double-quantised constants
  float sum[kWarps][kColumns][kSumStride];
};

// What a block does.
struct Item {
  int output;
  int run;           // of k
  std::int64_t row;  // the first of W
};

__device__ __forceinline__ Item item_at(const Outputs& outputs, unsigned number) {
  Item item{};
  while (item.output + 1 < outputs.count && number >= outputs.of[item.output + 1].first_item) item.output++;
  const Output& output = outputs.of[item.output];
  const unsigned within = number - output.first_item, split = output.split;
  item.run = static_cast<int>(within % split);
  item.row = static_cast<std::int64_t>(within / split) * kRows;
  return item;
}

// Where part `index` of `parts` begins, of which none is larger than another by more than one.
__device__ __forceinline__ int part_of(unsigned count, unsigned index, unsigned parts) {
  const unsigned rest = count % parts;
  return static_cast<int>(count / parts * index + (index < rest ? index : rest));
}

// As a shuffle gives it: ptxas then knows that a warp's threads stay together in loops over it.
__device__ __forceinline__ int own_warp() { return __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarp, 0); }

// A warp's part of an item from its next step on, as one lane sees it.
template <class T>
struct Share {
  int left;                             // steps
  const T* x;                           // 16 elements of its column
  const std::uint8_t* packed[kOctets];  // 8 bytes of its row in each octet
  bool nested;
  const void* constants;   // from the group of 256 blocks on in which the tile begins: 32 bits count the rest
  const float* scales;     // of the groups from there on
  unsigned unit[kOctets];  // steps of W from there to its row in each octet
  int log_steps;           // of a block of W
};

// What is under way. Lane 4 g + t has the constants of row g of each octet in step t of the round.
struct Ahead {
  uint2 words[kAhead][kOctets];
  std::uint32_t constant[kOctets];  // the code, or the constant itself where it isn't double quantised
  float constant_scale[kOctets];
};

// Rows beyond the last are taken for it, and so are columns of the MMA beyond the last row of x: their sums aren't stored.
template <class T>
__device__ __forceinline__ Share<T> share_of(const Output& output, const Input<T>& input, const Item& item) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4, warp = own_warp();
  const int run = part_of(input.steps, item.run, output.split);
  const int steps = part_of(input.steps, item.run + 1, output.split) - run;
  const int first = run + part_of(steps, warp, kWarps);
  const DeviceWeight4& weight = output.weight;
  Share<T> share;
  share.left = run + part_of(steps, warp + 1, kWarps) - first;
  share.x = input.x + min(g, input.m - 1) * input.stride + static_cast<std::int64_t>(first) * kDepth + 16 * t;
  share.log_steps = weight.log_block - kLogDepth;
  const std::int64_t groups = (item.row * input.steps >> share.log_steps) / kNestedBlock, blocks = groups * kNestedBlock;
  share.nested = weight.scales.scales;
  share.constants = static_cast<const std::uint8_t*>(weight.scales.values) + (share.nested ? blocks : 4 * blocks);
  share.scales = share.nested ? weight.scales.scales + groups : nullptr;
#pragma unroll
  for (int octet = 0; octet < kOctets; octet++) {
    const std::int64_t unit = min(item.row + 8 * octet + g, weight.n - 1) * input.steps + first;
    share.packed[octet] = weight.packed + unit * kStepBytes + 8 * t;
    share.unit[octet] = static_cast<unsigned>(unit - (blocks << share.log_steps));
  }
  return share;
}

// Without it the pointers are made out of one counter at every access: sm_80 takes 2.13 instructions a weight, not 1.76, and
// spills.
template <class P>
__device__ __forceinline__ void keep(P*& pointer) {
#ifndef PEFTK_CUDA_HOST
  asm("" : "+l"(pointer));
#endif
}

template <class T>
__device__ __forceinline__ void advance(Share<T>& share) {
  share.left -= kSteps;
  share.x += kSteps * kDepth;
#pragma unroll
  for (int octet = 0; octet < kOctets; octet++) {
    keep(share.packed[octet] += kSteps * kStepBytes);
    share.unit[octet] += kSteps;
  }
}

template <class T>
__device__ __forceinline__ void load_words(Ahead& ahead, const Share<T>& share, int step, int into) {
  if (step >= share.left) return;
#pragma unroll
  for (int octet = 0; octet < kOctets; octet++)
    ahead.words[into][octet] = __ldcs(reinterpret_cast<const uint2*>(share.packed[octet] + step * kStepBytes));
}

template <class T>
__device__ __forceinline__ void load_constants(Ahead& ahead, const Share<T>& share, int step) {
  step = min(step + static_cast<int>(threadIdx.x % 4), share.left - 1);
  if (share.nested) {
#pragma unroll
    for (int octet = 0; octet < kOctets; octet++) {
      const unsigned block = (share.unit[octet] + step) >> share.log_steps;
      ahead.constant[octet] = static_cast<const std::uint8_t*>(share.constants)[block];
      ahead.constant_scale[octet] = share.scales[block / kNestedBlock];
    }
  } else {
#pragma unroll
    for (int octet = 0; octet < kOctets; octet++)
      ahead.constant[octet] = static_cast<const std::uint32_t*>(share.constants)[(share.unit[octet] + step) >> share.log_steps];
  }
}

template <class T>
__device__ __forceinline__ void load_ahead(Ahead& ahead, const Share<T>& share) {
  if (share.left <= 0) return;
  load_constants(ahead, share, 0);
#pragma unroll
  for (int step = 0; step < kAhead; step++) load_words(ahead, share, step, step);
}

template <class T>
__device__ __forceinline__ void fill_tables(Shared& shared, const Tables& tables, int quant_type) {
  fill_pairs<T>(shared.pairs, tables.value4[quant_type], pair_factor<T>(quant_type), kThreads);
  for (int i = threadIdx.x; i < 256; i += kThreads) shared.value8[i] = tables.value8[i];
  __syncthreads();
}

// By MMA: rows g and g + 8 of columns 2t and 2t + 1, in units of pair_factor.
using Sums = float[kOctets / 2][4];

// sums += scale * c, where c is what the MMA of octets 2 i and 2 i + 1 gave.
__device__ __forceinline__ void add_scaled(float (&sums)[4], const float (&c)[4], float upper, float lower) {
  sums[0] = __fmaf_rn(c[0], upper, sums[0]);
  sums[1] = __fmaf_rn(c[1], upper, sums[1]);
  sums[2] = __fmaf_rn(c[2], lower, sums[2]);
  sums[3] = __fmaf_rn(c[3], lower, sums[3]);
}

template <class T>
__device__ __forceinline__ void multiply_step(Sums& sums, SharedAddress pairs, const uint2 (&words)[kOctets],
                                              const float (&scale)[kOctets], const T* x) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(x)), w = __ldg(reinterpret_cast<const uint4*>(x) + 1);
  const std::uint32_t columns[4][2] = {{v.x, v.y}, {v.z, v.w}, {w.x, w.y}, {w.z, w.w}};
#pragma unroll
  for (int pair = 0; pair < kOctets / 2; pair++) {
    const uint2 upper = words[2 * pair], lower = words[2 * pair + 1];
    float c[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const std::uint32_t u = i < 2 ? upper.x : upper.y, l = i < 2 ? lower.x : lower.y;
      const int byte = 2 * i % 4;
      const std::uint32_t rows[4] = {pair_of(pairs, u, byte), pair_of(pairs, l, byte), pair_of(pairs, u, byte + 1),
                                     pair_of(pairs, l, byte + 1)};
      mma<T>(c, rows, columns[i]);
    }
    add_scaled(sums[pair], c, scale[2 * pair], scale[2 * pair + 1]);
  }
}

__device__ __forceinline__ void decode(float (&scale)[kOctets], const Shared& shared, const Ahead& ahead, bool nested,
                                       float offset) {
  if (nested) {
#pragma unroll
    for (int octet = 0; octet < kOctets; octet++)
      scale[octet] = nested_scale(shared.value8[ahead.constant[octet]], ahead.constant_scale[octet], offset);
  } else {
#pragma unroll
    for (int octet = 0; octet < kOctets; octet++) scale[octet] = __uint_as_float(ahead.constant[octet]);
  }
}

template <class T>
__device__ __forceinline__ void multiply(Sums& sums, Shared& shared, Ahead& ahead, Share<T>& share, float offset) {
  const SharedAddress pairs = lane_pairs(shared.pairs, threadIdx.x % kWarp);
  for (; share.left > 0; advance(share)) {
    float own[kOctets];
    decode(own, shared, ahead, share.nested, offset);
    load_constants(ahead, share, kSteps);
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      if (step >= share.left) break;
      float scale[kOctets];
#pragma unroll
      for (int octet = 0; octet < kOctets; octet++) scale[octet] = __shfl_sync(kWholeWarp, own[octet], step, 4);
      multiply_step(sums, pairs, ahead.words[step % kAhead], scale, share.x + step * kDepth);
      load_words(ahead, share, step + kAhead, step % kAhead);
    }
  }
}

// Elements `column` and the next of a row of r, zero beyond it.
template <class T>
__device__ __forceinline__ std::uint32_t two_of(const T* row, std::int64_t column, std::int64_t r) {
  const std::uint32_t first = column < r ? row[column].bits : 0, second = column + 1 < r ? row[column + 1].bits : 0;
  return first | second << 16;
}

// sums += scale * b s^T, 16 of its columns a warp in turn.
template <class T>
__device__ __forceinline__ void multiply_low_rank(Sums& sums, const Output& output, std::int64_t first_row, int m) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const float scale = __fmul_rn(output.scale, pair_factor<T>(output.weight.quant_type));
  const std::int64_t r = output.r, last = output.weight.n - 1;
  const T* s = static_cast<const T*>(output.s) + min(g, m - 1) * r;
  for (std::int64_t first = own_warp() * 16; first < r; first += kWarps * 16) {
    const std::int64_t near = first + 2 * t, far = near + 8;
    const std::uint32_t columns[2] = {two_of(s, near, r), two_of(s, far, r)};
#pragma unroll
    for (int pair = 0; pair < kOctets / 2; pair++) {
      const std::int64_t row = first_row + 16 * pair + g;
      const T *upper = static_cast<const T*>(output.b) + min(row, last) * r,
              *lower = static_cast<const T*>(output.b) + min(row + 8, last) * r;
      const std::uint32_t rows[4] = {two_of(upper, near, r), two_of(lower, near, r), two_of(upper, far, r),
                                     two_of(lower, far, r)};
      float c[4] = {};
      mma<T>(c, rows, columns);
      add_scaled(sums[pair], c, scale, scale);
    }
  }
}

__device__ __forceinline__ void put(Shared& shared, const Sums& sums) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  auto& of_warp = shared.sum[threadIdx.x / kWarp];
#pragma unroll
  for (int pair = 0; pair < kOctets / 2; pair++)
#pragma unroll
    for (int i = 0; i < 4; i++) of_warp[2 * t + i % 2][16 * pair + 8 * (i / 2) + g] = sums[pair][i];
}

// A thread adds what the warps have of one element, in their order.
template <class T>
__device__ __forceinline__ void store(const Shared& shared, const Output& output, const Item& item, int m) {
  const int column = threadIdx.x / kRows;
  const std::int64_t row = item.row + threadIdx.x % kRows, n = output.weight.n;
  if (column >= m || row >= n) return;
  float sum = shared.sum[0][column][threadIdx.x % kRows];
#pragma unroll
  for (int warp = 1; warp < kWarps; warp++) sum = __fadd_rn(sum, shared.sum[warp][column][threadIdx.x % kRows]);
  sum = __fmul_rn(sum, __frcp_rn(pair_factor<T>(output.weight.quant_type)));
  if (output.split > 1) {
    output.partial[(static_cast<std::int64_t>(item.run) * m + column) * n + row] = sum;
  } else {
    if (output.bias) sum = __fadd_rn(sum, to_float(static_cast<const T*>(output.bias)[row]));
    static_cast<T*>(output.y)[column * n + row] = round_to<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    nf4_linear_few_kernel(const Outputs outputs, const Input<T> input, const Tables tables) {
  if constexpr (kHasSm80) {
    PEFTK_SHARED(Shared, shared, );
    const Item item = item_at(outputs, blockIdx.x);
    const Output& output = outputs.of[item.output];
    Share<T> share = share_of(output, input, item);
    Ahead ahead;
    load_ahead(ahead, share);  // while the tables are made
    fill_tables<T>(shared, tables, output.weight.quant_type);
    Sums sums = {};
    if (output.s && item.run == 0) multiply_low_rank<T>(sums, output, item.row, input.m);
    multiply(sums, shared, ahead, share, share.nested ? *output.weight.scales.offset : 0.0f);
    put(shared, sums);
    __syncthreads();
    store<T>(shared, output, item, input.m);
  }
}

}  // namespace nf4_linear_few_kernels

void nf4_linear_few(const std::vector<LinearOutput>& outputs, std::int64_t k, const void* x, std::int64_t x_stride,
                    std::int64_t m, int dtype, float* partial, void* stream) {
  using namespace nf4_linear_few_kernels;
  check_count(outputs.size());
  if (m > kColumns) refuse("m: expected 8 at most", m);
  if (k % kDepth || k >> 31) refuse("k: expected a multiple of 64 below 2^31", k);
  if (m == 0) return;
  Outputs list{};
  PartialSumsList sums{};
  for (const auto& [weight, bias, y, s, b, r, scale, split] : outputs) {
    const DeviceWeight4 w = device_weight(weight);
    if (w.log_block < kLogDepth) refuse("block_size: expected a multiple of 64", std::int64_t{1} << w.log_block);
    if (w.n == 0) continue;
    list.of[list.count++] = {w, bias, y, s, b, r, scale, split, partial, list.items};
    list.items += static_cast<unsigned>((w.n + kRows - 1) / kRows * split);
    if (split == 1) continue;
    sums.of[sums.count++] = {partial, bias, y, w.n, split};
    partial += split * m * w.n;
  }
  if (list.items == 0) return;
  with_type(x, dtype, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    if constexpr (sizeof(T) == 2) {
      const Input<T> input{typed, x_stride, static_cast<int>(m), static_cast<int>(k / kDepth)};
      launch(nf4_linear_few_kernel<T>, list.items, kThreads, 0, stream, list, input, make_tables());
      sum_partials<T>(sums, m, stream);
    } else {
      refuse("dtype: expected 1 (bf16) or 2 (fp16)", dtype);
    }
  });
}

}  // namespace peftk::cuda
