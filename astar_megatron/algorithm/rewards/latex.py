"""The reward of the MATH benchmark: the last \\boxed{...} of a response equals the answer, as normalised LaTeX.

The rules are those of the benchmark's own scorer (Hendrycks et al., arXiv 2103.03874), written anew: text is
rewritten, nothing is computed, so "2" is not "1+1". Two repairs: an escaped brace does not count as a brace, and
`\\sqrt 3`, `\\boxed {3}` are read as LaTeX reads them. Three deviations: units, all from the first `\\text{ ` on, go
however often that stands there; the official scorer compares the texts as they are where it stands more than once.
Math signs around the whole (`$27$`, `\\(27\\)`) go. And without a \\boxed the last \\fbox counts: the official scorer
finds it too, but takes only a \\boxed apart, so that \\fbox{5} is 0 there and 1 here. No end-of-text string is asked
for. The minus sign U+2212 is read as "-". Linear in the response.

`boxed_integer` is for contests whose answers are integers: "025", "27.0" and "3,159" are 25, 27 and 3159; what changes
the looks alone (dressing.py), braces, `\\text`, a unit behind it and the "m+n =" in front of it go. No integer is in
"25 \\text{ or } 27" or "25 \\text{ million}". An empty box is no answer, so the one before it counts.
"""

import re
from typing import NamedTuple

from astar_megatron.algorithm.rewards.dressing import undressed

_REMOVED = ("\n", "\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character counts as none
_SHORT_FRACTION = re.compile(r"\\frac([^{\\])(?:([^{\\])|(?=\{))")  # \frac12, \frac1{72}
_SHORT_ROOT = re.compile(r"\\sqrt([^{\[\\])")  # \sqrt3
_AROUND = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_LONGEST = 5000  # characters of an integer with all around it
_INTEGER = re.compile(r"([+-]?[0-9]{1,4000})(?:\.0*)?")  # Python refuses to read integers of more than 4300 digits
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,|\{,\}|\\,|\s)(?=[0-9]{3}(?![0-9]))")  # 3,159 as TeX writes it
_TWO_NUMBERS = re.compile(r"[0-9][\s,]+[0-9]")
_FONT = re.compile(r"\\(?:text|textbf|textrm|mathbf|mathrm|boldsymbol)(?=\{)")
_GAP_OF_UNIT = r"(?:\\[,;: ]|[\s~/]|\\cdot)"
_UNITS = re.compile(  # "\text{ m}\cdot\text{s}^{-1}"; one letter in \mathrm is a constant. Or a gap, as a whole: linear
    rf"((?:{_GAP_OF_UNIT}*+(?:\\text(?:rm)?\{{|\\mathrm\{{(?=[^{{}}]{{2}}))(?:[^{{}}0-9\\]|\\[ %$,])*\}}"
    rf"(?:\^(?:[0-9]|\{{-?[0-9]\}}))?)+)|{_GAP_OF_UNIT}++"
)
_BEHIND = re.compile(r"[\s.?$]*")
# None between digits: "2\,5" are two numbers. The last of "25\ " stands without its blank.
_SPACE = re.compile(r"(?<![0-9])\\[,;:]|\\[,;:](?![0-9])|\\$")
_NO_INTEGER = re.compile(  # a relation, or words that make another number of one
    r"[<>!]|\\not|(?<![A-Za-z])(?i:and|or)(?![A-Za-z])|(?<![A-Za-z])(?i:hundred|thousand|[mbt]r?illion|dozen)"
)
_GAP = r"(?:[\s$*]|\\[()\[\],;: ]|\\q?quad(?![a-z]))*"
_AND = r"(?:[,;]|\\text\{\s*(?:,\s*)?(?:and|or)\s*\}|\\lor(?![a-z])|\\vee(?![a-z])|(?:and|or)\b)"
_COMMA = re.compile(f"{_GAP}{_AND}(?:{_GAP}{_AND})?{_GAP}")  # between boxes that are a list
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
_SLASH = re.compile(r"(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))")


def math(response: str, answer: str) -> float:
    """Return 1.0 where the last \\boxed{...} of `response` equals the answer after normalisation, else 0.0.

    `answer` is the bare LaTeX or a whole solution with a \\boxed{...}. Raises ValueError where it holds none, or one
    of which normalisation leaves nothing.
    """
    gold = last_boxed(answer) if "\\boxed" in answer or "\\fbox" in answer else answer.strip()
    if gold is None or not (wanted := normalised(gold)):
        raise ValueError(f"answer: expected LaTeX or a solution with a closed \\boxed{{...}}, got {answer[-80:]!r}")
    return float(boxed_answer(response) == wanted)


def boxed_answer(response: str) -> str | None:
    """Return what `math` compares: the last \\boxed{...} of `response` in normal form."""
    boxed = last_boxed(response)
    return (normalised(boxed) or None) if boxed is not None else None


def boxed_list(response: str) -> str | None:
    """Return the last \\boxed{...} in normal form behind those that it ends a list of, with commas between.

    One of which the normal form leaves nothing ("\\text{ 5}") is as it stands.
    """
    return ",".join(normalised(box) or box.strip() for box in filled_boxes(response)) or None


