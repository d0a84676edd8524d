// What Python sees of the CUDA kernels: pyadapt._cuda. Every check is made before anything is launched; nothing waits for
// the device. `stream` is torch's handle, `workspace` an int8 tensor of as many bytes as the call's *_workspace says, or
// None where that is 0; `seed` is an int64 tensor of one element on the device, or a number.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "../core/checks.hpp"
#include "../core/error.hpp"
#include "../python/tensors.hpp"
#include "device.hpp"
#include "layer.hpp"

namespace pyadapt::cuda {
namespace {

namespace py = pybind11;
using python::Input;
using python::Optional;
using python::OptionalRows;
using python::rows;
using python::tensor;

// W is taken as it lies, with unit stride along either dimension, and never copied: it is large.
struct LayerWeight {
    Tensor values;
    Optional scale, bias;
    LayerWeight(py::handle weight, py::handle weight_scale, py::handle layer_bias)
        : values(tensor(weight, "weight")), scale(weight_scale, "weight_scale"), bias(layer_bias, "bias") {}
    Weight view() const { return {&values, scale.get(), bias.get()}; }
};

// A dropout with its seed; keeps the seed's memory for the call.
struct SeededDropout {
    std::optional<Input> on_device;
    DeviceDropout value;
    SeededDropout(double p, py::handle seed) {
        const Dropout dropout = make_dropout(p);
        value = {nullptr, {0, 0}, dropout.threshold, dropout.scale};
        if (p == 0.0) return;
        if (seed.is_none()) refuse_missing_seed(p);
        if (py::isinstance<py::int_>(seed)) {
            const auto key = static_cast<std::uint64_t>(seed.cast<std::int64_t>());
            value.key[0] = static_cast<std::uint32_t>(key);
            value.key[1] = static_cast<std::uint32_t>(key >> 32);
            return;
        }
        on_device.emplace(seed, "seed");
        check_seed(on_device->value);
        value.seed = static_cast<const std::int64_t*>(on_device->value.data);
    }
    const Tensor* seed() const { return on_device ? &on_device->value : nullptr; }
};

// The device of a call's first operand made current, its stream and its scratch memory.
struct Call {
    Optional workspace;
    Guard guard;
    Context context;
    Call(const Tensor& first, py::handle scratch, std::uintptr_t stream)
        : workspace(scratch, "workspace"), guard(first.device),
          context{first.device, launch_on(first.device, stream), workspace.get()} {}
};

void bind_linear_forward(py::handle x, py::handle weight, py::handle scale, py::handle bias, py::handle y, bool skinny,
                         py::handle workspace, std::uintptr_t stream) {
    const Input x_(x, "x", dlpack::import_rows);
    const Tensor y_ = rows(y, "y");
    const LayerWeight layer(weight, scale, bias);
    const Call call(x_, workspace, stream);
    linear_forward(x_, layer.view(), y_, skinny, call.context);
}

void bind_linear_dx(py::handle g, py::handle weight, py::handle scale, py::handle dx, py::handle workspace,
                    std::uintptr_t stream) {
    const Input g_(g, "g", dlpack::import_rows);
    const Tensor dx_ = rows(dx, "dx");
    const LayerWeight layer(weight, scale, py::none());
    const Call call(g_, workspace, stream);
    linear_dx(g_, layer.view(), dx_, call.context);
}

void bind_lora_forward(py::handle x, py::handle weight, py::handle scale, py::handle bias, py::handle A, py::handle B,
                       py::handle y, py::handle S, double scaling, double p, py::handle seed, bool skinny,
                       py::handle workspace, std::uintptr_t stream) {
    const Input x_(x, "x", dlpack::import_rows), A_(A, "A"), B_(B, "B");
    const Tensor y_ = rows(y, "y"), S_ = tensor(S, "S");
    const LayerWeight layer(weight, scale, bias);
    const SeededDropout dropout(p, seed);
    const Call call(x_, workspace, stream);
    check_same_device({&x_.value, dropout.seed()});
    const Adapter adapter = {&A_.value, &B_.value, scaling, dropout.value};
    lora_forward(x_, layer.view(), adapter, y_, S_, skinny, call.context);
}

void bind_lora_backward(py::handle g, py::handle x, py::handle weight, py::handle scale, py::handle A, py::handle B,
                        py::handle S, py::handle dx, py::handle dA, py::handle dB, double scaling, double p,
                        py::handle seed, py::handle workspace, std::uintptr_t stream) {
    const Input g_(g, "g", dlpack::import_rows), x_(x, "x", dlpack::import_rows), A_(A, "A"), B_(B, "B"), S_(S, "S");
    const Tensor dA_ = tensor(dA, "dA"), dB_ = tensor(dB, "dB");
    const OptionalRows dx_(dx, "dx");
    const LayerWeight layer(weight, scale, py::none());
    const SeededDropout dropout(p, seed);
    const Call call(g_, workspace, stream);
    check_same_device({&g_.value, dropout.seed()});
    const Adapter adapter = {&A_.value, &B_.value, scaling, dropout.value};
    lora_backward(g_, x_, layer.view(), adapter, S_, dx_.get(), dA_, dB_, call.context);
}

void bind_lora_shrink(py::handle x, py::handle A, py::handle S, double p, py::handle seed, py::handle workspace,
                      std::uintptr_t stream) {
    const Input x_(x, "x", dlpack::import_rows), A_(A, "A");
    const Tensor S_ = tensor(S, "S");
    const SeededDropout dropout(p, seed);
    const Call call(x_, workspace, stream);
    check_same_device({&x_.value, dropout.seed()});
    lora_shrink(x_, {&A_.value, nullptr, 1.0, dropout.value}, S_, call.context);
}

void bind_lora_expand(py::handle S, py::handle B, py::handle scale, py::handle bias, py::handle y, double scaling,
                      std::uintptr_t stream) {
    const Input S_(S, "S"), B_(B, "B");
    const Tensor y_ = rows(y, "y");
    const Optional scale_(scale, "weight_scale"), bias_(bias, "bias");
    const Call call(S_, py::none(), stream);
    lora_expand(S_, {nullptr, &B_.value, scaling, {}}, {nullptr, scale_.get(), bias_.get()}, y_, call.context);
}

void bind_lora_gradients(py::handle g, py::handle x, py::handle A, py::handle B, py::handle S, py::handle dS,
                         py::handle dA, py::handle dB, py::handle weight_scale, double factor, py::handle scaled_g,
                         double scaling, double p, py::handle seed, py::handle workspace, std::uintptr_t stream) {
    const Input g_(g, "g", dlpack::import_rows), x_(x, "x", dlpack::import_rows), A_(A, "A"), B_(B, "B"), S_(S, "S");
    const Tensor dS_ = tensor(dS, "dS"), dA_ = tensor(dA, "dA"), dB_ = tensor(dB, "dB");
    const Optional scale_(weight_scale, "weight_scale");
    const OptionalRows scaled_(scaled_g, "scaled_g");
    const SeededDropout dropout(p, seed);
    const Call call(g_, workspace, stream);
    check_same_device({&g_.value, dropout.seed()});
    const Adapter adapter = {&A_.value, &B_.value, scaling, dropout.value};
    lora_gradients(g_, x_, adapter, S_, dS_, dA_, dB_, scale_.get(), factor, scaled_.get(), call.context);
}

void bind_lora_expand_dx(py::handle dS, py::handle A, py::handle dx, double p, py::handle seed,
                         std::uintptr_t stream) {
    const Input dS_(dS, "dS"), A_(A, "A");
    const Tensor dx_ = rows(dx, "dx");
    const SeededDropout dropout(p, seed);
    const Call call(dS_, py::none(), stream);
    check_same_device({&dS_.value, dropout.seed()});
    lora_expand_dx(dS_, {&A_.value, nullptr, 1.0, dropout.value}, dx_, call.context);
}

void bind_quantize_rows(py::handle w, py::handle q, py::handle scale, std::uintptr_t stream) {
    const Input w_(w, "w");
    const Tensor q_ = tensor(q, "q"), scale_ = tensor(scale, "scale");
    const Call call(w_, py::none(), stream);
    quantize_rows(w_, q_, scale_, call.context);
}

void bind_dequantize_rows(py::handle q, py::handle scale, double factor, py::handle out, std::uintptr_t stream) {
    const Input q_(q, "q");
    const Tensor out_ = tensor(out, "out");
    const Optional scale_(scale, "scale");
    const Call call(q_, py::none(), stream);
    dequantize_rows(q_, scale_.get(), factor, out_, call.context);
}

// Sizes that fit are checked by the call that follows; here any answer will do for those that do not.
LayerSizes sizes(std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t r, bool bf16, bool int8) {
    const DType dtype = bf16 ? DType::bf16 : DType::f16;
    const auto fit = [](std::int64_t size) { return static_cast<int>(size & 0x7fffffff); };
    return {fit(M), fit(N), fit(K), fit(r), dtype, int8 ? DType::i8 : dtype};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "pyadapt's CUDA kernels. Use them through pyadapt.native and pyadapt.ops.";
    python::register_errors();
    py::register_exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError);

