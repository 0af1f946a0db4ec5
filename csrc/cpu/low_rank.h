// A low-rank branch beside a base product, forward and backward: y = x W^T + bias + scale D(z) A^T B^T. The branch rides on the
// base product: its sums start from s S B^T (forward) or D(T A) (backward), a few steps of the depth more. Nothing of W's size,
// no mask and no copy of D(z) is kept; what is made again is made in the packing of a panel. Knows no op. A base provides
//   n, k                                      the shape of W
//   weight_rows<Cell>()                       W^T: panels of rows of W, the depth is k
//   prepare_columns(threads)                  what all panels of columns share
//   weight_columns<Cell>(prepared)            W: panels of columns of W, the depth is n
//   few_fits<T>(m)                            whether few_product is the way for m rows of x
//   few_product(x, stride, m, threads, out)   out(first row of W, rows of W, row of x, their sums) for all of them
//   kHasStrips<T>; strips_fit(m)              whether strips_product(x, stride, m, threads, start, out) is the way
#pragma once
#include <algorithm>

#include "cpu/dropout.h"
#include "cpu/panel4.h"  // rows_as_columns, rows_as_depth
#include "cpu/product.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace peftk::PEFTK_TIER {

// A or B: rows of any of the three types.
struct FactorRows {
  const void* data;
  int dtype;
  std::int64_t stride;

  bool aligned() const { return true; }
  template <int N>
  void read(std::int64_t row, std::int64_t position, int count, F32* v) const {
    with_type(data, dtype, [&](const auto* p) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
      DenseRows<T>{p, stride}.template read<N>(row, position, count, v);
    });
  }
  template <int N>
  void read_whole(std::int64_t row, std::int64_t position, F32* v) const {
    read<N>(row, position, N * kLanes, v);
  }
};

struct Branch {
  FactorRows a, b;
  std::int64_t r;
  float scale;
  Dropout dropout;
};

template <class T>
struct Activations {  // (m, columns)
  const T* data;
  std::int64_t stride;
};

template <class Cell>
Scratch cells_for(std::int64_t rows, std::int64_t depth) {
  return Scratch(sizeof(std::uint32_t) * static_cast<std::size_t>(left_cells<Cell>(rows, depth)));
}
inline Scratch floats_for(std::int64_t count) { return Scratch(sizeof(float) * static_cast<std::size_t>(count)); }

// Calls body with z's rows, dropped out or plain.
template <class T, class Body>
void with_branch_input(const Activations<T>& z, const KeepBits& keep, Body body) {
  const DenseRows<T> plain{z.data, z.stride};
  if (keep.all_stay())
    body(plain);
  else
    body(DroppedRows<DenseRows<T>>{plain, keep});
}

inline void drop_tile(const Tile& tile, std::int64_t first_row, const KeepBits& keep) {
  for (int i = 0; i < tile.rows; i++) {
    float* const sums = tile.sums + i * tile.stride;
    for (int j = 0; j < tile.cols; j += kLanes) {
      const auto bits = static_cast<std::uint32_t>(keep.bits(first_row + tile.row + i, tile.col + j));
      store(sums + j, where(bits, load(sums + j) * broadcast(keep.scale())));
    }
  }
}

inline void scale_tile(const Tile& tile, float scale) {
  for (int i = 0; i < tile.rows * tile.stride; i += kLanes) store(tile.sums + i, load(tile.sums + i) * broadcast(scale));
}

// S of the rows [first, first + count): fp32 to `wide` (count, r) and T to `kept` (m, r). `left` is left with D(z)'s cells.
template <class Cell, class T>
void low_rank_input(const Activations<T>& z, const KeepBits& keep, const Branch& branch, std::int64_t k, std::int64_t first,
                    std::int64_t count, std::uint32_t* left, float* wide, T* kept, int threads) {
  with_branch_input(z, keep, [&](const auto& rows) { pack_all<Cell>(rows, first, count, k, left, threads); });
  const auto finish = [&](const Tile& tile) {
    if (!keep.all_stay()) scale_tile(tile, keep.scale());
    store_tile(wide, branch.r, tile);
    store_tile(kept + first * branch.r, branch.r, tile);
  };
  product<Cell>(count, branch.r, no_factors(), factors(left, k, rows_as_columns<Cell>(branch.a)), nothing_between(), finish,
                threads);
}

// The same for kFewRows rows or fewer: lanes along k. In fp64, since dB is no better than these few sums.
template <class T>
void few_low_rank_input(const Activations<T>& z, const Branch& branch, std::int64_t k, std::int64_t m, float* wide, T* kept,
                        int threads) {
  const KeepBits keep(branch.dropout, m, k, threads);
  const auto dot = [&](const auto& rows, std::int64_t i, std::int64_t j) {
    double sum[kLanes] = {};
    for (std::int64_t position = 0; position < k; position += kLanes) {
      const int here = static_cast<int>(std::min<std::int64_t>(k - position, kLanes));
      F32 value, factor;
      float values[kLanes], factors[kLanes];
      rows.template read<1>(i, position, here, &value);
      branch.a.read<1>(j, position, here, &factor);
      store(values, value);
      store(factors, factor);
      for (int lane = 0; lane < kLanes; lane++) sum[lane] += static_cast<double>(values[lane]) * factors[lane];
    }
    double all = 0.0;
    for (double lane : sum) all += lane;
    return static_cast<float>(all);
  };
  with_branch_input(z, keep, [&](const auto& rows) {
    parallel_for(branch.r, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t j = begin; j < end; j++)
        for (std::int64_t i = 0; i < m; i++) {
          wide[i * branch.r + j] = keep.scale() * dot(rows, i, j);
          kept[i * branch.r + j] = narrow<T>(wide[i * branch.r + j]);
        }
    });
  });
}

