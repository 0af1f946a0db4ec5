// The CUDA ops on the host, and the switches of the machine that they run on.
#include "bindings_cuda.h"
#include "fibers.h"

namespace py = pybind11;

PYBIND11_MODULE(cuda_host, m) {
  peftk::expose_cuda_ops(m);
  m.def("set_seed", &cuda_host::set_seed);
  m.def("set_capability", &cuda_host::set_capability);
  m.def("set_multiprocessors", &cuda_host::set_multiprocessors);
  // receiver(symbol, grid, block, shared_bytes, parameters) takes launches; None: fibers run them.
  m.def("set_receiver", [](const py::object& receiver) {
    if (receiver.is_none()) return cuda_host::set_receiver({});
    // Kept for good: it may be let go when the interpreter is no more.
    auto* held = new py::object(receiver);
    cuda_host::set_receiver([held](const cuda_host::Launch& launch) {
      py::gil_scoped_acquire with_gil;
      const auto dimensions = [](const dim3& d) { return py::make_tuple(d.x, d.y, d.z); };
      py::list parameters;
      for (const auto& bytes : launch.parameters) parameters.append(py::bytes(bytes));
      (*held)(launch.symbol, dimensions(launch.grid), dimensions(launch.block), launch.shared_bytes, parameters);
    });
  });
}
