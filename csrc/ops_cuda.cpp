// CUDA implementations of the operators: check, allocate, launch.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "csrc/arguments.h"
#include "csrc/cuda/launch.h"

namespace sparse24::ops {

namespace {

// The CUstream that is current in torch. torch 2.13 tells through its stable ABI; before that only libtorch_cuda does,
// which torch has loaded where a lookup by name alone does not reach it.
void* current_stream(int device) {
  using StreamOf = AOTITorchError (*)(int32_t, void**);
  using NativeHandle = AOTITorchError (*)(StreamHandle, void**);
  static const auto native_handle = reinterpret_cast<NativeHandle>(dlsym(RTLD_DEFAULT, "torch_stream_native_handle"));
  static const auto stream_of = [] {
    void* torch_cuda = native_handle ? nullptr : dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<StreamOf>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream = nullptr;
  if (native_handle) {
    StreamHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
    const AOTITorchError error = native_handle(handle, &stream);
    aoti_torch_delete_stream(handle);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
  } else {
    REQUIRE(stream_of != nullptr,
            "this torch tells no CUDA stream: it has neither torch_stream_native_handle nor "
            "aoti_torch_get_current_cuda_stream");
    STABLE_TORCH_ERROR_CODE_CHECK(stream_of(device, &stream));
  }
  return stream;
}

Tensor decompress(const Tensor& values, const Tensor& meta, int64_t in_features, std::string dtype,
                  std::string pattern) {
  const Element element = element_of(dtype);
  const Pattern kind = pattern_of(pattern);
  const int64_t rows = check_compressed(values, meta, in_features, element, kind);
  const int device = values.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor canonical_values = dense_rows(values), canonical_meta = dense_rows(meta);
  const int64_t columns = element == Element::I4 ? (in_features + 1) / 2 : in_features;
  Tensor dense = empty_like_device(values, {rows, columns}, storage_of(element));
  if (rows == 0 || in_features == 0) return dense;
  cuda::run_on_driver(cuda::describe_decompress(canonical_values.const_data_ptr(),
                                                static_cast<const uint8_t*>(canonical_meta.const_data_ptr()),
                                                dense.mutable_data_ptr(), rows, in_features, element, kind),
                      device, current_stream(device));
  return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse24, CUDA, m) { m.impl("decompress", TORCH_BOX(&decompress)); }

}  // namespace sparse24::ops
