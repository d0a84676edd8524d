"""EVA: first directions and ranks from the data, as peft finds them, and a model that is left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from models import FAMILIES, build, copy_adapter_to_peft, model_batch, peft_twin, plain_module, snapshot
from tolerance import assert_close, assert_near
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.methods.lora.pca import IncrementalPca

pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage:UserWarning")

TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def batches_of(family, count=3, rows=4, tokens=16):
    """Batches with padding and, where labels are beside tokens, masked labels."""
    batches = [model_batch(family, seed, rows, tokens) for seed in range(count)]
    for batch in batches:
        batch["attention_mask"][0, 10:] = 0
        if batch["labels"].shape == batch["attention_mask"].shape:
            batch["labels"] = batch["labels"].clone()
            batch["labels"][1, :5] = -100
    return batches


def options_of(family="llama", **options):
    known = FAMILIES[family]
    targets = TARGETS.get(family, list(known.targets))
    config = {"r": 3, "lora_alpha": 4, "target_modules": targets, "task_type": known.task, **options}
    return {**config, "init_lora_weights": "eva"}


def wrapped(family="llama", data=None, **options):
    data = batches_of(family) if data is None else data
    return pyadapt.wrap(build(family), LoraConfig(**options_of(family, **options)), data=data)


def logits(model, family="llama"):
    return model(**model_batch(family)).logits


def theirs_on(twin, batches):
    import peft

    peft.initialize_lora_eva_weights(twin, batches, show_progress_bar=False)
    return peft.get_peft_model_state_dict(twin)


def patterns(config):
    return dict(config.rank_pattern), dict(config.alpha_pattern)


@pytest.mark.parametrize(
    ("family", "eva"),
    [
        ("llama", {}),
        ("llama", {"rho": 3.0, "tau": 0.999}),
        ("llama", {"rho": 1.0}),
        ("llama", {"use_label_mask": False, "adjust_scaling_factors": False}),
        ("llama", {"label_mask_value": 5}),
        ("gpt2", {"whiten": True}),
    ],
    ids=str,
)
def test_values_ranks_and_scalings_are_those_of_peft(family, eva, tmp_path):
    import peft

    options = options_of(family, fan_in_fan_out=family == "gpt2")
    twin = peft_twin(build(family), eva_config=peft.EvaConfig(**eva), **options)
    theirs = theirs_on(twin, batches_of(family))
    model = wrapped(family, eva_config=eva)
    ours = {f"base_model.model.{key}": value for key, value in model.get_adapter_state_dict().items()}
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.shape == theirs[key].shape, key
        # Components that have stood still within tau; both libraries run the same rounds.
        assert_close(value, theirs[key], "product", torch.float32, key, part=torch.ones(()))
    assert patterns(model.peft_config["default"]) == patterns(twin.peft_config["default"])
    assert_near(logits(model, family), logits(build(family), family), "model")
    # Neither file needs data to be loaded.
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1)
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert_near(logits(again, family), logits(model, family), "model")
    copy_adapter_to_peft(model, twin)
    twin.save_pretrained(tmp_path / "peft")
    assert_near(logits(pyadapt.load(build(family), tmp_path / "peft"), family), logits(twin, family), "model")


def test_whitening_once_where_layers_share_their_input():
    """peft divides in place, once more for each layer of the same input; each is divided once here."""
    plain = wrapped(eva_config={"rho": 1.0}).get_adapter_state_dict()
    white = wrapped(eva_config={"rho": 1.0, "whiten": True}).get_adapter_state_dict()
    q, k, v = (f"model.layers.0.self_attn.{name}_proj.lora_A.weight" for name in "qkv")
    assert torch.equal(white[q], white[k])
    assert torch.equal(white[q], white[v])
    assert_near(nn.functional.normalize(white[q]), plain[q], "layer")
    captured = []
    model = build("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda layer, args, output: captured.append(args[0]))
    for batch in batches_of("llama"):
        model(**batch)
        captured[-1] = captured[-1][batch["attention_mask"].bool() & (batch["labels"] != -100)]
    # A turn over the data weighs each row alike, so that the singular values go with the root of the turns.
    x = torch.cat(captured).detach().double()
    S = torch.linalg.svdvals(x - x.mean(0))[:3]
    ratio = white[q].detach().norm(dim=1).double() * S.sqrt()
    assert float(ratio.std() / ratio.mean()) < 0.05
    assert float(ratio.mean()) <= 1


def test_peft_names(tmp_path):
    data, options = batches_of("llama"), options_of()
    at_once = wrapped()
    state = pyadapt.get_eva_state_dict(build("llama"), data, LoraConfig(**options))
    for how in ({"dataloader": data}, {"eva_state_dict": state}):
        later = pyadapt.get_peft_model(build("llama"), LoraConfig(**options))
        later.add_adapter("other", LoraConfig())
        pyadapt.initialize_lora_eva_weights(later, **how)
        assert later.active_adapters == ["default"]
        assert list(later.peft_config) == ["other", "default"]
        assert patterns(later.peft_config["default"]) == patterns(at_once.peft_config["default"])
        for key, value in later.get_adapter_state_dict("default").items():
            assert torch.equal(value, at_once.get_adapter_state_dict()[key])
        trained = {name for name, parameter in later.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, parameter in at_once.named_parameters() if parameter.requires_grad}
    with pytest.raises(ValueError, match="no adapter called 'nobody'; there are other, default"):
        pyadapt.initialize_lora_eva_weights(later, data, adapter_name="nobody")
    with pytest.raises(ValueError, match="adapter 'other' has init_lora_weights=True, not 'eva'"):
        pyadapt.initialize_lora_eva_weights(later, data, adapter_name="other")
    before = snapshot(later)
    q = "model.layers.0.self_attn.q_proj"
    for how, match in (
        ({}, "starts from data"),
        ({"eva_state_dict": {"lm_head": state[q]}}, "eva_state_dict has lm_head, which the adapter is not on"),
        ({"eva_state_dict": {q: torch.ones(3, 7)}}, rf"eva_state_dict: {q} is \(3, 7\), not \(rank, 24\)"),
    ):
        with pytest.raises(ValueError, match=match):
            pyadapt.initialize_lora_eva_weights(later, **how)
        assert snapshot(later) == before


def test_ranks_add_up_and_layers_without_one_get_no_adapter(tmp_path):
    import peft

    # What goes into down_proj hardly varies in more than a few directions.
    model = wrapped(eva_config={"rho": 8.0}, r=1)
    config = model.peft_config["default"]
    adapted = [path for path, layer in model.named_modules() if hasattr(layer, "adapters")]
    ranks = [len(model.get_submodule(path).adapters["default"].lora_A) for path in adapted]
    assert sum(ranks) == 10
    assert 0 < len(adapted) < 10
    assert sorted(config.target_modules) == sorted(adapted)
    model.save_pretrained(tmp_path)
    again = pyadapt.load(build("llama"), tmp_path)
    assert [len(again.get_submodule(path).adapters["default"].lora_A) for path in adapted] == ranks
    twin = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert sorted(peft.get_peft_model_state_dict(twin)) == sorted(
        f"base_model.model.{key}" for key in model.get_adapter_state_dict()
    )


def test_options_in_the_file_are_those_of_peft(tmp_path):
    import peft

    wrapped(eva_config={"rho": 1.5}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["eva_config"]
    assert written == vars(peft.EvaConfig(rho=1.5))
    assert LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5)).eva_config == written
    assert LoraConfig(init_lora_weights="eva").eva_config == vars(peft.EvaConfig())


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_any_batch_and_any_module(form):
    """One batch, seen again and again: the components are those of its centred rows."""
    rows = torch.randn(40, 7) @ torch.diag(2.0 ** -torch.arange(7)) + 3
    batch = {"tensor": rows, "tuple": (rows,), "mapping": {"x": rows}}[form]
    config = LoraConfig(
        r=2, target_modules=["encoder.0"], init_lora_weights="eva", eva_config={"rho": 1.0, "tau": 0.99999}
    )
    model = pyadapt.wrap(plain_module(), config, data=[batch])
    x = rows.double() - rows.double().mean(0)
    exact = torch.linalg.svd(x).Vh[:2]
    A = model.encoder[0].adapters["default"].lora_A.detach()
    assert_close((A.double() @ exact.t()).abs(), torch.eye(2).double(), "product", torch.float32)


@pytest.mark.parametrize("family", ["t5", "bert", "vit"])
def test_other_families(family):
    """Label and attention masks of other positions than a layer's rows are not asked of it."""
    data = [model_batch(family, seed, rows=6) for seed in range(2)]
    model = wrapped(family, data=data)
    assert_near(logits(model, family), logits(build(family), family), "model")
    assert all(
        layer.adapters["default"].lora_A.isfinite().all() for layer in model.modules() if hasattr(layer, "adapters")
    )


