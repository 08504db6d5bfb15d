// Eight floats at a time, in the vector extensions of GCC and Clang: AVX2 code where the target has
// it, two SSE or NEON registers elsewhere, and the same result per lane everywhere.
// The subtle thing: comparisons are written so that a NaN operand survives (x < lo ? lo : x keeps a
// NaN x), because a NaN logit has to reach the commit, which refuses it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

// These helpers are always inlined, so the calling convention of vectors is of no concern.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace elastic_cache {

struct BFloat16 {
  uint16_t bits;
};

inline constexpr int64_t kLanes = 8;
using Float8 = float __attribute__((vector_size(32)));
using Int8 = int32_t __attribute__((vector_size(32)));
using Uint8 = uint32_t __attribute__((vector_size(32)));
using Ushort8 = uint16_t __attribute__((vector_size(16)));
using Float4 = float __attribute__((vector_size(16)));
using Double4 = double __attribute__((vector_size(32)));
using Long4 = int64_t __attribute__((vector_size(32)));

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Float8 splat(float x) { return Float8{x, x, x, x, x, x, x, x}; }
inline Double4 splat4(double x) { return Double4{x, x, x, x}; }
// b unless a is greater or smaller: a NaN in b is kept. Written out for AVX, because GCC turns the
// comparison with a constant into two instructions where one does.
inline Float8 max(Float8 a, Float8 b) {
#ifdef __AVX__
  return Float8(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}
inline Float8 min(Float8 a, Float8 b) {
#ifdef __AVX__
  return Float8(_mm256_min_ps(__m256(a), __m256(b)));
#else
  return a < b ? a : b;
#endif
}

// a * b + c, fused where the target can. Not left to the compiler on x86: tuned for Zen, GCC fuses
// in some instantiations of a loop and not in others, and a row's result would depend on its batch.
inline Float8 multiply_add(Float8 a, Float8 b, Float8 c) {
#ifdef __FMA__
  return Float8(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}
inline Float8 multiply_add(Float8 a, Float8 b, float c) { return multiply_add(a, b, splat(c)); }

// Stops GCC from folding one load into several multiply-adds: two loads a cycle would then be the
// limit, not two multiply-adds (measured: 4.3 instead of 5.5 fused operations a nanosecond).
inline void keep_in_register([[maybe_unused]] Float8& x) {
#ifdef __FMA__
  asm("" : "+v"(x));  // with AVX-512, any of 32 registers
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
// Round to nearest even. A NaN is made quiet first: rounding its payload could give an infinity.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline Float8 load8(const float* p) {
  Float8 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline Float8 load8(const BFloat16* p) {
  Ushort8 x;
  std::memcpy(&x, p, sizeof(x));
  return bit_cast<Float8>(__builtin_convertvector(x, Uint8) << 16);
}
inline void store8(float* p, Float8 x) { std::memcpy(p, &x, sizeof(x)); }
inline void store8(BFloat16* p, Float8 x) {
  const Uint8 bits = bit_cast<Uint8>(x);
  const Uint8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Uint8 quiet = (bits >> 16) | 0x40;
  const Ushort8 out = __builtin_convertvector(x == x ? rounded : quiet, Ushort8);
  std::memcpy(p, &out, sizeof(out));
}

// What a value becomes when it is stored as T and read back.
template <class T>
inline float round_to(float x) {
  return to_float(from_float<T>(x));
}
template <class T>
inline Float8 round_to(Float8 x) {
  T stored[kLanes];
  store8(stored, x);
  return load8(stored);
}

// Written out for AVX, because a loop over std::sqrt stays scalar unless errno is given up.
inline Float8 sqrt(Float8 x) {
#ifdef __AVX__
  return Float8(_mm256_sqrt_ps(__m256(x)));
#else
  for (int64_t lane = 0; lane < kLanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

inline float sum(Float8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
inline double sum(Double4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
inline constexpr float kRound = 12582912.0f;

// 2^x within 1 ulp, flushed to 0 below 2^-126.5 and infinite from 2^127.5 on. The polynomial is the
// degree-6 minimax fit of the relative error (2.6e-9) on [-1/2, 1/2], with value 1 at 0.
inline Float8 exp2_flush(Float8 x) {
  x = min(splat(128.0f), max(splat(-127.0f), x));
  const Float8 shifted = x + kRound;
  const Float8 f = x - (shifted - kRound);
  Float8 p = splat(1.5594677525188028e-4f);
  p = multiply_add(p, f, 1.3406643903896096e-3f);
  p = multiply_add(p, f, 9.617692974966443e-3f);
  p = multiply_add(p, f, 5.550310550999477e-2f);
  p = multiply_add(p, f, 2.4022652782875664e-1f);
  p = multiply_add(p, f, 6.931472149680374e-1f);
  p = multiply_add(p, f, 1.0f);
  return p * bit_cast<Float8>((bit_cast<Int8>(shifted) << 23) + (127 << 23));
}

// e^x within 2 ulp over the whole range, subnormal results and overflow to infinity included: the
// power of two is applied in two halves, because neither 2^128 nor 2^-149 is a normal number.
inline Float8 exp(Float8 x) {
  x = min(splat(89.0f), max(splat(-104.0f), x));
  const Float8 shifted = multiply_add(x, splat(1.44269504f), kRound);
  const Float8 n = shifted - kRound;
  // ln 2 in two parts; the first has few enough bits for n * part to be exact.
  Float8 r = multiply_add(n, splat(-0.693359375f), x);
  r = multiply_add(n, splat(2.12194440e-4f), r);
  Float8 p = splat(1.406126809719949e-3f);
  p = multiply_add(p, r, 8.379018457008183e-3f);
  p = multiply_add(p, r, 4.1664776691812566e-2f);
  p = multiply_add(p, r, 1.6666365344915257e-1f);
  p = multiply_add(p, r, 5.000000434583224e-1f);
  p = multiply_add(p, r, 1.0000000496642114f);
  p = multiply_add(p, r, 1.0f);
  const Int8 whole = __builtin_convertvector(n == n ? n : splat(0.0f), Int8);
  const Int8 half = whole >> 1;
  return p * bit_cast<Float8>((half + 127) << 23) * bit_cast<Float8>((whole - half + 127) << 23);
}

// e^x in double for x <= 0, flushed to 0 below 2^-1022.5. Taylor to degree 13: 4e-18 at ln 2 / 2.
inline Double4 exp_nonpositive(Double4 x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -709.0 ? splat4(-709.2) : x;
  const Double4 shifted = x * 1.4426950408889634 + kShift;
  const Double4 n = shifted - kShift;
  const Double4 r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
  Double4 p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  constexpr double kInverseFactorial[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                          1.0 / 40320,    1.0 / 5040,    1.0 / 720,
                                          1.0 / 120,      1.0 / 24,      1.0 / 6,
                                          0.5,            1.0,           1.0};
  for (const double c : kInverseFactorial) p = p * r + c;
  return p * bit_cast<Double4>((bit_cast<Long4>(shifted) + 1023) << 52);
}

}  // namespace elastic_cache
