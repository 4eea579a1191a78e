#include "gguf/value.h"

#include <limits>
#include <optional>

namespace phi4edge::gguf {
namespace {

constexpr uint64_t kMinValueBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};

template <class Wide, class Read>
Array read_items(uint64_t count, Read read) {
  std::vector<Wide> items;
  items.reserve(size_t(count));
  for (uint64_t i = 0; i < count; ++i) items.push_back(read());
  return Array{std::move(items)};
}

template <class T, class Wide>
Array read_numbers(Cursor& in, uint64_t count) {
  return read_items<Wide>(count, [&] { return Wide(in.number<T>()); });
}

Array read_array(Cursor& in) {
  const auto type = in.number<uint32_t>();
  if (type == kArray) in.fail("nested arrays are not supported");
  if (type >= kEndOfTypes) in.fail(text("an array of unknown value type ", type, ", known are 0 to ", kEndOfTypes - 1));
  const auto count = in.number<uint64_t>();
  in.count_array_items(count, kMinValueBytes[type]);
  switch (type) {
    case kU8: return read_numbers<uint8_t, uint64_t>(in, count);
    case kI8: return read_numbers<int8_t, int64_t>(in, count);
    case kU16: return read_numbers<uint16_t, uint64_t>(in, count);
    case kI16: return read_numbers<int16_t, int64_t>(in, count);
    case kU32: return read_numbers<uint32_t, uint64_t>(in, count);
    case kI32: return read_numbers<int32_t, int64_t>(in, count);
    case kF32: return read_numbers<float, double>(in, count);
    case kU64: return read_numbers<uint64_t, uint64_t>(in, count);
    case kI64: return read_numbers<int64_t, int64_t>(in, count);
    case kF64: return read_numbers<double, double>(in, count);
    case kBool: return read_items<bool>(count, [&] { return in.boolean(); });
    default: return read_items<std::string>(count, [&] { return in.string(kMaxStringBytes, "a string"); });
  }
}

std::optional<int64_t> as_int(const Value& value) {
  if (const auto* i = std::get_if<int64_t>(&value)) return *i;
  const auto* u = std::get_if<uint64_t>(&value);
  return u && *u <= uint64_t(std::numeric_limits<int64_t>::max()) ? std::optional(int64_t(*u)) : std::nullopt;
}

}  // namespace

Value read_value(Cursor& in, uint32_t type) {
  switch (type) {
    case kU8: return uint64_t(in.number<uint8_t>());
    case kI8: return int64_t(in.number<int8_t>());
    case kU16: return uint64_t(in.number<uint16_t>());
    case kI16: return int64_t(in.number<int16_t>());
    case kU32: return uint64_t(in.number<uint32_t>());
    case kI32: return int64_t(in.number<int32_t>());
    case kF32: return double(in.number<float>());
    case kU64: return in.number<uint64_t>();
    case kI64: return in.number<int64_t>();
    case kF64: return in.number<double>();
    case kBool: return in.boolean();
    case kString: return in.string(kMaxStringBytes, "a string");
    case kArray: return std::make_shared<const Array>(read_array(in));
    default: in.fail(text("unknown value type ", type, ", known are 0 to ", kEndOfTypes - 1));
  }
}

const char* kind_of(const Value& value) {
  constexpr const char* kKinds[] = {"an unsigned integer", "a signed integer", "a number", "a boolean", "a string", "an array"};
  return kKinds[value.index()];
}

bool same(const Value& a, const Value& b) {
  if (a.index() != b.index()) return false;
  const auto* array = std::get_if<std::shared_ptr<const Array>>(&a);
  return array ? (*array)->items == std::get<std::shared_ptr<const Array>>(b)->items : a == b;
}

int64_t int_in_range(const std::string& path, std::string_view key, const Value& value, int64_t minimum, int64_t maximum) {
  const auto number = as_int(value);
  if (!number && !std::holds_alternative<uint64_t>(value)) {
    throw BundleError(path, std::string(key), text("expected an integer, found ", kind_of(value)), kDamaged);
  }
  if (!number || *number < minimum || *number > maximum) {
    const std::string found = number ? std::to_string(*number) : std::to_string(std::get<uint64_t>(value));
    throw BundleError(path, std::string(key), text("expected an integer from ", minimum, " to ", maximum, ", found ", found),
                      kDamaged);
  }
  return *number;
}

}  // namespace phi4edge::gguf
