// The kernels, written once over a vector class V.  Included by each instruction set's file after it has defined V in an
// unnamed namespace; everything here has internal linkage, since the linker would otherwise keep one copy of a function for
// the whole program, perhaps the one compiled for AVX-512.
//
// V has kRows 32-bit lanes (rows of a panel, or keys, or dims), kTileParts registers x kTileTokens tokens in a tile, and
//   Bytes (4 codes a lane), Ints, Floats
//   load_bytes  store_bytes  splat4 (4 codes to all lanes)  bit_field<From, To, Mask>  or_  lookup(bytes, 16 signed bytes)
//   dot(acc, unsigned codes, signed codes)  dot_signed, of codes that went through bias(), which adds 2^kSignedBiasBits
//   (-1: nothing) where the instruction wants unsigned ones
//   load_ints  load_u16  set1  field(ints, shift, mask)  signed_byte(ints, i)  shift_left  shift_left_by(ints, pointer to
//   the count)  add  or_  max  reduce_max  reduce_sum  store_codes (as int8)
//   load  store  load_half  store_half  set1(float)  mul  add  sub  fma  max (the second one if either is NaN)  div
//   to_float  round  as_floats  as_ints  magnitude_bits  reduce_max  reduce_sum
#pragma once

#include <cstring>

#include "kernels/kernels.h"
#include "quant/formats.h"

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

constexpr int kGroups = 8;                     // of 4 columns in 32
constexpr int kParts = kPanelRows / V::kRows;  // registers that cover the rows of a panel
constexpr int64_t kPrefetchBytes = 5 * 1024;   // ahead of the codes in use while decoding

// ---------------------------------------------------------------- quantised weights

template <class F>
struct Layout {
  using Codes = typename F::Codes;
  static constexpr int kSubsPerBlock32 = 32 / F::kSub;
  static constexpr int kSubs = kSuperBlock / F::kSub;
  static constexpr int kLineBytes32 = Codes::kLines * kLineBytes;  // bytes of 32 columns

