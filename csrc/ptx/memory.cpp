// The process's device address space: which buffer lies in which region.
#include "csrc/ptx/memory.h"

#include <bit>
#include <stdexcept>

namespace sparse24::ptx {
namespace {

constexpr uint32_t MAX_ALIGN = 4096;
// A buffer begins in the middle of its region: a pointer that strays by up to 32 GB, either way, is still named by it.
constexpr uint64_t MIDDLE = uint64_t{1} << (REGION_BITS - 1);
constexpr uint64_t MAX_BYTES = MIDDLE - 2 * MAX_ALIGN;

}  // namespace

Memory& Memory::instance() {
  static Memory memory;
  static const bool filled = [] {
    for (uint32_t region = 1; region < REGIONS; ++region) memory.unused_.push_back(region);
    memory.initialized_.resize(REGIONS);
    return true;
  }();
  static_cast<void>(filled);
  return memory;
}

uint64_t Memory::allocate(void* host, uint64_t size, uint32_t align, bool initialized, bool read_only) {
  if (!std::has_single_bit(align) || align > MAX_ALIGN) {
    throw std::invalid_argument("align must be a power of two up to " + std::to_string(MAX_ALIGN) + "; got " +
                                std::to_string(align));
  }
  if (size > MAX_BYTES) throw std::length_error("a buffer has at most " + std::to_string(MAX_BYTES) + " bytes");
  std::unique_ptr<uint8_t[]> known;
  if (!initialized && size > 0) known = std::make_unique<uint8_t[]>(size);
  std::lock_guard lock(mutex_);
  if (unused_.empty()) {
    throw std::length_error("all " + std::to_string(REGIONS - 1) + " buffers of device memory are in use");
  }
  const uint32_t region = unused_.front();
  unused_.pop_front();
  initialized_[region] = std::move(known);
  Allocation allocation;
  allocation.host = static_cast<uint8_t*>(host);
  // MIDDLE is a multiple of twice any `align`: one `align` on top leaves a multiple of no greater power of two.
  allocation.base = (uint64_t{region} << REGION_BITS) + MIDDLE + align;
  allocation.size = size;
  allocation.initialized = initialized_[region].get();
  allocation.read_only = read_only;
  allocation.live = true;
  regions_[region] = allocation;
  return allocation.base;
}

void Memory::free(uint64_t address) {
  std::lock_guard lock(mutex_);
  Allocation* allocation = find(address);
  if (allocation == nullptr || !allocation->live || allocation->base != address) return;
  const uint64_t region = address >> REGION_BITS;
  allocation->live = false;
  allocation->freed = true;
  allocation->host = nullptr;
  allocation->initialized = nullptr;
  initialized_[region].reset();
  unused_.push_back(static_cast<uint32_t>(region));
}

}  // namespace sparse24::ptx
