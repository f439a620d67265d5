"""Finding personal data in a prompt (spec DATA-7).

Patterns, with checksums where the number has one (cards: Luhn; IBAN: ISO 7064 mod 97-10), so that
an order number or a list of figures is not taken for a card. Recall comes first: a prompt is only
left out of the training split, so a false alarm costs one prompt.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple


class Pii(NamedTuple):
    """One find: `text[start:end]` looks like `kind`."""

    kind: str
    start: int
    end: int


def find_pii(text: str) -> list[Pii]:
    """Every find, in the order of the text; kinds may overlap."""
    finds = [
        Pii(kind, match.start(), match.end())
        for kind, pattern, check in _DETECTORS
        for match in pattern.finditer(text)
        if check is None or check(match[0])
    ]
    return sorted(finds, key=lambda find: find[1:])


def has_pii(text: str) -> bool:
    """Whether anything is found."""
    return any(
        check is None or check(match[0])
        for _, pattern, check in _DETECTORS
        for match in pattern.finditer(text)
    )


def _luhn(number: str) -> bool:
    digits = [int(c) for c in number if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) for d in digits[-2::-2]]
    # 3-6 and 2 are the first digits that payment networks use.
    return (
        13 <= len(digits) <= 19
        and digits[0] in (2, 3, 4, 5, 6)
        and len(set(digits)) > 1
        and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
    )


def _iban(text: str) -> bool:
    code = text.replace(" ", "")
    if not 15 <= len(code) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def _phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15


def _address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq"
    "|Terrace|Way|Highway|Hwy|Parkway|Pkwy|Crescent|Close"
)
_KEYS = (
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic, Stripe
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
    r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}",
    r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"\bAIza[0-9A-Za-z_-]{35}",  # Google
    r"\bhf_[A-Za-z0-9]{30,}",
    r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+",  # JSON web token
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    r"(?i:\b(?:api[ _-]?key|secret(?:[ _-]key)?|access[ _-]?token|passw(?:or)?d))"
    r"[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9_+/.-]{16,}",
)
_DETECTORS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool] | None], ...] = (
    ("e-mail", re.compile(r"[\w.%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}"), None),
    (
        "phone",
        re.compile(
            r"(?<![\w+])\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}(?!\d)"
            r"|(?<![\d.-])(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\d-])"
        ),
        _phone,
    ),
    (
        "ssn",
        re.compile(r"(?<![\d-])(?!000|666|9)\d{3}([- ])(?!00)\d\d\1(?!0000)\d{4}(?![\d-])"),
        None,
    ),
    ("card", re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])"), _luhn),
    ("iban", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    (
        "street address",
        re.compile(
            rf"\b\d{{1,5}}[A-Za-z]?,?\s+(?:[NSEW]\.?\s+)?(?:(?:[A-Z][\w'’.-]*|\d+(?:st|nd|rd|th))\s+)"
            rf"{{1,4}}(?:{_STREETS})\b"
            r"|\b(?:P\.? ?O\.?|Post Office) Box \d+"
            r"|\b\w+(?:straße|strasse|str\.|gasse|weg|platz|allee)\s+\d{1,4}\b"
            r"|\b\d{1,4},?\s+(?:bis\s+)?(?:rue|avenue|boulevard|chemin|quai)\s+(?:[a-z']+\s+){0,2}[A-Z]\w+"
        ),
        None,
    ),
    ("ip", re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)"), _address),
    ("ip", re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"), _address),
    ("api key", re.compile("|".join(_KEYS)), None),
)
