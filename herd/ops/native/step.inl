// All layers of a model in one call, for the tokens of one step: what `herd/model/llama4.py` says, over blocks and pages.
//
// For a small model the interpreter costs more than the arithmetic. Python builds a table of pointers once and hands over a step's tokens;
// the order of the work is that of `Block.forward`, and the two are held equal by a test.

struct HerdMatrix {
  const uint8_t* data;  // blocks; null for none
  int64_t rows, columns;
  int32_t group, bits, has_minimum, reserved;
};

struct HerdLayer {
  const float *attention_norm, *ffn_norm;  // [D]
  HerdMatrix q, k, v, o;
  HerdMatrix gate, up, down;                          // the dense feed-forward, or the shared expert
  HerdMatrix experts_gate, experts_up, experts_down;  // of one expert; the others follow it
  const float* router;                                // [E, D]; null in a dense layer
  HerdPages pages;
  int64_t is_local;
};

struct HerdFile;

struct HerdModel {
  int64_t width, heads, kv_heads, head_width, experts, experts_per_token, num_layers;
  int32_t activation_parts;    // 1: products round their activations to 8 bits, 2: to 16
  float norm_eps, qk_norm_eps;  // qk_norm_eps 0: no norm
  int32_t reserved;
  const double* frequencies;    // [K/2] radians per token
  double temperature_scale;     // 0: no temperature
  int64_t temperature_floor;
  const HerdLayer* layers;
  const float* norm;          // [D] the last norm
  HerdMatrix embed, head;     // none: `x` comes in as embeddings; hidden states are all that goes out
  HerdFile* file;             // that the pages of global layers lie in; null: they lie in memory
};

struct HerdReach {           // of one kind of layer
  const int64_t* pages;      // of all sequences, end to end, each's oldest first; null for a kind that the model has not
  const int64_t* num_pages;  // [B]
  const int64_t* lengths;    // [B] keys that each sees, its new tokens the last
  int64_t page_tokens;
};

struct HerdStep {
  int64_t tokens, sequences;
  const int64_t* counts;              // [B] tokens of each sequence
  const int64_t* starts;              // [B] position of each sequence's first token
  HerdReach local, full;
  const int64_t* ids;                 // [T] tokens to embed; null where x holds embeddings
  float* x;                           // [T, D] embeddings in, hidden states out
  int64_t num_rows;                   // how many of the T give logits
  const int64_t* rows;                // [num_rows]
  float* logits;                      // [num_rows, V]; null: none wanted
};

#include "window.inl"

// The arithmetic of layer.inl on one instruction set.
struct Floats {
  decltype(&portable::rms_norm) rms_norm;
  decltype(&portable::rotate) rotate;
  decltype(&portable::swiglu) swiglu;
  decltype(&portable::add) add;
  decltype(&portable::dot) dot;
  decltype(&portable::sigmoid_of) sigmoid;
  decltype(&portable::write_slot) write_slot;
  decltype(&portable::attend_span) attend_span;
  decltype(&portable::join_spans) join_spans;
  decltype(&portable::finish_row) finish_row;
};

#define HERD_FLOATS(n)                                                                                                            \
  {n::rms_norm, n::rotate, n::swiglu, n::add, n::dot, n::sigmoid_of, n::write_slot, n::attend_span, n::join_spans, n::finish_row}

const Floats& floats(Path path) {
  static const Floats plain HERD_FLOATS(portable);
#ifdef HERD_X86
  static const Floats fast HERD_FLOATS(avx2);
  if (path != kPortable) return fast;
#endif
  (void)path;
  return plain;
}

Blocks blocks_of(const HerdMatrix& m) { return {m.data, m.rows, m.columns, m.group, m.bits, m.has_minimum != 0}; }

// Up to kQueries neighbouring tokens of one sequence, which attend together.
struct QueryTile {
  int64_t token, count;
  const int64_t* pages;  // of the keys, oldest first
  int64_t visible;       // keys that the first token sees; each later one sees one more

  int64_t keys() const { return visible + count - 1; }  // that the last token sees
};

