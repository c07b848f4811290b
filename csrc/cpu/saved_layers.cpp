// SPDX-License-Identifier: Apache-2.0
// How layers are saved, and read back: see saved_steps.cpp. Weights are those that exist; the plan
// and the packed weights are made anew, for the machine that reads.
#include "saved_parts.h"
#include "threads.h"

namespace hetconv {
namespace {

// The geometry that float and integer layers share.
template <class P> void put_geometry(Writer& to, const P& p, int KH, int KW) {
  to.put(int64_t(p.N));
  for (int v : {p.F, p.C, KH, KW, p.H, p.W, p.Ho, p.Wo, p.sh, p.sw, p.pt, p.pl, p.dh, p.dw})
    to.put(int32_t(v));
}

template <class P> void read_geometry(Reader& from, P* p, int* KH, int* KW) {
  p->N = from.within<int64_t>(0, kMostImages, "the number of images");
  p->F = from.within<int32_t>(1, kMostPixels, "the number of filters");
  p->C = from.within<int32_t>(1, kMostPixels, "the number of channels");
  *KH = from.within<int32_t>(1, kMaxKernel, "the height of a kernel");
  *KW = from.within<int32_t>(1, kMaxKernel, "the width of a kernel");
  if (int64_t(p->C) * *KH * *KW > INT32_MAX / p->F) throw FileError("a layer has too many weights");
  p->H = from.within<int32_t>(1, kMostPixels, "the height of an image");
  p->W = from.within<int32_t>(1, kMostPixels, "the width of an image");
  p->Ho = from.within<int32_t>(1, kMostPixels, "the height of an output");
  p->Wo = from.within<int32_t>(1, kMostPixels, "the width of an output");
  if (int64_t(p->H) * p->W > INT32_MAX || int64_t(p->Ho) * p->Wo > INT32_MAX)
    throw FileError("an image has too many pixels");
  p->sh = from.within<int32_t>(1, INT32_MAX, "a stride");
  p->sw = from.within<int32_t>(1, INT32_MAX, "a stride");
  p->pt = from.within<int32_t>(0, kMostPixels, "a padding");
  p->pl = from.within<int32_t>(0, kMostPixels, "a padding");
  p->dh = from.within<int32_t>(1, INT32_MAX, "a dilation");
  p->dw = from.within<int32_t>(1, INT32_MAX, "a dilation");
  const int64_t bottom = (p->Ho - 1) * int64_t(p->sh) + (*KH - 1) * int64_t(p->dh);
  const int64_t right = (p->Wo - 1) * int64_t(p->sw) + (*KW - 1) * int64_t(p->dw);
  if (bottom > kMostPixels || right > kMostPixels || p->H + int64_t(p->pt) > kMostPixels ||
      p->W + int64_t(p->pl) > kMostPixels)
    throw FileError("a padded image is too large");
}

void put_view(Writer& to, const View& v) {
  for (int64_t stride : {v.sn, v.sc, v.sh, v.sw}) to.put(stride);
}

View read_view(Reader& from) {
  View v{};
  for (int64_t* stride : {&v.sn, &v.sc, &v.sh, &v.sw})
    *stride = from.within<int64_t>(0, kMostStride, "a stride of a tensor");
  return v;
}

Reach reach_of_view(const View& v, int64_t N, int64_t C, int64_t H, int64_t W, int element) {
  const int64_t shape[] = {N, C, H, W}, strides[] = {v.sn, v.sc, v.sh, v.sw};
  return {reach_of(4, shape, strides, element), element};
}

void put_weights(Writer& to, const SavedWeights* w, int F, int64_t columns, int element) {
  if (!w) throw std::invalid_argument("a layer is saved with its weights");
  const int64_t row = (columns + 7) / 8;
  int64_t live = 0;
  for (int64_t i = 0; i < F * row; ++i) live += __builtin_popcount(w->bits[i]);
  if (live != w->count) throw std::invalid_argument("a layer has another number of weights");
  const bool dense = live == F * columns;
  to.put(int32_t(dense));
  if (!dense) to.raw(w->bits, size_t(F * row));
  to.put(uint64_t(live));
  to.raw(w->live, size_t(live) * size_t(element));
}

// Weights, expanded: zero where none exists.
struct ReadWeights {
  std::vector<uint8_t> mask;
  std::vector<char> dense;  // [F][C][KH][KW]
};

ReadWeights read_weights(Reader& from, int F, int64_t columns, int element) {
  const bool dense = from.within<int32_t>(0, 1, "whether a layer is dense") != 0;
  const int64_t row = (columns + 7) / 8, all = F * columns;
  const char* bits = dense ? nullptr : from.raw(uint64_t(F), uint64_t(row));
  const uint64_t count = from.within<uint64_t>(0, uint64_t(all), "the number of weights");
  const char* live = from.raw(count, uint64_t(element));
  if (dense && count != uint64_t(all)) throw FileError("a dense layer lacks weights");
  ReadWeights found{std::vector<uint8_t>(size_t(all), dense ? 1 : 0), {}};
  if (dense) {
    found.dense.assign(live, live + count * uint64_t(element));
    return found;
  }
  found.dense.assign(size_t(all) * size_t(element), 0);
  uint64_t taken = 0;
  for (int64_t f = 0; f < F; ++f)
    for (int64_t i = 0; i < columns; ++i) {
      if (!(uint8_t(bits[f * row + i / 8]) >> (i % 8) & 1)) continue;
      if (taken == count) throw FileError("a layer lacks weights");
      found.mask[size_t(f * columns + i)] = 1;
      std::memcpy(found.dense.data() + (f * columns + i) * element,
                  live + taken++ * uint64_t(element), size_t(element));
    }
  if (taken != count) throw FileError("a layer has weights that belong nowhere");
  return found;
}

}  // namespace

void ConvStep::save(Writer& to, const SavedWeights* weights) const {
  const Plan& plan = *plan_;
  to.put(int32_t(plan.dtype()));
  to.text(plan.asked_form());
  to.put(int32_t(plan.channels_last()));
  put_geometry(to, p_, p_.KH, p_.KW);
  to.put(int32_t(p_.act));
  for (const View* v : {&p_.x, &p_.res, &p_.y}) put_view(to, *v);
  const size_t bytes = size_t(p_.F) * plan.accumulator_bytes();
  for (const auto* vector : {&scale_, &shift_}) {
    to.put(int32_t(!vector->empty()));
    if (!vector->empty()) to.raw(vector->data(), bytes);
  }
  put_pool(to, p_.pool);
  if (weights) to.put(int32_t(weights->dtype));
  put_weights(to, weights, p_.F, int64_t(p_.C) * p_.KH * p_.KW,
              weights ? size_of(weights->dtype) : 1);
}

Loaded ConvStep::load(Reader& from) {
  const auto dtype = from.one_of<DType>(4, "the dtype of a layer");
  std::string form = from.text();
  if (!is_form(form)) throw FileError("a layer has a form that is not known");
  const bool last = from.within<int32_t>(0, 1, "the layout of a layer") != 0;
  Problem p{};
  read_geometry(from, &p, &p.KH, &p.KW);
  p.act = from.one_of<Act>(5, "an activation");
  p.x = read_view(from);
  p.res = read_view(from);
  p.y = read_view(from);
  const size_t wide = dtype == DType::f64 ? 8 : 4;
  std::vector<double> vectors[2];  // double for its alignment
  for (auto& vector : vectors) {
    if (from.within<int32_t>(0, 1, "whether there is a vector of the filters") == 0) continue;
    const char* data = from.raw(uint64_t(p.F), wide);
    vector.resize((size_t(p.F) * wide + 7) / 8);
    std::memcpy(vector.data(), data, size_t(p.F) * wide);
  }
  p.scale = vectors[0].empty() ? nullptr : vectors[0].data();
  p.shift = vectors[1].empty() ? nullptr : vectors[1].data();
  Pool pool{};
  if (read_pool(from, &pool, p.Ho, p.Wo)) p.pool = &pool;
  // Pooled apart, where it must be, the image is of these.
  if (p.pool && dtype != DType::f32 && dtype != DType::bf16)
    throw FileError("a layer of that dtype is never pooled");
  const int64_t shape[] = {p.N, p.F, p.pool ? pool.Ho : p.Ho, p.pool ? pool.Wo : p.Wo};
  const int64_t strides[] = {p.y.sn, p.y.sc, p.y.sh, p.y.sw};
  if (!apart(4, shape, strides)) throw FileError("elements of an output share a place");
  const int64_t dense[] = {shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1]};
  for (int i = 0; i < 4; ++i)
    if (p.pool && shape[i] > 1 && strides[i] != dense[i])
      throw FileError("a pooled output is not in channels_last");
  if (!takes_steps(tile_of(form), p)) throw FileError("a layer has a form that is not for it");
  const auto weight_type = from.one_of<DType>(4, "the dtype of weights");
  const int element = size_of(weight_type);
  const int64_t columns = int64_t(p.C) * p.KH * p.KW;
  const ReadWeights w = read_weights(from, p.F, columns, element);
  const Kernels& kernels = isa_named("");
  std::shared_ptr<const Plan> plan;
  const auto make = [&](const std::string& as) {
    return std::make_shared<const Plan>(w.mask.data(), p.F, p.C, p.KH, p.KW, dtype, kernels, as,
                                        last);
  };
  try {
    plan = make(form);
  } catch (const std::invalid_argument&) {  // fewer filters than a vector of this machine has
    if (!tile_of(form)) throw;
    plan = make("auto");
  }
  const WeightView view{w.dense.data(), columns, int64_t(p.KH) * p.KW, p.KW, 1};
  const auto packed =
      std::make_shared<const Packed>(*plan, view, weight_type, omp_get_max_threads());
  return std::make_unique<ConvStep>(plan, packed, p);
}

