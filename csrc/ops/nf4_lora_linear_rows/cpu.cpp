// One product by W for the rows of all adapters, and each adapter's branch for its own rows: these are gathered, S and T are
// compact. Beside panels of W an adapter is a low factor that is zero in the others' rows.
#include "cpu/few_rows.h"
#include "cpu/low_rank.h"
#include "ops/nf4_lora_linear_rows/op.h"

namespace peftk::PEFTK_TIER {
namespace {

// Which rows of x an adapter has.
struct Rows {
  std::vector<std::int64_t> adapter, place;   // by row of x: whose it is, -1 for none; its place among that one's rows
  std::vector<std::vector<std::int64_t>> of;  // by adapter
  Rows(const std::vector<std::int64_t>& index, std::int64_t repeat, std::size_t adapters) : of(adapters) {
    for (std::int64_t one : index)
      for (std::int64_t i = 0; i < repeat; i++) {
        place.push_back(one < 0 ? 0 : static_cast<std::int64_t>(of[static_cast<std::size_t>(one)].size()));
        if (one >= 0) of[static_cast<std::size_t>(one)].push_back(count());
        adapter.push_back(one);
      }
  }
  std::int64_t count() const { return static_cast<std::int64_t>(adapter.size()); }
  std::int64_t count(std::size_t one) const { return static_cast<std::int64_t>(of[one].size()); }
};

// An adapter's rows side by side: where they lie, if they are a run, else a copy.
template <class T>
class Gathered {
 public:
  Gathered(const Activations<T>& all, std::int64_t columns, const std::vector<std::int64_t>& rows)
      : memory_(is_run(rows) ? 0 : sizeof(T) * rows.size() * static_cast<std::size_t>(columns)) {
    if (is_run(rows)) {
      view_ = {all.data + (rows.empty() ? 0 : rows.front()) * all.stride, all.stride};
      return;
    }
    T* out = memory_.template as<T>();
    view_ = {out, columns};
    for (std::int64_t row : rows) {
      std::memcpy(out, all.data + row * all.stride, sizeof(T) * static_cast<std::size_t>(columns));
      out += columns;
    }
  }
  const Activations<T>& view() const { return view_; }

 private:
  static bool is_run(const std::vector<std::int64_t>& rows) {
    return rows.empty() || rows.back() - rows.front() + 1 == static_cast<std::int64_t>(rows.size());
  }
  Scratch memory_;
  Activations<T> view_;
};

// An adapter's compact rows (its rows, r) as rows of x; zero where the row is another's.
struct SpreadRows {
  DenseRows<float> compact;
  const Rows* rows;
  std::int64_t adapter;

  bool aligned() const { return true; }
  template <int N>
  void read(std::int64_t row, std::int64_t position, int count, F32* v) const {
    const auto at = static_cast<std::size_t>(row);
    if (rows->adapter[at] == adapter) return compact.read<N>(rows->place[at], position, count, v);
    for (int j = 0; j < N; j++) v[j] = broadcast(0.0f);
  }
  template <int N>
  void read_whole(std::int64_t row, std::int64_t position, F32* v) const {
    read<N>(row, position, N * kLanes, v);
  }
};

// fp32 (its rows, r) of every adapter.
class Compact {
 public:
  Compact(const Rows& rows, const std::vector<Branch>& branches)
      : rows_(rows), branches_(branches), memory_(floats_for(total(rows, branches))) {
    float* next = memory_.as<float>();
    for (std::size_t i = 0; i < branches.size(); i++) {
      first_.push_back(next);
      next += rows.count(i) * branches[i].r;
    }
  }
  float* of(std::size_t adapter) const { return first_[adapter]; }
  const float* of_row(std::int64_t row) const {
    const auto at = static_cast<std::size_t>(row), adapter = static_cast<std::size_t>(rows_.adapter[at]);
    return of(adapter) + rows_.place[at] * branches_[adapter].r;
  }

