// What the emulated instructions compute, on this architecture: shuffles, votes, matrices (test_runtime.py).
#include "emulated_primitives.hpp"
#include "support.hpp"

namespace {

using namespace pyadapt::emulator;
using namespace pyadapt::cuda;
using driver::Array;
using driver::Check;
using driver::DType;
using driver::Random;

constexpr unsigned full = 0xffffffffu;

void shuffles(Check& check) {
    launch({1}, {64}, 0, [&] {
        const int lane = threadIdx.x % 32, mine = static_cast<int>(threadIdx.x) + 1000, warp = mine - lane;
        for (int by = 0; by < 32; ++by) {
            const int index = __shfl_sync(full, mine, by), over = __shfl_xor_sync(full, mine, by);
            const int up = __shfl_up_sync(full, mine, by), down = __shfl_down_sync(full, mine, by);
            check(index, warp + by, 0, "shfl", by);
            check(over, warp + (lane ^ by), 0, "shfl xor", by);
            check(up, lane >= by ? mine - by : mine, 0, "shfl up", by);
            check(down, lane + by < 32 ? mine + by : mine, 0, "shfl down", by);
        }
        check(__shfl_sync(full, 0.25f * static_cast<float>(lane), 37), 1.25, 0, "shfl of a lane modulo 32");
    });
}

// Segments of eight lanes: the operands that nvcc makes of a width of 8.
void segments(Check& check) {
    launch({1}, {32}, 0, [&] {
        const unsigned lane = threadIdx.x, within = lane % 8, first = lane - within;
        bool valid = false;
        unsigned got = shuffle(lane, Shuffle::index, 3, (24u << 8) | 31, valid);
        check(got, first + 3, 0, "index");
        got = shuffle(lane, Shuffle::down, 3, (24u << 8) | 31, valid);
        check(got, within + 3 < 8 ? lane + 3 : lane, 0, "down");
        check(valid, within + 3 < 8, 0, "down is within");
        got = shuffle(lane, Shuffle::up, 3, 24u << 8, valid);
        check(got, within >= 3 ? lane - 3 : lane, 0, "up");
        check(valid, within >= 3, 0, "up is within");
        got = shuffle(lane, Shuffle::butterfly, 5, (24u << 8) | 31, valid);
        check(got, lane ^ 5, 0, "butterfly");
    });
}

void votes(Check& check) {
    launch({1}, {64}, 0, [&] {
        check(__ballot_sync(full, threadIdx.x % 3 == 0), threadIdx.x < 32 ? 0x49249249u : 0x92492492u, 0, "ballot");
        check(__any_sync(full, threadIdx.x == 40), threadIdx.x >= 32, 0, "any");
        check(__all_sync(full, threadIdx.x != 40), threadIdx.x < 32, 0, "all");
    });
}

void bits(Check& check) {
    check(__umulhi(0xD2511F53u, 0xFFFFFFFFu), 0xD2511F52u, 0, "umulhi");
    check(__byte_perm(0x33221100u, 0x77665544u, 0x5140u), 0x55114400u, 0, "byte_perm");
    check(__byte_perm(0x33228100u, 0x77665544u, 0x0098u), 0x0000FF00u, 0, "byte_perm of a sign");
    check(__float_as_uint(1.0f), 0x3f800000u, 0, "float_as_uint");
    check(__float2int_rn(2.5f), 2, 0, "float2int");
    check(__float2int_rn(-3.5f), -4, 0, "float2int");
    check(__float2int_rn(3e9f), 2147483647.0, 0, "float2int");
    check(min(3, -4), -4, 0, "min");
    check(max(2.0f, NAN), 2, 0, "max");
}

void rounding(Check& check) {
#if PYADAPT_ARCH >= 800
    check(round_tf32(1 + 0x1p-11f), 1 + 0x1p-10, 0, "a tie goes away from zero");
    check(round_tf32(-1 - 0x1p-11f), -1 - 0x1p-10, 0, "a tie goes away from zero");
    check(round_tf32(1 + 0x1.ffcp-12f), 1, 0, "just below a tie");
    check(round_tf32(65504), 65504, 0, "an fp16 value");
    check(round_tf32(0x1.fep100f), 0x1.fep100, 0, "a bf16 value");
#else
    check(round_tf32(1 + 0x1p-23f), 1 + 0x1p-23, 0, "nothing is rounded");
#endif
    check(round_tf32(INFINITY), INFINITY, 0, "infinity");
    check(round_tf32(NAN), NAN, 0, "NaN");
}

// One product by a warp: a (16 x 16) and b (8 x 16, row n along the depth) through shared memory and ldmatrix.
template <class T>
void product(Check& check, const Array& a, const Array& b, double tolerance) {
    constexpr int row_bytes = 32;
    float out[32][4];
    launch({1}, {32}, 24 * row_bytes, [&] {
        unsigned char* shared = shared_memory();
        const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
        for (int i = lane; i < 16 * row_bytes; i += 32) shared[i] = a.as<unsigned char>()[i];
        for (int i = lane; i < 8 * row_bytes; i += 32) shared[16 * row_bytes + i] = b.as<unsigned char>()[i];
        __syncwarp();
        std::uint32_t a_registers[4], b_pairs[4];
        load_matrix_x4(a_registers, shared + lane % 16 * row_bytes + lane / 16 * 16);
        load_matrix_x4(b_pairs, shared + (16 + lane % 8) * row_bytes + lane / 8 % 2 * 16);
        float d[4];
        for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(100 * (g + i / 2 * 8) + 2 * t + i % 2);
        mma_16x8x16(d, a_registers, {b_pairs[0], b_pairs[1]}, T());
        for (int i = 0; i < 4; ++i) out[lane][i] = d[i];
    });
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) {
            double sum = 100 * m + n;
            for (int k = 0; k < 16; ++k) sum += a.get(m * 16 + k) * b.get(n * 16 + k);
            check(out[m % 8 * 4 + n / 2][m / 8 * 2 + n % 2], static_cast<float>(sum), tolerance, "d", m * 8 + n);
        }
    check.allow_conflicts(1000);  // rows of 32 bytes are not how a kernel should lay them out
}

