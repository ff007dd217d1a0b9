// 3x3 convolutions of NHWC pictures for sm_80 and newer, and growth, enlargement by two and a convolution as one of
// 2x2 taps: implicit products with cp.async, ldmatrix and mma.sync, bf16 or fp16 with fp32 sums.
//
// A thread block makes 8 x 16 pixels of 64 or 128 channels. Of 64 input channels at a time the pixels with their
// border come to shared memory once for all taps, the next 64 meanwhile; weights come tap after tap through a ring of
// three slots: one in use, one next, one on its way. What lies outside the picture, and channels that are not there,
// are zeros in shared memory, never in global memory.
#include <cuda_runtime.h>

#include "conv3x3.h"
#include "ptx.h"

namespace {

using namespace flashvsr;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 8, kColumns = 16;  // pixels of a tile; a warp multiplies whole rows of it
constexpr int kDepth = 64, kChunk = 8;   // input channels of a step; elements in 16 bytes
constexpr int kLineBytes = kDepth * 2;   // of a pixel, or of an output channel's weights
constexpr int kSlots = 3;

// kSide: taps in each direction, 3, or 2 to enlarge    kHalves: 64 output channels each
template <int kSide>
constexpr int kPatchColumns = kColumns + kSide - 1;
template <int kSide>
constexpr int kPatch = (kRows + kSide - 1) * kPatchColumns<kSide>;  // pixels
template <int kSide, int kHalves>
constexpr int kSharedBytes = (2 * kPatch<kSide> + kSlots * 64 * kHalves) * kLineBytes;
static_assert(kSharedBytes<3, 2> <= 99 * 1024, "sm_86, 89 and 120 give a block no more");

// Lines of 64 elements in chunks of 16 bytes, permuted so that ldmatrix reads 8 consecutive lines without conflict.
__device__ inline uint32_t chunk_at(uint32_t lines, int line, int chunk) {
  return lines + line * kLineBytes + ((chunk ^ (line & 7)) * 16);
}

template <bool kBf16, int kSide, int kHalves>
__global__ void __launch_bounds__(kThreads) conv3x3(const __grid_constant__ Conv3x3Params p) {
  constexpr int kTaps = kSide * kSide, kOutputs = 64 * kHalves;
  constexpr int kTileRows = kRows / (kWarps / kHalves);  // of a warp
  constexpr int kPatchLoads = (kPatch<kSide> + kThreads / 8 - 1) / (kThreads / 8);
  extern __shared__ __align__(256) uint8_t shared[];
  const uint32_t patches = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t slots = patches + 2 * kPatch<kSide> * kLineBytes;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int across = int((p.width + kColumns - 1) / kColumns);
  const int tile_y = int(blockIdx.x) / across * kRows, tile_x = int(blockIdx.x) % across * kColumns;
  const int first = blockIdx.y * kOutputs;  // output channel
  // A set of weights makes each pixel of a picture once: to enlarge one for each step and phase.
  const int sets = kSide == 2 ? 4 * p.steps : 1, set = int(blockIdx.z) % sets;
  const int64_t picture = blockIdx.z / sets;
  const int phase_y = kSide == 2 ? set / 2 % 2 : 0, phase_x = kSide == 2 ? set % 2 : 0;
  const int C = p.channels, blocks = (C + kDepth - 1) / kDepth, all = p.past ? 2 * blocks : blocks;

  // A thread copies the same chunk of every 32nd line.
  const int own_line = thread / 8, own_chunk = thread % 8;
  int at[kPatchLoads];  // of its pixels in the picture, -1 outside
#pragma unroll
  for (int i = 0; i < kPatchLoads; ++i) {
    const int pixel = own_line + i * (kThreads / 8);
    const int y = tile_y + pixel / kPatchColumns<kSide> - 1 + phase_y;
    const int x = tile_x + pixel % kPatchColumns<kSide> - 1 + phase_x;
    at[i] = y >= 0 && y < p.height && x >= 0 && x < p.width ? int(y * p.width + x) : -1;
  }
  auto copy_patch = [&](int block) {
    const bool past = block >= blocks;
    const int channel = (past ? block - blocks : block) * kDepth + own_chunk * kChunk;
    const auto* from = static_cast<const uint16_t*>(past ? p.past : p.x) + picture * p.height * p.width * C;
    const uint32_t to = patches + block % 2 * kPatch<kSide> * kLineBytes;
#pragma unroll
    for (int i = 0; i < kPatchLoads; ++i) {
      const int pixel = own_line + i * (kThreads / 8);
      const bool read = at[i] >= 0 && channel < C;
      if (pixel < kPatch<kSide>)
        copy_chunk(chunk_at(to, pixel, own_chunk), read ? from + int64_t(at[i]) * C + channel : from, read);
    }
  };
  const int inputs = p.past ? 2 * C : C;
  auto copy_weights = [&](int block, int tap, uint32_t to) {
    const bool past = block >= blocks;
    const int channel = (past ? block - blocks : block) * kDepth + own_chunk * kChunk;
    const auto* from = static_cast<const uint16_t*>(p.weight);
#pragma unroll
    for (int i = 0; i < kOutputs / 32; ++i) {
      const int line = own_line + 32 * i, output = first + line;
      const bool read = output < p.outputs && channel < C;
      const int64_t row = (int64_t(set) * p.outputs + output) * kTaps + tap;
      copy_chunk(chunk_at(to, line, own_chunk), read ? from + row * inputs + (past ? C : 0) + channel : from, read);
    }
  };
  uint32_t slot = slots;
  constexpr uint32_t kSlotBytes = kOutputs * kLineBytes, kLast = (kSlots - 1) * kSlotBytes;

  copy_patch(0);
  copy_weights(0, 0, slots);
  end_copy_group();
  copy_weights(0, 1, slots + kSlotBytes);
  end_copy_group();

  // Of a thread: pixels lane / 4 + 8 i of a row of the tile (i: 0, 1), channels 8 n + 2 (lane % 4) + {0, 1}.
  const int row = warp / kHalves * kTileRows, half = warp % kHalves * 64;
  float sum[kTileRows][8][4] = {};
  for (int block = 0; block < all; ++block) {
    const uint32_t patch = patches + block % 2 * kPatch<kSide> * kLineBytes;
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      wait_for_copies<1>();
      __syncthreads();  // this step's are here for every warp, and every warp is done with the step before
      const int later = tap + 2 < kTaps ? tap + 2 : tap + 2 - kTaps, its_block = tap + 2 < kTaps ? block : block + 1;
      if (its_block < all) copy_weights(its_block, later, slot == slots ? slots + kLast : slot - kSlotBytes);
      if (tap == 0 && block + 1 < all) copy_patch(block + 1);
      end_copy_group();

      uint32_t a_at[kTileRows];
#pragma unroll
      for (int t = 0; t < kTileRows; ++t)
        a_at[t] = chunk_at(patch, (row + t + tap / kSide) * kPatchColumns<kSide> + tap % kSide + lane % 16, lane / 16);
      const uint32_t b_at = chunk_at(slot, half + lane % 8 + lane / 16 * 8, lane / 8 % 2);
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
      slot = slot == slots + kLast ? slots : slot + kSlotBytes;
    }
  }
  wait_for_copies<0>();

