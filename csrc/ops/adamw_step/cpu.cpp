// One pass over parameters, gradients and moments: peftk/ops/adamw_step/__init__.py has the formula. Every operation rounds on
// its own, so that all tiers agree bit for bit. In 8 bits a block's new moments wait in the first-level cache for their absmax.
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "format/dynamic8.h"
#include "ops/adamw_step/op.h"

namespace peftk::PEFTK_TIER {
namespace {

constexpr int kBlock = kStateBlock;
constexpr std::int64_t kWorkPerElement = 16;  // in multiplications, for threads_worth

struct Coefficients {
  F32 grad_factor, decay, weight1, beta2, weight2, step_size, root_factor, eps;

  explicit Coefficients(const float* c)
      : grad_factor(broadcast(c[0])),
        decay(broadcast(c[1])),
        weight1(broadcast(c[2])),
        beta2(broadcast(c[3])),
        weight2(broadcast(c[4])),
        step_size(broadcast(c[5])),
        root_factor(broadcast(c[6])),
        eps(broadcast(c[7])) {}
};

// The new parameter; m and v become the new moments.
inline F32 updated(F32 param, F32 grad, F32& m, F32& v, const Coefficients& c) {
  const F32 g = grad * c.grad_factor;
  m = m + (g - m) * c.weight1;
  v = v * c.beta2 + (g * c.weight2) * g;
  const F32 denominator = square_root(v) * c.root_factor + c.eps;
  return param * c.decay - (m * c.step_size) / denominator;
}

// body(tensor, begin, end): elements [begin, end) of one tensor, begin at a block's start. Threads share the blocks of all
// tensors evenly, however many tensors there are.
template <class Tensor, class Body>
void for_each_range(const std::vector<Tensor>& tensors, int threads, Body&& body) {
  const auto count_of = [](const Tensor& t) { return std::get<std::tuple_size_v<Tensor> - 1>(t); };
  const auto blocks_of = [&](const Tensor& t) { return (count_of(t) + kBlock - 1) / kBlock; };
  std::int64_t blocks = 0;
  for (const Tensor& tensor : tensors) blocks += blocks_of(tensor);
  parallel_for(blocks, threads_worth(blocks * kBlock * kWorkPerElement, threads), [&](std::int64_t begin, std::int64_t end) {
    std::int64_t first = 0;  // block of the tensor at hand, of all
    for (const Tensor& tensor : tensors) {
      const std::int64_t last = first + blocks_of(tensor), from = begin > first ? begin : first, to = end < last ? end : last;
      const std::int64_t stop = (to - first) * kBlock;
      if (from < to) body(tensor, (from - first) * kBlock, stop < count_of(tensor) ? stop : count_of(tensor));
      first = last;
    }
  });
}

template <class T>
inline void step_vector(T* p, const T* g, float* m, float* v, const Coefficients& c) {
  F32 first = load(m), second = load(v);
  store(p, updated(load(p), load(g), first, second, c));
  store(m, first);
  store(v, second);
}

template <class T>
void step_range(T* p, const T* g, float* m, float* v, std::int64_t count, const Coefficients& c) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) step_vector(p + i, g + i, m + i, v + i, c);
  const std::int64_t rest = count - i;
  if (!rest) return;
  T few_p[kLanes] = {}, few_g[kLanes] = {};
  float few_m[kLanes] = {}, few_v[kLanes] = {};
  const auto each = [&](auto&& copy) { copy(few_p, p + i), copy(few_m, m + i), copy(few_v, v + i); };
  std::memcpy(few_g, g + i, sizeof(T) * rest);
  each([&](auto* here, auto* there) { std::memcpy(here, there, sizeof(*here) * rest); });
  step_vector(few_p, few_g, few_m, few_v, c);
  each([&](auto* here, auto* there) { std::memcpy(there, here, sizeof(*here) * rest); });
}

// The codes of kBlock new moments, and their absmax from its bits; nothing above the denormals is zeros.
inline void encode(const float* x, std::uint32_t absmax_bits, const Code8& code, std::uint8_t* codes, float* absmax) {
  if (absmax_bits < 0x00800000u) {
    *absmax = 0.0f;
    std::memset(codes, code.zero, kBlock);
    return;
  }
  if (absmax_bits > 0x7f800000u) absmax_bits = 0x7fc00000u;
  std::memcpy(absmax, &absmax_bits, 4);
  const F32 reciprocal = broadcast(1.0f / *absmax);
  for (int i = 0; i < kBlock; i += kLanes) store_bytes(codes + i, rank256(code.threshold, load(x + i) * reciprocal));
}

