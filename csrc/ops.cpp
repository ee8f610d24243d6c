// The operators: every schema, and the CPU implementations (check, allocate, call the kernels of csrc/cpu).
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

STABLE_TORCH_LIBRARY(sparse24, m) {
  m.def("prune_mask(Tensor weight, str pattern) -> Tensor");
  m.def("compress(Tensor weight, str pattern) -> (Tensor values, Tensor meta)");
  m.def("prune_compress(Tensor weight, str pattern) -> (Tensor values, Tensor meta)");
  m.def("decompress(Tensor values, Tensor meta, SymInt in_features, str dtype, str pattern) -> Tensor");
  m.def("validate(Tensor values, Tensor meta, SymInt in_features, str dtype, str pattern) -> ()");
  m.def("pack(Tensor values, Tensor meta, SymInt in_features) -> Tensor");
  m.def("packed_bytes(int out_features, int in_features, str dtype) -> int");
  m.def("unpack(Tensor packed, SymInt out_features, SymInt in_features, str dtype) -> (Tensor values, Tensor meta)");
  // The same twice: an op with a registered autograd formula costs microseconds more a call (sparse24/ops.py chooses).
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, SymInt out_features, SymInt in_features, "
      "str dtype, str activation) -> Tensor");
  m.def(
      "linear_inference(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, SymInt out_features, "
      "SymInt in_features, str dtype, str activation) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("force_cpu_isa(str isa) -> ()");
  m.def("device_archs() -> str");
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

using cpu::Activation;
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
  const Checked in(values, meta, in_features, dtype, pattern);
  const int64_t columns = in.element == Element::I4 ? (in_features + 1) / 2 : in_features;
  Tensor dense = empty_matrix(values, in.rows, columns, storage_of(in.element));
  cpu::decompress(in.pointers(), in.rows, in_features, in.element, in.pattern, dense.mutable_data_ptr());
  return dense;
}

// ---- Linear ----

Element linear_element(const std::string& dtype) {
  const Element element = element_of(dtype);
  REQUIRE(element != Element::I4, "dtype must be float32, float16, bfloat16 or int8; no kernel multiplies int4 yet");
  return element;
}

int64_t packed_bytes(int64_t out_features, int64_t in_features, std::string dtype) {
  REQUIRE(out_features >= 0 && in_features >= 0, "out_features and in_features must not be negative; got ",
          out_features, " and ", in_features);
  return cpu::packed_bytes(linear_element(dtype), out_features, in_features);
}

