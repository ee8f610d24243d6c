// Memory of the caller that kernels may read and write: any object with the buffer protocol, DLPack or numpy's array
// interface, as a pointer and a size. Needs the GIL.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace sparse24::ptx {

// Holds the object's memory until released. Throws ValueError for memory that a kernel cannot be given (read-only,
// strided, on a device) and TypeError for an object without memory; neither says which argument it is.
class Array {
 public:
  explicit Array(const pybind11::object& object);
  ~Array() { release(); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  void release();

  void* data() const { return data_; }
  uint64_t size() const { return size_; }  // bytes

 private:
  bool from_buffer(const pybind11::object& object);
  bool from_dlpack(const pybind11::object& object);
  bool from_interface(const pybind11::object& object);

  Py_buffer view_{};
  bool has_view_ = false;
  pybind11::object owner_;            // a capsule of DLPack, or the object itself
  void (*deleter_)(void*) = nullptr;  // of the DLPack tensor
  void* tensor_ = nullptr;
  void* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace sparse24::ptx
