// peftk/ops/adamw_step/__init__.py has the formula. Every operation rounds on its own, so that all tiers agree bit for bit.
#include "cpu/optimizer_step.h"
#include "ops/adamw_step/op.h"

namespace peftk::PEFTK_TIER {
namespace {

struct AdamW {
  static constexpr int kMoments = 2, kCoefficients = kAdamCoefficients;
  static constexpr bool kSigned[] = {true, false};
  F32 grad_factor, decay, weight1, beta2, weight2, step_size, root_factor, eps;

  explicit AdamW(const float* c)
      : grad_factor(broadcast(c[0])),
        decay(broadcast(c[1])),
        weight1(broadcast(c[2])),
        beta2(broadcast(c[3])),
        weight2(broadcast(c[4])),
        step_size(broadcast(c[5])),
        root_factor(broadcast(c[6])),
        eps(broadcast(c[7])) {}

  F32 operator()(F32 param, F32 grad, F32 (&moments)[kMoments]) const {
    auto& [m, v] = moments;
    const F32 g = grad * grad_factor;
    m = m + (g - m) * weight1;
    v = v * beta2 + (g * weight2) * g;
    const F32 denominator = square_root(v) * root_factor + eps;
    return param * decay - (m * step_size) / denominator;
  }
};

}  // namespace

void adamw_step(const std::vector<AdamTensor>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  optimizer_step<AdamW>(tensors, dtype, coefficients, threads);
}

void adamw_step8(const std::vector<AdamTensor8>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  optimizer_step8<AdamW>(tensors, dtype, coefficients, threads);
}

}  // namespace peftk::PEFTK_TIER
