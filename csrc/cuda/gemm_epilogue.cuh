// What follows the depth loop, on sums that have been settled: the scale of the columns, the low-rank term, bias, out.
#pragma once

#include "gemm_tile.cuh"
#include "philox.cuh"

namespace pyadapt::cuda::gemm_parts {

constexpr int rank_step = 16;
using RankRow = Panel<1, rank_step * 4>;  // of low_left or low_right in shared memory, in fp32

// What waits in shared memory, beside the panels, for the end of the depth loop.
template <class Tile>
struct alignas(16) Terms {
    float factor[Tile::columns], bias[Tile::columns];
    int row, column;  // of the tile's corner
};

template <class T, bool exchanged, class Tile>
struct Epilogue {
    static constexpr int pairs = Tile::across / 2;
    // Of low_left and low_right. They take the place of the panels.
    static constexpr int shared_bytes = (Tile::rows + Tile::columns) * RankRow::row_bytes;

    const Gemm& product;
    int row0, column0;  // the tile's corner
    int rows, columns;  // from there on
    bool wide;          // out takes four elements at once

    __device__ __forceinline__ Epilogue(const Gemm& product, int row0, int column0, bool wide)
        : product(product),
          row0(row0),
          column0(column0),
          rows(product.M - row0),
          columns(product.N - column0),
          wide(wide) {}
    // The corner is read anew for each part of the work, lest the compiler keep what it computed for one part in
    // registers until another: there are none to spare.
    __device__ __forceinline__ Epilogue(const Gemm& product, const volatile Terms<Tile>& terms, bool wide)
        : Epilogue(product, terms.row, terms.column, wide) {}

    Place<Tile> place;
    unsigned g = place.lane / 4, t = place.lane % 4;

    // This lane's places in the tile: row h of slab i, and the first of the four columns of pair p.
    __device__ __forceinline__ int row(int i, int h) const { return place.row + 16 * i + 8 * h + g; }
    __device__ __forceinline__ int column(int p) const {
        return place.column + 16 * p + 4 * group_of_lane<exchanged>(t);
    }
    static __device__ __forceinline__ float& at(Accumulators<Tile>& sums, int i, int h, int p, int c) {
        return sums[i][2 * p + c / 2][2 * h + c % 2];
    }

    // f(i, h, p, of_out) for each four elements of this lane that begin inside out.
    template <class Function>
    __device__ __forceinline__ void each_four(Function f) const {
        const std::int64_t first = (row0 + std::int64_t(row(0, 0))) * product.out_stride + column0 + column(0);
        T* line = static_cast<T*>(product.out) + first;
#pragma unroll
        for (int i = 0; i < Tile::down; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int p = 0; p < pairs; ++p)
                    if (row(i, h) < rows && column(p) < columns) f(i, h, p, line + 16 * p);
                line += 8 * product.out_stride;
            }
    }
    __device__ __forceinline__ bool whole(int p) const { return wide && columns - column(p) >= 4; }

    __device__ __forceinline__ void add_out(Accumulators<Tile>& sums) const {
        each_four([&](int i, int h, int p, const T* from) {
            if (whole(p)) {
                const uint2 words = *reinterpret_cast<const uint2*>(from);
                const float2 first = unpack<T>(words.x), second = unpack<T>(words.y);
                at(sums, i, h, p, 0) += first.x, at(sums, i, h, p, 1) += first.y;
                at(sums, i, h, p, 2) += second.x, at(sums, i, h, p, 3) += second.y;
            } else {
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (c < columns - column(p)) at(sums, i, h, p, c) += to_float(from[c]);
            }
        });
    }

