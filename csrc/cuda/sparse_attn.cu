// Block-sparse attention for sm_80 and newer: cp.async, ldmatrix and mma.sync, bf16 or fp16 with fp32 sums.
//
// A thread block serves one query block: 4 warps of 32 rows, so that keys and values, once in registers,
// serve two products. Tiles of 64 keys, and of their values, come in turn through a ring of three slots: one
// in use, one next, one on its way. With 80 KiB (D 128), 128 threads and 255 registers two thread blocks
// share a multiprocessor that has 164 KiB, and the softmax of one runs beside the products of the other.
//
// Output and scores fill 192 of the 255 registers, so the loop computes or reads anew what it rarely needs.
#include <cuda_runtime.h>

#include "ptx.h"
#include "sparse_attn.h"

namespace {

using namespace flashvsr;

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRowTiles = kBlock / kWarps / 16;     // of 16 rows, for each warp
constexpr int kKeys = 64, kTiles = kBlock / kKeys;  // of a tile; tiles of a block
constexpr int kSlots = 3;
constexpr int kChunk = 8;         // elements in 16 bytes
constexpr float kMostGrowth = 8;  // weights of a row, 1 at its top, may become this large before the top follows
template <int D>
constexpr int kTileBytes = kKeys * D * 2;
template <int D>
constexpr int kSharedBytes = kBlock * D * 2 + kSlots * kTileBytes<D>;
static_assert(kSharedBytes<128> <= 99 * 1024, "sm_86, 89 and 120 give a block no more");

// Rows of D elements in chunks of 16 bytes; a row's chunks are permuted so that ldmatrix reads 8 rows without
// conflict. Tiles are aligned to a row, so that 8 rows further is an addition and chunk + n, where chunk is
// below n's lowest bit, is the address ^ 16 n: few registers hold all addresses.
template <int D>
__device__ uint32_t chunk_at(uint32_t tile, int row, int chunk) {
  return tile + (row * (D / kChunk) + (chunk ^ (row & 7))) * 16;
}

// Starts to copy rows first, first + 1 .. of x; those from `length` on become zero and are not read. A thread
// copies one chunk of every kStep-th row.
template <int D, int rows>
__device__ void copy_rows(uint32_t tile, const uint16_t* x, int64_t stride, int first, int length) {
  constexpr int kPerRow = D / kChunk, kStep = kThreads / kPerRow;
  static_assert(kStep % 8 == 0, "rows 8 apart are permuted alike");
  const int row = threadIdx.x / kPerRow, chunk = threadIdx.x % kPerRow;
  const uint16_t* from = x + (first + row) * stride + chunk * kChunk;
  uint32_t to = chunk_at<D>(tile, row, chunk);
  if (first + rows <= length) {
#pragma unroll
    for (int n = 0; n < rows; n += kStep, from += kStep * stride) copy_chunk(to + n * D * 2, from);
  } else {
#pragma unroll 1
    for (int n = first + row; n < first + rows; n += kStep, from += kStep * stride, to += kStep * D * 2)
      copy_chunk(to, n < length ? from : x, n < length);
  }
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

// The list of key blocks that this thread block serves, and whose it is. Read anew with every call.
struct List {
  int number, block, head, batch;
};
__device__ List list_of(const SparseAttnParams& p) {
  const int number = *static_cast<const volatile int32_t*>(p.order + blockIdx.x);
  const int blocks = int(p.q_blocks), heads = int(p.heads);
  return {number, number % blocks, number / blocks % heads, number / blocks / heads};
}

__device__ const uint16_t* head_of(const void* x, const Strides& s, const List& list) {
  return static_cast<const uint16_t*>(x) + list.batch * s.batch + list.head * s.head;
}

template <bool kBf16, int D>
__global__ void __launch_bounds__(kThreads, 2) sparse_attn(const __grid_constant__ SparseAttnParams p) {
  extern __shared__ __align__(256) uint8_t shared[];
  __shared__ struct {
    const uint16_t *k, *v;
    const int32_t* index;
  } from;
  const uint32_t q_tile = uint32_t(__cvta_generic_to_shared(shared)), ring = q_tile + kBlock * D * 2;
  const List list = list_of(p);
  const int tiles = p.count[list.number] * kTiles;
  const float factor = float(p.scale * 1.4426950408889634);  // scores are taken to base 2
  if (threadIdx.x == 0)
    from = {head_of(p.k, p.k_strides, list), head_of(p.v, p.v_strides, list), p.index + list.number * p.cap};
  __syncthreads();

  // Copies the next tile, keys before values, to the slot before the one in use. The number of its block is
  // read a while before, as its address waits for it.
  int next_block = tiles > 0 ? *from.index : 0;
  uint32_t slot = ring;
  constexpr uint32_t kLast = (kSlots - 1) * kTileBytes<D>;
  auto slot_before = [&] { return slot == ring ? ring + kLast : slot - kTileBytes<D>; };
  auto slot_after = [&] { return slot == ring + kLast ? ring : slot + kTileBytes<D>; };
  auto copy = [&](int tile, uint32_t to, const uint16_t* x, int64_t stride) {
    if (tile < tiles)
      copy_rows<D, kKeys>(to, x, stride, next_block * kBlock + tile % kTiles * kKeys, int(p.k_len));
    end_copy_group();
  };
  if (tiles > 0) {
    copy_rows<D, kBlock>(q_tile, head_of(p.q, p.q_strides, list), p.q_strides.row, list.block * kBlock,
                         int(p.q_len));
    copy(0, ring, from.k, p.k_strides.row);
    copy(0, ring + kTileBytes<D>, from.v, p.v_strides.row);
    next_block = from.index[min(1, tiles - 1) / kTiles];
  }

  // Of a thread: rows 16 t + lane / 4 + 8 i of the warp (t: tile, i: 0, 1), columns 8 n + 2 (lane % 4) + {0,
  // 1}. A probability is 2^(score * factor - top).
  float out[kRowTiles][D / 8][4] = {}, top[kRowTiles][2], sum[kRowTiles][2] = {};
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) top[t][0] = top[t][1] = -INFINITY;

  // Where a lane reads: queries (a), keys (b), values (b, transposed).
  const uint32_t q_at =
      chunk_at<D>(q_tile, threadIdx.x / 32 * kRowTiles * 16 + threadIdx.x % 16, threadIdx.x % 32 / 16);
  auto lane = [] { return thread_index() % 32; };
  auto k_at = [&] { return chunk_at<D>(0, lane() % 8 + lane() / 16 * 8, lane() / 8 % 2); };
  auto v_at = [&] { return chunk_at<D>(0, lane() % 16, lane() / 16); };
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<kSlots - 2>();
    __syncthreads();  // the keys are here for every warp, and every warp is done with the slot before
    copy(tile + 1, slot_before(), from.k, p.k_strides.row);
    const int block_after = from.index[min(tile + 2, tiles - 1) / kTiles];
    float score[kRowTiles][kKeys / 8][4] = {};
    const uint32_t k_slot = slot + k_at();
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t q[kRowTiles][4], k[4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) load_matrices(q[t], (q_at ^ d * 2) + t * 16 * D * 2);
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        load_matrices(k, (k_slot ^ d * 2) + n * 8 * D * 2);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          multiply_add<kBf16>(score[t][n], q[t], k[0], k[1]);
          multiply_add<kBf16>(score[t][n + 1], q[t], k[2], k[3]);
        }
      }
    }
    const int keys = int(p.k_len) - from.index[tile / kTiles] * kBlock - tile % kTiles * kKeys;
    if (keys < kKeys)
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (n * 8 + lane() % 4 * 2 + c % 2 >= keys) score[t][n][c] = -INFINITY;

    // top follows the maximum only when a row of the warp has outgrown it; what came before shrinks then. A
    // list's first tile has a key, so top is finite from then on. Keys with all of a row's weight, one or equal
    // ones, should have the weight 1, which needs no rounding: so top follows too where one is heavier than twice a
    // lane's sum and 1. Equal ones that outgrow it by less carry one rounding more than under the maximum.
    float most[kRowTiles][2];
    bool grown = false;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = score[t][0][2 * i];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) m = fmaxf(m, fmaxf(score[t][n][2 * i], score[t][n][2 * i + 1]));
        most[t][i] = m * factor;
        grown |= exp2_fast(most[t][i] - top[t][i]) > fminf(kMostGrowth, fmaf(2, sum[t][i], 1));
      }
    if (__any_sync(~0u, grown))
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float m = fmaxf(top[t][i], row_max(most[t][i])), shrink = exp2_fast(top[t][i] - m);
          top[t][i] = m;
          sum[t][i] *= shrink;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) out[t][n][2 * i] *= shrink, out[t][n][2 * i + 1] *= shrink;
        }

    slot = slot_after();
    wait_for_copies<kSlots - 2>();
    __syncthreads();  // likewise the values
    copy(tile + 1, slot_before(), from.v, p.v_strides.row);
    next_block = block_after;
    const uint32_t v_slot = slot + v_at();
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      uint32_t probability[kRowTiles][4], v[4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float* s = &score[t][key / 8 + r / 2][r % 2 * 2];
          const float low = exp2_fast(fmaf(s[0], factor, -top[t][r % 2]));
          const float high = exp2_fast(fmaf(s[1], factor, -top[t][r % 2]));
          sum[t][r % 2] += low;
          sum[t][r % 2] += high;
          probability[t][r] = pack<kBf16>(low, high);
        }
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        load_matrices_transposed(v, (v_slot ^ n * 16) + key * D * 2);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          multiply_add<kBf16>(out[t][n], probability[t], v[0], v[1]);
          multiply_add<kBf16>(out[t][n + 1], probability[t], v[2], v[3]);
        }
      }
    }
    slot = slot_after();
  }

  const List again = list_of(p);
  const int warp = thread_index() / 32, column = lane() % 4 * 2;
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = int64_t(again.block) * kBlock + (warp * kRowTiles + t) * 16 + lane() / 4 + 8 * i;
      const float total = row_sum(sum[t][i]), inverse = total == 0 ? 0.f : 1.f / total;  // 0: an empty list
      if (row >= p.q_len) continue;
      auto* to = static_cast<uint32_t*>(p.out) +
                 (((again.batch * p.q_len + row) * p.heads + again.head) * D + column) / 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        to[n * 4] = pack<kBf16>(out[t][n][2 * i] * inverse, out[t][n][2 * i + 1] * inverse);
      if (column == 0)
        p.lse[(again.batch * p.heads + again.head) * p.q_len + row] =
            (top[t][i] + log2f(total)) * 0.69314718f;
    }
}

template <bool kBf16, int D>
cudaError_t launch(const SparseAttnParams& p, cudaStream_t stream) {
  const auto kernel = sparse_attn<kBf16, D>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<D>);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const unsigned lists = unsigned(p.batches * p.heads * p.q_blocks);
  kernel<<<lists, kThreads, kSharedBytes<D>, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

extern "C" const char* flashvsr_sparse_attn_cuda(const SparseAttnParams* params, int device, void* stream) {
  const SparseAttnParams& p = *params;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    auto* on = static_cast<cudaStream_t>(stream);
    const bool bf16 = p.dtype == DType::bf16;
    if (p.dim == 64)
      error = bf16 ? launch<true, 64>(p, on) : launch<false, 64>(p, on);
    else
      error = bf16 ? launch<true, 128>(p, on) : launch<false, 128>(p, on);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
