"""What the examples share: their options, rows from the hub, a small tokenizer, and how figures are printed."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(doc: str, real: dict, tiny: dict, **more: str) -> argparse.Namespace:
    """The options of every example; `real` holds defaults, `tiny` those that differ with --tiny, `more` own options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and made-up rows: no downloads")
    parser.add_argument("--model", help=f"a hub name or a folder (default {real['model']})")
    parser.add_argument("--dataset", help=f"a hub name or a folder (default {real['dataset']})")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--output", type=Path, help="where the adapter goes (default: a folder of the example's name)")
    for name, text in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=text)
    args = parser.parse_args()
    if args.tiny and (args.model or args.dataset):
        parser.error("--tiny makes a model and rows of its own: leave out --model and --dataset")
    for name, value in {**real, **(tiny if args.tiny else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.output = args.output or Path(parser.prog).with_suffix("").with_name(f"{Path(parser.prog).stem}-out")
    if args.tiny:
        args.model = args.output / "base"  # the example saves its tiny model there, then reads it as a real one
    torch.manual_seed(0)
    return args


def hub_rows(name: str, *config: str, **options):
    """`datasets.load_dataset`, with a clear error where that package is missing."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit("real rows need the package datasets: pip install datasets (or use --tiny)") from None
    return load_dataset(name, *config, **options)


def word_tokenizer(texts: list[str], start: str = "", end: str = "", pair: str = ""):
    """A fast tokenizer whose tokens are the words of `texts`, offline.

    Args:
        texts: every word that is to have a token of its own; others become <unk>.
        start: what stands before a text ("<s> ").
        end: what stands after it (" </s>").
        pair: how a second text is written (" </s> $B </s>").
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<s>"]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    one, marks = f"{start}$A{end}", [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=one, pair=one + (pair or " $B"), special_tokens=marks
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def file_size(folder: Path) -> str:
    """How large the adapter's weights are on disk."""
    return f"{(folder / 'adapter_model.safetensors').stat().st_size / 1024:.0f} kB"


def report(metric: str, before: float, after: float, folder: Path) -> None:
    """The closing lines of an example."""
    print(f"adapter in {folder}: {file_size(folder)}")
    print(f"{metric}: {before:.3f} before training, {after:.3f} after")
