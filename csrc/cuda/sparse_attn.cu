// Block-sparse attention for sm_80 and newer: cp.async, ldmatrix and mma.sync, bf16 or fp16 with fp32 sums.
//
// A thread block serves one query block: 4 warps of 32 rows. Key blocks are read in tiles of 32 keys (64
// where D is 64, so that registers do not spill), one tile ahead. At 64 KiB of shared memory and 128 threads
// two thread blocks share a multiprocessor, where it has that much, and fill each other's waits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "sparse_attn.h"

namespace {

using flashvsr::kBlock;
using flashvsr::SparseAttnParams;
using flashvsr::Strides;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRowTiles = kBlock / kWarps / 16;  // of 16 rows, for each warp
constexpr int kChunk = 8;                        // elements in 16 bytes
template <int D>
constexpr int kTileKeys = 4096 / D;
template <int D>
constexpr int kTileBytes = kTileKeys<D> * D * 2;
template <int D>
constexpr int kSharedBytes = kBlock * D * 2 + 4 * kTileBytes<D>;  // queries, two tiles of keys, two of values
static_assert(kSharedBytes<128> <= 99 * 1024, "sm_86, 89 and 120 give a block no more");

// Rows of D elements in chunks of 16 bytes; a row's chunks are permuted so that ldmatrix reads 8 rows without
// conflict. Tiles are aligned to a row, so that 16 rows further is an addition and chunk + n, where chunk is
// below n's lowest bit, is the address ^ 16 n: few registers hold all addresses.
template <int D>
__device__ uint32_t chunk_at(uint32_t tile, int row, int chunk) {
  return tile + (row * (D / kChunk) + (chunk ^ (row & 7))) * 16;
}

// Starts to copy `rows` rows; those from `valid` on become zero and are not read.
template <int D, int rows>
__device__ void copy_rows(uint32_t tile, const uint16_t* from, int64_t stride, int valid) {
  constexpr int kPerRow = D / kChunk;
#pragma unroll 2
  for (int n = threadIdx.x; n < rows * kPerRow; n += kThreads) {
    const int row = n / kPerRow, chunk = n % kPerRow;
    const bool read = row < valid;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(chunk_at<D>(tile, row, chunk)),
                 "l"(from + (read ? row * stride + chunk * kChunk : 0)), "r"(read ? 16 : 0));
  }
}

__device__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

