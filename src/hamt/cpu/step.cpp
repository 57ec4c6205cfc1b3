// One token of a whole model for CPUs, from ids to logits: step.h says how it is called.
//
// A model that reads one token reads all its weights, so the step is as fast as they come from
// memory: matrices are stored one after the other in the order of use, and the threads of a team
// share the rows of each. Equations as in ../layers.py and ../block.py.
//
// B rows of a batch, d width, H heads, S slots, F features, K key size.

#include "step.h"

#include <iterator>
#include <limits>
#include <memory>
#include <stdexcept>

#include "recurrence.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// As hamt.cpu.native packs them.
enum Kind { FLOAT, BFLOAT, INT8 };
enum Rule { GATED, NORMALIZED, CONVEX, DELTA };
enum Binding { ELEMENTWISE, PHASOR, CIRCULAR };
enum Turning { STILL, FIXED, BY_TOKEN };
constexpr char MAGIC[8] = {'H', 'A', 'M', 'T', 's', 't', 'p', '1'};

struct Header {
  char magic[8];
  int64_t bytes, kind, vocab, width, layers, heads, slots, features, keys, taps, inner, rule, binding;
  int64_t turning, turning_heads, turning_phases, gates, gating, output_gate, tied;
  double eps, decay_rate, multiplier;
};

constexpr int LANES = L<float>;
using V = Vec<float>;
inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// (rows, columns) in panels of 16 rows, filled up with zeros: of a panel first the 16 numbers of the
// first column, then those of the second; int8 by four columns at a time, four numbers of each row.
// So a product reads on and on, and adds up no vectors.
struct Matrix {
  const char* weights = nullptr;
  const float* scales = nullptr;  // of int8, one for each row
  int64_t rows = 0, columns = 0, kind = FLOAT;
};

struct Layer {
  const float *mixer_norm, *conv, *gate_bias, *read_bias, *turn, *head_norm, *mlp_norm;
  Matrix inputs, gates, output_gate, output, mlp_gate, mlp_up, mlp_down;
};

constexpr int64_t size_of(int64_t kind) { return kind == FLOAT ? 4 : kind == BFLOAT ? 2 : 1; }  // bytes

// The next four columns of a panel.
template <int KIND> inline void columns(const char* at, V* four) {
  if (KIND == FLOAT) {
    std::memcpy(four, at, 4 * sizeof(V));
  } else if (KIND == BFLOAT) {
    typedef uint16_t half __attribute__((vector_size(2 * LANES)));
    typedef uint32_t whole __attribute__((vector_size(4 * LANES)));
    for (int j = 0; j < 4; j++) {
      half h;
      std::memcpy(&h, at + j * sizeof h, sizeof h);
      const whole w = __builtin_convertvector(h, whole) << 16;
      std::memcpy(four + j, &w, sizeof w);
    }
  } else {  // shifts, as compilers convert vectors of bytes one number at a time
    Lanes<float>::ivec bytes;
    std::memcpy(&bytes, at, sizeof bytes);
    for (int j = 0; j < 4; j++) four[j] = __builtin_convertvector(bytes << (24 - 8 * j) >> 24, V);
  }
}

