// SPDX-License-Identifier: Apache-2.0
// BLAKE2b (RFC 7693), without a key: the digest of saved files.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hetconv {

// Writes `bytes` (1 to 64) of the digest of one piece of memory and, after it, another.
void blake2b(const void* first, size_t first_size, const void* second, size_t second_size,
             uint8_t* digest, size_t bytes);

}  // namespace hetconv
