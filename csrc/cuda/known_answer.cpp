// The known-answer test: W [N, K] and x [TOKENS, K] of small integers, a little larger than the largest tile and than
// the longest pipeline in every dimension, and their product on the host.
#include "csrc/cuda/known_answer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "csrc/cuda/driver.h"
#include "csrc/cuda/driver_api.h"
#include "csrc/cuda/linear.h"

namespace sparse24::cuda {

namespace {

constexpr int N = 264, TOKENS = 264;
constexpr int ROW_BYTES = 432;                   // of x: three blocks of columns and a part of one, in pieces of 16
constexpr int TOKENS_TAKEN[] = {TOKENS, 13, 7};  // the latter by kernels that take no more than 16, or 8

// ---- The problem ----

// -4 to 4, without a period that any tile shares.
int small_integer(int i) { return static_cast<int>((static_cast<uint32_t>(i) * 2654435761u >> 20) % 9) - 4; }

void store(Element element, int value, uint8_t* to) {
  if (element == Element::I8) {
    *to = static_cast<uint8_t>(value);
    return;
  }
  const auto bits = std::bit_cast<uint32_t>(static_cast<float>(value));
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (element == Element::F16 && value != 0) {  // another bias of the exponent, and 3 more bits of fraction
    half = static_cast<uint16_t>((half & 0x8000) | (((bits & 0x7fffffff) >> 13) - (112 << 10)));
  }
  std::memcpy(to, &half, sizeof half);
}

struct Problem {
  Element element;
  int bytes;                              // of an element
  int k;                                  // in_features
  std::vector<uint8_t> values, meta;      // canonical
  std::vector<float> x;                   // [TOKENS, k]
  std::vector<float> bias, scales, sums;  // [N], [N], [TOKENS, N]

