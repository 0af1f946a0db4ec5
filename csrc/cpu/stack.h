// Several products as one whose depth runs over all of theirs: left[0] * right[0] + left[1] * right[1] + ... A part starts at a
// whole cell; what the part before lacks for one is zero on both sides. Knows no op.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/panel.h"
#include "cpu/product.h"

namespace peftk::PEFTK_TIER {

template <class Cell, class Panel>
class Stack {
 public:
  static constexpr std::int64_t kTogether = panels_together(static_cast<const Panel*>(nullptr));

  void add(std::int64_t depth, Panel panel) {
    parts_.push_back({steps_, depth, std::move(panel)});
    steps_ += steps_of<Cell>(depth);
  }
  std::int64_t steps() const { return steps_; }
  std::int64_t depth() const { return steps_ * Cell::kDepth; }

  // Where a part lies in a left side of all parts; its groups are steps() apart.
  template <class Word>
  Word* left_of(std::size_t part, Word* left) const {
    return left + parts_[part].first_step * TileOf<Cell>::kRows;
  }

  void operator()(const Span& span, std::uint32_t* panel) const {
    for (const Part& part : parts_) {
      const std::int64_t start = part.first_step * Cell::kDepth;
      const std::int64_t begin = std::max(span.depth, start), end = std::min(span.depth + span.count, start + part.depth);
      if (begin >= end) continue;
      const std::int64_t step = (begin - span.depth) / Cell::kDepth;
      make_panel<Cell>(part.panel, {span.col, span.cols, span.vectors, begin - start, end - begin},
                       panel + step * span.vectors * kLanes);
    }
  }

 private:
  struct Part {
    std::int64_t first_step, depth;
    Panel panel;
  };
  std::vector<Part> parts_;
  std::int64_t steps_ = 0;
};

}  // namespace peftk::PEFTK_TIER
