// SPDX-License-Identifier: Apache-2.0
// Bands and weights of bfloat16 for the kernels of micro_pairs.h: elements are moved, not widened.
#pragma once
#include "micro_pairs.h"
#include "pack.h"
#include "pack_weights.h"

namespace hetconv {
namespace HETCONV_NS {

// The first n of 32 elements; the rest is zero.
HC_INLINE __m512i load_halves(const bf16* p, int n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, p);
}
HC_INLINE void store_halves(bf16* p, __m512i v, int n) {
  _mm512_mask_storeu_epi16(p, n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, v);
}

template <> inline void zero_fill<bf16>(bf16* p, int64_t n) {
  for (; n > 0; n -= 32, p += 32)
    store_halves(p, _mm512_setzero_si512(), int(least<int64_t>(n, 32)));
}

// Two rows of pixels as one of pairs: the first n and m of 16, zeros for the rest.
HC_INLINE Vec<float> both_rows(const bf16* lower, const bf16* upper, int n, int m) {
  const __m512i a = _mm512_cvtepu16_epi32(
                    _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), lower)),
                b = _mm512_cvtepu16_epi32(
                    _mm256_maskz_loadu_epi16(__mmask16((1u << m) - 1), upper));
  return (Vec<float>)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

template <>
inline void pack_run_channels_last<bf16, bf16>(const bf16* x, int64_t sc, int64_t sh, int64_t sw,
                                               int C, int first, int istride, int n, bf16* d,
                                               int Cb) {
  const int64_t px = istride * sw;
  x += int64_t(first) * sw;
  if (sc == 1) {
    if (px == C && Cb == C) {
      memcpy(static_cast<void*>(d), x, size_t(n) * C * sizeof(bf16));
      return;
    }
    for (int j = 0; j < n; ++j, d += Cb, x += px) {
      int c = 0;
      for (; c + 32 <= C; c += 32) _mm512_storeu_si512(d + c, _mm512_loadu_si512(x + c));
      for (; c < Cb; c += 32) store_halves(d + c, load_halves(x + c, most(0, C - c)), Cb - c);
    }
  } else if (px == 1) {
    for (int c0 = 0; c0 < Cb; c0 += 32)
      for (int j0 = 0; j0 < n; j0 += 16) {
        const int m = least(16, n - j0);
        Vec<float> r[16];
        for (int i = 0; i < 16; ++i) {
          const int c = c0 + 2 * i;
          const bf16* row = x + c * sc + j0;
          r[i] = c >= C ? Vec<float>{} : both_rows(row, row + sc, m, c + 1 < C ? m : 0);
          // As with single channels: more streams than the hardware follows.
          if (m == 16 && c + 1 < C) {
            __builtin_prefetch(row + 2 * sh, 0, 2);
            __builtin_prefetch(row + sc + 2 * sh, 0, 2);
          }
        }
        transpose<float>(r);
        for (int j = 0; j < m; ++j)
          store_halves(d + int64_t(j0 + j) * Cb + c0, (__m512i)r[j], Cb - c0);
      }
  } else {
    for (int j = 0; j < n; ++j, d += Cb, x += px) {
      for (int c = 0; c < C; ++c) d[c] = x[c * sc];
      zero_fill(d + C, Cb - C);
    }
  }
}

// For each output, the rows of taps that it reads: `KW` pixels of C channels, side by side.
static void pack_patches(const Problem& p, const bf16* x, int KW, const Axis& ya, int oy, int ox,
                         int rows, int cols, int64_t row_elements, bf16* band) {
  for (int q = 0; q < ya.pieces; ++q) {
    const Piece& yp = ya.piece[q];
    for (int i = 0, n = piece_length(ya, yp, rows); i < n; ++i) {
      const int iy = oy * p.sh - p.pt + yp.rel + i * yp.istride;
      bf16* d = band + int64_t(yp.e0 + i) * row_elements;
      for (int j = 0; j < cols; ++j)
        for (int k = 0; k < KW; ++k, d += p.C) {
          const int64_t ix = (int64_t(ox) + j) * p.sw - p.pl + int64_t(k) * p.dw;
          const bool inside = iy >= 0 && iy < p.H && ix >= 0 && ix < p.W;
          for (int c = 0; c < p.C; ++c)
            d[c] = inside ? x[iy * p.x.sh + ix * p.x.sw + c * p.x.sc] : bf16{};
        }
    }
  }
}

