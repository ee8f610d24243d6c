// Arrays by the three ways in which Python libraries share them.
#include "csrc/ptx/python_array.h"

#include <string>
#include <vector>

namespace py = pybind11;

namespace sparse24::ptx {
namespace {

// DLPack 1.0, the parts that are read here. Source: dmlc.github.io/dlpack, "C API".
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C order
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};
constexpr uint64_t READ_ONLY = 1;
constexpr int32_t CPU = 1, CUDA_HOST = 3, ROCM_HOST = 11;

constexpr const char* STRIDED =
    "is not contiguous in C order; the kernel sees bytes, not strides: pass x.copy(), or a tensor's x.contiguous()";
constexpr const char* FROZEN = "is read-only; a kernel may write wherever it has a pointer: pass a copy";

// Bytes of the tensor; throws where its elements do not lie one after another.
uint64_t bytes_of(const DLTensor& tensor) {
  uint64_t elements = 1;
  for (int i = 0; i < tensor.ndim; ++i) elements *= static_cast<uint64_t>(tensor.shape[i]);
  const uint64_t bits = uint64_t{tensor.dtype.bits} * tensor.dtype.lanes;
  int64_t stride = 1;
  for (int i = tensor.ndim - 1; i >= 0 && elements != 0 && tensor.strides != nullptr; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != stride) throw py::value_error(STRIDED);
    stride *= tensor.shape[i];
  }
  return (elements * bits + 7) / 8;
}

py::object exported(const py::object& object) {
  try {
    return object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return object.attr("__dlpack__")();  // from before DLPack 1.0
  }
}

void delete_tensor(void* tensor) {
  auto* managed = static_cast<DLManagedTensor*>(tensor);
  if (managed->deleter != nullptr) managed->deleter(managed);
}
void delete_versioned(void* tensor) {
  auto* managed = static_cast<DLManagedTensorVersioned*>(tensor);
  if (managed->deleter != nullptr) managed->deleter(managed);
}

}  // namespace

Array::Array(const py::object& object) {
  if (!from_buffer(object) && !from_dlpack(object) && !from_interface(object)) {
    const auto type = py::type::of(object).attr("__name__").cast<std::string>();
    throw py::type_error(
        "must be an array: numpy's, a torch tensor, or what else has the buffer protocol or "
        "__dlpack__; got " +
        type);
  }
}

void Array::release() {
  if (has_view_) PyBuffer_Release(&view_);
  if (deleter_ != nullptr) deleter_(tensor_);
  has_view_ = false;
  deleter_ = nullptr;
  owner_ = py::object();
  data_ = nullptr;
  size_ = 0;
}

bool Array::from_buffer(const py::object& object) {
  if (PyObject_CheckBuffer(object.ptr()) == 0) return false;
  if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDED_RO) != 0) {
    // numpy refuses element types that the protocol has no letter for (ml_dtypes): the array interface has them.
    if (!py::hasattr(object, "__array_interface__")) throw py::error_already_set();
    PyErr_Clear();
    return false;
  }
  const bool contiguous = PyBuffer_IsContiguous(&view_, 'C') != 0;
  const bool frozen = view_.readonly != 0;
  if (!contiguous || frozen) {
    PyBuffer_Release(&view_);
    throw py::value_error(contiguous ? FROZEN : STRIDED);
  }
  has_view_ = true;
  data_ = view_.buf;
  size_ = static_cast<uint64_t>(view_.len);
  return true;
}

bool Array::from_dlpack(const py::object& object) {
  if (!py::hasattr(object, "__dlpack__") || py::hasattr(object, "__array_interface__")) return false;
  py::object capsule;
  int device = CPU;
  try {
    if (py::hasattr(object, "__dlpack_device__")) {
      device = static_cast<int>(object.attr("__dlpack_device__")().cast<std::pair<py::int_, py::int_>>().first);
    }
    if (device == CPU || device == CUDA_HOST || device == ROCM_HOST) capsule = exported(object);
  } catch (py::error_already_set& error) {
    throw py::value_error("cannot be shared: " + std::string(py::str(error.value())));
  }
  if (!capsule) {
    throw py::value_error("is on a device (DLPack type " + std::to_string(device) +
                          "); the emulator reads host memory: pass x.cpu()");
  }
  const DLTensor* tensor = nullptr;
  uint64_t flags = 0;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
    auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->major > 1) throw py::value_error("speaks a DLPack newer than 1.x");
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");  // from here on it is ours to delete
    tensor_ = managed;
    deleter_ = delete_versioned;
    tensor = &managed->tensor;
    flags = managed->flags;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor") != 0) {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    tensor_ = managed;
    deleter_ = delete_tensor;
    tensor = &managed->tensor;
  } else {
    throw py::type_error("has a __dlpack__ that gives no DLPack capsule");
  }
  owner_ = capsule;
  try {
    if ((flags & READ_ONLY) != 0) throw py::value_error(FROZEN);
    size_ = bytes_of(*tensor);
    data_ = static_cast<uint8_t*>(tensor->data) + tensor->byte_offset;
  } catch (...) {
    release();
    throw;
  }
  return true;
}

bool Array::from_interface(const py::object& object) {
  if (!py::hasattr(object, "__array_interface__")) return false;
  const py::dict interface = object.attr("__array_interface__");
  const auto data = interface["data"].cast<std::pair<uintptr_t, bool>>();
  if (data.second) throw py::value_error(FROZEN);
  if (interface.contains("strides") && !interface["strides"].is_none()) throw py::value_error(STRIDED);
  const auto type = interface["typestr"].cast<std::string>();  // "<V2": byte order, kind, bytes
  uint64_t size = type.size() > 2 ? std::stoull(type.substr(2)) : 0;
  for (const int64_t extent : interface["shape"].cast<std::vector<int64_t>>()) size *= static_cast<uint64_t>(extent);
  owner_ = object;
  data_ = reinterpret_cast<void*>(data.first);
  size_ = size;
  return true;
}

}  // namespace sparse24::ptx
