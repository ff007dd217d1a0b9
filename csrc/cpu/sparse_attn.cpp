// Block-sparse attention for one instruction set. setup.py compiles this file once for each, with its flags
// and with FLASHVSR_SPARSE_ATTN naming the result. No C++ library header: an inline function of one, compiled
// here for AVX-512, could be the copy that the linker keeps for everybody.
#include "sparse_attn.h"

#include <math.h>
#include <string.h>

#include "vectors.h"

namespace flashvsr {
namespace {

// A register tile is kRows query rows by kVectors vectors: as many sums as hide the latency of a multiply-add
// while they, the operand vectors and a broadcast still fit the registers.
constexpr int kRows = kVectorBytes == 64 ? 8 : kVectorBytes == 32 ? 6 : 4, kVectors = 2;

// 2**x for x <= 0, within 1 ulp: the integer part goes to the exponent, the rest through a minimax polynomial
// (relative error 2e-9 on [-1/2, 1/2]). Below -126 the result stays near 2**-126; NaN stays NaN.
inline Vector<float> exp2_nonpositive(Vector<float> x) {
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  const Vector<float> least = Vector<float>{} - 126.f;
  x = x < least ? least : x;
  const Vector<float> shifted = x + 12582912.f;  // 1.5 * 2**23: the sum has no bits left for a fraction
  const Vector<float> f = x - (shifted - 12582912.f);
  Vector<float> p = f * 0.000153533621f + 0.00133988745f;
  p = p * f + 0.00961843736f;
  p = p * f + 0.0555033247f;
  p = p * f + 0.240226479f;
  p = p * f + 0.693147203f;
  p = p * f + 1.f;
  return p * (Vector<float>)(((Int)shifted + 127) << 23);
}
inline Vector<double> exp2_nonpositive(Vector<double> x) {
  for (int n = 0; n < kLanes<double>; ++n) x[n] = exp2(x[n]);
  return x;
}

// How numbers are multiplied. Unit: what a broadcast takes from a row and a lane from a packed panel; it
// holds kPerUnit neighbours along the dimension that is summed.
template <class T, class Input>
struct Plain {
  using In = Input;
  using Real = T;  // of scores, sums and outputs
  using Unit = T;
  static constexpr int kPerUnit = 1;
  static Unit unit(In first, In) { return widen(first); }
  static Vector<T> multiply_add(Unit a, Vector<Unit> b, Vector<T> sum) { return sum + a * b; }
  static void store_units(Vector<T> x, Unit* row) { at(row) = x; }
};
#ifdef __AVX512BF16__
struct Bf16Pairs {
  using In = Bf16;
  using Real = float;
  using Unit = uint32_t;
  static constexpr int kPerUnit = 2;
  static Unit unit(In first, In second) { return first.bits | uint32_t(second.bits) << 16; }
  static Vector<float> multiply_add(Unit a, Vector<Unit> b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
  static void store_units(Vector<float> x, Unit* row) { *(__m256bh*)row = _mm512_cvtneps_pbh((__m512)x); }
};
#endif

template <class Math, int D>
struct Attention {
  using In = typename Math::In;
  using Real = typename Math::Real;
  using Unit = typename Math::Unit;
  static constexpr int kPer = Math::kPerUnit, kQUnits = D / kPer, kKeyUnits = kBlock / kPer;
  static constexpr int kColumns = kVectors * kLanes<Real>;  // of a register tile and of a packed panel
  static constexpr int kKeysUnits = kQUnits * kBlock, kPackedUnits = 2 * kKeysUnits;
  static constexpr int kMost = (kBlock + kRows - 1) / kRows * kRows;  // rows of whole register tiles
  static constexpr int kStats = kBlock + 16;

  struct alignas(64) Scratch {
    Unit q[kMost * kQUnits], probabilities[kMost * kKeyUnits];
    Real scores[kMost * kBlock], out[kMost * D], max[kStats], sum[kStats], shrink[kStats];
  };

  static size_t block_bytes(int) { return sizeof(Unit) * kPackedUnits; }
  static size_t scratch_bytes(int) { return sizeof(Scratch); }

  static const In* block_of(const void* x, const Strides& s, int64_t batch, int64_t head, int64_t block) {
    return (const In*)x + batch * s.batch + head * s.head + block * kBlock * s.row;
  }
  static int rows_of(int64_t length, int64_t block) {
    return int(length - block * kBlock < kBlock ? length - block * kBlock : kBlock);
  }

