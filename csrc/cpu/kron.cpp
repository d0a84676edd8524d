// LoKr's term: products with kron(w1, w2) that never form it.
//
//   U = x down'    V = w1 U    y += scale V up'        a token's x as (c, d), its U as (c, h), V as (a, h), y as (a, b)
//   G = scale g    dV = G up   dU = w1' dV   dx += dU down   dw1 = dV U'   d_down = dU' x   d_up = G' V
//
// h may be the rank of the right factor, less than a vector: what w1 mixes then lies transposed, V' and dU', so that the
// vectors go along a and c.
//
// A task takes some tokens through all of it while they are in the cache: every product is small, and only x, g, y and dx
// go through memory, each once. U and V are made again in backward.
//
// A factor's gradient is a sum over tokens. It is cut into chunks whose number depends on shapes only, and the chunks
// are added up in their order: results are the same bit by bit for any number of threads.
#include <omp.h>

#include "../core/workspace.hpp"
#include "kernels.hpp"
#include "rows.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {
namespace {

constexpr std::int64_t task_rows = 32;         // that a product should have, so that factors are read for many
constexpr std::int64_t task_floats = 1 << 16;  // of x and y: they stay in L2
constexpr std::int64_t chunk_tokens = 32;      // at least so many tokens share a partial sum
constexpr std::int64_t most_chunks = 64;
constexpr std::int64_t most_partial_floats = 1 << 23;
constexpr std::int64_t serial_work = 1 << 17;  // multiply-adds below which a team costs more than it saves

std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t pieces(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }
std::int64_t padded(std::int64_t n) { return pieces(n, width) * width; }

// --- out (rows, cols) = left right, all in fp32, right (depth, cols) and out in whole vectors ---

struct Left {
    const float* at;
    std::int64_t row_stride, depth_stride;
};

Left rows(const float* matrix, std::int64_t stride) { return {matrix, stride, 1}; }
Left columns(const float* matrix, std::int64_t stride) { return {matrix, 1, stride}; }

#if PYADAPT_WIDTH == 16
constexpr int most_rows = 8;
#else
constexpr int most_rows = 6;
#endif

template <int R, int V>
static void tile(std::int64_t depth, const Left& left, const float* right, std::int64_t right_stride, float* out,
                 std::int64_t out_stride, bool add) {
    Floats acc[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) acc[i][j] = add ? load<Floats>(out + i * out_stride + j * width) : Floats{};
    const float* l = left.at;
    for (std::int64_t u = 0; u < depth; ++u) {
        Floats r[V];
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) r[j] = load<Floats>(right + j * width);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const Floats factor = broadcast(l[i * left.row_stride]);
#pragma GCC unroll 2
            for (int j = 0; j < V; ++j) acc[i][j] += factor * r[j];
        }
        l += left.depth_stride;
        right += right_stride;
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) store(out + i * out_stride + j * width, acc[i][j]);
}

typedef void (*Tile)(std::int64_t, const Left&, const float*, std::int64_t, float*, std::int64_t, bool);

template <int V, int R = most_rows>
static Tile tile_of(std::int64_t rows) {
    if constexpr (R > 1)
        if (rows < R) return tile_of<V, R - 1>(rows);
    return tile<R, V>;
}

void multiply(std::int64_t rows, std::int64_t cols, std::int64_t depth, const Left& left, const float* right,
              std::int64_t right_stride, float* out, std::int64_t out_stride, bool add = false) {
    for (std::int64_t j = 0; j < cols;) {
        const bool two = cols - j >= 2 * width;
        for (std::int64_t i = 0; i < rows; i += most_rows) {
            const Left from = {left.at + i * left.row_stride, left.row_stride, left.depth_stride};
            const Tile run = two ? tile_of<2>(rows - i) : tile_of<1>(rows - i);
            run(depth, from, right + j, right_stride, out + i * out_stride + j, out_stride, add);
        }
        j += two ? 2 * width : width;
    }
}

// --- matrices between memory, where they lie without gaps, and rows of whole vectors ---

