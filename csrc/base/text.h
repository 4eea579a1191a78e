// Pieces of a message put together: text("row ", 3) is "row 3", in any locale.
#pragma once

#include <locale>
#include <sstream>
#include <string>

namespace phi4edge {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  (out << ... << parts);
  return out.str();
}

}  // namespace phi4edge
