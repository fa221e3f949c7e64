// Matrix products of a few rows with weights in oneDNN's blocks, at the speed at which memory gives the weights.
//
// The layout is that of `_reorder_linear_weight` for bf16: blocks of 32 or 64 outputs, as the processor's oneDNN likes it,
// one after the other; in a block, for each pair of inputs, the pair's weights of all its outputs. The last block may
// have more than there are outputs. So a block is read from front to back, and nothing is held twice. Sums are in fp32,
// in the order of the inputs whatever the rows and `threads`.

#include <cstdint>

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "bfloat.h"

namespace {

constexpr int64_t kMost = 16;     // rows of a call
constexpr int64_t kAhead = 1024;  // elements to prefetch ahead: 2 KiB, further than the processor does by itself
constexpr int64_t kTiledAhead = 2048;
constexpr int64_t kPassed = 128;  // inputs whose weights are passed over again for more rows: 16 KiB at most

// Adds some inputs' part to the sums of a block's UNIT outputs for each row, or begins with it.
template <int UNIT, int ROWS>
void block(const uint16_t* w, const uint16_t* x, int64_t x_row, int64_t depth, float* sums, bool begins) {
  constexpr int kVectors = UNIT / 16;
  __m512 acc[ROWS][kVectors];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * UNIT + 16 * v);
  for (int64_t k = 0; k < depth; k += 2, w += 2 * UNIT) {
    __m512bh part[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      part[v] = (__m512bh)_mm512_loadu_si512(w + 32 * v);
      _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + 32 * v), _MM_HINT_T0);
    }
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_row + k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], part[v], both);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + r * UNIT + 16 * v, acc[r][v]);
}

// As many rows as the registers hold sums for.
template <int UNIT>
constexpr int64_t kAtOnce = UNIT == 32 ? 8 : 6;

#ifdef __AMX_BF16__

constexpr int64_t kFewestTiled = 3;  // fewer rows are read as fast without tiles
constexpr int64_t kTiledUnit = 32;   // what oneDNN's blocks have on processors with tiles

// Whether the system lets this process use the processor's tiles.
bool may_tile() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// As `block`, by tiles: 16 pairs of inputs by 16 outputs at a time, which lie in the weights as a tile wants them.
void tiled_block(const uint16_t* w, const uint16_t* x, int64_t x_row, int64_t rows, int64_t depth, float* sums) {
  Tiles tiles;  // 0 and 1: sums; 2: x; 3 and 4: weights
  for (int t = 0; t < 5; ++t) {
    tiles.row_bytes[t] = 64;
    tiles.rows[t] = static_cast<uint8_t>(t < 3 ? rows : 16);
  }
  _tile_loadconfig(&tiles);
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < depth; k += 32, w += 32 * kTiledUnit) {
    for (int64_t i = 0; i < 32 * kTiledUnit; i += 32)
      _mm_prefetch(reinterpret_cast<const char*>(w + kTiledAhead + i), _MM_HINT_T0);
    _tile_loadd(2, x + k, x_row * 2);
    _tile_loadd(3, w, 4 * kTiledUnit);
    _tile_loadd(4, w + kTiledUnit, 4 * kTiledUnit);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
  }
  _tile_stored(0, sums, 4 * kTiledUnit);
  _tile_stored(1, sums + kTiledUnit / 2, 4 * kTiledUnit);
  _tile_release();
}

#else

bool may_tile() { return false; }

#endif

template <int UNIT>
void rows_block(const uint16_t* w, const uint16_t* x, int64_t x_row, int64_t rows, int64_t depth, float* sums,
                bool begins) {
  switch (rows) {
    case 1: return block<UNIT, 1>(w, x, x_row, depth, sums, begins);
    case 2: return block<UNIT, 2>(w, x, x_row, depth, sums, begins);
    case 3: return block<UNIT, 3>(w, x, x_row, depth, sums, begins);
    case 4: return block<UNIT, 4>(w, x, x_row, depth, sums, begins);
    case 5: return block<UNIT, 5>(w, x, x_row, depth, sums, begins);
    case 6: return block<UNIT, 6>(w, x, x_row, depth, sums, begins);
  }
  if constexpr (kAtOnce<UNIT> > 6) {
    if (rows == 7) return block<UNIT, 7>(w, x, x_row, depth, sums, begins);
    return block<UNIT, 8>(w, x, x_row, depth, sums, begins);
  }
}

