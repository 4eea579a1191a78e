// Sessions in the Python module.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/text.h"
#include "decoder/decoder.h"
#include "decoder/kv_cache.h"
#include "module.h"

namespace phi4edge {
namespace {

LogitsFor logits_for(const std::string& which) {
  if (which == "none") return LogitsFor::kNone;
  if (which == "last") return LogitsFor::kLast;
  if (which == "all") return LogitsFor::kAll;
  throw InputError("logits: expected none, last or all, got '" + which + "'");
}

// Before logits of so many tokens are allocated.
void expect_room(const Session& session, int64_t n) {
  if (n > session.n_context())
    throw InputError(std::to_string(n) + " tokens do not fit a context of " + std::to_string(session.n_context()));
}

// Runs one of Session's extend functions and returns its logits, float32[0, 1 or n, vocab].
template <class Extend>
py::array_t<float> run(Session& session, int64_t n, const std::string& which_name, const py::object& progress,
                       Extend&& extend) {
  const LogitsFor which = logits_for(which_name);
  expect_room(session, n);
  py::array_t<float> logits({py::ssize_t(logits_rows(which, n)), py::ssize_t(session.config().vocab_size)});
  PythonProgress python(progress);
  float* out = logits.mutable_data();
  python.guard([&] { extend(which, out, [&python](int64_t done, int64_t total) { return python(done, total); }); });
  return logits;
}

// Session::extend_together; the logits of each session, views of one array.
py::list extend_together(const std::vector<Session*>& sessions, const std::vector<TokenArray>& tokens,
                         const std::string& which_name, const py::object& progress) {
  const LogitsFor which = logits_for(which_name);
  if (sessions.size() != tokens.size()) {
    throw InputError(text(sessions.size(), " sessions have tokens for ", tokens.size()));
  }
  std::vector<Extension> extensions;
  int64_t n_rows = 0;
  for (size_t i = 0; i < sessions.size(); ++i) {
    if (!sessions[i]) throw InputError(text("sessions[", i, "] is none"));
    expect_vector(tokens[i]);
    expect_room(*sessions[i], tokens[i].size());
    extensions.push_back({sessions[i], tokens[i].data(), tokens[i].size()});
    n_rows += logits_rows(which, tokens[i].size());
  }
  py::list list;
  if (sessions.empty()) return list;
  py::array_t<float> logits({py::ssize_t(n_rows), py::ssize_t(sessions.front()->config().vocab_size)});
  PythonProgress python(progress);
  float* out = logits.mutable_data();
  python.guard([&] {
    Session::extend_together(extensions, which, out, [&python](int64_t done, int64_t total) { return python(done, total); });
  });
  for (const Extension& each : extensions) {
    const py::ssize_t begin = each.first_logits, end = begin + logits_rows(which, each.n_tokens);
    list.append(logits[py::slice(begin, end, 1)]);
  }
  return list;
}

py::dict input_squares(Session& session) {
  py::dict dict;
  for (const InputSquares::Entry& entry : session.input_squares()) {
    for (const std::string& name : entry.tensors) {
      dict[to_str(name)] =
          py::make_tuple(py::array_t<double>(py::ssize_t(entry.sums.size()), entry.sums.data()), entry.n_tokens);
    }
  }
  return dict;
}

py::dict profile(Session& session) {
  py::dict dict;
  for (const OperationTotal& total : session.profile()) {
    dict[total.name] = py::make_tuple(total.seconds, total.n_bytes, total.operations);
  }
  return dict;
}

}  // namespace

void bind_sessions(py::module_& m) {
  py::class_<Session>(m, "Session", "One sequence and its KV cache.")
      .def(py::init([](std::shared_ptr<Model> model, int64_t n_context, const std::string& kv_type) {
             return std::make_unique<Session>(std::move(model), n_context, kv_type_named(kv_type));
           }),
           "model"_a, "n_context"_a, "kv_type"_a = "i16")
      .def(
          "extend",
          [](Session& session, const TokenArray& tokens, const std::string& logits, const py::object& progress) {
            expect_vector(tokens);
            return run(session, tokens.size(), logits, progress,
                       [&](LogitsFor which, float* out, const ForwardProgress& forward) {
                         session.extend(tokens.data(), tokens.size(), which, out, forward);
                       });
          },
          "tokens"_a, "logits"_a = "last", "progress"_a = py::none(),
          "Appends tokens; returns float32[0, 1 or n, vocab]. progress(done, total) may return False to cancel.")
      .def(
          "extend_embeddings",
          [](Session& session, const FloatArray& rows, const std::string& logits, const py::object& progress) {
            expect_matrix(rows, session.config().hidden_size);
            return run(session, rows.shape(0), logits, progress,
                       [&](LogitsFor which, float* out, const ForwardProgress& forward) {
                         session.extend_embeddings(rows.data(), rows.shape(0), which, out, forward);
                       });
          },
          "rows"_a, "logits"_a = "last", "progress"_a = py::none(), "Appends embedding rows, float32[n, hidden].")
      .def(
          "append",
          [](Session& session, const TokenArray& tokens) {
            expect_vector(tokens);
            session.append(tokens.data(), tokens.size());
          },
          "tokens"_a, "Appends tokens that the next extension computes together with its own.")
      .def(
          "append_embeddings",
          [](Session& session, const FloatArray& rows) {
            expect_matrix(rows, session.config().hidden_size);
            const WithoutInterpreter unlocked;
            session.append_embeddings(rows.data(), rows.shape(0));
          },
          "rows"_a, "The same with embedding rows, float32[n, hidden].")
      .def(
          "grow",
          [](Session& session, int64_t n_context) {
            const WithoutInterpreter unlocked;
            session.grow(n_context);
          },
          "n_context"_a, "Room for more tokens; what was computed stays.")
      .def("truncate", &Session::truncate, "n_tokens"_a)
      .def(
          "set_adapter",
          [](Session& session, const std::shared_ptr<Adapter>& adapter, double scale) { session.set_adapter(adapter, scale); },
          "adapter"_a.none(true), "scale"_a = 1.0,
          "From the next extension on, for the whole sequence; what was computed otherwise is computed again.")
      .def("n_reusable", &Session::n_reusable, "n_tokens"_a)
      .def("collect_input_squares", &Session::collect_input_squares, "enabled"_a,
           "Starts at zero, or stops; see input_squares().")
      .def("input_squares", &input_squares,
           "For each weight matrix by its GGUF name: the sums over tokens of its squared inputs, float64[n_columns], and the "
           "number of tokens.")
      .def("collect_profile", &Session::collect_profile, "enabled"_a, "Starts at zero, or stops and forgets; see profile().")
      .def("profile", &profile,
           "For each operation of forward passes: seconds (the mean of the threads), bytes read of weights or of keys and "
           "values, and arithmetic operations of matrix products. Empty while it is off.")
      .def("cancel", &Session::cancel, "Ends the extend() that runs in another thread.")
      .def_property_readonly("n_tokens", &Session::n_tokens)
      .def_property_readonly("n_context", &Session::n_context)
      .def_property_readonly("kv_bytes", &Session::kv_bytes);
  m.def("extend_together", &extend_together, "sessions"_a, "tokens"_a, "logits"_a = "last", "progress"_a = py::none(),
        "Session.extend() of several sessions of one model, which read the weights together; a list of what it returns for "
        "each.");
}

}  // namespace phi4edge
