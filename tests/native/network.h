// SPDX-License-Identifier: Apache-2.0
// A network of every class of step, as a program that can be run and saved.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "../../csrc/cpu/saved_program.h"
#include "driver.h"

namespace driver {

using namespace hetconv;

// A network of one float layer and one in 8 bits, and all that there is between layers.
class Made {
 public:
  explicit Made(const Case& c) : r_(c.seed) {
    const Conv& v = c.conv;
    const int size = int(size_of(c.dtype));
    const int64_t N = std::max<int64_t>(v.N, 1), pixels = int64_t(v.Ho) * v.Wo;
    about_.made_by = "the driver";
    about_.network = c.describe();
    const int x = input(c.dtype, {N, v.C, v.H, v.W});
    const int residual = c.residual ? input(c.dtype, {N, v.F, v.Ho, v.Wo}) : -1;

    const Place image = room(N * v.C * v.H * v.W * size);
    const CopyStep::Four shape{N, v.C, v.H, v.W};
    const int64_t plane = int64_t(v.H) * v.W;
    add(std::make_shared<CopyStep>(size, shape, CopyStep::Four{v.C * plane, plane, v.W, 1},
                                   CopyStep::Four{plane * v.C, 1, int64_t(v.W) * v.C, v.C},
                                   c.threads),
        {{x, 0}, image});

    auto p = problem_of<Problem>(v);
    p.N = N;
    p.KH = v.KH;
    p.KW = v.KW;
    p.x = {nullptr, plane * v.C, 1, int64_t(v.W) * v.C, v.C};
    p.y = {nullptr, pixels * v.F, 1, int64_t(v.Wo) * v.F, v.F};
    p.res = {nullptr, pixels * v.F, pixels, v.Wo, 1};
    p.act = c.act;
    p.threads = c.threads;
    const std::vector<double> numbers(size_t(v.F), 0.5);
    p.scale = c.scale ? numbers.data() : nullptr;
    p.shift = c.shift ? numbers.data() : nullptr;
    const auto plan = std::make_shared<const Plan>(v.mask.data(), v.F, v.C, v.KH, v.KW, c.dtype,
                                                   *available_isas()[0], c.form, c.channels_last);
    const int64_t columns = int64_t(v.C) * v.KH * v.KW;
    dense_ = random_bytes(size_t(v.F) * size_t(columns) * size_of(c.weight_dtype), c.weight_dtype);
    const WeightView view{dense_.data(), columns, int64_t(v.KH) * v.KW, v.KW, 1};
    const auto packed = std::make_shared<const Packed>(*plan, view, c.weight_dtype, 1);
    const SavedWeights* weights =
        keep(v.mask, v.F, columns, dense_.data(), size_of(c.weight_dtype), c.weight_dtype);
    Place y = room(N * pixels * v.F * size);
    layer_ = std::make_shared<ConvStep>(plan, packed, p);
    images_ = N;
    residual_ = residual >= 0;
    result_ = N * pixels * v.F * size;
    add(layer_, {image, {residual, 0}, y}, weights);
    if (c.dtype == DType::f32 || c.dtype == DType::bf16) between(c, N, y);
    if (c.dtype == DType::f32) in_8_bits(c, N, y);
    const Place padded{output(c.dtype, {2 * N * pixels * v.F + 5}), 0};
    const CopyStep whole(size, {1, 1, 1, N * pixels * v.F}, {0, 0, 0, 1}, {0, 0, 0, 2}, c.threads);
    add(std::make_shared<PadStep>(whole, 2 * N * pixels * v.F + 5, 3, chance(r_, 0.5) ? 7 : 0),
        {y, padded});
    const int64_t all = N * pixels * v.F;
    const Place out{output(c.dtype, {N, v.F, v.Ho, v.Wo}), 0};
    add(std::make_shared<CopyStep>(size, CopyStep::Four{1, 1, 1, all}, CopyStep::Four{0, 0, 0, 1},
                                   CopyStep::Four{0, 0, 0, 1}, 1),
        {y, out});
  }

