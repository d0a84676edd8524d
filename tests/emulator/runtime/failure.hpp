// What happens when a kernel does something that it must not.
//
//   fail("...")          from a kernel or the runtime; never returns
//   failure_handler      replaceable: the default prints `emulator: <what>` to stderr and ends the process with 97.
//                        Where a handler returns, the launch is abandoned and launch() throws Failure.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyadapt::emulator {

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr int failure_status = 97;

inline void print_and_exit(const std::string& what) {
    std::fprintf(stderr, "emulator: %s\n", what.c_str());
    std::fflush(nullptr);
    std::_Exit(failure_status);
}

// For failure_handler: leaves the failure to whoever called launch().
inline void throw_from_launch(const std::string&) {}

inline void (*failure_handler)(const std::string& what) = print_and_exit;

[[noreturn]] void fail(const std::string& what);  // fibers.hpp

}  // namespace pyadapt::emulator
