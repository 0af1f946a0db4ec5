// The ops that have CUDA kernels: one line each, here alone. Python calls them through peftk/ops/gpu.py.
#pragma once
#include "bindings_wire.h"
#include "ops/adamw_step/op.h"
#include "ops/blockwise8_dequantize/op.h"
#include "ops/blockwise8_quantize/op.h"
#include "ops/nf4_dequantize/op.h"
#include "ops/nf4_linear/op.h"
#include "ops/nf4_lora_linear/op.h"
#include "ops/nf4_quantize/op.h"
#include "ops/philox_dropout/op.h"

namespace peftk {

#define PEFTK_CUDA_OP(op) expose(m, "cuda_" #op, ::peftk::cuda::op, [] { return &::peftk::cuda::op; })

inline void expose_cuda_ops(py::module_& m) {
  PEFTK_CUDA_OP(adamw_step);
  PEFTK_CUDA_OP(adamw_step8);
  PEFTK_CUDA_OP(blockwise8_dequantize);
  PEFTK_CUDA_OP(blockwise8_quantize);
  PEFTK_CUDA_OP(nf4_dequantize);
  PEFTK_CUDA_OP(nf4_linear_decode);
  PEFTK_CUDA_OP(nf4_linear_dx_simple);
  PEFTK_CUDA_OP(nf4_linear_few);
  PEFTK_CUDA_OP(nf4_linear_simple);
  PEFTK_CUDA_OP(nf4_linear_tile);
  PEFTK_CUDA_OP(nf4_linear_dx_tile);
  PEFTK_CUDA_OP(nf4_lora_linear_outer);
  PEFTK_CUDA_OP(nf4_lora_linear_shrink);
  PEFTK_CUDA_OP(nf4_quantize);
  PEFTK_CUDA_OP(philox_dropout);
}

}  // namespace peftk
