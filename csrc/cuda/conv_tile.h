// What the convolutions share: the implicit product of a tile of NHWC pixels with all its taps, with cp.async, ldmatrix
// and mma.sync, bf16 or fp16 with fp32 sums, and how its results leave.
//
// A thread block of 4 or 8 warps makes 16 x 16 pixels of 64 or 128 channels, a warp 4 rows of them and 64 channels,
// where 8 ldmatrix feed 32 products. Of 32 input channels at a time the pixels with their border come to shared memory
// once for all taps, the next 32 meanwhile; weights come tap after tap through a ring of slots. Taps are unrolled, so
// that what ldmatrix reads differs from tap to tap by constants. Channels that are not there are zeros in shared
// memory, never in global memory. Results leave through shared memory, to be written in whole lines.
//
// A source says where all this lies, a type of its own for each convolution:
//   blocks                           of 32 input channels that are multiplied one after the other
//   pixel(block, y, x, channel)      the Chunk of a pixel of the tile's picture, or beyond its border, from this
//                                    channel of the block
//   weights(block, output, channel)  the Chunk of the first tap's, for output channel `output`
//   tap_stride, output_stride        elements from a tap's weights to the next one's, and from an output channel's
//   weight                           an address, for weights that are not read
//   bias                             (outputs,) or null
//   outputs, height, width           of all results
//   result(y, x)                     place among all pixels that are made
#pragma once
#include "ptx.h"

namespace flashvsr {

constexpr int kRows = 16, kColumns = 16;  // pixels of a tile
constexpr int kTileRows = 4;              // of a warp
constexpr int kDepth = 32, kChunk = 8;    // input channels at a time; elements in 16 bytes
// Of a pixel, or of an output channel's weights, and 16 between: so ldmatrix reads 8 lines without conflict.
constexpr int kLineBytes = kDepth * 2 + 16;

// kSide: taps in each direction, 3 or 2    kHalves: 64 output channels each
template <int kSide>
constexpr int kPatchColumns = kColumns + kSide - 1;
template <int kSide>
constexpr int kPatch = (kRows + kSide - 1) * kPatchColumns<kSide>;  // pixels
template <int kSide>
constexpr int kSlots = kSide == 3 ? 3 : 4;  // of weights: divides the taps, which so know their slot
template <int kHalves>
constexpr int kThreads = kHalves * kRows / kTileRows * 32;
// Blocks on a multiprocessor, which its registers allow. Said to the compiler, as it may else save registers for a third
// and load matrices just before their products.
template <int kHalves>
constexpr int kResident = 2 / kHalves;
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

// Of a thread: pixels lane / 4 + 8 i of a row of the tile (i: 0, 1), channels 8 n + 2 (lane % 4) + {0, 1}.
using Sums = float[kTileRows][8][4];

// What a thread block makes: channels from `first` of the pixels from (y, x).
struct Tile {
  int first, y, x;
};

// 8 elements in global memory, zeros unless they are read.
struct Chunk {
  const uint16_t* from;
  bool read;
};

__device__ inline uint8_t* shared_memory() {
  extern __shared__ __align__(256) uint8_t shared[];
  return shared;
}

// The first row of the tile and the first channel of the block's that are this warp's.
template <int kHalves>
__device__ inline int own_row() {
  return int(threadIdx.x) / 32 / kHalves * kTileRows;
}
template <int kHalves>
__device__ inline int own_half() {
  return int(threadIdx.x) / 32 % kHalves * 64;
}

// The products of a tile and bias. At its end no thread needs shared memory any more.
template <bool kBf16, int kSide, int kHalves, class Source>
__device__ inline void multiply_tile(const Source& source, const Tile& tile, Sums& sum) {
  constexpr int kTaps = kSide * kSide, kOutputs = 64 * kHalves;
  constexpr int kLines = kThreads<kHalves> * kChunk / kDepth;  // that all threads together copy
  constexpr int kAhead = kSlots<kSide> - 1, kPatchBytes = kPatch<kSide> * kLineBytes;
  constexpr int kLoads = (kPatch<kSide> + kLines - 1) / kLines;  // of a thread, for a patch
  // The next patch must be in groups that its first tap waits for.
  constexpr int kTapsWithLoads = kTaps - kAhead + 1, kLoadsOfTap = (kLoads + kTapsWithLoads - 1) / kTapsWithLoads;
  const uint32_t patches = uint32_t(__cvta_generic_to_shared(shared_memory()));
  const uint32_t slots = patches + 2 * kPatchBytes;
  const int lane = threadIdx.x % 32;

  // A thread copies the same chunk of lines that lie kLines apart.
  auto own_line = [] { return thread_index() / (kDepth / kChunk); };
  auto own_channel = [] { return thread_index() % (kDepth / kChunk) * kChunk; };
  auto own_place = [&] { return own_line() * kLineBytes + own_channel() * 2; };
  auto copy_pixel = [&](int block, int i) {
    const int pixel = own_line() + i * kLines;
    const Chunk chunk = source.pixel(block, tile.y + pixel / kPatchColumns<kSide> - 1,
                                     tile.x + pixel % kPatchColumns<kSide> - 1, own_channel());
    if ((i + 1) * kLines <= kPatch<kSide> || pixel < kPatch<kSide>)
      copy_chunk(patches + block % 2 * kPatchBytes + own_place() + i * kLines * kLineBytes, chunk.from, chunk.read);
  };
  Chunk weights;  // that this thread copies next
  auto begin_weights = [&](int block) {
    weights = source.weights(block, tile.first + own_line(), own_channel());
  };
  auto copy_weights = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kOutputs / kLines; ++i) {
      const bool read = weights.read && tile.first + own_line() + i * kLines < source.outputs;
      copy_chunk(slots + slot * kSlotBytes<kHalves> + own_place() + i * kLines * kLineBytes,
                 read ? weights.from + i * kLines * source.output_stride : source.weight, read);
    }
    weights.from += source.tap_stride;
  };

