// Families of isa.h whose rows stand in several files.
#pragma once
#include <initializer_list>
#include <vector>

#include "csrc/ptx/isa.h"

namespace sparse24::ptx {

Forms carry_forms();       // of integer_forms(): carry.cpp
Forms bit_forms();         // of logic_forms(): bits.cpp
Forms comparison_forms();  // of move_forms(): compare.cpp

inline std::vector<Form> join(std::initializer_list<Forms> parts) {
  std::vector<Form> all;
  for (const Forms& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

}  // namespace sparse24::ptx
