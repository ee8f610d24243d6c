// Which blocks of a launch have synchronised with which, and from it the races between blocks on global memory.
//
// A block's work is cut into epochs by its fences. Writing a synchronisation address with a strong operation (atomic,
// volatile, relaxed, release) after a fence publishes the epochs before that fence there; a strong read of the address
// makes the reader know what has been published there so far, and all that its publishers knew. Two accesses of
// different blocks to a byte race where one of them is a write, not both are strong, and the later block does not know
// the epoch of the earlier access. Source: PTX ISA, "Release and Acquire Patterns", "Conflict and Data-races".
//
// Nothing is reported that is ordered. What is not found:
//   - a fence that is missing on the side that acquires: a strong read is enough here;
//   - an acquisition that came too early: everything published at the address counts, whichever value was read;
//   - strong reads before a weak write; atomics whose scope is too narrow (fences of .cta scope do not publish);
//   - a third block's access where two others have touched different bytes of the word since;
//   - races within a block on global memory; those of launches of 2^28 blocks or more.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "csrc/ptx/memory.h"

namespace sparse24::ptx {

// An access as one number: from the top, block + 1 (28 bits), its epoch (31), a flag, the bytes of the word (4).
// The flag says of a write that it was strong, of a read that another block has read the same bytes.
struct GlobalAccess {
  static constexpr uint64_t FLAG = 16, BYTES = 15;
  static constexpr uint64_t pack(uint32_t block, uint32_t epoch) {
    return ((uint64_t{block} + 1) << 36) | (uint64_t{epoch & 0x7fffffff} << 5);
  }
  static constexpr uint32_t block_of(uint64_t access) { return static_cast<uint32_t>(access >> 36) - 1; }
  static constexpr uint32_t epoch_of(uint64_t access) { return static_cast<uint32_t>(access >> 5) & 0x7fffffff; }
};

class BlockOrder {
 public:
  static constexpr uint64_t MAX_BLOCKS = (uint64_t{1} << 28) - 1;

  explicit BlockOrder(uint64_t blocks);
  ~BlockOrder();
  BlockOrder(const BlockOrder&) = delete;
  BlockOrder& operator=(const BlockOrder&) = delete;

  bool active() const { return states_ != nullptr; }

  // A fence of wider than .cta scope, or the one that is part of a release.
  void fence(uint32_t block);
  // A strong write of `address`: call before it is performed, so that whoever sees it finds what it publishes.
  void publish(uint32_t block, uint64_t address) {
    if (states_[block] != nullptr) publish_epoch(block, address);
  }
  // A strong read of `address`: call after it.
  void acquire(uint32_t block, uint64_t address) {
    const uint32_t count = published_.load(std::memory_order_acquire);
    if (count == 0) return;
    // Spinning on an address adds nothing until somebody publishes.
    State* const mine = states_[block];
    if (mine != nullptr && mine->seen_address == address && mine->seen_count == count) return;
    acquire_published(block, address);
  }

  // What a race was with.
  struct Conflict {
    static constexpr uint32_t UNKNOWN = ~0u;
    uint64_t offset = 0;       // of the word in the buffer
    uint32_t block = UNKNOWN;  // UNKNOWN: one of several
    bool write = false;
  };
  // The cells of a buffer, made on first use.
  GlobalCell* cells(const Allocation& allocation, uint64_t region) {
    GlobalCell* cells = cells_[region].load(std::memory_order_acquire);
    return cells != nullptr ? cells : make_cells(allocation, region);
  }
  // Block and epoch as the accesses of `block` are recorded now.
  uint64_t stamp(uint32_t block) const { return GlobalAccess::pack(block, epoch_of(block)); }
  // Records an access of `bytes` at `offset` and tells whether it races. `strong`: atomics, volatile and the like.
  template <bool WRITE>
  bool races(GlobalCell* cells, uint64_t offset, uint32_t bytes, uint64_t stamp, bool strong, Conflict& conflict) {
    if ((offset | bytes) % 4 == 0) {
      bool found = false;
      for (uint64_t word = offset / 4, end = word + bytes / 4; word < end; ++word) {
        found |= touch<WRITE>(cells[word], word, 15, stamp, strong, conflict);
      }
      return found;
    }
    bool found = false;
    for (uint64_t word = offset / 4, end = (offset + bytes + 3) / 4; word < end; ++word) {
      const uint64_t first = word * 4 < offset ? offset % 4 : 0;
      const uint64_t last = word * 4 + 4 > offset + bytes ? (offset + bytes) % 4 : 4;
      found |= touch<WRITE>(cells[word], word, ((1u << last) - 1) & ~((1u << first) - 1), stamp, strong, conflict);
    }
    return found;
  }

