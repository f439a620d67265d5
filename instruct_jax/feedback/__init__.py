"""Where labels come from: simulated labelers, their rankings, and how well they agree."""

from instruct_jax.feedback.labelers import (
    Rate,
    SimulatedLabeler,
    accuracy,
    agreement,
    collect_rankings,
    labeler_folds,
    simulated_labelers,
)

__all__ = [
    "Rate",
    "SimulatedLabeler",
    "accuracy",
    "agreement",
    "collect_rankings",
    "labeler_folds",
    "simulated_labelers",
]