// One kind of layer: where the new tokens go, and how they attend. What is made for a step grows with its tokens, not with the context.
struct Sight {
  const HerdReach& reach;
  const int64_t page_rows;     // G * S
  std::vector<int64_t> write;  // [T] slots
  std::vector<QueryTile> tiles;

  Sight(const HerdReach& reach, const HerdStep& step, int64_t kv_heads) : reach(reach), page_rows(kv_heads * reach.page_tokens) {
    if (!reach.pages) return;
    const int64_t* pages = reach.pages;
    for (int64_t b = 0, t = 0; b < step.sequences; pages += reach.num_pages[b], t += step.counts[b], ++b) {
      const int64_t count = step.counts[b], old = reach.lengths[b] - count;
      write.resize(size_t(t + count));
      slots(pages, old, old + count, write.data() + t);
      for (int64_t j = 0; j < count; j += kQueries) tiles.push_back({t + j, std::min(kQueries, count - j), pages, old + j + 1});
    }
  }

  // Of keys [start, stop) of a table: in [P, G, S], the row of head 0.
  void slots(const int64_t* pages, int64_t start, int64_t stop, int64_t* out) const {
    const int64_t S = reach.page_tokens;
    for (int64_t page = start / S, place = start % S; start < stop; ++page, place = 0) {
      const int64_t count = std::min(S - place, stop - start), first = pages[page] * page_rows + place;
      for (int64_t i = 0; i < count; ++i) out[i] = first + i;
      out += count, start += count;
    }
  }
};

class Step {
 public:
  Step(Machine& machine, const HerdModel& model, const HerdStep& step)
      : m(machine), model(model), step(step), f(floats(machine.path)), T(step.tokens), D(model.width), H(model.heads), G(model.kv_heads),
        K(model.head_width), W((H + 2 * G) * K), R(model.experts_per_token * T), parts(model.activation_parts), local(step.local, step, model.kv_heads),
        full(step.full, step, model.kv_heads) {
    int64_t F = 0;
    bool is_moe = false;
    for (int64_t i = 0; i < model.num_layers; ++i) {
      F = std::max({F, model.layers[i].gate.rows, model.layers[i].experts_gate.rows});
      is_moe |= model.layers[i].router != nullptr;
    }
    const int64_t routed = is_moe ? R : 0;
    const int64_t sizes[] = {T * D, T * W, T * H * K, T * D, (T + routed) * 2 * F, routed * D, T * (K / 2), T * (K / 2), T};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    if (m.floats.size() < size_t(total)) m.floats.resize(size_t(total));
    float* at = m.floats.data();
    float** const buffers[] = {&normed, &qkv, &attended, &added, &hidden, &routed_out, &cos, &sin, &temperature};
    for (int i = 0; i < 9; ++i) *buffers[i] = at, at += sizes[i];
    m.inputs.hold(T, std::max(D, H * K), parts);
    m.hidden.hold(T, F, parts);
    const int64_t rows = kQueries * (H / G);
    m.hold_scratch(rows * (2 * K + kKeys) + 2 * kKeys * K + rows * int64_t(sizeof(SoftmaxRow) / sizeof(float)));
    joined.resize(size_t(T * H));
  }

  void run() {
    std::vector<int64_t> positions;
    for (int64_t b = 0; b < step.sequences; ++b)
      for (int64_t j = 0; j < step.counts[b]; ++j) positions.push_back(step.starts[b] + j);
    each_token([&](int64_t t) { place(positions[size_t(t)], t); });
    if (step.ids) each_token([&](int64_t t) { embed(blocks_of(model.embed), step.ids[t], step.x + t * D); });
    for (int64_t i = 0; i < model.num_layers; ++i) {
      attention(model.layers[i], i > 0);
      const HerdLayer* next = i + 1 < model.num_layers ? &model.layers[i + 1] : nullptr;
      model.layers[i].router ? moe(model.layers[i], next) : dense(model.layers[i], next);
    }
    each_token([&](int64_t t) { f.add(step.x + t * D, added + t * D, D); });
    if (step.logits) logits();
  }

 private:
  template <class F>
  void each_token(F&& work) {
    if (T * D < 1 << 13)
      for (int64_t t = 0; t < T; ++t) work(t);
    else
      parallel(m.pool, T, [&](int64_t t, int) { work(t); });
  }