 private:
  // What one block knows of others. Only the thread that runs the block touches it.
  struct State {
    uint32_t epoch = 1;
    int32_t acquired = -1;      // newest of acquisitions_
    uint64_t seen_address = 0;  // of the latest acquisition, when there were seen_count publications
    uint32_t seen_count = 0;
    uint32_t latest = 0, latest_epoch = 0;          // the block last found in `known`, and its epoch there
    int32_t learned = -1;                           // the acquisition up to which `known` is complete
    std::unordered_map<uint32_t, uint32_t> known;   // by block: the last epoch known
    std::unordered_set<int32_t> visited, followed;  // publications and acquisitions that are in `known`
  };
  struct Publication {
    uint32_t block, epoch;
    int32_t previous;  // at the same address
    int32_t acquired;  // what its block had acquired by then
  };
  struct Acquisition {
    int32_t publication;
    int32_t previous;  // of the same block
  };

  uint32_t epoch_of(uint32_t block) const { return states_[block] != nullptr ? states_[block]->epoch : 1; }
  State& state(uint32_t block);
  GlobalCell* make_cells(const Allocation& allocation, uint64_t region);
  void publish_epoch(uint32_t block, uint64_t address);
  void acquire_published(uint32_t block, uint64_t address);
  bool knows(uint32_t block, uint64_t access);
  bool knows_nothing(uint32_t block) const { return states_[block] == nullptr || states_[block]->acquired < 0; }

  template <bool WRITE>
  bool touch(GlobalCell& cell, uint64_t word, uint64_t mask, uint64_t stamp, bool strong, Conflict& conflict) {
    using A = GlobalAccess;
    bool race = false;
    const uint64_t writer = cell.writer.load(std::memory_order_relaxed);
    const uint64_t reader = cell.reader.load(std::memory_order_relaxed);
    const auto other = [&](uint64_t access) { return (access & mask) != 0 && ((access ^ stamp) >> 36) != 0; };
    if (other(writer) && !(strong && (writer & A::FLAG) != 0) && !knows(A::block_of(stamp), writer)) {
      conflict = {word * 4, A::block_of(writer), true};
      race = true;
    }
    if constexpr (WRITE) {
      if (other(reader) && !knows(A::block_of(stamp), reader)) {
        conflict = {word * 4, A::block_of(reader), false};
        race = true;
      } else if ((reader & mask) != 0 && (reader & A::FLAG) != 0 && knows_nothing(A::block_of(stamp))) {
        // Two blocks have read it, this one perhaps being one of them.
        conflict = {word * 4, Conflict::UNKNOWN, false};
        race = true;
      }
      uint64_t now = stamp | mask | (strong ? A::FLAG : 0);
      if (((writer ^ now) & ~A::BYTES) == 0) now |= writer & A::BYTES;
      if (now != writer) cell.writer.store(now, std::memory_order_relaxed);
    } else if (!strong) {
      uint64_t now = stamp | mask;
      if (((reader ^ now) >> 36) == 0) {
        now |= (reader & A::BYTES) | ((reader & A::BYTES) == mask ? reader & A::FLAG : 0);
      } else if ((reader & A::BYTES) == mask) {
        now |= A::FLAG;
      }
      if (now != reader) cell.reader.store(now, std::memory_order_relaxed);
    }
    return race;
  }

  uint64_t blocks_;
  State** states_ = nullptr;  // by block; null until it synchronises, so that the pages of most stay untouched
  std::array<std::atomic<GlobalCell*>, REGIONS> cells_{};
  std::atomic<uint32_t> published_{0};  // the number of publications
  std::mutex mutex_;                    // of what follows
  std::deque<State> all_states_;
  std::unordered_map<uint64_t, int32_t> addresses_;  // the newest publication at each
  std::vector<Publication> publications_;
  std::vector<Acquisition> acquisitions_;
};

}  // namespace sparse24::ptx
