// SPDX-License-Identifier: Apache-2.0
#include "steps.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "memory.h"
#include "step_pieces.h"

namespace hetconv {
namespace {

std::vector<double> copied(const void* from, int count, size_t size) {
  if (!from) return {};
  std::vector<double> to((size_t(count) * size + 7) / 8);
  std::memcpy(to.data(), from, size_t(count) * size);
  return to;
}

struct Freed {
  void operator()(void* at) const { std::free(at); }
};
using Memory = std::unique_ptr<char, Freed>;

Memory memory(int64_t bytes) { return Memory(static_cast<char*>(allocate(size_t(bytes)))); }

}  // namespace

// ---- the engine's ----

ConvStep::ConvStep(std::shared_ptr<const Plan> plan, std::shared_ptr<const Packed> packed,
                   const Problem& p)
    : plan_(std::move(plan)), packed_(std::move(packed)), p_(p) {
  const size_t size = plan_->accumulator_bytes();
  scale_ = copied(p.scale, p.F, size);
  shift_ = copied(p.shift, p.F, size);
  p_.scale = p_.shift = nullptr;
  p_.x.data = p_.res.data = p_.y.data = nullptr;
  if (p.pool) pool_ = *p.pool;
  p_.pool = p.pool ? &pool_ : nullptr;
}

void ConvStep::run(char* const* operands, int threads) const {
  Problem p = p_;
  p.threads = asked(threads, p.threads);
  p.x.data = operands[0];
  p.res.data = operands[1];
  p.y.data = operands[2];
  if (!scale_.empty()) p.scale = scale_.data();
  if (!shift_.empty()) p.shift = shift_.data();
  if (!fprop(*plan_, *packed_, p)) run_apart(p);
}

// Where the engine cannot pool what it computes, on an instruction set that the step was not
// recorded on: the whole output first.
void ConvStep::run_apart(Problem p) const {
  const DType dtype = plan_->dtype();
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  const int64_t row = int64_t(p.Wo) * p.F;
  const Memory whole = memory(p.N * p.Ho * row * size);
  const PoolStep pool(Pooling::max, dtype, p.N, p.Ho, p.Wo, p.F, pool_, p.threads);
  char* const operands[] = {whole.get(), p.y.data};
  p.y = View{whole.get(), p.Ho * row, 1, row, p.F};
  p.pool = nullptr;
  fprop(*plan_, *packed_, p);
  pool.run(operands, 0);
}

Int8ConvStep::Int8ConvStep(std::shared_ptr<const Int8Packed> packed, const Int8Problem& p,
                           const float* multiplier, const int32_t* bias)
    : packed_(std::move(packed)),
      p_(p),
      multiplier_(multiplier, multiplier + p.F),
      bias_(bias, bias + p.F),
      lanes_(int8_lanes(*packed_, p, multiplier, bias)) {
  p_.x = p_.res = nullptr;
  p_.y = nullptr;
  if (p.pool) pool_ = *p.pool;
  p_.pool = p.pool ? &pool_ : nullptr;
}

void Int8ConvStep::run(char* const* operands, int threads) const {
  Int8Problem p = p_;
  p.threads = asked(threads, p.threads);
  p.x = reinterpret_cast<const uint8_t*>(operands[0]);
  p.res = reinterpret_cast<const uint8_t*>(operands[1]);
  p.y = operands[2];
  if (!int8_fprop(*packed_, p, lanes_)) run_apart(p);
}

void Int8ConvStep::run_apart(Int8Problem p) const {
  const Memory whole = memory(p.N * p.Ho * p.Wo * p.F);
  Int8Images s{};
  s.N = p.N;
  s.H = p.Ho;
  s.W = p.Wo;
  s.C = p.F;
  s.x = reinterpret_cast<const uint8_t*>(whole.get());
  s.x_type = p.y_type == Int8Out::s8 ? Byte::s8 : Byte::u8;
  s.y = p.y;
  s.threads = usable_threads(p.threads);
  s.pool = &pool_;
  p.y = whole.get();
  p.pool = nullptr;
  int8_fprop(*packed_, p, lanes_);
  int8_isa_named(packed_->plan().kernels().name).max_pool(s);
}

void Int8SumStep::run(char* const* operands, int threads) const {
  Int8Sum s = s_;
  s.a = reinterpret_cast<const uint8_t*>(operands[0]);
  s.b = reinterpret_cast<const uint8_t*>(operands[1]);
  s.y = operands[2];
  s.threads = usable_threads(asked(threads, s.threads));
  kernels_.sum(s);
}

Int8ImagesStep::Int8ImagesStep(const Int8Kernels& kernels, const Int8Images& s)
    : kernels_(kernels), s_(s) {
  if (s.pool) pool_ = *s.pool;
  s_.pool = s.pool ? &pool_ : nullptr;
}

void Int8ImagesStep::run(char* const* operands, int threads) const {
  Int8Images s = s_;
  s.x = reinterpret_cast<const uint8_t*>(operands[0]);
  s.y = operands[1];
  s.threads = usable_threads(asked(threads, s.threads));
  s.pool ? kernels_.max_pool(s) : kernels_.mean(s);
}

void QuantizeStep::run(char* const* operands, int threads) const {
  kernels_.quantize(reinterpret_cast<const float*>(operands[0]), count_, scale_, zero_, type_,
                    reinterpret_cast<uint8_t*>(operands[1]),
                    usable_threads(asked(threads, threads_)));
}

// ---- between layers ----

namespace {

// Those of the instruction set that the engine takes.
const StepLoops& loops() {
#if defined(__x86_64__)
  static const std::string best = available_isas().front()->name;
  if (best.rfind("avx512", 0) == 0) return step_loops_avx512;
  if (best == "avx2") return step_loops_avx2;
#endif
  return step_loops_generic;
}

}  // namespace

EachStep::EachStep(Each what, DType dtype, int64_t count, float low, float high, int threads)
    : what_(what), dtype_(dtype), count_(count), low_(low), high_(high), threads_(threads) {
  if (dtype != DType::f32 && dtype != DType::bf16)
    throw std::invalid_argument("elements are float32 or bfloat16");
  if (count < 0) throw std::invalid_argument("a number of elements is negative");
}

const char* EachStep::kind() const {
  static const char* const names[] = {"add", "sub", "mul", "relu", "clamp", "leaky relu"};
  return names[int(what_)];
}

void EachStep::run(char* const* operands, int threads) const {
  const auto loop = loops().each[dtype_ == DType::f32 ? 0 : 1];
  in_pieces(count_, kPiece, asked(threads, threads_), [&](int64_t from, int64_t to) {
    loop(what_, operands[0], operands[1], operands[2], from, to, low_, high_);
  });
}

PoolStep::PoolStep(Pooling what, DType dtype, int64_t N, int H, int W, int C, const Pool& pool,
                   int threads)
    : what_(what), dtype_(dtype), N_(N), H_(H), W_(W), C_(C), pool_(pool), threads_(threads) {
  if (dtype != DType::f32 && dtype != DType::bf16)
    throw std::invalid_argument("images are float32 or bfloat16");
  const Pool& q = pool_;
  const bool whole = N >= 0 && H > 0 && W > 0 && C > 0 && q.KH > 0 && q.KW > 0 && q.sh > 0 &&
                     q.sw > 0 && q.pt >= 0 && q.pl >= 0 && q.pt < q.KH && q.pl < q.KW;
  if (!whole || (q.Ho - 1) * int64_t(q.sh) - q.pt >= H || (q.Wo - 1) * int64_t(q.sw) - q.pl >= W)
    throw std::invalid_argument("a window of the pooling has no pixel in it");
  if (what == Pooling::mean_of_planes && (dtype != DType::f32 || !of_whole_image()))
    throw std::invalid_argument("planes are averaged whole, in float32");
}

void PoolStep::run(char* const* operands, int threads) const {
  if (what_ == Pooling::mean_of_planes) return run_planes(operands, threads);
  const Pool& q = pool_;
  const int type = dtype_ == DType::f32 ? 0 : 1;
  const int64_t size = dtype_ == DType::f32 ? 4 : 2;
  const StepLoops& loop = loops();
  const int64_t work = int64_t(q.Wo) * C_ * q.KH * q.KW;
  const int64_t piece = kPiece / (work < 1 ? 1 : work);
  in_pieces(N_ * q.Ho, piece, asked(threads, threads_), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t n = i / q.Ho;
      const int top = int(i % q.Ho) * q.sh - q.pt;
      const int y0 = top < 0 ? 0 : top, y1 = top + q.KH < H_ ? top + q.KH : H_;
      for (int px = 0; px < q.Wo; ++px) {
        const int left = px * q.sw - q.pl;
        const int x0 = left < 0 ? 0 : left, x1 = left + q.KW < W_ ? left + q.KW : W_;
        const char* x = operands[0] + ((n * H_ + y0) * W_ + x0) * C_ * size;
        char* y = operands[1] + (i * q.Wo + px) * C_ * size;
        const Window window{y1 - y0, x1 - x0, int64_t(W_) * C_, C_};
        if (what_ == Pooling::max) {
          loop.pool[type](x, window, C_, y);
        } else {
          const bool all = what_ == Pooling::mean;
          const float taps = all ? float(q.KH) * float(q.KW) : float(window.h) * float(window.w);
          loop.mean[type](x, window, C_, taps, y);
        }
      }
    }
  });
}

