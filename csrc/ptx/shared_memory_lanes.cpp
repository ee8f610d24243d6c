// The checks of shared memory for all lanes of a warp: what is common is decided here by a few comparisons a word, and
// all else left to the checks of one access in shared_memory.cpp.
#include <bit>
#include <cstring>

#include "csrc/ptx/shared_memory.h"

namespace sparse24::ptx {
namespace {

constexpr uint8_t INITIALIZED = 15;

// Calls body(lane) for the lanes of a mask in turn.
template <class Body>
void in_turn(uint32_t lanes, Body&& body) {
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) body(static_cast<uint32_t>(std::countr_zero(rest)));
}

template <class T>
T larger(T a, T b) {
  return a > b ? a : b;
}

}  // namespace

template <uint32_t SIZE>
uint32_t SharedMemory::read_rows(Warp& warp, uint32_t lanes, const uint64_t* address) {
  const uint32_t floor = floor_of(warp), now = block_->time, bit = 1u << warp.index;
  uint32_t good = lanes;
  in_turn(lanes, [&](uint32_t lane) {
    bool plain = inside<SIZE>(address[lane]);
    SharedCell* const cells = words_.get() + (plain ? address[lane] / 4 : 0);
    // Written, and before the last barrier: by whom does not matter.
    for (uint32_t i = 0; i < SIZE / 4 && plain; ++i) {
      plain = (cells[i].state == INITIALIZED) & (cells[i].write_time < floor);
    }
    if (!plain) {
      if (!check_read(warp, lane, address[lane], SIZE)) good &= ~(1u << lane);
      return;
    }
    if (!race_) return;
    for (uint32_t i = 0; i < SIZE / 4; ++i) {
      SharedCell& cell = cells[i];
      if (cell.read_time < floor) {
        cell.read_time = now;
        cell.readers = bit;
        cell.reader_lane = static_cast<uint8_t>(lane);
      } else {
        note_read(warp, lane, cell);
      }
    }
  });
  return good;
}

template <uint32_t SIZE>
uint32_t SharedMemory::write_rows(Warp& warp, uint32_t lanes, const uint64_t* address, const uint8_t* data) {
  const uint32_t floor = floor_of(warp);
  SharedCell written;
  written.write_time = race_ ? block_->time : 0;
  written.writer_warp = static_cast<uint8_t>(warp.index);
  written.state = INITIALIZED;
  uint32_t good = lanes;
  in_turn(lanes, [&](uint32_t lane) {
    bool plain = inside<SIZE>(address[lane]);
    SharedCell* const cells = words_.get() + (plain ? address[lane] / 4 : 0);
    for (uint32_t i = 0; i < SIZE / 4 && plain; ++i) {
      // Nobody has touched it since the last barrier, or only this lane.
      const SharedCell& cell = cells[i];
      const bool mine = (cell.writer_warp == warp.index) & (cell.writer_lane == lane);
      plain = (cell.state <= INITIALIZED) & ((cell.write_time < floor) | mine) & (cell.read_time < floor);
    }
    if (plain) {
      written.writer_lane = static_cast<uint8_t>(lane);
      for (uint32_t i = 0; i < SIZE / 4; ++i) cells[i] = written;
    } else if (!check_write(warp, lane, address[lane], SIZE, data + lane * SIZE)) {
      good &= ~(1u << lane);
      return;
    }
    std::memcpy(bytes.data() + address[lane], data + lane * SIZE, SIZE);
  });
  return good;
}

template <uint32_t SIZE>
uint32_t SharedMemory::issue_rows(Warp& warp, uint32_t lanes, const uint64_t* address) {
  const uint32_t floor = checked_ ? floor_of(warp) : 0;
  uint32_t good = lanes;
  in_turn(lanes, [&](uint32_t lane) {
    bool plain = inside<SIZE>(address[lane]);
    if (plain && !checked_) return;
    SharedCell* const cells = words_.get() + (plain ? address[lane] / 4 : 0);
    for (uint32_t i = 0; i < SIZE / 4 && plain; ++i) {
      plain = (cells[i].state <= INITIALIZED) & (larger(cells[i].write_time, cells[i].read_time) < floor);
    }
    if (plain) {
      for (uint32_t i = 0; i < SIZE / 4; ++i) cells[i].state |= SharedCell::IN_FLIGHT;
    } else if (!check_async_issue(warp, lane, address[lane], SIZE)) {
      good &= ~(1u << lane);
    }
  });
  return good;
}

template <uint32_t SIZE>
void SharedMemory::deliver_rows(Warp& warp, uint32_t lanes, const uint32_t* address, const uint8_t (*data)[16]) {
  in_turn(lanes, [&](uint32_t lane) { std::memcpy(bytes.data() + address[lane], data[lane], SIZE); });
  if (!checked_) return;
  if (race_ && !async_) {
    in_turn(lanes, [&](uint32_t lane) { check_async_delivery(warp, lane, address[lane], SIZE); });
    return;
  }
  floor_of(warp);  // notes the time
  SharedCell written;
  written.write_time = race_ ? block_->time : 0;
  written.writer_warp = static_cast<uint8_t>(warp.index);
  written.state = INITIALIZED;
  in_turn(lanes, [&](uint32_t lane) {
    written.writer_lane = static_cast<uint8_t>(lane);
    SharedCell* const cells = &words_[address[lane] / 4];
    for (uint32_t i = 0; i < SIZE / 4; ++i) cells[i] = written;
  });
}

uint32_t SharedMemory::read_lanes(Warp& warp, uint32_t lanes, const uint64_t* address, uint32_t size) {
  return size == 4   ? read_rows<4>(warp, lanes, address)
         : size == 8 ? read_rows<8>(warp, lanes, address)
                     : read_rows<16>(warp, lanes, address);
}

uint32_t SharedMemory::write_lanes(Warp& warp, uint32_t lanes, const uint64_t* address, uint32_t size,
                                   const uint8_t* data) {
  return size == 4   ? write_rows<4>(warp, lanes, address, data)
         : size == 8 ? write_rows<8>(warp, lanes, address, data)
                     : write_rows<16>(warp, lanes, address, data);
}

uint32_t SharedMemory::async_issue_lanes(Warp& warp, uint32_t lanes, const uint64_t* address, uint32_t size) {
  return size == 4   ? issue_rows<4>(warp, lanes, address)
         : size == 8 ? issue_rows<8>(warp, lanes, address)
                     : issue_rows<16>(warp, lanes, address);
}

void SharedMemory::async_delivery_lanes(Warp& warp, uint32_t lanes, const uint32_t* address, uint32_t size,
                                        const uint8_t (*data)[16]) {
  if (size == 4) return deliver_rows<4>(warp, lanes, address, data);
  if (size == 8) return deliver_rows<8>(warp, lanes, address, data);
  deliver_rows<16>(warp, lanes, address, data);
}

}  // namespace sparse24::ptx
