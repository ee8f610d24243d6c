// mma and mma.sp: the forms, and the handlers that carry fragments to the arithmetic of csrc/ptx/tensor/ and back.
//
// Source: PTX ISA, "Multiply-and-Accumulate Instruction: mma" and "... mma.sp". What is not here, and refused: block
// scaling, the 6- and 4-bit floats, roundings of f64 other than .rn.
#include <array>
#include <bitset>
#include <cmath>
#include <cstring>

#include "csrc/ptx/isa.h"
#include "csrc/ptx/machine.h"
#include "csrc/ptx/numbers.h"
#include "csrc/ptx/tensor/arithmetic.h"
#include "csrc/ptx/tensor/fragments.h"

namespace sparse24::ptx {
namespace {

using tensor::Cell;
using tensor::Multiplication;
using tensor::Sparsity;

// ---- What choose() leaves in Operation::option: 0 and 1 are the types of A and B
// -------------------------------------

constexpr int FLAGS = 2, K_QUARTER = 3;
enum Flag : uint8_t {
  SIXTEEN_ROWS = 1,
  SPARSE = 2,
  ORDERED = 4,
  SATFINITE = 8,
  BITS_AND = 16,
  HALF_C = 32,
  HALF_D = 64,
};
// f16 m8n8k4 has neither sparsity nor integers.
constexpr uint8_t A_BY_COLUMNS = SPARSE, B_BY_COLUMNS = ORDERED;

bool has(const Operation& op, uint8_t flag) { return (op.option[FLAGS] & flag) != 0; }
Type a_type(const Operation& op) { return static_cast<Type>(op.option[0]); }
Type b_type(const Operation& op) { return static_cast<Type>(op.option[1]); }
int rows_of(const Operation& op) { return has(op, SIXTEEN_ROWS) ? 16 : 8; }
int k_of(const Operation& op) { return 4 * op.option[K_QUARTER]; }
int depth_of(const Operation& op) { return has(op, SPARSE) ? k_of(op) / 2 : k_of(op); }

const Slot* d_slots(const Operation& op) { return op.slot; }
const Slot* a_slots(const Operation& op) { return d_slots(op) + op.count[0]; }
const Slot* b_slots(const Operation& op) { return a_slots(op) + op.count[1]; }
const Slot* c_slots(const Operation& op) { return b_slots(op) + op.count[2]; }
Slot metadata_slot(const Operation& op) { return c_slots(op)[op.count[3]]; }

// ---- Accumulators: registers to rows of 8 and back
// -------------------------------------------------------------------

// Two registers of a warp side by side are 8 rows of 8 (fragments.h, cell_of_c).
template <class T>
void load_accumulators(Warp& warp, const Slot* slots, int count, T* rows) {
  for (int i = 0; i < count; i += 2, rows += 64) {
    const T *even = warp.lanes<T>(slots[i]), *odd = warp.lanes<T>(slots[i + 1]);
    for (int lane = 0; lane < LANES; ++lane) rows[2 * lane] = even[lane], rows[2 * lane + 1] = odd[lane];
  }
}

template <class T>
void store_accumulators(Warp& warp, const Slot* slots, int count, const T* rows, uint32_t lanes) {
  for (int i = 0; i < count; i += 2, rows += 64) {
    T *even = warp.lanes<T>(slots[i]), *odd = warp.lanes<T>(slots[i + 1]);
    each(lanes, [&](int lane) { even[lane] = rows[2 * lane], odd[lane] = rows[2 * lane + 1]; });
  }
}

// One register of pairs of f16 is 8 rows of 8 (cell_of_half_c).
void load_half_accumulators(Warp& warp, const Slot* slots, int count, float* rows) {
  for (int i = 0; i < count; ++i, rows += 64) {
    const uint32_t* pairs = warp.lanes<uint32_t>(slots[i]);
    for (int lane = 0; lane < LANES; ++lane) {
      rows[2 * lane] = half_to_float(pairs[lane] & 0xffff);
      rows[2 * lane + 1] = half_to_float(pairs[lane] >> 16);
    }
  }
}

void store_half_accumulators(Warp& warp, const Slot* slots, int count, const float* rows, uint32_t lanes) {
  for (int i = 0; i < count; ++i, rows += 64) {
    uint32_t* pairs = warp.lanes<uint32_t>(slots[i]);
    each(lanes,
         [&](int lane) { pairs[lane] = float_to_half(rows[2 * lane]) | float_to_half(rows[2 * lane + 1]) << 16; });
  }
}

// ---- Sparse A
// --------------------------------------------------------------------------------------------------------

std::string binary(uint32_t code) { return "0b" + std::bitset<4>(code).to_string(); }

// Checks selector and metadata and writes which row of B each stored element of A meets. What the ISA leaves undefined
// is found, and computed with all the same: an undefined selector counts modulo those that are defined.
void decode_metadata(Warp& warp, const Operation& op, uint32_t lanes, uint16_t* source) {
  const Sparsity sparsity{bits_of(a_type(op)), depth_of(op)};
  const uint32_t* words = warp.lanes<uint32_t>(metadata_slot(op));
  const int selectors = sparsity.selectors();
  if (op.immediate < 0 || op.immediate >= selectors) {
    warp.find_with(Kind::BAD_SELECTOR, static_cast<uint32_t>(std::countr_zero(lanes)), 0, [&] {
      return "sparsity selector " + std::to_string(op.immediate) + " is undefined for m16n8k" +
             std::to_string(k_of(op)) + " of ." + std::string(name_of(a_type(op))) +
             (selectors == 1 ? ", which has only 0" : ", which has 0 to " + std::to_string(selectors - 1));
    });
  }
  const int selector = static_cast<int>(op.immediate & (selectors - 1));
  tensor::Defect defect;
  if (warp.block->launch->checks(Check::TENSOR) &&
      tensor::find_defect(sparsity, selector, has(op, ORDERED), words, &defect)) {
    warp.find_with(Kind::BAD_METADATA, static_cast<uint32_t>(defect.lane), 0, [&] {
      const char* const rule = sparsity.bits == 32 ? "is neither 0b0100 nor 0b1110"
                               : has(op, ORDERED)  ? "does not name two increasing places"
                                                   : "names one place twice";
      return "metadata " + binary(defect.code) + " of row " + std::to_string(defect.row) + ", chunk " +
             std::to_string(defect.chunk) + " of A, in lane " + std::to_string(defect.lane) + ", " + rule;
    });
  }
  uint64_t rows[16];
  tensor::rows_of_metadata(sparsity, selector, words, rows);
  tensor::expand_metadata(sparsity, rows, source);
}

// ---- Handlers
// --------------------------------------------------------------------------------------------------------

// The largest `source` of mma.sp.
struct Sources {
  std::array<uint16_t, 16 * tensor::MAX_DEPTH> rows;
};

Multiplication multiplication_of(Warp& warp, const Operation& op, uint32_t lanes, Sources& sources) {
  Multiplication multiplication;
  multiplication.a_type = a_type(op), multiplication.b_type = b_type(op);
  multiplication.rows = rows_of(op), multiplication.depth = depth_of(op), multiplication.k = k_of(op);
  for (int i = 0; i < op.count[1]; ++i) multiplication.a[i] = warp.lanes<uint32_t>(a_slots(op)[i]);
  for (int i = 0; i < op.count[2]; ++i) multiplication.b[i] = warp.lanes<uint32_t>(b_slots(op)[i]);
  multiplication.source = tensor::dense_source();
  if (has(op, SPARSE)) {
    decode_metadata(warp, op, lanes, sources.rows.data());
    multiplication.source = sources.rows.data(), multiplication.source_stride = multiplication.depth;
  }
  multiplication.satfinite = has(op, SATFINITE), multiplication.both_bits = has(op, BITS_AND);
  multiplication.half = has(op, HALF_C) && has(op, HALF_D);
  return multiplication;
}

tensor::Model model_for(const Warp& warp, const Operation& op, bool half) {
  const LaunchOptions& options = warp.block->launch->options;
  return tensor::model_of(options.numerics, a_type(op), half, has(op, SPARSE) ? options.sparse_products : 0);
}

void multiply_floats(Warp& warp, const Operation& op, uint32_t lanes) {
  Sources sources;
  Multiplication multiplication = multiplication_of(warp, op, lanes, sources);
  multiplication.model = model_for(warp, op, multiplication.half);
  alignas(64) float rows[16 * 8];
  if (multiplication.half) {
    load_half_accumulators(warp, c_slots(op), op.count[3], rows);
    tensor::arithmetic().floats(multiplication, rows);
    store_half_accumulators(warp, d_slots(op), op.count[0], rows, lanes);
  } else {
    load_accumulators(warp, c_slots(op), op.count[3], rows);
    tensor::arithmetic().floats(multiplication, rows);
    store_accumulators(warp, d_slots(op), op.count[0], rows, lanes);
  }
}

void multiply_integers(Warp& warp, const Operation& op, uint32_t lanes) {
  Sources sources;
  const Multiplication multiplication = multiplication_of(warp, op, lanes, sources);
  alignas(64) int32_t rows[16 * 8];
  load_accumulators(warp, c_slots(op), op.count[3], rows);
  tensor::arithmetic().integers(multiplication, rows);
  store_accumulators(warp, d_slots(op), op.count[0], rows, lanes);
}

// f64 has one numerics: a chain of fused multiply-adds (PTX ISA, mma, ".f64 floating point operations").
void multiply_doubles(Warp& warp, const Operation& op, uint32_t lanes) {
  double a[16][16], b[16][8], c[16 * 8];
  for (int i = 0; i < op.count[1]; ++i) {
    for (int lane = 0; lane < LANES; ++lane) {
      const Cell cell = tensor::cell_of_a(rows_of(op), 1, lane, i, 0);
      a[cell.row][cell.column] = warp.lanes<double>(a_slots(op)[i])[lane];
    }
  }
  for (int i = 0; i < op.count[2]; ++i) {
    for (int lane = 0; lane < LANES; ++lane) {
      const Cell cell = tensor::cell_of_b(1, lane, i, 0);
      b[cell.row][cell.column] = warp.lanes<double>(b_slots(op)[i])[lane];
    }
  }
  load_accumulators(warp, c_slots(op), op.count[3], c);
  for (int m = 0; m < rows_of(op); ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < k_of(op); ++k) c[8 * m + n] = std::fma(a[m][k], b[k][n], c[8 * m + n]);
    }
  }
  store_accumulators(warp, d_slots(op), op.count[0], c, lanes);
}

