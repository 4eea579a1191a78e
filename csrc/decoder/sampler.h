// Logits to one token.
//
// Order, as in the default chain of llama.cpp:  logit bias -> penalties -> top_k -> top_p -> min_p -> temperature -> draw.
// top_p and min_p look at the softmax at temperature 1 of what the filters before them left.  Each filter keeps a prefix of
// the tokens ordered by (logit descending, id ascending), so equal logits are resolved in favour of the lower id everywhere.
//
// Reported log-probabilities are the log-softmax of the logits as given: before bias, penalties, filters and temperature.
//
// The draw uses integers only (weights of 30 bits, their sum, one number of an own generator): the same logits, options and
// seed give the same token with any compiler, C library and number of threads.  A token that is more than 2^30 times less
// likely than the best one is never drawn.
#pragma once

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <utility>
#include <vector>

namespace phi4edge {

struct SamplerOptions {
  float temperature = 0.0f;         // >= 0; 0 takes the best token and draws nothing
  int top_k = 0;                    // >= 0; 0 is off
  float top_p = 1.0f;               // 0..1; 1 is off; at least one token stays
  float min_p = 0.0f;               // 0..1, relative to the best token; 0 is off
  float repetition_penalty = 1.0f;  // > 0; divides positive logits and multiplies the others; 1 is off
  float presence_penalty = 0.0f;    // subtracted once from a token that occurred
  float frequency_penalty = 0.0f;   // subtracted once per occurrence
  int penalty_window = 64;          // the penalties see this many last tokens, prompt included; 0 none, -1 all
  std::vector<std::pair<int32_t, float>> logit_bias;  // added to the logit; -inf bans the token
  uint64_t seed = 0;
  int n_top = 0;                   // how many of the most likely tokens each Sample lists
  std::vector<int32_t> forbidden;  // never chosen (ids that stand for no text)
};

struct Sample {
  int32_t token = -1;
  float logprob = 0.0f;                        // natural logarithm
  std::vector<std::pair<int32_t, float>> top;  // (token, logprob), most likely first
};

// Not thread-safe: one Sampler per sequence.
class Sampler {
 public:
  // Throws InputError naming the option that is out of range.
  Sampler(SamplerOptions options, int64_t vocab_size);

  // `logits`: vocab_size floats; -inf is allowed.  Throws InputError when one is NaN or +inf, or when no token is possible.
  // Does not accept() the token.
  Sample sample(const float* logits);

  // Tells the penalties about a token of the prompt or of the answer.
  void accept(int32_t token);

  // As constructed: nothing accepted, the generator at its seed.
  void reset();

  int64_t vocab_size() const { return vocab_size_; }
  const SamplerOptions& options() const { return options_; }

 private:
  bool penalizes() const;
  const float* adjust(const float* logits);
  int32_t draw(const float* logits, float best);
  uint64_t next_random();

  SamplerOptions options_;
  int64_t vocab_size_;
  uint64_t random_state_;
  std::deque<int32_t> window_;                   // unused when the window is unlimited
  std::unordered_map<int32_t, int64_t> counts_;  // occurrences in the window
  std::vector<float> adjusted_;                  // [vocab_size], allocated at the first use
  std::vector<int32_t> weights_;                 // [vocab_size], likewise
};

}  // namespace phi4edge
