// The images of a module: which of its cubins a device runs, and what a kernel takes of a multiprocessor there.
#pragma once
#include <string_view>

#include "csrc/cuda/launch.h"

namespace sparse24::cuda {

// Null where a device of compute capability `sm` runs none of them: the driver then compiles the PTX.
const Image* choose_image(const Module& module, int sm);

struct Resources {
  unsigned registers = 0;     // of a thread; 0: not known
  unsigned shared_bytes = 0;  // static
  unsigned max_threads = 0;   // of a block; 0: as the device has it
};
// Read from the cubin. Throws std::runtime_error where it has no kernel of that name.
Resources resources_of(const Image& image, std::string_view kernel);

// Throws std::runtime_error for what cuLaunchKernel would refuse or fault on, naming the kernel, the limit and what
// came: extents, registers, shared memory, and pointers that are not aligned as the kernel asks for.
void check_launch(const Launch& launch, const Device& device, const Resources& resources);

}  // namespace sparse24::cuda
