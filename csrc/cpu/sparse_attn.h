// Block-sparse attention on CPUs: what the instruction sets share.
#pragma once
#include <stddef.h>

#include "../params.h"

namespace flashvsr {

// One build of sparse_attn.cpp for one dtype. A packed block holds 128 keys and values of one head in the
// order in which the kernel reads them; the packed blocks of a head lie one after the other.
struct SparseAttnCpu {
  size_t (*block_bytes)(int dim);
  size_t (*scratch_bytes)(int dim);  // for attend; both kinds of memory are aligned to 64 bytes
  void (*pack)(const SparseAttnParams&, int64_t batch, int64_t head, int64_t k_block, void* packed);
  void (*attend)(const SparseAttnParams&, int64_t batch, int64_t head, int64_t q_block, const void* packed,
                 void* scratch);
};

// The builds, each null for the dtypes that it does not serve. setup.py says which exist on this kind of
// machine.
const SparseAttnCpu* sparse_attn_generic(DType);
const SparseAttnCpu* sparse_attn_avx2(DType);
const SparseAttnCpu* sparse_attn_avx512(DType);
const SparseAttnCpu* sparse_attn_avx512bf16(DType);

// The best build that this processor runs and that serves dtype, or that of isa; null if there is none.
const SparseAttnCpu* find_sparse_attn_cpu(DType dtype, Isa isa);

struct Workers;
void run_sparse_attn_cpu(const SparseAttnParams&, const SparseAttnCpu&, const Workers&);

}  // namespace flashvsr
