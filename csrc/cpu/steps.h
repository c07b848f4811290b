// SPDX-License-Identifier: Apache-2.0
// Steps of a program: one call of the engine, or what a network has between two of them, with
// everything but the addresses of its operands.
#pragma once
#include <memory>
#include <vector>

#include "engine.h"
#include "int8_engine.h"
#include "steps_loops.h"

namespace hetconv {

class Step {
 public:
  virtual ~Step() = default;
  virtual const char* kind() const = 0;
  virtual int operands() const = 0;
  // Inputs first, the output last. They overlap only where an input is the output.
  virtual void run(char* const* operands) const = 0;
};

// Operands: x, residual (null: none), y.
class ConvStep : public Step {
 public:
  // Scale and shift are copied.
  ConvStep(std::shared_ptr<const Plan> plan, std::shared_ptr<const Packed> packed,
           const Problem& p);
  const char* kind() const override { return "conv"; }
  int operands() const override { return 3; }
  void run(char* const* operands) const override;

 private:
  std::shared_ptr<const Plan> plan_;
  std::shared_ptr<const Packed> packed_;
  Problem p_;
  Pool pool_{};
  std::vector<double> scale_, shift_;  // of the accumulation type; double for its alignment
};

// Operands: x, residual (null: none), y.
class Int8ConvStep : public Step {
 public:
  // Multipliers and biases are copied.
  Int8ConvStep(std::shared_ptr<const Int8Packed> packed, const Int8Problem& p,
               const float* multiplier, const int32_t* bias);
  const char* kind() const override { return "int8 conv"; }
  int operands() const override { return 3; }
  void run(char* const* operands) const override;

 private:
  std::shared_ptr<const Int8Packed> packed_;
  Int8Problem p_;
  Pool pool_{};
  std::vector<float> multiplier_;
  std::vector<int32_t> bias_;
};

// Operands: a, b (null: none), y.
class Int8SumStep : public Step {
 public:
  Int8SumStep(const Int8Kernels& kernels, const Int8Sum& s) : kernels_(kernels), s_(s) {}
  const char* kind() const override { return "int8 sum"; }
  int operands() const override { return 3; }
  void run(char* const* operands) const override;

 private:
  const Int8Kernels& kernels_;
  Int8Sum s_;
};

// Operands: x, y. A mean over the image, or max-pooling where there is a pool.
class Int8ImagesStep : public Step {
 public:
  Int8ImagesStep(const Int8Kernels& kernels, const Int8Images& s);
  const char* kind() const override { return s_.pool ? "int8 max pool" : "int8 mean"; }
  int operands() const override { return 2; }
  void run(char* const* operands) const override;

 private:
  const Int8Kernels& kernels_;
  Int8Images s_;
  Pool pool_{};
};

// Operands: x, y.
class QuantizeStep : public Step {
 public:
  QuantizeStep(const Int8Kernels& kernels, int64_t count, float scale, int zero, Byte type,
               int threads)
      : kernels_(kernels),
        count_(count),
        scale_(scale),
        zero_(zero),
        type_(type),
        threads_(threads) {}
  const char* kind() const override { return "quantize"; }
  int operands() const override { return 2; }
  void run(char* const* operands) const override;

 private:
  const Int8Kernels& kernels_;
  int64_t count_;
  float scale_;
  int zero_;
  Byte type_;
  int threads_;
};

// Operands: a, b (of the first three; null else), y: float32 or bfloat16, `count` elements in one
// order.
class EachStep : public Step {
 public:
  EachStep(Each what, DType dtype, int64_t count, float low, float high, int threads);
  const char* kind() const override;
  int operands() const override { return 3; }
  void run(char* const* operands) const override;

 private:
  Each what_;
  DType dtype_;
  int64_t count_;
  float low_, high_;
  int threads_;
};

// Operands: x, y: images in channels_last, float32 or bfloat16; a NaN wins.
class MaxPoolStep : public Step {
 public:
  MaxPoolStep(DType dtype, int64_t N, int H, int W, int C, const Pool& pool, int threads);
  const char* kind() const override { return "max pool"; }
  int operands() const override { return 2; }
  void run(char* const* operands) const override;

 private:
  DType dtype_;
  int64_t N_;
  int H_, W_, C_;
  Pool pool_;
  int threads_;
};

// Operands: the inputs, y. y is `outer` times the pieces of the inputs side by side; bytes[i] is
// the size of a piece of input i.
class ConcatStep : public Step {
 public:
  ConcatStep(int64_t outer, std::vector<int64_t> bytes, int threads);
  const char* kind() const override { return "concat"; }
  int operands() const override { return int(bytes_.size()) + 1; }
  void run(char* const* operands) const override;

 private:
  int64_t outer_, row_ = 0;
  std::vector<int64_t> bytes_;
  int threads_;
};

// Operands: x, y: images in channels_last. Pixel (i, j) of y is (rows[i], columns[j]) of x.
class PickStep : public Step {
 public:
  PickStep(int64_t N, int H, int W, int64_t pixel_bytes, std::vector<int> rows,
           std::vector<int> columns, int threads);
  const char* kind() const override { return "upsample"; }
  int operands() const override { return 2; }
  void run(char* const* operands) const override;

 private:
  int64_t N_;
  int H_, W_;
  int64_t pixel_;
  std::vector<int> rows_, columns_;
  int threads_;
};

}  // namespace hetconv