  // What the next product reads. Threads that wait for it fetch that, where the memory is what holds everything up.
  void expect(std::initializer_list<const HerdMatrix*> matrices) {
    for (int worker = 0; worker < m.pool.size(); ++worker) {
      Ahead& ahead = m.pool.ahead(worker);
      int i = 0;
      for (const HerdMatrix* matrix : matrices) {
        if (T > kFew || !matrix->data) break;
        const Blocks w = blocks_of(*matrix);
        const int64_t blocks = w.rows / kRows, each = Product::part_of(w, T, m.pool.size());
        const int64_t first = std::min(worker * each, blocks), count = std::min(each, blocks - first);
        ahead.set(i++, w.data + first * w.row_bytes(), std::min(count * w.row_bytes(), kFetch));
      }
      if (i < Ahead::kRanges) ahead.set(i, nullptr, 0);
    }
  }

  void add_one(Product& job, const HerdMatrix& w, const RoundedBuffer& x, float* y, int64_t stride) {
    job.add(blocks_of(w), x.view(), y, stride, T);
  }

  void round(const float* x, int64_t columns, RoundedBuffer& out, int64_t place) { round_token(m.path, x, columns, out, place); }

  void attention(const HerdLayer& layer, bool has_added) {
    each_token([&](int64_t t) {
      float* x = step.x + t * D;
      if (has_added) f.add(x, added + t * D, D);
      f.rms_norm(x, layer.attention_norm, D, model.norm_eps, normed + t * D);
      round(normed + t * D, D, m.inputs, t);
    });
    Product job{m.path, m.pool.size()};
    add_one(job, layer.q, m.inputs, qkv, W);
    add_one(job, layer.k, m.inputs, qkv + H * K, W);
    add_one(job, layer.v, m.inputs, qkv + (H + G) * K, W);
    expect({&layer.o});
    compute(job, m.pool);
    if (model.file && !layer.is_local) Window(*model.file, layer.pages, K, full.reach, step.sequences).open_new(step);
    each_token([&](int64_t t) { place_heads(layer, t); });
    attend(layer);
    each_token([&](int64_t t) { round(attended + t * H * K, H * K, m.inputs, t); });
    add_one(job, layer.o, m.inputs, added, D);
    expect({&layer.gate, &layer.up});
    compute(job, m.pool);
    each_token([&](int64_t t) {
      f.add(step.x + t * D, added + t * D, D);
      f.rms_norm(step.x + t * D, layer.ffn_norm, D, model.norm_eps, normed + t * D);
      round(normed + t * D, D, m.inputs, t);
    });
  }

  // Angles and temperature of a position. In doubles: at position 10,000,000 a float angle is off by up to half a radian.
  void place(int64_t position, int64_t t) {
    for (int64_t i = 0; i < K / 2; ++i) {
      const double angle = double(position) * model.frequencies[i];
      cos[t * (K / 2) + i] = float(std::cos(angle)), sin[t * (K / 2) + i] = float(std::sin(angle));
    }
    temperature[t] = 1.0f;
    if (model.temperature_scale > 0) {
      const int64_t steps = (position + 1) / model.temperature_floor;
      temperature[t] = float(1.0 + model.temperature_scale * std::log1p(double(steps)));
    }
  }

  // Rotate, normalize or warm the heads of a token, and write its key and value into their slot.
  void place_heads(const HerdLayer& layer, int64_t t) {
    float* row = qkv + t * W;
    for (int64_t h = 0; h < H + G; ++h) {
      float* head = row + h * K;
      if (layer.is_local) f.rotate(head, cos + t * (K / 2), sin + t * (K / 2), K);
      if (layer.is_local && model.qk_norm_eps > 0) f.rms_norm(head, nullptr, K, model.qk_norm_eps, head);
      if (!layer.is_local && h < H)
        for (int64_t i = 0; i < K; ++i) head[i] *= temperature[t];
    }
    const int64_t slot = (layer.is_local ? local : full).write[size_t(t)];
    const HerdPages& p = layer.pages;
    for (int64_t g = 0; g < G; ++g) {
      f.write_slot(row + (H + g) * K, K, p.keys, p.key_scales, slot + g * p.page_tokens, p.kind);
      f.write_slot(row + (H + G + g) * K, K, p.values, p.value_scales, slot + g * p.page_tokens, p.kind);
    }
  }

