// Where vpdpbusd and the shape allow it, integer dots; elsewhere the fp32 product of the rounded operands, which is the same
// number up to the rounding of fp32, at the speed of an fp32 product.
#include "cpu/few_rows.h"
#include "cpu/panel4.h"
#include "cpu/product.h"
#include "cpu/product_int8.h"
#include "ops/nf4_linear_int8/op.h"

namespace peftk::PEFTK_TIER {
namespace {

template <class T>
void integer_dots(const Matrix4& w, const Table8& table, const T* x, std::int64_t stride, std::int64_t m, const T* bias, T* y,
                  int threads) {
#ifdef PEFTK_TIER_IS_AVX512_BF16
  product_int8(w, table, x, stride, m, threads, [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
    store_sums(y + i * w.rows + row, sums, count, bias ? bias + row : nullptr);
  });
#else
  (void)w, (void)table, (void)x, (void)stride, (void)m, (void)bias, (void)y, (void)threads;
#endif
}

// x (m, k) rounded to 8 bits, as fp32.
template <class T>
void round_rows(const T* x, std::int64_t stride, std::int64_t m, std::int64_t k, float* rounded, int threads) {
  parallel_for(m, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; i++)
      for (std::int64_t start = 0; start < k; start += kRun) {
        const int count = static_cast<int>(std::min<std::int64_t>(kRun, k - start));
        std::int8_t q[kRun];
        const float scale = quantize_run(x + i * stride + start, count, q);
        for (int j = 0; j < count; j++) rounded[i * k + start + j] = static_cast<float>(q[j]) * scale;
      }
  });
}

// y of `m` rows, m <= kRowBlock, from rounded rows and a rounded table.
template <class T>
void rounded_product(const Matrix4& w, const float* x, std::int64_t m, const T* bias, T* y, int threads) {
  using Cell = FloatCell;
  if (few_fits<float>(w, m))
    return few_product(w, x, w.k, m, threads, [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
      store_sums(y + i * w.rows + row, sums, count, bias ? bias + row : nullptr);
    });
  const Scratch packed(sizeof(std::uint32_t) * static_cast<std::size_t>(left_cells<Cell>(m, w.k)));
  auto* const left = packed.as<std::uint32_t>();
  pack_all<Cell>(DenseRows<float>{x, w.k}, 0, m, w.k, left, threads);
  const auto finish = [&](const Tile& tile) {
    if (bias) add_bias(tile, bias);
    store_tile(y, w.rows, tile);
  };
  product<Cell>(m, w.rows, no_factors(), factors(left, w.k, weight_rows<Cell>(w)), nothing_between(), finish, threads);
}

template <class T>
void forward(Matrix4 w, const Table8& table, const T* x, std::int64_t stride, std::int64_t m, const T* bias, T* y, int threads) {
  if (int8_fits(w)) {
    for (std::int64_t first = 0; first < m; first += kRowBlock)
      integer_dots(w, table, x + first * stride, stride, std::min(m - first, kRowBlock), bias, y + first * w.rows, threads);
    return;
  }
  float values[16];
  for (int code = 0; code < 16; code++) values[code] = static_cast<float>(table.value[code]) / table.scale;
  w.values = values;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(std::min(m, kRowBlock) * w.k));
  for (std::int64_t first = 0; first < m; first += kRowBlock) {
    const std::int64_t count = std::min(m - first, kRowBlock);
    round_rows(x + first * stride, stride, count, w.k, memory.as<float>(), threads);
    rounded_product(w, memory.as<float>(), count, bias, y + first * w.rows, threads);
  }
}

}  // namespace

void nf4_linear_int8(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                     std::int64_t n, std::int64_t k, std::int64_t block_size, int quant_type, const void* x,
                     std::int64_t x_stride, std::int64_t m, int dtype, const void* bias, void* y, int threads) {
  const Matrix4 w = make_matrix4(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type);
  with_type(x, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    forward<T>(w, Table8(code4(quant_type)), rows, x_stride, m, static_cast<const T*>(bias), static_cast<T*>(y), threads);
  });
}

}  // namespace peftk::PEFTK_TIER
