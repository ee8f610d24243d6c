// libsparse24ptx.so: load a PTX text, run its kernels on the CPU, get a report. A plain C interface: no C++ type, no
// exception and no allocation crosses it. Strings returned are owned by the object they were asked of.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define SPARSE24_PTX_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sparse24_ptx_module sparse24_ptx_module;
typedef struct sparse24_ptx_report sparse24_ptx_report;

typedef struct {
  uint32_t grid[3], block[3];
  const void* arguments;  // the kernel's parameter space, as sparse24_ptx_describe lays it out
  size_t argument_bytes;
  uint32_t dynamic_shared;   // bytes
  uint32_t shared_limit;     // bytes of shared memory a block may have; 0: as the module's target has it
  uint32_t checks;           // bits: 1 memory, 2 init, 4 race, 8 sync, 16 async, 32 tensor
  uint32_t counters;         // 0 or 1
  uint32_t numerics;         // 0 ieee, 1 sm_80, 2 sm_90, 3 float64
  uint32_t sparse_products;  // products mma.sp sums at once; 0: as mma does. What hardware does is not known
  uint32_t order;            // 0 forward, 1 reverse, 2 random
  uint64_t seed;
  uint32_t threads;           // 0: one a core
  uint64_t budget;            // warp instructions a block may execute; 0: the default
  int (*interrupted)(void*);  // asked now and then from the calling thread; not 0: stop. May be null
  void* context;              // its argument
} sparse24_ptx_launch;

// Null on failure; sparse24_ptx_error() then says why (of the calling thread, until its next call).
SPARSE24_PTX_API sparse24_ptx_module* sparse24_ptx_load(const char* text, size_t size);
SPARSE24_PTX_API void sparse24_ptx_unload(sparse24_ptx_module* module);
// JSON: target, version, the kernels' names, and the .global and .const variables (name, type, elements, bytes).
SPARSE24_PTX_API const char* sparse24_ptx_describe(sparse24_ptx_module* module);
// JSON of one kernel: parameters, shared and local bytes, thread limits, registers, instructions, what is unsupported.
// Null where there is none of that name.
SPARSE24_PTX_API const char* sparse24_ptx_describe_kernel(sparse24_ptx_module* module, const char* name);
// 0 where the kernel can be run: it decodes, and nothing in it is unsupported.
SPARSE24_PTX_API int sparse24_ptx_decode(sparse24_ptx_module* module, const char* kernel);
// The bytes of a .global or .const variable; null where there is none of that name.
SPARSE24_PTX_API void* sparse24_ptx_variable(sparse24_ptx_module* module, const char* name, size_t* size);

// A device address for `size` bytes at `host`, a multiple of `align` and of no greater power of two; 0 on failure.
SPARSE24_PTX_API uint64_t sparse24_ptx_allocate(void* host, uint64_t size, uint32_t align, int initialized);
SPARSE24_PTX_API void sparse24_ptx_free(uint64_t address);

// Null on failure: no such kernel, an unsupported instruction, a launch that the driver would refuse.
SPARSE24_PTX_API sparse24_ptx_report* sparse24_ptx_run(sparse24_ptx_module* module, const char* kernel,
                                                       const sparse24_ptx_launch* launch);
SPARSE24_PTX_API size_t sparse24_ptx_finding_count(const sparse24_ptx_report* report);
SPARSE24_PTX_API const char* sparse24_ptx_report_json(sparse24_ptx_report* report);
// The first findings in words, each on a line that begins with two spaces; empty where there is none.
SPARSE24_PTX_API const char* sparse24_ptx_report_text(sparse24_ptx_report* report);
SPARSE24_PTX_API void sparse24_ptx_discard(sparse24_ptx_report* report);

SPARSE24_PTX_API const char* sparse24_ptx_instructions(void);  // the table of supported instructions, markdown
SPARSE24_PTX_API const char* sparse24_ptx_error(void);
// What kind of failure that was; for a fault of the PTX text also where, from 1 (0: not known). Both may be null.
enum {
  SPARSE24_PTX_OK = 0,
  SPARSE24_PTX_TEXT = 1,         // syntax, or an instruction that is not supported
  SPARSE24_PTX_ARGUMENT = 2,     // of the call
  SPARSE24_PTX_INTERRUPTED = 3,  // by `interrupted`
  SPARSE24_PTX_RESOURCES = 4,    // out of memory, of device addresses, of threads
};
SPARSE24_PTX_API int sparse24_ptx_error_kind(uint32_t* line, uint32_t* column);
// "avx512" or "portable": what the tensor cores' arithmetic runs on. `force` null: no change; null on failure.
SPARSE24_PTX_API const char* sparse24_ptx_isa(const char* force);

#ifdef __cplusplus
}
#endif