  // Keys as panels [128 / columns][units of D][columns], values as panels [D / columns][units of 128
  // keys][columns]. What lies beyond the last key is zero.
  static void pack(const SparseAttnParams& p, int64_t batch, int64_t head, int64_t block, void* packed) {
    const int keys = rows_of(p.k_len, block);
    Unit *k_to = (Unit*)packed, *v_to = k_to + kKeysUnits;
    if (keys < kBlock) memset(packed, 0, block_bytes(D));
    const In* k = block_of(p.k, p.k_strides, batch, head, block);
    for (int key = 0; key < keys; ++key, k += p.k_strides.row) {
      Unit* to = k_to + key / kColumns * kQUnits * kColumns + key % kColumns;
      for (int u = 0; u < kQUnits; ++u) to[u * kColumns] = Math::unit(k[u * kPer], k[u * kPer + kPer - 1]);
    }
    const In* v = block_of(p.v, p.v_strides, batch, head, block);
    const In zeros[D] = {};
    for (int u = 0; u * kPer < keys; ++u, v += kPer * p.v_strides.row) {
      const In* last = u * kPer + kPer <= keys ? v + (kPer - 1) * p.v_strides.row : zeros;
      for (int d = 0; d < D; ++d)
        v_to[(d / kColumns * kKeyUnits + u) * kColumns + d % kColumns] = Math::unit(v[d], last[d]);
    }
  }

  using Tile = Vector<Real>[kRows][kVectors];

  // tile += rows (stride `units`, kRows of them) times a packed panel of `units` lines.
  static void multiply(const Unit* rows, const Unit* panel, int units, Tile& tile) {
    for (int u = 0; u < units; ++u, panel += kColumns) {
      Vector<Unit> b[kVectors];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) b[n] = at(panel + n * kLanes<Unit>);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Unit a = rows[r * units + u];
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) tile[r][n] = Math::multiply_add(a, b[n], tile[r][n]);
      }
    }
  }

  // scores = q times keys, in units of log2: factor is scale * log2(e).
  static void score(Scratch& s, const Unit* keys, int rows, Real factor) {
    for (int column = 0; column < kBlock; column += kColumns, keys += kQUnits * kColumns)
      for (int row = 0; row < rows; row += kRows) {
        Tile tile = {};
        multiply(s.q + row * kQUnits, keys, kQUnits, tile);
        for (int r = 0; r < kRows; ++r)
          for (int n = 0; n < kVectors; ++n)
            at(s.scores + (row + r) * kBlock + column + n * kLanes<Real>) = tile[r][n] * factor;
      }
  }

  // Scores to probabilities against the running maximum; the running sum, and by how much what came before
  // shrinks.
  static void softmax(Scratch& s, int rows, int keys) {
    for (int row = 0; row < rows; ++row) {
      Real* x = s.scores + row * kBlock;
      for (int key = keys; key < kBlock; ++key) x[key] = -INFINITY;
      Vector<Real> most = at(x);
      for (int n = kLanes<Real>; n < kBlock; n += kLanes<Real>) most = at(x + n) > most ? at(x + n) : most;
      Real max = s.max[row];
      for (int n = 0; n < kLanes<Real>; ++n) max = most[n] > max ? most[n] : max;
      s.shrink[row] = s.max[row] - max;
      s.max[row] = max;
    }
    for (int row = 0; row < kStats; row += kLanes<Real>)
      at(s.shrink + row) = exp2_nonpositive(at(s.shrink + row));
    for (int row = 0; row < rows; ++row) {
      const Real *x = s.scores + row * kBlock, max = s.max[row];
      Vector<Real> sum = {};
      for (int n = 0; n < kBlock; n += kLanes<Real>) {
        const Vector<Real> p = exp2_nonpositive(at(x + n) - max);
        sum += p;
        Math::store_units(p, s.probabilities + row * kKeyUnits + n / kPer);
      }
      Real total = s.sum[row] * s.shrink[row];
      for (int n = 0; n < kLanes<Real>; ++n) total += sum[n];
      s.sum[row] = total;
    }
  }

