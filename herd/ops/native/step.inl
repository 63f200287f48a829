// All layers of a model in one call, for the tokens of one step: what `herd/model/llama4.py` says, over blocks and pages.
//
// For a small model the interpreter costs more than the arithmetic. Python builds a table of pointers once and hands over a step's tokens;
// the order of the work is that of `Block.forward`, and the two are held equal by a test.

struct HerdMatrix {
  const uint8_t* data;  // blocks
  int64_t rows, columns;
  int32_t group, bits, has_minimum, reserved;
};

struct HerdLayer {
  const float *attention_norm, *ffn_norm;  // [D]
  HerdMatrix q, k, v, o;
  HerdMatrix gate, up, down;                          // the dense feed-forward, or the shared expert
  HerdMatrix experts_gate, experts_up, experts_down;  // of one expert; the others follow it
  const float* router;                                // [E, D]; null in a dense layer
  float *keys, *values;                               // [slots, G, K]
  int64_t is_local;
};

struct HerdModel {
  int64_t width, heads, kv_heads, head_width, experts, experts_per_token, num_layers;
  float norm_eps, qk_norm_eps;  // qk_norm_eps 0: no norm
  const HerdLayer* layers;
};

struct HerdReach {          // of one kind of layer
  const int64_t* write;     // [T] slots
  const int64_t* read;      // slots of all sequences, end to end
  const int64_t* lengths;   // [B] how many of them each has
};

struct HerdStep {
  int64_t tokens, sequences;
  const int64_t* counts;              // [B] tokens of each sequence
  const float *cos, *sin;             // [T, K/2]
  const float* temperature;           // [T]
  HerdReach local, full;
  float* x;                           // [T, D] embeddings in, hidden states out
};

// The arithmetic of layer.inl on one instruction set.
struct Floats {
  decltype(&portable::rms_norm) rms_norm;
  decltype(&portable::rotate) rotate;
  decltype(&portable::swiglu) swiglu;
  decltype(&portable::add) add;
  decltype(&portable::attend) attend;
  decltype(&portable::dot) dot;
  decltype(&portable::sigmoid) sigmoid;
};

const Floats& floats(Path path) {
  static const Floats plain{portable::rms_norm, portable::rotate, portable::swiglu, portable::add,
                            portable::attend,   portable::dot,    portable::sigmoid};
#ifdef HERD_X86
  static const Floats fast{avx2::rms_norm, avx2::rotate, avx2::swiglu, avx2::add, avx2::attend, avx2::dot, avx2::sigmoid};
  if (path != kPortable) return fast;
#endif
  (void)path;
  return plain;
}

Blocks blocks_of(const HerdMatrix& m) { return {m.data, m.rows, m.columns, m.group, m.bits, m.has_minimum != 0}; }

class Step {
 public:
  Step(Machine& machine, const HerdModel& model, const HerdStep& step)
      : m(machine), model(model), step(step), f(floats(machine.path)), T(step.tokens), D(model.width), H(model.heads), G(model.kv_heads),
        K(model.head_width), W((H + 2 * G) * K), R(model.experts_per_token * T) {
    int64_t F = 0;
    bool is_moe = false;
    for (int64_t i = 0; i < model.num_layers; ++i) {
      F = std::max({F, model.layers[i].gate.rows, model.layers[i].experts_gate.rows});
      is_moe |= model.layers[i].router != nullptr;
    }
    const int64_t routed = is_moe ? R : 0;
    const int64_t sizes[] = {T * D, T * W, T * H * K, T * D, (T + routed) * 2 * F, routed * D};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    if (m.floats.size() < size_t(total)) m.floats.resize(size_t(total));
    float* at = m.floats.data();
    float** const buffers[] = {&normed, &qkv, &attended, &added, &hidden, &routed_out};
    for (int i = 0; i < 6; ++i) *buffers[i] = at, at += sizes[i];
    m.inputs.hold(T, std::max(D, H * K));
    m.hidden.hold(T, F);
    if (is_moe) m.routed.hold(R, std::max(D, F));
    visible_local.resize(size_t(T)), visible_full.resize(size_t(T)), sequence_local.resize(size_t(T));
    sequence_full.resize(size_t(T));
    lay_out(step.local, sequence_local, visible_local);
    lay_out(step.full, sequence_full, visible_full);
  }

