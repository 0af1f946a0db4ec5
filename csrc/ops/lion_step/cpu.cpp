// peftk/ops/lion_step/__init__.py has the formula. Every operation rounds on its own, so that all tiers agree bit for bit.
#include "cpu/optimizer_step.h"
#include "ops/lion_step/op.h"

namespace peftk::PEFTK_TIER {
namespace {

struct Lion {
  static constexpr int kMoments = 1, kCoefficients = kLionCoefficients;
  static constexpr bool kSigned[] = {true};
  F32 grad_factor, decay, beta1, weight1, beta2, weight2, lr;

  explicit Lion(const float* c)
      : grad_factor(broadcast(c[0])),
        decay(broadcast(c[1])),
        beta1(broadcast(c[2])),
        weight1(broadcast(c[3])),
        beta2(broadcast(c[4])),
        weight2(broadcast(c[5])),
        lr(broadcast(c[6])) {}

  F32 operator()(F32 param, F32 grad, F32 (&moments)[kMoments]) const {
    F32& m = moments[0];
    const F32 g = grad * grad_factor, direction = sign(m * beta1 + g * weight1);
    m = m * beta2 + g * weight2;
    return param * decay - direction * lr;
  }
};

}  // namespace

void lion_step(const std::vector<LionTensor>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  optimizer_step<Lion>(tensors, dtype, coefficients, threads);
}

void lion_step8(const std::vector<LionTensor8>& tensors, int dtype, const std::vector<float>& coefficients, int threads) {
  optimizer_step8<Lion>(tensors, dtype, coefficients, threads);
}

}  // namespace peftk::PEFTK_TIER
