"""Every primitive against its definition: emulated everywhere, and on the GPU where there is one.

What is exact is compared bit by bit (any NaN for a NaN), the tensor cores' sums within the bound of questions.py. Where
all of this passes on a GPU, what the emulator shows of a kernel holds there too, as far as these instructions go.
"""

from __future__ import annotations

import numpy as np
import pytest

from conformance.primitives import POISON, WORDS, emulator, hardware
from conformance.questions import QUESTIONS, Question, ask, one_nan, philox

ARCHITECTURES = (750, 800, 900)
BF16_FROM = 800


def check(name: str, question: Question, answer: np.ndarray, what: str) -> None:
    """Compare an answer with the definition."""
    if question.words is not None:
        wanted, got = one_nan(name, question.words), one_nan(name, answer)
        wrong = np.argwhere(wanted != got)
        shown = [f"{tuple(map(int, i))}: {got[tuple(i)]:08x} for {wanted[tuple(i)]:08x}" for i in wrong[:4]]
        assert not len(wrong), f"{what}: {len(wrong)} of {got.size} words are wrong; {'; '.join(shown)}"
        return
    assert question.values is not None
    assert question.bound is not None
    got, finite = answer.view(np.float32), np.isfinite(question.values)
    np.testing.assert_array_equal(got[~finite], question.values[~finite], err_msg=f"{what}: NaN or Inf")
    excess = np.abs(got[finite].astype(np.float64) - question.values[finite]) - question.bound[finite]
    # Written so that a NaN fails.
    assert (excess <= 0).all(), f"{what}: a sum is {np.nanmax(excess)} further off than its bound"


def names(architecture: int) -> list[str]:
    """The primitives that an architecture has."""
    return [name for name in QUESTIONS if name != "product_bf16" or architecture >= BF16_FROM]


@pytest.mark.parametrize(
    ("architecture", "name"), [(architecture, name) for architecture in ARCHITECTURES for name in names(architecture)]
)
def test_emulated(architecture, name):
    question = ask(name, architecture // 10)
    answer = emulator(architecture)(name, question.cases, *question.operands)
    check(name, question, answer, f"emulated {name}, {architecture}")


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", QUESTIONS)
def test_hardware(name, seed):
    """The GPU agrees with the definition, and bit by bit, or within twice the bound, with the emulator."""
    run = hardware()
    if run is None:
        pytest.skip("waits for a CUDA device")
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = 100 * major + 10 * minor
    if name not in names(architecture):
        pytest.skip(f"waits for a device that has it: this one is of compute capability {major}.{minor}")
    question = ask(name, architecture // 10, seed)
    answer = run(name, question.cases, *question.operands)
    check(name, question, answer, f"{name} on hardware")
    emulated = emulator(architecture)(name, question.cases, *question.operands)
    if question.words is not None:
        np.testing.assert_array_equal(one_nan(name, answer), one_nan(name, emulated))
    else:
        assert question.bound is not None
        finite = np.isfinite(question.values)
        apart = np.abs(answer.view(np.float32)[finite].astype(np.float64) - emulated.view(np.float32)[finite])
        assert (apart <= 2 * question.bound[finite]).all()


def test_published_numbers():
    """The generator of the questions is Philox4x32-10: the known answers of its authors' library (Random123)."""
    zero, ones = np.zeros(1, np.uint64), np.full(1, 0xFFFFFFFF, np.uint64)
    assert [int(c[0]) for c in philox([zero] * 4, [zero] * 2)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(c[0]) for c in philox([ones] * 4, [ones] * 2)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_wrong_word_is_found(name):
    """The comparison sees one wrong word, and one that was never written."""
    question = ask(name, 80)
    answer = emulator(800)(name, question.cases, *question.operands)
    assert answer.shape[2] == WORDS[name]
    for wrong in (POISON, None):
        spoilt = answer.copy()
        if question.values is not None:
            place = (1, *np.argwhere(np.abs(question.values[1]) > 0.5)[0])
            spoilt.view(np.float32)[place] *= 1.001
        else:
            place = (1, 5, answer.shape[2] - 1)
            spoilt[place] ^= 1
        if wrong is not None:
            spoilt[place] = wrong
        with pytest.raises(AssertionError, match=r"words are wrong|a sum is"):
            check(name, question, spoilt, "spoilt")
