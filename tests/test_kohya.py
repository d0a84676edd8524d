"""Files of kohya's trainer and of LyCORIS: written by LyCORIS itself, whose own output a loaded model has to give."""

from __future__ import annotations

import copy
import logging

import lycoris
import lycoris.kohya
import peft
import pytest
import torch
from models import assert_near, diffusion, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import pyadapt
from pyadapt import AdapterFileError

LORA = {
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon", "conv_dim": 3, "conv_alpha": 2.0},
    "tucker": {"algo": "locon", "conv_dim": 3, "conv_alpha": 2.0, "use_tucker": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "scalar": {"algo": "lora", "use_scalar": True},
}
LOHA = {
    "loha": {"algo": "loha"},
    "loha of two ranks": {"algo": "loha", "conv_dim": 3, "conv_alpha": 2.0},
    "loha tucker": {"algo": "loha", "use_tucker": True},
    "loha scalar": {"algo": "loha", "use_scalar": True},
}
LOKR = {
    "lokr": {"algo": "lokr"},
    "lokr factor 2": {"algo": "lokr", "factor": 2},
    "lokr factor 2, rank 1": {"algo": "lokr", "factor": 2, "linear_dim": 1},
    "lokr decompose both": {"algo": "lokr", "decompose_both": True, "linear_dim": 1},
    "lokr full": {"algo": "lokr", "full_matrix": True},
    "lokr of a high rank": {"algo": "lokr", "linear_dim": 100},
    "lokr tucker": {"algo": "lokr", "use_tucker": True, "factor": 2, "linear_dim": 1},
    "lokr scalar": {"algo": "lokr", "use_scalar": True},
}
ALL = {**LORA, **LOHA, **LOKR}


class Net(nn.Module):
    """Linear layers and convolutions whose names are hard to tell apart without their dots."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.Conv2d(12, 16, 1)])
        self.out = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 18, bias=False))

    def forward(self, x):
        h = self.conv(x).unflatten(-1, (4, 3))
        for block in self.blocks:
            h = block(h)
        return self.out(h.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net().double().eval()


def data():
    return torch.randn(5, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomise(network):
    """Give every trained weight of LyCORIS' modules a value, so that each of them counts."""
    generator = torch.Generator().manual_seed(7)
    network.double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter * (1 + 0.2 * values) if name.endswith("dora_scale") else 0.6 * values)


def save(network, path):
    save_file({key: value.detach().contiguous().clone() for key, value in network.state_dict().items()}, path)
    return path


def with_lycoris(model, path, linear_dim=2, linear_alpha=3.0, **options):
    """A copy of `model` with LyCORIS' own wrapper on it, and the file that it writes."""
    twin = copy.deepcopy(model)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv1d", "Conv2d"], "target_name": []})
    network = lycoris.create_lycoris(twin, 1.0, linear_dim, linear_alpha, **options)
    network.apply_to()
    randomise(network)
    return twin, save(network, path)


