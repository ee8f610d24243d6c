// Kernels that nobody would write: every form of every instruction with operands drawn at random, and damaged kernels
// that still decode. They run with random arguments, shapes and checks. Whatever they do, the process lives, in the
// sanitizers' build too; nothing outside of the one buffer is touched; each launch ends within its budget.
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/ptx/api.h"
#include "csrc/ptx/decoder.h"
#include "csrc/ptx/memory.h"
#include "tests/native/check.h"

namespace sparse24::ptx {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr int GENERATED = 2500, DAMAGED = 700;
#else
constexpr int GENERATED = 25'000, DAMAGED = 5000;
#endif

test::Random dice(24);
size_t below(size_t limit) { return static_cast<size_t>(dice.below(static_cast<int64_t>(limit))); }
bool one_in(size_t n) { return below(n) == 0; }
template <class List>
const auto& any_of(const List& list) {
  return list[below(list.size())];
}

const std::string HEAD = ".version 8.8\n.target sm_90a\n.address_size 64\n";

struct Tally {
  size_t parsed = 0, decoded = 0, launched = 0, findings = 0;
};

uint64_t random_word() {
  switch (below(6)) {
    case 0:
      return dice.bits();
    case 1:
      return below(64);
    case 2:
      return SHARED_WINDOW + below(600);
    case 3:
      return LOCAL_WINDOW + below(80);
    case 4:
      return uint64_t{0} - below(64);
    default:
      return dice.bits() & 0xffffffff;
  }
}

// Loads the text and launches each of its kernels, a 64-bit parameter often the address of a small buffer.
void try_text(const std::string& text, Tally& tally) {
  sparse24_ptx_module* module = sparse24_ptx_load(text.data(), text.size());
  CHECK(module != nullptr || sparse24_ptx_error_kind(nullptr, nullptr) == SPARSE24_PTX_TEXT, sparse24_ptx_error());
  if (module == nullptr) return;
  ++tally.parsed;
  CHECK(sparse24_ptx_describe(module) != nullptr);
  const auto tree = parse(text);
  for (const Function& function : tree->functions) {
    if (!function.is_entry || function.is_extern) continue;
    const std::string name(function.name);
    CHECK(sparse24_ptx_describe_kernel(module, name.c_str()) != nullptr, sparse24_ptx_error());
    std::unique_ptr<const Program> program;
    try {
      program = decode(*tree, function);
    } catch (const SyntaxError&) {
      continue;
    }
    ++tally.decoded;

    test::Guarded<uint8_t> buffer(256, 16);
    for (uint8_t& byte : buffer) byte = static_cast<uint8_t>(one_in(2) ? dice.bits() : 0x3c);
    const uint64_t address = sparse24_ptx_allocate(buffer.data(), buffer.bytes(), 16, one_in(2));
    CHECK(address != 0);
    std::vector<uint8_t> arguments(program->parameter_bytes);
    for (size_t at = 0; at < arguments.size(); at += 8) {
      const uint64_t word = one_in(8) ? random_word() : address + (one_in(4) ? below(256) : 0);
      std::memcpy(arguments.data() + at, &word, std::min<size_t>(8, arguments.size() - at));
    }
    sparse24_ptx_launch launch{};
    const uint32_t blocks[] = {1, 5, 32, 33, 64};
    for (int i = 0; i < 3; ++i) launch.grid[i] = launch.block[i] = 1;
    launch.grid[0] = 1 + static_cast<uint32_t>(below(2));
    launch.block[0] =
        program->required_threads[0] != 0 ? program->required_threads[0] : any_of(std::vector(blocks, blocks + 5));
    launch.arguments = arguments.data();
    launch.argument_bytes = arguments.size();
    launch.dynamic_shared = static_cast<uint32_t>(below(3)) * 100;
    launch.checks = one_in(3) ? static_cast<uint32_t>(below(64)) : 63;
    launch.counters = one_in(2);
    launch.numerics = static_cast<uint32_t>(below(4));
    launch.order = static_cast<uint32_t>(below(3));
    launch.seed = dice.bits();
    launch.threads = 1;
    launch.budget = 1000;
    sparse24_ptx_report* report = sparse24_ptx_run(module, name.c_str(), &launch);
    if (report != nullptr) {
      ++tally.launched;
      tally.findings += sparse24_ptx_finding_count(report) != 0;
      CHECK(sparse24_ptx_report_json(report)[0] == '{');
      CHECK((sparse24_ptx_finding_count(report) != 0) == (sparse24_ptx_report_text(report)[0] != 0));
      sparse24_ptx_discard(report);
    }
    sparse24_ptx_free(address);
    buffer.check();
  }
  sparse24_ptx_unload(module);
}

// ---- Every form -----------------------------------------------------------------------------------------------------

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    const size_t end = std::min(text.find(separator), text.size());
    parts.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return parts;
}

