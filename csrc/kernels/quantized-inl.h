// Products of quantised weights and quantised activations.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

template <class F>
struct Layout {
  using Codes = typename F::Codes;
  static constexpr int kSubs = kSuperBlock / F::kSub;
  static constexpr int kLineBytes32 = Codes::kLines * kLineBytes;                   // codes of 32 columns
  static constexpr int kScaleBytes256 = kSuperBlock / F::kValues * F::kScaleBytes;  // scales of a super-block
  // One scale of the activations for a super-block, or for 32 columns.
  static constexpr bool kOneScale = F::kValues == kSuperBlock;
  static constexpr int kXScales = kOneScale ? 1 : 8;
  static const QuantizedActivations& activations(const Activations& x) {
    return x.quantized[int(kOneScale ? ActivationScale::kFor256 : ActivationScale::kFor32)];
  }
  // Integer scales of so few bits that a code times its scale is a byte: the sum over a super-block is one of integers.
  static constexpr bool kIntegerScales = requires { typename F::IntegerScales; };

  static int64_t header_bytes(int64_t n_columns) {
    return (n_columns / F::kValues * F::kScaleBytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  }
};

// What is multiplied with the activations: codes as they are stored.
template <class F>
struct StoredCodes {
  static constexpr bool kSigned = F::kSigned;
  // Signed codes meet instructions that want unsigned ones with a bias; others carry an offset of their own.
  static constexpr int kBiasBits = kSigned ? V::kSignedBiasBits : F::kOffsetBits;
};
// Or their products with integer scales, without any offset.
template <class F>
struct ScaledCodes {
  static constexpr bool kSigned = F::IntegerScales::kSigned;
  static constexpr int kBiasBits = kSigned ? V::kSignedBiasBits : -1;
};

// The scales of a super-block, for the rows of one register.
template <class F>
struct Scales {
  alignas(64) float scale[Layout<F>::kSubs][V::kRows], minimum[F::kHasMin ? Layout<F>::kSubs : 1][V::kRows];

  PHI4EDGE_INLINE void load(const uint8_t* header, int64_t super_block, int n_blocks32, int row) {
    if constexpr (F::kValues == kSuperBlock) {
      F::template scales<V>(header + super_block * F::kScaleBytes, row, scale[0], minimum[0]);
    } else {
      const uint8_t* area = header + super_block * (kSuperBlock / F::kValues) * F::kScaleBytes;
      for (int j = 0; j < n_blocks32; ++j, area += F::kScaleBytes) {
        F::template scales<V>(area, row, scale[j], minimum[F::kHasMin ? j : 0]);
      }
    }
  }
};
template <class F>
  requires Layout<F>::kIntegerScales
struct Scales<F> {
  alignas(64) int32_t factor[Layout<F>::kSubs][V::kRows];  // 16-bit integers; the upper half of each is zero
  alignas(64) float scale[V::kRows], minimum[F::kHasMin ? Layout<F>::kSubs : 1][V::kRows];

