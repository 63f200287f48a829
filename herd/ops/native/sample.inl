// From logits to a token: `herd/ops/sample.py` is the definition, and says why weights are whole numbers.
//
// Included once per instruction set, as layer.inl is. One pass finds the largest logit of every block of 64, a second one the weight of every
// block that can matter. In the order of ids that is enough. Else the likeliest tokens are gathered, and only if top_p wants more than
// those a third pass adds weights up in a histogram of distances from the largest logit; a place in the descending order is then found in
// one bucket of it. Nothing is sorted, only parted. Blocks far below the top are at first only bounded: a token that is the same for the
// least and the most that they can weigh is the token. Sums of whole numbers have no order, and every product that is added to something
// is a fused one, so that a token does not depend on the instruction set.

constexpr int64_t kSpan = 64;              // logits of a block
constexpr int kPerOctave = 64;             // buckets per halving of the weight
constexpr int kBuckets = 44 * kPerOctave;  // beyond them weights are 0

struct Token {
  uint64_t order;  // ascending: the largest logit first, the lowest id first among equals
  int64_t weight;
};

struct Lot {  // one drawing; the buffers stay with the thread
  const float* logits;
  int64_t count, blocks;
  float most, pace;  // pace: buckets per unit of logit
  double scale;
  int last;                           // blocks that do not reach this bucket are not weighed
  int64_t total, kept;                // mass of all that was weighed, and of the weights there that min_p keeps
  int64_t rest;                       // the most that the others can weigh
  bool is_gathered;                   // whether `tokens` hold the likeliest of all, or one bucket
  float tail[kSpan];                  // the last block, filled up with -inf
  std::vector<float> maxima, ranked;  // the largest logit of every block; the same, parted
  std::vector<int64_t> sums;          // what min_p keeps of every block
  std::vector<uint16_t> places;       // bucket of every logit
  std::vector<int64_t> mass;          // of every bucket
  std::vector<Token> tokens;

  const float* block(int64_t i) const { return (i + 1) * kSpan <= count ? logits + i * kSpan : tail; }
};

inline bool is_likelier(const Token& a, const Token& b) { return a.order < b.order; }

inline uint64_t order_of(float logit, int64_t id) {
  const float x = logit + 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint64_t(bits >> 31 ? bits : ~bits & 0x7fffffff) << 32 | uint64_t(id);
}

// How often the weight is halved from the largest logit to this one, negative; below -64 it is all the same.
HERD_TARGET inline double octaves(float logit, double most, double scale) {
  const double y = (double(logit) - most) * scale;
  return y > -64.0 ? y : -64.0;
}

// round(2^(kWeightBits + y)) for y in -64 .. 0, the power to 4e-14 of itself, which is a sixth of the rounding.
HERD_TARGET inline int64_t weight_of(double y) {
  constexpr double kRound = 6755399441055744.0, kWhole = 4503599627370496.0;  // 1.5 * 2^52 and 2^52
  const double shifted = y + kRound, f = y - (shifted - kRound);
  double p = 1.0203121063391729e-07;  // 2^f on [-1/2, 1/2], interpolated at Chebyshev's nodes
  p = __builtin_fma(p, f, 1.3255224878668817e-06);
  p = __builtin_fma(p, f, 1.525268684626772e-05);
  p = __builtin_fma(p, f, 0.00015403455852453838);
  p = __builtin_fma(p, f, 0.0013333558179043112);
  p = __builtin_fma(p, f, 0.009618129159402558);
  p = __builtin_fma(p, f, 0.055504108664760424);
  p = __builtin_fma(p, f, 0.2402265069581299);
  p = __builtin_fma(p, f, 0.6931471805599453);
  p = __builtin_fma(p, f, 1.0);
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits << 52) + (uint64_t(1023 + kWeightBits) << 52);
  double power;
  std::memcpy(&power, &bits, 8);
  const double whole = __builtin_fma(p, power, kWhole);
  std::memcpy(&bits, &whole, 8);
  return int64_t(bits & 0xfffffffffffff);
}

