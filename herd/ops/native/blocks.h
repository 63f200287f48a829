// Products of 16-bit activations with 4-bit and 8-bit blocks. `herd/ops/int4.py` has the format and the definition.
//
// A block holds 8 rows x g columns. One 32-byte vector holds, per row, 4 columns in the low nibbles and the next 4 in the high ones, so
// that four bytes of activations, broadcast, meet all 8 rows at once and no sum runs across lanes. Integers are exact; floats are added
// per row, group after group, with the same fused operations on every path. So a row's result depends on neither the tile it is
// computed in, nor the number of threads, nor the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define HERD_X86 1
#define HERD_AVX2 __attribute__((target("avx2,fma,f16c")))
#define HERD_VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#endif

namespace herd {

constexpr int kRows = 8;    // rows of a block
constexpr int kGroup = 32;  // columns that share a scale of the activations
constexpr int kTile = 4;    // tokens per pass over a block
constexpr int kRadix = 254;  // an activation is kRadix * high + low, both in -127 .. 127
constexpr float kLargest = kRadix * 127 + 126;

struct Blocks {  // one matrix [rows, columns]
  const uint8_t* data;
  int64_t rows, columns;
  int group, bits;
  bool has_minimum;

  int64_t codes_bytes() const { return int64_t(kRows) * group * bits / 8; }
  int64_t block_bytes() const { return codes_bytes() + 16 + (has_minimum ? 16 : 0); }
  int64_t row_bytes() const { return columns / group * block_bytes(); }  // of 8 rows
};

struct Rounded {  // activations [tokens, columns], rounded to 16 bits in groups of 32
  const int8_t* codes;  // [tokens, columns / 32, 64]: 32 high parts, 32 low parts
  const float* scales;  // [tokens, columns / 32]
  const float* sums;    // [tokens, columns / 32], scale * sum of activations
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

// --- portable: the same integers and the same fused additions, one by one

inline void tile_portable(const Blocks& w, int64_t row_block, const Rounded& x, int64_t token, int count, float* y, int64_t stride) {
  const int64_t groups = w.columns / kGroup;
  const int per_block = w.group / kGroup;
  for (int t = 0; t < count; ++t) {
    float acc[kRows] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* block = w.data + row_block * w.row_bytes() + g / per_block * w.block_bytes();
      const uint8_t* codes = block + (g % per_block) * (kRows * kGroup * w.bits / 8);
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(block + w.codes_bytes());
      const int8_t* q = x.codes + ((token + t) * groups + g) * 2 * kGroup;
      const float scale_x = x.scales[(token + t) * groups + g], sum_x = x.sums[(token + t) * groups + g];
      for (int r = 0; r < kRows; ++r) {
        int32_t dot = 0;
        for (int c = 0; c < kGroup; ++c) {
          const int32_t activation = kRadix * q[c] + q[kGroup + c];
          if (w.bits == 4) {
            const uint8_t byte = codes[c / 8 * 32 + r * 4 + c % 4];
            dot += int32_t(c % 8 < 4 ? byte & 15 : byte >> 4) * activation;
          } else {
            dot += int32_t(int8_t(codes[c / 4 * 32 + r * 4 + c % 4])) * activation;
          }
        }
        const float scale = half_to_float(halves[r]);
        acc[r] = std::fma(float(dot), scale * scale_x, acc[r]);
        if (w.bits == 4) acc[r] = std::fma(w.has_minimum ? half_to_float(halves[kRows + r]) : -8.0f * scale, sum_x, acc[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) y[(token + t) * stride + row_block * kRows + r] = acc[r];
  }
}

#ifdef HERD_X86

inline int32_t four(const int8_t* q) {
  int32_t out;
  std::memcpy(&out, q, 4);
  return out;
}

// --- AVX2: at most 8 sums of 15 * 127 * 2 are added in 16 bits, 30,480 < 32,768

template <int T, int Bits, bool HasMinimum>
HERD_AVX2 void tile_avx2(const Blocks& w, int64_t row_block, const Rounded& x, int64_t token, float* y, int64_t stride) {
  const int64_t groups = w.columns / kGroup;
  const int per_block = w.group / kGroup;
  const int64_t codes_bytes = w.codes_bytes(), block_bytes = w.block_bytes();
  const uint8_t* block = w.data + row_block * w.row_bytes();
  const __m256i ones = _mm256_set1_epi16(1), radix = _mm256_set1_epi16(kRadix), low = _mm256_set1_epi8(15);
  __m256 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm256_setzero_ps();
  const int8_t* q0 = x.codes + token * w.columns * 2;
  const float* scales = x.scales + token * groups;
  const float* sums = x.sums + token * groups;
  for (int64_t g = 0; g < groups; block += block_bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(block + 2048), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(block + 2112), _MM_HINT_T0);
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + codes_bytes)));
    __m256 minimum = _mm256_setzero_ps();
    if (Bits == 4)
      minimum = HasMinimum ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + codes_bytes + 16)))
                           : _mm256_mul_ps(scale, _mm256_set1_ps(-8.0f));
    for (int part = 0; part < per_block; ++part, ++g) {
      const __m256i* codes = reinterpret_cast<const __m256i*>(block + part * (kRows * kGroup * Bits / 8));
      __m256i total[T];
      if (Bits == 4) {
        __m256i high[T], rest[T];
        for (int v = 0; v < 4; ++v) {
          const __m256i both = _mm256_loadu_si256(codes + v);
          const __m256i a = _mm256_and_si256(both, low), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
          for (int t = 0; t < T; ++t) {
            const int8_t* q = q0 + (t * groups + g) * 2 * kGroup + v * 8;
            const __m256i h = _mm256_add_epi16(_mm256_maddubs_epi16(a, _mm256_set1_epi32(four(q))),
                                               _mm256_maddubs_epi16(b, _mm256_set1_epi32(four(q + 4))));
            const __m256i l = _mm256_add_epi16(_mm256_maddubs_epi16(a, _mm256_set1_epi32(four(q + kGroup))),
                                               _mm256_maddubs_epi16(b, _mm256_set1_epi32(four(q + kGroup + 4))));
            high[t] = v ? _mm256_add_epi16(high[t], h) : h;
            rest[t] = v ? _mm256_add_epi16(rest[t], l) : l;
          }
        }
        for (int t = 0; t < T; ++t) total[t] = _mm256_add_epi32(_mm256_madd_epi16(high[t], radix), _mm256_madd_epi16(rest[t], ones));
      } else {
        for (int t = 0; t < T; ++t) total[t] = _mm256_setzero_si256();
        for (int v = 0; v < 8; ++v) {
          const __m256i code = _mm256_loadu_si256(codes + v), size = _mm256_abs_epi8(code);
          for (int t = 0; t < T; ++t) {  // |codes| <= 127: no saturation
            const int8_t* q = q0 + (t * groups + g) * 2 * kGroup + v * 4;
            const __m256i h = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(four(q)), code));
            const __m256i l = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(four(q + kGroup)), code));
            total[t] = _mm256_add_epi32(total[t], _mm256_add_epi32(_mm256_madd_epi16(h, radix), _mm256_madd_epi16(l, ones)));
          }
        }
      }
      for (int t = 0; t < T; ++t) {
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(scales[t * groups + g]));
        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[t]), both, acc[t]);
        if (Bits == 4) acc[t] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(sums[t * groups + g]), acc[t]);
      }
    }
  }
  for (int t = 0; t < T; ++t) _mm256_storeu_ps(y + (token + t) * stride + row_block * kRows, acc[t]);
}

