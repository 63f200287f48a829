// The float arithmetic of a layer, between its products: norms, rotary turns, attention over pages, SwiGLU, routing.
//
// Included once per instruction set, with HERD_TARGET set to it and HERD_FMA where it has fused products. Vectors are of 8 lanes; a sum
// is 8 sums, joined in a fixed order. Everything is computed per token, so no result depends on what else is in the batch.

using f8 = float __attribute__((vector_size(32)));
using i8 = int32_t __attribute__((vector_size(32)));

constexpr int kLanes = 8;

HERD_TARGET inline f8 load(const float* p) {
  f8 out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

HERD_TARGET inline void store(float* p, f8 x) { std::memcpy(p, &x, sizeof x); }

HERD_TARGET inline f8 all(float x) { return f8{x, x, x, x, x, x, x, x}; }

HERD_TARGET inline f8 fma(f8 a, f8 b, f8 c) {
#ifdef HERD_FMA
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

HERD_TARGET inline f8 larger(f8 a, f8 b) { return a > b ? a : b; }

HERD_TARGET inline float joined(f8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

HERD_TARGET inline float largest(f8 x) {
  float out = x[0];
  for (int i = 1; i < kLanes; ++i) out = std::max(out, x[i]);
  return out;
}

HERD_TARGET inline float dot(const float* a, const float* b, int64_t n) {  // n is a multiple of 8
  f8 sum = all(0);
  for (int64_t i = 0; i < n; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  return joined(sum);
}

// e^x to 2 units in the last place for x <= 0; next to nothing below -87. Source: Cephes expf.
HERD_TARGET inline f8 exp_down(f8 x) {
  x = x < -87.0f ? all(-87.0f) : x;  // NaN stays NaN
  const i8 n = __builtin_convertvector(fma(x, all(1.44269504f), all(-0.5f)), i8);
  const f8 whole = __builtin_convertvector(n, f8);
  const f8 r = fma(whole, all(2.12194440e-4f), fma(whole, all(-0.693359375f), x));
  f8 p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = fma(p, r, all(c));
  p = fma(p * r, r, r + 1.0f);
  const i8 bits = (n + 127) << 23;
  f8 power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

HERD_TARGET inline f8 sigmoid(f8 x) {
  const f8 e = exp_down(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

HERD_TARGET inline float sigmoid_of(float x) { return sigmoid(all(x))[0]; }

// out = x / rms(x) * weight; weight may be null
HERD_TARGET inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const f8 scale = all(1.0f / std::sqrt(dot(x, x, n) / float(n) + eps));
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, weight ? load(x + i) * scale * load(weight + i) : load(x + i) * scale);
}

// neighbouring pairs of one head
HERD_TARGET inline void rotate(float* x, const float* cos, const float* sin, int64_t head_width) {
  for (int64_t i = 0; i < head_width / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cos[i] - odd * sin[i];
    x[2 * i + 1] = even * sin[i] + odd * cos[i];
  }
}

HERD_TARGET inline void swiglu(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const f8 g = load(gate + i);
    store(gate + i, g * sigmoid(g) * load(up + i));
  }
}

HERD_TARGET inline void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, load(x + i) + load(y + i));
}

// --- keys and values in pages: float32, bfloat16, or int8 with a scale per token and head

template <int Kind>
HERD_TARGET inline f8 load_as_float(const void* data, int64_t at, f8 scale) {
  if (Kind == kFloat32) return load(static_cast<const float*>(data) + at);
  i8 bits;
  if (Kind == kBfloat16) {
    const uint16_t* raw = static_cast<const uint16_t*>(data) + at;
#ifdef HERD_FMA
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(raw))), 16);
    std::memcpy(&bits, &wide, sizeof bits);
#else
    for (int i = 0; i < kLanes; ++i) bits[i] = int32_t(uint32_t(raw[i]) << 16);
#endif
    f8 out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  const int8_t* raw = static_cast<const int8_t*>(data) + at;
#ifdef HERD_FMA
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(raw)));
  std::memcpy(&bits, &wide, sizeof bits);
#else
  for (int i = 0; i < kLanes; ++i) bits[i] = raw[i];
#endif
  return __builtin_convertvector(bits, f8) * scale;
}

