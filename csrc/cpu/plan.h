// SPDX-License-Identifier: Apache-2.0
// A Support lowered for one ISA and accumulation type: which form, which filters together, which
// columns in which order.
#pragma once
#include <memory>
#include <string>
#include <vector>
#include "permuted_rows.h"
#include "winograd.h"

namespace hetconv {

struct OffsetCache;

const char* form_of(int tile);  // Winograd's, by the outputs along an axis

struct Group {
  std::vector<int> filters;
  std::vector<Column> columns;  // by tap, then channel
};

// Lane l reads channels[l] of a window of VL channels, or nothing (-1).
struct LaneColumn {
  Column window;
  std::vector<int64_t> channels;
};

// The columns of a segment of filters, by how they are read (see FilterSegment).
struct SegmentColumns {
  std::vector<Column> broadcast, split, pairs[2], halves[2];
  std::vector<LaneColumn> lanes;
};

class Plan {
 public:
  // mask: F * C * KH * KW bytes, non-zero = the weight exists. form: "auto", "filters", "pixels"
  // (tiles of filters with the same columns) or "columns" (tiles of columns with the same filters,
  // added up); "winograd 2x2", "winograd 4x4" and "winograd 3x3", after the outputs of a tile (see
  // winograd.h; float32, the first bfloat16 too where the processor multiplies it; dilation 1, the
  // last for stride 2, the others for 1); "pixel pairs" (of bfloat16, where it has instructions;
  // else as "pixels"); "auto" is never Winograd's, and expects most calls with channels innermost
  // in memory (channels_last) or not.
  Plan(const uint8_t* mask, int F, int C, int KH, int KW, DType dtype, const Kernels& kernels,
       const std::string& form, bool channels_last);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const Lowered& lowered() const { return low_; }
  const Kernels& kernels() const { return kernels_; }
  DType dtype() const { return dtype_; }
  OffsetCache* offsets() const { return cache_.get(); }
  const char* form() const {
    if (low_.winograd) return form_of(winograd_.tile);
    if (low_.pixel_pairs) return "pixel pairs";
    return low_.form == Form::filters ? "filters" : low_.accumulate ? "columns" : "pixels";
  }
  // What it was asked for: the same again makes the same plan, on another machine that one's.
  const std::string& asked_form() const { return asked_form_; }
  bool channels_last() const { return channels_last_; }
  int64_t live() const { return live_count_; }
  const std::vector<Group>& groups() const { return groups_; }
  // Vector multiply-adds per pixel of the chosen form and of the useful work: their ratio is the
  // efficiency.
  double cost() const { return cost_; }
  double winograd_cost() const;  // of cost(), what is executed in tiles
  double useful() const { return double(live_count_) / low_.vl; }
  size_t accumulator_bytes() const { return dtype_ == DType::f64 ? 8 : 4; }

 private:
  void lower(const std::string& form);  // anything but "auto"
  double cost_of_form() const;          // of what was lowered last
  void lower_filters();
  bool take_whole_channels();
  bool take_phases(int tile);
  void lower_winograd(int tile);
  void add_places(WinogradPart& p, const std::vector<int>& places);
  void lower_pairs();
  void lower_pairs_in(const std::vector<int>& narrow);
  void lower_pixels();
  void lower_columns();
  void add_tiles(const std::vector<int>& filters, const std::vector<Column>& columns);
  void add_segment(const std::vector<int>& filters, const Group* group);
  void add_pair_segment(const std::vector<int>& filters, const Group* group);
  bool gather_channels(PairSegment& s, std::vector<std::vector<Column>>& taps, double cost);
  void add_windows(PairSegment& s, const std::vector<std::vector<LaneColumn>>& windows);
  void add_lane_columns(const FilterSegment& s, const std::vector<int>& filters,
                        SegmentColumns& found) const;
  void add_lanes(FilterSegment& s, const std::vector<LaneColumn>& lanes);
  std::vector<Column> read_by(const std::vector<int>& filters, int first, int last,
                              const std::vector<Column>& columns) const;
  std::vector<LaneColumn> lane_columns(const std::vector<int>& filters, int first, int last,
                                       const std::vector<Column>& columns) const;
  double filters_cost() const;
  double pairs_cost() const;
  void lower_pixel_pairs();
  bool fits_pixel_pairs() const;
  double pixel_pairs_cost() const;
  double pixels_cost() const;
  void clear();
  void finish();
  bool has(int f, int c, int ky, int kx) const {
    return mask_[((size_t(f) * low_.C + c) * low_.KH + ky) * low_.KW + kx] != 0;
  }
  bool pairs() const { return kernels_.pairs && dtype_ == DType::bf16; }
  void perm_push(int64_t v);

  Lowered low_{};
  const Kernels& kernels_;
  DType dtype_;
  std::string asked_form_;
  bool channels_last_;
  int64_t live_count_ = 0;
  double cost_ = 0;
  std::vector<uint8_t> mask_, taken_;
  std::vector<Group> groups_;
  std::vector<FilterSegment> segments_;
  std::vector<PairSegment> paired_;
  std::vector<PixelPairTile> pair_tiles_;
  std::vector<PixelPairGather> pair_gathers_;
  PixelPairs pixel_pairs_{};
  std::vector<Gather> gather_;
  std::vector<int> gathered_;
  std::vector<PixelTile> tiles_;
  std::vector<int> filters_, live_, plane_, ascending_, identity_;
  std::vector<Column> columns_;
  Winograd winograd_{};
  std::vector<WinogradUnit> units_;
  std::vector<WinogradPart> parts_;
  std::vector<int> from_, part0_, wino_offsets_;
  std::vector<uint8_t> whole_, wino_taken_;
  std::vector<int32_t> perms32_;
  std::vector<int64_t> perms64_;
  std::unique_ptr<OffsetCache, void (*)(OffsetCache*)> cache_;
};

bool is_form(const std::string& name);         // that a Plan can be asked for
int tile_of(const std::string& form);          // of Winograd's, the outputs along an axis; else 0
bool takes_steps(int tile, const Problem& p);  // a layer's stride and dilation; 0: any

// For the time of a call: what it finds in the cache is not freed. Of many layouts the cache keeps
// those that were asked for last.
struct OffsetUse {
  OffsetCache* cache;
  explicit OffsetUse(OffsetCache*);
  ~OffsetUse();
  OffsetUse(const OffsetUse&) = delete;
  OffsetUse& operator=(const OffsetUse&) = delete;
};

size_t offsets_count(OffsetCache*);
OffsetCache* offsets_new();
void offsets_delete(OffsetCache*);

}  // namespace hetconv
