// What Python sees of the core and the CPU kernels: pyadapt._native. Every check is made before memory is touched, and
// computing releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <omp.h>

#include <optional>
#include <string>
#include <vector>

#include "core/checks.hpp"
#include "core/error.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/ia3.hpp"
#include "cpu/int8.hpp"
#include "cpu/layer.hpp"
#include "cpu/loha.hpp"
#include "cpu/lokr.hpp"
#include "cpu/lora_rows.hpp"
#include "python/tensors.hpp"

namespace pyadapt {
namespace {

namespace py = pybind11;
using python::Input;
using python::Optional;
using python::OptionalRows;
using python::rows;
using python::tensor;

struct LayerWeight {
    Input values;  // as it lies: unit stride along either dimension
    Optional scale, bias;
    LayerWeight(py::handle weight, py::handle weight_scale, py::handle layer_bias)
        : values(weight, "weight", dlpack::import_tensor, true), scale(weight_scale, "weight_scale"),
          bias(layer_bias, "bias") {}
    Weight view() const { return {&values.value, scale.get(), bias.get()}; }
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

void scaled_linear_forward(py::handle x, py::handle input_scale, py::handle weight, py::handle scale, py::handle bias,
                           py::handle y, bool skinny, int threads) {
    const Input x_(x, "x", dlpack::import_rows), input_scale_(input_scale, "input_scale");
    const Tensor y_ = rows(y, "y");
    const LayerWeight layer(weight, scale, bias);
    py::gil_scoped_release release;
    cpu::linear_forward(x_, layer.view(), y_, skinny, team(threads), &input_scale_.value);
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
    const OptionalRows dx_(dx, "dx");
    const LayerWeight layer(weight, scale, py::none());
    const cpu::Adapter adapter = {&A_.value, &B_.value, scaling, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_backward(g_, x_, layer.view(), adapter, S_, dx_.get(), dA_, dB_,
                       team(threads));
}

void lora_shrink(py::handle x, py::handle A, py::handle S, double p, py::handle seed, bool for_bf16, int threads) {
    const Input x_(x, "x"), A_(A, "A");
    const Tensor S_ = tensor(S, "S");
    const cpu::Adapter adapter = {&A_.value, nullptr, 1.0, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_shrink(x_, adapter, S_, for_bf16 ? DType::bf16 : DType::f32, team(threads));
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

void lora_input_gradient(py::handle dS, py::handle x, py::handle dA, double p, py::handle seed, int threads) {
    const Input dS_(dS, "dS"), x_(x, "x");
    const Tensor dA_ = tensor(dA, "dA");
    const cpu::Adapter adapter = {nullptr, nullptr, 1.0, dropout(p, seed)};
    py::gil_scoped_release release;
    cpu::lora_input_gradient(dS_, x_, adapter, dA_, team(threads));
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

void scale_columns(py::handle a, py::handle scale, py::handle shift, py::handle b, py::handle out, py::handle dot,
                   int threads) {
    const Input a_(a, "a", dlpack::import_rows);
    const Optional scale_(scale, "scale"), shift_(shift, "shift");
    std::optional<Input> b_;
    if (!b.is_none()) b_.emplace(b, "b", dlpack::import_rows);
    const OptionalRows out_(out, "out");
    std::optional<Tensor> dot_;
    if (!dot.is_none()) dot_ = tensor(dot, "dot");
    py::gil_scoped_release release;
    cpu::scale_columns(a_, scale_.get(), shift_.get(), b_ ? &b_->value : nullptr, out_.get(), dot_ ? &*dot_ : nullptr,
                       team(threads));
}

// The sums over m of a[m, n] b[m, n] / divisor[n]; whether some |divisor| is below `least`.
bool column_quotients(py::handle a, py::handle b, py::handle divisor, double least, py::handle dot, int threads) {
    const Input a_(a, "a", dlpack::import_rows), b_(b, "b", dlpack::import_rows), divisor_(divisor, "divisor");
    const Tensor dot_ = tensor(dot, "dot");
    py::gil_scoped_release release;
    cpu::scale_columns(a_, nullptr, nullptr, &b_.value, nullptr, &dot_, team(threads));
    return cpu::divide_dots(dot_, divisor_, least);
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
    const OptionalRows dx_(dx, "dx");
    const Adapters adapters(As, Bs, scalings, dropouts, seed);
    const Matrices<Tensor> dA(dAs, "dA", tensor), dB(dBs, "dB", tensor);
    py::gil_scoped_release release;
    cpu::lora_rows_backward(g_.value, x_.value, adapters.views, segments_.value, S_.value, dx_.get(),
                            dA.values, dB.values, team(threads));
}

// --- LoHa ---

struct LohaInputs {
    Input w1a, w1b, w2a, w2b;
    Optional rows;
    double scaling;
    LohaInputs(py::handle w1a, py::handle w1b, py::handle w2a, py::handle w2b, py::handle rows, double scaling)
        : w1a(w1a, "w1a"), w1b(w1b, "w1b"), w2a(w2a, "w2a"), w2b(w2b, "w2b"), rows(rows, "factors"), scaling(scaling) {}
    cpu::LohaFactors view() const {
        return {&w1a.value, &w1b.value, &w2a.value, &w2b.value, rows.get(), scaling};
    }
};

void khatri_rao(py::handle w1a, py::handle w1b, py::handle w2a, py::handle w2b, py::handle rows, py::handle A,
                py::handle B, double scaling, int threads) {
    const LohaInputs factors(w1a, w1b, w2a, w2b, rows, scaling);
    const Tensor A_ = tensor(A, "A"), B_ = tensor(B, "B");
    py::gil_scoped_release release;
    cpu::khatri_rao(factors.view(), A_, B_, team(threads));
}

void khatri_rao_backward(py::handle dA, py::handle dB, py::handle w1a, py::handle w1b, py::handle w2a, py::handle w2b,
                         py::handle rows, py::handle dw1a, py::handle dw1b, py::handle dw2a, py::handle dw2b,
                         double scaling, int threads) {
    const Input dA_(dA, "dA"), dB_(dB, "dB");
    const LohaInputs factors(w1a, w1b, w2a, w2b, rows, scaling);
    const Tensor dw1a_ = tensor(dw1a, "dw1a"), dw1b_ = tensor(dw1b, "dw1b");
    const Tensor dw2a_ = tensor(dw2a, "dw2a"), dw2b_ = tensor(dw2b, "dw2b");
    py::gil_scoped_release release;
    cpu::khatri_rao_backward(dA_, dB_, factors.view(), dw1a_, dw1b_, dw2a_, dw2b_, team(threads));
}

// --- LoKr ---

void lokr_forward(py::handle x, py::handle w1, py::handle down, py::handle up, py::handle factors, py::handle y,
                  double scaling, int threads) {
    const Input x_(x, "x", dlpack::import_rows), w1_(w1, "w1"), down_(down, "down");
    const Optional up_(up, "up"), factors_(factors, "factors");
    const Tensor y_ = rows(y, "y");
    const cpu::LokrTerm term = {&w1_.value, &down_.value, up_.get(), factors_.get(), scaling};
    py::gil_scoped_release release;
    cpu::lokr_forward(x_, term, y_, team(threads));
}

void lokr_backward(py::handle g, py::handle x, py::handle w1, py::handle down, py::handle up, py::handle factors,
                   py::handle dx, py::handle dw1, py::handle d_down, py::handle d_up, double scaling, int threads) {
    const Input g_(g, "g", dlpack::import_rows), x_(x, "x", dlpack::import_rows), w1_(w1, "w1"), down_(down, "down");
    const Optional up_(up, "up"), factors_(factors, "factors");
    const OptionalRows dx_(dx, "dx"), d_up_(d_up, "d_up");
    const Tensor dw1_ = tensor(dw1, "dw1"), d_down_ = tensor(d_down, "d_down");
    const cpu::LokrTerm term = {&w1_.value, &down_.value, up_.get(), factors_.get(), scaling};
    py::gil_scoped_release release;
    cpu::lokr_backward(g_, x_, term, dx_.get(), dw1_, d_down_, d_up_.get(), team(threads));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "pyadapt's native core. Use it through pyadapt.native and pyadapt.ops.";
    python::register_errors();

    m.attr("version") = PYADAPT_VERSION;
    m.attr("compiler") = PYADAPT_COMPILER;
    m.attr("openmp") = _OPENMP;
    m.def("usable_isas", &cpu::usable_isas);
    m.def("isa", &cpu::isa);
    m.def("set_isa", &cpu::set_isa);

    m.def("linear_forward", &linear_forward);
    m.def("scaled_linear_forward", &scaled_linear_forward);
    m.def("linear_dx", &linear_dx);
    m.def("lora_forward", &lora_forward);
    m.def("lora_backward", &lora_backward);
    m.def("lora_shrink", &lora_shrink);
    m.def("lora_expand", &lora_expand);
    m.def("lora_gradients", &lora_gradients);
    m.def("lora_input_gradient", &lora_input_gradient);
    m.def("lora_expand_dx", &lora_expand_dx);
    m.def("quantize_rows", &quantize_rows);
    m.def("dequantize_rows", &dequantize_rows);
    m.def("scale_columns", &scale_columns);
    m.def("column_quotients", &column_quotients);
    m.def("lora_rows_forward", &lora_rows_forward);
    m.def("lora_rows_backward", &lora_rows_backward);
    m.def("khatri_rao", &khatri_rao);
    m.def("khatri_rao_backward", &khatri_rao_backward);
    m.def("lokr_forward", &lokr_forward);
    m.def("lokr_backward", &lokr_backward);
}

}  // namespace pyadapt
