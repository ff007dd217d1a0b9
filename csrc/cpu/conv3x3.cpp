// 3x3 convolution for one instruction set, in Winograd's form. setup.py compiles this file once for each set,
// with its flags and with FLASHVSR_CONV3X3 naming the result. No C++ library header: see sparse_attn.cpp.
#include "conv3x3.h"

#include "winograd.h"

namespace flashvsr {
namespace {

// Input channels of a chunk. Measured on a Zen 5 (48 KB of L1, 1 MB of L2 a core), as are the sizes below.
constexpr int kChunk = 128;
constexpr int kStripRows = 8;
constexpr int64_t kStreamBytes = 32 << 20;  // a larger result is out of all caches before anybody reads it

// Vectors first, first + 1, ... of a panel, all within one phase.
struct Panel {
  int phase, first, vectors;
};
inline Panel panel_of(const Conv3x3Plan& plan, int n) {
  const int phase = n / plan.phase_panels, part = n % plan.phase_panels;
  const int first = part * plan.phase_vectors / plan.phase_panels;
  return {phase, first, (part + 1) * plan.phase_vectors / plan.phase_panels - first};
}

// A worker's memory, in vectors: of a block the columns [row of points][group][vector][column] and the lines
// of four pixels [row of points][output vector][tile][pixel]; of a group at a row of points the input
// [point][vector][tile] and the products [point][tile][vector of a panel].
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

