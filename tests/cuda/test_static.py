"""What the compiler made of the kernels, for every release architecture; and that each rule would find its fault."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from source_tree import ROOT, script

check, objects, toolkit = script("check_cuda_build"), script("cuda_objects"), script("cuda_toolkit")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def tools():
    """Skip where CUDA's compiler or disassembler is not installed."""
    try:
        return toolkit.find(), toolkit.tool("cuobjdump")
    except toolkit.ToolMissing as error:
        pytest.skip(f"waits for CUDA's tools: {error}")


@pytest.fixture(scope="module")
def summaries(tools):
    """Every source for every release architecture: two compilers at once, kept from run to run."""
    return objects.compiled_all(SOURCES)


def test_there_are_kernels():
    assert {d.stem for d in check.DEMANDS} <= {source.stem for source in SOURCES}


@pytest.mark.slow
@pytest.mark.parametrize("stem", [source.stem for source in SOURCES])
def test_release_build(summaries, stem):
    problems = check.problems_of(stem, summaries[stem])
    assert not problems, "\n".join(problems)
    assert {kernel.architecture for kernel in summaries[stem].kernels} == set(objects.ARCHITECTURES)


FAULTY = """
#include "cuda/launch.cuh"
namespace pyadapt::cuda {
__global__ void local_memory(float* d, int n) {
    float v[64];
    for (int i = 0; i < 64; ++i) v[i] = d[i];
    for (int i = 0; i < n; ++i) v[static_cast<int>(d[i]) & 63] += 1;
    d[0] = v[n & 63];
}
__global__ void atomics(float* d) { atomicAdd(d, 1.0f); }
__global__ void doubles(double* d) { d[threadIdx.x] *= 1.5; }
__global__ void __launch_bounds__(1024) spills(float* d) {
    float v[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) v[i] = d[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; ++i) d[threadIdx.x * 96 + i] = v[i] * v[(i * 37 + 5) % 96];
}
__global__ void good(float* d) {
    PYADAPT_DYNAMIC_SHARED(memory);
    copy_async_16(memory + 16 * threadIdx.x, d + 4 * threadIdx.x, 16);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    std::uint32_t a[4];
    load_matrix_x4(a, memory + 16 * threadIdx.x);
    const std::uint32_t b[2] = {a[0], a[1]};
    float sums[4] = {};
    mma_16x8x16(sums, a, b, __half());
    const float left[4] = {round_tf32(sums[0]), 1, 2, 3}, right[2] = {4, 5};
    mma_16x8x8(sums, left, right);
    for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = sums[i];
}
}
"""


@pytest.fixture(scope="module")
def faulty(tools, tmp_path_factory):
    """Kernels with one fault each, and one without, for two architectures."""
    source = tmp_path_factory.mktemp("faulty") / "faulty.cu"
    source.write_text(FAULTY)
    return objects.compiled(source, (75, 90), None)


def kernel(summary, name, architecture=90):
    """The kernel of that name."""
    return next(k for k in summary.kernels if re.search(rf"\b{name}\b", k.name) and k.architecture == architecture)


@pytest.mark.parametrize(
    ("name", "word"),
    [("local_memory", "stack frame"), ("atomics", "atomics"), ("doubles", "doubles"), ("spills", "spills")],
)
def test_faults_are_found(faulty, name, word):
    assert any(word in problem for problem in check.kernel_problems("faulty", kernel(faulty, name)))


def test_a_good_kernel_passes(faulty):
    good = kernel(faulty, "good")
    assert check.kernel_problems("faulty", good) == []
    assert good.count("HMMA.16816") == good.count("HMMA.1688.F32.TF32") == good.count("LDGSTS") == 1
    assert kernel(faulty, "good", 75).count("HMMA.1688") == 2
    assert kernel(faulty, "good", 75).count("LDGSTS") == 0


def test_missing_instructions_are_found(faulty, monkeypatch):
    demand = check.Demand("faulty", "atomics", "LDGSTS", 80, 120)
    monkeypatch.setattr(check, "STUB", 4)  # these kernels are small
    assert "no LDGSTS" in check.demand_problems("faulty", faulty.kernels, [demand])[0]
    assert check.demand_problems("faulty", faulty.kernels, [replace(demand, kernel="good")]) == []
    assert check.demand_problems("faulty", faulty.kernels, [replace(demand, kernel="")]) == []
    assert "atomics" in check.demand_problems("faulty", faulty.kernels, [replace(demand, kernel="", every=True)])[0]
    assert check.demand_problems("faulty", faulty.kernels, [replace(demand, kernel="renamed")]) != []


def test_registers_over_the_ceiling_are_found(faulty, monkeypatch):
    monkeypatch.setattr(check, "CEILINGS", (("good", 8), ("", 255)))
    assert "at most 8 wanted" in check.kernel_problems("faulty", kernel(faulty, "good"))[0]


def test_missing_architectures_are_found(faulty):
    assert check.architecture_problems(faulty, (75, 90), None) == []
    assert "machine code" in check.architecture_problems(faulty, (75, 80, 90), None)[0]
    assert "PTX" in check.architecture_problems(faulty, (75, 90), 120)[0]


def test_kept_objects_are_used_again(faulty, tmp_path, monkeypatch):
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    monkeypatch.setattr(objects, "summarize", lambda *_: pytest.fail("compiled again"))
    assert objects.compiled(source, (75, 90), None) == faulty
    source.write_text(FAULTY.replace("1.5", "2.5"))
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        objects.compiled(source, (75, 90), None)


def test_a_shared_cudart_is_found(tools, tmp_path):
    """A library that needs libcudart at load is refused."""
    source, library = tmp_path / "plain.cu", tmp_path / "plain.so"
    source.write_text('#include <cuda_runtime_api.h>\nextern "C" int count(int* n) { return cudaGetDeviceCount(n); }\n')
    found, _ = tools
    shared = sorted(found.library.glob("libcudart.so*"))
    if not shared:
        pytest.skip("waits for a toolkit with a shared cudart")
    command = [found.nvcc, *objects.code_options((90,), None), "-shared", "-Xcompiler", "-fPIC", source, "-o", library]
    command += found.link_options
    objects._run([*command, "--cudart=none", "-Xlinker", shared[0]])
    assert any("libcudart" in problem for problem in check.extension_problems(library, (90,), None))
    objects._run(command)
    assert check.extension_problems(library, (90,), None) == []
