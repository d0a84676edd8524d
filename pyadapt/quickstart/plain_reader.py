"""Classify texts with a merged model folder, in a process that can import transformers but not pyadapt.

The quick start hands this file's text to `python -c`, with a request on standard input, and reads the outputs
from standard output. It needs nothing of pyadapt's, and before anything else makes sure of that.
"""

import json
import sys
from typing import Any

BATCH = 64


class NoPyadapt:
    """The first finder that Python asks: it refuses pyadapt and leaves everything else to the others."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """See importlib.abc.MetaPathFinder."""
        if name.partition(".")[0] == "pyadapt":
            raise ModuleNotFoundError(f"{name} is out of reach here, on purpose", name=name)


def pyadapt_is_out_of_reach() -> bool:
    """Try it."""
    try:
        __import__("pyadapt")
    except ModuleNotFoundError:
        return True
    return False


def classify(folder: str, texts: list[str], max_length: int) -> list[list[float]]:
    """The outputs of the model in `folder`, one row a text."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    # Texts of like length share a batch; the answer is in the order of the question.
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found: list[list[float]] = [[] for _ in texts]
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        batch = tokenizer(
            [texts[place] for place in places],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            outputs = model(**batch).logits
        for place, row in zip(places, outputs.tolist()):  # noqa: B905
            found[place] = row
    return found


def main() -> None:
    """Read {"folder", "texts", "max_length"} as JSON, write {"pyadapt": false, "logits"}."""
    sys.meta_path.insert(0, NoPyadapt)
    request = json.load(sys.stdin)
    if not pyadapt_is_out_of_reach():
        sys.exit("pyadapt can be imported here, so this check would prove nothing")
    outputs = classify(request["folder"], request["texts"], request["max_length"])
    leaked = any(name.partition(".")[0] == "pyadapt" for name in sys.modules)
    json.dump({"pyadapt": leaked, "logits": outputs}, sys.stdout)


if __name__ == "__main__":
    main()
