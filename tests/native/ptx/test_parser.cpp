// The parser: facts of the tree for what compilers write, exact places of errors, and thousands of damaged texts, each
// of which gives a tree or a SyntaxError.
#include <bit>
#include <functional>
#include <string>

#include "csrc/ptx/program.h"
#include "tests/native/check.h"

namespace sparse24::ptx {
namespace {

const std::string HEAD = ".version 8.8\n.target sm_90a, debug\n.address_size 64\n";

// As nvcc, Triton and CUTLASS write it; together everything that the grammar has.
const std::string WHOLE = HEAD + R"(
.file 1 "a.cu"
.file 2 "b \"q\".h", 123, 456
.extern .func (.param .b32 func_retval0) vprintf (.param .b64 p0, .param .b64 p1) ;
.global .align 1 .b8 $str[3] = {72, 105, 0};
.visible .const .align 8 .u64 table[] = {$str, $str+1, generic($str)+2, 0};
.global .b8 bytes[2] = {0xFF($str), 0xFF00($str)};
.global .f32 reals[2][2] = {{0f3F800000, -0f40000000}, {1.5, 2.0}};
.extern .shared .align 16 .b8 dynamic[];
.func (.param .b32 result) helper(.param .align 8 .b8 by_value[24], .reg .b32 r) .noreturn;
.visible .entry k(.param .u64 .ptr .global .align 16 a, .param .align 4 .b8 s[12])
.maxntid 128, 2
.reqntid 64
.minnctapersm 2
.maxnreg 99
.explicitcluster .reqnctapercluster 2, 1, 1
{
.pragma "nounroll";
.reg .pred %p<3>; .reg .b32 %r<5>, x; .reg .v4 .f32 v;
.local .align 8 .b8 depot[16];
.loc 1 7 3
@!%p1 bra $L__BB0_1;
ld.global.L1::no_allocate.L2::128B.v4.u32 {%r1, _, x, %r2}, [%rd1+-16]; // comment
.loc 2 9 1, function_name $L__info_string0+12, inlined_at 1 7 3
$L__BB0_1:
{ .reg .b32 t; $inner: mov.u32 t, %tid.x; { $inner: } }
mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32 {a}, {b};
setp.lt.and.s32 %p1|%p2, %r1, -0x10U, !%p0; /* a
comment */ cp.async.bulk.tensor.2d.shared::cluster.global [a], [b, {x, y}], [c-8];
ld.u32 x, [64];
call (retval0), vprintf, (param0, param1), proto;
proto: .callprototype (.param .b32 _) _ (.param .b64 _);
mov.b64 x, 1 ? (2 + 3) * 4 << 1 | 0b11 : 017;
mov.b64 x, -7 / 2 % 2 + (.s64) ~0 ^ !5;
mov.f64 x, 0d3FF0000000000000;
mov.u64 x, table+8*2;
targets: .branchtargets $L__BB0_1, end;
ret;
}
.section .debug_info { .b8 1,2 .b32 .debug_abbrev label: { .b64 $L__tmp0+4 } }
)";

template <class T>
const T& find(const Function& function, size_t number) {
  for (const Statement& statement : function.body) {
    if (const T* found = std::get_if<T>(&statement); found && number-- == 0) return *found;
  }
  CHECK(false, "no such statement");
  std::abort();
}

void test_tree() {
  const auto module = parse(WHOLE);
  CHECK(module->version_major == 8 && module->version_minor == 8);
  CHECK(module->target == "sm_90a");
  CHECK(module->files.size() == 3 && module->files[1] == "a.cu");

  CHECK(module->variables.size() == 5);
  const Variable &text = module->variables[0], &table = module->variables[1], &bytes = module->variables[2],
                 &reals = module->variables[3], &dynamic = module->variables[4];
  CHECK(text.name == "$str" && text.align == 1 && text.elements == 3 && text.type == Type::B8);
  CHECK(text.space == Space::GLOBAL && text.initializer[1].bits == 105);
  CHECK(table.space == Space::CONST && table.elements == 4 && table.initializer[1].symbol == "$str");
  CHECK(table.initializer[1].bits == 1 && !table.initializer[1].generic);
  CHECK(table.initializer[2].generic && table.initializer[2].bits == 2 && table.initializer[3].symbol.empty());
  CHECK(bytes.initializer[0].mask_byte == 1 && bytes.initializer[1].mask_byte == 2);
  CHECK(reals.elements == 4 && reals.initializer.size() == 4);
  CHECK(reals.initializer[1].bits == 0xc0000000 && reals.initializer[1].real_bits == 32);
  CHECK(reals.initializer[2].bits == std::bit_cast<uint64_t>(1.5) && reals.initializer[2].real_bits == 64);
  CHECK(dynamic.is_extern && dynamic.elements == 0 && dynamic.space == Space::SHARED && dynamic.align == 16);

  CHECK(module->functions.size() == 3);
  const Function &print = module->functions[0], &helper = module->functions[1], &kernel = module->functions[2];
  CHECK(print.is_extern && print.results.size() == 1 && print.parameters.size() == 2 && !print.is_entry);
  CHECK(helper.is_extern && helper.parameters[0].elements == 24 && helper.parameters[0].align == 8);
  CHECK(helper.parameters[1].space == Space::REGISTER);
  CHECK(kernel.is_entry && kernel.name == "k" && kernel.parameters[0].pointer);
  CHECK(kernel.parameters[0].pointer_space == Space::GLOBAL && kernel.parameters[0].pointer_align == 16);
  CHECK(kernel.parameters[0].align == 0 && kernel.parameters[1].align == 4 && kernel.parameters[1].elements == 12);
  CHECK(kernel.max_threads[0] == 128 && kernel.max_threads[1] == 2 && kernel.max_threads[2] == 1);
  CHECK(kernel.required_threads[0] == 64 && kernel.required_threads[1] == 1);
  CHECK(kernel.min_blocks == 2 && kernel.max_registers == 99);

  CHECK(find<Variable>(kernel, 0).count == 3 && find<Variable>(kernel, 2).name == "x");
  CHECK(find<Variable>(kernel, 3).vector == 4 && find<Variable>(kernel, 4).space == Space::LOCAL);
  CHECK(find<Label>(kernel, 0).name == "$L__BB0_1" && find<Label>(kernel, 1).name == "$inner");
  CHECK(find<Targets>(kernel, 0).labels.size() == 2 && find<Targets>(kernel, 0).labels[1] == "end");

  const Instruction& branch = find<Instruction>(kernel, 0);
  CHECK(branch.predicate == "%p1" && branch.predicate_negated && branch.opcode == "bra" && branch.modifiers.empty());
  CHECK(branch.source.file == 1 && branch.source.line == 7 && branch.operands[0].name == "$L__BB0_1");
  CHECK(branch.place.column == 7 && branch.text == "bra $L__BB0_1");
  const Instruction& load = find<Instruction>(kernel, 1);
  CHECK(load.predicate.empty() && load.modifiers.size() == 5 && load.modifiers[2] == "L2::128B");
  CHECK(load.operands[0].kind == Operand::Kind::VECTOR && load.operands[0].parts.size() == 4);
  CHECK(load.operands[0].parts[1].kind == Operand::Kind::SINK);
  CHECK(load.operands[1].kind == Operand::Kind::ADDRESS && load.operands[1].name == "%rd1");
  CHECK(load.operands[1].offset == -16);
  const Instruction& special = find<Instruction>(kernel, 2);
  CHECK(special.operands[1].name == "%tid.x" && special.source.file == 2 && special.source.line == 9);
  const Instruction& sparse = find<Instruction>(kernel, 3);
  CHECK(sparse.opcode == "mma" && sparse.modifiers[0] == "sp::ordered_metadata" && sparse.modifiers.size() == 7);
  const Instruction& compare = find<Instruction>(kernel, 4);
  CHECK(compare.operands[0].kind == Operand::Kind::PAIR && compare.operands[0].parts[1].name == "%p2");
  CHECK(compare.operands[2].bits == uint64_t{0} - 16 && compare.operands[3].negated);
  const Instruction& copy = find<Instruction>(kernel, 5);
  CHECK(copy.modifiers[4] == "shared::cluster" && copy.operands[1].parts[0].parts[1].name == "y");
  CHECK(copy.operands[2].offset == -8);
  CHECK(find<Instruction>(kernel, 6).operands[1].name.empty() && find<Instruction>(kernel, 6).operands[1].bits == 64);
  const Instruction& call = find<Instruction>(kernel, 7);
  CHECK(call.operands.size() == 4 && call.operands[0].kind == Operand::Kind::LIST);
  CHECK(call.operands[2].parts.size() == 2 && call.operands[3].name == "proto");
  CHECK(find<Instruction>(kernel, 8).operands[1].bits == 43);
  CHECK(find<Instruction>(kernel, 9).operands[1].bits == 0);
  CHECK(find<Instruction>(kernel, 10).operands[1].real_bits == 64);
  CHECK(find<Instruction>(kernel, 11).operands[1].name == "table");
  CHECK(find<Instruction>(kernel, 11).operands[1].offset == 16);
}

struct Wrong {
  std::string text;
  uint32_t line, column;
  const char* message;
};

void test_errors() {
  const std::string kernel = HEAD + ".entry k()\n{\n";  // what follows is line 6
  const Wrong wrong[] = {
      {"", 1, 1, "expected '.version' at the beginning; the text ends here"},
      {".version x", 1, 10, "a version such as 8.5; got 'x'"},
      {".version 8.5 .target sm_80 .address_size 32", 1, 42, "only 64-bit addresses"},
      {HEAD + "foo", 4, 1, "a directive, a variable or a function; got 'foo'"},
      {HEAD + ".global .u33 x;", 4, 9, "expected a type; got '.u33'"},
      {HEAD + ".global .align 3 .u32 x;", 4, 16, "power of two; got 3"},
      {HEAD + ".global .u8 x[2] = {1,2,3};", 4, 20,
       "there is room for 2 elements here; the initialiser of 'x' has more"},
      {HEAD + ".global .v4 .u8 x = {1,2,3};", 4, 21, "a vector has 4 elements; got 3"},
      {HEAD + ".global .u8 x[2][2] = {1, 2};", 4, 24, "'{' before the elements of an initialiser; got '1'"},
      {HEAD + ".global .u8 x = {1};", 4, 17, "one value: the braces of an initialiser are those of its array"},
      {HEAD + ".global .u8 x[2][];", 4, 14, "only the first extent of 'x' may be left out"},
      {HEAD + ".global .f32 x = 3;", 4, 18, "an integer cannot initialise a .f32"},
      {HEAD + ".global .u8 x, x;", 4, 16, "variable 'x' is there twice"},
      {HEAD + ".global .f64 x = 1e999;", 4, 18, "'1e999' is not a floating-point number of 64 bits"},
      {HEAD + ".global .u64 x[99999999999];", 4, 15, "'x' is too large"},
      {HEAD + ".func f() {}\n.func f() {}", 5, 7, "function 'f' is there twice"},
      {HEAD + "/* open", 4, 1, "a comment does not end"},
      {HEAD + ".file 1 \"open", 4, 9, "a string does not end"},
      {HEAD + "\x01", 4, 1, "unexpected character '\\x01'"},
      {kernel, 6, 1, "expected '}' at the end of 'k'"},
      {kernel + " add.s32 a, b\n c;", 7, 2, "',' or ';' after an operand of 'add'; got 'c'"},
      {kernel + "x: y:\nx: }", 7, 1, "label 'x' is there twice"},
      {kernel + "mov.f32 a, 0f123;", 6, 12, "a floating-point constant 0f has 8 hexadecimal digits"},
      {kernel + "mov.u32 a, 12z;", 6, 12, "'12z' is not a number"},
      {kernel + "mov.u32 a, 99999999999999999999;", 6, 12, "is not an integer of 64 bits"},
      {kernel + "mov.u32 a, 1/0;", 6, 13, "division by zero"},
      {kernel + "ld.u32 a, [b;", 6, 13, "expected ']' after an address; got ';'"},
      {kernel + "@ 5 bra x;", 6, 3, "a predicate after '@'; got '5'"},
      {kernel + ".reg .b32 r<0>;", 6, 11, "a number of registers is 1 to 10,000,000"},
      {kernel + ".reg .b32 r<4294967297>;", 6, 11, "a number of registers is 1 to 10,000,000"},
      {kernel + ".loc 1 2 3, nowhere;", 6, 20, "function_name or inlined_at"},
      {kernel + "mov.b32 a, " + std::string(99, '{') + ";", 6, 77, "an operand that nests less deep"},
      {kernel + "mov.b32 a, " + std::string(99, '(') + ";", 6, 77, "an expression that nests less deep"},
  };
  for (const Wrong& one : wrong) {
    try {
      parse(one.text);
      CHECK(false, "no error: ", one.text);
    } catch (const SyntaxError& error) {
      CHECK(error.place.line == one.line && error.place.column == one.column, error.what(), " in ", one.text);
      CHECK(std::string(error.what()).find(one.message) != std::string::npos, error.what(), ", not ", one.message);
    }
  }
}

// True: a tree, and a program of each kernel. Only SyntaxError may be thrown, with a place in the text and a short,
// printable message.
bool survives(const std::string& text) {
  bool is_tree = false;
  try {
    const auto module = parse(text);
    is_tree = true;
    for (const Function& function : module->functions) {
      if (function.is_entry && !function.is_extern) decode(*module, function);
    }
    return true;
  } catch (const SyntaxError& error) {
    CHECK(error.place.line >= 1 && error.place.column >= 1 && error.place.column <= text.size() + 1, error.what());
    const std::string message = error.what();
    CHECK(message.size() < 600, message);
    for (const char c : message) CHECK(c >= ' ' && c <= '~', message);
    return is_tree;
  }
}

#ifdef __SANITIZE_ADDRESS__
constexpr size_t DAMAGED = 2000;  // texts; each takes 30 times as long
#else
constexpr size_t DAMAGED = 6000;
#endif

void test_damaged() {
  test::Random random(24);
  const auto position = [&](const std::string& text) { return static_cast<size_t>(random.below(text.size() + 1)); };
  const auto piece = [&] { return WHOLE.substr(position(WHOLE), static_cast<size_t>(random.below(24))); };
  const std::string marks = "{}()[]<>,;:=+-*/%&|^~!?@_.\"\n0x\\";
  size_t trees = 0, damaged = 0;
  for (size_t i = 0; i < DAMAGED; ++i) {
    std::string text = WHOLE;
    for (int64_t n = random.between(1, 3); n > 0; --n) {
      const size_t at = position(text);
      switch (random.below(6)) {
        case 0:
          if (at < text.size()) text[at] = static_cast<char>(random.bits());
          break;
        case 1:
          text.erase(at, static_cast<size_t>(random.below(12)));
          break;
        case 2:
          text.insert(at, piece());
          break;
        case 3:
          text.insert(at, 1, marks[static_cast<size_t>(random.below(marks.size()))]);
          break;
        case 4:
          text.insert(at, static_cast<size_t>(random.below(300)), marks[static_cast<size_t>(random.below(6))]);
          break;
        default:
          if (random.below(4) == 0) text.resize(at);
      }
    }
    ++(survives(text) ? trees : damaged);
  }
  CHECK(trees > DAMAGED / 20 && damaged > DAMAGED / 2, trees, " trees, ", damaged, " errors");
  for (size_t length = 0; length < WHOLE.size(); ++length) survives(WHOLE.substr(0, length));
}

// Repeated a hundred thousand times: neither the stack nor quadratic time may be the limit.
void test_bombs() {
  const std::string kernel = HEAD + ".entry k() {\n";
  for (const char* one : {"{", "(", "[", "-", "~", "!", "1+", "1?", "a|", "{}", "a:", "@", "(.s64)", "1?1:", "-1*-"}) {
    std::string many;
    for (int i = 0; i < 100'000; ++i) many += one;
    for (const std::string& before : {HEAD, HEAD + ".global .u8 a[] = ", kernel, kernel + "mov.b32 a, "}) {
      survives(before + many);
    }
  }
  std::string functions = HEAD, labels = kernel;
  for (int i = 0; i < 100'000; ++i) {
    functions += std::string(".func f") + std::to_string(i).append("() {}\n");
    labels += std::string("l") + std::to_string(i) + ":";
  }
  CHECK(parse(functions)->functions.size() == 100'000);
  CHECK(parse(labels + "}")->functions[0].body.size() == 100'000);
}

}  // namespace
}  // namespace sparse24::ptx

int main() {
  sparse24::ptx::test_tree();
  sparse24::ptx::test_errors();
  sparse24::ptx::test_damaged();
  sparse24::ptx::test_bombs();
}