    // What each column is multiplied by, and its bias. Called before the depth loop, which hides the way of the loads.
    __device__ __forceinline__ void stage_terms(Terms<Tile>& terms) const {
        static_assert(Tile::columns <= Tile::threads);
        const int n = threadIdx.x;
        if (n == 0) terms.row = row0, terms.column = column0;
        if (n >= Tile::columns) return;
        float factor = product.alpha, bias = 0;
        if (n < columns) {
            const std::int64_t column = std::int64_t(column0) + n;
            if (product.column_scale) factor *= product.column_scale[column];
            if (product.bias) bias = load_element(product.bias, product.bias_dtype, column);
        }
        terms.factor[n] = factor;
        terms.bias[n] = bias;
    }

    __device__ __forceinline__ void scale_columns(Accumulators<Tile>& sums, const Terms<Tile>& terms) const {
#pragma unroll
        for (int p = 0; p < pairs; ++p) {
            const float4 factor = *reinterpret_cast<const float4*>(terms.factor + column(p));
#pragma unroll
            for (int i = 0; i < Tile::down; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    at(sums, i, h, p, 0) *= factor.x, at(sums, i, h, p, 1) *= factor.y;
                    at(sums, i, h, p, 2) *= factor.z, at(sums, i, h, p, 3) *= factor.w;
                }
        }
    }

    // Which of this lane's elements in slab i survive: four bits for each call of Philox, row by row. A loop, not
    // eight copies of the generator.
    __device__ __forceinline__ std::uint32_t survivors(const Philox& philox, int i) const {
        constexpr int calls = 2 * pairs;
        static_assert(4 * calls <= 32);
        std::uint32_t bits = 0;
#pragma unroll 1
        for (int call = 0; call < calls; ++call) {
            const std::uint64_t m = std::uint64_t(row0) + row(i, call / pairs);
            const std::uint32_t n = std::uint32_t(column0) + column(call % pairs);
            const uint4 draws = philox(m, n / 4);
            const std::uint32_t four = kept(product.dropout, draws.x) | kept(product.dropout, draws.y) << 1 |
                                       kept(product.dropout, draws.z) << 2 | kept(product.dropout, draws.w) << 3;
            bits |= four << 4 * call;
        }
        return bits;
    }

    // Where a rank of the 16 staged ones lies, in floats, in a block of 16 rows: as the fragments of mma_16x8x8 take
    // it. The order within a sum is free: lane t has ranks 4t and 4t + 1 in the first step, the next two in the
    // second.
    //   left:  16 bytes hold the two ranks of rows g and g + 8, a whole fragment of a lane;
    //   right: 16 bytes hold the four ranks of column g, both steps' fragments.
    static __device__ __forceinline__ unsigned place_left(unsigned row, unsigned rank) {
        return (rank / 2 % 2 * 32 + row % 8 * 4 + rank / 4) * 4 + rank % 2 * 2 + row / 8;
    }
    static __device__ __forceinline__ unsigned place_right(unsigned column, unsigned rank) {
        return RankRow::offset(fragment_column<exchanged>(column), rank / 4) / 4 + rank % 4;
    }

    // Ranks first .. first + 15 of `count` rows from `corner` on, times the factor and rounded for the tensor cores;
    // zeros outside. Threads go along the unit stride, a thread from one 16 x 16 block to the next: one address, and
    // four loads on their way.
    template <int count, bool is_left>
    __device__ __forceinline__ void stage(float* to, const Matrix& from, int corner, int inside, int first,
                                          float factor) const {
        constexpr unsigned share = rank_step * rank_step / Tile::threads;  // ranks of a thread in a block
        const bool along_rows = from.row_stride == 1;
        const unsigned row = along_rows ? threadIdx.x % 16 : threadIdx.x / (16 / share);
        const unsigned rank = share * (along_rows ? threadIdx.x / 16 : threadIdx.x % (16 / share));
        unsigned place[share];
#pragma unroll
        for (unsigned s = 0; s < share; ++s)
            place[s] = is_left ? place_left(row, rank + s) : place_right(row, rank + s);
        std::int64_t index =
            (corner + std::int64_t(row)) * from.row_stride + (first + std::int64_t(rank)) * from.column_stride;
#pragma unroll 2
        for (unsigned block = 0; block < count; block += 16) {
#pragma unroll
            for (unsigned s = 0; s < share; ++s) {
                float value = 0;
                if (int(block + row) < inside && int(rank + s) < product.rank - first)
                    value = factor * load_element(from.data, from.dtype, index + s * from.column_stride);
                to[place[s] + block * rank_step] = round_tf32(value);
            }
            index += 16 * from.row_stride;
        }
    }