template <class Base, class T>
void few_forward(const Base& base, const Activations<T>& x, std::int64_t m, const Activations<T>& z, const Branch& branch,
                 const T* bias, T* y, T* kept, int threads) {
  const Scratch memory = floats_for(m * branch.r);
  float* const s = memory.as<float>();
  few_low_rank_input(z, branch, base.k, m, s, kept, threads);
  base.few_product(x.data, x.stride, m, threads, [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
    float low[kLanes] = {};
    for (int lane = 0; lane < count; lane++) {
      F32 dot = broadcast(0.0f);
      for (std::int64_t j = 0; j < branch.r; j += kLanes) {
        F32 b, f;
        const int here = static_cast<int>(std::min<std::int64_t>(branch.r - j, kLanes));
        branch.b.read<1>(row + lane, j, here, &b);
        DenseRows<float>{s, branch.r}.read<1>(i, j, here, &f);
        dot = multiply_add(b, f, dot);
      }
      low[lane] = reduce_sum(dot);
    }
    store_sums(y + i * base.n + row, multiply_add(broadcast(branch.scale), load(low), sums), count, bias ? bias + row : nullptr);
  });
}

// The same where lanes are rows of W: the sums of a strip start from the branch.
template <class Base, class T>
void strips_forward(const Base& base, const Activations<T>& x, std::int64_t m, const Activations<T>& z, const Branch& branch,
                    const T* bias, T* y, T* kept, int threads) {
  using Cell = CellOf<T>;
  const Scratch left = cells_for<Cell>(m, base.k), wide = floats_for(m * branch.r);
  const KeepBits keep(branch.dropout, m, base.k, threads);
  low_rank_input<Cell>(z, keep, branch, base.k, 0, m, left.as<std::uint32_t>(), wide.as<float>(), kept, threads);
  const auto start = [&](std::int64_t row, int count, F32* sums) {
    const Scratch turned = floats_for(branch.r * kLanes);  // [r][kLanes rows of B]
    lanes_along<FloatCell>(branch.b, row, count, 0, branch.r, kLanes, turned.as<std::uint32_t>());
    for (std::int64_t i = 0; i < m; i++)
      for (std::int64_t j = 0; j < branch.r; j++)
        sums[i] = multiply_add(load(turned.as<float>() + j * kLanes),
                               broadcast(branch.scale * wide.as<float>()[i * branch.r + j]), sums[i]);
  };
  base.strips_product(x.data, x.stride, m, threads, start, [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
    store_sums(y + i * base.n + row, sums, count, bias ? bias + row : nullptr);
  });
}

template <class Base, class T>
void low_rank_forward(const Base& base, const Activations<T>& x, std::int64_t m, const Activations<T>& z, const Branch& branch,
                      const T* bias, T* y, T* s, int threads) {
  using Cell = CellOf<T>;
  if (m == 0) return;
  if (base.template few_fits<T>(m)) return few_forward(base, x, m, z, branch, bias, y, s, threads);
  if constexpr (Base::template kHasStrips<T>)
    if (base.strips_fit(m)) return strips_forward(base, x, m, z, branch, bias, y, s, threads);
  const std::int64_t block = row_block<Cell>(m, base.k);
  const KeepBits keep(branch.dropout, m, base.k, threads);
  const bool own_input = z.data != x.data || z.stride != x.stride || !keep.all_stay();
  const Scratch left = cells_for<Cell>(block, base.k), low_left = cells_for<Cell>(block, branch.r);
  const Scratch wide = floats_for(block * branch.r);
  for (std::int64_t first = 0; first < m; first += block) {
    const std::int64_t count = std::min(m - first, block);
    low_rank_input<Cell>(z, keep, branch, base.k, first, count, left.as<std::uint32_t>(), wide.as<float>(), s, threads);
    const DenseRows<float> scaled{wide.as<float>(), branch.r, branch.scale};
    pack_all<Cell>(scaled, 0, count, branch.r, low_left.as<std::uint32_t>(), threads);
    if (own_input) pack_all<Cell>(DenseRows<T>{x.data, x.stride}, first, count, base.k, left.as<std::uint32_t>(), threads);
    const auto finish = [&](const Tile& tile) {
      if (bias) add_bias(tile, bias);
      store_tile(y + first * base.n, base.n, tile);
    };
    product<Cell>(count, base.n, factors(low_left.as<std::uint32_t>(), branch.r, rows_as_columns<Cell>(branch.b)),
                  factors(left.as<std::uint32_t>(), base.k, base.template weight_rows<Cell>()), nothing_between(), finish,
                  threads);
  }
}