// f16 m8n8k4: four products, each of eight lanes.
void multiply_quads(Warp& warp, const Operation& op, uint32_t lanes) {
  // As registers of one warp would hold an 8x4 A and a 4x8 B: rows of 16 bytes, of which the first half is used.
  uint16_t a[4][8][8] = {}, b[4][8][8] = {};
  float c[4][8][8];
  const bool half_c = has(op, HALF_C), half_d = has(op, HALF_D);
  for (int lane = 0; lane < LANES; ++lane) {
    const int q = tensor::quads::product_of(lane);
    for (int i = 0; i < 4; ++i) {
      const Cell at = tensor::quads::cell_of_a(has(op, A_BY_COLUMNS), lane, i);
      a[q][at.row][at.column] = static_cast<uint16_t>(warp.lanes<uint32_t>(a_slots(op)[i / 2])[lane] >> 16 * (i % 2));
      const Cell bt = tensor::quads::cell_of_b(has(op, B_BY_COLUMNS), lane, i);
      b[q][bt.column][bt.row] = static_cast<uint16_t>(warp.lanes<uint32_t>(b_slots(op)[i / 2])[lane] >> 16 * (i % 2));
    }
    for (int i = 0; i < 8; ++i) {
      const Cell at = half_c ? tensor::quads::cell_of_half_c(lane, i) : tensor::quads::cell_of_c(lane, i);
      const uint32_t bits = warp.lanes<uint32_t>(c_slots(op)[half_c ? i / 2 : i])[lane];
      c[q][at.row][at.column] = half_c ? half_to_float(bits >> 16 * (i % 2) & 0xffff) : std::bit_cast<float>(bits);
    }
  }
  Multiplication multiplication;
  multiplication.a_type = multiplication.b_type = Type::F16;
  multiplication.rows = 8, multiplication.depth = multiplication.k = 4;
  multiplication.source = tensor::dense_source();
  multiplication.half = half_c && half_d;
  multiplication.model = model_for(warp, op, multiplication.half);
  for (int q = 0; q < 4; ++q) {
    uint32_t a_register[32], b_register[32];
    std::memcpy(a_register, a[q], sizeof a_register);
    std::memcpy(b_register, b[q], sizeof b_register);
    multiplication.a[0] = a_register, multiplication.b[0] = b_register;
    tensor::arithmetic().floats(multiplication, &c[q][0][0]);
  }
  each(lanes, [&](int lane) {
    const auto& d = c[tensor::quads::product_of(lane)];
    for (int i = 0; i < op.count[0]; ++i) {
      uint32_t& result = warp.lanes<uint32_t>(d_slots(op)[i])[lane];
      if (half_d) {
        const Cell low = tensor::quads::cell_of_half_c(lane, 2 * i),
                   high = tensor::quads::cell_of_half_c(lane, 2 * i + 1);
        result = float_to_half(d[low.row][low.column]) | float_to_half(d[high.row][high.column]) << 16;
      } else {
        const Cell at = tensor::quads::cell_of_c(lane, i);
        result = std::bit_cast<uint32_t>(d[at.row][at.column]);
      }
    }
  });
}

