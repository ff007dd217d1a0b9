// 3x3 convolution for one instruction set: Winograd's F(4x4, 3x3), 36 multiplications for 16 outputs and a pair
// of channels instead of 144. setup.py compiles this file once for each set, with its flags and with
// FLASHVSR_CONV3X3 naming the result. No C++ library header: see sparse_attn.cpp.
//
// The points are 0, +-5/8, +-3/2 and infinity: errors are twice a direct convolution's, with the usual 0, +-1,
// +-2 five times (measured on 8 to 784 channels). All constants of the transforms of pictures are exact.
#include "conv3x3.h"

#include "vectors.h"
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace flashvsr {
namespace {

constexpr int kTile = 4, kPatch = 6, kPoints = kPatch * kPatch;  // pixels of a tile, of its input; squared
constexpr int kL = kLanes<float>;
// Register tiles: rows (tiles of the picture) by vectors of output channels. The sums hide the latency of a
// multiply-add, and fit the registers together with a line of weights. Two heights for each width, so that
// few rows are wasted.
constexpr bool kWide = kVectorBytes == 64;
constexpr int kMaxVectors = kWide ? 4 : 2;
constexpr int kRows[5] = {0, kWide ? 24 : 12, kWide ? 12 : 6, 9, 6};
constexpr int kFewer[5] = {0, kWide ? 22 : 11, kWide ? 11 : 5, 8, 5};
// Measured on a Zen 5 (48 KB of L1, 1 MB of L2 a core).
#ifndef CHUNK
#define CHUNK 128
#define BLK (1 << 16)
#endif
#ifndef GB
#define GB 24576
#endif
#ifndef SR
#define SR 8
#endif
constexpr int kGroup = 48;           // most tiles of a group
#ifndef RB
#define RB 65536
#endif
#ifndef LG
#define LG 48
#endif
#ifndef BLK2
#define BLK2 (1<<17)
#endif
constexpr int kChunk = CHUNK;        // input channels of a chunk
constexpr int kBlockFloats = BLK;    // of a block's columns and of its lines: a quarter of L2
constexpr int kStripRows = SR;

typedef Vector<float> Vec;
typedef float Loose __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2), may_alias, aligned(2)));

inline Vec load(const float* p) { return *(const Loose*)p; }
inline Vec load(const Bf16* p) { return (Vec)(__builtin_convertvector(*(const Halves*)p, Bits) << 16); }
inline void store(Vec x, float* p) { *(Loose*)p = x; }
inline void store(Vec x, Bf16* p) {  // narrow of each lane
  const Bits bits = (Bits)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  *(Halves*)p = __builtin_convertvector(x == x ? rounded : Bits{} + 0x7FC0, Halves);
}

// `count` lanes, the others zero or left alone.
template <class In>
inline Vec load(const In* p, int count) {
  if (count == kL) return load(p);
  Vec x = {};
  for (int n = 0; n < count; ++n) x[n] = widen(p[n]);
  return x;
}
template <class In>
inline void store(Vec x, In* p, int count) {
  if (count == kL) return store(x, p);
  for (int n = 0; n < count; ++n) narrow(x[n], p + n);
}
#ifdef __AVX512F__
inline Vec load(const float* p, int count) { return (Vec)_mm512_maskz_loadu_ps((1 << count) - 1, p); }
inline void store(Vec x, float* p, int count) { _mm512_mask_storeu_ps(p, (1 << count) - 1, (__m512)x); }
#endif

constexpr float kA = 0.625f, kB = 1.5f, kAA = kA * kA, kBB = kB * kB;

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

// Products at the points to four pixels in a line.
inline void transform_output(const Vec (&m)[kPatch], Vec (&y)[kTile]) {
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = odd_a * kA + odd_b * kB;
  y[2] = even_a * kAA + even_b * kBB;
  y[3] = odd_a * (kAA * kA) + odd_b * (kBB * kB) + m[5];
}

// Three taps in a line to their values at the points, over the points' products of distances.
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

