// bf16 as the kernels hold it, 16 bits, to float and back.

#pragma once

#include <cstdint>
#include <cstring>

inline float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline float widen(float x) { return x; }

// To nearest, ties to even. Only for finite values: -ffast-math takes them for granted.
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