template <class T>
void products(Check& check, DType dtype) {
    Random random(3);
    product<T>(check, Array::random(dtype, 256, random), Array::random(dtype, 128, random), 1e-3);
    Array a(dtype, 256), b(dtype, 128);
    for (int i = 0; i < 256; ++i) a.set(i, i / 16 == i % 16 ? 1 : 0);
    for (int i = 0; i < 128; ++i) b.set(i, i);  // d is b transposed: whatever is at a wrong place shows
    product<T>(check, a, b, 0);
    for (int i = 0; i < 128; ++i) b.set(i, 0);
    b.set(21, INFINITY), b.set(40, NAN), b.set(3, dtype == DType::f16 ? 0x1p-24 : 0x1p-130);
    for (int i = 0; i < 256; ++i) a.set(i, 1);
    product<T>(check, a, b, 0);
}

void half_products(Check& check) { products<__half>(check, DType::f16); }
void bfloat_products(Check& check) { products<__nv_bfloat16>(check, DType::bf16); }

// a (16 x 8), b (8 x 8): tf32 sees 10 bits of mantissa, whatever stands below them.
void single_products(Check& check) {
    Random random(4);
    const Array a = Array::random(DType::f32, 128, random), b = Array::random(DType::f32, 64, random);
    float out[32][4];
    launch({1}, {32}, 0, [&] {
        const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
        float d[4] = {1, 1, 1, 1};
        mma_16x8x8(d,
                   {static_cast<float>(a.get(g * 8 + t)), static_cast<float>(a.get((g + 8) * 8 + t)),
                    static_cast<float>(a.get(g * 8 + t + 4)), static_cast<float>(a.get((g + 8) * 8 + t + 4))},
                   {static_cast<float>(b.get(t * 8 + g)), static_cast<float>(b.get((t + 4) * 8 + g))});
        for (int i = 0; i < 4; ++i) out[lane][i] = d[i];
    });
    const auto seen = [](double value) -> double {
        const float single = static_cast<float>(value);
        return PYADAPT_ARCH < 800 ? single : __uint_as_float(__float_as_uint(single) & 0xffffe000u);
    };
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) {
            double sum = 1;
            for (int k = 0; k < 8; ++k) sum += seen(a.get(m * 8 + k)) * seen(b.get(k * 8 + n));
            check(out[m % 8 * 4 + n / 2][m / 8 * 2 + n % 2], sum, 2e-6, "d", m * 8 + n);
        }
}

void matrices(Check& check) {
    launch({1}, {32}, 512, [&] {
        auto* elements = reinterpret_cast<std::uint16_t*>(shared_memory());
        const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
        for (unsigned i = lane; i < 256; i += 32) elements[i] = static_cast<std::uint16_t>(i);
        __syncwarp();
        std::uint32_t r[4];
        load_matrix_x4(r, elements + 8 * lane);
        for (unsigned j = 0; j < 4; ++j) {
            const unsigned first = 64 * j + 8 * g + 2 * t;
            check(r[j], first | (first + 1) << 16, 0, "ldmatrix", j);
        }
        load_matrix_x4_transposed(r, elements + 8 * lane);
        for (unsigned j = 0; j < 4; ++j) {
            const unsigned first = 64 * j + 8 * (2 * t) + g;
            check(r[j], first | (first + 8) << 16, 0, "ldmatrix.trans", j);
        }
    });
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<driver::Case> cases = {{"shuffles", shuffles},
                                       {"segments", segments},
                                       {"votes", votes},
                                       {"bits", bits},
                                       {"rounding", rounding},
                                       {"fp16 products", half_products},
                                       {"fp32 products", single_products},
                                       {"matrices", matrices}};
    if (driver::has_bf16) cases.push_back({"bf16 products", bfloat_products});
    return driver::run(argc, argv, cases);
}
