// Matrix products of a few rows with weights in oneDNN's blocks, at the speed at which memory gives the weights.
//
// The layout is that of `_reorder_linear_weight` for bf16: blocks of 32 outputs, one after the other; in a block, for
// each pair of inputs, the pair's weights of the 32 outputs. So a block is read from front to back, and nothing is held
// twice. Sums are in fp32, in the order of the inputs whatever the rows and `threads`.

#include <cstdint>

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <cmath>
#include <cstring>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "bfloat.h"

namespace {

constexpr int64_t kBlock = 32;
constexpr int64_t kMost = 16;  // rows of a call
constexpr int64_t kAhead = 1024;  // elements to prefetch ahead: 2 KiB, further than the processor does by itself
constexpr int64_t kTiledAhead = 2048;

// The sums of one block's 32 outputs for each row.
template <int ROWS>
void block(const uint16_t* w, const uint16_t* x, int64_t x_row, int64_t depth, float* sums) {
  __m512 low[ROWS], high[ROWS];
  for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2, w += 2 * kBlock) {
    const __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + kBlock);
    _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + kBlock), _MM_HINT_T0);
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_row + k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      low[r] = _mm512_dpbf16_ps(low[r], (__m512bh)first, both);
      high[r] = _mm512_dpbf16_ps(high[r], (__m512bh)second, both);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    _mm512_storeu_ps(sums + r * kBlock, low[r]);
    _mm512_storeu_ps(sums + r * kBlock + kBlock / 2, high[r]);
  }
}

#ifdef __AMX_BF16__

constexpr int64_t kFewestTiled = 3;  // fewer rows are read as fast without tiles

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
  for (int64_t k = 0; k < depth; k += 32, w += 32 * kBlock) {
    for (int64_t i = 0; i < 32 * kBlock; i += 32)
      _mm_prefetch(reinterpret_cast<const char*>(w + kTiledAhead + i), _MM_HINT_T0);
    _tile_loadd(2, x + k, x_row * 2);
    _tile_loadd(3, w, 4 * kBlock);
    _tile_loadd(4, w + kBlock, 4 * kBlock);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
  }
  _tile_stored(0, sums, 4 * kBlock);
  _tile_stored(1, sums + kBlock / 2, 4 * kBlock);
  _tile_release();
}

#else

bool may_tile() { return false; }

#endif

void any_block(const uint16_t* w, const uint16_t* x, int64_t x_row, int64_t rows, int64_t depth, float* sums) {
#ifdef __AMX_BF16__
  if (rows >= kFewestTiled && may_tile()) return tiled_block(w, x, x_row, rows, depth, sums);
#endif
  switch (rows) {
    case 1: return block<1>(w, x, x_row, depth, sums);
    case 2: return block<2>(w, x, x_row, depth, sums);
    case 3: return block<3>(w, x, x_row, depth, sums);
    case 4: return block<4>(w, x, x_row, depth, sums);
    case 5: return block<5>(w, x, x_row, depth, sums);
    case 6: return block<6>(w, x, x_row, depth, sums);
    case 7: return block<7>(w, x, x_row, depth, sums);
    default: return block<8>(w, x, x_row, depth, sums);
  }
}

inline void narrow(uint16_t* to, const float* from) {
  for (int64_t i = 0; i < kBlock; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

inline void gate(float* g, const float* u) {
  for (int64_t i = 0; i < kBlock; ++i) g[i] = g[i] / (1.0f + std::exp(-g[i])) * u[i];
}

struct Expert {
  int64_t first, rows;  // of the call's rows
  const uint16_t *gate, *up, *down;
};

}  // namespace

extern "C" {

int64_t shoal_most_few_rows() { return may_tile() ? kMost : 8; }

// out[r] = x[r] @ w.T + bias + residual[r], for at most so many rows of x, `x_row` apart. `outputs` is a multiple of 32,
// `inputs` an even number that needed no padding. `bias` and `residual` may be null.
void shoal_linear(uint16_t* out, const uint16_t* x, int64_t x_row, const uint16_t* w, const uint16_t* bias,
                  const uint16_t* residual, int64_t rows, int64_t outputs, int64_t inputs, int64_t threads) {
  if (rows < 1) return;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t o = 0; o < outputs; o += kBlock) {
    float sums[kMost * kBlock];
    any_block(w + o * inputs, x, x_row, rows, inputs, sums);
    for (int64_t r = 0; r < rows; ++r) {
      float* sum = sums + r * kBlock;
      if (bias)
        for (int64_t i = 0; i < kBlock; ++i) sum[i] += widen(bias[o + i]);
      if (residual)
        for (int64_t i = 0; i < kBlock; ++i) sum[i] += widen(residual[r * outputs + o + i]);
      narrow(out + r * outputs + o, sum);
    }
  }
}

// out[r] = silu(x[r] @ gate.T) * (x[r] @ up.T), otherwise as above.
void shoal_gated(uint16_t* out, const uint16_t* x, int64_t x_row, const uint16_t* gate_w, const uint16_t* up_w,
                 int64_t rows, int64_t outputs, int64_t inputs, int64_t threads) {
  if (rows < 1) return;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t o = 0; o < outputs; o += kBlock) {
    float gates[kMost * kBlock], ups[kMost * kBlock];
    any_block(gate_w + o * inputs, x, x_row, rows, inputs, gates);
    any_block(up_w + o * inputs, x, x_row, rows, inputs, ups);
    for (int64_t r = 0; r < rows; ++r) {
      gate(gates + r * kBlock, ups + r * kBlock);
      narrow(out + r * outputs + o, gates + r * kBlock);
    }
  }
}

// Gated MLPs of several experts, each with its own rows of x [rows, hidden]: out = down(silu(gate(x)) * up(x)).
// `experts` [count, 5]: first row, rows (at most as many), addresses of gate, up and down; `inner_rows` [rows, inner] is scratch.
void shoal_experts(uint16_t* out, const uint16_t* x, uint16_t* inner_rows, const int64_t* experts, int64_t count,
                   int64_t hidden, int64_t inner, int64_t threads) {
  const Expert* all = reinterpret_cast<const Expert*>(experts);
  const int64_t inner_blocks = inner / kBlock, blocks = hidden / kBlock;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < count * inner_blocks; ++task) {
      const Expert& expert = all[task / inner_blocks];
      const int64_t o = task % inner_blocks * kBlock;
      float gates[kMost * kBlock], ups[kMost * kBlock];
      any_block(expert.gate + o * hidden, x + expert.first * hidden, hidden, expert.rows, hidden, gates);
      any_block(expert.up + o * hidden, x + expert.first * hidden, hidden, expert.rows, hidden, ups);
      for (int64_t r = 0; r < expert.rows; ++r) {
        gate(gates + r * kBlock, ups + r * kBlock);
        narrow(inner_rows + (expert.first + r) * inner + o, gates + r * kBlock);
      }
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < count * blocks; ++task) {
      const Expert& expert = all[task / blocks];
      const int64_t o = task % blocks * kBlock;
      float sums[kMost * kBlock];
      any_block(expert.down + o * inner, inner_rows + expert.first * inner, inner, expert.rows, inner, sums);
      for (int64_t r = 0; r < expert.rows; ++r) narrow(out + (expert.first + r) * hidden + o, sums + r * kBlock);
    }
  }
}

}  // extern "C"

#else  // a processor without bf16 products: oneDNN's serve

extern "C" {
int64_t shoal_most_few_rows() { return 0; }
void shoal_linear() {}
void shoal_gated() {}
void shoal_experts() {}
}

#endif
