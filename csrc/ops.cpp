// The operators: every schema, and the CPU implementations (check, allocate, call the kernels of csrc/cpu). In a thread
// that emulates a device, decompress and linear go the device's way instead (csrc/ops_device.h).
// Shapes, meanings and errors are documented once, in sparse24/ops.py.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "csrc/arguments.h"
#include "csrc/cpu/conv/conv.h"
#include "csrc/cpu/format/format.h"
#include "csrc/cpu/format/transposable.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/linear/linear.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/permutation/permutation.h"
#include "csrc/cpu/transpose.h"
#include "csrc/operands.h"
#include "csrc/ops_dense.h"
#include "csrc/ops_device.h"
#include "kernels/packed.cuh"

STABLE_TORCH_LIBRARY(sparse24, m) {
  m.def("prune_mask(Tensor weight, str pattern) -> Tensor");
  m.def("transposable_tiles(Tensor scores) -> Tensor");
  m.def("kept_by_splits(Tensor sizes, Tensor eights) -> Tensor");
  m.def("compress(Tensor weight, str pattern) -> (Tensor values, Tensor meta)");
  m.def("prune_compress(Tensor weight, str pattern) -> (Tensor values, Tensor meta)");
  m.def("decompress(Tensor values, Tensor meta, SymInt in_features, str dtype, str pattern) -> Tensor");
  m.def("validate(Tensor values, Tensor meta, SymInt in_features, str dtype, str pattern) -> ()");
  m.def("pack(Tensor values, Tensor meta, SymInt in_features, str dtype, int group_size=0) -> Tensor");
  m.def("packed_bytes(int out_features, int in_features, str dtype, str device=\"cpu\", int group_size=0) -> int");
  m.def(
      "unpack(Tensor packed, SymInt out_features, SymInt in_features, str dtype, int group_size=0) -> "
      "(Tensor values, Tensor meta)");
  // The same twice: an op with a registered autograd formula costs microseconds more a call (sparse24/ops.py chooses).
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, SymInt out_features, SymInt in_features, "
      "str dtype, str activation, bool weight_only=False, int group_size=0) -> Tensor");
  m.def(
      "linear_inference(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, SymInt out_features, "
      "SymInt in_features, str dtype, str activation, bool weight_only=False, int group_size=0) -> Tensor");
  m.def(
      "linear_fused(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, Tensor? x_scales, Tensor? residual, "
      "Tensor? y_scale, SymInt out_features, SymInt in_features, str dtype, str activation, bool weight_only, "
      "str out_dtype, int group_size=0) -> Tensor");
  m.def("quantize(Tensor x, Tensor scale) -> Tensor");
  m.def("conv2d_pack(Tensor values, Tensor meta, SymInt in_channels, int groups, str dtype) -> Tensor");
  m.def(
      "conv2d_unpack(Tensor packed, SymInt out_channels, SymInt in_channels, int[] kernel_size, int groups, "
      "str dtype) -> (Tensor values, Tensor meta)");
  m.def(
      "conv2d(Tensor x, Tensor packed, Tensor? bias, Tensor? scales, Tensor? x_scales, Tensor? residual, "
      "Tensor? y_scale, SymInt out_channels, SymInt in_channels, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, str dtype, str activation, bool weight_only, str out_dtype) -> Tensor");
  // csrc/ops_choice.cpp
  m.def("cpu_name() -> str");
  m.def("cpu_kernels(str dtype, bool weight_only, str x_dtype) -> str");
  m.def(
      "cpu_choice(str dtype, bool weight_only, str x_dtype, int tokens, int out_features, int in_features) -> "
      "(str, str)");
  m.def("force_cpu_kernels(str kernels) -> ()");  // of this thread; "" ends it
  m.def("set_tuned_kernels(str table) -> ()");
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

// A contiguous copy of a weight that lies column by column; torch's own takes three times as long.
Tensor transposed_rows(const Tensor& weight) {
  Tensor copy = empty_like_device(weight, {weight.size(0), weight.size(1)}, weight.scalar_type());
  cpu::transpose(weight.const_data_ptr(), weight.stride(1), copy.mutable_data_ptr(), weight.size(1), weight.size(0),
                 static_cast<int>(weight.element_size()));
  return copy;
}

