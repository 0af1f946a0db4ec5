// Panels of W^T (forward: 48 rows of W, turned by square transposes) or of W (backward: 48 of its columns) are decoded into the
// second-level cache and multiplied with a block of packed rows at a time.
#include "cpu/few_rows.h"
#include "cpu/panel4.h"
#include "cpu/product.h"
#include "ops/nf4_linear/op.h"

namespace peftk::PEFTK_TIER {
namespace {

template <class T>
void few_forward(const Matrix4& w, const T* x, std::int64_t stride, std::int64_t m, const T* bias, T* y, int threads) {
  few_product(w, x, stride, m, threads, [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
    store_sums(y + i * w.rows + row, sums, count, bias ? bias + row : nullptr);
  });
}

template <class T>
void forward(const Matrix4& w, const T* x, std::int64_t stride, std::int64_t m, const T* bias, T* y, int threads) {
  using Cell = CellOf<T>;
  if (m == 0) return;
  if (few_fits<T>(w, m)) return few_forward(w, x, stride, m, bias, y, threads);
  const std::int64_t block = row_block<Cell>(m, w.k);
  const Scratch packed(sizeof(std::uint32_t) * static_cast<std::size_t>(left_cells<Cell>(block, w.k)));
  auto* const left = packed.as<std::uint32_t>();
  for (std::int64_t first = 0; first < m; first += block) {
    const std::int64_t count = std::min(m - first, block);
    pack_all<Cell>(DenseRows<T>{x, stride}, first, count, w.k, left, threads);
    const auto finish = [&](const Tile& tile) {
      if (bias) add_bias(tile, bias);
      store_tile(y + first * w.rows, w.rows, tile);
    };
    product<Cell>(count, w.rows, no_factors(), factors(left, w.k, weight_rows<Cell>(w)), nothing_between(), finish, threads);
  }
}

template <class T>
void backward(const Matrix4& w, const T* dy, std::int64_t stride, std::int64_t m, T* dx, int threads) {
  using Cell = CellOf<T>;
  const std::int64_t block = row_block<Cell>(m, w.rows);
  const Scratch packed(sizeof(std::uint32_t) * static_cast<std::size_t>(left_cells<Cell>(block, w.rows)));
  auto* const left = packed.as<std::uint32_t>();
  const ColumnConstants constants(w, threads);
  for (std::int64_t first = 0; first < m; first += block) {
    const std::int64_t count = std::min(m - first, block);
    pack_all<Cell>(DenseRows<T>{dy, stride}, first, count, w.rows, left, threads);
    const auto finish = [&](const Tile& tile) { store_tile(dx + first * w.k, w.k, tile); };
    product<Cell>(count, w.k, no_factors(), factors(left, w.rows, weight_columns<Cell>(w, constants)), nothing_between(), finish,
                  threads);
  }
}

}  // namespace

void nf4_linear(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                std::int64_t n, std::int64_t k, std::int64_t block_size, int quant_type, const void* x, std::int64_t x_stride,
                std::int64_t m, int dtype, const void* bias, void* y, int threads) {
  const Matrix4 w = make_matrix4(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type);
  with_type(x, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    forward<T>(w, rows, x_stride, m, static_cast<const T*>(bias), static_cast<T*>(y), threads);
  });
}

void nf4_linear_dx(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                   std::int64_t n, std::int64_t k, std::int64_t block_size, int quant_type, const void* dy,
                   std::int64_t dy_stride, std::int64_t m, int dtype, void* dx, int threads) {
  const Matrix4 w = make_matrix4(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type);
  with_type(dy, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    backward<T>(w, rows, dy_stride, m, static_cast<T*>(dx), threads);
  });
}

}  // namespace peftk::PEFTK_TIER
