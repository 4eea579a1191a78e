// Products of float weights; also what attention does with keys and values.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

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
      for (int64_t i = 0; i < V::kRows && i < n_rows; ++i) out[i] = task.adds ? out[i] + task.factor * lanes[i] : lanes[i];
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

}  // namespace
}  // namespace phi4edge
