// 3x3 convolutions of NHWC pictures for sm_80 and newer, and growth, enlargement by two and a convolution as one of
// 2x2 taps: implicit products with cp.async, ldmatrix and mma.sync, bf16 or fp16 with fp32 sums.
//
// A thread block makes 16 x 16 pixels of 64 or 128 channels, a warp 4 or 2 rows of them and 64 channels: of 4 rows 32
// products need 8 ldmatrix. Of 32 input channels at a time the pixels with their border come to shared memory once for
// all taps, the next 32 meanwhile; weights come tap after tap through a ring of four slots: one in use, three ahead.
// What lies outside the picture, and channels that are not there, are zeros in shared memory, never in global memory.
// Results leave through shared memory, where their residual has come in, to be read and written in whole lines.
#include <cuda_runtime.h>

#include "conv3x3.h"
#include "ptx.h"

namespace {

using namespace flashvsr;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 16, kColumns = 16;           // pixels of a tile; a warp multiplies whole rows of it
constexpr int kDepth = 32, kChunk = 8;             // input channels of a step; elements in 16 bytes
constexpr int kLineBytes = kDepth * 2;             // of a pixel, or of an output channel's weights
constexpr int kLines = kThreads * kChunk / kDepth;  // that all threads together copy
constexpr int kSlots = 4;

// kSide: taps in each direction, 3, or 2 to enlarge    kHalves: 64 output channels each
template <int kSide>
constexpr int kPatchColumns = kColumns + kSide - 1;
template <int kSide>
constexpr int kPatch = (kRows + kSide - 1) * kPatchColumns<kSide>;  // pixels
template <int kHalves>
constexpr int kSlotBytes = 64 * kHalves * kLineBytes;
template <int kHalves>
constexpr int kTileBytes = kRows * kColumns * 64 * kHalves * 2;  // of results
template <int kSide, int kHalves>
constexpr int kSourceBytes = 2 * kPatch<kSide> * kLineBytes + kSlots * kSlotBytes<kHalves>;
template <int kSide, int kHalves>
constexpr int kSharedBytes = kSourceBytes<kSide, kHalves> > kTileBytes<kHalves> ? kSourceBytes<kSide, kHalves>
                                                                                 : kTileBytes<kHalves>;
static_assert(kSharedBytes<3, 2> <= 99 * 1024, "sm_86, 89 and 120 give a block no more");

// Lines of 32 elements in chunks of 16 bytes, permuted so that ldmatrix reads 8 consecutive lines without conflict.
__device__ inline uint32_t chunk_at(uint32_t lines, int line, int chunk) {
  return lines + line * kLineBytes + ((chunk ^ (line / 2 & 3)) * 16);
}

// One that makes two halves needs the registers of a whole multiprocessor, of one half two share it.
template <bool kBf16, int kSide, int kHalves>
__global__ void __launch_bounds__(kThreads, 3 - kHalves) conv3x3(const __grid_constant__ Conv3x3Params p) {
  constexpr int kTaps = kSide * kSide, kOutputs = 64 * kHalves;
  constexpr int kTileRows = kRows / (kWarps / kHalves);  // of a warp
  constexpr int kPatchLoads = (kPatch<kSide> + kLines - 1) / kLines;
  extern __shared__ __align__(256) uint8_t shared[];
  const uint32_t patches = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t slots = patches + 2 * kPatch<kSide> * kLineBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // A set of weights makes each pixel of a picture once: to enlarge one for each step and phase. Blocks that read the
  // same pixels follow one another.
  const int sets = kSide == 2 ? 4 * p.steps : 1, groups = (p.outputs + kOutputs - 1) / kOutputs;
  const int first = int(blockIdx.x) % groups * kOutputs, set = int(blockIdx.x) / groups % sets;  // output channel
  const int tile_y = int(blockIdx.y) * kRows, tile_x = int(blockIdx.x) / groups / sets * kColumns;
  const int64_t picture = blockIdx.z;
  const int phase_y = kSide == 2 ? set / 2 % 2 : 0, phase_x = kSide == 2 ? set % 2 : 0;
  const int C = p.channels, blocks = (C + kDepth - 1) / kDepth, all = p.past ? 2 * blocks : blocks;

  // A thread copies the same chunk of lines that lie kLines apart.
  auto own_line = [] { return thread_index() / (kDepth / kChunk); };
  auto own_chunk = [] { return thread_index() % (kDepth / kChunk); };
  auto copy_patch = [&](int block) {
    const bool past = block >= blocks;
    const int line = own_line(), chunk = own_chunk();
    const int channel = (past ? block - blocks : block) * kDepth + chunk * kChunk;
    const auto* from = static_cast<const uint16_t*>(past ? p.past : p.x) + picture * p.height * p.width * C;
    const uint32_t to = patches + block % 2 * kPatch<kSide> * kLineBytes;
#pragma unroll
    for (int i = 0; i < kPatchLoads; ++i) {
      const int pixel = line + i * kLines;
      const int64_t y = tile_y + pixel / kPatchColumns<kSide> - 1 + phase_y;
      const int64_t x = tile_x + pixel % kPatchColumns<kSide> - 1 + phase_x;
      const bool read = y >= 0 && y < p.height && x >= 0 && x < p.width && channel < C;
      if (pixel < kPatch<kSide>)
        copy_chunk(chunk_at(to, pixel, chunk), read ? from + (y * p.width + x) * C + channel : from, read);
    }
  };
  const int inputs = p.past ? 2 * C : C;
  auto copy_weights = [&](int block, int tap, uint32_t to) {
    const bool past = block >= blocks;
    const int line = own_line(), chunk = own_chunk();
    const int channel = (past ? block - blocks : block) * kDepth + chunk * kChunk;
    const auto* from = static_cast<const uint16_t*>(p.weight);
#pragma unroll
    for (int i = 0; i < kOutputs / kLines; ++i) {
      const int output = first + line + i * kLines;
      const bool read = output < p.outputs && channel < C;
      const int64_t row = (int64_t(set) * p.outputs + output) * kTaps + tap;
      copy_chunk(chunk_at(to, line + i * kLines, chunk),
                 read ? from + row * inputs + (past ? C : 0) + channel : from, read);
    }
  };
  auto slot_of = [&](int step) { return slots + step % kSlots * kSlotBytes<kHalves>; };

  copy_patch(0);
#pragma unroll
  for (int step = 0; step < kSlots - 1; ++step) {
    copy_weights(0, step, slot_of(step));
    end_copy_group();
  }

  // Of a thread: pixels lane / 4 + 8 i of a row of the tile (i: 0, 1), channels 8 n + 2 (lane % 4) + {0, 1}.
  const int row = warp / kHalves * kTileRows, half = warp % kHalves * 64;
  float sum[kTileRows][8][4];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int output = first + half + 8 * n + lane % 4 * 2;  // and the one after it: outputs come in eights
    float bias[2] = {};
    if (p.bias && output < p.outputs) unpack<kBf16>(static_cast<const uint32_t*>(p.bias)[output / 2], bias);
#pragma unroll
    for (int t = 0; t < kTileRows; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[t][n][j] = bias[j % 2];
  }
  for (int block = 0, step = 0; block < all; ++block) {
    const uint32_t patch = patches + block % 2 * kPatch<kSide> * kLineBytes;
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap, ++step) {
      wait_for_copies<kSlots - 2>();
      __syncthreads();  // this step's are here for every warp, and every warp is done with the step before
      const int ahead = tap + kSlots - 1, later = ahead < kTaps ? ahead : ahead - kTaps;
      const int its_block = ahead < kTaps ? block : block + 1;
      if (its_block < all) copy_weights(its_block, later, slot_of(step + kSlots - 1));
      if (tap == 0 && block + 1 < all) copy_patch(block + 1);
      end_copy_group();

      uint32_t a_at[kTileRows];
#pragma unroll
      for (int t = 0; t < kTileRows; ++t)
        a_at[t] = chunk_at(patch, (row + t + tap / kSide) * kPatchColumns<kSide> + tap % kSide + lane % 16, lane / 16);
      const uint32_t b_at = chunk_at(slot_of(step), half + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t a[kTileRows][4], b[4];
#pragma unroll
        for (int t = 0; t < kTileRows; ++t) load_matrices(a[t], a_at[t] ^ (k * 2));
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          load_matrices(b, (b_at ^ (k * 2)) + n * 8 * kLineBytes);
#pragma unroll
          for (int t = 0; t < kTileRows; ++t) {
            multiply_add<kBf16>(sum[t][n], a[t], b[0], b[1]);
            multiply_add<kBf16>(sum[t][n + 1], a[t], b[2], b[3]);
          }
        }
      }
    }
  }

  // Results take the place of pixels and weights: a line of chunks for each pixel, permuted as above.
  constexpr int kScale = kSide == 2 ? 2 : 1, kChunks = kOutputs / kChunk;
  const int64_t out_picture = kSide == 2 ? picture * p.steps + set / 4 : picture;
  auto place = [](int pixel, int chunk) { return pixel * kOutputs * 2 + ((chunk ^ (pixel & 7)) * 16); };
  auto for_own_chunks = [&](auto move) {  // of the tile: place there, and of the result's first element
#pragma unroll 4
    for (int i = thread_index(); i < kRows * kColumns * kChunks; i += kThreads) {
      const int pixel = i / kChunks, chunk = i % kChunks, output = first + chunk * kChunk;
      const int y = tile_y + pixel / kColumns, x = tile_x + pixel % kColumns;
      if (y < p.height && x < p.width && output < p.outputs)
        move(place(pixel, chunk), ((out_picture * p.height * kScale + y * kScale + phase_y) * p.width * kScale +
                                   x * kScale + phase_x) * p.outputs + output);
    }
  };
  wait_for_copies<0>();
  __syncthreads();
  if (p.residual) {
    const auto* residual = static_cast<const uint16_t*>(p.residual);
    for_own_chunks([&](int to, int64_t from) { copy_chunk(patches + to, residual + from); });
    end_copy_group();
    wait_for_copies<0>();
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < kTileRows; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        auto* here = reinterpret_cast<uint32_t*>(
            shared + place((row + t) * kColumns + lane / 4 + 8 * i, half / kChunk + n) + lane % 4 * 4);
        float low = sum[t][n][2 * i], high = sum[t][n][2 * i + 1];
        if (p.residual) {
          float more[2];
          unpack<kBf16>(*here, more);
          low += more[0], high += more[1];
        }
        if (p.relu) low = low < 0 ? 0 : low, high = high < 0 ? 0 : high;  // NaN stays
        *here = pack<kBf16>(low, high);
      }
  __syncthreads();
  auto* out = static_cast<uint16_t*>(p.out);
  for_own_chunks([&](int from, int64_t to) {
    *reinterpret_cast<uint4*>(out + to) = *reinterpret_cast<const uint4*>(shared + from);
  });
}

