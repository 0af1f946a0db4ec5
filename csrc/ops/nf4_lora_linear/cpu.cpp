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

}  // namespace

void nf4_lora_linear(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                     std::int64_t n, std::int64_t k, std::int64_t block_size, int quant_type, const void* x,
                     std::int64_t x_stride, std::int64_t m, int dtype, const void* z, std::int64_t z_stride, const void* a,
                     int a_dtype, const void* b, int b_dtype, std::int64_t r, float scale, const void* bias,
                     std::uint32_t drop_below, float keep_scale, std::uint64_t seed, void* y, void* s, int threads) {
  const Base4 w(make_matrix4(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type));
  const Branch branch{{a, a_dtype, k}, {b, b_dtype, r}, r, scale, {drop_below, keep_scale, seed}};
  with_type(x, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    const Activations<T> given{rows, x_stride}, input{static_cast<const T*>(z), z_stride};
    low_rank_forward(w, given, m, z ? input : given, branch, static_cast<const T*>(bias), static_cast<T*>(y), static_cast<T*>(s),
                     threads);
  });
}

void nf4_lora_linear_backward(const std::uint8_t* packed, const void* absmax, const float* absmax_scale,
                              const float* absmax_offset, std::int64_t n, std::int64_t k, std::int64_t block_size, int quant_type,
                              const void* dy, std::int64_t dy_stride, std::int64_t m, int dtype, const void* z,
                              std::int64_t z_stride, const void* s, const void* a, int a_dtype, const void* b, int b_dtype,
                              std::int64_t r, float scale, std::uint32_t drop_below, float keep_scale, std::uint64_t seed,
                              int z_is_x, void* dx, void* dz, void* da, void* db, int threads) {
  const Base4 w(make_matrix4(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type));
  const Branch branch{{a, a_dtype, k}, {b, b_dtype, r}, r, scale, {drop_below, keep_scale, seed}};
  with_type(dy, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    const Gradients<T> out{static_cast<T*>(dx), static_cast<T*>(dz), z_is_x != 0, da, db};
    const Activations<T> given{rows, dy_stride}, input{static_cast<const T*>(z), z_stride};
    low_rank_backward(w, given, m, input, static_cast<const T*>(s), branch, out, threads);
  });
}

}  // namespace peftk::PEFTK_TIER