Rows rows_of(const Tensor& weight) {
  const Element element = element_of("weight", weight.scalar_type());
  REQUIRE(weight.dim() == 2, "weight must be [N, K]; got ", shape_of(weight));
  Tensor keep = weight;
  if (weight.size(1) > 1 && weight.stride(1) != 1) {
    const bool transposed = weight.stride(0) == 1 && weight.stride(1) >= weight.size(0);
    keep = transposed ? transposed_rows(weight) : torch::stable::contiguous(weight);
  }
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

// sizes [columns, rows] float32, eights [P, 8] int64: what 2:4 keeps of the eight columns, for each split, [P, 35].
Tensor kept_by_splits(const Tensor& sizes, const Tensor& eights) {
  REQUIRE(sizes.dim() == 2 && sizes.is_contiguous() && sizes.scalar_type() == ScalarType::Float,
          "sizes must be a contiguous float32 [columns, rows]; got ", shape_of(sizes));
  REQUIRE(eights.dim() == 2 && eights.size(1) == cpu::SPLIT_COLUMNS && eights.is_contiguous() &&
              eights.scalar_type() == ScalarType::Long,
          "eights must be a contiguous int64 [P, 8]; got ", shape_of(eights));
  const auto columns = static_cast<const int64_t*>(eights.const_data_ptr());
  for (int64_t i = 0; i < eights.numel(); ++i) {
    REQUIRE(columns[i] >= 0 && columns[i] < sizes.size(0), "eights must name columns of sizes, 0 to ",
            sizes.size(0) - 1, "; got ", columns[i]);
  }
  Tensor kept = empty_like_device(sizes, {eights.size(0), cpu::SPLITS}, ScalarType::Double);
  cpu::kept_by_splits(static_cast<const float*>(sizes.const_data_ptr()), sizes.size(1), columns, eights.size(0),
                      static_cast<double*>(kept.mutable_data_ptr()));
  return kept;
}

Tensor transposable_tiles(const Tensor& scores) {
  REQUIRE(scores.dim() == 2 && scores.scalar_type() == ScalarType::Float && scores.size(0) % cpu::TILE == 0 &&
              scores.size(1) % cpu::TILE == 0,
          "scores must be float32 [N, K] with N and K multiples of 4; got ", name_of(scores.scalar_type()), " ",
          shape_of(scores));
  const Tensor rows = scores.size(1) > 1 && scores.stride(1) != 1 ? torch::stable::contiguous(scores) : scores;
  Tensor mask = empty_like_device(scores, {scores.size(0), scores.size(1)}, ScalarType::Bool);
  cpu::transposable_mask(static_cast<const float*>(rows.const_data_ptr()), rows.stride(0), rows.size(0), rows.size(1),
                         static_cast<uint8_t*>(mask.mutable_data_ptr()));
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

int64_t packed_bytes(int64_t out_features, int64_t in_features, std::string dtype, std::string device,
                     int64_t group_size) {
  REQUIRE(out_features >= 0 && in_features >= 0, "out_features and in_features must not be negative; got ",
          out_features, " and ", in_features);
  const Element element = linear_element(dtype);
  check_group_size(group_size, element);
  if (device != "cuda") return cpu::packed_bytes(element, out_features, in_features, group_size);
  return packed::bytes(element_bits(device_element(element)), out_features, in_features);
}

// Memory for a packed weight, which streams from there at one token: huge pages give a fifth more bandwidth.
Tensor empty_packed(const Tensor& like, int64_t bytes) {
  Tensor packed = empty_like_device(like, {bytes}, ScalarType::Byte);
  advise_huge_pages(packed.mutable_data_ptr(), bytes);
  return packed;
}

uint8_t* bytes_of(const Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }
const uint8_t* const_bytes_of(const Tensor& tensor) { return static_cast<const uint8_t*>(tensor.const_data_ptr()); }

Tensor pack(const Tensor& values, const Tensor& meta, int64_t in_features, std::string dtype, int64_t group_size) {
  const Element element = linear_element(dtype);
  check_group_size(group_size, element);
  const int64_t rows = check_compressed(values, meta, in_features, element, cpu::pattern_of(element));
  const Tensor canonical_values = dense_rows(values), canonical_meta = dense_rows(meta);
  const Tensor packed = empty_packed(values, cpu::packed_bytes(element, rows, in_features, group_size));
  cpu::pack(const_bytes_of(canonical_values), const_bytes_of(canonical_meta), element, rows, in_features,
            bytes_of(packed), group_size);
  return packed;
}

constexpr int ALIGNMENT = 64;  // of packed

const uint8_t* check_packed(const Tensor& packed, const std::string& dtype, int64_t out_features, int64_t in_features,
                            int64_t group_size) {
  return packed_data(packed, packed_bytes(out_features, in_features, dtype, "cpu", group_size), ALIGNMENT, dtype,
                     out_features, in_features);
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t out_features, int64_t in_features, std::string dtype,
                                  int64_t group_size) {
  const Element element = linear_element(dtype);
  const Pattern pattern = cpu::pattern_of(element);
  const uint8_t* data = check_packed(packed, dtype, out_features, in_features, group_size);
  const ScalarType type = storage_of(element);
  const int64_t columns =
      values_row_bytes(pattern, element, in_features) * 8 / (is_int4(element) ? 8 : element_bits(element));
  Tensor values = empty_like_device(packed, {out_features, columns}, type);
  Tensor meta = empty_like_device(packed, {out_features, meta_row_bytes(pattern, in_features)}, ScalarType::Byte);
  cpu::unpack(data, element, out_features, in_features, bytes_of(values), bytes_of(meta), group_size);
  return {values, meta};
}

Tensor multiply(const LinearOperands& in, const uint8_t* packed) {
  const Tensor y = empty_like_device(in.x, in.y_shape, in.y_type);
  linear_by_choice({in.x.const_data_ptr(), in.x_stride, element_of("x", in.x_type), packed, in.element, in.weight_only,
                    in.in_features, in.epilogue(y), 0, in.group_size});
  return y;
}

Tensor linear_on(LinearOperands in, const Tensor& packed, const std::string& dtype) {
  const uint8_t* const data = check_packed(packed, dtype, in.out_features, in.in_features, in.group_size);
  if constexpr (HAS_DEVICE_CODE) {
    if (const Emulation* emulation = current_emulation()) return emulated_linear(*emulation, std::move(in), data);
  }
  return multiply(in, data);
}

Tensor linear(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::optional<Tensor> scales,
              int64_t out_features, int64_t in_features, std::string dtype, std::string activation, bool weight_only,
              int64_t group_size) {
  return linear_on(
      {x, std::move(bias), std::move(scales), out_features, in_features, dtype, activation, weight_only, group_size},
      packed, dtype);
}

Tensor linear_fused(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::optional<Tensor> scales,
                    std::optional<Tensor> x_scales, std::optional<Tensor> residual, std::optional<Tensor> y_scale,
                    int64_t out_features, int64_t in_features, std::string dtype, std::string activation,
                    bool weight_only, std::string out_dtype, int64_t group_size) {
  FusedOperands fused{std::move(x_scales), std::move(residual), std::move(y_scale), std::move(out_dtype)};
  return linear_on({x, std::move(bias), std::move(scales), out_features, in_features, dtype, activation, weight_only,
                    group_size, &fused},
                   packed, dtype);
}

// ---- Convolution ----

cpu::ConvWeight conv_weight(Element element, int64_t out_channels, int64_t in_channels,
                            const std::vector<int64_t>& kernel_size, int64_t groups) {
  return {element, out_channels, in_channels / groups, kernel_size[0], kernel_size[1], groups};
}

// The shapes of the canonical values and meta of a conv weight.
std::pair<std::vector<int64_t>, std::vector<int64_t>> conv_shapes(const cpu::ConvWeight& weight) {
  const Pattern pattern = cpu::pattern_of(weight.element);
  const int64_t slots = values_row_bytes(pattern, weight.element, weight.group_channels) * 8 /
                        (is_int4(weight.element) ? 8 : element_bits(weight.element));
  const int64_t o = weight.out_channels, r = weight.kernel_height, s = weight.kernel_width;
  return {{o, r, s, slots}, {o, r, s, meta_row_bytes(pattern, weight.group_channels)}};
}

Tensor conv2d_pack(const Tensor& values, const Tensor& meta, int64_t in_channels, int64_t groups, std::string dtype) {
  const Element element = linear_element(dtype);
  REQUIRE(values.scalar_type() == storage_of(element), "values must be ", name_of(storage_of(element)), " for ", dtype,
          "; got ", name_of(values.scalar_type()));
  REQUIRE(values.dim() == 4, "values must be [O, R, S, slots]; got ", shape_of(values));
  const std::vector<int64_t> kernel_size{values.size(1), values.size(2)};
  ConvGeometry{values.size(0), in_channels, kernel_size, {1, 1}, {0, 0}, {1, 1}, groups}.check();
  const cpu::ConvWeight weight = conv_weight(element, values.size(0), in_channels, kernel_size, groups);
  const auto [values_shape, meta_shape] = conv_shapes(weight);
  REQUIRE(shape_of(values) == shape_of(values_shape), "values must be ", shape_of(values_shape),
          " for in_channels = ", in_channels, " and groups = ", groups, "; got ", shape_of(values));
  REQUIRE(meta.scalar_type() == ScalarType::Byte && shape_of(meta) == shape_of(meta_shape), "meta must be uint8 ",
          shape_of(meta_shape), " to match values ", shape_of(values), "; got ", name_of(meta.scalar_type()), " ",
          shape_of(meta));
  const Tensor canonical_values = dense_rows(values), canonical_meta = dense_rows(meta);
  const Tensor packed = empty_packed(values, weight.packed_bytes());
  cpu::pack(weight, const_bytes_of(canonical_values), const_bytes_of(canonical_meta), bytes_of(packed));
  return packed;
}

std::tuple<Tensor, Tensor> conv2d_unpack(const Tensor& packed, int64_t out_channels, int64_t in_channels,
                                         std::vector<int64_t> kernel_size, int64_t groups, std::string dtype) {
  ConvGeometry{out_channels, in_channels, kernel_size, {1, 1}, {0, 0}, {1, 1}, groups}.check();
  const cpu::ConvWeight weight = conv_weight(linear_element(dtype), out_channels, in_channels, kernel_size, groups);
  const uint8_t* data =
      packed_data(packed, weight.packed_bytes(), ALIGNMENT, dtype, out_channels, weight.in_features());
  const auto [values_shape, meta_shape] = conv_shapes(weight);
  Tensor values = empty_like_device(packed, values_shape, storage_of(weight.element));
  Tensor meta = empty_like_device(packed, meta_shape, ScalarType::Byte);
  cpu::unpack(weight, data, bytes_of(values), bytes_of(meta));
  return {values, meta};
}

Tensor conv2d(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, std::optional<Tensor> scales,
              std::optional<Tensor> x_scales, std::optional<Tensor> residual, std::optional<Tensor> y_scale,
              int64_t out_channels, int64_t in_channels, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
              std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, std::string dtype,
              std::string activation, bool weight_only, std::string out_dtype) {
  const ConvGeometry geometry{out_channels, in_channels, kernel_size, stride, padding, dilation, groups};
  FusedOperands fused{std::move(x_scales), std::move(residual), std::move(y_scale), std::move(out_dtype)};
  const ConvOperands in(x, std::move(bias), std::move(scales), geometry, dtype, activation, weight_only, fused);
  const cpu::ConvWeight weight = conv_weight(in.element, out_channels, in_channels, kernel_size, groups);
  const std::vector<int64_t>& shape = in.y_shape;
  const std::vector<int64_t> last{shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1]};
  const Tensor y = in.channels_last ? empty_strided_like_device(in.x, shape, last, in.y_type)
                                    : empty_like_device(in.x, shape, in.y_type);
  const bool unit_channels = in.x.size(1) <= 1 || in.x.stride(1) == 1;
  const cpu::Conv2d call{
      .weight = weight,
      .packed = packed_data(packed, weight.packed_bytes(), ALIGNMENT, dtype, out_channels, weight.in_features()),
      .weight_only = weight_only,
      .x = in.x.const_data_ptr(),
      .x_element = element_of("x", in.x_type),
      .image_stride = in.x.stride(0),
      .row_stride = in.x.stride(2),
      .column_stride = in.x.stride(3),
      .channel_stride = unit_channels ? 1 : in.x.stride(1),
      .images = shape[0],
      .height = in.x.size(2),
      .width = in.x.size(3),
      .stride_height = stride[0],
      .stride_width = stride[1],
      .padding_height = padding[0],
      .padding_width = padding[1],
      .dilation_height = dilation[0],
      .dilation_width = dilation[1],
      .out_height = shape[2],
      .out_width = shape[3],
      .y_planes = !in.channels_last,
      .epilogue = in.epilogue(y)};
  if (const auto product = cpu::as_linear(call)) {
    linear_by_choice(*product);
  } else {
    cpu::conv2d(call);
  }
  return y;
}

// ---- Instruction sets ----

std::string cpu_isa() { return cpu::name_of(cpu::active_isa()); }

void force_cpu_isa(std::string isa) {
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i) {
    if (isa == cpu::name_of(static_cast<cpu::Isa>(i))) return cpu::force_isa(static_cast<cpu::Isa>(i));
  }
  refuse("isa must be one that this machine runs, portable up to ", cpu::name_of(cpu::best_isa()), "; got '", isa, "'");
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
  m.impl("kept_by_splits", TORCH_BOX(&kept_by_splits));
  m.impl("transposable_tiles", TORCH_BOX(&transposable_tiles));
  m.impl("compress", TORCH_BOX(&compress));
  m.impl("prune_compress", TORCH_BOX(&prune_compress));
  m.impl("decompress", TORCH_BOX(&decompress));
  m.impl("validate", TORCH_BOX(&validate));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_inference", TORCH_BOX(&linear));
  m.impl("linear_fused", TORCH_BOX(&linear_fused));
  m.impl("conv2d_pack", TORCH_BOX(&conv2d_pack));
  m.impl("conv2d_unpack", TORCH_BOX(&conv2d_unpack));
  m.impl("conv2d", TORCH_BOX(&conv2d));
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
