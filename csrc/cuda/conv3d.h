// Launcher of the projector's CUDA convolution, without any CUDA header.
#pragma once
#include "../params.h"

// Puts the kernels on a stream (a cudaStream_t) of a device. Null if they were launched, else the error.
extern "C" const char* flashvsr_causal_conv3d_cuda(const flashvsr::CausalConv3dParams* params, int device,
                                                   void* stream);
