#include "workspace.hpp"

#include <cstddef>
#include <cstdlib>
#include <new>

namespace pyadapt {
namespace {

constexpr std::size_t alignment = 64;

struct Arena {
    float* memory = nullptr;
    std::int64_t floats = 0;
    ~Arena() { std::free(memory); }
};

thread_local Arena arena;

}  // namespace

float* workspace(std::int64_t floats) {
    if (floats > arena.floats) {
        std::free(arena.memory);
        arena.floats = 0;
        const std::size_t needed = static_cast<std::size_t>(floats) * sizeof(float);
        const std::size_t bytes = (needed + alignment - 1) / alignment * alignment;
        arena.memory = static_cast<float*>(std::aligned_alloc(alignment, bytes));
        if (!arena.memory) throw std::bad_alloc();
        arena.floats = floats;
    }
    return arena.memory;
}

}  // namespace pyadapt