// A copy of a band's pixels, Cb apart, with the channels that a segment reads. Writes up to 32
// elements beyond the last.
static inline void gather_band(const Lowered& L, const PairSegment& s, const bf16* band,
                               int64_t pixels, int Cb, bf16* copy) {
  const Gather* g = L.gather + s.gather0;
  const float* perms = static_cast<const float*>(L.perms);
  for (int64_t i = 0; i < pixels; ++i, band += Cb, copy += Cb)
    for (int k = 0; k < s.gathers; ++k)
      _mm512_storeu_si512(copy + g[k].to,
                          (__m512i)permute_both(band + g[k].from, load<float>(perms + g[k].perm0)));
}

// ---- weights ----

// One weight as the upper or lower half of a lane.
template <class S> HC_INLINE uint32_t half_of(const S* w, bool upper) {
  return uint32_t(Narrow<bf16>::of(float(widen(*w))).bits) << (upper ? 16 : 0);
}

HC_INLINE bool idle_of(const Column& c, int half) { return c.idle & (half ? kUpper : kLower); }

template <class S>
static void pack_pair_segment(const Lowered& L, const PairSegment& s, const WeightView& v,
                              float* out) {
  const S* w = reinterpret_cast<const S*>(v.data);
  constexpr int lanes = VL<float>;
  const int pairs = 4 * s.runs + s.pairs;
  const int* filters = L.filters + s.filter0;
  const Column* columns = L.columns + s.col0;
  for (int k0 = 0; k0 < pairs; k0 += lanes) {
    const int n = least(lanes, pairs - k0);
    int64_t at[2 * lanes], live[2 * lanes];  // in the weight, -1 for a zero; in the mask
    for (int k = 0; k < n; ++k) {
      const bool run = k0 + k < 4 * s.runs;
      const Column& c = columns[run ? (k0 + k) / 4 : k0 + k - 3 * s.runs];
      for (int half = 0; half < 2; ++half) {
        const int number = c.channel + (run ? (k0 + k) % 4 * 2 : 0) + half;
        const int channel =
            s.gathers > 0 && !idle_of(c, half) ? L.gathered[s.gathered0 + number] : number;
        const bool idle = idle_of(c, half);
        const int own = L.span ? channel % L.C : channel, kx = c.kx + (L.span ? channel / L.C : 0);
        at[2 * k + half] = own * v.sc + c.ky * v.sh + kx * v.sw;
        live[2 * k + half] = idle ? -1 : mask_at(L, 0, own, c.ky, kx);
      }
    }
    for (int j = 0; j < s.nv; ++j) {
      Vec<float> r[lanes];
      for (int l = 0; l < lanes; ++l) {
        uint32_t lane[lanes] = {};
        if (j * lanes + l < s.lanes) {
          const int f = filters[j * lanes + l];
          const S* row = w + f * v.sf;
          const uint8_t* mask = L.mask + mask_at(L, f, 0, 0, 0);
          for (int k = 0; k < 2 * n; ++k)
            if (live[k] >= 0 && mask[live[k]]) lane[k / 2] |= half_of<S>(row + at[k], k % 2);
        }
        r[l] = load<float>(reinterpret_cast<const float*>(lane));
      }
      transpose<float>(r);
      for (int k = 0; k < n; ++k) store<float>(out + (int64_t(k0 + k) * s.nv + j) * lanes, r[k]);
    }
  }
  out += int64_t(pairs) * s.nv * lanes;
  columns += s.runs + s.pairs;
  const int32_t* perms = static_cast<const int32_t*>(L.perms) + s.perm0;
  const uint8_t* taken = L.taken + s.taken0;
  for (int q = 0; q < s.windows; ++q)
    for (int j = 0; j < s.nv; ++j, ++columns)
      for (int l = 0; l < lanes; ++l, ++perms, ++taken, ++out) {
        uint32_t both = 0;
        for (int half = 0; half < 2; ++half) {
          if (!(*taken & (half ? kUpper : kLower))) continue;
          const int channel = columns->channel + (*perms >> (16 * half) & 0xffff);
          both |= half_of<S>(w + filters[j * lanes + l] * v.sf + channel * v.sc +
                                 columns->ky * v.sh + columns->kx * v.sw,
                             half);
        }
        memcpy(out, &both, sizeof both);
      }
}

