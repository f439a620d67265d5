"""The calls that the generic tests and the published vectors run: all tables, with their masks.

Every function that takes `where` has a case with it, made from its first case where the tables have
none, and whatever lies behind a mask is 1e30 or -100.
"""

from __future__ import annotations

import inspect

from tests.losses import cases, cases_direct, cases_policy
from tests.losses.case import Case, littered, with_mask

_PLAIN = [*cases.CASES, *cases_direct.CASES, *cases_policy.CASES]


def takes_where(case: Case) -> bool:
    return "where" in inspect.signature(case.function).parameters


def _masked() -> list[Case]:
    have = {case.function_name for case in _PLAIN if "where" in case.masks}
    first = {case.function_name: case for case in reversed(_PLAIN)}
    return [with_mask(c) for n, c in first.items() if n not in have and takes_where(c)]


CASES = [littered(case) for case in [*_PLAIN, *_masked()]]
FIRST = {case.function_name: case for case in reversed(CASES)}
MASKED = [case for case in CASES if "where" in case.masks]
