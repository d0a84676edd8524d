// quantize.cu: bit for bit the formula of pyadapt/ops/quantize.py.
#include "support.hpp"

namespace {

using namespace driver;
using pyadapt::cuda::Dequantize;
using pyadapt::cuda::Quantize;

struct Layout {
    int rows, columns;
    int gap = 0;    // elements between the rows of the floating matrix
    int q_gap = 0;  // the same of q
    int shift = 0;  // elements of both between an aligned address and the first
    std::int64_t stride() const { return columns + gap; }
    std::int64_t q_stride() const { return columns + q_gap; }
    std::int64_t count() const { return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride() + columns; }
    std::int64_t q_count() const { return rows == 0 || columns == 0 ? 0 : (rows - 1) * q_stride() + columns; }
    std::string name() const {
        return std::to_string(rows) + "x" + std::to_string(columns) +
               (gap || q_gap ? " gaps " + std::to_string(gap) + " " + std::to_string(q_gap) : "") +
               (shift ? " shift " + std::to_string(shift) : "");
    }
};

void check_quantize(Check& check, const Array& w, const Layout& layout) {
    Array q(DType::i8, layout.q_count(), layout.shift), scale(DType::f32, layout.rows, 1);
    const Quantize pass = {layout.rows,         layout.columns,    w.data(),         w.dtype(), layout.stride(),
                           q.as<std::int8_t>(), layout.q_stride(), scale.as<float>()};
    check.succeeded(pyadapt::cuda::quantize(pass, launch_settings()));
    for (int row = 0; row < layout.rows; ++row) {
        float peak = 0;
        bool finite = true;
        for (int k = 0; k < layout.columns; ++k) {
            const auto magnitude = static_cast<float>(std::fabs(w.get(row * layout.stride() + k)));
            finite = finite && std::isfinite(magnitude);
            peak = std::fmax(peak, magnitude);
        }
        const float want = finite ? peak / 127.0f : NAN;
        check(scale.get(row), want, 0, "scale", row);
        for (int k = 0; k < layout.q_stride(); ++k) {
            const std::int64_t i = row * layout.q_stride() + k;
            if (k < layout.columns) {
                const auto value = static_cast<float>(w.get(row * layout.stride() + k));
                const float level = std::nearbyint(value / (want > 0 ? want : 1.0f));
                check(q.get(i), finite ? std::fmin(std::fmax(level, -127.0f), 127.0f) : 0, 0, "q", i);
            } else if (i < layout.q_count()) {
                check(q.get(i), -1, 0, "a gap of q", i);  // as it was
            }
        }
    }
}

void check_dequantize(Check& check, DType dtype, const Layout& layout, bool scaled, float factor) {
    Random random(5);
    const Array q = Array::random(DType::i8, layout.q_count(), random, layout.shift);
    const Array scale = Array::random(DType::f32, layout.rows, random, 1, 1e-4, 2e-2);
    Array out(dtype, layout.count(), layout.shift);
    const Dequantize pass = {layout.rows, layout.columns, q.as<std::int8_t>(), layout.q_stride(),
                             scaled ? scale.as<float>() : nullptr, factor, out.data(), dtype, layout.stride()};
    check.succeeded(pyadapt::cuda::dequantize(pass, launch_settings()));
    Array want(dtype, 1);
    for (int row = 0; row < layout.rows; ++row)
        for (int k = 0; k < layout.stride(); ++k) {
            const std::int64_t i = row * layout.stride() + k;
            if (k < layout.columns) {
                const auto level = static_cast<float>(q.get(row * layout.q_stride() + k));
                want.set(0, level * (scaled ? static_cast<float>(scale.get(row)) : 1.0f) * factor);
                check(out.get(i), want.get(0), 0, "out", i);
            } else if (i < layout.count()) {
                check(out.get(i), NAN, 0, "a gap of out", i);  // as it was
            }
        }
}

// Rows that are hard: zeros, the smallest numbers, a tie in every element, NaN and infinities.
Array hard_rows(DType dtype, const Layout& layout) {
    Random random(7);
    Array w = Array::random(dtype, layout.count(), random);
    for (int k = 0; k < layout.columns; ++k) {
        const std::int64_t stride = layout.stride();
        w.set(0 * stride + k, 0);
        w.set(1 * stride + k, k % 3 ? 0x1p-133 : -0x1p-126);
        w.set(2 * stride + k, k == 0 ? 127 : k % 200 - 99.5);
    }
    // Halves of a level within rounding: where a product with 1 / scale goes another way than a division.
    const float step = 0.7f / 127;
    for (int k = 0; k < layout.columns; ++k) w.set(6 * layout.stride() + k, k ? step * (k % 252 - 125.5f) : 0.7f);
    w.set(3 * layout.stride() + layout.columns - 1, NAN);
    w.set(4 * layout.stride() + layout.columns / 2, INFINITY);
    w.set(5 * layout.stride(), -INFINITY);
    w.set(5 * layout.stride() + 1, NAN);
    return w;
}

std::vector<Case> cases() {
    std::vector<Case> list;
    const std::vector<Layout> layouts = {
        {1, 1},       {5, 8},         {3, 16},        {7, 37},           {4, 320, 64, 64}, {3, 328, 8, 16, 8},
        {3, 328, 3},  {3, 328, 0, 3}, {3, 250, 7, 7}, {3, 320, 0, 0, 3}, {2, 9000},        {0, 5},
        {3, 0},
    };
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        const std::string suffix = std::string(" ") + pyadapt::name_of(dtype);
        for (const Layout& layout : layouts) {
            list.push_back({"quantize " + layout.name() + suffix, [=](Check& check) {
                                Random random(3);
                                const double size = layout.rows > 4 ? 1e-3 : 3;
                                const Array w =
                                    Array::random(dtype, layout.count(), random, layout.shift, -size, size);
                                check_quantize(check, w, layout);
                            }});
            list.push_back({"dequantize " + layout.name() + suffix,
                            [=](Check& check) { check_dequantize(check, dtype, layout, true, 1.0f); }});
        }
        for (const Layout& layout : {Layout{7, 300}, Layout{7, 304, 16}})
            list.push_back({"quantize hard " + layout.name() + suffix,
                            [=](Check& check) { check_quantize(check, hard_rows(dtype, layout), layout); }});
        list.push_back({"dequantize by a factor" + suffix,
                        [=](Check& check) { check_dequantize(check, dtype, {9, 40}, true, 0x1p-8f); }});
        list.push_back({"dequantize without scale" + suffix,
                        [=](Check& check) { check_dequantize(check, dtype, {9, 41}, false, 0.5f); }});
        list.push_back({"dequantize many rows" + suffix,
                        [=](Check& check) { check_dequantize(check, dtype, {1100, 8}, true, 1.0f); }});
    }
    return list;
}

}  // namespace

int main(int argc, char** argv) { return driver::run(argc, argv, cases()); }
