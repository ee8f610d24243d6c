// The operators: every schema, and the CPU implementations (check, allocate, call the kernels of csrc/cpu). In a thread
// that emulates a device, decompress and linear go the device's way instead (csrc/ops_device.h).
// Shapes, meanings and errors are documented once, in sparse24/ops.py.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "csrc/arguments.h"
#include "csrc/cpu/format.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/linear.h"
#include "csrc/cpu/parallel.h"
#include "csrc/linear_operands.h"
#include "csrc/ops_device.h"
#include "kernels/packed.cuh"

STABLE_TORCH_LIBRARY(sparse24, m) {
  m.def("prune_mask(Tensor weight, str pattern) -> Tensor");
  m.def("compress(Tensor weight, str pattern) -> (Tensor values, Tensor meta)");
  m.def("prune_compress(Tensor weight, str pattern) -> (Tensor values, Tensor meta)");
  m.def("decompress(Tensor values, Tensor meta, SymInt in_features, str dtype, str pattern) -> Tensor");
  m.def("validate(Tensor values, Tensor meta, SymInt in_features, str dtype, str pattern) -> ()");
  m.def("pack(Tensor values, Tensor meta, SymInt in_features) -> Tensor");
  m.def("packed_bytes(int out_features, int in_features, str dtype, str device=\"cpu\") -> int");
  m.def("unpack(Tensor packed, SymInt out_features, SymInt in_features, str dtype) -> (Tensor values, Tensor meta)");
  // The same twice: an op with a registered autograd formula costs microseconds more a call (sparse24/ops.py chooses).
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, SymInt out_features, SymInt in_features, "
      "str dtype, str activation) -> Tensor");
  m.def(
      "linear_inference(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, SymInt out_features, "
      "SymInt in_features, str dtype, str activation) -> Tensor");
  m.def(
      "linear_fused(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, Tensor? x_scales, Tensor? residual, "
      "Tensor? y_scale, SymInt out_features, SymInt in_features, str dtype, str activation, str out_dtype) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("force_cpu_isa(str isa) -> ()");
  m.def("device_archs() -> str");
  m.def("device_problem(int device, str dtype) -> str");
  m.def("emulated_arch() -> str");
  m.def("linear_plan(Tensor x, int out_features, str dtype) -> str");
}

namespace sparse24::cpu {

// ---- torch's thread pool ----

void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeBody body, const void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { body(first, last, context); });
}
int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace sparse24::cpu

