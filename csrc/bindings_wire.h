// How a C++ function's parameters cross from Python, for peftk._C and for the tests' host build of the CUDA kernels.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

namespace peftk {

namespace py = pybind11;

// A pointer as an integer, 0 for nullptr; tuples and lists of such part by part.
template <class T>
struct Wire {
  using Type = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;
  static T read(Type value) {
    if constexpr (std::is_pointer_v<T>)
      return reinterpret_cast<T>(value);
    else
      return value;
  }
};
template <class... Parts>
struct Wire<std::tuple<Parts...>> {
  using Type = std::tuple<typename Wire<Parts>::Type...>;
  static std::tuple<Parts...> read(const Type& value) {
    return std::apply([](const auto&... parts) { return std::tuple<Parts...>(Wire<Parts>::read(parts)...); }, value);
  }
};
template <class T>
struct Wire<std::vector<T>> {
  using Type = std::vector<typename Wire<T>::Type>;
  static std::vector<T> read(const Type& values) {
    std::vector<T> all;
    for (const auto& value : values) all.push_back(Wire<T>::read(value));
    return all;
  }
};

template <class Result, class... Args, class Pick>
void expose(py::module_& m, const char* name, Result (*)(Args...), Pick pick) {
  m.def(name, [pick](typename Wire<std::decay_t<Args>>::Type... args) {
    py::gil_scoped_release without_gil;
    return pick()(Wire<std::decay_t<Args>>::read(args)...);
  });
}

}  // namespace peftk
