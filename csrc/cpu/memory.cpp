// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace hetconv {

void* allocate(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  void* found = nullptr;
  if (posix_memalign(&found, huge ? kHugePage : 64, bytes)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(found, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // or else it stays as is
#endif
  return found;
}

}  // namespace hetconv
