// SPDX-License-Identifier: Apache-2.0
// fprop with filters in vectors and max-pooling: a band of outputs is pooled while it is near, and
// never goes to memory. Tasks are (image, band of pooled rows).
#pragma once
#include <limits>
#include "fprop_filters.h"

namespace hetconv {
namespace HETCONV_NS {

// The pooled rows [p0, p1) of image n, from rows of outputs, of which row `first` is at `rows`.
template <class S, class A>
static void pool_rows(const Problem& p, const S* rows, int first, int64_t n, int p0, int p1) {
  const Pool& q = *p.pool;
  const int64_t pitch = int64_t(p.Wo) * p.F;
  for (int py = p0; py < p1; ++py) {
    const int y0 = most(0, py * q.sh - q.pt), y1 = least(p.Ho, py * q.sh - q.pt + q.KH);
    for (int px = 0; px < q.Wo; ++px) {
      const int x0 = most(0, px * q.sw - q.pl), x1 = least(p.Wo, px * q.sw - q.pl + q.KW);
      S* to = reinterpret_cast<S*>(p.y.data) + n * p.y.sn + py * p.y.sh + px * p.y.sw;
      for (int f = 0; f < p.F; f += VL<A>) {
        const int lanes = least(VL<A>, p.F - f);
        Vec<A> largest = splat<A>(-std::numeric_limits<A>::infinity()), nan = largest;
        for (int y = y0; y < y1; ++y)
          for (int x = x0; x < x1; ++x) {
            const S* at = rows + (y - first) * pitch + int64_t(x) * p.F + f;
            const Vec<A> v = lanes == VL<A> ? read<S, A>(at) : read_n<S, A>(at, lanes);
            largest = largest > v ? largest : v;
            nan = v != v ? v : nan;
          }
        largest = nan != nan ? nan : largest;
        if (lanes == VL<A>)
          write<S, A>(to + f, largest);
        else
          write_n<S, A>(to + f, largest, lanes);
      }
    }
  }
}

template <class S, class A> struct PooledFprop : FiltersFprop<S, A> {
  using Base = FiltersFprop<S, A>;
  using Base::p;
  int pooled;  // rows of a band

  explicit PooledFprop(Base&& base) : Base(base), pooled(0) {}

  int rows_for(int pooled_rows) const {
    return int(least<int64_t>(p.Ho, (pooled_rows - 1) * int64_t(p.pool->sh) + p.pool->KH));
  }
  size_t output_bytes(int rows) const { return (size_t(rows) * p.Wo * p.F + VL<A>)*sizeof(S); }

  // Picks the band; false: not even one row of it fits.
  bool choose() {
    Base::choose_band();
    if (this->direct || this->cols != p.Wo || p.y.sc != 1) return false;
    const size_t scratch = this->scratch_bytes(p.Wo);
    for (int more = 1; more <= p.pool->Ho; ++more) {
      const int rows = rows_for(more);
      const size_t band = this->band_bytes(rows, p.Wo), output = output_bytes(rows);
      if (band + output + scratch + 4096 > kWorkspaceBytes) break;
      if (more > 1 && (band > kPooledBandBytes || output > kPooledBytes)) break;
      pooled = more;
    }
    if (pooled == 0) return false;
    int64_t bands = ceil_div(p.pool->Ho, pooled);
    if (p.N * bands < p.threads) bands = least<int64_t>(p.pool->Ho, bands * 2);
    pooled = int(ceil_div<int64_t>(p.pool->Ho, bands));
    this->rows = rows_for(pooled);
    this->lay_axes(this->rows, p.Wo);
    return true;
  }

  Ahead next_input(int64_t task, int64_t bands) const {
    const int oy = most(0, int(task % bands) * pooled * p.pool->sh - p.pool->pt);
    return this->input_of(task / bands, oy, 0, this->L.count);
  }

  bool run(OffsetCache* cache) {
    if (!choose()) return false;
    const Axis &ya = this->ya, &xa = this->xa;
    const int Cb = this->Cb;
    this->off = filter_offsets<A>(this->L, cache, ya, xa, int64_t(xa.entries) * Cb, Cb);
    const int64_t bands = ceil_div(p.pool->Ho, pooled), tasks = p.N * bands;
    const size_t band_room =
        ((size_t(ya.entries) * xa.entries * Cb + VL<A>)*sizeof(A) + 63) / 64 * 64;
    const size_t output_room = (output_bytes(this->rows) + 63) / 64 * 64;
    const int64_t pitch = int64_t(p.Wo) * p.F;
    Tasks queue(tasks, p.threads);
#pragma omp parallel num_threads(int(least<int64_t>(p.threads, tasks))) if (p.threads > 1 && \
                                                                                tasks > 1)
    {
      char* room =
          static_cast<char*>(workspace(band_room + output_room + this->scratch_bytes(p.Wo)));
      A* band = reinterpret_cast<A*>(room);
      S* output = reinterpret_cast<S*>(room + band_room);
      A* scratch = reinterpret_cast<A*>(room + band_room + output_room);
      Base mine(*this);  // writes its outputs to this thread's room
      mine.p.y = View{nullptr, 0, 1, pitch, p.F};
      int64_t before = -1;  // task whose outputs are in the room
      int held = 0, end = 0;
      const int self = omp_get_thread_num();
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int64_t n = task / bands;
        const int p0 = int(task % bands) * pooled, p1 = least(p.pool->Ho, p0 + pooled);
        const int first = most(0, p0 * p.pool->sh - p.pool->pt),
                  last = least(p.Ho, (p1 - 1) * p.pool->sh - p.pool->pt + p.pool->KH);
        // Windows of neighbouring bands share rows.
        const int known = before >= 0 && before + 1 == task && p0 > 0 ? most(0, end - first) : 0;
        if (known > 0)
          memmove(output, output + (first - held) * pitch, size_t(known * pitch) * sizeof(S));
        const int oy = first + known, nr = last - oy;
        mine.p.y.data = reinterpret_cast<char*>(output - first * pitch);
        if (nr > 0) {
          const S* x = reinterpret_cast<const S*>(p.x.data) + n * p.x.sn;
          pack_channels_last<S, A>(p, x, ya, xa, oy, 0, nr, p.Wo, Cb, band);
          const int64_t following = queue.expected(self);
          Ahead ahead = following >= 0 ? next_input(following, bands) : Ahead{};
          for (int s = 0; s < this->L.count; ++s) {
            const FilterSegment& g = this->L.segments[s];
            if (g.nv == 2)
              mine.template segment<2>(g, band, scratch, n, oy, 0, nr, p.Wo, ahead);
            else
              mine.template segment<1>(g, band, scratch, n, oy, 0, nr, p.Wo, ahead);
          }
        }
        before = task;
        held = first;
        end = last;
        pool_rows<S, A>(p, output, first, n, p0, p1);
      }
    }
    return true;
  }
};

// False: the band would not fit, or the form of the layer has none; nothing was written.
template <class S, class A>
static bool fprop_pooled(const Lowered& L, OffsetCache* cache, const Problem& p,
                         const void* packed) {
  PooledFprop<S, A> f(FiltersFprop<S, A>{
      L, p, static_cast<const A*>(packed), nullptr, {}, {}, 0, 0, 0, false, 0, 0});
  return f.run(cache);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