// One number of a matrix.
inline float number(const Matrix& m, int64_t row, int64_t column) {
  const int64_t panel = row / LANES * m.columns * LANES, lane = row % LANES;
  if (m.kind == INT8) {
    const int64_t at = panel + (column / 4 * LANES + lane) * 4 + column % 4;
    return float(int8_t(m.weights[at])) * m.scales[row];
  }
  const char* at = m.weights + (panel + column * LANES + lane) * size_of(m.kind);
  uint32_t bits = 0;
  if (m.kind == FLOAT) std::memcpy(&bits, at, 4);
  else std::memcpy(reinterpret_cast<char*>(&bits) + 2, at, 2);
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

// Some rows of y = or += m x, as far as there are rows.
inline void keep(const Matrix& m, int64_t row, V product, float* y, bool add) {
  const int count = int(std::min<int64_t>(LANES, m.rows - row));
  if (add) product += load(y + row, count);
  store(y + row, product, count);
}

// How many of B inputs are multiplied together, from b on.
inline int64_t together_from(int64_t b, int64_t B) { return B - b >= 8 ? 8 : B - b >= 4 ? 4 : B - b >= 2 ? 2 : 1; }

// The products of a panel with a few inputs, x (columns, INPUTS), in several sums each, as one would
// wait for itself.
template <int KIND, int INPUTS, int SUMS>
inline void panel(const Matrix& m, int64_t row, const float* x, float* y, int64_t stride, bool add) {
  V sums[INPUTS][SUMS] = {}, four[4];
  const char* at = m.weights + row * m.columns * size_of(KIND);
  for (int64_t i = 0; i < m.columns; i += 4, at += 4 * LANES * size_of(KIND), x += 4 * INPUTS) {
    columns<KIND>(at, four);
    for (int j = 0; j < 4; j++)
      for (int b = 0; b < INPUTS; b++) sums[b][j % SUMS] += four[j] * x[j * INPUTS + b];
  }
  for (int b = 0; b < INPUTS; b++) {
    V product = sums[b][0];
    for (int j = 1; j < SUMS; j++) product += sums[b][j];
    if (KIND == INT8) product *= load(m.scales + row, LANES);
    keep(m, row, product, y + b * stride, add);
  }
}

#ifdef __AVX512VNNI__
// Processors that multiply bytes need none converted: an input x (columns) is scaled to whole
// numbers of 24 bits, three bytes d with signs, and y = scale Σ_k 256^k Σ_i w_i d_ik. What is lost
// is 2^-24 of the largest x. They multiply signed bytes by unsigned ones, so it is w + 128, and
// 128 Σ_i d_ik is taken off.
struct Digits {
  const int32_t* words;  // of four columns the first digits, the second, the third, and nothing
  int32_t surplus[4];
  float scale;

  Digits() = default;
  Digits(const float* x, int64_t columns, int32_t* out) : words(out) {
    __m512i largest = _mm512_castps_si512(_mm512_set1_ps(1e-30f)), sums = _mm512_setzero_si512();
    auto at = [&](int64_t i) { return __m512(load(x + i, int(std::min<int64_t>(LANES, columns - i)))); };
    for (int64_t i = 0; i < columns; i += LANES)  // as bits: NaN is the largest of all
      largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(at(i))));
    constexpr float most = 8355000;  // 127 (1 + 256 + 256²), and room to round
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    std::memcpy(&scale, &bits, 4);
    const __m512 pace = _mm512_set1_ps(most / scale);
    scale /= most;
    const __m512i signs = _mm512_set1_epi32(0x808080), half = _mm512_set1_epi8(char(128));
    const __m512i transposed = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    for (int64_t i = 0; i < columns; i += LANES) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(at(i), pace));
      __m512i digits = _mm512_xor_si512(_mm512_add_epi32(whole, signs), signs);
      digits = _mm512_shuffle_epi8(digits, transposed);
      sums = _mm512_dpbusd_epi32(sums, half, digits);
      std::memcpy(out + i, &digits, sizeof digits);
    }
    int32_t lanes[LANES];
    std::memcpy(lanes, &sums, sizeof lanes);
    for (int k = 0; k < 4; k++) surplus[k] = lanes[k] + lanes[4 + k] + lanes[8 + k] + lanes[12 + k];
  }
};

// As ``panel``.
template <int INPUTS>
inline void panel_of_bytes(const Matrix& m, int64_t row, const Digits* x, float* y, int64_t stride, bool add) {
  __m512i sums[INPUTS][3];
  for (int b = 0; b < INPUTS; b++)
    for (int k = 0; k < 3; k++) sums[b][k] = _mm512_set1_epi32(-x[b].surplus[k]);
  const char* at = m.weights + row * m.columns;
  for (int64_t i = 0; i < m.columns; i += 4, at += 4 * LANES) {
    const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(at), _mm512_set1_epi8(char(128)));
    for (int b = 0; b < INPUTS; b++)
      for (int k = 0; k < 3; k++) sums[b][k] = _mm512_dpbusd_epi32(sums[b][k], w, _mm512_set1_epi32(x[b].words[i + k]));
  }
  for (int b = 0; b < INPUTS; b++) {
    V digit[3];
    for (int k = 0; k < 3; k++) digit[k] = V(_mm512_cvtepi32_ps(sums[b][k]));
    const V product = (digit[2] * 65536.f + digit[1] * 256.f + digit[0]) * (load(m.scales + row, LANES) * x[b].scale);
    keep(m, row, product, y + b * stride, add);
  }
}

