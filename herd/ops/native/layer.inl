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
  x = larger(x, __builtin_shuffle(x, i8{4, 5, 6, 7, 0, 1, 2, 3}));
  x = larger(x, __builtin_shuffle(x, i8{2, 3, 0, 1, 6, 7, 4, 5}));
  return larger(x, __builtin_shuffle(x, i8{1, 0, 3, 2, 5, 4, 7, 6}))[0];
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

// --- keys and values in pages: float32, float16, bfloat16, or int8 with a scale per token and head

template <int Kind>
HERD_TARGET inline f8 load_as_float(const void* data, int64_t at, f8 scale) {
  if (Kind == kFloat32) return load(static_cast<const float*>(data) + at);
  if (Kind == kFloat16) {
    const uint16_t* raw = static_cast<const uint16_t*>(data) + at;
#ifdef HERD_FMA
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(raw)));
#else
    f8 out;
    for (int i = 0; i < kLanes; ++i) out[i] = half_to_float(raw[i]);
    return out;
#endif
  }
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
  } else if (kind == kFloat16) {
    uint16_t* out = static_cast<uint16_t*>(data) + at;
    for (int64_t i = 0; i < head_width; i += kLanes) {
#ifdef HERD_FMA
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(load(x + i), _MM_FROUND_TO_NEAREST_INT));
#else
      for (int lane = 0; lane < kLanes; ++lane) out[i + lane] = float_to_half(x[i + lane]);
#endif
    }
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

// The keys of a block turned, [K, kKeys], from some column on.
struct TurnedKeys {
  const float* data;
  HERD_TARGET inline TurnedKeys from(int64_t column) const { return {data + column}; }
  HERD_TARGET inline f8 at(int64_t row, int lane) const { return load(data + row * kKeys + lane); }
};

// The values of a block, one in each slot, from some column on.
template <int Kind>
struct SlotValues {
  const void* data;
  const int64_t* starts;
  const float* scales;
  int64_t column = 0;
  HERD_TARGET inline SlotValues from(int64_t next) const { return {data, starts, scales, next}; }
  HERD_TARGET inline f8 at(int64_t row, int lane) const {
    return load_as_float<Kind>(data, starts[row] + column + lane, all(Kind == kInt8 ? scales[row] : 0.0f));
  }
};

