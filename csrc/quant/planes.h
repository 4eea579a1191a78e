// How the integer codes of a quantised panel lie in memory.
//
// A panel holds 16 rows.  Its codes come in lines of 64 bytes; byte 4 r + b of a line belongs to row r, so one line is one
// operand of a "4 products per 32-bit lane" instruction with 16 lanes = 16 rows (8 and 8 with 256-bit registers, and so on).
// "Group" g of a block of 32 columns is columns 4 g .. 4 g + 3, and b counts within it.
//
// A code of LOW + HIGH bits is split in two planes; a block of 32 columns takes LOW + HIGH lines:
//   8 bits  line g: group g
//   4 bits  line i: group 2 i in the low nibbles, group 2 i + 1 in the high nibbles
//   2 bits  line h: group 4 h + t in bits 2 t and 2 t + 1
//   1 bit   one line: group g in bit g
// Lines of both planes are in the order in which groups 0, 1, 2 .. need them, for a processor that fetches what comes next.
// Adapted from the layout study "P16" of this project; the bits per weight are those of the file.
#pragma once

#include <cstdint>
#include <cstring>

namespace phi4edge {

inline constexpr int kLineBytes = 64;

template <int Low, int High>
struct Planes {
  static constexpr int kLines = Low + High;  // per 32 columns

  // Puts the 32 codes of one row into the lines of one block of columns.
  static void pack(const uint8_t* codes, int row, uint8_t* lines) {
    put<Low, 0>(codes, lines + 4 * row);
    if constexpr (High > 0) put<High, Low>(codes, lines + 4 * row);
  }

  // The codes of group G of a block of 32 columns, in the rows of one register.  `lines` points at this register's first row.
  template <class V, int G>
  static typename V::Bytes group(const uint8_t* lines) {
    const auto low = get<V, Low, G, 0>(lines);
    if constexpr (High == 0) {
      return low;
    } else {
      return V::or_(low, get<V, High, G, Low>(lines));
    }
  }

 private:
  // Place of a line of the low plane, whose codes begin at bit From 0, or of the high one.
  template <int From>
  static constexpr int place(int line) {
    int n_before = 0;  // lines of the other plane
    if constexpr (From == 0) {
      while (n_before < High && n_before * Low < line * High) ++n_before;
    } else {
      while (n_before < Low && n_before * High <= line * Low) ++n_before;
    }
    return line + n_before;
  }

  // The field of group G in a plane of Bits bits, moved to bit To.
  template <class V, int Bits, int G, int To>
  static typename V::Bytes get(const uint8_t* lines) {
    constexpr int kGroupsPerLine = 8 / Bits, kFrom = G % kGroupsPerLine * Bits;
    const auto line = V::load_bytes(lines + place<To>(G / kGroupsPerLine) * kLineBytes);
    if constexpr (Bits == 8) {
      return line;
    } else {
      return V::template bit_field<kFrom, To, ((1 << Bits) - 1) << To>(line);
    }
  }

  // A plane of Bits bits, which are bits From and up of the codes; four codes at a time.
  template <int Bits, int From>
  static void put(const uint8_t* codes, uint8_t* to) {
    constexpr int kGroupsPerLine = 8 / Bits;
    constexpr uint32_t kMask = 0x01010101u * ((1u << Bits) - 1);
    for (int line = 0; line < Bits; ++line) {
      uint32_t all = 0;
      for (int t = 0; t < kGroupsPerLine; ++t) {
        uint32_t group;
        std::memcpy(&group, codes + 4 * (line * kGroupsPerLine + t), 4);
        all |= (group >> From & kMask) << (t * Bits);
      }
      std::memcpy(to + place<From>(line) * kLineBytes, &all, 4);
    }
  }
};

}  // namespace phi4edge