inline void product_of_bytes(const Matrix& m, int64_t from, int64_t to, int64_t B, const float* x, int64_t x_stride,
                             float* y, int64_t y_stride, bool add) {
  thread_local std::vector<int32_t> words;
  thread_local std::vector<Digits> inputs;
  const int64_t length = padded(m.columns);
  words.resize(B * length), inputs.resize(B);
  for (int64_t b = 0; b < B; b++) inputs[b] = Digits(x + b * x_stride, m.columns, words.data() + b * length);
  for (int64_t row = from; row < to; row += LANES)
    for (int64_t b = 0; b < B; b += together_from(b, B)) {
      float* out = y + b * y_stride;
      switch (together_from(b, B)) {
        case 8: panel_of_bytes<8>(m, row, &inputs[b], out, y_stride, add); break;
        case 4: panel_of_bytes<4>(m, row, &inputs[b], out, y_stride, add); break;
        case 2: panel_of_bytes<2>(m, row, &inputs[b], out, y_stride, add); break;
        default: panel_of_bytes<1>(m, row, &inputs[b], out, y_stride, add);
      }
    }
}
#endif


// Rows from..to of y (B, y_stride) = or += m x, of x (B, x_stride).
template <int KIND>
void product(const Matrix& m, int64_t from, int64_t to, int64_t B, const float* x, int64_t x_stride, float* y,
             int64_t y_stride, bool add) {
  thread_local std::vector<float> space;
  auto next = [&](int64_t b) { return together_from(b, B); };
  if (B > 1) {  // inputs that are multiplied together lie together
    space.resize(B * m.columns);
    for (int64_t b = 0; b < B; b += next(b))
      for (int64_t i = 0; i < m.columns; i++)
        for (int g = 0; g < next(b); g++) space[b * m.columns + i * next(b) + g] = x[(b + g) * x_stride + i];
    x = space.data();
  }
  for (int64_t row = from; row < to; row += LANES)
    for (int64_t b = 0; b < B; b += next(b)) {
      const float* in = x + b * m.columns;
      float* out = y + b * y_stride;
      switch (next(b)) {
        case 8: panel<KIND, 8, 1>(m, row, in, out, y_stride, add); break;
        case 4: panel<KIND, 4, 2>(m, row, in, out, y_stride, add); break;
        case 2: panel<KIND, 2, 4>(m, row, in, out, y_stride, add); break;
        default: panel<KIND, 1, 4>(m, row, in, out, y_stride, add);
      }
    }
}

// A member of the threads that step together.
struct Team {
  int64_t rank, size;
  void wait() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  int64_t begin(int64_t count, int64_t of = 1) const {
    const int64_t parts = (count + of - 1) / of;
    return std::min(count, parts * rank / size * of);
  }
  int64_t end(int64_t count, int64_t of = 1) const { return Team{rank + 1, size}.begin(count, of); }

  // This member's rows of y (B, ys) = m x, or += it.
  void multiply(const Matrix& m, int64_t B, const float* x, int64_t xs, float* y, int64_t ys, bool add = false) const {
    const int64_t from = begin(m.rows, LANES), to = end(m.rows, LANES);
    if (m.kind == FLOAT) product<FLOAT>(m, from, to, B, x, xs, y, ys, add);
    else if (m.kind == BFLOAT) product<BFLOAT>(m, from, to, B, x, xs, y, ys, add);
#ifdef __AVX512VNNI__
    // Three products of bytes an input: of several inputs that is more than converting the weights once.
    else if (B <= 4) product_of_bytes(m, from, to, B, x, xs, y, ys, add);
#endif
    else product<INT8>(m, from, to, B, x, xs, y, ys, add);
  }
};

inline float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }
inline float silu(float x) { return x * sigmoid(x); }
inline float log_sigmoid(float x) { return std::min(x, 0.f) - std::log1p(std::exp(-std::fabs(x))); }

void rms_norm(const float* x, const float* weight, int64_t count, double eps, float* out) {
  float squares = 0;
  for (int64_t i = 0; i < count; i++) squares += x[i] * x[i];
  const float scale = 1.f / std::sqrt(squares / float(count) + float(eps));
  for (int64_t i = 0; i < count; i++) out[i] = x[i] * scale * weight[i];
}

// An angle in [-pi, pi], or in (-2 pi, 2 pi), as hamt.memory.algebra has them.
inline float wrapped(float phase) {
  const float turns = std::nearbyint(phase / float(2 * M_PI));
  return phase - turns * 6.28125f - turns * float(2 * M_PI - 6.28125);
}
inline float reduced(float phase) { return float(std::fmod(double(phase), 2 * M_PI)); }

}  // namespace