Reach ConvStep::reach(int operand) const {
  const int element = size_of(plan_->dtype());
  if (operand == 0) return reach_of_view(p_.x, p_.N, p_.C, p_.H, p_.W, element);
  if (operand == 1) return reach_of_view(p_.res, p_.N, p_.F, p_.Ho, p_.Wo, element);
  return reach_of_view(p_.y, p_.N, p_.F, p_.pool ? pool_.Ho : p_.Ho, p_.pool ? pool_.Wo : p_.Wo,
                       element);
}

void Int8ConvStep::save(Writer& to, const SavedWeights* weights) const {
  const Int8Lowered& low = packed_->plan().lowered();
  put_geometry(to, p_, low.KH, low.KW);
  to.put(int32_t(p_.x_type));
  to.put(int32_t(p_.x_zero));
  put_ends(to, {p_.y_type, p_.y_zero, p_.low, p_.high});
  to.put(int32_t(p_.res_type));
  to.put(int32_t(p_.res_zero));
  to.put(p_.res_multiplier);
  to.raw(multiplier_.data(), multiplier_.size() * sizeof(float));
  to.raw(bias_.data(), bias_.size() * sizeof(int32_t));
  put_pool(to, p_.pool);
  put_weights(to, weights, p_.F, int64_t(p_.C) * low.KH * low.KW, 1);
}

