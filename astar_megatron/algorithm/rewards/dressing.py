"""What changes how an answer in LaTeX looks, and not what it says: `undressed` takes it away.

Around the whole answer: fonts, colours, a line below it. In front: blanks, sizes, "=", "\\Rightarrow", "\\therefore",
signs and words that say that it is rounded or is the answer. Behind: blanks, a full stop, a check mark. Words stay
text, "\\textbf{even}" is "\\text{even}"; so do letters in a font of mathematics, "\\mathrm{cm}". Linear in the length.
"""

import re

_DEEPEST = 8  # fonts within each other
_GAP = r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z])|\\[hv]space\*?\{[^{}]*\})"
_COLOUR = r"\\(?:text)?color(?:\[[^\]]*\])?\{[^{}]*\}"
_SIZES = "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle|textstyle"
_SIGNS = r"approx(?:eq)?|thickapprox|simeq|sim|cong|doteq|therefore|implies|(?:Long)?[Rr]ightarrow|to"
_WORDS = r"(?:(?:the )?(?:final )?answer(?: is)?[:=]?|about|approx(?:imately|\.)?|roughly)"
_FRONT = re.compile(
    rf"(?:{_GAP}|{_COLOUR}(?!\s*\{{)|\\(?:{_SIZES})(?!\s*\{{|[A-Za-z])|\\(?:{_SIGNS}|bf|it|rm|sf|tt)(?![A-Za-z])|="
    rf"|[\u2192\u21d2\u2234\u223c\u2243\u2245\u2248]|\\text(?:bf|it|rm)?\{{\s*(?i:{_WORDS})\s*\}})+"
)
_BEHIND = re.compile(rf"{_GAP}|\\checkmark|(?<!\.)(?<!\\right)(?<!\\left)\.")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|sl|tt|up|normal)|emph|[mh]box)\s*(?=\{)")
_MATHEMATICS = re.compile(
    rf"(?:\\(?:math(?:bf|it|rm|sf|tt|normal)|bm|boldsymbol|pmb|operatorname\*?|ensuremath|underline|{_SIZES})|{_COLOUR})"
    r"\s*(?=\{)"
)
_OF_DIGITS = re.compile(rf"{_MATHEMATICS.pattern}(?=\{{[0-9.,]+\}})")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character counts as none
_WORDS_ALONE = re.compile(r"[\s()]*[A-Za-z](?:[A-Za-z\s.,;:'!?()-]*[A-Za-z.!?)])?[\s()]*")


def undressed(latex: str) -> str:
    """Return an answer without what changes its looks alone."""
    latex = _OF_DIGITS.sub("", latex)
    for _ in range(_DEEPEST):
        latex = _without_ends(latex)
        if (text := _TEXT.match(latex)) and (content := _whole(latex, text.end())) is not None:
            latex = rf"\text{{{content}}}" if _WORDS_ALONE.fullmatch(content) else content
        elif (font := _MATHEMATICS.match(latex)) and (content := _whole(latex, font.end())) is not None:
            latex = latex if _WORDS_ALONE.fullmatch(content) else content
        elif latex.startswith(("{(", "{\\left(")) and (content := _whole(latex, 0)) is not None:
            latex = content
    return latex


def _without_ends(latex: str) -> str:
    front = _FRONT.match(latex)
    latex = latex[front.end() :] if front else latex
    end = len(latex)
    for match in reversed(list(_BEHIND.finditer(latex))):
        if match.end() != end:
            break
        end = match.start()
    return latex[:end]


def _whole(latex: str, start: int) -> str | None:
    """What the braces hold that open at `start`, where they close with the text; None where it goes on behind them."""
    depth = 0
    for brace in _BRACE.finditer(latex, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return latex[start + 1 : brace.start()] if brace.end() == len(latex) else None
    return None