struct hamt_model : Header {
  Matrix embedding, head;
  const float *norm, *lift = nullptr, *lower = nullptr;
  std::vector<Layer> layer;

  int64_t items() const { return heads * features; }
  int64_t inputs() const { return items() + 2 * heads * keys + heads * slots; }
  // Logits: those of the gates, and then what a token adds to the turn of its position.
  int64_t logits() const { return gates + (turning == BY_TOKEN ? turning_heads * turning_phases : 0); }

  void token(int64_t id, float* out) const {
    for (int64_t i = 0; i < width; i++) out[i] = number(embedding, id, i) * float(multiplier);
  }
};

namespace {

// Everything that a step needs beside weights and states; what is longer than it seems is padded.
struct Space {
  std::vector<float> floats;
  float *x, *normed, *conditioned, *inputs, *logits, *gate, *mixed, *inner, *up;
  float *items, *keys, *unbinding, *write, *read, *alpha, *beta;
  int64_t d, big, many, hidden, told;  // strides

  Space(const hamt_model& m, int64_t B) {
    d = padded(m.width), big = padded(m.items()), many = padded(m.inputs()), hidden = padded(m.inner);
    told = padded(m.logits());
    const int64_t counts[] = {d, d, d, many, told, big, big, hidden, hidden,
                              m.items(), m.heads * m.keys, m.heads * m.keys, m.heads * m.slots,
                              m.heads * m.slots, m.heads * m.slots, m.heads};
    float** const places[] = {&x, &normed, &conditioned, &inputs, &logits, &gate, &mixed, &inner, &up,
                              &items, &keys, &unbinding, &write, &read, &alpha, &beta};
    int64_t size = 0;
    for (int64_t count : counts) size += padded(B * count);
    floats.assign(size, 0.f);
    float* at = floats.data();
    for (size_t i = 0; i < std::size(places); at += padded(B * counts[i]), i++) *places[i] = at;
  }
};

// The gates of a head from its logits: (3) in ../memory/write_rules.
void gates_of(const hamt_model& m, const float* logits, int64_t h, float* write, float* alpha, float* beta) {
  const int64_t S = m.slots, all = m.heads * S;
  const float floor = std::exp(-20.f);
  float squares = 0;
  for (int64_t s = 0; s < S; s++) {
    if (m.rule == CONVEX) {
      write[s] = sigmoid(logits[h * S + s]);
      const float kept = std::max(1.f - write[s], std::numeric_limits<float>::min());
      alpha[s] = std::max(kept * float(1 - m.decay_rate), floor);
      continue;
    }
    const float forget = log_sigmoid(logits[h * S + s]), second = logits[all + h * S + s];
    alpha[s] = std::exp(std::max(forget, -20.f));
    write[s] = m.rule == DELTA ? second : sigmoid(second);
    if (m.rule == NORMALIZED) write[s] *= std::sqrt(std::max(-std::expm1(2 * forget), std::numeric_limits<float>::min()));
    squares += second * second;
  }
  if (m.rule == DELTA) {
    const float length = std::max(std::sqrt(squares), 1e-12f);
    for (int64_t s = 0; s < S; s++) write[s] /= length;
    *beta = sigmoid(logits[2 * all + h]);
  }
}

// p = p ⊛ ρ, and both keys composed with it.
void turn_keys(const hamt_model& m, const Layer& layer, const float* by_token, int64_t h, float* position, float* keys,
               float* unbinding) {
  for (int64_t i = 0; i < m.keys; i++) {
    float turn = layer.turn[h * m.keys + i];
    if (m.turning == BY_TOKEN && h < m.turning_heads && i < m.turning_phases)
      turn += by_token[h * m.turning_phases + i];
    if (m.binding == ELEMENTWISE) {
      if (position[i] == 0) position[i] = 1;  // before the first token
      if (turn < 0) position[i] = -position[i];
      keys[i] *= position[i];
      unbinding[i] *= position[i];
      continue;
    }
    if (m.binding == CIRCULAR && i == 0) turn = 0;
    position[i] = wrapped(wrapped(reduced(turn)) + reduced(position[i]));
    keys[i] += position[i];
    unbinding[i] += position[i];
  }
}

// A head of one row: bind, superpose, read, unbind, normalise. What it has read goes to ``mixed``.
void head_step(const hamt_model& m, const Layer& layer, const hamt_layer& state, Space& t, int64_t B, int64_t b,
               int64_t h) {
  const int64_t F = m.features, K = m.keys, S = m.slots, bh = b * m.heads + h;
  const float *in = t.inputs + b * t.many, *logits = t.logits + b * t.told;
  float *item = t.items + bh * F, *keys = t.keys + bh * K, *unbinding = t.unbinding + bh * K;
  float* mixed = t.mixed + b * t.big + h * F;
  const float* own = in + h * F;
  if (m.lift) {
    for (int64_t i = 0; i < F; i++) {
      float sum = 0;
      for (int64_t j = 0; j < F; j++) sum += m.lift[i * F + j] * own[j];
      item[i] = sum;
    }
  } else {
    std::copy_n(own, F, item);
  }
  for (int64_t i = 0; i < K; i++) {
    const float raw[] = {in[m.items() + h * K + i], in[m.items() + (m.heads + h) * K + i]};
    float* const to[] = {keys, unbinding};
    for (int j = 0; j < 2; j++) {
      if (m.binding == ELEMENTWISE) to[j][i] = raw[j] >= 0 ? 1.f : -1.f;
      else to[j][i] = m.binding == CIRCULAR && i == 0 ? 0.f : raw[j];
    }
  }
  if (m.turning != STILL) turn_keys(m, layer, logits + m.gates, h, state.position + bh * K, keys, unbinding);
  for (int64_t s = 0; s < S; s++)
    t.read[bh * S + s] = in[m.items() + 2 * m.heads * K + h * S + s] + layer.read_bias[h * S + s];
  gates_of(m, logits, h, t.write + bh * S, t.alpha + bh * S, t.beta + bh);

  Problem<float> q = {};
  q.B = B, q.N = 1, q.H = m.heads, q.S = S, q.F = F, q.phases = m.binding != ELEMENTWISE;
  q.x = t.items, q.k = t.keys, q.u = t.unbinding, q.w = t.write, q.r = t.read, q.alpha = t.alpha, q.beta = t.beta;
  // The read-outs (B, H, F) take the place of the items.
  if (m.rule == DELTA) forward_head<float, true>(q, b, h, 0, F / 2, state.slots, t.items, nullptr);
  else forward_head<float, false>(q, b, h, 0, F / 2, state.slots, t.items, nullptr);

  if (m.lower) {
    for (int64_t i = 0; i < F; i++) {
      float sum = 0;
      for (int64_t j = 0; j < F; j++) sum += m.lower[i * F + j] * item[j];
      mixed[i] = sum;
    }
    rms_norm(mixed, layer.head_norm, F, m.eps, mixed);
  } else {
    rms_norm(item, layer.head_norm, F, m.eps, mixed);
  }
  if (m.output_gate)
    for (int64_t i = 0; i < F; i++) mixed[i] *= silu(t.gate[b * t.big + h * F + i]);
}

// Normalise a row, and convolve it with what the state has of the last tokens; logits start as biases.
void condition(const hamt_model& m, const Layer& layer, const hamt_layer& state, Space& t, int64_t b) {
  const int64_t d = m.width, reach = m.taps - 1;
  float *normed = t.normed + b * t.d, *out = t.conditioned + b * t.d;
  std::fill_n(std::copy_n(layer.gate_bias, m.gates, t.logits + b * t.told), m.logits() - m.gates, 0.f);
  rms_norm(t.x + b * t.d, layer.mixer_norm, d, m.eps, normed);
  if (reach < 1) {
    std::copy_n(normed, d, out);
    return;
  }
  float* tail = state.conv + b * reach * d;
  for (int64_t i = 0; i < d; i++) out[i] = normed[i] * layer.conv[reach * d + i];
  for (int64_t tap = 0; tap < reach; tap++)
    for (int64_t i = 0; i < d; i++) out[i] += tail[tap * d + i] * layer.conv[tap * d + i];
  std::copy(tail + d, tail + reach * d, tail);
  std::copy_n(normed, d, tail + (reach - 1) * d);
}

// All layers, on x (B, d).
void run(const hamt_model& m, Team team, int64_t B, const hamt_layer* states, Space& t) {
  const int64_t d = t.d, heads = B * m.heads;
  for (int64_t l = 0; l < m.layers; l++) {
    const Layer& layer = m.layer[l];
    for (int64_t b = team.begin(B); b < team.end(B); b++) condition(m, layer, states[l], t, b);
    team.wait();
    team.multiply(layer.gates, B, t.conditioned, d, t.logits + (m.gating ? 0 : m.gates), t.told, true);
    team.multiply(layer.inputs, B, t.conditioned, d, t.inputs, t.many);
    if (m.output_gate) team.multiply(layer.output_gate, B, t.normed, d, t.gate, t.big);
    team.wait();
    for (int64_t i = team.begin(heads); i < team.end(heads); i++)
      head_step(m, layer, states[l], t, B, i / m.heads, i % m.heads);
    team.wait();
    team.multiply(layer.output, B, t.mixed, t.big, t.x, d, true);
    team.wait();
    if (!m.inner) continue;
    for (int64_t b = team.begin(B); b < team.end(B); b++)
      rms_norm(t.x + b * d, layer.mlp_norm, m.width, m.eps, t.normed + b * d);
    team.wait();
    team.multiply(layer.mlp_gate, B, t.normed, d, t.inner, t.hidden);
    team.multiply(layer.mlp_up, B, t.normed, d, t.up, t.hidden);
    for (int64_t b = 0; b < B; b++)  // of the rows that this member has multiplied
      for (int64_t i = team.begin(m.inner, LANES); i < team.end(m.inner, LANES); i++)
        t.inner[b * t.hidden + i] = silu(t.inner[b * t.hidden + i]) * t.up[b * t.hidden + i];
    team.wait();
    team.multiply(layer.mlp_down, B, t.inner, t.hidden, t.x, d, true);
    team.wait();
  }
}

// Let a team of threads work on the same thing.
template <typename Work> void together(int64_t threads, Work work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  work(Team{0, 1});
}

// Rows (B, width) into rows of another stride, or back.
void copy_rows(int64_t B, int64_t width, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t b = 0; b < B; b++) std::copy_n(from + b * from_stride, width, to + b * to_stride);
}

