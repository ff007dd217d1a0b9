// 3x3 convolutions of NHWC pictures on CPUs: what the instruction sets share.
#pragma once
#include <stddef.h>

#include "../params.h"

namespace flashvsr {

// How the work is cut. A picture is cut into tiles of 4x4 pixels. A task is a strip of blocks below one
// another; a block lies within a row of tiles and is cut into groups. Channels are cut into vectors, those of
// the input into chunks, those of the output into panels that are computed together. Where pictures are
// enlarged, the four phases of the output are outputs of one convolution of the small picture, and a panel
// lies within a phase.
struct Conv3x3Plan {
  int in_vectors, chunk_vectors, chunks;
  int phase_vectors, phase_panels, panels;
  int tile_rows, tile_columns;      // of a picture
  int block_columns, block_groups;  // tiles and groups of a block
  int strip_rows;                   // blocks of a strip
  int across, down;                 // strips of a picture
  bool stream;                      // the result is written past the caches
  int64_t weight_panel;             // floats of one panel's weights
  int64_t scratch;                  // floats of one worker's memory
};

// One build of conv3x3.cpp for one dtype. Memory is aligned to 64 bytes.
struct Conv3x3Cpu {
  void (*plan)(const Conv3x3Params&, int workers, Conv3x3Plan*);
  void (*transform_weights)(const Conv3x3Params&, const Conv3x3Plan&, int panel, int in_vector,
                            float* weights);
  void (*strip)(const Conv3x3Params&, const Conv3x3Plan&, int64_t strip, const float* weights,
                float* scratch);
};

// The builds, each null for the dtypes that it does not serve.
const Conv3x3Cpu* conv3x3_generic(DType);
const Conv3x3Cpu* conv3x3_avx2(DType);
const Conv3x3Cpu* conv3x3_avx512(DType);

// The best build that this processor runs and that serves dtype, or that of isa; null if there is none.
const Conv3x3Cpu* find_conv3x3_cpu(DType dtype, Isa isa);

struct Workers;
void run_conv3x3_cpu(const Conv3x3Params&, const Conv3x3Cpu&, const Workers&);

}  // namespace flashvsr
