// SPDX-License-Identifier: Apache-2.0
#include "int8_plan.h"

#include <algorithm>
#include <map>

#include "processor.h"

namespace hetconv {
namespace {

// In vector operations of 64 bytes, per pixel. Set by hand on two AVX-512 cores.
constexpr double kFinish = 3.5;    // of a unit's sums: requantised and written
constexpr double kScatter = 0.9;   // of a filter's byte that is written alone
constexpr double kSpread = 2.0;    // of those among 64 channels, written together
constexpr double kFewest = 0.75;   // of a step, however narrow: the load of its activations
constexpr double kHalo = 1.4;      // pixels that are packed, per output pixel
constexpr double kCompress = 3.0;  // of 64 channels, for each set of them
constexpr double kPick = 1.2;      // of a channel that is picked alone
constexpr size_t kMostMerged = 768;

int units_of(size_t filters) { return int((filters + kUnit - 1) / kUnit); }
double step_cost(int units) { return std::max(0.5 * units, kFewest); }

}  // namespace

Int8Plan::Int8Plan(const uint8_t* mask, int F, int C, int KH, int KW, const Int8Kernels& kernels,
                   const std::string& form)
    : kernels_(kernels), cache_(offsets_new(), offsets_delete) {
  low_.F = F;
  low_.C = C;
  low_.KH = KH;
  low_.KW = KW;
  // Of few channels, a quad takes the end of a pixel and the beginning of the next.
  low_.span = KW > 1 && C < 16 && C % kQuad != 0;
#if defined(__x86_64__)
  static const Processor processor = this_processor();
  low_.compress = processor.avx512vbmi2 && kernels.most_units == 4;
  low_.permute = processor.avx512vbmi && kernels.most_units == 4;
#endif
  mask_.resize(size_t(F) * C * KH * KW);
  for (size_t i = 0; i < mask_.size(); ++i) {
    mask_[i] = mask[i] != 0;
    live_ += mask_[i];
  }
  const std::vector<Int8Part> distinct = groups();
  for (int units = kernels.most_units; units >= 1; units /= 2) {
    // Groups of one unit stay apart, or come together in wider vectors.
    for (int unit = kUnit; unit <= std::min(2, units) * kUnit; unit *= 2) {
      Lowering found = lower(merged(distinct, units, unit));
      if (lowering_.blocks.empty() || found.cost < lowering_.cost) lowering_ = std::move(found);
    }
    if (distinct.size() == 1) break;
  }
  if (kernels.pixels && form != "filters") {
    Lowering found = lower_pixels(distinct);
    if (!found.tiles.empty() && (form == "pixels" || found.cost < lowering_.cost))
      lowering_ = std::move(found);
  }
  if (!lowering_.tiles.empty()) low_.span = 0;
  cost_ = lowering_.cost;
  low_.blocks = int(lowering_.blocks.size());
  low_.orders = int(lowering_.orders.size());
  low_.lanes = int(lowering_.filters.size());
  low_.block = lowering_.blocks.data();
  low_.order = lowering_.orders.data();
  low_.steps = lowering_.steps.data();
  low_.nsteps = int64_t(lowering_.steps.size());
  low_.filters = lowering_.filters.data();
  low_.masks = lowering_.masks.data();
  low_.channels = lowering_.channels.data();
  low_.picks = lowering_.picks.data();
  low_.spread = lowering_.spreads.data();
  low_.mask = mask_.data();
  low_.packed = lowering_.packed;
  low_.reach = lowering_.reach;
  low_.tiles = int(lowering_.tiles.size());
  low_.tile = lowering_.tiles.data();
  low_.gather = lowering_.gathers.data();
  low_.most_quads = lowering_.most_quads;
}

std::vector<Int8Part> Int8Plan::groups() const {
  const int C = low_.C, taps = tap_count();
  const size_t words = (size_t(C) * taps + 63) / 64;
  std::map<std::vector<uint64_t>, int> known;
  std::vector<Int8Part> found;
  for (int f = 0; f < low_.F; ++f) {
    std::vector<uint64_t> columns(words, 0);
    double apart = 0;
    std::vector<int> live(size_t(taps), 0);
    const uint8_t* row = mask_.data() + size_t(f) * C * taps;
    for (int c = 0; c < C; ++c)
      for (int t = 0; t < taps; ++t)
        if (row[size_t(c) * taps + t]) {
          const size_t bit = size_t(t) * C + c;
          columns[bit / 64] |= uint64_t(1) << bit % 64;
          ++live[size_t(t)];
        }
    for (int n : live) apart += (n + kQuad - 1) / kQuad;
    const auto at = known.emplace(columns, int(found.size()));
    if (at.second) found.push_back(Int8Part{{}, columns, columns, apart});
    found[size_t(at.first->second)].filters.push_back(f);
  }
  return found;
}

// What a block of both parts, or of one that is given twice, would take before it is lowered: what
// all filters read by quads, the rest that way or shuffled.
double Int8Plan::part_cost(const Int8Part& a, const Int8Part& b) const {
  const size_t filters = a.filters.size() + (&a == &b ? 0 : b.filters.size());
  size_t columns = 0, common = 0;
  for (size_t w = 0; w < a.columns.size(); ++w) {
    columns += size_t(__builtin_popcountll(a.columns[w] | b.columns[w]));
    common += size_t(__builtin_popcountll(a.common[w] & b.common[w]));
  }
  const int units = units_of(filters);
  const double quads = double(columns) / kQuad, shared = double(common) / kQuad,
               rest = std::max(0.0, std::max(a.apart, b.apart) - shared);
  return step_cost(units) * std::min(quads, shared + 1.25 * shuffle_cost() * rest) +
         kFinish * units;
}

// Adds the filters of another part.
static void join(Int8Part& a, const Int8Part& b) {
  a.filters.insert(a.filters.end(), b.filters.begin(), b.filters.end());
  for (size_t w = 0; w < a.columns.size(); ++w) {
    a.columns[w] |= b.columns[w];
    a.common[w] &= b.common[w];
  }
  a.apart = std::max(a.apart, b.apart);
}

// Groups in blocks of at most so many units; what is left of groups that fill no `unit` filters
// comes together with what costs least.
std::vector<Int8Part> Int8Plan::merged(const std::vector<Int8Part>& all, int most_units,
                                       int unit) const {
  std::vector<Int8Part> parts, rest;
  for (const Int8Part& g : all) {
    const size_t n = g.filters.size(), left = all.size() == 1 ? 0 : n % size_t(unit);
    const size_t whole = n - left;
    const int units = units_of(whole), count = (units + most_units - 1) / most_units;
    const auto some = [&](size_t from, size_t to) {
      Int8Part part = g;
      part.filters.assign(g.filters.begin() + int64_t(from), g.filters.begin() + int64_t(to));
      return part;
    };
    size_t f = 0;
    for (int i = 0; i < count; ++i) {
      const size_t take =
          std::min(whole - f, size_t(kUnit) * (units / count + (i < units % count)));
      parts.push_back(some(f, f + take));
      f += take;
    }
    if (left) rest.push_back(some(whole, n));
  }
  const size_t cap = size_t(most_units) * kUnit;
  std::vector<bool> taken(rest.size(), false);
  for (size_t i = 0; i < rest.size(); ++i) {
    if (taken[i]) continue;
    Int8Part grown = rest[i];
    for (;;) {
      // Into a block of its own group or another's, or together with another rest.
      Int8Part* into = nullptr;
      size_t partner = 0;
      double best = 0;
      const double alone = part_cost(grown, grown);
      const auto consider = [&](Int8Part& other, size_t index) {
        if (grown.filters.size() + other.filters.size() > cap) return;
        const double change = part_cost(grown, other) - alone - part_cost(other, other);
        if (change < best - 1e-9) {
          best = change;
          into = &other;
          partner = index;
        }
      };
      const size_t end = std::min(rest.size(), i + kMostMerged);
      for (size_t j = i + 1; j < end; ++j)
        if (!taken[j]) consider(rest[j], j);
      if (rest.size() <= kMostMerged && parts.size() <= kMostMerged)
        for (size_t j = 0; j < parts.size(); ++j) consider(parts[j], SIZE_MAX);
      if (!into) break;
      join(grown, *into);
      if (partner == SIZE_MAX)
        parts.erase(parts.begin() + (into - parts.data()));
      else
        taken[partner] = true;
    }
    std::sort(grown.filters.begin(), grown.filters.end());
    parts.push_back(std::move(grown));
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Int8Part& a, const Int8Part& b) {
    return a.filters.front() < b.filters.front();
  });
  return parts;
}