// Where each tensor is in the bytes: one after the other, each at a multiple of 64.
struct Reader {
  const char* bytes;
  int64_t count, at;

  // Nothing is taken beyond the end: then ``at`` is no longer within the bytes.
  const char* take(int64_t size) {
    const char* here = bytes + at;
    if (at > count || size < 0 || size > count - at) at = count + 1;
    else at += (size + 63) / 64 * 64;
    return at > count ? bytes : here;
  }
  const float* floats(int64_t size) { return reinterpret_cast<const float*>(take(4 * size)); }
  Matrix matrix(int64_t rows, int64_t columns, int64_t kind) {
    Matrix m;
    m.rows = rows, m.columns = (columns + 3) / 4 * 4, m.kind = kind;
    int64_t size;  // sizes may be anything: their product may be no number of 64 bits
    if (__builtin_mul_overflow(padded(rows), m.columns, &size) || __builtin_mul_overflow(size, size_of(kind), &size))
      size = -1;
    m.weights = take(size);
    if (kind == INT8) m.scales = floats(padded(rows));
    return m;
  }
};

}  // namespace

namespace {

// A step reads bytes from large pages half as fast again, and the kernel may put them there: it is
// asked for once, and where it has none all stays as it is.
void in_large_pages(const char* bytes, int64_t count) {
#ifdef __linux__
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE of Linux 6.1: now, and not some time later
  const intptr_t page = sysconf(_SC_PAGESIZE), end = intptr_t(bytes) + count;
  const intptr_t from = (intptr_t(bytes) + page - 1) / page * page, to = end / page * page;
  if (from >= to) return;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(from), to - from, COLLAPSE);
#endif
}