HERD_TARGET inline int bucket_of(const Lot& lot, float logit) {
  const float away = (lot.most - logit) * lot.pace;
  return int(away < float(kBuckets) ? away : float(kBuckets));
}

// The largest logit of every block, and of all; false where one is NaN or +inf, or all are -inf.
HERD_TARGET inline bool find_most(Lot& lot) {
  lot.blocks = (lot.count + kSpan - 1) / kSpan;
  lot.maxima.resize(size_t(lot.blocks));
  if (const int64_t rest = lot.count % kSpan) {
    std::copy(lot.logits + lot.count - rest, lot.logits + lot.count, lot.tail);
    std::fill(lot.tail + rest, lot.tail + kSpan, -INFINITY);
  }
  lot.most = -INFINITY;
  int odd = 0;
  for (int64_t b = 0; b < lot.blocks; ++b) {
    const float* x = lot.block(b);
    float half[kSpan / 2];
    for (int i = 0; i < kSpan; ++i) odd |= !(x[i] < INFINITY);
    for (int i = 0; i < kSpan / 2; ++i) half[i] = x[i] > x[i + kSpan / 2] ? x[i] : x[i + kSpan / 2];
    for (int i = 0; i < kSpan / 4; ++i) half[i] = half[i] > half[i + kSpan / 4] ? half[i] : half[i + kSpan / 4];
    for (int i = 0; i < kSpan / 8; ++i) half[i] = half[i] > half[i + kSpan / 8] ? half[i] : half[i + kSpan / 8];
    for (int i = 1; i < kSpan / 8; ++i) half[0] = half[i] > half[0] ? half[i] : half[0];
    lot.maxima[size_t(b)] = half[0];
    lot.most = half[0] > lot.most ? half[0] : lot.most;
  }
  return !odd && lot.most > -INFINITY;
}

HERD_TARGET inline void weigh_block(const float* x, double most, double scale, int64_t* weights) {
  double away[kSpan];
  for (int i = 0; i < kSpan; ++i) away[i] = octaves(x[i], most, scale);  // a loop of its own, so that a compiler makes vectors of both
  for (int i = 0; i < kSpan; ++i) weights[i] = weight_of(away[i]);
}

// Weighs every block that reaches `lot.last`.
HERD_TARGET inline void weigh(Lot& lot, int64_t least) {
  lot.sums.resize(size_t(lot.blocks));
  lot.total = lot.kept = lot.rest = 0;
  int64_t weights[kSpan];
  for (int64_t b = 0; b < lot.blocks; ++b) {
    const float most = lot.maxima[size_t(b)];
    int64_t all = 0, kept = 0;
    if (bucket_of(lot, most) <= lot.last) {
      weigh_block(lot.block(b), lot.most, lot.scale, weights);
      for (int i = 0; i < kSpan; ++i) all += weights[i], kept += weights[i] >= least ? weights[i] : 0;
    } else if (lot.last < kBuckets - 1) {
      lot.rest += kSpan * (weight_of(octaves(most, lot.most, lot.scale)) + 1);
    }
    lot.total += all, lot.kept += kept, lot.sums[size_t(b)] = kept;
  }
}

// The histogram of all weights.
HERD_TARGET inline void spread(Lot& lot, int64_t least) {
  lot.places.resize(size_t(lot.blocks * kSpan));
  lot.mass.assign(kBuckets + 1, 0);
  lot.last = kBuckets - 1, lot.total = lot.kept = lot.rest = 0;
  int64_t* mass = lot.mass.data();
  int64_t kept = 0, weights[kSpan];
  const float most = lot.most, pace = lot.pace;
  for (int64_t b = 0; b < lot.blocks; ++b) {
    if (bucket_of(lot, lot.maxima[size_t(b)]) > lot.last) continue;
    const float* x = lot.block(b);
    uint16_t* place = lot.places.data() + b * kSpan;
    weigh_block(x, most, lot.scale, weights);
    for (int i = 0; i < kSpan; ++i) {
      const float steps = (most - x[i]) * pace;
      place[i] = uint16_t(int(steps < float(kBuckets) ? steps : float(kBuckets)));
    }
    for (int i = 0; i < kSpan; ++i) kept += weights[i] >= least ? weights[i] : 0;
    for (int i = 0; i < kSpan; ++i) mass[place[i]] += weights[i];
  }
  lot.kept = kept;
  for (int64_t one : lot.mass) lot.total += one;
}

