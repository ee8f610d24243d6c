// The operators on a device: check, allocate, launch. One implementation for two machines: CUDA tensors run through the
// driver; CPU tensors, in a thread that emulates, on the emulator.
#include "csrc/ops_device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "csrc/cpu/linear/linear.h"
#include "csrc/cuda/driver.h"
#include "csrc/cuda/known_answer.h"
#include "csrc/cuda/linear.h"

namespace sparse24::ops {

namespace {

using cuda::Machine;
using torch::stable::accelerator::DeviceGuard;

// ---- On either machine: tensors on its device, operands that have passed every check ----

// The kernels count the elements of a row, their bytes, and the rows of W in 31 bits.
void check_features(int64_t out_features, int64_t in_features) {
  constexpr int64_t MAX_FEATURES = int64_t{1} << 30;
  REQUIRE(out_features < MAX_FEATURES && in_features < MAX_FEATURES,
          "out_features and in_features must be less than 2^30 on a GPU; got ", out_features, " and ", in_features);
}

Tensor pack_on(const Machine& machine, const Tensor& values, const Tensor& meta, Element element, int64_t in_features) {
  const int64_t rows = values.size(0);
  check_features(rows, in_features);
  Tensor packed = empty_like_device(values, {cuda::packed_bytes(element, rows, in_features)}, ScalarType::Byte);
  if (packed.numel() == 0) return packed;
  machine.run(cuda::describe_pack(values.const_data_ptr(), static_cast<const uint8_t*>(meta.const_data_ptr()), element,
                                  rows, in_features, static_cast<uint8_t*>(packed.mutable_data_ptr())));
  return packed;
}

Tensor decompress_on(const Machine& machine, const Tensor& values_in, const Tensor& meta_in, int64_t in_features,
                     Element element, Pattern pattern) {
  const Tensor values = dense_rows(values_in), meta = dense_rows(meta_in);
  const int64_t rows = values.size(0);
  const int64_t columns = element == Element::I4 ? (in_features + 1) / 2 : in_features;
  Tensor dense = empty_like_device(values, {rows, columns}, storage_of(element));
  if (rows == 0 || in_features == 0) return dense;
  machine.run(cuda::describe_decompress(values.const_data_ptr(), static_cast<const uint8_t*>(meta.const_data_ptr()),
                                        dense.mutable_data_ptr(), rows, in_features, element, pattern));
  return dense;
}

// Of x as int8: so many that every row may be copied 16 bytes at a time.
int64_t padded_columns(int64_t in_features) { return (in_features + 15) / 16 * 16; }

// x and its scales as int8; columns beyond in_features are zeros.
void quantize_x(const Machine& machine, LinearOperands& in) {
  if (in.in_features == 0) {  // a row of nothing has the scale of zeros
    in.x_scales = torch::stable::fill_(empty_like_device(in.x, {1}, ScalarType::Float), 1.0);
    return;
  }
  const int64_t columns = padded_columns(in.in_features);
  const Tensor q = empty_like_device(in.x, {in.tokens, columns}, ScalarType::Char);
  in.x_scales = empty_like_device(in.x, {in.tokens}, ScalarType::Float);
  machine.run(cuda::describe_quantize(in.x.const_data_ptr(), in.x_stride, element_of("x", in.x.scalar_type()),
                                      in.tokens, in.in_features, static_cast<int8_t*>(q.mutable_data_ptr()), columns,
                                      static_cast<float*>(in.x_scales->mutable_data_ptr())));
  in.x = q;
  in.x_stride = in.in_features = columns;  // W is padded to whole blocks of more columns than that
}

// A kernel by name, and splits of K, instead of those that the table has; empty and 0: as the table has it.
struct Asked {
  std::string kernel;
  int splits = 0;
};
thread_local Asked asked_on_cuda;

cuda::Plan plan_as_asked(const cuda::Linear& call, const cuda::Device& device, const Asked& asked) {
  const cuda::Plan plan = cuda::plan_linear(call, device);
  if (plan.splits == 0 || (asked.kernel.empty() && asked.splits == 0)) return plan;
  const std::string kernel = asked.kernel.empty() ? plan.kernel : asked.kernel;
  const auto found = cuda::plan_linear_as(call, device, kernel, std::max(asked.splits, 1));
  if (found) return *found;
  std::string names;
  for (const char* name : cuda::linear_kernels(call.element)) names += std::string(names.empty() ? "" : ", ") + name;
  refuse("linear_kernel must be one of ", names, " that takes this alignment, shape and device; got ", kernel);
}

Tensor linear_on(const Machine& machine, LinearOperands in, const Tensor& packed, const Asked& asked) {
  const bool int8 = in.element == Element::I8;
  REQUIRE(!in.weight_only, "weight_only must be false on a GPU: its kernels round x to int8 too; got true");
  REQUIRE(int8 || in.x.scalar_type() == storage_of(in.element), "x must be ", name_of(storage_of(in.element)),
          ", the dtype of the weight, on a GPU; got ", name_of(in.x.scalar_type()));
  REQUIRE(in.tokens < int64_t{1} << 31, "x must have fewer than 2^31 rows on a GPU; got ", in.tokens);
  constexpr int64_t MAX_STRIDE = int64_t{1} << 30;  // the kernels step from row to row by 32 bits, in bytes
  if (in.tokens > 1 && in.x_stride >= MAX_STRIDE) {
    in.x = torch::stable::contiguous(in.x);
    in.x_stride = in.in_features;
  }

  const Tensor y = empty_like_device(in.x, in.y_shape, in.y_type);
  if (in.tokens == 0 || in.out_features == 0) return y;
  if (int8 && in.x.scalar_type() != ScalarType::Char) quantize_x(machine, in);

  cuda::Linear call{};
  call.element = in.element;
  call.x = in.x.const_data_ptr();
  call.x_stride = in.x_stride;
  call.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  call.in_features = in.in_features;
  call.epilogue = in.epilogue(y);

  const cuda::Plan plan = plan_as_asked(call, machine.device(), asked);
  const Tensor workspace = empty_like_device(in.x, {plan.workspace_bytes}, ScalarType::Byte);
  cuda::run_linear(machine, call, plan, workspace.mutable_data_ptr());
  return y;
}

// ---- The driver ----

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

// The device of a tensor, made current, with its stream.
struct OnDevice {
  int device;
  DeviceGuard guard;
  void* stream;
  cuda::DriverMachine machine;