__device__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// c (16x8) += a (16x16) times b (16x8)
template <bool kBf16>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool kBf16>
__device__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (kBf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the 4 lanes that hold one row of a tile.
__device__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ const uint16_t* block_of(const void* x, const Strides& s, int64_t batch, int64_t head,
                                    int64_t row) {
  return static_cast<const uint16_t*>(x) + batch * s.batch + head * s.head + row * s.row;
}

template <bool kBf16, int D>
__global__ void __launch_bounds__(kThreads) sparse_attn(const __grid_constant__ SparseAttnParams p) {
  constexpr int kKeys = kTileKeys<D>, kTiles = kBlock / kKeys;
  extern __shared__ __align__(256) uint8_t shared[];
  const uint32_t q_tile = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t k_tile = q_tile + kBlock * D * 2, v_tile = k_tile + 2 * kTileBytes<D>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t q_at = chunk_at<D>(q_tile, warp * kRowTiles * 16 + lane % 16, lane / 16);
  const uint32_t k_at = chunk_at<D>(k_tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t v_at = chunk_at<D>(v_tile, lane % 16, lane / 16);
  const int list = blockIdx.x, q_blocks = int(p.q_blocks), heads = int(p.heads);
  const int block = list % q_blocks, head = list / q_blocks % heads, batch = list / q_blocks / heads;
  const int32_t count = p.count[list], *index = p.index + list * p.cap;
  const float factor = float(p.scale * 1.4426950408889634);  // scores are taken to base 2

  // Of a thread: rows 16 t + lane / 4 + 8 i of the warp (t: tile, i: 0, 1), columns 8 n + 2 (lane % 4) + {0,
  // 1}.
  float out[kRowTiles][D / 8][4] = {}, most[kRowTiles][2], sum[kRowTiles][2] = {};
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) most[t][0] = most[t][1] = -INFINITY;

  // The first key of a tile. Tiles alternate between the two buffers.
  auto key_of = [&](int tile) { return int64_t(index[tile / kTiles]) * kBlock + tile % kTiles * kKeys; };
  auto copy_tile = [&](int tile) {
    const int64_t key = key_of(tile), left = p.k_len - key, from = left > 0 ? key : 0;
    const int valid = left > kKeys ? kKeys : int(left), buffer = tile % 2 * kTileBytes<D>;
    copy_rows<D, kKeys>(k_tile + buffer, block_of(p.k, p.k_strides, batch, head, from), p.k_strides.row,
                        valid);
    copy_rows<D, kKeys>(v_tile + buffer, block_of(p.v, p.v_strides, batch, head, from), p.v_strides.row,
                        valid);
    asm volatile("cp.async.commit_group;");
  };
  if (count > 0) {
    const int64_t row = int64_t(block) * kBlock, left = p.q_len - row;
    copy_rows<D, kBlock>(q_tile, block_of(p.q, p.q_strides, batch, head, row), p.q_strides.row,
                         left > kBlock ? kBlock : int(left));
    copy_tile(0);
  }

  for (int tile = 0; tile < kTiles * count; ++tile) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();  // the tile is here for every warp, and every warp is done with the one before
    if (tile + 1 < kTiles * count) copy_tile(tile + 1);
    const uint32_t buffer = tile % 2 * kTileBytes<D>;

    float score[kRowTiles][kKeys / 8][4] = {};
#pragma unroll 4
    for (int d = 0; d < D; d += 16) {
      uint32_t q[kRowTiles][4], k[4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) load_matrices(q[t], (q_at ^ d * 2) + t * 16 * D * 2);
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        load_matrices(k, ((k_at + buffer) ^ d * 2) + n * 8 * D * 2);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          multiply_add<kBf16>(score[t][n], q[t], k[0], k[1]);
          multiply_add<kBf16>(score[t][n + 1], q[t], k[2], k[3]);
        }
      }
    }
    const int64_t keys = p.k_len - key_of(tile);
    if (keys < kKeys)
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (n * 8 + lane % 4 * 2 + c % 2 >= keys) score[t][n][c] = -INFINITY;

    // Scores become probabilities against the running maximum; what came before shrinks with it. A list's
    // first tile has a key, so the maximum is finite from then on.
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = most[t][i];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) m = fmaxf(m, fmaxf(score[t][n][2 * i], score[t][n][2 * i + 1]));
        m = row_max(m);
        const float shrink = exp2_fast((most[t][i] - m) * factor), top = m * factor;
        most[t][i] = m;
        sum[t][i] *= shrink;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) out[t][n][2 * i] *= shrink, out[t][n][2 * i + 1] *= shrink;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int c = 2 * i; c < 2 * i + 2; ++c) {
            score[t][n][c] = exp2_fast(fmaf(score[t][n][c], factor, -top));
            sum[t][i] += score[t][n][c];
          }
      }

#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      uint32_t probability[kRowTiles][4], v[4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float* c = &score[t][key / 8 + r / 2][r % 2 * 2];
          probability[t][r] = pack<kBf16>(c[0], c[1]);
        }
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        load_matrices_transposed(v, ((v_at + buffer) ^ n * 16) + key * D * 2);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          multiply_add<kBf16>(out[t][n], probability[t], v[0], v[1]);
          multiply_add<kBf16>(out[t][n + 1], probability[t], v[2], v[3]);
        }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = int64_t(block) * kBlock + (warp * kRowTiles + t) * 16 + lane / 4 + 8 * i;
      const float total = row_sum(sum[t][i]), inverse = count > 0 ? 1.f / total : 0.f;
      if (row >= p.q_len) continue;
      auto* to =
          static_cast<uint32_t*>(p.out) + (((batch * p.q_len + row) * p.heads + head) * D + lane % 4 * 2) / 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        to[n * 4] = pack<kBf16>(out[t][n][2 * i] * inverse, out[t][n][2 * i + 1] * inverse);
      if (lane % 4 == 0)
        p.lse[(batch * p.heads + head) * p.q_len + row] =
            count > 0 ? (most[t][i] * factor + log2f(total)) * 0.69314718f : -INFINITY;
    }
}

template <bool kBf16, int D>
cudaError_t launch(const SparseAttnParams& p, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      sparse_attn<kBf16, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<D>);
  if (error != cudaSuccess) return error;
  const unsigned lists = unsigned(p.batches * p.heads * p.q_blocks);
  sparse_attn<kBf16, D><<<lists, kThreads, kSharedBytes<D>, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

extern "C" const char* flashvsr_sparse_attn_cuda(const SparseAttnParams* params, int device, void* stream) {
  const SparseAttnParams& p = *params;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    auto* on = static_cast<cudaStream_t>(stream);
    const bool bf16 = p.dtype == flashvsr::DType::bf16;
    if (p.dim == 64)
      error = bf16 ? launch<true, 64>(p, on) : launch<false, 64>(p, on);
    else
      error = bf16 ? launch<true, 128>(p, on) : launch<false, 128>(p, on);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
