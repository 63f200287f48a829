// The C interface of herd's native kernels: plain buffers in, plain buffers out, 0 or an error code back. Called through ctypes.
//
// Every function may be called from any thread; calls run one after another, first come, first served, each on all threads of the pool.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "blocks.h"
#include "pool.h"

namespace {

using namespace herd;

enum Path { kPortable, kAvx2, kAvxVnni, kVnni };  // the later the better
constexpr const char* kPathNames[] = {"portable", "avx2", "avxvnni", "vnni"};
constexpr int64_t kKeys = 32;               // keys of a block of attention
constexpr int64_t kHeadStep = 16;           // a head is a multiple of this wide
constexpr int64_t kFewRows = 8;             // queries that read values as they lie
constexpr int64_t kQueries = 32;            // neighbouring tokens of a sequence that attend together
constexpr int64_t kSpan = 256;             // keys that are summed up by themselves before spans are joined
constexpr int64_t kSpanBytes = 32 << 20;    // of the sums of spans that wait to be joined
constexpr int64_t kMostHeadWidth = 512;
constexpr int64_t kMostQueriesPerKey = 64;  // query heads of one key/value head

enum KvKind { kFloat32, kBfloat16, kInt8, kFloat16 };

constexpr int64_t kv_bytes(int kind) { return kind == kFloat32 ? 4 : kind == kInt8 ? 1 : 2; }  // of one number

struct HerdPages {  // keys and values of one layer
  void *keys, *values;                // [P, G, S, K]
  float *key_scales, *value_scales;   // [P, G, S] of int8
  int64_t kv_heads, page_tokens;      // G, S
  int32_t kind, reserved;
};

struct SoftmaxRow {
  float most = -INFINITY;
  float totals[8] = {};
};

enum Error { kOk = 0, kBadShape = 1, kNoMemory = 2, kNoPath = 3, kNotNumbers = 4 };

constexpr int kWeightBits = 42;  // of the likeliest token, when one is drawn

struct HerdDraw {  // all but the logits
  double scale, top_p, point;
  int64_t top_k, least;
};

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors of 8 floats never leave this file
#define HERD_TARGET
namespace portable {
#include "layer.inl"
#include "sample.inl"
}
#undef HERD_TARGET
#ifdef HERD_X86
#define HERD_TARGET HERD_AVX2
#define HERD_FMA
namespace avx2 {
#include "layer.inl"
#include "sample.inl"
}
#undef HERD_TARGET
#undef HERD_FMA
#endif

bool has(Path path) {
  if (path == kPortable) return true;
#ifdef HERD_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return false;
  if (path == kAvx2) return true;
  const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#if defined(HERD_AVXVNNI_AS_AVX512)
  return vnni;
#else
  if (path == kVnni) return vnni;
#ifdef HERD_AVXVNNI
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 16);  // bit 4: AVX-VNNI
#endif
#endif
#endif
  return false;
}

Path best_path() {
  for (Path path : {kVnni, kAvxVnni, kAvx2})
    if (has(path)) return path;
  return kPortable;
}

