// The selective scan on a CPU, forward and backward; selective_scan/__init__.py has the equations and the shapes.
//
// Lanes are channels, which lie side by side in memory, so that states are kept as [state][channel] and no step of the
// recurrence crosses lanes. A task is one sequence and BLOCK channels of it; it goes through time in chunks of CHUNK
// tokens. Forward keeps the state before each chunk. Backward makes a chunk's states and decays again from it and then
// goes back through them, so that all states of a sequence are never there at once. Sums over channels (gradients of
// B and C) and over sequences (of A, D, dt_bias) are of one part per task, added in the order of the tasks: results do
// not depend on the number of threads.

#include "lanes.h"

namespace {

constexpr int64_t CHUNK = 32;
constexpr int64_t BLOCK = 128;
// States of a lane that forward holds in registers, of which AVX-512 has 32; backward holds a gradient and a sum for each.
constexpr int MOST = BYTES == 64 ? 16 : 8, MOST_BACK = 8;

}  // namespace

extern "C" {

// Numbers [sequence][token][...]: the last axis is contiguous, the others have strides (in elements).
struct Rows {
  void* data;
  int64_t sequence, token;
};

struct Scan {
  int64_t sequences, tokens, channels, states, threads;
  int64_t wide_double;  // whether the wide dtype is float64 (then all are), else it is float32
  int64_t narrow;       // whether x, dt, z, B, C, y and their gradients are bfloat16
  Rows x, dt, z, B, C, y;
  const void *A, *D, *dt_bias, *h0;
  const uint8_t* starts;  // [sequence][token]
  void *last, *kept;      // [sequence][channel][state]; [sequence][chunk][state][channel]
  // of the backward pass; gradients of Rows are contiguous
  Rows dy;
  const void* d_last;
  void *dx, *d_dt, *dz, *dB, *dC, *dA, *dD, *d_bias, *dh0;
};
}

