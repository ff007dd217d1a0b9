// The projector's CUDA convolution that torch sees, and every check of its arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>

#include "bindings.h"
#include "cuda/conv3d.h"

namespace {

using flashvsr::CausalConv3dParams;
using flashvsr::ClipStrides;
using flashvsr::where;
using torch::stable::Tensor;

constexpr int64_t kMost = std::numeric_limits<int>::max();

// Where steps of pictures lie; a stride that is used must be of 16 bytes.
ClipStrides check_strides(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.stride(4) == 1, name, " must be contiguous in its last dimension");
  for (int n : {0, 1, 2, 3})
    STD_TORCH_CHECK(x.size(n) == 1 || x.stride(n) % 8 == 0, "rows of ", name, " must be 16-byte aligned");
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

void causal_conv3d_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, std::optional<Tensor> tail,
                        std::optional<Tensor> gamma, const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 5 && x.size(1) % 2 == 0, "x must be (B, T, H, W, C) with even T");
  const int device = flashvsr::check_device(x, {&weight, &bias, where(tail), where(gamma), &out});
  const int64_t C = x.size(4), O = weight.dim() ? weight.size(0) : 0, taps = tail ? 4 : 2;
  CausalConv3dParams p = {};
  p.dtype = flashvsr::dtype_of("x", x);
  STD_TORCH_CHECK(p.dtype == flashvsr::DType::bf16 || p.dtype == flashvsr::DType::f16,
                  "x must be bfloat16 or float16 on CUDA");
  STD_TORCH_CHECK(C > 0 && O > 0 && C % 8 == 0 && O % 8 == 0, "channels must be multiples of 8 on CUDA, got ", C,
                  " and ", O);
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(1) == C && weight.size(2) == taps && weight.size(3) == 3 &&
                      weight.size(4) == 3,
                  "weight must be (O, ", C, ", ", taps, ", 3, 3)");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype");
  STD_TORCH_CHECK(weight.stride(0) == taps * 9 * C && weight.stride(1) == 1 && weight.stride(2) == 9 * C &&
                      weight.stride(3) == 3 * C && weight.stride(4) == C,
                  "weight must lie in memory as channels_last_3d");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == O, "bias must be (", O, ",)");
  STD_TORCH_CHECK(!gamma || (gamma->dim() == 1 && gamma->size(0) == O), "gamma must be (", O, ",)");
  STD_TORCH_CHECK(!tail || tail->dim() == 5, "tail must be like two steps of x");
  STD_TORCH_CHECK(out.dim() == 5, "out must be (B, T / 2, H, W, O)");
  for (int n : {0, 1, 2, 3, 4}) {
    STD_TORCH_CHECK(!tail || tail->size(n) == (n == 1 ? 2 : x.size(n)), "tail must be like two steps of x");
    STD_TORCH_CHECK(out.size(n) == (n == 1 ? x.size(n) / 2 : n == 4 ? O : x.size(n)),
                    "out must be (B, T / 2, H, W, O)");
  }
  STD_TORCH_CHECK(!tail || tail->scalar_type() == x.scalar_type(), "tail must have x's dtype");
  flashvsr::check_like("out", out, x);
  p.x = x.const_data_ptr(), p.x_strides = check_strides("x", x);
  if (tail) p.tail = tail->const_data_ptr(), p.tail_strides = check_strides("tail", *tail);
  p.weight = weight.const_data_ptr();
  p.bias = flashvsr::check_like("bias", bias, x);
  p.gamma = flashvsr::check_like("gamma", gamma, x);
  p.batches = x.size(0), p.steps = x.size(1) / 2, p.height = x.size(2), p.width = x.size(3);
  flashvsr::check_aligned({p.x, p.tail, p.weight, p.bias, p.gamma, out.const_data_ptr()});
  // Blocks of the launch, and places in int32.
  STD_TORCH_CHECK(C <= kMost / 64 && O <= kMost / 64 && 2 * p.batches * p.steps * p.height * p.width <= kMost &&
                      p.batches * p.steps * (p.height / 16 + 1) * (p.width / 16 + 1) * (O / 64 + 1) <= kMost,
                  "pictures are too many or too large: ", p.batches, " clips of ", 2 * p.steps, " of ", p.height,
                  " by ", p.width, ", ", O, " output channels");
  p.channels = int(C), p.outputs = int(O);
  const int64_t pixels = p.batches * p.steps * p.height * p.width;
  if (pixels == 0) return;
  p.out = out.mutable_data_ptr();
  std::optional<Tensor> squares;
  if (gamma) {
    squares = torch::stable::new_empty(x, {(O + 63) / 64, pixels}, torch::headeronly::ScalarType::Float);
    p.squares = static_cast<float*>(squares->mutable_data_ptr());
  }
  void* stream = flashvsr::current_stream(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* error = flashvsr_causal_conv3d_cuda(&p, device, stream);
  STD_TORCH_CHECK(error == nullptr, "causal_conv3d_cuda was not launched: ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flashvsr, m) {
  // weight: channels_last_3d
  m.def(
      "causal_conv3d_cuda(Tensor x, Tensor weight, Tensor bias, Tensor? tail, Tensor? gamma, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flashvsr, CUDA, m) { m.impl("causal_conv3d_cuda", TORCH_BOX(&causal_conv3d_cuda)); }
