// 3x3 convolutions of NHWC pictures for sm_80 and newer, and growth, enlargement by two and a convolution as one of
// 2x2 taps: tiles of conv_tile.h. What lies outside the picture is zero in shared memory. A residual comes into shared
// memory in the place of its results, to be read in whole lines as well.
#include <cuda_runtime.h>

#include "conv3x3.h"
#include "conv_tile.h"

namespace {

using namespace flashvsr;

// kSide: 3, or 2 to enlarge
template <int kSide>
struct Source {
  const Conv3x3Params& p;
  const uint16_t* weight;
  const uint32_t* bias;
  int x_blocks, blocks, outputs;
  int64_t height, width, picture;
  int set, phase_y, phase_x;  // of weights, and what it makes of each two by two pixels
  int64_t tap_stride, output_stride;

  __device__ Source(const Conv3x3Params& p, int64_t picture, int set)
      : p(p),
        weight(static_cast<const uint16_t*>(p.weight)),
        bias(static_cast<const uint32_t*>(p.bias)),
        x_blocks((p.channels + kDepth - 1) / kDepth),
        blocks(p.past ? 2 * x_blocks : x_blocks),
        outputs(p.outputs),
        height(p.height),
        width(p.width),
        picture(picture),
        set(set),
        phase_y(kSide == 2 ? set / 2 % 2 : 0),
        phase_x(kSide == 2 ? set % 2 : 0),
        tap_stride(p.past ? 2 * p.channels : p.channels),
        output_stride(kSide * kSide * tap_stride) {}

  __device__ Chunk pixel(int block, int row, int column, int own) const {
    const bool past = block >= x_blocks;
    const int channel = (past ? block - x_blocks : block) * kDepth + own;
    const int64_t y = row + phase_y, x = column + phase_x;
    const bool read = y >= 0 && y < p.height && x >= 0 && x < p.width && channel < p.channels;
    const auto* from = static_cast<const uint16_t*>(past ? p.past : p.x);
    return {from + (read ? ((picture * p.height + y) * p.width + x) * p.channels + channel : 0), read};
  }
  __device__ Chunk weights(int block, int output, int own) const {
    const bool past = block >= x_blocks;
    const int channel = (past ? block - x_blocks : block) * kDepth + own;
    return {weight + (int64_t(set) * outputs + output) * output_stride + (past ? p.channels : 0) + channel,
            channel < p.channels};
  }
  __device__ int64_t result(int y, int x) const {
    constexpr int kScale = kSide == 2 ? 2 : 1;
    const int64_t out_picture = kSide == 2 ? picture * p.steps + set / 4 : picture;
    return (out_picture * p.height * kScale + y * kScale + phase_y) * p.width * kScale + x * kScale + phase_x;
  }
};

template <bool kBf16, int kSide, int kHalves>
__global__ void __launch_bounds__(kThreads<kHalves>, kResident<kHalves>) conv3x3(const __grid_constant__ Conv3x3Params p) {
  // A set of weights makes each pixel of a picture once: to enlarge one for each step and phase. Blocks that read the
  // same pixels follow one another.
  constexpr int kOutputs = 64 * kHalves;
  const int sets = kSide == 2 ? 4 * p.steps : 1, groups = (p.outputs + kOutputs - 1) / kOutputs;
  const Tile tile = {int(blockIdx.x) % groups * kOutputs, int(blockIdx.y) * kRows,
                     int(blockIdx.x) / groups / sets * kColumns};
  const Source<kSide> source(p, blockIdx.z, int(blockIdx.x) / groups % sets);
  Sums sum;
  multiply_tile<kBf16, kSide, kHalves>(source, tile, sum);
  if (p.residual) {
    const auto* residual = static_cast<const uint16_t*>(p.residual);
    const uint32_t results = uint32_t(__cvta_generic_to_shared(shared_memory()));
    for_own_chunks<kHalves>(source, tile, [&](int to, int64_t from) { copy_chunk(results + to, residual + from); });
    end_copy_group();
    wait_for_copies<0>();
    __syncthreads();
  }
  write_tile<kBf16, kHalves>(source, tile, sum, p.out, [&](uint32_t here, float& low, float& high) {
    if (p.residual) {
      float more[2];
      unpack<kBf16>(here, more);
      low += more[0], high += more[1];
    }
    if (p.relu) low = low < 0 ? 0 : low, high = high < 0 ? 0 : high;  // NaN stays
  });
}

template <bool kBf16, int kSide, int kHalves>
cudaError_t launch(const Conv3x3Params& p, cudaStream_t stream) {
  const int64_t across = (p.width + kColumns - 1) / kColumns, groups = (p.outputs + 64 * kHalves - 1) / (64 * kHalves);
  const dim3 grid(unsigned(across * groups * (kSide == 2 ? 4 * p.steps : 1)), unsigned((p.height + kRows - 1) / kRows),
                  unsigned(p.pictures));
  return launch_tiles<kSide, kHalves>(conv3x3<kBf16, kSide, kHalves>, p, grid, stream);
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
