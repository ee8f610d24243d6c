// The graph of publications and acquisitions behind BlockOrder. Synchronising costs one node; what a block knows is
// collected only when it meets an access of another block.
#include "csrc/ptx/block_order.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace sparse24::ptx {

BlockOrder::BlockOrder(uint64_t blocks) : blocks_(blocks) {
  if (blocks <= 1 || blocks > MAX_BLOCKS) return;
  states_ = static_cast<State**>(std::calloc(blocks, sizeof(State*)));
  if (states_ == nullptr) throw std::bad_alloc();
}

BlockOrder::~BlockOrder() {
  for (auto& cells : cells_) std::free(cells.load(std::memory_order_relaxed));
  std::free(states_);
}

GlobalCell* BlockOrder::make_cells(const Allocation& allocation, uint64_t region) {
  std::lock_guard lock(mutex_);
  GlobalCell* cells = cells_[region].load(std::memory_order_relaxed);
  if (cells != nullptr) return cells;
  // Zero bytes are cells that nobody has touched; calloc leaves their pages to be made on first use.
  static_assert(sizeof(GlobalCell) == 16 && std::atomic<uint64_t>::is_always_lock_free);
  cells = static_cast<GlobalCell*>(std::calloc(allocation.size / 4 + 1, sizeof(GlobalCell)));
  if (cells == nullptr) throw std::bad_alloc();
  cells_[region].store(cells, std::memory_order_release);
  return cells;
}

BlockOrder::State& BlockOrder::state(uint32_t block) {
  if (states_[block] == nullptr) {
    std::lock_guard lock(mutex_);
    states_[block] = &all_states_.emplace_back();
  }
  return *states_[block];
}

void BlockOrder::fence(uint32_t block) { ++state(block).epoch; }

void BlockOrder::publish_epoch(uint32_t block, uint64_t address) {
  const State& state = *states_[block];
  if (state.epoch == 1) return;  // it has acquired, but never fenced
  std::lock_guard lock(mutex_);
  const auto [it, first] = addresses_.try_emplace(address, -1);
  const int32_t newest = it->second;
  if (!first) {
    const Publication& last = publications_[newest];
    if (last.block == block && last.epoch == state.epoch - 1 && last.acquired == state.acquired) return;
  }
  it->second = static_cast<int32_t>(publications_.size());
  publications_.push_back({block, state.epoch - 1, newest, state.acquired});
  published_.store(static_cast<uint32_t>(publications_.size()), std::memory_order_release);
}

void BlockOrder::acquire_published(uint32_t block, uint64_t address) {
  State& mine = state(block);
  std::lock_guard lock(mutex_);
  mine.seen_address = address;
  mine.seen_count = static_cast<uint32_t>(publications_.size());
  const auto it = addresses_.find(address);
  if (it == addresses_.end()) return;
  if (mine.acquired >= 0 && acquisitions_[mine.acquired].publication == it->second) return;
  acquisitions_.push_back({it->second, mine.acquired});
  mine.acquired = static_cast<int32_t>(acquisitions_.size()) - 1;
}

bool BlockOrder::knows(uint32_t block, uint64_t access) {
  if (knows_nothing(block)) return false;
  State& mine = *states_[block];
  const uint32_t other = GlobalAccess::block_of(access), epoch = GlobalAccess::epoch_of(access);
  if (mine.latest == other && mine.latest_epoch >= epoch) return true;  // what is known stays so
  if (mine.learned != mine.acquired) {
    std::lock_guard lock(mutex_);
    std::vector<int32_t> pending;
    const auto enqueue = [&](int32_t publication) {
      if (publication >= 0 && mine.visited.insert(publication).second) pending.push_back(publication);
    };
    // Whoever has followed an acquisition has followed those before it as well.
    const auto follow = [&](int32_t acquired) {
      for (; acquired >= 0 && mine.followed.insert(acquired).second; acquired = acquisitions_[acquired].previous) {
        enqueue(acquisitions_[acquired].publication);
      }
    };
    follow(mine.acquired);
    while (!pending.empty()) {
      const Publication publication = publications_[pending.back()];
      pending.pop_back();
      uint32_t& known = mine.known[publication.block];
      known = std::max(known, publication.epoch);
      enqueue(publication.previous);
      follow(publication.acquired);
    }
    mine.learned = mine.acquired;
  }
  const auto it = mine.known.find(other);
  if (it == mine.known.end() || it->second < epoch) return false;
  mine.latest = other;
  mine.latest_epoch = it->second;
  return true;
}

}  // namespace sparse24::ptx