  PHI4EDGE_INLINE void load(const uint8_t* header, int64_t super_block, int, int row) {
    F::IntegerScales::template load<V>(header + super_block * F::kScaleBytes, row, factor[0], scale, minimum[0]);
  }
};

// One operand of dot().
template <class F, int G>
PHI4EDGE_INLINE V::Bytes operand(const uint8_t* lines) {
  auto codes = F::Codes::template group<V, G>(lines);
  if constexpr (requires { F::kTable; }) codes = V::lookup(codes, F::kTable);
  if constexpr (F::kSigned) codes = V::bias(codes);
  return codes;
}

template <class C>
PHI4EDGE_INLINE V::Ints dot(V::Ints sum, V::Bytes weights, V::Bytes x) {
  if constexpr (C::kSigned) {
    return V::dot_signed(sum, weights, x);
  } else {
    return V::dot(sum, weights, x);
  }
}

// What takes the codes' offset back: -offset * sum of 16 activation codes.
template <class C>
PHI4EDGE_INLINE V::Ints start_value(const int32_t* neg_sums, int sixteen) {
  if constexpr (C::kBiasBits < 0) {
    return V::set1(0);
  } else {
    return V::shift_left(V::set1(neg_sums[sixteen]), C::kBiasBits);
  }
}

// Adds the products of one sub-block to the total of a super-block, which counts in the scale of its activations if they have
// one.  The order of operations is that of every kernel, so a token's result does not depend on how many tokens are computed
// together.
template <class F>
PHI4EDGE_INLINE V::Floats add_sub_block(V::Floats total, V::Ints sum, V::Floats scale, const float* x_scale) {
  if constexpr (Layout<F>::kOneScale) {
    return V::fma(V::to_float(sum), scale, total);
  } else {
    return V::fma(V::mul(V::to_float(sum), V::set1(*x_scale)), scale, total);
  }
}
template <class F>
PHI4EDGE_INLINE V::Floats add_super_block(V::Floats result, V::Floats total, const float* x_scale) {
  if constexpr (Layout<F>::kOneScale) {
    return V::fma(total, V::set1(*x_scale), result);
  } else {
    return V::add(total, result);
  }
}
template <class F>
PHI4EDGE_INLINE V::Floats subtract_minimum(V::Floats total, const int32_t* neg_sums, const float* neg_sums32, int sub,
                                           const int32_t* shifts, V::Floats minimum) {
  if constexpr (F::kSub == 16) {
    return V::fma(V::to_float(V::shift_left_by(V::set1(neg_sums[sub]), shifts + sub)), minimum, total);
  } else {
    return V::fma(V::set1(neg_sums32[sub]), minimum, total);
  }
}

PHI4EDGE_INLINE void store_rows(float* out, const float* from, int64_t n_rows, const MatmulTask& task) {
  if (n_rows > kPanelRows) n_rows = kPanelRows;
  if (task.adds) {
    for (int64_t row = 0; row < n_rows; ++row) out[row] += task.factor * from[row];
  } else if (n_rows == kPanelRows) {
    std::memcpy(out, from, kPanelRows * sizeof(float));
  } else {
    for (int64_t row = 0; row < n_rows; ++row) out[row] = from[row];
  }
}

// To the second-level cache: the first takes too few lines at a time to keep the memory busy.
template <int Bytes>
PHI4EDGE_INLINE void fetch(const uint8_t* from) {
  for (int i = 0; i < Bytes; i += kLineBytes) __builtin_prefetch(from + i, 0, 2);
}

// Few tokens: weights are unpacked in registers and used at once; bound by memory.
template <class F, int T>
void matmul_direct(const MatmulTask& task, int64_t first_token) {
  using L = Layout<F>;
  using C = StoredCodes<F>;
  const QuantizedActivations& x = L::activations(*task.x);
  const int64_t n_blocks32 = task.n_columns / 32, n_super = (n_blocks32 + 7) / 8, n_tokens = task.x->n_tokens;
  const int64_t header = L::header_bytes(task.n_columns);
  for (int64_t row0 = 0; row0 < task.n_rows; row0 += kPanelRows) {
    const uint8_t* panel = task.panels + size_t(row0 / kPanelRows) * task.panel_bytes;
    alignas(64) float result[T][kPanelRows] = {};
    for (int64_t sb = 0; sb < n_super; ++sb) {
      const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
      const int64_t at = sb * n_tokens + first_token;
      for (int part = 0; part < kParts; ++part) {
        const int row = part * V::kRows;
        Scales<F> scales;
        scales.load(panel, sb, m, row);
        typename V::Floats total[T];
        typename V::Ints integer_total[T];
        for (int t = 0; t < T; ++t) total[t] = V::set1(0.0f), integer_total[t] = V::set1(0);
        const uint8_t* lines = panel + header + sb * 8 * L::kLineBytes32 + 4 * row;
        const uint8_t* ahead = panel + kPrefetchBytes + sb * (int64_t(task.panel_bytes) / n_super);
        if (part == 0) fetch<L::kScaleBytes256>(ahead + 8 * L::kLineBytes32);
        for (int j = 0; j < m; ++j, lines += L::kLineBytes32) {
          if (part == 0) fetch<L::kLineBytes32>(ahead + j * L::kLineBytes32);
          typename V::Ints sum[T];
          unroll<2>([&](auto h) {  // sixteen columns each
            typename V::Ints part_sum[T];
            const int sixteen = 2 * j + h.value;
            for (int t = 0; t < T; ++t) part_sum[t] = start_value<C>(x.neg_sums + (at + t) * 16, sixteen);
            unroll<kGroups / 2>([&](auto g) {
              constexpr int kGroup = h.value * (kGroups / 2) + g.value;
              const auto w = operand<F, kGroup>(lines);
              for (int t = 0; t < T; ++t) {
                part_sum[t] = dot<C>(part_sum[t], w, V::splat4(x.codes + (at + t) * kSuperBlock + j * 32 + kGroup * 4));
              }
            });
            for (int t = 0; t < T; ++t) {
              const int32_t *shifts = x.shifts + (at + t) * 16, *neg_sums = x.neg_sums + (at + t) * 16;
              const float *neg_sums32 = x.neg_sums32 + (at + t) * 8, *x_scales = x.scales + (at + t) * L::kXScales;
              if constexpr (L::kIntegerScales) {
                const auto scaled = V::multiply16(part_sum[t], V::load_ints(scales.factor[sixteen]));
                integer_total[t] = V::add(integer_total[t], V::shift_left_by(scaled, shifts + sixteen));
              } else {
                const auto shifted = V::shift_left_by(part_sum[t], shifts + sixteen);
                sum[t] = F::kSub == 16 || h.value == 0 ? shifted : V::add(sum[t], shifted);
              }
              if constexpr (F::kSub == 16 || h.value == 1) {
                const int sub = F::kSub == 16 ? sixteen : j;
                if constexpr (!L::kIntegerScales) {
                  total[t] = add_sub_block<F>(total[t], sum[t], V::load(scales.scale[sub]), x_scales + j % L::kXScales);
                }
                if constexpr (F::kHasMin) {
                  total[t] = subtract_minimum<F>(total[t], neg_sums, neg_sums32, sub, shifts, V::load(scales.minimum[sub]));
                }
              }
            }
          });
        }
        for (int t = 0; t < T; ++t) {
          const float* x_scale = x.scales + (at + t) * L::kXScales;
          if constexpr (L::kIntegerScales) {
            total[t] = add_sub_block<F>(total[t], integer_total[t], V::load(scales.scale), x_scale);
          }
          V::store(result[t] + row, add_super_block<F>(V::load(result[t] + row), total[t], x_scale));
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      store_rows(task.out + (first_token + t) * task.out_stride + row0, result[t], task.n_rows - row0, task);
    }
  }
}

// One super-block of the rows of one register, unpacked: what the tile kernel reads from the first-level cache.
template <class F>
struct Expanded {
  using Kind = std::conditional_t<Layout<F>::kIntegerScales, ScaledCodes<F>, StoredCodes<F>>;
  alignas(64) uint8_t codes[kSuperBlock / 4][V::kRows * 4];
  Scales<F> scales;
};
constexpr size_t kMaxExpandedBytes = (kSuperBlock / 4 + 2 * (kSuperBlock / 16) + 1) * V::kRows * 4 + 4 * 64;

template <class F>
void expand(const uint8_t* panel, int64_t header, int64_t super_block, int n_blocks32, int row, Expanded<F>& out) {
  using L = Layout<F>;
  out.scales.load(panel, super_block, n_blocks32, row);
  const uint8_t* lines = panel + header + super_block * 8 * L::kLineBytes32 + 4 * row;
  for (int j = 0; j < n_blocks32; ++j, lines += L::kLineBytes32) {
    unroll<kGroups>([&](auto g) {
      auto codes = operand<F, g.value>(lines);
      if constexpr (L::kIntegerScales) {
        const auto factor = V::load_ints(out.scales.factor[2 * j + g.value / (kGroups / 2)]);
        codes = V::multiply_bytes(codes, factor, F::kOffsetBits);
        if constexpr (Expanded<F>::Kind::kSigned) codes = V::bias(codes);
      }
      V::store_bytes(out.codes[j * kGroups + g.value], codes);
    });
  }
}

// R row registers x T tokens over one super-block; adds to out[token * out_stride + r * kRows].
template <class F, int R, int T>
PHI4EDGE_INLINE void matmul_tile(const Expanded<F>* w, const QuantizedActivations& x, int64_t at, int n_blocks32, float* out,
                                 int64_t out_stride) {
  using L = Layout<F>;
  using C = typename Expanded<F>::Kind;
  typename V::Floats total[R][T];
  typename V::Ints sum[R][T];  // of a sub-block; with integer scales of the super-block
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) total[r][t] = V::set1(0.0f), sum[r][t] = V::set1(0);
  }
  const int8_t* codes = x.codes + at * kSuperBlock;
  const int32_t *shifts = x.shifts + at * 16, *neg_sums = x.neg_sums + at * 16;
  const float *neg_sums32 = x.neg_sums32 + at * 8, *x_scales = x.scales + at * L::kXScales;
  for (int j = 0; j < n_blocks32; ++j) {
    unroll<2>([&](auto h) {  // sixteen columns each
      const int sixteen = 2 * j + h.value, first_group = sixteen * (kGroups / 2);
      typename V::Ints part_sum[R][T];
      for (int t = 0; t < T; ++t) {
        const auto start = start_value<C>(neg_sums + t * 16, sixteen);
        for (int r = 0; r < R; ++r) part_sum[r][t] = start;
      }
      unroll<kGroups / 2>([&](auto g) {
        typename V::Bytes weights[R];
        for (int r = 0; r < R; ++r) weights[r] = V::load_bytes(w[r].codes[first_group + g.value]);
        for (int t = 0; t < T; ++t) {
          const auto a = V::splat4(codes + t * kSuperBlock + (first_group + g.value) * 4);
          for (int r = 0; r < R; ++r) part_sum[r][t] = dot<C>(part_sum[r][t], weights[r], a);
        }
      });
      constexpr bool kStarts = !L::kIntegerScales && (F::kSub == 16 || h.value == 0);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
          const auto shifted = V::shift_left_by(part_sum[r][t], shifts + t * 16 + sixteen);
          sum[r][t] = kStarts ? shifted : V::add(sum[r][t], shifted);
        }
      }
      if constexpr (F::kSub == 16 || h.value == 1) {
        const int sub = F::kSub == 16 ? sixteen : j;
        for (int t = 0; t < T; ++t) {
          for (int r = 0; r < R; ++r) {
            if constexpr (!L::kIntegerScales) {
              total[r][t] = add_sub_block<F>(total[r][t], sum[r][t], V::load(w[r].scales.scale[sub]),
                                             x_scales + t * L::kXScales + j % L::kXScales);
            }
            if constexpr (F::kHasMin) {
              total[r][t] = subtract_minimum<F>(total[r][t], neg_sums + t * 16, neg_sums32 + t * 8, sub, shifts + t * 16,
                                                V::load(w[r].scales.minimum[sub]));
            }
          }
        }
      }
    });
  }
  for (int t = 0; t < T; ++t) {
    const float* x_scale = x_scales + t * L::kXScales;
    for (int r = 0; r < R; ++r) {
      if constexpr (L::kIntegerScales) {
        total[r][t] = add_sub_block<F>(total[r][t], sum[r][t], V::load(w[r].scales.scale), x_scale);
      }
      float* to = out + t * out_stride + r * V::kRows;
      V::store(to, add_super_block<F>(V::load(to), total[r][t], x_scale));
    }
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
  const QuantizedActivations& x = L::activations(*task.x);
  const int64_t n_blocks32 = task.n_columns / 32, n_super = (n_blocks32 + 7) / 8, n_tokens = task.x->n_tokens;
  const int64_t header = L::header_bytes(task.n_columns);
  const int64_t n_panels = (task.n_rows + kPanelRows - 1) / kPanelRows;
  static_assert(sizeof(Expanded<F>) <= kMaxExpandedBytes);
  auto* expanded = static_cast<Expanded<F>*>(task.scratch);
  auto* tile_out = reinterpret_cast<float*>(expanded + kGroupParts);  // [token][kGroupPanels * 16]
  constexpr int kOutStride = kGroupPanels * kPanelRows;
  const int64_t n_tiles = (n_tokens + V::kTileTokens - 1) / V::kTileTokens;
  for (int64_t panel0 = 0; panel0 < n_panels; panel0 += kGroupPanels) {
    const int n_group = int(n_panels - panel0 < kGroupPanels ? n_panels - panel0 : kGroupPanels);
    const uint8_t* panel = task.panels + size_t(panel0) * task.panel_bytes;
    std::memset(tile_out, 0, size_t(n_tokens) * kOutStride * sizeof(float));
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
      for_token_tiles<V::kTileTokens>(n_tokens, [&](auto tile, int64_t first) {
        prefetch();
        const int64_t at = sb * n_tokens + first;
        float* out = tile_out + first * kOutStride;
        int i = 0;
        for (; i + V::kTileParts <= n_group * kParts; i += V::kTileParts) {
          matmul_tile<F, V::kTileParts, tile.value>(expanded + i, x, at, m, out + i * V::kRows, kOutStride);
        }
        for (; i < n_group * kParts; ++i) matmul_tile<F, 1, tile.value>(expanded + i, x, at, m, out + i * V::kRows, kOutStride);
      });
    }
    for (int64_t t = 0; t < n_tokens; ++t) {
      for (int p = 0; p < n_group; ++p) {
        const int64_t row = (panel0 + p) * kPanelRows;
        store_rows(task.out + t * task.out_stride + row, tile_out + t * kOutStride + p * kPanelRows, task.n_rows - row, task);
      }
    }
  }
}

