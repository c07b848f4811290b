// SPDX-License-Identifier: Apache-2.0
// How each step is saved, and read back: a step that is read touches only what its reach says,
// whatever the file says.
#include <algorithm>
#include <cmath>

#include "saved_parts.h"

namespace hetconv {

int64_t reach_of(int rank, const int64_t* shape, const int64_t* strides, int element) {
  __extension__ typedef __int128 Wide;
  constexpr int64_t most = int64_t(1) << 46;
  Wide last = 0;
  for (int i = 0; i < rank; ++i) {
    if (shape[i] == 0) return 0;
    last += Wide(shape[i] - 1) * strides[i];
    if (last > most) throw FileError("a tensor is larger than all memory");
  }
  return (int64_t(last) + 1) * element;
}

bool apart(int rank, const int64_t* shape, const int64_t* strides) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int i = 0; i < rank; ++i)
    if (shape[i] > 1) axes.push_back({strides[i], shape[i]});
  std::sort(axes.begin(), axes.end());
  int64_t end = 0;  // the last place so far
  for (const auto& axis : axes) {
    if (axis.first <= end) return false;
    if (axis.second - 1 > (INT64_MAX - end) / axis.first) return false;
    end += (axis.second - 1) * axis.first;
  }
  return true;
}

static constexpr int kMostTaps = 1 << 20;  // of a pooling

int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

void put_pool(Writer& to, const Pool* pool) {
  to.put(int32_t(pool != nullptr));
  if (pool)
    for (int v : {pool->KH, pool->KW, pool->sh, pool->sw, pool->pt, pool->pl, pool->Ho, pool->Wo})
      to.put(int32_t(v));
}

// Every window has a pixel of H x W in it.
static Pool read_windows(Reader& from, int H, int W) {
  Pool q{};
  for (int* v : {&q.KH, &q.KW, &q.sh, &q.sw})
    *v = from.within<int32_t>(1, kMostTaps, "the window of a pooling");
  q.pt = from.within<int32_t>(0, q.KH - 1, "the padding of a pooling");
  q.pl = from.within<int32_t>(0, q.KW - 1, "the padding of a pooling");
  q.Ho = from.within<int32_t>(1, kMostPixels, "the height of a pooled image");
  q.Wo = from.within<int32_t>(1, kMostPixels, "the width of a pooled image");
  if ((q.Ho - 1) * int64_t(q.sh) - q.pt >= H || (q.Wo - 1) * int64_t(q.sw) - q.pl >= W)
    throw FileError("a window of a pooling has no pixel in it");
  return q;
}

bool read_pool(Reader& from, Pool* pool, int H, int W) {
  if (from.within<int32_t>(0, 1, "whether there is a pooling") == 0) return false;
  *pool = read_windows(from, H, W);
  return true;
}

float read_finite(Reader& from, const char* what) {
  const float value = from.any<float>();
  if (!std::isfinite(value)) throw FileError(std::string(what) + " is NaN or infinite");
  return value;
}

int read_zero(Reader& from, Byte type) {
  const int low = type == Byte::s8 ? -128 : 0;
  return from.within<int32_t>(low, low + 255, "a zero point");
}

void put_ends(Writer& to, const Ends& e) {
  to.put(int32_t(e.type));
  to.put(int32_t(e.zero));
  to.put(e.low);
  to.put(e.high);
}

Ends read_ends(Reader& from) {
  Ends e{};
  e.type = from.one_of<Int8Out>(3, "the dtype of an output");
  const bool bytes = e.type != Int8Out::f32;
  e.zero = bytes ? read_zero(from, e.type == Int8Out::s8 ? Byte::s8 : Byte::u8)
                 : from.within<int32_t>(0, 0, "a zero point");
  const float least = e.type == Int8Out::s8 ? -128.0f : bytes ? 0.0f : -INFINITY;
  const float greatest = bytes ? least + 255.0f : INFINITY;
  e.low = from.within<float>(least, greatest, "the least value of an output");
  e.high = from.within<float>(e.low, greatest, "the greatest value of an output");
  return e;
}

