// SPDX-License-Identifier: Apache-2.0
// One call of each primitive on poisoned memory, compared with the reference.
#include <cmath>
#include <limits>
#include <sstream>

#include "driver.h"

namespace driver {

using hetconv::Act;
using hetconv::Packed;
using hetconv::Plan;
using hetconv::Problem;

static Values draw(Random& r, size_t count, int most) {
  Values values(count);
  for (double& v : values) v = pick(r, -most, most) * 0.25;
  return values;
}

// Dead weights are NaN in memory: nothing may read them.
static Values draw_weights(Random& r, const Conv& v) {
  Values w = draw(r, v.mask.size(), 6);
  for (size_t i = 0; i < w.size(); ++i)
    if (!v.mask[i]) w[i] = std::nan("");
  return w;
}

static Problem problem_of(const Case& c) {
  const Conv& v = c.conv;
  auto p = problem_of<Problem>(v);
  p.KH = v.KH;
  p.KW = v.KW;
  p.act = c.act;
  p.threads = c.threads;
  return p;
}

static hetconv::WeightView weights_of(const Tensor& w) {
  const hetconv::View v = w.view();
  return {v.data, v.sn, v.sc, v.sh, v.sw};
}

static std::vector<int64_t> shape_x(const Conv& v) { return {v.N, v.C, v.H, v.W}; }
static std::vector<int64_t> shape_y(const Conv& v) { return {v.N, v.F, v.Ho, v.Wo}; }
static std::vector<int64_t> shape_w(const Conv& v) { return {v.F, v.C, v.KH, v.KW}; }

static double activate(Act act, double v) {
  switch (act) {
    case Act::none:
      return v;
    case Act::relu:
      return v < 0 ? 0 : v;
    case Act::relu6:
      return v < 0 ? 0 : v > 6 ? 6 : v;
    case Act::silu:
      return v / (1 + std::exp(-v));
    case Act::gelu:
      return 0.5 * v * (1 + std::erf(v * std::sqrt(0.5)));
  }
  return v;
}

static double epsilon(DType d) {
  return d == DType::f64    ? std::numeric_limits<double>::epsilon()
         : d == DType::f32  ? std::numeric_limits<float>::epsilon()
         : d == DType::bf16 ? 0x1p-7
                            : 0x1p-10;
}

static std::string differ(const char* what, size_t at, double got, double want) {
  std::ostringstream text;
  text.precision(17);
  text << what << " at element " << at << ": " << got << ", expected " << want;
  return text.str();
}

// NaN or infinity in place of one number; -1 where there is none.
static int64_t plant(Random& r, const Case& c, Values& values) {
  if (!c.planted || values.empty()) return -1;
  const int64_t at = int64_t(r() % values.size());
  values[size_t(at)] = pick(r, 0, 1) ? std::nan("") : INFINITY;
  return at;
}

// A result that reads a non-finite number is not finite; one whose window does not cover it is
// exact; between the two, exact where groups are not merged (pixels in vectors).
static std::string compare_planted(const char* what, const Values& got, const Values& want,
                                   const std::vector<uint8_t>& reach, DType dtype, bool strict) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double exact = round_to(dtype, want[i]);
    const bool spoilt = !std::isfinite(got[i]);
    if (reach[i] == kRead && !spoilt)
      return differ("a result that reads NaN or Inf", i, got[i], NAN);
    if (reach[i] == kRead || (reach[i] == kWindow && spoilt && !strict)) continue;
    if (got[i] != exact) return differ(what, i, got[i], exact);
  }
  return "";
}

// What tiles of three and four outputs by Winograd may err by, whose transforms round even these
// numbers: far less than the least difference of two right results, 1/256. 0 for all other forms.
static double rounding(const Case& c, const Values& inputs, const Values& weights, int channels,
                       const Values& scale) {
  if (hetconv::tile_of(c.form) <= 2) return 0;
  const auto largest = [](const Values& values) {
    double most = 0;
    for (double v : values) most = std::max(most, std::fabs(v));
    return most;
  };
  return 0x1p-20 * c.conv.KH * c.conv.KW * channels * largest(inputs) * largest(weights) *
         largest(scale);
}

static bool strict(const Plan& plan) { return plan.lowered().form == hetconv::Form::pixels; }

