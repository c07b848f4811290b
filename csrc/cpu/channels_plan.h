// SPDX-License-Identifier: Apache-2.0
// A Support lowered for wgrad with channels in vectors, for one ISA and accumulation type.
#pragma once
#include "channels.h"
#include "plan.h"

namespace hetconv {

class ChannelsPlan {
 public:
  // From the same Support's Plan, whose groups and live channels it shares and keeps using.
  explicit ChannelsPlan(const Plan& plan);
  ChannelsPlan(const ChannelsPlan&) = delete;
  ChannelsPlan& operator=(const ChannelsPlan&) = delete;

  const ChannelLowered& lowered() const { return low_; }
  // Vector multiply-adds per pixel, weighted, with what packing costs.
  double cost(bool channels_last) const;

 private:
  using Members = std::vector<const Group*>;
  using Bits = std::vector<uint32_t>;  // by lane of a vector of filters: lanes of channels

  void clear();
  void lower_together(bool aligned);
  void lower_apart();
  void add_unit(const Members& groups, const std::vector<int>& channels);
  void add_vector(const Members& groups, const int* group_of, int vector, int x0,
                  const std::vector<int>& lane_of);
  void add_permuted(const Bits& pattern, const std::vector<ChannelWindow>& windows, int vector);
  void add_broadcast(int first, int n, const std::vector<ChannelWindow>& windows, int vector,
                     const std::vector<Bits>& lanes);
  void add_tile(ChannelTile t, const ChannelWindow* windows, double cost);
  uint32_t lanes_in_use(int vector) const;
  void finish();

  const Plan& plan_;
  int vl_;
  ChannelLowered low_{};
  double work_cost_ = 0;
  std::vector<ChannelUnit> units_;
  std::vector<ChannelTile> tiles_;
  std::vector<ChannelWindow> windows_;
  std::vector<int64_t> work_;
  std::vector<int> channels_, planes_, channel_run_, filters_, filter_run_;
  std::vector<int32_t> perms32_;
  std::vector<int64_t> perms64_;
  std::vector<uint8_t> taken_;
};

}  // namespace hetconv
