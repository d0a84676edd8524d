// The fragment tables against NVIDIA's own layouts: CuTe's traits of the same instructions, which work on the host.
//
// A layout of CuTe maps (lane, value) to a number: row + column * rows for A (M x K) and C (M x N), and n + k * N for
// B, which it writes (N x K); those of copies map (lane, bit) to a bit of the 8 rows of 128 bits.
#include <cute/tensor.hpp>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cstdio>

#include "fragments.hpp"

namespace {

using namespace pyadapt::emulator;

int compared = 0, wrong = 0;

// `place(lane, value)` against a layout of `values` a lane, for a matrix that CuTe numbers down its first mode.
template <class Layout, class Table>
void compare(const char* name, Layout layout, int values, int rows, bool transposed, Table place) {
    int wrong_here = 0;
    if (static_cast<int>(cute::size(layout)) != 32 * values) ++wrong_here;
    for (int lane = 0; lane < 32; ++lane)
        for (int value = 0; value < values; ++value) {
            const Place at = place(lane, value);
            const int number = transposed ? at.column + at.row * rows : at.row + at.column * rows;
            ++compared;
            if (static_cast<int>(layout(lane, value)) != number) ++wrong_here;
        }
    std::printf("%s %s: %d of %d wrong\n", wrong_here ? "FAIL" : "ok", name, wrong_here, 32 * values);
    wrong += wrong_here;
}

// Of the tables that CuTe writes over single elements: value = 2 reg + half.
Place a_16_of(int lane, int value) { return a_16x16(lane, value / 2, value % 2); }
Place b_16_of(int lane, int value) { return b_16x8(lane, value / 2, value % 2); }
Place a_8_of(int lane, int value) { return a_16x8(lane, value / 2, value % 2); }
Place b_8_of(int lane, int value) { return b_8x8(lane, value); }
Place a_tf32_of(int lane, int value) { return a_16x8_tf32(lane, value); }
Place b_tf32_of(int lane, int value) { return b_8x8_tf32(lane, value); }
Place accumulator_of(int lane, int value) { return accumulator_16x8(lane, value); }
Place matrix_of(int lane, int half) { return matrix_8x8(lane, half); }
Place transposed_of(int lane, int half) { return matrix_8x8_transposed(lane, half); }

template <class Traits>
void compare_16x8x16(const char* name) {
    compare(name, typename Traits::ALayout{}, 8, 16, false, a_16_of);
    compare(name, typename Traits::BLayout{}, 4, 8, true, b_16_of);
    compare(name, typename Traits::CLayout{}, 4, 16, false, accumulator_of);
}

template <class Layout, class Table>
void compare_copy(const char* name, Layout layout, Table place) {
    int wrong_here = 0;
    for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half) {
            const Place at = place(lane, half);
            ++compared;
            if (static_cast<int>(layout(lane, 16 * half)) != at.row * 128 + at.column * 16) ++wrong_here;
        }
    std::printf("%s %s: %d of 64 wrong\n", wrong_here ? "FAIL" : "ok", name, wrong_here);
    wrong += wrong_here;
}

}  // namespace

int main() {
    using namespace cute;
    compare_16x8x16<MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>>("m16n8k16 f16");
    compare_16x8x16<MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>>("m16n8k16 bf16");

    using Half = MMA_Traits<SM75_16x8x8_F32F16F16F32_TN>;
    compare("m16n8k8 f16", Half::ALayout{}, 4, 16, false, a_8_of);
    compare("m16n8k8 f16", Half::BLayout{}, 2, 8, true, b_8_of);
    compare("m16n8k8 f16", Half::CLayout{}, 4, 16, false, accumulator_of);

    using Single = MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>;
    compare("m16n8k8 tf32", Single::ALayout{}, 4, 16, false, a_tf32_of);
    compare("m16n8k8 tf32", Single::BLayout{}, 2, 8, true, b_tf32_of);
    compare("m16n8k8 tf32", Single::CLayout{}, 4, 16, false, accumulator_of);

    compare_copy("ldmatrix", Copy_Traits<SM75_U32x1_LDSM_N>::DstLayout{}, matrix_of);
    compare_copy("ldmatrix.trans", Copy_Traits<SM75_U16x2_LDSM_T>::DstLayout{}, transposed_of);

    std::printf("%d of %d wrong\n", wrong, compared);
    return wrong || compared == 0;
}
