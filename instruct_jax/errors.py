"""The ways a run ends before its time, each with its exit code; every layer may raise them.

0: done, or stopped by a signal with everything saved
2: a mistake in the configuration or the data (`UserError`), told in one line, nothing written
3: too many non-finite updates in a row (`NonFiniteError`), no reward where one was asked for
   (`RewardError`), or no figures of an evaluation of the user's (`EvaluationError`); the last good
   state is saved
4: a checkpoint that cannot be used (`CheckpointError`)
5: a file of the run that cannot be written (`StorageError`); the last saved step stands
130, 143: stopped by Ctrl-C or SIGTERM where no step could be saved (`Interrupted`)
"""

import signal


class RunError(Exception):
    """The base of the errors that a script turns into one line and an exit code."""

    exit_code = 1
    # Whether every process of a run raises it, so that they can leave in good order.
    everywhere = False


class UserError(RunError):
    """A mistake that the user can mend: the message says where it is and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A mistake in a configuration or on the command line."""


class NonFiniteError(RunError):
    """Training stopped because its updates stayed non-finite; no parameter was touched by them."""

    exit_code = 3
    everywhere = True


class RewardError(RunError):
    """A reward from outside raised, hung, or gave no finite number; nothing was learnt from it."""

    exit_code = 3
    everywhere = True


class EvaluationError(RunError):
    """A function of the user's that evaluates raised, or gave something else than numbers."""

    exit_code = 3
    everywhere = True


class CheckpointError(RunError):
    """A checkpoint that is damaged, or does not hold what is asked of it."""

    exit_code = 4


class StorageError(RunError):
    """The disk is full, or a directory may not be written to; what was saved before stands."""

    exit_code = 5


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, outside of a loop that saves its state and ends with code 0."""

    def __init__(self, number: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(
            f"stopped by {name}; what was saved stands, and the same command goes on from there"
        )
        self.exit_code = 128 + number
