// ldmatrix, stmatrix and movmatrix: 8x8 matrices of 16-bit elements, spread over a warp. Lane l holds elements 2(l%4)
// and 2(l%4)+1 of row l/4; with .trans, of column l/4. Source: PTX ISA, "ldmatrix", "stmatrix", "movmatrix".
#include <cstring>

#include "csrc/ptx/execute/access.h"
#include "csrc/ptx/execute/memory_forms.h"

namespace sparse24::ptx {
namespace {

constexpr int ROWS = 8;
constexpr uint32_t ROW_BYTES = 16;

using Matrix = uint16_t[ROWS][ROWS];

uint32_t pair(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

// The part of lane `lane`; with `transposed`, of the transpose.
uint32_t fragment(const Matrix& matrix, int lane, bool transposed) {
  const int row = lane / 4, column = lane % 4 * 2;
  return transposed ? pair(matrix[column][row], matrix[column + 1][row])
                    : pair(matrix[row][column], matrix[row][column + 1]);
}

void put_fragment(Matrix& matrix, int lane, bool transposed, uint32_t value) {
  const int row = lane / 4, column = lane % 4 * 2;
  (transposed ? matrix[column][row] : matrix[row][column]) = static_cast<uint16_t>(value);
  (transposed ? matrix[column + 1][row] : matrix[row][column + 1]) = static_cast<uint16_t>(value >> 16);
}

// Lanes 8i to 8i+7 give the addresses of the rows of matrix i.
uint32_t row_lanes(int count) { return count == 4 ? ~0u : (1u << ROWS * count) - 1; }

// ldmatrix and stmatrix reach shared memory only.
uint32_t locate_rows(Warp& warp, const Operation& operation, uint32_t rows, Access& access) {
  access.size = ROW_BYTES;
  if (operation.space == Space::SHARED) return locate(warp, Space::SHARED, rows, access);
  uint32_t inside = 0;
  in_turn(rows, [&](uint32_t lane) {
    const uint64_t offset = access.address[lane] - SHARED_WINDOW;
    if (offset < WINDOW_BYTES) {
      access.address[lane] = offset;
      inside |= 1u << lane;
    } else {
      warp.find(Kind::ILLEGAL, lane, access.address[lane],
                "a matrix's row at a generic address that is not in shared memory");
    }
  });
  return inside == 0 ? 0 : locate(warp, Space::SHARED, inside, access);
}

template <int COUNT, bool TRANSPOSED>
void load_matrix(Warp& warp, const Operation& operation, uint32_t lanes) {
  const uint32_t rows = row_lanes(COUNT) & lanes;
  Access access;
  uint32_t good = 0;
  if (rows != 0) {
    address_lanes(warp, operation, operation.slot[COUNT], 0, rows, access);
    good = locate_rows(warp, operation, rows, access);
  }
  for (int i = 0; i < COUNT; ++i) {
    Matrix matrix;
    for (int row = 0; row < ROWS; ++row) {
      const int lane = i * ROWS + row;
      if ((good >> lane & 1) != 0) {
        std::memcpy(matrix[row], access.host[lane], ROW_BYTES);
      } else {
        std::memset(matrix[row], 0, ROW_BYTES);
      }
    }
    if (operation.slot[i] == NO_SLOT) continue;
    uint32_t* const result = warp.lanes<uint32_t>(operation.slot[i]);
    if (!TRANSPOSED && lanes == ~0u) {
      std::memcpy(result, matrix, sizeof matrix);  // rows one after another are the lanes in order
    } else {
      each(lanes, [&](int lane) { result[lane] = fragment(matrix, lane, TRANSPOSED); });
    }
  }
  if (warp.undefined.pending()) warp.undefined.settle_matrices(warp, operation, COUNT, TRANSPOSED);
}

template <int COUNT, bool TRANSPOSED>
void store_matrix(Warp& warp, const Operation& operation, uint32_t lanes) {
  Matrix matrices[COUNT] = {};
  for (int i = 0; i < COUNT; ++i) {
    if (operation.slot[1 + i] == NO_SLOT) continue;
    const uint32_t* const value = warp.lanes<uint32_t>(operation.slot[1 + i]);
    each(lanes, [&](int lane) { put_fragment(matrices[i], lane, TRANSPOSED, value[lane]); });
  }
  const uint32_t rows = row_lanes(COUNT) & lanes;
  if (rows == 0) return;
  Access access;
  access.intent = Intent::WRITE;
  access.data = reinterpret_cast<const uint8_t*>(matrices);
  address_lanes(warp, operation, operation.slot[0], 0, rows, access);
  in_turn(locate_rows(warp, operation, rows, access),
          [&](uint32_t lane) { std::memcpy(access.host[lane], matrices[lane / ROWS][lane % ROWS], ROW_BYTES); });
}

void move_matrix(Warp& warp, const Operation& operation, uint32_t lanes) {
  Matrix matrix = {};
  const uint32_t* const value = warp.lanes<uint32_t>(operation.slot[1]);
  each(lanes, [&](int lane) { put_fragment(matrix, lane, false, value[lane]); });
  if (operation.slot[0] == NO_SLOT) return;
  uint32_t* const result = warp.lanes<uint32_t>(operation.slot[0]);
  each(lanes, [&](int lane) { result[lane] = fragment(matrix, lane, true); });
}

void converge(Operation& operation) {
  operation.flow = Flow::CONVERGE;
  operation.presence = Presence::ALIGNED;
}

template <int COUNT>
Handler handler(bool loads, bool transposed) {
  return loads ? (transposed ? load_matrix<COUNT, true> : load_matrix<COUNT, false>)
               : (transposed ? store_matrix<COUNT, true> : store_matrix<COUNT, false>);
}

template <bool LOADS>
bool choose(const Chosen& chosen, Operation& operation) {
  converge(operation);
  const int count = chosen.has("x1") ? 1 : chosen.has("x2") ? 2 : 4;
  if (operation.count[LOADS ? 0 : 1] != count) return false;
  const bool transposed = chosen.has("trans");
  operation.run = count == 1   ? handler<1>(LOADS, transposed)
                  : count == 2 ? handler<2>(LOADS, transposed)
                               : handler<4>(LOADS, transposed);
  return true;
}

bool choose_move(const Chosen&, Operation& operation) {
  converge(operation);
  operation.run = move_matrix;
  return true;
}

constexpr Form FORMS[] = {
    {"ldmatrix", "sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta? b16", "=*b32, [a]", choose<true>},
    {"stmatrix", "sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta? b16", "[a], *b32", choose<false>},
    {"movmatrix", "sync aligned m8n8 trans b16", "=b32, b32", choose_move},
};

}  // namespace

Forms matrix_forms() { return FORMS; }

}  // namespace sparse24::ptx