template <int UNIT>
void any_block(const uint16_t* w, const uint16_t* x, int64_t x_row, int64_t rows, int64_t depth, float* sums) {
#ifdef __AMX_BF16__
  if (UNIT == kTiledUnit && rows >= kFewestTiled && may_tile()) return tiled_block(w, x, x_row, rows, depth, sums);
#endif
  if (rows <= kAtOnce<UNIT>) return rows_block<UNIT>(w, x, x_row, rows, depth, sums, true);
  // More rows are further passes over some inputs' weights, which are in the nearest cache by then.
  for (int64_t k = 0; k == 0 || k < depth; k += kPassed) {
    const int64_t inputs = std::min(kPassed, depth - k);
    int64_t done = 0;
    for (int64_t passes = (rows + kAtOnce<UNIT> - 1) / kAtOnce<UNIT>; passes > 0; --passes) {
      const int64_t now = (rows - done + passes - 1) / passes;
      rows_block<UNIT>(w + k * UNIT, x + done * x_row + k, x_row, now, inputs, sums + done * UNIT, k == 0);
      done += now;
    }
  }
}

// `count` is a multiple of 16.
inline void narrow(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

// An exponential without end would make no number of the quotient: -ffast-math divides by way of a reciprocal.
inline void gate(float* g, const float* u, int64_t count) {
  for (int64_t i = 0; i < count; ++i) g[i] = g[i] / (1.0f + std::exp(std::min(-g[i], 80.0f))) * u[i];
}

// `inner` values of a gated MLP that has `whole` of them; the addresses are those of the first one's weights.
struct Expert {
  int64_t first, rows;  // of the call's rows
  const uint16_t *gate, *up, *down;
  int64_t inner, whole;
};

template <int UNIT>
void linear(uint16_t* out, const uint16_t* x, int64_t x_row, const uint16_t* w, const uint16_t* bias,
            const uint16_t* residual, int64_t rows, int64_t outputs, int64_t inputs, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t o = 0; o < outputs; o += UNIT) {
    float sums[kMost * UNIT];
    const int64_t count = std::min<int64_t>(UNIT, outputs - o);
    any_block<UNIT>(w + o * inputs, x, x_row, rows, inputs, sums);
    for (int64_t r = 0; r < rows; ++r) {
      float* sum = sums + r * UNIT;
      if (bias)
        for (int64_t i = 0; i < count; ++i) sum[i] += widen(bias[o + i]);
      if (residual)
        for (int64_t i = 0; i < count; ++i) sum[i] += widen(residual[r * outputs + o + i]);
      narrow(out + r * outputs + o, sum, count);
    }
  }
}

template <int UNIT>
void gated(uint16_t* out, const uint16_t* x, int64_t x_row, const uint16_t* gate_w, const uint16_t* up_w, int64_t rows,
           int64_t outputs, int64_t inputs, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t o = 0; o < outputs; o += UNIT) {
    float gates[kMost * UNIT], ups[kMost * UNIT];
    const int64_t count = std::min<int64_t>(UNIT, outputs - o);
    any_block<UNIT>(gate_w + o * inputs, x, x_row, rows, inputs, gates);
    any_block<UNIT>(up_w + o * inputs, x, x_row, rows, inputs, ups);
    for (int64_t r = 0; r < rows; ++r) {
      gate(gates + r * UNIT, ups + r * UNIT, count);
      narrow(out + r * outputs + o, gates + r * UNIT, count);
    }
  }
}

