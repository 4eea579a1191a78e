// Every step is one pass over the vocabulary; only the few tokens around a cut are ever sorted.  The passes are written so
// that the compiler can vectorise them: no branches, integer sums and maxima, floats added in fixed lanes.
#include "decoder/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "base/error.h"

namespace phi4edge {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kWeightOne = 1073741824.0f;  // 2^30: the weight of the best token
constexpr int kFewTokens = 1024;             // best_tokens is faster than prefix_end up to here
constexpr int32_t kLastToken = std::numeric_limits<int32_t>::max();

// Buckets of the distance to the best logit: weights are zero beyond ln(2^30) = 20.8, and 21 * 96 < 2048.
constexpr int kBuckets = 2048;
constexpr float kBucketsPerNat = 96.0f;

struct Scored {
  float logit;
  int32_t token;
};

bool better(const Scored& a, const Scored& b) { return a.logit > b.logit || (a.logit == b.logit && a.token < b.token); }

// e^-distance for distance >= +0, flat beyond 87; relative error below 2e-6; exactly 1 at 0.  2^(k + f), |f| <= 1/2, Taylor
// series of 2^f.  Own code because the last bit of std::exp differs between C libraries.
inline float exp_minus(float distance) {
  // As integers, positive floats have the same order; GCC turns a minimum of floats into a branch and stays scalar.
  const float clamped = std::bit_cast<float>(std::min(std::bit_cast<int32_t>(distance), std::bit_cast<int32_t>(87.0f)));
  const float t = clamped * -1.44269504f;
  const int32_t k = static_cast<int32_t>(t - 0.5f);
  const float f = t - static_cast<float>(k);
  float p = 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return p * std::bit_cast<float>((k + 127) << 23);
}

// Orders like the float that it is made of: -NaN < -inf < ... < -0 < 0 < ... < inf < NaN.  Maxima of integers vectorise.
inline int32_t ordered_bits(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

inline int32_t weight_of(float distance) { return static_cast<int32_t>(exp_minus(distance) * kWeightOne); }

inline int bucket_of(float distance) {
  return static_cast<int>(std::min(distance * kBucketsPerNat, static_cast<float>(kBuckets - 1)));
}

[[noreturn]] void throw_bad_logit(const float* logits, int64_t n_logits) {
  int64_t token = 0;
  while (token < n_logits && logits[token] <= std::numeric_limits<float>::max()) token++;
  const char* what = token < n_logits && std::isnan(logits[token]) ? "not a number" : "infinite";
  throw InputError("the logit of token " + std::to_string(token) + " is " + what,
                   "the model or its input is damaged; verify the model file");
}

// The best token.  Throws when a logit is NaN or +inf, or when all are -inf.
Scored best_token(const float* logits, int64_t n_logits) {
  constexpr int64_t kBlock = 1024;
  int32_t best = std::numeric_limits<int32_t>::min();
  int64_t best_begin = 0;
  for (int64_t begin = 0; begin < n_logits; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n_logits);
    int32_t highest = std::numeric_limits<int32_t>::min(), lowest = std::numeric_limits<int32_t>::max();
    for (int64_t i = begin; i < end; i++) {
      const int32_t bits = ordered_bits(logits[i] + 0.0f);  // -0 becomes 0: they are equal
      highest = bits > highest ? bits : highest;
      lowest = bits < lowest ? bits : lowest;
    }
    if (highest >= ordered_bits(kInfinity) || lowest < ordered_bits(-kInfinity)) throw_bad_logit(logits, n_logits);
    if (highest > best) {
      best = highest;
      best_begin = begin;
    }
  }
  if (best == ordered_bits(-kInfinity)) {
    throw InputError("no token can be chosen: every logit is -infinity", "loosen logit_bias, or verify the model file");
  }
  int64_t token = best_begin;
  while (ordered_bits(logits[token] + 0.0f) != best) token++;
  return {logits[token], static_cast<int32_t>(token)};
}

// log(sum(e^logit)).  Short sums in float, their sum in double: the error stays near 1e-6.
double log_sum_exp(const float* logits, int64_t n_logits, float best) {
  constexpr int64_t kLanes = 16;
  float terms[64 * kLanes];
  double total = 0.0;
  for (int64_t begin = 0; begin < n_logits; begin += 64 * kLanes) {
    const int64_t n_terms = std::min(64 * kLanes, n_logits - begin);
    for (int64_t i = 0; i < n_terms; i++) terms[i] = exp_minus(best - logits[begin + i]);
    std::fill(terms + n_terms, terms + 64 * kLanes, 0.0f);
    float sums[kLanes] = {};
    for (int64_t i = 0; i < 64 * kLanes; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; lane++) sums[lane] += terms[i + lane];
    }
    for (float sum : sums) total += static_cast<double>(sum);
  }
  return static_cast<double>(best) + std::log(total);
}

