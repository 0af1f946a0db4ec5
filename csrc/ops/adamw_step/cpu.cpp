// One pass over parameters, gradients and moments: peftk/ops/adamw_step/__init__.py has the formula. Every operation rounds on
// its own, so that all tiers agree bit for bit. In 8 bits a block's new moments wait in the first-level cache for their absmax.
#include "cpu/code8.h"
#include "cpu/parallel.h"
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

// Where the 8-bit moments of a parameter lie.
struct Codes {
  std::uint8_t *state1, *state2;
  float *absmax1, *absmax2;

  Codes from(std::int64_t i) const { return {state1 + i, state2 + i, absmax1 + i / kBlock, absmax2 + i / kBlock}; }
};

inline void encode(const Nearest8& nearest, const float* x, U32 most, std::uint8_t* codes, float* absmax) {
  std::uint32_t bits = reduce_max(most);
  if (bits < 0x00800000u) bits = 0;  // nothing above the denormals
  if (bits > 0x7f800000u) bits = 0x7fc00000u;
  std::memcpy(absmax, &bits, 4);
  const F32 factor = broadcast(bits ? 1.0f / *absmax : 0.0f);
  for (int i = 0; i < kBlock; i += kGroup8) {
    F32 scaled[kGroupVectors8];
    for (int j = 0; j < kGroupVectors8; j++) scaled[j] = load(x + i + j * kLanes) * factor;
    encode8(nearest, scaled, codes + i);
  }
}

template <class T>
void step_block(T* p, const T* g, const Codes& codes, const Coefficients& c) {
  const Nearest8 &nearest1 = nearest8(true), &nearest2 = nearest8(false);
  const F32 scale1 = broadcast(*codes.absmax1), scale2 = broadcast(*codes.absmax2);
  alignas(64) float new_m[kBlock], new_v[kBlock];
  U32 most1 = zero_bits(), most2 = zero_bits();
  for (int i = 0; i < kBlock; i += kGroup8) {
    F32 m[kGroupVectors8], v[kGroupVectors8];
    decode8(*nearest1.code, codes.state1 + i, m), decode8(*nearest2.code, codes.state2 + i, v);
    for (int j = 0; j < kGroupVectors8; j++) {
      const int at = i + j * kLanes;
      m[j] = m[j] * scale1, v[j] = v[j] * scale2;
      store(p + at, updated(load(p + at), load(g + at), m[j], v[j], c));
      most1 = max_magnitude_bits(most1, m[j]), most2 = max_magnitude_bits(most2, v[j]);
      store(new_m + at, m[j]), store(new_v + at, v[j]);
    }
  }
  encode(nearest1, new_m, most1, codes.state1, codes.absmax1);
  encode(nearest2, new_v, most2, codes.state2, codes.absmax2);
}

// A short last block is completed with zeros, which change neither its absmax nor the codes of the others.
template <class T>
void step_short_block(T* p, const T* g, const Codes& codes, std::int64_t count, const Coefficients& c) {
  T whole_p[kBlock] = {}, whole_g[kBlock] = {};
  std::uint8_t whole1[kBlock], whole2[kBlock];
  std::memset(whole1, code8(true).zero, kBlock), std::memset(whole2, code8(false).zero, kBlock);
  const auto each = [&](auto&& copy) { copy(whole_p, p), copy(whole1, codes.state1), copy(whole2, codes.state2); };
  std::memcpy(whole_g, g, sizeof(T) * count);
  each([&](auto* here, auto* there) { std::memcpy(here, there, sizeof(*here) * count); });
  step_block(whole_p, whole_g, Codes{whole1, whole2, codes.absmax1, codes.absmax2}, c);
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
    const Coefficients c(coefficients.data());
    const void* grad = std::get<1>(tensor);
    float *m = std::get<2>(tensor) + begin, *v = std::get<3>(tensor) + begin;
    with_type(std::get<0>(tensor), dtype, [&](auto* p) {
      const auto* g = static_cast<decltype(p)>(const_cast<void*>(grad));
      step_range(p + begin, g + begin, m, v, end - begin, c);
    });
  });
}

void adamw_step8(const std::vector<AdamTensor8>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  check(coefficients);
  for_each_range(tensors, threads, [&](const AdamTensor8& tensor, std::int64_t begin, std::int64_t end) {
    const Coefficients c(coefficients.data());
    const void* grad = std::get<1>(tensor);
    const Codes codes = Codes{std::get<2>(tensor), std::get<3>(tensor), std::get<4>(tensor), std::get<5>(tensor)}.from(begin);
    with_type(std::get<0>(tensor), dtype, [&](auto* param) {
      auto* p = param + begin;
      const auto* g = static_cast<decltype(p)>(const_cast<void*>(grad)) + begin;
      std::int64_t i = 0, count = end - begin;
      for (; i + kBlock <= count; i += kBlock) step_block(p + i, g + i, codes.from(i), c);
      if (i < count) step_short_block(p + i, g + i, codes.from(i), count - i, c);
    });
  });
}

}  // namespace peftk::PEFTK_TIER
