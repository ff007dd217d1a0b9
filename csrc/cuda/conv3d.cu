// The projector's causal convolution for sm_80 and newer, and the norm behind it: tiles of conv_tile.h, whose blocks of
// 32 channels are of one frame after the other, the next 32 channels then. Pixels beyond the picture's border are
// those of the border: a clamped address.
//
// With a norm each warp writes the sum of squares of its 64 channels, before they are rounded, to memory of its own,
// and a second kernel adds them up in one order: no atomics, and so the same bits every time.
#include <cuda_runtime.h>

#include "conv3d.h"
#include "conv_tile.h"

namespace {

using namespace flashvsr;

constexpr int kSide = 3, kNormPixels = 8;  // of a thread block of normalise, one for each warp

__device__ __host__ inline int64_t pixels_of(const CausalConv3dParams& p) {
  return p.batches * p.steps * p.height * p.width;
}

struct Source {
  const CausalConv3dParams& p;
  const uint16_t* weight;
  const uint32_t* bias;
  int frame_bits, blocks, outputs;  // frames of a step: 2 to the frame_bits
  int height, width;
  int64_t picture, batch;
  int step;
  int64_t tap_stride, output_stride;

  __device__ Source(const CausalConv3dParams& p, int64_t picture)
      : p(p),
        weight(static_cast<const uint16_t*>(p.weight)),
        bias(static_cast<const uint32_t*>(p.bias)),
        frame_bits(p.tail ? 2 : 1),
        blocks((p.channels + kDepth - 1) / kDepth << frame_bits),
        outputs(p.outputs),
        height(int(p.height)),
        width(int(p.width)),
        picture(picture),
        batch(picture / p.steps),
        step(int(picture % p.steps)),
        tap_stride(p.channels),
        output_stride((kSide * kSide * tap_stride) << frame_bits) {}

  // Of a block: its frame among those of the step, and its first channel.
  __device__ int frame_of(int block) const { return block & ((1 << frame_bits) - 1); }
  __device__ int channel_of(int block) const { return (block >> frame_bits) * kDepth; }

  __device__ Chunk pixel(int block, int row, int column, int own) const {
    const int frame = 2 * step + frame_of(block) + 2 - (1 << frame_bits), channel = channel_of(block) + own;
    const bool before = frame < 0;
    const int64_t row_stride = before ? p.tail_strides.row : p.x_strides.row;
    const int64_t column_stride = before ? p.tail_strides.column : p.x_strides.column;
    const auto* from = static_cast<const uint16_t*>(before ? p.tail : p.x);
    from += before ? batch * p.tail_strides.batch + (frame + 2) * p.tail_strides.frame
                   : batch * p.x_strides.batch + frame * p.x_strides.frame;
    from += min(max(row, 0), height - 1) * row_stride + min(max(column, 0), width - 1) * column_stride;
    const bool read = channel < p.channels;
    return {from + (read ? channel : 0), read};
  }
  __device__ Chunk weights(int block, int output, int own) const {
    const int channel = channel_of(block) + own;
    return {weight + output * output_stride + frame_of(block) * (kSide * kSide * tap_stride) + channel,
            channel < p.channels};
  }
  __device__ int64_t result(int y, int x) const { return (picture * height + y) * width + x; }
};

template <bool kBf16, int kHalves>
__global__ void __launch_bounds__(kThreads<kHalves>, kResident<kHalves>) conv3d(const __grid_constant__ CausalConv3dParams p) {
  // Blocks that read the same weights, which are more than all pixels, follow one another.
  const int columns = (int(p.width) + kColumns - 1) / kColumns, rows = (int(p.height) + kRows - 1) / kRows;
  const int tiles = columns * rows, pictures = int(p.batches * p.steps);
  const int i = int(blockIdx.x) % tiles, pass = int(blockIdx.x) / tiles;
  const Tile tile = {pass / pictures * 64 * kHalves, i / columns * kRows, i % columns * kColumns};
  const Source source(p, pass % pictures);
  Sums sum;
  multiply_tile<kBf16, kSide, kHalves>(source, tile, sum);
  const int first = tile.first + own_half<kHalves>();
  if (p.gamma && first < p.outputs) {
    const int lane = threadIdx.x % 32;
    float* squares = p.squares + first / 64 * pixels_of(p);
#pragma unroll
    for (int t = 0; t < kTileRows; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float square = 0;  // channels that are not there are zeros
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) square += sum[t][n][2 * i + j] * sum[t][n][2 * i + j];
        square += __shfl_xor_sync(~0u, square, 1);
        square += __shfl_xor_sync(~0u, square, 2);
        const int y = tile.y + own_row<kHalves>() + t, x = tile.x + lane / 4 + 8 * i;
        if (lane % 4 == 0 && y < source.height && x < source.width) squares[source.result(y, x)] = square;
      }
  }
  write_tile<kBf16, kHalves>(source, tile, sum, p.out, [](uint32_t, float&, float&) {});
}

