// A matrix in 4 bits, its constants, and its elements as rows (rows.h). Knows no op.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/rows.h"
#include "cpu/tile.h"
#include "format/absmax.h"
#include "format/nf4.h"
#include "format/weight4.h"

namespace peftk::PEFTK_TIER {

// (rows, k) codes in flat order, blocks of a power of two of elements that may straddle rows.
struct Matrix4 {
  const std::uint8_t* packed;
  Absmax absmax;
  std::int64_t rows, k;
  int block_shift;      // log2(elements a block)
  const float* values;  // 16, by code

  std::int64_t blocks_before(std::int64_t row) const { return (row * k) >> block_shift; }
  std::int64_t blocks_until(std::int64_t row) const { return (row * k + (std::int64_t{1} << block_shift) - 1) >> block_shift; }
};

inline Matrix4 make_matrix4(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                            std::int64_t rows, std::int64_t k, std::int64_t block_size, int quant_type) {
  if (block_size < kLanes || (block_size & (block_size - 1)))
    throw std::invalid_argument("block_size: expected a power of two from 16 on, got " + std::to_string(block_size));
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(block_size));
  return {packed, make_absmax(absmax, absmax_scale, absmax_offset), rows, k, shift, code4(quant_type).value};
}
inline Matrix4 make_matrix4(const Weight4& weight, std::int64_t k) {
  const auto& [packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type] = weight;
  return make_matrix4(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type);
}

// fp32 constants of the blocks [first, last).
inline void decode_constants(const Absmax& absmax, std::int64_t first, std::int64_t last, float* out) {
  if (!absmax.scales) {
    std::memcpy(out, static_cast<const float*>(absmax.values) + first, sizeof(float) * static_cast<std::size_t>(last - first));
    return;
  }
  static_assert(kNestedBlock % kLanes == 0);
  const auto* codes = static_cast<const std::uint8_t*>(absmax.values);
  std::int64_t block = first;
  for (; block < last && block % kLanes; block++) out[block - first] = absmax[block];
  const auto finish = [&](std::int64_t at, F32 value) {
    store(out + at - first, value * broadcast(absmax.scales[at / kNestedBlock]) + broadcast(absmax.offset));
  };
  while (block + kLanes <= last) {
#ifdef PEFTK_HAS_LOOKUP_64
    if (F32 values[4]; block + 64 <= last) {
      lookup256_64(absmax.code->byte, codes + block, values);
      for (int j = 0; j < 4; j++) finish(block + j * kLanes, values[j]);
      block += 64;
      continue;
    }
#endif
    finish(block, lookup256(absmax.code->value, codes + block));
    block += kLanes;
  }
  for (; block < last; block++) out[block - first] = absmax[block];
}

// Whether a lane may be a row: rows start on a multiple of 64 elements, and each 64 of a row share a constant.
inline constexpr std::int64_t kRun = 64;
inline bool in_runs(const Matrix4& w) { return w.k % kRun == 0 && (std::int64_t{1} << w.block_shift) >= kRun; }

// Constants of the runs [first, last) of a row.
inline void run_constants(const Matrix4& w, std::int64_t row, std::int64_t first, std::int64_t last, float* out) {
  const std::int64_t flat = row * w.k + first * kRun;
  if (w.block_shift == 6) return decode_constants(w.absmax, flat / kRun, flat / kRun + last - first, out);
  for (std::int64_t run = 0; run < last - first; run++) out[run] = w.absmax[(flat + run * kRun) >> w.block_shift];
}

