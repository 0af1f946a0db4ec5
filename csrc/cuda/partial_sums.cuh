// The second stage of a product whose inner dimension was split: partial sums are added in their order, so that the result does
// not depend on which block came first.
#pragma once
#include "cuda/convert.cuh"
#include "cuda/launch.h"
#include "cuda/weight4.cuh"

namespace peftk::cuda {

struct PartialSums {
  const float* partial;  // (splits, m, n)
  const void* bias;      // (n,) or nullptr
  void* out;             // (m, n)
  std::int64_t n;
  int splits;
};

struct PartialSumsList {
  int count;
  PartialSums of[kMostWeights];
};

namespace partial_sums_kernels {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) sum_partials_kernel(PartialSumsList list,  // blockIdx.y: which
                                                                std::int64_t m,
                                                                unsigned tiles) {  // of kThreads columns, the widest output's
  const PartialSums& sums = list.of[blockIdx.y];
  const std::int64_t row = blockIdx.x / tiles, column = static_cast<std::int64_t>(blockIdx.x % tiles) * kThreads + threadIdx.x;
  if (column >= sums.n) return;
  const float* partial = sums.partial + row * sums.n + column;
  float sum = *partial;
  for (int split = 1; split < sums.splits; split++) sum = __fadd_rn(sum, *(partial += m * sums.n));
  if (sums.bias) sum = __fadd_rn(sum, to_float(static_cast<const T*>(sums.bias)[column]));
  static_cast<T*>(sums.out)[row * sums.n + column] = round_to<T>(sum);
}

}  // namespace partial_sums_kernels

// T: of bias and out.
template <class T>
void sum_partials(const PartialSumsList& list, std::int64_t m, void* stream) {
  using namespace partial_sums_kernels;
  std::int64_t most = 0;
  for (int i = 0; i < list.count; i++) most = list.of[i].n > most ? list.of[i].n : most;
  if (!list.count || m * most == 0) return;
  const std::int64_t tiles = (most + kThreads - 1) / kThreads;
  const dim3 blocks(static_cast<unsigned>(m * tiles), static_cast<unsigned>(list.count));
  launch(sum_partials_kernel<T>, blocks, kThreads, 0, stream, list, m, static_cast<unsigned>(tiles));
}

}  // namespace peftk::cuda
