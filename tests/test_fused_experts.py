"""LoRA files from before the experts of a mixture were one parameter."""

from __future__ import annotations

import pytest
import torch
from models import assert_near
from models.mixtures import logits, mixture

import pyadapt

# Model -> its old names of gate, up and down, of the modules above them, and of what is adapted beside them.
UNFUSED = {
    "mixtral": (("w1", "w3", "w2"), "block_sparse_moe", ["q_proj", "gate", "w1", "w2", "w3"], (0, 1)),
    "qwen3_moe": (("gate_proj", "up_proj", "down_proj"), "mlp", ["q_proj", "gate"], (1,)),
}


def old_file(name, folder, **options):
    """An adapter as peft wrote it when each expert was a module of linear layers."""
    import peft
    from safetensors.torch import save_file

    (gate, up, down), block, targets, layers = UNFUSED[name]
    shapes = {gate: (40, 24), up: (40, 24), down: (24, 40)}
    r, ranks = options.get("r", 3), options.get("rank_pattern", {})
    tensors = {}

    def adapt(path, out_features, in_features):
        rank = ranks.get(path.rpartition(".")[2], r)
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, in_features) / 5
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out_features, rank) / 5

    for i in range(2):
        adapt(f"model.layers.{i}.self_attn.q_proj", 32, 24)
    for i in layers:
        adapt(f"model.layers.{i}.{block}.gate", 4, 24)
        for expert in range(4):
            for leaf, shape in shapes.items():
                adapt(f"model.layers.{i}.{block}.experts.{expert}.{leaf}", *shape)
    names = sorted({*targets, gate, up, down})
    peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": names, **options}).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", UNFUSED)
def test_a_file_with_single_experts_is_read_as_by_peft(name, tmp_path):
    import peft

    torch.manual_seed(3)
    if name == "qwen3_moe":
        # The dense layer, whose layers have the same names, is left alone.
        expression = r"model\.layers\.\d+\.(self_attn\.q_proj|mlp\.gate|mlp\.experts\..*(gate|up|down)_proj)"
        old_file(name, tmp_path, target_modules=expression)
    else:
        old_file(name, tmp_path)
    twin = peft.PeftModel.from_pretrained(mixture(name), tmp_path).eval()
    model = pyadapt.load(mixture(name), tmp_path).eval()
    assert_near(logits(model), logits(twin), "model")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(pyadapt.load(mixture(name), tmp_path / "again")), logits(model))
    again = peft.PeftModel.from_pretrained(mixture(name), tmp_path / "again").eval()
    assert_near(logits(again), logits(model), "model")


def test_ranks_and_scalings_of_single_experts(tmp_path, caplog):
    """peft reads neither patterns of single experts nor rsLoRA rightly, and no dropout: the oracle is the sum."""
    torch.manual_seed(3)
    options = {
        "use_rslora": True,
        "rank_pattern": {"w1": 2},
        "alpha_pattern": {"w3": 7, "gate": 2},
        "lora_dropout": 0.1,
    }
    tensors = old_file("mixtral", tmp_path, **options)
    model = pyadapt.load(mixture("mixtral"), tmp_path).eval()
    assert "lora_dropout=0.1 is left out" in caplog.text
    plain = mixture("mixtral").double()
    with torch.no_grad():
        for i, layer in enumerate(plain.model.layers):

            def delta(path, alpha=5, i=i):
                A, B = (tensors[f"base_model.model.model.layers.{i}.{path}.lora_{f}.weight"].double() for f in "AB")
                return alpha / len(A) ** 0.5 * B @ A

            layer.self_attn.q_proj.weight += delta("self_attn.q_proj")
            layer.mlp.gate.weight += delta("block_sparse_moe.gate", 2)
            for e in range(4):
                expert = f"block_sparse_moe.experts.{e}."
                layer.mlp.experts.gate_up_proj[e] += torch.cat([delta(expert + "w1"), delta(expert + "w3", 7)])
                layer.mlp.experts.down_proj[e] += delta(expert + "w2")
    assert_near(logits(model), logits(plain), "model", torch.float32)


def test_a_file_that_lacks_an_expert(tmp_path):
    from safetensors.torch import save_file

    tensors = old_file("mixtral", tmp_path)
    tensors = {key: value for key, value in tensors.items() if ".2.w3." not in key}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(pyadapt.AdapterFileError, match="7 of them, and none on w3 or up_proj of expert 2"):
        pyadapt.load(mixture("mixtral"), tmp_path)
