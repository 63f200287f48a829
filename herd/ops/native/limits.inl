// What the machine can do at most, beside which a benchmark puts what was done: reading memory, and multiplying bytes in registers.

constexpr int64_t kReadPart = int64_t(4) << 20;
constexpr int64_t kPeakRounds = 1 << 22;

void read_portable(const uint8_t* data, int64_t bytes, uint64_t* sum) {
  uint64_t total = 0, word;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) std::memcpy(&word, data + i, 8), total += word;
  *sum = total;
}

double peak_portable() {  // multiplications and additions per round
  volatile int32_t sink;
  int32_t sums[8] = {};
  for (int64_t i = 0; i < kPeakRounds; ++i)
    for (int j = 0; j < 8; ++j) sums[j] += int32_t(int8_t(i + j)) * int32_t(uint8_t(i - j));
  for (int32_t sum : sums) sink = sum;
  (void)sink;
  return 16;
}

#ifdef HERD_X86
HERD_AVX2 void read_avx2(const uint8_t* data, int64_t bytes, uint64_t* sum) {
  __m256i total[4] = {};
  for (int64_t i = 0; i + 128 <= bytes; i += 128) {
    _mm_prefetch(reinterpret_cast<const char*>(data + i + kAhead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(data + i + kAhead + 64), _MM_HINT_T0);
    for (int j = 0; j < 4; ++j)
      total[j] = _mm256_xor_si256(total[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j)));
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(total[0], total[1]), _mm256_xor_si256(total[2], total[3]));
  *sum = uint64_t(_mm256_extract_epi64(all, 0));
}

HERD_AVX2 double peak_avx2() {
  __m256i sums[6] = {}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
  for (auto& sum : sums) asm volatile("" : "+x"(sum));  // as if they differed
  for (int64_t i = 0; i < kPeakRounds; ++i) {
    for (auto& sum : sums) {
      asm volatile("" : "+x"(a));  // as if it were new
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
    }
  }
  for (auto& sum : sums) asm volatile("" : : "x"(sum));
  return 6 * 32 * 2;
}

HERD_VNNI double peak_vnni() {
  __m512i sums[12] = {}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  for (auto& sum : sums) asm volatile("" : "+v"(sum));
  for (int64_t i = 0; i < kPeakRounds; ++i) {
    for (auto& sum : sums) {
      asm volatile("" : "+v"(a));
      sum = _mm512_dpbusd_epi32(sum, a, b);
    }
  }
  for (auto& sum : sums) asm volatile("" : : "v"(sum));
  return 12 * 64 * 2;
}
#endif

#ifdef HERD_AVXVNNI
HERD_AVXVNNI double peak_avxvnni() {
  __m256i sums[12] = {}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
  for (auto& sum : sums) asm volatile("" : "+x"(sum));
  for (int64_t i = 0; i < kPeakRounds; ++i) {
    for (auto& sum : sums) {
      asm volatile("" : "+x"(a));
      sum = avxvnni::Narrow::dot(sum, a, b);
    }
  }
  for (auto& sum : sums) asm volatile("" : : "x"(sum));
  return 12 * 32 * 2;
}
#endif

double peak(Path path) {
#ifdef HERD_X86
  if (path == kVnni) return peak_vnni();
#ifdef HERD_AVXVNNI
  if (path == kAvxVnni) return peak_avxvnni();
#endif
  if (path == kAvx2) return peak_avx2();
#endif
  (void)path;
  return peak_portable();
}
