// The kernel table: the inner loops of the decoder, one table for each instruction set.
//
// Kernels know no threads, no allocation and no errors; their callers (decoder/ops) check shapes once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/format.h"
#include "quant/formats.h"

namespace phi4edge {

// Quantised activations: int8 codes with a power-of-two exponent e for 16 of them, so that one large value coarsens only its 15
// neighbours, and one float scale for as many columns as a block of the weights has, 32 or 256:
//   x = scale * (code << shift),  shift = kMaxShift - e,  e = 0 .. kMaxShift
// With a scale for 32 they are finer by a quarter, and weights of 8 bits are fine enough to show that.  With one for 256 a
// product over all of them stays an integer until the weights' scales come in, which is faster.
// All arrays are [super-block][token], so that a tile of tokens is one forward stream.
struct QuantizedActivations {
  int8_t* codes = nullptr;      // [.][.][256], -127 .. 127; zero beyond the last column
  float* scales = nullptr;      // [.][.][8], or [.][.][1]
  int32_t* shifts = nullptr;    // [.][.][16]
  int32_t* neg_sums = nullptr;  // [.][.][16]: minus the sum of 16 codes
  // Minus the sums of the values, for minimums.
  float* neg_sums32 = nullptr;   // with a scale for 32; [.][.][8]
  int8_t* sum_digits = nullptr;  // with one for 256: sums of code << shift; [.][.][kDigits], the digits to the base 256, -128
                                 // .. 127 each, [3][16] of 16 columns and then [3][8] of 32, the highest first
  static constexpr int kDigits16 = 3 * 16, kDigits = 80;
};
inline constexpr int kMaxShift = 9;  // 256 products of a signed byte with 127, shifted, are within 32 bits
static_assert((int64_t(kSuperBlock) * 128 * 127 << kMaxShift) < INT32_MAX);

enum class ActivationScale : int { kFor32, kFor256 };
inline constexpr int kActivationScaleCount = 2;

struct Activations {
  int64_t n_tokens = 0;   // tokens laid out, the stride of the arrays
  int64_t n_columns = 0;  // of the matrix they meet
  QuantizedActivations quantized[kActivationScaleCount];
  const float* values = nullptr;  // the same activations as floats, for float weights
  int64_t value_stride = 0;       // from token to token
};

// Output rows [0, n_rows) of `panels` for tokens [0, n_tokens) of x:  out[token * out_stride + row] is set, or
// factor times the product added to it
struct MatmulTask {
  const uint8_t* panels;
  size_t panel_bytes;
  int64_t n_rows;  // the last panel may be partly filled
  int64_t n_columns;
  const Activations* x;
  float* out;
  int64_t out_stride;
  bool adds;
  float factor;
  void* scratch;  // KernelTable::matmul_scratch_bytes(n_tokens) bytes, aligned to 64
};

// How keys and values are stored; kv_formats() of decoder/kv_cache has the names and sizes.
enum class KvType : int { kI16, kF32, kQ8_0 };
inline constexpr int kKvTypeCount = 3;

inline constexpr int64_t kLargestHead = 1024;  // dims; read_config() allows no more

// Keys, queries and values as 16-bit integers, with one scale for each: no code is larger than `code`, nor is the square root
// of the sum of their squares larger than `norm`.  Whatever the numbers were, sums of products then are within 32 bits: that of
// a key and a query is no larger than the product of their norms; that of weights and values than the sum of the weights,
// which attention holds below kI16WeightSum, times the largest code.  13 bits for values leave 16 for weights that are alike.
struct I16Limits {
  float code, norm;
};
inline constexpr I16Limits kI16Keys{32767, 46300}, kI16Values{8191, 8191 * 32};  // this norm limits nothing: 32^2 dims
inline constexpr float kI16Weight = 32767, kI16WeightSum = 262000;
// Rounding adds up to 1/2 for each of 1024 dims, whose norm is 16, and for each of 128 keys; a little is for errors of floats.
static_assert((int64_t(46300) + 16 + 1) * (46300 + 16 + 1) <= INT32_MAX && kLargestHead <= 4 * 16 * 16);
static_assert((int64_t(262000) + 64 + 10) * 8191 <= INT32_MAX);

// 16 positions: 16 float scales, and then lines of 16 pairs of codes.
//   keys     [value_dim / 2][16 keys][2 dims]
//   values   [value_dim / 16][8 pairs of keys][16 dims][2 keys]
// What is not finite in a value makes the scale of its key NaN: scales of values are finite.
struct I16Panel {
  static constexpr int64_t kScaleBytes = kPanelRows * sizeof(float), kDimBytes = kPanelRows * sizeof(int16_t);
};

// Q8_0 of 32 dims of 16 keys, or of 16 values: a half scale and 32 codes for each, as in GGUF's blocks.  Codes lie as those of
// an I16Panel with 32 dims, and what is not finite goes the same way.
struct KvBlock {
  static constexpr int kDims = 32;
  uint16_t scales[kPanelRows];
  int8_t codes[kPanelRows * kDims];
};
static_assert(sizeof(KvBlock) == kPanelRows * 34);

// Keys are attended to by segments, whose sums are merged in their order: one thread may take them all, or each thread some,
// and the result is the same to the bit.
inline constexpr int64_t kKeySegment = 1024;

// What attention sums up over some keys, in one array of floats: the values of each query, times their weights; the maximum of
// its scores, to the base 2; and its weights, which are relative to that.
struct AttentionSums {
  float *values, *maximum, *weight;  // [query][value_dim], [query], [query]

