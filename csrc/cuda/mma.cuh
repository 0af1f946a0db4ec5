// Tensor cores by warp, sm_80 and later: c (16, 8) += a (16, 16) b (16, 8), 16-bit elements, fp32 sums. Lane = 4 g + t holds
//   a[0] (g, 2t) (g, 2t+1)   a[1] (g+8, 2t) …   a[2] (g, 2t+8) …   a[3] (g+8, 2t+8) …      the first of a pair in the low half
//   b[0] (2t, g) (2t+1, g)   b[1] (2t+8, g) (2t+9, g)
//   c[0] (g, 2t)  c[1] (g, 2t+1)  c[2] (g+8, 2t)  c[3] (g+8, 2t+1)
// Any order of the inner dimension is right as long as a and b are in the same one.
#pragma once
#include <type_traits>

#include "cuda/convert.cuh"

namespace peftk::cuda {

// Whether this pass compiles for sm_80 or later: bodies of kernels that need it stand under `if constexpr (kHasSm80)`.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kHasSm80 = false;
#else
inline constexpr bool kHasSm80 = true;
#endif

#ifdef PEFTK_CUDA_HOST
using cuda_host::load_matrices;
using cuda_host::load_matrices_transposed;

template <class T>
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  cuda_host::mma(c, a, b, [](std::uint32_t bits) { return to_float(T{static_cast<std::uint16_t>(bits)}); });
}
#else

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements out of shared memory: lane i gives the 16-byte aligned row i % 8 of matrix i / 8, lane
// 4 g + t gets elements (g, 2t) and (g, 2t+1) of each; transposed, (2t, g) and (2t+1, g).
__device__ __forceinline__ void load_matrices(std::uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row))));
}
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(row))));
}
#endif

}  // namespace peftk::cuda