namespace {

// `to` [tokens][pitch], zero from `width` to the next whole vector.
template <class T>
void read(T* to, int64_t pitch, const Rows& from, bool narrow, int64_t b, int64_t t, int64_t steps, int64_t first,
          int64_t width) {
  const int64_t padded = (width + Vector<T>::width - 1) / Vector<T>::width * Vector<T>::width;
  for (int64_t i = 0; i < steps; ++i, to += pitch) {
    const int64_t at = b * from.sequence + (t + i) * from.token + first;
    if (narrow) {
      const uint16_t* row = static_cast<const uint16_t*>(from.data) + at;
      for (int64_t j = 0; j < width; ++j) to[j] = T(widened(row[j]));
    } else {
      std::memcpy(to, static_cast<const T*>(from.data) + at, size_t(width) * sizeof(T));
    }
    for (int64_t j = width; j < std::min(padded, pitch); ++j) to[j] = 0;
  }
}

template <class T>
void write(void* data, int64_t at, const T* from, int64_t width, bool narrow) {
  if (narrow) {
    uint16_t* row = static_cast<uint16_t*>(data) + at;
    for (int64_t j = 0; j < width; ++j) row[j] = narrowed(float(from[j]));
  } else {
    std::memcpy(static_cast<T*>(data) + at, from, size_t(width) * sizeof(T));
  }
}

// What a task works on: the place of its channels and of the chunk it is at, and memory that one thread uses again.
template <class T> struct Work {
  static constexpr int64_t W = Vector<T>::width;
  const Scan& scan;
  Buffer<T> A2, D, bias, h;                      // [state][BLOCK], or [BLOCK]
  const int64_t rows;                            // CHUNK, or all tokens where there are fewer
  Buffer<T> x, raw, delta, u, z, out;            // [rows][BLOCK]
  Buffer<T> B, C;                                // [rows][state]
  bool starts[CHUNK];
  int64_t b = 0, block = 0, first = 0, width = 0, vectors = 0;  // of the task
  int64_t t0 = 0, steps = 0;                                    // of the chunk

  explicit Work(const Scan& s)
      : scan(s), A2(s.states * BLOCK), D(BLOCK), bias(BLOCK), h(s.states * BLOCK), rows(std::min(CHUNK, s.tokens)),
        x(rows * BLOCK), raw(rows * BLOCK), delta(rows * BLOCK), u(rows * BLOCK), z(rows * BLOCK), out(rows * BLOCK),
        B(rows * s.states), C(rows * s.states) {}

  static int64_t blocks(const Scan& s) { return (s.channels + BLOCK - 1) / BLOCK; }
  static int64_t chunks(const Scan& s) { return (s.tokens + CHUNK - 1) / CHUNK; }

  void begin(int64_t task) {
    b = task / blocks(scan), block = task % blocks(scan);
    first = block * BLOCK, width = std::min(BLOCK, scan.channels - first), vectors = (width + W - 1) / W;
    turn(A2, static_cast<const T*>(scan.A) + first * scan.states);
    for (int64_t i = 0; i < scan.states * BLOCK; ++i) A2[i] *= T(LOG2E);
    for (int64_t j = 0; j < BLOCK; ++j) {
      D[j] = j < width ? static_cast<const T*>(scan.D)[first + j] : T(0);
      bias[j] = j < width && scan.dt_bias ? static_cast<const T*>(scan.dt_bias)[first + j] : T(0);
    }
  }

  // [channel][state] of the task's channels to [state][BLOCK]; 0 beyond them.
  void turn(T* to, const T* from) {
    if (width < BLOCK) std::fill_n(to, scan.states * BLOCK, T(0));
    for (int64_t j = 0; j < width; j += 16)  // both sides of a square stay in the first cache
      for (int64_t n = 0; n < scan.states; ++n)
        for (int64_t i = j; i < std::min(j + 16, width); ++i) to[n * BLOCK + i] = from[i * scan.states + n];
  }

  // The states of the task's channels, as they lie in h0 and h_T; zero where there are none.
  void take(T* to, const void* from) {
    if (from)
      turn(to, static_cast<const T*>(from) + (b * scan.channels + first) * scan.states);
    else
      std::fill_n(to, scan.states * BLOCK, T(0));
  }
  void give(void* to, const T* from) {
    T* states = static_cast<T*>(to) + (b * scan.channels + first) * scan.states;
    for (int64_t j = 0; j < width; ++j)
      for (int64_t n = 0; n < scan.states; ++n) states[j * scan.states + n] = from[n * BLOCK + j];
  }

  T* kept(int64_t chunk, int64_t n) {
    return static_cast<T*>(scan.kept) + ((b * chunks(scan) + chunk) * scan.states + n) * scan.channels + first;
  }

  void enter(int64_t chunk) {
    t0 = chunk * CHUNK, steps = std::min(CHUNK, scan.tokens - t0);
    const bool narrow = scan.narrow;
    read<T>(x, BLOCK, scan.x, narrow, b, t0, steps, first, width);
    read<T>(raw, BLOCK, scan.dt, narrow, b, t0, steps, first, width);
    if (scan.z.data) read<T>(z, BLOCK, scan.z, narrow, b, t0, steps, first, width);
    read<T>(B, scan.states, scan.B, narrow, b, t0, steps, 0, scan.states);
    read<T>(C, scan.states, scan.C, narrow, b, t0, steps, 0, scan.states);
    for (int64_t t = 0; t < steps; ++t) {
      starts[t] = scan.starts && scan.starts[b * scan.tokens + t0 + t];
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = t * BLOCK + v * W;
        const V<T> before = load<T>(raw + at) + load<T>(bias + v * W), step = softplus<T>(before);
        store<T>(raw + at, before);
        store<T>(delta + at, step);
        store<T>(u + at, step * load<T>(x + at));
        store<T>(out + at, load<T>(D + v * W) * load<T>(x + at));
      }
    }
  }
};

// One chunk, N states from n of the channels of vector v, from h and back into it; adds to `out`.
template <class T, int N> void forward_states(Work<T>& w, int64_t n, int64_t v) {
  const int64_t lane = v * Work<T>::W;
  V<T> h[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) h[i] = load<T>(w.h + (n + i) * BLOCK + lane);
  for (int64_t t = 0; t < w.steps; ++t) {
    if (w.starts[t])
      for (int i = 0; i < N; ++i) h[i] = V<T>{};
    const V<T> delta = load<T>(w.delta + t * BLOCK + lane), u = load<T>(w.u + t * BLOCK + lane);
    const T *B = w.B + t * w.scan.states + n, *C = w.C + t * w.scan.states + n;
    V<T> y = load<T>(w.out + t * BLOCK + lane);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      h[i] = exp2<T>(delta * load<T>(w.A2 + (n + i) * BLOCK + lane)) * h[i] + u * B[i];
      y += h[i] * C[i];
    }
    store<T>(w.out + t * BLOCK + lane, y);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store<T>(w.h + (n + i) * BLOCK + lane, h[i]);
}

