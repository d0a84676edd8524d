"""What only a GPU can show: streams, graphs, several devices, tuning. Skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
from ops.oracle import make_layer
from ops.test_lora import check
from places import GPU

from pyadapt.ops.kernels import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="waits for a CUDA device: make gpu-check"),
]
I8 = torch.int8


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, I8], ids=str)
@pytest.mark.parametrize("M", [1, 16, 200, 1000])
def test_large_layers(place, M, weight_dtype):
    check(place.layer(M, 1024, 1536, 16, weight_dtype=weight_dtype).with_dropout(0.1))


def test_any_stream(place):
    layer = place.layer(200, 512, 512, 16)
    expected, _ = layer.forward()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y, _ = layer.forward()
    stream.synchronize()
    assert torch.equal(y, expected)


def fused(layer, seed):
    y, S = cuda.lora_forward(
        layer.x, layer.weight, layer.weight_scale, layer.bias, layer.A, layer.B, 1.5, 0.3, seed, layer.x.dtype
    )
    return y, *cuda.lora_backward(
        layer.g, layer.x, layer.weight, layer.weight_scale, layer.A, layer.B, S, 1.5, 0.3, seed, True
    )


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, I8], ids=str)
def test_a_captured_graph_replays_and_draws_new_masks(place, weight_dtype):
    layer = place.layer(100, 256, 320, 8, weight_dtype=weight_dtype)
    seed = torch.tensor([7], device=place.device)
    fused(layer, seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(layer, seed)
    for value in (7, 8):
        seed.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(captured, fused(layer, seed), strict=True):
            assert torch.equal(found, expected)


def test_a_call_neither_waits_nor_allocates_outside_torch(place):
    layer = place.layer(100, 256, 320, 8, weight_dtype=I8)
    seed = torch.tensor([7], device=place.device)
    fused(layer, seed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(layer, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_and_cpu_agree_with_dropout(place):
    """Equal masks: what is left is rounding."""
    on_cpu = make_layer(60, 128, 96, 8, torch.bfloat16).with_dropout(0.4)
    on_gpu = on_cpu.to(place.device)
    (y, S), (y_cpu, S_cpu) = on_gpu.forward(), on_cpu.forward()
    assert torch.allclose(S.cpu(), S_cpu, rtol=1e-4, atol=1e-4)
    assert torch.allclose(y.cpu().float(), y_cpu.float(), rtol=2e-2, atol=5e-2)


def test_the_other_device(place):
    if torch.cuda.device_count() < 2:
        pytest.skip("waits for a second CUDA device: run the suite where there are two")
    layer = make_layer(100, 128, 96, 8, torch.bfloat16).to(torch.device("cuda", 1))
    check(layer)
    assert torch.cuda.current_device() == 0


def test_tuning_measures_once_and_remembers(place, monkeypatch, tmp_path):
    from pyadapt.ops import autotune

    monkeypatch.setenv("PYADAPT_AUTOTUNE", "1")
    monkeypatch.setenv("PYADAPT_CACHE", str(tmp_path))
    autotune.measurements.cache_clear()
    try:
        layer = place.layer(512, 256, 256, 8)
        check(layer)
        table = autotune.measurements(place.device).table()
        assert len(table) == 2  # forward and backward
        assert list(tmp_path.glob("autotune-*.json"))
    finally:
        autotune.measurements.cache_clear()