// Whether sizes are such as a model has: a file may hold anything.
bool sound(const Header& h) {
  const int64_t most = int64_t(1) << 24;
  for (int64_t size : {h.vocab, h.width, h.layers, h.heads, h.slots, h.features})
    if (size < 1 || size > most) return false;
  for (int64_t size : {h.taps, h.inner, h.turning_heads, h.turning_phases})
    if (size < 0 || size > most) return false;
  const int64_t of_a_rule[] = {2 * h.heads * h.slots, 2 * h.heads * h.slots, h.heads * h.slots,
                               2 * h.heads * h.slots + h.heads};
  return h.kind >= FLOAT && h.kind <= INT8 && h.rule >= GATED && h.rule <= DELTA && h.binding >= ELEMENTWISE &&
         h.binding <= CIRCULAR && h.turning >= STILL && h.turning <= BY_TOKEN && h.turning_heads <= h.heads &&
         h.turning_phases <= h.keys && h.features % 2 == 0 && h.gates == of_a_rule[h.rule] &&
         h.keys == (h.binding == ELEMENTWISE ? h.features : h.features / 2);
}

}  // namespace

hamt_model* hamt_open(const void* bytes, int64_t count) {
  auto m = std::make_unique<hamt_model>();
  if (count < int64_t(sizeof(Header))) return nullptr;
  std::memcpy(static_cast<Header*>(m.get()), bytes, sizeof(Header));
  if (std::memcmp(m->magic, MAGIC, sizeof MAGIC) || m->bytes != count || !sound(*m)) return nullptr;
  Reader from = {static_cast<const char*>(bytes), count, 0};
  from.take(sizeof(Header));
  const int64_t d = m->width, kind = m->kind, F = m->features;
  m->embedding = from.matrix(m->vocab, d, kind);
  m->head = m->tied ? m->embedding : from.matrix(m->vocab, d, kind);
  m->norm = from.floats(d);
  if (m->binding == CIRCULAR) m->lift = from.floats(F * F), m->lower = from.floats(F * F);
  for (int64_t l = 0; l < m->layers && from.at <= count; l++) {
    Layer layer = {};
    layer.mixer_norm = from.floats(d);
    if (m->taps > 1) layer.conv = from.floats(m->taps * d);
    layer.inputs = from.matrix(m->inputs(), d, kind);
    layer.gates = from.matrix(m->logits() - (m->gating ? 0 : m->gates), d, FLOAT);
    layer.gate_bias = from.floats(m->gates);
    layer.read_bias = from.floats(m->heads * m->slots);
    if (m->turning != STILL) layer.turn = from.floats(m->heads * m->keys);
    layer.head_norm = from.floats(F);
    if (m->output_gate) layer.output_gate = from.matrix(m->items(), d, kind);
    layer.output = from.matrix(d, m->items(), kind);
    if (m->inner) {
      layer.mlp_norm = from.floats(d);
      layer.mlp_gate = from.matrix(m->inner, d, kind);
      layer.mlp_up = from.matrix(m->inner, d, kind);
      layer.mlp_down = from.matrix(d, m->inner, kind);
    }
    m->layer.push_back(layer);
  }
  if (from.at != count) return nullptr;
  in_large_pages(from.bytes, count);
  return m.release();
}