// Max-pooling as it is computed gives the largest of what `p` gave, y.
static std::string check_pooled(const Case& c, const Plan& plan, const Packed& packed, Problem p,
                                const Values& y) {
  Random r(c.seed * 3 + 7);
  const Conv& v = c.conv;
  hetconv::Pool q{
      int(pick(r, 1, 4)), int(pick(r, 1, 4)), int(pick(r, 1, 3)), int(pick(r, 1, 3)), 0, 0, 0, 0};
  q.pt = int(pick(r, 0, q.KH / 2));
  q.pl = int(pick(r, 0, q.KW / 2));
  if (v.Ho + 2 * q.pt < q.KH || v.Wo + 2 * q.pl < q.KW) return "";
  q.Ho = (v.Ho + 2 * q.pt - q.KH) / q.sh + 1;
  q.Wo = (v.Wo + 2 * q.pl - q.KW) / q.sw + 1;
  Tensor pooled(r, c.dtype, {v.N, v.F, q.Ho, q.Wo}, false);
  p.y = pooled.view();
  p.pool = &q;
  const bool done = hetconv::fprop(plan, packed, p);
  if (!pooled.gaps_intact()) return "pooled fprop wrote beside its output";
  if (!done) return "";
  const Values got = pooled.read();
  for (int64_t plane = 0, i = 0; plane < int64_t(v.N) * v.F; ++plane)
    for (int py = 0; py < q.Ho; ++py)
      for (int px = 0; px < q.Wo; ++px, ++i) {
        double largest = -INFINITY;
        for (int oy = py * q.sh - q.pt; oy < py * q.sh - q.pt + q.KH; ++oy)
          for (int ox = px * q.sw - q.pl; ox < px * q.sw - q.pl + q.KW; ++ox)
            if (oy >= 0 && oy < v.Ho && ox >= 0 && ox < v.Wo)
              largest = std::max(largest, y[size_t((plane * v.Ho + oy) * v.Wo + ox)]);
        if (got[size_t(i)] != largest)
          return differ("pooled fprop", size_t(i), got[size_t(i)], largest);
      }
  return "";
}

std::string check_fprop(const Case& c, const Plan& plan) {
  hetconv::set_non_temporal_bytes(c.seed % 2 ? 0 : INT64_MAX);
  Random r(c.seed * 3 + 1);
  const Conv& v = c.conv;
  Problem p = problem_of(c);
  Tensor x(r, c.dtype, shape_x(v), !c.planted), w(r, c.weight_dtype, shape_w(v), false),
      y(r, c.dtype, shape_y(v), false), res(r, c.dtype, shape_y(v), true);
  Values xv = draw(r, size_t(v.N) * v.C * v.H * v.W, 8), wv = draw_weights(r, v),
         rv = draw(r, size_t(v.N) * v.F * v.Ho * v.Wo, 8);
  Values scale(size_t(v.F), 1.0), shift(size_t(v.F), 0.0);
  const DType wide = c.dtype == DType::f64 ? DType::f64 : DType::f32;
  Guarded scales(size_t(v.F) * size_of(wide), true), shifts(size_t(v.F) * size_of(wide), true);
  const auto put = [&](Guarded& memory, Values& values, bool used, double unit) {
    for (int f = 0; f < v.F; ++f) {
      if (used) values[size_t(f)] = pick(r, -4, 4) * unit;
      if (wide == DType::f64)
        reinterpret_cast<double*>(memory.data())[f] = values[size_t(f)];
      else
        reinterpret_cast<float*>(memory.data())[f] = float(values[size_t(f)]);
    }
    memory.read_only();
  };
  put(scales, scale, c.scale, 0.5);
  put(shifts, shift, c.shift, 0.25);
  const Values clean = xv;
  const int64_t planted = plant(r, c, xv);
  x.fill(xv);
  w.fill(wv);
  res.fill(rv);
  for (Tensor* t : {&x, &w, &res}) t->read_only();
  p.x = x.view();
  p.y = y.view();
  if (c.residual) p.res = res.view();
  if (c.scale) p.scale = scales.data();
  if (c.shift) p.shift = shifts.data();

  const Packed packed(plan, weights_of(w), c.weight_dtype, c.threads);
  hetconv::fprop(plan, packed, p);

  if (!y.gaps_intact()) return "fprop wrote beside its output";
  const Values got = y.read();
  Values want = reference_fprop(v, planted < 0 ? xv : clean, wv);
  const size_t plane = size_t(v.Ho) * v.Wo;
  for (size_t i = 0; i < want.size(); ++i) {
    const size_t f = i / plane % size_t(v.F);
    want[i] = want[i] * scale[f] + shift[f] + (c.residual ? rv[i] : 0);
  }
  if (planted >= 0) {
    std::vector<uint8_t> reach = reach_fprop(v, planted);
    // A scale of zero times infinity is NaN, as it should be; elsewhere nothing changes.
    return compare_planted("fprop", got, want, reach, c.dtype, strict(plan));
  }
  const bool smooth = c.act == Act::silu || c.act == Act::gelu;
  const double rounded = rounding(c, xv, wv, v.C, scale);
  for (size_t i = 0; i < want.size(); ++i) {
    const double exact = activate(c.act, want[i]);
    // exp and erf differ by a few units in the last place, before the result is rounded.
    const double bound = smooth ? 8 * epsilon(wide) * std::fabs(want[i]) +
                                      epsilon(c.dtype) * std::fabs(exact) +
                                      std::numeric_limits<float>::min() + 2 * rounded
                                : rounded;
    const double expected = smooth ? exact : round_to(c.dtype, exact);
    if (!(std::fabs(got[i] - expected) <= bound) && got[i] != expected)
      return differ("fprop", i, got[i], expected);
  }
  return check_pooled(c, plan, packed, p, got);
}

