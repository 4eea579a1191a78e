// AVX2 + FMA + F16C: eight rows at a time, half a line of a panel.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace phi4edge {
namespace {

struct V {
  static constexpr int kRows = 8, kTileParts = 2, kTileTokens = 2, kDirectTokens = 4, kTileQueries = 4;
  static constexpr int kSignedBiasBits = -1;  // vpsignb moves the sign to the activation instead
  struct Bytes {
    __m256i v;
  };
  struct Ints {
    __m256i v;
  };
  struct Floats {
    __m256 v;
  };

  static Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static void store_bytes(uint8_t* p, Bytes b) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b.v); }
  static Bytes splat4(const int8_t* p) {
    int32_t dword;
    std::memcpy(&dword, p, 4);
    return {_mm256_set1_epi32(dword)};
  }
  template <int From, int To, int Mask>
  static Bytes bit_field(Bytes b) {
    const __m256i mask = _mm256_set1_epi8(char(Mask));
    if constexpr (From >= To) {
      return {_mm256_and_si256(_mm256_srli_epi16(b.v, From - To), mask)};
    } else {
      return {_mm256_and_si256(_mm256_slli_epi16(b.v, To - From), mask)};
    }
  }
  static Bytes or_(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
  static Ints or_(Ints a, Ints b) { return {_mm256_or_si256(a.v, b.v)}; }
  static Bytes lookup(Bytes index, const int8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, index.v)};
  }
  static Bytes bias(Bytes b) { return b; }
  // Pairs of products stay in 16 bits: 2 * 63 * 127 for unsigned codes, 2 * 128 * 127 for signed ones.
  static constexpr bool kMakesPairs = true;
  static Ints multiply_pairs(Bytes w, Bytes x) { return {_mm256_maddubs_epi16(w.v, x.v)}; }
  static Ints add_pairs(Ints a, Ints b) { return {_mm256_add_epi16(a.v, b.v)}; }
  static Ints sum_pairs(Ints pairs) { return {_mm256_madd_epi16(pairs.v, _mm256_set1_epi16(1))}; }
  static Ints dot(Ints sum, Bytes w, Bytes x) { return add(sum, sum_pairs(multiply_pairs(w, x))); }
  static Ints dot_signed(Ints sum, Bytes w, Bytes x) { return dot(sum, {_mm256_abs_epi8(w.v)}, {_mm256_sign_epi8(x.v, w.v)}); }
  static Ints dot(Ints sum, Bytes w, const int8_t* x) { return dot(sum, w, splat4(x)); }
  static Ints dot_signed(Ints sum, Bytes w, const int8_t* x) { return dot_signed(sum, w, splat4(x)); }

  static Bytes multiply_bytes(Bytes b, Ints factor, int offset_bits) {
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i f = _mm256_or_si256(factor.v, _mm256_slli_epi32(factor.v, 16));
    const __m256i even = _mm256_mullo_epi16(_mm256_and_si256(b.v, low), f);
    const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(b.v, 8), f);
    const __m256i product = _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi16(odd, 8));
    if (offset_bits < 0) return {product};
    const __m256i offset = _mm256_and_si256(_mm256_slli_epi16(f, offset_bits), low);
    return {_mm256_sub_epi8(product, _mm256_or_si256(offset, _mm256_slli_epi16(offset, 8)))};
  }
  static Ints dot16(Ints sum, Ints a, Bytes pair) { return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, pair.v))}; }
  static Ints dot16(Ints sum, Ints a, const void* pair) { return dot16(sum, a, splat4(static_cast<const int8_t*>(pair))); }
  static Ints multiply16(Ints a, Ints b) { return {_mm256_madd_epi16(a.v, b.v)}; }

  static Ints load_ints(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  static void store_ints(int32_t* p, Ints v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.v); }
  static Ints load_u16(const void* p) { return {_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
  static Ints load_pairs_i8(const void* p) { return {_mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
  static Ints set1(int32_t v) { return {_mm256_set1_epi32(v)}; }
  static Ints field(Ints v, int shift, int mask) {
    return {_mm256_and_si256(_mm256_srli_epi32(v.v, shift), _mm256_set1_epi32(mask))};
  }
  template <int I>
  static Ints byte(Ints v) {
    return {_mm256_and_si256(_mm256_srli_epi32(v.v, 8 * I), _mm256_set1_epi32(0xff))};
  }
  template <int I>
  static Ints top_byte(Ints v) {
    return {_mm256_slli_epi32(_mm256_srli_epi32(v.v, 8 * I), 24)};
  }
  static Bytes as_bytes(Ints v) { return {v.v}; }
  static Ints shift_left(Ints v, int n) { return {_mm256_slli_epi32(v.v, n)}; }
  static Ints shift_left_by(Ints v, const int32_t* n) { return {_mm256_sllv_epi32(v.v, _mm256_set1_epi32(*n))}; }
  static Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static Ints sub(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  static Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.v, b.v)}; }
  static int32_t reduce_max(Ints v) {
    const __m128i a = _mm_max_epi32(_mm256_castsi256_si128(v.v), _mm256_extracti128_si256(v.v, 1));
    const __m128i b = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
  }
  static int32_t reduce_sum(Ints v) {
    const __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v.v), _mm256_extracti128_si256(v.v, 1));
    const __m128i b = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
  }
  // Lanes of two registers are joined at a time.
  template <class Join>
  static Ints join_each(const Ints (&v)[8], const Join& join) {
    __m256i quads[4], pairs[2];
    for (int i = 0; i < 4; ++i) {
      quads[i] = join(_mm256_permute2x128_si256(v[i].v, v[i + 4].v, 0x20), _mm256_permute2x128_si256(v[i].v, v[i + 4].v, 0x31));
    }
    for (int i = 0; i < 2; ++i) {
      pairs[i] =
          join(_mm256_unpacklo_epi32(quads[2 * i], quads[2 * i + 1]), _mm256_unpackhi_epi32(quads[2 * i], quads[2 * i + 1]));
    }
    return {join(_mm256_unpacklo_epi64(pairs[0], pairs[1]), _mm256_unpackhi_epi64(pairs[0], pairs[1]))};
  }
  static Ints max_of_each(const Ints (&v)[8]) {
    return join_each(v, [](__m256i a, __m256i b) { return _mm256_max_epi32(a, b); });
  }
  static Ints sum_of_each(const Ints (&v)[8]) {
    return join_each(v, [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); });
  }
  static void store_codes(int8_t* p, Ints v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v.v), _mm256_extracti128_si256(v.v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static void store_codes(int16_t* p, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(v.v), _mm256_extracti128_si256(v.v, 1)));
  }

  static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v.v); }
  static Floats load_half(const void* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
  static void store_half(uint16_t* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats set1(float v) { return {_mm256_set1_ps(v)}; }
  static Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Floats to_float(Ints v) { return {_mm256_cvtepi32_ps(v.v)}; }
  static Ints round(Floats v) { return {_mm256_cvtps_epi32(v.v)}; }
  static Floats as_floats(Ints v) { return {_mm256_castsi256_ps(v.v)}; }
  static Ints as_ints(Floats v) { return {_mm256_castps_si256(v.v)}; }
  static Ints magnitude_bits(Floats v) { return {_mm256_and_si256(as_ints(v).v, _mm256_set1_epi32(0x7fffffff))}; }
  static float reduce_max(Floats v) {
    const __m128 a = _mm_max_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
    const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
  }
  static float reduce_sum(Floats v) {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
  }
};

}  // namespace
}  // namespace phi4edge

#include "kernels/generic-inl.h"

PHI4EDGE_DEFINE_KERNELS(x86_avx2)