namespace sparse24::ops {

namespace {

using cpu::Compressed;
using cpu::Dense;
using cpu::Misfit;
using cpu::Selection;

// ---- Memory ----

// Asks for 2 MB pages. Best effort: where the kernel declines, nothing is lost.
void advise_huge_pages(void* data, size_t bytes) {
  constexpr size_t PAGE = size_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
#ifdef MADV_HUGEPAGE
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A matrix that a memory-bound kernel is about to write. From 32 MiB on glibc maps it afresh each time, and faults of
// 4 KB pages would cost several times the kernel itself.
Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType type) {
  constexpr size_t FRESH_BYTES = size_t{32} << 20;
  Tensor matrix = empty_like_device(like, {rows, columns}, type);
  const size_t bytes = matrix.numel() * matrix.element_size();
  if (bytes >= FRESH_BYTES) advise_huge_pages(matrix.mutable_data_ptr(), bytes);
  return matrix;
}

// ---- Format ----

float element_at(const Dense& dense, int64_t row, int64_t column) {
  const char* data = static_cast<const char*>(dense.data) + row * dense.row_stride;
  uint32_t bits = 0;
  switch (dense.element) {
    case Element::F32:
      std::memcpy(&bits, data + 4 * column, 4);
      return std::copysign(widen<Element::F32>(bits & 0x7fffffff), bits >> 31 ? -1.0f : 1.0f);
    case Element::F16:
      std::memcpy(&bits, data + 2 * column, 2);
      return std::copysign(widen<Element::F16>(bits & 0x7fff), bits >> 15 ? -1.0f : 1.0f);
    case Element::BF16:
      std::memcpy(&bits, data + 2 * column, 2);
      return std::copysign(widen<Element::BF16>(bits & 0x7fff), bits >> 15 ? -1.0f : 1.0f);
    case Element::I8:
      return static_cast<signed char>(data[column]);
    default:
      return static_cast<float>(static_cast<int8_t>((data[column / 2] >> 4 * (column & 1)) << 4) >> 4);
  }
}

[[noreturn]] void refuse_misfit(const Dense& dense, const std::string& pattern, Misfit misfit) {
  const int columns = group_columns(pattern_of(pattern));
  const int64_t begin = misfit.group * columns, end = std::min(begin + columns, dense.in_features);
  std::ostringstream text;
  text << "weight does not fit " << pattern << ": row " << misfit.row << ", group " << misfit.group << " (columns "
       << begin << " to " << end - 1 << ") is [";
  for (int64_t k = begin; k < end; ++k) text << (k > begin ? ", " : "") << element_at(dense, misfit.row, k);
  text << (pattern == "2:4"   ? "], more than two nonzeros"
           : pattern == "1:2" ? "], more than one nonzero in a half"
                              : "], more than two nonzero pairs")
       << "; prune it first, or use prune_compress";
  throw std::runtime_error(text.str());
}

// A dense weight and the tensor that keeps its memory: rows in place at any stride, a copy only for a strided row.
struct Rows {
  Tensor keep;
  Dense dense;
};

Rows rows_of(const Tensor& weight) {
  const Element element = element_of("weight", weight.scalar_type());
  REQUIRE(weight.dim() == 2, "weight must be [N, K]; got ", shape_of(weight));
  Tensor keep = weight.size(1) > 1 && weight.stride(1) != 1 ? torch::stable::contiguous(weight) : weight;
  const int64_t in_features = weight.size(1) * (element == Element::I4 ? 2 : 1);
  const Dense dense{keep.const_data_ptr(), keep.stride(0) * static_cast<int64_t>(keep.element_size()), keep.size(0),
                    in_features, element};
  return {keep, dense};
}

std::tuple<Tensor, Tensor> compress_rows(const Tensor& weight, const std::string& pattern, Selection selection) {
  const Pattern kind = pattern_of(pattern);
  const Rows rows = rows_of(weight);
  const Dense& dense = rows.dense;
  const ScalarType type = weight.scalar_type();
  const int64_t row_bytes = values_row_bytes(kind, dense.element, dense.in_features);
  Tensor values = empty_matrix(weight, dense.rows, row_bytes / static_cast<int64_t>(weight.element_size()), type);
  Tensor meta = empty_like_device(weight, {dense.rows, meta_row_bytes(kind, dense.in_features)}, ScalarType::Byte);
  const Misfit misfit = cpu::compress(dense, kind, selection,
                                      {values.mutable_data_ptr(), static_cast<uint8_t*>(meta.mutable_data_ptr())});
  if (misfit.row >= 0) refuse_misfit(dense, pattern, misfit);
  return {values, meta};
}

std::tuple<Tensor, Tensor> compress(const Tensor& weight, std::string pattern) {
  return compress_rows(weight, pattern, Selection::STRICT);
}

std::tuple<Tensor, Tensor> prune_compress(const Tensor& weight, std::string pattern) {
  return compress_rows(weight, pattern, Selection::MAGNITUDE);
}

Tensor prune_mask(const Tensor& weight, std::string pattern) {
  const Pattern kind = pattern_of(pattern);
  const Rows rows = rows_of(weight);
  Tensor mask = empty_like_device(weight, {rows.dense.rows, rows.dense.in_features}, ScalarType::Bool);
  cpu::prune_mask(rows.dense, kind, static_cast<uint8_t*>(mask.mutable_data_ptr()));
  return mask;
}

// Contiguous values and meta that have passed every check.
struct Checked {
  Tensor values, meta;
  Element element;
  Pattern pattern;
  int64_t rows;

  Checked(const Tensor& values_in, const Tensor& meta_in, int64_t in_features, const std::string& dtype,
          const std::string& pattern_name)
      : values(values_in), meta(meta_in), element(element_of(dtype)), pattern(pattern_of(pattern_name)) {
    rows = check_compressed(values, meta, in_features, element, pattern);
    values = dense_rows(values), meta = dense_rows(meta);
    const Misfit misfit = cpu::validate(pointers(), rows, in_features, element, pattern);
    if (misfit.row < 0) return;
    const int byte = pointers().meta[misfit.row * meta.size(1) + misfit.group / 2];
    const int code = byte >> 4 * (misfit.group & 1) & 15;
    REQUIRE(misfit.group < group_count(pattern, in_features), "meta is corrupt: row ", misfit.row,
            " ends in an unused half byte of ", code, "; it must be 0");
    REQUIRE(is_legal(pattern, code), "meta is corrupt: row ", misfit.row, ", group ", misfit.group, " has the code ",
            code, ", which names columns ", first_of(code), " and ", second_of(code), "; ", pattern_name,
            (pattern == Pattern::ONE_TWO ? " needs one of each half" : " needs them in increasing order"));
    refuse("values are corrupt: row ", misfit.row, ", group ", misfit.group,
           " holds something other than +0 in a slot beyond in_features = ", in_features);
  }

