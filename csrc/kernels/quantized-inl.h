// Products of quantised weights and quantised activations.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

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
      store_rows(task.out + (first_token + t) * task.out_stride + row0, result[t], task.n_rows - row0, task);
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
        store_rows(task.out + t * task.out_stride + row, tile_out + t * kOutStride + p * kPanelRows, task.n_rows - row, task);
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

}  // namespace
}  // namespace phi4edge