std::string constant() {
  static const std::vector<std::string> some{"0",
                                             "1",
                                             "-1",
                                             "2",
                                             "3",
                                             "4",
                                             "7",
                                             "16",
                                             "31",
                                             "32",
                                             "33",
                                             "63",
                                             "64",
                                             "255",
                                             "0x80000000",
                                             "0xffffffff",
                                             "0x7fffffffffffffff",
                                             "0x5410"};
  return one_in(8) ? std::to_string(dice.bits()) : any_of(some);
}

std::string value(Type type, bool result) {
  if (one_in(result ? 40 : 6)) return constant();
  if (one_in(60))
    return any_of(std::vector<std::string>{"_", "%tid.x", "%gridid", "%clock64", "shared", "%p1", "global"});
  const int bits = one_in(60) ? 32 : bits_of(type);
  const char* family = bits == 64 ? "%d" : bits == 16 ? "%h" : bits == 8 ? "%b" : "%r";
  return family + std::to_string(below(6));
}

std::string address() {
  static const std::vector<std::string> bases{"%d0", "%d0",    "%d0",    "%d1",     "%d2",   "%d3", "%d4",    "%r0",
                                              "%r1", "shared", "shared", "dynamic", "local", "a",   "global", "table"};
  std::string text = "[" + any_of(bases);
  if (one_in(2)) text += (one_in(4) ? "-" : "+") + std::to_string(one_in(10) ? dice.bits() >> 1 : below(40) * 4);
  return text + "]";
}

std::string operand_of(const OperandRule& rule, const Chosen& chosen) {
  using Kind = OperandRule::Kind;
  Type type = rule.type_index >= 0 ? chosen.type(rule.type_index) : rule.type;
  if (rule.doubled) type = bits_of(type) == 16 ? Type::B32 : Type::B64;
  std::string text;
  switch (rule.kind) {
    case Kind::VALUE:
      text = value(type, rule.result);
      break;
    case Kind::MASK:
      return one_in(3) ? value(type, false) : one_in(2) ? "0xffffffff" : constant();
    case Kind::PREDICATE:
      return one_in(20) ? constant() : (rule.negatable && one_in(3) ? "!%p" : "%p") + std::to_string(below(4));
    case Kind::VECTOR: {
      const size_t length = one_in(30) ? below(10) : any_of(std::vector<size_t>{0, 1, 2, 2, 4, 4, 8});
      if (length == 0) return value(type, rule.result);
      if (length > 1 && one_in(4)) type = bits_of(type) == 64 ? Type::B32 : Type::B16;  // as mov's
      for (size_t i = 0; i < length; ++i) text += (i == 0 ? "{" : ", ") + value(type, rule.result);
      text += "}";
      break;
    }
    case Kind::ADDRESS:
      return address();
    case Kind::IMMEDIATE:
      return one_in(3) ? constant() : any_of(std::vector<std::string>{"0", "1", "4", "8", "16", "128"});
    case Kind::LABEL:
      return one_in(2) ? "before" : "after";
    case Kind::LABELS:
      return "targets";
  }
  if (rule.pair_predicate && one_in(2)) text += "|%p" + std::to_string(below(4));
  return text;
}

// The registers that a thread holds of an operand of mma: D, A, B or C.
size_t registers_of_mma(const Chosen& chosen, size_t operand) {
  int m = 0, n = 0, k = 0;
  CHECK(std::sscanf(std::string(chosen.starting("m")).c_str(), "m%dn%dk%d", &m, &n, &k) == 3);
  const bool sparse = chosen.has("sp") || chosen.has("sp::ordered_metadata");
  const int elements[] = {m * n, m * k / (sparse ? 2 : 1), n * k, m * n};
  const Type type = chosen.type(static_cast<int>(operand));
  // m8n8k4 of f16 is four products at once, of eight lanes each (PTX ISA, "mma.m8n8k4 with .f16 floating point type").
  const int products = chosen.has("m8n8k4") && type != Type::F64 ? 4 : 1;
  const int bits = products * elements[operand] * bits_of(type) / LANES;
  return static_cast<size_t>(std::max(bits / (type == Type::F64 ? 64 : 32), 1));
}

