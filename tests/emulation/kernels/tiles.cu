// Matrix tiles for the PTX emulator: cp.async double buffering, ldmatrix, mma.sync.
#include <cuda_bf16.h>
#include <cuda_pipeline.h>

#include <cstdint>

// Each block sums `tiles` tiles of 128 floats, the next tile on its way while one is added.
extern "C" __global__ void sum_tiles(const float* x,  // (gridDim.x, tiles, 128)
                                     float* y,        // (gridDim.x, 128)
                                     int tiles        //
) {
  __shared__ __align__(16) float buffer[2][128];
  const float* mine = x + (int64_t)blockIdx.x * tiles * 128;
  int first = threadIdx.x * 4;
  __pipeline_memcpy_async(&buffer[0][first], mine + first, 16);
  __pipeline_commit();
  float sum[4] = {0, 0, 0, 0};
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) __pipeline_memcpy_async(&buffer[(t + 1) & 1][first], mine + (t + 1) * 128 + first, 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    for (int j = 0; j < 4; ++j) sum[j] += buffer[t & 1][(first + 4 + j) % 128];
    __syncthreads();
  }
  for (int j = 0; j < 4; ++j) y[(int64_t)blockIdx.x * 128 + (first + 4 + j) % 128] = sum[j];
}

__device__ void load_matrix(uint32_t (&r)[4], const void* row) {
  uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
  uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One warp: c (16, 16) = a (16, k) b (k, 16).
extern "C" __global__ void tile_matmul(const __nv_bfloat16* a,  // (16, k)
                                       const __nv_bfloat16* b,  // (k, 16)
                                       float* c,                // (16, 16)
                                       int k                    // a multiple of 16
) {
  __shared__ __align__(16) __nv_bfloat16 a_tile[16][16], b_tile[16][16];
  float d[2][4] = {};
  int lane = threadIdx.x, row = lane % 16, half = lane / 16;
  for (int at = 0; at < k; at += 16) {
    *(uint4*)&a_tile[row][8 * half] = *(const uint4*)(a + row * k + at + 8 * half);
    *(uint4*)&b_tile[row][8 * half] = *(const uint4*)(b + (at + row) * 16 + 8 * half);
    __syncwarp();
    uint32_t a_part[4], b_part[4];
    load_matrix(a_part, &a_tile[row][8 * half]);
    load_matrix_transposed(b_part, &b_tile[row][8 * half]);
    multiply(d[0], a_part, b_part[0], b_part[1]);
    multiply(d[1], a_part, b_part[2], b_part[3]);
    __syncwarp();
  }
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 16 + 8 * n + 2 * (lane % 4) + i % 2] = d[n][i];
}
