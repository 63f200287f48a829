// The C interface of herd's native kernels: plain buffers in, plain buffers out, 0 or an error code back. Called through ctypes.
//
// Every function may be called from any thread; calls run one after another, each on all threads of the pool.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <mutex>
#include <new>
#include <type_traits>
#include <vector>

#include "blocks.h"
#include "pool.h"

namespace {

using namespace herd;

enum Path { kPortable, kAvx2, kVnni };
constexpr int64_t kLanesOfHead = 8;  // a head is a multiple of this wide

enum Error { kOk = 0, kBadShape = 1, kNoMemory = 2, kNoPath = 3, kNotNumbers = 4 };

constexpr int kWeightBits = 42;  // of the likeliest token, when one is drawn

struct HerdDraw {  // all but the logits
  double scale, top_p, point;
  int64_t top_k, least;
};

#define HERD_TARGET
namespace portable {
#include "layer.inl"
#include "sample.inl"
}
#undef HERD_TARGET
#ifdef HERD_X86
#define HERD_TARGET HERD_AVX2
namespace avx2 {
#include "layer.inl"
#include "sample.inl"
}
#undef HERD_TARGET
#endif

Path best_path() {
#ifdef HERD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return kVnni;
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

struct RoundedBuffer {  // room for rounded activations
  std::vector<int8_t> codes;
  std::vector<float> scales, sums;

  void hold(int64_t tokens, int64_t columns) {
    const size_t size = size_t(tokens * columns);
    if (codes.size() < 2 * size) codes.resize(2 * size), scales.resize(size / kGroup), sums.resize(size / kGroup);
  }

  Rounded view() const { return {codes.data(), scales.data(), sums.data()}; }
};

struct Machine {
  std::mutex busy;
  std::atomic<Path> path{best_path()};  // read without the lock
  Pool pool;
  RoundedBuffer inputs, hidden, routed;
  std::vector<float> floats;
};

Machine& machine() {
  static Machine* made = new Machine;  // never destroyed: threads must not be joined while the process ends
  return *made;
}

// --- rounding of activations

void round_group_portable(const float* x, int8_t* codes, float* scale, float* sum) {
  float largest = 0;
  for (int c = 0; c < kGroup; ++c) largest = std::max(largest, std::fabs(x[c]));
  const float step = largest / kLargest, inverse = std::isfinite(1.0f / step) ? 1.0f / step : 0.0f;
  int32_t total = 0;
  for (int c = 0; c < kGroup; ++c) {
    const float q = std::nearbyint(x[c] * inverse), high = std::nearbyint(q * (1.0f / kRadix));
    codes[c] = int8_t(high), codes[kGroup + c] = int8_t(q - high * kRadix);
    total += int32_t(q);
  }
  *scale = step, *sum = step * float(total);
}

#ifdef HERD_X86
HERD_AVX2 void round_group_avx2(const float* x, int8_t* codes, float* scale, float* sum) {
  __m256 v[4];
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[i]));
  }
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  half = _mm_max_ss(half, _mm_shuffle_ps(half, half, 1));
  const float step = _mm_cvtss_f32(half) / kLargest, inverse = std::isfinite(1.0f / step) ? 1.0f / step : 0.0f;
  const __m256 times = _mm256_set1_ps(inverse), part = _mm256_set1_ps(1.0f / kRadix);
  __m256i q[4], high[4], low[4];
  for (int i = 0; i < 4; ++i) {
    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], times));
    high[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(q[i]), part));
    low[i] = _mm256_sub_epi32(q[i], _mm256_mullo_epi32(high[i], _mm256_set1_epi32(kRadix)));
  }
  const __m256i total = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
  __m128i four_sums = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  four_sums = _mm_add_epi32(four_sums, _mm_shuffle_epi32(four_sums, 0x4e));
  four_sums = _mm_add_epi32(four_sums, _mm_shuffle_epi32(four_sums, 0xb1));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (const __m256i* p : {high, low}) {
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(p[0], p[1]), _mm256_packs_epi32(p[2], p[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(words, order));
    codes += kGroup;
  }
  *scale = step, *sum = step * float(_mm_cvtsi128_si32(four_sums));
}
#endif