template <class T> void forward_task(Work<T>& w) {
  const Scan& scan = w.scan;
  w.take(w.h, scan.h0);
  for (int64_t chunk = 0; chunk < w.chunks(scan); ++chunk) {
    if (scan.kept)
      for (int64_t n = 0; n < scan.states; ++n)
        std::memcpy(w.kept(chunk, n), w.h + n * BLOCK, size_t(w.width) * sizeof(T));
    w.enter(chunk);
    for (int64_t v = 0; v < w.vectors; ++v) {
      int64_t n = 0;
      for (; n + MOST <= scan.states; n += MOST) forward_states<T, MOST>(w, n, v);
      for (; n + 4 <= scan.states; n += 4) forward_states<T, 4>(w, n, v);
      for (; n < scan.states; ++n) forward_states<T, 1>(w, n, v);
    }
    for (int64_t t = 0; t < w.steps; ++t) {
      if (scan.z.data)
        for (int64_t v = 0; v < w.vectors; ++v) {
          const int64_t at = t * BLOCK + v * w.W;
          const V<T> z = load<T>(w.z + at);
          store<T>(w.out + at, load<T>(w.out + at) * (z * sigmoid<T>(z)));
        }
      const int64_t at = w.b * scan.y.sequence + (w.t0 + t) * scan.y.token + w.first;
      write<T>(scan.y.data, at, w.out + t * BLOCK, w.width, scan.narrow);
    }
  }
  w.give(scan.last, w.h);
}

// Sums of one task each, and the memory of one thread's backward pass.
template <class T> struct Parts {
  Buffer<T> B, C;          // [task][token][state]
  Buffer<T> A, D, bias;    // [sequence][channel][state], [sequence][channel]
  explicit Parts(const Scan& s)
      : B(s.sequences * Work<T>::blocks(s) * s.tokens * s.states),
        C(s.sequences * Work<T>::blocks(s) * s.tokens * s.states), A(s.sequences * s.channels * s.states),
        D(s.sequences * s.channels), bias(s.sequences * s.channels) {}
};

template <class T> struct Back {
  static constexpr int64_t W = Vector<T>::width;
  Buffer<T> dh, dA, dD, d_bias;                        // [state][BLOCK], [BLOCK]
  Buffer<T> ds, along_B, along_A;                      // [CHUNK][BLOCK]: gradient before the gate, Σ_n dh B, Σ_n d(ΔA) A
  Buffer<T> states, decays, sum_B, sum_C;              // [CHUNK][MOST_BACK][W]
  explicit Back(const Scan& s)
      : dh(s.states * BLOCK), dA(s.states * BLOCK), dD(BLOCK), d_bias(BLOCK), ds(CHUNK * BLOCK),
        along_B(CHUNK * BLOCK), along_A(CHUNK * BLOCK), states((CHUNK + 1) * MOST_BACK * W),
        decays(CHUNK * MOST_BACK * W), sum_B(CHUNK * MOST_BACK * W), sum_C(CHUNK * MOST_BACK * W) {}
};

template <class T, int N> void backward_states(Work<T>& w, Back<T>& k, int64_t n, int64_t v) {
  constexpr int64_t W = Work<T>::W;
  const int64_t lane = v * W;
  {
    V<T> h[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      h[i] = load<T>(w.h + (n + i) * BLOCK + lane);
      store<T>(k.states + i * W, h[i]);  // states[t + 1] is that after token t
    }
    for (int64_t t = 0; t < w.steps; ++t) {
      if (w.starts[t])
        for (int i = 0; i < N; ++i) h[i] = V<T>{};
      const V<T> delta = load<T>(w.delta + t * BLOCK + lane), u = load<T>(w.u + t * BLOCK + lane);
      const T *B = w.B + t * w.scan.states + n, *C = w.C + t * w.scan.states + n;
      V<T> y = load<T>(w.out + t * BLOCK + lane);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const V<T> decay = exp2<T>(delta * load<T>(w.A2 + (n + i) * BLOCK + lane));
        store<T>(k.decays + (t * N + i) * W, decay);
        h[i] = decay * h[i] + u * B[i];
        store<T>(k.states + ((t + 1) * N + i) * W, h[i]);
        y += h[i] * C[i];
      }
      store<T>(w.out + t * BLOCK + lane, y);
    }
  }
  V<T> dh[N], dA[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    dh[i] = load<T>(k.dh + (n + i) * BLOCK + lane);
    dA[i] = load<T>(k.dA + (n + i) * BLOCK + lane);
  }
  for (int64_t t = w.steps - 1; t >= 0; --t) {
    const int64_t at = t * BLOCK + lane;
    const V<T> delta = load<T>(w.delta + at), u = load<T>(w.u + at), ds = load<T>(k.ds + at);
    const T *B = w.B + t * w.scan.states + n, *C = w.C + t * w.scan.states + n;
    V<T> along_B = load<T>(k.along_B + at), along_A = load<T>(k.along_A + at);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const int64_t place = (t * N + i) * W;
      dh[i] += ds * C[i];
      store<T>(k.sum_C + place, load<T>(k.sum_C + place) + ds * load<T>(k.states + place + N * W));
      store<T>(k.sum_B + place, load<T>(k.sum_B + place) + u * dh[i]);
      along_B += dh[i] * B[i];
      if (w.starts[t]) {
        dh[i] = V<T>{};
      } else {
        dh[i] *= load<T>(k.decays + place);
        const V<T> power = dh[i] * load<T>(k.states + place);  // gradient of Δ A
        dA[i] += power * delta;
        along_A += power * load<T>(w.A2 + (n + i) * BLOCK + lane);
      }
    }
    store<T>(k.along_B + at, along_B);
    store<T>(k.along_A + at, along_A);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    store<T>(k.dh + (n + i) * BLOCK + lane, dh[i]);
    store<T>(k.dA + (n + i) * BLOCK + lane, dA[i]);
  }
}

