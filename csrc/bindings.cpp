// The attention ops that torch sees, and every check of their arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "bindings.h"
#include "cpu/sparse_attn.h"
#ifdef FLASHVSR_CUDA
#include "cuda/sparse_attn.h"
#endif

namespace {

using flashvsr::dtype_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

flashvsr::Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

struct SparseAttnCall {
  flashvsr::SparseAttnParams params;
  Tensor out, lse;
};

SparseAttnCall check_sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index,
                                 const Tensor& count, double scale) {
  STD_TORCH_CHECK(q.dim() == 4, "q must be (B, Lq, H, D), got ", q.dim(), " dimensions");
  STD_TORCH_CHECK(k.dim() == 4, "k must be (B, Lk, H, D), got ", k.dim(), " dimensions");
  STD_TORCH_CHECK(v.dim() == 4, "v must be (B, Lk, H, D), got ", v.dim(), " dimensions");
  const int64_t B = q.size(0), Lq = q.size(1), H = q.size(2), D = q.size(3), Lk = k.size(1);
  STD_TORCH_CHECK(D == 64 || D == 128, "D must be 64 or 128, got ", D);
  for (int n : {0, 2, 3})
    STD_TORCH_CHECK(k.size(n) == q.size(n), "k must agree with q in dimension ", n, ": ", k.size(n), " and ",
                    q.size(n));
  for (int n : {0, 1, 2, 3})
    STD_TORCH_CHECK(v.size(n) == k.size(n), "v must agree with k in dimension ", n, ": ", v.size(n), " and ",
                    k.size(n));
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "k must have q's dtype");
  STD_TORCH_CHECK(v.scalar_type() == q.scalar_type(), "v must have q's dtype");
  STD_TORCH_CHECK(q.stride(3) == 1, "q's last dimension must be contiguous, its stride is ", q.stride(3));
  STD_TORCH_CHECK(k.stride(3) == 1, "k's last dimension must be contiguous, its stride is ", k.stride(3));
  STD_TORCH_CHECK(v.stride(3) == 1, "v's last dimension must be contiguous, its stride is ", v.stride(3));
  const int64_t Mq = (Lq + flashvsr::kBlock - 1) / flashvsr::kBlock,
                Mk = (Lk + flashvsr::kBlock - 1) / flashvsr::kBlock;
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int, "index must be int32");
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Int, "count must be int32");
  STD_TORCH_CHECK(index.dim() == 4 && index.size(0) == B && index.size(1) == H && index.size(2) == Mq,
                  "index must be (", B, ", ", H, ", ", Mq, ", cap)");
  STD_TORCH_CHECK(count.dim() == 3 && count.size(0) == B && count.size(1) == H && count.size(2) == Mq,
                  "count must be (", B, ", ", H, ", ", Mq, ")");
  STD_TORCH_CHECK(index.is_contiguous(), "index must be contiguous");
  STD_TORCH_CHECK(count.is_contiguous(), "count must be contiguous");
  Tensor out = torch::stable::new_empty(q, {B, Lq, H, D});
  Tensor lse = torch::stable::new_empty(q, {B, H, Lq}, ScalarType::Float);
  return {{q.const_data_ptr(),
           k.const_data_ptr(),
           v.const_data_ptr(),
           out.mutable_data_ptr(),
           static_cast<float*>(lse.mutable_data_ptr()),
           static_cast<const int32_t*>(index.const_data_ptr()),
           static_cast<const int32_t*>(count.const_data_ptr()),
           nullptr,
           strides_of(q),
           strides_of(k),
           strides_of(v),
           B,
           H,
           Lq,
           Lk,
           Mq,
           Mk,
           index.size(3),
           int(D),
           dtype_of("q", q),
           scale},
          out,
          lse};
}

#ifdef FLASHVSR_CPU

