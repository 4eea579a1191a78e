// What the parts of the Python module share: texts, arrays, the interpreter lock, progress.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "base/error.h"

namespace phi4edge {

namespace py = pybind11;
using namespace py::literals;

// Bytes that are not UTF-8 become lone surrogates, as in Python's file names.
py::str to_str(const std::string& bytes);

// --- Arrays ---

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using TokenArray = py::array_t<int32_t, py::array::c_style>;  // no cast: a wide number must not become another token
using ByteArray = py::array_t<uint8_t, py::array::c_style>;

void expect_matrix(const FloatArray& x, int64_t n_columns);
void expect_vector(const TokenArray& tokens);

// --- The interpreter lock ---

// A thread that asks for the lock when the interpreter is shutting down is ended there and then, which no C++ frame survives.
// So at exit those that compute are told to stop, and then sleep until the process ends.  Only daemon threads are left by
// then; an exception in one of them would be printed, for which Python has no means any more.
extern std::atomic<bool> exiting;
extern std::atomic<int> n_computing;
extern std::thread::id exiting_thread;  // valid when exiting is set

[[noreturn]] void sleep_for_ever();

// Gives the lock away for as long as it lives.
class WithoutInterpreter {
 public:
  ~WithoutInterpreter() {
    if (exiting && std::this_thread::get_id() != exiting_thread) {
      --n_computing;
      sleep_for_ever();
    }
  }

 private:
  struct Counted {
    Counted() {
      if (exiting) {
        if (std::this_thread::get_id() == exiting_thread) throw CancelledError();
        const py::gil_scoped_release release;
        sleep_for_ever();
      }
      ++n_computing;
    }
    ~Counted() { --n_computing; }
  };
  Counted counted_;  // before and after the other
  py::gil_scoped_release release_;
};

// --- Progress and cancellation ---

// Calls a Python progress function and the signal handlers.  What they raise is kept and raised when C++ has unwound.
class PythonProgress {
 public:
  explicit PythonProgress(py::object function) : function_(std::move(function)) {}

  bool operator()(int64_t done, int64_t total) {
    if (exiting) return false;
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) return keep_error();
    if (function_.is_none()) return true;
    try {
      const py::object result = function_(done, total);
      return result.ptr() != Py_False;
    } catch (py::error_already_set& error) {
      error.restore();
      return keep_error();
    }
  }

  // Runs work() without the interpreter lock.
  template <class Work>
  void guard(Work&& work) {
    try {
      const WithoutInterpreter outside;
      work();
    } catch (const CancelledError&) {
      if (!error_) throw;
      throw py::error_already_set(std::move(*error_));
    }
  }

 private:
  bool keep_error() {
    error_.emplace();  // fetches the error that Python has set
    return false;
  }

  py::object function_;
  std::optional<py::error_already_set> error_;
};

// --- Parts ---

void bind_sessions(py::module_& m);

}  // namespace phi4edge