  static int64_t header_bytes(int64_t n_columns) {
    return (n_columns / F::kValues * F::kScaleBytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  }
  // Signed codes meet instructions that want unsigned ones with a bias; others carry an offset of their own.
  static constexpr int kBiasBits = F::kSigned ? V::kSignedBiasBits : F::kOffsetBits;
};

// Scales (and minimums) of the super-block, for the rows of one register: [sub][kRows].
template <class F>
PHI4EDGE_INLINE void load_scales(const uint8_t* header, int64_t super_block, int n_blocks32, int row, float* scale,
                                 float* minimum) {
  if constexpr (F::kValues == kSuperBlock) {
    F::template scales<V>(header + super_block * F::kScaleBytes, row, scale, minimum);
  } else {
    const uint8_t* area = header + super_block * (kSuperBlock / F::kValues) * F::kScaleBytes;
    for (int j = 0; j < n_blocks32; ++j, area += F::kScaleBytes) {
      F::template scales<V>(area, row, scale + j * V::kRows, minimum + j * V::kRows);
    }
  }
}

// One operand of dot<F>.
template <class F, int G>
PHI4EDGE_INLINE V::Bytes operand(const uint8_t* lines) {
  auto codes = F::Codes::template group<V, G>(lines);
  if constexpr (requires { F::kTable; }) codes = V::lookup(codes, F::kTable);
  if constexpr (F::kSigned) codes = V::bias(codes);
  return codes;
}

template <class F>
PHI4EDGE_INLINE V::Ints dot(V::Ints sum, V::Bytes weights, V::Bytes x) {
  if constexpr (F::kSigned) {
    return V::dot_signed(sum, weights, x);
  } else {
    return V::dot(sum, weights, x);
  }
}

// What takes the weights' offset back: -offset * sum of 16 activation codes.
template <class F>
PHI4EDGE_INLINE V::Ints start_value(const int32_t* neg_sums, int sixteen) {
  constexpr int kBits = Layout<F>::kBiasBits;
  if constexpr (kBits < 0) {
    return V::set1(0);
  } else {
    return V::shift_left(V::set1(neg_sums[sixteen]), kBits);
  }
}

// Adds one sub-block's products to the running total of a row register.  The order of operations is that of every kernel,
// so a token's result does not depend on how many tokens are computed together.
PHI4EDGE_INLINE V::Floats add_sub_block(V::Floats total, V::Ints sum, V::Floats x_scale, V::Floats w_scale) {
  return V::fma(V::mul(V::to_float(sum), x_scale), w_scale, total);
}
template <class F>
PHI4EDGE_INLINE V::Floats subtract_minimum(V::Floats total, const int32_t* neg_sums, const float* neg_sums32, int sub,
                                           const int32_t* shifts, V::Floats x_scale, V::Floats minimum) {
  if constexpr (F::kSub == 16) {
    const auto sum = V::shift_left_by(V::set1(neg_sums[sub]), shifts + sub);
    return V::fma(V::mul(V::to_float(sum), x_scale), minimum, total);
  } else {
    return V::fma(V::set1(neg_sums32[sub]), minimum, total);
  }
}

PHI4EDGE_INLINE void store_rows(float* out, const float* from, int64_t n_rows) {
  if (n_rows >= kPanelRows) {
    std::memcpy(out, from, kPanelRows * sizeof(float));
  } else {
    for (int64_t row = 0; row < n_rows; ++row) out[row] = from[row];
  }
}

// Few tokens: weights are unpacked in registers and used at once; bound by memory.
template <class F, int T>
void matmul_direct(const MatmulTask& task, int64_t first_token) {
  using L = Layout<F>;
  const Activations& x = *task.x;
  const int64_t n_blocks32 = task.n_columns / 32, n_super = (n_blocks32 + 7) / 8;
  const int64_t header = L::header_bytes(task.n_columns);
  for (int64_t row0 = 0; row0 < task.n_rows; row0 += kPanelRows) {
    const uint8_t* panel = task.panels + size_t(row0 / kPanelRows) * task.panel_bytes;
    alignas(64) float result[T][kPanelRows] = {};
    for (int64_t sb = 0; sb < n_super; ++sb) {
      const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
      const int64_t at = sb * x.n_tokens + first_token;
      for (int part = 0; part < kParts; ++part) {
        const int row = part * V::kRows;
        alignas(64) float scale[L::kSubs * V::kRows], minimum[F::kHasMin ? L::kSubs * V::kRows : 1];
        load_scales<F>(panel, sb, m, row, scale, minimum);
        typename V::Floats total[T];
        for (int t = 0; t < T; ++t) total[t] = V::load(result[t] + row);
        const uint8_t* lines = panel + header + sb * 8 * L::kLineBytes32 + 4 * row;
        for (int j = 0; j < m; ++j, lines += L::kLineBytes32) {
          if (part == 0)
            unroll<L::Codes::kLines>([&](auto i) { __builtin_prefetch(lines + kPrefetchBytes + i.value * kLineBytes); });
          typename V::Ints sum[T];
          unroll<2>([&](auto h) {  // sixteen columns each
            typename V::Ints part_sum[T];
            for (int t = 0; t < T; ++t) part_sum[t] = start_value<F>(x.neg_sums + (at + t) * 16, 2 * j + h.value);
            unroll<kGroups / 2>([&](auto g) {
              constexpr int kGroup = h.value * (kGroups / 2) + g.value;
              const auto w = operand<F, kGroup>(lines);
              for (int t = 0; t < T; ++t) {
                part_sum[t] = dot<F>(part_sum[t], w, V::splat4(x.codes + (at + t) * kSuperBlock + j * 32 + kGroup * 4));
              }
            });
            for (int t = 0; t < T; ++t) {
              const auto shifted = V::shift_left_by(part_sum[t], x.shifts + (at + t) * 16 + 2 * j + h.value);
              sum[t] = F::kSub == 16 || h.value == 0 ? shifted : V::add(sum[t], shifted);
              if constexpr (F::kSub == 16 || h.value == 1) {
                const int sub = F::kSub == 16 ? 2 * j + h.value : j;
                const auto x_scale = V::set1(x.scales[(at + t) * 8 + j]);
                total[t] = add_sub_block(total[t], sum[t], x_scale, V::load(scale + sub * V::kRows));
                if constexpr (F::kHasMin) {
                  total[t] = subtract_minimum<F>(total[t], x.neg_sums + (at + t) * 16, x.neg_sums32 + (at + t) * 8, sub,
                                                 x.shifts + (at + t) * 16, x_scale, V::load(minimum + sub * V::kRows));
                }
              }
            }
          });
        }
        for (int t = 0; t < T; ++t) V::store(result[t] + row, total[t]);
      }
    }
    for (int t = 0; t < T; ++t) {
      store_rows(task.out + (first_token + t) * task.out_stride + row0, result[t], task.n_rows - row0);
    }
  }
}

// One super-block of the rows of one register, unpacked: what the tile kernel reads from the first-level cache.
struct Expanded {
  alignas(64) uint8_t codes[kSuperBlock / 4][V::kRows * 4];
  alignas(64) float scale[kSuperBlock / 16][V::kRows], minimum[kSuperBlock / 16][V::kRows];
};

template <class F>
void expand(const uint8_t* panel, int64_t header, int64_t super_block, int n_blocks32, int row, Expanded& out) {
  using L = Layout<F>;
  load_scales<F>(panel, super_block, n_blocks32, row, out.scale[0], out.minimum[0]);
  const uint8_t* lines = panel + header + super_block * 8 * L::kLineBytes32 + 4 * row;
  for (int j = 0; j < n_blocks32; ++j, lines += L::kLineBytes32) {
    unroll<kGroups>([&](auto g) { V::store_bytes(out.codes[j * kGroups + g.value], operand<F, g.value>(lines)); });
  }
}

// R row registers x T tokens over one super-block; adds to out[token * out_stride + r * kRows].
template <class F, int R, int T>
PHI4EDGE_INLINE void matmul_tile(const Expanded* w, const Activations& x, int64_t at, int n_blocks32, float* out,
                                 int64_t out_stride) {
  typename V::Floats total[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) total[r][t] = V::load(out + t * out_stride + r * V::kRows);
  }
  const int8_t* codes = x.codes + at * kSuperBlock;
  const int32_t *shifts = x.shifts + at * 16, *neg_sums = x.neg_sums + at * 16;
  const float *scales = x.scales + at * 8, *neg_sums32 = x.neg_sums32 + at * 8;
  for (int j = 0; j < n_blocks32; ++j) {
    typename V::Ints sum[R][T];
    unroll<2>([&](auto h) {  // sixteen columns each
      const int sixteen = 2 * j + h.value, first_group = sixteen * (kGroups / 2);
      typename V::Ints part_sum[R][T];
      for (int t = 0; t < T; ++t) {
        const auto start = start_value<F>(neg_sums + t * 16, sixteen);
        for (int r = 0; r < R; ++r) part_sum[r][t] = start;
      }
      unroll<kGroups / 2>([&](auto g) {
        typename V::Bytes weights[R];
        for (int r = 0; r < R; ++r) weights[r] = V::load_bytes(w[r].codes[first_group + g.value]);
        for (int t = 0; t < T; ++t) {
          const auto a = V::splat4(codes + t * kSuperBlock + (first_group + g.value) * 4);
          for (int r = 0; r < R; ++r) part_sum[r][t] = dot<F>(part_sum[r][t], weights[r], a);
        }
      });
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
          const auto shifted = V::shift_left_by(part_sum[r][t], shifts + t * 16 + sixteen);
          sum[r][t] = F::kSub == 16 || h.value == 0 ? shifted : V::add(sum[r][t], shifted);
        }
      }
      if constexpr (F::kSub == 16 || h.value == 1) {
        const int sub = F::kSub == 16 ? sixteen : j;
        for (int t = 0; t < T; ++t) {
          const auto x_scale = V::set1(scales[t * 8 + j]);
          for (int r = 0; r < R; ++r) {
            total[r][t] = add_sub_block(total[r][t], sum[r][t], x_scale, V::load(w[r].scale[sub]));
            if constexpr (F::kHasMin) {
              total[r][t] = subtract_minimum<F>(total[r][t], neg_sums + t * 16, neg_sums32 + t * 8, sub, shifts + t * 16,
                                                x_scale, V::load(w[r].minimum[sub]));
            }
          }
        }
      }
    });
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) V::store(out + t * out_stride + r * V::kRows, total[r][t]);
  }
}

