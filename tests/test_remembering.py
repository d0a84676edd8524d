"""What is made of frozen parameters is kept; whatever could change it lets it be made anew."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import build
from torch import nn

import pyadapt
from pyadapt.remembering import Remembered


class Counted:
    def __init__(self, *parameters):
        self.parameters, self.made, self.remembered = parameters, 0, Remembered()

    def __call__(self):
        def make():
            self.made += 1
            return sum(p.detach().sum() for p in self.parameters)

        return self.remembered.get(iter(self.parameters), make)


def frozen(*values):
    return nn.Parameter(torch.tensor(values), requires_grad=False)


def test_kept_while_frozen_and_the_same():
    counted = Counted(frozen(1.0, 2.0), frozen(3.0))
    with torch.no_grad():
        assert [counted().item(), counted().item(), counted.made] == [6.0, 6.0, 1]
        counted.parameters[0].add_(1.0)
        assert [counted().item(), counted().item(), counted.made] == [8.0, 8.0, 2]


def test_not_kept_in_training():
    counted = Counted(frozen(1.0))
    counted()
    counted()
    assert counted.made == 2
    with torch.no_grad():
        counted()
        counted.parameters[0].requires_grad_(True)
        counted()
        # An engine may have changed it meanwhile, and left no trace.
        counted.parameters[0].data = torch.tensor([5.0])
        counted.parameters[0].requires_grad_(False)
        assert counted().item() == 5.0


def test_another_dtype_of_autocast():
    counted = Counted(frozen(1.0))
    with torch.no_grad():
        counted()
        with torch.autocast("cpu", torch.bfloat16):
            counted()
    assert counted.made == 2


def test_copies_have_none_yet():
    counted = Counted(frozen(1.0))
    with torch.no_grad():
        counted()
        for again in (copy.deepcopy(counted), pickle.loads(pickle.dumps(counted))):
            again()
            assert again.made == 2


@pytest.mark.parametrize(
    "options",
    [
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
        {"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": 2},
    ],
)
def test_a_served_adapter_follows_what_is_changed_in_it(options, tmp_path):
    ids = torch.tensor([[3, 4, 5, 6]])

    def output(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    def saved(seed):
        torch.manual_seed(seed)
        model = pyadapt.wrap(build("llama"), {**options, "task_type": "CAUSAL_LM"}).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(1.0 + seed)
        model.save_pretrained(tmp_path / str(seed))
        return output(model)

    first, second = saved(0), saved(1)
    model = pyadapt.load(build("llama"), tmp_path / "0")
    assert torch.equal(output(model), first)
    model.hotswap_adapter(tmp_path / "1")
    assert torch.equal(output(model), second)
    with model.disable_adapter():
        assert torch.equal(output(model), output(build("llama")))
    assert torch.equal(output(model), second)
    # The frozen model below a prompt that its projections make something of.
    plain = build("llama")
    with torch.no_grad():
        for one in (model, plain):
            one.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    assert torch.equal(output(model), output(pyadapt.load(plain, tmp_path / "1")))


def test_an_adapter_of_the_projections_is_seen_when_switched():
    torch.manual_seed(0)
    options = {"adapter_len": 3, "adapter_layers": 2}
    model = pyadapt.wrap(build("llama"), pyadapt.AdaptionPromptConfig(**options), "prompt")
    model.add_adapter("lora", pyadapt.LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1.0)
    model.requires_grad_(False).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        model.set_adapter(["prompt", "lora"])
        model.requires_grad_(False)
        both = model(input_ids=ids).logits
        with model.rescaled(0.5, "lora"):
            assert not torch.equal(model(input_ids=ids).logits, both)
        assert torch.equal(model(input_ids=ids).logits, both)
