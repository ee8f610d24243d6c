// The module sparse24._ptx: the C interface for sparse24/ptx.py, which has the types and checks that users see.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "csrc/ptx/api.h"
#include "csrc/ptx/python_array.h"

namespace py = pybind11;

namespace sparse24::ptx {
namespace {

py::str text_of(const char* text) {
  return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(strlen(text)), "replace"));
}

// The failure that the C interface has just reported, as the Python exception for its kind.
[[noreturn]] void raise_last() {
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();  // a signal's handler has raised
  uint32_t line = 0, column = 0;
  const int kind = sparse24_ptx_error_kind(&line, &column);
  const py::str message = text_of(sparse24_ptx_error());
  switch (kind) {
    case SPARSE24_PTX_TEXT: {
      const py::object type = py::module_::import("sparse24._ptx").attr("PtxError");
      const py::object error = type(message);
      error.attr("line") = line;
      error.attr("column") = column;
      PyErr_SetObject(type.ptr(), error.ptr());
      break;
    }
    case SPARSE24_PTX_ARGUMENT:
      PyErr_SetObject(PyExc_ValueError, message.ptr());
      break;
    case SPARSE24_PTX_INTERRUPTED:
      PyErr_SetNone(PyExc_KeyboardInterrupt);
      break;
    default:
      PyErr_SetObject(PyExc_MemoryError, message.ptr());
  }
  throw py::error_already_set();
}

template <class T>
T checked(T result) {
  if (!result) raise_last();
  return result;
}

using Handle = std::shared_ptr<sparse24_ptx_module>;

// A .global or .const variable's bytes, as a buffer that keeps the module.
struct Variable {
  Handle module;
  uint8_t* data;
  size_t size;
};

class Module {
 public:
  explicit Module(const std::string& text) {
    sparse24_ptx_module* loaded;
    {
      py::gil_scoped_release release;
      loaded = sparse24_ptx_load(text.data(), text.size());
    }
    handle_ = Handle(checked(loaded), sparse24_ptx_unload);
  }
  py::str describe() const { return text_of(checked(sparse24_ptx_describe(handle_.get()))); }
  py::str describe_kernel(const std::string& name) const {
    return text_of(checked(sparse24_ptx_describe_kernel(handle_.get(), name.c_str())));
  }
  // Raises PtxError where the kernel cannot be run.
  void decode(const std::string& name) const { checked(sparse24_ptx_decode(handle_.get(), name.c_str()) == 0); }
  Variable variable(const std::string& name) const {
    size_t size = 0;
    void* data = sparse24_ptx_variable(handle_.get(), name.c_str(), &size);
    if (data == nullptr) {
      if (sparse24_ptx_error_kind(nullptr, nullptr) != SPARSE24_PTX_OK) raise_last();
      throw py::key_error(name);
    }
    return {handle_, static_cast<uint8_t*>(data), size};
  }
  py::str run(const std::string& kernel, std::array<uint32_t, 3> grid, std::array<uint32_t, 3> block,
              const py::bytes& arguments, uint32_t shared, uint32_t checks, bool counters, uint32_t numerics,
              uint32_t sparse_products, uint32_t order, uint64_t seed, uint32_t threads, uint64_t budget) const {
    const std::string_view bytes = arguments;
    sparse24_ptx_launch launch{};
    for (int i = 0; i < 3; ++i) {
      launch.grid[i] = grid[i];
      launch.block[i] = block[i];
    }
    launch.arguments = bytes.data();
    launch.argument_bytes = bytes.size();
    launch.dynamic_shared = shared;
    launch.checks = checks;
    launch.counters = counters;
    launch.numerics = numerics;
    launch.sparse_products = sparse_products;
    launch.order = order;
    launch.seed = seed;
    launch.threads = threads;
    launch.budget = budget;
    // Python runs signal handlers only in its main thread, and only when asked.
    launch.interrupted = [](void*) -> int {
      py::gil_scoped_acquire acquire;
      return PyErr_CheckSignals();
    };
    sparse24_ptx_report* report;
    {
      py::gil_scoped_release release;
      report = sparse24_ptx_run(handle_.get(), kernel.c_str(), &launch);
    }
    const std::unique_ptr<sparse24_ptx_report, void (*)(sparse24_ptx_report*)> owned(checked(report),
                                                                                     sparse24_ptx_discard);
    return text_of(sparse24_ptx_report_json(report));
  }

 private:
  Handle handle_;
};

// An array at a device address, until freed.
class Allocation {
 public:
  Allocation(const py::object& object, uint32_t align, bool initialized) : array_(object), size_(array_.size()) {
    // An empty tensor may have no pointer at all; its address is never to be read through.
    static uint8_t nothing;
    host_ = reinterpret_cast<uintptr_t>(array_.data());
    address_ = checked(sparse24_ptx_allocate(size_ != 0 ? array_.data() : &nothing, size_, align, initialized));
  }
  ~Allocation() { free(); }
  void free() {
    if (!freed_ && address_ != 0) sparse24_ptx_free(address_);
    freed_ = true;
    array_.release();
  }
  uint64_t address() const { return address_; }
  uint64_t size() const { return size_; }
  uintptr_t host() const { return host_; }

 private:
  Array array_;
  uint64_t size_, address_ = 0;  // both stay as they were when it is freed
  bool freed_ = false;
  uintptr_t host_ = 0;
};

}  // namespace

PYBIND11_MODULE(_ptx, m) {
  m.doc() = "The PTX emulator's native side; use sparse24.ptx.";
  const py::object error =
      py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc("sparse24.ptx.PtxError",
                                                                  "A PTX text that cannot be read or run: its syntax, "
                                                                  "or an instruction that is not supported.\n\n"
                                                                  "line, column: where in the text, from 1.",
                                                                  PyExc_Exception, nullptr));
  error.attr("line") = 0;
  error.attr("column") = 0;
  m.attr("PtxError") = error;

  py::class_<Variable>(m, "Variable", py::buffer_protocol()).def_buffer([](const Variable& variable) {
    return py::buffer_info(variable.data, static_cast<py::ssize_t>(variable.size));
  });
  py::class_<Module>(m, "Module")
      .def(py::init<const std::string&>())
      .def("describe", &Module::describe)
      .def("describe_kernel", &Module::describe_kernel)
      .def("variable", &Module::variable)
      .def("decode", &Module::decode)
      .def("run", &Module::run, py::arg("kernel"), py::arg("grid"), py::arg("block"), py::arg("arguments"),
           py::arg("shared"), py::arg("checks"), py::arg("counters"), py::arg("numerics"), py::arg("sparse_products"),
           py::arg("order"), py::arg("seed"), py::arg("threads"), py::arg("budget"));
  py::class_<Allocation>(m, "Allocation")
      .def(py::init<const py::object&, uint32_t, bool>())
      .def("free", &Allocation::free)
      .def_property_readonly("address", &Allocation::address)
      .def_property_readonly("size", &Allocation::size)
      .def_property_readonly("host", &Allocation::host);
  m.def(
      "isa", [](const char* force) { return text_of(checked(sparse24_ptx_isa(force))); },
      py::arg("force") = py::none());
  m.def("instructions", [] { return text_of(sparse24_ptx_instructions()); });
}

}  // namespace sparse24::ptx
