// Which instruction sets this build holds and this machine runs, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace pyadapt::cpu {

// The names that set_isa takes here, best last, emulated ones behind them. An emulated set runs the source of the wider
// one on this machine's instructions: for tests, never chosen by itself.
std::vector<std::string> usable_isas();
std::string isa();
// Throws ValueError naming the usable ones. Not for use while another thread is inside a kernel.
void set_isa(const std::string& name);

const Kernels& kernels();

}  // namespace pyadapt::cpu