  void run() {
    for (int64_t i = 0; i < model.num_layers; ++i) {
      attention(model.layers[i], i > 0);
      model.layers[i].router ? moe(model.layers[i]) : dense(model.layers[i]);
    }
    each_token([&](int64_t t) { f.add(step.x + t * D, added + t * D, D); });
  }

 private:
  // Where each token's visible keys start in `read`, and how many there are.
  void lay_out(const HerdReach& reach, std::vector<const int64_t*>& start, std::vector<int64_t>& visible) const {
    if (!reach.write) return;
    const int64_t* slots = reach.read;
    for (int64_t b = 0, t = 0; b < step.sequences; slots += reach.lengths[b], ++b)
      for (int64_t j = 0; j < step.counts[b]; ++j, ++t) {
        start[size_t(t)] = slots;
        visible[size_t(t)] = reach.lengths[b] - step.counts[b] + j + 1;
      }
  }

  template <class F>
  void each_token(F&& work) {
    if (T * D < 1 << 13)
      for (int64_t t = 0; t < T; ++t) work(t);
    else
      parallel(m.pool, T, work);
  }

  void multiply_all(Product& job) {
    m.pool.run(multiply, &job, int64_t(job.parts.size()));
    job.parts.clear();
  }

  void cut_one(Product& job, const HerdMatrix& w, const Rounded& x, float* y, int64_t stride) {
    cut(job.parts, blocks_of(w), x, y, stride, 0, T, m.pool.size());
  }

  void attention(const HerdLayer& layer, bool has_added) {
    each_token([&](int64_t t) {
      float* x = step.x + t * D;
      if (has_added) f.add(x, added + t * D, D);
      f.rms_norm(x, layer.attention_norm, D, model.norm_eps, normed + t * D);
      round_token(m.path, normed + t * D, D, m.inputs, t);
    });
    Product job{m.path, {}};
    cut_one(job, layer.q, m.inputs.view(), qkv, W);
    cut_one(job, layer.k, m.inputs.view(), qkv + H * K, W);
    cut_one(job, layer.v, m.inputs.view(), qkv + (H + G) * K, W);
    multiply_all(job);

    const HerdReach& reach = layer.is_local ? step.local : step.full;
    each_token([&](int64_t t) {
      float* row = qkv + t * W;
      for (int64_t h = 0; h < H + G; ++h) {
        float* head = row + h * K;
        if (layer.is_local) f.rotate(head, step.cos + t * (K / 2), step.sin + t * (K / 2), K);
        if (layer.is_local && model.qk_norm_eps > 0) f.rms_norm(head, nullptr, K, model.qk_norm_eps, head);
        if (!layer.is_local && h < H)
          for (int64_t i = 0; i < K; ++i) head[i] *= step.temperature[t];
      }
      std::memcpy(layer.keys + reach.write[t] * G * K, row + H * K, size_t(G * K) * sizeof(float));
      std::memcpy(layer.values + reach.write[t] * G * K, row + (H + G) * K, size_t(G * K) * sizeof(float));
    });
    const auto& start = layer.is_local ? sequence_local : sequence_full;
    const auto& visible = layer.is_local ? visible_local : visible_full;
    parallel(m.pool, T * G, [&](int64_t task) {
      const int64_t t = task / G, g = task % G;
      f.attend(qkv + t * W + g * (H / G) * K, H / G, K, layer.keys + g * K, layer.values + g * K, G * K, start[size_t(t)],
               visible[size_t(t)], attended + t * H * K + g * (H / G) * K);
    });
    each_token([&](int64_t t) { round_token(m.path, attended + t * H * K, H * K, m.inputs, t); });
    cut_one(job, layer.o, m.inputs.view(), added, D);
    multiply_all(job);
    each_token([&](int64_t t) {
      f.add(step.x + t * D, added + t * D, D);
      f.rms_norm(step.x + t * D, layer.ffn_norm, D, model.norm_eps, normed + t * D);
      round_token(m.path, normed + t * D, D, m.inputs, t);
    });
  }

