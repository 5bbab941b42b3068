// fastmkd._native: what is not a tensor op. Build metadata, processor features, instruction-set override, self-test.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "core/isa.h"
#include "core/self_test.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (fastmkd::Isa isa : fastmkd::available_isas()) names.emplace_back(fastmkd::isa_name(isa));
  return names;
}

std::vector<std::tuple<std::string, bool, std::string>> self_test() {
  std::vector<std::tuple<std::string, bool, std::string>> results;
  for (const fastmkd::SelfTestResult& result : fastmkd::self_test()) {
    results.emplace_back(result.name, result.ok, result.detail);
  }
  return results;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build metadata, processor features, instruction-set override and self-test of the compiled libraries.";
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(fastmkd::kBuildInfo); },
      "What this build was made with: compiler, flags, torch, CUDA, what was skipped and why.");
  m.def("cpu_features", &fastmkd::cpu_features, "Extensions of this processor that the library knows about.");
  m.def("available_isas", &isa_names, "Instruction sets compiled in that this processor can run.");
  m.def(
      "active_isa", [] { return std::string(fastmkd::isa_name(fastmkd::active_isa())); },
      "The instruction set in use.");
  m.def("set_isa", &fastmkd::set_isa, py::arg("name"),
        "Switches the kernels to an instruction set; ValueError for one that cannot run here.");
  m.def("self_test", &self_test, py::call_guard<py::gil_scoped_release>(),
        "Every kernel on every available instruction set: a list of (name, ok, detail).");
}
