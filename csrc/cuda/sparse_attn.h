// Launchers of the CUDA kernels, without any CUDA header.
#pragma once
#include "../params.h"

// Puts the kernel on a stream (a cudaStream_t) of a device. Null if it was launched, else the error.
extern "C" const char* flashvsr_sparse_attn_cuda(const flashvsr::SparseAttnParams* params, int device,
                                                 void* stream);