  std::string file() {
    // Bases are numbered as they come; in the file the inputs are before the outputs.
    std::vector<int> bases{0};
    int in = 1, out = 1 + int(about_.inputs.size());
    for (const bool is_input : is_input_) bases.push_back(is_input ? in++ : out++);
    about_.arena = arena_;
    return write_program(about_, {{&program_, weights_, bases}});
  }

  // What the steps give, one after another, before anything was saved.
  std::vector<std::string> run(const std::vector<std::vector<char>>& inputs) {
    std::vector<char> arena(size_t(arena_) + 64);
    std::vector<std::vector<char>> outputs;
    for (const TensorSpec& t : about_.outputs) outputs.emplace_back(size_t(t.bytes()));
    std::vector<char*> bases{arena.data() + (64 - uintptr_t(arena.data()) % 64)};
    size_t in = 0, out = 0;
    for (const bool is_input : is_input_)
      bases.push_back(is_input ? const_cast<char*>(inputs[in++].data()) : outputs[out++].data());
    program_.run(bases.data());
    std::vector<std::string> found;
    for (const auto& one : outputs) found.emplace_back(one.begin(), one.end());
    return found;
  }

  std::vector<std::vector<char>> inputs() {
    std::vector<std::vector<char>> found;
    for (const TensorSpec& t : about_.inputs)
      found.push_back(random_bytes(size_t(t.bytes()), DType(int(t.type))));
    return found;
  }

  // What the float layer gives of a batch, or of its images one by one; the operands lie anyhow.
  std::vector<char> layer(const std::vector<std::vector<char>>& inputs, bool one_by_one) {
    std::vector<char> y(static_cast<size_t>(result_));
    char* bases[] = {nullptr, const_cast<char*>(inputs[0].data()),
                     residual_ ? const_cast<char*>(inputs[1].data()) : nullptr, y.data()};
    const int64_t strides[] = {0, int64_t(inputs[0].size()) / images_,
                               residual_ ? int64_t(inputs[1].size()) / images_ : 0,
                               result_ / images_};
    Program program;
    program.add(one_by_one ? layer_->of_part(images_) : layer_,
                {{1, 0}, {residual_ ? 2 : -1, 0}, {3, 0}});
    one_by_one ? program.run_parts(bases, strides, images_, 3) : program.run(bases);
    return y;
  }

 private:
  void between(const Case& c, int64_t N, Place y) {
    const Conv& v = c.conv;
    const int size = int(size_of(c.dtype)), threads = c.threads;
    const int64_t all = N * v.Ho * v.Wo * v.F;
    for (int what = 0; what < 6; ++what) {
      const Place b = what < 3 ? y : Place{-1, 0};
      const Place to = what % 2 ? y : room(all * size);
      add(std::make_shared<EachStep>(Each(what), c.dtype, all, 0.25f, 6.0f, threads), {y, b, to});
    }
    const int kh = pick(r_, 1, v.Ho), kw = pick(r_, 1, v.Wo), pad = kh > 1 && kw > 1;
    const Pool q{kh, kw, 1, 1, pad, pad, v.Ho + 2 * pad - kh + 1, v.Wo + 2 * pad - kw + 1};
    const int64_t pooled = N * q.Ho * q.Wo * v.F * size;
    std::vector<Place> parts;
    for (int what = 0; what < 3; ++what) {
      parts.push_back(room(pooled));
      add(std::make_shared<PoolStep>(Pooling(what), c.dtype, N, v.Ho, v.Wo, v.F, q, threads),
          {y, parts.back()});
    }
    if (c.dtype == DType::f32) {
      const Pool all_of_it{v.Ho, v.Wo, 1, 1, 0, 0, 1, 1};
      add(std::make_shared<PoolStep>(Pooling::mean_of_planes, c.dtype, N, v.Ho, v.Wo, v.F,
                                     all_of_it, threads),
          {y, {output(c.dtype, {N, v.F}), 0}});
    }
    const int64_t piece = int64_t(v.F) * size;
    parts.push_back(room(3 * pooled));
    const Place together = parts.back();
    add(std::make_shared<ConcatStep>(N * q.Ho * q.Wo, std::vector<int64_t>{piece, piece, piece},
                                     threads),
        parts);
    std::vector<int> rows, columns;
    for (int i = 0; i < 2 * q.Ho; ++i) rows.push_back(i / 2);
    for (int i = 0; i < q.Wo; ++i) columns.push_back(q.Wo - 1 - i);
    const Place larger{output(c.dtype, {N, 3 * v.F, 2 * q.Ho, q.Wo}), 0};
    add(std::make_shared<PickStep>(N, q.Ho, q.Wo, 3 * piece, rows, columns, threads),
        {together, larger});
    const bool wide = c.dtype == DType::f32;
    const DType other = wide ? DType::bf16 : DType::f32;
    const Place cast{output(other, {all}), 0};
    add(std::make_shared<CastStep>(c.dtype, other, all, threads), {y, cast});
  }

