"""Stable Diffusion: UNet and text encoder stay what they are, and compute what a twin with adapters of peft does."""

from __future__ import annotations

import copy
import warnings

import diffusers
import peft
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from models import assert_near, diffusion, snapshot
from torch import nn

import pyadapt
from pyadapt import IA3Config, LoHaConfig, LoKrConfig, LoraConfig

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"]
EVERYWHERE += ["time_emb_proj", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"]

# Name -> method and options; every weight starts with a value that counts.
CONFIGS = {
    "lora": (LoraConfig, {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": EVERYWHERE}),
    "lora of attention": (LoraConfig, {"r": 4, "init_lora_weights": False, "target_modules": ATTENTION}),
    "loha": (LoHaConfig, {"r": 4, "alpha": 6, "init_weights": False, "target_modules": EVERYWHERE}),
    "lokr": (LoKrConfig, {"r": 4, "alpha": 6, "init_weights": False, "target_modules": EVERYWHERE}),
    "lokr in two": (LoKrConfig, {"r": 1, "init_weights": False, "target_modules": EVERYWHERE, "decompose_both": True}),
    "ia3": (
        IA3Config,
        {
            "target_modules": ["to_k", "to_v", "ff.net.2"],
            "feedforward_modules": ["ff.net.2"],
            "init_ia3_weights": False,
        },
    ),
}
for _name in ("loha", "lokr in two"):
    CONFIGS[f"{_name}, effective"] = (CONFIGS[_name][0], {**CONFIGS[_name][1], "use_effective_conv2d": True})
# Those that a scaling makes weaker or stronger.
SCALED = [name for name in CONFIGS if name != "ia3"]


def config_of(name, **more):
    cls, options = CONFIGS[name]
    return cls(**{**options, **more})


def wrapped(name, dtype=torch.float64, **more):
    torch.manual_seed(3)
    return pyadapt.wrap(diffusion.unet(dtype), config_of(name, **more))


def predict(unet, dtype=torch.float64, **more):
    return unet(**diffusion.unet_inputs(dtype), **more).sample


def twin_of(model, name):
    """peft's model of the same UNet with the same weights."""
    cls, options = CONFIGS[name]
    theirs = getattr(peft, cls.__name__)(**options)
    twin = peft.get_peft_model(diffusion.unet(torch.float64), theirs)
    ours = {f"base_model.model.{key}": value.detach() for key, value in model.get_adapter_state_dict().items()}
    assert sorted(ours) == sorted(peft.get_peft_model_state_dict(twin))
    peft.set_peft_model_state_dict(twin, ours)
    return twin.eval()


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        return function(*args)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_peft(name):
    model = wrapped(name)
    twin = twin_of(model, name)
    y, expected = predict(model), predict(twin)
    assert (y - predict(diffusion.unet(torch.float64))).abs().max() > 1e-3
    assert_near(y, expected, "model")
    y.square().sum().backward()
    expected.square().sum().backward()
    theirs = {key.replace(".default", ""): p.grad for key, p in twin.named_parameters() if p.requires_grad}
    ours = {f"base_model.model.{key}": p for key, p in model.get_adapter_state_dict().items()}
    assert ours.keys() == theirs.keys()
    for key, parameter in ours.items():
        path, _, factor = key.rpartition(".")
        if f"{path}.hada_t1" in ours and factor in ("hada_w1_a", "hada_w2_a"):
            # peft takes the other product's part for this one's (see test_loha_conv).
            continue
        assert_near(parameter.grad, theirs[key], "gradient")


@pytest.mark.parametrize("name", CONFIGS)
def test_files_both_ways_with_peft(name, tmp_path):
    model = wrapped(name)
    model.save_pretrained(tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(diffusion.unet(torch.float64), tmp_path / "ours").double()
    # A file of fp64 is one of fp64, whatever peft's own weights are at first.
    assert_near(predict(twin.eval()), predict(model), "model", torch.float32)
    twin = twin_of(model, name)
    quietly(twin.save_pretrained, tmp_path / "theirs")
    again = pyadapt.load(diffusion.unet(torch.float64), tmp_path / "theirs")
    for key, value in model.get_adapter_state_dict().items():
        assert torch.equal(again.get_adapter_state_dict()[key], value)
    assert_near(predict(again), predict(model), "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_stays_a_model_of_diffusers(name):
    plain = diffusion.unet(torch.bfloat16)
    parameters, config = dict(plain.named_parameters()), plain.config
    model = pyadapt.wrap(plain, config_of(name))
    assert model is plain
    assert isinstance(model, UNet2DConditionModel)
    assert type(model).__name__ == "UNet2DConditionModel"
    assert model.config is config
    assert model.config.cross_attention_dim == diffusion.WIDTH
    # Pipelines cast to it, whatever the adapters are held in.
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert all(model.get_parameter(key) is parameter for key, parameter in parameters.items())
    assert model.num_parameters() > sum(p.numel() for p in parameters.values())
    y = predict(model, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    again = copy.deepcopy(model)
    assert torch.equal(predict(again, torch.bfloat16), y)
    again.to(torch.float32)
    assert again.dtype == predict(again, torch.float32).dtype == torch.float32


def test_attention_processors_can_be_exchanged():
    from diffusers.models.attention_processor import AttnProcessor

    model = wrapped("lora")
    y = predict(model)
    model.set_attn_processor(AttnProcessor())
    assert_near(predict(model), y, "model")
    model.set_default_attn_processor()
    assert_near(predict(model), y, "model")
    model.to(memory_format=torch.channels_last)
    assert_near(predict(model), y, "model")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(name, when):
    def gradients(checkpointing):
        plain = diffusion.unet(torch.float64)
        if checkpointing and when == "before":
            plain.enable_gradient_checkpointing()
        torch.manual_seed(3)
        model = pyadapt.wrap(plain, config_of(name)).train()
        if checkpointing and when == "after":
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == checkpointing
        predict(model).square().sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    for key, grad in expected.items():
        assert_near(found[key], grad, "gradient")


def test_it_compiles_in_one_graph():
    model = wrapped("lokr in two, effective", target_modules=["to_q", "conv1"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_near(predict(compiled), predict(model), "model")


def denoising_loss(unet, encoder, dtype):
    """What DreamBooth trains: the noise in a picture's latents, by its caption."""
    generator = torch.Generator().manual_seed(8)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([100, 700])
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    noisy = scheduler.add_noise(latents, noise, timesteps).to(dtype)
    context = encoder(input_ids=diffusion.token_ids()).last_hidden_state.to(dtype)
    return nn.functional.mse_loss(unet(noisy, timesteps, context).sample.float(), noise)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss(name, dtype):
    """DreamBooth with both models adapted, from the start that each method has by itself."""
    start = {"init_ia3_weights": True} if name == "ia3" else {}
    start |= {key: True for key in CONFIGS[name][1] if key in ("init_weights", "init_lora_weights")}
    unet = pyadapt.wrap(diffusion.unet(dtype), config_of(name, **start)).train()
    cls = CONFIGS[name][0]
    feedforward = {"feedforward_modules": ["fc2"]} if name == "ia3" else {}
    encoder = pyadapt.wrap(diffusion.text_encoder(), cls(target_modules=["q_proj", "v_proj", "fc2"], **feedforward))
    trained = [p for model in (unet, encoder) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = denoising_loss(unet, encoder.train(), dtype)
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_it_is_a_plain_model_that_diffusers_saves_and_loads(name, tmp_path):
    model = wrapped(name)
    y = predict(model)
    merged = pyadapt.merge(model)
    assert type(merged) is UNet2DConditionModel
    assert_near(predict(merged), y, "merged")
    merged.save_pretrained(tmp_path)
    assert "_hf_peft_config_loaded" not in vars(merged)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert torch.equal(predict(loaded), predict(merged))


@pytest.mark.parametrize("name", CONFIGS)
def test_unwrapping_gives_the_model_back(name):
    plain = diffusion.unet(torch.float64)
    y, before = predict(plain), snapshot(plain)
    pyadapt.unwrap(pyadapt.wrap(plain, config_of(name)))
    assert snapshot(plain) == before
    assert torch.equal(predict(plain), y)


def deltas(name, seed, scale=1.0):
    """What an adapter alone adds to each layer's weight."""
    model = pyadapt.wrap(diffusion.unet(torch.float64), config_of(name))
    refill(model, "default", seed)
    if name in SCALED:
        model.set_scale("default", scale)
    plain = diffusion.unet(torch.float64)
    merged = pyadapt.merge(model)
    return {key: merged.get_parameter(key) - value for key, value in plain.named_parameters()}


def refill(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def with_deltas(*every):
    model = diffusion.unet(torch.float64)
    with torch.no_grad():
        for added in every:
            for key, value in added.items():
                model.get_parameter(key).add_(value)
    return model


def two(name, second=None):
    """A model with two adapters, whose weights the seeds 1 and 2 give."""
    model = pyadapt.wrap(diffusion.unet(torch.float64), config_of(name))
    model.add_adapter("second", config_of(second or name))
    refill(model, "default", 1)
    refill(model, "second", 2)
    return model


@pytest.mark.parametrize("names", [*((name, name) for name in SCALED), ("lora", "lokr"), ("loha, effective", "lora")])
def test_several_combined_by_weight(names):
    model = two(*names)
    model.set_adapter(["default", "second"])
    model.set_scale("default", 0.7)
    model.set_scale("second", -0.4)
    expected = with_deltas(deltas(names[0], 1, 0.7), deltas(names[1], 2, -0.4))
    assert_near(predict(model), predict(expected), "model")
    model.set_adapters(["default", "second"], weights=[0.7, -0.4])
    assert_near(predict(model), predict(expected), "model")
    assert_near(predict(pyadapt.merge(model)), predict(expected), "merged")


def test_lora_as_one_weighted_adapter():
    model = two("lora")
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type="cat")
    model.set_adapter("both")
    assert_near(predict(model), predict(with_deltas(deltas("lora", 1, 0.7), deltas("lora", 2, -0.4))), "model")


def test_an_adapter_for_each_picture():
    model = two("lora", "lokr")
    inputs = diffusion.unet_inputs(torch.float64)
    mixed = model(**inputs, adapter_names=["default", "second"]).sample
    for row, name in enumerate(["default", "second"]):
        model.set_adapter(name)
        assert_near(mixed[row], model(**inputs).sample[row], "model")


@pytest.mark.parametrize("name", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("projected", [False, True])
def test_text_encoder(name, projected, tmp_path):
    cls, options = CONFIGS[name]
    options = {**options, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
    model = pyadapt.wrap(diffusion.text_encoder(projected=projected).double(), cls(**options))
    y = model(input_ids=diffusion.token_ids())[0]
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(diffusion.text_encoder(projected=projected).double(), tmp_path).double()
    assert_near(twin(input_ids=diffusion.token_ids())[0], y, "model", torch.float32)
    assert_near(pyadapt.merge(model)(input_ids=diffusion.token_ids())[0], y, "merged")


def decoder():
    """The part of Stable Diffusion that makes pictures of latents."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def pipeline(unet, encoder):
    """Stable Diffusion with these two, and a tiny decoder; prompts come as embeddings."""
    pipe = StableDiffusionPipeline(
        vae=decoder().to(unet.dtype),
        text_encoder=encoder,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents(pipe, **more):
    embeddings = pipe.text_encoder(input_ids=diffusion.token_ids(1)).last_hidden_state
    return pipe(
        prompt_embeds=embeddings,
        negative_prompt_embeds=torch.zeros_like(embeddings),
        num_inference_steps=3,
        output_type="latent",
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(2),
        **more,
    ).images


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pipeline_gives_the_same_latents_merged_as_unmerged(name):
    unet, encoder = wrapped(name), diffusion.text_encoder().double()
    cls = CONFIGS[name][0]
    feedforward = {"feedforward_modules": ["fc2"]} if name == "ia3" else {}
    pyadapt.wrap(encoder, cls(target_modules=["q_proj", "fc2"], **feedforward))
    refill(encoder, "default", 1)
    pipe = pipeline(unet, encoder)
    expected = latents(pipe)
    plain = latents(pipeline(diffusion.unet(torch.float64), diffusion.text_encoder().double()))
    assert (expected - plain).abs().max() > 1e-3
    pyadapt.merge(unet)
    pyadapt.merge(encoder)
    assert_near(latents(pipe), expected, "merged")


def test_a_pipeline_finds_what_it_calls():
    """Names of diffusers that look for peft's layers, of which there are none, do here what they say."""
    model = two("lora", "lokr")
    pipe = pipeline(model, diffusion.text_encoder().double())
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = latents(pipe)
    plain = latents(pipeline(diffusion.unet(torch.float64), pipe.text_encoder))
    assert pipe.get_list_adapters() == {"unet": ["default", "second"]}
    pipe.disable_lora()
    assert torch.equal(latents(pipe), plain)
    pipe.enable_lora()
    pipe.set_adapters("default")
    assert torch.equal(latents(pipe), expected["default"])
    pipe.set_adapters(["default", "second"], [0.5, 0.25])
    both = with_deltas(deltas("lora", 1, 0.5), deltas("lokr", 2, 0.25))
    assert_near(latents(pipe), latents(pipeline(both, pipe.text_encoder)), "model")
    pipe.fuse_lora(components=["unet"])
    assert model.adapter_state.merged == ("default", "second")
    assert_near(latents(pipe), latents(pipeline(both, pipe.text_encoder)), "merged")
    # The pipeline's own looks for peft's layers; the model's is the way back.
    model.unfuse_lora()
    pipe.delete_adapters("default")
    pipe.set_adapters("second")
    assert torch.equal(latents(pipe), expected["second"])
    pipe.unload_lora_weights()
    assert not pyadapt.model.is_wrapped(model)
    assert torch.equal(latents(pipe), plain)


def test_scale_in_the_arguments_of_attention():
    model = wrapped("lora")
    pipe = pipeline(model, diffusion.text_encoder().double())
    half = with_deltas(deltas_of(model, 0.5))
    assert_near(predict(model, cross_attention_kwargs={"scale": 0.5}), predict(half), "model")
    expected = latents(pipeline(half, pipe.text_encoder))
    assert_near(latents(pipe, cross_attention_kwargs={"scale": 0.5}), expected, "model")
    # It holds for the one call.
    assert model.conv_in.adapters["default"].scaling == 1.5
    assert_near(predict(model, cross_attention_kwargs={"scale": 1.0}), predict(model), "model")
    rows = model(
        **diffusion.unet_inputs(torch.float64),
        adapter_names=["default", "__base__"],
        cross_attention_kwargs={"scale": 0.5},
    ).sample
    assert_near(rows[0], predict(half)[0], "model")
    assert_near(rows[1], predict(diffusion.unet(torch.float64))[1], "model")


def deltas_of(model, scale):
    """What `model` adds to each weight, times `scale`."""
    scaled = copy.deepcopy(model)
    scaled.set_scale("default", scale)
    merged = pyadapt.merge(scaled)
    plain = diffusion.unet(torch.float64)
    return {key: merged.get_parameter(key) - value for key, value in plain.named_parameters()}


def test_fusing_with_a_scale():
    model = wrapped("loha")
    half = with_deltas(deltas_of(model, 0.5))
    model.fuse_lora(lora_scale=0.5)
    assert_near(predict(model), predict(half), "merged")
    model.unfuse_lora()


def test_names_of_diffusers_and_of_transformers_agree():
    model = two("lora")
    assert model.active_adapters() == ["default"]
    model.set_adapter("second")
    assert model.active_adapters() == model.active_adapters == ["second"]
    y, plain = predict(model), predict(diffusion.unet(torch.float64))
    model.disable_adapters()
    assert torch.equal(predict(model), plain)
    model.enable_adapters()
    assert torch.equal(predict(model), y)
    model.disable_lora()
    assert torch.equal(predict(model), plain)
    model.enable_lora()
    assert torch.equal(predict(model), y)
    model.delete_adapters("second")
    assert list(model.peft_config) == ["default"]
    model.enable_lora_hotswap(target_rank=9)
    assert len(model.conv_in.adapters["default"].lora_A) == 9


REFUSED = {
    "their adapters": (lambda m, f: m.load_lora_adapter(f), RuntimeError, r"model\.load_adapter\(path, name\)"),
    "their files": (lambda m, f: m.save_lora_adapter(f), RuntimeError, r"model\.save_pretrained\(folder\)"),
    "fused projections": (lambda m, f: m.fuse_qkv_projections(), RuntimeError, r"pyadapt\.merge\(model\) first"),
    "unknown name": (lambda m, f: m.set_adapters("no"), ValueError, "no adapter is called 'no'"),
    "weights": (lambda m, f: m.set_adapters(["default"], [1.0, 2.0]), ValueError, "1 adapters and 2 weights"),
    "of blocks": (lambda m, f: m.set_adapters("default", {"down": 0.5}), ValueError, "weights for single blocks"),
    "taken": (lambda m, f: m.add_adapter(peft.LoraConfig(target_modules=["to_q"])), ValueError, "'default'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_changed(case, tmp_path):
    call, error, match = REFUSED[case]
    model = wrapped("lora")
    before = snapshot(model)
    with pytest.raises(error, match=match):
        call(model, tmp_path)
    assert snapshot(model) == before


def test_a_method_without_a_scaling():
    model = wrapped("ia3")
    y = predict(model)
    model.set_adapters("default")
    assert torch.equal(predict(model), y)
    with pytest.raises(ValueError, match="has no scaling"):
        model.set_adapters("default", 0.5)
    with pytest.raises(ValueError, match="has no scaling"):
        predict(model, cross_attention_kwargs={"scale": 0.5})


def test_add_adapter_takes_a_configuration_of_peft():
    model = wrapped("lora")
    model.add_adapter(peft.LoraConfig(target_modules=["to_q"], r=3), "theirs")
    assert isinstance(model.peft_config["theirs"], LoraConfig)
    model.set_adapter("theirs")
    assert_near(predict(model), predict(diffusion.unet(torch.float64)), "model")


def test_after_unwrapping_diffusers_has_its_own_way():
    plain = pyadapt.unwrap(wrapped("lora"))
    plain.add_adapter(peft.LoraConfig(target_modules=["to_q"], r=3), "theirs")
    assert plain.active_adapters() == ["theirs"]
    assert plain.peft_config.keys() == {"theirs"}
    plain.disable_adapters()
    plain.enable_adapters()
    plain.set_adapters("theirs", 0.5)
    plain.unload_lora()
    assert type(plain) is UNet2DConditionModel
    assert torch.equal(predict(plain), predict(diffusion.unet(torch.float64)))


def test_default_targets_of_a_unet():
    assert pyadapt.plan(diffusion.unet(), LoraConfig()).config.target_modules == ["to_q", "to_v"]


def test_other_models_of_diffusers(tmp_path):
    model = pyadapt.wrap(decoder(), LoraConfig(target_modules=["conv1", "to_q"], init_lora_weights=False))
    x = torch.randn(1, 3, 8, 8)
    y = model(x).sample
    pyadapt.merge(model).save_pretrained(tmp_path)
    assert_near(diffusers.AutoencoderKL.from_pretrained(tmp_path)(x).sample, y, "merged")
