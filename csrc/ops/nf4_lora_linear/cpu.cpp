// W's panels are decoded as in nf4_linear; the branch beside them stands in low_rank.h.
#include "cpu/few_rows.h"
#include "cpu/low_rank.h"
#include "ops/nf4_lora_linear/op.h"

namespace peftk::PEFTK_TIER {
namespace {

// W in 4 bits, as low_rank.h wants it.
struct Base4 {
  Matrix4 w;
  std::int64_t n, k;
  explicit Base4(const Matrix4& matrix) : w(matrix), n(matrix.rows), k(matrix.k) {}

  template <class Cell>
  auto weight_rows() const {
    return PEFTK_TIER::weight_rows<Cell>(w);
  }
  template <class Cell>
  auto weight_columns(const ColumnConstants& constants) const {
    return PEFTK_TIER::weight_columns<Cell>(w, constants);
  }
  ColumnConstants prepare_columns(int threads) const { return {w, threads}; }
  template <class T>
  bool few_fits(std::int64_t m) const {
    return m <= kFewRows;
  }
  template <class T, class Out>
  void few_product(const T* x, std::int64_t stride, std::int64_t m, int threads, Out out) const {
    PEFTK_TIER::few_product(w, x, stride, m, threads, out);
  }
#ifdef PEFTK_TIER_IS_AVX512_BF16
  template <class T>
  static constexpr bool kHasStrips = std::is_same_v<T, Bf16>;
  bool strips_fit(std::int64_t m) const { return few_bf16_fits(w, m); }
  template <class T, class Start, class Out>
  void strips_product(const T* x, std::int64_t stride, std::int64_t m, int threads, Start start, Out out) const {
    strips_bf16(w, x, stride, m, threads, start, out);
  }
#else
  template <class>
  static constexpr bool kHasStrips = false;
#endif
};

Branch make_branch(const LowRank& given, std::int64_t k) {
  const auto& [a, a_dtype, b, b_dtype, r, scale, drop_below, keep_scale, seed] = given;
  return {{a, a_dtype, k}, {b, b_dtype, r}, r, scale, {drop_below, keep_scale, seed}};
}

}  // namespace

void nf4_lora_linear(const std::vector<std::tuple<Weight4, LowRank, const void*, void*, void*>>& outputs, std::int64_t k,
                     const void* x, std::int64_t x_stride, std::int64_t m, int dtype, const void* z, std::int64_t z_stride,
                     int threads) {
  with_type(x, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    std::vector<Output<Base4, T>> all;
    for (const auto& [weight, branch, bias, y, s] : outputs)
      all.push_back({Base4(make_matrix4(weight, k)), make_branch(branch, k), static_cast<const T*>(bias), static_cast<T*>(y),
                     static_cast<T*>(s)});
    const Activations<T> given{rows, x_stride}, input{static_cast<const T*>(z), z_stride};
    low_rank_forward(all, given, m, z ? input : given, threads);
  });
}

void nf4_lora_linear_backward(
    const std::vector<std::tuple<Weight4, LowRank, const void*, std::int64_t, const void*, void*, void*>>& gradients,
    std::int64_t k, std::int64_t m, int dtype, const void* z, std::int64_t z_stride, int z_is_x, void* dx, void* dz,
    int threads) {
  with_type(z, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    std::vector<Gradient<Base4, T>> all;
    for (const auto& [weight, branch, dy, dy_stride, s, da, db] : gradients)
      all.push_back({Base4(make_matrix4(weight, k)),
                     make_branch(branch, k),
                     {static_cast<const T*>(dy), dy_stride},
                     static_cast<const T*>(s),
                     da,
                     db});
    const InputGradients<T> out{static_cast<T*>(dx), static_cast<T*>(dz), z_is_x != 0};
    low_rank_backward(all, m, Activations<T>{rows, z_stride}, out, threads);
  });
}

}  // namespace peftk::PEFTK_TIER
