// Products for many tokens: weights are unpacked to the first-level cache, for tiles of rows and tokens; also single rows.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

// One super-block of the rows of one register, unpacked: what the tile kernel reads from the first-level cache.
template <class F>
struct Expanded {
  using L = Layout<F>;
  using Kind = std::conditional_t<L::kIntegerScales, ScaledCodes<F>, StoredCodes<F>>;
  alignas(64) uint8_t codes[kSuperBlock / 4][V::kRows * 4];
  alignas(64) float scale[L::kSubs][V::kRows];  // of the sub-blocks, where they are not in the codes
  alignas(64) float minimum[L::kOneScale ? 1 : L::kSubs][V::kRows];
  alignas(64) float super_scale[V::kRows];
  Minimums<F> minimums;
};
constexpr size_t kMaxExpandedBytes = (kSuperBlock / 4 + 2 * (kSuperBlock / 16) + 6) * V::kRows * 4 + 8 * 64;

template <class F>
void expand(const uint8_t* panel, int64_t super_block, int n_blocks32, int row, Expanded<F>& out) {
  using L = Layout<F>;
  const uint8_t* scales = panel + super_block * L::kStride;
  const uint8_t* lines = L::codes(scales, n_blocks32) + 4 * row;
  const auto store_codes = [&](int block, const auto& change) {
    unroll<kGroups>([&](auto g) {
      V::store_bytes(out.codes[block * kGroups + g.value], change(g, operand<F, g.value>(lines + block * L::kLineBytes32)));
    });
  };
  if constexpr (!L::kOneScale) {
    for (int j = 0; j < n_blocks32; ++j, scales += F::kScaleBytes) {
      V::store(out.scale[j], F::template scale<V>(scales, row));
      if constexpr (F::kHasMin) V::store(out.minimum[j], F::template minimum<V>(scales, row));
      store_codes(j, [](auto, auto codes) { return codes; });
    }
  } else {
    V::store(out.super_scale, super_scale<F>(scales, row));
    if constexpr (F::kHasMin) out.minimums.load(scales, row);
    unroll<L::kSubs / 4>([&](auto quad) {
      const auto scale_bytes = F::template scale_bytes<V, quad.value>(scales, row);
      typename V::Ints factor[4];
      unroll<4>([&](auto i) {
        if constexpr (L::kIntegerScales) {
          factor[i.value] = F::IntegerScales::template factor<V>(V::byte<i.value>(scale_bytes));
        } else {
          V::store(out.scale[quad.value * 4 + i.value], sub_scale<F, i.value>(scale_bytes));
        }
      });
      constexpr int kBlocks = 4 * F::kSub / 32;
      for (int j = 0; j < kBlocks; ++j) {
        store_codes(quad.value * kBlocks + j, [&](auto g, auto codes) {
          if constexpr (L::kIntegerScales)
            codes = V::multiply_bytes(codes, factor[2 * j + g.value / (kGroups / 2)], F::kOffsetBits);
          if constexpr (L::kIntegerScales && Expanded<F>::Kind::kSigned) codes = V::bias(codes);
          return codes;
        });
      }
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
  for (int j = 0; j < n_blocks32; ++j) {
    unroll<2>([&](auto h) {  // sixteen columns each
      const int sixteen = 2 * j + h.value, first_group = sixteen * (kGroups / 2);
      typename V::Ints part_sum[R][T];
      const auto weights = [&](auto g, int r) { return V::load_bytes(w[r].codes[first_group + g.value]); };
      dot_sixteen<C, R, T>(weights, codes + sixteen * 16, neg_sums + sixteen, part_sum);
      constexpr bool kStarts = !L::kIntegerScales && (F::kSub == 16 || h.value == 0);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
          const auto shifted = V::shift_left_by(part_sum[r][t], shifts + t * 16 + sixteen);
          sum[r][t] = kStarts ? shifted : V::add(sum[r][t], shifted);
        }
      }
      if constexpr (!L::kIntegerScales && (F::kSub == 16 || h.value == 1)) {
        const int sub = F::kSub == 16 ? sixteen : j;
        for (int t = 0; t < T; ++t) {
          for (int r = 0; r < R; ++r) {
            const auto scale = V::load(w[r].scale[sub]);
            if constexpr (L::kOneScale) {
              total[r][t] = V::fma(V::to_float(sum[r][t]), scale, total[r][t]);
            } else {
              total[r][t] = add_block<F>(total[r][t], sum[r][t], scale, x.scales[(at + t) * 8 + j]);
              if constexpr (F::kHasMin) {
                total[r][t] = V::fma(V::set1(x.neg_sums32[(at + t) * 8 + j]), V::load(w[r].minimum[j]), total[r][t]);
              }
            }
          }
        }
      }
    });
  }
  if constexpr (L::kOneScale) {
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) {
        if constexpr (L::kIntegerScales) total[r][t] = V::to_float(sum[r][t]);
        total[r][t] = V::mul(total[r][t], V::load(w[r].super_scale));
      }
    }
    if constexpr (F::kHasMin) {
      const Minimums<F>* minimums[R];
      for (int r = 0; r < R; ++r) minimums[r] = &w[r].minimums;
      subtract_minimums<F, R, T>(minimums, x.sum_digits + at * x.kDigits, total);
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      float* to = out + t * out_stride + r * V::kRows;
      V::store(to,
               L::kOneScale ? V::fma(total[r][t], V::set1(x.scales[at + t]), V::load(to)) : V::add(total[r][t], V::load(to)));
    }
  }
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
    // The panels that come next are fetched to the second-level cache, some lines with each tile.
    const int64_t n_bytes = n_group * int64_t(task.panel_bytes), n_steps = n_super * n_tiles;
    const int64_t step_bytes = (n_bytes / n_steps + kLineBytes - 1) / kLineBytes * kLineBytes;
    const uint8_t *ahead = panel + n_bytes, *ahead_end = ahead + n_bytes;
    const auto prefetch = [&] {
      for (int64_t i = 0; i < step_bytes && ahead < ahead_end; i += kLineBytes, ahead += kLineBytes) {
        __builtin_prefetch(ahead, 0, 2);
      }
    };
    for (int64_t sb = 0; sb < n_super; ++sb) {
      const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
      for (int i = 0; i < n_group * kParts; ++i) {
        expand<F>(panel + size_t(i / kParts) * task.panel_bytes, sb, m, i % kParts * V::kRows, expanded[i]);
      }
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

constexpr int64_t kMaxDirectTokens = 2 * V::kDirectTokens;  // up to here unpacking each time is cheaper than expanding

template <class F>
void matmul_quantized(const MatmulTask& task) {
  if (task.x->n_tokens > kMaxDirectTokens) return matmul_expanded<F>(task);
  for_token_tiles<V::kDirectTokens>(task.x->n_tokens,
                                    [&](auto tile, int64_t first) { matmul_direct<F, tile.value>(task, first); });
}

// Scales and minimums of the sub-blocks of one row, for codes as they were expanded.
template <class F>
void row_scales(const Expanded<F>& block, int lane, float* scale, float* minimum) {
  using L = Layout<F>;
  for (int sub = 0; sub < L::kSubs; ++sub) {
    minimum[sub] = F::kHasMin && !L::kOneScale ? block.minimum[L::kOneScale ? 0 : sub][lane] : 0;
    scale[sub] = L::kIntegerScales ? 1.0f : block.scale[sub][lane];
    if constexpr (L::kOneScale) scale[sub] *= block.super_scale[lane];
  }
  if constexpr (L::kOneScale && F::kHasMin) {
    alignas(64) int32_t bytes[V::kRows];
    alignas(64) float super_scale[V::kRows];
    V::store(super_scale, block.minimums.super_scale);
    for (int sub = 0; sub < L::kSubs; ++sub) {
      V::store_ints(bytes, block.minimums.bytes[sub / 4]);
      minimum[sub] = super_scale[lane] * float(bytes[lane] >> (8 * (sub % 4)) & 0xff);
    }
  }
}

template <class F>
void dequantize_panel_row(const uint8_t* panel, int row, int64_t n_columns, float* out) {
  using L = Layout<F>;
  using C = typename Expanded<F>::Kind;
  const int64_t n_blocks32 = n_columns / 32;
  const int part_row = row / V::kRows * V::kRows, lane = row % V::kRows;
  for (int64_t sb = 0; sb * 8 < n_blocks32; ++sb) {
    const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
    Expanded<F> block;
    expand<F>(panel, sb, m, part_row, block);
    float scale[L::kSubs], minimum[L::kSubs];
    row_scales(block, lane, scale, minimum);
    for (int i = 0; i < 32 * m; ++i) {
      const uint8_t code = block.codes[i / 4][4 * lane + i % 4];
      const int q = C::kBiasBits >= 0 ? int(code) - (1 << (C::kBiasBits < 0 ? 0 : C::kBiasBits))
                    : C::kSigned      ? int(int8_t(code))
                                      : int(code);
      out[sb * kSuperBlock + i] = scale[i / F::kSub] * float(q) - minimum[i / F::kSub];
    }
  }
}

}  // namespace
}  // namespace phi4edge