def test_batches_from_a_loader_and_a_forward_of_ones_own():
    data = batches_of("llama")
    rows = [{key: value[i] for key, value in batch.items()} for batch in data for i in range(4)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    expected = wrapped(data=data).get_adapter_state_dict()
    for key, value in wrapped(data=loader).get_adapter_state_dict().items():
        assert torch.equal(value, expected[key])
    packed = [{"packed": batch, "input_ids": batch["input_ids"]} for batch in data]
    plain = LoraConfig(**options_of(eva_config={"use_label_mask": False}))
    # Without a mask beside the ids, every position counts.
    state = pyadapt.get_eva_state_dict(build("llama"), packed, plain, lambda model, batch: model(**batch["packed"]))
    full = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in data]
    other = pyadapt.get_eva_state_dict(build("llama"), full, plain)
    assert state.keys() == other.keys()


def test_on_a_model_that_has_an_adapter():
    """Inputs are those of the base model, whatever is on it."""
    model = pyadapt.wrap(build("llama"), LoraConfig(init_lora_weights=False))
    model.merge_adapter()
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(**options_of()), data=batches_of("llama"))
    expected = wrapped().get_adapter_state_dict()
    for key, value in model.get_adapter_state_dict("second").items():
        assert torch.equal(value, expected[key])
    assert model.adapter_state.enabled


