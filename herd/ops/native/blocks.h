// Products of rounded activations with 4-bit and 8-bit blocks. `herd/ops/int4.py` has the format and the definition.
//
// A block holds 8 rows x g columns. One 32-byte vector holds, per row, 4 columns in the low nibbles and the next 4 in the high ones, so
// that four bytes of activations, broadcast, meet all 8 rows at once and no sum runs across lanes. Integers are exact; floats are added
// per row, group after group, with the same fused operations on every path. So a row's result depends on neither the tile it is
// computed in, nor the number of threads, nor the instruction set.
//
// Activations lie in tiles of 8 tokens, group by group, so that a kernel walks them with one pointer. An activation of 8 bits is one
// code, one of 16 bits two: kRadix * high + low.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define HERD_X86 1
#define HERD_AVX2 __attribute__((target("avx2,fma,f16c")))
#define HERD_VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
// HERD_AVXVNNI_AS_AVX512 tests the kernels of AVX-VNNI on a machine that has the instruction only in AVX-512's form.
#ifdef HERD_AVXVNNI_AS_AVX512
#define HERD_AVXVNNI HERD_VNNI
#elif (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HERD_AVXVNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#endif
#endif

namespace herd {

constexpr int kRows = 8;     // rows of a block
constexpr int kGroup = 32;   // columns that share a scale of the activations
constexpr int kTile = 8;     // tokens of a tile
constexpr int kRadix = 254;  // an activation of 16 bits is kRadix * high + low, both in -127 .. 127
constexpr int kLargest[] = {0, 127, kRadix * 127 + 126};  // code of the largest activation, by its number of parts

struct Blocks {  // one matrix [rows, columns]
  const uint8_t* data;
  int64_t rows, columns;
  int group, bits;
  bool has_minimum;

  int64_t codes_bytes() const { return int64_t(kRows) * group * bits / 8; }
  int64_t block_bytes() const { return codes_bytes() + 16 + (has_minimum ? 16 : 0); }
  int64_t row_bytes() const { return columns / group * block_bytes(); }  // of 8 rows
};

struct Rounded {  // activations [tokens, columns] in groups of 32
  const int8_t* codes;   // [tokens / 8, columns / 32, parts, 8, 32]: with two parts, the high ones first
  const float* scales;   // [tokens / 8, columns / 32, 8]
  const float* sums;     // [tokens / 8, columns / 32, 8], scale * total
  const int32_t* totals;  // [tokens / 8, columns / 32, 8], the sum of the activations' codes
  int parts;             // 1: 8 bits, 2: 16 bits

  Rounded tile(int64_t index, int64_t columns) const {
    const int64_t at = index * (columns / kGroup) * kTile;
    return {codes + at * parts * kGroup, scales + at, sums + at, totals + at, parts};
  }
};

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) bits = sign | 0x7f800000 | (mantissa << 13);
  else if (exponent) bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  else {
    const float value = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// To the nearest, ties to even; what is too large becomes infinite.
inline uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00 | ((bits >> 13) & 0x3ff));
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // below 2^-14: in steps of 2^-24
    float size;
    std::memcpy(&size, &bits, 4);
    return uint16_t(sign | uint16_t(std::nearbyint(size * 16777216.0f)));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return uint16_t(sign | ((bits - 0x38000000) >> 13));
}

// --- portable: the same integers and the same fused additions, one by one. x is one tile, of which `count` tokens are wanted.

