// The checks of shared memory: bounds, bytes never written, races within the block, copies under way.
#include "csrc/ptx/shared_memory.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

namespace sparse24::ptx {
namespace {

constexpr uint8_t POISON = 0xcd;
constexpr uint8_t INITIALIZED = 15;  // all bytes of a word

std::string number(uint64_t value) { return std::to_string(value); }

}  // namespace

void SharedMemory::start(Block& block, uint32_t size) {
  block_ = &block;
  bytes.assign(size, POISON);
  const Launch& launch = *block.launch;
  init_ = launch.checks(Check::INIT);
  race_ = launch.checks(Check::RACE);
  async_ = launch.checks(Check::ASYNC);
  checked_ = init_ || race_ || async_;
  if (!checked_) return;
  const size_t words = (size_t{size} + 3) / 4;
  if (capacity_ < words) {
    const size_t room = (words * sizeof(SharedCell) + 63) / 64 * 64;
    words_.reset(static_cast<SharedCell*>(std::aligned_alloc(64, room)));
    if (!words_) throw std::bad_alloc();
    capacity_ = words;
  }
  SharedCell fresh;
  if (!init_) fresh.state = INITIALIZED;
  std::fill_n(words_.get(), words, fresh);
  floor_times_.fill(0);
  for (Recent& recent : recent_) recent.count = 0;
  published_.clear();
  fencing_ = 0;
}

// ---- order ----------------------------------------------------------------------------------------------------------

uint32_t SharedMemory::Recent::first_from(uint32_t time, uint32_t now) const {
  const uint32_t known = std::min(count, LENGTH);
  uint32_t found = now;
  for (uint32_t i = 1; i <= known; ++i) {  // from the latest back
    const uint32_t one = times[(count - i) % LENGTH];
    if (one < time) return found;
    found = one;
  }
  return known < count ? time : found;
}

uint32_t SharedMemory::update_floor(const Warp& warp) {
  const uint32_t now = block_->time, w = warp.index;
  uint32_t floor = std::min(warp.synced_all, now);
  for (uint32_t b = 0; b < block_->warps.size(); ++b) {
    if (b != w) floor = std::min(floor, recent_[b].first_from(block_->synced[w][b], now));
  }
  Recent& recent = recent_[w];
  recent.times[recent.count++ % Recent::LENGTH] = now;
  floor_times_[w] = now;
  return floors_[w] = std::max(floor, 1u);  // 0 is the time of what has never been
}

bool SharedMemory::ordered(const Access& access, uint32_t time, uint32_t warp, uint32_t lane) const {
  if (warp != access.warp.index) return time < block_->synced[access.warp.index][warp];
  if (lane == access.lane || time < access.warp.synced_all) return true;
  return lane < LANES && access.warp.synced && time < access.warp.synced[access.lane][lane];
}

void SharedMemory::fence(Warp& warp) {
  if (!race_) return;
  Clock& clock = fenced_[warp.index];
  std::copy_n(block_->synced[warp.index], LANES, clock.begin());
  clock[warp.index] = ++block_->time;
  fencing_ |= 1u << warp.index;
}

void SharedMemory::publish(Warp& warp, uint32_t address) {
  if (!race_ || (fencing_ >> warp.index & 1) == 0) return;
  Clock& clock = published_[address];  // zeros where new
  const Clock& mine = fenced_[warp.index];
  for (uint32_t b = 0; b < LANES; ++b) clock[b] = std::max(clock[b], mine[b]);
}

void SharedMemory::acquire(Warp& warp, uint32_t lane, uint32_t address) {
  if (!race_ || published_.empty()) return;
  const auto found = published_.find(address);
  if (found == published_.end()) return;
  const Clock& clock = found->second;
  bool news = false;
  for (uint32_t b = 0; b < LANES; ++b) {
    uint32_t& known = block_->synced[warp.index][b];
    if (clock[b] <= known) continue;
    known = clock[b];
    news = true;
  }
  const uint32_t own = clock[warp.index];
  if (own > warp.synced_all) {
    if (!warp.synced) warp.synced = std::make_unique<uint32_t[][LANES]>(LANES);
    for (uint32_t other = 0; other < LANES; ++other) {
      uint32_t& known = warp.synced[lane][other];
      news |= known < own;
      known = std::max(known, own);
    }
  }
  if (news) ++block_->time;
}

// ---- one access -----------------------------------------------------------------------------------------------------

bool SharedMemory::check_bounds(Warp& warp, uint32_t lane, uint64_t address, uint32_t size, const char* access) {
  if (address > bytes.size() || size > bytes.size() - address) {
    warp.find_with(Kind::OUT_OF_BOUNDS, lane, address, [&] {
      return std::string(access) + " of " + number(size) + " bytes at offset " +
             std::to_string(static_cast<int64_t>(address)) + " of the block's " + number(bytes.size()) +
             " bytes of shared memory";
    });
    return false;
  }
  if ((address & (size - 1)) != 0) {
    warp.find_with(Kind::MISALIGNED, lane, address, [&] {
      return std::string(access) + " of " + number(size) + " bytes at offset " + number(address) + " of the block's " +
             number(bytes.size()) + " bytes of shared memory: not a multiple of " + number(size);
    });
    return false;
  }
  return true;
}

void SharedMemory::report_race(Access& access, uint32_t warp, uint32_t lane, const char* earlier) const {
  const bool within = warp == access.warp.index;
  if (access.told) return;
  access.told = true;
  access.warp.find_with(within ? Kind::RACE_WARP : Kind::RACE_SHARED, access.lane, access.address, [&] {
    std::string who = "warp " + number(warp);
    if (lane < LANES) who += ", lane " + number(lane);
    return std::string(access.name) + " of " + number(access.size) + " bytes of shared memory that " + who + " " +
           earlier + (within ? " without bar.warp.sync in between" : " without a barrier in between");
  });
}

void SharedMemory::check_state(const Access& access, bool reads) {
  const uint32_t offset = access.address % 4;
  const uint32_t mask = access.size >= 4 ? INITIALIZED : ((1u << access.size) - 1) << offset;
  const uint64_t first = access.address / 4, last = (access.address + access.size - 1) / 4;
  uint32_t missing = 0;  // bytes, a bit each
  for (uint64_t word = first; word <= last; ++word) {
    const uint8_t state = words_[word].state;
    if (async_ && (state & SharedCell::IN_FLIGHT) != 0) {
      access.warp.find_with(Kind::ASYNC_IN_FLIGHT, access.lane, access.address, [&] {
        return std::string(access.name) + " of " + number(access.size) + " bytes at offset " + number(access.address) +
               " of shared memory, where a cp.async that has not been waited for writes";
      });
      return;
    }
    if (reads) missing |= (~state & mask) << (4 * (word - first));
  }
  missing >>= offset;
  if (missing == 0) return;
  const Definedness::Hole hole{access.lane, missing, access.address, access.size, [](const auto&, const auto& hole) {
                                 return "read of " + number(hole.size) + " bytes at offset " + number(hole.address) +
                                        " of shared memory; the byte at offset " + number(hole.first()) +
                                        " has never been written";
                               }};
  access.warp.undefined.take(access.warp, hole);
}

void SharedMemory::forget(uint64_t address, uint32_t size) {
  if (!init_) return;
  for (uint64_t at = address; at < address + size; ++at) words_[at / 4].state &= static_cast<uint8_t>(~(1 << at % 4));
}

// The cells of a word's bytes.
SharedCell* SharedMemory::split(uint64_t word) {
  if (split_.size() < bytes.size() + 4) split_.resize(bytes.size() + 4);
  SharedCell* cells = &split_[word * 4];
  if ((words_[word].state & SharedCell::SPLIT) == 0) {
    std::fill_n(cells, 4, words_[word]);
    words_[word].state |= SharedCell::SPLIT;
  }
  return cells;
}

// Calls visit(cell, first byte, bytes) for the cells of an access: words where it touches all of one, bytes otherwise.
template <class Visit>
void SharedMemory::visit(const Access& access, Visit&& visit) {
  const uint64_t end = access.address + access.size;
  for (uint64_t at = access.address; at < end;) {
    const uint64_t word = at / 4;
    const bool whole = at % 4 == 0 && end - at >= 4;
    if (whole && (words_[word].state & SharedCell::SPLIT) == 0) {
      visit(words_[word], at, 4);
      at += 4;
      continue;
    }
    SharedCell* cells = split(word);
    const uint64_t stop = std::min(end, word * 4 + 4);
    for (; at < stop; ++at) visit(cells[at % 4], at, 1);
    if (whole) {
      // All bytes have had the same access; where they had the same past too, the word speaks for them again.
      bool same = true;
      for (int i = 1; i < 4; ++i) same = same && std::memcmp(&cells[0], &cells[i], sizeof(SharedCell) - 1) == 0;
      if (same) {
        const uint8_t state = words_[word].state;
        words_[word] = cells[0];
        words_[word].state = state & static_cast<uint8_t>(~SharedCell::SPLIT);
      }
    }
  }
}

void SharedMemory::note_read(const Warp& warp, uint32_t lane, SharedCell& cell) const {
  const uint32_t bit = 1u << warp.index;
  const bool own = cell.readers == bit;
  if (cell.read_time < floors_[warp.index] || (own && cell.read_time < warp.synced_all) ||
      (own && cell.reader_lane == lane)) {
    // Whoever is ordered after this read is ordered after those before it, too.
    cell.read_time = block_->time;
    cell.readers = bit;
    cell.reader_lane = static_cast<uint8_t>(lane);
  } else {
    cell.readers |= bit;
    cell.reader_lane = LANES;
  }
}

void SharedMemory::read_cell(Access& access, SharedCell& cell) {
  const uint32_t writer = cell.writer_lane & (SharedCell::STRONG - 1);
  const bool strong = (cell.writer_lane & SharedCell::STRONG) != 0;
  if (cell.write_time != 0 && !(strong && access.strong) &&
      !(cell.writer_warp == access.warp.index && writer == LANES) &&
      !ordered(access, cell.write_time, cell.writer_warp, writer)) {
    report_race(access, cell.writer_warp, writer, "has written");
  }
  if (!access.strong) note_read(access.warp, access.lane, cell);
}

// `equal`: the bytes hold the value already. `record`: the write takes place now.
void SharedMemory::write_cell(Access& access, SharedCell& cell, bool equal, bool record) {
  const uint32_t w = access.warp.index, bit = 1u << w;
  const uint32_t writer = cell.writer_lane & (SharedCell::STRONG - 1);
  const bool strong = (cell.writer_lane & SharedCell::STRONG) != 0;
  const bool unordered = cell.write_time != 0 && !ordered(access, cell.write_time, cell.writer_warp, writer);
  if (unordered && !equal && !(strong && access.strong)) report_race(access, cell.writer_warp, writer, "has written");
  for (uint32_t rest = cell.readers & ~bit; rest != 0; rest &= rest - 1) {
    const uint32_t reader = static_cast<uint32_t>(__builtin_ctz(rest));
    if (!ordered(access, cell.read_time, reader, LANES)) report_race(access, reader, cell.reader_lane, "has read");
  }
  if (cell.readers == bit && cell.reader_lane != access.lane) {
    bool after = ordered(access, cell.read_time, w, cell.reader_lane < LANES ? cell.reader_lane : access.lane ^ 1);
    if (!after && cell.reader_lane == LANES && access.warp.synced) {
      const uint32_t* known = access.warp.synced[access.lane];
      after = cell.read_time < *std::max_element(known, known + LANES);
    }
    if (!after) report_race(access, w, cell.reader_lane, "has read");
  }
  if (!record) return;
  const bool several = unordered && equal && cell.writer_warp == w && !strong;
  cell.write_time = block_->time;
  cell.read_time = cell.readers = 0;
  cell.writer_warp = static_cast<uint8_t>(w);
  cell.writer_lane = static_cast<uint8_t>((several ? LANES : access.lane) | (access.strong ? SharedCell::STRONG : 0));
}

bool SharedMemory::check_read(Warp& warp, uint32_t lane, uint64_t address, uint32_t size, bool strong) {
  if (!check_bounds(warp, lane, address, size, "read")) return false;
  if (!checked_) return true;
  floor_of(warp);
  Access access{warp, lane, address, size, strong, "read"};
  check_state(access, true);
  if (race_) visit(access, [&](SharedCell& cell, uint64_t, uint32_t) { read_cell(access, cell); });
  return true;
}

bool SharedMemory::check_write(Warp& warp, uint32_t lane, uint64_t address, uint32_t size, const uint8_t* data,
                               bool strong) {
  if (!check_bounds(warp, lane, address, size, "write")) return false;
  if (!checked_) return true;
  floor_of(warp);
  Access access{warp, lane, address, size, strong, "write"};
  check_state(access, false);
  if (race_) {
    visit(access, [&](SharedCell& cell, uint64_t at, uint32_t count) {
      const bool equal = data != nullptr && std::memcmp(&bytes[at], data + (at - address), count) == 0;
      write_cell(access, cell, equal, true);
    });
  }
  for (uint64_t at = address; at < address + size; ++at) words_[at / 4].state |= static_cast<uint8_t>(1 << at % 4);
  return true;
}

bool SharedMemory::check_atomic(Warp& warp, uint32_t lane, uint64_t address, uint32_t size) {
  if (!check_bounds(warp, lane, address, size, "atomic")) return false;
  if (!checked_) return true;
  floor_of(warp);
  Access access{warp, lane, address, size, true, "atomic"};
  check_state(access, true);
  if (race_) visit(access, [&](SharedCell& cell, uint64_t, uint32_t) { write_cell(access, cell, false, true); });
  for (uint64_t at = address; at < address + size; ++at) words_[at / 4].state |= static_cast<uint8_t>(1 << at % 4);
  return true;
}

bool SharedMemory::check_async_issue(Warp& warp, uint32_t lane, uint64_t address, uint32_t size) {
  if (!check_bounds(warp, lane, address, size, "cp.async write")) return false;
  if (!checked_) return true;
  floor_of(warp);
  Access access{warp, lane, address, size, false, "cp.async write"};
  check_state(access, false);
  if (race_) visit(access, [&](SharedCell& cell, uint64_t, uint32_t) { write_cell(access, cell, false, false); });
  SharedCell* const cells = &words_[address / 4];
  for (uint32_t i = 0; i < size / 4; ++i) cells[i].state |= SharedCell::IN_FLIGHT;
  return true;
}

void SharedMemory::check_async_delivery(Warp& warp, uint32_t lane, uint64_t address, uint32_t size) {
  if (!checked_) return;
  floor_of(warp);
  // Accesses since the issue are the async check's finding; without it they are races.
  if (race_ && !async_) {
    Access access{warp, lane, address, size, false, "cp.async write"};
    visit(access, [&](SharedCell& cell, uint64_t, uint32_t) { write_cell(access, cell, false, false); });
  }
  SharedCell now;
  if (race_) now.write_time = block_->time;
  now.writer_warp = static_cast<uint8_t>(warp.index);
  now.writer_lane = static_cast<uint8_t>(lane);
  now.state = INITIALIZED;
  std::fill_n(&words_[address / 4], size / 4, now);
}

}  // namespace sparse24::ptx
