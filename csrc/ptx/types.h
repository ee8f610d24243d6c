// The scalar types and state spaces of PTX. Source: PTX ISA, "State Spaces, Types, and Variables".
#pragma once
#include <cstdint>
#include <string_view>

namespace sparse24::ptx {

enum class Type : uint8_t {
  NONE,
  PRED,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  BF16,
  TF32,
  F32,
  F64,
  F16X2,
  BF16X2,
  U16X2,
  S16X2,
  E4M3,
  E5M2,
  E4M3X2,
  E5M2X2,
  S4,
  U4,
  B1,
};

// The type that PTX writes as `name`, without its dot; NONE for a name that is no type.
Type type_named(std::string_view name);
std::string_view name_of(Type type);

// Bits of one element: 1 for PRED and B1, 4 for S4 and U4, 32 for the packed pairs and TF32.
int bits_of(Type type);
bool is_signed(Type type);  // S8 to S64, S16X2, S4

enum class Space : uint8_t {
  GENERIC,  // no space named: the address says it
  REGISTER,
  PARAM,  // of the kernel, or of a device function
  CONST,
  GLOBAL,
  SHARED,
  LOCAL,
};
std::string_view name_of(Space space);

}  // namespace sparse24::ptx