  void in_8_bits(const Case& c, int64_t N, Place y) {
    const Conv& v = c.conv;
    const Int8Kernels& isa = *int8_isas()[0];
    const int threads = c.threads;
    const int64_t pixels = int64_t(v.Ho) * v.Wo, all = N * pixels * v.F;
    const Place bytes = room(all);
    add(std::make_shared<QuantizeStep>(isa, all, 0.125f, 3, Byte::u8, threads), {y, bytes});
    Int8Problem p{};
    p.N = N;
    p.C = p.F = v.F;
    p.H = p.Ho = v.Ho;
    p.W = p.Wo = v.Wo;
    p.sh = p.sw = p.dh = p.dw = 1;
    p.x_zero = 3;
    p.y_type = Int8Out::s8;
    p.low = -128.0f;
    p.high = 127.0f;
    p.res_zero = 3;
    p.res_multiplier = 0.5f;
    p.threads = threads;
    const size_t count = size_t(v.F) * size_t(v.F);
    std::vector<uint8_t> mask(count);
    for (uint8_t& m : mask) m = chance(r_, 0.6);
    dense8_.resize(count);
    for (char& w : dense8_) w = char(pick(r_, -127, 127));
    const auto plan = std::make_shared<const Int8Plan>(mask.data(), v.F, v.F, 1, 1, isa);
    const int64_t strides[] = {v.F, 1, 1, 1};
    const auto packed = std::make_shared<const Int8Packed>(
        plan, reinterpret_cast<const int8_t*>(dense8_.data()), strides, 1);
    const std::vector<float> multiplier(size_t(v.F), 0.01f);
    const std::vector<int32_t> bias(size_t(v.F), 100);
    const SavedWeights* weights = keep(mask, v.F, v.F, dense8_.data(), 1, DType::f32);
    Place signs = room(all);
    add(std::make_shared<Int8ConvStep>(packed, p, multiplier.data(), bias.data()),
        {bytes, chance(r_, 0.5) ? bytes : Place{-1, 0}, signs}, weights);
    const Int8Sum s{all,  nullptr, nullptr,     Byte::u8, Byte::s8, 3,      0,      0.5f,
                    0.5f, nullptr, Int8Out::u8, 2,        0.0f,     255.0f, threads};
    add(std::make_shared<Int8SumStep>(isa, s), {bytes, signs, bytes});
    Int8Images images{};
    images.N = N;
    images.H = v.Ho;
    images.W = v.Wo;
    images.C = v.F;
    images.threads = threads;
    const Pool q{1, 1, 2, 2, 0, 0, (v.Ho + 1) / 2, (v.Wo + 1) / 2};
    images.pool = &q;
    const Place pooled{output_8(N * q.Ho * q.Wo * v.F), 0};
    add(std::make_shared<Int8ImagesStep>(isa, images), {bytes, pooled});
    images.pool = nullptr;
    images.multiplier = 1.0f / float(pixels);
    images.y_type = Int8Out::f32;
    images.low = -std::numeric_limits<float>::infinity();
    images.high = std::numeric_limits<float>::infinity();
    const Place mean{output(DType::f32, {N * v.F}), 0};
    add(std::make_shared<Int8ImagesStep>(isa, images), {bytes, mean});
  }

