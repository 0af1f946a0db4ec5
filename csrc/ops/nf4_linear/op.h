// nf4_linear: y = x W^T + bias; nf4_linear_dx: dx = sum of dy W over the weights that share x; W in 4 bits.
#pragma once
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "format/weight4.h"

namespace peftk {

PEFTK_EVERY_TIER(void nf4_linear(const std::uint8_t* packed,  // (ceil(n * k / 2),)
                                 const void* absmax,          // (blocks,) fp32, or uint8 codes
                                 const float* absmax_scale,   // (ceil(blocks / 256),) or nullptr
                                 const float* absmax_offset,  // (1,) or nullptr
                                 std::int64_t n, std::int64_t k,
                                 std::int64_t block_size,  // elements a block, a power of two from 16 on
                                 int quant_type,           // 0 nf4, 1 fp4
                                 const void* x,            // (m, k), x_stride elements from row to row
                                 std::int64_t x_stride, std::int64_t m,
                                 int dtype,         // of x, bias and y: DType
                                 const void* bias,  // (n,) or nullptr
                                 void* y,           // (m, n)
                                 int threads);)

// The same for several weights of one k.
PEFTK_EVERY_TIER(void nf4_linear_many(const std::vector<std::tuple<Weight4,
                                                                   const void*,  // bias
                                                                   void*>>&      // y
                                          outputs,
                                      std::int64_t k, const void* x, std::int64_t x_stride, std::int64_t m, int dtype,
                                      int threads);)

PEFTK_EVERY_TIER(void nf4_linear_dx(const std::vector<std::tuple<Weight4,
                                                                 const void*,     // dy (m, n)
                                                                 std::int64_t>>&  // elements from row to row of it
                                        gradients,
                                    std::int64_t k, std::int64_t m,
                                    int dtype,  // of dy and dx
                                    void* dx,   // (m, k)
                                    int threads);)

namespace cuda {
// Products on the device of `stream`, without waiting for it: y = x W^T + bias + scale * s b^T for each weight of the list (16 at
// most), dx = sum of dy W + D(t a) over the list; D is dropout. The low-rank start is left out where s (t) is nullptr.
// split > 1: the inner dimension is cut into so many runs, whose sums a second kernel adds in their order, out of `partial`.
using LinearOutput = std::tuple<Weight4,
                                const void*,   // bias (n,) or nullptr
                                void*,         // y (m, n)
                                const void*,   // s (m, r) or nullptr
                                const void*,   // b (n, r)
                                std::int64_t,  // r
                                float,         // scale
                                int>;          // split
using LinearGradient = std::tuple<Weight4,
                                  const void*,     // dy (m, n)
                                  std::int64_t,    // elements from row to row of it
                                  const void*,     // t (m, r) or nullptr
                                  const void*,     // a (r, k)
                                  std::int64_t,    // r
                                  std::uint32_t,   // p * 2^32 of the dropout on t a, whose elements count as those of (m, k)
                                  float,           // 1 / (1 - p)
                                  std::uint64_t>;  // seed

// A few rows: m ≤ 8, bf16 or fp16, sm_80 or later, k and blocks multiples of 64, packed and the rows of x on 16 bytes.
void nf4_linear_few(const std::vector<LinearOutput>& outputs, std::int64_t k,
                    const void* x,  // (m, k), x_stride elements from row to row
                    std::int64_t x_stride, std::int64_t m,
                    int dtype,       // of everything but the weights: DType
                    float* partial,  // (sum over the outputs with split > 1 of split * m * n,), or nullptr where none has
                    void* stream);   // cudaStream_t

// Any m, else as above. tokens: rows of x in a tile, 16, 32, 64 or 128.
void nf4_linear_tile(const std::vector<LinearOutput>& outputs, std::int64_t k,
                     const void* x,  // (m, k), x_stride elements from row to row
                     std::int64_t x_stride, std::int64_t m, int dtype, int tokens,
                     float* partial,  // as above
                     void* stream);

// Every shape, format and dtype, on every target: sums by fp32 units.
void nf4_linear_simple(const std::vector<LinearOutput>& outputs, std::int64_t k,
                       const void* x,  // (m, k), x_stride elements from row to row
                       std::int64_t x_stride, std::int64_t m, int dtype,
                       float* partial,  // as above
                       void* stream);

// dx, with the limits of nf4_linear_tile and the rows of every dy on 16 bytes.
void nf4_linear_dx_tile(const std::vector<LinearGradient>& gradients, std::int64_t k, std::int64_t m, int dtype, int tokens,
                        int split,
                        void* dx,        // (m, k)
                        float* partial,  // (split, m, k), or nullptr where split is 1
                        void* stream);

// dx for every shape, format and dtype, on every target.
void nf4_linear_dx_simple(const std::vector<LinearGradient>& gradients, std::int64_t k, std::int64_t m, int dtype, int split,
                          void* dx,        // (m, k)
                          float* partial,  // (split, m, k), or nullptr where split is 1
                          void* stream);

// A chunk of W: rows first_row … + rows, columns first_column … + columns, every element rounded once.
void nf4_linear_decode(const Weight4& weight, std::int64_t k, std::int64_t first_row, std::int64_t rows,
                       std::int64_t first_column, std::int64_t columns,
                       void* out,  // (rows, columns)
                       int dtype,  // of out: DType
                       void* stream);
}  // namespace cuda

}  // namespace peftk