def test_over_int8_and_beside_an_embedding():
    quantized = pyadapt.quantize(build("llama"))
    before = logits(quantized)
    options = options_of(target_modules=["q_proj", "embed_tokens"])
    model = pyadapt.wrap(quantized, LoraConfig(**options), data=batches_of("llama"))
    assert_near(logits(model), before, "model")
    assert not model.model.embed_tokens.adapters["default"].lora_embedding_A.any()


class Failing:
    """A loader whose second turn fails."""

    def __init__(self, batches):
        self.batches, self.turns = batches, 0

    def __iter__(self):
        self.turns += 1
        yield self.batches[0]
        if self.turns > 1:
            raise OSError("the disk is gone")


def test_nothing_is_left_when_it_fails():
    model = build("llama").train()
    model.model.layers[0].eval()
    before = snapshot(model)
    with pytest.raises(OSError, match="the disk is gone"):
        pyadapt.wrap(model, LoraConfig(**options_of(eva_config={"tau": 1.0})), data=Failing(batches_of("llama")))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        pyadapt.wrap(model, LoraConfig(**options_of()), data=[{"nonsense": torch.ones(2)}])
    assert snapshot(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    pyadapt.get_eva_state_dict(model, batches_of("llama"), LoraConfig(**options_of()))
    assert snapshot(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (None, r"starts from data: wrap\(model, config, data=<a DataLoader or a list>\)"),
        ([], "data holds no batch"),
        (iter([1]), "data can be gone through once only"),
        (
            [model_batch("llama", rows=1, tokens=4)],
            "largest batch has 4 rows, fewer than the 6 components of model.lay",
        ),
    ],
    ids=["none", "empty", "once", "small"],
)
def test_bad_data(data, match):
    for model in (build("llama"), pyadapt.wrap(build("llama"), LoraConfig())):
        before = snapshot(model)
        with pytest.raises(ValueError, match=match):
            pyadapt.wrap(model, LoraConfig(**options_of()), "new", data=data)
        assert snapshot(model) == before


