// ld, ldu and st, in all state spaces. Source: PTX ISA, "ld", "ld.global.nc", "ldu", "st".
#include <atomic>
#include <cstring>
#include <vector>

#include "csrc/ptx/execute/access.h"
#include "csrc/ptx/execute/memory_forms.h"
#include "csrc/ptx/shared_memory.h"

namespace sparse24::ptx {
namespace {

// The lanes of a slot that holds values of type T.
template <class T>
using Register = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
bool aligned(const uint8_t* host) {
  return reinterpret_cast<uintptr_t>(host) % sizeof(T) == 0;
}

// Strong operations are not torn. A buffer of the host may be less aligned than its device address says.
template <class T>
T strong_load(uint8_t* host) {
  if (aligned<T>(host)) return std::atomic_ref<T>(*reinterpret_cast<T*>(host)).load(std::memory_order_acquire);
  T value;
  std::memcpy(&value, host, sizeof value);
  return value;
}
template <class T>
void strong_store(uint8_t* host, T value) {
  if (aligned<T>(host)) {
    std::atomic_ref<T>(*reinterpret_cast<T*>(host)).store(value, std::memory_order_release);
  } else {
    std::memcpy(host, &value, sizeof value);
  }
}

template <class T, int N>
void load(Warp& warp, const Operation& operation, uint32_t lanes) {
  Access access;
  access.size = sizeof(T) * N;
  access.strong = (operation.option[0] & STRONG) != 0;
  address_lanes(warp, operation, operation.slot[N], 0, lanes, access);
  const uint32_t good = locate(warp, operation.space, lanes, access);
  for (int i = 0; i < N; ++i) {
    if (operation.slot[i] == NO_SLOT) continue;
    Register<T>* const result = warp.lanes<Register<T>>(operation.slot[i]);
    if (access.strong) {
      each(lanes, [&](int lane) {
        uint8_t* const host = access.host[lane] + static_cast<size_t>(i) * sizeof(T);
        result[lane] = (good >> lane & 1) != 0 ? strong_load<T>(host) : T{0};
      });
      continue;
    }
    each(lanes, [&](int lane) {
      T value;
      std::memcpy(&value, access.host[lane] + static_cast<size_t>(i) * sizeof(T), sizeof(T));
      result[lane] = value;
    });
  }
  if (warp.undefined.pending()) warp.undefined.settle_load(warp, operation, N, sizeof(T));
  if (access.strong) after_strong_read(warp, good, access, (operation.option[0] & DEVICE) != 0);
}

// Undefined values: bytes of shared and local memory that hold one count as never written; in global memory it is used.
void store_marks(Warp& warp, Slot slot, uint32_t lanes, const Access& access, uint64_t offset, uint32_t size) {
  const uint32_t marked = warp.undefined.lanes_of(slot) & lanes;
  if (marked == 0) return;
  warp.undefined.report(warp, slot, marked & access.global);
  Block& block = *warp.block;
  const uint64_t frame = block.program->local_bytes, base = uint64_t{warp.index} * LANES * frame;
  in_turn(marked & ~access.global, [&](uint32_t lane) {
    const uint64_t at = access.address[lane] + offset;
    if ((access.shared >> lane & 1) != 0) {
      block.shared->forget(at, size);
    } else if (!block.local_initialized.empty()) {
      std::memset(block.local_initialized.data() + base + lane * frame + at, 0, size);
    }
  });
}

template <class T, int N>
void store(Warp& warp, const Operation& operation, uint32_t lanes) {
  Access access;
  access.size = sizeof(T) * N;
  access.intent = Intent::WRITE;
  access.strong = (operation.option[0] & STRONG) != 0;
  address_lanes(warp, operation, operation.slot[0], 0, lanes, access);
  T values[LANES][N];
  const bool shared = operation.space == Space::SHARED || operation.space == Space::GENERIC;
  if (shared && warp.block->shared->checked()) {
    // A sink in the vector leaves its bytes as they are. PTX has these in global memory only, where data is not used.
    for (int i = 0; i < N; ++i) {
      if (operation.slot[1 + i] == NO_SLOT) {
        each(lanes, [&](int lane) { values[lane][i] = 0; });
        continue;
      }
      const Register<T>* const value = warp.lanes<Register<T>>(operation.slot[1 + i]);
      each(lanes, [&](int lane) { values[lane][i] = static_cast<T>(value[lane]); });
    }
    access.data = reinterpret_cast<const uint8_t*>(values);
  }
  const uint32_t good = locate(warp, operation.space, lanes, access);
  if (access.strong) {
    const bool release = (operation.option[0] & ORDERED) != 0;
    before_strong_write(warp, good, access, release, (operation.option[0] & DEVICE) != 0);
  }
  // Lanes in turn, all of one lane's elements before the next lane's: where lanes meet, the last one's vector stays.
  const Register<T>* value[N];
  for (int i = 0; i < N; ++i) {
    const Slot slot = operation.slot[1 + i];
    value[i] = slot == NO_SLOT ? nullptr : warp.lanes<Register<T>>(slot);
  }
  each(good, [&](int lane) {
    for (int i = 0; i < N; ++i) {
      if (value[i] == nullptr) continue;
      const T one = static_cast<T>(value[i][lane]);
      uint8_t* const host = access.host[lane] + static_cast<size_t>(i) * sizeof(T);
      if (access.strong) {
        strong_store<T>(host, one);
      } else {
        std::memcpy(host, &one, sizeof one);
      }
    }
  });
  if (warp.undefined.any()) {
    for (uint32_t i = 0; i < N; ++i) {
      store_marks(warp, operation.slot[1 + i], good, access, i * sizeof(T), sizeof(T));
    }
  }
}

struct Load {
  template <class T, int N>
  static constexpr Handler handler = load<T, N>;
};
struct Store {
  template <class T, int N>
  static constexpr Handler handler = store<T, N>;
};

template <class Kind, class T>
Handler of_count(int count) {
  switch (count) {
    case 1:
      return Kind::template handler<T, 1>;
    case 2:
      return Kind::template handler<T, 2>;
    case 4:
      return Kind::template handler<T, 4>;
    case 8:
      if constexpr (sizeof(T) == 4) return Kind::template handler<T, 8>;
      return nullptr;
    default:
      return nullptr;
  }
}

template <class Kind>
Handler of_type(Type type, int count) {
  switch (bits_of(type)) {
    case 8:
      return of_count<Kind, uint8_t>(count);
    case 16:
      return of_count<Kind, uint16_t>(count);
    case 32:
      return of_count<Kind, uint32_t>(count);
    default:
      return of_count<Kind, uint64_t>(count);
  }
}

// What ld and st have in common: `vector` is the operand with the values, `policy` the one with the cache policy.
template <class Kind>
bool choose(const Chosen& chosen, Operation& operation, int vector, int policy) {
  static constexpr int COUNTS[] = {2, 4, 8};
  const int which = chosen.one_of({"v2", "v4", "v8"}, -1);
  const int count = which < 0 ? 1 : COUNTS[which];
  if (operation.count[vector] != count) return false;
  if (chosen.has("L2::cache_hint") != (operation.count[policy] != 0)) return false;
  const bool scoped = chosen.has("cta") || chosen.has("cluster") || chosen.has("gpu") || chosen.has("sys");
  const bool ordered = chosen.has("acquire") || chosen.has("release");
  if ((chosen.has("relaxed") || ordered) != scoped) return false;
  if (chosen.has("mmio") && !(chosen.has("relaxed") && chosen.has("sys"))) return false;
  // 32 bytes only from global memory.
  const int bytes = bits_of(chosen.type()) / 8 * count;
  if (bytes > 16 && operation.space != Space::GLOBAL && operation.space != Space::GENERIC) return false;
  const bool strong = scoped || chosen.has("volatile");
  if (strong) operation.option[0] = STRONG | (ordered ? ORDERED : 0) | (chosen.has("cta") ? 0 : DEVICE);
  operation.run = of_type<Kind>(chosen.type(), count);
  return operation.run != nullptr;
}

bool choose_load(const Chosen& chosen, Operation& operation) {
  if (chosen.has("nc") && operation.space != Space::GLOBAL) return false;
  return choose<Load>(chosen, operation, 0, 2);
}
bool choose_store(const Chosen& chosen, Operation& operation) { return choose<Store>(chosen, operation, 1, 2); }
// ldu: the same address in all lanes is a promise that nothing here depends on.
bool choose_load_uniform(const Chosen& chosen, Operation& operation) { return choose<Load>(chosen, operation, 0, 2); }

// Operands that a form does not have count as left out: ldu has no cache policy.
constexpr Form FORMS[] = {
    {"ld",
     "weak|volatile|relaxed|acquire? mmio? cta|cluster|gpu|sys? "
     "const|global|local|param|param::entry|param::func|shared|shared::cta|shared::cluster? ca|cg|cs|lu|cv? nc? "
     "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate? "
     "L2::evict_normal|L2::evict_first|L2::evict_last? L2::cache_hint? L2::64B|L2::128B|L2::256B? v2|v4|v8? "
     "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64",
     "=*0, [a], b64?", choose_load},
    {"ldu", "global? v2|v4? b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64", "=*0, [a]", choose_load_uniform},
    {"st",
     "weak|volatile|relaxed|release? mmio? cta|cluster|gpu|sys? "
     "global|local|param|param::func|shared|shared::cta|shared::cluster? wb|cg|cs|wt? "
     "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate? "
     "L2::evict_normal|L2::evict_first|L2::evict_last? L2::cache_hint? v2|v4|v8? "
     "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64",
     "[a], *0, b64?", choose_store},
};

}  // namespace

Forms memory_forms() {
  static const std::vector<Form> forms = [] {
    std::vector<Form> all(std::begin(FORMS), std::end(FORMS));
    for (const Forms& part : {atomic_forms(), async_copy_forms(), matrix_forms(), fence_forms()}) {
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }();
  return forms;
}

}  // namespace sparse24::ptx