template <class T>
void step_block(T* p, const T* g, std::uint8_t* state1, std::uint8_t* state2, float* absmax1, float* absmax2,
                const Coefficients& c) {
  const Code8 &code1 = code8(true), &code2 = code8(false);
  const F32 scale1 = broadcast(*absmax1), scale2 = broadcast(*absmax2);
  alignas(64) float new_m[kBlock], new_v[kBlock];
  U32 most1 = zero_bits(), most2 = zero_bits();
  for (int i = 0; i < kBlock; i += kLanes) {
    F32 m = lookup256(code1.value, state1 + i) * scale1, v = lookup256(code2.value, state2 + i) * scale2;
    store(p + i, updated(load(p + i), load(g + i), m, v, c));
    most1 = max_magnitude_bits(most1, m), most2 = max_magnitude_bits(most2, v);
    store(new_m + i, m), store(new_v + i, v);
  }
  encode(new_m, reduce_max(most1), code1, state1, absmax1);
  encode(new_v, reduce_max(most2), code2, state2, absmax2);
}

// A short last block is completed with zeros, which change neither its absmax nor the codes of the others.
template <class T>
void step_short_block(T* p, const T* g, std::uint8_t* state1, std::uint8_t* state2, float* absmax1, float* absmax2,
                      std::int64_t count, const Coefficients& c) {
  T whole_p[kBlock] = {}, whole_g[kBlock] = {};
  std::uint8_t whole1[kBlock], whole2[kBlock];
  std::memset(whole1, code8(true).zero, kBlock), std::memset(whole2, code8(false).zero, kBlock);
  const auto each = [&](auto&& copy) { copy(whole_p, p), copy(whole1, state1), copy(whole2, state2); };
  std::memcpy(whole_g, g, sizeof(T) * count);
  each([&](auto* here, auto* there) { std::memcpy(here, there, sizeof(*here) * count); });
  step_block(whole_p, whole_g, whole1, whole2, absmax1, absmax2, c);
  each([&](auto* here, auto* there) { std::memcpy(there, here, sizeof(*here) * count); });
}

void check(const std::vector<float>& coefficients) {
  if (coefficients.size() != kAdamCoefficients)
    refuse("coefficients: expected 8 numbers", static_cast<long>(coefficients.size()));
}

}  // namespace

void adamw_step(const std::vector<AdamTensor>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  check(coefficients);
  for_each_range(tensors, threads, [&](const AdamTensor& tensor, std::int64_t begin, std::int64_t end) {
    const auto& [param, grad, exp_avg, exp_avg_sq, count] = tensor;
    const Coefficients c(coefficients.data());
    float *m = exp_avg, *v = exp_avg_sq;
    const void* gradient = grad;
    with_type(param, dtype, [&](auto* p) {
      const auto* g = static_cast<decltype(p)>(const_cast<void*>(gradient));
      step_range(p + begin, g + begin, m + begin, v + begin, end - begin, c);
    });
  });
}

void adamw_step8(const std::vector<AdamTensor8>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  check(coefficients);
  for_each_range(tensors, threads, [&](const AdamTensor8& tensor, std::int64_t begin, std::int64_t end) {
    const auto [param, gradient, state1, state2, absmax1, absmax2, count] = tensor;
    const Coefficients c(coefficients.data());
    with_type(param, dtype, [&, g = gradient, s1 = state1, s2 = state2, a1 = absmax1, a2 = absmax2](auto* p) {
      const auto* grads = static_cast<decltype(p)>(const_cast<void*>(g));
      for (std::int64_t i = begin; i < end; i += kBlock) {
        float *scale1 = a1 + i / kBlock, *scale2 = a2 + i / kBlock;
        if (i + kBlock <= end)
          step_block(p + i, grads + i, s1 + i, s2 + i, scale1, scale2, c);
        else
          step_short_block(p + i, grads + i, s1 + i, s2 + i, scale1, scale2, end - i, c);
      }
    });
  });
}

}  // namespace peftk::PEFTK_TIER
