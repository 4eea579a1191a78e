// The Python module phi4edge._core.  It carries values between Python and C++ and decides nothing.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "base/bandwidth.h"
#include "base/error.h"
#include "decoder/adapter.h"
#include "decoder/config.h"
#include "decoder/decoder.h"
#include "decoder/kernel_speed.h"
#include "decoder/memory.h"
#include "decoder/multiply.h"
#include "decoder/sampler.h"
#include "gguf/gguf.h"
#include "kernels/dispatch.h"
#include "module.h"
#include "quant/format.h"
#include "quant/quantize.h"

namespace phi4edge {

std::atomic<bool> exiting{false};
std::atomic<int> n_computing{0};
std::thread::id exiting_thread;

void sleep_for_ever() {
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

py::str to_str(const std::string& bytes) {
  PyObject* decoded = PyUnicode_DecodeUTF8(bytes.data(), Py_ssize_t(bytes.size()), "surrogateescape");
  if (!decoded) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
}

void expect_matrix(const FloatArray& x, int64_t n_columns) {
  if (x.ndim() != 2 || x.shape(1) != n_columns) {
    throw InputError("expected an array [n, " + std::to_string(n_columns) + "], got " + std::to_string(x.ndim()) +
                     " dimensions and " + std::to_string(x.size()) + " values");
  }
}

void expect_vector(const TokenArray& tokens) {
  if (tokens.ndim() != 1) throw InputError("tokens: expected one dimension, got " + std::to_string(tokens.ndim()));
}

namespace {

// --- Errors ---

const char* error_class(Error::Kind kind) {
  switch (kind) {
    case Error::Kind::kBundle: return "BundleError";
    case Error::Kind::kFile: return "FileError";
    case Error::Kind::kInput: return "InputError";
    case Error::Kind::kUnsupported: return "UnsupportedError";
    case Error::Kind::kOutOfMemory: return "OutOfMemoryError";
    case Error::Kind::kCancelled: return "Cancelled";
  }
  return "Phi4EdgeError";
}

void raise(const char* class_name, const std::string& problem, const std::string& path, const std::string& field,
           const std::string& hint) {
  const py::object type = py::module_::import("phi4edge.errors").attr(class_name);
  const py::object error = type(to_str(problem), "path"_a = to_str(path), "field"_a = to_str(field), "hint"_a = to_str(hint));
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate_error(std::exception_ptr exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const Error& error) {
    raise(error_class(error.kind()), error.what(), error.path(), error.field(), error.hint());
  } catch (const std::bad_alloc&) {
    raise("OutOfMemoryError", "not enough memory", {}, {}, "close other programs, or use a smaller model or context");
  }
}

// --- The interpreter lock ---

void stop_all() {
  exiting_thread = std::this_thread::get_id();
  exiting = true;  // progress functions say no from here on
  const py::gil_scoped_release release;
  while (n_computing > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

void stop_all_at_exit() {
  py::module_::import("atexit").attr("register")(py::cpp_function(&stop_all));
  // The child of a fork has none of the other threads.
  py::module_::import("os").attr("register_at_fork")("after_in_child"_a = py::cpp_function([] { n_computing = 0; }));
}

// --- Files ---

std::string fs_path(const py::object& path) {
  PyObject* encoded = nullptr;
  if (!PyUnicode_FSConverter(path.ptr(), &encoded)) throw py::error_already_set();
  return std::string(py::reinterpret_steal<py::bytes>(encoded));
}

struct ToPython {
  py::object operator()(const std::string& s) const { return to_str(s); }
  py::object operator()(bool b) const { return py::bool_(b); }
  py::object operator()(double d) const { return py::float_(d); }
  py::object operator()(uint64_t i) const { return py::int_(i); }
  py::object operator()(int64_t i) const { return py::int_(i); }
  py::object operator()(const std::shared_ptr<const gguf::Array>& array) const {
    return std::visit(
        [this](const auto& items) -> py::object {
          py::list list(items.size());
          for (size_t i = 0; i < items.size(); ++i) list[i] = (*this)(items[i]);
          return list;
        },
        array->items);
  }
};

py::dict to_dict(const gguf::File& file) {
  py::dict metadata;
  for (const auto& [key, value] : file.metadata()) metadata[to_str(key)] = std::visit(ToPython(), value);
  return metadata;
}

py::list to_strs(const std::vector<std::string>& strings) {
  py::list list;
  for (const std::string& s : strings) list.append(to_str(s));
  return list;
}

// An array that owns memory which numpy need not allocate, so that too little of it is our error.
py::array_t<uint8_t> own(std::unique_ptr<uint8_t[]> bytes, size_t n_bytes) {
  uint8_t* data = bytes.get();
  py::capsule owner(data, [](void* p) { delete[] static_cast<uint8_t*>(p); });
  bytes.release();
  return py::array_t<uint8_t>(py::ssize_t(n_bytes), data, owner);
}

py::array_t<uint8_t> read_tensor(const gguf::File& file, const std::string& name) {
  const gguf::Tensor* tensor = file.find_tensor(name);
  if (!tensor) throw BundleError(file.paths()[0], "tensor '" + name + "'", "not in this file");
  std::unique_ptr<uint8_t[]> bytes;
  {
    const WithoutInterpreter outside;
    bytes.reset(new uint8_t[tensor->n_bytes]);
    file.read(*tensor, 0, tensor->n_bytes, bytes.get());
  }
  return own(std::move(bytes), tensor->n_bytes);
}

void bind_gguf(py::module_& m) {
  using gguf::File, gguf::Tensor;
  py::class_<Tensor>(m, "TensorInfo", "An entry of a GGUF file's tensor directory.")
      .def_property_readonly("name", [](const Tensor& t) { return to_str(t.name); })
      .def_readonly("type_id", &Tensor::type_id, "ggml type number")
      .def_property_readonly("type_name", [](const Tensor& t) { return ggml_type_name(t.type_id); })
      .def_property_readonly(
          "shape", [](const Tensor& t) { return py::tuple(py::cast(t.shape)); }, "ggml order: the row length first")
      .def_readonly("n_bytes", &Tensor::n_bytes)
      .def_readonly("offset", &Tensor::offset, "bytes from the start of its shard")
      .def_readonly("shard", &Tensor::shard, "index into GgufFile.paths");

  py::class_<File, std::shared_ptr<File>>(m, "GgufFile", "A GGUF file, or all shards of one; checked when opened.")
      .def(py::init([](const py::object& path) {
             const std::string bytes = fs_path(path);
             const WithoutInterpreter outside;
             return std::make_shared<File>(bytes);
           }),
           "path"_a, "Raises FileError or BundleError.")
      .def_property_readonly("paths", [](const File& f) { return to_strs(f.paths()); })
      .def_property_readonly("version", &File::version)
      .def_property_readonly("size_on_disk", &File::size_on_disk, "bytes, of all shards")
      .def_property_readonly("warnings", [](const File& f) { return to_strs(f.warnings()); })
      .def_property_readonly("metadata", &to_dict, "A new dict at each call, in the order of the file.")
      .def_property_readonly("tensors", &File::tensors, "In the order of the file.")
      .def("read", &read_tensor, "name"_a, "The tensor's bytes as they are in the file, uint8[n_bytes].");
}

// --- Kernels ---

py::array_t<float> dequantize(uint32_t type_id, const ByteArray& data, int64_t n_values) {
  const Format* format = find_format(type_id);
  if (!format) throw InputError("no format has the type number " + std::to_string(type_id));
  if (n_values < 0 || n_values % format->block_values != 0 || size_t(data.size()) != format->row_bytes(n_values)) {
    throw InputError(std::to_string(n_values) + " values of " + format->name + " do not take " + std::to_string(data.size()) +
                     " bytes");
  }
  py::array_t<float> out(n_values);
  format->dequantize(data.data(), n_values, out.mutable_data());
  return out;
}

py::array_t<uint8_t> quantize(uint32_t type_id, const FloatArray& rows, int n_threads,
                              const std::optional<FloatArray>& importance) {
  const Format* format = find_format(type_id);
  if (!format) throw InputError("no format has the type number " + std::to_string(type_id));
  if (rows.ndim() != 2) throw InputError("expected rows in two dimensions, got " + std::to_string(rows.ndim()));
  if (importance && (importance->ndim() != 1 || importance->shape(0) != rows.shape(1))) {
    throw InputError("expected an importance for each of " + std::to_string(rows.shape(1)) + " columns, got " +
                     std::to_string(importance->size()));
  }
  const size_t row_bytes = format->row_bytes(rows.shape(1));
  py::array_t<uint8_t> out({rows.shape(0), py::ssize_t(row_bytes)});
  uint8_t* to = out.mutable_data();
  const float *from = rows.data(), *weights = importance ? importance->data() : nullptr;
  const int64_t n_rows = rows.shape(0), n_columns = rows.shape(1);
  const WithoutInterpreter outside;
  ThreadPool pool(n_threads);
  quantize_rows(*format, select_kernels("").quantize_row[format_index(*format)], from, n_rows, n_columns, weights, to, pool);
  return out;
}

void bind_kernels(py::module_& m) {
  py::class_<Format>(m, "FormatInfo", "A weight format that the decoder reads.")
      .def_readonly("name", &Format::name)
      .def_readonly("type_id", &Format::type_id, "ggml type number")
      .def_readonly("block_values", &Format::block_values)
      .def_readonly("block_bytes", &Format::block_bytes)
      .def_readonly("is_float", &Format::is_float);
  m.def("formats", [] {
    int count = 0;
    const Format* const* all = formats(&count);
    py::list list;
    for (int i = 0; i < count; ++i) list.append(py::cast(all[i], py::return_value_policy::reference));
    return list;
  });
  m.def(
      "isas",
      [] {
        py::list names;
        for (const KernelTable* table : usable_kernels()) names.append(table->name);
        return names;
      },
      "Instruction sets that this build has and this CPU runs, best first.");
  m.def("dequantize", &dequantize, "type_id"_a, "data"_a, "n_values"_a,
        "File blocks to floats, by the definition of the format.");
  m.def("quantize", &quantize, "type_id"_a, "rows"_a, "n_threads"_a = 1, "importance"_a = py::none(),
        "Floats [n_rows, n_columns] to file blocks, uint8[n_rows, row_bytes], with the least importance[column] * error^2.");
  m.def("read_bandwidth", &read_bandwidth, "n_threads"_a, "n_bytes"_a, "seconds"_a,
        "Bytes per second, the median of the passes.", py::call_guard<WithoutInterpreter>());
  m.def("int8_peak", &int8_peak, "isa"_a, "n_threads"_a, "seconds"_a,
        "Operations per second of the int8 dot product that the kernels use; an empty isa is the one that they take.",
        py::call_guard<WithoutInterpreter>());

  py::class_<ThreadPool>(m, "ThreadPool").def(py::init<int>(), "n_threads"_a).def_property_readonly("size", &ThreadPool::size);
  py::class_<PanelMatrix>(m, "PackedMatrix", "Weights as the kernels read them; for tests and benchmarks.")
      .def(py::init([](uint32_t type_id, const ByteArray& blocks, int64_t n_rows, int64_t n_columns) {
             return pack_matrix(type_id, blocks.data(), size_t(blocks.size()), n_rows, n_columns);
           }),
           "type_id"_a, "blocks"_a, "n_rows"_a, "n_columns"_a)
      .def_property_readonly("n_bytes", &PanelMatrix::n_bytes)
      .def(
          "row",
          [](const PanelMatrix& matrix, int64_t row, const std::string& isa) {
            py::array_t<float> out(matrix.n_columns);
            unpack_row(matrix, row, out.mutable_data(), isa);
            return out;
          },
          "row"_a, "isa"_a = "")
      .def(
          "multiply",
          [](const PanelMatrix& matrix, const FloatArray& x, ThreadPool& pool, const std::string& isa) {
            expect_matrix(x, matrix.n_columns);
            py::array_t<float> out({x.shape(0), py::ssize_t(matrix.n_rows)});
            float* to = out.mutable_data();
            const float* from = x.data();
            const int64_t n_tokens = x.shape(0);
            const WithoutInterpreter outside;
            if (n_tokens > 0) multiply(matrix, from, n_tokens, to, pool, isa);
            return out;
          },
          "x"_a, "pool"_a, "isa"_a = "", "x [n, columns] to [n, rows].")
      .def(
          "time_multiply",
          [](const PanelMatrix& matrix, const FloatArray& x, ThreadPool& pool, int64_t n_repeats, int64_t n_copies,
             const std::string& isa) {
            expect_matrix(x, matrix.n_columns);
            const float* from = x.data();
            const int64_t n_tokens = x.shape(0);
            const WithoutInterpreter unlocked;
            return time_multiply(matrix, from, n_tokens, n_repeats, n_copies, pool, isa);
          },
          "x"_a, "pool"_a, "n_repeats"_a, "n_copies"_a = 1, "isa"_a = "",
          "Seconds of each of n_repeats products with x [n, columns]; they take n_copies of the matrix in turn.");
}

// --- Decoder ---

void bind_config(py::module_& m) {
  py::class_<RopeConfig>(m, "RopeConfig")
      .def_readonly("n_dims", &RopeConfig::n_dims)
      .def_readonly("base", &RopeConfig::base)
      .def_readonly("interleaved", &RopeConfig::interleaved)
      .def_readonly("position_scale", &RopeConfig::position_scale)
      .def_readonly("attention_factor", &RopeConfig::attention_factor)
      .def_readonly("factors_short", &RopeConfig::factors_short)
      .def_readonly("factors_long", &RopeConfig::factors_long)
      .def_readonly("original_context", &RopeConfig::original_context);
  py::class_<ModelConfig>(m, "ModelConfig", "Hyperparameters; see csrc/decoder/config.h.")
      .def_readonly("architecture", &ModelConfig::architecture)
      .def_readonly("name", &ModelConfig::name)
      .def_readonly("n_layers", &ModelConfig::n_layers)
      .def_readonly("hidden_size", &ModelConfig::hidden_size)
      .def_readonly("n_heads", &ModelConfig::n_heads)
      .def_readonly("n_kv_heads", &ModelConfig::n_kv_heads)
      .def_readonly("head_dim", &ModelConfig::head_dim)
      .def_readonly("ffn_size", &ModelConfig::ffn_size)
      .def_readonly("vocab_size", &ModelConfig::vocab_size)
      .def_readonly("context_length", &ModelConfig::context_length, "trained")
      .def_readonly("sliding_window", &ModelConfig::sliding_window, "0 is none")
      .def_readonly("rms_epsilon", &ModelConfig::rms_epsilon)
      .def_readonly("tied_head", &ModelConfig::tied_head)
      .def_readonly("rope", &ModelConfig::rope);
  m.def("read_config", &read_config, "file"_a, "Raises BundleError.");
  m.def(
      "check_finite",
      [](const gguf::File& file, ThreadPool& pool, const py::object& progress) {
        PythonProgress python(progress);
        python.guard([&] {
          check_finite(file, pool, [&python](uint64_t done, uint64_t total) { return python(int64_t(done), int64_t(total)); });
        });
      },
      "file"_a, "pool"_a, "progress"_a = py::none(),
      "Reads all weights; raises a BundleError that names the first tensor with a NaN or an infinity.");
  py::class_<MemoryNeed>(m, "MemoryNeed", "Bytes.")
      .def_readonly("weights", &MemoryNeed::weights)
      .def_readonly("kv_cache", &MemoryNeed::kv_cache)
      .def_readonly("scratch", &MemoryNeed::scratch)
      .def_property_readonly("total", &MemoryNeed::total);
  m.def(
      "memory_need",
      [](const gguf::File& file, int64_t n_context, const std::string& kv_type) {
        return memory_need(file, read_config(file), n_context, kv_type_named(kv_type));
      },
      "file"_a, "n_context"_a, "kv_type"_a = "i16", "What loading the file and one session of n_context tokens take.");
  m.def(
      "kv_bytes_per_token",
      [](const ModelConfig& config, const std::string& kv_type) {
        return KvCache::bytes_per_token(config, kv_type_named(kv_type));
      },
      "config"_a, "kv_type"_a = "i16");
  m.def(
      "kv_types",
      [] {
        py::list names;
        for (const KvFormat& format : kv_formats()) names.append(format.name);
        return names;
      },
      "How keys and values can be stored.");
  m.def("available_memory", [] { return available_memory(); }, "Bytes that this process can still take.");
  m.def("require_memory", &require_memory, "need"_a, "available"_a, "Raises OutOfMemoryError with the numbers.");
}

void bind_decoder(py::module_& m) {
  py::class_<Model, std::shared_ptr<Model>>(m, "Model", "Weights in memory, shared by sessions.")
      .def(py::init([](const gguf::File& file, int n_threads, const std::string& isa, const py::object& progress) {
             PythonProgress python(progress);
             std::shared_ptr<Model> model;
             python.guard([&] {
               model = std::make_shared<Model>(file, n_threads, isa, [&python](uint64_t done, uint64_t total) {
                 return python(int64_t(done), int64_t(total));
               });
             });
             return model;
           }),
           "file"_a, "n_threads"_a, "isa"_a = "", "progress"_a = py::none(),
           "progress(done, total), in bytes, may return False to cancel.")
      .def_property_readonly("config", &Model::config, py::return_value_policy::reference_internal)
      .def_property_readonly("weight_bytes", [](const Model& model) { return model.weights().n_bytes(); })
      .def_property_readonly("embedding_bytes", [](const Model& model) { return model.weights().embedding.n_bytes(); })
      .def_property_readonly("isa", [](const Model& model) { return model.kernels().name; })
      .def_property_readonly("n_threads", [](Model& model) { return model.pool().size(); });
  py::class_<Adapter, std::shared_ptr<Adapter>>(m, "Adapter", "A LoRA adapter in memory, for the sessions of one model.")
      .def(py::init(
               [](std::shared_ptr<Model> model, const gguf::File& file, uint64_t available_memory, const py::object& progress) {
                 PythonProgress python(progress);
                 std::shared_ptr<Adapter> adapter;
                 python.guard([&] {
                   adapter = std::make_shared<Adapter>(
                       std::move(model), file, available_memory,
                       [&python](uint64_t done, uint64_t total) { return python(int64_t(done), int64_t(total)); });
                 });
                 return adapter;
               }),
           "model"_a, "file"_a, "available_memory"_a = UINT64_MAX, "progress"_a = py::none(),
           "available_memory: bytes it may take.  Raises BundleError, OutOfMemoryError.")
      .def_property_readonly("n_bytes", &Adapter::n_bytes);
}

// --- Sampler ---

void bind_sampler(py::module_& m) {
  py::class_<SamplerOptions>(m, "SamplerOptions")
      .def(py::init([](float temperature, int top_k, float top_p, float min_p, float repetition_penalty, float presence_penalty,
                       float frequency_penalty, int penalty_window, std::vector<std::pair<int32_t, float>> logit_bias,
                       uint64_t seed, int n_top, std::vector<int32_t> forbidden) {
             return SamplerOptions{temperature,
                                   top_k,
                                   top_p,
                                   min_p,
                                   repetition_penalty,
                                   presence_penalty,
                                   frequency_penalty,
                                   penalty_window,
                                   std::move(logit_bias),
                                   seed,
                                   n_top,
                                   std::move(forbidden)};
           }),
           py::kw_only(), py::arg("temperature") = SamplerOptions{}.temperature, py::arg("top_k") = SamplerOptions{}.top_k,
           py::arg("top_p") = SamplerOptions{}.top_p, py::arg("min_p") = SamplerOptions{}.min_p,
           py::arg("repetition_penalty") = SamplerOptions{}.repetition_penalty,
           py::arg("presence_penalty") = SamplerOptions{}.presence_penalty,
           py::arg("frequency_penalty") = SamplerOptions{}.frequency_penalty,
           py::arg("penalty_window") = SamplerOptions{}.penalty_window, py::arg("logit_bias") = SamplerOptions{}.logit_bias,
           py::arg("seed") = SamplerOptions{}.seed, py::arg("n_top") = SamplerOptions{}.n_top,
           py::arg("forbidden") = SamplerOptions{}.forbidden)
      .def_readwrite("temperature", &SamplerOptions::temperature)
      .def_readwrite("top_k", &SamplerOptions::top_k)
      .def_readwrite("top_p", &SamplerOptions::top_p)
      .def_readwrite("min_p", &SamplerOptions::min_p)
      .def_readwrite("repetition_penalty", &SamplerOptions::repetition_penalty)
      .def_readwrite("presence_penalty", &SamplerOptions::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplerOptions::frequency_penalty)
      .def_readwrite("penalty_window", &SamplerOptions::penalty_window)
      .def_readwrite("logit_bias", &SamplerOptions::logit_bias)
      .def_readwrite("seed", &SamplerOptions::seed)
      .def_readwrite("n_top", &SamplerOptions::n_top)
      .def_readwrite("forbidden", &SamplerOptions::forbidden);
  py::class_<Sample>(m, "Sample")
      .def_readonly("token", &Sample::token)
      .def_readonly("logprob", &Sample::logprob)
      .def_readonly("top", &Sample::top);
  py::class_<Sampler>(m, "Sampler")
      .def(py::init<SamplerOptions, int64_t>(), py::arg("options"), py::arg("vocab_size"))
      .def(
          "sample",
          [](Sampler& self, const FloatArray& logits) {
            if (logits.ndim() != 1 || logits.shape(0) != self.vocab_size()) {
              throw InputError("sample: expected " + std::to_string(self.vocab_size()) + " logits in one dimension, got " +
                               std::to_string(logits.size()) + " in " + std::to_string(logits.ndim()));
            }
            const float* data = logits.data();
            const WithoutInterpreter outside;
            return self.sample(data);
          },
          py::arg("logits"))
      .def("accept", &Sampler::accept, py::arg("token"))
      .def("reset", &Sampler::reset)
      .def_property_readonly("vocab_size", &Sampler::vocab_size);
}

}  // namespace
}  // namespace phi4edge

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled decoder of phi4edge.  Use the Python classes around it.";
  py::register_local_exception_translator(&phi4edge::translate_error);
  phi4edge::stop_all_at_exit();
  phi4edge::bind_gguf(m);
  phi4edge::bind_kernels(m);
  phi4edge::bind_config(m);
  phi4edge::bind_decoder(m);
  phi4edge::bind_sessions(m);
  phi4edge::bind_sampler(m);
}
