// SPDX-License-Identifier: Apache-2.0
// fprop with max-pooling: a band of outputs is pooled while it is near, and never goes to memory.
// Tasks are (image, band of pooled rows). Pixels in vectors that are pooled 2 x 2 do not come here
// as outputs: their accumulators are pooled first (see `PixelBands::choose_halves`).
#pragma once
#include <limits>
#include "fprop_filters.h"
#include "fprop_pixels.h"

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
        // NaN is kept apart, unlike in `larger`: many pixels make a long chain.
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

// Form: FiltersFprop, PixelsFprop or WinogradFprop.
template <class S, class A, class Form> struct Pooled : Form {
  using Form::p;
  int pooled = 0;  // rows of a band

  explicit Pooled(const Form& form) : Form(form) {}

  // Rows are computed from a multiple of kTileRows on, so that tiles are the same in all bands.
  static constexpr int kTileRows = Form::kTileRows;
  int rows_for(int pooled_rows) const {
    const int64_t windows = (pooled_rows - 1) * int64_t(p.pool->sh) + p.pool->KH;
    return int(least<int64_t>(p.Ho, windows + kTileRows - 1));
  }
  static int tile_of(int row) { return row - row % kTileRows; }
  size_t room_for_outputs() const {
    return ((size_t(this->rows) * p.Wo * p.F + VL<A>)*sizeof(S) + 63) / 64 * 64;
  }
  size_t room() { return this->room_for_band() + room_for_outputs() + this->room_for_scratch(); }

  // Picks the band; false: not even one row of it fits.
  bool choose() {
    this->choose_band();
    if (!this->has_bands()) return false;
    for (int more = 1; more <= p.pool->Ho; ++more) {
      this->lay_rows(rows_for(more));
      if (room() + 4096 > kWorkspaceBytes) break;
      if (more > 1 &&
          (this->room_for_band() > kPooledBandBytes || room_for_outputs() > kPooledBytes))
        break;
      pooled = more;
    }
    if (pooled == 0) return false;
    int64_t bands = ceil_div(p.pool->Ho, pooled);
    if (p.N * bands < p.threads) bands = least<int64_t>(p.pool->Ho, bands * 2);
    pooled = int(ceil_div<int64_t>(p.pool->Ho, bands));
    // A band that follows another computes `sh` rows for each pooled one: whole tiles of them.
    int unit = 1;
    while (unit * p.pool->sh % kTileRows != 0) ++unit;
    if (pooled > unit) pooled -= pooled % unit;
    this->lay_rows(rows_for(pooled));
    return true;
  }

  int first_of(int p0) const { return most(0, p0 * p.pool->sh - p.pool->pt); }

  bool run(OffsetCache* cache) {
    if (!choose()) return false;
    this->find_offsets(cache);
    const int64_t bands = ceil_div(p.pool->Ho, pooled), tasks = p.N * bands;
    const int64_t pitch = int64_t(p.Wo) * p.F;
    const size_t bytes = room();
    Tasks queue(tasks, p.threads);
    in_parallel(least<int64_t>(p.threads, tasks), [&](int self) {
      char* memory = static_cast<char*>(workspace(bytes));
      auto* band = reinterpret_cast<typename Form::Band*>(memory);
      S* output = reinterpret_cast<S*>(memory + this->room_for_band());
      A* scratch = reinterpret_cast<A*>(memory + this->room_for_band() + room_for_outputs());
      Form mine(*this);  // writes its outputs to this thread's memory
      mine.p.y = View{nullptr, 0, 1, pitch, p.F};
      mine.p.pool = nullptr;
      int64_t before = -1;  // task whose outputs are there: rows [held, end)
      int held = 0, end = 0;
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int64_t n = task / bands;
        const int p0 = int(task % bands) * pooled, p1 = least(p.pool->Ho, p0 + pooled),
                  needed = first_of(p0),
                  last = least(p.Ho, (p1 - 1) * p.pool->sh - p.pool->pt + p.pool->KH);
        // Windows of neighbouring bands share rows.
        const int known =
            before >= 0 && before + 1 == task && p0 > 0 ? most(0, tile_of(end) - needed) : 0;
        const int first = known > 0 ? needed : tile_of(needed);
        if (known > 0)
          memmove(output, output + (first - held) * pitch, size_t(known * pitch) * sizeof(S));
        mine.p.y.data = reinterpret_cast<char*>(output - first * pitch);
        if (first + known < last) {
          const int64_t next = queue.expected(self);
          Ahead ahead;
          if (next >= 0)
            ahead = this->input_of_rows(next / bands, first_of(int(next % bands) * pooled));
          mine.compute_rows(n, first + known, last - first - known, band, scratch, ahead);
        }
        before = task;
        held = first;
        end = last;
        pool_rows<S, A>(p, output, first, n, p0, p1);
      }
    });
    return true;
  }
};

// False: a band would not fit, or the layer is not computed in bands of whole rows; nothing was
// written.
template <class S, class A, class K = FilterColumns<A>>
static bool fprop_pooled(const Lowered& L, OffsetCache* cache, const Problem& p,
                         const void* packed) {
  if (L.form == Form::filters)
    return Pooled<S, A, FiltersFprop<S, A, K>>(filters_fprop<S, A, K>(L, p, packed)).run(cache);
  PixelsFprop<S, A> form = pixels_fprop<S, A>(L, p, packed);
  if (form.choose_halves()) {
    form.run_bands(cache);
    return true;
  }
  return Pooled<S, A, PixelsFprop<S, A>>(form).run(cache);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