// The order in which channels with the same taps are neighbours, and dead ones left out.
int Int8Plan::gathered(Lowering& to, const Int8Part& part) const {
  const int C = low_.C;
  const std::vector<std::vector<int>> sets = by_taps(part);
  std::vector<int> channels;
  for (const auto& set : sets) channels.insert(channels.end(), set.begin(), set.end());
  for (size_t i = 0; i < to.orders.size(); ++i) {
    const Int8Order& o = to.orders[i];
    if (!o.identity && size_t(o.channels) == channels.size() &&
        std::equal(channels.begin(), channels.end(), to.channels.begin() + o.channel0))
      return int(i);
  }
  Int8Order order{};
  order.channels = int(channels.size());
  order.pitch = std::max(kQuad, (order.channels + 15) / 16 * 16);
  if (order.pitch % 1024 == 0) order.pitch += 64;
  order.classes = int(sets.size());
  order.mask0 = int64_t(to.masks.size());
  order.channel0 = int64_t(to.channels.size());
  const size_t words = (size_t(C) + 63) / 64;
  for (const auto& set : sets) {
    const size_t at = to.masks.size();
    to.masks.resize(at + words, 0);
    for (int c : set) to.masks[at + size_t(c) / 64] |= uint64_t(1) << c % 64;
  }
  to.channels.insert(to.channels.end(), channels.begin(), channels.end());
  to.orders.push_back(order);
  return int(to.orders.size()) - 1;
}

