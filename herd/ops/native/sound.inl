// Whether what a caller hands over can be computed without leaving its buffers: a bad table ends in an error code, never in a crash.

// Whether a buffer of a * b may be: no product or sum of a few such sizes overflows.
bool fits(int64_t a, int64_t b) {
  constexpr int64_t kMost = int64_t(1) << 40;
  return a >= 0 && b >= 0 && (a == 0 || b <= kMost / a);
}

bool is_sound(const Blocks& w) {
  return w.data && (w.bits == 4 || w.bits == 8) && (w.group == 32 || w.group == 128) && w.rows > 0 && w.columns > 0 &&
         fits(w.rows, w.columns) && w.rows % kRows == 0 && w.columns % w.group == 0 && !(w.bits == 8 && (w.has_minimum || w.group != 32));
}

bool is_matrix(const HerdMatrix& m, int64_t rows, int64_t columns) {
  return m.rows == rows && m.columns == columns && is_sound(blocks_of(m));
}

bool is_sound(const HerdPages& p, int64_t kv_heads) {
  return p.keys && p.values && p.kv_heads == kv_heads && p.page_tokens > 0 && p.kind >= kFloat32 && p.kind <= kFloat16 &&
         (p.kind != kInt8 || (p.key_scales && p.value_scales));
}

bool is_sound(const HerdModel& m) {
  const int64_t D = m.width, H = m.heads, G = m.kv_heads, K = m.head_width;
  if (D < 1 || H < 1 || G < 1 || K < 1 || D % kGroup || K % kHeadStep || K > kMostHeadWidth || H % G || H / G > kMostQueriesPerKey ||
      !fits(H, K) || H * K % kGroup || m.num_layers < 0 || !m.layers || m.activation_parts < 1 || m.activation_parts > 2 || !m.frequencies ||
      m.temperature_floor < 1)
    return false;
  if (m.file && (!m.file->base || m.file->bytes < 1 || m.file->window < 0 || m.file->touched < 0)) return false;
  for (const HerdLayer* l = m.layers; l < m.layers + m.num_layers; ++l) {
    const int64_t F = l->gate.rows, S = l->experts_gate.rows;
    if (!l->attention_norm || !l->ffn_norm || !is_sound(l->pages, G) || !is_matrix(l->q, H * K, D) || !is_matrix(l->k, G * K, D) ||
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
  if (!reach.pages || !reach.num_pages || !reach.lengths || reach.page_tokens < 1) return false;
  for (int64_t b = 0; b < s.sequences; ++b)
    if (reach.lengths[b] < s.counts[b] || !fits(reach.num_pages[b], reach.page_tokens) ||
        reach.lengths[b] > reach.num_pages[b] * reach.page_tokens)
      return false;
  return true;
}

bool is_sound(const HerdStep& s, const HerdModel& m) {
  if (s.tokens < 1 || s.sequences < 1 || !s.counts || !s.starts || !s.x || s.num_rows < 0 || s.num_rows > s.tokens) return false;
  int64_t tokens = 0;
  for (int64_t b = 0; b < s.sequences; ++b) {
    if (s.counts[b] < 0 || s.counts[b] > s.tokens - tokens || s.starts[b] < 0) return false;
    tokens += s.counts[b];
  }
  if (tokens != s.tokens || !fits(s.tokens, m.width) || !fits(s.tokens, 3 * m.heads * m.head_width)) return false;
  for (const HerdLayer* l = m.layers; l < m.layers + m.num_layers; ++l) {
    const HerdReach& reach = l->is_local ? s.local : s.full;
    if (!fits(s.tokens, l->gate.rows) || !is_sound(reach, s) || reach.page_tokens != l->pages.page_tokens) return false;
    const int64_t k = m.experts_per_token, widest = std::max(m.width, l->experts_gate.rows);
    if (l->router && (!fits(s.tokens, k) || !fits(s.tokens * k, widest))) return false;
  }
  if (s.ids) {
    if (!is_matrix(m.embed, m.embed.rows, m.width)) return false;
    for (int64_t t = 0; t < s.tokens; ++t)
      if (s.ids[t] < 0 || s.ids[t] >= m.embed.rows) return false;
  }
  if (s.logits) {
    if (!s.rows || !m.norm || !is_matrix(m.head, m.head.rows, m.width) || !fits(s.num_rows, m.head.rows)) return false;
    for (int64_t i = 0; i < s.num_rows; ++i)
      if (s.rows[i] < 0 || s.rows[i] >= s.tokens) return false;
  }
  return true;
}
