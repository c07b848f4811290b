// SPDX-License-Identifier: Apache-2.0
// Weights into the order in which the micro-kernels read them. What a dead entry holds never shows.
#pragma once
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "threads.h"
#include "vec.h"
#include "winograd.h"
#include "winograd_transforms.h"

namespace hetconv {
namespace HETCONV_NS {

HC_INLINE int64_t mask_at(const Lowered& L, int f, int c, int ky, int kx) {
  return ((int64_t(f) * L.C + c) * L.KH + ky) * L.KW + kx;
}

// The value of a live entry, zero for a dead one whatever it holds; without a branch, which random
// masks would mispredict at every second weight.
template <class A> HC_INLINE A kept(A value, uint8_t live) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(A) == sizeof(Bits));
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= Bits(0) - Bits(live != 0);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

template <class S, class A>
static void pack_segment(const Lowered& L, const FilterSegment& s, const WeightView& v, A* out) {
  const S* w = reinterpret_cast<const S*>(v.data);
  const int ft = s.nv * VL<A>, broadcast = 4 * s.quads + s.singles;
  const int* filters = L.filters + s.filter0;
  const Column* columns = L.columns + s.col0;
  // Vector of filters by vector: their rows of the weight stay near while all columns are read.
  for (int j = 0; j < s.nv; ++j)
    for (int k0 = 0; k0 < broadcast; k0 += VL<A>) {
      const int n = least(VL<A>, broadcast - k0);
      int64_t at[VL<A>], live[VL<A>];
      for (int k = 0; k < n; ++k) {
        const bool quad = k0 + k < 4 * s.quads;
        const Column& c = columns[quad ? (k0 + k) / 4 : k0 + k - 3 * s.quads];
        const int channel = c.channel + (quad ? (k0 + k) % 4 : 0);
        at[k] = channel * v.sc + c.ky * v.sh + c.kx * v.sw;
        live[k] = mask_at(L, 0, channel, c.ky, c.kx);
      }
      Vec<A> r[VL<A>];
      for (int l = 0; l < VL<A>; ++l) {
        A lane[VL<A>] = {};
        if (j * VL<A> + l < s.lanes) {
          const int f = filters[j * VL<A> + l];
          const S* row = w + f * v.sf;
          const uint8_t* mask = L.mask + mask_at(L, f, 0, 0, 0);
          if (s.merged) {
            for (int k = 0; k < n; ++k) lane[k] = kept(A(widen(row[at[k]])), mask[live[k]]);
          } else
            for (int k = 0; k < n; ++k) lane[k] = A(widen(row[at[k]]));
        }
        r[l] = load<A>(lane);
      }
      transpose<A>(r);
      for (int k = 0; k < n; ++k) store<A>(out + int64_t(k0 + k) * ft + j * VL<A>, r[k]);
    }
  out += int64_t(broadcast) * ft;
  columns += s.quads + s.singles;
  for (int q = 0; q < s.split; ++q)
    for (int j = 0; j < s.nv; ++j, ++columns) {
      const int64_t at = columns->channel * v.sc + columns->ky * v.sh + columns->kx * v.sw;
      for (int l = 0; l < VL<A>; ++l) {
        const int lane = j * VL<A> + l;
        if (lane >= s.lanes || columns->idle) {
          *out++ = A(0);
          continue;
        }
        const int f = filters[lane];
        *out++ = kept(A(widen(w[f * v.sf + at])),
                      L.mask[mask_at(L, f, columns->channel, columns->ky, columns->kx)]);
      }
    }
  for (int j = 0; j < s.nv; ++j)
    for (int q = 0; q < s.pairs[j] + s.halves[j]; ++q)
      for (int half = 0; half < 2; ++half) {
        const Column& c = *columns;
        if (half == 1 || q >= s.pairs[j]) ++columns;  // the halves of a pair share one
        for (int l = 0; l < VL<A>; ++l) {
          const int lane = j * VL<A> + (half * VL<A> + l) / 2, channel = c.channel + l % 2;
          const bool live =
              lane < s.lanes && !c.idle && L.mask[mask_at(L, filters[lane], channel, c.ky, c.kx)];
          *out++ =
              live ? A(widen(w[filters[lane] * v.sf + channel * v.sc + c.ky * v.sh + c.kx * v.sw]))
                   : A(0);
        }
      }
  const auto* perms = reinterpret_cast<const typename Lane<A>::index*>(L.perms) + s.perm0;
  const uint8_t* taken = L.taken + s.taken0;
  for (int q = 0; q < s.straight + s.permuted; ++q)
    for (int j = 0; j < s.nv; ++j, ++columns)
      for (int l = 0; l < VL<A>; ++l) {
        const int lane = j * VL<A> + l;
        const int64_t shift =
            q < s.straight ? l : int64_t(perms[(int64_t(q - s.straight) * s.nv + j) * VL<A> + l]);
        A value = 0;
        if (*taken++) {
          const int f = filters[lane], c = int(columns->channel + shift);
          value = A(widen(w[f * v.sf + c * v.sc + columns->ky * v.sh + columns->kx * v.sw]));
        }
        *out++ = value;
      }
}

template <class S, class A>
static void pack_tile(const Lowered& L, const PixelTile& t, const WeightView& v, A* out) {
  const S* w = reinterpret_cast<const S*>(v.data);
  const int* filters = L.filters + t.filter0;
  for (int k = 0; k < t.ncols; ++k) {
    const Column& c = L.columns[t.col0 + k];
    const S* at = w + c.channel * v.sc + c.ky * v.sh + c.kx * v.sw;
    for (int i = 0; i < t.nf; ++i) *out++ = A(widen(at[filters[i] * v.sf]));
  }
}

// The taps of a filter that a transformed channel is multiplied by, row by row; what is dead, or
// beyond the kernel, is zero.
template <class S, int M>
static void taps_of(const Lowered& L, const WeightView& v, int f, int channel, double* g) {
  constexpr int R = taps(M), P = phases(M);
  const int c = channel % L.C, phase = channel / L.C, y0 = phase / P, x0 = phase % P;
  const uint8_t* live = L.mask + (int64_t(f) * L.C + c) * L.KH * L.KW;
  const S* w = reinterpret_cast<const S*>(v.data) + f * v.sf + c * v.sc;
  for (int i = 0; i < R * R; ++i) {
    const int y = P * (i / R) + y0, x = P * (i % R) + x0;
    const bool there = y < L.KH && x < L.KW && (P == 1 || live[y * L.KW + x]);
    g[i] = there ? double(widen(w[y * v.sh + x * v.sw])) : 0.0;
  }
}

template <class S, class A, int M>
static void pack_part(const Lowered& L, const WinogradPart& k, const WeightView& v, A* out) {
  const FilterSegment& s = L.segments[k.segment];
  const int* from = L.winograd->from + L.winograd->units[k.unit].from0;
  const int* places = L.winograd->offsets + k.off0;
  const int columns = 4 * k.quads + k.singles + k.pairs, ft = (k.pairs ? 2 : k.nv) * VL<A>;
  const ptrdiff_t pitch = ptrdiff_t(columns) * ft;
  for (int q = 0; q < columns; ++q)
    for (int l = 0; l < ft; ++l) {
      const bool quad = q < 4 * k.quads;
      const int at = k.pairs ? places[q] + l % 2
                     : quad  ? places[q / 4] + q % 4
                             : places[q - 3 * k.quads];
      const int lane = k.vector * VL<A> + (k.pairs ? l / 2 : l),
                channel = from[at / VL<A>] + at % VL<A>;
      A* to = out + ptrdiff_t(q) * ft + l;
      const bool taken = !k.pairs || (L.winograd->taken[k.off0 + q] & (l % 2 ? kUpper : kLower));
      const int f = taken && lane < s.lanes ? L.filters[s.filter0 + lane] : -1;
      const int channels = L.winograd->channels;
      if (f >= 0 && channel < channels && L.winograd->whole[int64_t(f) * channels + channel]) {
        double g[taps(M) * taps(M)];
        taps_of<S, M>(L, v, f, channel, g);
        transform_weight<A, M>(g, to, pitch);
      } else {
        for (int i = 0; i < positions(M); ++i) to[i * pitch] = A(0);
      }
    }
}

template <class S, class A>
static void pack_all(const Lowered& L, const WeightView& v, A* out, int threads) {
  if (L.packed <= (1 << 16)) threads = 1;
  each_in_parallel(L.count, threads, [&](int64_t i) {
    if (L.form == Form::filters)
      pack_segment<S, A>(L, L.segments[i], v, out + L.segments[i].w0);
    else
      pack_tile<S, A>(L, L.tiles[i], v, out + L.tiles[i].w0);
  });
  if (!L.winograd) return;
  each_in_parallel(L.winograd->nparts, threads, [&](int64_t i) {
    const WinogradPart& k = L.winograd->parts[i];
    const int tile = L.winograd->tile;
    const auto pack = tile == 2   ? pack_part<S, A, 2>
                      : tile == 3 ? pack_part<S, A, 3>
                                  : pack_part<S, A, 4>;
    pack(L, k, v, out + k.w0);
  });
}

template <class A>
static void pack_weights(const Lowered& L, const WeightView& v, DType from, void* packed,
                         int threads) {
  A* out = static_cast<A*>(packed);
  switch (from) {
    case DType::f32:
      return pack_all<float, A>(L, v, out, threads);
    case DType::f64:
      return pack_all<double, A>(L, v, out, threads);
    case DType::bf16:
      return pack_all<bf16, A>(L, v, out, threads);
    case DType::f16:
      return pack_all<f16, A>(L, v, out, threads);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