  // Tiles of queries by key/value heads; where these are too few to share out, as in the decoding of long contexts, also by spans of keys.
  // Where tiles are small, several heads at once: memory is then read in order. Spans are joined in order, whoever summed them up and however
  // many at a time.
  void attend(const HerdLayer& layer) {
    const Sight& sight = layer.is_local ? local : full;
    const std::vector<QueryTile>& tiles = sight.tiles;
    int64_t longest = 0, count = 0;
    for (const QueryTile& tile : tiles) {
      longest = std::max(longest, tile.keys());
      count = std::max(count, tile.count);
    }
    const int64_t num_spans = (longest + kSpan - 1) / kSpan, num_tiles = int64_t(tiles.size()), threads = m.pool.size(), rows = count * (H / G);
    const bool by_spans = num_spans > 1 && num_tiles * G < 8 * threads;
    const int64_t heads = std::max<int64_t>(1, std::min({G, kQueries / count, num_tiles * (by_spans ? num_spans : 1) * G / threads}));
    const int64_t groups = (G + heads - 1) / heads, num_tasks = num_tiles * groups;
    const int64_t most = by_spans ? std::max<int64_t>(16, kSpanBytes / (num_tiles * G * rows * (K + 9) * int64_t(sizeof(float)))) : num_spans;
    const auto rows_of = [&](int64_t task, int worker) {
      const int64_t head = task % groups * heads;
      return Rows(*this, sight, tiles[size_t(task / groups)], head, std::min(heads, G - head), worker);
    };
    std::unique_ptr<Window> window;
    if (model.file && !layer.is_local) window.reset(new Window(*model.file, layer.pages, K, sight.reach, step.sequences));
    for (int64_t first = 0, last; first < num_spans; first = last) {
      last = std::min(num_spans, first + most);
      if (window) last = window->open(first, last);
      if (by_spans) {
        states.resize(size_t(num_tasks * (last - first) * heads * rows));
        accs.resize(states.size() * size_t(K));
        const auto place = [&](int64_t task, int64_t span) { return size_t((task * (last - first) + span - first) * heads * rows); };
        parallel(m.pool, num_tasks * (last - first), [&](int64_t i, int worker) {
          const int64_t task = i / (last - first), span = first + i % (last - first);
          if (span * kSpan < tiles[size_t(task / groups)].keys())
            rows_of(task, worker).span(layer.pages, span, &states[place(task, span)], &accs[place(task, span) * size_t(K)]);
        });
        parallel(m.pool, num_tasks, [&](int64_t task, int worker) {
          Rows r = rows_of(task, worker);
          for (int64_t span = first; span < last && span * kSpan < r.tile.keys(); ++span)
            r.join(span, &states[place(task, span)], &accs[place(task, span) * size_t(K)]);
          if (last == num_spans) r.finish();
        });
      } else {
        parallel(m.pool, num_tasks, [&](int64_t task, int worker) {
          Rows r = rows_of(task, worker);
          for (int64_t span = first; span < last && span * kSpan < r.tile.keys(); ++span) {
            r.span(layer.pages, span, r.states, r.accs);
            r.join(span, r.states, r.accs);
          }
          if (last == num_spans) r.finish();
        });
      }
    }
  }

  // The queries of a tile for some key/value heads, and a worker's room for their work. What spans are joined to lies in `attended`.
  struct Rows {
    Rows(Step& s, const Sight& sight, const QueryTile& tile, int64_t head, int64_t heads, int worker)
        : s(s), sight(sight), tile(tile), head(head), heads(heads), each(s.H / s.G), count(tile.count * each) {
      const int64_t rows = kQueries * each;
      q = s.m.scratch[size_t(worker)].data();
      accs = q + rows * s.K;
      states = reinterpret_cast<SoftmaxRow*>(accs + rows * s.K);
      rest = reinterpret_cast<float*>(states + rows);
      for (int64_t r = 0; r < count * heads; ++r)
        std::memcpy(q + r * s.K, s.qkv + token(r) * s.W + query_head(r) * s.K, size_t(s.K) * sizeof(float));
      for (int64_t r = 0; r < count; ++r) visible[r] = tile.visible + r / each;
    }