// Calls body.template operator()<T>(first) so that tiles of at most Max tokens cover n tokens.
template <int Max, class Body>
PHI4EDGE_INLINE void for_token_tiles(int64_t n, Body&& body) {
  int64_t first = 0;
  for (; first + Max <= n; first += Max) body(Index<Max>{}, first);
  unroll<Max - 1>([&](auto i) {
    if (n - first == i.value + 1) body(Index<i.value + 1>{}, first);
  });
}

constexpr int kTileRows = V::kTileParts * V::kRows;                                // rows of a tile
constexpr int kGroupPanels = kTileRows > kPanelRows ? kTileRows / kPanelRows : 1;  // panels that are computed together
constexpr int kGroupParts = kGroupPanels * kParts;

// Many tokens: a group of panels is unpacked once per super-block, then all tokens run over it.
template <class F>
void matmul_expanded(const MatmulTask& task) {
  using L = Layout<F>;
  const Activations& x = *task.x;
  const int64_t n_blocks32 = task.n_columns / 32, n_super = (n_blocks32 + 7) / 8;
  const int64_t header = L::header_bytes(task.n_columns);
  const int64_t n_panels = (task.n_rows + kPanelRows - 1) / kPanelRows;
  auto* expanded = static_cast<Expanded*>(task.scratch);
  auto* tile_out = reinterpret_cast<float*>(expanded + kGroupParts);  // [token][kGroupPanels * 16]
  constexpr int kOutStride = kGroupPanels * kPanelRows;
  const int64_t n_tiles = (x.n_tokens + V::kTileTokens - 1) / V::kTileTokens;
  for (int64_t panel0 = 0; panel0 < n_panels; panel0 += kGroupPanels) {
    const int n_group = int(n_panels - panel0 < kGroupPanels ? n_panels - panel0 : kGroupPanels);
    const uint8_t* panel = task.panels + size_t(panel0) * task.panel_bytes;
    std::memset(tile_out, 0, size_t(x.n_tokens) * kOutStride * sizeof(float));
    for (int64_t sb = 0; sb < n_super; ++sb) {
      const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
      for (int i = 0; i < n_group * kParts; ++i) {
        expand<F>(panel + size_t(i / kParts) * task.panel_bytes, header, sb, m, i % kParts * V::kRows, expanded[i]);
      }
      // The next super-block's lines are fetched a few at a time, spread over the tiles.
      const uint8_t* next = panel + header + (sb + 1) * 8 * L::kLineBytes32;
      const int64_t n_lines = 8 * L::Codes::kLines, per_tile = (n_lines + n_tiles - 1) / n_tiles;
      int64_t line = 0;
      const auto prefetch = [&] {
        for (int64_t i = 0; i < per_tile && line < n_lines; ++i, ++line) {
          for (int p = 0; p < n_group; ++p) __builtin_prefetch(next + size_t(p) * task.panel_bytes + line * kLineBytes);
        }
      };
      for_token_tiles<V::kTileTokens>(x.n_tokens, [&](auto tile, int64_t first) {
        prefetch();
        const int64_t at = sb * x.n_tokens + first;
        float* out = tile_out + first * kOutStride;
        int i = 0;
        for (; i + V::kTileParts <= n_group * kParts; i += V::kTileParts) {
          matmul_tile<F, V::kTileParts, tile.value>(expanded + i, x, at, m, out + i * V::kRows, kOutStride);
        }
        for (; i < n_group * kParts; ++i) matmul_tile<F, 1, tile.value>(expanded + i, x, at, m, out + i * V::kRows, kOutStride);
      });
    }
    for (int64_t t = 0; t < x.n_tokens; ++t) {
      for (int p = 0; p < n_group; ++p) {
        const int64_t row = (panel0 + p) * kPanelRows;
        store_rows(task.out + t * task.out_stride + row, tile_out + t * kOutStride + p * kPanelRows, task.n_rows - row);
      }
    }
  }
}