  AttentionSums(float* sums, int64_t n_queries, int64_t value_dim)
      : values(sums), maximum(sums + n_queries * value_dim), weight(maximum + n_queries) {}
  static int64_t n_floats(int64_t n_queries, int64_t value_dim) { return n_queries * (value_dim + 2); }
};

// Attention of a tile of query rows over segments of one KV head; the softmax is what sums of values are to those of weights.
//   I16     K: [key / 16] of I16Panel                      V: the same
//   F32     K: [key / 16][head_dim][16 keys]               V: [key][value_dim]
//   Q8_0    K: [key / 16][value_dim / 32] of KvBlock       V: the same
struct AttentionTask {
  const float* queries;  // row i starts at queries + i * query_stride; already multiplied by 1 / sqrt(head_dim)
  int64_t query_stride;
  int n_queries;
  const int64_t* first_key;  // row i sees keys first_key[i] .. last_key[i]
  const int64_t* last_key;
  int head_dim;   // any
  int value_dim;  // head_dim rounded up to 16, or with Q8_0 to 32
  const void* keys;
  const void* values;
  int64_t first_segment, end_segment;
  float* sums;    // AttentionSums of n_queries
  void* scratch;  // KernelTable::attention_scratch_bytes(n_queries, value_dim)
};

inline constexpr int64_t kMaxPeakSteps = 1 << 16;  // of KernelTable::repeat_dots

struct KernelTable {
  const char* name;
  void (*matmul[kFormatCount])(const MatmulTask& task);
  const QuantizeRow* quantize_row;  // [kFormatCount]: weights to file blocks; null for float formats
  // Quantises n_columns floats of one token; arrays point at this token's entries of super-block 0, n_tokens apart.
  void (*quantize[kActivationScaleCount])(const float* x, int64_t n_columns, int64_t n_tokens, const QuantizedActivations& out);
  void (*attention[kKvTypeCount])(const AttentionTask& task);
  // sums: those of two lots of keys, of which `sums` had the first
  void (*merge_attention)(float* sums, float* other, int n_queries, int value_dim);
  // x += add (where it is not null), then  out = x / sqrt(mean(x^2) + epsilon) * weight
  void (*rms_norm)(float* x, const float* add, const float* weight, int64_t n_values, float epsilon, float* out);
  void (*silu_multiply)(const float* gate, const float* up, int64_t n_values, float* out);
  // Codes, with zeros up to a multiple of 16, and their scale.  What is not finite, or 2^126 or more, makes the scale NaN;
  // a head of nothing but numbers below 2^-110 becomes zero.
  float (*to_i16)(const float* x, int64_t n_values, const I16Limits& limits, int16_t* codes);
  // Codes and half scales of 32 values each, as KvBlock has them; zeros fill up the last 32.
  void (*to_q8)(const float* x, int64_t n_values, int8_t* codes, uint16_t* scales);
  // Sixteen-row panel, lane `row`, back to floats.
  void (*dequantize_row[kFormatCount])(const uint8_t* panel, int row, int64_t n_columns, float* out);
  // The int8 dot product of the matmul kernels and nothing else, in registers; returns the operations done, where multiplying
  // and adding are two.  For measuring what this CPU could do.
  int64_t (*repeat_dots)(int64_t n_steps);
  size_t (*matmul_scratch_bytes)(int64_t n_tokens);
  size_t (*attention_scratch_bytes)(int n_queries, int value_dim);
};

}  // namespace phi4edge