# LyCORIS' usual choice of layers, less what it would name twice in a UNet.
PRESET = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = ["conv_in", "conv_out", "time_embedding.linear_1"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""


def with_kohya(unet, encoders, path, linear_dim=2, linear_alpha=3.0, **options):
    """Copies of a UNet and a text encoder (or several) with kohya's form of LyCORIS on them, and the file."""
    twins = copy.deepcopy(unet), copy.deepcopy(encoders)
    preset = path.with_suffix(".toml")
    preset.write_text(PRESET)
    network = lycoris.kohya.create_network(
        1.0, linear_dim, linear_alpha, None, twins[1], twins[0], preset=str(preset), **options
    )
    network.apply_to(twins[1], twins[0], True, True)
    randomise(network)
    return *twins, save(network, path)


def predict(unet):
    return unet(**diffusion.unet_inputs(torch.float64)).sample


def encode(encoder):
    return encoder(input_ids=diffusion.token_ids())[0]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "style.safetensors"


@pytest.mark.parametrize("case", ALL)
def test_lycoris_wrapper(case, file):
    plain = net()
    twin, _ = with_lycoris(plain, file, **ALL[case])
    model = pyadapt.load(net(), file)
    assert (twin(data()) - plain(data())).abs().max() > 1e-3
    assert_near(model(data()), twin(data()), "model")
    assert sorted(model.peft_config["default"].target_modules) == ["blocks.0", "blocks.1", "conv", "out.0", "out.2"]
    # A stored weight is as good as one that is computed along the way.
    assert_near(pyadapt.merge(model)(data()), twin(data()), "merged")


@pytest.mark.parametrize("case", ALL)
def test_stable_diffusion(case, file):
    unet, encoder = diffusion.unet(torch.float64), diffusion.text_encoder().double()
    unet_twin, encoder_twin, _ = with_kohya(unet, encoder, file, **ALL[case])
    before = predict(unet), encode(encoder)
    assert (predict(unet_twin) - before[0]).abs().max() > 1e-3
    assert (encode(encoder_twin) - before[1]).abs().max() > 1e-3
    assert_near(predict(pyadapt.load(unet, file)), predict(unet_twin), "model")
    assert_near(encode(pyadapt.load(encoder, file)), encode(encoder_twin), "model")


@pytest.mark.parametrize("case", ["tucker", "loha tucker", "lokr tucker", "loha of two ranks"])
def test_what_was_loaded_is_an_adapter_like_any_other(case, file, tmp_path):
    """Saved as PEFT's folder, read by peft; beside another adapter, swapped in, trained."""
    unet = diffusion.unet(torch.float64)
    twin, _, _ = with_kohya(unet, diffusion.text_encoder().double(), file, **ALL[case])
    model = pyadapt.load(unet, file, adapter_name="style")
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(diffusion.unet(torch.float64), tmp_path / "ours/style")
    assert_near(predict(theirs.base_model.model.double()), predict(twin), "model", torch.float32)
    again = pyadapt.load(diffusion.unet(torch.float64), tmp_path / "ours/style")
    assert torch.equal(predict(again), predict(model))
    again.load_adapter(file, "second", low_cpu_mem_usage=True, is_trainable=True)
    again.set_adapter("second")
    assert torch.equal(predict(again), predict(model))
    predict(again).square().mean().backward()
    grads = [p.grad for name, p in again.named_parameters() if ".adapters.second." in name]
    assert grads
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if ".adapters.default." in name:
                parameter.normal_()
    again.set_adapter("default")
    assert again.hotswap_adapter(file, "default")
    assert_near(predict(again), predict(model), "model")


@pytest.mark.parametrize("on_input", [True, False])
def test_ia3(on_input, file):
    """Of outputs LyCORIS scales the weight and not the bias: that has an equivalent where there is none."""
    plain = net()
    if not on_input:
        plain.out[0].bias = None
    twin = copy.deepcopy(plain)
    names = [r"conv$", r"blocks\.1", r"out\.0"] if on_input else [r"out\.[02]"]
    lycoris.LycorisNetwork.apply_preset({"target_module": [], "target_name": names})
    network = lycoris.LycorisNetwork(twin, network_module="ia3", train_on_input=on_input)
    network.apply_to()
    randomise(network)
    save(network, file)
    model = pyadapt.load(plain, file)
    assert (twin(data()) - net()(data())).abs().max() > 1e-3
    assert_near(model(data()), twin(data()), "model")
    assert len(model.peft_config["default"].target_modules) == len(names) + (not on_input)
    if not on_input:
        refused(load_file(file), file, "LyCORIS' IA3 of an output leaves the layer's bias alone")


def test_half_precision_files(file):
    with_lycoris(net(), file, **ALL["locon"])
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    model = pyadapt.load(net().float(), file)
    assert model.out[0].adapters["default"].lora_A.dtype == torch.float32
    assert model.out[0].adapters["default"].scaling == 1.5
    model = pyadapt.load(net().float(), file, adapter_dtype=torch.bfloat16)
    assert torch.equal(model.out[0].adapters["default"].lora_A, load_file(file)["lycoris_out_0.lora_down.weight"])


def test_each_layer_has_its_own_rank_and_alpha(file):
    """Targets and patterns mean one path, and not another with the same end: 0 is not 1.0, and not 2.0."""
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), pair, nn.Sequential(nn.Linear(4, 4)))
    tensors = {}
    for name, rank, alpha in (("0", 1, 5.0), ("1_0", 2, 3.0), ("1_1", 2, 3.0)):
        tensors[f"lycoris_{name}.lora_down.weight"] = torch.randn(rank, 4)
        tensors[f"lycoris_{name}.lora_up.weight"] = torch.randn(4, rank)
        tensors[f"lycoris_{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    model = pyadapt.load(model, file)
    units = {path: layer.adapters["default"] for path, layer in pyadapt.layer.adapted_layers(model)}
    assert {path: (len(unit.lora_A), unit.scaling) for path, unit in units.items()} == {
        "0": (1, 5.0),
        "1.0": (2, 1.5),
        "1.1": (2, 1.5),
    }


def test_alpha_that_is_missing_or_zero_is_the_rank(file):
    tensors = {"lycoris_0.lora_down.weight": torch.randn(3, 4), "lycoris_0.lora_up.weight": torch.randn(5, 3)}
    for alpha in ({}, {"lycoris_0.alpha": torch.tensor(0.0)}):
        save_file({**tensors, **alpha}, file)
        assert pyadapt.load(nn.Sequential(nn.Linear(4, 5)), file)[0].adapters["default"].scaling == 1.0


def test_linear_weights_of_a_pointwise_convolution_and_the_other_way_round(file):
    down, up = torch.randn(3, 4), torch.randn(5, 3)
    x = torch.randn(2, 4, 6)
    for ones in ((), (1,), (1, 1)):
        weights = {"lora_down.weight": down.reshape(3, 4, *ones), "lora_up.weight": up.reshape(5, 3, *ones)}
        save_file({f"lycoris_0.{key}": value for key, value in weights.items()}, file)
        conv, linear = nn.Sequential(nn.Conv1d(4, 5, 1)), nn.Sequential(nn.Linear(4, 5))
        exact = conv(x) + (up @ down) @ x
        linear[0].load_state_dict({"weight": conv[0].weight[..., 0], "bias": conv[0].bias})
        assert_near(pyadapt.load(conv, file)(x), exact, "layer")
        assert_near(pyadapt.load(linear, file)(x.mT).mT, exact, "layer")


def test_the_factor_of_older_files(file):
    """Before LyCORIS multiplied `scalar` into a factor it wrote it beside them."""
    twin, _ = with_lycoris(net(), file, **ALL["lora"])
    tensors = load_file(file)
    for key in list(tensors):
        if key.endswith("lora_up.weight"):
            tensors[key] = tensors[key] / 3
            tensors[key.replace("lora_up.weight", "scalar")] = torch.tensor(3.0, dtype=torch.float64)
    save_file(tensors, file)
    assert_near(pyadapt.load(net(), file)(data()), twin(data()), "model")


def test_a_file_for_several_models_says_what_it_left_aside(file, caplog):
    unet, encoder = diffusion.unet(torch.float64), diffusion.text_encoder().double()
    with_kohya(unet, encoder, file, **ALL["lora"])
    with caplog.at_level(logging.INFO, "pyadapt"):
        pyadapt.load(unet, file)
    assert "took the keys of lora_unet and left those of lora_te aside" in caplog.text


def test_two_text_encoders(file):
    """SDXL's: each takes the keys that fit it, whether its names have CLIP's outer level or not."""
    first, second = diffusion.text_encoder(2).double(), diffusion.text_encoder(3, width=24, projected=True).double()
    _, twins, _ = with_kohya(diffusion.unet(torch.float64), [first, second], file, **ALL["lora"])
    keys = set(load_file(file))
    assert any(key.startswith("lora_te1_encoder_layers_0_self_attn") for key in keys)
    assert any(key.startswith("lora_te2_text_model_encoder_layers_0_self_attn") for key in keys)
    assert_near(encode(pyadapt.load(second, file)), encode(twins[1]), "model")
    with pytest.raises(AdapterFileError, match=r"(?s)18 keys of lora_te2 .* \(2, 24\), and the layer needs \(2, 16\)"):
        pyadapt.load(diffusion.text_encoder(2).double(), file, prefix="lora_te2")
    assert_near(encode(pyadapt.load(first, file)), encode(twins[0]), "model")


def test_keys_of_transformers_4(file):
    encoder = diffusion.text_encoder().double()
    _, twin, _ = with_kohya(diffusion.unet(torch.float64), encoder, file, **ALL["lora"])
    renamed = {key.replace("lora_te_", "lora_te_text_model_"): value for key, value in load_file(file).items()}
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in renamed
    save_file(renamed, file)
    assert_near(encode(pyadapt.load(encoder, file)), encode(twin), "model")


def test_prefixes_that_fit_alike_have_to_be_told_apart(file):
    encoders = [diffusion.text_encoder().double(), diffusion.text_encoder().double()]
    _, twins, _ = with_kohya(diffusion.unet(torch.float64), encoders, file, **ALL["lora"])
    model = diffusion.text_encoder().double()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="lora_te1 and of lora_te2 fit it alike; say which are meant: prefix="):
        pyadapt.load(model, file)
    assert snapshot(model) == before
    assert_near(encode(pyadapt.load(model, file, prefix="lora_te2")), encode(twins[1]), "model")
    model.load_adapter(file, "first", prefix="lora_te1")
    model.set_adapter("first")
    assert_near(encode(model), encode(twins[0]), "model")