// to (rows, padded(cols)) = scale * the matrix at data[at]. `line` has room for the matrix and a vector more. What comes
// behind a row's end in `to` is left to chance, and nothing that counts is computed from it.
void unpack(const void* data, DType dtype, std::int64_t at, std::int64_t rows, std::int64_t cols, const float* scale,
            float* line, float* to) {
    const std::int64_t stride = padded(cols);
    float* flat = stride == cols ? to : line;
    widen(data, dtype, at, rows * cols, flat);
    if (scale)
        for (std::int64_t i = 0; i < rows * cols; ++i) flat[i] *= scale[i];
    if (stride == cols) return;
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < cols; j += width)
            store(to + i * stride + j, load<Floats>(line + i * cols + j));
}

// The matrix at data[at] += scale * term, whose rows are whole vectors.
void add_to(void* data, DType dtype, std::int64_t at, std::int64_t rows, std::int64_t cols, const float* term,
            const float* scale, float* line) {
    const std::int64_t stride = padded(cols);
    widen(data, dtype, at, rows * cols, line);
    for (std::int64_t i = 0; i < rows; ++i, term += stride) {
        float* row = line + i * cols;
        if (scale)
            for (std::int64_t j = 0; j < cols; ++j) row[j] += scale[i * cols + j] * term[j];
        else
            for (std::int64_t j = 0; j < cols; ++j) row[j] += term[j];
    }
    narrow(line, data, dtype, at, rows * cols);
}

// to (rows, padded(cols)) = from.
void pad(const float* from, std::int64_t rows, std::int64_t cols, float* to) {
    const std::int64_t stride = padded(cols);
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < stride; ++j) to[i * stride + j] = j < cols ? from[i * cols + j] : 0.0f;
}

// to (cols, padded(rows)) = from (rows, cols)', from's rows `stride` apart.
void transpose(const float* from, std::int64_t rows, std::int64_t cols, std::int64_t stride, float* to) {
    const std::int64_t wide = padded(rows);
    for (std::int64_t j = 0; j < cols; ++j) {
        float* line = to + j * wide;
        for (std::int64_t i = 0; i < rows; ++i) line[i] = from[i * stride + j];
        for (std::int64_t i = rows; i < wide; ++i) line[i] = 0.0f;
    }
}

float* take(float*& memory, std::int64_t floats) {
    float* taken = memory;
    memory += (floats + 15) / 16 * 16;
    return taken;
}

// What all tasks share, and how the tokens are cut.
struct Plan {
    const Kron& job;
    const std::int64_t a, b, c, d, h;
    const std::int64_t ap = padded(a), bp = padded(b), cp = padded(c), dp = padded(d), hp = padded(h);
    std::int64_t tokens = 1;  // of a task's turn
    float *w1 = nullptr, *w1_t = nullptr, *down = nullptr, *down_t = nullptr, *up = nullptr, *up_t = nullptr;
    float* scale = nullptr;  // of an output feature: (a, b)

    explicit Plan(const Kron& job) : job(job), a(job.a), b(job.b), c(job.c), d(job.d), h(job.h) {
        while (tokens * least(a, c) < task_rows && 2 * tokens * (a * bp + c * dp) <= task_floats) tokens *= 2;
    }

    std::int64_t shared_floats() const {
        return a * cp + c * ap + h * dp + d * hp + b * hp + h * bp + a * b + 7 * 16;
    }
    void share(float* memory) {
        pad(job.w1, a, c, w1 = take(memory, a * cp));
        transpose(job.w1, a, c, c, w1_t = take(memory, c * ap));
        transpose(job.down, h, d, d, down_t = take(memory, d * hp));
        pad(job.down, h, d, down = take(memory, h * dp));
        if (job.up) {
            transpose(job.up, b, h, h, up_t = take(memory, h * bp));
            pad(job.up, b, h, up = take(memory, b * hp));
        }
        scale = take(memory, a * b);
        for (std::int64_t n = 0; n < a * b; ++n) scale[n] = job.scaling * (job.factors ? job.factors[n] : 1.0f);
    }

    // The multiply-adds of a forward.
    std::int64_t work() const { return job.M * (c * d * h + a * c * h + a * b * h); }
};

// The scratch memory of one task: `tokens` of each.
struct Scratch {
    float *x, *y, *U;
    float *V_t, *line;  // of one token: V', and its x or y