// How the bytes of a block get to filters that are no neighbours, where that is quicker at once.
void Int8Plan::add_spreads(Lowering& to, Int8Block& b) const {
  constexpr int piece = 64;
  const int* ids = to.filters.data() + b.filter0;
  int pieces = 0;
  for (int l = 0; l < b.filters; ++l) pieces += l == 0 || ids[l] / piece != ids[l - 1] / piece;
  if (!low_.permute || kSpread * pieces >= kScatter * b.filters) return;
  b.spread0 = int64_t(to.spreads.size());
  for (int l = 0; l < b.filters; ++l) {
    const int at = ids[l] / piece * piece, j = ids[l] - at;
    if (b.spreads == 0 || to.spreads.back().at != at) {
      to.spreads.push_back(Int8Spread{});
      to.spreads.back().at = at;
      ++b.spreads;
    }
    Int8Spread& s = to.spreads.back();
    s.channels |= uint64_t(1) << j;
    s.lanes |= uint32_t(1) << l;
    s.pick[j] = uint8_t(l);
    s.back[l] = uint8_t(j);
  }
}

// Where a row has three taps, most of them are neighbours at stride 1.
double Int8Plan::shuffle_cost() const {
  return low_.KW < 3 || low_.span ? kernels_.shuffle_cost : kernels_.row_cost;
}

