// peftk/ops/ademamix_step/__init__.py has the formula. Every operation rounds on its own, so that all tiers agree bit for bit.
#include "cpu/optimizer_step.h"
#include "ops/ademamix_step/op.h"

namespace peftk::PEFTK_TIER {
namespace {

struct AdEMAMix {
  static constexpr int kMoments = 3, kCoefficients = kAdEMAMixCoefficients;
  static constexpr bool kSigned[] = {true, false, true};
  F32 grad_factor, decay, weight1, beta2, weight2, weight3, step_size, slow_size, root_factor, eps;

  explicit AdEMAMix(const float* c)
      : grad_factor(broadcast(c[0])),
        decay(broadcast(c[1])),
        weight1(broadcast(c[2])),
        beta2(broadcast(c[3])),
        weight2(broadcast(c[4])),
        weight3(broadcast(c[5])),
        step_size(broadcast(c[6])),
        slow_size(broadcast(c[7])),
        root_factor(broadcast(c[8])),
        eps(broadcast(c[9])) {}

  F32 operator()(F32 param, F32 grad, F32 (&moments)[kMoments]) const {
    auto& [m, v, slow] = moments;
    const F32 g = grad * grad_factor;
    m = m + (g - m) * weight1;
    v = v * beta2 + (g * weight2) * g;
    slow = slow + (g - slow) * weight3;
    const F32 denominator = square_root(v) * root_factor + eps;
    return param * decay - (m * step_size + slow * slow_size) / denominator;
  }
};

}  // namespace

void ademamix_step(const std::vector<AdEMAMixTensor>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  optimizer_step<AdEMAMix>(tensors, dtype, coefficients, threads);
}

void ademamix_step8(const std::vector<AdEMAMixTensor8>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  optimizer_step8<AdEMAMix>(tensors, dtype, coefficients, threads);
}

}  // namespace peftk::PEFTK_TIER