// Constants of the runs [first_run, last_run) of kLanes rows (the last row again where none is left), turned:
// out[(run - first_run) * stride + i] belongs to row first_row + i.
inline void turn_constants(const Matrix4& w, std::int64_t first_row, std::int64_t first_run, std::int64_t last_run, float* out,
                           std::int64_t stride) {
  constexpr std::int64_t kAtOnce = 4 * kLanes;
  float decoded[kLanes][kAtOnce];
  for (std::int64_t start = first_run; start < last_run; start += kAtOnce) {
    const std::int64_t runs = std::min(kAtOnce, last_run - start);
    for (int i = 0; i < kLanes; i++) run_constants(w, std::min(first_row + i, w.rows - 1), start, start + runs, decoded[i]);
    std::int64_t run = 0;
    for (; run + kLanes <= runs; run += kLanes) {
      U32 square[kLanes];
      for (int i = 0; i < kLanes; i++) square[i] = as_cells(load(decoded[i] + run));
      transpose(square);
      for (int i = 0; i < kLanes; i++)
        store_cells(reinterpret_cast<std::uint32_t*>(out + (start - first_run + run + i) * stride), square[i]);
    }
    for (; run < runs; run++)
      for (int i = 0; i < kLanes; i++) out[(start - first_run + run) * stride + i] = decoded[i][run];
  }
}

// For kernels that read `Rows` rows of W side by side, 64 bytes of each at a time: what comes after them is asked for in the
// order of memory, a line for each line that is read, into the second-level cache. A 4096 x 4096 W in DRAM takes nf4_linear_int8
// 0.3 ms so at m = 1, in L3 0.25; it took 0.70 where the next rows were asked for in the order that they are read in, into the
// first level.
inline constexpr std::int64_t kAhead = 8 << 10;  // bytes, at least
inline std::int64_t bytes_ahead(int rows, std::int64_t k) { return std::max<std::int64_t>(rows * k / 2, kAhead); }
template <int Rows>
void ask_ahead(const std::uint8_t* first_row, std::int64_t k, std::int64_t line) {
  __builtin_prefetch(first_row + bytes_ahead(Rows, k) + 64 * line, 0, 2);
}

// At the start of a thread's rows: the bytes that `ask_ahead` leaves out, since nothing comes before them. A W of 576 x 576 has
// 83 KB a thread where there are two; from memory, in a step of generation, it takes 18 us so and 20 to 21 without, with kAhead
// at 32 KB (a Xeon with AMX).
template <int Rows>
void ask_first(const std::uint8_t* first_row, std::int64_t k) {
  for (std::int64_t byte = 0; byte < bytes_ahead(Rows, k); byte += 64) __builtin_prefetch(first_row + byte, 0, 2);
}

// `Constants`: Absmax itself, or a pointer p to decoded ones with p[block] valid where it is read.
template <class Constants>
struct Rows4 {
  const Matrix4& matrix;
  Constants constants;
  Table16 table;

  Rows4(const Matrix4& m, Constants c) : matrix(m), constants(c), table(load_table16(m.values)) {}

  // Vectors that start at a multiple of their length lie in one block and in whole bytes.
  bool aligned() const { return matrix.k % kLanes == 0; }
  template <int N>
  void read_whole(std::int64_t row, std::int64_t position, F32* v) const {
    const std::int64_t flat = row * matrix.k + position;
    for (int j = 0; j < N; j++) v[j] = whole(flat + j * kLanes);
  }
  template <int N>
  void read(std::int64_t row, std::int64_t position, int count, F32* v) const {
    const std::int64_t flat = row * matrix.k + position;
    const bool whole_bytes = flat % kLanes == 0;
    for (int j = 0; j < N; j++) {
      const int here = lanes_left(count, j);
      v[j] = whole_bytes && here == kLanes ? whole(flat + j * kLanes) : few(flat + j * kLanes, here);
    }
  }

  F32 whole(std::int64_t flat) const {
    return lookup(table, nibbles(matrix.packed + flat / 2)) * broadcast(constants[flat >> matrix.block_shift]);
  }

  // Any start, any count up to kLanes: elements before `flat` that share its byte, or a block's end inside, are minded.
  F32 few(std::int64_t flat, int count) const {
    float out[kLanes] = {};
    for (int i = 0; i < count; i++) {
      const std::int64_t at = flat + i;
      const int byte = matrix.packed[at / 2];
      out[i] = matrix.values[at & 1 ? byte & 15 : byte >> 4] * constants[at >> matrix.block_shift];
    }
    return load(out);
  }
};

}  // namespace peftk::PEFTK_TIER
