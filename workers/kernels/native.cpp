// Small operations of a decode step whose torch versions cost more in calls, copies and barriers than in arithmetic.
//
// Plain C functions over bf16 (as uint16_t) with sums in fp32; no torch headers, so that it compiles in a second and
// fits any torch. OpenMP's functions are left for the loader to find in the library that torch has brought, so that
// both use one team of threads. No function's result depends on `threads`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "bfloat.h"

namespace {

constexpr int64_t kChunk = 256;  // cached tokens that one task attends to; fixed, so that sums do not depend on threads

constexpr int64_t kBlock = 64;    // logits whose maximum is looked at first

// Orders bf16 values as integers; a NaN has its place too, so that sorting stays sound.
inline uint16_t rank(uint16_t x) { return static_cast<uint16_t>(x & 0x8000 ? ~x : x | 0x8000); }

struct Paged {
  const uint16_t* q;
  int64_t q_row;
  const uint16_t* cache;
  int64_t cache_row;
  const int64_t* block_ids;
  int64_t blocks_per_sequence;
  const int64_t* lengths;
  int64_t block_size;
  int64_t kv_heads;
  int64_t group;
  int64_t width;
  float scale;
};

struct Task {
  int64_t sequence, kv_head, start, stop;
};

// Calls `use(t, row)` for each of the task's tokens, counted from 0, with its row of the cache from `offset` on.
template <typename Use>
inline void each_row(const Paged& p, const Task& task, int64_t offset, const Use& use) {
  const int64_t* blocks = p.block_ids + task.sequence * p.blocks_per_sequence;
  const int64_t count = task.stop - task.start;
  for (int64_t t = 0; t < count;) {
    const int64_t token = task.start + t, block = token / p.block_size, place = token - block * p.block_size;
    const int64_t last = std::min(count, t + p.block_size - place);
    const uint16_t* at = p.cache + (blocks[block] * p.block_size + place) * p.cache_row + offset;
    for (; t < last; ++t, at += p.cache_row) use(t, at);
  }
}

#ifdef __AVX512BF16__

constexpr int64_t kLanes = 32;  // bf16 values in a register

inline __m512bh load(const uint16_t* x) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)); }

inline __m512 load_wide(const uint16_t* x) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline bool fits(int64_t width) { return width % 64 == 0; }

// scores[g][t] = q[g] . key[t] for QUERIES queries.
template <int QUERIES>
void score(const Paged& p, const Task& task, const uint16_t* q, float* scores) {
  each_row(p, task, task.kv_head * p.width, [&](int64_t t, const uint16_t* key) {
    if (!task.kv_head)
      for (int64_t d = 0; d < p.cache_row; d += 32) __builtin_prefetch(key + 8 * p.cache_row + d);
    __m512 sums[QUERIES];
    for (int g = 0; g < QUERIES; ++g) sums[g] = _mm512_setzero_ps();
    for (int64_t d = 0; d < p.width; d += kLanes) {
      const __m512bh part = load(key + d);
      for (int g = 0; g < QUERIES; ++g) sums[g] = _mm512_dpbf16_ps(sums[g], part, load(q + g * p.width + d));
    }
    for (int g = 0; g < QUERIES; ++g) scores[g * kChunk + t] = _mm512_reduce_add_ps(sums[g]) * p.scale;
  });
}

// values[g] = sum over t of weights[g][t] * value[t], 64 elements of the width at a time.
template <int QUERIES>
void weigh(const Paged& p, const Task& task, const float* weights, float* values) {
  for (int64_t d = 0; d < p.width; d += 64) {
    __m512 sums[QUERIES][4];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    each_row(p, task, (p.kv_heads + task.kv_head) * p.width + d, [&](int64_t t, const uint16_t* value) {
      for (int i = 0; i < 4; ++i) {
        const __m512 part = load_wide(value + 16 * i);
        for (int g = 0; g < QUERIES; ++g)
          sums[g][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[g * kChunk + t]), part, sums[g][i]);
      }
    });
    for (int g = 0; g < QUERIES; ++g)
      for (int i = 0; i < 4; ++i) _mm512_storeu_ps(values + g * p.width + d + 16 * i, sums[g][i]);
  }
}

#else

inline bool fits(int64_t) { return true; }

template <int QUERIES>
void score(const Paged& p, const Task& task, const uint16_t* q, float* scores) {
  each_row(p, task, task.kv_head * p.width, [&](int64_t t, const uint16_t* key) {
    for (int g = 0; g < QUERIES; ++g) {
      float sum = 0;
      for (int64_t d = 0; d < p.width; ++d) sum += widen(q[g * p.width + d]) * widen(key[d]);
      scores[g * kChunk + t] = sum * p.scale;
    }
  });
}