template <class T>
struct Gradients {
  T *dx, *dz;  // or nullptr
  bool z_is_x;
  void *da, *db;
};

// dx and dz of the rows [first, first + count) from packed dy and packed T.
template <class Cell, class Base, class Columns, class T>
void input_gradients(const Base& base, const Columns& columns, const KeepBits& keep, const Branch& branch, std::int64_t first,
                     std::int64_t count, const std::uint32_t* dy, const std::uint32_t* t, const Gradients<T>& out, int threads) {
  const auto drop = [&](const Tile& tile) {
    if (!keep.all_stay()) drop_tile(tile, first, keep);
  };
  const auto store_dx = [&](const Tile& tile) { store_tile(out.dx + first * base.k, base.k, tile); };
  const auto store_dz = [&](const Tile& tile) {
    drop(tile);
    store_tile(out.dz + first * base.k, base.k, tile);
  };
  const auto low = factors(t, branch.r, rows_as_depth<Cell>(branch.a));
  const auto main = factors(dy, base.n, base.template weight_columns<Cell>(columns));
  if (out.dx && out.z_is_x) product<Cell>(count, base.k, low, main, drop, store_dx, threads);
  if (out.dx && !out.z_is_x) product<Cell>(count, base.k, no_factors(), main, nothing_between(), store_dx, threads);
  if (out.dz) product<Cell>(count, base.k, no_factors(), low, nothing_between(), store_dz, threads);
}

// dA = T^T D(z) from T (m, r) in fp32; dB^T = scale S^T dy from S (m, r). Sums run over all m rows.
template <class Cell, class T>
void factor_gradients(const KeepBits& keep, const Branch& branch, std::int64_t n, std::int64_t k, std::int64_t m,
                      const Activations<T>& dy, const Activations<T>& z, const T* s, const float* t, const Gradients<T>& out,
                      int threads) {
  const Scratch memory = cells_for<Cell>(branch.r, m);
  auto* const left = memory.as<std::uint32_t>();
  pack_left_across<Cell>(DenseRows<float>{t, branch.r, keep.scale()}, branch.r, m, left);
  with_type(out.da, branch.a.dtype, [&](auto* da) {
    with_branch_input(z, keep, [&](const auto& rows) {
      product<Cell>(
          branch.r, k, no_factors(), factors(left, m, rows_as_depth<Cell>(rows)), nothing_between(),
          [&](const Tile& tile) { store_tile(da, k, tile); }, threads);
    });
  });
  pack_left_across<Cell>(DenseRows<T>{s, branch.r}, branch.r, m, left);
  with_type(out.db, branch.b.dtype, [&](auto* db) {
    using D = std::remove_pointer_t<decltype(db)>;
    const auto finish = [&](const Tile& tile) {
      for (int j = 0; j < tile.cols; j++)
        for (int i = 0; i < tile.rows; i++)
          db[(tile.col + j) * branch.r + tile.row + i] = narrow<D>(branch.scale * tile.sums[i * tile.stride + j]);
    };
    const DenseRows<T> rows{dy.data, dy.stride};
    product<Cell>(branch.r, n, no_factors(), factors(left, m, rows_as_depth<Cell>(rows)), nothing_between(), finish, threads);
  });
}

template <class Base, class T>
void low_rank_backward(const Base& base, const Activations<T>& dy, std::int64_t m, const Activations<T>& z, const T* s,
                       const Branch& branch, const Gradients<T>& out, int threads) {
  using Cell = CellOf<T>;
  const std::int64_t block = row_block<Cell>(m, base.n), r = branch.r;
  const Scratch all_t = floats_for(m * r);
  const auto columns = base.prepare_columns(threads);
  const KeepBits keep(branch.dropout, m, base.k, threads);
  {
    const Scratch left = cells_for<Cell>(block, base.n), low_left = cells_for<Cell>(block, r);
    for (std::int64_t first = 0; first < m; first += block) {
      const std::int64_t count = std::min(m - first, block);
      float* const t = all_t.as<float>() + first * r;
      pack_all<Cell>(DenseRows<T>{dy.data, dy.stride}, first, count, base.n, left.as<std::uint32_t>(), threads);
      const auto finish = [&](const Tile& tile) {
        scale_tile(tile, branch.scale);
        store_tile(t, r, tile);
      };
      product<Cell>(count, r, no_factors(), factors(left.as<std::uint32_t>(), base.n, rows_as_depth<Cell>(branch.b)),
                    nothing_between(), finish, threads);
      pack_all<Cell>(DenseRows<float>{t, r}, 0, count, r, low_left.as<std::uint32_t>(), threads);
      input_gradients<Cell>(base, columns, keep, branch, first, count, left.as<std::uint32_t>(), low_left.as<std::uint32_t>(),
                            out, threads);
    }
  }
  factor_gradients<Cell>(keep, branch, base.n, base.k, m, dy, z, s, all_t.as<float>(), out, threads);
}

}  // namespace peftk::PEFTK_TIER
