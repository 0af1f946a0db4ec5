// The pass of an optimizer's step over a list of tensors, in place: parameters, gradients and moments are read once, all but the
// gradients written. In 8 bits a block's new moments wait in the first-level cache for their absmax. An optimizer is a Formula:
//
//   kMoments, kSigned[kMoments]    how many fp32 moments an element has, and which of them the signed 8-bit code holds
//   kCoefficients                  the numbers it is made of, all fp32
//   formula(param, grad, moments)  the new parameter; moments become the new ones. Moments of zero without a gradient stay zero:
//                                  such elements complete a short block.
//
// A tensor is a tuple: param, grad, the moments (in 8 bits their codes, then their absmax), count.
#pragma once
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/code8.h"
#include "cpu/parallel.h"

namespace peftk::PEFTK_TIER {

inline constexpr std::int64_t kStepWork = 16;  // of an element, in multiplications, for threads_worth

template <class Tensor>
std::int64_t count_of(const Tensor& tensor) {
  return std::get<std::tuple_size_v<Tensor> - 1>(tensor);
}

// body(tensor, begin, end): elements [begin, end) of one tensor, begin at a block's start. Threads share the blocks of all
// tensors evenly, however many tensors there are.
template <class Tensor, class Body>
void for_each_range(const std::vector<Tensor>& tensors, int threads, Body&& body) {
  const auto blocks_of = [](const Tensor& t) { return (count_of(t) + kStateBlock - 1) / kStateBlock; };
  std::int64_t blocks = 0;
  for (const Tensor& tensor : tensors) blocks += blocks_of(tensor);
  parallel_for(blocks, threads_worth(blocks * kStateBlock * kStepWork, threads), [&](std::int64_t begin, std::int64_t end) {
    std::int64_t first = 0;  // block of the tensor at hand, of all
    for (const Tensor& tensor : tensors) {
      const std::int64_t last = first + blocks_of(tensor), from = begin > first ? begin : first, to = end < last ? end : last;
      const std::int64_t stop = (to - first) * kStateBlock;
      if (from < to) body(tensor, (from - first) * kStateBlock, stop < count_of(tensor) ? stop : count_of(tensor));
      first = last;
    }
  });
}

// ---- moments in fp32 ----------------------------------------------------------------------------------------------------------

template <int kMoments>
struct Moments {
  float* of[kMoments];

  template <class Tensor, std::size_t... I>
  static Moments from(const Tensor& tensor, std::int64_t begin, std::index_sequence<I...>) {
    return {{std::get<2 + I>(tensor) + begin...}};
  }
};

template <class T, class Formula, int kMoments>
inline void step_vector(T* p, const T* g, const Moments<kMoments>& moments, std::int64_t i, const Formula& formula) {
  F32 here[kMoments];
  for (int k = 0; k < kMoments; k++) here[k] = load(moments.of[k] + i);
  store(p, formula(load(p), load(g), here));
  for (int k = 0; k < kMoments; k++) store(moments.of[k] + i, here[k]);
}

template <class T, class Formula, int kMoments>
void step_range(T* p, const T* g, const Moments<kMoments>& moments, std::int64_t count, const Formula& formula) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) step_vector(p + i, g + i, moments, i, formula);
  const std::int64_t rest = count - i;
  if (!rest) return;
  T few_p[kLanes] = {}, few_g[kLanes] = {};
  float few[kMoments][kLanes] = {};
  Moments<kMoments> few_moments;
  std::memcpy(few_g, g + i, sizeof(T) * rest);
  std::memcpy(few_p, p + i, sizeof(T) * rest);
  for (int k = 0; k < kMoments; k++) {
    few_moments.of[k] = few[k];
    std::memcpy(few[k], moments.of[k] + i, sizeof(float) * rest);
  }
  step_vector(few_p, few_g, few_moments, 0, formula);
  std::memcpy(p + i, few_p, sizeof(T) * rest);
  for (int k = 0; k < kMoments; k++) std::memcpy(moments.of[k] + i, few[k], sizeof(float) * rest);
}

// Tensor: tuple<void* param, const void* grad, float*… moments, int64 count>; params and grads are of `dtype`.
template <class Formula, class Tensor>
void optimizer_step(const std::vector<Tensor>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  constexpr int kMoments = Formula::kMoments;
  static_assert(std::tuple_size_v<Tensor> == 3 + kMoments);
  if (coefficients.size() != Formula::kCoefficients)
    refuse("coefficients: expected another count of numbers", static_cast<long>(coefficients.size()));
  for_each_range(tensors, threads, [&](const Tensor& tensor, std::int64_t begin, std::int64_t end) {
    const Formula formula(coefficients.data());
    const void* grad = std::get<1>(tensor);
    const auto moments = Moments<kMoments>::from(tensor, begin, std::make_index_sequence<kMoments>());
    with_type(std::get<0>(tensor), dtype, [&](auto* p) {
      const auto* g = static_cast<decltype(p)>(const_cast<void*>(grad));
      step_range(p + begin, g + begin, moments, end - begin, formula);
    });
  });
}

// ---- moments in 8 bits --------------------------------------------------------------------------------------------------------

