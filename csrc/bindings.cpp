// What Python sees of the core: pyadapt._native. Tensors come as DLPack capsules, which are read and left to their own
// destructors; every check is made before memory is touched, and computing releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <omp.h>

#include <string>

#include "core/checks.hpp"
#include "core/dlpack.hpp"
#include "core/error.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/int8.hpp"
#include "cpu/layer.hpp"

namespace py = pybind11;

namespace pyadapt {
namespace {

Tensor tensor(py::handle capsule, const char* name) {
    auto* managed = static_cast<dlpack::Managed*>(
        PyCapsule_IsValid(capsule.ptr(), "dltensor") ? PyCapsule_GetPointer(capsule.ptr(), "dltensor") : nullptr);
    if (!managed)
        throw TypeError(std::string(name) + " is a " + Py_TYPE(capsule.ptr())->tp_name +
                        "; wanted an unused DLPack capsule");
    return dlpack::import_tensor(managed->tensor, name);
}

// A tensor that may be None.
struct Optional {
    Tensor value{};
    bool given;
    Optional(py::handle capsule, const char* name) : given(!capsule.is_none()) {
        if (given) value = tensor(capsule, name);
    }
    const Tensor* get() const { return given ? &value : nullptr; }
};

struct LayerWeight {
    Tensor values;
    Optional scale, bias;
    LayerWeight(py::handle weight, py::handle weight_scale, py::handle layer_bias)
        : values(tensor(weight, "weight")), scale(weight_scale, "weight_scale"), bias(layer_bias, "bias") {}
    cpu::Weight view() const { return {&values, scale.get(), bias.get()}; }
};

int team(int threads) {
    if (threads >= 1) return threads;
    throw ValueError("threads is " + std::to_string(threads) + "; wanted at least 1");
}

Dropout dropout(double p, py::handle seed) { return make_dropout(p, Optional(seed, "seed").get()); }

void linear_forward(py::handle x, py::handle weight, py::handle scale, py::handle bias, py::handle y, bool skinny,
                    int threads) {
    const Tensor x_ = tensor(x, "x"), y_ = tensor(y, "y");
    const LayerWeight layer(weight, scale, bias);
    py::gil_scoped_release release;
    cpu::linear_forward(x_, layer.view(), y_, skinny, team(threads));
}

void linear_dx(py::handle g, py::handle weight, py::handle scale, py::handle dx, int threads) {
    const Tensor g_ = tensor(g, "g"), dx_ = tensor(dx, "dx");
    const LayerWeight layer(weight, scale, py::none());
    py::gil_scoped_release release;
    cpu::linear_dx(g_, layer.view(), dx_, team(threads));
}

void lora_forward(py::handle x, py::handle weight, py::handle scale, py::handle bias, py::handle A, py::handle B,
                  py::handle y, py::handle S, double scaling, double p, py::handle seed, bool skinny, int threads) {
    const Tensor x_ = tensor(x, "x"), A_ = tensor(A, "A"), B_ = tensor(B, "B");
    const Tensor y_ = tensor(y, "y"), S_ = tensor(S, "S");
    const LayerWeight layer(weight, scale, bias);
    const cpu::Adapter adapter = {&A_, &B_, scaling, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_forward(x_, layer.view(), adapter, y_, S_, skinny, team(threads));
}

void lora_backward(py::handle g, py::handle x, py::handle weight, py::handle scale, py::handle A, py::handle B,
                   py::handle S, py::handle dx, py::handle dA, py::handle dB, double scaling, double p, py::handle seed,
                   int threads) {
    const Tensor g_ = tensor(g, "g"), x_ = tensor(x, "x"), A_ = tensor(A, "A"), B_ = tensor(B, "B");
    const Tensor S_ = tensor(S, "S");
    const Tensor dA_ = tensor(dA, "dA"), dB_ = tensor(dB, "dB");
    const Optional dx_(dx, "dx");
    const LayerWeight layer(weight, scale, py::none());
    const cpu::Adapter adapter = {&A_, &B_, scaling, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_backward(g_, x_, layer.view(), adapter, S_, dx_.get(), dA_, dB_, team(threads));
}

void lora_shrink(py::handle x, py::handle A, py::handle S, double p, py::handle seed, int threads) {
    const Tensor x_ = tensor(x, "x"), A_ = tensor(A, "A"), S_ = tensor(S, "S");
    const cpu::Adapter adapter = {&A_, nullptr, 1.0, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_shrink(x_, adapter, S_, team(threads));
}

void lora_expand(py::handle S, py::handle B, py::handle scale, py::handle bias, py::handle y, double scaling,
                 int threads) {
    const Tensor S_ = tensor(S, "S"), B_ = tensor(B, "B");
    const Tensor y_ = tensor(y, "y");
    const Optional scale_(scale, "weight_scale"), bias_(bias, "bias");
    const cpu::Adapter adapter = {nullptr, &B_, scaling, Dropout{}};
    py::gil_scoped_release release;
    cpu::lora_expand(S_, adapter, {nullptr, scale_.get(), bias_.get()}, y_, team(threads));
}

void lora_gradients(py::handle g, py::handle x, py::handle A, py::handle B, py::handle S, py::handle dS, py::handle dA,
                    py::handle dB, double scaling, double p, py::handle seed, int threads) {
    const Tensor g_ = tensor(g, "g"), x_ = tensor(x, "x"), A_ = tensor(A, "A"), B_ = tensor(B, "B");
    const Tensor S_ = tensor(S, "S");
    const Tensor dS_ = tensor(dS, "dS"), dA_ = tensor(dA, "dA"), dB_ = tensor(dB, "dB");
    const cpu::Adapter adapter = {&A_, &B_, scaling, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_gradients(g_, x_, adapter, S_, dS_, dA_, dB_, team(threads));
}

void lora_expand_dx(py::handle dS, py::handle A, py::handle dx, double p, py::handle seed, int threads) {
    const Tensor dS_ = tensor(dS, "dS"), A_ = tensor(A, "A"), dx_ = tensor(dx, "dx");
    const cpu::Adapter adapter = {&A_, nullptr, 1.0, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_expand_dx(dS_, adapter, dx_, team(threads));
}

void quantize_rows(py::handle w, py::handle q, py::handle scale, int threads) {
    const Tensor w_ = tensor(w, "w"), q_ = tensor(q, "q"), scale_ = tensor(scale, "scale");
    py::gil_scoped_release release;
    cpu::quantize_rows(w_, q_, scale_, team(threads));
}

void dequantize_rows(py::handle q, py::handle scale, py::handle out, int threads) {
    const Tensor q_ = tensor(q, "q"), out_ = tensor(out, "out");
    const Optional scale_(scale, "scale");
    py::gil_scoped_release release;
    cpu::dequantize_rows(q_, scale_.get(), out_, team(threads));
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
}

}  // namespace pyadapt
