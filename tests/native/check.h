// What the native tests share: CHECK, and buffers between inaccessible pages.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>

namespace sparse24::test {

template <class... Message>
[[noreturn]] void fail(const char* file, int line, const char* condition, const Message&... message) {
  std::cerr << file << ':' << line << ": failed: " << condition;
  if constexpr (sizeof...(message) > 0) std::cerr << ": ";
  (std::cerr << ... << message) << std::endl;
  std::_Exit(1);  // at once, from whichever thread
}

// CHECK(condition, message...): prints the place, the condition and the message, and ends the program with status 1.
#define CHECK(condition, ...)                                                                            \
  do {                                                                                                   \
    if (!(condition)) ::sparse24::test::fail(__FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__); \
  } while (0)

// `count` elements that end at an inaccessible page (or fewer than `alignment` bytes before it): a read or write past
// the end faults, whoever does it, inline assembly included. The bytes before the buffer are a canary, checked at the
// end, behind another inaccessible page.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, size_t alignment = alignof(T)) : count_(count), bytes_(count * sizeof(T)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes_ + alignment + page - 1) / page * page;
    mapped_ = inner_ + 2 * page;
    void* mapping = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mapping != MAP_FAILED);
    base_ = static_cast<uint8_t*>(mapping);
    first_ = base_ + page;
    CHECK(mprotect(first_, inner_, PROT_READ | PROT_WRITE) == 0);
    std::memset(first_, CANARY, inner_);
    data_ = first_ + (inner_ - bytes_) / alignment * alignment;
  }
  ~Guarded() {
    check();
    munmap(base_, mapped_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  // That nobody wrote beside the buffer.
  void check() const {
    for (const uint8_t* byte = first_; byte < data_; ++byte) CHECK(*byte == CANARY, "written before the buffer");
    for (const uint8_t* byte = data_ + bytes_; byte < first_ + inner_; ++byte) {
      CHECK(*byte == CANARY, "written past the buffer");
    }
  }
  // From here on a write to the buffer faults.
  void make_read_only() { CHECK(mprotect(first_, inner_, PROT_READ) == 0); }

  T* data() { return reinterpret_cast<T*>(data_); }
  const T* data() const { return reinterpret_cast<const T*>(data_); }
  int64_t size() const { return count_; }
  size_t bytes() const { return bytes_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + count_; }

 private:
  static constexpr uint8_t CANARY = 0xCA;
  int64_t count_;
  size_t bytes_, inner_, mapped_;
  uint8_t *base_, *first_, *data_;
};

// A fixed-seed generator whose sequence is the same everywhere (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(limit)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }  // both included
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }            // [0, 1)

 private:
  uint64_t state_;
};

}  // namespace sparse24::test
