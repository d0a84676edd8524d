#include "lora_rows.hpp"

#include <algorithm>
#include <string>

#include "../core/checks.hpp"
#include "../core/error.hpp"
#include "dispatch.hpp"
#include "operands.hpp"

namespace pyadapt::cpu {
namespace {

// Consecutive rows of one adapter.
struct Segment {
    std::int64_t row, rows;
    std::size_t adapter;
};

template <class Integer>
std::string text(Integer n) {
    return std::to_string(n);
}

// The segments that have rows and an adapter; neighbours of the same adapter become one.
std::vector<Segment> read_segments(const Tensor& table, std::int64_t M, std::size_t adapters) {
    check_shape(table, {"segments", table.sizes[0]}, {"row and adapter", 2});
    check_dtype(table, DType::i64);
    check_rows(table);
    const auto* values = static_cast<const std::int64_t*>(table.data);
    const std::int64_t count = table.sizes[0], stride = table.strides[0];
    if (count == 0 && M > 0)
        throw ValueError("segments is empty, but x has " + text(M) + " rows; wanted one from row 0 on");
    std::vector<Segment> segments;
    for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t row = values[j * stride], adapter = values[j * stride + 1];
        const std::int64_t end = j + 1 < count ? values[(j + 1) * stride] : M;
        if (j == 0 && row != 0) throw ValueError("segments starts at row " + text(row) + "; wanted 0");
        if (row > M)
            throw ValueError("segments[" + text(j) + "] starts at row " + text(row) + ", but x has " + text(M));
        if (end < row && j + 1 < count)
            throw ValueError("segments[" + text(j + 1) + "] starts at row " + text(end) + ", before segments[" +
                             text(j) + "] at " + text(row) + "; wanted ascending rows");
        if (adapter < -1 || adapter >= static_cast<std::int64_t>(adapters))
            throw ValueError("segments[" + text(j) + "] asks for adapter " + text(adapter) + " of " +
                             text(adapters) + "; wanted -1 for none, or an index below that");
        if (adapter < 0 || end == row) continue;
        const auto index = static_cast<std::size_t>(adapter);
        if (!segments.empty() && segments.back().adapter == index && segments.back().row + segments.back().rows == row)
            segments.back().rows += end - row;
        else
            segments.push_back({row, end - row, index});
    }
    return segments;
}

// The rows of each adapter, as depth steps of the sums over them.
std::vector<std::vector<Steps>> rows_of_adapters(const std::vector<Segment>& segments, std::size_t adapters) {
    std::vector<std::vector<Steps>> rows(adapters);
    for (const Segment& segment : segments) rows[segment.adapter].push_back({segment.row, segment.rows});
    return rows;
}

SegmentProduct product_into(const Tensor& out, const Operand& left, const Operand& right) {
    SegmentProduct product;
    product.rows = out.sizes[0];
    product.cols = out.sizes[1];
    product.left = left;
    product.right = right;
    product.out = out.data;
    product.out_dtype = out.dtype;
    product.out_stride = out.strides[0];
    return product;
}

// A product for the rows of one segment.
SegmentProduct rows_product(const Segment& segment, std::int64_t cols, const Tensor& out, const Operand& left,
                            const Operand& right, const Steps& depth) {
    SegmentProduct product = product_into(out, left, right);
    product.row = segment.row;
    product.rows = segment.rows;
    product.cols = cols;
    product.steps = &depth;
    product.ranges = 1;
    return product;
}

// A product summed over all rows of one adapter.
SegmentProduct sum_product(const std::vector<Steps>& rows, const Tensor& out, const Operand& left,
                           const Operand& right) {
    SegmentProduct product = product_into(out, left, right);
    product.steps = rows.data();
    product.ranges = static_cast<std::int64_t>(rows.size());
    return product;
}

// The second products read what the first ones write.
void run(std::vector<SegmentProduct>& first, std::vector<SegmentProduct>& second, int threads) {
    static_assert(most_stages >= 2);
    const auto stage = [](std::vector<SegmentProduct>& products) {
        return SegmentStage{products.data(), static_cast<std::int64_t>(products.size())};
    };
    const SegmentStage stages[] = {stage(first), stage(second)};
    kernels().segments(stages, 2, threads);
}

// The depth of the products that go back from S or dS.
std::vector<Steps> ranks_of(const std::vector<Adapter>& adapters) {
    std::vector<Steps> ranks;
    for (const Adapter& adapter : adapters) ranks.push_back({0, adapter.A->sizes[0]});
    return ranks;
}

float scaling_of(const Adapter& adapter) { return static_cast<float>(adapter.scaling); }

// --- checks ---

// The largest rank.
std::int64_t check_adapters(const std::vector<Adapter>& adapters, std::int64_t N, std::int64_t K) {
    std::int64_t largest = 0;
    for (const Adapter& adapter : adapters) {
        check_two_dimensional(*adapter.A);
        const std::int64_t r = adapter.A->sizes[0];
        check_matrix(*adapter.A, {"r", r}, {"K", K});
        check_matrix(*adapter.B, {"N", N}, {"r", r});
        largest = std::max(largest, r);
    }
    return largest;
}

void check_S(const Tensor& S, std::int64_t M, std::int64_t rank) {
    check_two_dimensional(S);
    check_result(S, {"M", M}, {"R", std::max(S.sizes[1], rank)});
    check_dtype(S, DType::f32);
}

// Where no adapter writes: rows of the base layer, and the columns beyond a smaller rank.
void clear_rest(const Tensor& S, const std::vector<Segment>& segments, const std::vector<Adapter>& adapters) {
    auto* values = static_cast<float*>(S.data);
    const auto clear = [&](std::int64_t first, std::int64_t end, std::int64_t from) {
        for (std::int64_t m = first; m < end; ++m)
            std::fill(values + m * S.strides[0] + from, values + m * S.strides[0] + S.sizes[1], 0.0f);
    };
    std::int64_t row = 0;
    for (const Segment& segment : segments) {
        clear(row, segment.row, 0);
        row = segment.row + segment.rows;
        clear(segment.row, row, adapters[segment.adapter].A->sizes[0]);
    }
    clear(row, S.sizes[0], 0);
}

}  // namespace