template <bool kBf16, int kSide, int kHalves>
cudaError_t launch(const Conv3x3Params& p, cudaStream_t stream) {
  const auto kernel = conv3x3<kBf16, kSide, kHalves>;
  constexpr int kBytes = kSharedBytes<kSide, kHalves>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const int64_t across = (p.width + kColumns - 1) / kColumns, groups = (p.outputs + 64 * kHalves - 1) / (64 * kHalves);
  const dim3 grid(unsigned(across * groups * (kSide == 2 ? 4 * p.steps : 1)), unsigned((p.height + kRows - 1) / kRows),
                  unsigned(p.pictures));
  kernel<<<grid, kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <bool kBf16, int kSide>
cudaError_t launch(const Conv3x3Params& p, cudaStream_t stream) {
  return p.outputs > 64 ? launch<kBf16, kSide, 2>(p, stream) : launch<kBf16, kSide, 1>(p, stream);
}

}  // namespace

extern "C" const char* flashvsr_conv3x3_cuda(const flashvsr::Conv3x3Params* params, int device, void* stream) {
  const Conv3x3Params& p = *params;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    auto* on = static_cast<cudaStream_t>(stream);
    if (p.dtype == DType::bf16)
      error = p.enlarge ? launch<true, 2>(p, on) : launch<true, 3>(p, on);
    else
      error = p.enlarge ? launch<false, 2>(p, on) : launch<false, 3>(p, on);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