constexpr int64_t kDirectTokens = 4;  // up to here unpacking each time is cheaper than expanding

template <class F>
void matmul_quantized(const MatmulTask& task) {
  if (task.x->n_tokens > 2 * kDirectTokens) return matmul_expanded<F>(task);
  for_token_tiles<kDirectTokens>(task.x->n_tokens,
                                 [&](auto tile, int64_t first) { matmul_direct<F, tile.value>(task, first); });
}

template <class F>
void dequantize_panel_row(const uint8_t* panel, int row, int64_t n_columns, float* out) {
  using L = Layout<F>;
  const int64_t header = L::header_bytes(n_columns), n_blocks32 = n_columns / 32;
  const int part_row = row / V::kRows * V::kRows, lane = row % V::kRows;
  for (int64_t sb = 0; sb * 8 < n_blocks32; ++sb) {
    const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
    Expanded block;
    expand<F>(panel, header, sb, m, part_row, block);
    for (int i = 0; i < 32 * m; ++i) {
      const uint8_t code = block.codes[i / 4][4 * lane + i % 4];
      constexpr int kBits = L::kBiasBits;
      const int q = kBits >= 0 ? int(code) - (1 << (kBits < 0 ? 0 : kBits)) : F::kSigned ? int(int8_t(code)) : int(code);
      const int sub = i / F::kSub;
      out[sb * kSuperBlock + i] = block.scale[sub][lane] * float(q) - (F::kHasMin ? block.minimum[sub][lane] : 0.0f);
    }
  }
}

