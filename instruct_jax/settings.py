"""A field of a configuration, said once: its default, its range, what it does, and when it acts.

    @dataclass(frozen=True)
    class FitConfig(Settings):
        batch_size: int = setting(64, "rows of a batch", low=1)
        learning_rate: float = setting(1e-4, "peak learning rate", above=0.0)

The ranges hold wherever such a dataclass is made; the command line (cli/config.py) reads the same
words for `--help`, for what it refuses, and for what a run may be resumed with. Choices are said by
the type (`Literal`). A subclass that only changes a default inherits the rest.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from instruct_jax.errors import ConfigError

# In `acts_if`: a field that a script never reads; see `never`.
NEVER = "never"
# Steps, tokens and rows are counted in int32; a field that may be larger says its own `high`.
INT32_MAX = 2**31 - 1
# A float becomes a number of this kind wherever it is computed with, and is infinite above it.
FLOAT32_MAX = 3.4028234e38
_OFF = (None, False, 0, "", "none", ())


@dataclass(frozen=True)
class About:
    """What is known of a field; the bounds hold for each number in it, and None is never bound."""

    text: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    unit: str = ""
    needs: str = ""
    may_change: bool | Literal["more"] = False

    @property
    def range(self) -> str:
        """The bounds in words, such as "above 0 and at most 1"; empty where there are none."""
        words = [f"above {_written(self.above)}"] if self.above is not None else []
        words += [f"below {_written(self.below)}"] if self.below is not None else []
        if self.low is not None and self.high is not None:
            return " and ".join([f"{_written(self.low)} to {_written(self.high)}", *words])
        words[:0] = [f"{_written(self.low)} or more"] if self.low is not None else []
        words += [f"at most {_written(self.high)}"] if self.high is not None else []
        return " and ".join(words)

    def _largest(self, number: float) -> float:
        if isinstance(number, int):
            return math.inf if self.high is not None else INT32_MAX
        return FLOAT32_MAX

    def holds(self, number: float) -> bool:
        """Whether a number is finite, one of int32 or float32, and within the bounds."""
        return (
            math.isfinite(number)
            and abs(number) <= self._largest(number)
            and (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def setting(
    default: Any = dataclasses.MISSING,
    text: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: str = "",
    needs: str = "",
    may_change: bool | Literal["more"] = False,
) -> Any:
    """A dataclass field with `default` and all that is to be said of it, in one line.

    `low` and `high` are allowed values, `above` and `below` are not. `unit` is shown beside the
    type. `needs` names the condition under which the field acts: a sibling that is on (not None,
    0, False, "", "none" or empty), dotted for one inside a group; "sibling=a|b" for one that has
    one of these values, "sibling>1" for a larger one; joined by " or ", and those by " and ".
    `may_change`: whether a run may be resumed with another value, or with "more" of it.
    """
    about = About(text, low, high, above, below, unit, needs, may_change)
    return dataclasses.field(default=default, metadata={"about": about})


def never(why: str) -> str:
    """The condition of `acts_if` that never holds, and why.

    >>> why_idle(None, never("nothing is trained"))
    'nothing is trained'
    """
    return f"{NEVER}: {why}"


def is_never(condition: str) -> bool:
    """Whether a condition of `acts_if` never holds."""
    return condition.partition(":")[0] == NEVER


def about(config_class: type, name: str) -> About:
    """What the first class that says anything says of the field `name`."""
    for base in config_class.__mro__:
        field = vars(base).get("__dataclass_fields__", {}).get(name)
        if field is not None and "about" in field.metadata:
            found: About = field.metadata["about"]
            return found
    return About()


@dataclass(frozen=True)
class Settings:
    """The base of configurations: every number of one is finite and in its range."""

    # "field" or "group.field" -> the condition, as in `needs`, under which a script that has this
    # configuration reads it at all; NEVER, or `never(why)`, for one that it does not.
    acts_if: ClassVar[Mapping[str, str]] = {}

    @property
    def leaves_files(self) -> bool:
        """Whether a script that is so configured works in a directory of its own."""
        return True

    def __post_init__(self) -> None:
        """ConfigError, of one line that starts with the field's name, for a value out of range."""
        for field in dataclasses.fields(self):
            value, said = getattr(self, field.name), about(type(self), field.name)
            for number in _numbers(value):
                if not said.holds(number):
                    expected = said.range or "a finite number"
                    if isinstance(number, float) and FLOAT32_MAX < number < math.inf:
                        expected = f"at most {FLOAT32_MAX:g}, the largest of float32"
                    elif isinstance(number, int) and said.high is None and number > INT32_MAX:
                        expected = f"at most {INT32_MAX:,}"
                    what = f" ({said.text})" if said.text else ""
                    raise ConfigError(f"{field.name}={value!r}: expected {expected}{what}")


def why_idle(config: Any, needs: str, *, prefix: str = "") -> str | None:
    """Why the condition `needs` does not hold in `config`, in words; None where it does.

    `prefix` is how the fields of `config` are named from outside ("ppo.").
    """
    if is_never(needs):
        return needs.partition(": ")[2] or "nothing here reads it"
    for every in filter(None, needs.split(" and ")):
        reasons = [_why_off(config, one, prefix) for one in every.split(" or ")]
        if None not in reasons:
            return " and ".join(map(str, reasons))
    return None


def _why_off(config: Any, condition: str, prefix: str) -> str | None:
    name, least = condition.partition(">")[::2]
    name, wanted = name.partition("=")[::2]
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    if least:
        on = value is not None and value > float(least)
    elif wanted:
        on = str(value) in wanted.split("|")
    else:
        on = value not in _OFF
    return None if on else f"{prefix}{name} is {value!r}"


def _numbers(value: Any) -> list[float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return [value] if number else []


def short(number: float) -> str:
    """A float as people write it: 1e-5 and 1e6, not 1e-05 and 1e+06."""
    mantissa, e, exponent = str(number).partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _written(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else short(float(f"{bound:g}")).removesuffix(".0")
