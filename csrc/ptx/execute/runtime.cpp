// The functions of the CUDA runtime that kernels call: vprintf and __assertfail. Their arguments lie in .param
// variables, of which the slots hold the places in local memory. Source: CUDA C++ Programming Guide, "Formatted
// Output".
#include "csrc/ptx/execute/runtime.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "csrc/ptx/machine.h"
#include "csrc/ptx/shared_memory.h"

namespace sparse24::ptx {
namespace {

// The memory of one lane from an address on.
struct View {
  const uint8_t* data = nullptr;
  uint64_t size = 0;

  template <class T>
  bool read(uint64_t offset, T& value) const {
    if (offset > size || size - offset < sizeof value) return false;
    std::memcpy(&value, data + offset, sizeof value);
    return true;
  }
};

View from(const uint8_t* data, uint64_t size, uint64_t offset) {
  return offset < size ? View{data + offset, size - offset} : View{};
}

size_t frame_of(const Warp& warp, uint32_t lane) {
  return (size_t{warp.index} * LANES + lane) * warp.block->program->local_bytes;
}

View local_view(const Warp& warp, uint32_t lane, uint64_t offset) {
  return from(warp.block->local.data() + frame_of(warp, lane), warp.block->program->local_bytes, offset);
}

// What a generic address leads to; nothing where it is nobody's.
View view(const Warp& warp, uint32_t lane, uint64_t address) {
  Block& block = *warp.block;
  if (address - LOCAL_WINDOW < WINDOW_BYTES) return local_view(warp, lane, address - LOCAL_WINDOW);
  if (address - SHARED_WINDOW < WINDOW_BYTES) {
    return from(block.shared->bytes.data(), block.shared->bytes.size(), address - SHARED_WINDOW);
  }
  const Allocation* const allocation = block.launch->memory.find(address);
  if (allocation == nullptr || !allocation->live || address < allocation->base) return {};
  return from(allocation->host, allocation->size, address - allocation->base);
}

// The string at a generic address; false where it has no end in its buffer.
bool read_string(Warp& warp, uint32_t lane, uint64_t address, std::string& text) {
  const View bytes = view(warp, lane, address);
  const void* const end = bytes.size == 0 ? nullptr : std::memchr(bytes.data, 0, bytes.size);
  if (end == nullptr) {
    warp.find(Kind::OUT_OF_BOUNDS, lane, address, "a string that has no end in the buffer it is in");
    return false;
  }
  text.assign(reinterpret_cast<const char*>(bytes.data), static_cast<const char*>(end));
  return true;
}

// The 8 bytes of an argument of the call.
uint64_t argument(Warp& warp, uint32_t lane, Slot slot) {
  uint64_t value = 0;
  const View bytes = local_view(warp, lane, warp.lanes<uint64_t>(slot)[lane]);
  if (bytes.size != 0) std::memcpy(&value, bytes.data, std::min<uint64_t>(bytes.size, sizeof value));
  return value;
}

template <class T>
std::string formatted(const std::string& format, T value) {
  const int size = std::snprintf(nullptr, 0, format.c_str(), value);
  std::string text(size > 0 ? static_cast<size_t>(size) : 0, '\0');
  std::snprintf(text.data(), text.size() + 1, format.c_str(), value);
  return text;
}

// One call of printf by one lane.
class Printer {
 public:
  Printer(Warp& warp, uint32_t lane, View arguments) : warp_(warp), lane_(lane), arguments_(arguments) {}

  // The number of arguments that it has taken, or what CUDA returns on errors.
  int print(const std::string& format) {
    size_t at = 0;
    while (at < format.size()) {
      const size_t percent = std::min(format.find('%', at), format.size());
      text_.append(format, at, percent - at);
      at = percent;
      if (at < format.size() && !conversion(format, at)) return -2;
    }
    warp_.block->launch->print(text_);
    return taken_;
  }

 private:
  template <class T>
  bool take(T& value) {
    offset_ = (offset_ + sizeof value - 1) / sizeof value * sizeof value;
    if (!arguments_.read(offset_, value)) {
      warp_.find(Kind::OUT_OF_BOUNDS, lane_, offset_, "printf reads more arguments than its buffer has");
      return false;
    }
    offset_ += sizeof value;
    ++taken_;
    return true;
  }