// Covers the columns of the filters by quads and shuffled steps, greedily from the left.
void Int8Plan::add_block(Lowering& to, const std::vector<int>& filters, int order) const {
  const int C = low_.C, KW = low_.KW, taps_together = low_.span ? KW : 1;
  const Int8Order& o = to.orders[size_t(order)];
  const int width = taps_together * o.channels;  // positions of a run
  // Within memory that is read directly no step may go beyond the last channel.
  const int edge = o.identity ? taps_together * C : INT32_MAX;
  Int8Block b{};
  b.filters = int(filters.size());
  b.lanes = units_of(filters.size()) * kUnit;
  b.filter0 = int(to.filters.size());
  b.contiguous = filters.back() - filters.front() == int(filters.size()) - 1;
  b.order = order;
  b.step0 = int64_t(to.steps.size());
  b.w0 = to.packed;
  b.picks0 = int64_t(to.picks.size());
  for (int l = 0; l < b.lanes; ++l) to.filters.push_back(l < b.filters ? filters[size_t(l)] : -1);
  std::vector<Int8Step> shuffled;
  std::vector<uint32_t> live(static_cast<size_t>(width));
  for (int ky = 0; ky < low_.KH; ++ky)
    for (int kx0 = 0; kx0 < KW; kx0 += taps_together) {
      for (int at = 0; at < width; ++at) {
        const int c = o.identity ? at % C : to.channels[size_t(o.channel0 + at)];
        const int kx = low_.span ? at / C : kx0;
        uint32_t bits = 0;
        for (int l = 0; l < b.filters; ++l)
          bits |= uint32_t(has(filters[size_t(l)], c, ky, kx)) << l;
        live[size_t(at)] = bits;
      }
      for (int at = 0; at < width;) {
        if (!live[size_t(at)]) {
          ++at;
          continue;
        }
        const int end = std::min(width, at + kWindow);
        int quads = 0, counts[32] = {0}, picks = 0;
        for (int i = at, covered = at; i < end; ++i) {
          if (!live[size_t(i)]) continue;
          if (i >= covered) {
            ++quads;
            covered = i + kQuad;
          }
          for (int l = 0; l < b.filters; ++l)
            picks = std::max(picks, counts[l] += live[size_t(i)] >> l & 1);
        }
        const int shuffles = (picks + kQuad - 1) / kQuad;
        if (shuffles * shuffle_cost() < quads) {
          const int from = std::max(0, std::min(at, edge - kWindow));
          if (o.identity) to.reach = std::max(to.reach, from + kWindow);
          const size_t picks0 = to.picks.size();
          to.picks.resize(picks0 + size_t(shuffles) * size_t(b.lanes) * kQuad, 0x80);
          for (int l = 0; l < b.filters; ++l)
            for (int i = at, k = 0; i < end; ++i)
              if (live[size_t(i)] >> l & 1) {
                to.picks[picks0 + (size_t(k / kQuad) * size_t(b.lanes) + size_t(l)) * kQuad +
                         size_t(k % kQuad)] = uint8_t(i - from);
                ++k;
              }
          for (int s = 0; s < shuffles; ++s)
            shuffled.push_back(Int8Step{int16_t(ky), int16_t(kx0), from, 0});
          at = end;
        } else {
          const int from = std::max(0, std::min(at, edge - kQuad));
          if (o.identity) to.reach = std::max(to.reach, from + kQuad);
          uint8_t own = 0;
          for (int i = at; i < from + kQuad && i < width; ++i)
            if (live[size_t(i)]) own |= uint8_t(1 << (i - from));
          to.steps.push_back(Int8Step{int16_t(ky), int16_t(kx0), from, own});
          ++b.quads;
          at = from + kQuad;
        }
      }
    }
  b.shuffles = int(shuffled.size());
  share_rows(to, b, shuffled);
  to.steps.insert(to.steps.end(), shuffled.begin(), shuffled.end());
  to.packed += int64_t(b.quads + 2 * b.shuffles) * b.lanes * kQuad;
  if (!b.contiguous) add_spreads(to, b);
  const int units = b.lanes / kUnit;
  const int in_rows = 3 * b.triples + 2 * b.twins;
  b.cost = step_cost(units) * (b.quads + kernels_.shuffle_cost * (b.shuffles - in_rows) +
                               kernels_.row_cost * in_rows) +
           kFinish * units +
           (b.contiguous ? 0
            : b.spreads  ? kSpread * b.spreads
                         : kScatter * b.filters);
  to.cost += b.cost;
  to.blocks.push_back(b);
}

Int8Plan::Lowering Int8Plan::lower(const std::vector<Int8Part>& parts) const {
  const int C = low_.C;
  Lowering plain;
  Int8Order identity{};
  identity.channels = C;
  identity.identity = 1;
  identity.pitch = !low_.span && C % 1024 == 0 ? C + 64 : C;
  plain.orders.push_back(identity);
  for (const Int8Part& part : parts) add_block(plain, part.filters, 0);
  if (low_.span || C < 8 || parts.size() == 1) return plain;
  // The same with channels gathered, where what that saves is worth the packing.
  Lowering trial;
  trial.orders.push_back(identity);
  std::vector<int> order_of;
  for (const Int8Part& part : parts) order_of.push_back(gathered(trial, part));
  for (size_t i = 0; i < parts.size(); ++i) add_block(trial, parts[i].filters, order_of[i]);
  std::vector<double> saved(trial.orders.size(), 0.0);
  for (size_t i = 0; i < parts.size(); ++i)
    saved[size_t(order_of[i])] += plain.blocks[i].cost - trial.blocks[i].cost;
  bool any = false;
  double packing = 0;
  for (size_t k = 1; k < trial.orders.size(); ++k) {
    const Int8Order& o = trial.orders[k];
    const double cost =
        kHalo * (low_.compress ? kCompress * o.classes * ((C + 63) / 64) : kPick * o.channels);
    saved[k] -= cost;
    if (saved[k] > 0) {
      any = true;
      packing += cost;
    }
  }
  if (!any) return plain;
  Lowering mixed;
  mixed.orders = trial.orders;
  mixed.channels = trial.channels;
  mixed.masks = trial.masks;
  std::vector<size_t> sequence(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    sequence[i] = i;
    if (saved[size_t(order_of[i])] <= 0) order_of[i] = 0;
  }
  std::stable_sort(sequence.begin(), sequence.end(),
                   [&](size_t a, size_t b) { return order_of[a] < order_of[b]; });
  for (size_t i : sequence) add_block(mixed, parts[i].filters, order_of[i]);
  mixed.cost += packing;
  return mixed;
}

}  // namespace hetconv
