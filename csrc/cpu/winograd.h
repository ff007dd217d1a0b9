// Winograd's F(4x4, 3x3) for one instruction set: 36 multiplications for 4x4 outputs and a pair of channels
// instead of 144. A tile is 4x4 pixels of the output, its patch 6x6 of the input. Pictures and weights go to
// values at 6x6 points, and products back to pixels, columns first on the way there and last on the way back.
//
// The points are 0, +-5/8, +-3/2 and infinity: on random numbers the error is two to four times that of a
// direct convolution, less than half of what the usual 0, +-1, +-2 give. Constants for pictures are exact.
#pragma once
#include "vectors.h"

namespace flashvsr {
namespace {

typedef Vector<float> Vec;
constexpr int kL = kLanes<float>;
constexpr int kTile = 4, kPatch = 6, kPoints = kPatch * kPatch;
constexpr float kA = 0.625f, kB = 1.5f, kAA = kA * kA, kBB = kB * kB;

inline int min(int64_t a, int64_t b) { return int(a < b ? a : b); }
inline int max(int64_t a, int64_t b) { return int(a > b ? a : b); }
inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Six pixels in a line to their values at the points.
inline void transform_input(const Vec (&d)[kPatch], Vec (&v)[kPatch]) {
  const Vec even_a = d[4] - d[2] * kBB, odd_a = d[3] - d[1] * kBB;
  const Vec even_b = d[4] - d[2] * kAA, odd_b = d[3] - d[1] * kAA;
  v[0] = d[0] * (kAA * kBB) + (d[4] - d[2] * (kAA + kBB));
  v[1] = even_a + odd_a * kA;
  v[2] = even_a - odd_a * kA;
  v[3] = even_b + odd_b * kB;
  v[4] = even_b - odd_b * kB;
  v[5] = d[1] * (kAA * kBB) + (d[5] - d[3] * (kAA + kBB));
}

// Three taps in a line to their values at the points, each over the product of its point's distances.
inline void transform_taps(const Vec (&g)[3], Vec (&u)[kPatch]) {
  constexpr float a = 1 / (2 * kAA * (kAA - kBB)), b = 1 / (2 * kBB * (kBB - kAA));
  const Vec even_a = g[0] + g[2] * kAA, odd_a = g[1] * kA, even_b = g[0] + g[2] * kBB, odd_b = g[1] * kB;
  u[0] = g[0] * (1 / (kAA * kBB));
  u[1] = (even_a + odd_a) * a;
  u[2] = (even_a - odd_a) * a;
  u[3] = (even_b + odd_b) * b;
  u[4] = (even_b - odd_b) * b;
  u[5] = g[2];
}

// Products at the points to four pixels in a line.
inline void transform_output(const Vec (&m)[kPatch], Vec (&y)[kTile]) {
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = odd_a * kA + odd_b * kB;
  y[2] = even_a * kAA + even_b * kBB;
  y[3] = odd_a * (kAA * kA) + odd_b * (kBB * kB) + m[5];
}

// A register tile: kR tiles by kN vectors of output channels. The sums hide the latency of a multiply-add and
// fit the registers together with a line of weights. Two heights for each width, so that few rows are wasted.
constexpr bool kWide = kVectorBytes == 64;
constexpr int kMaxVectors = kWide ? 4 : 2;
constexpr int kRows[5] = {0, kWide ? 24 : 12, kWide ? 12 : 6, 9, 6};
constexpr int kFewer[5] = {0, kWide ? 22 : 11, kWide ? 11 : 5, 8, 5};
// Most tiles that go through a row of points together. Register tiles never reach beyond it: heights divide
// it, and the fewer ones stand in where some tiles are missing.
constexpr int kGroup = 48;

// m[tile][vector] = in[input vector][tile] times weights[input channel][vector], at one point.
template <int kN, int kR>
void multiply(const Vec* in, const float* weights, int in_vectors, Vec* m) {
  Vec sum[kR][kN] = {};
  for (int v = 0; v < in_vectors; ++v, in += kGroup) {
    const float* a = (const float*)in;
    for (int c = 0; c < kL; ++c, weights += kN * kL, ++a) {
      Vec b[kN];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) b[n] = at(weights + n * kL);
#pragma GCC unroll 24
      for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) sum[r][n] += a[r * kL] * b[n];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) m[r * kN + n] = sum[r][n];
}

// Rows of pixels that will be read soon, fetched bit by bit while the core multiplies.
struct Ahead {
  const char* from = nullptr;
  int64_t pitch = 0, bytes = 0;  // from row to row, of a row
  int rows = 0;                  // at most 4

