// SPDX-License-Identifier: Apache-2.0
// The epilogue, from accumulators to the output tensor: scale, shift, residual, activation, storage
// type, memory format.
#pragma once
#include <cmath>
#include <limits>
#include "non_temporal.h"

namespace hetconv {
namespace HETCONV_NS {

template <class A> struct Out {
  View y, res;
  const A* scale;
  const A* shift;
  Act act;
};

template <class A> static inline Out<A> out_of(const Problem& p) {
  return Out<A>{p.y, p.res, static_cast<const A*>(p.scale), static_cast<const A*>(p.shift), p.act};
}

template <class A> static __attribute__((noinline)) Vec<A> smooth(Vec<A> v, Act act) {
  for (int i = 0; i < VL<A>; ++i) {
    const A x = v[i];
    if (act == Act::silu)
      v[i] = x / (A(1) + std::exp(-x));
    else
      v[i] = A(0.5) * x * (A(1) + std::erf(x * A(0.70710678118654752440)));
  }
  return v;
}

// Comparisons are written so that NaN stays NaN.
template <class A> HC_INLINE Vec<A> activate(Vec<A> v, Act act) {
  const Vec<A> zero = {};
  if (act == Act::none) return v;
  if (act == Act::relu) return zero > v ? zero : v;
  if (act == Act::relu6) {
    const Vec<A> six = splat<A>(A(6));
    v = zero > v ? zero : v;
    return six < v ? six : v;
  }
  return smooth<A>(v, act);
}

// What happens to the accumulators of up to VL filters, one pixel at a time: lanes = filters.
template <class S, class A> struct Lanes {
  const Out<A>& o;
  const int* filters;
  int n;
  bool vectors;  // the filters are neighbours in memory
  Vec<A> scale, shift;

  Lanes(const Out<A>& out, const int* f, int count, bool contiguous)
      : o(out), filters(f), n(count), scale(splat<A>(A(1))), shift{} {
    vectors = contiguous && o.y.sc == 1 && (!o.res.data || o.res.sc == 1);
    if (o.scale) scale = of_filters(o.scale, contiguous);
    if (o.shift) shift = of_filters(o.shift, contiguous);
  }
  Vec<A> of_filters(const A* values, bool contiguous) const {
    if (contiguous) return load_n<A>(values + filters[0], n);
    Vec<A> v = {};
    for (int l = 0; l < n; ++l) v[l] = values[filters[l]];
    return v;
  }
  // Whether there is nothing but a shift, a residual and a ReLU, for a whole vector: what most
  // layers have. `Simple` then asks nothing for each pixel.
  bool simple() const {
    return vectors && n == VL<A> && !o.scale && (o.act == Act::none || o.act == Act::relu);
  }
  // What becomes of accumulators; res: the pixel at filter 0, or null.
  HC_INLINE Vec<A> finished(const Lanes& k, Vec<A> v, const S* res) {
    if (k.o.scale) v *= k.scale;
    if (k.o.shift) v += k.shift;
    if (res && k.vectors)
      v += read_n<S, A>(res + k.filters[0], k.n);
    else if (res)
      for (int l = 0; l < k.n; ++l) v[l] += widen(res[k.filters[l] * k.o.res.sc]);
    return activate<A>(v, k.o.act);
  }
  // y: the pixel at filter 0.
  HC_INLINE void keep(const Lanes& k, Vec<A> v, S* y) {
    if (k.vectors && k.n == VL<A>) {
      write<S, A>(y + k.filters[0], v);
    } else if (k.vectors) {
      write_n<S, A>(y + k.filters[0], v, k.n);
    } else {
      A lane[VL<A>];
      store<A>(lane, v);
      for (int l = 0; l < k.n; ++l) y[k.filters[l] * k.o.y.sc] = Narrow<S>::of(lane[l]);
    }
  }
  HC_INLINE void put(const Lanes& k, Vec<A> v, S* y, const S* res) {
    keep(k, finished(k, v, res), y);
  }
};

template <class S, class A> struct Simple {
  Vec<A> floor, shift;

  explicit Simple(const Lanes<S, A>& k)
      : floor(splat<A>(k.o.act == Act::relu ? A(0) : -std::numeric_limits<A>::infinity())),
        shift(k.shift) {}
  HC_INLINE Vec<A> finished(const Simple& k, Vec<A> v, const S* res) {
    v += k.shift;
    if (res) v += read<S, A>(res);
    return k.floor > v ? k.floor : v;
  }
  HC_INLINE void keep(const Simple&, Vec<A> v, S* y) { write<S, A>(y, v); }
  HC_INLINE void put(const Simple& k, Vec<A> v, S* y, const S* res) {
    keep(k, finished(k, v, res), y);
  }
};

// `Simple`, past the caches.
template <class A> struct SimpleNonTemporal : Simple<A, A> {
  using Simple<A, A>::Simple;
  HC_INLINE void put(const SimpleNonTemporal& k, Vec<A> v, A* y, const A* res) {
    store_non_temporal<A>(y, Simple<A, A>::finished(k, v, res));
  }
};

// Where a tile of MR pixels x NV vectors of filters goes while it is still in registers, and what
// happens to it there: what `Simple` does. y is null where the sums themselves are wanted.
template <class S, class A> struct TileEnd {
  S* y;
  const S* res;
  ptrdiff_t y_pixel, res_pixel;
  const A* shift;  // [NV] vectors, or null
  bool relu;
  bool past_caches;  // by non-temporal stores

  // Whether it can do all that `o` asks, to filters from `filter0` on.
  bool takes(const Out<A>& o, int filter0) {
    if (o.scale || (o.act != Act::none && o.act != Act::relu)) return false;
    shift = o.shift ? o.shift + filter0 : nullptr;
    relu = o.act == Act::relu;
    y_pixel = o.y.sw;
    res_pixel = o.res.sw;
    return true;
  }
};

template <class S, class A, int MR, int NV>
HC_INLINE void finish_tile(Vec<A> (&acc)[MR][NV], const TileEnd<S, A>& e) {
  const Vec<A> floor = splat<A>(e.relu ? A(0) : -std::numeric_limits<A>::infinity());
  HC_UNROLL for (int j = 0; j < NV; ++j) {
    if (e.shift) {
      const Vec<A> shift = load<A>(e.shift + j * VL<A>);
      HC_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] += shift;
    }
    if (e.res) {
      HC_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] +=
          read<S, A>(e.res + i * e.res_pixel + j * VL<A>);
    }
    // Written so that NaN stays NaN.
    HC_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = floor > acc[i][j] ? floor : acc[i][j];
    S* y = e.y + j * VL<A>;
    if constexpr (kNonTemporalStores && sizeof(S) == sizeof(A))
      if (e.past_caches) {
        HC_UNROLL for (int i = 0; i < MR; ++i) store_non_temporal<A>(y + i * e.y_pixel, acc[i][j]);
        continue;
      }
    HC_UNROLL for (int i = 0; i < MR; ++i) write<S, A>(y + i * e.y_pixel, acc[i][j]);
  }
}