// out = SiLU(out / sqrt(mean(out^2) + 1e-24) * gamma), a pixel a warp.
template <bool kBf16>
__global__ void __launch_bounds__(kNormPixels * 32) normalise(const __grid_constant__ CausalConv3dParams p) {
  const int lane = threadIdx.x % 32, parts = (p.outputs + 63) / 64, chunks = p.outputs / kChunk;
  const int64_t pixels = pixels_of(p), pixel = int64_t(blockIdx.x) * kNormPixels + threadIdx.x / 32;
  if (pixel >= pixels) return;
  float square = 0;
  for (int part = lane; part < parts; part += 32) square += p.squares[part * pixels + pixel];
#pragma unroll
  for (int other = 16; other > 0; other /= 2) square += __shfl_xor_sync(~0u, square, other);
  const float scale = rsqrtf(square / p.outputs + 1e-24f);
  const auto* gamma = static_cast<const uint4*>(p.gamma);
  auto* out = static_cast<uint4*>(p.out) + pixel * chunks;
  auto activate = [&](uint32_t y, uint32_t gamma) {
    float value[2], factor[2];
    unpack<kBf16>(y, value), unpack<kBf16>(gamma, factor);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      value[i] *= scale * factor[i];
      value[i] /= 1 + exp2_fast(value[i] * -1.4426950408889634f);
    }
    return pack<kBf16>(value[0], value[1]);
  };
#pragma unroll 4
  for (int i = lane; i < chunks; i += 32) {
    const uint4 y = out[i], by = gamma[i];
    out[i] = {activate(y.x, by.x), activate(y.y, by.y), activate(y.z, by.z), activate(y.w, by.w)};
  }
}

template <bool kBf16, int kHalves>
cudaError_t launch(const CausalConv3dParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.width + kColumns - 1) / kColumns * ((p.height + kRows - 1) / kRows);
  const int64_t groups = (p.outputs + 64 * kHalves - 1) / (64 * kHalves);
  const dim3 grid(unsigned(tiles * p.batches * p.steps * groups));
  cudaError_t error = launch_tiles<kSide, kHalves>(conv3d<kBf16, kHalves>, p, grid, stream);
  if (error != cudaSuccess || !p.gamma) return error;
  const auto kernel = normalise<kBf16>;
  constexpr int kThreadsOfBlock = kNormPixels * 32, kBytes = 0;
  const dim3 all(unsigned((pixels_of(p) + kNormPixels - 1) / kNormPixels));
  kernel<<<all, kThreadsOfBlock, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <bool kBf16>
cudaError_t launch(const CausalConv3dParams& p, cudaStream_t stream) {
  return p.outputs > 64 ? launch<kBf16, 2>(p, stream) : launch<kBf16, 1>(p, stream);
}

}  // namespace

extern "C" const char* flashvsr_causal_conv3d_cuda(const flashvsr::CausalConv3dParams* params, int device,
                                                   void* stream) {
  const CausalConv3dParams& p = *params;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    auto* on = static_cast<cudaStream_t>(stream);
    error = p.dtype == DType::bf16 ? launch<true>(p, on) : launch<false>(p, on);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
