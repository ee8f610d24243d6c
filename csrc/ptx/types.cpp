// Names and sizes of the scalar types and state spaces.
#include "csrc/ptx/types.h"

#include <array>

namespace sparse24::ptx {
namespace {

struct Row {
  Type type;
  std::string_view name;
  int bits;
  bool is_signed = false;
};

// In the order of the enumeration.
constexpr std::array ROWS{
    Row{Type::NONE, "none", 0},      Row{Type::PRED, "pred", 1},      Row{Type::B8, "b8", 8},
    Row{Type::B16, "b16", 16},       Row{Type::B32, "b32", 32},       Row{Type::B64, "b64", 64},
    Row{Type::B128, "b128", 128},    Row{Type::U8, "u8", 8},          Row{Type::U16, "u16", 16},
    Row{Type::U32, "u32", 32},       Row{Type::U64, "u64", 64},       Row{Type::S8, "s8", 8, true},
    Row{Type::S16, "s16", 16, true}, Row{Type::S32, "s32", 32, true}, Row{Type::S64, "s64", 64, true},
    Row{Type::F16, "f16", 16},       Row{Type::BF16, "bf16", 16},     Row{Type::TF32, "tf32", 32},
    Row{Type::F32, "f32", 32},       Row{Type::F64, "f64", 64},       Row{Type::F16X2, "f16x2", 32},
    Row{Type::BF16X2, "bf16x2", 32}, Row{Type::U16X2, "u16x2", 32},   Row{Type::S16X2, "s16x2", 32, true},
    Row{Type::E4M3, "e4m3", 8},      Row{Type::E5M2, "e5m2", 8},      Row{Type::E4M3X2, "e4m3x2", 16},
    Row{Type::E5M2X2, "e5m2x2", 16}, Row{Type::S4, "s4", 4, true},    Row{Type::U4, "u4", 4},
    Row{Type::B1, "b1", 1},
};

const Row& row(Type type) { return ROWS[static_cast<size_t>(type)]; }

}  // namespace

Type type_named(std::string_view name) {
  for (const Row& one : ROWS) {
    if (one.name == name && one.type != Type::NONE) return one.type;
  }
  return Type::NONE;
}

std::string_view name_of(Type type) { return row(type).name; }
int bits_of(Type type) { return row(type).bits; }
bool is_signed(Type type) { return row(type).is_signed; }

std::string_view name_of(Space space) {
  switch (space) {
    case Space::GENERIC:
      return "generic";
    case Space::REGISTER:
      return "reg";
    case Space::PARAM:
      return "param";
    case Space::CONST:
      return "const";
    case Space::GLOBAL:
      return "global";
    case Space::SHARED:
      return "shared";
    case Space::LOCAL:
      return "local";
  }
  return "";
}

}  // namespace sparse24::ptx
