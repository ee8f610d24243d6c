// A cubin is an ELF file. What is read of it, as `cuobjdump -elf` shows it and `ptxas -v` confirms it
// (tests/test_native.py):
//   .nv.info            attributes of all kernels; EIATTR_REGCOUNT: symbol, registers of a thread
//   .nv.info.KERNEL     attributes of one; EIATTR_MAX_THREADS, EIATTR_REQNTID: threads of a block in x, y, z
//   .nv.shared.KERNEL   its size: static shared memory, with the driver's own 1 KB from sm_90 on
#include "csrc/cuda/image.h"

#include <elf.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sparse24::cuda {

namespace {

class Cubin {
 public:
  explicit Cubin(const Image& image) : bytes_(image.cubin) {
    header_ = at<Elf64_Ehdr>(0);
    names_ = section(header_.e_shstrndx).sh_offset;
  }

  int section_count() const { return header_.e_shnum; }
  Elf64_Shdr section(int i) const { return at<Elf64_Shdr>(header_.e_shoff + i * sizeof(Elf64_Shdr)); }
  // Its index; 0 where there is none.
  int find(const std::string& name) const {
    for (int i = 1; i < header_.e_shnum; ++i) {
      if (text(names_ + section(i).sh_name) == name) return i;
    }
    return 0;
  }

  // The symbol of a kernel; 0 where there is none.
  uint32_t symbol(std::string_view kernel) const {
    const Elf64_Shdr symbols = section(find(".symtab"));
    const size_t names = section(symbols.sh_link).sh_offset;
    for (uint32_t i = 0; i < symbols.sh_size / sizeof(Elf64_Sym); ++i) {
      const auto symbol = at<Elf64_Sym>(symbols.sh_offset + i * sizeof(Elf64_Sym));
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && text(names + symbol.st_name) == kernel) return i;
    }
    return 0;
  }

  // Calls found(attribute, words) for each attribute of a section of them.
  template <class Found>
  void attributes(const std::string& name, const Found& found) const {
    constexpr uint8_t SIZED = 4;  // the format with a size and as many bytes after it; others have two bytes, no more
    struct Attribute {
      uint8_t format, attribute;
      uint16_t size;
    };
    const int index = find(name);
    if (index == 0) return;
    const Elf64_Shdr place = section(index);
    for (size_t offset = place.sh_offset; offset < place.sh_offset + place.sh_size;) {
      const auto head = at<Attribute>(offset);
      offset += sizeof head;
      if (head.format != SIZED) continue;
      uint32_t words[3] = {};
      std::memcpy(words, bytes_ + offset, std::min<size_t>(head.size, sizeof words));
      found(head.attribute, words);
      offset += head.size;
    }
  }

 private:
  template <class T>
  T at(size_t offset) const {
    T value;
    std::memcpy(&value, bytes_ + offset, sizeof value);
    return value;
  }
  std::string_view text(size_t offset) const { return reinterpret_cast<const char*>(bytes_ + offset); }

  const unsigned char* bytes_;
  Elf64_Ehdr header_;
  size_t names_;
};

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the same for all from sm_80 on.
constexpr uint64_t MAX_GRID_X = 0x7fffffff, MAX_GRID_YZ = 65535, MAX_BLOCK_XY = 1024, MAX_BLOCK_Z = 64;
constexpr uint64_t MAX_THREADS = 1024, REGISTERS = 65536;

uint64_t round_up(uint64_t a, uint64_t b) { return (a + b - 1) / b * b; }

}  // namespace

const Image* choose_image(const Module& module, int sm) {
  const Image* best = nullptr;
  for (const Image& image : std::span(module.images, module.image_count)) {
    if (image.sm == sm) return &image;
    const bool later_minor = image.sm / 10 == sm / 10 && image.sm < sm;
    if (image.kind != 'a' && later_minor && (!best || image.sm > best->sm)) best = &image;
  }
  return best;
}

Resources resources_of(const Image& image, std::string_view kernel) {
  constexpr uint8_t MAX_THREADS_ATTRIBUTE = 0x05, REQUIRED_THREADS_ATTRIBUTE = 0x10, REGISTERS_ATTRIBUTE = 0x2f;
  constexpr unsigned SYSTEM_SHARED_BYTES = 1024, FIRST_SM_WITH_SYSTEM_SHARED = 90;
  const Cubin cubin(image);
  const std::string name(kernel);
  const uint32_t symbol = cubin.symbol(kernel);
  if (symbol == 0) throw std::runtime_error("the cubin for sm_" + std::to_string(image.sm) + " has no kernel " + name);

  Resources out;
  cubin.attributes(".nv.info", [&](uint8_t attribute, const uint32_t* words) {
    if (attribute == REGISTERS_ATTRIBUTE && words[0] == symbol) out.registers = words[1];
  });
  cubin.attributes(".nv.info." + name, [&](uint8_t attribute, const uint32_t* words) {
    if (attribute == MAX_THREADS_ATTRIBUTE || attribute == REQUIRED_THREADS_ATTRIBUTE) {
      out.max_threads = words[0] * words[1] * words[2];
    }
  });
  if (const int shared = cubin.find(".nv.shared." + name)) {
    out.shared_bytes = static_cast<unsigned>(cubin.section(shared).sh_size);
    if (image.sm >= static_cast<int>(FIRST_SM_WITH_SYSTEM_SHARED)) out.shared_bytes -= SYSTEM_SHARED_BYTES;
  }
  return out;
}

void check_launch(const Launch& launch, const Device& device, const Resources& resources) {
  const auto refuse = [&](const std::string& rule, uint64_t came) {
    throw std::runtime_error("kernel '" + std::string(launch.kernel) + "' cannot be launched on sm_" +
                             std::to_string(device.sm) + ": " + rule + "; got " + std::to_string(came));
  };
  const auto within = [&](const char* what, uint64_t came, uint64_t most) {
    if (came < 1 || came > most) refuse(std::string(what) + " must be 1 to " + std::to_string(most), came);
  };
  within("grid.x", launch.grid.x, MAX_GRID_X);
  within("grid.y", launch.grid.y, MAX_GRID_YZ);
  within("grid.z", launch.grid.z, MAX_GRID_YZ);
  within("block.x", launch.block.x, MAX_BLOCK_XY);
  within("block.y", launch.block.y, MAX_BLOCK_XY);
  within("block.z", launch.block.z, MAX_BLOCK_Z);
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  within("threads of a block", threads, resources.max_threads ? resources.max_threads : MAX_THREADS);

  // Warps get registers in units of 256, and four warps alike.
  const uint64_t warps = round_up((threads + 31) / 32, 4);
  const uint64_t registers = warps * round_up(uint64_t{resources.registers} * 32, 256);
  if (registers > REGISTERS) {
    refuse("registers of a block, " + std::to_string(resources.registers) + " a thread, must be at most " +
               std::to_string(REGISTERS),
           registers);
  }
  const uint64_t shared = uint64_t{launch.shared_bytes} + resources.shared_bytes;
  if (shared > device.shared_bytes_per_block) {
    refuse("bytes of shared memory, " + std::to_string(resources.shared_bytes) + " of them static, must be at most " +
               std::to_string(device.shared_bytes_per_block),
           shared);
  }
  for (const Range& range : launch.ranges) {
    const auto address = reinterpret_cast<uintptr_t>(range.data);
    if (address % range.alignment != 0) {
      refuse("the pointer at byte " + std::to_string(range.offset) + " of its arguments must be a multiple of " +
                 std::to_string(range.alignment),
             address);
    }
  }
}

}  // namespace sparse24::cuda