  void add(std::shared_ptr<const Step> step, std::vector<Place> places,
           const SavedWeights* weights = nullptr) {
    program_.add(std::move(step), std::move(places));
    weights_.push_back(weights);
  }

  Place room(int64_t bytes) {
    const int64_t at = arena_;
    arena_ += (bytes + 63) / 64 * 64;
    return {0, at};
  }

  int tensor(bool is_input, Element type, std::vector<int64_t> shape) {
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t i = shape.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * shape[i + 1];
    auto& list = is_input ? about_.inputs : about_.outputs;
    list.push_back(
        {"tensor " + std::to_string(is_input_.size()), type, std::move(shape), std::move(strides)});
    is_input_.push_back(is_input);
    return int(is_input_.size());
  }
  int input(DType dtype, std::vector<int64_t> shape) {
    return tensor(true, Element(int(dtype)), std::move(shape));
  }
  int output(DType dtype, std::vector<int64_t> shape) {
    return tensor(false, Element(int(dtype)), std::move(shape));
  }
  int output_8(int64_t count) { return tensor(false, Element::u8, {count}); }

  std::vector<char> random_bytes(size_t bytes, DType dtype) {
    std::vector<char> found(bytes);
    for (size_t i = 0; i < bytes / size_of(dtype); ++i) {
      const double value = pick(r_, -8, 8) / 8.0;
      const float narrow = float(value);
      uint32_t bits;
      std::memcpy(&bits, &narrow, 4);
      const uint16_t top = uint16_t(bits >> 16);  // of bfloat16; some float16 or other
      if (dtype == DType::f64) std::memcpy(&found[i * 8], &value, 8);
      if (dtype == DType::f32) std::memcpy(&found[i * 4], &narrow, 4);
      if (dtype == DType::bf16) std::memcpy(&found[i * 2], &top, 2);
      const uint16_t half = uint16_t(value < 0 ? 0xb800 : 0x3800);
      if (dtype == DType::f16) std::memcpy(&found[i * 2], &half, 2);
    }
    return found;
  }

  const SavedWeights* keep(const std::vector<uint8_t>& mask, int F, int64_t columns,
                           const char* dense, size_t size, DType dtype) {
    const int64_t row = (columns + 7) / 8;
    bits_.emplace_back(new std::vector<uint8_t>(size_t(F * row), 0));
    live_.emplace_back(new std::vector<char>);
    int64_t count = 0;
    for (int64_t f = 0; f < F; ++f)
      for (int64_t i = 0; i < columns; ++i) {
        if (!mask[size_t(f * columns + i)]) continue;
        (*bits_.back())[size_t(f * row + i / 8)] |= uint8_t(1 << i % 8);
        const char* from = dense + size_t(f * columns + i) * size;
        live_.back()->insert(live_.back()->end(), from, from + size);
        ++count;
      }
    saved_.emplace_back(new SavedWeights{bits_.back()->data(), live_.back()->data(), count, dtype});
    return saved_.back().get();
  }

  Random r_;
  std::shared_ptr<const Step> layer_;
  bool residual_ = false;
  int64_t images_ = 1, result_ = 0;  // of the layer: images, bytes
  ProgramFile about_;
  Program program_;
  int64_t arena_ = 0;
  std::vector<bool> is_input_;
  std::vector<char> dense_, dense8_;
  std::vector<const SavedWeights*> weights_;
  std::vector<std::unique_ptr<std::vector<uint8_t>>> bits_;
  std::vector<std::unique_ptr<std::vector<char>>> live_;
  std::vector<std::unique_ptr<SavedWeights>> saved_;
};

}  // namespace driver
