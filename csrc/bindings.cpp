// What Python sees of the core: pyadapt._native. A tensor comes as it is and is read through the DLPack table of its type,
// or as a capsule, which is left to its own destructor; every check is made before memory is touched, and computing
// releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <omp.h>

#include <optional>
#include <string>
#include <vector>

#include "core/checks.hpp"
#include "core/dlpack.hpp"
#include "core/error.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/int8.hpp"
#include "cpu/layer.hpp"
#include "cpu/lora_rows.hpp"

namespace py = pybind11;

namespace pyadapt {
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
                     "); wanted a dense tensor on the CPU");
}

Tensor tensor(py::handle object, const char* name) { return dlpack::import_tensor(source(object, name).view, name); }
Tensor rows(py::handle object, const char* name) { return dlpack::import_rows(source(object, name).view, name); }

// Something to read. A tensor without the unit stride that the kernels need is copied for the call.
struct Input {
    Tensor value;
    py::object copy;
    Input(py::handle object, const char* name, Tensor (*import)(const dlpack::View&, const char*) = dlpack::import_tensor,
          bool along_either = false) {
        const Source given = source(object, name);
        if (is_capsule(object) || dlpack::has_unit_stride(given.view, along_either)) {
            value = import(given.view, name);
        } else {
            copy = object.attr("contiguous")();
            value = import(source(copy, name).view, name);
        }
    }
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

struct LayerWeight {
    Input values;  // as it lies: unit stride along either dimension
    Optional scale, bias;
    LayerWeight(py::handle weight, py::handle weight_scale, py::handle layer_bias)
        : values(weight, "weight", dlpack::import_tensor, true), scale(weight_scale, "weight_scale"),
          bias(layer_bias, "bias") {}
    cpu::Weight view() const { return {&values.value, scale.get(), bias.get()}; }
};

int team(int threads) {
    if (threads >= 1) return threads;
    throw ValueError("threads is " + std::to_string(threads) + "; wanted at least 1");
}

Dropout dropout(double p, py::handle seed) { return make_dropout(p, Optional(seed, "seed").get()); }

void linear_forward(py::handle x, py::handle weight, py::handle scale, py::handle bias, py::handle y, bool skinny,
                    int threads) {
    const Input x_(x, "x", dlpack::import_rows);
    const Tensor y_ = rows(y, "y");
    const LayerWeight layer(weight, scale, bias);
    py::gil_scoped_release release;
    cpu::linear_forward(x_, layer.view(), y_, skinny, team(threads));
}

void linear_dx(py::handle g, py::handle weight, py::handle scale, py::handle dx, int threads) {
    const Input g_(g, "g", dlpack::import_rows);
    const Tensor dx_ = rows(dx, "dx");
    const LayerWeight layer(weight, scale, py::none());
    py::gil_scoped_release release;
    cpu::linear_dx(g_, layer.view(), dx_, team(threads));
}

void lora_forward(py::handle x, py::handle weight, py::handle scale, py::handle bias, py::handle A, py::handle B,
                  py::handle y, py::handle S, double scaling, double p, py::handle seed, bool skinny, int threads) {
    const Input x_(x, "x", dlpack::import_rows), A_(A, "A"), B_(B, "B");
    const Tensor y_ = rows(y, "y"), S_ = tensor(S, "S");
    const LayerWeight layer(weight, scale, bias);
    const cpu::Adapter adapter = {&A_.value, &B_.value, scaling, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_forward(x_, layer.view(), adapter, y_, S_, skinny, team(threads));
}

void lora_backward(py::handle g, py::handle x, py::handle weight, py::handle scale, py::handle A, py::handle B,
                   py::handle S, py::handle dx, py::handle dA, py::handle dB, double scaling, double p, py::handle seed,
                   int threads) {
    const Input g_(g, "g", dlpack::import_rows), x_(x, "x", dlpack::import_rows), A_(A, "A"), B_(B, "B"), S_(S, "S");
    const Tensor dA_ = tensor(dA, "dA"), dB_ = tensor(dB, "dB");
    std::optional<Tensor> dx_;
    if (!dx.is_none()) dx_ = rows(dx, "dx");
    const LayerWeight layer(weight, scale, py::none());
    const cpu::Adapter adapter = {&A_.value, &B_.value, scaling, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_backward(g_, x_, layer.view(), adapter, S_, dx_ ? &*dx_ : nullptr, dA_, dB_,
                       team(threads));
}

void lora_shrink(py::handle x, py::handle A, py::handle S, double p, py::handle seed, int threads) {
    const Input x_(x, "x"), A_(A, "A");
    const Tensor S_ = tensor(S, "S");
    const cpu::Adapter adapter = {&A_.value, nullptr, 1.0, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_shrink(x_, adapter, S_, team(threads));
}

void lora_expand(py::handle S, py::handle B, py::handle scale, py::handle bias, py::handle y, double scaling,
                 int threads) {
    const Input S_(S, "S"), B_(B, "B");
    const Tensor y_ = tensor(y, "y");
    const Optional scale_(scale, "weight_scale"), bias_(bias, "bias");
    const cpu::Adapter adapter = {nullptr, &B_.value, scaling, Dropout{}};
    py::gil_scoped_release release;
    cpu::lora_expand(S_, adapter, {nullptr, scale_.get(), bias_.get()}, y_, team(threads));
}

void lora_gradients(py::handle g, py::handle x, py::handle A, py::handle B, py::handle S, py::handle dS, py::handle dA,
                    py::handle dB, double scaling, double p, py::handle seed, int threads) {
    const Input g_(g, "g"), x_(x, "x"), A_(A, "A"), B_(B, "B"), S_(S, "S");
    const Tensor dS_ = tensor(dS, "dS"), dA_ = tensor(dA, "dA"), dB_ = tensor(dB, "dB");
    const cpu::Adapter adapter = {&A_.value, &B_.value, scaling, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_gradients(g_, x_, adapter, S_, dS_, dA_, dB_, team(threads));
}

void lora_expand_dx(py::handle dS, py::handle A, py::handle dx, double p, py::handle seed, int threads) {
    const Input dS_(dS, "dS"), A_(A, "A");
    const Tensor dx_ = tensor(dx, "dx");
    const cpu::Adapter adapter = {&A_.value, nullptr, 1.0, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_expand_dx(dS_, adapter, dx_, team(threads));
}

void quantize_rows(py::handle w, py::handle q, py::handle scale, int threads) {
    const Input w_(w, "w");
    const Tensor q_ = tensor(q, "q"), scale_ = tensor(scale, "scale");
    py::gil_scoped_release release;
    cpu::quantize_rows(w_, q_, scale_, team(threads));
}

void dequantize_rows(py::handle q, py::handle scale, py::handle out, int threads) {
    const Input q_(q, "q");
    const Tensor out_ = tensor(out, "out");
    const Optional scale_(scale, "scale");
    py::gil_scoped_release release;
    cpu::dequantize_rows(q_, scale_.get(), out_, team(threads));
}

// --- a batch in which each segment of rows has an adapter of its own ---

// One matrix of every adapter, under names that errors can give: A[3].
template <class Value>
struct Matrices {
    std::vector<std::string> names;
    std::vector<Value> values;
    template <class Import>
    Matrices(const py::list& tensors, const char* letter, Import import) {
        names.reserve(tensors.size());
        values.reserve(tensors.size());
        for (py::handle each : tensors) {
            names.push_back(letter + ("[" + std::to_string(names.size()) + "]"));
            values.push_back(import(each, names.back().c_str()));
        }
    }
};

Input input(py::handle object, const char* name) { return Input(object, name); }

struct Adapters {
    Matrices<Input> A, B;
    std::vector<cpu::Adapter> views;
    Adapters(const py::list& As, const py::list& Bs, const std::vector<double>& scalings,
             const std::vector<double>& dropouts, py::handle seed)
        : A(As, "A", input), B(Bs, "B", input) {
        const auto check = [&](std::size_t count, const char* name) {
            if (count == A.values.size()) return;
            throw ValueError(std::string(name) + " has " + std::to_string(count) +
                             " entries; wanted one for each of the " + std::to_string(A.values.size()) +
                             " adapters in A");
        };
        check(B.values.size(), "B");
        check(scalings.size(), "scalings");
        check(dropouts.size(), "dropouts");
        const Optional seed_(seed, "seed");
        for (std::size_t a = 0; a < A.values.size(); ++a)
            views.push_back(
                {&A.values[a].value, &B.values[a].value, scalings[a], make_dropout(dropouts[a], seed_.get())});
    }
};

void lora_rows_forward(py::handle x, const py::list& As, const py::list& Bs, py::handle segments, py::handle S,
                       py::handle y, const std::vector<double>& scalings, const std::vector<double>& dropouts,
                       py::handle seed, int threads) {
    const Input x_(x, "x", dlpack::import_rows), segments_(segments, "segments");
    const Tensor S_ = tensor(S, "S"), y_ = rows(y, "y");
    const Adapters adapters(As, Bs, scalings, dropouts, seed);
    py::gil_scoped_release release;
    cpu::lora_rows_forward(x_.value, adapters.views, segments_.value, S_, y_, team(threads));
}

void lora_rows_backward(py::handle g, py::handle x, const py::list& As, const py::list& Bs, py::handle segments,
                        py::handle S, py::handle dx, const py::list& dAs, const py::list& dBs,
                        const std::vector<double>& scalings, const std::vector<double>& dropouts, py::handle seed,
                        int threads) {
    const Input g_(g, "g", dlpack::import_rows), x_(x, "x", dlpack::import_rows), segments_(segments, "segments");
    const Input S_(S, "S");
    std::optional<Tensor> dx_;
    if (!dx.is_none()) dx_ = rows(dx, "dx");
    const Adapters adapters(As, Bs, scalings, dropouts, seed);
    const Matrices<Tensor> dA(dAs, "dA", tensor), dB(dBs, "dB", tensor);
    py::gil_scoped_release release;
    cpu::lora_rows_backward(g_.value, x_.value, adapters.views, segments_.value, S_.value, dx_ ? &*dx_ : nullptr,
                            dA.values, dB.values, team(threads));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "pyadapt's native core. Use it through pyadapt.native and pyadapt.ops.";
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const ValueError& error) {
            py::set_error(PyExc_ValueError, error.what());
        } catch (const TypeError& error) {
            py::set_error(PyExc_TypeError, error.what());
        }
    });

    m.attr("version") = PYADAPT_VERSION;
    m.attr("compiler") = PYADAPT_COMPILER;
    m.attr("openmp") = _OPENMP;
    m.attr("cuda") = false;
    m.def("usable_isas", &cpu::usable_isas);
    m.def("isa", &cpu::isa);
    m.def("set_isa", &cpu::set_isa);

    m.def("linear_forward", &linear_forward);
    m.def("linear_dx", &linear_dx);
    m.def("lora_forward", &lora_forward);
    m.def("lora_backward", &lora_backward);
    m.def("lora_shrink", &lora_shrink);
    m.def("lora_expand", &lora_expand);
    m.def("lora_gradients", &lora_gradients);
    m.def("lora_expand_dx", &lora_expand_dx);
    m.def("quantize_rows", &quantize_rows);
    m.def("dequantize_rows", &dequantize_rows);
    m.def("lora_rows_forward", &lora_rows_forward);
    m.def("lora_rows_backward", &lora_rows_backward);
}

}  // namespace pyadapt
