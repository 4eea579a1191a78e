// The kernels, written once over a vector class V.  Included by each instruction set's file after it has defined V in an
// unnamed namespace; everything here has internal linkage, since the linker would otherwise keep one copy of a function for
// the whole program, perhaps the one compiled for AVX-512.
//
// V has kRows 32-bit lanes (rows of a panel, or keys, or dims), kTileParts registers x kTileTokens tokens in a tile,
// kDirectTokens tokens at a time where few are computed, kTileQueries queries in a tile of attention, and
//   Bytes (4 codes a lane), Ints, Floats
//   load_bytes  store_bytes  splat4 (4 codes to all lanes)  bit_field<From, To, Mask>  or_  lookup(bytes, 16 signed bytes)
//   multiply_bytes(bytes, ints, n): each byte of a lane by the lane's integer, minus that integer << n (n < 0: not), modulo 256
//   multiply16(a, b), of integers of 16 bits; the upper half of b is zero
//   dot16(acc, a, pointer to a pair): adds both products of a lane's 16-bit integers and the pair's
//   dot(acc, unsigned codes, signed codes)  dot_signed, of codes that went through bias(), which adds 2^kSignedBiasBits
//   (-1: nothing) where the instruction wants unsigned ones; both also with a pointer to four codes, as splat4
//   kMakesPairs: dot() makes sums of two products in 16 bits; then also multiply_pairs, add_pairs, and sum_pairs, to 32 bits
//   load_ints  store_ints  load_u16  load_pairs_i8 (two bytes of each lane, to 16 bits)  set1  field(ints, shift, mask)
//   byte<I>(ints)  top_byte<I>(ints), moved to the top  as_bytes  shift_left  shift_left_by(ints, pointer to the count)  add
//   sub  or_  max  reduce_max  reduce_sum max_of_each  sum_of_each (lane i has that of all lanes of the i'th of kRows
//   registers) store_codes (as int8 or int16)  load  store  load_half  store_half  set1(float)  mul  add  sub  fma  max (the
//   second one if either is NaN)  div  to_float  round  as_floats  as_ints  magnitude_bits  reduce_max  reduce_sum
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/kernels.h"
#include "quant/formats.h"
#include "quant/panel_layout.h"

#define PHI4EDGE_INLINE inline __attribute__((always_inline))

namespace phi4edge {
namespace {

template <int I>
struct Index {
  static constexpr int value = I;
};
template <int N, int I = 0, class Body>
PHI4EDGE_INLINE void unroll(Body&& body) {
  if constexpr (I < N) {
    body(Index<I>{});
    unroll<N, I + 1>(body);
  }
}

// To the second-level cache: the first takes too few lines at a time to keep the memory busy.  What is there may lie behind the
// end of the memory.
PHI4EDGE_INLINE void prefetch(const void* from, int64_t n_bytes) {
  for (int64_t i = 0; i < n_bytes; i += kLineBytes) __builtin_prefetch(static_cast<const uint8_t*>(from) + i, 0, 2);
}

constexpr int kGroups = 8;                     // of 4 columns in 32
constexpr int kParts = kPanelRows / V::kRows;  // registers that cover the rows of a panel

}  // namespace
}  // namespace phi4edge

// Each builds on the ones before.
// clang-format off
#include "kernels/quantized-inl.h"
#include "kernels/quantized_direct-inl.h"
#include "kernels/quantized_tiles-inl.h"
#include "kernels/float-inl.h"
#include "kernels/elementwise-inl.h"
#include "kernels/kv_caches-inl.h"
#include "kernels/attention-inl.h"
#include "kernels/peak-inl.h"
// clang-format on

namespace phi4edge {
namespace {

size_t matmul_scratch_bytes(int64_t n_tokens) {
  return kGroupParts * ((kMaxExpandedBytes + 63) / 64 * 64) + size_t(n_tokens) * kGroupPanels * kPanelRows * sizeof(float);
}

constexpr KernelTable make_table(const char* name, const QuantizeRow* quantize_row) {
  KernelTable table{};
  table.name = name;
#define X(F) \
  table.matmul[int(FormatIndex::F)] = matmul_float<F>, table.dequantize_row[int(FormatIndex::F)] = dequantize_float_row<F>;
  PHI4EDGE_FLOAT_FORMATS(X)
#undef X
#define X(F) \
  table.matmul[int(FormatIndex::F)] = matmul_quantized<F>, table.dequantize_row[int(FormatIndex::F)] = dequantize_panel_row<F>;
  PHI4EDGE_QUANTIZED_FORMATS(X)
#undef X
  table.quantize_row = quantize_row;
  table.quantize[int(ActivationScale::kFor32)] = quantize<32>;
  table.quantize[int(ActivationScale::kFor256)] = quantize<kSuperBlock>;
  table.attention[int(KvType::kI16)] = attention<IntegerCache<I16Codes>>;
  table.attention[int(KvType::kF32)] = attention<FloatCache>;
  table.attention[int(KvType::kQ8_0)] = attention<IntegerCache<Q8Codes>>;
  table.silu_multiply = silu_multiply;
  table.rms_norm = rms_norm;
  table.to_i16 = to_i16;
  table.to_q8 = to_q8;
  table.repeat_dots = repeat_dots;
  table.matmul_scratch_bytes = matmul_scratch_bytes;
  table.attention_scratch_bytes = attention_scratch_bytes;
  table.merge_attention = merge_attention;
  return table;
}

}  // namespace
}  // namespace phi4edge

// The one symbol of an instruction set's object file; the quantizers are in a file of their own.
#define PHI4EDGE_DEFINE_KERNELS(isa)                                        \
  namespace phi4edge {                                                      \
  extern const QuantizeRow k_quantizers_##isa[kFormatCount];                \
  extern const KernelTable k_kernels_##isa;                                 \
  const KernelTable k_kernels_##isa = make_table(#isa, k_quantizers_##isa); \
  }
