// Codes into the bytes of a block: the opposite of each format's codes().
//
// Part of quantize-inl.h.
#pragma once

namespace phi4edge {
namespace {

PHI4EDGE_INLINE void join_nibbles(const uint8_t* codes, uint8_t* q) {
  for (int i = 0; i < 16; ++i) q[i] = uint8_t((codes[i] & 15) | codes[i + 16] << 4);
}

// Bit i of `high` is bit 4 of code i.
PHI4EDGE_INLINE void join_fifth_bits(const uint8_t* codes, uint8_t* high) {
  for (int i = 0; i < 4; ++i) {
    uint64_t eight;
    std::memcpy(&eight, codes + 8 * i, 8);
    high[i] = uint8_t((eight >> 4 & 0x0101010101010101) * 0x0102040810204080 >> 56);  // moves bit 8 i to bit 56 + i
  }
}

// As in Q4_K: for each 64 values, the first 32 in the low nibbles and the last 32 in the high nibbles.
PHI4EDGE_INLINE void join_nibbles_of_256(const uint8_t* codes, uint8_t* q) {
  for (int i = 0; i < 256; i += 64, q += 32) {
    for (int l = 0; l < 32; ++l) q[l] = uint8_t((codes[i + l] & 15) | codes[i + 32 + l] << 4);
  }
}

// Bit j of byte l is bit `bit` of code 32 j + l.
PHI4EDGE_INLINE void join_bit_of_256(const uint8_t* codes, int bit, uint8_t* high) {
  std::memset(high, 0, 32);
  for (int j = 0; j < 8; ++j) {
    for (int l = 0; l < 32; ++l) high[l] = uint8_t(high[l] | (codes[32 * j + l] >> bit & 1) << j);
  }
}

// Per 128 values: bits 2 j and 2 j + 1 of byte l are bits `bit` and `bit` + 1 of code 32 j + l.
PHI4EDGE_INLINE void join_pairs_of_256(const uint8_t* codes, int bit, uint8_t* pairs) {
  std::memset(pairs, 0, 64);
  for (int j = 0; j < 8; ++j) {
    uint8_t* to = pairs + j / 4 * 32;
    for (int l = 0; l < 32; ++l) to[l] = uint8_t(to[l] | (codes[32 * j + l] >> bit & 3) << (j % 4 * 2));
  }
}

PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q8_0::Block& block) { std::memcpy(block.q, codes, sizeof block.q); }
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q4_0::Block& block) { join_nibbles(codes, block.q); }
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q4_1::Block& block) { join_nibbles(codes, block.q); }
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, IQ4_NL::Block& block) { join_nibbles(codes, block.q); }
template <class Block>
void store_five_bit_codes(const uint8_t* codes, Block& block) {
  join_nibbles(codes, block.q);
  join_fifth_bits(codes, block.high);
}
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q5_0::Block& block) { store_five_bit_codes(codes, block); }
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q5_1::Block& block) { store_five_bit_codes(codes, block); }
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, IQ4_XS::Block& block) {
  for (int j = 0; j < 8; ++j) join_nibbles(codes + 32 * j, block.q + 16 * j);
}
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q2_K::Block& block) { join_pairs_of_256(codes, 0, block.q); }
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q3_K::Block& block) {
  join_pairs_of_256(codes, 0, block.low);
  join_bit_of_256(codes, 2, block.high);
}
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q4_K::Block& block) { join_nibbles_of_256(codes, block.q); }
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q5_K::Block& block) {
  join_nibbles_of_256(codes, block.q);
  join_bit_of_256(codes, 4, block.high);
}
PHI4EDGE_INLINE void store_codes(const uint8_t* codes, Q6_K::Block& block) {
  for (int half = 0; half < 2; ++half) {  // low nibbles are values 0-63 of each 128, high nibbles 64-127
    const uint8_t* from = codes + 128 * half;
    for (int l = 0; l < 64; ++l) block.low[64 * half + l] = uint8_t((from[l] & 15) | from[64 + l] << 4);
  }
  join_pairs_of_256(codes, 4, block.high);
}

// The scales of the sub-blocks.
PHI4EDGE_INLINE void store_scales(const int* s, IQ4_XS::Block& block) {  // -32..31
  block.high = 0;
  std::memset(block.low, 0, sizeof block.low);
  for (int j = 0; j < 8; ++j) {
    const int biased = s[j] + 32;
    block.low[j / 2] = uint8_t(block.low[j / 2] | (biased & 15) << (4 * (j % 2)));
    block.high = uint16_t(block.high | (biased >> 4) << (2 * j));
  }
}
PHI4EDGE_INLINE void store_scales(const int* s, Q3_K::Block& block) {  // -32..31
  std::memset(block.packed, 0, sizeof block.packed);
  for (int j = 0; j < 16; ++j) {
    const int biased = s[j] + 32;
    uint8_t &low = block.packed[j % 8], &high = block.packed[8 + j % 4];
    low = uint8_t(low | (biased & 15) << (j / 8 * 4));
    high = uint8_t(high | (biased >> 4) << (j / 4 * 2));
  }
}
PHI4EDGE_INLINE void store_scales(const int* s, Q6_K::Block& block) {  // -128..127
  for (int j = 0; j < 16; ++j) block.s[j] = int8_t(s[j]);
}
PHI4EDGE_INLINE void store_scales(const int* s, const int* m, Q2_K::Block& block) {  // 0..15
  for (int j = 0; j < 16; ++j) block.nibbles[j] = uint8_t(s[j] | m[j] << 4);
}
template <class Block>  // Q4_K, Q5_K: 0..63
void store_scales(const int* s, const int* m, Block& block) {
  for (int j = 0; j < 4; ++j) {
    block.pairs[j] = uint8_t(s[j] | s[4 + j] >> 4 << 6);
    block.pairs[4 + j] = uint8_t(m[j] | m[4 + j] >> 4 << 6);
    block.pairs[8 + j] = uint8_t((s[4 + j] & 15) | (m[4 + j] & 15) << 4);
  }
}

}  // namespace
}  // namespace phi4edge
