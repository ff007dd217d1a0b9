// The C++ and CUDA convolutions that torch sees, and every check of their arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>

#include "bindings.h"
#include "cpu/conv3x3.h"
#ifdef FLASHVSR_CUDA
#include "cuda/conv3x3.h"
#endif

namespace {

using flashvsr::check_like;
using flashvsr::Conv3x3Params;
using torch::stable::Tensor;

// The parameters that x gives.
Conv3x3Params check_picture(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be (N, H, W, C), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  STD_TORCH_CHECK(x.size(3) > 0, "x must have channels");
  STD_TORCH_CHECK(x.size(3) <= std::numeric_limits<int>::max() / 64, "x has too many channels: ", x.size(3));
  Conv3x3Params p = {};
  p.x = x.const_data_ptr();
  p.pictures = x.size(0), p.height = x.size(1), p.width = x.size(2);
  p.channels = int(x.size(3)), p.steps = 1;
  p.dtype = flashvsr::dtype_of("x", x);
  return p;
}

// The parameters of a call but where the result goes.
Conv3x3Params check_conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& past, const std::optional<Tensor>& residual, bool relu) {
  Conv3x3Params p = check_picture(x);
  const int64_t inputs = x.size(3) * (past ? 2 : 1), O = weight.dim() ? weight.size(0) : 0;
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == inputs && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight must be (O, ", inputs, ", 3, 3)");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  STD_TORCH_CHECK((O < 2 || weight.stride(0) == 9 * inputs) && (inputs < 2 || weight.stride(1) == 1) &&
                      weight.stride(2) == 3 * inputs && weight.stride(3) == inputs,
                  "weight must lie in memory as channels_last");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == O), "bias must be (", O, ",)");
  STD_TORCH_CHECK(!past || past->dim() == 4, "past must be like x");
  STD_TORCH_CHECK(!residual || residual->dim() == 4, "residual must be (N, H, W, ", O, ")");
  for (int n : {0, 1, 2, 3}) {
    STD_TORCH_CHECK(!past || past->size(n) == x.size(n), "past must be like x");
    STD_TORCH_CHECK(!residual || residual->size(n) == (n < 3 ? x.size(n) : O),
                    "residual must be (N, H, W, ", O, ")");
  }
  STD_TORCH_CHECK(O > 0, "there must be output channels");
  p.weight = weight.const_data_ptr();
  p.bias = check_like("bias", bias, x);
  p.past = check_like("past", past, x);
  p.residual = check_like("residual", residual, x);
  p.outputs = int(O), p.relu = relu;
  return p;
}

Conv3x3Params check_upsample_conv(const Tensor& x, const Tensor& folded, bool relu) {
  Conv3x3Params p = check_picture(x);
  STD_TORCH_CHECK(folded.dim() == 7 && folded.size(6) == x.size(3), "folded must be (T, 2, 2, O, 2, 2, ",
                  x.size(3), ")");
  for (int n : {1, 2, 4, 5})
    STD_TORCH_CHECK(folded.size(n) == 2, "folded must be (T, 2, 2, O, 2, 2, ", x.size(3), ")");
  STD_TORCH_CHECK(folded.size(0) > 0, "folded must have time steps");
  STD_TORCH_CHECK(folded.size(3) > 0, "there must be output channels");
  p.weight = check_like("folded", folded, x);
  p.steps = int(folded.size(0)), p.outputs = int(folded.size(3));
  p.enlarge = true, p.relu = relu;
  return p;
}

#ifdef FLASHVSR_CPU

Tensor run(Conv3x3Params p, const Tensor& x, int64_t isa) {
  const int64_t scale = p.enlarge ? 2 : 1;
  Tensor out = torch::stable::new_empty(
      x, {p.pictures * p.steps, p.height * scale, p.width * scale, int64_t(p.outputs)});
  p.out = out.mutable_data_ptr();
  const auto* kernels = flashvsr::find_conv3x3_cpu(p.dtype, flashvsr::Isa(isa));
  STD_TORCH_CHECK(kernels != nullptr, "no build for x's dtype runs on this processor (isa ", isa, ")");
  if (p.pictures * p.height * p.width > 0)
    flashvsr::run_conv3x3_cpu(p, *kernels, flashvsr::torch_workers());
  return out;
}