// Accumulators pixel by pixel, lanes = filters: rows x cols pixels, `pitch` elements apart, to y at
// element offset `at`.
template <class S, class A>
static void emit_pixels(const Out<A>& o, const int* filters, int lanes, bool contiguous,
                        const A* acc, ptrdiff_t pitch, int rows, int cols, int64_t at,
                        int64_t res_at) {
  S* y = reinterpret_cast<S*>(o.y.data) + at;
  const S* res = o.res.data ? reinterpret_cast<const S*>(o.res.data) + res_at : nullptr;
  for (int l0 = 0; l0 < lanes; l0 += VL<A>) {
    const Lanes<S, A> k(o, filters + l0, least(VL<A>, lanes - l0), contiguous);
    if (k.simple()) {
      const Simple<S, A> e(k);
      for (int r = 0; r < rows; ++r) {
        const A* own = acc + int64_t(r) * cols * pitch + l0;
        S* to = y + r * o.y.sh + filters[l0];
        if (res) {
          const S* more = res + r * o.res.sh + filters[l0];
          for (int c = 0; c < cols; ++c)
            Simple<S, A>::put(e, load<A>(own + c * pitch), to + c * o.y.sw, more + c * o.res.sw);
        } else {
          for (int c = 0; c < cols; ++c)
            Simple<S, A>::put(e, load<A>(own + c * pitch), to + c * o.y.sw, nullptr);
        }
      }
      continue;
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c)
        Lanes<S, A>::put(k, load<A>(acc + (int64_t(r) * cols + c) * pitch + l0),
                         y + r * o.y.sh + c * o.y.sw,
                         res ? res + r * o.res.sh + c * o.res.sw : nullptr);
  }
}

// Accumulators filter by filter, `pitch` elements apart and readable up to the next multiple of VL:
// one row of pixels, to an output with filters innermost. order (or null): which row of
// accumulators is that of filters[i].
template <class S, class A>
static __attribute__((noinline)) void emit_transposed(const Out<A>& o, const int* filters,
                                                      int count, bool contiguous, const int* order,
                                                      const A* acc, ptrdiff_t pitch, int cols,
                                                      int64_t at, int64_t res_at) {
  S* y = reinterpret_cast<S*>(o.y.data) + at;
  const S* res = o.res.data ? reinterpret_cast<const S*>(o.res.data) + res_at : nullptr;
  for (int c0 = 0; c0 < cols; c0 += VL<A>)
    for (int l0 = 0; l0 < count; l0 += VL<A>) {
      const Lanes<S, A> k(o, filters + l0, least(VL<A>, count - l0), contiguous);
      Vec<A> r[VL<A>];
      HC_UNROLL for (int i = 0; i < VL<A>; ++i) {
        const int l = least(l0 + i, count - 1);
        r[i] = load<A>(acc + (order ? order[l] : l) * pitch + c0);
      }
      transpose<A>(r);
      const int m = least(VL<A>, cols - c0);
      S* to = y + c0 * o.y.sw;
      if (m == VL<A> && k.simple()) {
        const Simple<S, A> e(k);
        to += filters[l0];
        const S* more = res ? res + c0 * o.res.sw + filters[l0] : nullptr;
        HC_UNROLL for (int j = 0; j < VL<A>; ++j)
            Simple<S, A>::put(e, r[j], to + j * o.y.sw, more ? more + j * o.res.sw : nullptr);
        continue;
      }
      for (int j = 0; j < m; ++j)
        Lanes<S, A>::put(k, r[j], to + j * o.y.sw, res ? res + (c0 + j) * o.res.sw : nullptr);
    }
}

