// Which element of a matrix a register of a lane holds: the tables of the PTX ISA, "Matrix fragments", and no other
// copy of them. test_fragments.py compares them with CuTe's.
//
// `reg` counts a lane's registers, `half` the 16-bit elements of one register, the low one first.
#pragma once

namespace pyadapt::emulator {

struct Place {
    int row, column;
};

[[gnu::always_inline]] constexpr bool operator==(Place a, Place b) { return a.row == b.row && a.column == b.column; }

// With g = lane / 4 and t = lane % 4, as everywhere in the ISA.
[[gnu::always_inline]] constexpr int group_of(int lane) { return lane / 4; }
[[gnu::always_inline]] constexpr int member_of(int lane) { return lane % 4; }

// C and D, 16 x 8 fp32, of every shape here: reg 0..3.
[[gnu::always_inline]] constexpr Place accumulator_16x8(int lane, int reg) {
    return {group_of(lane) + 8 * (reg / 2), 2 * member_of(lane) + reg % 2};
}

// m16n8k16, 16 bits: A (16 x 16) reg 0..3, B (16 deep x 8) reg 0..1.
[[gnu::always_inline]] constexpr Place a_16x16(int lane, int reg, int half) {
    return {group_of(lane) + 8 * (reg % 2), 2 * member_of(lane) + 8 * (reg / 2) + half};
}
[[gnu::always_inline]] constexpr Place b_16x8(int lane, int reg, int half) {
    return {2 * member_of(lane) + 8 * reg + half, group_of(lane)};
}

// m16n8k8, 16 bits: A (16 x 8) reg 0..1, B (8 deep x 8) one register.
[[gnu::always_inline]] constexpr Place a_16x8(int lane, int reg, int half) {
    return {group_of(lane) + 8 * reg, 2 * member_of(lane) + half};
}
[[gnu::always_inline]] constexpr Place b_8x8(int lane, int half) {
    return {2 * member_of(lane) + half, group_of(lane)};
}

// m16n8k8, tf32: A (16 x 8) reg 0..3, B (8 deep x 8) reg 0..1.
[[gnu::always_inline]] constexpr Place a_16x8_tf32(int lane, int reg) {
    return {group_of(lane) + 8 * (reg % 2), member_of(lane) + 4 * (reg / 2)};
}
[[gnu::always_inline]] constexpr Place b_8x8_tf32(int lane, int reg) {
    return {member_of(lane) + 4 * reg, group_of(lane)};
}

// ldmatrix: the register of one 8 x 8 matrix of 16-bit elements.
[[gnu::always_inline]] constexpr Place matrix_8x8(int lane, int half) {
    return {group_of(lane), 2 * member_of(lane) + half};
}
[[gnu::always_inline]] constexpr Place matrix_8x8_transposed(int lane, int half) {
    return {matrix_8x8(lane, half).column, matrix_8x8(lane, half).row};
}

}  // namespace pyadapt::emulator
