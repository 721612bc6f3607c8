#include "common.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace larder::python {

uint32_t Milliseconds(const Seconds& seconds) {
  if (!seconds.has_value()) return 0;
  if (std::isnan(*seconds) || *seconds < 0) {
    throw nb::value_error("a deadline is a number of seconds, not below 0");
  }
  const double ms = std::ceil(*seconds * 1000);
  if (ms >= static_cast<double>(LARDER_NO_DEADLINE)) return LARDER_NO_DEADLINE;
  return ms < 1 ? 1 : static_cast<uint32_t>(ms);
}

void Raise(int32_t status) {
  const std::string text = larder_last_error();
  const nb::object error =
      nb::module_::import_("larder._errors").attr("make")(status, text);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())),
                  error.ptr());
  throw nb::python_error();
}

namespace {

// A buffer of whole numbers of the width of `Number`, whatever their sign.
template <class Number, class Element>
std::vector<Number> Widened(const Py_buffer& buffer) {
  const auto* const first = static_cast<const Element*>(buffer.buf);
  return std::vector<Number>(first,
                             first + buffer.len / Py_ssize_t{sizeof(Element)});
}

template <class Number>
std::vector<Number> NumbersOf(nb::handle numbers) {
  if (PyObject_CheckBuffer(numbers.ptr())) {
    Py_buffer buffer;
    if (PyObject_GetBuffer(numbers.ptr(), &buffer,
                           PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0) {
      throw nb::python_error();
    }
    const std::string format = buffer.format == nullptr ? "B" : buffer.format;
    const bool flat = buffer.ndim == 1 && format.size() == 1;
    const bool whole = flat && std::strchr("iIlLqQ", format[0]) != nullptr;
    std::vector<Number> result;
    if (whole && buffer.itemsize == 4) {
      result = Widened<Number, int32_t>(buffer);
    } else if (whole && buffer.itemsize == 8) {
      result = Widened<Number, int64_t>(buffer);
    }
    PyBuffer_Release(&buffer);
    if (!whole) {
      throw nb::type_error("wanted one dimension of 32 or 64 bit integers");
    }
    return result;
  }
  const nb::object fast = nb::steal(PySequence_Fast(
      numbers.ptr(), "wanted a list, a tuple or an array of integers"));
  if (!fast.is_valid()) throw nb::python_error();
  std::vector<Number> result;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(fast.ptr());
  PyObject** const items = PySequence_Fast_ITEMS(fast.ptr());
  result.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    const long long value = PyLong_AsLongLong(items[i]);
    if (value == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
    result.push_back(static_cast<Number>(value));
  }
  return result;
}

}  // namespace

std::vector<uint32_t> TokensOf(nb::handle numbers) {
  return NumbersOf<uint32_t>(numbers);
}
std::vector<int64_t> PlacesOf(nb::handle numbers) {
  return NumbersOf<int64_t>(numbers);
}

bool AddressAndBytes(nb::handle object, void*& data, uint64_t& bytes) {
  if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != 2) {
    return false;
  }
  data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(object.ptr(), 0));
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  bytes = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(object.ptr(), 1));
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return true;
}

Memory::Memory(nb::handle object, bool writable) {
  if (PyObject_CheckBuffer(object.ptr())) {
    if (PyObject_GetBuffer(
            object.ptr(), &buffer_,
            writable ? PyBUF_WRITABLE | PyBUF_SIMPLE : PyBUF_SIMPLE) != 0) {
      throw nb::python_error();
    }
    data_ = buffer_.buf;
    bytes_ = static_cast<uint64_t>(buffer_.len);
    return;
  }
  if (AddressAndBytes(object, data_, bytes_)) return;
  nb::ndarray<nb::device::cpu, nb::c_contig> array;
  if (!nb::try_cast(object, array)) {
    throw nb::type_error(
        "wanted contiguous host memory: a buffer, a CPU tensor (DLPack), or "
        "(address, bytes)");
  }
  data_ = array.data();
  bytes_ = array.nbytes();
  owner_ = nb::cast(array);
}

Memory::Memory(Memory&& other) noexcept
    : data_(other.data_),
      bytes_(other.bytes_),
      buffer_(std::exchange(other.buffer_, {})),
      owner_(std::move(other.owner_)) {}

Memory::~Memory() {
  if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
}

larder_id IdOf(const nb::bytes& bytes) {
  larder_id id;
  if (bytes.size() != sizeof id.bytes) {
    throw nb::value_error("an id or digest has 32 bytes");
  }
  std::memcpy(id.bytes, bytes.c_str(), sizeof id.bytes);
  return id;
}

}  // namespace larder::python
