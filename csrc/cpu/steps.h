// SPDX-License-Identifier: Apache-2.0
// Steps of a program: one call of the engine, or what a network has between two of them, with
// everything but the addresses of its operands.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "engine.h"
#include "int8_engine.h"
#include "steps_loops.h"

namespace hetconv {

class Writer;  // saved.h
class Reader;
struct SavedWeights;

// What a step may touch of an operand: bytes from its address on, and the size of its elements.
struct Reach {
  int64_t bytes;
  int element;
};

// Planes: it computes from planes of channels, to planes of filters, and transposes all others.
// Pixels: the same of channels innermost. Either: both alike. Fixed: nothing is known.
enum class Lying : int { fixed, planes, pixels, either };

class Step {
 public:
  virtual ~Step() = default;
  virtual const char* kind() const = 0;
  virtual int operands() const = 0;
  // Inputs first, the output last. They overlap only where an input is the output.
  // threads: 0 = as many as the step was made for.
  virtual void run(char* const* operands, int threads) const = 0;

  // In files, see saved_program.h. Each class has a `load` that reads what `save` wrote.
  virtual void save(Writer& to, const SavedWeights* weights) const = 0;
  virtual Reach reach(int operand) const = 0;
  virtual bool optional(int operand) const {  // may be null
    (void)operand;
    return false;
  }
  virtual bool in_place() const { return false; }  // an input may be the output

  // How it would have its operands lie, if it may be given others than it was recorded with.
  virtual Lying lying() const { return Lying::fixed; }
  // The same, with those of x, the residual and y in planes that are asked for. All operands are
  // dense, of N images of H x W pixels. Throws std::invalid_argument where they are fixed.
  virtual std::shared_ptr<const Step> in_planes(const std::array<bool, 3>& which, int64_t N, int H,
                                                int W) const;
  // The same for one of so many equal parts of the batch, each image computed as in the whole; null
  // where it is not known how.
  virtual std::shared_ptr<const Step> of_part(int64_t parts) const {
    (void)parts;
    return nullptr;
  }
  virtual size_t weight_bytes() const { return 0; }  // that a run reads
};

using Loaded = std::unique_ptr<const Step>;

// Operands: x, residual (null: none), y.
class ConvStep : public Step {
 public:
  // Scale and shift are copied.
  ConvStep(std::shared_ptr<const Plan> plan, std::shared_ptr<const Packed> packed,
           const Problem& p);
  const char* kind() const override { return "conv"; }
  int operands() const override { return 3; }
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);
  bool optional(int operand) const override { return operand == 1; }
  std::shared_ptr<const Step> of_part(int64_t parts) const override;
  size_t weight_bytes() const override { return packed_->bytes(); }

  Lying lying() const override;
  std::shared_ptr<const Step> in_planes(const std::array<bool, 3>& which, int64_t N, int H,
                                        int W) const override;

 private:
  void run_apart(Problem p) const;
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
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);
  bool optional(int operand) const override { return operand == 1; }

 private:
  void run_apart(Int8Problem p) const;
  std::shared_ptr<const Int8Packed> packed_;
  Int8Problem p_;
  Pool pool_{};
  std::vector<float> multiplier_;
  std::vector<int32_t> bias_;
  Int8Lanes lanes_;
};

// Operands: a, b (null: none), y.
class Int8SumStep : public Step {
 public:
  Int8SumStep(const Int8Kernels& kernels, const Int8Sum& s) : kernels_(kernels), s_(s) {}
  const char* kind() const override { return "int8 sum"; }
  int operands() const override { return 3; }
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);
  bool optional(int operand) const override { return operand == 1; }
  bool in_place() const override { return s_.y_type != Int8Out::f32; }

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
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);

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
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);

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
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);
  bool optional(int operand) const override { return operand == 1 && what_ > Each::mul; }
  bool in_place() const override { return true; }

 private:
  Each what_;
  DType dtype_;
  int64_t count_;
  float low_, high_;
  int threads_;
};

// What is taken of a window: the greatest, where a NaN wins; or the sum over the number of all
// taps, or of those inside the image; or that of a whole image, which lies in planes.
enum class Pooling : int { max = 0, mean = 1, mean_inside = 2, mean_of_planes = 3 };

// Operands: x, y: images in channels_last, or in planes; float32 or bfloat16.
class PoolStep : public Step {
 public:
  PoolStep(Pooling what, DType dtype, int64_t N, int H, int W, int C, const Pool& pool,
           int threads);
  const char* kind() const override { return what_ == Pooling::max ? "max pool" : "average pool"; }
  int operands() const override { return 2; }
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);
  Lying lying() const override;
  std::shared_ptr<const Step> in_planes(const std::array<bool, 3>& which, int64_t N, int H,
                                        int W) const override;
  std::shared_ptr<const Step> of_part(int64_t parts) const override;

 private:
  bool of_whole_image() const {
    return pool_.KH == H_ && pool_.KW == W_ && pool_.Ho == 1 && pool_.Wo == 1 && !pool_.pt &&
           !pool_.pl;
  }
  void run_planes(char* const* operands, int threads) const;
  Pooling what_;
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
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);

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
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);

 private:
  int64_t N_;
  int H_, W_;
  int64_t pixel_;
  std::vector<int> rows_, columns_;
  int threads_;
};

// Operands: x, y: the same elements in another order: element (i, j, k, l) of sizes n has these
// strides, in elements of 1, 2, 4 or 8 bytes.
class CopyStep : public Step {
 public:
  using Four = std::array<int64_t, 4>;
  CopyStep(int element, const Four& sizes, const Four& x_strides, const Four& y_strides,
           int threads);
  int element() const { return element_; }
  int threads() const { return threads_; }
  const char* kind() const override { return "copy"; }
  int operands() const override { return 2; }
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);

 private:
  int element_;
  Four sizes_, x_, y_;
  int threads_;
};

// Operands: x, y: `count` elements of y that are `value`, but for a copy of x from `first` on, all
// in elements; `value` is the lowest bytes of one.
class PadStep : public Step {
 public:
  PadStep(const CopyStep& copy, int64_t count, int64_t first, uint64_t value);
  const char* kind() const override { return "pad"; }
  int operands() const override { return 2; }
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);

 private:
  CopyStep copy_;
  int64_t count_, first_;
  uint64_t value_;
};

// Operands: x, y: `count` elements from float32 to bfloat16, or back.
class CastStep : public Step {
 public:
  CastStep(DType from, DType to, int64_t count, int threads);
  const char* kind() const override { return "cast"; }
  int operands() const override { return 2; }
  void run(char* const* operands, int threads) const override;
  void save(Writer& to, const SavedWeights* weights) const override;
  Reach reach(int operand) const override;
  static Loaded load(Reader& from);

 private:
  bool narrow_;
  int64_t count_;
  int threads_;
};

}  // namespace hetconv
