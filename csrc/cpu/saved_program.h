// SPDX-License-Identifier: Apache-2.0
// A wholly native network in a file, for hosts without Python.
//
//   8 bytes   "hetconv\0"
//   uint32    version of the format
//   uint32    0
//   uint64    bytes that follow the head
//   16 bytes  BLAKE2b of the head so far and of all that follows
//   text      what wrote it; text: the network's class
//   int64     bytes of the arena
//   tensors   the inputs: a count, then name, dtype, shape and strides of each; the outputs
//   steps     a count, then of each: its class, its places (base, offset), what its class saves
//
// Bases: -1 is null, 0 the arena, then the inputs, then the outputs. Weights are those that exist,
// not packed: each machine packs them for its own instruction set.
#pragma once
#include <mutex>

#include "program.h"
#include "saved.h"

namespace hetconv {

enum class Element : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, u8 = 4, s8 = 5 };

struct TensorSpec {
  std::string name;
  Element type;
  std::vector<int64_t> shape, strides;  // strides in elements
  int element() const;                  // its size in bytes
  int64_t bytes() const;                // from the first element to the end of the last
};

constexpr int kMostAxes = 8;

struct ProgramFile {
  std::string made_by, network;
  int64_t arena = 0;
  std::vector<TensorSpec> inputs, outputs;
};

// Steps of a network, one part after another.
struct ProgramPart {
  const Program* program;
  std::vector<const SavedWeights*> weights;  // one for each step, null for those without
  std::vector<int> bases;                    // of the program's bases, those in the file
};

std::string write_program(const ProgramFile& about, const std::vector<ProgramPart>& parts);

// A program that was read. Runs in any number of threads at once, each call in an arena of its own,
// which is kept for another one.
class SavedProgram {
 public:
  // The whole of a file, which is not needed any more then. Throws FileError, and std::bad_alloc
  // where this machine has not as much memory.
  SavedProgram(const void* data, size_t size);
  ~SavedProgram() { release(); }
  SavedProgram(const SavedProgram&) = delete;
  SavedProgram& operator=(const SavedProgram&) = delete;
  const ProgramFile& about() const { return about_; }
  const Program& program() const { return program_; }
  // Throws std::invalid_argument for a null or misaligned address, for outputs that overlap inputs
  // or one another, and for a number of threads that is none. threads: 0 = OpenMP's.
  void run(const void* const* inputs, void* const* outputs, int threads);
  size_t release();  // frees the arenas that no call is using; returns their bytes

 private:
  void read_steps(Reader& from);
  void check(const Step& step, const std::vector<Place>& places, std::vector<uint8_t>* written);
  int64_t bytes_of(int base) const;
  int alignment_of(int base) const;
  char* take();
  void put_back(char* arena);
  ProgramFile about_;
  Program program_;
  std::vector<char*> idle_;
};

}  // namespace hetconv
