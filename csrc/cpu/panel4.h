// Right sides of products (product.h) from a 4-bit weight. Knows no op.
//   weight_rows<Cell>(w)      W^T: panels of rows of W, the depth is k
//   weight_columns<Cell>(w)   W: panels of columns of W, the depth is n
#pragma once
#include "cpu/panel.h"
#include "cpu/scratch.h"

namespace peftk::PEFTK_TIER {

// A strip of rows has its constants in one run, so they are decoded beforehand, once.
template <class Cell>
auto weight_rows(const Matrix4& w) {
  return [&w](const Span& span, std::uint32_t* panel) {
    if (!w.absmax.scales) {
      panel_along<Cell>(Rows4<const float*>(w, static_cast<const float*>(w.absmax.values)), span, panel);
      return;
    }
    const std::int64_t first = w.blocks_before(span.col), last = w.blocks_until(span.col + span.cols);
    const Scratch constants(sizeof(float) * static_cast<std::size_t>(last - first));
    decode_constants(w.absmax, first, last, constants.as<float>());
    panel_along<Cell>(Rows4<const float*>(w, constants.as<float>() - first), span, panel);
  };
}

template <class Cell>
auto weight_columns(const Matrix4& w) {
  return [&w](const Span& span, std::uint32_t* panel) {
    with_vectors(span.vectors,
                 [&](auto vectors) { panel_across<Cell, decltype(vectors)::value>(Rows4<Absmax>(w, w.absmax), span, panel); });
  };
}

// The same two from any other rows.
template <class Cell, class Rows>
auto rows_as_columns(const Rows& rows) {
  return [&rows](const Span& span, std::uint32_t* panel) { panel_along<Cell>(rows, span, panel); };
}
template <class Cell, class Rows>
auto rows_as_depth(const Rows& rows) {
  return [&rows](const Span& span, std::uint32_t* panel) {
    with_vectors(span.vectors, [&](auto vectors) { panel_across<Cell, decltype(vectors)::value>(rows, span, panel); });
  };
}

}  // namespace peftk::PEFTK_TIER