ConcatStep::ConcatStep(int64_t outer, std::vector<int64_t> bytes, int threads)
    : outer_(outer), bytes_(std::move(bytes)), threads_(threads) {
  for (const int64_t b : bytes_) {
    if (b < 0) throw std::invalid_argument("a piece has a negative size");
    row_ += b;
  }
  if (outer < 0) throw std::invalid_argument("a number of pieces is negative");
}

void ConcatStep::run(char* const* operands, int threads) const {
  char* y = operands[bytes_.size()];
  in_pieces(outer_, (kPiece * 4) / (row_ < 1 ? 1 : row_), asked(threads, threads_),
            [&](int64_t from, int64_t to) {
              int64_t before = 0;
              for (size_t k = 0; k < bytes_.size(); ++k) {
                const int64_t size = bytes_[k];
                for (int64_t i = from; i < to; ++i)
                  std::memcpy(y + i * row_ + before, operands[k] + i * size, size_t(size));
                before += size;
              }
            });
}

PickStep::PickStep(int64_t N, int H, int W, int64_t pixel_bytes, std::vector<int> rows,
                   std::vector<int> columns, int threads)
    : N_(N),
      H_(H),
      W_(W),
      pixel_(pixel_bytes),
      rows_(std::move(rows)),
      columns_(std::move(columns)),
      threads_(threads) {
  for (const int row : rows_)
    if (row < 0 || row >= H) throw std::invalid_argument("a row is not one of the image's");
  for (const int column : columns_)
    if (column < 0 || column >= W)
      throw std::invalid_argument("a column is not one of the image's");
  if (N < 0 || pixel_bytes < 0) throw std::invalid_argument("a size is negative");
}