void hamt_close(hamt_model* model) { delete model; }

hamt_sizes hamt_sizes_of(const hamt_model* m) {
  return {m->heads * m->slots * m->features, m->turning == STILL ? 0 : m->heads * m->keys,
          std::max<int64_t>(m->taps - 1, 0) * m->width, m->layers, m->vocab};
}

int hamt_run(const hamt_model* m, int64_t rows, float* hidden, const hamt_layer* layers, int64_t threads) try {
  Space space(*m, rows);
  copy_rows(rows, m->width, hidden, m->width, space.x, space.d);
  together(threads, [&](Team team) { run(*m, team, rows, layers, space); });
  for (int64_t b = 0; b < rows; b++) rms_norm(space.x + b * space.d, m->norm, m->width, m->eps, hidden + b * m->width);
  return 0;
} catch (const std::exception&) {  // there is no memory: no program in C could catch it
  return 2;
}

int hamt_head(const hamt_model* m, int64_t rows, const float* normed, float* logits, int64_t threads) try {
  const int64_t stride = padded(m->width);
  std::vector<float> inputs(rows * stride);
  copy_rows(rows, m->width, normed, m->width, inputs.data(), stride);
  together(threads, [&](Team team) { team.multiply(m->head, rows, inputs.data(), stride, logits, m->vocab); });
  return 0;
} catch (const std::exception&) {
  return 2;
}

int hamt_step(const hamt_model* m, int64_t rows, const int64_t* tokens, const hamt_layer* layers, float* logits,
              int64_t threads) try {
  for (int64_t b = 0; b < rows; b++)
    if (tokens[b] < 0 || tokens[b] >= m->vocab) return 1;
  std::vector<float> hidden(rows * m->width);
  for (int64_t b = 0; b < rows; b++) m->token(tokens[b], hidden.data() + b * m->width);
  if (hamt_run(m, rows, hidden.data(), layers, threads)) return 2;
  return hamt_head(m, rows, hidden.data(), logits, threads);
} catch (const std::exception&) {
  return 2;
}
