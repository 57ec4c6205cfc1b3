// The loop over tokens of the holographic memory: what fused.cpp and step.cpp share.
//
// The slots of a head stay in the first cache while the loop over tokens binds on the way in and
// unbinds on the way out: nothing but inputs and outputs travels to memory. Equations as in
// ../memory/holographic.py and ../memory/write_rules/.
//
// Layout, all contiguous: x, y (B,N,H,F); k, u (B,N,H,K); w, r, alpha (B,N,H,S); beta (B,N,H);
// M (B,H,S,F); p (1 or B,N,1 or H,K); reset (B,N). F features are K pairs (i, i + K) under phases;
// under signs K = F, and the "pair" is still (i, i + F/2). L lanes of a vector.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int BYTES = 64;
template <typename T> struct Lanes;
template <> struct Lanes<float> {
  typedef float vec __attribute__((vector_size(BYTES)));
  typedef int32_t ivec __attribute__((vector_size(BYTES)));
};
template <> struct Lanes<double> {
  typedef double vec __attribute__((vector_size(BYTES)));
  typedef int64_t ivec __attribute__((vector_size(BYTES)));
};
template <typename T> using Vec = typename Lanes<T>::vec;
template <typename T> constexpr int L = BYTES / sizeof(T);

template <typename T> inline Vec<T> load(const T* at, int count) {
  Vec<T> v = {};
  if (count == L<T>) std::memcpy(&v, at, BYTES);
  else std::memcpy(&v, at, count * sizeof(T));
  return v;
}
template <typename T> inline void store(T* at, const Vec<T>& v, int count) {
  if (count == L<T>) std::memcpy(at, &v, BYTES);
  else std::memcpy(at, &v, count * sizeof(T));
}
template <typename T> inline T sum(const Vec<T>& v) {
  T total = 0;
  for (int i = 0; i < L<T>; i++) total += v[i];
  return total;
}

// Whether any phase is too large for the reduction below, or no number.
inline bool any_beyond(const Vec<float>& x) {
  typedef Lanes<float>::ivec ivec;
  constexpr int32_t MAGNITUDE = 0x7fffffff, LIMIT = 0x46000000;  // 8192, as bits; of NaN they are larger
  const ivec beyond = ((ivec)x & MAGNITUDE) > LIMIT;
  int64_t words[BYTES / 8], found = 0;
  std::memcpy(words, &beyond, BYTES);
  for (int64_t word : words) found |= word;
  return found;
}
__attribute__((noinline, cold)) void sincos_of_any(const Vec<float>& x, Vec<float>& sine, Vec<float>& cosine) {
  for (int i = 0; i < L<float>; i++) {
    sine[i] = float(std::sin(double(x[i])));
    cosine[i] = float(std::cos(double(x[i])));
  }
}

// Cody-Waite reduction to [-pi/4, pi/4] and the minimax polynomials of Cephes (Moshier 1992).
inline void sincos(const Vec<float>& x, Vec<float>& sine, Vec<float>& cosine) {
  typedef Lanes<float>::ivec ivec;
  if (__builtin_expect(any_beyond(x), 0)) {
    Vec<float> both[2];  // what has an address is not kept in registers
    sincos_of_any(x, both[0], both[1]);
    sine = both[0];
    cosine = both[1];
    return;
  }
  const Vec<float> turns = (x * 0.636619772f + 12582912.f) - 12582912.f;
  Vec<float> a = x - turns * 1.5703125f;
  a = a - turns * 4.837512969970703125e-4f;
  a = a - turns * 7.54978995489188216e-8f;
  const Vec<float> z = a * a;
  const Vec<float> s = a + a * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
  const Vec<float> c =
      1.f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const ivec quadrant = __builtin_convertvector(turns, ivec);
  const ivec odd = (quadrant & 1) != 0;
  const Vec<float> s1 = odd ? c : s, c1 = odd ? s : c;
  sine = ((quadrant & 2) != 0) ? -s1 : s1;
  cosine = (((quadrant + 1) & 2) != 0) ? -c1 : c1;
}
inline void sincos(const Vec<double>& x, Vec<double>& sine, Vec<double>& cosine) {
  for (int i = 0; i < L<double>; i++) {
    sine[i] = std::sin(x[i]);
    cosine[i] = std::cos(x[i]);
  }
}

// The same fields in the same order as in fused.py.
struct Sizes {
  int64_t B, N, H, S, F, chunk, phases, parts, position_rows, position_heads, threads;
};
template <typename T> struct Problem : Sizes {
  const T *x, *k, *u, *w, *r, *alpha, *beta, *p;
  const uint8_t* reset;
  int64_t half() const { return F / 2; }
  int64_t chunks() const { return (N + chunk - 1) / chunk; }
  int64_t token(int64_t b, int64_t t, int64_t h) const { return (b * N + t) * H + h; }
};