  // %[flags][width][.precision][length]letter
  bool conversion(const std::string& format, size_t& at) {
    const size_t begin = at++;
    std::string spec = "%";
    const auto number = [&] {
      if (at < format.size() && format[at] == '*') {
        int32_t value = 0;
        if (!take(value)) return false;
        spec += std::to_string(std::clamp(value, -1000, 1000));
        ++at;
        return true;
      }
      size_t digits = 0;
      while (at < format.size() && format[at] >= '0' && format[at] <= '9') {
        if (++digits <= 3) spec += format[at];  // a width of thousands is nobody's wish
        ++at;
      }
      return true;
    };
    while (at < format.size() && std::strchr("-+ #0", format[at]) != nullptr) spec += format[at++];
    if (!number()) return false;
    if (at < format.size() && format[at] == '.') {
      spec += format[at++];
      if (!number()) return false;
    }
    bool wide = false;
    while (at < format.size() && std::strchr("hlLqjzt", format[at]) != nullptr) wide |= format[at++] != 'h';
    const char letter = at < format.size() ? format[at++] : '\0';
    switch (letter) {
      case '%':
        text_ += '%';
        return true;
      case 'd':
      case 'i':
        return wide ? append<int64_t, long long>(spec + "ll" + letter) : append<int32_t, int>(spec + letter);
      case 'u':
      case 'o':
      case 'x':
      case 'X':
        return wide ? append<uint64_t, unsigned long long>(spec + "ll" + letter)
                    : append<uint32_t, unsigned>(spec + letter);
      case 'c':
        return append<int32_t, int>(spec + letter);
      case 'p':
        return append<uint64_t, void*>(spec + letter);
      case 's': {
        uint64_t address = 0;
        std::string text;
        if (!take(address) || !read_string(warp_, lane_, address, text)) return false;
        text_ += formatted(spec + letter, text.c_str());
        return true;
      }
      default:
        if (letter != '\0' && std::strchr("fFeEgGaA", letter) != nullptr) return append<double, double>(spec + letter);
        text_.append(format, begin, at - begin);  // no conversion: as it stands
        return true;
    }
  }

  template <class T, class U>
  bool append(const std::string& spec) {
    T value{};
    if (!take(value)) return false;
    if constexpr (std::is_pointer_v<U>) {
      text_ += formatted(spec, reinterpret_cast<U>(value));
    } else {
      text_ += formatted(spec, static_cast<U>(value));
    }
    return true;
  }

  Warp& warp_;
  uint32_t lane_;
  View arguments_;
  uint64_t offset_ = 0;
  int taken_ = 0;
  std::string text_;
};

// Slots: [result], format, arguments.
void print(Warp& warp, const Operation& operation, uint32_t lanes) {
  const int results = operation.count[0];
  each(lanes, [&](int index) {
    const auto lane = static_cast<uint32_t>(index);
    const uint64_t address = argument(warp, lane, operation.slot[results]);
    int taken = -1;  // of a null format
    std::string format;
    if (address != 0) {
      const View arguments = view(warp, lane, argument(warp, lane, operation.slot[results + 1]));
      taken = read_string(warp, lane, address, format) ? Printer(warp, lane, arguments).print(format) : -2;
    }
    if (results == 0) return;
    const uint64_t place = warp.lanes<uint64_t>(operation.slot[0])[lane];
    if (place + sizeof taken > warp.block->program->local_bytes) return;
    std::memcpy(warp.block->local.data() + frame_of(warp, lane) + place, &taken, sizeof taken);
    if (warp.block->local_initialized.empty()) return;
    std::memset(warp.block->local_initialized.data() + frame_of(warp, lane) + place, 1, sizeof taken);
  });
}

bool choose_print(const Chosen&, Operation& operation) {
  operation.run = print;
  return operation.count[0] <= 1 && operation.count[1] == 2;
}

// Slots: message, file, line, function, size of a character.
void assert_failed(Warp& warp, const Operation& operation, uint32_t lanes) {
  const auto lane = static_cast<uint32_t>(std::countr_zero(lanes));
  std::string message, file, function;
  for (auto& [text, slot] : {std::pair{&message, 0}, {&file, 1}, {&function, 3}}) {
    if (!read_string(warp, lane, argument(warp, lane, operation.slot[slot]), *text)) text->assign(1, '?');
  }
  const auto line = static_cast<uint32_t>(argument(warp, lane, operation.slot[2]));
  warp.find_with(Kind::TRAP, lane, 0, [&] {
    return file + ":" + std::to_string(line) + ": " + function + ": assertion `" + message + "` failed";
  });
}

bool choose_assert(const Chosen&, Operation& operation) {
  operation.run = assert_failed;
  operation.flow = Flow::TRAP;
  return operation.count[0] == 0 && operation.count[1] == 5;
}

constexpr Form FORMS[] = {
    {"call.vprintf", "", "", choose_print},
    {"call.__assertfail", "", "", choose_assert},
};

}  // namespace

Forms runtime_forms() { return FORMS; }

}  // namespace sparse24::ptx
