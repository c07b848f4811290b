// SPDX-License-Identifier: Apache-2.0
// One random call of the engine in 8 bits, between guard pages, against whole numbers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>

#include "../../csrc/cpu/int8_engine.h"
#include "driver.h"

namespace driver {

using hetconv::Byte;
using hetconv::Int8Out;

namespace {

struct Bytes {
  Guarded memory;
  size_t count;
  Bytes(Random& r, size_t n, bool fill) : memory(std::max<size_t>(n, 1), chance(r, 0.5)), count(n) {
    for (size_t i = 0; i < n && fill; ++i) memory.data()[i] = char(pick(r, 0, 255));
    if (fill) memory.read_only();
  }
  const uint8_t* data() const { return reinterpret_cast<const uint8_t*>(memory.data()); }
  int at(size_t i, Byte type) const {
    return type == Byte::u8 ? int(data()[i]) : int(int8_t(data()[i]));
  }
};

struct Range {
  int low, high;
};
Range range_of(Byte type) { return type == Byte::u8 ? Range{0, 255} : Range{-128, 127}; }
Byte draw_type(Random& r) { return chance(r, 0.5) ? Byte::u8 : Byte::s8; }
int draw_of(Random& r, Byte type) { return pick(r, range_of(type).low, range_of(type).high); }

// Each product is stored before it is added, so that no compiler contracts the two.
float product(float a, float b) {
  volatile float p = a * b;
  return p;
}

// What a result is to be, as a number.
struct Finish {
  Int8Out type;
  int zero;
  float low, high;
  double of(float t) const {
    if (type == Int8Out::f32) return std::min(std::max(t, low), high);
    return std::nearbyint(std::min(std::max(t, low - float(zero)), high - float(zero))) + zero;
  }
  double read(const char* y, size_t i) const {
    if (type == Int8Out::f32) {
      float v;
      std::memcpy(&v, y + 4 * i, 4);
      return v;
    }
    return type == Int8Out::u8 ? double(uint8_t(y[i])) : double(int8_t(y[i]));
  }
  size_t size() const { return type == Int8Out::f32 ? 4 : 1; }
};

Finish draw_finish(Random& r) {
  Finish f{Int8Out(pick(r, 0, 2)), 0, -40.0f, 60.0f};
  if (f.type == Int8Out::f32) return f;
  const Byte type = f.type == Int8Out::u8 ? Byte::u8 : Byte::s8;
  f.zero = draw_of(r, type);
  const int a = draw_of(r, type), b = draw_of(r, type);
  f.low = float(std::min(a, b));
  f.high = float(std::max(a, b));
  if (chance(r, 0.4)) {
    f.low = float(range_of(type).low);
    f.high = float(range_of(type).high);
  }
  return f;
}

std::string wrong_at(const char* what, size_t i, double got, double expected) {
  std::ostringstream text;
  text << what << ": element " << i << " is " << got << ", expected " << expected;
  return text.str();
}

std::string compare(const char* what, const Bytes& y, const Finish& f,
                    const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (f.read(y.memory.data(), i) != expected[i])
      return wrong_at(what, i, f.read(y.memory.data(), i), expected[i]);
  if (!y.memory.slack_intact()) return std::string(what) + ": wrote beside its result";
  return "";
}

hetconv::Pool draw_pool(Random& r, int H, int W) {
  hetconv::Pool q{};
  q.KH = pick(r, 1, std::min(3, H));
  q.KW = pick(r, 1, std::min(3, W));
  q.sh = pick(r, 1, 3);
  q.sw = pick(r, 1, 3);
  q.pt = pick(r, 0, q.KH / 2);
  q.pl = pick(r, 0, q.KW / 2);
  q.Ho = (H + 2 * q.pt - q.KH) / q.sh + 1;
  q.Wo = (W + 2 * q.pl - q.KW) / q.sw + 1;
  return q;
}

// Largest values of the windows; images are [N][H][W][C].
std::vector<double> pooled(const std::vector<double>& x, const hetconv::Pool& q, int64_t N, int H,
                           int W, int C) {
  std::vector<double> y;
  for (int64_t n = 0; n < N; ++n)
    for (int py = 0; py < q.Ho; ++py)
      for (int px = 0; px < q.Wo; ++px)
        for (int c = 0; c < C; ++c) {
          double best = -1e9;
          for (int iy = py * q.sh - q.pt; iy < py * q.sh - q.pt + q.KH; ++iy)
            for (int ix = px * q.sw - q.pl; ix < px * q.sw - q.pl + q.KW; ++ix)
              if (iy >= 0 && iy < H && ix >= 0 && ix < W)
                best = std::max(best, x[size_t(((n * H + iy) * W + ix) * C + c)]);
          y.push_back(best);
        }
  return y;
}

std::string check_convolution(Random& r, const Case& c, const hetconv::Int8Packed& packed,
                              const std::vector<int8_t>& w) {
  const Conv& v = c.conv;
  const Byte type = draw_type(r), added = draw_type(r);
  const int zero = draw_of(r, type), added_zero = draw_of(r, added);
  const Finish f = draw_finish(r);
  const size_t outputs = size_t(v.N) * size_t(v.Ho) * size_t(v.Wo) * size_t(v.F);
  const Bytes x(r, size_t(v.N) * size_t(v.H) * size_t(v.W) * size_t(v.C), true);
  const bool residual = chance(r, 0.35);
  const Bytes res(r, residual ? outputs : 0, true);
  std::vector<float> multiplier(size_t(v.F));
  std::vector<int32_t> bias(size_t(v.F));
  for (float& m : multiplier) m = float(std::uniform_real_distribution<>(0.0, 0.004)(r));
  for (int32_t& b : bias) b = pick(r, -9000, 9000);
  const float scale = 0.37f;
  std::vector<double> expected(outputs);
  for (int64_t n = 0; n < v.N; ++n)
    for (int oy = 0; oy < v.Ho; ++oy)
      for (int ox = 0; ox < v.Wo; ++ox)
        for (int k = 0; k < v.F; ++k) {
          int64_t sum = bias[size_t(k)];
          for (int ky = 0; ky < v.KH; ++ky)
            for (int kx = 0; kx < v.KW; ++kx) {
              const int64_t iy = int64_t(oy) * v.sh - v.pt + ky * v.dh,
                            ix = int64_t(ox) * v.sw - v.pl + kx * v.dw;
              if (iy < 0 || iy >= v.H || ix < 0 || ix >= v.W) continue;
              for (int ch = 0; ch < v.C; ++ch) {
                const size_t weight = size_t(v.weight_at(k, ch, ky, kx));
                if (v.mask[weight])
                  sum +=
                      int64_t(x.at(size_t(((n * v.H + iy) * v.W + ix) * v.C + ch), type) - zero) *
                      w[weight];
              }
            }
          const size_t at = size_t(((n * v.Ho + oy) * v.Wo + ox) * v.F + k);
          float t = product(float(sum), multiplier[size_t(k)]);
          if (residual) t = t + product(float(res.at(at, added) - added_zero), scale);
          expected[at] = f.of(t);
        }
  auto p = problem_of<hetconv::Int8Problem>(v);
  p.x = x.data();
  p.x_type = type;
  p.x_zero = zero;
  p.y_type = f.type;
  p.y_zero = f.zero;
  p.low = f.low;
  p.high = f.high;
  p.res = residual ? res.data() : nullptr;
  p.res_type = added;
  p.res_zero = added_zero;
  p.res_multiplier = scale;
  p.threads = c.threads;
  const hetconv::Pool q = draw_pool(r, v.Ho, v.Wo);
  const bool pool = !residual && f.type != Int8Out::f32 && chance(r, 0.35);
  if (pool) {
    p.pool = &q;
    expected = pooled(expected, q, v.N, v.Ho, v.Wo, v.F);
  }
  Bytes y(r, expected.size() * f.size(), false);
  p.y = y.memory.data();
  if (!hetconv::int8_fprop(packed, p, multiplier.data(), bias.data())) return "was not pooled";
  return compare("int8 fprop", y, f, expected);
}

std::string check_sum(Random& r, const hetconv::Int8Kernels& isa, int threads) {
  const Byte ta = draw_type(r), tb = draw_type(r);
  const Finish f = draw_finish(r);
  const size_t n = size_t(chance(r, 0.1) ? pick(r, 30000, 70000) : pick(r, 0, 300));
  const Bytes a(r, n, true), b(r, n, true);
  const bool two = chance(r, 0.6);
  const hetconv::Int8Sum s{int64_t(n),
                           a.data(),
                           two ? b.data() : nullptr,
                           ta,
                           tb,
                           draw_of(r, ta),
                           draw_of(r, tb),
                           chance(r, 0.3) ? 0.5f : 0.613f,
                           0.5f,
                           nullptr,
                           f.type,
                           f.zero,
                           f.low,
                           f.high,
                           threads};
  std::vector<double> expected(n);
  for (size_t i = 0; i < n; ++i) {
    float t = product(float(a.at(i, ta) - s.a_zero), s.a_multiplier);
    if (two) t = t + product(float(b.at(i, tb) - s.b_zero), s.b_multiplier);
    expected[i] = f.of(t);
  }
  Bytes y(r, n * f.size(), false);
  hetconv::Int8Sum call = s;
  call.y = y.memory.data();
  isa.sum(call);
  return compare("int8 sum", y, f, expected);
}

std::string check_images(Random& r, const hetconv::Int8Kernels& isa, int threads) {
  hetconv::Int8Images s{};
  s.N = pick(r, 0, 3);
  s.H = pick(r, 1, 12);
  s.W = pick(r, 1, 12);
  s.C = chance(r, 0.5) ? pick(r, 1, 20) : pick(r, 1, 150);
  s.x_type = draw_type(r);
  s.x_zero = draw_of(r, s.x_type);
  s.multiplier = 0.07f;
  s.threads = threads;
  const Bytes x(r, size_t(s.N) * size_t(s.H * s.W) * size_t(s.C), true);
  s.x = x.data();
  Finish f = draw_finish(r);
  s.y_type = f.type;
  s.y_zero = f.zero;
  s.low = f.low;
  s.high = f.high;
  std::vector<double> means, values(x.count);
  for (size_t i = 0; i < x.count; ++i) values[i] = x.at(i, s.x_type);
  for (int64_t n = 0; n < s.N; ++n)
    for (int c = 0; c < s.C; ++c) {
      int64_t sum = 0;
      for (int64_t k = 0; k < int64_t(s.H) * s.W; ++k)
        sum += int64_t(values[size_t((n * s.H * s.W + k) * s.C + c)]) - s.x_zero;
      means.push_back(f.of(product(float(sum), s.multiplier)));
    }
  Bytes y(r, means.size() * f.size(), false);
  s.y = y.memory.data();
  isa.mean(s);
  const std::string wrong = compare("int8 mean", y, f, means);
  if (!wrong.empty()) return wrong;
  const hetconv::Pool q = draw_pool(r, s.H, s.W);
  const std::vector<double> expected = pooled(values, q, s.N, s.H, s.W, s.C);
  Bytes best(r, expected.size(), false);
  s.pool = &q;
  s.y = best.memory.data();
  isa.max_pool(s);
  f.type = s.x_type == Byte::u8 ? Int8Out::u8 : Int8Out::s8;
  return compare("int8 max_pool", best, f, expected);
}

std::string check_quantize(Random& r, const hetconv::Int8Kernels& isa, int threads) {
  const Byte type = draw_type(r);
  const Finish f{type == Byte::u8 ? Int8Out::u8 : Int8Out::s8, draw_of(r, type),
                 float(range_of(type).low), float(range_of(type).high)};
  std::vector<float> x(size_t(pick(r, 0, 400)));
  const float special[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 0.25f, 0.75f, -0.25f};
  for (float& v : x)
    v = chance(r, 0.2) ? special[pick(r, 0, 7)] : float(std::normal_distribution<>(0, 40)(r));
  std::vector<double> expected;
  for (const float v : x) expected.push_back(f.of(std::isnan(v) ? 0.0f : v / 0.5f));
  Bytes y(r, x.size(), false);
  isa.quantize(x.data(), int64_t(x.size()), 0.5f, f.zero, type,
               reinterpret_cast<uint8_t*>(y.memory.data()), threads);
  return compare("int8 quantize", y, f, expected);
}

}  // namespace

std::string check_int8(const Case& c, const hetconv::Int8Kernels& isa) {
  const Conv& v = c.conv;
  Random r(c.seed ^ 0x9e3779b97f4a7c15u);
  std::vector<int8_t> w(v.mask.size());
  for (int8_t& k : w) k = int8_t(pick(r, -127, 127));
  const auto plan = std::make_shared<const hetconv::Int8Plan>(
      v.mask.data(), v.F, v.C, v.KH, v.KW, isa, chance(r, 0.3) ? "pixels" : "auto");
  const int64_t strides[4] = {int64_t(v.C) * v.KH * v.KW, int64_t(v.KH) * v.KW, v.KW, 1};
  const hetconv::Int8Packed packed(plan, w.data(), strides, c.threads);
  std::string wrong;
  for (int i = 0; i < 3 && wrong.empty(); ++i)
    wrong = check_convolution(r, i ? another_image(c, c.seed * 3 + uint64_t(i)) : c, packed, w);
  if (wrong.empty()) wrong = check_sum(r, isa, c.threads);
  if (wrong.empty()) wrong = check_images(r, isa, c.threads);
  if (wrong.empty()) wrong = check_quantize(r, isa, c.threads);
  return wrong.empty() ? "" : std::string(isa.name) + ": " + wrong;
}

}  // namespace driver
