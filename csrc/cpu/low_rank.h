// A low-rank branch beside a base product, forward and backward: y = x W^T + bias + scale D(z) A^T B^T. The branch rides on the
// base product: its sums start from s S B^T (forward) or D(T A) (backward), a few steps of the depth more. Nothing of W's size,
// no mask and no copy of D(z) is kept; what is made again is made in the packing of a panel. Several weights may share x: it is
// packed once, and dx is one product over all of them. Knows no op. A base provides
//   n, k                                      the shape of W
//   weight_rows<Cell>()                       W^T: panels of rows of W, the depth is k
//   prepare_columns(threads)                  what all panels of columns share
//   weight_columns<Cell>(prepared)            W: panels of columns of W, the depth is n
//   few_fits<T>(m)                            whether few_product is the way for m rows of x
//   few_product(x, stride, m, threads, out)   out(first row of W, rows of W, row of x, their sums) for all of them
//   kHasStrips<T>; strips_fit(m)              whether strips_product(x, stride, m, threads, start, out) is the way
#pragma once
#include <algorithm>
#include <deque>
#include <vector>

#include "cpu/dropout.h"
#include "cpu/panel4.h"  // rows_as_columns, rows_as_depth
#include "cpu/product.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/stack.h"

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

template <class Cell, class T>
void pack_branch_input(const Activations<T>& z, const KeepBits& keep, std::int64_t k, std::int64_t first, std::int64_t count,
                       std::uint32_t* left, int threads) {
  with_branch_input(z, keep, [&](const auto& rows) { pack_all<Cell>(rows, first, count, k, left, threads); });
}

// Calls body with the factor's rows in its own type.
template <class Body>
void with_factor(const FactorRows& factor, Body body) {
  with_type(factor.data, factor.dtype, [&](const auto* p) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    body(DenseRows<T>{p, factor.stride});
  });
}

// out[0 .. k) = rows[i], zeros up to the next multiple of kLanes.
template <class Rows>
void widen_row(const Rows& rows, std::int64_t i, std::int64_t k, float* out) {
  for (std::int64_t position = 0; position < k; position += kLanes) {
    F32 value;
    rows.template read<1>(i, position, static_cast<int>(std::min<std::int64_t>(k - position, kLanes)), &value);
    store(out + position, value);
  }
}

// rows[j] . x in fp64; x as widen_row writes it.
template <class Rows>
float wide_dot(const Rows& rows, std::int64_t j, std::int64_t k, const float* x) {
  double sum[kLanes] = {};
  for (std::int64_t position = 0; position < k; position += kLanes) {
    F32 factor;
    float factors[kLanes];
    rows.template read<1>(j, position, static_cast<int>(std::min<std::int64_t>(k - position, kLanes)), &factor);
    store(factors, factor);
    for (int lane = 0; lane < kLanes; lane++)
      sum[lane] += static_cast<double>(x[position + lane]) * static_cast<double>(factors[lane]);
  }
  double all = 0.0;
  for (double lane : sum) all += lane;
  return static_cast<float>(all);
}

// b[row + lane] . s for the first `count` lanes, b (n, r).
template <class Rows>
F32 few_low_rank(const Rows& b, std::int64_t row, int count, const float* s, std::int64_t r) {
  float low[kLanes] = {};
  for (int lane = 0; lane < count; lane++) {
    F32 dot = broadcast(0.0f);
    for (std::int64_t j = 0; j < r; j += kLanes) {
      const int here = static_cast<int>(std::min<std::int64_t>(r - j, kLanes));
      F32 factor, f;
      b.template read<1>(row + lane, j, here, &factor);
      DenseRows<float>{s, r}.read<1>(0, j, here, &f);
      dot = multiply_add(factor, f, dot);
    }
    low[lane] = reduce_sum(dot);
  }
  return load(low);
}