int64_t tiles_of(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

struct RoundedBuffer {  // room for rounded activations
  std::vector<int8_t> codes;
  std::vector<float> scales, sums;
  std::vector<int32_t> totals;
  int parts = 2;

  void hold(int64_t tokens, int64_t columns, int new_parts) {
    const size_t size = size_t(tiles_of(tokens) * kTile * columns);
    parts = new_parts;
    if (codes.size() < size * size_t(parts)) codes.resize(size * size_t(parts));
    if (scales.size() < size / kGroup) scales.resize(size / kGroup), sums.resize(size / kGroup), totals.resize(size / kGroup);
  }

  Rounded view() const { return {codes.data(), scales.data(), sums.data(), totals.data(), parts}; }
};

struct Machine {
  Turns busy;
  std::atomic<Path> path{best_path()};  // read without the lock
  Pool pool;
  RoundedBuffer inputs, hidden, routed;
  std::vector<float> floats;
  std::vector<std::vector<float>> scratch;  // of each worker

  void hold_scratch(int64_t size) {
    scratch.resize(size_t(pool.size()));
    for (auto& own : scratch)
      if (own.size() < size_t(size)) own.resize(size_t(size));
  }
};

Machine& machine() {
  static Machine* made = new Machine;  // never destroyed: threads must not be joined while the process ends
  return *made;
}

// --- rounding of activations: 32 of one token, into its place in a tile

struct Place {
  int8_t* codes;  // the second part lies kTile * kGroup further
  float *scale, *sum;
  int32_t* total;
};

// What is not finite makes the scale NaN, and so every sum that it enters: it must not look like a number further on.
void round_group_portable(const float* x, int parts, const Place& out) {
  float largest = 0, nothing = 0;
  for (int c = 0; c < kGroup; ++c) largest = std::max(largest, std::fabs(x[c])), nothing += x[c] * 0.0f;
  const float step = largest / float(kLargest[parts]) + nothing, inverse = std::isfinite(1.0f / step) ? 1.0f / step : 0.0f;
  int32_t total = 0;
  for (int c = 0; c < kGroup; ++c) {
    const float q = std::isnan(step) ? 0.0f : std::nearbyint(x[c] * inverse), high = std::nearbyint(q * (1.0f / kRadix));
    out.codes[c] = int8_t(parts == 1 ? q : high);
    if (parts == 2) out.codes[kTile * kGroup + c] = int8_t(q - high * kRadix);
    total += int32_t(q);
  }
  *out.scale = step, *out.total = total, *out.sum = step * float(total);
}

#ifdef HERD_X86
HERD_AVX2 void round_group_avx2(const float* x, int parts, const Place& out) {
  __m256 v[4];
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps(), nothing = most;
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[i]));
    nothing = _mm256_fmadd_ps(v[i], _mm256_setzero_ps(), nothing);
  }
  const bool is_finite = _mm256_movemask_ps(_mm256_cmp_ps(nothing, nothing, _CMP_UNORD_Q)) == 0;
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  half = _mm_max_ss(half, _mm_shuffle_ps(half, half, 1));
  const float step = is_finite ? _mm_cvtss_f32(half) / float(kLargest[parts]) : NAN, inverse = std::isfinite(1.0f / step) ? 1.0f / step : 0.0f;
  const __m256 times = _mm256_set1_ps(inverse), part = _mm256_set1_ps(1.0f / kRadix);
  __m256i q[4], high[4], low[4];
  for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], times));
  const __m256i total = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
  __m128i four_sums = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  four_sums = _mm_add_epi32(four_sums, _mm_shuffle_epi32(four_sums, 0x4e));
  four_sums = _mm_add_epi32(four_sums, _mm_shuffle_epi32(four_sums, 0xb1));
  for (int i = 0; parts == 2 && i < 4; ++i) {
    high[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(q[i]), part));
    low[i] = _mm256_sub_epi32(q[i], _mm256_mullo_epi32(high[i], _mm256_set1_epi32(kRadix)));
  }
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int p = 0; p < parts; ++p) {
    const __m256i* from = parts == 1 ? q : p == 0 ? high : low;
    const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(from[0], from[1]), _mm256_packs_epi32(from[2], from[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.codes + p * kTile * kGroup), _mm256_permutevar8x32_epi32(words, order));
  }
  *out.total = _mm_cvtsi128_si32(four_sums);
  *out.scale = step, *out.sum = step * float(*out.total);
}
#endif

void round_token(Path path, const float* x, int64_t columns, RoundedBuffer& out, int64_t token) {
  const int64_t groups = columns / kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t group = token / kTile * groups + g, at = group * kTile + token % kTile;
    const Place place{out.codes.data() + (group * out.parts * kTile + token % kTile) * kGroup, &out.scales[size_t(at)],
                      &out.sums[size_t(at)], &out.totals[size_t(at)]};
#ifdef HERD_X86
    if (path != kPortable) {
      round_group_avx2(x + g * kGroup, out.parts, place);
      continue;
    }
#endif
    round_group_portable(x + g * kGroup, out.parts, place);
  }
}