template <int UNIT>
void experts(uint16_t* out, const uint16_t* x, uint16_t* inner_rows, const Expert* all, int64_t count, int64_t hidden,
             int64_t most, int64_t threads) {
  const int64_t inner_blocks = (most + UNIT - 1) / UNIT, blocks = (hidden + UNIT - 1) / UNIT;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < count * inner_blocks; ++task) {
      const Expert& expert = all[task / inner_blocks];
      const int64_t o = task % inner_blocks * UNIT;
      if (o >= expert.inner) continue;
      float gates[kMost * UNIT], ups[kMost * UNIT];
      const int64_t width = std::min<int64_t>(UNIT, expert.inner - o);
      any_block<UNIT>(expert.gate + o * hidden, x + expert.first * hidden, hidden, expert.rows, hidden, gates);
      any_block<UNIT>(expert.up + o * hidden, x + expert.first * hidden, hidden, expert.rows, hidden, ups);
      for (int64_t r = 0; r < expert.rows; ++r) {
        gate(gates + r * UNIT, ups + r * UNIT, width);
        narrow(inner_rows + (expert.first + r) * most + o, gates + r * UNIT, width);
      }
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < count * blocks; ++task) {
      const Expert& expert = all[task / blocks];
      const int64_t o = task % blocks * UNIT, width = std::min<int64_t>(UNIT, hidden - o);
      float sums[kMost * UNIT];
      any_block<UNIT>(expert.down + o * expert.whole, inner_rows + expert.first * most, most, expert.rows, expert.inner,
                      sums);
      for (int64_t r = 0; r < expert.rows; ++r) narrow(out + (expert.first + r) * hidden + o, sums + r * UNIT, width);
    }
  }
}

}  // namespace

extern "C" {

int64_t shoal_most_few_rows() { return may_tile() ? kMost : 8; }

// Where a part of a layer's weights is read for several ranks' rows, that pays for as many.
int64_t shoal_most_part_rows() { return kMost; }

// out[r] = x[r] @ w.T + bias + residual[r], for at most kMost rows of x, `x_row` apart. `unit` is a block's outputs, 32 or
// 64; `outputs` and `inputs` are multiples of 32. `bias` and `residual` may be null.
void shoal_linear(uint16_t* out, const uint16_t* x, int64_t x_row, const uint16_t* w, const uint16_t* bias,
                  const uint16_t* residual, int64_t rows, int64_t outputs, int64_t inputs, int64_t unit,
                  int64_t threads) {
  if (rows < 1) return;
  (unit == 64 ? linear<64> : linear<32>)(out, x, x_row, w, bias, residual, rows, outputs, inputs, threads);
}

// out[r] = silu(x[r] @ gate.T) * (x[r] @ up.T), otherwise as above.
void shoal_gated(uint16_t* out, const uint16_t* x, int64_t x_row, const uint16_t* gate_w, const uint16_t* up_w,
                 int64_t rows, int64_t outputs, int64_t inputs, int64_t unit, int64_t threads) {
  if (rows < 1) return;
  (unit == 64 ? gated<64> : gated<32>)(out, x, x_row, gate_w, up_w, rows, outputs, inputs, threads);
}

// Gated MLPs of several experts, each with its own rows of x [rows, hidden]: out = down(silu(gate(x)) * up(x)), or what
// some of the inner values give of it.
// `experts` [count, 7] are `Expert`s of at most kMost rows; `inner_rows` [rows, most] is scratch, for at most `most` inner
// values of each.
void shoal_experts(uint16_t* out, const uint16_t* x, uint16_t* inner_rows, const int64_t* all, int64_t count,
                   int64_t hidden, int64_t most, int64_t unit, int64_t threads) {
  (unit == 64 ? experts<64> : experts<32>)(out, x, inner_rows, reinterpret_cast<const Expert*>(all), count, hidden, most,
                                           threads);
}

}  // extern "C"

#else  // a processor without bf16 products: oneDNN's serve

extern "C" {
int64_t shoal_most_few_rows() { return 0; }
int64_t shoal_most_part_rows() { return 0; }
void shoal_linear() {}
void shoal_gated() {}
void shoal_experts() {}
}

#endif