void PickStep::run(char* const* operands, int threads) const {
  const int64_t Ho = int64_t(rows_.size()), Wo = int64_t(columns_.size());
  const int64_t row = Wo * pixel_;
  in_pieces(N_ * Ho, (kPiece * 4) / (row < 1 ? 1 : row), asked(threads, threads_),
            [&](int64_t from, int64_t to) {
              for (int64_t i = from; i < to; ++i) {
                const char* x = operands[0] + ((i / Ho) * H_ + rows_[size_t(i % Ho)]) * W_ * pixel_;
                char* y = operands[1] + i * row;
                for (int64_t j = 0; j < Wo; ++j)
                  std::memcpy(y + j * pixel_, x + columns_[size_t(j)] * pixel_, size_t(pixel_));
              }
            });
}

namespace {

// `rows` x `columns` elements by their strides; x[0] and y[0] of rows, [1] of columns.
template <class T, int COLUMNS>
void copy_few(const T* from, T* to, int64_t rows, const int64_t* x, const int64_t* y) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < COLUMNS; ++j) to[i * y[0] + j * y[1]] = from[i * x[0] + j * x[1]];
}

template <class T>
void copy_plane(const char* x_data, char* y_data, int64_t rows, int64_t columns, const int64_t* x,
                const int64_t* y) {
  const T* from = reinterpret_cast<const T*>(x_data);
  T* to = reinterpret_cast<T*>(y_data);
  if (x[1] == 1 && y[1] == 1) {
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(to + i * y[0], from + i * x[0], size_t(columns) * sizeof(T));
    return;
  }
  switch (columns) {  // the colours of an image
    case 1:
      return copy_few<T, 1>(from, to, rows, x, y);
    case 2:
      return copy_few<T, 2>(from, to, rows, x, y);
    case 3:
      return copy_few<T, 3>(from, to, rows, x, y);
    case 4:
      return copy_few<T, 4>(from, to, rows, x, y);
  }
  // A cache line of one operand is used whole while those of the other are near.
  constexpr int64_t kBlock = 64 / int64_t(sizeof(T));
  for (int64_t j0 = 0; j0 < columns; j0 += kBlock) {
    const int64_t j1 = j0 + kBlock < columns ? j0 + kBlock : columns;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = j0; j < j1; ++j) to[i * y[0] + j * y[1]] = from[i * x[0] + j * x[1]];
  }
}

}  // namespace

