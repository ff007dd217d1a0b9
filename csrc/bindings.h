// What the bindings share. They use torch's stable ABI alone, so that one build serves every torch from 2.11
// up.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef FLASHVSR_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "cpu/workers.h"
#include "params.h"

namespace flashvsr {

inline DType dtype_of(const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// As many workers as torch has threads, on those threads.
inline Workers torch_workers() {
  return {int(torch::stable::get_num_threads()), [](int count, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(context, int(worker));
            });
          }};
}

#ifdef FLASHVSR_CUDA

// The stream that torch works on. The function lives in libtorch_cuda.so alone: linked normally, this library
// would not load beside a torch without CUDA.
inline void* current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return cuda ? reinterpret_cast<Get>(dlsym(cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA stream: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch gives no CUDA stream for device ", device);
  return stream;
}

#endif

}  // namespace flashvsr
