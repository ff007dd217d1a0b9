// SIMD vectors of the instruction set that a file is compiled for, and bfloat16. They are the compilers'
// vector extension, so that one source serves SSE, AVX2, AVX-512 and NEON.
#pragma once
#include <stdint.h>
#include <string.h>

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

}  // namespace
}  // namespace flashvsr