    static std::int64_t line_floats(const Plan& plan) {
        return (plan.a * plan.b > plan.c * plan.d ? plan.a * plan.b : plan.c * plan.d) + width;
    }
    static std::int64_t floats(const Plan& plan) {
        const std::int64_t token = plan.c * (plan.dp + plan.hp) + plan.a * plan.bp;
        return plan.tokens * token + plan.h * plan.ap + line_floats(plan) + 5 * 16;
    }
    Scratch(const Plan& plan, float*& memory)
        : x(take(memory, plan.tokens * plan.c * plan.dp)), y(take(memory, plan.tokens * plan.a * plan.bp)),
          U(take(memory, plan.tokens * plan.c * plan.hp)), V_t(take(memory, plan.h * plan.ap)),
          line(take(memory, line_floats(plan))) {}
};

// x and U of the tokens [m, m + count).
void make_U(const Plan& plan, const Scratch& scratch, std::int64_t m, std::int64_t count) {
    const Kron& job = plan.job;
    for (std::int64_t t = 0; t < count; ++t)
        unpack(job.x, job.x_dtype, (m + t) * job.x_stride, plan.c, plan.d, nullptr, scratch.line,
               scratch.x + t * plan.c * plan.dp);
    multiply(count * plan.c, plan.hp, plan.d, rows(scratch.x, plan.dp), plan.down_t, plan.hp, scratch.U, plan.hp);
}

// V' of the token whose U is given.
void make_V_t(const Plan& plan, const Scratch& scratch, const float* U) {
    multiply(plan.h, plan.ap, plan.c, columns(U, plan.hp), plan.w1_t, plan.ap, scratch.V_t, plan.ap);
}

void forward_tokens(const Plan& plan, const Scratch& scratch, std::int64_t m, std::int64_t count) {
    const Kron& job = plan.job;
    const std::int64_t a = plan.a, c = plan.c, h = plan.h, ap = plan.ap, bp = plan.bp, hp = plan.hp;
    make_U(plan, scratch, m, count);
    for (std::int64_t t = 0; t < count; ++t) {
        const float* U = scratch.U + t * c * hp;
        if (job.up) {
            make_V_t(plan, scratch, U);
            multiply(a, bp, h, columns(scratch.V_t, ap), plan.up_t, bp, scratch.y, bp);
        } else {
            multiply(a, bp, c, rows(job.w1, c), U, hp, scratch.y, bp);
        }
        add_to(job.y, job.y_dtype, (m + t) * job.y_stride, a, plan.b, scratch.y, plan.scale, scratch.line);
    }
}

// --- backward ---

// A chunk's part of the factors' gradients, in whole vectors.
struct Partial {
    float *w1, *down, *up;
    static std::int64_t floats(const Plan& plan) {
        return plan.a * plan.cp + plan.h * plan.dp + (plan.job.up ? plan.h * plan.bp : 0) + 3 * 16;
    }
    Partial(const Plan& plan, float* memory)
        : w1(take(memory, plan.a * plan.cp)), down(take(memory, plan.h * plan.dp)), up(memory) {}
};

// What backward has beside x, U and V'.
struct Gradients {
    float *dV;        // (tokens a, h)
    float *dU_t, *U_t;  // of one token: (h, c)
    static std::int64_t floats(const Plan& plan) {
        return plan.tokens * plan.a * plan.hp + 2 * plan.h * plan.cp + 3 * 16;
    }
    Gradients(const Plan& plan, float*& memory)
        : dV(take(memory, plan.tokens * plan.a * plan.hp)), dU_t(take(memory, plan.h * plan.cp)),
          U_t(take(memory, plan.h * plan.cp)) {}
};

void backward_tokens(const Plan& plan, const Scratch& scratch, const Gradients& own, const Partial& sums,
                     std::int64_t m, std::int64_t count) {
    const Kron& job = plan.job;
    const std::int64_t a = plan.a, b = plan.b, c = plan.c, d = plan.d, h = plan.h;
    const std::int64_t ap = plan.ap, bp = plan.bp, cp = plan.cp, dp = plan.dp, hp = plan.hp;
    make_U(plan, scratch, m, count);
    float* G = job.up ? scratch.y : own.dV;  // without `up` h is b, and dV is G
    for (std::int64_t t = 0; t < count; ++t)
        unpack(job.g, job.g_dtype, (m + t) * job.g_stride, a, b, plan.scale, scratch.line, G + t * a * bp);
    if (job.up) multiply(count * a, hp, b, rows(G, bp), plan.up, hp, own.dV, hp);
    for (std::int64_t t = 0; t < count; ++t) {
        const float *U = scratch.U + t * c * hp, *dV = own.dV + t * a * hp;
        float* x = scratch.x + t * c * dp;
        if (job.up) {
            make_V_t(plan, scratch, U);
            multiply(h, bp, a, rows(scratch.V_t, ap), G + t * a * bp, bp, sums.up, bp, true);
        }
        transpose(U, c, h, hp, own.U_t);
        multiply(a, cp, h, rows(dV, hp), own.U_t, cp, sums.w1, cp, true);
        multiply(h, cp, a, columns(dV, hp), plan.w1, cp, own.dU_t, cp);
        multiply(h, dp, c, rows(own.dU_t, cp), x, dp, sums.down, dp, true);
        if (!job.dx) continue;
        // x is read no more: its place takes the term.
        multiply(c, dp, h, columns(own.dU_t, cp), plan.down, dp, x, dp);
        add_to(job.dx, job.dx_dtype, (m + t) * job.dx_stride, c, d, x, nullptr, scratch.line);
    }
}

