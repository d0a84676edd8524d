// The net's own test: small kernels, right ones and wrong ones, one picked by the first argument (test_runtime.py).
//
// A wrong kernel has to end the process with a failure of the emulator or a finding of a sanitizer, or print `wrong`.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "emulated_primitives.hpp"
#include "support.hpp"

namespace {

using namespace pyadapt::emulator;
using pyadapt::cuda::copy_async_16;
using pyadapt::cuda::copy_async_commit;
using pyadapt::cuda::copy_async_wait;
using pyadapt::cuda::load_matrix_x4;
using driver::Array;
using driver::DType;

constexpr unsigned threads = 128;

template <class T>
T* shared_as() {
    return reinterpret_cast<T*>(shared_memory());
}

int verdict(bool right) {
    std::puts(right ? "right" : "wrong");
    return right ? 0 : 1;
}

// Thread i hands i to thread (i + distance) % threads through shared memory.
int hand_over(bool with_barrier, unsigned distance) {
    std::vector<float> got(threads);
    launch({1}, {threads}, threads * 4, [&] {
        const unsigned i = threadIdx.x;
        shared_as<float>()[i] = static_cast<float>(i);
        if (with_barrier) __syncthreads();
        got[i] = shared_as<float>()[(i + threads - distance) % threads];
    });
    bool right = true;
    for (unsigned i = 0; i < threads; ++i) right &= got[i] == static_cast<float>((i + threads - distance) % threads);
    return verdict(right);
}

// The same twice in one place: the second write has to wait for the first read.
int overwrite(bool with_barrier) {
    std::vector<float> got(threads);
    launch({1}, {threads}, threads * 4, [&] {
        const unsigned i = threadIdx.x;
        for (int round = 0; round < 2; ++round) {
            shared_as<float>()[i] = static_cast<float>(i);
            __syncthreads();
            got[i] = shared_as<float>()[(i + 40) % threads];
            if (with_barrier) __syncthreads();
        }
    });
    return verdict(got[3] == 43);
}

// Between the lanes of one warp: __syncwarp orders memory, a shuffle does not.
int within_warp(bool with_syncwarp) {
    bool right = true;
    launch({1}, {32}, 128, [&] {
        shared_as<int>()[threadIdx.x] = static_cast<int>(threadIdx.x);
        if (with_syncwarp) __syncwarp();
        else __shfl_sync(0xffffffffu, 0, 0);
        if (shared_as<int>()[threadIdx.x ^ 1] != static_cast<int>(threadIdx.x ^ 1)) right = false;
    });
    return verdict(right);
}

// Blocks run one after another here, and all at once on a GPU.
int blocks_share_memory() {
    std::vector<int> global(threads);
    launch({2}, {threads}, 0, [&] { global[(threadIdx.x + blockIdx.x) % threads] = 1; });
    return 0;
}

int stages(int waits_for, bool barrier_behind) {
    constexpr int rounds = 4;
    Array source(DType::f32, rounds * threads * 4);
    for (int i = 0; i < source.count(); ++i) source.set(i, i);
    bool right = true;
    launch({1}, {threads}, 2 * threads * 16, [&] {
        const unsigned i = threadIdx.x;
        auto* stage = shared_as<float>();
        const auto issue = [&](int round) {
            const float* from = source.as<float>() + (round * threads + i) * 4;
            if (round < rounds) copy_async_16(stage + (round % 2 * threads + i) * 4, from, 16);
            copy_async_commit();
        };
        issue(0);
        for (int round = 0; round < rounds; ++round) {
            issue(round + 1);
            if (waits_for == 1) copy_async_wait<1>();
            else copy_async_wait<2>();
            if (barrier_behind) __syncthreads();
            const unsigned other = (i + 1) % threads;
            const float want = static_cast<float>((round * threads + other) * 4);
            if (stage[(round % 2 * threads + other) * 4] != want) right = false;
            __syncthreads();
        }
        copy_async_wait<0>();
    });
    return verdict(right);
}

int partial_copies() {
    bool right = true;
    for (int bytes = 0; bytes <= 16; ++bytes) {
        const driver::Memory source(static_cast<std::size_t>(bytes));
        std::memset(source.data(), 7, bytes);
        launch({1}, {1}, 16, [&] {
            copy_async_16(shared_memory(), source.data(), bytes);
            right &= PYADAPT_ARCH < 800 || shared_memory()[0] == 0xFF;
            copy_async_commit();
            copy_async_wait<0>();
            for (int i = 0; i < 16; ++i) right &= shared_memory()[i] == (i < bytes ? 7 : 0);
        });
    }
    return verdict(right);
}

int copy_in_flight(bool committed) {
    const driver::Memory source(16);
    launch({1}, {32}, 512, [&] {
        copy_async_16(shared_memory() + threadIdx.x * 16, source.data(), 16);
        if (committed) copy_async_commit();
    });
    return 0;
}

// Each lane's row of 16 bytes at lane * stride + shift, in `bytes` of shared memory.
int rows(unsigned stride, unsigned shift, unsigned bytes) {
    launch({1}, {32}, bytes, [&] {
        std::uint32_t r[4];
        load_matrix_x4(r, shared_memory() + threadIdx.x * stride + shift);
    });
    std::printf("conflicts %ld\n", counters.ldmatrix_conflicts);
    return 0;
}

int order() {
    std::string ran[4];
    const auto record = [](std::string& text) {
        launch({1}, {64}, 0, [&] { text += static_cast<char>('0' + threadIdx.x); });
    };
    set_order(Order::forward), record(ran[0]);
    set_order(Order::reverse), record(ran[1]);
    set_order(Order::random, 1), record(ran[2]);
    set_order(Order::random, 2), record(ran[3]);
    std::string ascending;
    for (int i = 0; i < 64; ++i) ascending += static_cast<char>('0' + i);
    const std::string descending(ascending.rbegin(), ascending.rend());
    return verdict(ran[0] == ascending && ran[1] == descending && ran[2] != ran[3] && ran[2] != ascending);
}

// A replaced handler makes launch() throw; the next launch is as good as new.
int throwing() {
    failure_handler = throw_from_launch;
    int caught = 0;
    for (int round = 0; round < 3; ++round) {
        try {
            launch({3}, {threads}, 64, [&] {
                if (threadIdx.x < 64) __syncthreads();
                if (blockIdx.x == 1 && threadIdx.x == 5) fail("on purpose");
                __syncthreads();
            });
        } catch (const Failure& failure) {
            caught += std::strstr(failure.what(), "on purpose") != nullptr;
        }
    }
    try {
        launch({1}, {2048}, 0, [] {});
    } catch (const Failure&) {
        ++caught;
    }
    failure_handler = print_and_exit;
    return caught == 4 ? hand_over(true, 33) : verdict(false);
}

int two_host_threads() {
    bool right[2] = {true, true};
    const auto work = [&](int which) {
        for (int round = 0; round < 50; ++round)
            launch({2}, {threads}, threads * 4, [&] {
                shared_as<int>()[threadIdx.x] = which;
                __syncthreads();
                if (shared_as<int>()[(threadIdx.x + 50) % threads] != which) right[which] = false;
            });
    };
    std::thread first(work, 0), second(work, 1);
    first.join();
    second.join();
    return verdict(right[0] && right[1]);
}

int shared_limit(std::size_t bytes) {
    pyadapt::cuda::launch_kernel(+[](int) {}, dim3(1), 32, bytes, nullptr, 0);
    return 0;
}

const std::map<std::string, int (*)()> modes = {
    {"hand over", [] { return hand_over(true, 33); }},
    {"hand over without barrier", [] { return hand_over(false, 33); }},
    {"overwrite", [] { return overwrite(true); }},
    {"overwrite without barrier", [] { return overwrite(false); }},
    {"syncwarp", [] { return within_warp(true); }},
    {"shuffle for syncwarp", [] { return within_warp(false); }},
    {"blocks share memory", blocks_share_memory},
    {"stages", [] { return stages(1, true); }},
    {"stages, wait one short", [] { return stages(2, true); }},
    {"stages without barrier", [] { return stages(1, false); }},
    {"partial copies", partial_copies},
    {"exit in flight", [] { return copy_in_flight(true); }},
    {"exit with an open group", [] { return copy_in_flight(false); }},
    {"rows", [] { return rows(16, 0, 512); }},
    {"rows, padded", [] { return rows(48, 0, 31 * 48 + 16); }},
    {"rows, 128 bytes apart", [] { return rows(128, 0, 31 * 128 + 16); }},
    {"rows, all the same", [] { return rows(0, 0, 16); }},
    {"rows, one outside", [] { return rows(16, 0, 496); }},
    {"rows, misaligned", [] { return rows(16, 8, 1024); }},
    {"copy outside", [] {
         const driver::Memory source(16);
         launch({1}, {1}, 16, [&] { copy_async_16(shared_memory() + 16, source.data(), 16); });
         return 0;
     }},
    {"copy before the start", [] {
         const driver::Memory source(16);
         launch({1}, {1}, 16, [&] { copy_async_16(shared_memory() - 16, source.data(), 16); });
         return 0;
     }},
    {"copy misaligned in shared memory", [] {
         const driver::Memory source(16);
         launch({1}, {1}, 32, [&] { copy_async_16(shared_memory() + 8, source.data(), 16); });
         return 0;
     }},
    {"copy misaligned in global memory", [] {
         const driver::Memory source(32);
         launch({1}, {1}, 16, [&] { copy_async_16(shared_memory(), source.data() + 4, 16); });
         return 0;
     }},
    {"copy beyond the source", [] {
         const driver::Memory source(12);
         launch({1}, {1}, 16, [&] {
             copy_async_16(shared_memory(), source.data(), 16);
             copy_async_commit();
             copy_async_wait<0>();
         });
         return 0;
     }},
    {"store outside", [] {
         launch({1}, {1}, 20, [] { shared_memory()[20] = 1; });
         return 0;
     }},
    {"store outside an operand", [] {
         const driver::Memory out(20);
         launch({1}, {32}, 0, [&] { out.data()[threadIdx.x] = 1; });
         return 0;
     }},
    {"load outside", [] {
         bool nan = false;
         launch({1}, {1}, 20, [&] { nan = std::isnan(shared_as<float>()[5]); });
         return verdict(!nan);
     }},
    {"load of what nobody stored", [] {
         bool nan = false;
         launch({2}, {1}, 20, [&] {
             nan = std::isnan(shared_as<float>()[blockIdx.x]);
             shared_as<float>()[1] = 1;
         });
         return verdict(!nan);
     }},
    {"different instructions", [] {
         launch({1}, {32}, 0, [] {
             if (threadIdx.x < 16) __ballot_sync(0xffffffffu, 1);
             else __shfl_sync(0xffffffffu, 1, 0);
         });
         return 0;
     }},
    {"different barriers", [] {
         launch({1}, {32}, 0, [] {
             if (threadIdx.x < 16)
                 __syncthreads();
             else
                 __syncthreads();  // on a line of its own
         });
         return 0;
     }},
    {"different barriers by warp", [] {
         launch({1}, {64}, 0, [] {
             if (threadIdx.x < 32)
                 __syncthreads();
             else
                 __syncthreads();
         });
         return verdict(true);
     }},
    {"barrier for half a warp", [] {
         launch({1}, {64}, 0, [] {
             if (threadIdx.x < 16) __syncthreads();
             __syncwarp();
         });
         return 0;
     }},
    {"exit before a shuffle", [] {
         launch({1}, {32}, 0, [] {
             if (threadIdx.x == 5) return;
             __shfl_sync(0xffffffffu, 1, 0);
         });
         return 0;
     }},
    {"warp exits before a barrier", [] {
         launch({1}, {64}, 0, [] {
             if (threadIdx.x < 32) return;
             __syncthreads();
         });
         return verdict(true);
     }},
    {"mma in part of a warp", [] {
         launch({1}, {16}, 0, [] {
             float d[4] = {};
             pyadapt::cuda::mma_16x8x8(d, {1, 1, 1, 1}, {1, 1});
         });
         return 0;
     }},
    {"half a mask", [] {
         launch({1}, {32}, 0, [] { __shfl_sync(0xffffu, 1, 0); });
         return 0;
     }},
    {"bf16", [] {
         launch({1}, {32}, 0, [] {
             float d[4] = {};
             pyadapt::cuda::mma_16x8x16(d, {}, {}, __nv_bfloat16());
         });
         return verdict(true);
     }},
    {"stack overrun", [] {
         launch({1}, {1}, 0, [] {
             volatile unsigned char large[8 * stack_bytes];
             for (std::size_t i = sizeof large; i-- > 0; i -= i < 1024 ? i : 1024) large[i] = 1;
         });
         return 0;
     }},
    {"too much shared memory", [] { return shared_limit(PYADAPT_SHARED_LIMIT + 1); }},
    {"all shared memory", [] { return shared_limit(PYADAPT_SHARED_LIMIT); }},
    {"too many threads", [] {
         launch({1}, {1056}, 0, [] {});
         return 0;
     }},
    {"no blocks", [] {
         launch({0}, {32}, 0, [] {});
         return 0;
     }},
    {"launch in a kernel", [] {
         launch({1}, {1}, 0, [] { launch({1}, {1}, 0, [] {}); });
         return 0;
     }},
    {"order", order},
    {"throwing", throwing},
    {"two host threads", two_host_threads},
};

}  // namespace

int main(int argc, char** argv) {
    set_order_from_environment();
    const auto mode = modes.find(argc > 1 ? argv[1] : "");
    if (mode == modes.end()) {
        for (const auto& [name, function] : modes) std::puts(name.c_str());
        return argc > 1 ? 2 : 0;
    }
    return mode->second();
}