// ---- Forms
// -----------------------------------------------------------------------------------------------------------

struct Shape {
  int rows, k;
};

Shape shape_of(const Chosen& chosen) {
  const int k16 = chosen.number("m16n8k", 0);
  return k16 != 0 ? Shape{16, k16} : Shape{8, chosen.number("m8n8k", 0)};
}

// Sets what all have in common; false where the operands are not the fragments of the shape.
bool set(const Chosen& chosen, Operation& op, Handler run) {
  const Shape shape = shape_of(chosen);
  const Type d = chosen.type(0), a = chosen.type(1), b = chosen.type(2), c = chosen.type(3);
  const bool sparse = !chosen.starting("sp").empty();
  op.run = run;
  op.flow = Flow::CONVERGE, op.presence = Presence::ALIGNED;
  op.option[0] = static_cast<uint8_t>(a), op.option[1] = static_cast<uint8_t>(b);
  op.option[K_QUARTER] = static_cast<uint8_t>(shape.k / 4);
  op.option[FLAGS] = static_cast<uint8_t>(
      (shape.rows == 16 ? SIXTEEN_ROWS : 0) | (sparse ? SPARSE : 0) |
      (chosen.has("sp::ordered_metadata") ? ORDERED : 0) | (chosen.has("satfinite") ? SATFINITE : 0) |
      (chosen.has("and") ? BITS_AND : 0) | (c == Type::F16 ? HALF_C : 0) | (d == Type::F16 ? HALF_D : 0));
  const int register_bits = a == Type::F64 ? 64 : 32, bits = bits_of(a), depth = sparse ? shape.k / 2 : shape.k;
  const auto accumulators = [&](Type type) { return shape.rows * 8 / LANES / (type == Type::F16 ? 2 : 1); };
  const int expected[4] = {accumulators(d), shape.rows * depth * bits / register_bits / LANES,
                           8 * shape.k * bits / register_bits / LANES, accumulators(c)};
  int slots = sparse ? 1 : 0;
  for (int i = 0; i < 4; ++i) {
    if (op.count[i] != expected[i]) return false;
    slots += expected[i];
  }
  for (int i = 0; i < slots; ++i) {
    if (op.slot[i] == NO_SLOT) return false;
  }
  return true;
}