// out (rows, cols), its rows dense, or its transpose (cols, rows) = the chunks' sums in their order.
void add_up(const float* first, std::int64_t chunks, std::int64_t share, std::int64_t rows, std::int64_t cols,
            float* out, bool transposed) {
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < cols; ++j) {
            const float* at = first + i * padded(cols) + j;
            float sum = 0.0f;
            for (std::int64_t chunk = 0; chunk < chunks; ++chunk) sum += at[chunk * share];
            out[transposed ? j * rows + i : i * cols + j] = sum;
        }
}

}  // namespace

void kron_forward(const Kron& job) {
    Plan plan(job);
    const std::int64_t tasks = pieces(job.M, plan.tokens), share = (Scratch::floats(plan) + 15) / 16 * 16;
    if (tasks == 0) return;
    const int team = plan.work() < serial_work ? 1 : static_cast<int>(least(job.threads, tasks));
    float* memory = workspace(plan.shared_floats() + 16 + team * share);
    plan.share(take(memory, plan.shared_floats()));
    const auto run = [&](std::int64_t task, int thread) {
        float* own = memory + thread * share;
        const Scratch scratch(plan, own);
        const std::int64_t m = task * plan.tokens;
        forward_tokens(plan, scratch, m, least(plan.tokens, job.M - m));
    };
    if (team == 1) {
        for (std::int64_t task = 0; task < tasks; ++task) run(task, 0);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(team)
    for (std::int64_t task = 0; task < tasks; ++task) run(task, omp_get_thread_num());
}

void kron_backward(const Kron& job) {
    Plan plan(job);
    const std::int64_t partial = (Partial::floats(plan) + 15) / 16 * 16;
    std::int64_t chunks = least(least(pieces(job.M, chunk_tokens), most_chunks), most_partial_floats / partial);
    chunks = chunks < 1 ? 1 : chunks;
    const std::int64_t length = pieces(pieces(job.M, chunks), plan.tokens) * plan.tokens;
    const std::int64_t share = (Scratch::floats(plan) + Gradients::floats(plan) + 15) / 16 * 16;
    const int team = 3 * plan.work() < serial_work ? 1 : static_cast<int>(least(job.threads, chunks));
    float* memory = workspace(plan.shared_floats() + 16 + chunks * partial + team * share);
    plan.share(take(memory, plan.shared_floats()));
    float* partials = take(memory, chunks * partial);
    const auto run = [&](std::int64_t chunk, int thread) {
        float* own = memory + thread * share;
        const Scratch scratch(plan, own);
        const Gradients gradients(plan, own);
        float* sums = partials + chunk * partial;
        __builtin_memset(sums, 0, partial * sizeof(float));
        const Partial parts(plan, sums);
        const std::int64_t end = least(job.M, (chunk + 1) * length);
        for (std::int64_t m = chunk * length; m < end; m += plan.tokens)
            backward_tokens(plan, scratch, gradients, parts, m, least(plan.tokens, end - m));
    };
    if (team == 1) {
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk, 0);
    } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk, omp_get_thread_num());
    }
    const Partial first(plan, partials);
    add_up(first.w1, chunks, partial, plan.a, plan.c, job.dw1, false);
    add_up(first.down, chunks, partial, plan.h, plan.d, job.d_down, false);
    if (job.up) add_up(first.up, chunks, partial, plan.h, plan.b, job.d_up, true);
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