  constexpr int kScale = kSide == 2 ? 2 : 1;
  const int64_t out_picture = kSide == 2 ? picture * p.steps + set / 4 : picture;
#pragma unroll
  for (int t = 0; t < kTileRows; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int y = tile_y + row + t, x = tile_x + lane / 4 + 8 * i;
      if (y >= p.height || x >= p.width) continue;
      const int64_t pixel = (out_picture * p.height * kScale + y * kScale + phase_y) * p.width * kScale +
                            x * kScale + phase_x;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int output = first + half + 8 * n + lane % 4 * 2;  // and the one after it: outputs come in eights
        if (output >= p.outputs) continue;
        float low = sum[t][n][2 * i], high = sum[t][n][2 * i + 1], more[2];
        if (p.bias) {
          unpack<kBf16>(static_cast<const uint32_t*>(p.bias)[output / 2], more);
          low += more[0], high += more[1];
        }
        const int64_t to = (pixel * p.outputs + output) / 2;
        if (p.residual) {
          unpack<kBf16>(static_cast<const uint32_t*>(p.residual)[to], more);
          low += more[0], high += more[1];
        }
        if (p.relu) low = low < 0 ? 0 : low, high = high < 0 ? 0 : high;  // NaN stays
        static_cast<uint32_t*>(p.out)[to] = pack<kBf16>(low, high);
      }
    }
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
  const unsigned tiles = unsigned((p.height + kRows - 1) / kRows * ((p.width + kColumns - 1) / kColumns));
  const dim3 grid(tiles, unsigned(p.outputs + 64 * kHalves - 1) / (64 * kHalves),
                  unsigned(p.pictures * (kSide == 2 ? 4 * p.steps : 1)));
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