    // Row r, of all heads one after the other: whose it is.
    int64_t token(int64_t r) const { return tile.token + r % count / each; }
    int64_t query_head(int64_t r) const { return (head + r / count) * each + r % each; }

    void span(const HerdPages& pages, int64_t span, SoftmaxRow* out, float* out_accs) {
      const int64_t start = span * kSpan, stop = std::min(tile.keys(), start + kSpan), known = std::min(tile.keys(), stop + kKeys) - start;
      int64_t slots[kSpan + kKeys];
      sight.slots(tile.pages, start, start + known, slots);
      s.f.attend_span(q, count, visible, head, heads, s.K, pages, slots, known, start, stop, rest, out, out_accs);
    }

    void join(int64_t span, const SoftmaxRow* done, const float* done_accs) {
      for (int64_t r = 0; r < count * heads; ++r) {
        const int64_t to = token(r) * s.H + query_head(r);
        float* out = s.attended + to * s.K;
        if (span > 0) {
          s.f.join_spans(s.joined[size_t(to)], out, done[r], done_accs + r * s.K, s.K);
        } else {
          s.joined[size_t(to)] = done[r];
          std::memcpy(out, done_accs + r * s.K, size_t(s.K) * sizeof(float));
        }
      }
    }

    void finish() {
      for (int64_t r = 0; r < count * heads; ++r) {
        const int64_t to = token(r) * s.H + query_head(r);
        s.f.finish_row(s.joined[size_t(to)], s.attended + to * s.K, s.K, s.attended + to * s.K);
      }
    }

    Step& s;
    const Sight& sight;
    const QueryTile& tile;
    const int64_t head, heads, each, count;
    float *q, *accs, *rest;
    SoftmaxRow* states;
    int64_t visible[kQueries * kMostQueriesPerKey];
  };

  // From `normed`, rounded in `inputs`, to `added`. next: the layer after this one, null for none.
  void dense(const HerdLayer& layer, const HerdLayer* next) {
    const int64_t F = layer.gate.rows;
    Product job{m.path, m.pool.size()};
    add_one(job, layer.gate, m.inputs, hidden, 2 * F);
    add_one(job, layer.up, m.inputs, hidden + F, 2 * F);
    expect({&layer.down});
    compute(job, m.pool);
    each_token([&](int64_t t) { swiglu(hidden + t * 2 * F, F, m.hidden, t); });
    add_one(job, layer.down, m.hidden, added, D);
    next ? expect({&next->q, &next->k, &next->v}) : expect({&model.head});
    compute(job, m.pool);
  }

  void swiglu(float* row, int64_t F, RoundedBuffer& out, int64_t place) {
    f.swiglu(row, row + F, F);
    round(row, F, out, place);
  }

  void moe(const HerdLayer& layer, const HerdLayer* next) {
    const int64_t k = model.experts_per_token, F = layer.experts_gate.rows, S = layer.gate.rows;
    const Routed routed = route(layer);
    m.routed.hold(routed.tiles * kTile, std::max(D, F), parts);
    each_token([&](int64_t t) {
      for (int64_t r = t * k; r < (t + 1) * k; ++r) {  // the score multiplies the expert's input
        float* scaled = routed_out + r * D;
        for (int64_t i = 0; i < D; ++i) scaled[i] = normed[t * D + i] * routed.scores[size_t(r)];
        round(scaled, D, m.routed, routed.padded[size_t(r)]);
      }
    });
    Product job{m.path, m.pool.size()};
    float* expert_hidden = hidden + T * 2 * S;
    add_one(job, layer.gate, m.inputs, hidden, 2 * S);
    add_one(job, layer.up, m.inputs, hidden + S, 2 * S);
    expect({&layer.down});
    add_experts(job, layer.experts_gate, routed, expert_hidden, 2 * F);
    add_experts(job, layer.experts_up, routed, expert_hidden + F, 2 * F);
    compute(job, m.pool);
    each_token([&](int64_t t) {
      swiglu(hidden + t * 2 * S, S, m.hidden, t);
      for (int64_t r = t * k; r < (t + 1) * k; ++r)
        swiglu(expert_hidden + routed.place[size_t(r)] * 2 * F, F, m.routed, routed.padded[size_t(r)]);
    });
    add_one(job, layer.down, m.hidden, added, D);
    next ? expect({&next->q, &next->k, &next->v}) : expect({&model.head});
    add_experts(job, layer.experts_down, routed, routed_out, D);
    compute(job, m.pool);
    each_token([&](int64_t t) {
      for (int64_t r = t * k; r < (t + 1) * k; ++r) f.add(added + t * D, routed_out + routed.place[size_t(r)] * D, D);
    });
  }