std::string instruction_of(const Form& form) {
  std::string text(form.opcode);
  if (text.starts_with("call.")) return "";
  std::vector<std::string> modifiers;
  const std::vector<std::string> groups = split(form.modifiers, ' ');
  for (std::string group : groups) {
    if (group.ends_with('?')) {
      if (groups.size() > 8 ? !one_in(8) : one_in(2)) continue;
      group.pop_back();
    }
    std::string modifier = any_of(split(group, '|'));
    if (modifier.ends_with('*')) modifier.replace(modifier.size() - 1, 1, "128B");
    modifiers.push_back(modifier);
  }
  for (const std::string& modifier : modifiers) text += "." + modifier;
  const Chosen chosen(std::vector<std::string_view>(modifiers.begin(), modifiers.end()));
  const char* separator = " ";
  for (const OperandRule& rule : rules_of(form)) {
    if (rule.optional && one_in(2)) continue;
    const size_t number = static_cast<size_t>(&rule - rules_of(form).data());
    if (form.opcode == "mma" && rule.kind == OperandRule::Kind::VECTOR && !one_in(16)) {
      text += separator + std::string("{");
      for (size_t i = registers_of_mma(chosen, number); i-- > 0;) {
        text += (rule.type == Type::F64 ? "%d" : "%r") + std::to_string(below(6)) + (i > 0 ? ", " : "}");
      }
    } else {
      text += separator + operand_of(rule, chosen);
    }
    separator = ", ";
  }
  return (one_in(4) ? "@%p1 " : one_in(8) ? "@!%p2 " : "") + text + ";\n";
}

const std::string PROLOGUE = HEAD + R"(
.global .align 16 .b8 global[64] = {1, 2, 3};
.const .align 8 .u64 table[4] = {global, 4, 5, 6};
.extern .shared .align 16 .b8 dynamic[];
.visible .entry k(.param .u64 .ptr .align 16 a, .param .u64 b)
{
.reg .pred %p<4>; .reg .b8 %b<6>; .reg .b16 %h<6>; .reg .b32 %r<6>; .reg .b64 %d<6>;
.shared .align 16 .b8 shared[512];
.local .align 16 .b8 local[64];
ld.param.u64 %d0, [a];
ld.param.u64 %d1, [b];
cvta.shared.u64 %d2, 16;
cvta.local.u64 %d3, 16;
mov.u64 %d4, table;
ld.global.u32 %r1, [%d0];
ld.global.v2.u32 {%r2, %r3}, [%d0+8];
mov.u32 %r0, %tid.x;
mov.u32 %r4, 0x3f800000;
ld.global.u16 %h0, [%d0+16];
mov.b16 %h1, 0x3c00;
and.b32 %r5, %r0, 1;
setp.eq.u32 %p1, %r5, 0;
setp.lt.u32 %p2, %r0, 20;
before:
)";

void test_every_form() {
  const std::vector<const Form*>& forms = all_forms();
  std::vector<size_t> accepted(forms.size(), 0);
  Tally tally;
  for (int i = 0; i < GENERATED; ++i) {
    const size_t number = static_cast<size_t>(i) % forms.size();
    const std::string line = instruction_of(*forms[number]);
    const size_t before = tally.decoded;
    try_text(PROLOGUE + line + (one_in(3) ? instruction_of(*forms[number]) : "") +
                 "after:\nst.global.u64 [%d0], %d5;\nexit;\ntargets: .branchtargets before, after;\n}\n",
             tally);
    accepted[number] += tally.decoded - before;
  }
  size_t never = 0;
  for (const size_t count : accepted) never += count == 0;
  if (std::getenv("VERBOSE") != nullptr) {
    std::cerr << tally.decoded << " decoded, " << tally.launched << " launched, " << tally.findings << " found; forms "
              << forms.size() << ", never " << never << "\n";
    for (size_t i = 0; i < forms.size(); ++i) {
      if (accepted[i] == 0)
        std::cerr << forms[i]->opcode << " " << forms[i]->modifiers << " | " << forms[i]->operands << "\n";
    }
  }
  CHECK(tally.decoded > GENERATED / 10 && tally.launched == tally.decoded, tally.decoded, " ", tally.launched);
}

// ---- Damaged kernels ------------------------------------------------------------------------------------------------

