"""What math_verify and boxed_integer take off an answer before they read it: its looks, and nothing that it says."""

import pytest

from astar_megatron.algorithm import rewards
from astar_megatron.algorithm.rewards.dressing import undressed

ANSWERS = ["204", r"\left( 3, \frac{\pi}{2} \right)", r"145^\circ", r"\{1,2\}"]
IN_FRONT = [
    *("= ", r"\approx ", r"\approx", "\u2248", r"\simeq ", r"\therefore ", r"\Rightarrow ", r"\implies ", "~", r"\; "),
    *(r"\displaystyle ", r"\large ", r"\color{red} ", r"\quad", r"\hspace{1mm} ", r"\bf ", r"\therefore \quad = "),
    *(r"\text{about } ", r"\text{Answer: }", r"\textbf{The final answer is }", r"\text{Approximately }"),
]
BEHIND = [".", r" \checkmark", r"\,", r"\quad", r"\ .", r". \checkmark"]
AROUND = [
    *(r"\mathbf{%}", r"\boldsymbol{%}", r"\bm{%}", r"\textbf{%}", r"\underline{%}", r"\color{red}{%}", r"\mathrm{%}"),
    *(r"\textcolor[rgb]{1,0,0}{%}", r"\Large{%}", r"\mbox{%}", r"\ensuremath{%}", r"\underline{\mathbf{%}}"),
    *(r"\approx \mathbf{%}.", r"\mathbf{= %.}", r"\textbf{\(%\)}"),
]


DRESSES = [*(f"{words}%" for words in IN_FRONT), *(f"%{words}" for words in BEHIND), *AROUND]


@pytest.mark.parametrize("dress", DRESSES)
def test_what_changes_the_looks_alone_changes_no_verdict(dress: str) -> None:
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    reward = rewards.get("math_verify")
    for answer, other in zip(ANSWERS, [*ANSWERS[1:], ANSWERS[0]], strict=True):
        box = rf"\boxed{{{dress.replace('%', answer)}}}"
        assert (reward(box, answer), reward(box, other)) == (1.0, 0.0), (box, answer)


@pytest.mark.parametrize("dress", DRESSES)
def test_an_integer_is_one_in_any_dress(dress: str) -> None:
    reward = rewards.get("boxed_integer")
    box = rf"\boxed{{{dress.replace('%', '204')}}}"
    assert (reward(box, "204"), reward(box, "203")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("latex", "bare"),
    [
        ("5.", "5"),
        ("0.5", "0.5"),
        (r"\textbf{even}", r"\text{even}"),
        (r"\mathrm{even}", r"\mathrm{even}"),
        (r"\mathrm{D}", r"\mathrm{D}"),
        (r"-\mathbf{5}", "-{5}"),
        (r"\mathbf{a}+\mathbf{b}", r"\mathbf{a}+\mathbf{b}"),
        (r"\textcolor{red}{a}+b", r"\textcolor{red}{a}+b"),
        (r"\mathbb{R}", r"\mathbb{R}"),
        (r"\overline{5}", r"\overline{5}"),
        (r"\text{not } 5", r"\text{not } 5"),
        (r"\neq 5", r"\neq 5"),
        ("1,2,3,...", "1,2,3,..."),
        (r"\left\{x \right.", r"\left\{x \right."),
        (r"x \to 5", r"x \to 5"),
        (r"\tofu", r"\tofu"),
        ("{1,2}", "{1,2}"),
        (r"\mathbf{5", r"\mathbf{5"),
        (r"\mathbf{5\}", r"\mathbf{5\}"),
        (r"\approx", ""),
        ("", ""),
    ],
)
def test_what_says_something_stays(latex: str, bare: str) -> None:
    assert undressed(latex) == bare


def test_what_says_something_keeps_its_verdict() -> None:
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    reward = rewards.get("math_verify")
    for box, answer, score in (
        (r"\textbf{even}", r"\text{even}", 1.0),
        (r"\textbf{even}", r"\text{odd}", 0.0),
        (r"\text{not } 5", "5", 0.0),
        (r"\approx \neq 5", "5", 0.0),
        (r"\approx 2 \times 10^{3}", "10", 0.0),
        (r"{52}_8", "52_8", 1.0),
        (r"\mathbf{52}_8", "52_7", 0.0),
        (r"\overline{5}", "5", 0.0),
    ):
        assert reward(rf"\boxed{{{box}}}", answer) == score, box