// --- AVX-512 VNNI: two blocks of rows side by side in one register

HERD_VNNI inline __m512i pair(const uint8_t* a, const uint8_t* b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
}

HERD_VNNI inline __m512 halves(const uint8_t* a, const uint8_t* b) {
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a))),
                                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1));
}

template <int T, int Bits, bool HasMinimum>
HERD_VNNI void tile_vnni(const Blocks& w, int64_t row_block, const Rounded& x, int64_t token, float* y, int64_t stride) {
  const int64_t groups = w.columns / kGroup;
  const int per_block = w.group / kGroup;
  const int64_t codes_bytes = w.codes_bytes(), block_bytes = w.block_bytes();
  const uint8_t* first = w.data + row_block * w.row_bytes();
  const uint8_t* second = first + w.row_bytes();
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(-128), radix = _mm512_set1_epi32(kRadix);
  __m512 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();
  const int8_t* q0 = x.codes + token * w.columns * 2;
  const float* scales = x.scales + token * groups;
  const float* sums = x.sums + token * groups;
  for (int64_t g = 0; g < groups; first += block_bytes, second += block_bytes) {
    for (int ahead = 2048; ahead < 2048 + block_bytes; ahead += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(first + ahead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(second + ahead), _MM_HINT_T0);
    }
    const __m512 scale = halves(first + codes_bytes, second + codes_bytes);
    __m512 minimum = _mm512_setzero_ps();
    if (Bits == 4)
      minimum = HasMinimum ? halves(first + codes_bytes + 16, second + codes_bytes + 16) : _mm512_mul_ps(scale, _mm512_set1_ps(-8.0f));
    for (int part = 0; part < per_block; ++part, ++g) {
      const int64_t at = part * (kRows * kGroup * Bits / 8);
      __m512i total[T], rest[T];
      for (int t = 0; t < T; ++t) total[t] = rest[t] = _mm512_setzero_si512();
      if (Bits == 4) {
        for (int v = 0; v < 4; ++v) {
          const __m512i both = pair(first + at + v * 32, second + at + v * 32);
          const __m512i a = _mm512_and_si512(both, low), b = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
          for (int t = 0; t < T; ++t) {
            const int8_t* q = q0 + (t * groups + g) * 2 * kGroup + v * 8;
            total[t] = _mm512_dpbusd_epi32(total[t], a, _mm512_set1_epi32(four(q)));
            rest[t] = _mm512_dpbusd_epi32(rest[t], a, _mm512_set1_epi32(four(q + kGroup)));
            total[t] = _mm512_dpbusd_epi32(total[t], b, _mm512_set1_epi32(four(q + 4)));
            rest[t] = _mm512_dpbusd_epi32(rest[t], b, _mm512_set1_epi32(four(q + kGroup + 4)));
          }
        }
      } else {  // the instruction wants unsigned codes: code + 128, and 128 * sum of activations taken off again
        __m512i extra[T], extra_rest[T];
        for (int t = 0; t < T; ++t) extra[t] = extra_rest[t] = _mm512_setzero_si512();
        for (int v = 0; v < 8; ++v) {
          const __m512i code = _mm512_xor_si512(pair(first + at + v * 32, second + at + v * 32), flip);
          for (int t = 0; t < T; ++t) {
            const int8_t* q = q0 + (t * groups + g) * 2 * kGroup + v * 4;
            const __m512i h = _mm512_set1_epi32(four(q)), l = _mm512_set1_epi32(four(q + kGroup));
            total[t] = _mm512_dpbusd_epi32(total[t], code, h);
            extra[t] = _mm512_dpbusd_epi32(extra[t], flip, h);
            rest[t] = _mm512_dpbusd_epi32(rest[t], code, l);
            extra_rest[t] = _mm512_dpbusd_epi32(extra_rest[t], flip, l);
          }
        }
        for (int t = 0; t < T; ++t) {
          total[t] = _mm512_sub_epi32(total[t], extra[t]);
          rest[t] = _mm512_sub_epi32(rest[t], extra_rest[t]);
        }
      }
      for (int t = 0; t < T; ++t) total[t] = _mm512_add_epi32(_mm512_mullo_epi32(total[t], radix), rest[t]);
      for (int t = 0; t < T; ++t) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(scales[t * groups + g]));
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[t]), both, acc[t]);
        if (Bits == 4) acc[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sums[t * groups + g]), acc[t]);
      }
    }
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(y + (token + t) * stride + row_block * kRows, acc[t]);
}

