"""What the configurations of LoHa and LoKr have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ...layer_config import RankedConfig


@dataclass
class LycorisConfig(RankedConfig):
    """Configuration of a method that LyCORIS has brought; names and defaults are those of PEFT.

    What is not listed: see `RankedConfig`.

    Attributes:
        alpha: numerator of the scaling.
        rank_dropout: probability that an output feature gets nothing of the adapter in a training step, in [0, 1).
        module_dropout: probability that a layer gets nothing of the adapter in a training step, in [0, 1).
        use_effective_conv2d: take the kernel's places of a convolution apart from its channels (proposition 3 of the
            FedPara paper), where the kernel has more than one.
        init_weights: how the factors start; True lets the adapter do nothing at first, False does not.
    """

    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_probabilities("rank_dropout", "module_dropout")
