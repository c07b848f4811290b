// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

namespace driver {

int pick(Random& r, int low, int high) { return std::uniform_int_distribution<>(low, high)(r); }

// ---- numbers ----

struct Format {
  const char* name;
  size_t size;
  int digits, least;  // explicit bits of the mantissa; smallest exponent of a normal number
};
static const Format kFormats[4] = {{"float32", 4, 23, -126},
                                   {"float64", 8, 52, -1022},
                                   {"bfloat16", 2, 7, -126},
                                   {"float16", 2, 10, -14}};

size_t size_of(DType d) { return kFormats[int(d)].size; }
const char* name_of(DType d) { return kFormats[int(d)].name; }

double round_to(DType d, double v) {
  if (d == DType::f64 || v == 0 || !std::isfinite(v)) return v;
  if (d == DType::f32) return float(v);
  const Format& f = kFormats[int(d)];
  const double unit = std::ldexp(1.0, std::max(std::ilogb(v), f.least) - f.digits);
  const double near = std::nearbyint(v / unit) * unit;
  return d == DType::f16 && std::fabs(near) > 65504 ? std::copysign(INFINITY, v) : near;
}

static double decode(DType d, const char* p) {
  if (d == DType::f32) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
  }
  if (d == DType::f64) {
    double v;
    std::memcpy(&v, p, 8);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (d == DType::bf16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  double v = exponent == 31  ? (mantissa ? NAN : INFINITY)
             : exponent == 0 ? std::ldexp(mantissa, -24)
                             : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -v : v;
}

// v must be a number of the format, NaN or infinite.
static void encode(DType d, double v, char* p) {
  if (d == DType::f64) {
    std::memcpy(p, &v, 8);
    return;
  }
  const float narrow = float(v);
  if (d == DType::f32) {
    std::memcpy(p, &narrow, 4);
    return;
  }
  uint16_t bits;
  if (d == DType::bf16) {
    uint32_t wide;
    std::memcpy(&wide, &narrow, 4);
    bits = uint16_t(wide >> 16);
  } else if (std::isnan(v)) {
    bits = 0x7e00;
  } else if (std::isinf(v)) {
    bits = 0x7c00;
  } else if (std::fabs(v) < std::ldexp(1.0, -14)) {
    bits = uint16_t(std::ldexp(std::fabs(v), 24));
  } else {
    const int exponent = std::ilogb(v);
    bits =
        uint16_t(((exponent + 15) << 10) | (int(std::ldexp(std::fabs(v), 10 - exponent)) & 1023));
  }
  if (d == DType::f16 && std::signbit(v)) bits |= 0x8000;
  std::memcpy(p, &bits, 2);
}

// ---- memory ----

static size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

Guarded::Guarded(size_t bytes, bool at_the_end) : bytes_(bytes) {
  inner_ = std::max<size_t>(1, (bytes + page() - 1) / page()) * page();
  void* got = mmap(nullptr, inner_ + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) std::abort();
  base_ = static_cast<char*>(got);
  if (mprotect(base_ + page(), inner_, PROT_READ | PROT_WRITE)) std::abort();
  std::memset(base_ + page(), 0xff, inner_);
  data_ = base_ + page() + (at_the_end ? inner_ - bytes : 0);
}

Guarded::~Guarded() { munmap(base_, inner_ + 2 * page()); }

void Guarded::read_only() {
  if (mprotect(base_ + page(), inner_, PROT_READ)) std::abort();
}

bool Guarded::slack_intact() const {
  const char *first = base_ + page(), *last = first + inner_;
  const auto written = [](char b) { return b != char(0xff); };
  return std::none_of(first, static_cast<const char*>(data_), written) &&
         std::none_of(static_cast<const char*>(data_) + bytes_, last, written);
}

// ---- tensors ----

Tensor::Tensor(Random& r, DType dtype, const std::vector<int64_t>& shape, bool may_repeat)
    : dtype_(dtype), offset_(0), span_(1) {
  std::copy(shape.begin(), shape.end(), shape_);
  int order[4] = {0, 1, 2, 3};  // outermost first
  const int kind = pick(r, 0, 9);
  if (kind >= 4 && kind < 8) {
    const int last[4] = {0, 2, 3, 1};  // channels_last
    std::copy(last, last + 4, order);
  } else if (kind >= 8) {
    std::shuffle(order, order + 4, r);
  }
  const bool gaps = kind >= 8 || chance(r, 0.3);
  const int repeated = may_repeat && chance(r, 0.1) ? pick(r, 0, 3) : -1;
  for (int i = 3; i >= 0; --i) {
    const int axis = order[i];
    const int64_t count = std::max<int64_t>(shape_[axis], 1);
    if (axis == repeated) {
      strides[axis] = 0;
      continue;
    }
    // The innermost axis, too, has gaps in one kind.
    const int64_t stride = span_ + (gaps && (i < 3 || kind == 9) ? pick(r, 0, 3) : 0);
    strides[axis] = stride;
    span_ += stride * (count - 1);
    if (gaps && count > 1 && chance(r, 0.1)) {
      strides[axis] = -stride;
      offset_ += stride * (count - 1);
    }
    // A tensor library may give an axis of one element any stride.
    if (count == 1 && chance(r, 0.3)) strides[axis] = pick(r, 0, 1) ? 1 : pick(r, -3, 99);
  }
  memory_ = std::make_unique<Guarded>(size_t(span_) * size_of(dtype), chance(r, 0.7));
}

char* Tensor::at(const int64_t index[4]) const {
  int64_t element = offset_;
  for (int i = 0; i < 4; ++i) element += index[i] * strides[i];
  return memory_->data() + element * int64_t(size_of(dtype_));
}

template <class Visit> void Tensor::each(Visit visit) const {
  int64_t flat = 0;
  int64_t i[4];
  for (i[0] = 0; i[0] < shape_[0]; ++i[0])
    for (i[1] = 0; i[1] < shape_[1]; ++i[1])
      for (i[2] = 0; i[2] < shape_[2]; ++i[2])
        for (i[3] = 0; i[3] < shape_[3]; ++i[3]) visit(i, flat++);
}

void Tensor::fill(Values& values) {
  each([&](const int64_t* index, int64_t flat) {
    int64_t first = 0;
    for (int a = 0; a < 4; ++a)
      first = first * shape_[a] + (strides[a] == 0 && shape_[a] > 1 ? 0 : index[a]);
    values[flat] = values[first];
    encode(dtype_, values[flat], at(index));
  });
}

Values Tensor::read() const {
  Values values(size_t(shape_[0]) * shape_[1] * shape_[2] * shape_[3]);
  each([&](const int64_t* index, int64_t flat) { values[flat] = decode(dtype_, at(index)); });
  return values;
}

bool Tensor::gaps_intact() const {
  const size_t size = size_of(dtype_);
  std::vector<uint8_t> mine(size_t(span_) * size, 0);
  each([&](const int64_t* index, int64_t) {
    std::memset(mine.data() + (at(index) - memory_->data()), 1, size);
  });
  for (size_t i = 0; i < mine.size(); ++i)
    if (!mine[i] && memory_->data()[i] != char(0xff)) return false;
  return memory_->slack_intact();
}

hetconv::View Tensor::view() const {
  return {memory_->data() + offset_ * int64_t(size_of(dtype_)), strides[0], strides[1], strides[2],
          strides[3]};
}

std::string Tensor::describe() const {
  std::string text = "(";
  for (int i = 0; i < 4; ++i) text += (i ? " " : "") + std::to_string(strides[i]);
  return text + ")";
}

}  // namespace driver