template <int Bits, bool HasMinimum>
HERD_AVX2 void tiles_avx2(const Blocks& w, int64_t row_block, const Rounded& x, int64_t token, int count, float* y, int64_t stride) {
  switch (count) {
    case 1: return tile_avx2<1, Bits, HasMinimum>(w, row_block, x, token, y, stride);
    case 2: return tile_avx2<2, Bits, HasMinimum>(w, row_block, x, token, y, stride);
    case 3: return tile_avx2<3, Bits, HasMinimum>(w, row_block, x, token, y, stride);
    default: return tile_avx2<4, Bits, HasMinimum>(w, row_block, x, token, y, stride);
  }
}

template <int Bits, bool HasMinimum>
HERD_VNNI void tiles_vnni(const Blocks& w, int64_t row_block, const Rounded& x, int64_t token, int count, float* y, int64_t stride) {
  switch (count) {
    case 1: return tile_vnni<1, Bits, HasMinimum>(w, row_block, x, token, y, stride);
    case 2: return tile_vnni<2, Bits, HasMinimum>(w, row_block, x, token, y, stride);
    case 3: return tile_vnni<3, Bits, HasMinimum>(w, row_block, x, token, y, stride);
    default: return tile_vnni<4, Bits, HasMinimum>(w, row_block, x, token, y, stride);
  }
}

#endif  // HERD_X86

}  // namespace herd