inline int ceil_div(int64_t a, int b) { return int((a + b - 1) / b); }
inline int min(int64_t a, int64_t b) { return int(a < b ? a : b); }

// Vectors first, first + 1, ... of a panel, all within one phase.
struct Panel {
  int phase, first, vectors;
};
inline Panel panel_of(const Conv3x3Plan& plan, int n) {
  const int phase = n / plan.phase_panels, part = n % plan.phase_panels;
  const int first = part * plan.phase_vectors / plan.phase_panels;
  return {phase, first, (part + 1) * plan.phase_vectors / plan.phase_panels - first};
}

// A block's memory, in vectors: its columns [row of points][group][vector][column], a group's input at one row
// of points [point][vector][tile] and its products [point][tile][vector of a panel], lines of four pixels
// [row of points][output vector][tile][pixel].
inline int group_columns(const Conv3x3Plan& plan) {
  return ceil_div(plan.block_columns, plan.block_groups) * kTile + 2;
}
inline int64_t columns_step(const Conv3x3Plan& plan) {
  return int64_t(plan.block_groups) * plan.chunk_vectors * group_columns(plan);
}
inline int64_t lines_step(const Conv3x3Plan& plan) {
  return int64_t(plan.panels / plan.phase_panels) * plan.phase_vectors * plan.block_columns * kTile;
}

void make_plan(const Conv3x3Params& p, int workers, Conv3x3Plan* out) {
  Conv3x3Plan& plan = *out;
  plan.in_vectors = ceil_div(p.channels, kL) * (p.past ? 2 : 1);
  plan.chunks = ceil_div(plan.in_vectors * kL, kChunk);
  plan.chunk_vectors = ceil_div(plan.in_vectors, plan.chunks);
  const int phases = p.enlarge ? 4 : 1;
  plan.phase_vectors = p.steps * ceil_div(p.outputs, kL);
  plan.phase_panels = ceil_div(plan.phase_vectors, kMaxVectors);
  plan.panels = plan.phase_panels * phases;
  plan.tile_rows = ceil_div(p.height, kTile), plan.tile_columns = ceil_div(p.width, kTile);

  const int panel = ceil_div(plan.phase_vectors, plan.phase_panels);
  const int out_vectors = plan.phase_vectors * phases;
  const int widest = plan.chunk_vectors > out_vectors ? plan.chunk_vectors : out_vectors;
  const int row_bytes = kPatch * plan.chunk_vectors * kL * panel * kVectorBytes;
  const int group = row_bytes > RB ? LG : kPatch * 24 * (plan.chunk_vectors + panel) * kVectorBytes > GB ? 12 : 24;
  const int block = (row_bytes > RB ? BLK2 : kBlockFloats) / (kPatch * kTile * kL * widest);
  plan.across = ceil_div(plan.tile_columns, block > group ? block : group);
  plan.block_columns = ceil_div(plan.tile_columns, plan.across);
  plan.across = ceil_div(plan.tile_columns, plan.block_columns);
  plan.block_groups = ceil_div(plan.block_columns, group);
  const int64_t share = p.pictures * plan.across * plan.tile_rows / (8 * workers);
  plan.strip_rows = share < 1 ? 1 : min(share, kStripRows);
  plan.down = ceil_div(plan.tile_rows, plan.strip_rows);
  plan.weight_panel = int64_t(kPoints) * plan.in_vectors * kL * kMaxVectors * kL;
  plan.scratch = (kPatch * (columns_step(plan) + lines_step(plan)) +
                  kPatch * kGroup * (plan.chunk_vectors + kMaxVectors)) * kL;
}

template <class In>
struct Conv3x3 {
  // Input vector n: its first channel among the weights' inputs, and how many channels it has.
  struct Inputs {
    const In* x;  // at the first pixel
    int weight_channel, count;
  };
  static Inputs inputs_of(const Conv3x3Params& p, int n) {
    const int half = ceil_div(p.channels, kL), channel = n % half * kL;
    const bool past = n >= half;
    return {(const In*)(past ? p.past : p.x) + channel, channel + (past ? p.channels : 0),
            min(kL, p.channels - channel)};
  }