inline void tile_portable(const Blocks& w, int64_t row_block, const Rounded& x, int count, float* y, int64_t stride) {
  const int64_t groups = w.columns / kGroup;
  const int per_block = w.group / kGroup;
  for (int t = 0; t < count; ++t) {
    float acc[kRows] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* block = w.data + row_block * w.row_bytes() + g / per_block * w.block_bytes();
      const uint8_t* codes = block + (g % per_block) * (kRows * kGroup * w.bits / 8);
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(block + w.codes_bytes());
      const int8_t* q = x.codes + (g * x.parts * kTile + t) * kGroup;
      const float scale_x = x.scales[g * kTile + t], sum_x = x.sums[g * kTile + t];
      for (int r = 0; r < kRows; ++r) {
        int32_t dot = w.bits == 4 && !w.has_minimum ? -8 * x.totals[g * kTile + t] : 0;
        for (int c = 0; c < kGroup; ++c) {
          const int32_t activation = x.parts == 1 ? q[c] : kRadix * q[c] + q[kTile * kGroup + c];
          if (w.bits == 4) {
            const uint8_t byte = codes[c / 8 * 32 + r * 4 + c % 4];
            dot += int32_t(c % 8 < 4 ? byte & 15 : byte >> 4) * activation;
          } else {
            dot += int32_t(int8_t(codes[c / 4 * 32 + r * 4 + c % 4])) * activation;
          }
        }
        acc[r] = std::fma(float(dot), half_to_float(halves[r]) * scale_x, acc[r]);
        if (w.has_minimum) acc[r] = std::fma(half_to_float(halves[kRows + r]), sum_x, acc[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) y[t * stride + row_block * kRows + r] = acc[r];
  }
}

#ifdef HERD_X86

inline int32_t four(const int8_t* q) {
  int32_t out;
  std::memcpy(&out, q, 4);
  return out;
}

constexpr int kAhead = 8192;  // bytes to fetch before they are needed

// --- AVX2: at most 8 sums of 15 * 127 * 2 are added in 16 bits, 30,480 < 32,768

template <int T, int Bits, bool HasMinimum, int Parts>
HERD_AVX2 void tile_avx2(const Blocks& w, int64_t row_block, const Rounded& x, int first, int count, float* y, int64_t stride) {
  const int64_t groups = w.columns / kGroup;
  const int per_block = w.group / kGroup;
  const int64_t codes_bytes = w.codes_bytes(), block_bytes = w.block_bytes();
  const uint8_t* block = w.data + row_block * w.row_bytes();
  const __m256i ones = _mm256_set1_epi16(1), radix = _mm256_set1_epi16(kRadix), low = _mm256_set1_epi8(15);
  __m256 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm256_setzero_ps();
  const int8_t* q0 = x.codes + first * kGroup;
  const float *scales = x.scales + first, *sums = x.sums + first;
  const int32_t* totals = x.totals + first;
  for (int64_t g = 0; g < groups; block += block_bytes) {
    for (int ahead = kAhead; ahead < kAhead + block_bytes; ahead += 64)
      _mm_prefetch(reinterpret_cast<const char*>(block + ahead), _MM_HINT_T1);
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + codes_bytes)));
    __m256 minimum = _mm256_setzero_ps();
    if (HasMinimum) minimum = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + codes_bytes + 16)));
    for (int part = 0; part < per_block; ++part, ++g, q0 += Parts * kTile * kGroup, scales += kTile, sums += kTile, totals += kTile) {
      const __m256i* codes = reinterpret_cast<const __m256i*>(block + part * (kRows * kGroup * Bits / 8));
      __m256i total[T];
      if (Bits == 4) {
        __m256i dots[T][Parts];
        for (int v = 0; v < 4; ++v) {
          const __m256i both = _mm256_loadu_si256(codes + v);
          const __m256i a = _mm256_and_si256(both, low), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
          for (int t = 0; t < T; ++t)
            for (int p = 0; p < Parts; ++p) {
              const int8_t* q = q0 + (p * kTile + t) * kGroup + v * 8;
              const __m256i d = _mm256_add_epi16(_mm256_maddubs_epi16(a, _mm256_set1_epi32(four(q))),
                                                 _mm256_maddubs_epi16(b, _mm256_set1_epi32(four(q + 4))));
              dots[t][p] = v ? _mm256_add_epi16(dots[t][p], d) : d;
            }
        }
        for (int t = 0; t < T; ++t) {
          total[t] = _mm256_madd_epi16(dots[t][0], Parts == 1 ? ones : radix);
          if (Parts == 2) total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(dots[t][Parts - 1], ones));
          if (!HasMinimum) total[t] = _mm256_sub_epi32(total[t], _mm256_slli_epi32(_mm256_set1_epi32(totals[t]), 3));
        }
      } else {
        for (int t = 0; t < T; ++t) total[t] = _mm256_setzero_si256();
        for (int v = 0; v < 8; ++v) {
          const __m256i code = _mm256_loadu_si256(codes + v), size = _mm256_abs_epi8(code);
          for (int t = 0; t < T; ++t)
            for (int p = 0; p < Parts; ++p) {  // |codes| <= 127: no saturation
              const __m256i q = _mm256_set1_epi32(four(q0 + (p * kTile + t) * kGroup + v * 4));
              const __m256i d = _mm256_maddubs_epi16(size, _mm256_sign_epi8(q, code));
              total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(d, p + 1 == Parts ? ones : radix));
            }
        }
      }
      for (int t = 0; t < T; ++t) {
        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[t]), _mm256_mul_ps(scale, _mm256_set1_ps(scales[t])), acc[t]);
        if (HasMinimum) acc[t] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(sums[t]), acc[t]);
      }
    }
  }
  for (int t = 0; t < T && t < count; ++t) _mm256_storeu_ps(y + (first + t) * stride + row_block * kRows, acc[t]);
}

// --- a tile of `count` tokens with one block of rows: what runs is written for 1, 2 or 4 tokens, and the rest is dropped

template <int Bits, bool HasMinimum, int Parts>
HERD_AVX2 void tiles_avx2(const Blocks& w, int64_t row_block, const Rounded& x, int count, float* y, int64_t stride) {
  if (count == 1) return tile_avx2<1, Bits, HasMinimum, Parts>(w, row_block, x, 0, count, y, stride);
  if (count == 2) return tile_avx2<2, Bits, HasMinimum, Parts>(w, row_block, x, 0, count, y, stride);
  tile_avx2<4, Bits, HasMinimum, Parts>(w, row_block, x, 0, count, y, stride);
  if (count > 4) tile_avx2<4, Bits, HasMinimum, Parts>(w, row_block, x, 4, count - 4, y, stride);
}

// --- the same with instructions that add four products at once, of AVX-512 and of AVX2

#define HERD_TARGET HERD_VNNI
#define HERD_DOT _mm256_dpbusd_epi32
#define HERD_WIDE
#define HERD_MOST_TOKENS 8
namespace vnni {
#include "dots.inl"
}
#undef HERD_TARGET
#undef HERD_DOT
#undef HERD_WIDE
#undef HERD_MOST_TOKENS

#ifdef HERD_AVXVNNI
#define HERD_TARGET HERD_AVXVNNI
#define HERD_MOST_TOKENS 4
#ifdef HERD_AVXVNNI_AS_AVX512
#define HERD_DOT _mm256_dpbusd_epi32
#else
#define HERD_DOT _mm256_dpbusd_avx_epi32
#endif
namespace avxvnni {
#include "dots.inl"
}
#undef HERD_TARGET
#undef HERD_DOT
#undef HERD_MOST_TOKENS
#endif

#endif  // HERD_X86

}  // namespace herd