def original_names(unet):
    """Path of each layer of a UNet -> its name in the original code, as ours has it."""
    from pyadapt.kohya.names import paths_by_name

    own = {path.replace(".", "_") for path, _ in unet.named_modules()}
    pattern = ("input_blocks", "middle_block", "output_blocks", "time_embed_", "label_emb", "out_")
    names = paths_by_name(unet).items()
    return {paths[0]: name for name, paths in names if name not in own and name.startswith(pattern)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "layers_per_block": 2,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 1),
            "use_linear_projection": True,
        },
    ],
    ids=["small", "like SDXL"],
)
def test_names_of_the_original_blocks_are_those_that_diffusers_maps(options):
    """The oracle maps such names to its own paths, whose "_" it makes dots."""
    from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers

    unet = diffusion.unet(**options)
    names = original_names(unet)
    layers = [path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert names.keys() >= set(layers)
    for path in layers:
        if path == "up_blocks.0.upsamplers.0.conv" and not hasattr(unet.up_blocks[0], "attentions"):
            # The oracle takes place 1 for attention always; without any, it is that of the upsampling (as in
            # output_blocks.2.1.conv of Stable Diffusion 1's checkpoints).
            assert names[path] == "output_blocks_1_1_conv"
            continue
        state = {f"lora_unet_{names[path]}.lora_down.weight": torch.zeros(1)}
        (key,) = map(_convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers(state, unet.config))
        flat = key.replace(".lora.down.weight", "").replace("_lora.down.weight", "").replace(".processor", "")
        # Its last part is not undone for the layers of attention: to_out stands for to_out.0.
        assert flat.replace(".", "_") in (path.replace(".", "_"), path.replace(".", "_").removesuffix("_0")), path


def test_a_file_with_the_original_names(file):
    unet = diffusion.unet(torch.float64)
    twin, _, _ = with_kohya(unet, diffusion.text_encoder().double(), file, **ALL["locon"])
    by_own_name = {path.replace(".", "_"): name for path, name in original_names(unet).items()}
    renamed = {}
    for key, value in load_file(file).items():
        module, _, suffix = key.partition(".")
        if module.startswith("lora_unet_"):
            renamed[f"lora_unet_{by_own_name[module.removeprefix('lora_unet_')]}.{suffix}"] = value
    save_file(renamed, file)
    assert_near(predict(pyadapt.load(unet, file)), predict(twin), "model")


def test_a_folder_with_one_such_file(file, tmp_path):
    twin, _ = with_lycoris(net(), file, **ALL["lora"])
    assert_near(pyadapt.load(net(), tmp_path)(data()), twin(data()), "model")
    save_file(load_file(file), tmp_path / "other.safetensors")
    with pytest.raises(AdapterFileError, match=r"2 files: name one \(other.safetensors, style.safetensors\)"):
        pyadapt.load(net(), tmp_path)


def refused(tensors, file, match, model=None, **options):
    """Loading fails with one error, and leaves a plain model and a wrapped one as they were."""
    save_file(tensors, file)
    plain = net() if model is None else model
    before = snapshot(plain)
    with pytest.raises(AdapterFileError, match=match):
        pyadapt.load(plain, file, **options)
    assert snapshot(plain) == before
    layers = [path for path, layer in plain.named_modules() if isinstance(layer, nn.Linear)]
    wrapped = pyadapt.wrap(plain, pyadapt.LoraConfig(target_modules=layers, r=1))
    before = snapshot(wrapped)
    with pytest.raises(AdapterFileError, match=match):
        wrapped.load_adapter(file, "other", **options)
    assert snapshot(wrapped) == before


def one_layer(**others):
    """A file for the layer `out.0` of `net()`."""
    tensors = {"lora_down.weight": torch.randn(2, 16), "lora_up.weight": torch.randn(20, 2), **others}
    return {f"lycoris_out_0.{key}": value for key, value in tensors.items() if value is not None}


BAD = {
    "no tensors": ({}, "holds no tensors"),
    "other keys": ({"weight": torch.ones(2)}, r"its keys \(weight\) begin with none of lora_unet, "),
    "keys of PEFT": ({"base_model.model.out.0.lora_A.weight": torch.ones(2, 16)}, "no adapter_config.json: give"),
    "no module": ({"lora_unet_mid.lora_up.weight": torch.ones(2, 2)}, "no such module: lora_unet_mid"),
    "extra module": ({**one_layer(), "lycoris_in.lora_up.weight": torch.ones(2, 2)}, "no such module: lycoris_in"),
    "extra key": ({**one_layer(), "bundle.emb": torch.ones(2)}, "no such module: bundle.emb"),
    "missing half": (one_layer(**{"lora_down.weight": None}), "lycoris_out_0: lora_down.weight is missing"),
    "misshapen": (one_layer(**{"lora_down.weight": torch.ones(2, 9)}), r"is \(2, 9\), and the layer needs \(2, 16\)"),
    "two ranks": (one_layer(**{"lora_up.weight": torch.ones(20, 3)}), r"is \(20, 3\), and the layer needs \(20, 2\)"),
    "columns' norm": (one_layer(dora_scale=torch.ones(1, 16)), r"dora_scale is \(1, 16\): DoRA here has the norm of"),
    "some DoRA": (
        {**one_layer(dora_scale=torch.ones(20, 1)), "lycoris_out_2.lora_down.weight": torch.ones(2, 20),
         "lycoris_out_2.lora_up.weight": torch.ones(18, 2)},
        "use_dora would have to be True for out.0 and False for out.2",
    ),
    "full": ({"lycoris_out_0.diff": torch.ones(20, 16)}, "diff is a whole weight's difference"),
    "norm": ({"lycoris_out_1.w_norm": torch.ones(4)}, "w_norm is a trained norm"),
    "OFT": ({"lycoris_out_0.oft_blocks": torch.ones(2, 2, 2)}, "oft_blocks is OFT"),
    "GLoRA": ({"lycoris_out_0.a1.weight": torch.ones(2, 2)}, "a1.weight is GLoRA"),
    "unknown": ({"lycoris_out_0.foo": torch.ones(2, 2)}, "foo is of no method known here"),
    "no layer": ({f"lycoris_out_1.{k}": torch.ones(2, 2) for k in ("lora_up.weight", "lora_down.weight")}, "is a GELU"),
    "two methods": (
        {**one_layer(), **{f"lycoris_out_2.hada_w{i}_{s}": torch.ones(18, 2) if s == "a" else torch.ones(2, 20)
                           for i in "12" for s in "ab"}},
        r"layers of several methods \(LOHA, LORA\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, file):
    tensors, match = BAD[case]
    refused(tensors, file, match)


@pytest.mark.parametrize("case", ["tucker", "dora", "loha", "loha tucker", "lokr factor 2, rank 1", "lokr tucker"])
def test_any_tensor_of_any_other_shape_is_one_error(case, file):
    with_lycoris(net(), file, **ALL[case])
    whole = load_file(file)
    layer = "lycoris_blocks_0." if "tucker" in case else "lycoris_out_0."
    for key in (key for key in whole if key.startswith(layer)):
        is_alpha = key.endswith("alpha")
        for shape in ((0,), (1,) * 6, (3, 3, 3), (2, 3), (), (1,)):
            if not (is_alpha and torch.Size(shape).numel() == 1):
                refused({**whole, key: torch.ones(shape)}, file, layer[:-1] + ": ")
        if is_alpha:
            refused({**whole, key: torch.tensor(float("nan"))}, file, "alpha is nan, and has to be a finite number")


def test_names_that_are_written_alike(file):
    model = nn.Module()
    model.a_b, model.a = nn.ModuleDict({"c": nn.Linear(4, 4)}), nn.ModuleDict({"b_c": nn.Linear(4, 4)})
    tensors = {"lycoris_a_b_c.lora_up.weight": torch.ones(4, 2), "lycoris_a_b_c.lora_down.weight": torch.ones(2, 4)}
    refused(tensors, file, r"a_b\.c and a\.b_c are written alike", model)


def test_a_convolution_with_groups(file):
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Linear(4, 4))
    tensors = {"lycoris_0.lora_up.weight": torch.ones(4, 2, 1), "lycoris_0.lora_down.weight": torch.ones(2, 2, 3)}
    refused(tensors, file, "2 groups sees one group here", model)


KRON = {
    "unbalanced": ({"unbalanced_factorization": True}, r"splits 20 as \(\d, \d\) and another layer as .*unbalanced"),
    # 16 = 4 x 4 where PEFT makes 8 x 2 of it, and 20 = 5 x 4 a third thing.
    "a large factor": ({"factor": 8}, "no decompose_factor splits the dimensions as the file does"),
    "DoRA": ({"dora_wd": True}, "dora_scale is the norm of DoRA, which LoKr here has not"),
}


@pytest.mark.parametrize("case", KRON)
def test_kronecker_products_that_peft_cannot_name(case, file):
    options, match = KRON[case]
    model = nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 32))
    with_lycoris(model, file, algo="lokr", **options)
    refused(load_file(file), file, match, model)


