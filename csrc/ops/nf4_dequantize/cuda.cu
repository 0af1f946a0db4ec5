// out = T(value4[code] * scale + 0), scale as in cuda/block_scale.cuh: one kernel, the double-quantised constants decoded inside.
// A warp takes a tile of kChunks stores a lane. Every load and store of a warp is one contiguous run: 128-bit loads of packed
// bytes would give each lane 64 neighbouring bytes of result, and its 128-bit stores would each fill half a sector. The trick is
// the table of cuda/byte_table.cuh: a packed byte is two values in one read.
#include "cuda/byte_table.cuh"
#include "cuda/launch.h"
#include "cuda/vector.cuh"
#include "ops/nf4_dequantize/op.h"

namespace peftk::cuda {
namespace nf4_dequantize_kernels {  // a kernel needs a name that other files can see

constexpr int kThreads = 1024;  // one block a multiprocessor fills it: the table is 64 KB
constexpr int kChunks = 8;      // of a lane and tile: so many loads are under way at once

// What one 128-bit store holds: kChunk elements, kChunk / 2 packed bytes.
template <class T>
struct Chunk {
  static constexpr int kChunk = kPerVector<T>;
  static constexpr int kTile = kWarp * kChunks * kChunk;
  using Packed = std::conditional_t<kChunk == 8, std::uint32_t, std::uint16_t>;
};

struct Source {
  const std::uint8_t* packed;  // of element 0
  BlockScales scales;
  std::int64_t block_size;
  std::int64_t first;  // element that goes to out[0]
  std::int64_t count;
};

// `out` is where the lane's first chunk goes.
template <bool kUnderflow, class T>
__device__ __forceinline__ void decode_tile(const ByteRow* rows, const typename Chunk<T>::Packed* words, float own,
                                            const std::uint32_t* from, std::uint32_t at, T* out) {
  constexpr int kChunk = Chunk<T>::kChunk;
#pragma unroll
  for (int c = 0; c < kChunks; c++) {
    const float scale = __shfl_sync(kWholeWarp, own, from[c]);
    float values[kChunk];
    decode_bytes<kUnderflow>(rows, words[c], at, scale, values);
    store_vector(out + c * kWarp * kChunk, values);
  }
}

// One thread's share of pairs [begin, end): any count, block size and alignment.
template <class T, bool kNested>
__device__ __forceinline__ void decode_pairs(const ByteRow* rows, const Source& source, float offset, std::int64_t begin,
                                             std::int64_t end, std::int64_t stride, T* out) {
  const auto value8 = [rows](std::uint8_t code) { return rows[code].value8[0].x; };
  for (std::int64_t pair = begin; pair < end; pair += stride) {
    const float scale = scale_of<kNested>(source.scales, 2 * pair / source.block_size, offset, value8);
    const float2 value = rows[source.packed[pair]].pair[0];
    const std::int64_t at = 2 * pair - source.first;
    if (at >= 0) out[at] = round_to<T>(scaled<true>(value.x, scale));
    if (at + 1 < source.count) out[at + 1] = round_to<T>(scaled<true>(value.y, scale));
  }
}

// Block of a tile: (tile * blocks + first) >> shift, where a tile has many blocks (shift 0), or a block many tiles (blocks 1).
struct Tiles {
  std::uint32_t count;
  std::uint32_t blocks;
  int shift;
  int log_block;
  std::uint64_t first;
};

// Lane i decodes the scale of the tile's i-th block for the whole warp.
template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel(const Source source, const Tiles tiles, const ByteTables tables, T* __restrict__ out) {
  using C = Chunk<T>;
  PEFTK_DYNAMIC_SHARED(ByteRow, rows);
  fill<kThreads>(rows, tables);

  const std::uint32_t lane = threadIdx.x % kWarp, at = lane % kByteCopies * sizeof(float2);
  const auto value8 = [&](std::uint8_t code) { return rows[code].value8[lane % kByteCopies].x; };
  const float offset = offset_of<kNested>(source.scales);
  const std::uint64_t first_block = tiles.first + (lane & (tiles.blocks - 1));
  std::uint32_t from[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; c++) from[c] = (c * kWarp + lane) * C::kChunk >> tiles.log_block;

  const std::uint32_t warp = blockIdx.x + threadIdx.x / kWarp * gridDim.x, warps = gridDim.x * (kThreads / kWarp);
  const auto* here = reinterpret_cast<const typename C::Packed*>(source.packed + source.first / 2) +
                     static_cast<std::uint64_t>(warp) * (kWarp * kChunks) + lane;
  T* there = out + static_cast<std::uint64_t>(warp) * C::kTile + lane * C::kChunk;
  for (std::uint32_t tile = warp; tile < tiles.count; tile += warps) {
    typename C::Packed words[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; c++) words[c] = __ldcs(here + c * kWarp);
    const std::uint64_t block = (static_cast<std::uint64_t>(tile) * tiles.blocks + first_block) >> tiles.shift;
    const float own = scale_of<kNested>(source.scales, block, offset, value8);
    if (__any_sync(kWholeWarp, may_underflow(own)))
      decode_tile<true>(rows, words, own, from, at, there);
    else
      decode_tile<false>(rows, words, own, from, at, there);
    here += static_cast<std::uint64_t>(warps) * (kWarp * kChunks);
    there += static_cast<std::uint64_t>(warps) * C::kTile;
  }

  const std::int64_t thread = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x;
  const std::int64_t rest = source.first + static_cast<std::int64_t>(tiles.count) * C::kTile;
  decode_pairs<T, kNested>(rows, source, offset, rest / 2 + thread, (source.first + source.count + 1) / 2,
                           static_cast<std::int64_t>(gridDim.x) * kThreads, out);
}

// What the main path takes: nothing where accesses would be unaligned, or a tile has more blocks than a warp has lanes.
template <class T>
Tiles make_tiles(const Source& source, const T* out) {
  using C = Chunk<T>;
  const std::int64_t size = source.block_size, step = size < C::kTile ? size : C::kTile;
  const bool fits = (size & (size - 1)) == 0 && C::kTile / size <= kWarp && source.first % step == 0;
  const bool aligned = is_aligned(source.packed + source.first / 2, sizeof(typename C::Packed)) && is_aligned(out, kVectorBytes);
  Tiles tiles{};
  if (!fits || !aligned) return tiles;
  tiles.count = static_cast<std::uint32_t>(source.count / C::kTile);
  tiles.blocks = static_cast<std::uint32_t>(C::kTile / step);
  tiles.shift = __builtin_ctzll(size / step);
  tiles.log_block = __builtin_ctzll(size);
  tiles.first = static_cast<std::uint64_t>(source.first / step);
  return tiles;
}

}  // namespace nf4_dequantize_kernels

void nf4_dequantize(const std::uint8_t* packed, const void* absmax, const float* absmax_scale, const float* absmax_offset,
                    std::int64_t first, std::int64_t count, std::int64_t block_size, int quant_type, void* out, int dtype,
                    void* stream) {
  using namespace nf4_dequantize_kernels;
  if (count == 0) return;
  const Source source{packed, {absmax, absmax_scale, absmax_offset}, block_size, first, count};
  const ByteTables tables = byte_tables(quant_type);
  with_type(out, dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const Tiles tiles = make_tiles(source, typed);
    const std::int64_t rest = count - static_cast<std::int64_t>(tiles.count) * Chunk<T>::kTile;
    const std::int64_t rounds = rest / (2 * kThreads);  // of pairs, a block
    const unsigned blocks = blocks_for(rounds > tiles.count ? rounds : tiles.count, 1, 1);
    const auto kernel = absmax_scale ? nf4_dequantize_kernel<T, true> : nf4_dequantize_kernel<T, false>;
    launch(kernel, blocks, kThreads, kByteTableBytes, stream, source, tiles, tables, typed);
  });
}

}  // namespace peftk::cuda