template <Handler RUN>
bool choose(const Chosen& chosen, Operation& op) {
  // All but f16 m8n8k4 have C as wide as D.
  return chosen.type(0) == chosen.type(3) && set(chosen, op, RUN);
}

// The four products take twice the registers that one 8x8x4 would.
bool choose_quads(const Chosen& chosen, Operation& op) {
  const Type d = chosen.type(0), c = chosen.type(3);
  if (c == Type::F32 && d == Type::F16) return false;
  op.run = multiply_quads;
  op.flow = Flow::CONVERGE, op.presence = Presence::ALIGNED;
  op.option[0] = op.option[1] = static_cast<uint8_t>(Type::F16);
  const int row = chosen.place_of("row"), column = chosen.place_of("col");
  const bool a_by_columns = column >= 0 && (row < 0 || column < row), b_by_columns = column >= 0 && column > row;
  op.option[FLAGS] = static_cast<uint8_t>((a_by_columns ? A_BY_COLUMNS : 0) | (b_by_columns ? B_BY_COLUMNS : 0) |
                                          (c == Type::F16 ? HALF_C : 0) | (d == Type::F16 ? HALF_D : 0));
  const int expected[4] = {d == Type::F16 ? 4 : 8, 2, 2, c == Type::F16 ? 4 : 8};
  int slots = 0;
  for (int i = 0; i < 4; ++i) {
    if (op.count[i] != expected[i]) return false;
    slots += expected[i];
  }
  for (int i = 0; i < slots; ++i) {
    if (op.slot[i] == NO_SLOT) return false;
  }
  return true;
}

