// SPDX-License-Identifier: Apache-2.0
// No call may take a workspace beyond its share of the cache, whatever the layer and the image.
#include <cstdio>

#include "driver.h"

namespace driver {

struct Size {
  int C, F, K, H, W, dilation = 1;
};
// One pixel's window of all channels must fit, so there is a largest C * K * K.
static const Size kSizes[] = {
    {64, 64, 3, 56, 56},        {96, 200, 5, 9, 28},  {512, 512, 3, 2, 7},  {2048, 64, 1, 14, 14},
    {64, 2048, 1, 14, 14},      {16, 1500, 3, 3, 40}, {16, 4096, 3, 2, 64}, {4096, 16, 3, 2, 64},
    {16, 4096, 7, 2, 70},       {3000, 16, 7, 2, 70}, {3, 64, 3, 3, 9000},  {2048, 2048, 1, 1, 7},
    {64, 64, 3, 1, 9001, 4500},
};

static hetconv::View view(std::vector<double>& memory, const Size& s, int channels, bool last) {
  char* data = reinterpret_cast<char*>(memory.data());
  const int64_t pixels = int64_t(s.H) * s.W;
  if (last) return {data, pixels * channels, 1, int64_t(s.W) * channels, channels};
  return {data, pixels * channels, pixels, s.W, 1};
}

int check_workspaces(const hetconv::Kernels& isa) {
  int wrong = 0;
  size_t most = 0;
  for (const Size& s : kSizes) {
    // Every channel is read by some filter, and every filter reads a sixteenth of them.
    std::vector<uint8_t> mask(size_t(s.F) * s.C * s.K * s.K);
    for (size_t i = 0; i < mask.size(); ++i) {
      const int64_t c = int64_t(i) / (s.K * s.K) % s.C, f = int64_t(i) / (s.K * s.K) / s.C;
      mask[i] = (c - f) % 16 == 0;
    }
    // Zeros, of the largest dtype.
    std::vector<double> x(size_t(s.C) * s.H * s.W), y(size_t(s.F) * s.H * s.W), w(mask.size());
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16})
      for (const char* form : {"auto", "filters", "pixels", "columns", "pixel pairs"})
        for (int layout = 0; layout < 2; ++layout) {
          hetconv::Problem p{};
          p.N = 1;
          p.C = s.C;
          p.F = s.F;
          p.H = p.Ho = s.H;
          p.W = p.Wo = s.W;
          p.KH = p.KW = s.K;
          p.sh = p.sw = 1;
          p.dh = p.dw = s.dilation;
          p.pt = p.pl = s.dilation * (s.K / 2);
          p.threads = 2;
          p.x = view(x, s, s.C, layout == 1);
          p.y = view(y, s, s.F, layout == 1);
          const hetconv::Plan plan(mask.data(), s.F, s.C, s.K, s.K, dtype, isa, form, layout == 1);
          const int64_t strides[4] = {int64_t(s.C) * s.K * s.K, s.K * s.K, s.K, 1};
          const hetconv::Packed packed(plan,
                                       {reinterpret_cast<const char*>(w.data()), strides[0],
                                        strides[1], strides[2], strides[3]},
                                       dtype, 2);
          const auto look = [&](const char* verb) {
            const size_t bytes = largest_workspace();
            most = bytes > most ? bytes : most;
            if (bytes <= hetconv::kWorkspaceBytes) return;
            ++wrong;
            std::printf("WORKSPACE %.2f MiB: %s %s %s form %s (%s) %s C%d F%d K%d %dx%d\n",
                        double(bytes) / (1 << 20), isa.name, verb, name_of(dtype), form,
                        plan.form(), layout ? "channels_last" : "contiguous", s.C, s.F, s.K, s.H,
                        s.W);
          };
          largest_workspace();
          hetconv::fprop(plan, packed, p);
          look("fprop");
          if (std::string(form) == "filters" || std::string(form) == "pixel pairs")
            continue;  // wgrad has two forms
          const hetconv::Wgrad wgrad(mask.data(), s.F, s.C, s.K, s.K, dtype, isa,
                                     std::string(form) == "columns" ? "channels" : "pixels",
                                     layout == 1);
          wgrad.run(p, w.data(), strides);
          look("wgrad");
        }
  }
  std::printf("%s: at most %.2f MiB of workspace a thread, %d calls beyond\n", isa.name,
              double(most) / (1 << 20), wrong);
  return wrong;
}

}  // namespace driver