CopyStep::CopyStep(int element, const Four& sizes, const Four& x_strides, const Four& y_strides,
                   int threads)
    : element_(element), sizes_(sizes), x_(x_strides), y_(y_strides), threads_(threads) {
  if (element != 1 && element != 2 && element != 4 && element != 8)
    throw std::invalid_argument("elements have 1, 2, 4 or 8 bytes");
  for (const int64_t n : sizes)
    if (n < 0) throw std::invalid_argument("a size is negative");
  // The longest steps of the output outermost.
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j)
      if (y_[size_t(j)] > y_[size_t(i)]) {
        std::swap(sizes_[size_t(i)], sizes_[size_t(j)]);
        std::swap(x_[size_t(i)], x_[size_t(j)]);
        std::swap(y_[size_t(i)], y_[size_t(j)]);
      }
  // Rows that follow each other in both operands are one. What overflows is a damaged file's.
  int64_t x_row = 0, y_row = 0, both = 0;
  const bool small = !__builtin_mul_overflow(sizes_[3], x_[3], &x_row) &&
                     !__builtin_mul_overflow(sizes_[3], y_[3], &y_row) &&
                     !__builtin_mul_overflow(sizes_[3], sizes_[2], &both);
  if (small && x_[2] == x_row && y_[2] == y_row) {
    sizes_[3] = both;
    sizes_[2] = 1;
  }
}

void CopyStep::run(char* const* operands, int threads) const {
  const auto plane = element_ == 1   ? copy_plane<uint8_t>
                     : element_ == 2 ? copy_plane<uint16_t>
                     : element_ == 4 ? copy_plane<uint32_t>
                                     : copy_plane<uint64_t>;
  const int64_t outer = sizes_[0] * sizes_[1], inner = sizes_[2] * sizes_[3];
  const int64_t piece = kPiece / (inner < 1 ? 1 : inner);
  in_pieces(outer, piece, asked(threads, threads_), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t a = i / sizes_[1], b = i % sizes_[1];
      plane(operands[0] + (a * x_[0] + b * x_[1]) * element_,
            operands[1] + (a * y_[0] + b * y_[1]) * element_, sizes_[2], sizes_[3], &x_[2], &y_[2]);
    }
  });
}

PadStep::PadStep(const CopyStep& copy, int64_t count, int64_t first, uint64_t value)
    : copy_(copy), count_(count), first_(first), value_(value) {
  if (count < 0 || first < 0) throw std::invalid_argument("a number of elements is negative");
}

void PadStep::run(char* const* operands, int threads) const {
  const int size = copy_.element();
  char* y = operands[1];
  in_pieces(count_, kPiece, asked(threads, copy_.threads()), [&](int64_t from, int64_t to) {
    if (value_ == 0)
      std::memset(y + from * size, 0, size_t(to - from) * size_t(size));
    else
      for (int64_t i = from; i < to; ++i) std::memcpy(y + i * size, &value_, size_t(size));
  });
  char* const inner[] = {operands[0], y + first_ * size};
  copy_.run(inner, threads);
}

CastStep::CastStep(DType from, DType to, int64_t count, int threads)
    : narrow_(from == DType::f32), count_(count), threads_(threads) {
  const bool known =
      (from == DType::f32 && to == DType::bf16) || (from == DType::bf16 && to == DType::f32);
  if (!known) throw std::invalid_argument("a cast is from float32 to bfloat16, or back");
  if (count < 0) throw std::invalid_argument("a number of elements is negative");
}

void CastStep::run(char* const* operands, int threads) const {
  const auto loop = loops().cast[narrow_ ? 1 : 0];
  in_pieces(count_, kPiece, asked(threads, threads_),
            [&](int64_t from, int64_t to) { loop(operands[0], operands[1], from, to); });
}

}  // namespace hetconv
