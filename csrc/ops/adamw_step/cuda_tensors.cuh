// What both steps of AdamW on a GPU share: the list of tensors of a launch, which is cut into chunks of one size, and the update.
#pragma once
#include "cuda/launch.h"
#include "cuda/vector.cuh"
#include "ops/adamw_step/op.h"

namespace peftk::cuda {
namespace adamw_step_kernels {  // a kernel needs a name that other files can see

constexpr int kMostParameterBytes = 4096;  // of a launch, on every driver

struct Coefficients {
  float grad_factor, decay, weight1, beta2, weight2, step_size, root_factor, eps;
};

inline Coefficients make_coefficients(const std::vector<float>& c) {
  if (c.size() != kAdamCoefficients) refuse("coefficients: expected 8 numbers", static_cast<long>(c.size()));
  return {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]};
}

// As many tensors as parameters have room for. Place: the addresses and the count of one.
template <class Place>
struct TensorList {
  static constexpr int kMost = (kMostParameterBytes - 128) / (sizeof(Place) + sizeof(std::uint32_t));
  std::uint32_t count;             // tensors
  std::uint32_t first[kMost + 1];  // chunk with which a tensor begins; behind the last: chunks in all
  Place of[kMost];

  __device__ __forceinline__ std::uint32_t chunks() const { return first[count]; }

  // Tensor that a chunk belongs to.
  __device__ __forceinline__ std::uint32_t find(std::uint32_t chunk) const {
    std::uint32_t low = 0, high = count;
    while (high - low > 1) {
      const std::uint32_t middle = (low + high) / 2;
      (chunk >= first[middle] ? low : high) = middle;
    }
    return low;
  }
};

// step(list) for the tensors, cut into lists.
template <class Place, class Tensors, class Make, class Step>
void for_each_list(const Tensors& tensors, std::int64_t chunk, Make&& make, Step&& step) {  // chunk: elements
  TensorList<Place> list{};
  for (const auto& tensor : tensors) {
    const Place place = make(tensor);
    if (place.count == 0) continue;
    if (list.count == list.kMost) step(list), list.count = 0;
    const auto chunks = static_cast<std::uint32_t>((place.count + chunk - 1) / chunk);
    list.of[list.count] = place;
    list.first[list.count + 1] = list.first[list.count] + chunks;
    list.count++;
  }
  if (list.count) step(list);
}

// peftk/ops/adamw_step/__init__.py has the formula; each operation rounds by itself.
__device__ __forceinline__ void update(const Coefficients& c, float grad, float& p, float& m, float& v) {
  const float g = __fmul_rn(grad, c.grad_factor);
  m = __fadd_rn(m, __fmul_rn(__fsub_rn(g, m), c.weight1));
  v = __fadd_rn(__fmul_rn(v, c.beta2), __fmul_rn(__fmul_rn(g, c.weight2), g));
  const float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(v), c.root_factor), c.eps);
  p = __fsub_rn(__fmul_rn(p, c.decay), __fdiv_rn(__fmul_rn(m, c.step_size), denominator));
}

}  // namespace adamw_step_kernels
}  // namespace peftk::cuda