 private:
  static std::int64_t total(const Rows& rows, const std::vector<Branch>& branches) {
    std::int64_t all = 0;
    for (std::size_t i = 0; i < branches.size(); i++) all += rows.count(i) * branches[i].r;
    return all;
  }
  const Rows& rows_;
  const std::vector<Branch>& branches_;
  Scratch memory_;
  std::vector<float*> first_;
};

// The adapters as low factors of a product over rows [first, first + count) of x: scale * compact on the left, `panel(branch)` on
// the right.
template <class Cell, class Panel>
class Lows {
 public:
  Lows(const Rows& rows, const std::vector<Branch>& branches, const Compact& compact, bool scaled, std::int64_t block,
       Panel panel)
      : memory_(sizeof(std::uint32_t) * static_cast<std::size_t>(all_cells(rows, branches, block))) {
    std::int64_t at = 0;
    for (std::size_t i = 0; i < branches.size(); i++) {
      if (rows.count(i) == 0 || branches[i].r == 0) continue;
      sources_.push_back(
          {{compact.of(i), branches[i].r, scaled ? branches[i].scale : 1.0f}, &rows, static_cast<std::int64_t>(i)});
      first_.push_back(at);
      factors_.push_back(factors(memory_.as<std::uint32_t>() + at, branches[i].r, panel(branches[i])));
      at += cells(block, branches[i].r);
    }
  }
  const auto& of(std::int64_t first, std::int64_t count, int threads) {
    for (std::size_t i = 0; i < sources_.size(); i++)
      pack_all<Cell>(sources_[i], first, count, factors_[i].depth, memory_.as<std::uint32_t>() + first_[i], threads);
    return factors_;
  }

 private:
  static std::int64_t cells(std::int64_t block, std::int64_t r) {
    return (left_cells<Cell>(block, r) + 15) / 16 * 16;
  }  // cache lines
  static std::int64_t all_cells(const Rows& rows, const std::vector<Branch>& branches, std::int64_t block) {
    std::int64_t all = 0;
    for (std::size_t i = 0; i < branches.size(); i++)
      if (rows.count(i) > 0 && branches[i].r > 0) all += cells(block, branches[i].r);
    return all;
  }

