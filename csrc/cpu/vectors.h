// SIMD vectors of the instruction set that a file is compiled for, and bfloat16. They are the compilers'
// vector extension, so that one source serves SSE, AVX2, AVX-512 and NEON.
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace flashvsr {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
inline Vector<T>& at(T* p) {
  return *(Vector<T>*)p;
}
template <class T>
inline const Vector<T>& at(const T* p) {
  return *(const Vector<T>*)p;
}

struct Bf16 {
  uint16_t bits;
};
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline void narrow(float x, float* y) { *y = x; }
inline void narrow(double x, double* y) { *y = x; }
inline void narrow(float x, Bf16* y) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  y->bits = x == x ? uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) : 0x7FC0;
}

// A vector of float from and to memory of any alignment, as float or bfloat16.
typedef float LooseFloats __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint16_t LooseBf16s __attribute__((vector_size(kVectorBytes / 2), may_alias, aligned(2)));

inline Vector<float> load(const float* p) { return *(const LooseFloats*)p; }
inline Vector<float> load(const Bf16* p) {
  return (Vector<float>)(__builtin_convertvector(*(const LooseBf16s*)p, FloatBits) << 16);
}
inline void store(Vector<float> x, float* p) { *(LooseFloats*)p = x; }
inline void store(Vector<float> x, Bf16* p) {  // narrow of each lane
  const FloatBits bits = (FloatBits)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  *(LooseBf16s*)p = __builtin_convertvector(x == x ? rounded : FloatBits{} + 0x7FC0, LooseBf16s);
}

// The first `count` lanes alone: the others become zero, or are left as they are in memory.
template <class In>
inline Vector<float> load(const In* p, int count) {
  if (count == kLanes<float>) return load(p);
  Vector<float> x = {};
  for (int n = 0; n < count; ++n) x[n] = widen(p[n]);
  return x;
}
template <class In>
inline void store(Vector<float> x, In* p, int count) {
  if (count == kLanes<float>) return store(x, p);
  for (int n = 0; n < count; ++n) narrow(x[n], p + n);
}
#ifdef __AVX512F__
inline Vector<float> load(const float* p, int count) {
  return (Vector<float>)_mm512_maskz_loadu_ps((1 << count) - 1, p);
}
inline void store(Vector<float> x, float* p, int count) {
  _mm512_mask_storeu_ps(p, (1 << count) - 1, (__m512)x);
}
#endif

// Aligned stores of whole cache lines that need not be read first; other threads see them behind the fence.
inline void store_past_caches(Vector<float> x, float* p) {
#ifdef __AVX512F__
  _mm512_stream_ps(p, (__m512)x);
#else
  store(x, p);
#endif
}
inline void store_past_caches(Vector<float> x, Bf16* p) { store(x, p); }
inline void fence_past_caches() {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace flashvsr