// out[r] (+)= a[r] . b for R rows and W * 8 columns: a [R, n], b [n, ...]
template <int R, int W, bool Continued, class B>
HERD_TARGET inline void rows_times(const float* a, int64_t a_stride, const B& b, int64_t n, float* out, int64_t out_stride) {
  f8 sums[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sums[r][w] = Continued ? load(out + r * out_stride + w * kLanes) : all(0);
  for (int64_t i = 0; i < n; ++i) {
    f8 x[R];
    for (int r = 0; r < R; ++r) x[r] = all(a[r * a_stride + i]);
    for (int w = 0; w < W; ++w) {
      const f8 y = b.at(i, w * kLanes);
      for (int r = 0; r < R; ++r) sums[r][w] = fma(x[r], y, sums[r][w]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store(out + r * out_stride + w * kLanes, sums[r][w]);
}

// The same for any number of rows, and columns by 16 or 32: as many sums side by side as there are registers.
template <bool Continued, class B>
HERD_TARGET inline void product(int64_t rows, const float* a, int64_t a_stride, const B& b, int64_t n, int64_t columns, float* out,
                                int64_t out_stride) {
#define HERD_ROWS(R, W) rows_times<R, W, Continued>(a + r * a_stride, a_stride, b.from(c), n, out + r * out_stride + c, out_stride)
  for (int64_t c = 0, wide; c < columns; c += wide) {
    wide = rows <= 3 && c + 4 * kLanes <= columns ? 4 * kLanes : 2 * kLanes;
    for (int64_t r = 0, take; r < rows; r += take) {
      take = rows - r > 6 ? 4 : rows - r > 5 ? 3 : rows - r;  // never one left over
      switch (wide == 4 * kLanes ? -take : take) {
        case -1: HERD_ROWS(1, 4); break;
        case -2: HERD_ROWS(2, 4); break;
        case -3: HERD_ROWS(3, 4); break;
        case 1: HERD_ROWS(1, 2); break;
        case 2: HERD_ROWS(2, 2); break;
        case 3: HERD_ROWS(3, 2); break;
        case 4: HERD_ROWS(4, 2); break;
        default: HERD_ROWS(5, 2); break;
      }
    }
  }
#undef HERD_ROWS
}

// 8 rows of 8 lanes, turned.
HERD_TARGET inline void turn(f8* rows) {
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
    rows[j] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
    rows[j + 4] = _mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
  }
#else
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < j; ++i) std::swap(rows[i][j], rows[j][i]);
#endif
}

// Where a block's keys and values start, those of the block after it, and the scales. Past `count` the last stands again, which no row sees.
struct BlockOfSlots {
  int64_t starts[kKeys], next[kKeys];
  float key_scales[kKeys], value_scales[kKeys];

  HERD_TARGET BlockOfSlots(const HerdPages& pages, int64_t head, int64_t head_width, const int64_t* slots, int64_t count) {
    for (int64_t j = 0; j < kKeys; ++j) {
      const int64_t slot = slots[std::min(j, count - 1)] + head * pages.page_tokens;
      starts[j] = slot * head_width;
      next[j] = (slots[std::min(j + kKeys, count - 1)] + head * pages.page_tokens) * head_width;
      if (pages.kind == kInt8) key_scales[j] = pages.key_scales[slot], value_scales[j] = pages.value_scales[slot];
    }
  }
};

// The keys of a block as floats and turned, [K, kKeys]. Meanwhile the next block is fetched into the second cache (see blocks.h), bit by bit:
// pages are too short for the machine to see where reading goes on.
template <int Kind>
HERD_TARGET inline void turn_keys(const BlockOfSlots& block, const HerdPages& pages, int64_t head_width, float* keys) {
  constexpr int64_t kBytes = kv_bytes(Kind);
  f8 rows[kLanes];
  for (int64_t j = 0; j < kKeys; j += kLanes)
    for (int64_t i = 0; i < head_width; i += Kind == kBfloat16 ? 2 * kLanes : kLanes) {
      if (i * kBytes % 64 == 0)
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t at = (block.next[j + lane] + i) * kBytes;
          __builtin_prefetch(static_cast<const char*>(pages.keys) + at, 0, 2);
          __builtin_prefetch(static_cast<const char*>(pages.values) + at, 0, 2);
        }
      if (Kind == kBfloat16) {  // turned as pairs, which are then taken apart
        for (int lane = 0; lane < kLanes; ++lane)
          std::memcpy(&rows[lane], static_cast<const uint16_t*>(pages.keys) + block.starts[j + lane] + i, sizeof(f8));
        turn(rows);
        for (int lane = 0; lane < kLanes; ++lane) {
          i8 pair;
          std::memcpy(&pair, &rows[lane], sizeof pair);
          const i8 even = pair << 16, odd = pair & int32_t(0xffff0000);
          std::memcpy(keys + (i + 2 * lane) * kKeys + j, &even, sizeof even);
          std::memcpy(keys + (i + 2 * lane + 1) * kKeys + j, &odd, sizeof odd);
        }
      } else {
        for (int lane = 0; lane < kLanes; ++lane)
          rows[lane] = load_as_float<Kind>(pages.keys, block.starts[j + lane] + i, all(Kind == kInt8 ? block.key_scales[j + lane] : 0.0f));
        turn(rows);
        for (int lane = 0; lane < kLanes; ++lane) store(keys + (i + lane) * kKeys + j, rows[lane]);
      }
    }
}

// Softmax as it goes, over the keys of one span. State of a row: the largest score, 8 sums of weights, and [K] sums of weighted values.
HERD_TARGET inline void weigh(float* scores, int64_t visible, float scale, int64_t head_width, SoftmaxRow& row, float* acc) {
  constexpr int kVectors = kKeys / kLanes;
  const i8 order{0, 1, 2, 3, 4, 5, 6, 7};
  f8 s[kVectors];
  for (int i = 0; i < kVectors; ++i) s[i] = order < int32_t(visible) - i * kLanes ? load(scores + i * kLanes) * scale : all(-INFINITY);
  f8 larger_ones = s[0];
  for (int i = 1; i < kVectors; ++i) larger_ones = larger(larger_ones, s[i]);
  const float most = std::max(row.most, largest(larger_ones));
  f8 total = load(row.totals);
  if (most > row.most) {
    const float shrink = row.most == -INFINITY ? 0.0f : exp_down(all(row.most - most))[0];
    for (int64_t i = 0; i < head_width; i += kLanes) store(acc + i, load(acc + i) * shrink);
    total = total * shrink;
    row.most = most;
  }
  for (int i = 0; i < kVectors; ++i) {
    s[i] = order < int32_t(visible) - i * kLanes ? exp_down(s[i] - most) : all(0);
    total = total + s[i];
    store(scores + i * kLanes, s[i]);
  }
  store(row.totals, total);
}

// The scores of a block's keys for `rows` queries, and what their values come to.
template <int Kind>
HERD_TARGET inline void attend_block(const float* q, int64_t rows, const int64_t* visible, int64_t at, int64_t head_width,
                                     const HerdPages& pages, const BlockOfSlots& block, float* scratch, SoftmaxRow* state, float* acc) {
  float *keys = scratch, *values = keys + kKeys * head_width, *scores = values + kKeys * head_width;
  turn_keys<Kind>(block, pages, head_width, keys);
  product<false>(rows, q, head_width, TurnedKeys{keys}, head_width, kKeys, scores, kKeys);
  const float scale = 1.0f / std::sqrt(float(head_width));
  for (int64_t r = 0; r < rows; ++r) weigh(scores + r * kKeys, visible[r] - at, scale, head_width, state[r], acc + r * head_width);
  const SlotValues<Kind> in_slots{pages.values, block.starts, block.value_scales};
  if (Kind == kFloat32 || rows <= kFewRows) {
    product<true>(rows, scores, kKeys, in_slots, kKeys, head_width, acc, head_width);
    return;
  }
  int64_t starts[kKeys];  // many rows: as floats once
  for (int64_t j = 0; j < kKeys; ++j) {
    starts[j] = j * head_width;
    for (int64_t i = 0; i < head_width; i += kLanes) store(values + starts[j] + i, in_slots.at(j, int(i)));
  }
  product<true>(rows, scores, kKeys, SlotValues<kFloat32>{values, starts, nullptr}, kKeys, head_width, acc, head_width);
}

// Queries [heads, rows, K] of key/value heads from `head` on, row r of each at the end of visible[r] keys; keys [start, stop), start being where
// a span starts. `slots` are theirs and those of a block after them, `known` in all. The blocks are the same whoever asks, so a
// row's result does not depend on the other rows. Heads within blocks: the keys of a page, of all heads, are read as they lie.
HERD_TARGET inline void attend_span(const float* q, int64_t rows, const int64_t* visible, int64_t head, int64_t heads, int64_t head_width,
                                    const HerdPages& pages, const int64_t* slots, int64_t known, int64_t start, int64_t stop, float* scratch,
                                    SoftmaxRow* states, float* accs) {
  static constexpr decltype(&attend_block<kFloat32>) kinds[] = {attend_block<kFloat32>, attend_block<kBfloat16>, attend_block<kInt8>,
                                                                attend_block<kFloat16>};
  const auto attend = kinds[pages.kind];
  for (int64_t r = 0; r < heads * rows; ++r) states[r] = SoftmaxRow{};
  std::memset(accs, 0, size_t(heads * rows * head_width) * sizeof(float));
  int64_t first = 0;  // rows before it see nothing of the block: rows see ever more
  for (int64_t at = start; at < stop; at += kKeys) {
    while (first < rows && visible[first] <= at) ++first;
    for (int64_t h = 0; h < heads; ++h) {
      const BlockOfSlots block(pages, head + h, head_width, slots + (at - start), known - (at - start));
      const int64_t row = h * rows + first;
      attend(q + row * head_width, rows - first, visible + first, at, head_width, pages, block, scratch, states + row,
             accs + row * head_width);
    }
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
