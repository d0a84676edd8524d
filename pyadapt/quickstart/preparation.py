"""Everything a run needs before its first step: data read and split, model wrapped, batches laid out."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pretrained
from .docstrings import split_docstrings
from .errors import QuickstartError
from .examples import Example, Split
from .jsonl import split_jsonl
from .options import Options, check
from .training import Collator, Encoded, encode, epoch_batches

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Run:
    """One run's options, data and wrapped model."""

    options: Options
    source: str
    split: Split
    tokenizer: Any
    model: Any
    collate: Collator
    heldout: list[Encoded]
    batches: list[list[Encoded]]

    @property
    def model_name(self) -> str:
        """For people: a hub name or the folder's own name."""
        return Path(self.source).name if self.options.model else "MiniLM"

    @property
    def heldout_texts(self) -> list[str]:
        """The texts of `heldout`, in its order."""
        return [example.text for example in self.split.heldout]

    def autocast(self) -> AbstractContextManager[None]:
        """A context for one forward."""
        return pretrained.autocast(self.options.base, self.collate.device)


def prepare(options: Options) -> Run:
    """Check the options, read data and model, wrap the model.

    Raises QuickstartError for what cannot work; nothing has been written by then.
    """
    check(options)
    config = pretrained.method_config(options.method, options.rank)
    source = pretrained.locate(options.model)
    split = _read_split(options)
    import torch

    device = _device(options.device)
    torch.manual_seed(options.seed)
    pretrained.quiet_transformers()
    tokenizer = pretrained.read_tokenizer(source)
    model = pretrained.read_model(source, split.labels, tokenizer.pad_token_id).to(device)
    _check_length(options.max_length, tokenizer, model)
    model = pretrained.wrapped(pretrained.set_base(model, options.base), config)

    to_rows = partial(encode, tokenizer, labels=split.labels, max_length=options.max_length)
    rows, draw = to_rows(split.train), random.Random(options.seed)
    batches = [epoch_batches(rows, options.batch_size, draw) for _ in range(options.epochs)]
    return Run(
        options=options,
        source=source,
        split=split,
        tokenizer=tokenizer,
        model=model,
        collate=Collator(tokenizer, device),
        heldout=to_rows(split.heldout),
        batches=[batch for epoch in batches for batch in epoch],
    )


def _read_split(options: Options) -> Split:
    split = split_jsonl(options.data, options.seed) if options.data else split_docstrings(options.seed)
    return Split(_some(split.train, options), _some(split.heldout, options), split.labels)


def _some(examples: list[Example], options: Options) -> list[Example]:
    if options.limit is None or options.limit >= len(examples):
        return examples
    return random.Random(options.seed).sample(examples, options.limit)


def _device(name: str) -> torch.device:
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise QuickstartError("--device cuda: torch finds no GPU here")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def _check_length(max_length: int, tokenizer: Any, model: Any) -> None:
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    longest = min(limit for limit in limits if limit)
    if max_length > longest:
        raise QuickstartError(f"--max-length is {max_length}, this model takes at most {longest} tokens")
