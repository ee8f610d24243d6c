// The format on the CPU: every instruction set, element, pattern and short K, between guard pages, from unaligned rows.
// The portable path is held against sparse24/reference.py by tests/test_format.py; here all others are held against it.
#include <algorithm>
#include <limits>
#include <vector>

#include "csrc/cpu/format/format.h"
#include "csrc/cpu/isa.h"
#include "tests/native/check.h"
#include "tests/native/parallel.h"

using namespace sparse24;
using namespace sparse24::cpu;
using sparse24::test::Guarded;
using sparse24::test::Random;
using Bytes = Guarded<uint8_t>;

namespace {

constexpr Element ELEMENTS[] = {Element::F32, Element::F16, Element::BF16, Element::I8, Element::I4};
constexpr Pattern PATTERNS[] = {Pattern::TWO_FOUR, Pattern::ONE_TWO, Pattern::PAIR_FOUR_EIGHT};
constexpr int64_t ROWS = 3;

std::vector<Isa> isas() {
  std::vector<Isa> result;
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) result.push_back(static_cast<Isa>(isa));
  return result;
}

struct Case {
  Element element;
  Pattern pattern;
  int64_t in_features;
  int64_t rows = ROWS;

  int64_t dense_bytes() const { return dense_row_bytes(element, in_features); }
  int64_t values_bytes() const { return values_row_bytes(pattern, element, in_features); }
  int64_t meta_bytes() const { return meta_row_bytes(pattern, in_features); }
  int64_t groups() const { return group_count(pattern, in_features); }
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "element " << static_cast<int>(c.element) << ", pattern " << static_cast<int>(c.pattern) << ", ["
             << c.rows << ", " << c.in_features << "], isa " << static_cast<int>(active_isa());
}

uint32_t item(const uint8_t* row, Element element, int64_t column) {
  uint32_t bits = 0;
  if (element == Element::I4) return (row[column / 2] >> (4 * (column % 2))) & 15;
  const int bytes = element_bits(element) / 8;
  std::memcpy(&bits, row + column * bytes, bytes);
  return bits;
}

void set_item(uint8_t* row, Element element, int64_t column, uint32_t bits) {
  if (element == Element::I4) {
    const int shift = 4 * (column % 2);
    row[column / 2] = static_cast<uint8_t>((row[column / 2] & (0xf0 >> shift)) | (bits << shift));
  } else {
    const int bytes = element_bits(element) / 8;
    std::memcpy(row + column * bytes, &bits, bytes);
  }
}

bool is_nonzero(Element element, uint32_t bits) {
  const bool is_float = element != Element::I8 && element != Element::I4;
  return is_float ? (bits & ((1u << (element_bits(element) - 1)) - 1)) != 0 : bits != 0;
}

// Random bits, and often one of few: zeros of both signs, equal magnitudes, subnormals, infinities, NaNs.
uint32_t random_item(Random& random, Element element) {
  static const std::vector<uint32_t> f32 = {0,          0x80000000, 0x3f800000, 0xbf800000, 1,         0x80000001,
                                            0x7f800000, 0xff800000, 0x7f800001, 0xffc00123, 0x7f7fffff};
  static const std::vector<uint32_t> f16 = {0,      0x8000, 0x3c00, 0xbc00, 1,      0x8001, 0x03ff,
                                            0x0400, 0x7c00, 0xfc00, 0x7c01, 0xfe12, 0x7bff};
  static const std::vector<uint32_t> bf16 = {0, 0x8000, 0x3f80, 0xbf80, 1, 0x8001, 0x7f80, 0xff80, 0x7f81, 0xffc1};
  static const std::vector<uint32_t> i8 = {0, 1, 255, 127, 128, 129};
  static const std::vector<uint32_t> i4 = {0, 1, 15, 7, 8, 9};
  const auto& special = element == Element::F32    ? f32
                        : element == Element::F16  ? f16
                        : element == Element::BF16 ? bf16
                        : element == Element::I8   ? i8
                                                   : i4;
  if (random.below(3) == 0) return static_cast<uint32_t>(random.bits() & ((uint64_t{1} << element_bits(element)) - 1));
  return special[random.below(static_cast<int64_t>(special.size()))];
}

// A matrix whose rows are `stride` bytes apart (negative: the last row lies first) and end at an inaccessible page.
class Matrix {
 public:
  Matrix(const Case& c, int64_t padding, bool reversed)
      : c_(c),
        stride_(c.dense_bytes() + padding),
        bytes_(c.rows == 0 ? 0 : (c.rows - 1) * stride_ + c.dense_bytes(), 1),
        reversed_(reversed) {}

