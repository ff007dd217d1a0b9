// Stands for CUDA and csrc/cuda/ptx.h where there is no GPU: the threads of a block are fibers, which change at
// barriers and where the lanes of a warp work together. Blocks run one after the other, in memory that is poisoned.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <initializer_list>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads fibers::sync_block
#define threadIdx fibers::Index()
#define blockIdx fibers::block
#define shared fibers::memory  // the kernels' name for it

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaFuncAttributePreferredSharedMemoryCarveout = 1;
constexpr int cudaSharedmemCarveoutMaxShared = 100;
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace fibers {

constexpr int kMost = 1024, kStack = 1 << 16, kMemory = 99 * 1024;
constexpr uint32_t kFirst = 1024;  // address of the first byte of shared memory: 0 is none

struct Copy {
  uint32_t to;
  const void* from;
  bool read;
};
struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it goes on: a jump, as swapcontext asks the kernel for the signal mask
  bool begun;
  std::vector<char> stack;
  std::vector<Copy> started;
  std::vector<std::vector<Copy>> groups;
  uint32_t given[2][8];  // to the other lanes, at every second of their meetings
  int meetings;
};
inline Fiber fiber[kMost];
inline ucontext_t outside;
inline std::function<void()> body;
alignas(256) inline uint8_t memory[kMemory];
inline bool late;  // copies arrive when they are waited for, else as soon as they start
inline int threads, now, left, waiting, round_of_block, lanes_waiting[kMost / 32], round_of_warp[kMost / 32];
inline long idle;
inline dim3 block;

struct Index {
  int x = now;
};

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "%s, block %u %u %u, thread %d\n", what, block.x, block.y, block.z, now);
  abort();
}

inline void turn_to(int next) {
  if (++idle > 100L * kMost) fail("threads wait for each other");
  if (_setjmp(fiber[now].place)) return;
  now = next;
  if (fiber[next].begun) _longjmp(fiber[next].place, 1);
  fiber[next].begun = true;
  setcontext(&fiber[next].start);
}
inline void sync_block() {
  const int round = round_of_block;
  if (++waiting == threads) waiting = idle = 0, ++round_of_block;
  while (round == round_of_block) turn_to((now + 1) % threads);
}
inline void sync_warp() {
  const int warp = now / 32, round = round_of_warp[warp];
  if (++lanes_waiting[warp] == 32) lanes_waiting[warp] = idle = 0, ++round_of_warp[warp];
  while (round == round_of_warp[warp]) turn_to(warp * 32 + (now + 1) % 32);
}
// To the other lanes of this warp; all give something before any goes on.
inline void give(std::initializer_list<uint32_t> mine) {
  Fiber& own = fiber[now];
  int i = 0;
  for (uint32_t x : mine) own.given[own.meetings & 1][i++] = x;
  sync_warp();
  ++own.meetings;
}
// What a lane of this warp gave.
inline const uint32_t* from(int lane) { return fiber[now / 32 * 32 + lane].given[(fiber[now].meetings - 1) & 1]; }

inline uint8_t* at(uint32_t address) {
  if (address < kFirst || address + 16 > kFirst + kMemory || address % 16) fail("an address outside shared memory");
  return memory + (address - kFirst);
}
inline void arrive(const Copy& copy) {
  if (copy.read)
    memcpy(at(copy.to), copy.from, 16);
  else
    memset(at(copy.to), 0, 16);
}

inline void run() {
  body();
  if (!fiber[now].started.empty()) fail("copies end in no group");
  for (auto& group : fiber[now].groups)
    if (!group.empty()) fail("copies are not waited for");
  if (--left == 0) setcontext(&outside);
  for (;;) turn_to((now + 1) % threads);  // never more than the others need
}

template <class Kernel, class Params>
void launch(Kernel kernel, dim3 grid, int block_threads, int bytes, const Params& params) {
  threads = block_threads;
  if (bytes > kMemory) fail("too much shared memory");
  body = [&] { kernel(params); };
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) {
        memset(memory, 0xff, sizeof memory);
        waiting = idle = 0, left = threads;
        memset(lanes_waiting, 0, sizeof lanes_waiting);
        for (int i = 0; i < threads; ++i) {
          Fiber& f = fiber[i];
          f.stack.resize(kStack), f.groups.clear(), f.started.clear(), f.meetings = 0, f.begun = i == 0;
          getcontext(&f.start);
          f.start.uc_stack.ss_sp = f.stack.data(), f.start.uc_stack.ss_size = kStack, f.start.uc_link = nullptr;
          makecontext(&f.start, run, 0);
        }
        now = 0;
        swapcontext(&outside, &fiber[0].start);
      }
}

}  // namespace fibers

inline float __shfl_xor_sync(unsigned, float x, int other) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  fibers::give({bits});
  memcpy(&x, fibers::from(fibers::now % 32 ^ other), 4);
  return x;
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline uint64_t __cvta_generic_to_shared(const void* x) {
  return static_cast<const uint8_t*>(x) - fibers::memory + fibers::kFirst;
}

namespace flashvsr {

inline float exp2_fast(float x) { return exp2f(x); }

inline int thread_index() { return fibers::now; }

inline void copy_chunk(uint32_t to, const void* from, bool read = true) {
  if (uintptr_t(from) % 16) fibers::fail("an address is not a multiple of 16");
  fibers::at(to);
  if (fibers::late)
    fibers::fiber[fibers::now].started.push_back({to, from, read});
  else
    fibers::arrive({to, from, read});
}
inline void end_copy_group() {
  auto& f = fibers::fiber[fibers::now];
  f.groups.push_back(std::move(f.started));
  f.started.clear();
}
template <int kLater>
void wait_for_copies() {
  auto& groups = fibers::fiber[fibers::now].groups;
  for (; groups.size() > kLater; groups.erase(groups.begin()))
    for (auto& copy : groups.front()) fibers::arrive(copy);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  fibers::give({address});
  const int lane = fibers::now % 32;
  for (int m = 0; m < 4; ++m)
    memcpy(&r[m], fibers::at(fibers::from(m * 8 + lane / 4)[0]) + lane % 4 * 4, 4);
}

template <bool kBf16>
float wide(uint16_t bits) {
  if constexpr (!kBf16) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return x;
  }
  const uint32_t word = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &word, 4);
  return x;
}
template <bool kBf16>
uint16_t narrow(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  if (kBf16) return x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  const _Float16 half = _Float16(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
template <bool kBf16>
void unpack(uint32_t bits, float (&x)[2]) {
  x[0] = wide<kBf16>(bits & 0xffff), x[1] = wide<kBf16>(bits >> 16);
}
template <bool kBf16>
uint32_t pack(float low, float high) {
  return narrow<kBf16>(low) | uint32_t(narrow<kBf16>(high)) << 16;
}

template <bool kBf16>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fibers::give({a[0], a[1], a[2], a[3], b0, b1});
  const int group = fibers::now % 32 / 4, column = fibers::now % 4 * 2;
  float x[2][16], y[2][16];  // two rows of a, two columns of b
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 16; k += 2) {
      const int part = k / 8, lane = k % 8 / 2;
      float two[2];
      unpack<kBf16>(fibers::from(group * 4 + lane)[i + 2 * part], two);
      x[i][k] = two[0], x[i][k + 1] = two[1];
      unpack<kBf16>(fibers::from((column + i) * 4 + lane)[4 + part], two);
      y[i][k] = two[0], y[i][k + 1] = two[1];
    }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) c[i] += x[i / 2][k] * y[i % 2][k];
}

}  // namespace flashvsr
