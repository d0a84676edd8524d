"""transformers' Trainer under each engine, and accelerate's loop, saved and resumed. Run on the ranks of a gang.

The gang is run without a process group, which accelerate makes itself.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import torch
from engines import ZERO3
from models import model_batch
from resume_cases import SAVED_AT, STEPS, WITHOUT_BIASES, Result, wrapped

import pyadapt

ROWS = 4 * STEPS


class Rows(torch.utils.data.Dataset):
    """As many rows as all steps take."""

    def __init__(self) -> None:
        batch = model_batch("bert", rows=ROWS)
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(ROWS)]

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def run(
    engine: str,
    folder: str,
    resume: bool | str = False,
    dropout: float = 0.0,
    killed: str | None = None,
    config: dict[str, Any] | None = None,
) -> Result:
    """Trainer for STEPS steps, of which each SAVED_AT-th is saved; or the rest of them, from a checkpoint.

    Args:
        engine: "zero3", "fsdp1", "fsdp2", the last two also with "_sharded" for SHARDED_STATE_DICT, "ddp", or "alone".
        folder: output folder.
        resume: the checkpoint to go on from; True for the first in it.
        dropout: of the adapter.
        killed: where the process ends by SIGKILL: "between steps", behind the third, or "saving" the second checkpoint.
        config: what the adapter's configuration has otherwise.
    """
    from transformers import Trainer

    arguments = training_arguments(engine, folder, max_steps=STEPS, save_steps=SAVED_AT, learning_rate=1e-2)
    seed = 4 if resume else 3
    model = wrapped(seed, lora_dropout=dropout, **(config or {}))
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    if engine.startswith("fsdp1"):
        # On a CPU torch offloads states by no copy, of a buffer that it uses again.
        trainer.accelerator.state.fsdp_plugin.optim_state_dict_config.offload_to_cpu = False
    if "sharded" in engine:
        trainer.add_callback(pyadapt.AdapterCheckpoint())
    if killed is not None:
        trainer.add_callback(_killer(trainer, killed))
    checkpoint = os.path.join(folder, f"checkpoint-{SAVED_AT}") if resume is True else resume or None
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The history of a run that was resumed has its first part as well.
    adapter = {key: value.detach().numpy() for key, value in model.get_adapter_state_dict().items()}
    return losses[SAVED_AT if resume else 0 :], adapter


def refusal(engine: str, folder: str, config: dict[str, Any]) -> str:
    """What is said where a model with another configuration is to go on from the first checkpoint."""
    try:
        run(engine, folder, True, config=config)
    except BaseException as error:  # that of torch.distributed.checkpoint is no Exception
        return f"{type(error).__name__}: {error}"
    return "nothing"


def best(engine: str, folder: str) -> tuple[str, dict[str, Any]]:
    """Trainer with `load_best_model_at_end`: the name of the best checkpoint, and the adapter at the end."""
    from transformers import Trainer

    # The largest loss counts as the best, which is that of the first checkpoint and not of the last.
    judged = {
        "eval_strategy": "steps",
        "eval_steps": SAVED_AT,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    options = {"max_steps": STEPS, "save_steps": SAVED_AT, "learning_rate": 1e-2, "load_best_model_at_end": True}
    arguments = training_arguments(engine, folder, **options, **judged)
    model = wrapped(3)
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    adapter = {key: value.detach().numpy() for key, value in model.get_adapter_state_dict().items()}
    return os.path.basename(trainer.state.best_model_checkpoint), adapter


def training_arguments(engine: str, folder: str, **options: Any) -> Any:
    """Trainer's arguments for the same global batch under each engine; sets up accelerate's state."""
    from transformers import TrainingArguments

    options = {**_options(engine, folder), **options}
    return TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)), logging_steps=1,
        report_to=[], disable_tqdm=True, seed=11, dataloader_pin_memory=False, average_tokens_across_devices=False,
        **options,
    )  # fmt: skip


def loop(
    engine: str, folder: str, first: int = 0, dropout: float = 0.0, killed: str | None = None, hooks: bool = True
) -> Result:
    """A loop with accelerate from step `first`, before which it loads from `folder`, where it saves behind SAVED_AT.

    Args:
        engine: "alone", "ddp", "zero3", "fsdp1", "fsdp2", the last two also with "_sharded" for SHARDED_STATE_DICT, and
            "fsdp1_flat", without use_orig_params.
        folder: of the checkpoint.
        first: number of the first step.
        dropout: of the adapter.
        killed: see `run`.
        hooks: whether `checkpoint_adapters` is called.
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin, FullyShardedDataParallelPlugin, set_seed

    options = _options(engine, folder)
    # One order of the data for all ranks, whose own seeds differ; a scheduler that steps once a step, not once a rank.
    config = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=7)
    common: Any = {"dataloader_config": config, "step_scheduler_with_optimizer": False}
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if engine == "zero3":
        zero3 = {**ZERO3, "train_micro_batch_size_per_gpu": 4 // ranks}
        accelerator = Accelerator(**common, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero3))
    elif engine.startswith("fsdp"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(engine[4]),
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            cpu_ram_efficient_loading=False,
            use_orig_params="flat" not in engine,
            state_dict_type="SHARDED_STATE_DICT" if "sharded" in engine else "FULL_STATE_DICT",
        )
        plugin.optim_state_dict_config.offload_to_cpu = False  # see `run`
        accelerator = Accelerator(**common, fsdp_plugin=plugin)
    else:
        accelerator = Accelerator(cpu=options["use_cpu"], **common)
    set_seed(7, device_specific=False)
    model = wrapped(3 + first, lora_dropout=dropout, **(WITHOUT_BIASES if "flat" in engine else {}))
    set_seed(7 + accelerator.process_index)
    if "flat" in engine:
        # What an optimizer is made over has to be the model's afterwards.
        model = accelerator.prepare(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    # With a generator of its own: or each start of an iterator draws from the one that dropout draws from.
    generator = torch.Generator().manual_seed(7)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4 // ranks, shuffle=True, generator=generator)
    call, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    inside = accelerator.unwrap_model(call)
    if hooks:
        pyadapt.distributed.checkpoint_adapters(accelerator)
    call.train()
    if first:
        accelerator.load_state(folder)
    batches = iter(accelerator.skip_first_batches(loader, first) if first else loader)
    losses = []
    for step in range(first, STEPS):
        loss = call(**next(batches)).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        if step + 1 == SAVED_AT and not first:
            accelerator.save_state(folder)
            accelerator.wait_for_everyone()
        if killed == "between steps" and step + 1 == SAVED_AT + 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return losses, {key: value.detach().numpy() for key, value in inside.get_adapter_state_dict().items()}


def _killer(trainer: Any, where: str) -> Any:
    """A callback that ends the process; see `run`."""
    from transformers import TrainerCallback

    def end(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Killer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == SAVED_AT + 1 and where == "between steps":
                end()
            if state.global_step == 2 * SAVED_AT:
                # Asked for when the adapters of this checkpoint are there, and nothing else of it.
                trainer.optimizer.state_dict = end

    return Killer()


def _options(engine: str, folder: str) -> dict[str, Any]:
    """What TrainingArguments say of the engine, and accelerate's state as it is on GPUs, with gloo in NCCL's place."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if engine == "alone":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        return {"use_cpu": True}
    if engine == "ddp":
        return {"use_cpu": True, "ddp_backend": "gloo"}
    configured = {"accelerator_config": {"use_configured_state": True}}
    os.environ["ACCELERATE_USE_CPU"] = "false"
    if engine == "zero3":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        config = {**ZERO3, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
        # As `accelerate launch` says it; a file for each rank, which would read what another is writing.
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = os.path.join(folder, f"zero3-{os.environ['RANK']}.json")
        with open(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"], "w", encoding="utf-8") as file:
            json.dump(config, file)
        return configured
    kind, _, sharded = engine.partition("_")
    os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": kind[-1]})
    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    config = {
        "version": int(kind[-1]),
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT",
    }
    if kind == "fsdp1":
        config.update(use_orig_params=True, sync_module_states=False)
        _copy_to_cpu()
    return {**configured, "fsdp": "full_shard auto_wrap", "fsdp_config": config}


def _copy_to_cpu() -> None:
    """Let torch move FSDP1's parameters to the CPU as from a GPU, by a copy: on a CPU it frees what it then reads."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    move = FlatParamHandle.flat_param_to

    def flat_param_to(handle: Any, *args: Any, **kwargs: Any) -> None:
        handle.flat_param.data = handle.flat_param.detach().clone()
        move(handle, *args, **kwargs)

    FlatParamHandle.flat_param_to = flat_param_to
