// The reference kernels: plain C++, one row at a time.  Every other instruction set is tested against these.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "quant/half.h"

namespace phi4edge {
namespace {

struct V {
  static constexpr int kRows = 1, kTileParts = 1, kTileTokens = 4, kDirectTokens = 4, kTileQueries = 4;
  static constexpr int kSignedBiasBits = -1;
  using Bytes = uint32_t;  // four codes
  using Ints = int32_t;
  using Floats = float;

  template <class T>
  static T read(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }

  static Bytes load_bytes(const uint8_t* p) { return read<uint32_t>(p); }
  static void store_bytes(uint8_t* p, Bytes b) { std::memcpy(p, &b, 4); }
  static Bytes splat4(const int8_t* p) { return read<uint32_t>(p); }
  template <int From, int To, int Mask>
  static Bytes bit_field(Bytes b) {
    constexpr uint32_t kMask = 0x01010101u * uint32_t(Mask);
    return (From >= To ? b >> (From - To) : b << (To - From)) & kMask;
  }
  static Bytes or_(Bytes a, Bytes b) { return a | b; }
  static Ints or_(Ints a, Ints b) { return a | b; }
  static Bytes lookup(Bytes index, const int8_t* table) {
    uint32_t out = 0;
    for (int b = 0; b < 32; b += 8) out |= uint32_t(uint8_t(table[index >> b & 15])) << b;
    return out;
  }
  static Bytes bias(Bytes b) { return b; }
  static constexpr bool kMakesPairs = false;
  static Ints dot(Ints sum, Bytes w, Bytes x) {
    for (int b = 0; b < 32; b += 8) sum += int32_t(uint8_t(w >> b)) * int8_t(x >> b);
    return sum;
  }
  static Ints dot_signed(Ints sum, Bytes w, Bytes x) {
    for (int b = 0; b < 32; b += 8) sum += int32_t(int8_t(w >> b)) * int8_t(x >> b);
    return sum;
  }
  static Ints dot(Ints sum, Bytes w, const int8_t* x) { return dot(sum, w, splat4(x)); }
  static Ints dot_signed(Ints sum, Bytes w, const int8_t* x) { return dot_signed(sum, w, splat4(x)); }

  static Bytes multiply_bytes(Bytes bytes, Ints factor, int offset_bits) {
    const uint32_t f = uint32_t(factor), offset = offset_bits < 0 ? 0 : f << offset_bits;
    uint32_t out = 0;
    for (int b = 0; b < 32; b += 8) out |= (((bytes >> b & 0xff) * f - offset) & 0xff) << b;
    return out;
  }
  static Ints dot16(Ints sum, Ints a, Bytes pair) {  // modulo 2^32, as vectors do: what goes beyond is never used
    const int32_t low = int16_t(a) * int16_t(pair), high = (a >> 16) * (int32_t(pair) >> 16);
    return int32_t(uint32_t(sum) + uint32_t(low) + uint32_t(high));
  }
  static Ints dot16(Ints sum, Ints a, const void* pair) { return dot16(sum, a, read<uint32_t>(pair)); }
  static Ints multiply16(Ints a, Ints b) { return a * int16_t(b); }

  static Ints load_ints(const void* p) { return read<int32_t>(p); }
  static void store_ints(int32_t* p, Ints v) { *p = v; }
  static Ints load_u16(const void* p) { return read<uint16_t>(p); }
  static Ints load_pairs_i8(const void* p) {
    const auto pair = read<uint16_t>(p);
    return int32_t(uint32_t(uint16_t(int8_t(pair))) | uint32_t(uint16_t(int8_t(pair >> 8))) << 16);
  }
  static Ints set1(int32_t v) { return v; }
  static Ints field(Ints v, int shift, int mask) { return int32_t(uint32_t(v) >> shift) & mask; }
  template <int I>
  static Ints byte(Ints v) {
    return int32_t(uint32_t(v) >> (8 * I) & 0xff);
  }
  template <int I>
  static Ints top_byte(Ints v) {
    return int32_t(uint32_t(v) >> (8 * I) << 24);
  }
  static Bytes as_bytes(Ints v) { return uint32_t(v); }
  static Ints shift_left(Ints v, int n) { return int32_t(uint32_t(v) << n); }
  static Ints shift_left_by(Ints v, const int32_t* n) { return shift_left(v, *n); }
  static Ints add(Ints a, Ints b) { return int32_t(uint32_t(a) + uint32_t(b)); }
  static Ints sub(Ints a, Ints b) { return int32_t(uint32_t(a) - uint32_t(b)); }
  static Ints max(Ints a, Ints b) { return a > b ? a : b; }
  static int32_t reduce_max(Ints v) { return v; }
  static int32_t reduce_sum(Ints v) { return v; }
  static Ints max_of_each(const Ints (&v)[1]) { return v[0]; }
  static Ints sum_of_each(const Ints (&v)[1]) { return v[0]; }
  static void store_codes(int8_t* p, Ints v) { *p = int8_t(v); }
  static void store_codes(int16_t* p, Ints v) {
    const auto code = int16_t(v);
    std::memcpy(p, &code, sizeof code);
  }

  static Floats load(const float* p) { return *p; }
  static void store(float* p, Floats v) { *p = v; }
  static Floats load_half(const void* p) { return half_to_float(read<uint16_t>(p)); }
  static void store_half(uint16_t* p, Floats v) { *p = float_to_half(v); }
  static Floats set1(float v) { return v; }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats sub(Floats a, Floats b) { return a - b; }
  static Floats div(Floats a, Floats b) { return a / b; }
  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static Floats to_float(Ints v) { return float(v); }
  static Ints round(Floats v) { return v == v ? int32_t(std::nearbyint(v)) : 0; }
  static Floats as_floats(Ints v) { return std::bit_cast<float>(v); }
  static Ints as_ints(Floats v) { return std::bit_cast<int32_t>(v); }
  static Ints magnitude_bits(Floats v) { return as_ints(v) & 0x7fffffff; }
  static float reduce_max(Floats v) { return v; }
  static float reduce_sum(Floats v) { return v; }
};

}  // namespace
}  // namespace phi4edge

#include "kernels/generic-inl.h"

PHI4EDGE_DEFINE_KERNELS(scalar)
