// SPDX-License-Identifier: Apache-2.0
// What saved programs are written to and read from: numbers in little-endian order, one after
// another. Whatever a file says is checked before it is used.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"

namespace hetconv {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are in little-endian order");

// A file is damaged, of another kind, or of a later version.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A layer's weights as they are saved: those that exist, by filter, channel, row and column.
struct SavedWeights {
  const uint8_t* bits;  // [F][ceil(C * KH * KW / 8)], the lowest bit first
  const void* live;
  int64_t count;
  DType dtype;  // of floats
};

class Writer {
 public:
  template <class T> void put(T value) { raw(&value, sizeof value); }
  void raw(const void* data, size_t size) { bytes.append(static_cast<const char*>(data), size); }
  void text(const std::string& s) {
    put(uint32_t(s.size()));
    raw(s.data(), s.size());
  }
  std::string bytes;
};

class Reader {
 public:
  Reader(const void* data, size_t size)
      : at_(static_cast<const char*>(data)), end_(static_cast<const char*>(data) + size) {}
  bool done() const { return at_ == end_; }
  const char* raw(uint64_t size) {
    if (size > uint64_t(end_ - at_)) throw FileError("it ends in the middle of a step");
    const char* found = at_;
    at_ += size;
    return found;
  }
  // `count` elements of `size` bytes.
  const char* raw(uint64_t count, uint64_t size) {
    if (count > uint64_t(end_ - at_) / size) throw FileError("it ends in the middle of a step");
    return raw(count * size);
  }
  template <class T> T any() {
    T value;
    std::memcpy(&value, raw(sizeof value), sizeof value);
    return value;
  }
  template <class T> T within(T low, T high, const char* what) {
    const T value = any<T>();
    if (!(value >= low && value <= high)) throw FileError(std::string(what) + " is out of range");
    return value;
  }
  template <class E> E one_of(int count, const char* what) {
    return E(within<int32_t>(0, count - 1, what));
  }
  std::string text() {
    const auto size = within<uint32_t>(0, 1 << 16, "the length of a name");
    return std::string(raw(size), size);
  }
  template <class T> std::vector<T> list(size_t most, const char* what) {
    const auto count = within<uint64_t>(0, most, what);
    const char* from = raw(count, sizeof(T));
    std::vector<T> found(static_cast<size_t>(count));
    if (count > 0) std::memcpy(found.data(), from, size_t(count) * sizeof(T));
    return found;
  }

 private:
  const char *at_, *end_;
};

// Bytes from the first element of a tensor to the end of its last. Throws FileError where that is
// beyond all memory.
int64_t reach_of(int rank, const int64_t* shape, const int64_t* strides, int element);
// Whether no two elements share a place.
bool apart(int rank, const int64_t* shape, const int64_t* strides);

}  // namespace hetconv
