// out (rows, columns) = T(W[first_row …, first_column …]), each element as nf4_dequantize rounds it. Where everything is a
// multiple of 64, a warp takes kSpan columns of kRows rows: 32 pieces of 64 columns, so that lane i decodes the scale of piece i,
// and a shuffle brings it to those who need it. Packed bytes become values by the table of cuda/byte_table.cuh; loads and stores
// of a warp are contiguous. At the edges tiles overlap: no access is conditional. Stores stay in L2, where a product reads the
// chunk next. All else: element by element.
#include "cuda/byte_table.cuh"
#include "cuda/launch.h"
#include "cuda/vector.cuh"
#include "cuda/weight4.cuh"
#include "ops/nf4_linear/op.h"

namespace peftk::cuda {
namespace nf4_linear_decode_kernels {

constexpr int kThreads = 1024;  // one block a multiprocessor fills it: the table is 64 KB
constexpr int kPiece = 64;      // columns that lie in one block for sure

// What a warp takes: a 128-bit store a lane and row.
template <class T>
struct Tile {
  static constexpr int kOwn = kPerVector<T>;      // columns of a lane
  static constexpr int kSpan = kWarp * kOwn;      // columns
  static constexpr int kPieces = kSpan / kPiece;  // of a row
  static constexpr int kRows = kWarp / kPieces;   // so many loads are under way at once
  using Packed = std::conditional_t<kOwn == 8, std::uint32_t, std::uint16_t>;
};

struct Chunk {  // of W (n, k)
  DeviceWeight4 weight;
  std::int64_t k;
  std::int64_t first_row, rows;
  std::int64_t first_column, columns;
};

// `own`: the scale of the lane's piece; `out`: where the lane's columns of the first row go.
template <class T>
__device__ __forceinline__ void decode_tile(const ByteRow* table, const typename Tile<T>::Packed (&words)[Tile<T>::kRows],
                                            float own, std::uint32_t lane, std::int64_t columns, T* out) {
  using Tile = Tile<T>;
  const std::uint32_t at = lane % kByteCopies * sizeof(float2), piece = lane * Tile::kOwn / kPiece;
  const bool rare = __any_sync(kWholeWarp, may_underflow(own));
#pragma unroll
  for (int r = 0; r < Tile::kRows; r++, out += columns) {
    const float scale = __shfl_sync(kWholeWarp, own, r * Tile::kPieces + piece);
    float values[Tile::kOwn];
    if (rare)
      decode_bytes<true>(table, words[r], at, scale, values);
    else
      decode_bytes<false>(table, words[r], at, scale, values);
    __stcg(reinterpret_cast<uint4*>(out), round_vector<T>(values));
  }
}

struct Tiles {
  std::uint32_t count;
  std::uint32_t across;  // side by side
};

template <class T, bool kNested>
__global__ void __launch_bounds__(kThreads)
    decode_tiles_kernel(const Chunk chunk, const Tiles tiles, const ByteTables tables, T* __restrict__ out) {
  using Tile = Tile<T>;
  PEFTK_DYNAMIC_SHARED(ByteRow, table);
  fill<kThreads>(table, tables);

  const std::uint32_t lane = threadIdx.x % kWarp;
  const auto value8 = [&](std::uint8_t code) { return table[code].value8[lane % kByteCopies].x; };
  const float offset = offset_of<kNested>(chunk.weight.scales);
  const std::int64_t first = chunk.first_row * chunk.k + chunk.first_column;
  const std::int64_t piece = lane / Tile::kPieces * chunk.k + lane % Tile::kPieces * kPiece;  // from the tile's first element on
  const std::uint32_t warp = blockIdx.x + threadIdx.x / kWarp * gridDim.x, warps = gridDim.x * (kThreads / kWarp);
  for (std::uint32_t tile = warp; tile < tiles.count; tile += warps) {
    const std::int64_t down = tile / tiles.across, across = tile - down * tiles.across;
    const std::int64_t row = min(down * Tile::kRows, chunk.rows - Tile::kRows);
    const std::int64_t column = min(across * Tile::kSpan, chunk.columns - Tile::kSpan);
    const std::int64_t start = first + row * chunk.k + column;

    typename Tile::Packed words[Tile::kRows];
    const std::uint8_t* here = chunk.weight.packed + (start + lane * Tile::kOwn) / 2;
#pragma unroll
    for (int r = 0; r < Tile::kRows; r++, here += chunk.k / 2)
      words[r] = __ldcs(reinterpret_cast<const typename Tile::Packed*>(here));
    const std::uint64_t block = static_cast<std::uint64_t>(start + piece) >> chunk.weight.log_block;
    const float own = scale_of<kNested>(chunk.weight.scales, block, offset, value8);
    T* const there = out + row * chunk.columns + column + lane * Tile::kOwn;
    decode_tile(table, words, own, lane, chunk.columns, there);
  }
}

constexpr int kThreadsAny = 256;

// Any k, block size and alignment.
template <class T, bool kNested>
__global__ void __launch_bounds__(kThreadsAny)
    decode_elements_kernel(const Chunk chunk, const ByteTables tables, T* __restrict__ out) {
  PEFTK_SHARED(float, value4, [16]);
  PEFTK_SHARED(float, value8, [256]);
  if (threadIdx.x < 16) value4[threadIdx.x] = tables.value4[threadIdx.x];
  value8[threadIdx.x] = tables.code8.value[threadIdx.x];
  __syncthreads();

  const DeviceWeight4& weight = chunk.weight;
  const float offset = offset_of<kNested>(weight.scales);
  const std::int64_t count = chunk.rows * chunk.columns, step = static_cast<std::int64_t>(gridDim.x) * kThreadsAny;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreadsAny + threadIdx.x; i < count; i += step) {
    const std::uint64_t element = (chunk.first_row + i / chunk.columns) * chunk.k + chunk.first_column + i % chunk.columns;
    const float scale =
        scale_of<kNested>(weight.scales, element >> weight.log_block, offset, [&](std::uint8_t code) { return value8[code]; });
    const std::uint32_t byte = weight.packed[element / 2];
    out[i] = round_to<T>(scaled<true>(value4[element % 2 ? byte & 15 : byte >> 4], scale));
  }
}

// None where an access would be unaligned, a piece in two blocks, or the chunk smaller than a tile.
template <class T>
Tiles make_tiles(const Chunk& chunk, const T* out) {
  const std::int64_t block_size = std::int64_t{1} << chunk.weight.log_block;
  const bool pieces = ((chunk.k | chunk.first_column | chunk.columns | block_size) & (kPiece - 1)) == 0;
  const bool aligned = is_aligned(chunk.weight.packed, sizeof(typename Tile<T>::Packed)) && is_aligned(out, kVectorBytes);
  if (!pieces || !aligned || chunk.rows < Tile<T>::kRows || chunk.columns < Tile<T>::kSpan) return {0, 1};
  const std::int64_t across = (chunk.columns + Tile<T>::kSpan - 1) / Tile<T>::kSpan;
  const std::int64_t down = (chunk.rows + Tile<T>::kRows - 1) / Tile<T>::kRows;
  return {static_cast<std::uint32_t>(across * down), static_cast<std::uint32_t>(across)};
}

template <class T, bool kNested>
void decode(const Chunk& chunk, const ByteTables& tables, T* out, void* stream) {
  if (const Tiles tiles = make_tiles(chunk, out); tiles.count) {
    launch(decode_tiles_kernel<T, kNested>, blocks_for(tiles.count, 1, 1), kThreads, kByteTableBytes, stream, chunk, tiles,
           tables, out);
  } else {
    const unsigned blocks = blocks_for(chunk.rows * chunk.columns, kThreadsAny, kResidentThreads / kThreadsAny);
    launch(decode_elements_kernel<T, kNested>, blocks, kThreadsAny, 0, stream, chunk, tables, out);
  }
}

}  // namespace nf4_linear_decode_kernels

void nf4_linear_decode(const Weight4& weight, std::int64_t k, std::int64_t first_row, std::int64_t rows,
                       std::int64_t first_column, std::int64_t columns, void* out, int dtype, void* stream) {
  using namespace nf4_linear_decode_kernels;
  if (rows == 0 || columns == 0) return;
  const Chunk chunk{device_weight(weight), k, first_row, rows, first_column, columns};
  const ByteTables tables = byte_tables(chunk.weight.quant_type);
  with_type(out, dtype, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const auto run = chunk.weight.scales.scales ? decode<T, true> : decode<T, false>;
    run(chunk, tables, typed, stream);
  });
}

}  // namespace peftk::cuda
