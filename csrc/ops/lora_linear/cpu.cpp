// W's panels are made of its rows as they lie; the branch beside them stands in low_rank.h. Not oneDNN's products with the branch
// added afterwards: at m=512, 4096x4096, bf16, one core of Zen 4 its two alone take 78.5 + 84 ms, this op 160.
#include "cpu/few_dense.h"
#include "cpu/low_rank.h"
#include "ops/lora_linear/op.h"

namespace peftk::PEFTK_TIER {
namespace {

// W in T, as low_rank.h wants it.
template <class T>
struct BaseDense {
  DenseRows<T> w;
  bool turned;  // w's rows are the columns of W
  std::int64_t n, k;

  template <class Cell>
  auto weight_rows() const {
    return panels<Cell>(!turned);
  }
  struct Nothing {};
  Nothing prepare_columns(int) const { return {}; }
  template <class Cell>
  auto weight_columns(Nothing) const {
    return panels<Cell>(turned);
  }
  template <class Cell>
  auto panels(bool rows_are_columns) const {
    return [this, rows_are_columns](const Span& span, std::uint32_t* panel) {
      rows_are_columns ? rows_as_columns<Cell>(w)(span, panel) : rows_as_depth<Cell>(w)(span, panel);
    };
  }
  template <class>
  static constexpr bool kHasStrips = false;
  template <class>
  bool few_fits(std::int64_t m) const {
    return m <= kFewDenseRows;
  }
  template <class Out>
  void few_product(const T* x, std::int64_t stride, std::int64_t m, int threads, Out out) const {
    turned ? few_turned_product(w, n, k, x, stride, m, threads, out) : few_dense_product(w, n, k, x, stride, m, threads, out);
  }
};

}  // namespace

void lora_linear(const void* w, std::int64_t w_stride, int w_turned, std::int64_t n, std::int64_t k, const void* x,
                 std::int64_t x_stride, std::int64_t m, int dtype, const void* z, std::int64_t z_stride, const void* a,
                 int a_dtype, const void* b, int b_dtype, std::int64_t r, float scale, const void* bias, std::uint32_t drop_below,
                 float keep_scale, std::uint64_t seed, void* y, void* s, int threads) {
  const Branch branch{{a, a_dtype, k}, {b, b_dtype, r}, r, scale, {drop_below, keep_scale, seed}};
  with_type(x, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    const BaseDense<T> base{{static_cast<const T*>(w), w_stride}, w_turned != 0, n, k};
    const Activations<T> given{rows, x_stride}, input{static_cast<const T*>(z), z_stride};
    const std::vector<Output<BaseDense<T>, T>> one{
        {base, branch, static_cast<const T*>(bias), static_cast<T*>(y), static_cast<T*>(s)}};
    low_rank_forward(one, given, m, z ? input : given, threads);
  });
}

void lora_linear_backward(const void* w, std::int64_t w_stride, int w_turned, std::int64_t n, std::int64_t k, const void* dy,
                          std::int64_t dy_stride, std::int64_t m, int dtype, const void* z, std::int64_t z_stride, const void* s,
                          const void* a, int a_dtype, const void* b, int b_dtype, std::int64_t r, float scale,
                          std::uint32_t drop_below, float keep_scale, std::uint64_t seed, int z_is_x, void* dx, void* dz,
                          void* da, void* db, int threads) {
  const Branch branch{{a, a_dtype, k}, {b, b_dtype, r}, r, scale, {drop_below, keep_scale, seed}};
  with_type(dy, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    const InputGradients<T> out{static_cast<T*>(dx), static_cast<T*>(dz), z_is_x != 0};
    const BaseDense<T> base{{static_cast<const T*>(w), w_stride}, w_turned != 0, n, k};
    const Activations<T> given{rows, dy_stride}, input{static_cast<const T*>(z), z_stride};
    const std::vector<Gradient<BaseDense<T>, T>> one{{base, branch, given, static_cast<const T*>(s), da, db}};
    low_rank_backward(one, m, input, out, threads);
  });
}

}  // namespace peftk::PEFTK_TIER