template <class T> inline T sum_of(const T* lanes) {
  T sum[Vector<T>::width];
  std::memcpy(sum, lanes, sizeof sum);
  for (int64_t half = Vector<T>::width / 2; half; half /= 2)
    for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
  return sum[0];
}

template <class T, int N> void backward_group(Work<T>& w, Back<T>& k, T* part_B, T* part_C, int64_t n) {
  constexpr int64_t W = Work<T>::W;
  std::fill_n(static_cast<T*>(k.sum_B), w.steps * N * W, T(0));
  std::fill_n(static_cast<T*>(k.sum_C), w.steps * N * W, T(0));
  for (int64_t v = 0; v < w.vectors; ++v) backward_states<T, N>(w, k, n, v);
  for (int64_t t = 0; t < w.steps; ++t)
    for (int i = 0; i < N; ++i) {
      const int64_t at = (w.t0 + t) * w.scan.states + n + i;
      part_B[at] = sum_of<T>(k.sum_B + (t * N + i) * W);
      part_C[at] = sum_of<T>(k.sum_C + (t * N + i) * W);
    }
}

template <class T> void backward_task(Work<T>& w, Back<T>& k, Parts<T>& parts) {
  constexpr int64_t W = Work<T>::W;
  const Scan& scan = w.scan;
  const bool gated = scan.z.data;
  const int64_t of_task = (w.b * w.blocks(scan) + w.block) * scan.tokens * scan.states;
  w.take(k.dh, scan.d_last);
  std::fill_n(static_cast<T*>(w.h), scan.states * BLOCK, T(0));  // lanes without a channel stay finite
  std::fill_n(static_cast<T*>(k.dA), scan.states * BLOCK, T(0));
  std::fill_n(static_cast<T*>(k.dD), BLOCK, T(0));
  std::fill_n(static_cast<T*>(k.d_bias), BLOCK, T(0));
  for (int64_t chunk = w.chunks(scan) - 1; chunk >= 0; --chunk) {
    for (int64_t n = 0; n < scan.states; ++n)
      std::memcpy(w.h + n * BLOCK, w.kept(chunk, n), size_t(w.width) * sizeof(T));
    w.enter(chunk);
    read<T>(k.ds, BLOCK, scan.dy, scan.narrow, w.b, w.t0, w.steps, w.first, w.width);
    for (int64_t at = 0; at < w.steps * BLOCK; at += W) {
      store<T>(k.along_B + at, V<T>{});
      store<T>(k.along_A + at, V<T>{});
      if (gated) {  // z becomes silu'(z) dy, which the output before the gate multiplies at the end
        const V<T> z = load<T>(w.z + at), gate = sigmoid<T>(z), dy = load<T>(k.ds + at);
        store<T>(w.z + at, dy * gate * (T(1) + z * (T(1) - gate)));
        store<T>(k.ds + at, dy * (z * gate));
      }
    }
    int64_t n = 0;
    T *part_B = parts.B + of_task, *part_C = parts.C + of_task;
    for (; n + MOST_BACK <= scan.states; n += MOST_BACK) backward_group<T, MOST_BACK>(w, k, part_B, part_C, n);
    for (; n + 4 <= scan.states; n += 4) backward_group<T, 4>(w, k, part_B, part_C, n);
    for (; n < scan.states; ++n) backward_group<T, 1>(w, k, part_B, part_C, n);
    for (int64_t t = 0; t < w.steps; ++t) {
      for (int64_t v = 0; v < w.vectors; ++v) {
        const int64_t at = t * BLOCK + v * W;
        const V<T> x = load<T>(w.x + at), ds = load<T>(k.ds + at), raw = load<T>(w.raw + at);
        const V<T> along_B = load<T>(k.along_B + at);
        const V<T> d_delta = along_B * x + load<T>(k.along_A + at) * T(1 / LOG2E);
        const V<T> d_raw = raw > T(20) ? d_delta : d_delta * sigmoid<T>(raw);
        store<T>(k.along_A + at, d_raw);
        store<T>(k.along_B + at, along_B * load<T>(w.delta + at) + ds * load<T>(w.D + v * W));
        store<T>(k.d_bias + v * W, load<T>(k.d_bias + v * W) + d_raw);
        store<T>(k.dD + v * W, load<T>(k.dD + v * W) + ds * x);
        if (gated) store<T>(w.z + at, load<T>(w.z + at) * load<T>(w.out + at));
      }
      const int64_t at = (w.b * scan.tokens + w.t0 + t) * scan.channels + w.first;
      write<T>(scan.dx, at, k.along_B + t * BLOCK, w.width, scan.narrow);
      write<T>(scan.d_dt, at, k.along_A + t * BLOCK, w.width, scan.narrow);
      if (gated) write<T>(scan.dz, at, w.z + t * BLOCK, w.width, scan.narrow);
    }
  }
  if (scan.dh0) w.give(scan.dh0, k.dh);
  w.give(parts.A, k.dA);
  const int64_t at = w.b * scan.channels + w.first;
  std::memcpy(parts.D + at, k.dD, size_t(w.width) * sizeof(T));
  std::memcpy(parts.bias + at, k.d_bias, size_t(w.width) * sizeof(T));
}