template <class F>
void parallel(Pool& pool, int64_t count, F&& f) {
  pool.run([](void* context, int64_t i, int worker) { (*static_cast<std::remove_reference_t<F>*>(context))(i, worker); }, &f, count);
}

// --- products

// A tile of `count` tokens with `blocks` blocks of rows from `row_block` on, 1 or 2.
using Tiles = void (*)(const Blocks& w, int64_t row_block, const Rounded& x, int count, float* y, int64_t stride);

template <int Parts>
Tiles tiles_for(Path path, const Blocks& w, bool is_wide) {
#ifdef HERD_X86
#define HERD_KINDS(f) (w.bits == 8 ? f(8, false) : w.has_minimum ? f(4, true) : f(4, false))
#define HERD_TILES(bits, minimum) tiles_avx2<bits, minimum, Parts>
  if (path == kAvx2) return HERD_KINDS(HERD_TILES);
#undef HERD_TILES
#ifdef HERD_AVXVNNI
#define HERD_TILES(bits, minimum) avxvnni::tiles<avxvnni::Narrow, bits, minimum, Parts>
  if (path == kAvxVnni) return HERD_KINDS(HERD_TILES);
#undef HERD_TILES
#endif
#define HERD_TILES(bits, minimum) (is_wide ? vnni::tiles<vnni::Wide, bits, minimum, Parts> : vnni::tiles<vnni::Narrow, bits, minimum, Parts>)
  if (path == kVnni) return HERD_KINDS(HERD_TILES);
#undef HERD_TILES
#undef HERD_KINDS
#endif
  (void)path, (void)w, (void)is_wide;
  return tile_portable;
}

struct Part {  // blocks [first, last) of one matrix, for some tokens
  Blocks weight;
  Rounded x;  // of the first token, which starts a tile
  float* y;   // likewise
  int64_t stride, first, last, tokens;
};

constexpr int64_t kFetch = 384 << 10;  // most bytes of a matrix that a waiting thread fetches: its second cache must still hold them when they are wanted
constexpr int kFew = 2;  // so many tokens wait for memory, not for arithmetic

struct Product {  // of several matrices
  Path path;
  int threads;
  std::vector<Part> parts = {};

  // Few tokens: one long part for each thread, which reads on where it was. Many: parts that fill a quarter of a second-level cache, where
  // they meet tile after tile, and enough of them that no thread waits long.
  void add(const Blocks& w, const Rounded& x, float* y, int64_t stride, int64_t tokens) {
    const int64_t blocks = w.rows / kRows, step = part_of(w, tokens, threads);
    for (int64_t b = 0; b < blocks; b += step) parts.push_back({w, x, y, stride, b, std::min(b + step, blocks), tokens});
  }

  static int64_t part_of(const Blocks& w, int64_t tokens, int threads) {
    const int64_t blocks = w.rows / kRows;
    const int64_t most = (int64_t(tokens > kFew ? 256 : 4096) << 10) / w.row_bytes();
    int64_t step = std::max<int64_t>(2, std::min(most, blocks / (tokens > kFew ? 4 * threads : threads)));
    return step + step % 2;
  }
};

void multiply(void* context, int64_t index, int) {
  const Product& p = *static_cast<Product*>(context);
  const Part& part = p.parts[size_t(index)];
  const auto choose = part.x.parts == 1 ? tiles_for<1> : tiles_for<2>;
  const Tiles narrow = choose(p.path, part.weight, false), wide = choose(p.path, part.weight, true);
  // a tile of tokens stays in the first cache while it meets every block of the part, and the part stays in the second
  for (int64_t t = 0; t < part.tokens; t += kTile) {
    const Rounded x = part.x.tile(t / kTile, part.weight.columns);
    const int count = int(std::min<int64_t>(kTile, part.tokens - t));
    float* y = part.y + t * part.stride;
    int64_t b = part.first;
    if (p.path == kVnni && (count > kFew || part.x.parts == 2))  // what waits for memory alone reads it best in narrow registers
      for (; b + 2 <= part.last; b += 2) wide(part.weight, b, x, count, y, part.stride);
    for (; b < part.last; ++b) narrow(part.weight, b, x, count, y, part.stride);
  }
}

