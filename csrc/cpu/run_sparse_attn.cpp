// Chooses the build of the kernel for this processor and shares its tasks among workers.
#include <algorithm>
#include <numeric>
#include <vector>

#include "sparse_attn.h"
#include "workers.h"

namespace flashvsr {

const SparseAttnCpu* find_sparse_attn_cpu(DType dtype, Isa isa) {
  struct Build {
    Isa isa;
    bool supported;
    const SparseAttnCpu* (*kernels)(DType);
  };
  const Build builds[] = {
      // best first
#if defined(__x86_64__)
      {Isa::avx512bf16, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl"),
       sparse_attn_avx512bf16},
      {Isa::avx512, __builtin_cpu_supports("avx512f") != 0, sparse_attn_avx512},
      {Isa::avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), sparse_attn_avx2},
#endif
      {Isa::generic, true, sparse_attn_generic}};
  for (const Build& build : builds)
    if (build.supported && (isa == Isa::best || isa == build.isa))
      if (const SparseAttnCpu* kernels = build.kernels(dtype)) return kernels;
  return nullptr;
}

// Heads are packed and served in groups, so that packed keys and values stay small beside the tensors
// themselves while each group has enough query blocks (longest list first) for all workers to finish
// together.
void run_sparse_attn_cpu(const SparseAttnParams& p, const SparseAttnCpu& kernels, const Workers& workers) {
  const int64_t all_heads = p.batches * p.heads, tasks_wanted = 32 * workers.count;
  const int64_t group = std::clamp((tasks_wanted + p.q_blocks - 1) / p.q_blocks, int64_t(1), all_heads);
  const size_t block_bytes = kernels.block_bytes(p.dim), head_bytes = block_bytes * p.k_blocks;
  const size_t scratch_bytes = kernels.scratch_bytes(p.dim);
  const Buffer packed = buffer(head_bytes * group), scratch = buffer(scratch_bytes * workers.count);
  char *const packed_at = static_cast<char*>(packed.get()), *const scratch_at =
                                                                static_cast<char*>(scratch.get());

  std::vector<int64_t> order;
  for (int64_t first = 0; first < all_heads; first += group) {
    const int64_t heads = std::min(group, all_heads - first);
    share(workers, heads * p.k_blocks, [&](int64_t n, int) {
      const int64_t head = first + n / p.k_blocks;
      kernels.pack(p, head / p.heads, head % p.heads, n % p.k_blocks, packed_at + n * block_bytes);
    });
    const int32_t* count = p.count + first * p.q_blocks;
    order.resize(heads * p.q_blocks);
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return count[a] > count[b]; });
    share(workers, int64_t(order.size()), [&](int64_t n, int worker) {
      const int64_t head = first + order[n] / p.q_blocks;
      kernels.attend(p, head / p.heads, head % p.heads, order[n] % p.q_blocks,
                     packed_at + (head - first) * head_bytes, scratch_at + worker * scratch_bytes);
    });
  }
}

}  // namespace flashvsr