    m.attr("version") = PYADAPT_VERSION;
    m.attr("architectures") = PYADAPT_CUDA_ARCHITECTURES;  // "80-real,...,120"
    m.attr("runtime") = CUDART_VERSION;
    m.def("device_count", &device_count);
    m.def("capability", &capability);

    m.def("forward_workspace", [](std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t r, bool bf16, bool int8,
                                  bool skinny, int device) {
        return forward_workspace(sizes(M, N, K, r, bf16, int8), skinny, launch_on(device, 0));
    });
    m.def("backward_workspace", [](std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t r, bool bf16, bool int8,
                                   int device) {
        return backward_workspace(sizes(M, N, K, r, bf16, int8), launch_on(device, 0));
    });
    m.def("linear_forward", &bind_linear_forward);
    m.def("linear_dx", &bind_linear_dx);
    m.def("lora_forward", &bind_lora_forward);
    m.def("lora_backward", &bind_lora_backward);
    m.def("lora_shrink", &bind_lora_shrink);
    m.def("lora_expand", &bind_lora_expand);
    m.def("lora_gradients", &bind_lora_gradients);
    m.def("lora_expand_dx", &bind_lora_expand_dx);
    m.def("quantize_rows", &bind_quantize_rows);
    m.def("dequantize_rows", &bind_dequantize_rows);
}

}  // namespace pyadapt::cuda
