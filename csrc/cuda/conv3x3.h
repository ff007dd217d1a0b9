// Launcher of the CUDA convolutions, without any CUDA header.
#pragma once
#include "../params.h"

// Puts the kernel on a stream (a cudaStream_t) of a device. Null if it was launched, else the error.
extern "C" const char* flashvsr_conv3x3_cuda(const flashvsr::Conv3x3Params* params, int device, void* stream);
