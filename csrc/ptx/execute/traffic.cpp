// Waves and sectors. Most accesses are free of conflicts and in order, and are seen to be so in one pass.
#include "csrc/ptx/execute/traffic.h"

#include <algorithm>
#include <cstring>

#include "csrc/ptx/program.h"

namespace sparse24::ptx {
namespace {

constexpr uint32_t BANKS = 32, WORD = 4, WAVE = BANKS * WORD, SECTOR = 32;

// A set of up to 128 numbers.
class Distinct {
 public:
  Distinct() { std::memset(first_, 0xff, sizeof first_); }
  bool insert(uint64_t key) {
    uint8_t& head = first_[(key ^ key >> 7) % BUCKETS];
    for (uint8_t at = head; at != NONE; at = next_[at]) {
      if (keys_[at] == key) return false;
    }
    keys_[count_] = key;
    next_[count_] = head;
    head = static_cast<uint8_t>(count_++);
    return true;
  }
  uint32_t count() const { return count_; }

 private:
  static constexpr uint32_t BUCKETS = 64;
  static constexpr uint8_t NONE = 0xff;
  uint8_t first_[BUCKETS], next_[128];
  uint64_t keys_[128];
  uint32_t count_ = 0;
};

uint32_t at_least_one(uint64_t bytes, uint32_t unit) {
  return static_cast<uint32_t>(std::max<uint64_t>((bytes + unit - 1) / unit, 1));
}

// Waves of the lanes that hardware takes at once, where some of them share a bank.
uint32_t conflicting_waves(uint32_t lanes, const uint64_t* address, uint32_t size) {
  Distinct words;
  uint32_t by_bank[BANKS] = {}, most = 1;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const uint64_t first = address[__builtin_ctz(rest)] / WORD;
    for (uint64_t word = first; word < first + std::max(size / WORD, 1u); ++word) {
      if (words.insert(word)) most = std::max(most, ++by_bank[word % BANKS]);
    }
  }
  return most;
}

uint64_t distinct_bytes(uint32_t lanes, const uint64_t* address, uint32_t size) {
  Distinct starts;  // accesses are aligned: two of them are the same bytes or have none in common
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) starts.insert(address[__builtin_ctz(rest)]);
  return uint64_t{starts.count()} * size;
}

}  // namespace

void count_shared(OperationCounters& counters, uint32_t lanes, const uint64_t* address, uint32_t size) {
  const uint32_t group = size <= WORD ? LANES : LANES * WORD / std::min(size, 16u);
  const uint32_t unit = std::max(size, WORD), slots = WAVE / unit;
  const uint32_t group_mask = group == LANES ? ~0u : (1u << group) - 1;
  const uint32_t count = static_cast<uint32_t>(__builtin_popcount(lanes));
  bool conflicts = false;
  uint64_t places[4] = {};  // a bit for each access, 256 of them wide: enough to see that those of a tile are distinct
  for (uint32_t start = 0; start < LANES; start += group) {
    const uint32_t now = lanes >> start & group_mask;
    if (now == 0) continue;
    uint32_t used = 0;  // a bit for each place of an access among the banks
    for (uint32_t rest = now; rest != 0; rest &= rest - 1) {
      const uint64_t access = address[start + static_cast<uint32_t>(__builtin_ctz(rest))] / unit;
      used |= 1u << access % slots;
      places[access / 64 % 4] |= uint64_t{1} << access % 64;
    }
    if (__builtin_popcount(used) == __builtin_popcount(now)) {
      ++counters.shared_waves;
    } else {
      counters.shared_waves += conflicting_waves(now << start, address, size);
      conflicts = true;
    }
  }
  counters.bytes += uint64_t{size} * count;
  uint32_t distinct = 0;
  for (const uint64_t part : places) distinct += static_cast<uint32_t>(__builtin_popcountll(part));
  const bool all_distinct = distinct == count || (!conflicts && group == LANES);
  counters.shared_ideal +=
      at_least_one(all_distinct ? uint64_t{count} * size : distinct_bytes(lanes, address, size), WAVE);
}

void count_global(OperationCounters& counters, uint32_t lanes, const uint64_t* address, uint32_t size) {
  uint32_t sectors = 0;
  uint64_t bytes = 0, end = 0, last_sector = ~uint64_t{0};
  bool ascending = true;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const uint64_t start = address[__builtin_ctz(rest)];
    if (start < end) {
      if (start + size == end) continue;  // the same bytes as the lane before
      ascending = false;
      break;
    }
    const uint64_t first = start / SECTOR, last = (start + size - 1) / SECTOR;
    sectors += static_cast<uint32_t>(last - first) + (first != last_sector);
    last_sector = last;
    bytes += size;
    end = start + size;
  }
  if (!ascending) {
    Distinct all;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      const uint64_t start = address[__builtin_ctz(rest)];
      for (uint64_t sector = start / SECTOR; sector <= (start + size - 1) / SECTOR; ++sector) all.insert(sector);
    }
    sectors = all.count();
    bytes = distinct_bytes(lanes, address, size);
  }
  counters.global_sectors += sectors;
  counters.global_ideal += at_least_one(bytes, SECTOR);
  counters.bytes += uint64_t{size} * static_cast<uint32_t>(__builtin_popcount(lanes));
}

}  // namespace sparse24::ptx
