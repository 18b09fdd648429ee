"""Rewards whose answer is a number: `last_number` and the two GSM8K rules.

Linear in the response's length. Only the ASCII digits count; the minus sign U+2212 is read as "-". By `last_number` so
is an en dash, but for a range's: that stands behind a number, its unit (a sign or TeX's braces) and what closes it
("*", "$", a quote or a bracket), with or without blanks. By it a minus with a gap behind it is a sign where only a
sign can stand: behind "=" or an opening bracket ("x = - 4"), and behind a "$" that opens a formula ("$- 4$"), as one
does that stands behind no word or number and is closed in its line. Exponents are not read: the last number of "1.5e3"
is 3. An answer that is not one number ("1/2", "50%", "70 dollars") raises ValueError: it could score 0 alone.

TeX's thousands, "9{,}500", "9\\,500" and "9,\\!500", are 9500, as `boxed_integer` reads them, but for `gsm8k_strict`:
its official rule ends at the brace or the backslash.
"""

import re
from decimal import Decimal

# A sign directly behind a digit or letter is a hyphen ("5-3", "A-4"); behind the "_" of emphasis it is none. "1,234" is
# one number, "1, 2" and "1,2" are two.
_NUMBER = re.compile(
    r"(?:(?<![^\W_])(?<![^\W_]_)-\$?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"
)
_GAP = r"(?:[^\S\n]|~|\\[,;:! ])*"
_UNIT = r"(?:\\[%$]|[%\u2030\u00b0\u00a2\u00a3\u00a5\u20ac]|\^?(?:\\[A-Za-z]+)?\{[^{}\n]*\})"  # degrees, euros, TeX's
_DASH = re.compile(  # with the number in front of a range's
    rf"([0-9](?:{_GAP}{_UNIT})*[$*_`'\")\]}}\u2019\u201d\u2032\u2033]*{_GAP}\u2013)|\u2013"
)
_CLOSED = r"(?=[^$\n]*\$(?![\w\\({+-]))"  # by a "$" that opens nothing
_GAP_BEHIND_SIGN = re.compile(rf"((?:[={{(\[][ \t]*\$?|(?<![\w\\])\$(?=-){_CLOSED})-)(?:[ \t]|\\[,;: ])+(?=\$?[.0-9])")
_OFFICIAL = re.compile(r"-?[0-9.,]+")
_PLAIN = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
_OFFICIAL_STRICT = re.compile(r"#### (-?[0-9.,]+)")
TEX_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3}(?![0-9]))")


def last_number(response: str, answer: str) -> float:
    """Return 1.0 where the last number of `response` equals `answer`, else 0.0; "7", "7.0" and "$7.00" are equal."""
    gold = _decimal(answer)  # refuses an answer that is no number, whatever the response
    itself = number_in(answer)
    if itself is None or _decimal(itself) != gold:  # "1,5" is two numbers
        raise ValueError(f"answer: expected one number, got {answer[:80]!r}")
    number = number_in(response)
    return float(number is not None and _decimal(number) == gold)


def number_in(response: str) -> str | None:
    """Return what `last_number` compares: the last number of `response`, in its shortest form ("7.50" is "7.5")."""
    text = _DASH.sub(lambda dash: dash[1] or "-", _plain(response))
    text = _GAP_BEHIND_SIGN.sub(r"\1", text)
    number = next(reversed(_NUMBER.findall(text)), None)
    return _shortest(_decimal(number)) if number is not None else None


def gsm8k_strict(response: str, answer: str) -> float:
    """Return 1.0 where what follows the first "#### " of `response` is the answer, else 0.0.

    The official rule: `#### (\\-?[0-9\\.\\,]+)`, commas removed, exact match of the text ("42." is not "42").
    `answer` is "42" or a GSM8K solution that ends in "#### 42"; of "7.0" both "7.0" and "7" are right.
    """
    golds = _golds(answer)
    return float(strict_answer(response) in golds)


def strict_answer(response: str) -> str | None:
    """Return what `gsm8k_strict` compares; None also where that is no number (".")."""
    match = _OFFICIAL_STRICT.search(_plain_minus(response))
    return _number(_bare(match[1])) if match is not None else None


def gsm8k_flexible(response: str, answer: str) -> float:
    """Return 1.0 where the last number of `response` is the answer, else 0.0; `answer` as in gsm8k_strict.

    The official rule's last `\\-?[0-9\\.\\,]+`, with four repairs: commas go ("1,000" is "1000"), TeX's too, and so
    does the full stop that ends a sentence; and numbers are equal by value: "$29.00" is "29". A minus before a dollar
    sign is lost, as in the official rule: "-$5" is "5", unlike `last_number`'s.
    """
    golds = _golds(answer)
    return float(flexible_answer(response) in golds)


def flexible_answer(response: str) -> str | None:
    """Return what `gsm8k_flexible` compares, in its shortest form; None also where that is no number ("1.2.3")."""
    written = next((text for text in reversed(_OFFICIAL.findall(_plain(response))) if text.strip("-.,")), None)
    number = _number(_bare(written).rstrip(".")) if written is not None else None
    return _shortest(Decimal(number)) if number is not None else None


def _golds(answer: str) -> set[str]:
    """The texts that are right: the answer's number as it is written and in its shortest form."""
    written = _plain(answer.rpartition("####")[2]).strip().removeprefix("$")
    gold = written.replace(",", "").removesuffix(".")
    if _number(gold) is None:
        raise ValueError(f'answer: expected one number or a solution that ends in "#### number", got {answer[-80:]!r}')
    return {gold, _shortest(Decimal(gold))}


def _number(text: str) -> str | None:
    return text if _PLAIN.fullmatch(text) else None


def _shortest(number: Decimal) -> str:
    """A number without an exponent and needless zeros; of every digit, unlike Decimal.normalize."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _decimal(text: str) -> Decimal:
    bare = _bare(_plain(text)).strip()
    if re.fullmatch(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)", bare) is None:
        raise ValueError(f"answer: expected a number, got {text[:80]!r}; for LaTeX answers take the reward `math`")
    return Decimal(bare)


def _bare(text: str) -> str:
    return text.replace(",", "").replace("$", "")


def _plain(text: str) -> str:
    """The text with its numbers as plain text writes them: TeX's separators of thousands go, and "\\!" as in `math`."""
    return TEX_THOUSANDS.sub("", _plain_minus(text).replace("\\!", ""))


def _plain_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")