  // out = out * shrink + probabilities times values.
  static void accumulate(Scratch& s, const Unit* values, int rows) {
    for (int column = 0; column < D; column += kColumns, values += kKeyUnits * kColumns)
      for (int row = 0; row < rows; row += kRows) {
        Real* out = s.out + row * D + column;
        Tile tile;
        for (int r = 0; r < kRows; ++r)
          for (int n = 0; n < kVectors; ++n)
            tile[r][n] = at(out + r * D + n * kLanes<Real>) * s.shrink[row + r];
        multiply(s.probabilities + row * kKeyUnits, values, kKeyUnits, tile);
        for (int r = 0; r < kRows; ++r)
          for (int n = 0; n < kVectors; ++n) at(out + r * D + n * kLanes<Real>) = tile[r][n];
      }
  }

  static void attend(const SparseAttnParams& p, int64_t batch, int64_t head, int64_t block,
                     const void* packed, void* scratch) {
    Scratch& s = *(Scratch*)scratch;
    const int q_rows = rows_of(p.q_len, block), rows = (q_rows + kRows - 1) / kRows * kRows;
    const In* q = block_of(p.q, p.q_strides, batch, head, block);
    for (int row = 0; row < q_rows; ++row, q += p.q_strides.row)
      for (int u = 0; u < kQUnits; ++u)
        s.q[row * kQUnits + u] = Math::unit(q[u * kPer], q[u * kPer + kPer - 1]);
    memset(s.q + q_rows * kQUnits, 0, (rows - q_rows) * kQUnits * sizeof(Unit));
    memset(s.out, 0, rows * D * sizeof(Real));
    for (int row = 0; row < kStats; ++row) s.max[row] = -INFINITY, s.sum[row] = s.shrink[row] = 0;

    const int64_t list = (batch * p.heads + head) * p.q_blocks + block;
    const int32_t* index = p.index + list * p.cap;
    for (int32_t n = 0; n < p.count[list]; ++n) {
      const Unit* keys = (const Unit*)packed + int64_t(index[n]) * kPackedUnits;
      score(s, keys, rows, Real(p.scale * M_LOG2E));
      softmax(s, rows, rows_of(p.k_len, index[n]));
      accumulate(s, keys + kKeysUnits, rows);
    }

    for (int row = 0; row < q_rows; ++row) {
      const int64_t l = block * kBlock + row;
      In* out = (In*)p.out + ((batch * p.q_len + l) * p.heads + head) * D;
      const bool empty = p.count[list] == 0;
      for (int d = 0; d < D; ++d) narrow(empty ? Real(0) : s.out[row * D + d] / s.sum[row], out + d);
      p.lse[(batch * p.heads + head) * p.q_len + l] =
          empty ? -INFINITY : float((s.max[row] + log2(s.sum[row])) * M_LN2);
    }
  }
};

// One table for both sizes of D: the caller's dim says which.
template <class Math>
const SparseAttnCpu* kernels() {
  using A = Attention<Math, 64>;
  using B = Attention<Math, 128>;
  static const SparseAttnCpu table = {
      [](int dim) { return dim == 64 ? A::block_bytes(dim) : B::block_bytes(dim); },
      [](int dim) { return dim == 64 ? A::scratch_bytes(dim) : B::scratch_bytes(dim); },
      [](const SparseAttnParams& p, int64_t b, int64_t h, int64_t i, void* to) {
        p.dim == 64 ? A::pack(p, b, h, i, to) : B::pack(p, b, h, i, to);
      },
      [](const SparseAttnParams& p, int64_t b, int64_t h, int64_t i, const void* packed, void* scratch) {
        p.dim == 64 ? A::attend(p, b, h, i, packed, scratch) : B::attend(p, b, h, i, packed, scratch);
      }};
  return &table;
}

}  // namespace

const SparseAttnCpu* FLASHVSR_SPARSE_ATTN(DType dtype) {
#ifdef __AVX512BF16__
  return dtype == DType::bf16 ? kernels<Bf16Pairs>() : nullptr;
#else
  switch (dtype) {
    case DType::f32:
      return kernels<Plain<float, float> >();
    case DType::f64:
      return kernels<Plain<double, double> >();
    case DType::bf16:
      return kernels<Plain<float, Bf16> >();
    default:
      return nullptr;
  }
#endif
}

}  // namespace flashvsr