// One head of one token into its slot.
HERD_TARGET inline void write_slot(const float* x, int64_t head_width, void* data, float* scales, int64_t head, int kind) {
  const int64_t at = head * head_width;
  if (kind == kFloat32) {
    std::memcpy(static_cast<float*>(data) + at, x, size_t(head_width) * sizeof(float));
  } else if (kind == kBfloat16) {
    uint16_t* out = static_cast<uint16_t*>(data) + at;
    for (int64_t i = 0; i < head_width; ++i) {  // to the nearest, ties to even
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      out[i] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
  } else {
    float most = 0, nothing = 0;
    for (int64_t i = 0; i < head_width; ++i) most = std::max(most, std::fabs(x[i])), nothing += x[i] * 0.0f;
    const float scale = most / 127.0f + nothing, inverse = std::isfinite(1.0f / scale) ? 1.0f / scale : 0.0f;
    int8_t* out = static_cast<int8_t*>(data) + at;
    for (int64_t i = 0; i < head_width; ++i) out[i] = std::isnan(scale) ? int8_t(0) : int8_t(std::nearbyint(x[i] * inverse));
    scales[head] = scale;
  }
}

// out[r] (+)= a[r] . b for R rows, 16 columns: a [R, n], b [n, stride]
template <int R, bool Continued>
HERD_TARGET inline void rows_times(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, float* out,
                                   int64_t out_stride) {
  f8 first[R], second[R];
  for (int r = 0; r < R; ++r) {
    first[r] = Continued ? load(out + r * out_stride) : all(0);
    second[r] = Continued ? load(out + r * out_stride + kLanes) : all(0);
  }
  for (int64_t i = 0; i < n; ++i) {
    const f8 left = load(b + i * b_stride), right = load(b + i * b_stride + kLanes);
    for (int r = 0; r < R; ++r) {
      const f8 x = all(a[r * a_stride + i]);
      first[r] = fma(x, left, first[r]);
      second[r] = fma(x, right, second[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    store(out + r * out_stride, first[r]);
    store(out + r * out_stride + kLanes, second[r]);
  }
}

template <bool Continued>
HERD_TARGET inline void some_rows_times(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n,
                                        float* out, int64_t out_stride) {
  while (rows > 0) {
    const int64_t take = rows > 6 ? 4 : rows > 5 ? 3 : rows;  // never one left over
#define HERD_ROWS(R) rows_times<R, Continued>(a, a_stride, b, b_stride, n, out, out_stride)
    switch (take) {
      case 1: HERD_ROWS(1); break;
      case 2: HERD_ROWS(2); break;
      case 3: HERD_ROWS(3); break;
      case 4: HERD_ROWS(4); break;
      default: HERD_ROWS(5); break;
    }
#undef HERD_ROWS
    rows -= take, a += take * a_stride, out += take * out_stride;
  }
}

// 8 rows of 8 lanes, turned; row j of the outcome goes to out + j * stride.
HERD_TARGET inline void store_turned(const f8* rows, float* out, int64_t stride) {
#ifdef HERD_FMA
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int j = 0; j < 4; ++j) {
    store(out + j * stride, _mm256_permute2f128_ps(b[j], b[j + 4], 0x20));
    store(out + (j + 4) * stride, _mm256_permute2f128_ps(b[j], b[j + 4], 0x31));
  }
#else
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < kLanes; ++i) out[j * stride + i] = rows[i][j];
#endif
}

// The keys of a block turned, [K, 16], and its values, [16, K], as floats. Past `count` the last key stands again, which no row sees.
template <int Kind>
HERD_TARGET void gather(const HerdPages& pages, int64_t head, int64_t head_width, const int64_t* slots, int64_t count, float* keys,
                        float* values) {
  constexpr int64_t kBytes = Kind == kFloat32 ? 4 : Kind == kBfloat16 ? 2 : 1;
  for (int64_t j = kPrefetchKeys; j < std::min(count, kPrefetchKeys + kKeys); ++j) {  // into the second cache: see blocks.h
    const int64_t next = (slots[j] + head * pages.page_tokens) * head_width * kBytes;
    for (int64_t i = 0; i < head_width * kBytes; i += 64) {
      __builtin_prefetch(static_cast<const char*>(pages.keys) + next + i, 0, 2);
      __builtin_prefetch(static_cast<const char*>(pages.values) + next + i, 0, 2);
    }
  }
  int64_t at[kKeys];
  f8 key_scales[kKeys], value_scales[kKeys];
  for (int64_t j = 0; j < kKeys; ++j) {
    at[j] = (slots[std::min(j, count - 1)] + head * pages.page_tokens) * head_width;
    if (Kind != kInt8) continue;
    key_scales[j] = all(pages.key_scales[at[j] / head_width]);
    value_scales[j] = all(pages.value_scales[at[j] / head_width]);
  }
  for (int64_t j = 0; j < kKeys; ++j)
    for (int64_t i = 0; i < head_width; i += kLanes)
      store(values + j * head_width + i, load_as_float<Kind>(pages.values, at[j] + i, value_scales[j]));
  f8 rows[kLanes];
  for (int64_t j = 0; j < kKeys; j += kLanes)
    for (int64_t i = 0; i < head_width; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) rows[lane] = load_as_float<Kind>(pages.keys, at[j + lane] + i, key_scales[j + lane]);
      store_turned(rows, keys + i * kKeys + j, kKeys);
    }
}

// Softmax as it goes, over the keys of one span. State of a row: the largest score, 8 sums of weights, and [K] sums of weighted values.
HERD_TARGET inline void weigh(float* scores, int64_t visible, float scale, int64_t head_width, SoftmaxRow& row, float* acc) {
  const i8 order{0, 1, 2, 3, 4, 5, 6, 7};
  const i8 shown[2] = {order < int32_t(visible), order + kLanes < int32_t(visible)};
  f8 s[2];
  for (int i = 0; i < 2; ++i) s[i] = shown[i] ? load(scores + i * kLanes) * scale : all(-INFINITY);
  const float most = std::max(row.most, largest(larger(s[0], s[1])));
  f8 total = load(row.totals);
  if (most > row.most) {
    const float shrink = row.most == -INFINITY ? 0.0f : exp_down(all(row.most - most))[0];
    for (int64_t i = 0; i < head_width; i += kLanes) store(acc + i, load(acc + i) * shrink);
    total = total * shrink;
    row.most = most;
  }
  for (int i = 0; i < 2; ++i) {
    s[i] = shown[i] ? exp_down(s[i] - most) : all(0);
    total = total + s[i];
    store(scores + i * kLanes, s[i]);
  }
  store(row.totals, total);
}

// `rows` queries [rows, K] of one key/value head, row r at the end of visible[r] keys; keys [start, stop), whose slots are `slots`, start
// being where a span starts. The blocks are the same whoever asks, so a row's result does not depend on the other rows.
HERD_TARGET inline void attend_span(const float* q, int64_t rows, const int64_t* visible, int64_t head, int64_t head_width,
                                    const HerdPages& pages, const int64_t* slots, int64_t start, int64_t stop, float* scratch,
                                    SoftmaxRow* state, float* acc) {
  float *keys = scratch, *values = keys + kKeys * head_width, *scores = values + kKeys * head_width;
  const float scale = 1.0f / std::sqrt(float(head_width));
  for (int64_t r = 0; r < rows; ++r) state[r] = SoftmaxRow{};
  std::memset(acc, 0, size_t(rows * head_width) * sizeof(float));
  int64_t first = 0;  // rows before it see nothing of the block: rows see ever more
  for (int64_t at = start; at < stop; at += kKeys) {
    const auto fetch = pages.kind == kFloat32 ? gather<kFloat32> : pages.kind == kBfloat16 ? gather<kBfloat16> : gather<kInt8>;
    fetch(pages, head, head_width, slots + (at - start), stop - at, keys, values);
    while (first < rows && visible[first] <= at) ++first;
    const int64_t seeing = rows - first;
    some_rows_times<false>(seeing, q + first * head_width, head_width, keys, kKeys, head_width, scores, kKeys);
    for (int64_t r = first; r < rows; ++r)
      weigh(scores + (r - first) * kKeys, visible[r] - at, scale, head_width, state[r], acc + r * head_width);
    for (int64_t i = 0; i < head_width; i += kKeys)
      some_rows_times<true>(seeing, scores, kKeys, values + i, head_width, kKeys, acc + first * head_width + i, head_width);
  }
}

// Join the state of a later span of keys to that of the earlier ones.
HERD_TARGET inline void join_spans(SoftmaxRow& row, float* acc, const SoftmaxRow& later, const float* later_acc, int64_t head_width) {
  if (later.most == -INFINITY) return;
  if (row.most == -INFINITY) {
    row = later;
    std::memcpy(acc, later_acc, size_t(head_width) * sizeof(float));
    return;
  }
  const float most = std::max(row.most, later.most);
  const f8 keep = exp_down(all(row.most - most)), take = exp_down(all(later.most - most));
  for (int64_t i = 0; i < head_width; i += kLanes) store(acc + i, load(acc + i) * keep + load(later_acc + i) * take);
  store(row.totals, load(row.totals) * keep + load(later.totals) * take);
  row.most = most;
}

HERD_TARGET inline void finish_row(const SoftmaxRow& row, const float* acc, int64_t head_width, float* out) {
  const f8 total = all(joined(load(row.totals)));
  for (int64_t i = 0; i < head_width; i += kLanes) store(out + i, load(acc + i) / total);
}
