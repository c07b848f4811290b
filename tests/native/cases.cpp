// SPDX-License-Identifier: Apache-2.0
// Random calls: Support x geometry x dtype x form x epilogue x threads.
#include <algorithm>
#include <sstream>

#include "driver.h"

namespace driver {

using hetconv::Act;

static void draw_mask(Random& r, Case& c) {
  Conv& v = c.conv;
  const int kinds = 7, kind = pick(r, 0, kinds - 1);
  v.mask.assign(size_t(v.F) * v.C * v.KH * v.KW, 0);
  const int p = pick(r, 1, std::max(v.C, 2)), groups = pick(r, 1, 6);
  const double density = std::vector<double>{0.0, 0.05, 0.3, 0.6, 0.95}[size_t(pick(r, 0, 4))];
  std::vector<int> label(size_t(v.F), 0);
  for (int& l : label) l = pick(r, 0, groups - 1);
  std::vector<uint8_t> keep(size_t(groups) * v.C * v.KH * v.KW);
  for (uint8_t& k : keep) k = chance(r, density);
  for (int f = 0; f < v.F; ++f)
    for (int ch = 0; ch < v.C; ++ch)
      for (int ky = 0; ky < v.KH; ++ky)
        for (int kx = 0; kx < v.KW; ++kx) {
          const bool centre = ky == v.KH / 2 && kx == v.KW / 2;
          const size_t tap = (size_t(ch) * v.KH + ky) * v.KW + kx;
          bool live = true;
          if (kind == 1) live = ch * groups / v.C == f * groups / v.F;
          if (kind == 2) live = centre || ch * p / v.C == f * p / v.F;
          if (kind == 3) live = centre || (ch - f) % p == 0;
          if (kind == 4) live = keep[(size_t(label[f]) * v.C + ch) * v.KH * v.KW];  // whole kernels
          if (kind == 5) live = keep[size_t(label[f]) * v.C * v.KH * v.KW + tap];
          if (kind == 6) live = chance(r, density);
          v.mask[size_t(v.weight_at(f, ch, ky, kx))] = live ? 1 : 0;
        }
  const char* names[kinds] = {"dense",         "grouped", "het-blocked", "het-interleaved",
                              "self-grouping", "ragged",  "irregular"};
  c.mask_kind = names[kind];
}

// Steps: the stride, with dilation 1; 0: any.
static void draw_image(Random& r, Conv& v, int steps) {
  for (;;) {
    const int size = pick(r, 0, 9);
    v.N = chance(r, 0.03) ? 0 : size == 7 ? pick(r, 4, 9) : pick(r, 1, 3);
    v.H = size == 8 ? pick(r, 1, 3) : size == 9 ? pick(r, 20, 40) : pick(r, 1, 14);
    v.W = size == 8 ? pick(r, 60, 300) : size == 9 ? pick(r, 20, 40) : pick(r, 1, 18);
    const auto step = [&] { return chance(r, 0.5) ? 1 : pick(r, 1, 3); };
    v.sh = steps ? steps : step();
    v.sw = steps ? steps : step();
    v.dh = steps ? 1 : step();
    v.dw = steps ? 1 : step();
    const bool same = chance(r, 0.4);
    v.pt = same ? v.dh * (v.KH - 1) / 2 : pick(r, 0, v.KH + 1);
    v.pl = same ? v.dw * (v.KW - 1) / 2 : pick(r, 0, v.KW + 1);
    const int bottom = chance(r, 0.7) ? v.pt : pick(r, 0, 3),
              right = chance(r, 0.7) ? v.pl : pick(r, 0, 3);
    const int rows = v.H + v.pt + bottom - v.dh * (v.KH - 1),
              cols = v.W + v.pl + right - v.dw * (v.KW - 1);
    if (rows < 1 || cols < 1) continue;
    v.Ho = (rows - 1) / v.sh + 1;
    v.Wo = (cols - 1) / v.sw + 1;
    if (double(v.N) * v.Ho * v.Wo * double(v.mask.size()) <= 2e6) return;
  }
}

static bool has_whole_kernels(const Conv& v) {
  for (size_t i = 0; i + 9 <= v.mask.size(); i += 9)
    if (std::all_of(v.mask.begin() + i, v.mask.begin() + i + 9, [](uint8_t t) { return t != 0; }))
      return true;
  return false;
}

// All filters read what the first one does; false: that is nothing.
static bool read_alike(Conv& v) {
  const auto row = v.mask.begin(), end = row + ptrdiff_t(v.mask.size()) / v.F;
  for (int f = 1; f < v.F; ++f) std::copy(row, end, row + f * (end - row));
  return std::find(row, end, 1) != end;
}

Case random_case(uint64_t seed, const hetconv::Kernels& isa) {
  Random r(seed);
  Case c{};
  c.seed = seed;
  c.isa = &isa;
  const int edges[] = {1, 3, 3, 5, 7, 2};
  const bool square = chance(r, 0.7);
  // What Winograd's forms are for: of whole kernels, and of phases.
  const bool transform = chance(r, 0.2), first = !isa.pairs && chance(r, 0.08);
  do {
    c.conv.KH = first ? pick(r, 7, 8) : transform ? 3 : edges[pick(r, 0, 5)];
    c.conv.KW = first ? pick(r, 7, 8) : transform || square ? c.conv.KH : edges[pick(r, 0, 5)];
    const int most = chance(r, 0.6) && !transform ? 20 : 80;
    const int least = transform || first ? isa.vector_bytes / 4 : 1;
    c.conv.C = first ? pick(r, 1, 4) : pick(r, least, std::max(least, most));
    c.conv.F = pick(r, least, std::max(least, most));
  } while (int64_t(c.conv.C) * c.conv.F * c.conv.KH * c.conv.KW > 40000);
  draw_mask(r, c);
  const bool alike = first && read_alike(c.conv);
  draw_image(r, c.conv, first ? 2 : transform ? 1 : 0);
  const DType types[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  c.dtype = chance(r, 0.4) ? DType::f32 : types[pick(r, 0, 3)];
  if (isa.pairs) c.dtype = DType::bf16;  // the rest is another instruction set's
  c.weight_dtype = chance(r, 0.7) ? c.dtype : types[pick(r, 0, 3)];
  const char* forms[] = {"auto", "filters", "pixels", "columns", "pixel pairs"};
  c.form = forms[pick(r, 0, isa.pairs ? 4 : 3)];
  if (alike) {
    c.dtype = DType::f32;
    c.form = "winograd 3x3";
  } else if (transform && !first && has_whole_kernels(c.conv)) {
    if (!isa.pairs) c.dtype = DType::f32;
    c.form = isa.pairs || chance(r, 0.5) ? "winograd 2x2" : "winograd 4x4";
  }
  const Act acts[] = {Act::none, Act::relu, Act::relu6, Act::silu, Act::gelu};
  // In tiles of more than two outputs what is not finite reaches a whole tile.
  c.planted = chance(r, 0.2) && hetconv::tile_of(c.form) <= 2;
  c.act = c.planted || chance(r, 0.5) ? Act::none : acts[pick(r, 1, 4)];
  c.scale = chance(r, 0.3);
  c.shift = chance(r, 0.4);
  c.residual = chance(r, 0.3);
  c.channels_last = chance(r, 0.5);
  c.threads = pick(r, 1, 4);
  return c;
}

Case another_image(const Case& like, uint64_t seed) {
  Random r(seed);
  Case c = like;
  c.seed = seed;
  const int tile = hetconv::tile_of(c.form);
  draw_image(r, c.conv, tile ? hetconv::phases(tile) : 0);
  c.threads = pick(r, 1, 2);
  return c;
}

std::string Case::describe() const {
  const char* acts[] = {"none", "relu", "relu6", "silu", "gelu"};
  const Conv& v = conv;
  std::ostringstream text;
  text << "case " << seed << ": " << isa->name << ' ' << name_of(dtype) << " weights "
       << name_of(weight_dtype) << ' ' << mask_kind << " form " << form << " N" << v.N << " C"
       << v.C << " H" << v.H << " W" << v.W << " F" << v.F << " out " << v.Ho << 'x' << v.Wo
       << " K " << v.KH << 'x' << v.KW << " stride " << v.sh << ',' << v.sw << " pad " << v.pt
       << ',' << v.pl << " dilation " << v.dh << ',' << v.dw << " act " << acts[int(act)]
       << (scale ? " scale" : "") << (shift ? " shift" : "") << (residual ? " residual" : "")
       << (planted ? " planted" : "") << (channels_last ? " channels_last" : "") << " threads "
       << threads;
  return text.str();
}

}  // namespace driver