int bytes_of(Int8Out type) { return type == Int8Out::f32 ? 4 : 1; }

Reach dense_reach(std::initializer_list<int64_t> sizes, int element) {
  int64_t total = 1;
  for (int64_t n : sizes) {
    if (n == 0) return {0, element};
    if (total > (int64_t(1) << 46) / n) throw FileError("a tensor is larger than all memory");
    total *= n;
  }
  return {total * element, element};
}

// ---- between layers in 8 bits ----

void Int8SumStep::save(Writer& to, const SavedWeights*) const {
  to.put(s_.count);
  for (Byte type : {s_.a_type, s_.b_type}) to.put(int32_t(type));
  for (int zero : {s_.a_zero, s_.b_zero}) to.put(int32_t(zero));
  for (float multiplier : {s_.a_multiplier, s_.b_multiplier}) to.put(multiplier);
  put_ends(to, {s_.y_type, s_.y_zero, s_.low, s_.high});
}

Loaded Int8SumStep::load(Reader& from) {
  Int8Sum s{};
  s.count = from.within<int64_t>(0, kMostElements, "a number of elements");
  s.a_type = from.one_of<Byte>(2, "the dtype of an operand");
  s.b_type = from.one_of<Byte>(2, "the dtype of an operand");
  s.a_zero = read_zero(from, s.a_type);
  s.b_zero = read_zero(from, s.b_type);
  s.a_multiplier = read_finite(from, "a multiplier");
  s.b_multiplier = read_finite(from, "a multiplier");
  const Ends ends = read_ends(from);
  s.y_type = ends.type;
  s.y_zero = ends.zero;
  s.low = ends.low;
  s.high = ends.high;
  s.threads = 1;
  return std::make_unique<Int8SumStep>(int8_isa_named(""), s);
}

Reach Int8SumStep::reach(int operand) const {
  return dense_reach({s_.count}, operand == 2 ? bytes_of(s_.y_type) : 1);
}

void Int8ImagesStep::save(Writer& to, const SavedWeights*) const {
  to.put(s_.N);
  for (int v : {s_.H, s_.W, s_.C}) to.put(int32_t(v));
  to.put(int32_t(s_.x_type));
  put_pool(to, s_.pool);
  if (s_.pool) return;
  to.put(int32_t(s_.x_zero));
  to.put(s_.multiplier);
  put_ends(to, {s_.y_type, s_.y_zero, s_.low, s_.high});
}

Loaded Int8ImagesStep::load(Reader& from) {
  Int8Images s{};
  s.N = from.within<int64_t>(0, kMostImages, "the number of images");
  s.H = from.within<int32_t>(1, kMostPixels, "the height of an image");
  s.W = from.within<int32_t>(1, kMostPixels, "the width of an image");
  s.C = from.within<int32_t>(1, kMostPixels, "the number of channels");
  s.x_type = from.one_of<Byte>(2, "the dtype of images");
  s.threads = 1;
  Pool pool{};
  if (read_pool(from, &pool, s.H, s.W)) {
    s.pool = &pool;
    s.y_type = s.x_type == Byte::s8 ? Int8Out::s8 : Int8Out::u8;
  } else {
    // Sums of that many bytes fit in int32.
    if (int64_t(s.H) * s.W > 1 << 23) throw FileError("an image to be averaged is too large");
    s.x_zero = read_zero(from, s.x_type);
    s.multiplier = read_finite(from, "a multiplier");
    const Ends ends = read_ends(from);
    s.y_type = ends.type;
    s.y_zero = ends.zero;
    s.low = ends.low;
    s.high = ends.high;
  }
  return std::make_unique<Int8ImagesStep>(int8_isa_named(""), s);
}

