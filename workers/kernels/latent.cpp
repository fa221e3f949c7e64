// The heads' own projections around latent attention, for few rows: each head's weights are read once, at the speed at
// which memory gives them. bf16 in and out, sums in fp32, in an order that depends on the sizes of a head alone: neither
// on the rows nor on `threads`. See native.cpp for how it is compiled.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "bfloat.h"

namespace {

#ifdef __AVX512BF16__
constexpr int64_t kLanes = 32;  // bf16 values in a register

inline __m512bh load(const uint16_t* x) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)); }
#endif

// out[o] = sum over i of x[i] * weight[i][o], four inputs at a time; `sums` has room for the outputs.
void from_rows(uint16_t* out, const uint16_t* x, const uint16_t* weight, int64_t inputs, int64_t outputs, float* sums) {
  std::fill(sums, sums + outputs, 0.0f);
  int64_t i = 0;
  for (; i + 4 <= inputs; i += 4) {
    const uint16_t* w = weight + i * outputs;
    const float a = widen(x[i]), b = widen(x[i + 1]), c = widen(x[i + 2]), d = widen(x[i + 3]);
    for (int64_t o = 0; o < outputs; ++o)
      sums[o] += (a * widen(w[o]) + b * widen(w[outputs + o])) +
                 (c * widen(w[2 * outputs + o]) + d * widen(w[3 * outputs + o]));
  }
  for (; i < inputs; ++i)
    for (int64_t o = 0; o < outputs; ++o) sums[o] += widen(x[i]) * widen(weight[i * outputs + o]);
  for (int64_t o = 0; o < outputs; ++o) out[o] = narrow(sums[o]);
}

// out[o] = sum over i of x[i] * weight[o][i].
void from_columns(uint16_t* out, const uint16_t* x, const uint16_t* weight, int64_t inputs, int64_t outputs) {
  for (int64_t o = 0; o < outputs; ++o) {
    const uint16_t* w = weight + o * inputs;
    int64_t i = 0;
    float sum = 0;
#ifdef __AVX512BF16__
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (; i + 2 * kLanes <= inputs; i += 2 * kLanes) {
      even = _mm512_dpbf16_ps(even, load(x + i), load(w + i));
      odd = _mm512_dpbf16_ps(odd, load(x + i + kLanes), load(w + i + kLanes));
    }
    sum = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
#endif
    for (; i < inputs; ++i) sum += widen(x[i]) * widen(w[i]);
    out[o] = narrow(sum);
  }
}

}  // namespace

extern "C" {

// Each head's own projection: x [rows, heads, inputs], `x_row` and `x_head` apart, gives out [rows, heads, outputs].
//   weight  [heads, inputs, outputs], or with `transposed` [heads, outputs, inputs]
void shoal_per_head(uint16_t* out, const uint16_t* x, int64_t x_row, int64_t x_head, const uint16_t* weight,
                    int64_t rows, int64_t heads, int64_t inputs, int64_t outputs, bool transposed, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<float> sums(outputs);
    const uint16_t* w = weight + h * inputs * outputs;
    for (int64_t t = 0; t < rows; ++t) {
      const uint16_t* from = x + t * x_row + h * x_head;
      uint16_t* to = out + (t * heads + h) * outputs;
      if (transposed)
        from_columns(to, from, w, inputs, outputs);
      else
        from_rows(to, from, w, inputs, outputs, sums.data());
    }
  }
}

}  // extern "C"
