// SPDX-License-Identifier: Apache-2.0
// fprop in 8 bits: tasks are (image, band of rows, strip of columns, share of the blocks). The form
// says what is in a vector, filters or pixels.
#pragma once
#include "int8_filters.h"
#if defined(__AVX512VNNI__)
#include "int8_pixels.h"
#endif
#include "int8_pool.h"
#include "tasks.h"

namespace hetconv {
namespace HETCONV_NS {

static inline Finish finish_of(const Int8Problem& p) {
  Finish finish = finish_for(p.y_type, p.y_zero, p.low, p.high);
  finish.bounded = p.bounded;
  finish.res_flip = flip_of(p.res_type);
  finish.res_zero = unsigned_zero(p.res_type, p.res_zero);
  finish.res_multiplier = p.res_multiplier;
  return finish;
}

template <class Form> struct Int8Fprop {
  const Int8Lowered& L;
  Int8Problem p;
  Finish finish;
  Form form;

  Int8Fprop(const Int8Lowered& lowered, const Int8Problem& problem, const int8_t* packed)
      : L(lowered), p(problem), finish(finish_of(problem)), form(lowered, p, packed, finish) {}
  Int8Fprop(const Int8Fprop&) = delete;

  void run(OffsetCache* cache) {
    Int8Bands& bands = form.bands;
    bands.choose();
    form.off = bands.offsets(cache);
    const int rows = bands.rows, cols = bands.cols;
    const int64_t nb = ceil_div(p.Ho, rows), strips = ceil_div(p.Wo, cols),
                  units = p.N * nb * strips;
    const int shares = bands.shares_for(units);
    const int64_t tasks = units * shares;
    const size_t room = bands.room();
    const int64_t image = int64_t(p.Ho) * p.Wo * p.F * (p.y_type == Int8Out::f32 ? 4 : 1);
    Tasks queue(tasks, p.threads);
    in_parallel(least<int64_t>(p.threads, tasks), [&](int self) {
      uint8_t* band = static_cast<uint8_t*>(workspace(room));
      int64_t unit_held = -1;
      int held = -1;
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int64_t unit = task / shares, share = task % shares, n = unit / (nb * strips);
        const int oy = int(unit / strips % nb) * rows, ox = int(unit % strips) * cols;
        if (unit != unit_held) held = -1;
        unit_held = unit;
        form.compute(int(L.blocks * share / shares), int(L.blocks * (share + 1) / shares), band, n,
                     oy, ox, least(rows, p.Ho - oy), least(cols, p.Wo - ox), &held,
                     static_cast<uint8_t*>(p.y) + n * image);
      }
    });
  }

  // The outputs of a band are pooled while they are near. False: a band would not fit.
  bool run_pooled(OffsetCache* cache) {
    const Pool& q = *p.pool;
    const int64_t row = int64_t(p.Wo) * p.F;
    Int8Bands& bands = form.bands;
    int pooled = bands.choose_pooled(row);
    if (pooled == 0) return false;
    form.off = bands.offsets(cache);
    const int64_t nb = ceil_div(q.Ho, pooled), tasks = p.N * nb;
    const size_t band_room = bands.room(), room = band_room + size_t(bands.rows * row) + 64;
    Tasks queue(tasks, p.threads);
    in_parallel(least<int64_t>(p.threads, tasks), [&](int self) {
      uint8_t* band = static_cast<uint8_t*>(workspace(room));
      uint8_t* rows = band + band_room;
      int64_t before = -1;  // the task whose outputs are there: rows [from, to)
      int from = 0, to = 0;
      for (int64_t task = queue.take(self); task >= 0; task = queue.take(self)) {
        const int64_t n = task / nb;
        const int p0 = int(task % nb) * pooled, p1 = least(q.Ho, p0 + pooled);
        const int first = most(0, p0 * q.sh - q.pt),
                  last = least(p.Ho, (p1 - 1) * q.sh - q.pt + q.KH);
        // Windows of neighbouring bands share rows.
        const int known = before >= 0 && before + 1 == task && p0 > 0 ? most(0, to - first) : 0;
        if (known > 0) memmove(rows, rows + (first - from) * row, size_t(known * row));
        if (first + known < last) {
          int held = -1;
          form.compute(0, L.blocks, band, n, first + known, 0, last - first - known, p.Wo, &held,
                       rows - first * row);
        }
        before = task;
        from = first;
        to = last;
        pool_bytes(q, rows, first, p.Ho, p.Wo, p.F, p.y_type == Int8Out::s8,
                   static_cast<uint8_t*>(p.y) + n * q.Ho * q.Wo * p.F, p0, p1);
      }
    });
    return true;
  }
};

// A 1x1 layer is one long row of pixels.
static inline Int8Problem flatten_pointwise(const Int8Lowered& L, const Int8Problem& p) {
  Int8Problem q = p;
  const bool pointwise = L.KH == 1 && L.KW == 1 && p.sh == 1 && p.sw == 1 && p.pt == 0 &&
                         p.pl == 0 && p.H == p.Ho && p.W == p.Wo;
  if (!pointwise || p.N * p.H * p.W > (1 << 30)) return q;
  q.W = q.Wo = int(p.N * p.H * p.W);
  q.H = q.Ho = 1;
  q.N = 1;
  return q;
}

template <class Form>
static bool int8_fprop_by(const Int8Lowered& L, OffsetCache* cache, const Int8Problem& p,
                          const int8_t* packed) {
  if (p.pool) return p.y_type != Int8Out::f32 && Int8Fprop<Form>(L, p, packed).run_pooled(cache);
  Int8Fprop<Form>(L, flatten_pointwise(L, p), packed).run(cache);
  return true;
}

static bool int8_fprop(const Int8Lowered& L, OffsetCache* cache, const Int8Problem& p,
                       const int8_t* packed) {
#if defined(__AVX512VNNI__)
  if (L.pixels_in_vectors()) return int8_fprop_by<Int8Pixels>(L, cache, p, packed);
#endif
  return int8_fprop_by<Int8Filters>(L, cache, p, packed);
}

}  // namespace HETCONV_NS
}  // namespace hetconv