constexpr std::string_view DENSE = "=*b32, *b32, *b32, *b32", DOUBLES = "=*f64, *f64, *f64, *f64",
                           SPARSE_A = "=*b32, *b32, *b32, *b32, b32, i";

constexpr Form FORMS[] = {
    {"mma", "sync aligned m8n8k4 row|col row|col f16|f32 f16 f16 f16|f32", DENSE, choose_quads},
    {"mma", "sync aligned m16n8k8|m16n8k16 row col f16|f32 f16 f16 f16|f32", DENSE, choose<multiply_floats>},
    {"mma", "sync aligned m16n8k8|m16n8k16 row col f32 bf16 bf16 f32", DENSE, choose<multiply_floats>},
    {"mma", "sync aligned m16n8k4|m16n8k8 row col f32 tf32 tf32 f32", DENSE, choose<multiply_floats>},
    {"mma", "sync aligned m16n8k16|m16n8k32 row col f16|f32 e4m3|e5m2 e4m3|e5m2 f16|f32", DENSE,
     choose<multiply_floats>},
    {"mma", "sync aligned m16n8k32 row col kind::f8f6f4 f16|f32 e4m3|e5m2 e4m3|e5m2 f16|f32", DENSE,
     choose<multiply_floats>},
    {"mma", "sync aligned m8n8k4|m16n8k4|m16n8k8|m16n8k16 row col rn? f64 f64 f64 f64", DOUBLES,
     choose<multiply_doubles>},
    {"mma", "sync aligned m8n8k16|m16n8k16|m16n8k32 row col satfinite? s32 s8|u8 s8|u8 s32", DENSE,
     choose<multiply_integers>},
    {"mma", "sync aligned m8n8k32|m16n8k32|m16n8k64 row col satfinite? s32 s4|u4 s4|u4 s32", DENSE,
     choose<multiply_integers>},
    {"mma", "sync aligned m8n8k128|m16n8k128|m16n8k256 row col s32 b1 b1 s32 xor|and popc", DENSE,
     choose<multiply_integers>},
    {"mma", "sp|sp::ordered_metadata sync aligned m16n8k16|m16n8k32 row col f16|f32 f16 f16 f16|f32", SPARSE_A,
     choose<multiply_floats>},
    {"mma", "sp|sp::ordered_metadata sync aligned m16n8k16|m16n8k32 row col f32 bf16 bf16 f32", SPARSE_A,
     choose<multiply_floats>},
    {"mma", "sp|sp::ordered_metadata sync aligned m16n8k8|m16n8k16 row col f32 tf32 tf32 f32", SPARSE_A,
     choose<multiply_floats>},
    {"mma", "sp|sp::ordered_metadata sync aligned m16n8k64 row col f32 e4m3|e5m2 e4m3|e5m2 f32", SPARSE_A,
     choose<multiply_floats>},
    {"mma", "sp::ordered_metadata sync aligned m16n8k64 row col kind::f8f6f4 f16|f32 e4m3|e5m2 e4m3|e5m2 f16|f32",
     SPARSE_A, choose<multiply_floats>},
    {"mma", "sp|sp::ordered_metadata sync aligned m16n8k32|m16n8k64 row col satfinite? s32 s8|u8 s8|u8 s32", SPARSE_A,
     choose<multiply_integers>},
    {"mma", "sp|sp::ordered_metadata sync aligned m16n8k64|m16n8k128 row col satfinite? s32 s4|u4 s4|u4 s32", SPARSE_A,
     choose<multiply_integers>},
};

}  // namespace

Forms tensor_forms() { return FORMS; }

}  // namespace sparse24::ptx
