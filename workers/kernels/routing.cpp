// The way of a step's rows to their experts: choice, order, copies and sums, each one call where torch takes many.
//
// Plain C functions, as in native.cpp. Indexes are int64, rows are copied as bytes. No function's result for a row
// depends on the other rows or on `threads`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "bfloat.h"

namespace {

constexpr int64_t kManyRows = 256;  // from here on several threads are worth their start

// The place of the largest of `values` that `open` still has; of equal ones the first. Some open place, whatever the
// values are.
int64_t best(const float* values, const uint8_t* open, int64_t count) {
  int64_t found = -1;
  for (int64_t i = 0; i < count; ++i)
    if (open[i] && (found < 0 || values[i] > values[found])) found = i;
  return found;
}

struct Rule {
  int64_t experts, groups, groups_kept, top_k, sigmoid, normalize;
  float scale;
};

void choose(const Rule& rule, const float* logits, const float* bias, int64_t* ids, float* weights, float* scratch) {
  const int64_t experts = rule.experts, size = experts / rule.groups;
  float *scores = scratch, *ranked = scratch + experts, *groups = scratch + 2 * experts;
  if (rule.sigmoid) {
    for (int64_t e = 0; e < experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  } else {
    const float peak = *std::max_element(logits, logits + experts);
    float total = 0;
    for (int64_t e = 0; e < experts; ++e) total += scores[e] = std::exp(logits[e] - peak);
    for (int64_t e = 0; e < experts; ++e) scores[e] /= total;
  }
  for (int64_t e = 0; e < experts; ++e) ranked[e] = bias ? scores[e] + bias[e] : scores[e];

  std::vector<uint8_t> open(experts, rule.groups_kept == rule.groups);
  if (rule.groups_kept < rule.groups) {
    for (int64_t g = 0; g < rule.groups; ++g) {
      const float* group = ranked + g * size;
      float first = group[0], second = std::numeric_limits<float>::lowest();
      for (int64_t i = 1; i < size; ++i) {
        second = std::max(second, std::min(first, group[i]));
        first = std::max(first, group[i]);
      }
      groups[g] = rule.sigmoid ? first + second : first;
    }
    std::vector<uint8_t> left(rule.groups, 1);
    for (int64_t k = 0; k < rule.groups_kept; ++k) {
      const int64_t g = best(groups, left.data(), rule.groups);
      left[g] = 0;
      std::fill_n(open.begin() + g * size, size, 1);
    }
  }
  for (int64_t k = 0; k < rule.top_k; ++k) {
    ids[k] = best(ranked, open.data(), experts);
    open[ids[k]] = 0;
  }
  std::sort(ids, ids + rule.top_k);
  float total = 0;
  for (int64_t k = 0; k < rule.top_k; ++k) total += weights[k] = scores[ids[k]];
  const bool normalize = rule.normalize && rule.top_k > 1;
  for (int64_t k = 0; k < rule.top_k; ++k) weights[k] = (normalize ? weights[k] / (total + 1e-20f) : weights[k]) * rule.scale;
}

}  // namespace

extern "C" {

// Which experts each row of logits [rows, experts] goes to, ascending, and with what weight: ids and weights
// [rows, top_k]. `bias` [experts], which only chooses, may be null.
void shoal_choose(int64_t* ids, float* weights, const float* logits, const float* bias, int64_t rows, int64_t experts,
                  int64_t groups, int64_t groups_kept, int64_t top_k, int64_t sigmoid, int64_t normalize, float scale,
                  int64_t threads) {
  const Rule rule{experts, groups, groups_kept, top_k, sigmoid, normalize, scale};
#pragma omp parallel num_threads(threads) if (threads > 1 && rows >= kManyRows)
  {
    std::vector<float> scratch(2 * experts + groups);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; ++t)
      choose(rule, logits + t * experts, bias, ids + t * top_k, weights + t * top_k, scratch.data());
  }
}

// The stable order [count] that sorts `slots` [count], and how many there are of each slot.
void shoal_group(int64_t* order, int64_t* counts, const int64_t* slots, int64_t count, int64_t num_slots) {
  std::fill_n(counts, num_slots, 0);
  for (int64_t i = 0; i < count; ++i) ++counts[slots[i]];
  std::vector<int64_t> next(num_slots);
  for (int64_t s = 0, sum = 0; s < num_slots; sum += counts[s++]) next[s] = sum;
  for (int64_t i = 0; i < count; ++i) order[next[slots[i]]++] = i;
}

// The order that puts rows sorted by (rank, slot), `arrived` [ranks, slots] of each, by (slot, rank); and the number of
// each slot's.
void shoal_merge(int64_t* order, int64_t* counts, const int64_t* arrived, int64_t ranks, int64_t slots) {
  std::vector<int64_t> first(ranks * slots);
  for (int64_t i = 0, sum = 0; i < ranks * slots; sum += arrived[i++]) first[i] = sum;
  for (int64_t s = 0; s < slots; ++s) {
    counts[s] = 0;
    for (int64_t r = 0; r < ranks; ++r) {
      const int64_t part = arrived[r * slots + s];
      for (int64_t i = 0; i < part; ++i) *order++ = first[r * slots + s] + i;
      counts[s] += part;
    }
  }
}

// Each token's row of x [tokens, width bytes], `x_row` apart, once for each of its choices, sorted by where they go, and
// in the order of tokens there. Choices are `places` [tokens, top_k] of `num_places`, and with `slots` one more each:
// the last of every `slots` places. order [rows]: the flat (token, choice) of each row; counts [num_places].
void shoal_spread(uint8_t* out, int64_t* order, int64_t* counts, const uint8_t* x, int64_t x_row, const int64_t* places,
                  int64_t tokens, int64_t top_k, int64_t num_places, int64_t slots, int64_t width) {
  const int64_t more = slots ? num_places / slots : 0, choices = top_k + more;
  const auto place = [&](int64_t t, int64_t k) {
    return k < top_k ? places[t * top_k + k] : (k - top_k + 1) * slots - 1;
  };
  std::fill_n(counts, num_places, 0);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < choices; ++k) ++counts[place(t, k)];
  std::vector<int64_t> next(num_places);
  for (int64_t p = 0, sum = 0; p < num_places; sum += counts[p++]) next[p] = sum;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < choices; ++k) {
      const int64_t row = next[place(t, k)]++;
      order[row] = t * choices + k;
      std::memcpy(out + row * width, x + t * x_row, width);
    }
}

