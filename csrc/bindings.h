// What the bindings share. They use torch's stable ABI alone, so that one build serves every torch from 2.11
// up.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

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

// Where another tensor of x's dtype lies, or null.
inline const void* check_like(const char* name, const std::optional<torch::stable::Tensor>& y,
                              const torch::stable::Tensor& x) {
  if (!y) return nullptr;
  STD_TORCH_CHECK(y->scalar_type() == x.scalar_type(), name, " must have x's dtype");
  STD_TORCH_CHECK(y->is_contiguous(), name, " must be contiguous");
  return y->const_data_ptr();
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

inline const torch::stable::Tensor* where(const std::optional<torch::stable::Tensor>& x) { return x ? &*x : nullptr; }

// x's device, on which the others, which may be null, must be too.
inline int check_device(const torch::stable::Tensor& x, std::initializer_list<const torch::stable::Tensor*> others) {
  STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
  const int device = x.get_device_index();
  for (const auto* y : others)
    STD_TORCH_CHECK(y == nullptr || (y->is_cuda() && y->get_device_index() == device), "all must be on x's device");
  return device;
}

inline void check_aligned(std::initializer_list<const void*> places) {
  for (const void* at : places)
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(at) % 16 == 0, "tensors must begin at a multiple of 16 bytes");
}

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