Reach Int8ImagesStep::reach(int operand) const {
  if (operand == 0) return dense_reach({s_.N, s_.H, s_.W, s_.C}, 1);
  if (s_.pool) return dense_reach({s_.N, pool_.Ho, pool_.Wo, s_.C}, 1);
  return dense_reach({s_.N, s_.C}, bytes_of(s_.y_type));
}

void QuantizeStep::save(Writer& to, const SavedWeights*) const {
  to.put(count_);
  to.put(scale_);
  to.put(int32_t(type_));
  to.put(int32_t(zero_));
}

Loaded QuantizeStep::load(Reader& from) {
  const auto count = from.within<int64_t>(0, kMostElements, "a number of elements");
  const float scale = read_finite(from, "a scale");
  if (scale <= 0) throw FileError("a scale is not positive");
  const auto type = from.one_of<Byte>(2, "the dtype of an output");
  const int zero = read_zero(from, type);
  return std::make_unique<QuantizeStep>(int8_isa_named(""), count, scale, zero, type, 1);
}

Reach QuantizeStep::reach(int operand) const { return dense_reach({count_}, operand == 0 ? 4 : 1); }

// ---- between layers ----

void EachStep::save(Writer& to, const SavedWeights*) const {
  to.put(int32_t(what_));
  to.put(int32_t(dtype_));
  to.put(count_);
  to.put(low_);
  to.put(high_);
}

Loaded EachStep::load(Reader& from) {
  const auto what = from.one_of<Each>(6, "what is done to each element");
  const auto dtype = from.one_of<DType>(4, "the dtype of elements");
  const auto count = from.within<int64_t>(0, kMostElements, "a number of elements");
  const float low = from.any<float>(), high = from.any<float>();
  return std::make_unique<EachStep>(what, dtype, count, low, high, 1);
}

Reach EachStep::reach(int) const { return dense_reach({count_}, size_of(dtype_)); }

void PoolStep::save(Writer& to, const SavedWeights*) const {
  to.put(int32_t(what_));
  to.put(int32_t(dtype_));
  to.put(N_);
  for (int v : {H_, W_, C_}) to.put(int32_t(v));
  put_pool(to, &pool_);
}

Loaded PoolStep::load(Reader& from) {
  const auto what = from.one_of<Pooling>(4, "what is taken of a window");
  const auto dtype = from.one_of<DType>(4, "the dtype of images");
  const auto N = from.within<int64_t>(0, kMostImages, "the number of images");
  const int H = from.within<int32_t>(1, kMostPixels, "the height of an image");
  const int W = from.within<int32_t>(1, kMostPixels, "the width of an image");
  const int C = from.within<int32_t>(1, kMostPixels, "the number of channels");
  Pool pool{};
  if (!read_pool(from, &pool, H, W)) throw FileError("a pooling has no windows");
  return std::make_unique<PoolStep>(what, dtype, N, H, W, C, pool, 1);
}

Reach PoolStep::reach(int operand) const {
  if (operand == 0) return dense_reach({N_, H_, W_, C_}, size_of(dtype_));
  return dense_reach({N_, pool_.Ho, pool_.Wo, C_}, size_of(dtype_));
}

void ConcatStep::save(Writer& to, const SavedWeights*) const {
  to.put(outer_);
  to.put(uint64_t(bytes_.size()));
  to.raw(bytes_.data(), bytes_.size() * sizeof(int64_t));
}

Loaded ConcatStep::load(Reader& from) {
  const auto outer = from.within<int64_t>(0, kMostElements, "a number of pieces");
  auto bytes = from.list<int64_t>(1 << 16, "the number of parts");
  if (bytes.empty()) throw FileError("nothing is put together");
  for (const int64_t b : bytes)
    if (b < 0 || b > kMostElements) throw FileError("the size of a piece is out of range");
  return std::make_unique<ConcatStep>(outer, std::move(bytes), 1);
}

Reach ConcatStep::reach(int operand) const {
  return dense_reach({outer_, operand < int(bytes_.size()) ? bytes_[size_t(operand)] : row_}, 1);
}