const std::vector<std::string> KERNELS{HEAD + R"(
.visible .entry loop(.param .u64 .ptr .global .align 16 a, .param .u64 n, .param .align 8 .b8 s[16])
.maxntid 64
{
.reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<12>; .reg .b64 %rd<8>; .reg .f32 %f<8>; .reg .f64 %fd<3>;
.shared .align 16 .b8 tile[128];
ld.param.u64 %rd1, [a];
ld.param.u32 %r5, [s+4];
cvta.to.global.u64 %rd2, %rd1;
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ntid.x;
and.b32 %r3, %r1, 7;
mul.wide.u32 %rd3, %r3, 16;
add.s64 %rd4, %rd2, %rd3;
ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd4];
mov.u32 %r4, 0;
$L1:
fma.rn.f32 %f1, %f1, %f2, %f3;
add.s32 %r4, %r4, 1;
setp.lt.u32 %p1|%p2, %r4, 5;
@%p1 bra $L1;
shl.b32 %r6, %r3, 2;
mov.u32 %r7, tile;
add.s32 %r7, %r7, %r6;
st.shared.f32 [%r7+4], %f1;
bar.sync 0;
ld.shared.u32 %r8, [%r7];
cvt.rn.f16.f32 %h1, %f2;
cvt.f64.f32 %fd1, %f3;
atom.shared.add.u32 %r9, [tile+8], 1;
st.global.v2.u32 [%rd4+8], {%r8, %r9};
ret;
}
)",
                                       HEAD + R"(
.extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 p);
.global .align 1 .b8 $str[7] = {37, 100, 32, 37, 115, 10, 0};
.const .align 8 .u64 pointers[3] = {$str, generic($str)+4, 0};
.global .align 4 .u32 total;
.func (.param .b32 out, .reg .b32 more) helper(.param .align 8 .b8 by[8], .reg .b64 r)
{
.reg .b32 %r<4>; .reg .pred %p;
ld.param.u32 %r1, [by];
ld.param.u32 %r2, [by+4];
setp.gt.s32 %p, %r1, %r2;
@%p ret;
add.s32 %r3, %r1, %r2;
st.param.b32 [out], %r3;
cvt.u32.u64 more, r;
ret;
}
.visible .entry calls(.param .u64 a, .param .u32 n)
{
.reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<6>;
.local .align 8 .b8 depot[16];
ld.param.u64 %rd1, [a];
ld.param.u32 %r1, [n];
mov.u32 %r2, %laneid;
{
.param .align 8 .b8 p0[8];
.param .b32 ret0;
st.param.u32 [p0], %r2;
st.param.u32 [p0+4], 3;
call.uni (ret0, %r3), helper, (p0, %rd1);
ld.param.b32 %r4, [ret0];
}
and.b32 %r5, %r4, 1;
targets: .branchtargets $A, $B;
brx.idx %r5, targets;
$A: st.local.u32 [depot], %r3;
bra $C;
$B: st.local.u32 [depot], %r4;
$C: mov.u64 %rd2, depot;
cvta.local.u64 %rd3, %rd2;
st.local.u64 [depot+8], %rd3;
mov.u64 %rd4, $str;
cvta.global.u64 %rd4, %rd4;
{ .param .b64 q0; .param .b64 q1; .param .b32 q2;
st.param.b64 [q0], %rd4; st.param.b64 [q1], %rd3;
call (q2), vprintf, (q0, q1);
}
red.global.add.u32 [total], 1;
ld.const.u64 %rd5, [pointers+8];
ld.u8 %r6, [%rd5];
st.global.u32 [%rd1], %r6;
exit;
}
)",
                                       HEAD + R"(
.extern .shared .align 16 .b8 dynamic[];
.visible .entry tensor(.param .u64 a, .param .u64 b)
{
.reg .pred %p<3>; .reg .b32 %r<24>; .reg .b64 %rd<6>; .reg .f32 %f<6>;
ld.param.u64 %rd1, [a];
mov.u32 %r1, %tid.x;
and.b32 %r2, %r1, 3;
shl.b32 %r3, %r2, 4;
cvt.u64.u32 %rd2, %r3;
add.s64 %rd3, %rd1, %rd2;
cp.async.cg.shared.global [dynamic], [%rd3], 16;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
mov.u32 %r4, dynamic;
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r5, %r6}, [%r4];
ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r4];
mov.f32 %f1, 0f00000000;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r7, %r8, %r9, %r10}, {%r5, %r6}, {%f1, %f1, %f1, %f1};
mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r7, %r8, %r9, %r10}, {%r5, %r6, %r7, %r8}, {%f1, %f2, %f3, %f4}, 0x44444444, 0;
shfl.sync.bfly.b32 %r11|%p1, %r5, 1, 31, 0xffffffff;
vote.sync.ballot.b32 %r12, %p1, -1;
{ .reg .b32 %r11; mov.b32 %r11, {1, 2}; redux.sync.add.s32 %r12, %r11, 0xffffffff; }
activemask.b32 %r13;
membar.gl;
atom.global.cas.b32 %r14, [%rd3], %r11, %r12;
st.global.v4.f32 [%rd1+32], {%f1, %f2, %f3, %f4};
ret;
}
)"};