  explicit OnDevice(const Tensor& tensor)
      : device(tensor.get_device_index()), guard(device), stream(current_stream(device)), machine(device, stream) {}
};

std::string device_name(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : tensor.is_cpu() ? "cpu" : "another";
}

void check_device(const char* argument, const Tensor& tensor, const Tensor& packed) {
  REQUIRE(tensor.device() == packed.device(), argument, " must be on the device of packed, ", device_name(packed),
          "; got ", device_name(tensor));
}

Tensor decompress(const Tensor& values, const Tensor& meta, int64_t in_features, std::string dtype,
                  std::string pattern) {
  const Element element = element_of(dtype);
  const Pattern kind = pattern_of(pattern);
  check_compressed(values, meta, in_features, element, kind);
  return decompress_on(OnDevice(values).machine, values, meta, in_features, element, kind);
}

void check_no_groups(int64_t group_size) {
  REQUIRE(group_size == 0, "group_size must be None on a GPU: none of its kernels takes scales of groups; got ",
          group_size);
}

Tensor pack(const Tensor& values, const Tensor& meta, int64_t in_features, std::string dtype, int64_t group_size) {
  check_no_groups(group_size);
  const Element element = linear_element(dtype);
  check_compressed(values, meta, in_features, device_element(element), Pattern::TWO_FOUR);
  return pack_on(OnDevice(values).machine, dense_rows(values), dense_rows(meta), element, in_features);
}

const uint8_t* check_packed(const Tensor& packed, const std::string& dtype, Element element, int64_t out_features,
                            int64_t in_features) {
  constexpr int ALIGNMENT = 16;
  check_features(out_features, in_features);
  return packed_data(packed, cuda::packed_bytes(device_element(element), out_features, in_features), ALIGNMENT, dtype,
                     out_features, in_features);
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t out_features, int64_t in_features, std::string dtype,
                                  int64_t group_size) {
  check_no_groups(group_size);
  const Element element = linear_element(dtype);
  const uint8_t* const data = check_packed(packed, dtype, element, out_features, in_features);
  const int64_t groups = group_count(Pattern::TWO_FOUR, in_features);
  Tensor values = empty_like_device(packed, {out_features, 2 * groups}, storage_of(element));
  Tensor meta =
      empty_like_device(packed, {out_features, meta_row_bytes(Pattern::TWO_FOUR, in_features)}, ScalarType::Byte);
  if (out_features == 0 || in_features == 0) return {values, meta};
  OnDevice(packed).machine.run(cuda::describe_unpack(data, element, out_features, in_features,
                                                     values.mutable_data_ptr(),
                                                     static_cast<uint8_t*>(meta.mutable_data_ptr())));
  return {values, meta};
}

Tensor linear_on_cuda(LinearOperands in, const Tensor& packed, const std::string& dtype) {
  check_no_groups(in.group_size);
  check_packed(packed, dtype, in.element, in.out_features, in.in_features);
  check_device("x", in.x, packed);
  if (in.bias) check_device("bias", *in.bias, packed);
  if (in.scales) check_device("scales", *in.scales, packed);
  if (in.x_scales) check_device("x_scales", *in.x_scales, packed);
  if (in.residual) check_device("residual", *in.residual, packed);
  if (in.y_scale) check_device("y_scale", *in.y_scale, packed);
  const OnDevice on(packed);
  const std::string& problem = cuda::device_problem(packed.get_device_index(), on.machine.stream(), in.element);
  REQUIRE(problem.empty(), "no sparse ", dtype, " product on ", device_name(packed), ": ", problem);
  return linear_on(on.machine, std::move(in), packed, asked_on_cuda);
}

Tensor linear(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::optional<Tensor> scales,
              int64_t out_features, int64_t in_features, std::string dtype, std::string activation, bool weight_only,
              int64_t group_size) {
  return linear_on_cuda(
      {x, std::move(bias), std::move(scales), out_features, in_features, dtype, activation, weight_only, group_size},
      packed, dtype);
}

Tensor linear_fused(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::optional<Tensor> scales,
                    std::optional<Tensor> x_scales, std::optional<Tensor> residual, std::optional<Tensor> y_scale,
                    int64_t out_features, int64_t in_features, std::string dtype, std::string activation,
                    bool weight_only, std::string out_dtype, int64_t group_size) {
  FusedOperands fused{std::move(x_scales), std::move(residual), std::move(y_scale), std::move(out_dtype)};
  return linear_on_cuda({x, std::move(bias), std::move(scales), out_features, in_features, dtype, activation,
                         weight_only, group_size, &fused},
                        packed, dtype);
}

void force_linear_kernel(std::string kernel, int64_t splits) {
  asked_on_cuda = {std::move(kernel), static_cast<int>(splits)};
}

std::string linear_kernels(std::string dtype) {
  std::string names;
  for (const char* name : cuda::linear_kernels(device_element(linear_element(dtype)))) {
    names += std::string(names.empty() ? "" : " ") + name;
  }
  return names;
}

}  // namespace

std::string linear_plan(const Tensor& x, int64_t out_features, Element element) {
  cuda::Linear call{};
  call.element = device_element(element);
  call.in_features = x.size(x.dim() - 1);
  call.epilogue.out_features = static_cast<int32_t>(out_features);
  call.epilogue.tokens = static_cast<int32_t>(call.in_features ? x.numel() / call.in_features : 0);
  check_features(out_features, call.in_features);
  if (call.epilogue.tokens == 0 || out_features == 0) return "no product";
  if (rows_are_regular(x, call.x_stride) && x.scalar_type() == storage_of(element)) {
    call.x = x.const_data_ptr();
  } else {  // a copy, which linear makes: of x, or of x quantised
    call.x_stride = call.in_features = element == Element::I8 ? padded_columns(call.in_features) : call.in_features;
  }
  const cuda::Plan plan = x.is_cuda()
                              ? plan_as_asked(call, OnDevice(x).machine.device(), asked_on_cuda)
                              : plan_as_asked(call, current_emulation()->options.device,
                                              {current_emulation()->linear_kernel, current_emulation()->splits});
  return plan.splits > 1 ? std::string(plan.kernel) + ", K in " + std::to_string(plan.splits) + " splits" : plan.kernel;
}

std::string device_problem(int64_t device, Element element) {
  // Nothing multiplies float32, but the other kernels may still be asked of.
  const Element tried = element == Element::F32 ? Element::F16 : element;
  return cuda::device_problem(static_cast<int>(device), current_stream(static_cast<int>(device)), tried);
}

// ---- The emulator ----

Tensor emulated_linear(const Emulation& emulation, LinearOperands in, const uint8_t* packed) {
  check_no_groups(in.group_size);
  const cuda::EmulatedMachine machine = emulation.machine();
  const Element element = device_element(in.element);
  check_features(in.out_features, in.in_features);
  const int64_t groups = group_count(Pattern::TWO_FOUR, in.in_features);
  const int64_t meta_bytes = meta_row_bytes(Pattern::TWO_FOUR, in.in_features);
  const Tensor values = empty_like_device(in.x, {in.out_features, 2 * groups}, storage_of(element));
  const Tensor meta = empty_like_device(in.x, {in.out_features, meta_bytes}, ScalarType::Byte);
  cpu::unpack(packed, element, in.out_features, in.in_features, values.mutable_data_ptr(),
              static_cast<uint8_t*>(meta.mutable_data_ptr()));
  const Tensor device_packed = pack_on(machine, values, meta, element, in.in_features);
  return linear_on(machine, std::move(in), device_packed, {emulation.linear_kernel, emulation.splits});
}

Tensor emulated_decompress(const Emulation& emulation, const Tensor& values, const Tensor& meta, int64_t in_features,
                           const std::string& dtype, const std::string& pattern) {
  const Element element = element_of(dtype);
  const Pattern kind = pattern_of(pattern);
  check_compressed(values, meta, in_features, element, kind);
  return decompress_on(emulation.machine(), values, meta, in_features, element, kind);
}

// For tests and measurements, and only in builds with device code.
STABLE_TORCH_LIBRARY_FRAGMENT(sparse24, m) {
  m.def("force_linear_kernel(str kernel, int splits) -> ()");  // of this thread's products on CUDA
  m.def("linear_kernels(str dtype) -> str");                   // their names, with a space between
}

STABLE_TORCH_LIBRARY_IMPL(sparse24, CompositeExplicitAutograd, m) {
  m.impl("force_linear_kernel", TORCH_BOX(&force_linear_kernel));
  m.impl("linear_kernels", TORCH_BOX(&linear_kernels));
}

STABLE_TORCH_LIBRARY_IMPL(sparse24, CUDA, m) {
  m.impl("decompress", TORCH_BOX(&decompress));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_inference", TORCH_BOX(&linear));
  m.impl("linear_fused", TORCH_BOX(&linear_fused));
}

}  // namespace sparse24::ops