// The larger lanes; NaN wins.
template <class A> HC_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
  const Vec<A> m = a > b ? a : b;
  return a != a ? a : m;
}
// Max-pooling, 2 x 2, of two rows of accumulators, `pitch` apart and readable up to the next
// multiple of 2 VL: `pixels` results, where the first row was.
template <class A> static void pool_in_place(A* rows, ptrdiff_t pitch, int pixels) {
  const auto lanes = std::make_integer_sequence<int, VL<A>>();
  for (int c = 0; c < pixels; c += VL<A>) {
    const A* at = rows + 2 * c;
    const Vec<A> a = larger<A>(load<A>(at), load<A>(at + pitch)),
                 b = larger<A>(load<A>(at + VL<A>), load<A>(at + pitch + VL<A>));
    const Vec<A> m = larger<A>(every_other<A, 0>(a, b, lanes), every_other<A, 1>(a, b, lanes));
    if (c + VL<A> <= pixels)
      store<A>(rows + c, m);
    else
      store_n<A>(rows + c, m, pixels - c);
  }
}

// Accumulators of one filter as rows of pixels, `pitch` elements from row to row.
template <class S, class A>
static void emit_rows(const Out<A>& o, int filter, const A* acc, ptrdiff_t pitch, int rows,
                      int cols, int64_t at, int64_t res_at) {
  S* y = reinterpret_cast<S*>(o.y.data) + at + filter * o.y.sc;
  const S* res =
      o.res.data ? reinterpret_cast<const S*>(o.res.data) + res_at + filter * o.res.sc : nullptr;
  const Vec<A> scale = splat<A>(o.scale ? o.scale[filter] : A(1)),
               shift = splat<A>(o.shift ? o.shift[filter] : A(0));
  const bool vectors = o.y.sw == 1 && (!res || o.res.sw == 1);
  if (pitch == cols && o.y.sh == cols && vectors && (!res || o.res.sh == cols)) {
    cols *= rows;
    rows = 1;
  }
  for (int r = 0; r < rows; ++r) {
    const A* a = acc + r * pitch;
    for (int c0 = 0; c0 < cols; c0 += VL<A>) {
      const int n = least(VL<A>, cols - c0);
      Vec<A> v = load<A>(a + c0);
      if (o.scale) v *= scale;
      if (o.shift) v += shift;
      if (vectors) {
        if (res) v += read_n<S, A>(res + r * o.res.sh + c0, n);
        v = activate<A>(v, o.act);
        if (n == VL<A>)
          write<S, A>(y + r * o.y.sh + c0, v);
        else
          write_n<S, A>(y + r * o.y.sh + c0, v, n);
      } else {
        if (res)
          for (int l = 0; l < n; ++l) v[l] += widen(res[r * o.res.sh + (c0 + l) * o.res.sw]);
        v = activate<A>(v, o.act);
        A lane[VL<A>];
        store<A>(lane, v);
        for (int l = 0; l < n; ++l) y[r * o.y.sh + (c0 + l) * o.y.sw] = Narrow<S>::of(lane[l]);
      }
    }
  }
}

// [count rows of n elements, `from` apart] to [n rows of `count` elements, `to` apart]; both are
// readable and writable up to the next multiple of VL.
template <class A>
static void transpose_scratch(const A* src, ptrdiff_t from, int count, int n, A* dst,
                              ptrdiff_t to) {
  for (int i0 = 0; i0 < count; i0 += VL<A>)
    for (int j0 = 0; j0 < n; j0 += VL<A>) {
      Vec<A> r[VL<A>];
      HC_UNROLL for (int i = 0; i < VL<A>; ++i) {
        r[i] = load<A>(src + least(i0 + i, count - 1) * from + j0);
      }
      transpose<A>(r);
      const int m = least(VL<A>, n - j0);
      for (int j = 0; j < m; ++j) store<A>(dst + (j0 + j) * to + i0, r[j]);
    }
}

}  // namespace HETCONV_NS
}  // namespace hetconv
