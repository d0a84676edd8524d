"""Labelled texts: what an example is, which ones may be kept, and how they are split."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A text, its label, and the group (a module, a document) that must not be torn apart by a split."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Split:
    """Training and held-out examples, and the label names in the order of the classifier's outputs."""

    train: list[Example]
    heldout: list[Example]
    labels: list[str]


def normalised(text: str) -> str:
    """The text without case and layout: two texts that are equal in this form count as one."""
    return " ".join(text.lower().split())


def without_duplicates(examples: Iterable[Example]) -> list[Example]:
    """Each text once; a text that bears two labels goes altogether, for it cannot be learnt."""
    first: dict[str, Example] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        key = normalised(example.text)
        first.setdefault(key, example)
        labels[key].add(example.label)
    return [example for key, example in first.items() if len(labels[key]) == 1]


def by_label(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """The examples of each label, labels in alphabetical order."""
    found: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        found[example.label].append(example)
    return dict(sorted(found.items()))


def balanced(examples: Iterable[Example], most: int, seed: int) -> list[Example]:
    """As many examples of every label as the rarest label has, but no more than `most`, drawn by `seed`."""
    classes = by_label(examples)
    count = min(most, *(len(members) for members in classes.values()))
    drawn = random.Random(seed)
    return [example for members in classes.values() for example in drawn.sample(members, count)]


def rank(key: str, seed: int) -> str:
    """A place in an order that depends on nothing but `key` and `seed`."""
    return hashlib.sha256(f"{seed}\0{key}".encode()).hexdigest()


def hold_out(groups: Iterable[str], share: float, seed: int) -> set[str]:
    """The groups to hold out: about `share` of them, at least one where there are two or more."""
    ordered = sorted(set(groups), key=lambda group: rank(group, seed))
    if len(ordered) < 2:
        return set()
    return set(ordered[: max(1, round(share * len(ordered)))])