  Compressed pointers() const {
    return {const_cast<void*>(values.const_data_ptr()),
            const_cast<uint8_t*>(static_cast<const uint8_t*>(meta.const_data_ptr()))};
  }
};

void validate(const Tensor& values, const Tensor& meta, int64_t in_features, std::string dtype, std::string pattern) {
  Checked(values, meta, in_features, dtype, pattern);
}

Tensor decompress(const Tensor& values, const Tensor& meta, int64_t in_features, std::string dtype,
                  std::string pattern) {
  if constexpr (HAS_DEVICE_CODE) {
    if (const Emulation* emulation = current_emulation())
      return emulated_decompress(*emulation, values, meta, in_features, dtype, pattern);
  }
  const Checked in(values, meta, in_features, dtype, pattern);
  const int64_t columns = in.element == Element::I4 ? (in_features + 1) / 2 : in_features;
  Tensor dense = empty_matrix(values, in.rows, columns, storage_of(in.element));
  cpu::decompress(in.pointers(), in.rows, in_features, in.element, in.pattern, dense.mutable_data_ptr());
  return dense;
}

// ---- Linear ----

int64_t packed_bytes(int64_t out_features, int64_t in_features, std::string dtype, std::string device) {
  REQUIRE(out_features >= 0 && in_features >= 0, "out_features and in_features must not be negative; got ",
          out_features, " and ", in_features);
  const Element element = linear_element(dtype);
  if (device != "cuda") return cpu::packed_bytes(element, out_features, in_features);
  return packed::bytes(element_bits(device_element(element)), out_features, in_features);
}

Tensor pack(const Tensor& values, const Tensor& meta, int64_t in_features) {
  const Element element = values_element(values);
  const int64_t rows = check_compressed(values, meta, in_features, element, Pattern::TWO_FOUR);
  const Tensor canonical_values = dense_rows(values), canonical_meta = dense_rows(meta);
  const int64_t bytes = cpu::packed_bytes(element, rows, in_features);
  Tensor packed = empty_like_device(values, {bytes}, ScalarType::Byte);
  advise_huge_pages(packed.mutable_data_ptr(), bytes);  // at one token W streams from memory: a fifth more bandwidth
  cpu::pack(canonical_values.const_data_ptr(), static_cast<const uint8_t*>(canonical_meta.const_data_ptr()), element,
            rows, in_features, static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

const uint8_t* check_packed(const Tensor& packed, const std::string& dtype, int64_t out_features, int64_t in_features) {
  constexpr int ALIGNMENT = 64;
  return packed_data(packed, packed_bytes(out_features, in_features, dtype, "cpu"), ALIGNMENT, dtype, out_features,
                     in_features);
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t out_features, int64_t in_features, std::string dtype) {
  const Element element = linear_element(dtype);
  const uint8_t* data = check_packed(packed, dtype, out_features, in_features);
  const int64_t groups = group_count(Pattern::TWO_FOUR, in_features);
  Tensor values = empty_like_device(packed, {out_features, 2 * groups}, storage_of(element));
  Tensor meta =
      empty_like_device(packed, {out_features, meta_row_bytes(Pattern::TWO_FOUR, in_features)}, ScalarType::Byte);
  cpu::unpack(data, element, out_features, in_features, values.mutable_data_ptr(),
              static_cast<uint8_t*>(meta.mutable_data_ptr()));
  return {values, meta};
}

// On the CPU's own kernels, which know bias, scales and an activation.
Tensor multiply(const LinearOperands& in, const uint8_t* packed) {
  const Tensor y = empty_like_device(in.x, in.y_shape, in.y_type);
  cpu::Linear call{};
  call.x = in.x.const_data_ptr();
  call.x_stride = in.x_stride;
  call.x_element = element_of("x", in.x.scalar_type());
  call.packed = packed;
  call.weight_element = in.element;
  if (in.scales) call.scales = static_cast<const float*>(in.scales->const_data_ptr());
  if (in.bias) call.bias = in.bias->const_data_ptr(), call.bias_element = element_of("bias", in.bias->scalar_type());
  call.activation = in.activation;
  call.y = y.mutable_data_ptr();
  call.y_stride = in.out_features;
  call.tokens = in.tokens;
  call.out_features = in.out_features;
  call.in_features = in.in_features;
  cpu::linear(call);
  return y;
}

Tensor linear(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::optional<Tensor> scales,
              int64_t out_features, int64_t in_features, std::string dtype, std::string activation) {
  LinearOperands in(x, std::move(bias), std::move(scales), out_features, in_features, dtype, activation);
  const uint8_t* const data = check_packed(packed, dtype, out_features, in_features);
  if constexpr (HAS_DEVICE_CODE) {
    if (const Emulation* emulation = current_emulation()) return emulated_linear(*emulation, std::move(in), data);
  }
  return multiply(in, data);
}

Tensor linear_fused(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::optional<Tensor> scales,
                    std::optional<Tensor> x_scales, std::optional<Tensor> residual, std::optional<Tensor> y_scale,
                    int64_t out_features, int64_t in_features, std::string dtype, std::string activation,
                    std::string out_dtype) {
  FusedOperands fused{std::move(x_scales), std::move(residual), std::move(y_scale), std::move(out_dtype)};
  LinearOperands in(x, std::move(bias), std::move(scales), out_features, in_features, dtype, activation, &fused);
  const uint8_t* const data = check_packed(packed, dtype, out_features, in_features);
  if constexpr (HAS_DEVICE_CODE) {
    if (const Emulation* emulation = current_emulation()) return emulated_linear(*emulation, std::move(in), data);
  }
  REQUIRE(x.scalar_type() != ScalarType::Char, "x must be of a float dtype: the CPU kernels have no int8 x; got int8");
  REQUIRE(!in.residual, "residual must be none: the CPU kernels have no residual; got one");
  REQUIRE(in.y_type == x.scalar_type(), "out_dtype must be the dtype of x, ", name_of(x.scalar_type()),
          ": the CPU kernels have no other; got ", name_of(in.y_type));
  return multiply(in, data);
}

// ---- Instruction sets ----

constexpr const char* ISA_NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16"};  // in the order of Isa

std::string cpu_isa() { return ISA_NAMES[static_cast<int>(cpu::active_isa())]; }

void force_cpu_isa(std::string isa) {
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i) {
    if (isa == ISA_NAMES[i]) return cpu::force_isa(static_cast<cpu::Isa>(i));
  }
  refuse("isa must be one that this machine runs, portable up to ", ISA_NAMES[static_cast<int>(cpu::best_isa())],
         "; got '", isa, "'");
}

// ---- The device ----

std::string device_archs() { return SPARSE24_ARCHS; }

std::string device_problem_of(int64_t device, std::string dtype) {
  const Element element = linear_element(dtype);
  if constexpr (HAS_DEVICE_CODE) return device_problem(device, element);
  return "this build of sparse24 has no device code";
}

std::string emulated_arch() {
  if constexpr (HAS_DEVICE_CODE) {
    if (const Emulation* emulation = current_emulation()) return emulation->options.arch;
  }
  return "";
}

std::string linear_plan_of(const Tensor& x, int64_t out_features, std::string dtype) {
  const Element element = linear_element(dtype);
  REQUIRE(x.dim() >= 1, "x must be [..., in_features]; got []");
  REQUIRE(x.is_cuda() || !emulated_arch().empty(), "x must be a CUDA tensor, or a CPU tensor within emulate()");
  if constexpr (HAS_DEVICE_CODE) return linear_plan(x, out_features, element);
  return "";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse24, CPU, m) {
  m.impl("prune_mask", TORCH_BOX(&prune_mask));
  m.impl("compress", TORCH_BOX(&compress));
  m.impl("prune_compress", TORCH_BOX(&prune_compress));
  m.impl("decompress", TORCH_BOX(&decompress));
  m.impl("validate", TORCH_BOX(&validate));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_inference", TORCH_BOX(&linear));
  m.impl("linear_fused", TORCH_BOX(&linear_fused));
}

STABLE_TORCH_LIBRARY_IMPL(sparse24, CompositeExplicitAutograd, m) {
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("force_cpu_isa", TORCH_BOX(&force_cpu_isa));
  m.impl("device_archs", TORCH_BOX(&device_archs));
  m.impl("device_problem", TORCH_BOX(&device_problem_of));
  m.impl("emulated_arch", TORCH_BOX(&emulated_arch));
  m.impl("linear_plan", TORCH_BOX(&linear_plan_of));
}

}  // namespace sparse24::ops
