// Plain structs handed from the bindings to the kernels. No torch header here.
#pragma once
#include <cstdint>

namespace flashvsr {

constexpr int kBlock = 128;  // rows of a query block, keys of a key block

enum class DType : int { f32, f64, bf16, f16 };

// Builds of a C++ kernel; best: of those that the processor runs. Ops take the number: a string argument of an op in
// torch's stable ABI (2.13) is never freed, 48 bytes a call, which pins the heap around it.
enum class Isa : int { best, generic, avx2, avx512, avx512bf16 };

// Strides count elements; the last dimension (D) is contiguous.
struct Strides {
  int64_t batch, row, head;
};

// Attention over listed key blocks: query block (b, h, i) attends to key blocks index[b, h, i, 0 .. count[b,
// h, i]).
struct SparseAttnParams {
  const void *q, *k, *v;  // (B, Lq, H, D), (B, Lk, H, D)
  void* out;              // (B, Lq, H, D), contiguous
  float* lse;             // (B, H, Lq), contiguous, natural logarithm
  const int32_t* index;   // (B, H, Mq, cap), contiguous
  const int32_t* count;   // (B, H, Mq), contiguous
  const int32_t* order;   // (B * H * Mq,): the n-th list to run is (b * H + h) * Mq + i; null on the CPU
  Strides q_strides, k_strides, v_strides;
  int64_t batches, heads, q_len, k_len, q_blocks, k_blocks, cap;
  int dim;  // D: 64 or 128
  DType dtype;
  double scale;
};

// out = relu(conv(x) + bias + residual), or growth in time, enlargement by 2 and a convolution as one.
struct Conv3x3Params {
  const void *x, *past;  // (N, H, W, C), contiguous; past: the second half of the input channels, or null
  const void* weight;    // (O, 3, 3, C or 2 C); to enlarge (T, 2, 2, O, 2, 2, C), see fold_upsample
  const void* bias;      // (O,) or null
  const void* residual;  // like out, or null
  void* out;             // (N, H, W, O); enlarged (N * T, 2 H, 2 W, O)
  int64_t pictures, height, width;  // N, H, W
  int channels, outputs, steps;     // C, O, T (1 if nothing is enlarged)
  bool enlarge, relu;
  DType dtype;  // f32 or bf16 on a CPU, bf16 or f16 on a GPU
};

// Strides count elements; the last dimension, channels, is contiguous.
struct ClipStrides {
  int64_t batch, frame, row, column;
};

// out's step t: a sum of 3x3 convolutions of frames 2 t - 2 to 2 t + 1, or without tail of 2 t and 2 t + 1, and SiLU of
// its RMS norm over the channels.
struct CausalConv3dParams {
  const void *x, *tail;  // (B, 2 T, H, W, C); (B, 2, H, W, C), the frames before x, or null
  const void* weight;    // (O, 4, 3, 3, C), without tail (O, 2, 3, 3, C)
  const void* bias;      // (O,)
  const void* gamma;     // (O,) or null for no norm
  void* out;             // (B, T, H, W, O), contiguous
  float* squares;        // with gamma (ceil(O / 64), B T H W): what the sums of squares are made of
  ClipStrides x_strides, tail_strides;
  int64_t batches, steps, height, width;  // B, T, H, W
  int channels, outputs;                  // C, O
  DType dtype;                            // bf16 or f16
};

}  // namespace flashvsr
