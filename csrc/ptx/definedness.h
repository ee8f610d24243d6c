// initcheck through registers: a value that comes from bytes never written is no error until something depends on it.
//
// Kernels load more than they use: the stage behind the last, rows beyond the edge of a matrix. So a load of such bytes
// marks its registers, per lane; arithmetic, mma included, passes the mark on to its results; a store to shared or
// local memory passes it on to the bytes. It is a finding when a predicate, an address, a global store, an atomic or
// another lane takes the value. The finding names the load. As long as no mark is alive, nothing of this costs
// anything.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/ptx/program.h"

namespace sparse24::ptx {

class Definedness {
 public:
  // Bytes of a load that were never written, where in memory the first of them is.
  struct Hole {
    uint32_t lane;
    uint32_t bytes;    // of the lane's access, a bit each
    uint64_t address;  // of the access
    uint32_t size;     // of the access
    std::string (*describe)(const Warp& warp, const Hole& hole);
    uint64_t first() const { return address + static_cast<uint64_t>(__builtin_ctz(bytes)); }  // byte
  };

  void start(const Program& program);

  // ---- at a load ----
  // Keeps the hole of a load, whose registers can carry marks; that of another instruction is a finding at once.
  void take(Warp& warp, const Hole& hole);
  bool pending() const { return !holes_.empty(); }
  // ld: element i of a lane, of `element_bytes`, is in slot[i].
  void settle_load(const Warp& warp, const Operation& operation, int elements, int element_bytes);
  // ldmatrix: lane 8i + r gave the address of row r of matrix i, which is in slot[i].
  void settle_matrices(const Warp& warp, const Operation& operation, int matrices, bool transposed);

  // ---- at every other operation, while marks are alive ----
  bool any() const { return alive_ != 0; }
  // Reports uses, and marks or clears the results. Called before the operation runs.
  // `group`: the lanes that are there, `lanes` those whose guard is true.
  void step(Warp& warp, const Operation& operation, uint32_t group, uint32_t lanes);
  // A finding for those of `lanes` in which the slot's value is undefined.
  void report(Warp& warp, Slot slot, uint32_t lanes);
  // The lanes of a slot whose value is undefined.
  uint32_t lanes_of(Slot slot) const { return slot == NO_SLOT || !any() ? 0 : marks_[slot / SLOT_BYTES]; }

 private:
  static constexpr uint32_t SLOT_BYTES = 64;  // slots are as far apart
  struct Origin {
    uint32_t operation = 0;
    Hole hole{};
  };
  void set(Slot slot, uint32_t lanes, uint32_t mark, const Origin* origin);
  void propagate(const Operation& operation, uint32_t lanes, uint32_t first, uint32_t count);
  void through_tensor_core(const Operation& operation, uint32_t lanes);

  std::vector<uint32_t> marks_;  // by slot: lanes
  std::vector<Origin> origins_;  // by slot: of one of its marks
  std::vector<Hole> holes_;      // of the load under way
  uint32_t alive_ = 0;           // slots with marks
};

}  // namespace sparse24::ptx
