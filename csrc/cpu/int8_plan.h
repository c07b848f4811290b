// SPDX-License-Identifier: Apache-2.0
// A Support lowered for the engine in 8 bits, and the weights packed for it.
#pragma once
#include <memory>
#include <string>
#include <vector>
#include "int8.h"
#include "plan.h"

namespace hetconv {

std::vector<const Int8Kernels*> int8_isas();  // that this machine can run, best first
const Int8Kernels& int8_isa_named(const std::string& name);  // "" = the best

// Filters that are to share a block, and the columns that they read together.
struct Int8Part {
  std::vector<int> filters;
  std::vector<uint64_t> columns;  // bits by tap, then channel
  std::vector<uint64_t> common;   // those that every filter reads
  double apart;                   // steps that a filter alone would take, the most of any
};

class Int8Plan {
 public:
  // mask: F * C * KH * KW bytes, non-zero = the weight exists.
  // form: "auto", "filters" or "pixels", whichever are in vectors; where the instruction set has no
  // kernels for pixels, it is always filters.
  Int8Plan(const uint8_t* mask, int F, int C, int KH, int KW, const Int8Kernels& kernels,
           const std::string& form = "auto");
  Int8Plan(const Int8Plan&) = delete;
  Int8Plan& operator=(const Int8Plan&) = delete;

  const Int8Lowered& lowered() const { return low_; }
  const Int8Kernels& kernels() const { return kernels_; }
  const char* form() const { return low_.pixels_in_vectors() ? "pixels" : "filters"; }
  OffsetCache* offsets() const { return cache_.get(); }
  int64_t live() const { return live_; }
  // Vector operations (of 64 bytes) per pixel, and those that the live weights need at least.
  double cost() const { return cost_; }
  double useful() const { return double(live_) / 64; }

 private:
  struct Lowering {
    std::vector<Int8Block> blocks;
    std::vector<Int8Order> orders;
    std::vector<Int8Step> steps;
    std::vector<int> filters, channels;
    std::vector<uint64_t> masks;
    std::vector<uint8_t> picks;
    std::vector<Int8Spread> spreads;
    std::vector<Int8PixelTile> tiles;
    std::vector<Int8Gather> gathers;
    int most_quads = 0;
    int64_t packed = 0;
    int reach = 0;
    double cost = 0;
  };
  std::vector<Int8Part> groups() const;
  std::vector<Int8Part> merged(const std::vector<Int8Part>& groups, int most_units, int unit) const;
  double part_cost(const Int8Part& a, const Int8Part& b) const;
  Lowering lower(const std::vector<Int8Part>& parts) const;
  double shuffle_cost() const;
  void share_rows(Lowering& to, Int8Block& b, std::vector<Int8Step>& steps) const;
  void add_block(Lowering& to, const std::vector<int>& filters, int order) const;
  void add_spreads(Lowering& to, Int8Block& b) const;
  int gathered(Lowering& to, const Int8Part& part) const;
  std::vector<std::vector<int>> by_taps(const Int8Part& part) const;
  Lowering lower_pixels(const std::vector<Int8Part>& groups) const;
  bool has(int f, int c, int ky, int kx) const {
    return mask_[((size_t(f) * low_.C + c) * low_.KH + ky) * low_.KW + kx] != 0;
  }
  int tap_count() const { return low_.KH * low_.KW; }

  Int8Lowered low_{};
  const Int8Kernels& kernels_;
  int64_t live_ = 0;
  double cost_ = 0;
  std::vector<uint8_t> mask_;
  Lowering lowering_;
  std::unique_ptr<OffsetCache, void (*)(OffsetCache*)> cache_;
};

class Int8Packed {
 public:
  // strides in elements, in the order filter, channel, row, column
  Int8Packed(std::shared_ptr<const Int8Plan> plan, const int8_t* w, const int64_t* strides,
             int threads);
  const Int8Plan& plan() const { return *plan_; }
  const int8_t* data() const { return static_cast<const int8_t*>(data_.get()); }
  size_t bytes() const { return bytes_; }
  const std::vector<int32_t>& sums() const { return sums_; }    // of each filter's live weights
  const std::vector<int64_t>& reach() const { return reach_; }  // of their absolute values

 private:
  std::shared_ptr<const Int8Plan> plan_;
  size_t bytes_;
  std::unique_ptr<void, void (*)(void*)> data_;
  std::vector<int32_t> sums_;
  std::vector<int64_t> reach_;
};

}  // namespace hetconv