// The key of one token for the pairs from `pair` on: (cos, sin), or the signs of both halves.
template <typename T> struct Key { Vec<T> first, second; };

template <typename T>
inline Key<T> key_at(const Problem<T>& q, const T* keys, int64_t b, int64_t t, int64_t h, int64_t pair, int count) {
  if (!q.phases) {
    const T* signs = keys + q.token(b, t, h) * q.F + pair;
    return {load(signs, count), load(signs + q.half(), count)};
  }
  Vec<T> phase = load(keys + q.token(b, t, h) * q.half() + pair, count);
  if (q.p) {
    const int64_t row = q.position_rows > 1 ? b : 0, head = q.position_heads > 1 ? h : 0;
    phase += load(q.p + ((row * q.N + t) * q.position_heads + head) * q.half() + pair, count);
  }
  Key<T> key;
  sincos(phase, key.second, key.first);
  return key;
}
template <typename T>
inline void turn(bool phases, const Key<T>& key, bool back, Vec<T>& re, Vec<T>& im) {
  if (!phases) {
    re *= key.first;
    im *= key.second;
    return;
  }
  const Vec<T> sine = back ? -key.second : key.second;
  const Vec<T> turned = re * key.first - im * sine;
  im = re * sine + im * key.first;
  re = turned;
}

// One token over the slots of one vector of pairs; M is read with one stride and written with another.
template <typename T, bool DELTA, bool WHOLE>
inline void advance(const Problem<T>& q, int64_t token, bool reset, const T* from, int64_t from_half, int64_t from_slot,
                    T* to, int64_t to_half, int64_t to_slot, int count, Vec<T> re, Vec<T> im, Vec<T>& out_re,
                    Vec<T>& out_im) {
  if (WHOLE) count = L<T>;
  const T *w = q.w + token * q.S, *r = q.r + token * q.S, *alpha = q.alpha + token * q.S;
  out_re = Vec<T>{};
  out_im = Vec<T>{};
  if (DELTA) {
    if (!reset) {
      Vec<T> held_re = {}, held_im = {};
      for (int64_t s = 0; s < q.S; s++) {
        const T weight = w[s] * alpha[s];
        held_re += weight * load(from + s * from_slot, count);
        held_im += weight * load(from + s * from_slot + from_half, count);
      }
      re -= held_re;
      im -= held_im;
    }
    re *= q.beta[token];
    im *= q.beta[token];
  }
  for (int64_t s = 0; s < q.S; s++) {
    Vec<T> m_re = w[s] * re, m_im = w[s] * im;
    if (!reset) {
      m_re += alpha[s] * load(from + s * from_slot, count);
      m_im += alpha[s] * load(from + s * from_slot + from_half, count);
    }
    store(to + s * to_slot, m_re, count);
    store(to + s * to_slot + to_half, m_im, count);
    out_re += r[s] * m_re;
    out_im += r[s] * m_im;
  }
}

// Token by token over all features of a part: the slots stay in the first cache, everything else streams.
template <typename T, bool DELTA>
void forward_head(const Problem<T>& q, int64_t b, int64_t h, int64_t from, int64_t to, T* M, T* y, T* checkpoints) {
  T* state = M + (b * q.H + h) * q.S * q.F;
  for (int64_t t = 0; t < q.N; t++) {
    if (checkpoints && t % q.chunk == 0) {
      T* saved = checkpoints + ((b * q.H + h) * q.chunks() + t / q.chunk) * q.S * q.F;
      for (int64_t half = 0; half < 2 * q.S; half++)
        std::copy_n(state + half * q.half() + from, to - from, saved + half * q.half() + from);
    }
    const int64_t token = q.token(b, t, h);
    const bool reset = q.reset && q.reset[b * q.N + t];
    for (int64_t pair = from; pair < to; pair += L<T>) {
      const int count = int(std::min<int64_t>(L<T>, to - pair));
      const T* item = q.x + token * q.F + pair;
      Vec<T> re = load(item, count), im = load(item + q.half(), count), out_re, out_im;
      turn(q.phases, key_at(q, q.k, b, t, h, pair, count), false, re, im);
      if (count == L<T>)
        advance<T, DELTA, true>(q, token, reset, state + pair, q.half(), q.F, state + pair, q.half(), q.F, count, re,
                                im, out_re, out_im);
      else
        advance<T, DELTA, false>(q, token, reset, state + pair, q.half(), q.F, state + pair, q.half(), q.F, count, re,
                                 im, out_re, out_im);
      turn(q.phases, key_at(q, q.u, b, t, h, pair, count), true, out_re, out_im);
      store(y + token * q.F + pair, out_re, count);
      store(y + token * q.F + pair + q.half(), out_im, count);
    }
  }
}

}  // namespace