// ---------------------------------------------------------------- float weights; also keys and values of attention

// R registers x T inputs:  acc[r][t] += sum over k of w[k][r] * x[t][k].  Step k of register r lies at
// w + k * line_bytes + r / kParts * panel_bytes + r % kParts * (register).
template <class E, int R, int T>
PHI4EDGE_INLINE void float_tile(const uint8_t* w, int64_t line_bytes, int64_t panel_bytes, int64_t n_steps, const float* x,
                                int64_t x_stride, V::Floats (&acc)[R][T]) {
  constexpr int kRegisterBytes = V::kRows * int(sizeof(typename E::Block));
  for (int64_t k = 0; k < n_steps; ++k) {
    typename V::Floats weights[R];
    for (int r = 0; r < R; ++r) {
      weights[r] = E::template load<V>(w + k * line_bytes + r / kParts * panel_bytes + r % kParts * kRegisterBytes);
    }
    for (int t = 0; t < T; ++t) {
      const auto a = V::set1(x[t * x_stride + k]);
      for (int r = 0; r < R; ++r) acc[r][t] = V::fma(weights[r], a, acc[r][t]);
    }
  }
}

// R registers of rows, from register `first_register` of the panels on, for a tile of tokens.
template <class E, int R, int T>
PHI4EDGE_INLINE void float_rows(const MatmulTask& task, int64_t first_register, int64_t first_token) {
  static_assert(R % kParts == 0 || kParts % R == 0, "a tile starts where a panel does, or stays within one");
  constexpr int64_t kRegisterBytes = V::kRows * sizeof(typename E::Block), kLine = kPanelRows * sizeof(typename E::Block);
  const Activations& x = *task.x;
  const auto panel_bytes = int64_t(task.panel_bytes);
  typename V::Floats acc[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) acc[r][t] = V::set1(0.0f);
  }
  const uint8_t* w = task.panels + first_register / kParts * panel_bytes + first_register % kParts * kRegisterBytes;
  float_tile<E, R, T>(w, kLine, panel_bytes, task.n_columns, x.values + first_token * x.value_stride, x.value_stride, acc);
  for (int r = 0; r < R; ++r) {
    const int64_t row = (first_register + r) * V::kRows, n_rows = task.n_rows - row;
    for (int t = 0; t < T; ++t) {
      float* out = task.out + (first_token + t) * task.out_stride + row;
      alignas(64) float lanes[V::kRows];
      V::store(lanes, acc[r][t]);
      for (int64_t i = 0; i < V::kRows && i < n_rows; ++i) out[i] = lanes[i];
    }
  }
}

template <class E>
void matmul_float(const MatmulTask& task) {
  // Sums side by side hide the latency of a fused multiply-add; with several tokens there are more anyway.
  constexpr int kRegisters = V::kRows < kPanelRows ? 4 : 2;  // few panels at a time: each is a stream of its own
  const int64_t n_registers = (task.n_rows + kPanelRows - 1) / kPanelRows * kParts;
  for (int64_t begin = 0; begin < n_registers; begin += kRegisters) {
    const int64_t end = begin + kRegisters < n_registers ? begin + kRegisters : n_registers;
    for_token_tiles<V::kTileTokens>(task.x->n_tokens, [&](auto tile, int64_t token) {
      constexpr int T = tile.value, R = T == 1 ? kRegisters : V::kTileParts;
      int64_t i = begin;
      for (; i + R <= end; i += R) float_rows<E, R, T>(task, i, token);
      for (; i < end; ++i) float_rows<E, 1, T>(task, i, token);
    });
  }
}

template <class E>
void dequantize_float_row(const uint8_t* panel, int row, int64_t n_columns, float* out) {
  for (int64_t column = 0; column < n_columns; ++column) {
    typename E::Block value;
    std::memcpy(&value, panel + size_t(column * kPanelRows + row) * sizeof value, sizeof value);
    alignas(64) typename E::Block lanes[kPanelRows] = {};
    lanes[0] = value;
    alignas(64) float wide[V::kRows];
    V::store(wide, E::template load<V>(lanes));
    out[column] = wide[0];
  }
}

// ---------------------------------------------------------------- element-wise

