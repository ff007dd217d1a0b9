// 3x3 convolutions of NHWC pictures for sm_80 and newer, and growth, enlargement by two and a convolution as one of
// 2x2 taps: implicit products with cp.async, ldmatrix and mma.sync, bf16 or fp16 with fp32 sums.
//
// A thread block of 4 or 8 warps makes 16 x 16 pixels of 64 or 128 channels, a warp 4 rows of them and 64 channels,
// where 8 ldmatrix feed 32 products. Of 32 input channels at a time the pixels with their border come to shared memory
// once for all taps, the next 32 meanwhile; weights come tap after tap through a ring of slots. Taps are unrolled, so
// that what ldmatrix reads differs from tap to tap by constants. What lies outside the picture, and channels that are
// not there, are zeros in shared memory, never in global memory. Results leave through shared memory, where their
// residual has come in, to be read and written in whole lines.
#include <cuda_runtime.h>

#include "conv3x3.h"
#include "ptx.h"

namespace {

using namespace flashvsr;

constexpr int kRows = 16, kColumns = 16;  // pixels of a tile
constexpr int kTileRows = 4;              // of a warp
constexpr int kDepth = 32, kChunk = 8;    // input channels at a time; elements in 16 bytes
// Of a pixel, or of an output channel's weights, and 16 between: so ldmatrix reads 8 lines without conflict.
constexpr int kLineBytes = kDepth * 2 + 16;

// kSide: taps in each direction, 3, or 2 to enlarge    kHalves: 64 output channels each
template <int kSide>
constexpr int kPatchColumns = kColumns + kSide - 1;
template <int kSide>
constexpr int kPatch = (kRows + kSide - 1) * kPatchColumns<kSide>;  // pixels
template <int kSide>
constexpr int kSlots = kSide == 3 ? 3 : 4;  // of weights: divides the taps, which so know their slot
template <int kHalves>
constexpr int kThreads = kHalves * kRows / kTileRows * 32;
template <int kHalves>
constexpr int kSlotBytes = 64 * kHalves * kLineBytes;
template <int kHalves>
constexpr int kTileBytes = kRows * kColumns * 64 * kHalves * 2;  // of results
template <int kSide, int kHalves>
constexpr int kSourceBytes = 2 * kPatch<kSide> * kLineBytes + kSlots<kSide> * kSlotBytes<kHalves>;
template <int kSide, int kHalves>
constexpr int kSharedBytes = kSourceBytes<kSide, kHalves> > kTileBytes<kHalves> ? kSourceBytes<kSide, kHalves>
                                                                                 : kTileBytes<kHalves>;
static_assert(kSharedBytes<3, 2> <= 99 * 1024 && kSharedBytes<2, 2> <= 99 * 1024,
              "sm_86, 89 and 120 give a block no more");

template <bool kBf16, int kSide, int kHalves>
__global__ void __launch_bounds__(kThreads<kHalves>) conv3x3(const __grid_constant__ Conv3x3Params p) {
  constexpr int kTaps = kSide * kSide, kOutputs = 64 * kHalves;
  constexpr int kLines = kThreads<kHalves> * kChunk / kDepth;  // that all threads together copy
  constexpr int kAhead = kSlots<kSide> - 1, kPatchBytes = kPatch<kSide> * kLineBytes;
  constexpr int kLoads = (kPatch<kSide> + kLines - 1) / kLines;  // of a thread, for a patch
  // The next patch must be in groups that its first tap waits for.
  constexpr int kTapsWithLoads = kTaps - kAhead + 1, kLoadsOfTap = (kLoads + kTapsWithLoads - 1) / kTapsWithLoads;
  extern __shared__ __align__(256) uint8_t shared[];
  const uint32_t patches = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t slots = patches + 2 * kPatchBytes;
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
  auto own_place = [&] { return own_line() * kLineBytes + own_chunk() * 16; };
  auto copy_pixel = [&](int block, int i) {
    const bool past = block >= blocks;
    const int pixel = own_line() + i * kLines;
    const int channel = (past ? block - blocks : block) * kDepth + own_chunk() * kChunk;
    const int64_t y = tile_y + pixel / kPatchColumns<kSide> - 1 + phase_y;
    const int64_t x = tile_x + pixel % kPatchColumns<kSide> - 1 + phase_x;
    const bool read = y >= 0 && y < p.height && x >= 0 && x < p.width && channel < C;
    const auto* from = static_cast<const uint16_t*>(past ? p.past : p.x);
    from += read ? ((picture * p.height + y) * p.width + x) * C + channel : 0;
    if ((i + 1) * kLines <= kPatch<kSide> || pixel < kPatch<kSide>)
      copy_chunk(patches + block % 2 * kPatchBytes + own_place() + i * kLines * kLineBytes, from, read);
  };
  const int64_t inputs = p.past ? 2 * C : C;
  const uint16_t* weights;  // that this thread copies next
  bool has_channel;
  auto begin_weights = [&](int block) {
    const bool past = block >= blocks;
    const int channel = (past ? block - blocks : block) * kDepth + own_chunk() * kChunk;
    has_channel = channel < C;
    weights = static_cast<const uint16_t*>(p.weight) +
              (int64_t(set) * p.outputs + first + own_line()) * kTaps * inputs + (past ? C : 0) + channel;
  };
  auto copy_weights = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kOutputs / kLines; ++i) {
      const bool read = has_channel && first + own_line() + i * kLines < p.outputs;
      copy_chunk(slots + slot * kSlotBytes<kHalves> + own_place() + i * kLines * kLineBytes,
                 read ? weights + i * kLines * kTaps * inputs : static_cast<const uint16_t*>(p.weight), read);
    }
    weights += inputs;
  };