  explicit Problem(Element type) : element(type), bytes(element_bits(type) / 8), k(ROW_BYTES / bytes) {
    const int groups = k / 4, row_meta = (groups + 1) / 2;
    values.resize(N * 2 * groups * bytes);
    meta.resize(N * row_meta);
    x.resize(TOKENS * k);
    sums.resize(TOKENS * N);
    std::vector<float> columns(k * TOKENS);  // x, transposed
    for (int token = 0; token < TOKENS; ++token) {
      for (int column = 0; column < k; ++column) {
        const int value = small_integer(token * k + column);
        x[token * k + column] = columns[column * TOKENS + token] = static_cast<float>(value);
      }
    }
    constexpr uint8_t CODES[] = {0x4, 0x8, 0x9, 0xC, 0xD, 0xE};
    for (int row = 0; row < N; ++row) {
      std::vector<float> sum(TOKENS);
      for (int group = 0; group < groups; ++group) {
        const int code = CODES[(row * 7 + group) % 6];
        meta[row * row_meta + group / 2] |= code << (group % 2 * 4);
        for (int slot = 0; slot < 2; ++slot) {
          const int index = (row * groups + group) * 2 + slot, value = small_integer(index + 12345);
          store(element, value, &values[index * bytes]);
          const float* column = &columns[(4 * group + (slot == 0 ? first_of(code) : second_of(code))) * TOKENS];
          for (int token = 0; token < TOKENS; ++token) sum[token] += static_cast<float>(value) * column[token];
        }
      }
      bias.push_back(static_cast<float>(small_integer(row)));
      scales.push_back(static_cast<float>(1 << row % 3));
      for (int token = 0; token < TOKENS; ++token) {
        sums[token * N + row] = (element == Element::I8 ? sum[token] * scales[row] : sum[token]) + bias[row];
      }
    }
  }
};

// ---- On the device ----

class Stream {
 public:
  Stream() { check(driver().cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate"); }
  ~Stream() { driver().cuStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  CUstream get() const { return stream_; }
  void wait() const { check(driver().cuStreamSynchronize(stream_), "cuStreamSynchronize"); }

 private:
  CUstream stream_ = nullptr;
};

class Buffer {
 public:
  Buffer(const Stream& stream, size_t bytes) : stream_(stream), bytes_(bytes) {
    check(driver().cuMemAlloc(&address_, bytes), "cuMemAlloc");
  }
  Buffer(const Stream& stream, const void* data, size_t bytes) : Buffer(stream, bytes) {
    check(driver().cuMemcpyHtoDAsync(address_, data, bytes, stream.get()), "cuMemcpyHtoDAsync");
    stream.wait();  // `data` may be gone after this
  }
  template <class T>
  Buffer(const Stream& stream, const std::vector<T>& data) : Buffer(stream, data.data(), data.size() * sizeof(T)) {}
  ~Buffer() { driver().cuMemFree(address_); }
  Buffer(const Buffer&) = delete;

  template <class T>
  T* get(size_t offset = 0) const {
    return reinterpret_cast<T*>(address_ + offset);
  }
  // To ones, which are no number and no small integer.
  void poison() const { check(driver().cuMemsetD8Async(address_, 0xff, bytes_, stream_.get()), "cuMemsetD8Async"); }
  template <class T>
  std::vector<T> read(size_t count) const {
    std::vector<T> out(count);
    check(driver().cuMemcpyDtoHAsync(out.data(), address_, count * sizeof(T), stream_.get()), "cuMemcpyDtoHAsync");
    stream_.wait();
    return out;
  }

 private:
  const Stream& stream_;
  size_t bytes_;
  CUdeviceptr address_ = 0;
};

// `got` is what was written, `expected` as much or more.
template <class T>
void require_equal(const std::string& kernel, const std::vector<T>& got, const std::vector<T>& expected, int columns) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == expected[i]) continue;
    throw std::runtime_error(kernel + " computes wrongly on this device: entry [" + std::to_string(i / columns) + ", " +
                             std::to_string(i % columns) + "] must be " + std::to_string(expected[i]) + "; got " +
                             std::to_string(got[i]));
  }
}

// Packs W, and unpacks it to compare.
void pack(const Machine& machine, const Stream& stream, const Problem& problem, const Buffer& packed) {
  const Buffer values(stream, problem.values), meta(stream, problem.meta);
  const Buffer values_back(stream, problem.values.size()), meta_back(stream, problem.meta.size());
  for (const Buffer* buffer : {&values_back, &meta_back, &packed}) buffer->poison();
  const Launch there =
      describe_pack(values.get<void>(), meta.get<uint8_t>(), problem.element, N, problem.k, packed.get<uint8_t>());
  const Launch back = describe_unpack(packed.get<uint8_t>(), problem.element, N, problem.k, values_back.get<void>(),
                                      meta_back.get<uint8_t>());
  machine.run(there);
  machine.run(back);
  const auto compare = [&](const Buffer& buffer, const std::vector<uint8_t>& expected) {
    require_equal(std::string(there.kernel) + ", then " + back.kernel, buffer.read<uint8_t>(expected.size()), expected,
                  static_cast<int>(expected.size() / N));
  };
  compare(values_back, problem.values);
  compare(meta_back, problem.meta);
}

// Every kernel that takes x of this alignment, and once with K split.
void multiply(const Machine& machine, const Stream& stream, const Problem& problem, const Buffer& packed,
              int alignment) {
  constexpr int LINE = 16;
  const int begin = alignment % LINE, stride = ROW_BYTES + LINE + begin;
  std::vector<uint8_t> rows(begin + TOKENS * stride, 0xff);  // no zeros between the rows
  for (int token = 0; token < TOKENS; ++token) {
    for (int column = 0; column < problem.k; ++column) {
      store(problem.element, static_cast<int>(problem.x[token * problem.k + column]),
            &rows[begin + token * stride + column * problem.bytes]);
    }
  }
  const Buffer x(stream, rows), bias(stream, problem.bias), scales(stream, problem.scales);
  const Buffer x_scales(stream, std::vector<float>{1.0f});
  const Buffer y(stream, sizeof(float) * TOKENS * N), workspace(stream, 2 * sizeof(float) * TOKENS * N);

  Linear call{};
  call.element = problem.element;
  call.x = x.get<void>(begin);
  call.x_stride = stride / problem.bytes;
  call.packed = packed.get<uint8_t>();
  call.in_features = problem.k;
  call.epilogue.y = y.get<void>();
  call.epilogue.y_stride = call.epilogue.out_features = N;
  call.epilogue.bias = bias.get<void>();
  if (problem.element == Element::I8) {
    call.epilogue.scales = scales.get<float>();
    call.epilogue.x_scales = x_scales.get<float>();
  }
  const int most_splits = alignment == LINE ? 2 : 1;
  for (const std::string kernel : linear_kernels(problem.element)) {
    for (int splits = 1; splits <= most_splits; ++splits) {
      for (const int tokens : TOKENS_TAKEN) {
        call.epilogue.tokens = tokens;
        const auto plan = plan_linear_as(call, machine.device(), kernel, splits);
        if (!plan) continue;
        y.poison();
        run_linear(machine, call, *plan, workspace.get<void>());
        require_equal(
            splits > 1 ? kernel + ", then linear_reduce_" + (problem.element == Element::I8 ? "i32" : "f32") : kernel,
            y.read<float>(tokens * N), problem.sums, N);
        break;
      }
    }
  }
}

// x of float type to int8, by the rounding that kernels/linear.cuh promises.
void quantize(const Machine& machine, const Stream& stream, const Problem& problem) {
  std::vector<int8_t> expected(problem.x.size());
  std::vector<float> expected_scales;
  for (int token = 0; token < TOKENS; ++token) {
    const float* row = &problem.x[token * problem.k];
    float largest = 0;
    for (int column = 0; column < problem.k; ++column) largest = std::max(largest, std::fabs(row[column]));
    const float scale = largest / 127;
    expected_scales.push_back(scale);
    for (int column = 0; column < problem.k; ++column) {
      expected[token * problem.k + column] = static_cast<int8_t>(std::nearbyint(row[column] / scale));
    }
  }
  const Buffer x(stream, problem.x), q(stream, expected.size()), scales(stream, sizeof(float) * TOKENS);
  q.poison();
  const Launch launch = describe_quantize(x.get<void>(), problem.k, Element::F32, TOKENS, problem.k, q.get<int8_t>(),
                                          problem.k, scales.get<float>());
  machine.run(launch);
  require_equal(launch.kernel, q.read<int8_t>(expected.size()), expected, problem.k);
  require_equal(launch.kernel, scales.read<float>(TOKENS), expected_scales, 1);
}

void test(int device, Element element) {
  const BoundContext context(device);
  const RelaxedCapture relaxed;  // of other threads' streams
  const Stream stream;
  const DriverMachine machine(device, stream.get());
  const Problem problem(element);
  const Buffer packed(stream, packed_bytes(element, N, problem.k));
  pack(machine, stream, problem, packed);
  for (const int alignment : {problem.bytes, 4, 16}) multiply(machine, stream, problem, packed, alignment);
  if (element == Element::I8) quantize(machine, stream, problem);
}

bool is_capturing(int device, void* stream) {
  const BoundContext context(device);
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = driver().cuStreamIsCapturing(static_cast<CUstream>(stream), &status);
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return true;  // asked of the legacy stream while another captures
  check(result, "cuStreamIsCapturing");
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

}  // namespace

const std::string& device_problem(int device, void* stream, Element element) {
  static const std::string none;
  static std::mutex mutex;
  static std::map<std::pair<int, int>, std::string> outcomes;
  static thread_local std::string passing;  // not an outcome: it may be otherwise the next time
  const std::lock_guard lock(mutex);        // others wait for the outcome
  const std::pair key(device, static_cast<int>(element));
  const auto known = outcomes.find(key);
  if (known != outcomes.end()) return known->second;
  std::string outcome;
  try {
    if (is_capturing(device, stream)) return none;
    test(device, element);
  } catch (const DriverError& error) {
    if (error.code == CUDA_ERROR_OUT_OF_MEMORY) return passing = error.what();
    outcome = error.what();
  } catch (const std::exception& error) {
    outcome = error.what();
  }
  return outcomes.emplace(key, std::move(outcome)).first->second;
}

}  // namespace sparse24::cuda