  // Output vector n of a phase: time step, first channel, how many channels.
  struct Outputs {
    int step, channel, count;
  };
  static Outputs outputs_of(const Conv3x3Params& p, int n) {
    const int per_step = ceil_div(p.outputs, kL), channel = n % per_step * kL;
    return {n / per_step, channel, min(kL, p.outputs - channel)};
  }

  // The weights from all inputs to one output at one tap; null where a phase has no such tap.
  static const In* taps_of(const Conv3x3Params& p, int phase, int step, int output, int y, int x) {
    const int64_t inputs = p.channels * (p.past ? 2 : 1);
    const In* weight = (const In*)p.weight;
    if (!p.enlarge) return weight + ((int64_t(output) * 3 + y) * 3 + x) * inputs;
    y -= phase / 2, x -= phase % 2;
    if (y < 0 || y > 1 || x < 0 || x > 1) return nullptr;
    return weight + ((((int64_t(step) * 4 + phase) * p.outputs + output) * 2 + y) * 2 + x) * inputs;
  }

  // A panel's weights lie as [chunk][point][input channel of the chunk][output channel of the panel].
  static void transform_weights(const Conv3x3Params& p, const Conv3x3Plan& plan, int n_panel, int in_vector,
                                float* weights) {
    const Panel panel = panel_of(plan, n_panel);
    const Inputs in = inputs_of(p, in_vector);
    const int chunk = in_vector / plan.chunk_vectors, first = chunk * plan.chunk_vectors;
    const int in_chunk = min(plan.chunk_vectors, plan.in_vectors - first), columns = panel.vectors * kL;
    const int64_t point = int64_t(in_chunk) * kL * columns;
    float* to = weights + n_panel * plan.weight_panel + int64_t(kPoints) * first * kL * columns +
                int64_t(in_vector - first) * kL * columns;
    for (int n = 0; n < panel.vectors; ++n) {
      const Outputs out = outputs_of(p, panel.first + n);
      for (int o = 0; o < kL; ++o) {
        Vec g[3][3] = {}, half[kPatch][3], u[kPatch][kPatch];
        for (int y = 0; y < 3 && o < out.count; ++y)
          for (int x = 0; x < 3; ++x)
            if (const In* taps = taps_of(p, panel.phase, out.step, out.channel + o, y, x))
              g[x][y] = load(taps + in.weight_channel, in.count);
        for (int x = 0; x < 3; ++x) {
          Vec column[kPatch];
          transform_taps(g[x], column);
          for (int i = 0; i < kPatch; ++i) half[i][x] = column[i];
        }
        for (int i = 0; i < kPatch; ++i) transform_taps(half[i], u[i]);
        for (int i = 0; i < kPoints; ++i)
          for (int c = 0; c < kL; ++c) to[i * point + c * columns + n * kL + o] = u[i / kPatch][i % kPatch][c];
      }
    }
  }

  // The six pixels below one another at each column of a group, from pixel (y, x) on, to their values at the
  // points of a column. Zero outside the picture.
  static void transform_columns(const Conv3x3Params& p, const In* picture, int channels, int64_t y, int64_t x,
                                int count, Vec* to, int64_t step) {
    const int begin = x < 0 ? int(-x) : 0, end = min(count, p.width - x);
    for (int i = 0; i < kPatch; ++i) {
      for (int n = 0; n < begin; ++n) to[i * step + n] = Vec{};
      for (int n = end; n < count; ++n) to[i * step + n] = Vec{};
    }
    const int64_t pitch = p.width * p.channels;
    const In* from = picture + y * pitch + x * p.channels;
    if (channels == kL && y >= 0 && y + kPatch <= p.height)
      for (int n = begin; n < end; ++n) {
        Vec d[kPatch], v[kPatch];
#pragma GCC unroll 6
        for (int i = 0; i < kPatch; ++i) d[i] = load(from + i * pitch + int64_t(n) * p.channels);
        transform_input(d, v);
#pragma GCC unroll 6
        for (int i = 0; i < kPatch; ++i) to[i * step + n] = v[i];
      }
    else
      for (int n = begin; n < end; ++n) {
        Vec d[kPatch], v[kPatch];
        for (int i = 0; i < kPatch; ++i)
          d[i] = y + i >= 0 && y + i < p.height ? load(from + i * pitch + int64_t(n) * p.channels, channels) : Vec{};
        transform_input(d, v);
        for (int i = 0; i < kPatch; ++i) to[i * step + n] = v[i];
      }
  }