// The tokens of one bucket.
HERD_TARGET inline void gather(Lot& lot, uint16_t bucket) {
  lot.tokens.clear();
  for (int64_t b = 0; b < lot.blocks; ++b) {
    if (bucket_of(lot, lot.maxima[size_t(b)]) > bucket) continue;
    const float* x = lot.block(b);
    const uint16_t* place = lot.places.data() + b * kSpan;
    uint16_t same = 0;
    for (int i = 0; i < kSpan; ++i) same += place[i] == bucket;
    for (int i = 0; same && i < kSpan; ++i)
      if (place[i] == bucket) {
        --same;
        if (b * kSpan + i < lot.count) lot.tokens.push_back({order_of(x[i], b * kSpan + i), weight_of(octaves(x[i], lot.most, lot.scale))});
      }
  }
}

// The k likeliest tokens. The k-th largest of the blocks' maxima is no larger than the k-th largest logit.
HERD_TARGET inline void gather_top(Lot& lot, int64_t k) {
  float threshold = -INFINITY;
  if (k <= lot.blocks) {
    lot.ranked = lot.maxima;
    std::nth_element(lot.ranked.begin(), lot.ranked.begin() + k - 1, lot.ranked.end(), std::greater<float>());
    threshold = lot.ranked[size_t(k - 1)];
  }
  lot.tokens.clear();
  for (int64_t b = 0; b < lot.blocks; ++b) {
    if (lot.maxima[size_t(b)] < threshold) continue;
    const float* x = lot.block(b);
    for (int64_t i = b * kSpan; i < std::min(lot.count, (b + 1) * kSpan); ++i)
      if (x[i % kSpan] >= threshold) lot.tokens.push_back({order_of(x[i % kSpan], i), 0});
  }
  std::nth_element(lot.tokens.begin(), lot.tokens.begin() + k - 1, lot.tokens.end(), is_likelier);
  lot.tokens.resize(size_t(k));
  for (Token& token : lot.tokens) token.weight = weight_of(octaves(lot.logits[uint32_t(token.order)], lot.most, lot.scale));
}

struct Range {
  int64_t low, high;
};

// The token at `target` in the mass of all, the likeliest first, and the mass of those before it; false if it is not the same one for
// the whole range.
HERD_TARGET inline bool locate(Lot& lot, Range target, Token& found, int64_t& before) {
  before = 0;
  if (!lot.is_gathered) {
    uint16_t bucket = 0;
    while (before + lot.mass[bucket] <= target.low) before += lot.mass[bucket++];
    gather(lot, bucket);
  }
  auto first = lot.tokens.begin(), last = lot.tokens.end();
  while (last - first > 1) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, is_likelier);
    int64_t half = 0;
    for (auto token = first; token != middle; ++token) half += token->weight;
    if (target.low < before + half) last = middle;
    else before += half, first = middle;
  }
  found = *first;
  return target.high < before + found.weight;
}

HERD_TARGET inline int64_t share(double part, int64_t mass) { return std::min(int64_t(part * double(mass)), mass - 1); }

