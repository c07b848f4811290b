// SPDX-License-Identifier: Apache-2.0
// Memory in huge pages. A network's activations and weights take thousands of pages of 4 KiB, more
// than a core keeps translations of; on a virtual machine each one that is missing costs two nested
// walks of page tables. Linux gives huge pages to who asks (transparent_hugepage=madvise, the
// default of many distributions) or to all (always).
#pragma once
#include <cstddef>

namespace hetconv {

constexpr size_t kHugePage = size_t(2) << 20;

// Memory at a multiple of 64 bytes, in huge pages as far as it fills whole ones. Freed by
// std::free. Throws std::bad_alloc.
void* allocate(size_t bytes);

}  // namespace hetconv