  // A group's columns at one row of points to the input at the points of that row.
  static void transform_row(const Vec* columns, int pitch, int tiles, int vectors, Vec* to) {
    const int64_t step = int64_t(vectors) * kGroup;
    for (int n = 0; n < vectors; ++n, to += kGroup, columns += pitch) {
      for (int t = 0; t < tiles; ++t) {
        Vec d[kPatch], v[kPatch];
#pragma GCC unroll 6
        for (int j = 0; j < kPatch; ++j) d[j] = columns[t * kTile + j];
        transform_input(d, v);
#pragma GCC unroll 6
        for (int j = 0; j < kPatch; ++j) to[j * step + t] = v[j];
      }
    }
  }

  // Four rows of pixels that will be read soon, fetched while the core multiplies.
  struct Ahead {
    const char* from = nullptr;
    int64_t pitch = 0, bytes = 0;  // from row to row, of a row
    int rows = 0;
    // At one of 36 points.
    __attribute__((always_inline)) void fetch(int point) const {  // else GCC drops the call: it changes nothing
      const int row = point / 9, part = point % 9;
      if (row >= rows) return;
      const char* line = from + row * pitch;
      for (int64_t at = bytes * part / 9 / 64 * 64; at < bytes * (part + 1) / 9; at += 64) __builtin_prefetch(line + at);
    }
  };
  static Ahead pixels(const In* picture, int64_t width, int64_t height, int channels, int64_t y, int64_t x,
                      int64_t count) {
    const int64_t end = x + count < width ? x + count : width, size = channels * int64_t(sizeof(In));
    return {(const char*)(picture + (y * width + x) * channels), width * size, (end - x) * size, min(kTile, height - y)};
  }

