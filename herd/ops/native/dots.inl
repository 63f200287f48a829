// Products by the instruction that multiplies unsigned by signed bytes and adds four neighbours to 32 bits.
//
// Included once per form of it, with HERD_TARGET, HERD_DOT for registers of 8 rows, HERD_WIDE where there are registers of two blocks of 8
// side by side, and HERD_MOST_TOKENS, as many as have their sums in registers.

struct Narrow {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kBlocks = 1;
  HERD_TARGET static Int load(const uint8_t* p, int64_t) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  HERD_TARGET static Float halves(const uint8_t* p, int64_t) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  HERD_TARGET static Int set(int32_t x) { return _mm256_set1_epi32(x); }
  HERD_TARGET static Float set(float x) { return _mm256_set1_ps(x); }
  HERD_TARGET static Int low(Int x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  HERD_TARGET static Int high(Int x) { return low(_mm256_srli_epi16(x, 4)); }
  HERD_TARGET static Int flip(Int x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
  HERD_TARGET static Int dot(Int acc, Int a, Int b) { return HERD_DOT(acc, a, b); }
  HERD_TARGET static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  HERD_TARGET static Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  HERD_TARGET static Int mul(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  HERD_TARGET static Float real(Int x) { return _mm256_cvtepi32_ps(x); }
  HERD_TARGET static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  HERD_TARGET static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  HERD_TARGET static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  template <int N>
  HERD_TARGET static Int shift(Int x) { return _mm256_slli_epi32(x, N); }
};

#ifdef HERD_WIDE
struct Wide {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kBlocks = 2;
  HERD_TARGET static Int load(const uint8_t* p, int64_t next) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + next)), 1);
  }
  HERD_TARGET static Float halves(const uint8_t* p, int64_t next) {
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + next)), 1));
  }
  HERD_TARGET static Int set(int32_t x) { return _mm512_set1_epi32(x); }
  HERD_TARGET static Float set(float x) { return _mm512_set1_ps(x); }
  HERD_TARGET static Int low(Int x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  HERD_TARGET static Int high(Int x) { return low(_mm512_srli_epi16(x, 4)); }
  HERD_TARGET static Int flip(Int x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
  HERD_TARGET static Int dot(Int acc, Int a, Int b) { return _mm512_dpbusd_epi32(acc, a, b); }
  HERD_TARGET static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  HERD_TARGET static Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  HERD_TARGET static Int mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  HERD_TARGET static Float real(Int x) { return _mm512_cvtepi32_ps(x); }
  HERD_TARGET static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  HERD_TARGET static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  HERD_TARGET static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  template <int N>
  HERD_TARGET static Int shift(Int x) { return _mm512_slli_epi32(x, N); }
};
#endif

template <class V, int T, int Bits, bool HasMinimum, int Parts>
HERD_TARGET void tile(const Blocks& w, int64_t row_block, const Rounded& x, int first, int count, float* y, int64_t stride) {
  const int64_t groups = w.columns / kGroup, next = w.row_bytes();
  const int per_block = w.group / kGroup;
  const int64_t codes_bytes = w.codes_bytes(), block_bytes = w.block_bytes();
  const uint8_t* block = w.data + row_block * next;
  // two rows of blocks are read side by side, so what comes next lies whole pairs ahead
  const int64_t ahead_bytes = V::kBlocks == 1 ? kAhead : (kAhead + 2 * next - 1) / (2 * next) * 2 * next;
  typename V::Float acc[T];
  for (int t = 0; t < T; ++t) acc[t] = V::set(0.0f);
  const int8_t* q0 = x.codes + first * kGroup;
  const float *scales = x.scales + first, *sums = x.sums + first;
  const int32_t* totals = x.totals + first;
  for (int64_t g = 0; g < groups; block += block_bytes) {
    for (int i = 0; i < V::kBlocks; ++i)
      for (int64_t ahead = ahead_bytes; ahead < ahead_bytes + block_bytes; ahead += 64)
        _mm_prefetch(reinterpret_cast<const char*>(block + i * next + ahead), _MM_HINT_T1);
    const typename V::Float scale = V::halves(block + codes_bytes, next);
    typename V::Float minimum = V::set(0.0f);
    if (HasMinimum) minimum = V::halves(block + codes_bytes + 16, next);
    for (int part = 0; part < per_block; ++part, ++g, q0 += Parts * kTile * kGroup, scales += kTile, sums += kTile, totals += kTile) {
      const uint8_t* codes = block + part * (kRows * kGroup * Bits / 8);
      constexpr int kChains = T * Parts <= 2 ? 2 : 1;  // an instruction waits for the one before it in its chain
      typename V::Int dots[T][Parts][kChains];
      for (auto& of_token : dots)
        for (auto& of_part : of_token)
          for (auto& dot : of_part) dot = V::set(0);
      for (int v = 0; v < Bits; ++v) {
        const typename V::Int both = V::load(codes + v * 32, next);
        const typename V::Int a = Bits == 4 ? V::low(both) : V::flip(both), b = Bits == 4 ? V::high(both) : a;
        for (int t = 0; t < T; ++t)
          for (int p = 0; p < Parts; ++p) {
            const int8_t* q = q0 + (p * kTile + t) * kGroup + v * (Bits == 4 ? 8 : 4);
            typename V::Int &first = dots[t][p][Bits == 4 ? 0 : v % kChains], &second = dots[t][p][kChains - 1];
            first = V::dot(first, a, V::set(four(q)));
            if (Bits == 4) second = V::dot(second, b, V::set(four(q + 4)));
          }
      }
      for (int t = 0; t < T; ++t) {
        for (int p = 0; kChains == 2 && p < Parts; ++p) dots[t][p][0] = V::add(dots[t][p][0], dots[t][p][1 % kChains]);
        typename V::Int total = dots[t][0][0];
        if (Parts == 2) total = V::add(V::mul(total, V::set(kRadix)), dots[t][Parts - 1][0]);
        if (!HasMinimum) total = V::sub(total, V::template shift<Bits == 4 ? 3 : 7>(V::set(totals[t])));
        acc[t] = V::fma(V::real(total), V::mul(scale, V::set(scales[t])), acc[t]);
        if (HasMinimum) acc[t] = V::fma(minimum, V::set(sums[t]), acc[t]);
      }
    }
  }
  for (int t = 0; t < T && t < count; ++t) V::store(y + (first + t) * stride + row_block * kRows, acc[t]);
}

// A tile of `count` tokens with one block of rows, or two: what runs is written for 1, 2, 4 or 8 tokens, and the rest is dropped.
template <class V, int Bits, bool HasMinimum, int Parts>
HERD_TARGET void tiles(const Blocks& w, int64_t row_block, const Rounded& x, int count, float* y, int64_t stride) {
  if (count == 1) return tile<V, 1, Bits, HasMinimum, Parts>(w, row_block, x, 0, count, y, stride);
  if (count == 2) return tile<V, 2, Bits, HasMinimum, Parts>(w, row_block, x, 0, count, y, stride);
  if (count <= 4) return tile<V, 4, Bits, HasMinimum, Parts>(w, row_block, x, 0, count, y, stride);
  for (int first = 0; first < count; first += HERD_MOST_TOKENS)
    tile<V, HERD_MOST_TOKENS, Bits, HasMinimum, Parts>(w, row_block, x, first, count - first, y, stride);
}
