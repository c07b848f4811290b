// SPDX-License-Identifier: Apache-2.0
#include "dgrad.h"

#include <algorithm>
#include <numeric>

namespace hetconv {

static Residue residue(int r, int K, int stride, int pad, int dilation) {
  const int common = std::gcd(stride, dilation);
  Residue c{r, 0, stride / common, 0, 0, dilation / common};
  for (int k = K - 1; k >= 0; --k) {
    const int at = r + pad - dilation * k;
    if (at % stride != 0) continue;
    c.k0 = k;
    c.first = at / stride;
    ++c.count;
  }
  return c;
}

static size_t storage_bytes(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

Dgrad::Dgrad(const uint8_t* mask, int F, int C, int KH, int KW, DType dtype, const Kernels& kernels,
             const std::string& form, bool channels_last, const int stride[2], const int padding[2],
             const int dilation[2])
    : F_(F), C_(C), stride_{stride[0], stride[1]}, dtype_(dtype) {
  for (int ry = 0; ry < stride[0]; ++ry)
    for (int rx = 0; rx < stride[1]; ++rx) {
      Part part{residue(ry, KH, stride[0], padding[0], dilation[0]),
                residue(rx, KW, stride[1], padding[1], dilation[1]), nullptr};
      const Residue &y = part.y, &x = part.x;
      const bool none = y.count == 0 || x.count == 0;
      const int kh = none ? 1 : y.count, kw = none ? 1 : x.count;
      std::vector<uint8_t> transposed(size_t(C) * F * kh * kw, 0);
      if (!none)
        for (int c = 0; c < C; ++c)
          for (int f = 0; f < F; ++f)
            for (int j = 0; j < kh; ++j)
              for (int i = 0; i < kw; ++i)
                transposed[((size_t(c) * F + f) * kh + j) * kw + i] =
                    mask[((size_t(f) * C + c) * KH + y.k0 + y.step * (kh - 1 - j)) * KW + x.k0 +
                         x.step * (kw - 1 - i)];
      part.plan = std::make_unique<Plan>(transposed.data(), C, F, kh, kw, dtype, kernels,
                                         none ? "pixels" : form, channels_last);
      parts_.push_back(std::move(part));
    }
}

std::vector<std::unique_ptr<Packed>> Dgrad::pack(const WeightView& w, DType from,
                                                 int threads) const {
  std::vector<std::unique_ptr<Packed>> out;
  for (const Part& part : parts_) {
    WeightView v = w;
    std::swap(v.sf, v.sc);
    if (part.y.count > 0 && part.x.count > 0) {
      v.data += int64_t(storage_bytes(from)) *
                ((part.y.k0 + int64_t(part.y.step) * (part.y.count - 1)) * w.sh +
                 (part.x.k0 + int64_t(part.x.step) * (part.x.count - 1)) * w.sw);
      v.sh = -part.y.step * w.sh;
      v.sw = -part.x.step * w.sw;
    }
    out.push_back(std::make_unique<Packed>(*part.plan, v, from, threads));
  }
  return out;
}

void Dgrad::run(const std::vector<std::unique_ptr<Packed>>& packed, const View& dy, int64_t N,
                int Ho, int Wo, const View& dx, int H, int W, int threads) const {
  const size_t size = storage_bytes(dtype_);
  for (size_t i = 0; i < parts_.size(); ++i) {
    const Residue &y = parts_[i].y, &x = parts_[i].x;
    Problem p{};
    p.N = N;
    p.C = F_;
    p.F = C_;
    p.KH = parts_[i].plan->lowered().KH;
    p.KW = parts_[i].plan->lowered().KW;
    p.H = Ho;
    p.W = Wo;
    p.Ho = H > y.r ? (H - y.r + stride_[0] - 1) / stride_[0] : 0;
    p.Wo = W > x.r ? (W - x.r + stride_[1] - 1) / stride_[1] : 0;
    p.sh = p.sw = 1;
    const bool none = y.count == 0 || x.count == 0;
    p.dh = none ? 1 : y.spread;
    p.dw = none ? 1 : x.spread;
    p.pt = none ? 0 : (y.count - 1) * y.spread - y.first;
    p.pl = none ? 0 : (x.count - 1) * x.spread - x.first;
    p.x = dy;
    p.y = View{dx.data + int64_t(size) * (y.r * dx.sh + x.r * dx.sw), dx.sn, dx.sc,
               stride_[0] * dx.sh, stride_[1] * dx.sw};
    p.threads = threads;
    fprop(*parts_[i].plan, *packed[i], p);
  }
}

}  // namespace hetconv