  // From `normed`, rounded in `inputs`, to `added`.
  void dense(const HerdLayer& layer) {
    const int64_t F = layer.gate.rows;
    Product job{m.path, {}};
    cut_one(job, layer.gate, m.inputs.view(), hidden, 2 * F);
    cut_one(job, layer.up, m.inputs.view(), hidden + F, 2 * F);
    multiply_all(job);
    each_token([&](int64_t t) { swiglu(hidden + t * 2 * F, F, m.hidden, t); });
    cut_one(job, layer.down, m.hidden.view(), added, D);
    multiply_all(job);
  }

  void swiglu(float* row, int64_t F, RoundedBuffer& out, int64_t index) {
    f.swiglu(row, row + F, F);
    round_token(m.path, row, F, out, index);
  }

  void moe(const HerdLayer& layer) {
    const int64_t E = model.experts, k = model.experts_per_token, F = layer.experts_gate.rows, S = layer.gate.rows;
    const auto rows = static_cast<size_t>(R), num = static_cast<size_t>(E);
    std::vector<int64_t> chosen(rows), place(rows), counts(num, 0), next(num, 0);
    std::vector<float> scores(rows);
    each_token([&](int64_t t) {
      std::vector<float> logits(num);
      for (int64_t e = 0; e < E; ++e) logits[size_t(e)] = f.dot(normed + t * D, layer.router + e * D, D);
      for (int64_t i = 0; i < k; ++i) {  // the largest first, the lowest expert on a tie
        const int64_t best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        chosen[size_t(t * k + i)] = best;
        scores[size_t(t * k + i)] = f.sigmoid(logits[size_t(best)]);
        logits[size_t(best)] = -std::numeric_limits<float>::infinity();
      }
    });
    for (int64_t e : chosen) ++counts[size_t(e)];
    for (int64_t e = 1; e < E; ++e) next[size_t(e)] = next[size_t(e - 1)] + counts[size_t(e - 1)];
    for (int64_t r = 0; r < R; ++r) place[size_t(r)] = next[size_t(chosen[size_t(r)])]++;
    each_token([&](int64_t t) {
      for (int64_t r = t * k; r < (t + 1) * k; ++r) {  // the score multiplies the expert's input
        float* scaled = routed_out + place[size_t(r)] * D;
        for (int64_t i = 0; i < D; ++i) scaled[i] = normed[t * D + i] * scores[size_t(r)];
        round_token(m.path, scaled, D, m.routed, place[size_t(r)]);
      }
    });
    Product job{m.path, {}};
    float* expert_hidden = hidden + T * 2 * S;
    cut_one(job, layer.gate, m.inputs.view(), hidden, 2 * S);
    cut_one(job, layer.up, m.inputs.view(), hidden + S, 2 * S);
    cut_experts(job, layer.experts_gate, counts, m.routed.view(), expert_hidden, 2 * F);
    cut_experts(job, layer.experts_up, counts, m.routed.view(), expert_hidden + F, 2 * F);
    multiply_all(job);
    each_token([&](int64_t t) {
      swiglu(hidden + t * 2 * S, S, m.hidden, t);
      for (int64_t r = t * k; r < (t + 1) * k; ++r) swiglu(expert_hidden + place[size_t(r)] * 2 * F, F, m.routed, place[size_t(r)]);
    });
    cut_one(job, layer.down, m.hidden.view(), added, D);
    cut_experts(job, layer.experts_down, counts, m.routed.view(), routed_out, D);
    multiply_all(job);
    each_token([&](int64_t t) {
      for (int64_t r = t * k; r < (t + 1) * k; ++r) f.add(added + t * D, routed_out + place[size_t(r)] * D, D);
    });
  }

  void cut_experts(Product& job, const HerdMatrix& w, const std::vector<int64_t>& counts, const Rounded& x, float* y, int64_t stride) {
    Blocks one = blocks_of(w);
    int64_t token = 0;
    for (int64_t count : counts) {
      if (count) cut(job.parts, one, x, y, stride, token, count, m.pool.size());
      token += count;
      one.data += one.rows / kRows * one.row_bytes();
    }
  }

  Machine& m;
  const HerdModel& model;
  const HerdStep& step;
  const Floats& f;
  const int64_t T, D, H, G, K, W, R;
  float *normed, *qkv, *attended, *added, *hidden, *routed_out;
  std::vector<int64_t> visible_local, visible_full;
  std::vector<const int64_t*> sequence_local, sequence_full;
};