void round_token(Path path, const float* x, int64_t columns, RoundedBuffer& out, int64_t token) {
  const int64_t groups = columns / kGroup, first = token * groups;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = first + g;
    int8_t* codes = out.codes.data() + at * 2 * kGroup;
#ifdef HERD_X86
    if (path != kPortable) {
      round_group_avx2(x + g * kGroup, codes, &out.scales[size_t(at)], &out.sums[size_t(at)]);
      continue;
    }
#endif
    round_group_portable(x + g * kGroup, codes, &out.scales[size_t(at)], &out.sums[size_t(at)]);
  }
}

template <class F>
void parallel(Pool& pool, int64_t count, F&& f) {
  pool.run([](void* context, int64_t i, int) { (*static_cast<std::remove_reference_t<F>*>(context))(i); }, &f, count);
}

Rounded rounded(Machine& m, RoundedBuffer& out, const float* x, int64_t tokens, int64_t columns) {
  out.hold(tokens, columns);
  auto one = [&](int64_t t) { round_token(m.path, x + t * columns, columns, out, t); };
  if (tokens * columns < 1 << 15)
    for (int64_t t = 0; t < tokens; ++t) one(t);
  else
    parallel(m.pool, tokens, one);
  return out.view();
}

// --- products

void tiles(Path path, const Blocks& w, int64_t row_block, const Rounded& x, int64_t token, int count, float* y, int64_t stride) {
#ifdef HERD_X86
  if (path == kAvx2) {
    if (w.bits == 8) return tiles_avx2<8, false>(w, row_block, x, token, count, y, stride);
    if (w.has_minimum) return tiles_avx2<4, true>(w, row_block, x, token, count, y, stride);
    return tiles_avx2<4, false>(w, row_block, x, token, count, y, stride);
  }
  if (path == kVnni) {
    if (w.bits == 8) return tiles_vnni<8, false>(w, row_block, x, token, count, y, stride);
    if (w.has_minimum) return tiles_vnni<4, true>(w, row_block, x, token, count, y, stride);
    return tiles_vnni<4, false>(w, row_block, x, token, count, y, stride);
  }
#endif
  tile_portable(w, row_block, x, token, count, y, stride);
}

struct Part {  // blocks [first, last) of one matrix, for some tokens
  Blocks weight;
  Rounded x;
  float* y;  // of token 0
  int64_t stride, first, last, token, tokens;
};

struct Product {
  Path path;
  std::vector<Part> parts;
};

void multiply(void* context, int64_t index, int) {
  const Product& p = *static_cast<Product*>(context);
  const Part& part = p.parts[size_t(index)];
  // a tile of tokens stays in the first cache while it meets every block of the part, and the part stays in the second
  for (int64_t t = 0; t < part.tokens; t += kTile) {
    const int count = int(std::min<int64_t>(kTile, part.tokens - t));
    int64_t b = part.first;
    if (p.path == kVnni && count > 2)  // one or two tokens wait for memory, and the narrow path reads it faster
      for (; b + 2 <= part.last; b += 2) tiles(kVnni, part.weight, b, part.x, part.token + t, count, part.y, part.stride);
    const Path single = p.path == kVnni ? kAvx2 : p.path;
    for (; b < part.last; ++b) tiles(single, part.weight, b, part.x, part.token + t, count, part.y, part.stride);
  }
}

// Cut a matrix into parts that fill half of a second-level cache, or fewer blocks where there would be too few parts to share out.
void cut(std::vector<Part>& parts, const Blocks& w, const Rounded& x, float* y, int64_t stride, int64_t token, int64_t tokens, int threads) {
  const int64_t blocks = w.rows / kRows;
  const int64_t fitting = std::max<int64_t>(2, (int64_t(256) << 10) / w.row_bytes());
  int64_t step = std::min(fitting, std::max<int64_t>(2, blocks / (4 * threads)));
  step += step % 2;
  for (int64_t b = 0; b < blocks; b += step) parts.push_back({w, x, y, stride, b, std::min(b + step, blocks), token, tokens});
}

