// Python's tensors as the core sees them. A tensor comes as it is and is read through the DLPack table of its type, or as a
// capsule, which is left to its own destructor. Shared by every extension module.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "../core/dlpack.hpp"

namespace pyadapt::python {

namespace py = pybind11;

// Something to write to; checked like everything that is imported.
Tensor tensor(py::handle object, const char* name);
// The same for (..., columns) as (rows, columns).
Tensor rows(py::handle object, const char* name);

// Something to read. A tensor without the unit stride that the kernels need is copied for the call.
struct Input {
    Tensor value;
    py::object copy;
    Input(py::handle object, const char* name, Tensor (*import)(const dlpack::View&, const char*) = dlpack::import_tensor,
          bool along_either = false);
    operator const Tensor&() const { return value; }
};

// An input that may be None.
struct Optional {
    std::optional<Input> input;
    Optional(py::handle object, const char* name) {
        if (!object.is_none()) input.emplace(object, name);
    }
    const Tensor* get() const { return input ? &input->value : nullptr; }
};

// A result that may be None.
struct OptionalRows {
    std::optional<Tensor> value;
    OptionalRows(py::handle object, const char* name) {
        if (!object.is_none()) value = rows(object, name);
    }
    const Tensor* get() const { return value ? &*value : nullptr; }
};

// The core's exceptions as Python's of the same name.
void register_errors();

}  // namespace pyadapt::python
