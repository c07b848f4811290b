// SPDX-License-Identifier: Apache-2.0
#include "reference.h"

namespace driver {

// Calls visit(x, y, w, mask) with the indices of every product of the dense convolution.
template <class Visit> static void products(const Conv& v, Visit visit) {
  for (int64_t n = 0; n < v.N; ++n)
    for (int f = 0; f < v.F; ++f)
      for (int c = 0; c < v.C; ++c)
        for (int ky = 0; ky < v.KH; ++ky)
          for (int kx = 0; kx < v.KW; ++kx) {
            const int64_t w = v.weight_at(f, c, ky, kx);
            for (int oy = 0; oy < v.Ho; ++oy)
              for (int ox = 0; ox < v.Wo; ++ox) {
                const int iy = oy * v.sh - v.pt + ky * v.dh, ix = ox * v.sw - v.pl + kx * v.dw;
                if (iy < 0 || iy >= v.H || ix < 0 || ix >= v.W) continue;
                visit(((n * v.C + c) * v.H + iy) * v.W + ix,
                      ((n * v.F + f) * v.Ho + oy) * v.Wo + ox, w, v.mask[w] != 0);
              }
          }
}

static size_t size_of_x(const Conv& v) { return size_t(v.N) * v.C * v.H * v.W; }
static size_t size_of_y(const Conv& v) { return size_t(v.N) * v.F * v.Ho * v.Wo; }

Values reference_fprop(const Conv& v, const Values& x, const Values& w) {
  Values y(size_of_y(v), 0.0);
  products(v, [&](int64_t i, int64_t o, int64_t k, bool live) {
    if (live) y[o] += x[i] * w[k];
  });
  return y;
}

Values reference_dgrad(const Conv& v, const Values& dy, const Values& w) {
  Values dx(size_of_x(v), 0.0);
  products(v, [&](int64_t i, int64_t o, int64_t k, bool live) {
    if (live) dx[i] += dy[o] * w[k];
  });
  return dx;
}

Values reference_wgrad(const Conv& v, const Values& x, const Values& dy) {
  Values dw(v.mask.size(), 0.0);
  products(v, [&](int64_t i, int64_t o, int64_t k, bool live) {
    if (live) dw[k] += x[i] * dy[o];
  });
  return dw;
}

// An element of one channel lies in the window of every filter whose taps come upon its pixel.
std::vector<uint8_t> reach_fprop(const Conv& v, int64_t element) {
  std::vector<uint8_t> reach(size_of_y(v), kNothing);
  const int64_t plane = int64_t(v.H) * v.W, image = plane * v.C;
  products(v, [&](int64_t i, int64_t o, int64_t, bool live) {
    if (i == element && live) reach[o] = kRead;
    if (i / image == element / image && i % plane == element % plane && !reach[o])
      reach[o] = kWindow;
  });
  return reach;
}

std::vector<uint8_t> reach_dgrad(const Conv& v, int64_t element) {
  std::vector<uint8_t> reach(size_of_x(v), kNothing);
  const int64_t plane = int64_t(v.Ho) * v.Wo, image = plane * v.F;
  products(v, [&](int64_t i, int64_t o, int64_t, bool live) {
    if (o == element && live) reach[i] = kRead;
    if (o / image == element / image && o % plane == element % plane && !reach[i])
      reach[i] = kWindow;
  });
  return reach;
}

}  // namespace driver