Tensor conv3x3_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                   std::optional<Tensor> past, std::optional<Tensor> residual, bool relu, int64_t isa) {
  return run(check_conv3x3(x, weight, bias, past, residual, relu), x, isa);
}

Tensor upsample_conv_cpu(const Tensor& x, const Tensor& folded, bool relu, int64_t isa) {
  return run(check_upsample_conv(x, folded, relu), x, isa);
}

#endif
#ifdef FLASHVSR_CUDA

using flashvsr::where;

void launch(Conv3x3Params p, const Tensor& x, std::initializer_list<const Tensor*> others, const Tensor& out) {
  const int device = flashvsr::check_device(x, others);
  STD_TORCH_CHECK(p.dtype == flashvsr::DType::bf16 || p.dtype == flashvsr::DType::f16,
                  "x must be bfloat16 or float16 on CUDA");
  STD_TORCH_CHECK(p.channels % 8 == 0 && p.outputs % 8 == 0, "channels must be multiples of 8 on CUDA, got ",
                  p.channels, " and ", p.outputs);
  const int64_t scale = p.enlarge ? 2 : 1, sets = p.enlarge ? 4 * p.steps : 1;
  STD_TORCH_CHECK(out.dim() == 4 && out.size(0) == p.pictures * p.steps && out.size(1) == p.height * scale &&
                      out.size(2) == p.width * scale && out.size(3) == p.outputs,
                  "out must be (", p.pictures * p.steps, ", ", p.height * scale, ", ", p.width * scale, ", ",
                  p.outputs, ")");
  check_like("out", out, x);
  flashvsr::check_aligned({p.x, p.past, p.weight, p.bias, p.residual, out.const_data_ptr()});
  // Blocks of the launch, of which there may be so many across, down, and of pictures; places in int32.
  STD_TORCH_CHECK(p.pictures <= 65535 && p.height <= 65535 * 16 &&
                      p.height * p.width <= std::numeric_limits<int>::max() &&
                      (p.width / 16 + 1) * (p.outputs / 64 + 1) * sets <= std::numeric_limits<int>::max(),
                  "pictures are too many or too large: ", p.pictures, " of ", p.height, " by ", p.width, ", ",
                  p.outputs, " output channels");
  p.out = out.mutable_data_ptr();
  if (p.pictures * p.height * p.width == 0) return;
  void* stream = flashvsr::current_stream(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* error = flashvsr_conv3x3_cuda(&p, device, stream);
  STD_TORCH_CHECK(error == nullptr, "conv3x3_cuda was not launched: ", error);
}

void conv3x3_cuda(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> past,
                  std::optional<Tensor> residual, bool relu, const Tensor& out) {
  launch(check_conv3x3(x, weight, bias, past, residual, relu), x,
         {&weight, where(bias), where(past), where(residual), &out}, out);
}

void upsample_conv_cuda(const Tensor& x, const Tensor& folded, bool relu, const Tensor& out) {
  launch(check_upsample_conv(x, folded, relu), x, {&folded, &out}, out);
}

#endif

}  // namespace

#ifdef FLASHVSR_CPU
STABLE_TORCH_LIBRARY_FRAGMENT(flashvsr, m) {
  // weight: channels_last    isa: number of an Isa, for tests
  m.def(
      "conv3x3_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? past, Tensor? residual, bool relu, "
      "int isa=0) -> Tensor");
  m.def("upsample_conv_cpu(Tensor x, Tensor folded, bool relu, int isa=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(flashvsr, CPU, m) {
  m.impl("conv3x3_cpu", TORCH_BOX(&conv3x3_cpu));
  m.impl("upsample_conv_cpu", TORCH_BOX(&upsample_conv_cpu));
}
#endif
#ifdef FLASHVSR_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(flashvsr, m) {
  m.def(
      "conv3x3_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor? past, Tensor? residual, bool relu, "
      "Tensor(a!) out) -> ()");
  m.def("upsample_conv_cuda(Tensor x, Tensor folded, bool relu, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flashvsr, CUDA, m) {
  m.impl("conv3x3_cuda", TORCH_BOX(&conv3x3_cuda));
  m.impl("upsample_conv_cuda", TORCH_BOX(&upsample_conv_cuda));
}
#endif
