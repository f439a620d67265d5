"""The optimizer of a run as fields: one group for each, of which the chosen one's act."""

from dataclasses import dataclass
from typing import Literal

import optax

from instruct_jax.settings import Settings, setting
from instruct_jax.training import optim
from instruct_jax.training.optim import Schedule


@dataclass(frozen=True)
class _Descent(Settings):
    """What every optimizer has."""

    weight_decay: float = setting(0.0, "share of a matrix taken off, times the rate", low=0.0)
    clip: float = setting(1.0, "the norm that a larger gradient is cut to; 0 cuts none", low=0.0)


@dataclass(frozen=True)
class AdamConfig(_Descent):
    """Adam as the paper uses it (betas 0.9, 0.95); eps, decay and clip are not printed there."""

    b1: float = setting(0.9, "how much of the mean gradient an update keeps", low=0.0, below=1.0)
    b2: float = setting(0.95, "how much of the mean squared gradient", low=0.0, below=1.0)
    eps: float = setting(1e-8, "added to the root of the mean squared gradient", above=0.0)
    form: Literal["pytorch", "tensorflow"] = setting(
        "pytorch", "whether eps is added after the bias correction, or before it as in 2019"
    )


@dataclass(frozen=True)
class AdafactorConfig(_Descent):
    """Adafactor: of a matrix two vectors are kept, where Adam keeps two matrices."""

    decay_rate: float = setting(
        0.8, "1 - t^-rate of the mean squared gradient is kept by update t", above=0.0, high=1.0
    )
    clip_rms: float = setting(
        1.0, "the root mean square that a larger update of a matrix is cut to", above=0.0
    )
    relative: bool = setting(
        False,
        "whether a rate counts in parts of a matrix's own root mean square, as in the paper, whose "
        "rates are 0.01 and less; else as Adam's do",
    )
    min_factored: int = setting(
        128, "the shorter side of the least matrix that two vectors stand for", low=2
    )


@dataclass(frozen=True)
class LionConfig(_Descent):
    """Lion, one moment; a rate of a third to a tenth of Adam's, a decay as much larger."""

    b1: float = setting(
        0.9, "how much of the mean gradient there is in an update", low=0.0, below=1.0
    )
    b2: float = setting(
        0.99, "how much of the mean gradient is kept for the next update", low=0.0, below=1.0
    )


@dataclass(frozen=True)
class MuonConfig(Settings):
    """Muon of the layers' matrices, one moment; the rest, decay and clip are those of `adam`."""

    momentum: float = setting(
        0.95, "how much of the mean gradient an update keeps", low=0.0, below=1.0
    )
    iterations: int = setting(5, "Newton-Schulz iterations of an update", low=1, high=20)
    rms: float = setting(
        0.2, "root mean square of an update before the rate; Adam's is about 0.2", above=0.0
    )


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The choice, and the values of each."""

    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = setting(
        "adamw", "what makes an update of a gradient; muon has adamw for what is in no layer"
    )
    adam: AdamConfig = setting(AdamConfig(), needs="optimizer=adamw|muon")
    adafactor: AdafactorConfig = setting(AdafactorConfig(), needs="optimizer=adafactor")
    lion: LionConfig = setting(LionConfig(), needs="optimizer=lion")
    muon: MuonConfig = setting(MuonConfig(), needs="optimizer=muon")

    def make_optimizer(self, rate: Schedule) -> optax.GradientTransformation:
        """The optimizer with these values and this rate."""
        if self.optimizer == "adafactor":
            return optim.adafactor(rate, **vars(self.adafactor))
        if self.optimizer == "lion":
            return optim.lion(rate, **vars(self.lion))
        adam = dict(vars(self.adam))
        adam["tf_style"] = adam.pop("form") == "tensorflow"
        if self.optimizer == "muon":
            return optim.muon(rate, **vars(self.muon), **adam)
        return optim.adamw(rate, **adam)