  Scratch memory_;  // one for all: a container of them would be compiled once for each instruction set, under one name
  std::vector<SpreadRows> sources_;
  std::vector<std::int64_t> first_;
  std::vector<decltype(factors(nullptr, 0, std::declval<Panel>()(std::declval<Branch>())))> factors_;
};

// S of every adapter, from its own rows of z: fp32 in `compact`, T in s.
template <class T>
void inputs(const Rows& rows, const std::vector<Branch>& branches, const std::vector<T*>& s, const Activations<T>& z,
            std::int64_t k, const Compact& compact, int threads) {
  using Cell = CellOf<T>;
  for (std::size_t i = 0; i < branches.size(); i++) {
    const std::int64_t m = rows.count(i);
    if (m == 0 || branches[i].r == 0) continue;
    const Gathered<T> own(z, k, rows.of[i]);
    if (m <= kFewRows) {
      few_low_rank_input(own.view(), branches[i], k, m, compact.of(i), s[i], threads);
      continue;
    }
    const KeepBits keep(branches[i].dropout, m, k, threads);
    const std::int64_t block = row_block<Cell>(m, k);
    const Scratch left = cells_for<Cell>(block, k);
    for (std::int64_t first = 0; first < m; first += block) {
      const std::int64_t count = std::min(m - first, block);
      pack_branch_input<Cell>(own.view(), keep, k, first, count, left.as<std::uint32_t>(), threads);
      low_rank_input<Cell>(left.as<std::uint32_t>(), keep, branches[i], k, first, count, compact.of(i) + first * branches[i].r,
                           s[i], threads);
    }
  }
}

template <class T>
void few(const Matrix4& w, const Rows& rows, const std::vector<Branch>& branches, const Compact& compact, const Activations<T>& x,
         const T* bias, T* y, int threads) {
  const std::int64_t m = rows.count();
  few_product(w, x.data, x.stride, m, threads_worth(m * w.rows * w.k, threads),
              [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
                const std::int64_t adapter = rows.adapter[static_cast<std::size_t>(i)];
                if (adapter >= 0) {
                  const Branch& branch = branches[static_cast<std::size_t>(adapter)];
                  with_factor(branch.b, [&](const auto& b) {
                    const F32 low = few_low_rank(b, row, count, compact.of_row(i), branch.r);
                    sums = multiply_add(broadcast(branch.scale), low, sums);
                  });
                }
                store_sums(y + i * w.rows + row, sums, count, bias ? bias + row : nullptr);
              });
}

#ifdef PEFTK_TIER_IS_AVX512_BF16
// Lanes are rows of W: the sums of a strip start from the branches.
inline void strips(const Matrix4& w, const Rows& rows, const std::vector<Branch>& branches, const Compact& compact,
                   const Activations<Bf16>& x, const Bf16* bias, Bf16* y, int threads) {
  std::int64_t most = 1;
  for (const Branch& branch : branches) most = std::max(most, branch.r);
  const auto start = [&](std::int64_t row, int count, F32* sums) {
    const Scratch turned = floats_for(most * kLanes);  // [r][kLanes rows of B]
    for (std::size_t a = 0; a < branches.size(); a++) {
      const Branch& branch = branches[a];
      if (rows.of[a].empty()) continue;
      lanes_along<FloatCell>(branch.b, row, count, 0, branch.r, kLanes, turned.as<std::uint32_t>());
      const float* s = compact.of(a);
      for (std::int64_t i : rows.of[a])
        for (std::int64_t j = 0; j < branch.r; j++)
          sums[i] = multiply_add(load(turned.as<float>() + j * kLanes), broadcast(branch.scale * *s++), sums[i]);
    }
  };
  const std::int64_t m = rows.count();
  strips_bf16(w, x.data, x.stride, m, threads_worth(m * w.rows * w.k, threads), start,
              [&](std::int64_t row, int count, std::int64_t i, F32 sums) {
                store_sums(y + i * w.rows + row, sums, count, bias ? bias + row : nullptr);
              });
}
#endif

template <class T>
void in_panels(const Matrix4& w, const Rows& rows, const std::vector<Branch>& branches, const Compact& compact,
               const Activations<T>& x, const T* bias, T* y, int threads) {
  using Cell = CellOf<T>;
  const std::int64_t m = rows.count(), n = w.rows, k = w.k, block = row_block<Cell>(m, k);
  const auto panel = [](const Branch& branch) { return rows_as_columns<Cell>(branch.b); };
  Lows<Cell, decltype(panel)> lows(rows, branches, compact, true, block, panel);
  const Scratch packed = cells_for<Cell>(block, k);
  auto* const left = packed.as<std::uint32_t>();
  for (std::int64_t first = 0; first < m; first += block) {
    const std::int64_t count = std::min(m - first, block);
    pack_all<Cell>(DenseRows<T>{x.data, x.stride}, first, count, k, left, threads);
    const auto finish = [&](const Tile& tile) {
      if (bias) add_bias(tile, bias);
      store_tile(y + first * n, n, tile);
    };
    product<Cell>(count, n, lows.of(first, count, threads), factors(left, k, weight_rows<Cell>(w)), nothing_between(), finish,
                  threads);
  }
}

// T of every adapter, scale dy B of its own rows, and its dA and dB.
template <class T>
struct Own {
  const T* s;
  void *da, *db;
};
template <class T>
void factor_gradients_of_all(const Rows& rows, const std::vector<Branch>& branches, const std::vector<Own<T>>& own,
                             const Activations<T>& dy, const Activations<T>& z, std::int64_t n, std::int64_t k, const Compact& t,
                             int threads) {
  using Cell = CellOf<T>;
  for (std::size_t i = 0; i < branches.size(); i++) {
    const Branch& branch = branches[i];
    const std::int64_t m = rows.count(i), r = branch.r;
    if (m == 0 || r == 0) continue;
    const Gathered<T> own_dy(dy, n, rows.of[i]), own_z(z, k, rows.of[i]);
    const std::int64_t block = row_block<Cell>(m, n);
    const Scratch packed = cells_for<Cell>(block, n);
    auto* const left = packed.as<std::uint32_t>();
    for (std::int64_t first = 0; first < m; first += block) {
      const std::int64_t count = std::min(m - first, block);
      pack_all<Cell>(DenseRows<T>{own_dy.view().data, own_dy.view().stride}, first, count, n, left, threads);
      const auto finish = [&](const Tile& tile) {
        scale_tile(tile, branch.scale);
        store_tile(t.of(i) + first * r, r, tile);
      };
      product<Cell>(count, r, no_factors(), factors(left, n, rows_as_depth<Cell>(branch.b)), nothing_between(), finish, threads);
    }
    const KeepBits keep(branch.dropout, m, k, threads);
    factor_gradients<Cell>(keep, branch, n, k, m, own_dy.view(), own_z.view(), own[i].s, t.of(i), own[i].da, own[i].db, threads);
  }
}

template <class T>
void backward(const Matrix4& w, const Rows& rows, const std::vector<Branch>& branches, const std::vector<Own<T>>& own,
              const Activations<T>& dy, const Activations<T>& z, const InputGradients<T>& out, int threads) {
  using Cell = CellOf<T>;
  const std::int64_t m = rows.count(), n = w.rows, k = w.k, block = row_block<Cell>(m, n);
  const Compact t(rows, branches);
  factor_gradients_of_all(rows, branches, own, dy, z, n, k, t, threads);
  const auto panel = [](const Branch& branch) { return rows_as_depth<Cell>(branch.a); };
  Lows<Cell, decltype(panel)> lows(rows, branches, t, false, block, panel);
  const ColumnConstants constants(w, threads);
  const Scratch packed = cells_for<Cell>(block, n);
  auto* const left = packed.as<std::uint32_t>();
  for (std::int64_t first = 0; first < m; first += block) {
    const std::int64_t count = std::min(m - first, block);
    const auto& branch = lows.of(first, count, threads);
    if (out.dx) {
      pack_all<Cell>(DenseRows<T>{dy.data, dy.stride}, first, count, n, left, threads);
      const auto main = factors(left, n, weight_columns<Cell>(w, constants));
      const auto store = [&](const Tile& tile) { store_tile(out.dx + first * k, k, tile); };
      if (out.z_is_x)
        product<Cell>(count, k, branch, main, nothing_between(), store, threads);
      else
        product<Cell>(count, k, no_factors(), main, nothing_between(), store, threads);
    }
    const auto store = [&](const Tile& tile) { store_tile(out.dz + first * k, k, tile); };
    if (out.dz && !branch.empty()) product<Cell>(count, k, branch, no_factors(), nothing_between(), store, threads);
    if (out.dz && branch.empty()) std::memset(out.dz + first * k, 0, sizeof(T) * static_cast<std::size_t>(count * k));
  }
}

Branch make_branch(const AdapterFactors& given, std::int64_t k) {
  const auto& [a, a_dtype, b, b_dtype, r, scale] = given;
  return {{a, a_dtype, k}, {b, b_dtype, r}, r, scale, {}};
}

}  // namespace

void nf4_lora_linear_rows(const Weight4& weight, const std::vector<std::tuple<AdapterFactors, void*>>& adapters,
                          const std::vector<std::int64_t>& index, std::int64_t repeat, std::int64_t k, const void* x,
                          std::int64_t x_stride, int dtype, const void* z, std::int64_t z_stride, const void* bias, void* y,
                          int threads) {
  const Matrix4 w = make_matrix4(weight, k);
  const Rows rows(index, repeat, adapters.size());
  if (rows.count() == 0) return;
  with_type(x, dtype, [&](const auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    std::vector<Branch> branches;
    std::vector<T*> s;
    for (const auto& [branch, kept] : adapters) {
      branches.push_back(make_branch(branch, k));
      s.push_back(static_cast<T*>(kept));
    }
    const Activations<T> given{data, x_stride}, input{static_cast<const T*>(z), z_stride};
    const Compact compact(rows, branches);
    inputs(rows, branches, s, z ? input : given, k, compact, threads);
    const auto* add = static_cast<const T*>(bias);
    auto* const out = static_cast<T*>(y);
#ifdef PEFTK_TIER_IS_AVX512_BF16
    if constexpr (std::is_same_v<T, Bf16>)
      if (rows.count() > kFewRows && few_bf16_fits(w, rows.count()))
        return strips(w, rows, branches, compact, given, add, out, threads);
#endif
    if (few_fits<T>(w, rows.count())) return few(w, rows, branches, compact, given, add, out, threads);
    in_panels(w, rows, branches, compact, given, add, out, threads);
  });
}

void nf4_lora_linear_rows_backward(const Weight4& weight,
                                   const std::vector<std::tuple<AdapterFactors, const void*, void*, void*>>& adapters,
                                   const std::vector<std::int64_t>& index, std::int64_t repeat, std::int64_t k, const void* dy,
                                   std::int64_t dy_stride, int dtype, const void* z, std::int64_t z_stride, int z_is_x, void* dx,
                                   void* dz, int threads) {
  const Matrix4 w = make_matrix4(weight, k);
  const Rows rows(index, repeat, adapters.size());
  if (rows.count() == 0) return;
  with_type(dy, dtype, [&](const auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    std::vector<Branch> branches;
    std::vector<Own<T>> own;
    for (const auto& [branch, s, da, db] : adapters) {
      branches.push_back(make_branch(branch, k));
      own.push_back({static_cast<const T*>(s), da, db});
    }
    const Activations<T> given{data, dy_stride}, input{static_cast<const T*>(z), z_stride};
    const InputGradients<T> out{static_cast<T*>(dx), static_cast<T*>(dz), z_is_x != 0};
    backward(w, rows, branches, own, given, input, out, threads);
  });
}

}  // namespace peftk::PEFTK_TIER