def boxed_integer(response: str, answer: str) -> float:
    """Return 1.0 where the last \\boxed{...} of `response` is the integer `answer`, else 0.0.

    Both in the normal form of `math`. Raises ValueError where `answer` is no integer.
    """
    gold = integer_of(answer)
    return float(integer_in(response) == gold)


def integer_in(response: str) -> str | None:
    """Return what `boxed_integer` compares; None where the last \\boxed{...} that holds anything is no integer.

    None too where it ends a list of others.
    """
    integers = {_integer(boxed) for boxed in last_boxes(_EMPTY_BOX.sub("", response))}
    return integers.pop() if len(integers) == 1 else None


def integer_of(answer: str) -> str:
    """Return an integer such as "025" or "27.0", white space around it or not, in its shortest form. ValueError."""
    integer = _integer(answer.strip())
    if integer is None:
        raise ValueError(f"answer: expected an integer, got {answer[:80]!r}")
    return integer


def _integer(latex: str) -> str | None:
    """The integer that LaTeX writes, in its shortest form; None where it writes none."""
    if len(latex) > _LONGEST:
        return None
    text = _THOUSANDS.sub("", undressed(latex).replace("\\!", ""))
    if _NO_INTEGER.search(text) or _TWO_NUMBERS.search(text):
        return None
    # Without fonts: of a \text{ the normal form would cut off all that follows.
    text = _without_braces(_SPACE.sub("", normalised(_FONT.sub("", _without_unit(text)))))
    name, equals, value = text.partition("=")
    match = _INTEGER.fullmatch(_without_braces(value if equals else name))
    return str(int(match[1])) if match else None


def _without_unit(text: str) -> str:
    """The text without the units that it ends with, and without what stands behind them."""
    for run in _UNITS.finditer(text):
        if run[1] and _BEHIND.fullmatch(text, run.end()):
            return text[: run.start()]
    return text


def _without_braces(text: str) -> str:
    around = min(len(text) - len(text.lstrip("{")), len(text) - len(text.rstrip("}")))
    return text[around : len(text) - around]


def last_boxed(text: str) -> str | None:
    """Return what the last \\boxed (else the last \\fbox) of `text` holds; None where there is none or it isn't closed.

    "\\boxed 5" without braces holds what follows up to the next "$".
    """
    box = _last_box(text, len(text), _name(text))
    return box.content if box else None


def last_boxes(text: str) -> list[str]:
    """Return what `last_boxed` does, behind what the boxes hold that it ends a list of: "\\boxed{1} and \\boxed{2}"."""
    contents: list[str] = []
    name, end = _name(text), len(text)
    while (box := _last_box(text, end, name)) is not None and (not contents or _COMMA.fullmatch(text, box.end, end)):
        contents.append(box.content)
        end = box.start
    return contents[::-1]


def filled_boxes(text: str) -> list[str]:
    """Return what `last_boxes` does, but for those that hold nothing."""
    return [box for box in last_boxes(text) if box.strip()]


class _Box(NamedTuple):
    """Where a box begins and ends in a text."""

    start: int
    end: int
    content: str


def _name(text: str) -> str:
    return "\\boxed" if "\\boxed" in text else "\\fbox"


def _last_box(text: str, end: int, name: str) -> _Box | None:
    """The last box of text[:end]; None where that is not closed."""
    if (start := text.rfind(name, 0, end)) < 0:
        return None
    inside = start + len(name)
    while inside < end and text[inside].isspace():
        inside += 1
    if inside < end and text[inside] != "{":
        content = text[inside:end].partition("$")[0]
        return _Box(start, inside + len(content), content) if text[inside - 1].isspace() else None
    depth = 0
    for brace in _BRACE.finditer(text, inside, end):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return _Box(start, brace.end(), text[inside + 1 : brace.start()])
    return None


def normalised(latex: str) -> str:
    """Return `latex` in the benchmark's normal form: two answers are equal where their normal forms are."""
    text = latex.replace("\N{MINUS SIGN}", "-").replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for removed in _REMOVED:
        text = text.replace(removed, "")
    text = _without_math_signs(text).partition("\\text{ ")[0]  # units on the right
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:  # "k = 3"
        text = right
    text = text.replace(" ", "")
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_FRACTION.sub(_long_fraction, text)
    if text == "0.5":
        return "\\frac{1}{2}"
    slash = _SLASH.fullmatch(text)
    return f"\\frac{{{slash[1]}}}{{{slash[2]}}}" if slash else text


def _without_math_signs(text: str) -> str:
    whole = text.strip()
    for left, right in _AROUND:
        if whole.startswith(left) and whole.endswith(right) and len(whole) >= len(left + right):
            inside = whole[len(left) : -len(right)]
            return text if left in inside or right in inside else inside
    return text


def _long_fraction(match: re.Match[str]) -> str:
    return f"\\frac{{{match[1]}}}" + (f"{{{match[2]}}}" if match[2] else "")