  // One of 36 parts. Always inline: GCC takes a call that changes nothing for one that does nothing.
  __attribute__((always_inline)) void fetch(int part) const {
    constexpr int kParts = kPoints / 4;
    const int row = part / kParts;
    if (row >= rows) return;
    const int64_t begin = bytes * (part % kParts) / kParts / 64 * 64;
    const int64_t end = bytes * (part % kParts + 1) / kParts;
    for (int64_t n = begin; n < end; n += 64) __builtin_prefetch(from + row * pitch + n);
  }
};

// What a group of tiles does at one row of points.
struct PointRow {
  int row, missing;       // 0 to 5; a point of the row where all weights are zero, or -1
  int tiles, in_vectors;  // of the group, of the chunk
  bool add;               // to what the chunks before have given
  const Ahead* ahead;     // three of them, or null
};

// The columns of a group at a row of points, [input vector][column], to values at the points
// [point][input vector][tile].
inline void transform_row(const PointRow& r, const Vec* columns, int pitch, Vec* to) {
  const int64_t step = int64_t(r.in_vectors) * kGroup;
  for (int n = 0; n < r.in_vectors; ++n, to += kGroup, columns += pitch)
    for (int t = 0; t < r.tiles; ++t) {
      Vec d[kPatch], v[kPatch];
#pragma GCC unroll 6
      for (int j = 0; j < kPatch; ++j) d[j] = columns[t * kTile + j];
      transform_input(d, v);
#pragma GCC unroll 6
      for (int j = 0; j < kPatch; ++j) to[j * step + t] = v[j];
    }
}

// Those values times weights [point][input channel][vector], and of the products lines of four pixels
// [vector][tile][pixel], vectors `pitch` apart. m: memory for the products, kPatch * kGroup * kN.
template <int kN>
void multiply_row(const PointRow& r, const Vec* in, const float* weights, Vec* m, Vec* lines, int pitch) {
  constexpr int kR = kRows[kN], kF = kFewer[kN], kStep = kGroup * kN;
  const int parts = ceil_div(r.tiles, kR), spare = (parts * kR - r.tiles) / (kR - kF);
  const int full = max(parts - spare, 0);
  const int64_t point = int64_t(r.in_vectors) * kL * kN * kL;
  for (int j = 0; j < kPatch; ++j, in += r.in_vectors * kGroup, weights += point) {
    for (int n = 0; n < 3 && r.ahead; ++n) r.ahead[n].fetch(r.row * kPatch + j);
    Vec* to = m + j * kStep;
    if (j == r.missing) {
      for (int t = 0; t < r.tiles * kN; ++t) to[t] = Vec{};
      continue;
    }
    for (int part = 0, t = 0; part < parts; t += part++ < full ? kR : kF)
      if (part < full)
        multiply<kN, kR>(in + t, weights, r.in_vectors, to + t * kN);
      else
        multiply<kN, kF>(in + t, weights, r.in_vectors, to + t * kN);
  }
  for (int n = 0; n < kN; ++n, ++m, lines += pitch)
    for (int t = 0; t < r.tiles; ++t) {
      Vec d[kPatch], y[kTile];
#pragma GCC unroll 6
      for (int j = 0; j < kPatch; ++j) d[j] = m[j * kStep + t * kN];
      transform_output(d, y);
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) lines[t * kTile + j] = r.add ? lines[t * kTile + j] + y[j] : y[j];
    }
}

}  // namespace
}  // namespace flashvsr
