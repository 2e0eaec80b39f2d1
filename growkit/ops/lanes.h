// What kernels on a CPU have in common: vectors of the widest kind there is, exp and what is made of it, memory, threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T> struct Number;
template <> struct Number<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number in the low bits
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723212e-6f;
  static constexpr int log_terms = 8;
};
template <> struct Number<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr int log_terms = 18;
};

template <class T> struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef typename Number<T>::Bits bits __attribute__((vector_size(BYTES)));
  static constexpr int64_t width = BYTES / sizeof(T);
};
template <class T> using V = typename Vector<T>::type;

template <class T> inline V<T> load(const T* from) { return *reinterpret_cast<const V<T>*>(from); }
template <class T> inline void store(T* to, V<T> value) { *reinterpret_cast<V<T>*>(to) = value; }
template <class T> inline V<T> all(T value) { return V<T>{} + value; }

// (2^r - 1) / r for |r| <= 1/2. Near 0 its error vanishes with r, or a decay near 1 would be off for a whole memory.
inline V<float> raised(V<float> r) {  // interpolated at Chebyshev's points: relative error of 2^r 5e-9 before rounding
  V<float> p = all(0.00015453163359779865f);
  p = p * r + 0.0013390863314270973f;
  p = p * r + 0.009618083015084267f;
  p = p * r + 0.055503569543361664f;
  p = p * r + 0.24022650718688965f;
  return p * r + 0.6931471824645996f;
}
inline V<double> raised(V<double> r) {  // ln(2)^k / k!: relative error 4e-18 before rounding
  V<double> p = all(1.3691488853904124e-12);
  p = p * r + 2.5678435993488196e-11;
  p = p * r + 4.4455382718708101e-10;
  p = p * r + 7.0549116208011209e-09;
  p = p * r + 1.0178086009239699e-07;
  p = p * r + 1.3215486790144307e-06;
  p = p * r + 1.5252733804059840e-05;
  p = p * r + 1.5403530393381608e-04;
  p = p * r + 1.3333558146428443e-03;
  p = p * r + 9.6181291076284769e-03;
  p = p * r + 5.5504108664821576e-02;
  p = p * r + 2.4022650695910069e-01;
  return p * r + 6.9314718055994529e-01;
}

// 2^whole for a vector that is `rounded` = whole + round + bias: 0 at -bias, infinite at bias + 1.
template <class T> inline V<T> power(V<T> rounded) {
  return (V<T>)(((typename Vector<T>::bits)rounded) << Number<T>::mantissa);
}

// 2^v. NaN stays NaN; what would be denormal is 0.
template <class T> inline V<T> exp2(V<T> v) {
  constexpr T low = -Number<T>::bias, high = Number<T>::bias + 1, magic = Number<T>::round + Number<T>::bias;
  v = v < low ? all<T>(low) : v;
  v = v > high ? all<T>(high) : v;
  const V<T> rounded = v + magic;
  const V<T> r = v - (rounded - magic);
  const V<T> scale = power<T>(rounded);
  return raised(r) * r * scale + scale;
}

constexpr double LOG2E = 1.4426950408889634;

// e^x for x <= 0, without exp2(x log2 e)'s error that grows with |x|.
template <class T> inline V<T> exp_negative(V<T> x) {
  constexpr T low = -Number<T>::bias * T(0.6931), magic = Number<T>::round + Number<T>::bias;
  x = x < low ? all<T>(low) : x;
  const V<T> rounded = x * T(LOG2E) + magic;
  const V<T> whole = rounded - magic;
  const V<T> r = ((x - whole * Number<T>::ln2_high) - whole * Number<T>::ln2_low) * T(LOG2E);
  const V<T> scale = power<T>(rounded);
  return raised(r) * r * scale + scale;
}

template <class T> inline V<T> minus_magnitude(V<T> x) { return x > T(0) ? -x : x; }

template <class T> inline V<T> softplus(V<T> x) {
  const V<T> e = exp_negative<T>(minus_magnitude<T>(x));
  const V<T> s = e / (e + T(2));  // log(1 + e) = 2 artanh(e / (2 + e)), e <= 1
  const V<T> square = s * s;
  V<T> sum = all<T>(T(1) / (2 * Number<T>::log_terms + 1));
  for (int k = Number<T>::log_terms - 1; k >= 0; --k) sum = sum * square + T(1) / (2 * k + 1);
  const V<T> positive = x > T(0) ? x : all<T>(0);
  return x > T(20) ? x : positive + (s + s) * sum;
}

template <class T> inline V<T> sigmoid(V<T> x) {
  const V<T> e = exp_negative<T>(minus_magnitude<T>(x));
  const V<T> top = x < T(0) ? e : all<T>(1);
  return top / (e + T(1));
}

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};

// Aligned memory, zero at first.
template <class T> struct Buffer {
  std::unique_ptr<T[], Freed> memory;
  explicit Buffer(int64_t size) {
    const size_t bytes = (size_t(size) * sizeof(T) + 127) / 64 * 64;
    void* found = std::aligned_alloc(64, bytes);
    if (!found) throw std::bad_alloc();
    std::memset(found, 0, bytes);
    memory.reset(static_cast<T*>(found));
  }
  operator T*() const { return memory.get(); }
};

inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t narrowed(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t(value != value ? 0x7fc0 : rounded);
}

// Runs body(make(), task) for every task, on as many threads as there are tasks for; false where memory lacks. With
// OpenMP they are torch's (native.py links the library that torch has loaded).
template <class Make, class Body> bool each_task(int64_t tasks, int64_t threads, Make make, Body body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> fine{true};
  auto run = [&] {
    try {
      auto memory = make();
      for (int64_t task; (task = next++) < tasks;) body(*memory, task);
    } catch (const std::bad_alloc&) {
      fine = false;
    }
  };
  const int count = int(std::min(threads, tasks));
  if (count <= 1) {
    run();
    return fine;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(count)
  run();
#else
  std::vector<std::thread> others;
  others.reserve(size_t(count));
  try {
    for (int i = 1; i < count; ++i) others.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads to be had: those that run do all of it
  }
  run();
  for (auto& thread : others) thread.join();
#endif
  return fine;
}

template <class Run> int64_t outcome(Run run) {
  try {
    return run() ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