// to[i] = Σ_part parts[part][i]
template <class T> void add_up(void* to, const T* parts, int64_t count, int64_t size, int64_t at, bool narrow) {
  std::vector<T> sum(parts, parts + size);
  for (int64_t part = 1; part < count; ++part)
    for (int64_t i = 0; i < size; ++i) sum[size_t(i)] += parts[part * size + i];
  write<T>(to, at, sum.data(), size, narrow);
}

template <class T> bool forward(const Scan& scan) {
  return each_task(
      scan.sequences * Work<T>::blocks(scan), scan.threads, [&] { return std::make_unique<Work<T>>(scan); },
      [&](Work<T>& work, int64_t task) {
        work.begin(task);
        forward_task<T>(work);
      });
}

template <class T> bool backward(const Scan& scan) {
  struct Both {
    Work<T> work;
    Back<T> back;
    explicit Both(const Scan& s) : work(s), back(s) {}
  };
  Parts<T> parts(scan);
  const bool fine = each_task(
      scan.sequences * Work<T>::blocks(scan), scan.threads, [&] { return std::make_unique<Both>(scan); },
      [&](Both& both, int64_t task) {
        both.work.begin(task);
        backward_task<T>(both.work, both.back, parts);
      });
  if (!fine) return false;
  const int64_t blocks = Work<T>::blocks(scan), size = scan.tokens * scan.states;
  for (int64_t b = 0; b < scan.sequences; ++b) {
    add_up<T>(scan.dB, parts.B + b * blocks * size, blocks, size, b * size, scan.narrow);
    add_up<T>(scan.dC, parts.C + b * blocks * size, blocks, size, b * size, scan.narrow);
  }
  add_up<T>(scan.dA, parts.A, scan.sequences, scan.channels * scan.states, 0, false);
  add_up<T>(scan.dD, parts.D, scan.sequences, scan.channels, 0, false);
  if (scan.d_bias) add_up<T>(scan.d_bias, parts.bias, scan.sequences, scan.channels, 0, false);
  return true;
}

}  // namespace

// 0, or 1 if memory lacks.
extern "C" int64_t growkit_scan_forward(const Scan* scan) {
  return outcome([&] { return scan->wide_double ? forward<double>(*scan) : forward<float>(*scan); });
}
extern "C" int64_t growkit_scan_backward(const Scan* scan) {
  return outcome([&] { return scan->wide_double ? backward<double>(*scan) : backward<float>(*scan); });
}