// e^x for x <= 88; relative error below 2e-7; zero far below.  Range reduction by powers of two, then a polynomial of degree 6.
PHI4EDGE_INLINE V::Floats exp(V::Floats x) {
  x = V::max(V::set1(-87.0f), x);  // in this order a NaN stays one
  const auto n = V::round(V::mul(x, V::set1(1.44269504f)));
  const auto nf = V::to_float(n);
  auto r = V::fma(nf, V::set1(-0.693359375f), x);
  r = V::fma(nf, V::set1(2.12194440e-4f), r);
  auto p = V::set1(1.0f / 720);
  p = V::fma(p, r, V::set1(1.0f / 120));
  p = V::fma(p, r, V::set1(1.0f / 24));
  p = V::fma(p, r, V::set1(1.0f / 6));
  p = V::fma(p, r, V::set1(0.5f));
  p = V::fma(p, r, V::set1(1.0f));
  p = V::fma(p, r, V::set1(1.0f));
  return V::as_floats(V::add(V::as_ints(p), V::shift_left(n, 23)));
}

// x / (1 + e^-x) * up, with -x held below the overflow of exp().
PHI4EDGE_INLINE V::Floats silu_times(V::Floats x, V::Floats up) {
  const auto zero = V::set1(0.0f);
  const auto minus = V::sub(zero, V::max(x, V::set1(-87.0f)));
  return V::mul(V::div(x, V::add(V::set1(1.0f), exp(minus))), up);
}

void silu_multiply(const float* gate, const float* up, int64_t n_values, float* out) {
  int64_t i = 0;
  for (; i + V::kRows <= n_values; i += V::kRows) V::store(out + i, silu_times(V::load(gate + i), V::load(up + i)));
  if (i == n_values) return;
  alignas(64) float tail[2][V::kRows] = {};
  for (int64_t j = i; j < n_values; ++j) tail[0][j - i] = gate[j], tail[1][j - i] = up[j];
  V::store(tail[0], silu_times(V::load(tail[0]), V::load(tail[1])));
  for (int64_t j = i; j < n_values; ++j) out[j] = tail[0][j - i];
}

void to_half(const float* x, int64_t n_values, uint16_t* out) {
  int64_t i = 0;
  for (; i + V::kRows <= n_values; i += V::kRows) V::store_half(out + i, V::load(x + i));
  for (; i < n_values; ++i) {
    alignas(64) float lanes[V::kRows] = {x[i]};
    alignas(64) uint16_t halves[V::kRows];
    V::store_half(halves, V::load(lanes));
    out[i] = halves[0];
  }
}

// The bits of the largest magnitude of 16 values.  Magnitudes are in the order of their bits, and infinities and NaN, which
// comparisons of floats would lose, come last.
PHI4EDGE_INLINE int32_t largest16(const float* in) {
  auto largest = V::set1(0);
  for (int i = 0; i < 16; i += V::kRows) largest = V::max(largest, V::magnitude_bits(V::load(in + i)));
  return V::reduce_max(largest);
}

// 32 values to codes.  What is not finite makes the scale NaN, and so reaches the logits, where it is noticed.
PHI4EDGE_INLINE void quantize32(const float* in, int8_t* codes, float& scale, int32_t* shifts, int32_t* neg_sums,
                                float& neg_sum32) {
  constexpr int32_t kInfinity = 0x7f800000, kNan = 0x7fc00000, kTiny = 0x0da24260;  // kTiny: 1e-30, its reciprocal is finite
  const int32_t bits16[2] = {largest16(in), largest16(in + 16)};
  const int32_t bits32 = bits16[0] > bits16[1] ? bits16[0] : bits16[1];
  if (bits32 < kTiny || bits32 >= kInfinity) {
    const int32_t bits = bits32 < kTiny ? 0 : kNan;
    std::memset(codes, 0, 32);
    std::memcpy(&scale, &bits, 4);
    neg_sum32 = scale;
    shifts[0] = shifts[1] = 0, neg_sums[0] = neg_sums[1] = 0;
    return;
  }
  float max32;
  std::memcpy(&max32, &bits32, 4);
  const float inverse = 127.0f / max32;
  int32_t sum32 = 0;
  for (int half = 0; half < 2; ++half) {
    const int ratio = (bits32 - bits16[half]) >> 23;  // floor(log2(max32 / max16))
    const int e = ratio < 7 ? ratio : 7;
    const auto factor = V::set1(inverse * float(1 << e));
    auto sum = V::set1(0);
    for (int i = 16 * half; i < 16 * half + 16; i += V::kRows) {
      const auto q = V::round(V::mul(V::load(in + i), factor));
      V::store_codes(codes + i, q);
      sum = V::add(sum, q);
    }
    shifts[half] = 7 - e;
    neg_sums[half] = -V::reduce_sum(sum);
    sum32 += neg_sums[half] * (1 << shifts[half]);
  }
  scale = max32 * (1.0f / (127.0f * 128.0f));
  neg_sum32 = float(sum32) * scale;
}

