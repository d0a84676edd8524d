"""Methods that learn a prompt, on a whole model, beside peft: ``python -m benchmarks.prompts``.

A training step (forward and backward) and greedy decoding with a cache, over those of the frozen model, whose step goes
back to the input embeddings. The model is a random one of a real transformers class. Times are medians of runs in
turns with the frozen model, in one process, each library by itself.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyadapt
from benchmarks.layer import DTYPES
from benchmarks.measure import environment, interleave, write_csv

FLOOR = "frozen"
TOKENS = {"num_virtual_tokens": 20}
# Case -> configuration, under the names that pyadapt and peft share.
CONFIGS: dict[str, dict[str, Any]] = {
    "prefix": {"peft_type": "PREFIX_TUNING", **TOKENS},
    "prefix mlp": {"peft_type": "PREFIX_TUNING", "prefix_projection": True, **TOKENS},
    "prompt": {"peft_type": "PROMPT_TUNING", **TOKENS},
    "p-tuning": {"peft_type": "P_TUNING", "encoder_hidden_size": 128, **TOKENS},
    "llama-adapter": {"peft_type": "ADAPTION_PROMPT", "adapter_len": 10, "adapter_layers": 4},
}
# Vocabulary, hidden size, layers, heads, rows, tokens.
SIZE, QUICK_SIZE = (4096, 512, 4, 8, 4, 128), (64, 32, 4, 4, 2, 8)


def frozen_model(size: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A Llama whose weights need no gradients."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, hidden, layers, heads = size[:4]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def with_library(library: str, model: nn.Module, case: str) -> Any:
    """`model` with the adapter of `case`."""
    options = {**CONFIGS[case], "task_type": "CAUSAL_LM"}
    if library == "pyadapt":
        return pyadapt.wrap(model, options).eval()
    import peft

    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(options.pop("peft_type"))](**options)
    return peft.get_peft_model(model, config).eval()


def training(model: Any, ids: Tensor, embed: bool) -> Callable[[], object]:
    """One forward and backward; `embed` lets the gradients of the input embeddings be what is asked for."""

    def run() -> object:
        given = {"input_ids": ids}
        if embed:
            given = {"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_(True)}
        loss = model(**given, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss

    return run


def decoding(model: Any, ids: Tensor, steps: int) -> Callable[[], object]:
    """Greedy decoding of a fixed number of tokens."""
    # As an adapter is served, which is frozen.
    model.requires_grad_(False)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a CSV where one is named."""
    parser = argparse.ArgumentParser(prog="benchmarks.prompts", description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=20.0, help="a library and kind of run (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a fraction of a second: for tests")
    options = parser.parse_args(arguments)
    size = QUICK_SIZE if options.quick else SIZE
    ids = torch.randint(1, size[0], size[4:], generator=torch.Generator().manual_seed(0))
    warnings.filterwarnings("ignore", module="peft")
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    kinds: dict[str, Callable[[Any, bool], Callable[[], object]]] = {
        "training": lambda model, is_floor: training(model, ids, is_floor),
        "decoding": lambda model, _: decoding(model, ids[:, : size[5] // 4], 4 if options.quick else 24),
    }
    rows: list[dict[str, object]] = []
    for kind, make in kinds.items():
        ratios: dict[tuple[str, str], float] = {}
        for library in ("pyadapt", "peft"):
            models = {FLOOR: frozen_model(size, DTYPES[options.dtype])}
            for case in CONFIGS:
                models[case] = with_library(library, frozen_model(size, DTYPES[options.dtype]), case)
            runs = {case: make(model, case == FLOOR) for case, model in models.items()}
            timings = interleave(runs, 0.2 if options.quick else options.seconds)
            for case, timing in timings.items():
                ratios[library, case] = ratio = timing.median / timings[FLOOR].median
                measured = {"median_ms": round(timing.median, 3), "runs": len(timing.times)}
                where = {"kind": kind, "dtype": options.dtype, "library": library, "case": case}
                rows.append({**where, **measured, "over frozen": round(ratio, 3)})
        print(f"\n{kind}, {options.dtype}, over the frozen model\n{'':14}{'pyadapt':>10}{'peft':>10}")
        for case in CONFIGS:
            print(f"{case:14}{ratios['pyadapt', case]:>10.2f}{ratios['peft', case]:>10.2f}")
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