// The `count` best tokens, best first.  Amortised one comparison per token: the buffer is cut back to `count` when full,
// and its worst entry becomes the threshold for what follows.
std::vector<Scored> best_tokens(const float* logits, int64_t n_logits, int64_t count) {
  count = std::min(count, n_logits);
  std::vector<Scored> found;
  if (count == 0) return found;
  const size_t capacity = static_cast<size_t>(2 * count + 64);
  found.reserve(capacity);
  float threshold = -kInfinity;
  const auto keep_best = [&] {
    std::nth_element(found.begin(), found.begin() + (count - 1), found.end(), better);
    found.resize(static_cast<size_t>(count));
    threshold = found.back().logit;
  };
  for (int64_t i = 0; i < n_logits; i++) {
    // Once the buffer was cut, later tokens with a logit equal to the threshold have a higher id and lose.
    if (logits[i] > threshold || (threshold == -kInfinity && logits[i] == threshold)) {
      found.push_back({logits[i], static_cast<int32_t>(i)});
      if (found.size() == capacity) keep_best();
    }
  }
  if (static_cast<int64_t>(found.size()) > count) keep_best();
  std::sort(found.begin(), found.end(), better);
  return found;
}

// weights[i] = 2^30 e^(-(best - logit) / temperature), and 0 for the tokens after the cut.
void weigh(const float* logits, int32_t n_logits, float best, float temperature, Scored cut, int32_t* weights) {
  const int32_t cut_bits = ordered_bits(cut.logit + 0.0f);
  for (int32_t i = 0; i < n_logits; i++) {
    const int32_t bits = ordered_bits(logits[i] + 0.0f);
    const int32_t inside = int32_t{bits > cut_bits} | (int32_t{bits == cut_bits} & int32_t{i <= cut.token});
    weights[i] = weight_of((best - logits[i]) / temperature) & -inside;
  }
}

// The first token, in order of preference, at which the weights so far sum up to `wanted`.  Finds the bucket of logits where
// that happens, then halves the tokens of the bucket until one is left.
Scored prefix_end(const float* logits, int32_t n_logits, float best, const int32_t* weights, double wanted) {
  int64_t buckets[kBuckets] = {};
  for (int32_t i = 0; i < n_logits; i++) buckets[bucket_of(best - logits[i])] += weights[i];
  int crossing = 0;
  int64_t sum = 0;
  while (crossing < kBuckets - 1 && static_cast<double>(sum + buckets[crossing]) < wanted) sum += buckets[crossing++];

  std::vector<Scored> candidates;
  for (int32_t i = 0; i < n_logits; i++) {
    if (bucket_of(best - logits[i]) == crossing && weights[i] > 0) candidates.push_back({logits[i], i});
  }
  if (candidates.empty()) return {-kInfinity, kLastToken};  // less than `wanted` in all
  auto begin = candidates.begin(), end = candidates.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, better);
    int64_t half = 0;
    for (auto candidate = begin; candidate != middle; ++candidate) half += weights[candidate->token];
    if (static_cast<double>(sum + half) >= wanted) {
      end = middle;
    } else {
      sum += half;
      begin = middle;
    }
  }
  return *begin;
}

void require(bool ok, const char* field, const char* range, const std::string& value) {
  if (!ok) throw InputError(std::string(field) + " must be " + range + ", got " + value);
}

void check_token(int64_t token, int64_t vocab_size, const char* field) {
  if (token < 0 || token >= vocab_size) {
    throw InputError(std::string(field) + ": token " + std::to_string(token) + " is not in the vocabulary (0 to " +
                     std::to_string(vocab_size - 1) + ")");
  }
}

void check(const SamplerOptions& options, int64_t vocab_size) {
  require(vocab_size > 0 && vocab_size < kLastToken, "vocab_size", "between 1 and 2^31 - 2", std::to_string(vocab_size));
  const auto finite = [](float value) { return std::isfinite(value); };
  const auto unit = [](float value) { return value >= 0.0f && value <= 1.0f; };
  const SamplerOptions& o = options;
  require(finite(o.temperature) && o.temperature >= 0.0f, "temperature", "finite and at least 0",
          std::to_string(o.temperature));
  require(o.top_k >= 0, "top_k", "at least 0", std::to_string(o.top_k));
  require(unit(o.top_p), "top_p", "between 0 and 1", std::to_string(o.top_p));
  require(unit(o.min_p), "min_p", "between 0 and 1", std::to_string(o.min_p));
  require(finite(o.repetition_penalty) && o.repetition_penalty > 0.0f, "repetition_penalty", "finite and above 0",
          std::to_string(o.repetition_penalty));
  require(finite(o.presence_penalty), "presence_penalty", "finite", std::to_string(o.presence_penalty));
  require(finite(o.frequency_penalty), "frequency_penalty", "finite", std::to_string(o.frequency_penalty));
  require(o.penalty_window >= -1, "penalty_window", "at least -1", std::to_string(o.penalty_window));
  require(o.n_top >= 0, "n_top", "at least 0", std::to_string(o.n_top));
  for (const auto& [token, bias] : o.logit_bias) {
    check_token(token, vocab_size, "logit_bias");
    require(bias < kInfinity, "logit_bias", "finite or -inf", std::to_string(bias));  // false for NaN
  }
  for (int32_t token : o.forbidden) check_token(token, vocab_size, "forbidden");
}

}  // namespace