// Whether a buffer of a * b may be: no product or sum of a few such sizes overflows.
bool fits(int64_t a, int64_t b) {
  constexpr int64_t kMost = int64_t(1) << 40;
  return a >= 0 && b >= 0 && (a == 0 || b <= kMost / a);
}

bool is_sound(const Blocks& w) {
  return w.data && (w.bits == 4 || w.bits == 8) && (w.group == 32 || w.group == 128) && w.rows > 0 && w.columns > 0 && fits(w.rows, w.columns) &&
         w.rows % kRows == 0 && w.columns % w.group == 0 && !(w.bits == 8 && (w.has_minimum || w.group != 32));
}

#include "step.inl"

bool is_matrix(const HerdMatrix& m, int64_t rows, int64_t columns) {
  return m.rows == rows && m.columns == columns && is_sound(blocks_of(m));
}

bool is_sound(const HerdModel& m) {
  const int64_t D = m.width, H = m.heads, G = m.kv_heads, K = m.head_width;
  if (D < 1 || H < 1 || G < 1 || K < 1 || D % kGroup || K % kLanesOfHead || H % G || !fits(H, K) || m.num_layers < 0 || !m.layers)
    return false;
  for (const HerdLayer* l = m.layers; l < m.layers + m.num_layers; ++l) {
    const int64_t F = l->gate.rows, S = l->experts_gate.rows;
    if (!l->attention_norm || !l->ffn_norm || !l->keys || !l->values || !is_matrix(l->q, H * K, D) || !is_matrix(l->k, G * K, D) ||
        !is_matrix(l->v, G * K, D) || !is_matrix(l->o, D, H * K) || !is_matrix(l->gate, F, D) || !is_matrix(l->up, F, D) ||
        !is_matrix(l->down, D, F))
      return false;
    if (l->router && (m.experts_per_token < 1 || m.experts < m.experts_per_token || !is_matrix(l->experts_gate, S, D) ||
                      !is_matrix(l->experts_up, S, D) || !is_matrix(l->experts_down, D, S) || !fits(m.experts, S * D)))
      return false;
  }
  return true;
}

bool is_sound(const HerdReach& reach, const HerdStep& s) {
  if (!reach.write || !reach.read || !reach.lengths) return false;
  for (int64_t b = 0; b < s.sequences; ++b)
    if (reach.lengths[b] < s.counts[b]) return false;
  return true;
}

bool is_sound(const HerdStep& s, const HerdModel& m) {
  if (s.tokens < 1 || s.sequences < 1 || !s.counts || !s.cos || !s.sin || !s.temperature || !s.x) return false;
  int64_t tokens = 0;
  for (int64_t b = 0; b < s.sequences; ++b) {
    if (s.counts[b] < 0 || s.counts[b] > s.tokens - tokens) return false;
    tokens += s.counts[b];
  }
  if (tokens != s.tokens || !fits(s.tokens, m.width) || !fits(s.tokens, 3 * m.heads * m.head_width)) return false;
  for (const HerdLayer* l = m.layers; l < m.layers + m.num_layers; ++l) {
    if (!fits(s.tokens, l->gate.rows) || !is_sound(l->is_local ? s.local : s.full, s)) return false;
    const int64_t k = m.experts_per_token, widest = std::max(m.width, l->experts_gate.rows);
    if (l->router && (!fits(s.tokens, k) || !fits(s.tokens * k, widest))) return false;
  }
  return true;
}

}  // namespace