template <int QUERIES>
void weigh(const Paged& p, const Task& task, const float* weights, float* values) {
  std::fill(values, values + QUERIES * p.width, 0.0f);
  each_row(p, task, (p.kv_heads + task.kv_head) * p.width, [&](int64_t t, const uint16_t* value) {
    for (int g = 0; g < QUERIES; ++g)
      for (int64_t d = 0; d < p.width; ++d) values[g * p.width + d] += weights[g * kChunk + t] * widen(value[d]);
  });
}

#endif

// The task's softmax for QUERIES of its queries, not yet divided: the largest score, the sum of exponentials, and the
// sum of values weighted by them.
template <int QUERIES>
void attend(const Paged& p, const Task& task, int64_t first, float* peak, float* total, float* values) {
  float scores[QUERIES * kChunk];
  const int64_t count = task.stop - task.start;
  const uint16_t* q = p.q + task.sequence * p.q_row + (task.kv_head * p.group + first) * p.width;
  score<QUERIES>(p, task, q, scores);
  for (int g = 0; g < QUERIES; ++g) {
    float* s = scores + g * kChunk;
    float highest = s[0], sum = 0;
    for (int64_t t = 1; t < count; ++t) highest = std::max(highest, s[t]);
    for (int64_t t = 0; t < count; ++t) {
      s[t] = std::exp(s[t] - highest);
      sum += s[t];
    }
    peak[first + g] = highest;
    total[first + g] = sum;
  }
  weigh<QUERIES>(p, task, scores, values + first * p.width);
}

void attend_all(const Paged& p, const Task& task, float* peak, float* total, float* values) {
  int64_t first = 0;
  for (; first + 4 <= p.group; first += 4) attend<4>(p, task, first, peak, total, values);
  switch (p.group - first) {
    case 3: return attend<3>(p, task, first, peak, total, values);
    case 2: return attend<2>(p, task, first, peak, total, values);
    case 1: return attend<1>(p, task, first, peak, total, values);
  }
}

template <typename T>
void rms_norm(uint16_t* out, const T* x, int64_t x_row, const float* weight, int64_t rows, int64_t width, float epsilon,
              int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 64)
  for (int64_t t = 0; t < rows; ++t) {
    const T* from = x + t * x_row;
    uint16_t* to = out + t * width;
    float sum = 0;
    for (int64_t d = 0; d < width; ++d) sum += widen(from[d]) * widen(from[d]);
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
    for (int64_t d = 0; d < width; ++d) to[d] = narrow(widen(from[d]) * factor * weight[d]);
  }
}

}  // namespace

extern "C" {

// Whether `shoal_attend_paged` takes heads of this width.
bool shoal_attends(int64_t width) { return fits(width); }

// One query token of each of `sequences`, against its cached keys and values.
//   q        [sequences, kv_heads * group * width], rows `q_row` apart
//   cache    [slots, cache_row]: keys of all kv heads, then values
//   lengths  [sequences]: cached tokens, at least one
//   out      [sequences, kv_heads * group * width]
void shoal_attend_paged(uint16_t* out, const uint16_t* q, int64_t q_row, const uint16_t* cache, int64_t cache_row,
                        const int64_t* block_ids, int64_t blocks_per_sequence, const int64_t* lengths,
                        int64_t block_size, int64_t sequences, int64_t kv_heads, int64_t group, int64_t width,
                        float scale, int64_t threads) {
  const Paged p{q, q_row, cache, cache_row, block_ids, blocks_per_sequence, lengths, block_size, kv_heads, group, width,
                scale};
  std::vector<Task> tasks;
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t k = 0; k < kv_heads; ++k)
      for (int64_t start = 0; start < lengths[s]; start += kChunk)
        tasks.push_back({s, k, start, std::min(start + kChunk, lengths[s])});

  const int64_t count = static_cast<int64_t>(tasks.size()), part = group * (width + 2);
  std::vector<float> parts(count * part);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    float* mine = parts.data() + i * part;
    attend_all(p, tasks[i], mine, mine + group, mine + 2 * group);
  }
  // The parts of one head follow one another.
  for (int64_t first = 0, last; first < count; first = last) {
    const Task& task = tasks[first];
    for (last = first + 1; last < count && tasks[last].start; ++last) {
    }
    for (int64_t g = 0; g < group; ++g) {
      const float* head = parts.data() + g;
      float highest = head[first * part], total = 0;
      for (int64_t i = first; i < last; ++i) highest = std::max(highest, head[i * part]);
      for (int64_t i = first; i < last; ++i) {
        // The weight of this part's values, left where its peak was.
        const float weight = std::exp(head[i * part] - highest);
        parts[i * part + g] = weight;
        total += weight * head[i * part + group];
      }
      uint16_t* to = out + ((task.sequence * kv_heads + task.kv_head) * group + g) * width;
      for (int64_t d = 0; d < width; ++d) {
        float sum = 0;
        for (int64_t i = first; i < last; ++i)
          sum += parts[i * part + g] * parts[i * part + 2 * group + g * width + d];
        to[d] = narrow(sum / total);
      }
    }
  }
}

