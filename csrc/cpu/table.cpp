// The kernel table of one instruction set.
#include "kernels.hpp"

#define PYADAPT_TEXT_OF(name) #name
#define PYADAPT_TEXT(name) PYADAPT_TEXT_OF(name)

namespace pyadapt::cpu::PYADAPT_ISA {

void gemm(const Gemm* products, int count);
void skinny(const Skinny&);
void quantize_rows(const QuantizeRows&);
void dequantize_rows(const DequantizeRows&);
void segments(const SegmentStage* stages, int count, int threads);
void columns(const Columns&);
void kron_forward(const Kron&);
void kron_backward(const Kron&);
void khatri_rao(const KhatriRao&);
void khatri_rao_backward(const KhatriRao&);

extern const Kernels kernels;
const Kernels kernels = {PYADAPT_TEXT(PYADAPT_ISA), gemm, skinny, quantize_rows, dequantize_rows, segments,
                         columns, kron_forward, kron_backward, khatri_rao, khatri_rao_backward};

}  // namespace pyadapt::cpu::PYADAPT_ISA
