// The recurrence of the holographic memory, token by token, for CPUs: forward and backward.

#include "recurrence.h"

namespace {

template <typename T> struct Gradients {
  const T *y, *checkpoints;
  T *M, *x, *k, *u, *w, *r, *log_alpha, *beta;  // M: of the final state, and then of the first
};

// Everything of one chunk that the backward pass needs again, for one vector of pairs.
template <typename T> struct Workspace {
  int64_t S;
  std::vector<Vec<T>> states, bound, mixed, grads, lanes;
  Workspace(int64_t chunk, int64_t slots)
      : S(slots), states((chunk + 1) * slots * 2), bound(chunk * 2), mixed(chunk * 2), grads(slots * 2),
        lanes(chunk * (3 * slots + 1)) {}
  Vec<T>* state(int64_t i) { return states.data() + i * S * 2; }           // before token i of the chunk
  Vec<T>* lane(int64_t i) { return lanes.data() + i * (3 * S + 1); }        // partial sums of its gates
};

template <typename T, bool DELTA>
void backward_block(const Problem<T>& q, const Gradients<T>& g, Workspace<T>& space, int64_t b, int64_t h, int64_t c,
                    int64_t pair, int count) {
  const int64_t start = c * q.chunk, end = std::min(q.N, start + q.chunk);
  const T* saved = g.checkpoints + ((b * q.H + h) * q.chunks() + c) * q.S * q.F + pair;
  for (int64_t s = 0; s < q.S; s++) {
    space.state(0)[2 * s] = load(saved + s * q.F, count);
    space.state(0)[2 * s + 1] = load(saved + s * q.F + q.half(), count);
  }
  for (int64_t t = start; t < end; t++) {  // forward again, every state kept
    const int64_t i = t - start, token = q.token(b, t, h);
    const T* item = q.x + token * q.F + pair;
    Vec<T> re = load(item, count), im = load(item + q.half(), count);
    turn(q.phases, key_at(q, q.k, b, t, h, pair, count), false, re, im);
    space.bound[2 * i] = re;
    space.bound[2 * i + 1] = im;
    const bool reset = q.reset && q.reset[b * q.N + t];
    advance<T, DELTA, true>(q, token, reset, (T*)space.state(i), L<T>, 2 * L<T>, (T*)space.state(i + 1), L<T>, 2 * L<T>,
                      L<T>, re, im, space.mixed[2 * i], space.mixed[2 * i + 1]);
  }
  T* dM = g.M + (b * q.H + h) * q.S * q.F + pair;
  Vec<T>*after = space.state(end - start), *grads = space.grads.data();  // state after the token at hand
  for (int64_t s = 0; s < q.S; s++) {
    grads[2 * s] = load(dM + s * q.F, count);
    grads[2 * s + 1] = load(dM + s * q.F + q.half(), count);
  }
  for (int64_t t = end - 1; t >= start; t--) {
    const int64_t i = t - start, token = q.token(b, t, h);
    const T *w = q.w + token * q.S, *r = q.r + token * q.S, *alpha = q.alpha + token * q.S;
    const bool reset = q.reset && q.reset[b * q.N + t];
    Vec<T>*lane = space.lane(i), *before = space.state(i);
    // y = turn(mixed, -u): its gradient, turned back, is that of the mixture of slots.
    const T* dy = g.y + token * q.F + pair;
    Vec<T> re = load(dy, count), im = load(dy + q.half(), count);
    const Key<T> out = key_at(q, q.u, b, t, h, pair, count), in = key_at(q, q.k, b, t, h, pair, count);
    if (!q.phases) {
      store(g.u + token * q.F + pair, re * space.mixed[2 * i], count);
      store(g.u + token * q.F + pair + q.half(), im * space.mixed[2 * i + 1], count);
    }
    turn(q.phases, out, false, re, im);
    if (q.phases) store(g.u + token * q.half() + pair, re * space.mixed[2 * i + 1] - im * space.mixed[2 * i], count);
    Vec<T> new_re = {}, new_im = {};
    Vec<T> x_re = space.bound[2 * i], x_im = space.bound[2 * i + 1];
    for (int64_t s = 0; s < q.S; s++) {
      lane[s] += re * after[2 * s] + im * after[2 * s + 1];
      grads[2 * s] += r[s] * re;
      grads[2 * s + 1] += r[s] * im;
      new_re += w[s] * grads[2 * s];
      new_im += w[s] * grads[2 * s + 1];
    }
    if (DELTA) {
      const T beta = q.beta[token];
      Vec<T> e_re = x_re, e_im = x_im;  // x - what is held
      for (int64_t s = 0; s < q.S && !reset; s++) {
        e_re -= w[s] * alpha[s] * before[2 * s];
        e_im -= w[s] * alpha[s] * before[2 * s + 1];
      }
      lane[3 * q.S] += new_re * e_re + new_im * e_im;
      new_re *= beta;
      new_im *= beta;
      for (int64_t s = 0; s < q.S; s++) {
        lane[q.S + s] += beta * (grads[2 * s] * e_re + grads[2 * s + 1] * e_im);
        if (!reset) lane[q.S + s] -= alpha[s] * (new_re * before[2 * s] + new_im * before[2 * s + 1]);
        grads[2 * s] -= w[s] * new_re;
        grads[2 * s + 1] -= w[s] * new_im;
      }
    } else {
      for (int64_t s = 0; s < q.S; s++) lane[q.S + s] += grads[2 * s] * x_re + grads[2 * s + 1] * x_im;
    }
    for (int64_t s = 0; s < q.S; s++) {
      if (reset) {
        grads[2 * s] = grads[2 * s + 1] = Vec<T>{};
        continue;
      }
      grads[2 * s] *= alpha[s];
      grads[2 * s + 1] *= alpha[s];
      lane[2 * q.S + s] += grads[2 * s] * before[2 * s] + grads[2 * s + 1] * before[2 * s + 1];
    }
    if (q.phases) {
      store(g.k + token * q.half() + pair, new_im * x_re - new_re * x_im, count);
    } else {
      const T* item = q.x + token * q.F + pair;
      store(g.k + token * q.F + pair, new_re * load(item, count), count);
      store(g.k + token * q.F + pair + q.half(), new_im * load(item + q.half(), count), count);
    }
    turn(q.phases, in, true, new_re, new_im);
    store(g.x + token * q.F + pair, new_re, count);
    store(g.x + token * q.F + pair + q.half(), new_im, count);
    after = before;
  }
  for (int64_t s = 0; s < q.S; s++) {
    store(dM + s * q.F, grads[2 * s], count);
    store(dM + s * q.F + q.half(), grads[2 * s + 1], count);
  }
}

template <typename T, bool DELTA>
void backward_head(const Problem<T>& q, const Gradients<T>& g, int64_t b, int64_t h, int64_t part, int64_t from,
                   int64_t to) {
  Workspace<T> space(q.chunk, q.S);
  const int64_t gates = part * q.B * q.N * q.H;
  for (int64_t c = q.chunks() - 1; c >= 0; c--) {
    std::fill(space.lanes.begin(), space.lanes.end(), Vec<T>{});
    for (int64_t pair = from; pair < to; pair += L<T>)
      backward_block<T, DELTA>(q, g, space, b, h, c, pair, int(std::min<int64_t>(L<T>, to - pair)));
    for (int64_t t = c * q.chunk; t < std::min(q.N, (c + 1) * q.chunk); t++) {
      const Vec<T>* lane = space.lane(t - c * q.chunk);
      const int64_t token = gates + q.token(b, t, h);
      for (int64_t s = 0; s < q.S; s++) {
        g.r[token * q.S + s] = sum<T>(lane[s]);
        g.w[token * q.S + s] = sum<T>(lane[q.S + s]);
        g.log_alpha[token * q.S + s] = sum<T>(lane[2 * q.S + s]);
      }
      if (DELTA) g.beta[token] = sum<T>(lane[3 * q.S]);
    }
  }
}

template <typename T> Problem<T> problem(const Sizes* sizes, void* const* in) {
  auto at = [&](int i) { return static_cast<const T*>(in[i]); };
  return {*sizes, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), static_cast<const uint8_t*>(in[8])};
}