// out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight, for rows of x `x_row` apart.
void shoal_rms_norm(uint16_t* out, const uint16_t* x, int64_t x_row, const float* weight, int64_t rows, int64_t width,
                    float epsilon, int64_t threads) {
  rms_norm(out, x, x_row, weight, rows, width, epsilon, threads);
}

// The same of x in fp32.
void shoal_rms_norm_wide(uint16_t* out, const float* x, int64_t x_row, const float* weight, int64_t rows, int64_t width,
                         float epsilon, int64_t threads) {
  rms_norm(out, x, x_row, weight, rows, width, epsilon, threads);
}

// Rotates x [rows, heads, width] in place: x * cos + roll(x, width / 2) * sin, for cos and sin [rows, width].
void shoal_rotate(uint16_t* x, int64_t x_row, int64_t x_head, const uint16_t* cos, const uint16_t* sin, int64_t rows,
                  int64_t heads, int64_t width, int64_t threads) {
  const int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 64)
  for (int64_t t = 0; t < rows; ++t) {
    const uint16_t *c = cos + t * width, *s = sin + t * width;
    for (int64_t h = 0; h < heads; ++h) {
      uint16_t* low = x + t * x_row + h * x_head;
      uint16_t* high = low + half;
      for (int64_t d = 0; d < half; ++d) {
        const float a = widen(low[d]), b = widen(high[d]);
        low[d] = narrow(a * widen(c[d]) + b * widen(s[d]));
        high[d] = narrow(b * widen(c[half + d]) + a * widen(s[half + d]));
      }
    }
  }
}

// Logits in fp32, the largest `candidates` of each row computed again from x and the head's weight.
//   out, logits  [rows, vocabulary];  x [rows, width], rows `x_row` apart;  weight [vocabulary, width]
// Of equal logits the lower ids come first.
void shoal_refine(float* out, const uint16_t* logits, const uint16_t* x, int64_t x_row, const uint16_t* weight,
                  int64_t rows, int64_t vocabulary, int64_t width, int64_t candidates, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
  for (int64_t t = 0; t < rows; ++t) {
    float* row = out + t * vocabulary;
    const uint16_t* from = logits + t * vocabulary;
    for (int64_t i = 0; i < vocabulary; ++i) row[i] = widen(from[i]);

    // As many blocks' maxima as there are candidates bound the smallest candidate from below.
    std::vector<uint16_t> peaks;
    for (int64_t start = 0; start < vocabulary; start += kBlock) {
      const int64_t stop = std::min(start + kBlock, vocabulary);
      uint16_t peak = 0;
      for (int64_t i = start; i < stop; ++i) peak = std::max(peak, rank(from[i]));
      peaks.push_back(peak);
    }
    uint16_t bound = 0;
    if (static_cast<int64_t>(peaks.size()) > candidates) {
      std::vector<uint16_t> order(peaks);
      std::nth_element(order.begin(), order.begin() + candidates - 1, order.end(), std::greater<uint16_t>());
      bound = order[candidates - 1];
    }
    std::vector<int64_t> likely;
    for (int64_t block = 0; block < static_cast<int64_t>(peaks.size()); ++block) {
      if (peaks[block] < bound) continue;
      const int64_t stop = std::min((block + 1) * kBlock, vocabulary);
      for (int64_t i = block * kBlock; i < stop; ++i)
        if (rank(from[i]) >= bound) likely.push_back(i);
    }
    if (static_cast<int64_t>(likely.size()) > candidates) {
      std::nth_element(likely.begin(), likely.begin() + candidates - 1, likely.end(), [&](int64_t a, int64_t b) {
        const uint16_t ranks[2] = {rank(from[a]), rank(from[b])};
        return ranks[0] > ranks[1] || (ranks[0] == ranks[1] && a < b);
      });
      likely.resize(candidates);
    }
    for (const int64_t id : likely) {
      float sum = 0;
      for (int64_t d = 0; d < width; ++d) sum += widen(x[t * x_row + d]) * widen(weight[id * width + d]);
      row[id] = sum;
    }
  }
}

}  // extern "C"