// On the CPU the lists are cheap to look at: an index out of range must not become a wild read.
void check_lists(const flashvsr::SparseAttnParams& p) {
  for (int64_t list = 0; list < p.batches * p.heads * p.q_blocks; ++list) {
    const int32_t count = p.count[list], *index = p.index + list * p.cap;
    STD_TORCH_CHECK(count >= 0 && count <= p.cap, "count must be 0 to ", p.cap, ", got ", count);
    for (int32_t n = 0; n < count; ++n)
      STD_TORCH_CHECK(index[n] >= 0 && index[n] < p.k_blocks, "index must be below ", p.k_blocks, ", got ",
                      index[n]);
  }
}

std::tuple<Tensor, Tensor> sparse_attn_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& index, const Tensor& count, double scale,
                                           int64_t isa) {
  SparseAttnCall call = check_sparse_attn(q, k, v, index, count, scale);
  const auto& p = call.params;
  check_lists(p);
  const auto* kernels = flashvsr::find_sparse_attn_cpu(p.dtype, flashvsr::Isa(isa));
  STD_TORCH_CHECK(kernels != nullptr, "no build for q's dtype runs on this processor (isa ", isa, ")");
  if (p.batches * p.heads * p.q_blocks > 0)
    flashvsr::run_sparse_attn_cpu(p, *kernels, flashvsr::torch_workers());
  return {call.out, call.lse};
}

#endif
#ifdef FLASHVSR_CUDA

void check_rows(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name,
                  " must begin at a multiple of 16 bytes");
  for (int n : {0, 1, 2})
    STD_TORCH_CHECK(x.size(n) < 2 || x.stride(n) % 8 == 0, name,
                    "'s rows must be 16-byte aligned, stride ", n, " is ", x.stride(n));
}

std::tuple<Tensor, Tensor> sparse_attn_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& index, const Tensor& count, const Tensor& order,
                                            double scale) {
  STD_TORCH_CHECK(q.is_cuda(), "q must be on a CUDA device");
  const int device = q.get_device_index();
  for (const Tensor* x : {&k, &v, &index, &count, &order})
    STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == device,
                    "k, v, index, count and order must be on q's device");
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
                  "q must be bfloat16 or float16 on CUDA");
  STD_TORCH_CHECK(scale > 0, "scale must be positive on CUDA, got ", scale);
  SparseAttnCall call = check_sparse_attn(q, k, v, index, count, scale);
  check_rows("q", q);
  check_rows("k", k);
  check_rows("v", v);
  flashvsr::SparseAttnParams& p = call.params;
  STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int, "order must be int32");
  STD_TORCH_CHECK(order.dim() == 1 && order.size(0) == count.numel(), "order must be (", count.numel(), ",)");
  STD_TORCH_CHECK(order.is_contiguous(), "order must be contiguous");
  p.order = static_cast<const int32_t*>(order.const_data_ptr());
  if (p.batches * p.heads * p.q_blocks > 0) {
    void* stream = flashvsr::current_stream(device);
    const torch::stable::accelerator::DeviceGuard guard(device);
    const char* error = flashvsr_sparse_attn_cuda(&p, device, stream);
    STD_TORCH_CHECK(error == nullptr, "sparse_attn_cuda was not launched: ", error);
  }
  return {call.out, call.lse};
}

#endif

}  // namespace

#ifdef FLASHVSR_CPU
STABLE_TORCH_LIBRARY_FRAGMENT(flashvsr, m) {
  // isa: number of an Isa, for tests
  m.def(
      "sparse_attn_cpu(Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, float scale, int isa=0) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flashvsr, CPU, m) { m.impl("sparse_attn_cpu", TORCH_BOX(&sparse_attn_cpu)); }
#endif
#ifdef FLASHVSR_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(flashvsr, m) {
  m.def(
      "sparse_attn_cuda(Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, Tensor order, float scale) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flashvsr, CUDA, m) { m.impl("sparse_attn_cuda", TORCH_BOX(&sparse_attn_cuda)); }
#endif
