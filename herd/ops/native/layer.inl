// The float arithmetic of a layer, between its products: norms, rotary turns, attention over pages, SwiGLU, routing.
//
// Included once per instruction set, with HERD_TARGET set to it. Loops run over 8 lanes, so that a compiler makes vectors of them; a sum
// is 8 sums, joined in a fixed order. Everything is computed per token, so no result depends on what else is in the batch.

constexpr int kLanes = 8;

HERD_TARGET inline float joined(const float* lane) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

HERD_TARGET inline float dot(const float* a, const float* b, int64_t n) {  // n is a multiple of 8
  float lane[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += a[i + j] * b[i + j];
  return joined(lane);
}

// e^x to 2 units in the last place for x <= 0; 0 below -87. Source: Cephes expf.
HERD_TARGET inline float exp_down(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = float(int32_t(x * 1.44269504f - 0.5f));
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

HERD_TARGET inline float sigmoid(float x) {
  const float e = exp_down(x < 0 ? x : -x);
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// out = x / rms(x) * weight; weight may be null
HERD_TARGET inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const float scale = 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps);
  if (weight)
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale;
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
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

HERD_TARGET inline void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

// Attention of one token and one key/value head: `heads` queries [heads, K] over keys at slots[0 .. count), oldest first; softmax as it
// goes, in blocks of keys that start at the oldest, so that a block is the same whoever asks. out [heads, K].
HERD_TARGET inline void attend(const float* q, int64_t heads, int64_t head_width, const float* keys, const float* values, int64_t slot_stride,
                               const int64_t* slots, int64_t count, float* out) {
  constexpr int64_t kBlock = 32;
  const float scale = 1.0f / std::sqrt(float(head_width));
  float weights[kBlock];
  for (int64_t h = 0; h < heads; ++h) {
    const float* query = q + h * head_width;
    float* acc = out + h * head_width;
    for (int64_t i = 0; i < head_width; ++i) acc[i] = 0;
    float most = -INFINITY, total = 0;
    for (int64_t start = 0; start < count; start += kBlock) {
      const int64_t n = std::min(kBlock, count - start);
      float block_most = most;
      for (int64_t j = 0; j < n; ++j) {
        weights[j] = dot(query, keys + slots[start + j] * slot_stride, head_width) * scale;
        block_most = std::max(block_most, weights[j]);
      }
      if (block_most > most) {
        const float shrink = most == -INFINITY ? 0.0f : exp_down(most - block_most);
        for (int64_t i = 0; i < head_width; ++i) acc[i] *= shrink;
        total *= shrink;
        most = block_most;
      }
      for (int64_t j = n; j < kBlock; ++j) weights[j] = -INFINITY;
      for (int64_t j = 0; j < kBlock; ++j) weights[j] = weights[j] == -INFINITY ? 0.0f : exp_down(weights[j] - most);
      for (int64_t j = 0; j < n; ++j) {
        const float* value = values + slots[start + j] * slot_stride;
        const float w = weights[j];
        total += w;
        for (int64_t i = 0; i < head_width; ++i) acc[i] += w * value[i];
      }
    }
    for (int64_t i = 0; i < head_width; ++i) acc[i] /= total;
  }
}
