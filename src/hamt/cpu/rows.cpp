// What a layer does to its tokens between two matrix products, forward and backward, each in one
// pass over memory: RMSNorm (with a gate), SwiGLU, and the short convolution.
//
// Layout, all contiguous. R rows of F numbers; for the convolution B rows of N tokens of F numbers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// hamt.cpu.rows has the same, in this order.
struct Sizes {
  int64_t batch, length, width, taps, threads;
  double eps;
};

inline double exp_of(double x) { return std::exp(x); }

// e^x as 2^n · e^r with |r| ≤ ln 2 / 2, without a branch, so that compilers make vectors of it; two
// units in the last place. Beyond ±87 it stays finite.
inline float exp_of(float x) {
  x = std::min(std::max(x, -87.f), 87.f);
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 · 2^23: n in the last bits
  uint32_t n;
  std::memcpy(&n, &shifted, 4);
  const float r = x - (shifted - 12582912.f) * 0.693147182f - (shifted - 12582912.f) * -1.90465421e-9f;
  float value = 1.f + r * (1.f + r * (0.5f + r * (0.166666672f + r * (0.0416664853f + r * (0.00833336077f + r * 0.00139449199f)))));
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += n << 23;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename T> inline T sigmoid(T x) { return T(1) / (T(1) + exp_of(-x)); }

// Calls run(thread, first, last) for every thread's share of `count` rows.
template <typename Run> void share(int64_t count, int64_t threads, Run run) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) run(part, count * part / threads, count * (part + 1) / threads);
}

// 1 / rms(x) of one row.
template <typename T> T scale_of(const Sizes& q, const T* x) {
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < q.width; i++) squares += x[i] * x[i];
  return T(1) / std::sqrt(squares / T(q.width) + T(q.eps));
}

// out = x / rms(x) ⊙ weight (⊙ silu(gate)).
template <typename T> void norm(const Sizes& q, const T* x, const T* weight, const T* gate, T* out) {
  const int64_t F = q.width;
  share(q.batch, q.threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const T *in = x + row * F, *open = gate + row * F;
      T* to = out + row * F;
      const T by = scale_of(q, in);
      if (gate) {
#pragma omp simd
        for (int64_t i = 0; i < F; i++) to[i] = in[i] * by * weight[i] * (open[i] * sigmoid(open[i]));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < F; i++) to[i] = in[i] * by * weight[i];
      }
    }
  });
}

// dweight (threads, F) is zero before.
template <typename T>
void norm_backward(const Sizes& q, const T* x, const T* weight, const T* gate, const T* dout, T* dx, T* dweight,
                   T* dgate) {
  const int64_t F = q.width;
  share(q.batch, q.threads, [&](int64_t thread, int64_t first, int64_t last) {
    T* sums = dweight + thread * F;
    for (int64_t row = first; row < last; row++) {
      const T *in = x + row * F, *open = gate + row * F, *from = dout + row * F;
      T *to = dx + row * F, *to_gate = dgate + row * F;
      const T by = scale_of(q, in);
      T along = 0;  // Σ of what x / rms(x) is to get, times x / rms(x)
      if (gate) {
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < F; i++) {
          const T s = sigmoid(open[i]), normed = in[i] * by, silu = open[i] * s;
          to_gate[i] = from[i] * normed * weight[i] * s * (T(1) + open[i] * (T(1) - s));
          const T opened = from[i] * silu;
          sums[i] += opened * normed;
          to[i] = opened * weight[i];
          along += to[i] * normed;
        }
      } else {
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < F; i++) {
          const T normed = in[i] * by;
          sums[i] += from[i] * normed;
          to[i] = from[i] * weight[i];
          along += to[i] * normed;
        }
      }
      along /= T(F);
#pragma omp simd
      for (int64_t i = 0; i < F; i++) to[i] = by * (to[i] - in[i] * by * along);
    }
  });
}

// out = silu(gate) ⊙ up.
template <typename T> void swiglu(const Sizes& q, const T* gate, const T* up, T* out) {
  share(q.batch, q.threads, [&](int64_t, int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first * q.width; i < last * q.width; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
  });
}

template <typename T> void swiglu_backward(const Sizes& q, const T* gate, const T* up, const T* dout, T* dgate, T* dup) {
  share(q.batch, q.threads, [&](int64_t, int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first * q.width; i < last * q.width; i++) {
      const T s = sigmoid(gate[i]), silu = gate[i] * s;
      dup[i] = dout[i] * silu;
      dgate[i] = dout[i] * up[i] * s * (T(1) + gate[i] * (T(1) - s));
    }
  });
}