void compute(Product& job, Pool& pool) {
  pool.run(multiply, &job, int64_t(job.parts.size()));
  job.parts.clear();
}

// One row of a matrix as floats: an embedding.
void embed(const Blocks& w, int64_t row, float* out) {
  const int64_t r = row % kRows;
  const uint8_t* block = w.data + row / kRows * w.row_bytes();
  for (int64_t column = 0; column < w.columns; block += w.block_bytes()) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(block + w.codes_bytes());
    const float scale = half_to_float(halves[r]), minimum = w.has_minimum ? half_to_float(halves[kRows + r]) : 0.0f;
    for (int c = 0; c < w.group; ++c, ++column) {
      if (w.bits == 8) {
        out[column] = float(int8_t(block[c / 4 * 32 + r * 4 + c % 4])) * scale;
      } else {
        const uint8_t byte = block[c / 8 * 32 + r * 4 + c % 4];
        const float code = float((c % 8 < 4 ? byte & 15 : byte >> 4) - (w.has_minimum ? 0 : 8));
        out[column] = w.has_minimum ? code * scale + minimum : code * scale;
      }
    }
  }
}

#include "step.inl"

#include "limits.inl"

#include "sound.inl"

}  // namespace

extern "C" {

// One of kPathNames: what products run on.
const char* herd_path() { return kPathNames[machine().path]; }

// Choose a path, for tests and comparisons; the machine must have it.
int herd_use_path(const char* name) {
  Machine& m = machine();
  std::lock_guard<Turns> lock(m.busy);
  for (Path path : {kPortable, kAvx2, kAvxVnni, kVnni})
    if (name && !std::strcmp(name, kPathNames[path]) && has(path)) {
      m.path = path;
      return kOk;
    }
  return kNoPath;
}

int herd_use_threads(int count) {
  Machine& m = machine();
  std::lock_guard<Turns> lock(m.busy);
  if (count < 1 || count > 1024) return kBadShape;
  try {
    if (count != m.pool.size()) m.pool.resize(count);
  } catch (const std::exception&) {  // the system makes no more threads; those that it made are used
    return kNoMemory;
  }
  return kOk;
}

// x [tokens, columns] float32 -> codes int16 and scales float32 per 32 columns.
int herd_round(const float* x, int64_t tokens, int64_t columns, int parts, int16_t* codes, float* scales) {
  if (columns <= 0 || columns % kGroup || !fits(tokens, columns) || parts < 1 || parts > 2) return kBadShape;
  if (tokens == 0) return kOk;
  if (!x || !codes || !scales) return kBadShape;
  Machine& m = machine();
  std::lock_guard<Turns> lock(m.busy);
  try {
    RoundedBuffer r;
    r.hold(tokens, columns, parts);
    for (int64_t t = 0; t < tokens; ++t) {
      round_token(m.path, x + t * columns, columns, r, t);
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t group = t / kTile * (columns / kGroup) + c / kGroup;
        const int8_t* code = r.codes.data() + (group * parts * kTile + t % kTile) * kGroup + c % kGroup;
        codes[t * columns + c] = int16_t(parts == 1 ? code[0] : kRadix * code[0] + code[kTile * kGroup]);
        scales[(t * columns + c) / kGroup] = r.scales[size_t(group * kTile + t % kTile)];
      }
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

// x [R, columns] float32, sorted by matrix, rounded to 8 bits (parts 1) or 16 (parts 2); counts [num] rows of x for each of `num` matrices
// [rows, columns] end to end in `data`; y [R, rows] float32. A plain product has num = 1.
int herd_product(const uint8_t* data, int64_t num, int64_t rows, int64_t columns, int group, int bits, int has_minimum, int parts,
                 const float* x, const int64_t* counts, float* y) {
  Blocks w{data, rows, columns, group, bits, has_minimum != 0};
  if (!is_sound(w) || num < 1 || !fits(num, rows * columns) || !counts || parts < 1 || parts > 2) return kBadShape;
  Machine& m = machine();
  std::lock_guard<Turns> lock(m.busy);
  try {
    int64_t total = 0, tiles = 0;
    for (int64_t e = 0; e < num; ++e) {
      if (counts[e] < 0 || !fits(counts[e], std::max(rows, columns))) return kBadShape;
      total += counts[e], tiles += tiles_of(counts[e]);
      if (!fits(tiles * kTile, std::max(rows, columns))) return kBadShape;
    }
    if (total == 0) return kOk;
    if (!x || !y) return kBadShape;
    std::vector<int64_t> padded;  // where each row lies when every matrix's rows start a tile
    for (int64_t e = 0, start = 0; e < num; start += tiles_of(counts[e]) * kTile, ++e)
      for (int64_t i = 0; i < counts[e]; ++i) padded.push_back(start + i);
    m.inputs.hold(tiles * kTile, columns, parts);
    auto round = [&](int64_t i, int) { round_token(m.path, x + i * columns, columns, m.inputs, padded[size_t(i)]); };
    parallel(m.pool, total, round);
    Product job{m.path, m.pool.size()};
    int64_t tile = 0;
    for (int64_t e = 0; e < num; w.data += rows / kRows * w.row_bytes(), ++e) {
      if (counts[e] > 0) job.add(w, m.inputs.view().tile(tile, columns), y, rows, counts[e]);
      tile += tiles_of(counts[e]), y += counts[e] * rows;
    }
    compute(job, m.pool);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

// All layers for one step. The tables must stay as they are during the call.
int herd_step(const HerdModel* model, const HerdStep* step) {
  if (!model || !step || !is_sound(*model) || !is_sound(*step, *model)) return kBadShape;
  Machine& m = machine();
  std::lock_guard<Turns> lock(m.busy);
  try {
    Step(m, *model, *step).run();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

// Read `bytes` of `data` once, with all threads; the caller holds the watch.
int herd_read(const uint8_t* data, int64_t bytes) {
  Machine& m = machine();
  std::lock_guard<Turns> lock(m.busy);
  std::atomic<uint64_t> all{0};
  parallel(m.pool, (bytes + kReadPart - 1) / kReadPart, [&](int64_t part, int) {
    const int64_t start = part * kReadPart, count = std::min(kReadPart, bytes - start);
    uint64_t sum = 0;
#ifdef HERD_X86
    if (m.path != kPortable) read_avx2(data + start, count, &sum);
    else read_portable(data + start, count, &sum);
#else
    read_portable(data + start, count, &sum);
#endif
    all ^= sum;
  });
  return kOk;
}

// Multiply and add bytes in registers, with all threads; how many operations that were.
double herd_peak() {
  Machine& m = machine();
  std::lock_guard<Turns> lock(m.busy);
  std::vector<double> each(size_t(4 * m.pool.size()));
  parallel(m.pool, int64_t(each.size()), [&](int64_t i, int) { each[size_t(i)] = peak(m.path) * double(kPeakRounds); });
  double total = 0;
  for (double operations : each) total += operations;
  return total;
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

// -inf for each of the logits [count] whose bit is 0. Takes no lock and no thread of the pool.
int herd_mask(float* logits, int64_t count, const uint32_t* bits) {
  if (!logits || !bits || count < 1) return kBadShape;
#ifdef HERD_X86
  if (machine().path != kPortable) {
    avx2::mask(logits, count, bits);
    return kOk;
  }
#endif
  portable::mask(logits, count, bits);
  return kOk;
}

}  // extern "C"
