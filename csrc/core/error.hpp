// What the core throws. The bindings turn each into the Python exception of the same name.
#pragma once

#include <stdexcept>
#include <string>

namespace pyadapt {

// A shape, stride, device or value that a kernel cannot take: ValueError.
struct ValueError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A dtype that a kernel cannot take: TypeError.
struct TypeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace pyadapt