  uint8_t* row(int64_t n) { return bytes_.data() + (reversed_ ? c_.rows - 1 - n : n) * stride_; }
  Dense view() {
    return {c_.rows == 0 ? bytes_.data() : row(0), reversed_ ? -stride_ : stride_, c_.rows, c_.in_features, c_.element};
  }
  void fill(Random& random) {
    for (uint8_t& byte : bytes_) byte = static_cast<uint8_t>(random.bits());  // the unused nibble of int4 included
    for (int64_t n = 0; n < c_.rows; ++n) {
      for (int64_t k = 0; k < c_.in_features; ++k) set_item(row(n), c_.element, k, random_item(random, c_.element));
    }
  }

 private:
  Case c_;
  int64_t stride_;
  Bytes bytes_;
  bool reversed_;
};

// One array of `rows` rows of `row_bytes`, guarded and with no alignment.
struct Output {
  Output(const Case& c) : values(c.rows * c.values_bytes(), 1), meta(c.rows * c.meta_bytes(), 1) {}
  Compressed view() { return {values.data(), meta.data()}; }
  bool operator==(const Output& other) const {
    return std::equal(values.data(), values.data() + values.bytes(), other.values.data()) &&
           std::equal(meta.data(), meta.data() + meta.bytes(), other.meta.data());
  }
  Bytes values, meta;
};

bool same(const Bytes& a, const Bytes& b) { return std::equal(a.data(), a.data() + a.bytes(), b.data()); }

// The first group with more nonzero units than fit, by counting.
Misfit count_misfit(const Case& c, Matrix& dense) {
  const int unit = group_columns(c.pattern) / 4;
  for (int64_t n = 0; n < c.rows; ++n) {
    for (int64_t g = 0; g < c.groups(); ++g) {
      int nonzero[4] = {};
      for (int64_t k = g * 4 * unit; k < std::min(c.in_features, (g + 1) * 4 * unit); ++k) {
        if (is_nonzero(c.element, item(dense.row(n), c.element, k))) nonzero[k / unit % 4] = 1;
      }
      const bool fits = c.pattern == Pattern::ONE_TWO ? nonzero[0] + nonzero[1] < 2 && nonzero[2] + nonzero[3] < 2
                                                      : nonzero[0] + nonzero[1] + nonzero[2] + nonzero[3] <= 2;
      if (!fits) return {n, g};
    }
  }
  return {};
}

bool operator==(const Misfit& a, const Misfit& b) { return a.row == b.row && a.group == b.group; }

bool is_valid(const Case& c, Output& output) {
  return validate(output.view(), c.rows, c.in_features, c.element, c.pattern).row < 0;
}

// Prunes, compresses and decompresses one random matrix on every instruction set.
void test_paths_agree(const Case& c, Random& random) {
  Matrix dense(c, random.below(4) == 0 ? 0 : random.below(9), random.below(4) == 0);
  dense.fill(random);
  Bytes mask(c.rows * c.in_features, 1);
  Output expected(c);
  Matrix pruned(c, random.below(9), false);
  for (Isa isa : isas()) {
    force_isa(isa);
    Bytes own_mask(c.rows * c.in_features, 1);
    Output own(c);
    prune_mask(dense.view(), c.pattern, own_mask.data());
    CHECK(compress(dense.view(), c.pattern, Selection::MAGNITUDE, own.view()).row < 0);
    if (isa == Isa::PORTABLE) {
      std::copy(own_mask.begin(), own_mask.end(), mask.begin());
      std::copy(own.values.begin(), own.values.end(), expected.values.begin());
      std::copy(own.meta.begin(), own.meta.end(), expected.meta.begin());
      for (int64_t n = 0; n < c.rows; ++n) {
        for (int64_t k = 0; k < c.in_features; ++k) {
          const uint32_t bits = item(dense.row(n), c.element, k);
          const uint8_t kept = mask[n * c.in_features + k];
          CHECK(kept <= 1);
          set_item(pruned.row(n), c.element, k, kept ? bits : 0);
        }
        if (c.element == Element::I4 && c.in_features % 2 == 1) set_item(pruned.row(n), c.element, c.in_features, 9);
      }
    }
    CHECK(same(own_mask, mask), c);
    CHECK(own == expected, c);
    CHECK(is_valid(c, own), c);

    CHECK(compress(dense.view(), c.pattern, Selection::STRICT, own.view()) == count_misfit(c, dense), c);
    CHECK(compress(pruned.view(), c.pattern, Selection::STRICT, own.view()).row < 0, c);
    CHECK(own == expected, c);

    Bytes back(c.rows * c.dense_bytes(), 1);
    decompress(own.view(), c.rows, c.in_features, c.element, c.pattern, back.data());
    for (int64_t n = 0; n < c.rows; ++n) {
      uint8_t* row = back.data() + n * c.dense_bytes();
      for (int64_t k = 0; k < c.in_features; ++k) {
        CHECK(item(row, c.element, k) == item(pruned.row(n), c.element, k), c, ", row ", n, ", column ", k);
      }
      if (c.element == Element::I4 && c.in_features % 2 == 1) CHECK(row[c.dense_bytes() - 1] < 16, c);
    }
  }
}