// Names with their % or $, directives and modifiers with their dot, numbers, single marks.
std::vector<std::string> tokens_of(const std::string& text) {
  const auto continues = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == ':';
  };
  std::vector<std::string> tokens;
  for (size_t at = 0; at < text.size();) {
    size_t end = at + 1;
    if (std::strchr(".%$", text[at]) || continues(text[at])) {
      while (end < text.size() && continues(text[end])) ++end;
    }
    tokens.push_back(text.substr(at, end - at));
    at = end;
  }
  return tokens;
}

int kind_of(const std::string& token) {
  if (token[0] == '.') return 1;
  if (token[0] == '%') return 2;
  if (std::isdigit(static_cast<unsigned char>(token[0]))) return 3;
  return std::isalpha(static_cast<unsigned char>(token[0])) || token[0] == '$' ? 4 : 5;
}

void test_damaged_kernels() {
  std::vector<std::vector<std::string>> texts;
  std::vector<std::string> all[6];
  for (const std::string& text : KERNELS) {
    texts.push_back(tokens_of(text));
    for (const std::string& token : texts.back()) all[kind_of(token)].push_back(token);
  }
  Tally whole;
  for (const std::string& text : KERNELS) try_text(text, whole);
  CHECK(whole.launched == KERNELS.size(), whole.launched, ": ", sparse24_ptx_error());

  const auto line_of = [](const std::vector<std::string>& tokens, size_t at) {  // from after a ';' to the next
    size_t begin = at, end = at;
    while (begin > 0 && tokens[begin - 1] != ";") --begin;
    while (end < tokens.size() && tokens[end] != ";") ++end;
    return std::pair(begin, std::min(end + 1, tokens.size()));
  };
  Tally tally;
  for (int i = 0; i < DAMAGED; ++i) {
    std::vector<std::string> tokens = any_of(texts);
    for (size_t n = 1 + below(4); n > 0; --n) {
      const size_t at = below(tokens.size());
      const auto [begin, end] = line_of(tokens, at);
      switch (below(5)) {
        case 0:  // another number, register, name or modifier
        case 1:
          tokens[at] = kind_of(tokens[at]) == 3 && one_in(2) ? constant() : any_of(all[kind_of(tokens[at])]);
          break;
        case 2:
          tokens.erase(tokens.begin() + static_cast<long>(begin), tokens.begin() + static_cast<long>(end));
          break;
        case 3: {  // a line of any text, here
          const std::vector<std::string>& other = any_of(texts);
          const auto [from, to] = line_of(other, below(other.size()));
          const std::vector<std::string> line(other.begin() + static_cast<long>(from),
                                              other.begin() + static_cast<long>(to));
          tokens.insert(tokens.begin() + static_cast<long>(begin), line.begin(), line.end());
          break;
        }
        default: {  // exchanged tokens of a kind
          const size_t with = below(tokens.size());
          if (kind_of(tokens[at]) == kind_of(tokens[with])) std::swap(tokens[at], tokens[with]);
        }
      }
      if (tokens.empty()) tokens.emplace_back(" ");
    }
    std::string text;
    for (const std::string& token : tokens) text += token;
    try_text(text, tally);
  }
  if (std::getenv("VERBOSE") != nullptr) {
    std::cerr << "damaged: " << tally.parsed << " parsed, " << tally.decoded << " decoded, " << tally.launched
              << " launched, " << tally.findings << " found\n";
  }
  CHECK(tally.parsed > DAMAGED / 3 && tally.launched > DAMAGED / 8, tally.parsed, " ", tally.launched);
}

}  // namespace
}  // namespace sparse24::ptx

int main() {
  sparse24::ptx::test_every_form();
  sparse24::ptx::test_damaged_kernels();
}