constexpr int64_t kMaxDirectTokens = 8;  // up to here unpacking each time is cheaper than expanding

template <class F>
void matmul_quantized(const MatmulTask& task) {
  if (task.x->n_tokens > kMaxDirectTokens) return matmul_expanded<F>(task);
  for_token_tiles<V::kDirectTokens>(task.x->n_tokens,
                                    [&](auto tile, int64_t first) { matmul_direct<F, tile.value>(task, first); });
}

template <class F>
void dequantize_panel_row(const uint8_t* panel, int row, int64_t n_columns, float* out) {
  using L = Layout<F>;
  const int64_t header = L::header_bytes(n_columns), n_blocks32 = n_columns / 32;
  const int part_row = row / V::kRows * V::kRows, lane = row % V::kRows;
  for (int64_t sb = 0; sb * 8 < n_blocks32; ++sb) {
    const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
    Expanded<F> block;
    expand<F>(panel, header, sb, m, part_row, block);
    for (int i = 0; i < 32 * m; ++i) {
      const uint8_t code = block.codes[i / 4][4 * lane + i % 4];
      using C = typename Expanded<F>::Kind;
      const int q = C::kBiasBits >= 0 ? int(code) - (1 << (C::kBiasBits < 0 ? 0 : C::kBiasBits))
                    : C::kSigned      ? int(int8_t(code))
                                      : int(code);
      const int sub = i / F::kSub;
      float scale;
      if constexpr (L::kIntegerScales) {
        scale = block.scales.scale[lane];
      } else {
        scale = block.scales.scale[sub][lane];
      }
      out[sb * kSuperBlock + i] = scale * float(q) - (F::kHasMin ? block.scales.minimum[F::kHasMin ? sub : 0][lane] : 0.0f);
    }
  }
}

}  // namespace
}  // namespace phi4edge