Sampler::Sampler(SamplerOptions options, int64_t vocab_size) : options_(std::move(options)), vocab_size_(vocab_size) {
  check(options_, vocab_size);
  reset();
}

void Sampler::reset() {
  window_.clear();
  counts_.clear();
  random_state_ = options_.seed;
}

bool Sampler::penalizes() const {
  return options_.penalty_window != 0 &&
         (options_.repetition_penalty != 1.0f || options_.presence_penalty != 0.0f || options_.frequency_penalty != 0.0f);
}

void Sampler::accept(int32_t token) {
  check_token(token, vocab_size_, "accept");
  if (!penalizes()) return;
  counts_[token]++;
  if (options_.penalty_window < 0) return;
  window_.push_back(token);
  if (static_cast<int64_t>(window_.size()) > options_.penalty_window) {
    const auto oldest = counts_.find(window_.front());
    if (--oldest->second == 0) counts_.erase(oldest);
    window_.pop_front();
  }
}

// The logits with bias, penalties and forbidden tokens applied; `logits` itself when there is nothing to apply.
const float* Sampler::adjust(const float* logits) {
  if (options_.logit_bias.empty() && options_.forbidden.empty() && counts_.empty()) return logits;
  adjusted_.assign(logits, logits + vocab_size_);
  for (const auto& [token, bias] : options_.logit_bias) adjusted_[static_cast<size_t>(token)] += bias;
  for (const auto& [token, count] : counts_) {
    float& logit = adjusted_[static_cast<size_t>(token)];
    logit = logit > 0.0f ? logit / options_.repetition_penalty : logit * options_.repetition_penalty;
    logit -= static_cast<float>(count) * options_.frequency_penalty + options_.presence_penalty;
  }
  for (int32_t token : options_.forbidden) adjusted_[static_cast<size_t>(token)] = -kInfinity;
  return adjusted_.data();
}

// Inverse of the cumulative distribution, in the order of the ids.  Each filter keeps a prefix of one order, so the filters
// together are one cut: the last token that is kept.
int32_t Sampler::draw(const float* logits, float best) {
  const int32_t n_logits = static_cast<int32_t>(vocab_size_);
  Scored cut{-kInfinity, kLastToken};
  if (options_.top_k > 0 && options_.top_k <= kFewTokens) {
    cut = best_tokens(logits, n_logits, options_.top_k).back();
  } else if (options_.top_k > 0) {
    weights_.assign(static_cast<size_t>(n_logits), 1);
    cut = prefix_end(logits, n_logits, best, weights_.data(), options_.top_k);
  }
  weights_.resize(static_cast<size_t>(n_logits));
  int32_t* weights = weights_.data();
  if (options_.top_p < 1.0f) {
    weigh(logits, n_logits, best, 1.0f, cut, weights);
    const int64_t total = std::accumulate(weights, weights + n_logits, int64_t{0});
    cut = prefix_end(logits, n_logits, best, weights, static_cast<double>(options_.top_p) * static_cast<double>(total));
  }
  if (options_.min_p > 0.0f) {
    const float least = best + std::log(options_.min_p);
    if (least > cut.logit) cut = {least, kLastToken};
  }
  weigh(logits, n_logits, best, options_.temperature, cut, weights);

  // One rounding of one product: the same everywhere.  The best token has weight 2^30, so total > 0.
  const int64_t total = std::accumulate(weights, weights + n_logits, int64_t{0});
  const double uniform = static_cast<double>(next_random() >> 11) / 9007199254740992.0;  // [0, 1), 53 bits
  int64_t rest = std::min(static_cast<int64_t>(uniform * static_cast<double>(total)), total - 1);
  constexpr int32_t kBlock = 1024;
  int32_t token = 0;
  while (token + kBlock <= n_logits) {
    const int64_t sum = std::accumulate(weights + token, weights + token + kBlock, int64_t{0});
    if (rest < sum) break;
    rest -= sum;
    token += kBlock;
  }
  while (rest >= weights[token]) rest -= weights[token++];
  return token;
}

// A Weyl sequence through a 64-bit finaliser (the splitmix64 construction): 8 bytes of state, full period.
uint64_t Sampler::next_random() {
  random_state_ += 0x9E3779B97F4A7C15ull;
  uint64_t z = random_state_;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

Sample Sampler::sample(const float* logits) {
  const Scored given_best = best_token(logits, vocab_size_);
  const float* adjusted = adjust(logits);
  const Scored best = adjusted == logits ? given_best : best_token(adjusted, vocab_size_);
  Sample result;
  result.token = options_.temperature == 0.0f ? best.token : draw(adjusted, best.logit);
  const double normalizer = log_sum_exp(logits, vocab_size_, given_best.logit);
  const auto logprob = [&](int32_t token) { return static_cast<float>(static_cast<double>(logits[token]) - normalizer); };
  result.logprob = logprob(result.token);
  for (const Scored& entry : best_tokens(logits, vocab_size_, options_.n_top)) {
    result.top.emplace_back(entry.token, logprob(entry.token));
  }
  return result;
}

}  // namespace phi4edge