Tensor pack(const Tensor& values, const Tensor& meta, int64_t in_features) {
  const Element element = element_of("values", values.scalar_type());
  REQUIRE(element != Element::I4, "values must be float32, float16, bfloat16 or int8; no kernel multiplies int4 yet");
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
  const int64_t bytes = packed_bytes(out_features, in_features, dtype);
  REQUIRE(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.size(0) == bytes &&
              packed.is_contiguous(),
          "packed must be contiguous uint8 [", bytes, "] for a [", out_features, ", ", in_features, "] ", dtype,
          " weight; got ", name_of(packed.scalar_type()), " ", shape_of(packed));
  const auto data = static_cast<const uint8_t*>(packed.const_data_ptr());
  REQUIRE(reinterpret_cast<uintptr_t>(data) % 64 == 0 || bytes == 0,
          "packed must start at a multiple of 64 bytes, as pack() makes it; got an address ",
          reinterpret_cast<uintptr_t>(data) % 64, " bytes past one");
  return data;
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

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

Activation activation_of(const std::string& activation) {
  if (activation == "none") return Activation::NONE;
  if (activation == "relu") return Activation::RELU;
  if (activation == "gelu") return Activation::GELU;
  if (activation == "gelu_tanh") return Activation::GELU_TANH;
  REQUIRE(activation == "silu", "activation must be 'none', 'relu', 'gelu', 'gelu_tanh' or 'silu'; got '", activation,
          "'");
  return Activation::SILU;
}

// Whether all leading dimensions of x step by one row stride, which is written to `stride`.
bool rows_are_regular(const Tensor& x, int64_t& stride) {
  const int64_t dims = x.dim();
  if (x.size(dims - 1) > 1 && x.stride(dims - 1) != 1) return false;
  stride = x.size(dims - 1);
  bool found = false;
  int64_t next = 0;  // what the next outer dimension must step by
  for (int64_t i = dims - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (!found)
      stride = x.stride(i), found = true;
    else if (x.stride(i) != next)
      return false;
    next = x.stride(i) * x.size(i);
  }
  return true;
}

// As torch::stable::empty, without the microsecond of a trip through the dispatcher.
Tensor empty_on_cpu(const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor linear(const Tensor& x_in, const Tensor& packed, std::optional<Tensor> bias, std::optional<Tensor> scales,
              int64_t out_features, int64_t in_features, std::string dtype, std::string activation) {
  const Element weight_element = linear_element(dtype);
  const int64_t dims = x_in.dim();
  REQUIRE(is_float(x_in.scalar_type()), "x must be float32, float16 or bfloat16; got ", name_of(x_in.scalar_type()));
  REQUIRE(dims >= 1 && x_in.size(dims - 1) == in_features, "x must be [..., ", in_features, "] to match weight [",
          out_features, ", ", in_features, "]; got ", shape_of(x_in));

  constexpr int64_t EXACT_I8_FEATURES = int64_t{1} << 18;  // csrc/cpu/linear.h: beyond, an int32 sum could wrap
  REQUIRE(weight_element != Element::I8 || in_features <= EXACT_I8_FEATURES, "in_features must be at most ",
          EXACT_I8_FEATURES, " for an int8 weight; got ", in_features);

  cpu::Linear call{};
  call.packed = check_packed(packed, dtype, out_features, in_features);
  if (bias) {
    REQUIRE(is_float(bias->scalar_type()), "bias must be float32, float16 or bfloat16; got ",
            name_of(bias->scalar_type()));
    REQUIRE(bias->dim() == 1 && bias->size(0) == out_features, "bias must be [", out_features, "]; got ",
            shape_of(*bias));
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    call.bias = bias->const_data_ptr();
    call.bias_element = element_of("bias", bias->scalar_type());
  }
  REQUIRE(scales.has_value() == (weight_element == Element::I8),
          weight_element == Element::I8 ? "scales are required for an int8 weight; got none"
                                        : "scales are for int8 weights alone; got some for another");
  if (scales) {
    REQUIRE(scales->scalar_type() == ScalarType::Float && scales->dim() == 1 && scales->size(0) == out_features,
            "scales must be float32 [", out_features, "]; got ", name_of(scales->scalar_type()), " ",
            shape_of(*scales));
    if (!scales->is_contiguous()) scales = torch::stable::contiguous(*scales);
    call.scales = static_cast<const float*>(scales->const_data_ptr());
  }
  call.activation = activation_of(activation);

  Tensor x = x_in;
  if (!rows_are_regular(x, call.x_stride)) {
    x = torch::stable::contiguous(x);
    call.x_stride = in_features;
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  call.tokens = 1;
  for (int64_t i = 0; i < dims - 1; ++i) call.tokens *= shape[i];
  const Tensor y = empty_on_cpu(shape, x.scalar_type());

  call.x = x.const_data_ptr();
  call.x_element = element_of("x", x.scalar_type());
  call.weight_element = weight_element;
  call.y = y.mutable_data_ptr();
  call.y_stride = out_features;
  call.out_features = out_features;
  call.in_features = in_features;
  cpu::linear(call);
  return y;
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

std::string device_archs() { return SPARSE24_ARCHS; }

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
}

STABLE_TORCH_LIBRARY_IMPL(sparse24, CompositeExplicitAutograd, m) {
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("force_cpu_isa", TORCH_BOX(&force_cpu_isa));
  m.impl("device_archs", TORCH_BOX(&device_archs));
}

}  // namespace sparse24::ops
