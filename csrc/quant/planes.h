// How the integer codes of a quantised panel lie in memory.
//
// A panel holds 16 rows.  Its codes come in lines of 64 bytes; byte 4 r + b of a line belongs to row r, so one line is one
// operand of a "4 products per 32-bit lane" instruction with 16 lanes = 16 rows (8 and 8 with 256-bit registers, and so on).
// "Group" g of a block of 32 columns is columns 4 g .. 4 g + 3, and b counts within it.
//
// A code of LOW + HIGH bits is split in two planes; a block of 32 columns takes LOW + HIGH lines, low plane first:
//   8 bits  line g: group g
//   4 bits  line i: group 2 i in the low nibbles, group 2 i + 1 in the high nibbles
//   2 bits  line h: group 4 h + t in bits 2 t and 2 t + 1
//   1 bit   one line: group g in bit g
// Adapted from the layout study "P16" of this project; the bits per weight are those of the file.
#pragma once

#include <cstdint>

namespace phi4edge {

inline constexpr int kLineBytes = 64;

template <int Low, int High>
struct Planes {
  static constexpr int kLines = Low + High;  // per 32 columns

  // Adds the 32 codes of one row to the (zeroed) lines of one block of columns.
  static void pack(const uint8_t* codes, int row, uint8_t* lines) {
    for (int column = 0; column < 32; ++column) {
      const int group = column / 4, byte = 4 * row + column % 4;
      put<Low>(codes[column] & ((1 << Low) - 1), group, lines + byte);
      if constexpr (High > 0) put<High>(codes[column] >> Low, group, lines + Low * kLineBytes + byte);
    }
  }

  // The codes of group G of a block of 32 columns, in the rows of one register.  `lines` points at this register's first row.
  template <class V, int G>
  static typename V::Bytes group(const uint8_t* lines) {
    const auto low = get<V, Low, G, 0>(lines);
    if constexpr (High == 0) {
      return low;
    } else {
      return V::or_(low, get<V, High, G, Low>(lines + Low * kLineBytes));
    }
  }

 private:
  // The field of group G in a plane of Bits bits, moved to bit To.
  template <class V, int Bits, int G, int To>
  static typename V::Bytes get(const uint8_t* lines) {
    constexpr int kGroupsPerLine = 8 / Bits, kFrom = G % kGroupsPerLine * Bits;
    const auto line = V::load_bytes(lines + G / kGroupsPerLine * kLineBytes);
    if constexpr (Bits == 8) {
      return line;
    } else {
      return V::template bit_field<kFrom, To, ((1 << Bits) - 1) << To>(line);
    }
  }

  template <int Bits>
  static void put(int field, int group, uint8_t* byte_of_first_line) {
    constexpr int kGroupsPerLine = 8 / Bits;
    uint8_t& byte = byte_of_first_line[group / kGroupsPerLine * kLineBytes];
    byte = uint8_t(byte | field << (group % kGroupsPerLine * Bits));
  }
};

}  // namespace phi4edge
