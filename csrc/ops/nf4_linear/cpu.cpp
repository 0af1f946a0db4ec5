// Panels of W^T (forward: 48 rows of W, turned by square transposes) or of W (backward: 48 of its columns) are decoded into the
// second-level cache and multiplied with a block of packed rows at a time.
#include <deque>

#include "cpu/few_rows.h"
#include "cpu/panel4.h"
#include "cpu/product.h"
#include "cpu/stack.h"
#include "ops/nf4_linear/op.h"

namespace peftk::PEFTK_TIER {
namespace {

template <class T>
void few_forward(const Matrix4& w, const T* x, std::int64_t stride, std::int64_t m, const T* bias, T* y, int threads) {
  few_product(w, x, stride, m, threads_worth(m * w.rows * w.k, threads),
              [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
                store_sums(y + i * w.rows + row, sums, count, bias ? bias + row : nullptr);
              });
}

template <class T>
struct Output {
  Matrix4 w;
  const T* bias;
  T* y;
};

// Every output of the one x, which is packed once for those that panels serve.
template <class T>
void forward(const Output<T>* outputs, std::size_t many, const T* x, std::int64_t stride, std::int64_t m, std::int64_t k,
             int threads) {
  using Cell = CellOf<T>;
  if (m == 0) return;
  std::size_t in_panels = 0;
  for (std::size_t i = 0; i < many; i++) {
    const Output<T>& o = outputs[i];
    few_fits<T>(o.w, m) ? few_forward(o.w, x, stride, m, o.bias, o.y, threads) : void(in_panels++);
  }
  if (in_panels == 0) return;
  const std::int64_t block = row_block<Cell>(m, k);
  const Scratch packed(sizeof(std::uint32_t) * static_cast<std::size_t>(left_cells<Cell>(block, k)));
  auto* const left = packed.as<std::uint32_t>();
  for (std::int64_t first = 0; first < m; first += block) {
    const std::int64_t count = std::min(m - first, block);
    pack_all<Cell>(DenseRows<T>{x, stride}, first, count, k, left, threads);
    for (const Output<T>* o = outputs; o < outputs + many; o++) {
      if (few_fits<T>(o->w, m)) continue;
      const std::int64_t n = o->w.rows;
      const auto finish = [&](const Tile& tile) {
        if (o->bias) add_bias(tile, o->bias);
        store_tile(o->y + first * n, n, tile);
      };
      product<Cell>(count, n, no_factors(), factors(left, k, weight_rows<Cell>(o->w)), nothing_between(), finish, threads);
    }
  }
}

template <class T>
struct Gradient {  // of an output
  Matrix4 w;
  const T* dy;
  std::int64_t stride;
};

// dx = sum of dy W: a panel of columns of all weights, a left side of all dy.
template <class T>
void backward(const std::vector<Gradient<T>>& gradients, std::int64_t m, std::int64_t k, T* dx, int threads) {
  using Cell = CellOf<T>;
  std::deque<ColumnConstants> constants;
  Stack<Cell, WeightColumns<Cell>> weights;
  for (const auto& g : gradients) weights.add(g.w.rows, weight_columns<Cell>(g.w, constants.emplace_back(g.w, threads)));
  const std::int64_t block = row_block<Cell>(m, weights.depth());
  const Scratch packed(sizeof(std::uint32_t) * static_cast<std::size_t>(left_cells<Cell>(block, weights.depth())));
  auto* const left = packed.as<std::uint32_t>();
  for (std::int64_t first = 0; first < m; first += block) {
    const std::int64_t count = std::min(m - first, block);
    for (std::size_t i = 0; i < gradients.size(); i++) {
      const Gradient<T>& g = gradients[i];
      pack_all<Cell>(DenseRows<T>{g.dy, g.stride}, first, count, g.w.rows, weights.left_of(i, left), threads, weights.steps());
    }
    const auto finish = [&](const Tile& tile) { store_tile(dx + first * k, k, tile); };
    product<Cell>(count, k, no_factors(), factors(left, weights.depth(), weights), nothing_between(), finish, threads);
  }
}

}  // namespace

void nf4_linear(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                std::int64_t n, std::int64_t k, std::int64_t block_size, int quant_type, const void* x, std::int64_t x_stride,
                std::int64_t m, int dtype, const void* bias, void* y, int threads) {
  const Matrix4 w = make_matrix4(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type);
  with_type(x, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    const Output<T> output{w, static_cast<const T*>(bias), static_cast<T*>(y)};
    forward(&output, 1, rows, x_stride, m, k, threads);
  });
}

void nf4_linear_many(const std::vector<std::tuple<Weight4, const void*, void*>>& outputs, std::int64_t k, const void* x,
                     std::int64_t x_stride, std::int64_t m, int dtype, int threads) {
  with_type(x, dtype, [&](const auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    std::vector<Output<T>> all;
    for (const auto& [weight, bias, y] : outputs)
      all.push_back({make_matrix4(weight, k), static_cast<const T*>(bias), static_cast<T*>(y)});
    forward(all.data(), all.size(), rows, x_stride, m, k, threads);
  });
}

void nf4_linear_dx(const std::vector<std::tuple<Weight4, const void*, std::int64_t>>& gradients, std::int64_t k, std::int64_t m,
                   int dtype, void* dx, int threads) {
  with_type(dx, dtype, [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    std::vector<Gradient<T>> all;
    for (const auto& [weight, dy, stride] : gradients)
      all.push_back({make_matrix4(weight, k), static_cast<const T*>(dy), stride});
    backward(all, m, k, out, threads);
  });
}

}  // namespace peftk::PEFTK_TIER