// Random values and codes: nothing is read or written out of bounds, and every instruction set gives the same.
void test_garbage(const Case& c, Random& random) {
  Output garbage(c);
  for (Bytes* bytes : {&garbage.values, &garbage.meta}) {
    for (uint8_t& byte : *bytes) byte = static_cast<uint8_t>(random.bits());
  }
  Bytes expected(c.rows * c.dense_bytes(), 1);
  for (Isa isa : isas()) {
    force_isa(isa);
    Bytes dense(c.rows * c.dense_bytes(), 1);
    decompress(garbage.view(), c.rows, c.in_features, c.element, c.pattern, dense.data());
    if (isa == Isa::PORTABLE) std::copy(dense.begin(), dense.end(), expected.begin());
    CHECK(same(dense, expected), c);
  }
}

void set_code(const Case& c, Output& output, int64_t row, int64_t group, int code) {
  uint8_t& byte = output.meta[row * c.meta_bytes() + group / 2];
  const int shift = 4 * (group % 2);
  byte = static_cast<uint8_t>((byte & (0xf0 >> shift)) | (code << shift));
}

// Every illegal code is found, at the first place of several; so are values past in_features and unused bits of meta.
void test_validate(const Case& c, Random& random) {
  Matrix dense(c, 0, false);
  dense.fill(random);
  const auto check = [&](Output& output) {
    return validate(output.view(), c.rows, c.in_features, c.element, c.pattern);
  };
  for (int code = 0; code < 16; ++code) {
    Output output(c);
    compress(dense.view(), c.pattern, Selection::MAGNITUDE, output.view());
    int64_t first = c.rows * c.groups();
    for (int i = 0; i < 3; ++i) {
      const int64_t place = random.below(c.rows * c.groups());
      // Not in a group that reaches past in_features: there a legal code may leave a value out of bounds.
      if (place % c.groups() == c.groups() - 1 && c.in_features % group_columns(c.pattern) != 0) continue;
      set_code(c, output, place / c.groups(), place % c.groups(), code);
      first = std::min(first, place);
    }
    const bool found = !is_legal(c.pattern, code) && first < c.rows * c.groups();
    CHECK(check(output) == (found ? Misfit{first / c.groups(), first % c.groups()} : Misfit{}), c, ", code ", code);
  }
  const int64_t row = random.below(c.rows);
  if (c.in_features % group_columns(c.pattern) != 0) {
    Output output(c);
    compress(dense.view(), c.pattern, Selection::MAGNITUDE, output.view());
    // With the last two units kept, the last slot is past in_features.
    set_code(c, output, row, c.groups() - 1, code_of(2, 3));
    if (c.pattern == Pattern::ONE_TWO) set_code(c, output, row, c.groups() - 1, code_of(1, 3));
    const int64_t slots = c.groups() * group_columns(c.pattern) / 2;
    for (int64_t k = slots - group_columns(c.pattern) / 2; k < slots; ++k) {
      set_item(output.values.data() + row * c.values_bytes(), c.element, k, 0);
    }
    CHECK(check(output) == Misfit{}, c);
    // A -0.0 is not +0.
    set_item(output.values.data() + row * c.values_bytes(), c.element, slots - 1, 1u << (element_bits(c.element) - 1));
    CHECK(check(output) == (Misfit{row, c.groups() - 1}), c);
  }
  if (c.groups() % 2 == 1) {
    Output output(c);
    compress(dense.view(), c.pattern, Selection::MAGNITUDE, output.view());
    set_code(c, output, row, c.groups(), code_of(0, 1));
    CHECK(check(output) == (Misfit{row, c.groups()}), c);
  }
}

