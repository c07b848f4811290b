// SPDX-License-Identifier: Apache-2.0
#include "blake2.h"

#include <cstring>

namespace hetconv {
namespace {

constexpr uint64_t kStart[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                                0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
constexpr uint8_t kOrder[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
constexpr size_t kBlock = 128;

uint64_t rotated(uint64_t v, int by) { return v >> by | v << (64 - by); }

class Hash {
 public:
  explicit Hash(size_t bytes) {
    std::memcpy(h_, kStart, sizeof h_);
    h_[0] ^= 0x01010000 ^ bytes;
  }
  void add(const uint8_t* data, size_t size) {
    while (size > 0) {
      if (held_ == kBlock) compress(false);  // the last block waits
      const size_t n = size < kBlock - held_ ? size : kBlock - held_;
      std::memcpy(block_ + held_, data, n);
      held_ += n;
      data += n;
      size -= n;
    }
  }
  void finish(uint8_t* digest, size_t bytes) {
    std::memset(block_ + held_, 0, kBlock - held_);
    compress(true);
    std::memcpy(digest, h_, bytes);
  }

 private:
  void compress(bool last) {
    total_ += held_;
    uint64_t m[16], v[16];
    std::memcpy(m, block_, sizeof m);
    std::memcpy(v, h_, sizeof h_);
    std::memcpy(v + 8, kStart, sizeof kStart);
    v[12] ^= total_;  // below 2**64 bytes
    if (last) v[14] = ~v[14];
    const auto mix = [&](int a, int b, int c, int d, uint64_t x, uint64_t y) {
      v[a] += v[b] + x;
      v[d] = rotated(v[d] ^ v[a], 32);
      v[c] += v[d];
      v[b] = rotated(v[b] ^ v[c], 24);
      v[a] += v[b] + y;
      v[d] = rotated(v[d] ^ v[a], 16);
      v[c] += v[d];
      v[b] = rotated(v[b] ^ v[c], 63);
    };
    for (int round = 0; round < 12; ++round) {
      const uint8_t* s = kOrder[round % 10];
      for (int i = 0; i < 4; ++i) mix(i, 4 + i, 8 + i, 12 + i, m[s[2 * i]], m[s[2 * i + 1]]);
      for (int i = 0; i < 4; ++i)
        mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[s[8 + 2 * i]],
            m[s[9 + 2 * i]]);
    }
    for (int i = 0; i < 8; ++i) h_[i] ^= v[i] ^ v[8 + i];
    held_ = 0;
  }
  uint64_t h_[8], total_ = 0;
  uint8_t block_[kBlock];
  size_t held_ = 0;
};

}  // namespace

void blake2b(const void* first, size_t first_size, const void* second, size_t second_size,
             uint8_t* digest, size_t bytes) {
  Hash hash(bytes);
  hash.add(static_cast<const uint8_t*>(first), first_size);
  hash.add(static_cast<const uint8_t*>(second), second_size);
  hash.finish(digest, bytes);
}

}  // namespace hetconv