std::string check_dgrad(const Case& c) {
  Random r(c.seed * 3 + 2);
  const Conv& v = c.conv;
  const int stride[2] = {v.sh, v.sw}, padding[2] = {v.pt, v.pl}, dilation[2] = {v.dh, v.dw};
  const bool first = hetconv::tile_of(c.form) == 3;  // which no residue's kernel is
  const hetconv::Dgrad engine(v.mask.data(), v.F, v.C, v.KH, v.KW, c.dtype, *c.isa,
                              first ? "auto" : c.form, c.channels_last, stride, padding, dilation);
  Tensor dy(r, c.dtype, shape_y(v), !c.planted), w(r, c.weight_dtype, shape_w(v), false),
      dx(r, c.dtype, shape_x(v), false);
  Values dyv = draw(r, size_t(v.N) * v.F * v.Ho * v.Wo, 8), wv = draw_weights(r, v);
  const Values clean = dyv;
  const int64_t planted = plant(r, c, dyv);
  dy.fill(dyv);
  w.fill(wv);
  dy.read_only();
  w.read_only();
  const auto packed = engine.pack(weights_of(w), c.weight_dtype, c.threads);
  engine.run(packed, dy.view(), v.N, v.Ho, v.Wo, dx.view(), v.H, v.W, c.threads);
  if (!dx.gaps_intact()) return "dgrad wrote beside its output";
  const Values got = dx.read(), want = reference_dgrad(v, planted < 0 ? dyv : clean, wv);
  if (planted >= 0) {
    bool all_strict = true;
    for (const auto& part : engine.parts()) all_strict = all_strict && strict(*part.plan);
    return compare_planted("dgrad", got, want, reach_dgrad(v, planted), c.dtype, all_strict);
  }
  const double rounded = first ? 0 : rounding(c, dyv, wv, v.F, {1.0});
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::fabs(got[i] - round_to(c.dtype, want[i])) <= rounded))
      return differ("dgrad", i, got[i], round_to(c.dtype, want[i]));
  return "";
}

std::string check_wgrad(const Case& c, const hetconv::Wgrad& wgrad) {
  Random r(c.seed * 3 + 3);
  const Conv& v = c.conv;
  Problem p = problem_of(c);
  Tensor x(r, c.dtype, shape_x(v), !c.planted), dy(r, c.dtype, shape_y(v), true),
      dw(r, c.dtype, shape_w(v), false);
  Values xv = draw(r, size_t(v.N) * v.C * v.H * v.W, 8),
         dyv = draw(r, size_t(v.N) * v.F * v.Ho * v.Wo, 8);
  const Values clean = xv;
  const int64_t planted = plant(r, c, xv);
  x.fill(xv);
  dy.fill(dyv);
  x.read_only();
  dy.read_only();
  p.x = x.view();
  p.y = dy.view();
  wgrad.run(p, dw.view().data, dw.strides);
  if (!dw.gaps_intact()) return "wgrad wrote beside its output";
  const Values got = dw.read(), want = reference_wgrad(v, planted < 0 ? xv : clean, dyv);
  const int64_t spoilt = planted < 0 ? -1 : planted / (int64_t(v.H) * v.W) % v.C;
  for (size_t i = 0; i < want.size(); ++i) {
    if (!v.mask[i]) {
      if (!std::isnan(got[i])) return differ("a dead weight's gradient", i, got[i], NAN);
      continue;
    }
    if (int64_t(i) / (int64_t(v.KH) * v.KW) % v.C == spoilt) continue;  // reads the planted channel
    if (got[i] != round_to(c.dtype, want[i]))
      return differ("wgrad", i, got[i], round_to(c.dtype, want[i]));
  }
  return "";
}

}  // namespace driver