  // m[tile][vector] = tiles times weights, for one point and one register tile.
  template <int kN, int kR>
  static void multiply(const Vec* tiles, const float* weights, int vectors, Vec* m) {
    Vec sum[kR][kN] = {};
    for (int v = 0; v < vectors; ++v, tiles += kGroup) {
      const float* a = (const float*)tiles;
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

  // Products of a group and a panel at the points of a row, and of them lines of four pixels, the panel's
  // vectors `pitch` apart. A phase of an enlargement has two taps in a line: it lacks the point 0 or the point
  // infinity.
  template <int kN>
  static void multiply_row(int tiles, int vectors, int missing, const Vec* in, const float* weights, bool add,
                           const Ahead (&ahead)[3], int i, Vec* m, Vec* lines, int pitch) {
    constexpr int kR = kRows[kN], kF = kFewer[kN], kStep = kGroup * kN;
    const int parts = ceil_div(tiles, kR), spare = (parts * kR - tiles) / (kR - kF);
    const int most = parts - (spare < parts ? spare : parts);
    for (int j = 0; j < kPatch; ++j, in += vectors * kGroup, weights += int64_t(vectors) * kL * kN * kL) {
      Vec* to = m + j * kStep;
      for (const Ahead& a : ahead) a.fetch(i * kPatch + j);
      if (j == missing) {
        for (int t = 0; t < tiles * kN; ++t) to[t] = Vec{};
        continue;
      }
      for (int part = 0, t = 0; part < parts; t += part++ < most ? kR : kF)
        if (part < most)
          multiply<kN, kR>(in + t, weights, vectors, to + t * kN);
        else
          multiply<kN, kF>(in + t, weights, vectors, to + t * kN);
    }
    for (int n = 0; n < kN; ++n, ++m, lines += pitch)
      for (int t = 0; t < tiles; ++t) {
        Vec d[kPatch], y[kTile];
#pragma GCC unroll 6
        for (int j = 0; j < kPatch; ++j) d[j] = m[j * kStep + t * kN];
        transform_output(d, y);
#pragma GCC unroll 4
        for (int j = 0; j < kTile; ++j) lines[t * kTile + j] = add ? lines[t * kTile + j] + y[j] : y[j];
      }
  }

  // A block: `tiles` tiles from (row, column) on.
  struct Block {
    int64_t picture;
    int row, column, tiles;
  };

  // Lines of an output vector to pixels.
  static void finish(const Conv3x3Params& p, const Conv3x3Plan& plan, const Block& b, int phase, const Outputs& o,
                     const Vec* lines) {
    const int scale = p.enlarge ? 2 : 1;
    const int64_t column_step = scale * p.outputs, row_step = scale * p.width * column_step;
    const int64_t first = (b.picture * p.steps + o.step) * p.height * scale * p.width * scale * p.outputs +
                          (phase / 2 * p.width * scale + phase % 2) * p.outputs + o.channel +
                          b.row * kTile * row_step + b.column * kTile * column_step;
    const int rows = min(kTile, p.height - b.row * kTile), columns = min(b.tiles * kTile, p.width - b.column * kTile);
    const Vec bias = p.bias ? load((const In*)p.bias + o.channel, o.count) : Vec{};
    if (rows == kTile && o.count == kL)
      finish_line<true>(p, lines, lines_step(plan), first, row_step, column_step, rows, columns, kL, bias);
    else
      finish_line<false>(p, lines, lines_step(plan), first, row_step, column_step, rows, columns, o.count, bias);
  }
  template <bool full>
  static void finish_line(const Conv3x3Params& p, const Vec* lines, int64_t step, int64_t at, int64_t row_step,
                          int64_t column_step, int rows, int columns, int count, Vec bias) {
    for (int x = 0; x < columns; ++x, at += column_step) {
      Vec d[kPatch], y[kTile];
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) d[i] = lines[i * step + x];
      transform_output(d, y);
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
        if (!full && i >= rows) break;
        const int64_t pixel = at + i * row_step;
        Vec value = y[i] + bias;
        if (p.residual) value += load((const In*)p.residual + pixel, full ? kL : count);
        if (p.relu) value = value > 0 ? value : Vec{};
        if (full)
          store_full(value, (In*)p.out + pixel);
        else
          store(value, (In*)p.out + pixel, count);
      }
    }
  }
  static void store_full(Vec x, float* p) {
#if defined(NT) && defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#else
    store(x, p);
#endif
  }
  static void store_full(Vec x, Bf16* p) { store(x, p); }

  static void strip(const Conv3x3Params& p, const Conv3x3Plan& plan, int64_t n, const float* weights,
                    float* scratch) {
    const int column = int(n % plan.across) * plan.block_columns;
    const int first = int(n / plan.across % plan.down) * plan.strip_rows;
    const int tiles = min(plan.block_columns, plan.tile_columns - column);
    for (int row = first; row < min(first + plan.strip_rows, plan.tile_rows); ++row)
      block(p, plan, {n / plan.across / plan.down, row, column, tiles}, weights, (Vec*)scratch);
  }

