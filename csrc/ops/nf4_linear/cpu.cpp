// Panels of W^T (forward: 48 rows of W, turned by square transposes) or of W (backward: 48 of its columns) are decoded into the
// second-level cache and multiplied with kRowBlock packed rows at a time.
#include "cpu/product.h"
#include "ops/nf4_linear/cpu_few.h"
#include "ops/nf4_linear/op.h"

namespace peftk::PEFTK_TIER {
namespace {

constexpr std::int64_t kRowBlock = 512;  // rows packed at once: 4 MB at k = 4096 in bf16; W is decoded once for each block

// Right side of the forward product: rows of W are columns, so a strip's constants are one run.
template <class Cell>
auto rows_of(const Matrix4& w) {
  return [&w](const Span& span, std::uint32_t* panel) {
    const std::int64_t first = w.blocks_before(span.col), last = w.blocks_until(span.col + span.cols);
    if (!w.absmax.scales) {
      panel_along<Cell>(Rows4<const float*>(w, static_cast<const float*>(w.absmax.values)), span, panel);
      return;
    }
    const Scratch constants(sizeof(float) * static_cast<std::size_t>(last - first));
    decode_constants(w.absmax, first, last, constants.as<float>());
    panel_along<Cell>(Rows4<const float*>(w, constants.as<float>() - first), span, panel);
  };
}

// Right side of the backward product: steps of the depth are rows of W.
template <class Cell>
auto columns_of(const Matrix4& w) {
  return [&w](const Span& span, std::uint32_t* panel) {
    with_vectors(span.vectors,
                 [&](auto vectors) { panel_across<Cell, decltype(vectors)::value>(Rows4<Absmax>(w, w.absmax), span, panel); });
  };
}

template <class T>
void add_bias(const Tile& tile, const T* bias) {
  for (int i = 0; i < tile.rows; i++)
    for (int j = 0; j < tile.cols; j += kLanes) {
      F32 few;
      DenseRows<T>{bias, 0}.template read<1>(0, tile.col + j, lanes_left(tile.cols - j, 0), &few);
      float* const sums = tile.sums + i * tile.stride + j;
      store(sums, load(sums) + few);
    }
}

template <class T>
void few_forward(const Matrix4& w, const T* x, std::int64_t stride, std::int64_t m, const T* bias, T* y, int threads) {
  const std::int64_t wide_stride = (w.k + kLanes - 1) / kLanes * kLanes;
  const Scratch memory(sizeof(float) * static_cast<std::size_t>(m * wide_stride));
  float* const wide = memory.as<float>();
  for (std::int64_t i = 0; i < m; i++)
    for (std::int64_t j = 0; j < w.k; j += kLanes) {
      F32 v;
      DenseRows<T>{x, stride}.template read<1>(i, j, static_cast<int>(std::min<std::int64_t>(w.k - j, kLanes)), &v);
      store(wide + i * wide_stride + j, v);
    }
  const auto out = [&](std::int64_t row, int i, float sum) {
    F32 b = broadcast(0.0f);
    if (bias) DenseRows<T>{bias, 0}.template read<1>(0, row, 1, &b);
    float lanes[kLanes];
    store(lanes, b + broadcast(sum));
    store_row(y + i * w.rows + row, lanes, 1);
  };
  switch (m) {
    case 1: return few_rows<1>(w, wide, wide_stride, threads, out);
    case 2: return few_rows<2>(w, wide, wide_stride, threads, out);
    case 3: return few_rows<3>(w, wide, wide_stride, threads, out);
    default: return few_rows<4>(w, wide, wide_stride, threads, out);
  }
}

template <class T>
void forward(const Matrix4& w, const T* x, std::int64_t stride, std::int64_t m, const T* bias, T* y, int threads) {
  using Cell = CellOf<T>;
  if (m <= kFewRows) return m ? few_forward(w, x, stride, m, bias, y, threads) : void();
  const Scratch packed(sizeof(std::uint32_t) * static_cast<std::size_t>(left_cells<Cell>(std::min(m, kRowBlock), w.k)));
  auto* const left = packed.as<std::uint32_t>();
  for (std::int64_t first = 0; first < m; first += kRowBlock) {
    const std::int64_t count = std::min(m - first, kRowBlock);
    pack_all<Cell>(DenseRows<T>{x, stride}, first, count, w.k, left, threads);
    const auto finish = [&](const Tile& tile) {
      if (bias) add_bias(tile, bias);
      for (int i = 0; i < tile.rows; i++)
        store_row(y + (first + tile.row + i) * w.rows + tile.col, tile.sums + i * tile.stride, tile.cols);
    };
    product<Cell>(count, w.rows, no_factors(), factors(left, w.k, rows_of<Cell>(w)), nothing_between(), finish, threads);
  }
}

template <class T>
void backward(const Matrix4& w, const T* dy, std::int64_t stride, std::int64_t m, T* dx, int threads) {
  using Cell = CellOf<T>;
  const Scratch packed(sizeof(std::uint32_t) * static_cast<std::size_t>(left_cells<Cell>(std::min(m, kRowBlock), w.rows)));
  auto* const left = packed.as<std::uint32_t>();
  for (std::int64_t first = 0; first < m; first += kRowBlock) {
    const std::int64_t count = std::min(m - first, kRowBlock);
    pack_all<Cell>(DenseRows<T>{dy, stride}, first, count, w.rows, left, threads);
    const auto finish = [&](const Tile& tile) {
      for (int i = 0; i < tile.rows; i++)
        store_row(dx + (first + tile.row + i) * w.k + tile.col, tile.sums + i * tile.stride, tile.cols);
    };
    product<Cell>(count, w.k, no_factors(), factors(left, w.rows, columns_of<Cell>(w)), nothing_between(), finish, threads);
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