// The tokens of the convolution: those of a row, before them its tail of taps - 1.
template <typename T> struct Tokens {
  const Sizes& q;
  T *x, *tail;
  const int64_t* documents;  // (B, N), or null; those of the tail are 0
  T* at(int64_t b, int64_t t) const {
    const int64_t reach = q.taps - 1;
    return t < 0 ? tail + (b * reach + reach + t) * q.width : x + (b * q.length + t) * q.width;
  }
  bool same(int64_t b, int64_t t, int64_t later) const {
    if (!documents) return true;
    const int64_t* row = documents + b * q.length;
    return (t < 0 ? 0 : row[t]) == row[later];
  }
};

// out[t] = Σ_j weight[j] ⊙ x[t + j - (taps - 1)], within a document.
template <typename T>
void convolve(const Sizes& q, const Tokens<const T>& x, const T* weight, T* out) {
  const int64_t F = q.width, reach = q.taps - 1;
  share(q.batch * q.length, q.threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const int64_t b = row / q.length, t = row % q.length;
      T* to = out + row * F;
      const T *in = x.at(b, t), *by = weight + reach * F;
#pragma omp simd
      for (int64_t i = 0; i < F; i++) to[i] = in[i] * by[i];
      for (int64_t j = 0; j < reach; j++) {
        if (!x.same(b, t + j - reach, t)) continue;
        const T *past = x.at(b, t + j - reach), *tap = weight + j * F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) to[i] += past[i] * tap[i];
      }
    }
  });
}

// dweight (threads, taps, F) is zero before.
template <typename T>
void convolve_backward(const Sizes& q, const Tokens<const T>& x, const T* weight, const T* dout, const Tokens<T>& dx,
                       T* dweight) {
  const int64_t F = q.width, reach = q.taps - 1, all = reach + q.length;
  share(q.batch * all, q.threads, [&](int64_t thread, int64_t first, int64_t last) {
    T* sums = dweight + thread * q.taps * F;
    for (int64_t row = first; row < last; row++) {
      const int64_t b = row / all, t = row % all - reach;
      const T* in = x.at(b, t);
      T* to = dx.at(b, t);
      std::fill(to, to + F, T(0));
      for (int64_t j = 0; j < q.taps; j++) {  // by tap j the token adds to what is `later`
        const int64_t later = t + reach - j;
        if (later < 0 || later >= q.length || !x.same(b, t, later)) continue;
        const T *from = dout + (b * q.length + later) * F, *tap = weight + j * F;
        T* sum = sums + j * F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
          to[i] += from[i] * tap[i];
          sum[i] += from[i] * in[i];
        }
      }
    }
  });
}

template <typename T> void run_norm(const Sizes* q, void* const* p) {
  auto at = [&](int i) { return static_cast<T*>(p[i]); };
  norm<T>(*q, at(0), at(1), at(2), at(3));
}
template <typename T> void run_norm_backward(const Sizes* q, void* const* p) {
  auto at = [&](int i) { return static_cast<T*>(p[i]); };
  norm_backward<T>(*q, at(0), at(1), at(2), at(3), at(4), at(5), at(6));
}
template <typename T> void run_swiglu(const Sizes* q, void* const* p) {
  auto at = [&](int i) { return static_cast<T*>(p[i]); };
  swiglu<T>(*q, at(0), at(1), at(2));
}
template <typename T> void run_swiglu_backward(const Sizes* q, void* const* p) {
  auto at = [&](int i) { return static_cast<T*>(p[i]); };
  swiglu_backward<T>(*q, at(0), at(1), at(2), at(3), at(4));
}
template <typename T> void run_convolve(const Sizes* q, void* const* p) {
  auto at = [&](int i) { return static_cast<T*>(p[i]); };
  const auto documents = static_cast<const int64_t*>(p[2]);
  convolve<T>(*q, {*q, at(0), at(1), documents}, at(3), at(4));
}
template <typename T> void run_convolve_backward(const Sizes* q, void* const* p) {
  auto at = [&](int i) { return static_cast<T*>(p[i]); };
  const auto documents = static_cast<const int64_t*>(p[2]);
  convolve_backward<T>(*q, {*q, at(0), at(1), documents}, at(3), at(4), {*q, at(5), at(6), documents}, at(7));
}

}  // namespace

#define EXPORT(name) \
  extern "C" void hamt_##name##_float(const Sizes* q, void* const* p) { run_##name<float>(q, p); } \
  extern "C" void hamt_##name##_double(const Sizes* q, void* const* p) { run_##name<double>(q, p); }
EXPORT(norm)
EXPORT(norm_backward)
EXPORT(swiglu)
EXPORT(swiglu_backward)
EXPORT(convolve)
EXPORT(convolve_backward)
