// The marks of undefined values: set by loads, moved by operations, reported where something depends on them.
#include "csrc/ptx/definedness.h"

#include <algorithm>

#include "csrc/ptx/machine.h"

namespace sparse24::ptx {

void Definedness::start(const Program& program) {
  holes_.clear();
  if (alive_ != 0 || marks_.size() != program.register_bytes / SLOT_BYTES) {
    marks_.assign(program.register_bytes / SLOT_BYTES, 0);
    origins_.resize(marks_.size());
    alive_ = 0;
  }
}

// The lanes in `lanes` get the marks in `mark`.
void Definedness::set(Slot slot, uint32_t lanes, uint32_t mark, const Origin* origin) {
  if (slot == NO_SLOT) return;
  uint32_t& marks = marks_[slot / SLOT_BYTES];
  const uint32_t before = marks;
  marks = (marks & ~lanes) | (mark & lanes);
  alive_ += (marks != 0) - (before != 0);
  if ((mark & lanes) == 0 || origin == nullptr) return;
  Origin& known = origins_[slot / SLOT_BYTES];  // of one load, the first lane's
  if (before == 0 || known.operation != origin->operation) known = *origin;
}

void Definedness::take(Warp& warp, const Hole& hole) {
  if (warp.block->program->operations[warp.current].use == Use::LOAD) {
    holes_.push_back(hole);
  } else {
    warp.find_with(Kind::UNINITIALIZED, hole.lane, hole.address, [&] { return hole.describe(warp, hole); });
  }
}

void Definedness::settle_load(const Warp& warp, const Operation& operation, int elements, int element_bytes) {
  for (const Hole& hole : holes_) {
    const Origin origin{warp.current, hole};
    for (int i = 0; i < elements; ++i) {
      const uint64_t bytes = ((uint64_t{1} << element_bytes) - 1) << (i * element_bytes);
      if ((hole.bytes & bytes) != 0) set(operation.slot[i], 1u << hole.lane, ~0u, &origin);
    }
  }
  holes_.clear();
}

void Definedness::settle_matrices(const Warp& warp, const Operation& operation, int matrices, bool transposed) {
  for (const Hole& hole : holes_) {
    const Origin origin{warp.current, hole};
    const uint32_t row = hole.lane % 8;
    if (static_cast<int>(hole.lane / 8) >= matrices) continue;
    for (uint32_t column = 0; column < 8; ++column) {
      if ((hole.bytes >> (2 * column) & 3) == 0) continue;
      const uint32_t lane = transposed ? 4 * column + row / 2 : 4 * row + column / 2;
      set(operation.slot[hole.lane / 8], 1u << lane, ~0u, &origin);
    }
  }
  holes_.clear();
}

// Says once, at the load, that the value of `slot` is used here in some of `lanes`.
void Definedness::report(Warp& warp, Slot slot, uint32_t lanes) {
  const uint32_t marked = lanes_of(slot) & lanes;
  if (marked == 0) return;
  const Origin origin = origins_[slot / SLOT_BYTES];
  const uint32_t here = warp.current;
  warp.current = origin.operation;
  warp.find_with(Kind::UNINITIALIZED, origin.hole.lane, origin.hole.address, [&] {
    return origin.hole.describe(warp, origin.hole) + "; the value is used at line " +
           std::to_string(warp.block->line_of(here));
  });
  warp.current = here;
  set(slot, marked, 0, nullptr);  // once is enough
}

// Results are undefined in the lanes in which one of the sources is: slots first to first + count.
void Definedness::propagate(const Operation& operation, uint32_t lanes, uint32_t first, uint32_t count) {
  uint32_t marked = 0;
  Origin origin;
  for (uint32_t i = first; i < first + count; ++i) {
    const uint32_t one = lanes_of(operation.slot[i]) & lanes;
    if (one != 0) origin = origins_[operation.slot[i] / SLOT_BYTES];
    marked |= one;
  }
  for (uint32_t i = 0; i < operation.results; ++i) set(operation.slot[i], lanes, marked, &origin);
}

// mma: a row of A reaches that row of the result, a column of B that column. Of the shapes m16n8: register i of A holds
// row lane/4 + 8 * (i % 2), B the column lane/4, results the rows lane/4 and lane/4 + 8 and the columns 2 * (lane%4)
// and the next. Of other shapes and of what is not uniform, everything is marked.
void Definedness::through_tensor_core(const Operation& operation, uint32_t lanes) {
  const uint32_t d = operation.count[0], a = operation.count[1], b = operation.count[2], c = operation.count[3];
  const auto marks = [&](uint32_t first, uint32_t count, uint32_t step, Origin& origin) {
    uint32_t all = 0;
    for (uint32_t i = first; i < first + count; i += step) {
      const uint32_t one = lanes_of(operation.slot[i]);
      if (one != 0) origin = origins_[operation.slot[i] / SLOT_BYTES];
      all |= one;
    }
    return all;
  };
  // A bit of each group of four lanes that has one set.
  const auto quads = [](uint32_t mask) {
    mask |= mask >> 1;
    mask |= mask >> 2;
    return mask & 0x11111111u;
  };
  Origin origin;
  const bool plain = operation.use == Use::TENSOR && lanes == ~0u && (d == 2 || d == 4) && c == d;
  const uint32_t columns = quads(marks(d + a, b, 1, origin));
  const uint32_t rows[2] = {quads(marks(d, a, 2, origin)), a > 1 ? quads(marks(d + 1, a - 1, 2, origin)) : 0};
  uint32_t result[4] = {};
  for (uint32_t i = 0; i < d && plain; ++i) {
    const uint32_t half = d == 4 ? i / 2 : i;
    result[i] = rows[half] * 15 | (lanes_of(operation.slot[d + a + b + i]));
    if (result[i] != 0 && lanes_of(operation.slot[d + a + b + i]) != 0) {
      origin = origins_[operation.slot[d + a + b + i] / SLOT_BYTES];
    }
    for (uint32_t column = 0; column < 8; ++column) {
      const bool here = d == 2 || column % 2 == i % 2;
      if (here && (columns >> (4 * column) & 1) != 0) result[i] |= 0x11111111u << (column / 2);
    }
  }
  if (!plain && (columns | rows[0] | rows[1] | marks(d + a + b, c, 1, origin)) != 0) std::fill_n(result, 4, ~0u);
  for (uint32_t i = 0; i < d; ++i) set(operation.slot[i], lanes, result[std::min(i, 3u)], &origin);
}

void Definedness::step(Warp& warp, const Operation& operation, uint32_t group, uint32_t lanes) {
  if (operation.guard != NO_SLOT) report(warp, operation.guard, group);
  switch (operation.use) {
    case Use::TENSOR:
    case Use::TENSOR_WHOLE:
      // The selection of values by metadata cannot be undefined.
      for (uint32_t i = operation.count[0] + operation.count[1] + operation.count[2] + operation.count[3];
           i < operation.slots; ++i) {
        report(warp, operation.slot[i], lanes);
      }
      through_tensor_core(operation, lanes);
      return;
    case Use::PROPAGATE:
      propagate(operation, lanes, operation.results, operation.slots - operation.results);
      return;
    case Use::STORE:  // the store itself passes the marks of values on; an address is used
      report(warp, operation.slot[0], lanes);
      return;
    case Use::LOAD:
    case Use::REPORT:
      for (uint32_t i = operation.results; i < operation.slots; ++i) report(warp, operation.slot[i], lanes);
      for (uint32_t i = 0; i < operation.results; ++i) set(operation.slot[i], lanes, 0, nullptr);
      return;
  }
}

}  // namespace sparse24::ptx
