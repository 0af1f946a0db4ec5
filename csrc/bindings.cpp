// The front door of peftk._C: one line an op. Pointers cross as addresses (tensor.data_ptr()); checks stand in peftk/ops/<op>/.
#include "bindings_wire.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "format/dynamic8.h"
#include "format/nf4.h"
#include "ops/adamw_step/op.h"
#include "ops/ademamix_step/op.h"
#include "ops/blockwise8_dequantize/op.h"
#include "ops/blockwise8_quantize/op.h"
#include "ops/lion_step/op.h"
#include "ops/lora_linear/op.h"
#include "ops/nf4_dequantize/op.h"
#include "ops/nf4_linear/op.h"
#include "ops/nf4_linear_int8/op.h"
#include "ops/nf4_lora_linear/op.h"
#include "ops/nf4_lora_linear_rows/op.h"
#include "ops/nf4_quantize/op.h"
#include "ops/philox_dropout/op.h"
#ifdef PEFTK_WITH_CUDA
#include "bindings_cuda.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;

#define PEFTK_OP(op) peftk::expose(m, #op, ::peftk::scalar::op, [] { return PEFTK_TIERED(op); })

PYBIND11_MODULE(_C, m) {
  m.def("compiled_tiers", &peftk::compiled_tiers);
  m.def("available_tiers", &peftk::available_tiers);
  m.def("why_not_tiers", &peftk::why_not_tiers);
  m.def("tier", &peftk::tier_name);
  m.def("set_tier", &peftk::set_tier);
  m.def("find_thread_runtime", &peftk::find_thread_runtime);
  m.def("code4", [](int quant_type) {
    const auto& code = peftk::code4(quant_type);
    return py::make_tuple(std::vector<float>(code.value, code.value + 16),
                          std::vector<float>(code.threshold, code.threshold + 15));
  });
  m.def("code8", [](bool is_signed) {
    const auto& code = peftk::code8(is_signed);
    return py::make_tuple(std::vector<float>(code.value, code.value + 256),
                          std::vector<float>(code.threshold, code.threshold + 255));
  });
#ifdef PEFTK_WITH_CUDA
  m.def("cuda_devices", &peftk::cuda_devices);
  m.def("cuda_status", &peftk::cuda_status);
  peftk::expose_cuda_ops(m);
#endif

  PEFTK_OP(adamw_step);
  PEFTK_OP(adamw_step8);
  PEFTK_OP(ademamix_step);
  PEFTK_OP(ademamix_step8);
  PEFTK_OP(blockwise8_dequantize);
  PEFTK_OP(blockwise8_quantize);
  PEFTK_OP(lion_step);
  PEFTK_OP(lion_step8);
  PEFTK_OP(lora_linear);
  PEFTK_OP(lora_linear_backward);
  PEFTK_OP(nf4_dequantize);
  PEFTK_OP(nf4_linear);
  PEFTK_OP(nf4_linear_dx);
  PEFTK_OP(nf4_linear_int8);
  PEFTK_OP(nf4_linear_many);
  PEFTK_OP(nf4_lora_linear);
  PEFTK_OP(nf4_lora_linear_backward);
  PEFTK_OP(nf4_lora_linear_rows);
  PEFTK_OP(nf4_lora_linear_rows_backward);
  PEFTK_OP(nf4_quantize);
  PEFTK_OP(philox_dropout);
}