def kron(**shapes):
    """A file for the layer `out.0` of `net()`, (20, 16)."""
    return {f"lycoris_out_0.lokr_{key}": torch.ones(shape) for key, shape in shapes.items()}


BAD_KRON = {
    "w1 too large": (kron(w1=(3, 4), w2=(5, 4)), r"w1 is \(3, 4\), and the layer has 20 outputs and 16 inputs"),
    "w1 no matrix": (kron(w1=(4,), w2=(5, 4)), r"lokr_w1 is \(4,\), and has to be a matrix"),
    "half of w1": (kron(w1_a=(4, 1), w2=(5, 4)), "lokr_w1_b is missing"),
    "w1 of two ranks": (kron(w1_a=(4, 1), w1_b=(2, 4), w2=(5, 4)), "which cannot be multiplied"),
    "no w2": (kron(w1=(4, 4)), "lokr_w2_b is missing"),
    "w2 misshapen": (kron(w1=(4, 4), w2=(4, 4)), r"lokr_w2 is \(4, 4\), and the layer needs \(5, 4\)"),
    "two ranks": (kron(w1_a=(4, 1), w1_b=(1, 4), w2_a=(5, 2), w2_b=(2, 4)), "w1 is of rank 1 and w2 of rank 2"),
    "rank too high": (kron(w1=(4, 4), w2_a=(5, 3), w2_b=(3, 4)), "at rank 3 w2 of 5 x 4 would have the other form"),
    "w2 alone full": (kron(w1_a=(4, 1), w1_b=(1, 4), w2=(5, 4)), "at rank 1 w2 of 5 x 4 would have the other form"),
    "no convolution": (kron(w1=(4, 4), w2_a=(1, 5), w2_b=(1, 4), t2=(1, 1, 3, 3)), "lokr_t2 takes a kernel apart"),
    "decompose_both of one": (
        {
            **kron(w1_a=(4, 1), w1_b=(1, 4), w2_a=(5, 1), w2_b=(1, 4)),
            "lycoris_out_2.lokr_w1": torch.ones(3, 4),
            "lycoris_out_2.lokr_w2_a": torch.ones(6, 1),
            "lycoris_out_2.lokr_w2_b": torch.ones(1, 5),
        },
        "w1 of out.2 would be a product here: decompose_both is one choice",
    ),
}


