#include "dispatch.hpp"

#include <atomic>

#include "../core/error.hpp"

namespace pyadapt::cpu {

// Each is defined by table.cpp, compiled for that instruction set.
#define PYADAPT_DECLARE(ns) \
    namespace ns {          \
    extern const Kernels kernels; \
    }
PYADAPT_DECLARE(portable)
#ifdef PYADAPT_X86
PYADAPT_DECLARE(avx2)
PYADAPT_DECLARE(avx512)
PYADAPT_DECLARE(avx512_bf16)
#endif
#ifdef PYADAPT_EMULATED
PYADAPT_DECLARE(avx512_emulated)
PYADAPT_DECLARE(avx512_bf16_emulated)
#endif
#undef PYADAPT_DECLARE

namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
    bool usable;
    bool emulated;
};

// __builtin_cpu_supports asks the operating system too: a set whose registers it does not save counts as absent.
const std::vector<Isa>& all_isas() {
    static const std::vector<Isa> isas = [] {
        std::vector<Isa> found = {{"portable", &portable::kernels, true, false}};
#ifdef PYADAPT_X86
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                              __builtin_cpu_supports("f16c");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        found.push_back({"avx2", &avx2::kernels, has_avx2, false});
        found.push_back({"avx512", &avx512::kernels, has_avx512, false});
        const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
        found.push_back({"avx512_bf16", &avx512_bf16::kernels, has_bf16, false});
#endif
#ifdef PYADAPT_EMULATED
        found.push_back({"avx512-emulated", &avx512_emulated::kernels, has_avx2, true});
        found.push_back({"avx512_bf16-emulated", &avx512_bf16_emulated::kernels, has_avx2, true});
#endif
        return found;
    }();
    return isas;
}

const Isa* best() {
    const Isa* choice = nullptr;
    for (const Isa& isa : all_isas())
        if (isa.usable && !isa.emulated) choice = &isa;
    return choice;
}

std::atomic<const Isa*>& in_use() {
    static std::atomic<const Isa*> isa{best()};
    return isa;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : all_isas())
        if (isa.usable) names.emplace_back(isa.name);
    return names;
}

std::string isa() { return in_use().load()->name; }

void set_isa(const std::string& name) {
    std::string usable;
    for (const Isa& isa : all_isas()) {
        if (!isa.usable) continue;
        if (name == isa.name) return in_use().store(&isa);
        usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw ValueError("the instruction set '" + name + "' is unknown or not usable here; usable: " + usable);
}

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed)->kernels; }

}  // namespace pyadapt::cpu