extern "C" {

// "portable", "avx2" or "vnni": what products run on.
const char* herd_path() {
  static const char* const names[] = {"portable", "avx2", "vnni"};
  return names[machine().path];
}

// Choose a path, for tests and comparisons; the machine must have it.
int herd_use_path(const char* name) {
  Machine& m = machine();
  std::lock_guard<std::mutex> lock(m.busy);
  for (Path path : {kPortable, kAvx2, kVnni}) {
    if (!name) break;
    static const char* const names[] = {"portable", "avx2", "vnni"};
    if (!std::strcmp(name, names[path]) && path <= best_path()) {
      m.path = path;
      return kOk;
    }
  }
  return kNoPath;
}

int herd_use_threads(int count) {
  Machine& m = machine();
  std::lock_guard<std::mutex> lock(m.busy);
  if (count < 1 || count > 1024) return kBadShape;
  try {
    if (count != m.pool.size()) m.pool.resize(count);
  } catch (const std::exception&) {  // the system makes no more threads; those that it made are used
    return kNoMemory;
  }
  return kOk;
}

// x [tokens, columns] float32 -> codes int16 and scales float32 per 32 columns.
int herd_round(const float* x, int64_t tokens, int64_t columns, int16_t* codes, float* scales) {
  if (columns <= 0 || columns % kGroup || !fits(tokens, columns)) return kBadShape;
  if (tokens == 0) return kOk;
  if (!x || !codes || !scales) return kBadShape;
  Machine& m = machine();
  std::lock_guard<std::mutex> lock(m.busy);
  try {
    RoundedBuffer buffer;
    const Rounded r = rounded(m, buffer, x, tokens, columns);
    for (int64_t i = 0; i < tokens * columns; ++i) {
      const int8_t* group = r.codes + i / kGroup * 2 * kGroup + i % kGroup;
      codes[i] = int16_t(kRadix * group[0] + group[kGroup]);
    }
    std::memcpy(scales, r.scales, size_t(tokens * columns / kGroup) * sizeof(float));
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

// x [R, columns] float32, sorted by matrix; counts [num] rows of x for each of `num` matrices [rows, columns] end to end in `data`;
// y [R, rows] float32. A plain product has num = 1.
int herd_product(const uint8_t* data, int64_t num, int64_t rows, int64_t columns, int group, int bits, int has_minimum, const float* x,
                 const int64_t* counts, float* y) {
  Blocks w{data, rows, columns, group, bits, has_minimum != 0};
  if (!is_sound(w) || num < 1 || !fits(num, rows * columns) || !counts) return kBadShape;
  Machine& m = machine();
  std::lock_guard<std::mutex> lock(m.busy);
  try {
    int64_t total = 0;
    for (int64_t e = 0; e < num; ++e) {
      if (counts[e] < 0 || !fits(counts[e], std::max(rows, columns))) return kBadShape;
      total += counts[e];
      if (!fits(total, std::max(rows, columns))) return kBadShape;
    }
    if (total == 0) return kOk;
    if (!x || !y) return kBadShape;
    const Rounded r = rounded(m, m.inputs, x, total, columns);
    Product job{m.path, {}};
    int64_t token = 0;
    for (int64_t e = 0; e < num; ++e, w.data += rows / kRows * w.row_bytes()) {
      if (counts[e] > 0) cut(job.parts, w, r, y, rows, token, counts[e], m.pool.size());
      token += counts[e];
    }
    m.pool.run(multiply, &job, int64_t(job.parts.size()));
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

// All layers for one step. The tables must stay as they are during the call.
int herd_step(const HerdModel* model, const HerdStep* step) {
  if (!model || !step || !is_sound(*model) || !is_sound(*step, *model)) return kBadShape;
  Machine& m = machine();
  std::lock_guard<std::mutex> lock(m.busy);
  try {
    Step(m, *model, *step).run();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

// logits [count] float32 -> a token. Takes no lock and no thread of the pool.
int herd_sample(const float* logits, int64_t count, const HerdDraw* draw, int64_t* token) {
  if (!logits || !draw || !token || count < 1 || count > int64_t(1) << (63 - kWeightBits) || draw->top_k < 0 || draw->least < 0 ||
      draw->least > int64_t(1) << kWeightBits || !(draw->scale > 0) || !(draw->top_p >= 0 && draw->top_p <= 1) ||
      !(draw->point >= 0 && draw->point < 1))
    return kBadShape;
  try {
#ifdef HERD_X86
    if (machine().path != kPortable) return avx2::sample(logits, count, *draw, token);
#endif
    return portable::sample(logits, count, *draw, token);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // extern "C"