// What rank `index` makes of `told` [ranks, ranks, slots], how many rows each rank sends to each for each slot: how many
// come here for each slot [slots], how many it sends to and gets from each rank [ranks] each, and how many of each
// rank's slots but the last any rank sends something to [ranks].
void shoal_survey(int64_t* per_slot, int64_t* sent, int64_t* received, int64_t* chosen, const int64_t* told, int64_t index,
                  int64_t ranks, int64_t slots) {
  const auto at = [&](int64_t from, int64_t to) { return told + (from * ranks + to) * slots; };
  std::fill_n(per_slot, slots, 0);
  for (int64_t r = 0; r < ranks; ++r) {
    sent[r] = received[r] = chosen[r] = 0;
    for (int64_t s = 0; s < slots; ++s) {
      sent[r] += at(index, r)[s];
      received[r] += at(r, index)[s];
      per_slot[s] += at(r, index)[s];
      int64_t any = 0;
      for (int64_t from = 0; from < ranks && s + 1 < slots; ++from) any |= at(from, r)[s];
      chosen[r] += any != 0;
    }
  }
}

// out[r] = x[order[r] / shared], rows of `width` bytes, those of x `x_row` bytes apart.
void shoal_take(uint8_t* out, const uint8_t* x, int64_t x_row, const int64_t* order, int64_t shared, int64_t rows,
                int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= kManyRows) schedule(static)
  for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * width, x + order[r] / shared * x_row, width);
}

// out[places[r]] = y[r], rows of `width` bytes.
void shoal_put(uint8_t* out, const uint8_t* y, const int64_t* places, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= kManyRows) schedule(static)
  for (int64_t r = 0; r < rows; ++r) std::memcpy(out + places[r] * width, y + r * width, width);
}

// out[t] = sum over k of weights[t, k] * y[row of (t, k)], in fp32 from left to right. order[r] is the flat (t, k) of
// row r; a choice without a row counts as zeros. The `plain` choices behind the others have a weight of one.
void shoal_weighted_sum(uint16_t* out, const uint16_t* y, const int64_t* order, const float* weights, int64_t rows,
                        int64_t tokens, int64_t top_k, int64_t plain, int64_t width, int64_t threads) {
  const int64_t choices = top_k + plain;
  std::vector<int64_t> row_of(tokens * choices, -1);
  for (int64_t r = 0; r < rows; ++r) row_of[order[r]] = r;
#pragma omp parallel num_threads(threads) if (threads > 1 && tokens * choices >= kManyRows)
  {
    std::vector<float> sums(width);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t k = 0; k < choices; ++k) {
        const int64_t row = row_of[t * choices + k];
        if (row < 0) continue;
        const uint16_t* from = y + row * width;
        const float weight = k < top_k ? weights[t * top_k + k] : 1.0f;
        for (int64_t d = 0; d < width; ++d) sums[d] += weight * widen(from[d]);
      }
      for (int64_t d = 0; d < width; ++d) out[t * width + d] = narrow(sums[d]);
    }
  }
}

}  // extern "C"