    // sums += mask(the staged ranks' term). The mask falls on each step's part alone: a sum of masked parts is the
    // masked sum.
    __device__ __forceinline__ void add_staged(Accumulators<Tile>& sums, const float* left, const float* right,
                                               const std::uint32_t (&mask)[Tile::down]) const {
        const float4* a = reinterpret_cast<const float4*>(left + place.row * rank_step + place_left(g, 4 * t));
        const float4* b = reinterpret_cast<const float4*>(right + place.column * rank_step + RankRow::offset(g, t) / 4);
#pragma unroll
        for (int i = 0; i < Tile::down; ++i) {
            const float4 first = a[64 * i], second = a[64 * i + 32];
#pragma unroll
            for (int j = 0; j < Tile::across; ++j) {
                __syncwarp();  // keeps the compiler from loading all at once, for which there are no registers
                const float4 both = b[32 * j];
                float part[4] = {};
                mma_16x8x8(part, {first.x, first.y, first.z, first.w}, {both.x, both.y});
                mma_16x8x8(part, {second.x, second.y, second.z, second.w}, {both.z, both.w});
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int call = e / 2 * pairs + j / 2;
                    sums[i][j][e] += mask[i] >> (4 * call + j % 2 * 2 + e % 2) & 1 ? part[e] : 0;
                }
            }
        }
    }

    __device__ __forceinline__ void add_low_rank(Accumulators<Tile>& sums, unsigned char* shared,
                                                 const Terms<Tile>& terms) const {
        float* left = reinterpret_cast<float*>(shared);
        float* right = left + Tile::rows * rank_step;
        const Matrix low_left = {product.low_left, DType::f32, product.rank, 1};
        const bool dropout = product.dropout.threshold != 0;
        const Philox philox = dropout ? philox_of(product.dropout) : Philox{};
        std::uint32_t mask[Tile::down];
#pragma unroll
        for (int i = 0; i < Tile::down; ++i) mask[i] = dropout ? survivors(philox, i) : ~0u;
        for (int first = 0; first < product.rank; first += rank_step) {
            __syncthreads();  // all have read what lies there
            const Epilogue now(product, terms, wide);
            stage<Tile::rows, true>(left, low_left, now.row0, now.rows, first, 1);
            stage<Tile::columns, false>(right, product.low_right, now.column0, now.columns, first,
                                        product.low_scale * product.dropout.scale);
            __syncthreads();
            add_staged(sums, left, right, mask);
        }
    }

    // out = sums + bias, rounded once.
    __device__ __forceinline__ void store(Accumulators<Tile>& sums, const Terms<Tile>& terms) const {
        each_four([&](int i, int h, int p, T* to) {
            const float4 bias = *reinterpret_cast<const float4*>(terms.bias + column(p));
            const T rounded[4] = {
                from_float<T>(at(sums, i, h, p, 0) + bias.x), from_float<T>(at(sums, i, h, p, 1) + bias.y),
                from_float<T>(at(sums, i, h, p, 2) + bias.z), from_float<T>(at(sums, i, h, p, 3) + bias.w)};
            if (whole(p)) {
                *reinterpret_cast<uint2*>(to) = make_uint2(pack(rounded[0], rounded[1]), pack(rounded[2], rounded[3]));
            } else {
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (c < columns - column(p)) to[c] = rounded[c];
            }
        });
    }
};

}  // namespace pyadapt::cuda::gemm_parts