void quantize(const float* x, int64_t n_columns, int64_t n_tokens, const MutableActivations& out) {
  const int64_t n_super = (n_columns + kSuperBlock - 1) / kSuperBlock;
  for (int64_t sb = 0; sb < n_super; ++sb) {
    const int64_t at = sb * n_tokens;
    for (int j = 0; j < 8; ++j) {
      const int64_t first = sb * kSuperBlock + 32 * j, n_left = n_columns - first;
      alignas(64) float padded[32] = {};
      const float* in = x + first;
      if (n_left < 32) {  // beyond the last column
        if (n_left > 0) std::memcpy(padded, in, size_t(n_left) * sizeof(float));
        in = padded;
      }
      quantize32(in, out.codes + at * kSuperBlock + 32 * j, out.scales[at * 8 + j], out.shifts + at * 16 + 2 * j,
                 out.neg_sums + at * 16 + 2 * j, out.neg_sums32[at * 8 + j]);
    }
  }
}

// ---------------------------------------------------------------- attention

constexpr int kKeyBlock = 128;  // keys whose scores are held at once; blocks start at multiples of it, so that a query's
                                // result does not depend on how the prompt was cut

// Scores of one key block: scores[query][key] = q . k
template <class E>
PHI4EDGE_INLINE void key_scores(const AttentionTask& task, int64_t first_key, int n_keys, float* scores) {
  const int64_t line = kPanelRows * sizeof(typename E::Block), panel_bytes = line * task.head_dim;
  const auto* keys = static_cast<const uint8_t*>(task.keys) + first_key / kPanelRows * panel_bytes;
  constexpr int R = V::kTileParts;
  const int n_parts = (n_keys + V::kRows - 1) / V::kRows;
  for_token_tiles<V::kTileTokens>(task.n_queries, [&](auto tile, int64_t first) {
    constexpr int T = tile.value;
    const auto run = [&](auto registers, int part) {
      constexpr int N = registers.value;
      typename V::Floats acc[N][T];
      for (int r = 0; r < N; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t] = V::set1(0.0f);
      }
      const uint8_t* w = keys + part / kParts * panel_bytes + part % kParts * V::kRows * int(sizeof(typename E::Block));
      float_tile<E, N, T>(w, line, panel_bytes, task.head_dim, task.queries + first * task.query_stride, task.query_stride,
                          acc);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < N; ++r) V::store(scores + (first + t) * kKeyBlock + (part + r) * V::kRows, acc[r][t]);
      }
    };
    // Several registers at a time only where they start a panel, or are whole panels.
    int part = 0;
    if constexpr (R % kParts == 0) {
      for (; part + R <= n_parts; part += R) run(Index<R>{}, part);
    }
    for (; part < n_parts; ++part) run(Index<1>{}, part);
  });
}

// out[query][dim] += sum over keys of weight[query][key] * value[key][dim]
template <class E>
PHI4EDGE_INLINE void add_values(const AttentionTask& task, int64_t first_key, int n_keys, const float* weights, float* out) {
  const int64_t line = task.value_dim * int64_t(sizeof(typename E::Block)),
                panel_bytes = kPanelRows * sizeof(typename E::Block);
  const auto* values = static_cast<const uint8_t*>(task.values) + first_key * line;
  constexpr int R = V::kTileParts;
  const int n_parts = task.value_dim / V::kRows;
  for_token_tiles<V::kTileTokens>(task.n_queries, [&](auto tile, int64_t first) {
    constexpr int T = tile.value;
    const auto run = [&](auto registers, int part) {
      constexpr int N = registers.value;
      typename V::Floats acc[N][T];
      float* to = out + first * task.value_dim + part * V::kRows;
      for (int r = 0; r < N; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t] = V::load(to + t * task.value_dim + r * V::kRows);
      }
      const uint8_t* w = values + part / kParts * panel_bytes + part % kParts * V::kRows * int(sizeof(typename E::Block));
      float_tile<E, N, T>(w, line, panel_bytes, n_keys, weights + first * kKeyBlock, kKeyBlock, acc);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < N; ++r) V::store(to + t * task.value_dim + r * V::kRows, acc[r][t]);
      }
    };
    int part = 0;
    if constexpr (R % kParts == 0) {
      for (; part + R <= n_parts; part += R) run(Index<R>{}, part);
    }
    for (; part < n_parts; ++part) run(Index<1>{}, part);
  });
}

