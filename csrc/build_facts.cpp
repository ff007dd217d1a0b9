// flashvsr_kernels._build: what setup.py compiled and with what.
#include <pybind11/pybind11.h>

#include <sstream>

namespace py = pybind11;

static py::list words(const char* text) {
  py::list list;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

PYBIND11_MODULE(_build, m) {
  m.def("facts", [] {
    py::dict facts;
    facts["version"] = FLASHVSR_VERSION;
    facts["torch"] = FLASHVSR_TORCH;
    facts["compiler"] = FLASHVSR_COMPILER;
    facts["cpu"] = words(FLASHVSR_CPU_ISAS);
    facts["nvcc"] = FLASHVSR_NVCC_VERSION;
    facts["cuda"] = words(FLASHVSR_CUDA_ARCHS);
    return facts;
  });
}