void PickStep::save(Writer& to, const SavedWeights*) const {
  to.put(N_);
  to.put(int32_t(H_));
  to.put(int32_t(W_));
  to.put(pixel_);
  for (const auto* places : {&rows_, &columns_}) {
    to.put(uint64_t(places->size()));
    to.raw(places->data(), places->size() * sizeof(int));
  }
}

Loaded PickStep::load(Reader& from) {
  const auto N = from.within<int64_t>(0, kMostImages, "the number of images");
  const int H = from.within<int32_t>(1, kMostPixels, "the height of an image");
  const int W = from.within<int32_t>(1, kMostPixels, "the width of an image");
  const auto pixel = from.within<int64_t>(0, kMostPixels, "the size of a pixel");
  auto rows = from.list<int>(kMostPixels, "the number of rows");
  auto columns = from.list<int>(kMostPixels, "the number of columns");
  return std::make_unique<PickStep>(N, H, W, pixel, std::move(rows), std::move(columns), 1);
}

Reach PickStep::reach(int operand) const {
  if (operand == 0) return dense_reach({N_, H_, W_, pixel_}, 1);
  return dense_reach({N_, int64_t(rows_.size()), int64_t(columns_.size()), pixel_}, 1);
}

void CopyStep::save(Writer& to, const SavedWeights*) const {
  to.put(int32_t(element_));
  for (const Four* four : {&sizes_, &x_, &y_})
    for (const int64_t v : *four) to.put(v);
}

Loaded CopyStep::load(Reader& from) {
  const int element = from.within<int32_t>(1, 8, "the size of elements");
  Four sizes, x, y;
  for (int64_t& v : sizes) v = from.within<int64_t>(0, kMostElements, "a size");
  for (int64_t& v : x) v = from.within<int64_t>(0, kMostStride, "a stride of a tensor");
  for (int64_t& v : y) v = from.within<int64_t>(0, kMostStride, "a stride of a tensor");
  if (!apart(4, sizes.data(), y.data())) throw FileError("elements of an output share a place");
  return std::make_unique<CopyStep>(element, sizes, x, y, 1);
}

Reach CopyStep::reach(int operand) const {
  const Four& strides = operand == 0 ? x_ : y_;
  return {reach_of(4, sizes_.data(), strides.data(), element_), element_};
}

void PadStep::save(Writer& to, const SavedWeights* weights) const {
  copy_.save(to, weights);
  to.put(count_);
  to.put(first_);
  to.put(value_);
}

Loaded PadStep::load(Reader& from) {
  const Loaded step = CopyStep::load(from);
  const auto& copy = static_cast<const CopyStep&>(*step);
  const auto count = from.within<int64_t>(0, kMostElements, "a number of elements");
  const auto first = from.within<int64_t>(0, count, "where a copy begins");
  if (copy.reach(1).bytes / copy.element() > count - first)
    throw FileError("a copy reaches beyond what is padded");
  const auto value = from.any<uint64_t>();
  return std::make_unique<PadStep>(copy, count, first, value);
}

Reach PadStep::reach(int operand) const {
  return operand == 0 ? copy_.reach(0) : dense_reach({count_}, copy_.element());
}

void CastStep::save(Writer& to, const SavedWeights*) const {
  to.put(int32_t(narrow_));
  to.put(count_);
}

Loaded CastStep::load(Reader& from) {
  const bool narrow = from.within<int32_t>(0, 1, "the direction of a cast") != 0;
  const auto count = from.within<int64_t>(0, kMostElements, "a number of elements");
  const DType f32 = DType::f32, bf16 = DType::bf16;
  return std::make_unique<CastStep>(narrow ? f32 : bf16, narrow ? bf16 : f32, count, 1);
}

Reach CastStep::reach(int operand) const {
  return dense_reach({count_}, (operand == 0) == narrow_ ? 4 : 2);
}

}  // namespace hetconv
