// A 4-bit weight as kernels see it, the lists of weights that one launch takes, and the tables of both codes.
#pragma once
#include "cuda/block_scale.cuh"
#include "format/nf4.h"
#include "format/weight4.h"

namespace peftk::cuda {

inline constexpr int kMostWeights = 16;  // of one launch: they are kernel parameters

struct DeviceWeight4 {
  const std::uint8_t* packed;  // (ceil(n * k / 2),)
  BlockScales scales;          // absmax, (ceil(n * k / block_size),)
  std::int64_t n;
  int log_block;   // log2 of the elements a block
  int quant_type;  // 0 nf4, 1 fp4
};

inline DeviceWeight4 device_weight(const Weight4& weight) {
  const auto& [packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type] = weight;
  return {packed, {absmax, absmax_scale, absmax_offset}, n, __builtin_ctzll(block_size), quant_type};
}

struct Tables {         // a kernel parameter; each block copies what it needs to shared memory
  float value4[2][16];  // by quant_type and stored code
  float value8[256];    // the signed dynamic 8-bit code
};

inline Tables make_tables() {
  Tables tables;
  for (int type = 0; type < 2; type++)
    for (int i = 0; i < 16; i++) tables.value4[type][i] = code4(type).value[i];
  for (int i = 0; i < 256; i++) tables.value8[i] = code8(true).value[i];
  return tables;
}

inline void check_count(std::size_t weights) {
  if (weights < 1 || weights > kMostWeights) refuse("a list of weights: expected 1 to 16", static_cast<std::int64_t>(weights));
}

}  // namespace peftk::cuda