  // A group's input and products at a row of points stay in L1 beside a panel's weights there. Weights too
  // large for that are read from L2, rarely: groups are large. A block's columns and lines stay in L2.
  const int panel = ceil_div(plan.phase_vectors, plan.phase_panels);
  const bool heavy = kPatch * plan.chunk_vectors * kL * panel * kVectorBytes > 64 << 10;
  const bool wide = kPatch * 24 * (plan.chunk_vectors + panel) * kVectorBytes > 24 << 10;
  const int group = heavy ? kGroup : wide ? 12 : 24;
  const int widest = max(plan.chunk_vectors, plan.phase_vectors * phases);
  const int block = (heavy ? 512 << 10 : 256 << 10) / (kPatch * kTile * widest * kVectorBytes);
  plan.across = ceil_div(plan.tile_columns, max(block, group));
  plan.block_columns = ceil_div(plan.tile_columns, plan.across);
  plan.across = ceil_div(plan.tile_columns, plan.block_columns);
  plan.block_groups = ceil_div(plan.block_columns, group);
  const int64_t share = p.pictures * plan.across * plan.tile_rows / (8 * workers);
  plan.strip_rows = max(1, min(share, kStripRows));
  plan.down = ceil_div(plan.tile_rows, plan.strip_rows);
  const int64_t out_bytes = p.pictures * p.steps * p.height * p.width * phases * p.outputs * 4;
  plan.stream = kWide && p.dtype == DType::f32 && p.outputs % kL == 0 &&
                uintptr_t(p.out) % kVectorBytes == 0 && out_bytes > kStreamBytes;
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
          for (int c = 0; c < kL; ++c)
            to[i * point + c * columns + n * kL + o] = u[i / kPatch][i % kPatch][c];
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
        for (int i = 0; i < kPatch; ++i) {
          const bool inside = y + i >= 0 && y + i < p.height;
          d[i] = inside ? load(from + i * pitch + int64_t(n) * p.channels, channels) : Vec{};
        }
        transform_input(d, v);
        for (int i = 0; i < kPatch; ++i) to[i * step + n] = v[i];
      }
  }

  // A block: `tiles` tiles from (row, column) on.
  struct Block {
    int64_t picture;
    int row, column, tiles;
  };

  // Tiles first, first + 1, ... of a block.
  struct Group {
    int first, tiles;
  };
  static Group group_of(const Conv3x3Plan& plan, const Block& b, int n) {
    const int first = b.tiles * n / plan.block_groups;
    return {first, b.tiles * (n + 1) / plan.block_groups - first};
  }

  // A group's values at a row of points times all weights there, added to the block's lines. first: the
  // chunk's first input vector.
  static void multiply_panels(const Conv3x3Plan& plan, PointRow row, bool enlarge, int first, Group group,
                              Vec* in, const float* weights, Vec* block_lines) {
    const int pitch = plan.block_columns * kTile;
    Vec* m = in + kPatch * kGroup * plan.chunk_vectors;
    for (int n = 0; n < plan.panels; ++n) {
      const Panel panel = panel_of(plan, n);
      const int64_t pair = int64_t(kL) * panel.vectors * kL;  // floats of a pair of vectors at a point
      const float* from =
          weights + n * plan.weight_panel + (kPoints * first + row.row * kPatch * row.in_vectors) * pair;
      Vec* lines = block_lines + row.row * lines_step(plan) +
                   (panel.phase * plan.phase_vectors + panel.first) * pitch + group.first * kTile;
      // A phase has two taps in a line, the first two or the last two: it lacks the point infinity or 0.
      if (enlarge && row.row == (panel.phase / 2 ? 0 : kPatch - 1)) {
        for (int v = 0; v < panel.vectors && !row.add; ++v)
          for (int t = 0; t < group.tiles * kTile; ++t) lines[v * pitch + t] = Vec{};
        continue;
      }
      row.missing = !enlarge ? -1 : panel.phase % 2 ? 0 : kPatch - 1;
      const auto run = panel.vectors == 1   ? multiply_row<1>
                       : panel.vectors == 2 ? multiply_row<2>
                       : panel.vectors == 3 ? multiply_row<kWide ? 3 : 1>
                                            : multiply_row<kWide ? 4 : 1>;
      run(row, in, from, m, lines, pitch);
      row.ahead = nullptr;
    }
  }

  // Four rows of pixels from (y, x) on, to be fetched ahead.
  static Ahead pixels(const void* picture, int64_t width, int64_t height, int channels, int64_t y, int64_t x,
                      int64_t count) {
    const int64_t end = min(x + count, width), pixel = channels * int64_t(sizeof(In));
    return {(const char*)picture + (y * width + x) * pixel, width * pixel, (end - x) * pixel,
            min(kTile, height - y)};
  }

  // Lines of an output vector to pixels.
  static void finish(const Conv3x3Params& p, const Conv3x3Plan& plan, const Block& b, int phase,
                     const Outputs& o, const Vec* lines) {
    const int scale = p.enlarge ? 2 : 1;
    const int64_t column_step = scale * p.outputs, row_step = scale * p.width * column_step;
    const int64_t first = (b.picture * p.steps + o.step) * p.height * scale * p.width * scale * p.outputs +
                          (phase / 2 * p.width * scale + phase % 2) * p.outputs + o.channel +
                          b.row * kTile * row_step + b.column * kTile * column_step;
    const int rows = min(kTile, p.height - b.row * kTile);
    const int columns = min(b.tiles * kTile, p.width - b.column * kTile);
    const Vec bias = p.bias ? load((const In*)p.bias + o.channel, o.count) : Vec{};
    const bool full = rows == kTile && o.count == kL;
    const auto run = !full         ? finish_line<false, false>
                     : plan.stream ? finish_line<true, true>
                                   : finish_line<true, false>;
    run(p, lines, lines_step(plan), first, row_step, column_step, rows, columns, o.count, bias);
  }
  template <bool full, bool stream>
  static void finish_line(const Conv3x3Params& p, const Vec* lines, int64_t step, int64_t at,
                          int64_t row_step, int64_t column_step, int rows, int columns, int count, Vec bias) {
    if (full) rows = kTile, count = kL;
    for (int x = 0; x < columns; ++x, at += column_step) {
      Vec d[kPatch], y[kTile];
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) d[i] = lines[i * step + x];
      transform_output(d, y);
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
        if (i >= rows) break;
        const int64_t pixel = at + i * row_step;
        Vec value = y[i] + bias;
        if (p.residual) value += load((const In*)p.residual + pixel, count);
        if (p.relu) value = value < 0 ? Vec{} : value;  // NaN stays NaN
        if (stream)
          store_past_caches(value, (In*)p.out + pixel);
        else
          store(value, (In*)p.out + pixel, count);
      }
    }
  }

  static void block(const Conv3x3Params& p, const Conv3x3Plan& plan, const Block& b, const float* weights,
                    Vec* scratch) {
    Vec *columns = scratch, *lines = columns + kPatch * columns_step(plan);
    Vec* in = lines + kPatch * lines_step(plan);
    const int pitch = group_columns(plan);
    const int64_t pixels_before = b.picture * p.height * p.width;
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      const int first = chunk * plan.chunk_vectors;
      const int vectors = min(plan.chunk_vectors, plan.in_vectors - first);
      for (int n = 0; n < vectors; ++n) {
        const Inputs inputs = inputs_of(p, first + n);
        for (int g = 0; g < plan.block_groups; ++g) {
          const Group group = group_of(plan, b, g);
          transform_columns(p, inputs.x + pixels_before * p.channels, inputs.count, b.row * kTile - 1,
                            (b.column + group.first) * kTile - 1, group.tiles * kTile + 2,
                            columns + (int64_t(g) * vectors + n) * pitch, columns_step(plan));
        }
      }
      for (int i = 0; i < kPatch; ++i)
        for (int g = 0; g < plan.block_groups; ++g) {
          const Group group = group_of(plan, b, g);
          Ahead coming[3] = {};
          if (chunk == 0) {  // the rows that the block below will read, and what is added to this one
            const int y = b.row * kTile, x = (b.column + group.first) * kTile, count = group.tiles * kTile;
            const auto at = [&](const void* picture, int channels, int row) {
              const In* from = (const In*)picture + pixels_before * channels;
              return picture ? pixels(from, p.width, p.height, channels, row, x, count) : Ahead();
            };
            coming[0] = at(p.x, p.channels, y + kTile + 1);
            coming[1] = at(p.past, p.channels, y + kTile + 1);
            coming[2] = at(p.residual, p.outputs, y);
          }
          const PointRow row = {i, -1, group.tiles, vectors, chunk > 0, coming};
          transform_row(row, columns + i * columns_step(plan) + int64_t(g) * vectors * pitch, pitch, in);
          multiply_panels(plan, row, p.enlarge, first, group, in, weights, lines);
        }
    }
    for (int n = 0; n < plan.panels / plan.phase_panels * plan.phase_vectors; ++n)
      finish(p, plan, b, n / plan.phase_vectors, outputs_of(p, n % plan.phase_vectors),
             lines + n * plan.block_columns * kTile);
  }

  static void strip(const Conv3x3Params& p, const Conv3x3Plan& plan, int64_t n, const float* weights,
                    float* scratch) {
    const int column = int(n % plan.across) * plan.block_columns;
    const int first = int(n / plan.across % plan.down) * plan.strip_rows;
    const int tiles = min(plan.block_columns, plan.tile_columns - column);
    for (int row = first; row < min(first + plan.strip_rows, plan.tile_rows); ++row)
      block(p, plan, {n / plan.across / plan.down, row, column, tiles}, weights, (Vec*)scratch);
    if (plan.stream) fence_past_caches();
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
