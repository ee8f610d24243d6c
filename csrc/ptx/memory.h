// The memory that kernels see: buffers of the host between poisoned addresses, and what is known of each byte.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace sparse24::ptx {

// A device address names its allocation in the bits from REGION_BITS up: each has 2^36 bytes of addresses to itself, so
// that no stray pointer reaches a neighbour. Regions 0 and above are never given away: null and small integers fault.
constexpr int REGION_BITS = 36;
constexpr int REGIONS = 1024;
// Generic addresses of the other spaces: windows above all regions.
constexpr uint64_t SHARED_WINDOW = uint64_t{0x7e} << 40;
constexpr uint64_t LOCAL_WINDOW = uint64_t{0x7d} << 40;
constexpr uint64_t PARAM_WINDOW = uint64_t{0x7c} << 40;
constexpr uint64_t WINDOW_BYTES = uint64_t{1} << 40;

// Who last touched a word of global memory (4 bytes), as GlobalAccess of block_order.h packs it. 0: nobody.
struct GlobalCell {
  std::atomic<uint64_t> writer{0}, reader{0};
};

struct Allocation {
  uint8_t* host = nullptr;
  uint64_t base = 0;  // device address of the first byte
  uint64_t size = 0;
  uint8_t* initialized = nullptr;  // one byte a byte; null: all are
  bool read_only = false;          // .const
  bool live = false;               // false: freed, or never given out
  bool freed = false;
};

class Memory {
 public:
  static Memory& instance();  // one address space for the process

  // Gives `size` bytes at `host` an address that is a multiple of `align` and of no greater power of two, between
  // addresses that belong to nobody. They stay the caller's; accesses go straight to them. `initialized`: whether they
  // count as written. Throws std::invalid_argument for an `align` that is no power of two up to 4096, std::length_error
  // when all regions are in use.
  uint64_t allocate(void* host, uint64_t size, uint32_t align, bool initialized, bool read_only = false);
  // Accesses to a freed address are found and named until its region is used again, which is as late as possible.
  void free(uint64_t address);

  // The allocation whose region `address` is in, live or not; null where no region is.
  Allocation* find(uint64_t address) {
    const uint64_t region = address >> REGION_BITS;
    return region < REGIONS ? &regions_[region] : nullptr;
  }

 private:
  std::mutex mutex_;
  std::array<Allocation, REGIONS> regions_{};
  std::vector<std::unique_ptr<uint8_t[]>> initialized_;  // by region
  std::deque<uint32_t> unused_;                          // regions to give out, the longest unused first
};

}  // namespace sparse24::ptx