// Transformed weights, rounded once; as pack_part, in lanes of two places.
template <class S>
static void pack_pair_part(const Lowered& L, const WinogradPart& k, const WeightView& v,
                           float* out) {
  constexpr int M = 2, lanes = VL<float>;
  const Winograd& W = *L.winograd;
  const PairSegment& s = L.paired[k.segment];
  const int* from = W.from + W.units[k.unit].from0;
  const int columns = 4 * k.quads + k.singles;
  const ptrdiff_t pitch = ptrdiff_t(columns) * k.nv * lanes;
  for (int q = 0; q < columns; ++q) {
    const int64_t place = k.off0 + (q < 4 * k.quads ? q / 4 : q - 3 * k.quads);
    const int first = W.offsets[place] + (q < 4 * k.quads ? q % 4 * 2 : 0);
    for (int l = 0; l < k.nv * lanes; ++l) {
      const int lane = k.vector * lanes + l;
      const int f = lane < s.lanes ? L.filters[s.filter0 + lane] : -1;
      uint32_t both[positions(M)] = {};
      for (int half = 0; f >= 0 && half < 2; ++half) {
        const int at = first + half, channel = from[at / lanes] + at % lanes;
        const bool taken = W.taken[place] & (half ? kUpper : kLower);
        if (!taken || channel >= W.channels || !W.whole[int64_t(f) * W.channels + channel])
          continue;
        double g[taps(M) * taps(M)];
        float u[positions(M)];
        taps_of<S, M>(L, v, f, channel, g);
        transform_weight<float, M>(g, u, 1);
        for (int i = 0; i < positions(M); ++i) both[i] |= half_of(u + i, half != 0);
      }
      for (int i = 0; i < positions(M); ++i)
        memcpy(out + i * pitch + ptrdiff_t(q) * k.nv * lanes + l, both + i, sizeof *both);
    }
  }
}

template <class S>
static void pack_pair_segments(const Lowered& L, const WeightView& v, float* out, int threads) {
  if (L.packed <= (1 << 16)) threads = 1;
  each_in_parallel(L.count, threads, [&](int64_t i) {
    pack_pair_segment<S>(L, L.paired[i], v, out + L.paired[i].w0);
  });
  each_in_parallel(L.winograd ? L.winograd->nparts : 0, threads, [&](int64_t i) {
    const WinogradPart& k = L.winograd->parts[i];
    pack_pair_part<S>(L, k, v, out + k.w0);
  });
}

template <class S>
static void pack_pixel_pairs(const Lowered& L, const WeightView& v, float* out, int threads);

template <class S>
static void pack_as(const Lowered& L, const WeightView& v, float* out, int threads) {
  if (L.pixel_pairs)
    pack_pixel_pairs<S>(L, v, out, threads);
  else
    pack_pair_segments<S>(L, v, out, threads);
}

static void pack_pairs(const Lowered& L, const WeightView& v, DType from, void* packed,
                       int threads) {
  if (L.form != Form::filters && !L.pixel_pairs)
    return pack_weights<float>(L, v, from, packed, threads);
  float* out = static_cast<float*>(packed);
  switch (from) {
    case DType::f32:
      return pack_as<float>(L, v, out, threads);
    case DType::f64:
      return pack_as<double>(L, v, out, threads);
    case DType::bf16:
      return pack_as<bf16>(L, v, out, threads);
    case DType::f16:
      return pack_as<f16>(L, v, out, threads);
  }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
