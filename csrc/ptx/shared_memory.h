// A block's shared memory, and what is known of each word of it: who wrote and read it when, and what is under way.
//
// Races: an access is ordered after an earlier one where a barrier of the block, a bar.warp.sync, or a fence with a
// strong write that a strong read has seen (a flag, a lock) lies between them. Not found:
//   - of several unordered atomics, a later plain access is compared with the last only;
//   - lanes of one warp that write equal values to a word count as one writer;
//   - a lock in global memory that guards shared memory is not seen as one: it would be reported.
#pragma once
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <unordered_map>
#include <vector>

#include "csrc/ptx/machine.h"

namespace sparse24::ptx {

// One word (4 bytes), or one byte where lanes touch parts of words.
struct SharedCell {
  uint32_t write_time = 0;  // Block::time of the last write; 0: none that anything could race with
  uint32_t read_time = 0;   // of the first of the reads that `readers` are of
  uint32_t readers = 0;     // warps that have read it since the write, a bit each
  uint8_t writer_warp = 0;
  uint8_t writer_lane = 0;  // LANES: several wrote the same value. STRONG: see there
  uint8_t reader_lane = 0;  // LANES: several
  uint8_t state = 0;        // of a word: bits 0-3: bytes initialised; IN_FLIGHT; SPLIT

  static constexpr uint8_t IN_FLIGHT = 16;  // a cp.async will write it
  static constexpr uint8_t SPLIT = 32;      // times and lanes are in the cells of its bytes
  static constexpr uint8_t STRONG = 64;     // in writer_lane: by an atomic, a volatile or the like
};
static_assert(sizeof(SharedCell) == 16);

class SharedMemory {
 public:
  std::vector<uint8_t> bytes;

  void start(Block& block, uint32_t size);  // contents are poison, nothing initialised
  bool checked() const { return checked_; }

  // The checks of one access by one lane, of a power of two of bytes. False: out of bounds or misaligned; then nothing
  // may be touched. `strong`: relaxed, acquire, release, volatile.
  bool check_read(Warp& warp, uint32_t lane, uint64_t address, uint32_t size, bool strong = false);
  bool check_write(Warp& warp, uint32_t lane, uint64_t address, uint32_t size, const uint8_t* data,
                   bool strong = false);
  // Atomics read and write without racing with each other.
  bool check_atomic(Warp& warp, uint32_t lane, uint64_t address, uint32_t size);
  // cp.async: from issue to delivery the bytes are in flight.
  bool check_async_issue(Warp& warp, uint32_t lane, uint64_t address, uint32_t size);
  void check_async_delivery(Warp& warp, uint32_t lane, uint64_t address, uint32_t size);
  // The same for several lanes and accesses of 4, 8 or 16 bytes, quick where all is well; the result: the lanes that
  // may go on. write_lanes writes the values as well, `size` bytes of `data` a lane: the next lane's are compared with
  // them.
  uint32_t read_lanes(Warp& warp, uint32_t lanes, const uint64_t* address, uint32_t size);
  uint32_t write_lanes(Warp& warp, uint32_t lanes, const uint64_t* address, uint32_t size, const uint8_t* data);
  uint32_t async_issue_lanes(Warp& warp, uint32_t lanes, const uint64_t* address, uint32_t size);
  void async_delivery_lanes(Warp& warp, uint32_t lanes, const uint32_t* address, uint32_t size,
                            const uint8_t (*data)[16]);
  // Out of bounds or misaligned: said, and false.
  bool check_bounds(Warp& warp, uint32_t lane, uint64_t address, uint32_t size, const char* access);

  // The bytes count as never written again: the value stored there is undefined.
  void forget(uint64_t address, uint32_t size);

  // Flags and locks in shared memory: a fence by a warp; a strong write, said before it; a strong read, said after it.
  void fence(Warp& warp);
  void publish(Warp& warp, uint32_t address);
  void acquire(Warp& warp, uint32_t lane, uint32_t address);

 private:
  // By warp: the time before which its accesses are known.
  using Clock = std::array<uint32_t, LANES>;
  // An access under way.
  struct Access {
    Warp& warp;
    uint32_t lane;
    uint64_t address;
    uint32_t size;
    bool strong;
    const char* name;
    bool told = false;  // a race of it: one is enough
  };

  // The last times at which a warp has accessed shared memory, ascending.
  struct Recent {
    static constexpr uint32_t LENGTH = 16;
    uint32_t count = 0;
    uint32_t times[LENGTH];
    // The first of them that is not before `time`; `time` itself where that is too long ago to be known.
    uint32_t first_from(uint32_t time, uint32_t now) const;
  };
  // Everything at earlier times is ordered before what `warp` does now. Block::synced alone would give the time at
  // which the first warp came to the last barrier, and most of what lies before it would have to be looked at closely.
  uint32_t floor_of(const Warp& warp) {
    return floor_times_[warp.index] == block_->time ? floors_[warp.index] : update_floor(warp);
  }
  uint32_t update_floor(const Warp& warp);
  bool ordered(const Access& access, uint32_t time, uint32_t warp, uint32_t lane) const;
  void check_state(const Access& access, bool reads);
  template <class Visit>
  void visit(const Access& access, Visit&& visit);
  void read_cell(Access& access, SharedCell& cell);
  void write_cell(Access& access, SharedCell& cell, bool equal, bool record);
  void note_read(const Warp& warp, uint32_t lane, SharedCell& cell) const;
  template <uint32_t SIZE>
  bool inside(uint64_t address) const {
    return address % SIZE == 0 && address < bytes.size() && bytes.size() - address >= SIZE;
  }
  template <uint32_t SIZE>
  uint32_t read_rows(Warp& warp, uint32_t lanes, const uint64_t* address);
  template <uint32_t SIZE>
  uint32_t write_rows(Warp& warp, uint32_t lanes, const uint64_t* address, const uint8_t* data);
  template <uint32_t SIZE>
  uint32_t issue_rows(Warp& warp, uint32_t lanes, const uint64_t* address);
  template <uint32_t SIZE>
  void deliver_rows(Warp& warp, uint32_t lanes, const uint32_t* address, const uint8_t (*data)[16]);
  void report_race(Access& access, uint32_t warp, uint32_t lane, const char* earlier) const;
  SharedCell* split(uint64_t word);

  Block* block_ = nullptr;
  bool checked_ = false, init_ = false, race_ = false, async_ = false;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<SharedCell[], Free> words_;  // 64-byte aligned: a row of 16 bytes is one cache line of cells
  size_t capacity_ = 0;
  std::vector<SharedCell> split_;  // one a byte, made when the first word is split
  std::array<uint32_t, LANES> floors_{}, floor_times_{};
  std::array<Recent, LANES> recent_{};             // by warp
  std::unordered_map<uint32_t, Clock> published_;  // by address
  std::array<Clock, LANES> fenced_{};              // by warp: what was ordered before its last fence
  uint32_t fencing_ = 0;                           // warps that have fenced, a bit each
};

}  // namespace sparse24::ptx