template <int kMoments>
struct Codes {
  std::uint8_t* codes[kMoments];
  float* absmax[kMoments];

  template <class Tensor, std::size_t... I>
  static Codes from(const Tensor& tensor, std::int64_t begin, std::index_sequence<I...>) {
    return {{std::get<2 + I>(tensor) + begin...}, {std::get<2 + kMoments + I>(tensor) + begin / kStateBlock...}};
  }
  Codes at(std::int64_t i) const {
    Codes there = *this;
    for (int k = 0; k < kMoments; k++) there.codes[k] += i, there.absmax[k] += i / kStateBlock;
    return there;
  }
};

inline void encode_moment(const Nearest8& nearest, const float* x, U32 most, std::uint8_t* codes, float* absmax) {
  std::uint32_t bits = reduce_max(most);
  if (bits < 0x00800000u) bits = 0;  // nothing above the denormals
  if (bits > 0x7f800000u) bits = 0x7fc00000u;
  std::memcpy(absmax, &bits, 4);
  const F32 factor = broadcast(bits ? 1.0f / *absmax : 0.0f);
  for (int i = 0; i < kStateBlock; i += kGroup8) {
    F32 scaled[kGroupVectors8];
    for (int j = 0; j < kGroupVectors8; j++) scaled[j] = load(x + i + j * kLanes) * factor;
    encode8(nearest, scaled, codes + i);
  }
}

template <class T, class Formula, int kMoments>
void step_block(T* p, const T* g, const Codes<kMoments>& at, const Formula& formula) {
  alignas(64) float fresh[kMoments][kStateBlock];
  const Nearest8* nearest[kMoments];
  F32 scale[kMoments];
  U32 most[kMoments];
  for (int k = 0; k < kMoments; k++) {
    nearest[k] = &nearest8(Formula::kSigned[k]);
    scale[k] = broadcast(*at.absmax[k]), most[k] = zero_bits();
  }
  for (int i = 0; i < kStateBlock; i += kGroup8) {
    F32 old[kMoments][kGroupVectors8];
    for (int k = 0; k < kMoments; k++) decode8(*nearest[k]->code, at.codes[k] + i, old[k]);
    for (int j = 0; j < kGroupVectors8; j++) {
      const int here = i + j * kLanes;
      F32 moments[kMoments];
      for (int k = 0; k < kMoments; k++) moments[k] = old[k][j] * scale[k];
      store(p + here, formula(load(p + here), load(g + here), moments));
      for (int k = 0; k < kMoments; k++) {
        most[k] = max_magnitude_bits(most[k], moments[k]);
        store(fresh[k] + here, moments[k]);
      }
    }
  }
  for (int k = 0; k < kMoments; k++) encode_moment(*nearest[k], fresh[k], most[k], at.codes[k], at.absmax[k]);
}

// A short last block is completed with zeros, which change neither its absmax nor the codes of the others.
template <class T, class Formula, int kMoments>
void step_short_block(T* p, const T* g, const Codes<kMoments>& at, std::int64_t count, const Formula& formula) {
  T whole_p[kStateBlock] = {}, whole_g[kStateBlock] = {};
  std::uint8_t whole[kMoments][kStateBlock];
  Codes<kMoments> there = at;
  std::memcpy(whole_g, g, sizeof(T) * count);
  std::memcpy(whole_p, p, sizeof(T) * count);
  for (int k = 0; k < kMoments; k++) {
    std::memset(whole[k], code8(Formula::kSigned[k]).zero, kStateBlock);
    std::memcpy(whole[k], at.codes[k], count);
    there.codes[k] = whole[k];
  }
  step_block(whole_p, whole_g, there, formula);
  std::memcpy(p, whole_p, sizeof(T) * count);
  for (int k = 0; k < kMoments; k++) std::memcpy(at.codes[k], whole[k], count);
}

// Tensor: tuple<void* param, const void* grad, uint8_t*… codes, float*… absmax, int64 count>.
template <class Formula, class Tensor>
void optimizer_step8(const std::vector<Tensor>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  constexpr int kMoments = Formula::kMoments;
  static_assert(std::tuple_size_v<Tensor> == 3 + 2 * kMoments);
  if (coefficients.size() != Formula::kCoefficients)
    refuse("coefficients: expected another count of numbers", static_cast<long>(coefficients.size()));
  for_each_range(tensors, threads, [&](const Tensor& tensor, std::int64_t begin, std::int64_t end) {
    const Formula formula(coefficients.data());
    const void* grad = std::get<1>(tensor);
    const auto codes = Codes<kMoments>::from(tensor, begin, std::make_index_sequence<kMoments>());
    with_type(std::get<0>(tensor), dtype, [&](auto* param) {
      auto* p = param + begin;
      const auto* g = static_cast<decltype(p)>(const_cast<void*>(grad)) + begin;
      std::int64_t i = 0, count = end - begin;
      for (; i + kStateBlock <= count; i += kStateBlock) step_block(p + i, g + i, codes.at(i), formula);
      if (i < count) step_short_block(p + i, g + i, codes.at(i), count - i, formula);
    });
  });
}

}  // namespace peftk::PEFTK_TIER
