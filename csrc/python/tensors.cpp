#include "tensors.hpp"

#include "../core/error.hpp"

namespace pyadapt::python {
namespace {

// The exchange table of a tensor type; null where it has none (torch before 2.10). It lives as long as the process.
const dlpack::Exchange* exchange_of(PyTypeObject* type) {
    struct Known {
        PyTypeObject* type;
        const dlpack::Exchange* table;
    };
    static Known known[8];  // torch.Tensor, Parameter and few more; each is kept, so that no other type takes its address
    static std::size_t count = 0;
    for (std::size_t i = 0; i < count; ++i)
        if (known[i].type == type) return known[i].table;
    const dlpack::Exchange* table = nullptr;
    if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
        table = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        Py_DECREF(capsule);
    }
    PyErr_Clear();
    while (table && table->major > dlpack::exchange_major) table = table->previous;
    if (table && (table->major != dlpack::exchange_major || !table->view)) table = nullptr;
    if (count < std::size(known)) {
        Py_INCREF(type);
        known[count++] = {type, table};
    }
    return table;
}

// A view of a tensor, good while both the tensor and `capsule` live.
struct Source {
    dlpack::View view;
    py::object capsule;  // torch's own, of a tensor whose type has no exchange table
};

bool is_capsule(py::handle object) { return PyCapsule_IsValid(object.ptr(), "dltensor"); }

dlpack::View view_in(py::handle capsule) {
    return static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
}

Source source(py::handle object, const char* name) try {
    Source found;
    if (is_capsule(object)) {
        found.view = view_in(object);
    } else if (const dlpack::Exchange* exchange = exchange_of(Py_TYPE(object.ptr()))) {
        if (exchange->view(object.ptr(), &found.view)) throw py::error_already_set();
    } else if (py::hasattr(object, "__dlpack__")) {
        found.capsule = py::module_::import("torch.utils.dlpack").attr("to_dlpack")(object);
        found.view = view_in(found.capsule);
    } else {
        throw TypeError(std::string(name) + " is a " + Py_TYPE(object.ptr())->tp_name +
                        "; wanted a tensor or an unused DLPack capsule");
    }
    return found;
} catch (const py::error_already_set& error) {
    // torch has no view of a meta, sparse or otherwise special tensor.
    const std::string said = error.what();
    throw ValueError(std::string(name) + " cannot be read as plain memory (" + said.substr(0, said.find('\n')) +
                     "); wanted a dense tensor");
}

}  // namespace

Tensor tensor(py::handle object, const char* name) { return dlpack::import_tensor(source(object, name).view, name); }
Tensor rows(py::handle object, const char* name) { return dlpack::import_rows(source(object, name).view, name); }

Input::Input(py::handle object, const char* name, Tensor (*import)(const dlpack::View&, const char*), bool along_either) {
    const Source given = source(object, name);
    if (is_capsule(object) || dlpack::has_unit_stride(given.view, along_either)) {
        value = import(given.view, name);
    } else {
        copy = object.attr("contiguous")();
        value = import(source(copy, name).view, name);
    }
}

void register_errors() {
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const ValueError& error) {
            py::set_error(PyExc_ValueError, error.what());
        } catch (const TypeError& error) {
            py::set_error(PyExc_TypeError, error.what());
        }
    });
}

}  // namespace pyadapt::python
