"""Replaces what identifies people and can be told by its form: addresses of mail and machines, telephone numbers, and
numbers of cards and accounts that pass their checksum.

Names and street addresses need a model and are not found. Rules of form also miss and overreach; they are an option,
and what they replaced is counted.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence

from megalm.errors import DataError

_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}\b"
)
_IP = re.compile(
    r"(?<![\w.])(?:\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]))"
)
_PHONE = re.compile(r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,4}(?![\w-]|\.\d)")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")


def _digits(text: str) -> str:
    return "".join(character for character in text if character in "0123456789")


def _is_ip(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback)


def _is_phone(text: str) -> bool:
    """A country code, an area code in brackets, or the three groups that North American numbers have; so that dates and
    versions stay."""
    count = len(_digits(text))
    return 7 <= count <= 15 and (text[0] in "+(" or re.fullmatch(r"\d{3}[ .-]\d{3}[ .-]\d{4}", text) is not None)


def _is_card(text: str) -> bool:
    """Luhn's checksum, and a first digit that card networks use."""
    digits = [int(digit) for digit in _digits(text)]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return digits[0] in (2, 3, 4, 5, 6) and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 7064 checksum."""
    plain = text.replace(" ", "")
    return len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


_RULES: dict[str, tuple[re.Pattern[str], Callable[[str], bool] | None, str]] = {
    "email": (_EMAIL, None, "<EMAIL>"),
    "iban": (_IBAN, _is_iban, "<IBAN>"),
    "card": (_CARD, _is_card, "<CARD>"),
    "ip": (_IP, _is_ip, "<IP>"),
    "phone": (_PHONE, _is_phone, "<PHONE>"),
}
"""In the order in which they are applied: a card's number must not be taken for a telephone's."""


def check_kinds(kinds: Sequence[str]) -> None:
    """DataError where a kind is unknown."""
    if unknown := [kind for kind in kinds if kind not in _RULES]:
        raise DataError(f"--scrub {','.join(unknown)}: expected kinds among {', '.join(_RULES)}")


class Scrubber:
    """Replaces the named kinds of personal data and counts them."""

    def __init__(self, kinds: Sequence[str]) -> None:
        check_kinds(kinds)
        self._rules = {kind: rule for kind, rule in _RULES.items() if kind in kinds}
        self.counts: Counter[str] = Counter()

    def apply(self, text: str) -> str:
        """The text with a placeholder such as ``<EMAIL>`` for each piece that was found."""
        for kind, (pattern, check, placeholder) in self._rules.items():

            def replace(
                match: re.Match[str],
                kind: str = kind,
                check: Callable[[str], bool] | None = check,
                placeholder: str = placeholder,
            ) -> str:
                if check is not None and not check(match[0]):
                    return match[0]
                self.counts[kind] += 1
                return placeholder

            text = pattern.sub(replace, text)
        return text