void lora_rows_forward(const Tensor& x, const std::vector<Adapter>& adapters, const Tensor& segments, const Tensor& S,
                       const Tensor& y, int threads) {
    check_two_dimensional(x);
    check_two_dimensional(y);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], N = y.sizes[1];
    check_matrix(x, {"M", M}, {"K", K});
    check_S(S, M, check_adapters(adapters, N, K));
    check_result(y, {"M", M}, {"N", N});
    const std::vector<Segment> parts = read_segments(segments, M, adapters.size());
    clear_rest(S, parts, adapters);

    const Steps features = {0, K};
    const std::vector<Steps> ranks = ranks_of(adapters);
    std::vector<SegmentProduct> shrink, expand;
    for (const Segment& part : parts) {
        const Adapter& adapter = adapters[part.adapter];
        const Steps& rank = ranks[part.adapter];
        const Operand left = dropped(rows_of(x), adapter.dropout);
        shrink.push_back(rows_product(part, rank.count, S, left, rows_of(*adapter.A), features));
        expand.push_back(rows_product(part, N, y, rows_of(S), rows_of(*adapter.B), rank));
        expand.back().alpha = scaling_of(adapter);
        expand.back().add_out = true;
    }
    run(shrink, expand, threads);
}

void lora_rows_backward(const Tensor& g, const Tensor& x, const std::vector<Adapter>& adapters, const Tensor& segments,
                        const Tensor& S, const Tensor* dx, const std::vector<Tensor>& dA, const std::vector<Tensor>& dB,
                        int threads) {
    check_two_dimensional(g);
    check_two_dimensional(x);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], N = g.sizes[1];
    check_matrix(g, {"M", M}, {"N", N});
    check_matrix(x, {"M", M}, {"K", K});
    const std::int64_t R = check_adapters(adapters, N, K);
    check_S(S, M, R);
    if (dx) check_result(*dx, {"M", M}, {"K", K});
    if (dA.size() != adapters.size() || dB.size() != adapters.size())
        throw ValueError("dA has " + text(dA.size()) + " and dB " + text(dB.size()) +
                         " entries; wanted one for each of the " + text(adapters.size()) + " adapters");
    for (std::size_t a = 0; a < adapters.size(); ++a) {
        const std::int64_t r = adapters[a].A->sizes[0];
        check_result(dA[a], {"r", r}, {"K", K});
        check_result(dB[a], {"N", N}, {"r", r});
    }
    const std::vector<Segment> parts = read_segments(segments, M, adapters.size());
    const std::vector<std::vector<Steps>> rows = rows_of_adapters(parts, adapters.size());

    std::vector<float> memory(static_cast<std::size_t>(M * R));
    const Tensor dS = {"dS", memory.data(), DType::f32, 2, {M, R}, {R, 1}};
    const Steps outputs = {0, N};
    const std::vector<Steps> ranks = ranks_of(adapters);
    std::vector<SegmentProduct> of_g, of_dS;
    for (const Segment& part : parts) {
        const Adapter& adapter = adapters[part.adapter];
        const Steps& rank = ranks[part.adapter];
        of_g.push_back(rows_product(part, rank.count, dS, rows_of(g), columns_of(*adapter.B), outputs));
        of_g.back().alpha = scaling_of(adapter);
        if (!dx) continue;
        of_dS.push_back(rows_product(part, K, *dx, rows_of(dS), columns_of(*adapter.A), rank));
        of_dS.back().mask = &adapter.dropout;
        of_dS.back().add_out = true;
    }
    for (std::size_t a = 0; a < adapters.size(); ++a) {
        of_g.push_back(sum_product(rows[a], dB[a], columns_of(g), columns_of(S)));
        of_g.back().alpha = scaling_of(adapters[a]);
        of_dS.push_back(sum_product(rows[a], dA[a], columns_of(dS), dropped(columns_of(x), adapters[a].dropout)));
    }
    run(of_g, of_dS, threads);
}

}  // namespace pyadapt::cpu
