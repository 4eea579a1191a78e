// AVX-512 with VNNI: sixteen rows at a time, one line of a panel; vpdpbusd adds four products a lane, vpdpwssd two.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace phi4edge {
namespace {

struct V {
  static constexpr int kRows = 16, kTileParts = 2, kTileTokens = 4, kDirectTokens = 8, kTileQueries = 8;
  static constexpr int kSignedBiasBits = 7;  // vpdpbusd wants unsigned weights: signed codes plus 128
  struct Bytes {
    __m512i v;
  };
  struct Ints {
    __m512i v;
  };
  struct Floats {
    __m512 v;
  };

  // An index of shuffle_epi8 for each lane of 32 bits; the four of 16 bytes differ by `step`.
  static __m512i places(uint32_t first, uint32_t step) {
    return _mm512_set4_epi32(int(first + 3 * step), int(first + 2 * step), int(first + step), int(first));
  }

  static Bytes load_bytes(const uint8_t* p) {
    __m512i line = _mm512_loadu_si512(p);
    asm("" : "+v"(line));  // or GCC loads it again for each of its groups
    return {line};
  }
  static void store_bytes(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b.v); }
  static Bytes splat4(const int8_t* p) {
    int32_t dword;
    std::memcpy(&dword, p, 4);
    return {_mm512_set1_epi32(dword)};
  }
  template <int From, int To, int Mask>
  static Bytes bit_field(Bytes b) {
    const __m512i mask = _mm512_set1_epi8(char(Mask));
    if constexpr (From >= To) {
      return {_mm512_and_si512(_mm512_srli_epi16(b.v, From - To), mask)};
    } else {
      return {_mm512_and_si512(_mm512_slli_epi16(b.v, To - From), mask)};
    }
  }
  static Bytes or_(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
  static Ints or_(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
  static Bytes lookup(Bytes index, const int8_t* table) {
    const __m512i t = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm512_shuffle_epi8(t, index.v)};
  }
  static Bytes bias(Bytes b) { return {_mm512_xor_si512(b.v, _mm512_set1_epi8(char(0x80)))}; }
  static constexpr bool kMakesPairs = false;
  static Ints dot(Ints sum, Bytes w, Bytes x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }
  static Ints dot_signed(Ints sum, Bytes w, Bytes x) { return dot(sum, w, x); }
  // In assembly, or GCC 12 loads the broadcast with an instruction of its own.
  struct FourBytes {
    int8_t values[4];
  };
  static Ints dot(Ints sum, Bytes w, const int8_t* x) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(w.v), "m"(*reinterpret_cast<const FourBytes*>(x)));
    return sum;
  }
  static Ints dot_signed(Ints sum, Bytes w, const int8_t* x) { return dot(sum, w, x); }

  static Bytes multiply_bytes(Bytes b, Ints factor, int offset_bits) {
    const __m512i low = _mm512_set1_epi16(0xff);
    const __m512i f = _mm512_or_si512(factor.v, _mm512_slli_epi32(factor.v, 16));
    const __m512i even = _mm512_mullo_epi16(_mm512_and_si512(b.v, low), f);
    const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(b.v, 8), f);
    const __m512i product = _mm512_or_si512(_mm512_and_si512(even, low), _mm512_slli_epi16(odd, 8));
    if (offset_bits < 0) return {product};
    const __m512i offset = _mm512_and_si512(_mm512_slli_epi16(f, unsigned(offset_bits)), low);
    return {_mm512_sub_epi8(product, _mm512_or_si512(offset, _mm512_slli_epi16(offset, 8)))};
  }
  struct Pair {
    int16_t values[2];
  } __attribute__((may_alias));
  static Ints dot16(Ints sum, Ints a, const void* pair) {
    // The intrinsic has GCC 12 copy sums around and spill them.
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(a.v), "m"(*static_cast<const Pair*>(pair)));
    return sum;
  }
  static Ints dot16(Ints sum, Ints a, Bytes pair) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(pair.v));
    return sum;
  }
  static Ints multiply16(Ints a, Ints b) { return {_mm512_madd_epi16(a.v, b.v)}; }

  static Ints load_ints(const void* p) {
    __m512i line = _mm512_loadu_si512(p);
    asm("" : "+v"(line));  // or GCC loads it again for each of its products
    return {line};
  }
  static void store_ints(int32_t* p, Ints v) { _mm512_storeu_si512(p, v.v); }
  static Ints load_u16(const void* p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
  static Ints load_pairs_i8(const void* p) {
    __m512i pairs = _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    asm("" : "+v"(pairs));
    return {pairs};
  }
  static Ints set1(int32_t v) { return {_mm512_set1_epi32(v)}; }
  static Ints field(Ints v, int shift, int mask) {
    return {_mm512_and_si512(_mm512_srli_epi32(v.v, unsigned(shift)), _mm512_set1_epi32(mask))};
  }
  template <int I>
  static Ints byte(Ints v) {
    if constexpr (I == 0) return {_mm512_and_si512(v.v, _mm512_set1_epi32(0xff))};
    if constexpr (I == 3) return {_mm512_srli_epi32(v.v, 24)};
    return {_mm512_shuffle_epi8(v.v, places(0x80808000u + I, 4))};
  }
  template <int I>
  static Ints top_byte(Ints v) {
    if constexpr (I == 0) return {_mm512_slli_epi32(v.v, 24)};
    if constexpr (I == 3) return {_mm512_and_si512(v.v, _mm512_set1_epi32(int(0xff000000)))};
    return {_mm512_shuffle_epi8(v.v, places((uint32_t(I) << 24) + 0x808080, 4u << 24))};
  }
  static Bytes as_bytes(Ints v) { return {v.v}; }
  static Ints shift_left(Ints v, int n) { return {_mm512_slli_epi32(v.v, unsigned(n))}; }
  static Ints shift_left_by(Ints v, const int32_t* n) {  // in assembly for the same reason
    __m512i out;
    __asm__("vpsllvd %2%{1to16%}, %1, %0" : "=v"(out) : "v"(v.v), "m"(*n));
    return {out};
  }
  static Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static Ints sub(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  static Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
  static int32_t reduce_max(Ints v) { return _mm512_reduce_max_epi32(v.v); }
  static int32_t reduce_sum(Ints v) { return _mm512_reduce_add_epi32(v.v); }
  // Lanes of two registers are joined at a time.
  template <class Join>
  static Ints join_each(const Ints (&v)[16], const Join& join) {
    __m512i octets[8], quads[4], pairs[2];
    for (int i = 0; i < 8; ++i) {
      const __m512i a = v[i / 4 * 8 + i % 4].v, b = v[i / 4 * 8 + i % 4 + 4].v;
      octets[i] = join(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512i a = octets[i], b = octets[i + 4];
      quads[i] = join(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
      const __m512i a = quads[2 * i], b = quads[2 * i + 1];
      pairs[i] = join(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    return {join(_mm512_unpacklo_epi64(pairs[0], pairs[1]), _mm512_unpackhi_epi64(pairs[0], pairs[1]))};
  }
  static Ints max_of_each(const Ints (&v)[16]) {
    return join_each(v, [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); });
  }
  static Ints sum_of_each(const Ints (&v)[16]) {
    return join_each(v, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
  }
  // Converting into memory is one instruction, and takes Zen 4 a hundred cycles; a register between keeps GCC from it.
  static void store_codes(int8_t* p, Ints v) {
    __m128i codes = _mm512_cvtsepi32_epi8(v.v);
    asm("" : "+v"(codes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
  }
  static void store_codes(int16_t* p, Ints v) {
    __m256i codes = _mm512_cvtsepi32_epi16(v.v);
    asm("" : "+v"(codes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes);
  }

  static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v.v); }
  static Floats load_half(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
  static void store_half(uint16_t* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats set1(float v) { return {_mm512_set1_ps(v)}; }
  static Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Floats to_float(Ints v) { return {_mm512_cvtepi32_ps(v.v)}; }
  static Ints round(Floats v) { return {_mm512_cvtps_epi32(v.v)}; }
  static Floats as_floats(Ints v) { return {_mm512_castsi512_ps(v.v)}; }
  static Ints as_ints(Floats v) { return {_mm512_castps_si512(v.v)}; }
  static Ints magnitude_bits(Floats v) { return {_mm512_and_si512(as_ints(v).v, _mm512_set1_epi32(0x7fffffff))}; }
  static float reduce_max(Floats v) { return _mm512_reduce_max_ps(v.v); }
  static float reduce_sum(Floats v) { return _mm512_reduce_add_ps(v.v); }
};

}  // namespace
}  // namespace phi4edge

#include "kernels/generic-inl.h"

PHI4EDGE_DEFINE_KERNELS(x86_avx512vnni)