@pytest.mark.parametrize("case", BAD_KRON)
def test_bad_kronecker_products(case, file):
    tensors, match = BAD_KRON[case]
    refused(tensors, file, match)


@pytest.mark.parametrize("factor", [-1, 8, 16])
def test_the_factor_is_found_for_the_dimensions_of_stable_diffusion(factor):
    from lycoris.functional import factorization

    from pyadapt.methods.lycoris.lokr import factorization as ours
    from pyadapt.methods.lycoris.lokr_kohya import Split, _factor

    splits = {
        size: Split(*factorization(size, factor)) for size in (4, 320, 640, 768, 960, 1280, 1920, 2048, 2560, 5120)
    }
    found = _factor(splits)
    assert {size: ours(size, found) for size in splits} == splits


def test_a_prefix_that_is_not_there(file):
    refused(one_layer(), file, "prefix='lora_unet': the file's keys begin with lycoris", prefix="lora_unet")


def test_half_of_the_tensors_missing_are_listed(file):
    with_lycoris(net(), file, **ALL["locon"])
    tensors = load_file(file)
    kept = {key: value for key, value in tensors.items() if not key.endswith("lora_up.weight")}
    refused(kept, file, r"(?s)5 keys of lycoris.*lycoris_blocks_0: lora_up.weight is missing.*lycoris_out_2: lora_up")


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"PK\x03\x04 a zip file"])
def test_no_safetensors(content, file):
    file.write_bytes(content)
    model = net()
    before = snapshot(model)
    with pytest.raises(AdapterFileError):
        pyadapt.load(model, file)
    assert snapshot(model) == before


def test_without_strict_other_keys_are_left_out(file, caplog):
    save_file({**one_layer(), "bundle.emb": torch.ones(2), "lycoris_in.lora_up.weight": torch.ones(2, 2)}, file)
    model = pyadapt.load(net(), file, strict=False)
    assert "left out, as this model has no place for them: bundle.emb, lycoris_in" in caplog.text
    assert [path for path, _ in pyadapt.layer.adapted_layers(model)] == ["out.0"]
    # Half of a layer is no adapter, however lenient one is.
    save_file(one_layer(**{"lora_up.weight": None}), file)
    with pytest.raises(AdapterFileError, match=r"lora_up\.weight is missing"):
        pyadapt.load(net(), file, strict=False)