// Heads, and parts of their features where there are fewer heads than threads, are independent.
template <typename T, typename Run> void each_part(const Problem<T>& q, Run run) {
  const int64_t vectors = (q.half() + L<T> - 1) / L<T>;
#pragma omp parallel for num_threads(q.threads) schedule(dynamic)
  for (int64_t task = 0; task < q.B * q.H * q.parts; task++) {
    const int64_t part = task % q.parts, head = task / q.parts;
    const int64_t from = vectors * part / q.parts * L<T>;
    const int64_t to = std::min(q.half(), vectors * (part + 1) / q.parts * L<T>);
    run(head / q.H, head % q.H, part, from, to);
  }
}

template <typename T> void forward(const Sizes* sizes, void* const* in, void* const* out) {
  const Problem<T> q = problem<T>(sizes, in);
  T *M = (T*)out[0], *y = (T*)out[1], *checkpoints = (T*)out[2];
  each_part(q, [&](int64_t b, int64_t h, int64_t, int64_t from, int64_t to) {
    if (q.beta) forward_head<T, true>(q, b, h, from, to, M, y, checkpoints);
    else forward_head<T, false>(q, b, h, from, to, M, y, checkpoints);
  });
}

template <typename T> void backward(const Sizes* sizes, void* const* in, void* const* out) {
  const Problem<T> q = problem<T>(sizes, in);
  auto at = [&](int i) { return static_cast<T*>(out[i]); };
  const Gradients<T> g = {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9)};
  each_part(q, [&](int64_t b, int64_t h, int64_t part, int64_t from, int64_t to) {
    if (q.beta) backward_head<T, true>(q, g, b, h, part, from, to);
    else backward_head<T, false>(q, g, b, h, part, from, to);
  });
}

}  // namespace

#define EXPORT(pass, type) \
  extern "C" void hamt_##pass##_##type(const Sizes* sizes, void* const* in, void* const* out) { \
    pass<type>(sizes, in, out); \
  }
EXPORT(forward, float)
EXPORT(forward, double)
EXPORT(backward, float)
EXPORT(backward, double)