  static void block(const Conv3x3Params& p, const Conv3x3Plan& plan, const Block& b, const float* weights,
                    Vec* scratch) {
    Vec *columns = scratch, *lines = columns + kPatch * columns_step(plan), *in = lines + kPatch * lines_step(plan),
        *m = in + kPatch * kGroup * plan.chunk_vectors;
    const int groups = plan.block_groups, pitch = group_columns(plan);
    const int64_t picture = b.picture * p.height * p.width;
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      const int first = chunk * plan.chunk_vectors, vectors = min(plan.chunk_vectors, plan.in_vectors - first);
      for (int n = 0; n < vectors; ++n) {
        const Inputs inputs = inputs_of(p, first + n);
        for (int g = 0; g < groups; ++g) {
          const int at = b.tiles * g / groups, count = b.tiles * (g + 1) / groups - at;
          transform_columns(p, inputs.x + picture * p.channels, inputs.count, int64_t(b.row) * kTile - 1,
                            int64_t(b.column + at) * kTile - 1, count * kTile + 2,
                            columns + (int64_t(g) * vectors + n) * pitch, columns_step(plan));
        }
      }
      for (int i = 0; i < kPatch; ++i)
        for (int g = 0; g < groups; ++g) {
          const int at = b.tiles * g / groups, count = b.tiles * (g + 1) / groups - at;
          transform_row(columns + i * columns_step(plan) + int64_t(g) * vectors * pitch, pitch, count, vectors, in);
          Ahead coming[3] = {};
          if (chunk == 0) {
            const int64_t y = b.row * kTile, x = (b.column + at) * kTile;
            coming[0] = pixels((const In*)p.x + picture * p.channels, p.width, p.height, p.channels, y + 5, x,
                               count * kTile);
            if (p.past)
              coming[1] = pixels((const In*)p.past + picture * p.channels, p.width, p.height, p.channels, y + 5, x,
                                 count * kTile);
            if (p.residual)
              coming[2] = pixels((const In*)p.residual + picture * p.outputs, p.width, p.height, p.outputs, y, x,
                                 count * kTile);
          }
          for (int n = 0; n < plan.panels; ++n) {
            const Panel panel = panel_of(plan, n);
            const int64_t pair = int64_t(kL) * panel.vectors * kL;  // floats of a pair of vectors at a point
            const float* from = weights + n * plan.weight_panel + (kPoints * first + i * kPatch * vectors) * pair;
            const int line = plan.block_columns * kTile;
            Vec* to = lines + i * lines_step(plan) + (panel.phase * plan.phase_vectors + panel.first) * line + at * kTile;
            if (p.enlarge && i == (panel.phase / 2 ? 0 : kPatch - 1)) {
              for (int v = 0; v < panel.vectors; ++v)
                for (int t = 0; t < count * kTile && chunk == 0; ++t) to[v * line + t] = Vec{};
              continue;
            }
            const Ahead none[3] = {};
            const Ahead(&ahead)[3] = n ? none : coming;
            const int missing = !p.enlarge ? -1 : panel.phase % 2 ? 0 : kPatch - 1;
            switch (panel.vectors) {
              case 1:
                multiply_row<1>(count, vectors, missing, in, from, chunk > 0, ahead, i, m, to, line);
                break;
              case 2:
                multiply_row<2>(count, vectors, missing, in, from, chunk > 0, ahead, i, m, to, line);
                break;
#ifdef __AVX512F__
              case 3:
                multiply_row<3>(count, vectors, missing, in, from, chunk > 0, ahead, i, m, to, line);
                break;
              case 4:
                multiply_row<4>(count, vectors, missing, in, from, chunk > 0, ahead, i, m, to, line);
                break;
#endif
            }
          }
        }
    }
    for (int n = 0; n < plan.panels / plan.phase_panels * plan.phase_vectors; ++n)
      finish(p, plan, b, n / plan.phase_vectors, outputs_of(p, n % plan.phase_vectors),
             lines + n * plan.block_columns * kTile);
  }
};

template <class In>
const Conv3x3Cpu* kernels() {
  static const Conv3x3Cpu table = {make_plan, Conv3x3<In>::transform_weights, Conv3x3<In>::strip};
  return &table;
}

}  // namespace

const Conv3x3Cpu* FLASHVSR_CONV3X3(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return kernels<float>();
    case DType::bf16:
      return kernels<Bf16>();
    default:
      return nullptr;
  }
}

}  // namespace flashvsr