// Softmax with a running maximum (Milakov and Gimelshein, 2018), so that no full row of scores is ever held.
template <class E>
void attention(const AttentionTask& task) {
  const int n = task.n_queries;
  auto* scores = static_cast<float*>(task.scratch);  // [query][kKeyBlock]
  float* acc = scores + n * kKeyBlock;               // [query][value_dim]
  float *maximum = acc + n * task.value_dim, *sum = maximum + n;
  constexpr float kNone = -3.0e38f;
  int64_t first = task.first_key[0], last = task.last_key[0];
  for (int i = 0; i < n; ++i) {
    maximum[i] = kNone, sum[i] = 0;
    first = task.first_key[i] < first ? task.first_key[i] : first;
    last = task.last_key[i] > last ? task.last_key[i] : last;
  }
  std::memset(acc, 0, size_t(n) * task.value_dim * sizeof(float));
  for (int64_t key0 = first / kKeyBlock * kKeyBlock; key0 <= last; key0 += kKeyBlock) {
    const int n_keys = int(last - key0 + 1 < kKeyBlock ? last - key0 + 1 : kKeyBlock);
    key_scores<E>(task, key0, n_keys, scores);
    for (int i = 0; i < n; ++i) {
      float* s = scores + i * kKeyBlock;
      const int64_t from = task.first_key[i] - key0, to = task.last_key[i] - key0;  // visible: from .. to
      const int padded = (n_keys + V::kRows - 1) / V::kRows * V::kRows;
      for (int64_t k = 0; k < from && k < padded; ++k) s[k] = kNone;
      for (int64_t k = to < 0 ? 0 : to + 1; k < padded; ++k) s[k] = kNone;
      auto m = V::set1(maximum[i]);
      for (int k = 0; k < padded; k += V::kRows) m = V::max(m, V::load(s + k));
      const float new_maximum = V::reduce_max(m);
      if (new_maximum == kNone) {  // nothing visible yet
        std::memset(s, 0, size_t(padded) * sizeof(float));
        continue;
      }
      if (new_maximum > maximum[i]) {
        alignas(64) float lane[V::kRows];
        V::store(lane, exp(V::set1(maximum[i] - new_maximum)));
        const float factor = maximum[i] == kNone ? 0.0f : lane[0];
        sum[i] *= factor;
        float* row = acc + i * task.value_dim;
        for (int d = 0; d < task.value_dim; ++d) row[d] *= factor;
        maximum[i] = new_maximum;
      }
      auto total = V::set1(0.0f);
      for (int k = 0; k < padded; k += V::kRows) {
        const auto p = exp(V::sub(V::load(s + k), V::set1(new_maximum)));
        V::store(s + k, p);
      }
      for (int64_t k = 0; k < from && k < padded; ++k) s[k] = 0;  // exp() does not reach zero
      for (int64_t k = to < 0 ? 0 : to + 1; k < padded; ++k) s[k] = 0;
      for (int k = 0; k < padded; k += V::kRows) total = V::add(total, V::load(s + k));
      sum[i] += V::reduce_sum(total);
    }
    add_values<E>(task, key0, n_keys, scores, acc);
  }
  for (int i = 0; i < n; ++i) {
    const float inverse = 1.0f / sum[i];
    for (int d = 0; d < task.head_dim; ++d) task.out[i * task.out_stride + d] = acc[i * task.value_dim + d] * inverse;
  }
}

size_t matmul_scratch_bytes(int64_t n_tokens) {
  return kGroupParts * sizeof(Expanded) + size_t(n_tokens) * kGroupPanels * kPanelRows * sizeof(float);
}

size_t attention_scratch_bytes(int n_queries, int value_dim) {
  return size_t(n_queries) * (kKeyBlock + value_dim + 2) * sizeof(float);
}

constexpr KernelTable make_table(const char* name) {
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
  table.quantize = quantize;
  table.attention_f16 = attention<F16>;
  table.attention_f32 = attention<F32>;
  table.silu_multiply = silu_multiply;
  table.to_half = to_half;
  table.matmul_scratch_bytes = matmul_scratch_bytes;
  table.attention_scratch_bytes = attention_scratch_bytes;
  return table;
}

}  // namespace
}  // namespace phi4edge

// The one symbol of an instruction set's object file.
#define PHI4EDGE_DEFINE_KERNELS(isa)                    \
  namespace phi4edge {                                  \
  extern const KernelTable k_kernels_##isa;             \
  const KernelTable k_kernels_##isa = make_table(#isa); \
  }