// S of the rows [first, first + count): fp32 to `wide` (count, r) and T to `kept` (m, r); `left` holds D(z)'s cells.
template <class Cell, class T>
void low_rank_input(const std::uint32_t* left, const KeepBits& keep, const Branch& branch, std::int64_t k, std::int64_t first,
                    std::int64_t count, float* wide, T* kept, int threads) {
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
  const std::int64_t padded = (k + kLanes - 1) / kLanes * kLanes;
  const Scratch memory = floats_for(m * padded);
  auto* const values = memory.as<float>();
  with_branch_input(z, keep, [&](const auto& rows) {
    for (std::int64_t i = 0; i < m; i++) widen_row(rows, i, k, values + i * padded);
  });
  with_factor(branch.a, [&](const auto& a) {
    parallel_for(branch.r, threads_worth(m * branch.r * k, threads), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t j = begin; j < end; j++)
        for (std::int64_t i = 0; i < m; i++) {
          wide[i * branch.r + j] = keep.scale() * wide_dot(a, j, k, values + i * padded);
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
  with_factor(branch.b, [&](const auto& b) {
    base.few_product(x.data, x.stride, m, threads_worth(m * base.n * (base.k + branch.r), threads),
                     [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
                       const F32 low = few_low_rank(b, row, count, s + i * branch.r, branch.r);
                       store_sums(y + i * base.n + row, multiply_add(broadcast(branch.scale), low, sums), count,
                                  bias ? bias + row : nullptr);
                     });
  });
}

// The same where lanes are rows of W: the sums of a strip start from the branch.
template <class Base, class T>
void strips_forward(const Base& base, const Activations<T>& x, std::int64_t m, const Activations<T>& z, const Branch& branch,
                    const T* bias, T* y, T* kept, int threads) {
  using Cell = CellOf<T>;
  const Scratch left = cells_for<Cell>(m, base.k), wide = floats_for(m * branch.r);
  const KeepBits keep(branch.dropout, m, base.k, threads);
  pack_branch_input<Cell>(z, keep, base.k, 0, m, left.as<std::uint32_t>(), threads);
  low_rank_input<Cell>(left.as<std::uint32_t>(), keep, branch, base.k, 0, m, wide.as<float>(), kept, threads);
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

// One of the weights that share x.
template <class Base, class T>
struct Output {
  Base base;
  Branch branch;
  const T* bias;
  T *y, *s;
};

// Whether no panels are needed for m rows; the output is there then.
template <class Base, class T>
bool forward_without_panels(const Output<Base, T>& o, const Activations<T>& x, std::int64_t m, const Activations<T>& z,
                            int threads) {
  if (o.base.template few_fits<T>(m)) {
    few_forward(o.base, x, m, z, o.branch, o.bias, o.y, o.s, threads);
    return true;
  }
  if constexpr (Base::template kHasStrips<T>)
    if (o.base.strips_fit(m)) {
      strips_forward(o.base, x, m, z, o.branch, o.bias, o.y, o.s, threads);
      return true;
    }
  return false;
}

template <class Base, class T>
void low_rank_forward(const std::vector<Output<Base, T>>& outputs, const Activations<T>& x, std::int64_t m,
                      const Activations<T>& z, int threads) {
  using Cell = CellOf<T>;
  if (m == 0) return;
  const std::int64_t k = outputs.front().base.k, block = row_block<Cell>(m, k);
  struct Pass {
    const Output<Base, T>& output;
    KeepBits keep;
    Scratch low_left;
    Pass(const Output<Base, T>& o, std::int64_t rows, std::int64_t block_rows, int team)
        : output(o), keep(o.branch.dropout, rows, o.base.k, team), low_left(cells_for<Cell>(block_rows, o.branch.r)) {}
  };
  std::deque<Pass> passes;
  std::int64_t most = 0;
  for (const auto& o : outputs) {
    if (forward_without_panels(o, x, m, z, threads)) continue;
    passes.emplace_back(o, m, block, threads);
    most = std::max(most, o.branch.r);
  }
  if (passes.empty()) return;
  const bool own_input = z.data != x.data || z.stride != x.stride || !passes.back().keep.all_stay();
  const Scratch memory = cells_for<Cell>(block, k), wide = floats_for(block * most);
  auto* const left = memory.as<std::uint32_t>();
  for (std::int64_t first = 0; first < m; first += block) {
    const std::int64_t count = std::min(m - first, block);
    bool plain = false;  // left holds z as it is
    for (const Pass& pass : passes) {
      const Branch& branch = pass.output.branch;
      if (!plain || !pass.keep.all_stay()) pack_branch_input<Cell>(z, pass.keep, k, first, count, left, threads);
      plain = pass.keep.all_stay();
      low_rank_input<Cell>(left, pass.keep, branch, k, first, count, wide.as<float>(), pass.output.s, threads);
      const DenseRows<float> scaled{wide.as<float>(), branch.r, branch.scale};
      pack_all<Cell>(scaled, 0, count, branch.r, pass.low_left.template as<std::uint32_t>(), threads);
    }
    if (own_input) pack_all<Cell>(DenseRows<T>{x.data, x.stride}, first, count, k, left, threads);
    for (const Pass& pass : passes) {
      const auto& [base, branch, bias, y, s] = pass.output;
      const std::int64_t n = base.n;
      const auto finish = [&, bias = bias, y = y](const Tile& tile) {
        if (bias) add_bias(tile, bias);
        store_tile(y + first * n, n, tile);
      };
      const auto low = factors(pass.low_left.template as<std::uint32_t>(), branch.r, rows_as_columns<Cell>(branch.b));
      product<Cell>(count, n, low, factors(left, k, base.template weight_rows<Cell>()), nothing_between(), finish, threads);
    }
  }
}

template <class T>
struct InputGradients {
  T *dx, *dz;  // or nullptr
  bool z_is_x;
};

// What comes back from one of the weights.
template <class Base, class T>
struct Gradient {
  Base base;
  Branch branch;
  Activations<T> dy;
  const T* s;
  void *da, *db;
};

// dA = T^T D(z) from T (m, r) in fp32; dB^T = scale S^T dy from S (m, r). Sums run over all m rows.
template <class Cell, class T>
void factor_gradients(const KeepBits& keep, const Branch& branch, std::int64_t n, std::int64_t k, std::int64_t m,
                      const Activations<T>& dy, const Activations<T>& z, const T* s, const float* t, void* da_out, void* db_out,
                      int threads) {
  const Scratch memory = cells_for<Cell>(branch.r, m);
  auto* const left = memory.as<std::uint32_t>();
  pack_left_across<Cell>(DenseRows<float>{t, branch.r, keep.scale()}, branch.r, m, left);
  with_type(da_out, branch.a.dtype, [&](auto* da) {
    with_branch_input(z, keep, [&](const auto& rows) {
      product<Cell>(
          branch.r, k, no_factors(), factors(left, m, rows_as_depth<Cell>(rows)), nothing_between(),
          [&](const Tile& tile) { store_tile(da, k, tile); }, threads);
    });
  });
  pack_left_across<Cell>(DenseRows<T>{s, branch.r}, branch.r, m, left);
  with_type(db_out, branch.b.dtype, [&](auto* db) {
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
void low_rank_backward(const std::vector<Gradient<Base, T>>& gradients, std::int64_t m, const Activations<T>& z,
                       const InputGradients<T>& out, int threads) {
  using Cell = CellOf<T>;
  const std::int64_t k = gradients.front().base.k;
  std::int64_t depth = 0;
  for (const auto& g : gradients) depth += g.base.n;
  const std::int64_t block = row_block<Cell>(m, depth);
  struct Pass {
    const Gradient<Base, T>& gradient;
    KeepBits keep;
    decltype(std::declval<Base>().prepare_columns(1)) columns;
    Scratch t, low_left;
    Pass(const Gradient<Base, T>& g, std::int64_t rows, std::int64_t block_rows, int team)
        : gradient(g),
          keep(g.branch.dropout, rows, g.base.k, team),
          columns(g.base.prepare_columns(team)),
          t(floats_for(rows * g.branch.r)),
          low_left(cells_for<Cell>(block_rows, g.branch.r)) {}
  };
  std::deque<Pass> passes;
  Stack<Cell, decltype(gradients.front().base.template weight_columns<Cell>(passes.front().columns))> weights;
  std::vector<decltype(factors(nullptr, 0, rows_as_depth<Cell>(gradients.front().branch.a)))> lows;
  for (const auto& g : gradients) {
    const Pass& pass = passes.emplace_back(g, m, block, threads);
    weights.add(g.base.n, g.base.template weight_columns<Cell>(pass.columns));
    lows.push_back(factors(pass.low_left.template as<std::uint32_t>(), g.branch.r, rows_as_depth<Cell>(g.branch.a)));
  }
  {
    const Scratch memory = cells_for<Cell>(block, weights.depth());
    auto* const left = memory.as<std::uint32_t>();
    for (std::int64_t first = 0; first < m; first += block) {
      const std::int64_t count = std::min(m - first, block);
      for (std::size_t i = 0; i < passes.size(); i++) {
        const auto& [base, branch, dy, s, da, db] = gradients[i];
        const std::int64_t r = branch.r;
        const float scale = branch.scale;
        float* const t = passes[i].t.template as<float>() + first * r;
        std::uint32_t* const own = weights.left_of(i, left);
        pack_all<Cell>(DenseRows<T>{dy.data, dy.stride}, first, count, base.n, own, threads, weights.steps());
        const auto finish = [&](const Tile& tile) {
          scale_tile(tile, scale);
          store_tile(t, r, tile);
        };
        product<Cell>(count, r, no_factors(), factors(own, base.n, rows_as_depth<Cell>(branch.b), weights.steps()),
                      nothing_between(), finish, threads);
        pack_all<Cell>(DenseRows<float>{t, r}, 0, count, r, passes[i].low_left.template as<std::uint32_t>(), threads);
      }
      const auto drop = [&](const Tile& tile, std::size_t i) {
        if (!passes[i].keep.all_stay()) drop_tile(tile, first, passes[i].keep);
      };
      const auto store_dx = [&](const Tile& tile) { store_tile(out.dx + first * k, k, tile); };
      const auto store_dz = [&](const Tile& tile) { store_tile(out.dz + first * k, k, tile); };
      const auto main = factors(left, weights.depth(), weights);
      if (out.dx && out.z_is_x) product<Cell>(count, k, lows, main, drop, store_dx, threads);
      if (out.dx && !out.z_is_x) product<Cell>(count, k, no_factors(), main, nothing_between(), store_dx, threads);
      if (out.dz) product<Cell>(count, k, lows, no_factors(), drop, store_dz, threads);
    }
  }
  for (const Pass& pass : passes) {
    const auto& [base, branch, dy, s, da, db] = pass.gradient;
    factor_gradients<Cell>(pass.keep, branch, base.n, k, m, dy, z, s, pass.t.template as<float>(), da, db, threads);
  }
}

}  // namespace peftk::PEFTK_TIER