def test_a_layer_that_no_input_reaches():
    model = plain_module()
    model.unused = nn.Linear(3, 3)
    config = LoraConfig(r=1, target_modules=["unused", "encoder.0"], init_lora_weights="eva")
    with pytest.raises(ValueError, match="no input reaches unused with this data; leave it out of target_modules"):
        pyadapt.wrap(model, config, data=[torch.randn(9, 7)])
    assert not pyadapt.is_wrapped(model)


@pytest.mark.parametrize(
    ("eva", "match"),
    [
        ({"rho": 0.5}, "eva_config: rho=0.5 is not at least 1"),
        ({"tau": 1.5}, r"eva_config: tau=1.5 is not in \[0, 1\]"),
        ({"row": 2}, "eva_config has no 'row'; known are rho, tau, use_label_mask, "),
    ],
    ids=str,
)
def test_bad_options(eva, match):
    with pytest.raises(ValueError, match=match):
        LoraConfig(init_lora_weights="eva", eva_config=eva)


def test_options_without_eva_are_a_warning(caplog):
    LoraConfig(eva_config={"rho": 2.0})
    assert 'eva_config is not used: init_lora_weights is not "eva"' in caplog.text


def test_components_that_never_stand_still(monkeypatch, caplog):
    """The data is gone through again and again, but not for ever."""
    monkeypatch.setattr("pyadapt.methods.lora.eva.MOST_BATCHES", 4)
    model = wrapped(eva_config={"tau": 1.0})
    assert "EVA: some components still move after 6 batches and are taken as they are" in caplog.text
    assert sum(len(layer.adapters["default"].lora_A) for layer in model.modules() if hasattr(layer, "adapters")) == 30


# --- incremental PCA --------------------------------------------------------------------------------------------------


def test_pca_in_batches_is_the_pca_of_all_rows():
    """Rows of rank 5 lose nothing to the cut at 5 components, so that batches of any size give the same."""
    torch.manual_seed(0)
    x = (torch.randn(90, 5) * torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0])) @ torch.linalg.qr(torch.randn(12, 5)).Q.t() + 4
    pca = IncrementalPca(5, tau=0.99)
    assert pca.components is None
    for rows in x.split((50, 7, 33)):
        pca.update(rows)
    centred = x.double() - x.double().mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert_close(pca.singular_values, S[:5], "product", torch.float32)
    assert_close((pca.components.double() @ Vh[:5].t()).abs(), torch.eye(5).double(), "product", torch.float32)
    assert_close(pca.explained, S[:5].square() / centred.square().sum(), "product", torch.float32)
    assert bool((pca.components.max(1).values == pca.components.abs().max(1).values).all())


def test_pca_stands_still_on_the_same_rows():
    x = torch.randn(40, 6) @ torch.diag(2.0 ** -torch.arange(6))
    pca = IncrementalPca(3, tau=0.999)
    pca.update(x)
    assert not pca.still.any()
    pca.update(x)
    assert pca.still.all()


# --- several processes ------------------------------------------------------------------------------------------------


def _in_a_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = [{key: value[rank::2] for key, value in batch.items()} for batch in batches_of("llama")]
    # Unequal numbers of rows, so that they are padded on the way.
    state = pyadapt.get_eva_state_dict(build("llama"), data, LoraConfig(**options_of(eva_config={"rho": 1.0})))
    torch.save(state, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_their_rows(tmp_path):
    torch.multiprocessing.spawn(_in_a_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = pyadapt.get_eva_state_dict(
        build("llama"), batches_of("llama"), LoraConfig(**options_of(eva_config={"rho": 1.0}))
    )
    for path, A in first.items():
        assert torch.equal(A, second[path])
        # The same rows in another order.
        assert_close(A, alone[path], "model", torch.bfloat16, path)