  // Which rows go to which expert. Sorted by expert they lie end to end; rounded, every expert starts a tile.
  struct Routed {
    std::vector<int64_t> counts;         // [E]
    std::vector<int64_t> place, padded;  // [R]
    std::vector<float> scores;           // [R]
    int64_t tiles;
  };

  Routed route(const HerdLayer& layer) {
    const int64_t E = model.experts, k = model.experts_per_token;
    std::vector<int64_t> chosen(static_cast<size_t>(R)), next(static_cast<size_t>(E), 0), next_padded(static_cast<size_t>(E), 0);
    Routed routed{std::vector<int64_t>(static_cast<size_t>(E), 0), chosen, chosen, std::vector<float>(static_cast<size_t>(R)), 0};
    each_token([&](int64_t t) {
      std::vector<float> logits(static_cast<size_t>(E));
      for (int64_t e = 0; e < E; ++e) logits[size_t(e)] = f.dot(normed + t * D, layer.router + e * D, D);
      for (int64_t i = 0; i < k; ++i) {  // the largest first, the lowest expert on a tie
        const int64_t best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        chosen[size_t(t * k + i)] = best;
        routed.scores[size_t(t * k + i)] = f.sigmoid(logits[size_t(best)]);
        logits[size_t(best)] = -std::numeric_limits<float>::infinity();
      }
    });
    for (int64_t e : chosen) ++routed.counts[size_t(e)];
    for (size_t e = 0; e < size_t(E); ++e) {
      if (e) next[e] = next[e - 1] + routed.counts[e - 1];
      next_padded[e] = routed.tiles * kTile;
      routed.tiles += tiles_of(routed.counts[e]);
    }
    for (size_t r = 0; r < size_t(R); ++r) {
      routed.place[r] = next[size_t(chosen[r])]++;
      routed.padded[r] = next_padded[size_t(chosen[r])]++;
    }
    return routed;
  }

  void add_experts(Product& job, const HerdMatrix& w, const Routed& routed, float* y, int64_t stride) {
    Blocks one = blocks_of(w);
    int64_t tile = 0;
    for (int64_t count : routed.counts) {
      if (count) job.add(one, m.routed.view().tile(tile, w.columns), y, stride, count);
      tile += tiles_of(count), y += count * stride;
      one.data += one.rows / kRows * one.row_bytes();
    }
  }

  void logits() {
    const int64_t n = step.num_rows, V = model.head.rows;
    m.inputs.hold(n, D, parts);
    for (int64_t i = 0; i < n; ++i) {
      f.rms_norm(step.x + step.rows[i] * D, model.norm, D, model.norm_eps, normed + i * D);
      round(normed + i * D, D, m.inputs, i);
    }
    Product job{m.path, m.pool.size()};
    expect({});
    job.add(blocks_of(model.head), m.inputs.view(), step.logits, V, n);
    compute(job, m.pool);
  }

  Machine& m;
  const HerdModel& model;
  const HerdStep& step;
  const Floats& f;
  const int64_t T, D, H, G, K, W, R;
  const int parts;
  const Sight local, full;
  std::vector<SoftmaxRow> joined;  // [T, H] of the spans so far
  std::vector<SoftmaxRow> states;  // of spans
  std::vector<float> accs;
  float *normed, *qkv, *attended, *added, *hidden, *routed_out, *cos, *sin, *temperature;
};