#pragma unroll
  for (int i = 0; i < kLoads; ++i) copy_pixel(0, i);
  begin_weights(0);
#pragma unroll
  for (int tap = 0; tap < kAhead; ++tap) {
    copy_weights(tap);
    end_copy_group();
  }

  const int row = own_row<kHalves>(), half = own_half<kHalves>();
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int output = tile.first + half + 8 * n + lane % 4 * 2;  // and the one after it: outputs come in eights
    float bias[2] = {};
    if (source.bias && output < source.outputs) unpack<kBf16>(source.bias[output / 2], bias);
#pragma unroll
    for (int t = 0; t < kTileRows; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[t][n][j] = bias[j % 2];
  }
  const uint32_t a_at = patches + (row * kPatchColumns<kSide> + lane % 16) * kLineBytes + lane / 16 * 16;
  const uint32_t b_at = slots + (half + lane % 8 + lane / 16 * 8) * kLineBytes + lane / 8 % 2 * 16;
  for (int block = 0; block < source.blocks; ++block) {
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
        const bool more = block + 1 < source.blocks;
        if (tap + kAhead == kTaps) begin_weights(block + 1);
        if (tap + kAhead < kTaps || more) copy_weights((tap + kAhead) % kSlots<kSide>);
        if (more)
#pragma unroll
          for (int i = tap * kLoadsOfTap; i < (tap + 1) * kLoadsOfTap && i < kLoads; ++i) copy_pixel(block + 1, i);
        end_copy_group();
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();  // every warp is done with what it multiplied
}

// Results take the place of pixels and weights: a line of chunks for each pixel, permuted so that 8 lines are written
// without conflict.
template <int kHalves>
__device__ inline int result_place(int pixel, int chunk) {
  return pixel * 64 * kHalves * 2 + ((chunk ^ (pixel & 7)) * 16);
}

// For this thread's share of the tile's results in chunks: move(place in shared memory, place of the first in global).
template <int kHalves, class Source, class Move>
__device__ inline void for_own_chunks(const Source& source, const Tile& tile, Move move) {
  constexpr int kChunks = 64 * kHalves / kChunk;
#pragma unroll 4
  for (int i = thread_index(); i < kRows * kColumns * kChunks; i += kThreads<kHalves>) {
    const int pixel = i / kChunks, chunk = i % kChunks, output = tile.first + chunk * kChunk;
    const int y = tile.y + pixel / kColumns, x = tile.x + pixel % kColumns;
    if (y < source.height && x < source.width && output < source.outputs)
      move(result_place<kHalves>(pixel, chunk), source.result(y, x) * source.outputs + output);
  }
}

// The tile's results to out, through shared memory; finish(here, low, high) changes two sums whose place there is here.
template <bool kBf16, int kHalves, class Source, class Finish>
__device__ inline void write_tile(const Source& source, const Tile& tile, const Sums& sum, void* out, Finish finish) {
  const int lane = threadIdx.x % 32, row = own_row<kHalves>(), half = own_half<kHalves>();
#pragma unroll
  for (int t = 0; t < kTileRows; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int pixel = (row + t) * kColumns + lane / 4 + 8 * i;
        auto* here = reinterpret_cast<uint32_t*>(
            shared_memory() + result_place<kHalves>(pixel, half / kChunk + n) + lane % 4 * 4);
        float low = sum[t][n][2 * i], high = sum[t][n][2 * i + 1];
        finish(*here, low, high);
        *here = pack<kBf16>(low, high);
      }
  __syncthreads();
  for_own_chunks<kHalves>(source, tile, [&](int from, int64_t to) {
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + to) =
        *reinterpret_cast<const uint4*>(shared_memory() + from);
  });
}

// Puts a kernel of tiles on a stream.
template <int kSide, int kHalves, class Params>
cudaError_t launch_tiles(void (*kernel)(Params), const Params& p, dim3 grid, cudaStream_t stream) {
  constexpr int kThreadsOfBlock = kThreads<kHalves>, kBytes = kSharedBytes<kSide, kHalves>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreadsOfBlock, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flashvsr