Loaded Int8ConvStep::load(Reader& from) {
  Int8Problem p{};
  int KH = 0, KW = 0;
  read_geometry(from, &p, &KH, &KW);
  const int64_t columns = int64_t(p.C) * KH * KW;
  if (columns > kMostPixels) throw FileError("a filter has too many weights");
  p.x_type = from.one_of<Byte>(2, "the dtype of an input");
  p.x_zero = read_zero(from, p.x_type);
  const Ends ends = read_ends(from);
  p.y_type = ends.type;
  p.y_zero = ends.zero;
  p.low = ends.low;
  p.high = ends.high;
  p.res_type = from.one_of<Byte>(2, "the dtype of a residual");
  p.res_zero = read_zero(from, p.res_type);
  p.res_multiplier = read_finite(from, "the multiplier of a residual");
  std::vector<float> multiplier(size_t(p.F), 0.0f);
  std::vector<int32_t> bias(size_t(p.F), 0);
  std::memcpy(multiplier.data(), from.raw(uint64_t(p.F), sizeof(float)), size_t(p.F) * 4);
  std::memcpy(bias.data(), from.raw(uint64_t(p.F), sizeof(int32_t)), size_t(p.F) * 4);
  Pool pool{};
  if (read_pool(from, &pool, p.Ho, p.Wo)) {
    if (p.y_type == Int8Out::f32) throw FileError("a layer with float32 outputs is never pooled");
    p.pool = &pool;
  }
  const ReadWeights w = read_weights(from, p.F, columns, 1);
  const auto plan =
      std::make_shared<const Int8Plan>(w.mask.data(), p.F, p.C, KH, KW, int8_isa_named(""));
  const int64_t strides[] = {columns, int64_t(KH) * KW, KW, 1};
  const auto packed = std::make_shared<const Int8Packed>(
      plan, reinterpret_cast<const int8_t*>(w.dense.data()), strides, omp_get_max_threads());
  int64_t bound = 0;
  if (int8_unfit_filter(*packed, multiplier.data(), bias.data(), &bound) >= 0)
    throw FileError("the sums of a layer in 8 bits could overflow");
  return std::make_unique<Int8ConvStep>(packed, p, multiplier.data(), bias.data());
}

Reach Int8ConvStep::reach(int operand) const {
  if (operand == 0) return dense_reach({p_.N, p_.H, p_.W, p_.C}, 1);
  if (operand == 1) return dense_reach({p_.N, p_.Ho, p_.Wo, p_.F}, 1);
  return dense_reach({p_.N, p_.pool ? pool_.Ho : p_.Ho, p_.pool ? pool_.Wo : p_.Wo, p_.F},
                     bytes_of(p_.y_type));
}

}  // namespace hetconv
