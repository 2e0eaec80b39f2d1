// What is elementwise in Pattention on a CPU: s = tau a / |a| under each norm, gelu(s), and back. pattention/rows.py has
// the equations. Lanes are parameter tokens, which lie side by side; a row of scores stays in the first cache between
// the pass that sums its squares and the pass that uses them. Numbers are float32 or bfloat16, arithmetic is float32.

#include "lanes.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

extern "C" {

struct Scores {
  int64_t rows, norms, threads;
  int64_t narrow;  // whether s, g and slope are bfloat16
  float floor;     // of a norm
  const int64_t* ends;  // [norm] where its columns end
  const float* taus;    // [norm]
  float* scales;        // [row][norm] tau / |a|
  void *s, *g, *slope;  // [row][column]
  int64_t s_row, g_row, slope_row;  // elements from a row to the next
};
}

namespace {

using F = V<float>;
constexpr int64_t LANES = Vector<float>::width;
constexpr int64_t TASK = 1 << 15;  // numbers, below which a thread is not worth starting
typedef uint16_t Narrow __attribute__((vector_size(LANES * 2)));
typedef uint32_t Wide __attribute__((vector_size(LANES * 4)));

inline F get(const float* from, int64_t count) {
  F value{};
  std::memcpy(&value, from, count == LANES ? sizeof(F) : size_t(count) * 4);
  return value;
}
inline void put(float* to, F value, int64_t count) { std::memcpy(to, &value, count == LANES ? sizeof(F) : size_t(count) * 4); }

inline F widened(Narrow half) { return (F)(__builtin_convertvector(half, Wide) << 16); }
inline Narrow narrowed(F value) {  // to the nearest, ties to even
#if defined(__AVX512BF16__)
  return (Narrow)_mm512_cvtneps_pbh((__m512)value);
#endif
  const Wide bits = (Wide)value;
  const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(value != value ? Wide{} + 0x7fc0 : rounded, Narrow);
}
inline F get(const uint16_t* from, int64_t count) {
  Narrow half{};
  std::memcpy(&half, from, count == LANES ? sizeof(Narrow) : size_t(count) * 2);
  return widened(half);
}
inline void put(uint16_t* to, F value, int64_t count) {
  const Narrow half = narrowed(value);
  std::memcpy(to, &half, count == LANES ? sizeof(Narrow) : size_t(count) * 2);
}
inline F as_stored(const float*, F value) { return value; }
inline F as_stored(const uint16_t*, F value) { return widened(narrowed(value)); }

// Sum of term(j, count) over all lanes of the columns; four at a time, or each would wait for the one before it.
template <class Term> inline float summed(int64_t start, int64_t end, Term term) {
  F parts[4] = {};
  int64_t j = start;
  for (; j + 4 * LANES <= end; j += 4 * LANES)
    for (int64_t k = 0; k < 4; ++k) parts[k] += term(j + k * LANES, LANES);
  for (; j < end; j += LANES) parts[0] += term(j, std::min(LANES, end - j));
  const F whole = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  float lanes[LANES];
  std::memcpy(lanes, &whole, sizeof lanes);
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The bell e^(-s^2/2), and the part P of the normal distribution below s. P(-a) e^(a^2/2) = t p(t) is a best fit for a
// up to 19, beyond which P(-a) is 0.
struct Normal {
  F bell, below;
};
inline Normal normal(F s, F bell, F t, F p) {
  const F tail = bell * t * p;
  return {bell, s > 0.0f ? 1.0f - tail : tail};
}
inline F magnitude(F s) { return (F)((Wide)s & 0x7fffffffu); }

inline F one_over(F value) {  // relative error 6e-5, or none
#if defined(__AVX512F__)
  return (F)_mm512_rcp14_ps((__m512)value);
#endif
  return 1.0f / value;
}

inline Normal normal(const float*, F s) {  // relative errors: 5e-8 of p, before rounding
  const F y = magnitude(s) * 0.275f + 1.0f, near = one_over(y);
  const F t = near + near * (1.0f - y * near);  // a step of Newton's: half as long as a division
  F p = all(0.027167711406946182f);
  p = p * t - 0.11052457243204117f;
  p = p * t + 0.12956976890563965f;
  p = p * t - 0.03417327627539635f;
  p = p * t + 0.0871419757604599f;
  p = p * t + 0.07936856895685196f;
  p = p * t + 0.10206767171621323f;
  p = p * t + 0.10967256873846054f;
  p = p * t + 0.10970960557460785f;
  return normal(s, exp2<float>(s * s * float(-0.5 * LOG2E)), t, p);
}

inline Normal normal(const uint16_t*, F s) {  // relative errors: 2e-4 of p, 1e-4 of the bell; a rounding is 2e-3
  constexpr float low = -127.0f, magic = Number<float>::round + Number<float>::bias;
  const F t = one_over(magnitude(s) * 0.5f + 1.0f);
  F p = all(-0.12574273347854614f);
  p = p * t + 0.24522557854652405f;
  p = p * t + 0.17955924570560455f;
  p = p * t + 0.20084117352962494f;
  F v = s * s * float(-0.5 * LOG2E);
  v = v < low ? all(low) : v;
  const F rounded = v + magic;
  const F r = v - (rounded - magic);
  F raised = all(0.05500892999689198f);
  raised = raised * r + 0.2422109596234704f;
  raised = raised * r + 0.6932829273211776f;
  const F scale = power<float>(rounded);
  return normal(s, raised * r * scale + scale, t, p);
}

template <class T, class Use> inline void each(int64_t start, int64_t end, Use use) {
  int64_t j = start;
#pragma GCC unroll 4
  for (; j + LANES <= end; j += LANES) use(j, LANES);
  if (j < end) use(j, end - j);
}

// s (scores at first) becomes tau a / |a|, g its gelu.
template <class T> void forward_row(const Scores& c, int64_t row) {
  T* s = static_cast<T*>(c.s) + row * c.s_row;
  T* g = static_cast<T*>(c.g) + row * c.g_row;
  for (int64_t norm = 0, start = 0; norm < c.norms; start = c.ends[norm++]) {
    const float length = std::sqrt(summed(start, c.ends[norm], [&](int64_t j, int64_t n) {
      const F a = get(s + j, n);
      return a * a;
    }));
    const float scale = c.taus[norm] / (length < c.floor ? c.floor : length);  // NaN is not below
    c.scales[row * c.norms + norm] = scale;
    each<T>(start, c.ends[norm], [&](int64_t j, int64_t n) {
      const F scaled = as_stored(s, get(s + j, n) * scale);
      put(s + j, scaled, n);
      put(g + j, scaled * normal(s, scaled).below, n);
    });
  }
}

// g = gelu(s), slope = gelu'(s).
template <class T> void weights_row(const Scores& c, int64_t row) {
  const T* s = static_cast<const T*>(c.s) + row * c.s_row;
  T* g = static_cast<T*>(c.g) + row * c.g_row;
  T* slope = static_cast<T*>(c.slope) + row * c.slope_row;
  each<T>(0, c.ends[c.norms - 1], [&](int64_t j, int64_t n) {
    const F scaled = get(s + j, n);
    const Normal at = normal(s, scaled);
    put(g + j, scaled * at.below, n);
    put(slope + j, at.below + scaled * at.bell * 0.3989422804014327f, n);
  });
}

// g, the gradient of gelu(s), becomes that of the scores: tau/|a| (ds - s (s.ds)/tau^2).
template <class T> void backward_row(const Scores& c, int64_t row) {
  const T* s = static_cast<const T*>(c.s) + row * c.s_row;
  T* g = static_cast<T*>(c.g) + row * c.g_row;
  const T* slope = static_cast<const T*>(c.slope) + row * c.slope_row;
  for (int64_t norm = 0, start = 0; norm < c.norms; start = c.ends[norm++]) {
    const float dot = summed(start, c.ends[norm], [&](int64_t j, int64_t n) {
      return get(s + j, n) * get(g + j, n) * get(slope + j, n);
    });
    const float tau = c.taus[norm], scale = c.scales[row * c.norms + norm];
    const float along = scale >= tau / c.floor ? 0.0f : dot / (tau * tau);  // at the floor nothing depends on |a|
    each<T>(start, c.ends[norm], [&](int64_t j, int64_t n) {
      put(g + j, (get(g + j, n) * get(slope + j, n) - get(s + j, n) * along) * scale, n);
    });
  }
}

template <class Row> int64_t over_rows(const Scores& c, Row row) {
  const int64_t width = std::max<int64_t>(1, c.ends[c.norms - 1]), each = std::max<int64_t>(1, TASK / width);
  return outcome([&] {
    return each_task((c.rows + each - 1) / each, c.threads, [] { return std::make_unique<char>(); },
                     [&](char&, int64_t task) {
                       for (int64_t i = task * each; i < std::min(c.rows, (task + 1) * each); ++i) row(c, i);
                     });
  });
}

}  // namespace

// 0, or 1 if memory lacks.
extern "C" int64_t growkit_pattention_forward(const Scores* c) {
  return over_rows(*c, c->narrow ? forward_row<uint16_t> : forward_row<float>);
}
extern "C" int64_t growkit_pattention_weights(const Scores* c) {
  return over_rows(*c, c->narrow ? weights_row<uint16_t> : weights_row<float>);
}
extern "C" int64_t growkit_pattention_backward(const Scores* c) {
  return over_rows(*c, c->narrow ? backward_row<uint16_t> : backward_row<float>);
}