// Large enough for many threads and for stores past the caches; rows that are not aligned for those included.
void test_large(Element element, Pattern pattern, int64_t in_features) {
  const Case c{element, pattern, in_features, (int64_t{18} << 20) * 4 / element_bits(element) / in_features + 1};
  Random random(in_features);
  std::vector<uint32_t> random_bits((c.rows * c.dense_bytes() + 3) / 4);
  for (uint32_t& bits : random_bits) bits = static_cast<uint32_t>(random.bits());
  const Dense dense{random_bits.data(), c.dense_bytes(), c.rows, c.in_features, element};
  std::vector<uint8_t> fitting(c.rows * c.dense_bytes());
  const Dense fits{fitting.data(), c.dense_bytes(), c.rows, c.in_features, element};
  const int64_t values_bytes = c.rows * c.values_bytes(), meta_bytes = c.rows * c.meta_bytes();
  std::vector<uint8_t> expected(values_bytes + meta_bytes), own(values_bytes + meta_bytes + 64);
  uint8_t* aligned = own.data() + (64 - reinterpret_cast<uintptr_t>(own.data()) % 64) % 64;
  const Compressed out{aligned, aligned + values_bytes};
  const auto equal = [&] { return std::equal(expected.begin(), expected.end(), aligned); };

  // Groups that do not fit, in late blocks of many rows: the first is named, whichever thread finds one first.
  const int64_t middle = c.rows / 2, group = c.groups() * 2 / 3;
  const int64_t group_bytes = element_bits(element) * group_columns(pattern) / 8;
  const auto misfit_of = [&](int64_t row) { return fitting.data() + row * c.dense_bytes() + group * group_bytes; };

  for (Isa isa : isas()) {
    force_isa(isa);
    for (int threads : {1, 2, 5}) {
      test::set_thread_count(threads);
      std::fill(own.begin(), own.end(), 0);
      CHECK(compress(dense, pattern, Selection::MAGNITUDE, out).row < 0, c);
      if (isa == Isa::PORTABLE && threads == 1) {
        std::copy(aligned, aligned + values_bytes + meta_bytes, expected.begin());
      }
      CHECK(equal(), c, ", threads ", threads);
      decompress(out, c.rows, in_features, element, pattern, fitting.data());
      std::fill(own.begin(), own.end(), 0);
      CHECK(compress(fits, pattern, Selection::STRICT, out).row < 0, c);
      CHECK(equal(), c, ", threads ", threads);

      for (int64_t row : {c.rows - 1, middle + 1, middle}) {
        std::memset(misfit_of(row), 0x11, group_bytes);
        CHECK(compress(fits, pattern, Selection::STRICT, out) == (Misfit{row, group}), c, ", threads ", threads);
      }
      CHECK(compress(dense, pattern, Selection::MAGNITUDE, out).row < 0, c);
      for (int64_t row : {c.rows - 1, middle + 1, middle}) {
        out.meta[row * c.meta_bytes() + group / 2] = 0;
        CHECK(validate(out, c.rows, in_features, element, pattern) == (Misfit{row, group / 2 * 2}), c);
      }
    }
  }
  test::set_thread_count(2);
}

// The first row's misfit is found at once, those of other threads' rows long after they have begun: row 0 is named.
void test_a_later_row_reports_last() {
  force_isa(Isa::PORTABLE);
  const Case c{Element::I8, Pattern::TWO_FOUR, 1 << 20, 4};
  std::vector<uint8_t> dense(c.rows * c.dense_bytes());
  std::memset(dense.data(), 1, 4);
  for (int64_t n = 2; n <= c.rows; ++n) std::memset(dense.data() + n * c.dense_bytes() - 4, 1, 4);
  Output out(c);
  test::set_thread_count(4);
  for (int repeat = 0; repeat < 20; ++repeat) {
    const Misfit misfit = compress({dense.data(), c.dense_bytes(), c.rows, c.in_features, c.element}, c.pattern,
                                   Selection::STRICT, out.view());
    CHECK(misfit == (Misfit{0, 0}), c, ", row ", misfit.row);
  }
  test::set_thread_count(2);
}

}  // namespace

int main() {
  Random random(24);
  for (Element element : ELEMENTS) {
    for (Pattern pattern : PATTERNS) {
      std::vector<int64_t> sizes;
      for (int64_t k = 0; k <= 70; ++k) sizes.push_back(k);
      for (int64_t k : {126, 127, 128, 129, 131, 136, 191, 193, 255, 256, 257, 260, 389}) sizes.push_back(k);
      for (int64_t k : sizes) {
        const Case c{element, pattern, k};
        for (int repeat = 0; repeat < 3; ++repeat) test_paths_agree(c, random);
        test_garbage(c, random);
        if (k > 0) test_validate(c, random);
      }
      test_paths_agree({element, pattern, 65, 0}, random);
    }
  }
  test_large(Element::F32, Pattern::TWO_FOUR, 1024);
  test_large(Element::F16, Pattern::ONE_TWO, 1028);
  test_large(Element::I8, Pattern::PAIR_FOUR_EIGHT, 1000);
  test_large(Element::I4, Pattern::TWO_FOUR, 4096);
  test_a_later_row_reports_last();
  std::cout << "format: " << isas().size() << " instruction sets agree" << std::endl;
}