// The token, the likeliest first; false if what was not weighed or not gathered decides.
HERD_TARGET inline bool draw_descending(Lot& lot, const HerdDraw& draw, int64_t* drawn) {
  Range kept{lot.kept, lot.kept + lot.rest};
  Token token;
  int64_t before;
  if (draw.top_p < 1) {
    Range last{lot.total, lot.total + lot.rest};
    for (int64_t* end : {&last.low, &last.high}) *end = std::max<int64_t>(int64_t(std::ceil(draw.top_p * double(*end))), 1) - 1;
    if (!locate(lot, last, token, before)) return false;
    kept = {std::min(kept.low, before + token.weight), std::min(kept.high, before + token.weight)};
  }
  if (!locate(lot, {share(draw.point, kept.low), share(draw.point, kept.high)}, token, before)) return false;
  *drawn = int64_t(uint32_t(token.order));
  return true;
}

// The token in the order of ids, after `weigh`.
HERD_TARGET inline int64_t draw_by_id(const Lot& lot, const HerdDraw& draw) {
  int64_t target = share(draw.point, lot.kept), b = 0, weights[kSpan];
  while (lot.sums[size_t(b)] <= target) target -= lot.sums[size_t(b++)];
  weigh_block(lot.block(b), lot.most, lot.scale, weights);
  for (int64_t i = 0;; ++i) {
    const int64_t kept = weights[i] >= draw.least ? weights[i] : 0;
    if (target < kept) return b * kSpan + i;
    target -= kept;
  }
}

// 0, or an error where no token can be drawn.
HERD_TARGET inline int sample(const float* logits, int64_t count, const HerdDraw& draw, int64_t* drawn) {
  constexpr double kAside = 10;         // what is not weighed at first is less than 2^-10 of the likeliest token
  constexpr int64_t kCandidates = 256;  // that top_p is tried with
  static thread_local Lot lot;
  lot.logits = logits, lot.count = count;
  if (!find_most(lot)) return kNotNumbers;
  if (std::isinf(draw.scale)) {
    const int64_t b = std::find(lot.maxima.begin(), lot.maxima.end(), lot.most) - lot.maxima.begin();
    const float* x = lot.block(b);
    *drawn = b * kSpan + (std::find(x, x + kSpan, lot.most) - x);
    return kOk;
  }
  lot.scale = draw.scale, lot.pace = float(std::min(draw.scale * kPerOctave, 1e30));
  lot.is_gathered = true;
  if (draw.top_k && draw.top_k < count) {
    gather_top(lot, draw.top_k);
    lot.total = lot.kept = lot.rest = 0;
    for (const Token& token : lot.tokens) lot.total += token.weight, lot.kept += token.weight >= draw.least ? token.weight : 0;
    draw_descending(lot, draw, drawn);
    return kOk;
  }
  const bool is_by_id = draw.top_p >= 1;
  const double least = std::max(double(draw.least) - 0.5, 0.0);  // it rounds to what min_p keeps
  const double needed = is_by_id ? kWeightBits - std::log2(least) : kAside + std::log2(double(count));  // octaves, or inf
  lot.last = std::min(kBuckets - 1, int(std::min(needed, 64.0) * kPerOctave) + 1);
  weigh(lot, draw.least);
  if (is_by_id) {
    *drawn = draw_by_id(lot, draw);
    return kOk;
  }
  gather_top(lot, std::min(count, kCandidates));
  if (!draw_descending(lot, draw, drawn)) {
    spread(lot, draw.least);
    lot.is_gathered = false;
    draw_descending(lot, draw, drawn);
  }
  return kOk;
}

// -inf where a token's bit is 0. Most words of 32 tokens are all allowed or all not.
HERD_TARGET inline void mask(float* logits, int64_t count, const uint32_t* bits) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; i += 32) {
    const uint32_t word = bits[i / 32];
    if (word == ~uint32_t(0)) continue;
    float* x = logits + i;
    const int64_t n = std::min<int64_t>(32, count - i);
    if (n == 32)
      for (uint32_t j = 0; j < 32; ++j) x[j] = word >> j & 1 ? x[j] : kNever;
    else
      for (uint32_t j = 0; j < n; ++j) x[j] = word >> j & 1 ? x[j] : kNever;
  }
}
