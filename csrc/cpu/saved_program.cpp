// SPDX-License-Identifier: Apache-2.0
#include "saved_program.h"

#include <pthread.h>
#include <unistd.h>

#include <cstdlib>
#include <new>
#include <typeinfo>

#include "blake2.h"
#include "memory.h"
#include "threads.h"

namespace hetconv {
namespace {

constexpr char kMagic[8] = {'h', 'e', 't', 'c', 'o', 'n', 'v', 0};
constexpr uint32_t kVersion = 1;
constexpr size_t kHead = 24, kDigest = 16;
constexpr int kMostTensors = 1024, kMostSteps = 1 << 20, kMostThreads = 1024;
constexpr size_t kLine = 64;  // places begin at cache lines

struct Class {
  const std::type_info& type;
  Loaded (*load)(Reader&);
};

// By their numbers in files.
const Class kClasses[] = {
    {typeid(ConvStep), ConvStep::load},         {typeid(Int8ConvStep), Int8ConvStep::load},
    {typeid(Int8SumStep), Int8SumStep::load},   {typeid(Int8ImagesStep), Int8ImagesStep::load},
    {typeid(QuantizeStep), QuantizeStep::load}, {typeid(EachStep), EachStep::load},
    {typeid(PoolStep), PoolStep::load},         {typeid(ConcatStep), ConcatStep::load},
    {typeid(PickStep), PickStep::load},         {typeid(CopyStep), CopyStep::load},
    {typeid(CastStep), CastStep::load},         {typeid(PadStep), PadStep::load},
};
constexpr int kClassCount = int(sizeof kClasses / sizeof *kClasses);

int class_of(const Step& step) {
  for (int i = 0; i < kClassCount; ++i)
    if (kClasses[i].type == typeid(step)) return i;
  throw std::invalid_argument(std::string("a step '") + step.kind() + "' cannot be saved");
}

void put_tensors(Writer& to, const std::vector<TensorSpec>& tensors) {
  to.put(int32_t(tensors.size()));
  for (const TensorSpec& t : tensors) {
    to.text(t.name);
    to.put(int32_t(t.type));
    to.put(int32_t(t.shape.size()));
    for (const auto* numbers : {&t.shape, &t.strides})
      for (const int64_t v : *numbers) to.put(v);
  }
}

std::vector<TensorSpec> read_tensors(Reader& from, bool outputs) {
  const int count = from.within<int32_t>(1, kMostTensors, "the number of inputs or outputs");
  std::vector<TensorSpec> found;
  for (int i = 0; i < count; ++i) {
    TensorSpec t;
    t.name = from.text();
    if (t.name.find('\0') != std::string::npos) throw FileError("a name has a zero in it");
    t.type = from.one_of<Element>(6, "the dtype of a tensor");
    const auto rank = size_t(from.within<int32_t>(0, kMostAxes, "the number of axes"));
    for (auto* numbers : {&t.shape, &t.strides})
      for (size_t k = 0; k < rank; ++k)
        numbers->push_back(from.within<int64_t>(0, int64_t(1) << 40, "a size of a tensor"));
    if (t.bytes() == 0) throw FileError("an input or output is empty");
    if (outputs && !apart(int(rank), t.shape.data(), t.strides.data()))
      throw FileError("elements of an output share a place");
    found.push_back(std::move(t));
  }
  return found;
}

void digest_of(const char* file, size_t size, uint8_t* digest) {
  blake2b(file, kHead, file + kHead + kDigest, size - kHead - kDigest, digest, kDigest);
}

bool overlap(const char* a, int64_t a_bytes, const char* b, int64_t b_bytes) {
  return uintptr_t(a) < uintptr_t(b) + size_t(b_bytes) &&
         uintptr_t(b) < uintptr_t(a) + size_t(a_bytes);
}

// Of all programs: it is held for as long as a list takes, and while a process forks, so that the
// child finds it free.
std::mutex lock_of_arenas;
const int fork_guard =
    pthread_atfork([] { lock_of_arenas.lock(); }, [] { lock_of_arenas.unlock(); },
                   [] { lock_of_arenas.unlock(); });

}  // namespace

int TensorSpec::element() const {
  static const int sizes[] = {4, 8, 2, 2, 1, 1};
  return sizes[int(type)];
}

int64_t TensorSpec::bytes() const {
  return reach_of(int(shape.size()), shape.data(), strides.data(), element());
}

std::string write_program(const ProgramFile& about, const std::vector<ProgramPart>& parts) {
  size_t count = 0;
  for (const ProgramPart& part : parts) {
    if (part.weights.size() != part.program->size() ||
        int(part.bases.size()) < part.program->bases())
      throw std::invalid_argument("weights or bases are missing");
    count += part.program->size();
  }
  Writer to;
  to.raw(kMagic, sizeof kMagic);
  to.put(kVersion);
  to.put(uint32_t(0));
  to.put(uint64_t(0));  // the size, below
  to.raw(kMagic, 8);    // the digest, below
  to.raw(kMagic, 8);
  to.text(about.made_by);
  to.text(about.network);
  to.put(about.arena);
  put_tensors(to, about.inputs);
  put_tensors(to, about.outputs);
  to.put(int32_t(count));
  for (const ProgramPart& part : parts)
    for (size_t i = 0; i < part.program->size(); ++i) {
      const Step& step = part.program->step(i);
      to.put(int32_t(class_of(step)));
      to.put(int32_t(part.program->places(i).size()));
      for (const Place& place : part.program->places(i)) {
        to.put(int32_t(place.base < 0 ? -1 : part.bases[size_t(place.base)]));
        to.put(place.offset);
      }
      step.save(to, part.weights[i]);
    }
  const uint64_t size = to.bytes.size() - kHead - kDigest;
  std::memcpy(&to.bytes[16], &size, sizeof size);
  digest_of(to.bytes.data(), to.bytes.size(), reinterpret_cast<uint8_t*>(&to.bytes[kHead]));
  return std::move(to.bytes);
}

SavedProgram::SavedProgram(const void* data, size_t size) {
  const char* file = static_cast<const char*>(data);
  if (size < kHead + kDigest || std::memcmp(file, kMagic, sizeof kMagic) != 0)
    throw FileError("it is no program of hetconv_kernels.export.program");
  Reader head(file + sizeof kMagic, kHead - sizeof kMagic);
  const auto version = head.any<uint32_t>();
  if (version != kVersion)
    throw FileError("its format is version " + std::to_string(version) +
                    ", and this library reads " + std::to_string(kVersion));
  if (head.any<uint32_t>() != 0 || head.any<uint64_t>() != size - kHead - kDigest)
    throw FileError("it is not as long as it says");
  uint8_t digest[kDigest];
  digest_of(file, size, digest);
  if (std::memcmp(digest, file + kHead, kDigest) != 0)
    throw FileError("its contents are not those that were saved");
  Reader from(file + kHead + kDigest, size - kHead - kDigest);
  about_.made_by = from.text();
  about_.network = from.text();
  about_.arena = from.within<int64_t>(0, int64_t(1) << 46, "the size of the arena");
  if (about_.arena / sysconf(_SC_PAGESIZE) > sysconf(_SC_PHYS_PAGES)) throw std::bad_alloc();
  about_.inputs = read_tensors(from, false);
  about_.outputs = read_tensors(from, true);
  try {
    read_steps(from);
  } catch (const std::invalid_argument& error) {  // from the steps themselves
    throw FileError(error.what());
  }
  if (!from.done()) throw FileError("something follows its last step");
}

void SavedProgram::read_steps(Reader& from) {
  const int count = from.within<int32_t>(1, kMostSteps, "the number of steps");
  std::vector<uint8_t> written(about_.outputs.size(), 0);
  for (int i = 0; i < count; ++i) {
    const int kind = from.within<int32_t>(0, kClassCount - 1, "the class of a step");
    const int operands = from.within<int32_t>(1, 1 << 17, "the number of operands");
    std::vector<Place> places;
    for (int k = 0; k < operands; ++k) {
      const int most = int(about_.inputs.size() + about_.outputs.size());
      const int base = from.within<int32_t>(-1, most, "the base of a place");
      places.push_back({base, from.within<int64_t>(0, int64_t(1) << 46, "a place")});
    }
    std::shared_ptr<const Step> step = kClasses[kind].load(from);
    if (step->operands() != operands) throw FileError("a step has another number of operands");
    check(*step, places, &written);
    program_.add(std::move(step), std::move(places));
  }
  for (const uint8_t whole : written)
    if (!whole) throw FileError("an output is never written");
}

// Whether a step stays within its operands, and writes nothing that it must not.
void SavedProgram::check(const Step& step, const std::vector<Place>& places,
                         std::vector<uint8_t>* written) {
  const int last = step.operands() - 1;
  for (int i = 0; i <= last; ++i) {
    const Place& place = places[size_t(i)];
    if (place.base < 0) {
      if (!step.optional(i)) throw FileError("a step lacks an operand");
      continue;
    }
    const Reach reach = step.reach(i);
    if (place.offset > bytes_of(place.base) - reach.bytes)
      throw FileError("a step reaches beyond its operand");
    if (place.offset % reach.element != 0 || alignment_of(place.base) % reach.element != 0)
      throw FileError("an operand is not aligned");
  }
  const Place& to = places[size_t(last)];
  const Reach reach = step.reach(last);
  const int first = 1 + int(about_.inputs.size());
  if (to.base > 0 && to.base < first) throw FileError("a step writes to an input");
  if (to.base >= first && to.offset == 0 && reach.bytes == bytes_of(to.base))
    (*written)[size_t(to.base - first)] = 1;
  for (int i = 0; i < last; ++i) {
    const Place& place = places[size_t(i)];
    if (place.base != to.base) continue;
    const int64_t bytes = step.reach(i).bytes;
    const bool same = place.offset == to.offset && bytes == reach.bytes && step.in_place();
    const bool beside =
        place.offset + bytes <= to.offset || to.offset + reach.bytes <= place.offset;
    if (!same && !beside) throw FileError("a step writes over what it reads");
  }
}

int64_t SavedProgram::bytes_of(int base) const {
  if (base == 0) return about_.arena;
  const size_t i = size_t(base - 1), inputs = about_.inputs.size();
  return i < inputs ? about_.inputs[i].bytes() : about_.outputs[i - inputs].bytes();
}

int SavedProgram::alignment_of(int base) const {
  if (base == 0) return int(kLine);
  const size_t i = size_t(base - 1), inputs = about_.inputs.size();
  return i < inputs ? about_.inputs[i].element() : about_.outputs[i - inputs].element();
}

void SavedProgram::run(const void* const* inputs, void* const* outputs, int threads) {
  if (threads < 0 || threads > kMostThreads)
    throw std::invalid_argument("threads: received " + std::to_string(threads) +
                                ", expected 0 to " + std::to_string(kMostThreads));
  const size_t ins = about_.inputs.size(), outs = about_.outputs.size();
  constexpr size_t kFew = 32;
  char* few[kFew];
  std::vector<char*> many(1 + ins + outs > kFew ? 1 + ins + outs : 0);
  char** bases = many.empty() ? few : many.data();
  for (size_t i = 0; i < ins + outs; ++i) {
    const bool in = i < ins;
    const size_t k = in ? i : i - ins;
    const TensorSpec& spec = in ? about_.inputs[k] : about_.outputs[k];
    char* at = in ? static_cast<char*>(const_cast<void*>(inputs ? inputs[k] : nullptr))
                  : static_cast<char*>(outputs ? outputs[k] : nullptr);
    const std::string what = (in ? "input " : "output ") + std::to_string(k);
    if (!at) throw std::invalid_argument(what + ": received NULL, expected its address");
    if (uintptr_t(at) % size_t(spec.element()) != 0)
      throw std::invalid_argument(what + ": received an address that is not a multiple of " +
                                  std::to_string(spec.element()) + ", the size of its elements");
    bases[1 + i] = at;
    for (size_t other = 0; other < i && !in; ++other)
      if (overlap(at, bytes_of(int(1 + i)), bases[1 + other], bytes_of(int(1 + other))))
        throw std::invalid_argument(what +
                                    " overlaps another output or an input; expected memory "
                                    "of its own");
  }
  bases[0] = take();
  try {
    program_.run(bases, threads > 0 ? threads : omp_get_max_threads());
  } catch (...) {
    put_back(bases[0]);
    throw;
  }
  put_back(bases[0]);
}

char* SavedProgram::take() {
  {
    std::lock_guard<std::mutex> hold(lock_of_arenas);
    if (!idle_.empty()) {
      char* arena = idle_.back();
      idle_.pop_back();
      return arena;
    }
  }
  const size_t bytes = (size_t(about_.arena) / kLine + 1) * kLine;
  char* arena = static_cast<char*>(allocate(bytes));
  std::memset(arena, 0, bytes);  // its pages are there before the first step
  return arena;
}

void SavedProgram::put_back(char* arena) {
  std::lock_guard<std::mutex> hold(lock_of_arenas);
  idle_.push_back(arena);
}

size_t SavedProgram::release() {
  std::vector<char*> freed;
  {
    std::lock_guard<std::mutex> hold(lock_of_arenas);
    freed.swap(idle_);
  }
  for (char* arena : freed) std::free(arena);
  return freed.size() * size_t(about_.arena);
}

}  // namespace hetconv