#pragma unroll
  for (int i = 0; i < kLoads; ++i) copy_pixel(0, i);
  begin_weights(0);
#pragma unroll
  for (int tap = 0; tap < kAhead; ++tap) {
    copy_weights(tap);
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
  const uint32_t a_at = patches + (row * kPatchColumns<kSide> + lane % 16) * kLineBytes + lane / 16 * 16;
  const uint32_t b_at = slots + (half + lane % 8 + lane / 16 * 8) * kLineBytes + lane / 8 % 2 * 16;
  for (int block = 0; block < all; ++block) {
    const uint32_t patch_at = a_at + block % 2 * kPatchBytes;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      wait_for_copies<kAhead - 1>();
      __syncthreads();  // this tap's are here for every warp, and every warp is done with the tap before
      const uint32_t tap_at = patch_at + (tap / kSide * kPatchColumns<kSide> + tap % kSide) * kLineBytes;
      const uint32_t slot_at = b_at + tap % kSlots<kSide> * kSlotBytes<kHalves>;
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t a[kTileRows][4], b[4];
#pragma unroll
        for (int t = 0; t < kTileRows; ++t)
          load_matrices(a[t], tap_at + t * kPatchColumns<kSide> * kLineBytes + k * 2);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          load_matrices(b, slot_at + n * 8 * kLineBytes + k * 2);
#pragma unroll
          for (int t = 0; t < kTileRows; ++t) {
            multiply_add<kBf16>(sum[t][n], a[t], b[0], b[1]);
            multiply_add<kBf16>(sum[t][n + 1], a[t], b[2], b[3]);
          }
        }
        if (k > 0) continue;
        // While the tensor cores are busy: what is needed kAhead taps later, and a part of the next patch.
        const bool more = block + 1 < all;
        if (tap + kAhead == kTaps) begin_weights(block + 1);
        if (tap + kAhead < kTaps || more) copy_weights((tap + kAhead) % kSlots<kSide>);
        if (more)
#pragma unroll
          for (int i = tap * kLoadsOfTap; i < (tap + 1) * kLoadsOfTap && i < kLoads; ++i) copy_pixel(block + 1, i);
        end_copy_group();
      }
    }
  }

  // Results take the place of pixels and weights: a line of chunks for each pixel, permuted so that 8 lines are
  // written without conflict.
  constexpr int kScale = kSide == 2 ? 2 : 1, kChunks = kOutputs / kChunk;
  const int64_t out_picture = kSide == 2 ? picture * p.steps + set / 4 : picture;
  auto place = [](int pixel, int chunk) { return pixel * kOutputs * 2 + ((chunk ^ (pixel & 7)) * 16); };
  auto for_own_chunks = [&](auto move) {  // of the tile: place there, and of the result's first element
#pragma unroll 4
    for (int i = thread_index(); i < kRows * kColumns * kChunks; i += kThreads<kHalves>) {
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
  constexpr int kBlock = kThreads<kHalves>, kBytes = kSharedBytes<kSide, kHalves>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const int64_t across = (p.width + kColumns - 1) / kColumns, groups = (p.outputs + 64 * kHalves - 1) / (64 * kHalves);
  const dim3 grid(unsigned(across * groups * (kSide == 2 ? 4 * p.steps : 1)), unsigned((p.height + kRows - 1) / kRows),
                  unsigned(p.pictures));
  kernel<<<grid, kBlock, kBytes, stream>>>(p);
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
