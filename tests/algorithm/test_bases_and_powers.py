"""Numbers that math_verify gives the library in other words: a base's name stays whole, and 1.5e3 is one number."""

import pytest

from astar_megatron.algorithm import rewards

pytest.importorskip("math_verify", reason="needs the package math-verify")

EQUAL = [
    *(("52_8", text) for text in (r"52_{\left(8\right)}", r"52_{\text{base-8}}", r"52_{\text{base eight}}", "52~_8")),
    *(("52_8", text) for text in (r"52_\text{base 8}", r"52_{(\text{base }8)}", r"52_{\mathbf{\text{8}}}")),
    ("101_{-2}", r"101_{\text{base }-2}"),
    ("121_{b+1}", r"121_{(\mathrm{b} + 1)}"),
    ("12_{b^2}", "12_{b^{2}}"),
    (r"10_\alpha", r"10_{\alpha}"),
    ("1_{[0,1)}", r"1_{[0,\,1)}"),
    ("5_{}", "5"),
    ("1A2_{16}", r"1a2_{\text{sixteen}}"),
    ("1E3_{16}", "(1E3)_{16}"),
    ("1E3_{10}", "1000"),
    ("1/2e3", "0.0005"),
    ("1e3/2e3", "0.5"),
    ("3e8/2e6", "150"),
    ("x/1e3", r"\frac{x}{1000}"),
    (r"1\div 2e3", "0.0005"),
    (r"1 \over 2e3", "0.0005"),
    ("1/-2e3", "-1/2000"),
    ("1/4e7", "2.5e-8"),
    ("x^(1/2e3)", r"x^{\frac{1}{2000}}"),
    ("x^(2e3)", "x^{2000}"),
    ("2e3!", "2000!"),
    (r"7 \mod 2e3", "7"),
    ("5-2e3", "-1995"),
    ("-2e3", "-2000"),
    (r"\sin 2e3", r"\sin 2000"),
    (r"x \cdot 2e3", "2000x"),
    ("(1,2e3)", "(1,2000)"),
    (r"\{1e3,2e3\}", "1000,2000"),
    ("x^2e3", "3ex^2"),  # no power of ten, but Euler's number
    ("x2e3", "6ex"),
    ("x1.5e3", "4.5ex"),
    (".5e3", "500"),
]
DIFFERENT = [
    ("101_{-2}", "101_{2}"),
    ("13_{-4}", "13_4"),
    ("101_{-10}", "101"),
    ("101_{-10}", "101_{10}"),
    ("121_{b+1}", "121_{b-1}"),
    ("2_{a-b}", "2_{ab}"),
    ("2_{(a+b)c}", "2_{a+bc}"),
    ("11_{1/2}", "11_{12}"),
    ("11_{2+i}", "11_{2i}"),
    ("3_{+}", "3_{-}"),
    ("52_B", "52_b"),
    (r"10_{\alpha}", r"10_{\gamma}"),
    (r"10_\alpha", r"10_\gamma"),
    ("10_\N{GREEK SMALL LETTER BETA}", "10_\N{GREEK SMALL LETTER DELTA}"),
    ("12_{b^{12}}", "12_{b^12}"),
    ("1_{x>0}", "1_{x<0}"),
    (r"1_{A\cup B}", r"1_{A\cap B}"),
    ("1_{[0,1)}", "1_{(0,1]}"),
    (r"1_{\{0,1\}}", "1_{(0,1)}"),
    (r"2_{\frac{1}{b^{2}}}", r"2_{\frac{1}{b^{3}}}"),
    ("1E3_{16}", "1000_{16}"),
    ("1E3_{16}", "1000"),
    ("1E3_{16}", "3E1_{16}"),
    ("1E3_{16}", "1E3_{15}"),
    ("1A2_{16}", "2A1_{16}"),
    ("1A2B_{16}", "2A1B_{16}"),
    ("-1E3_{16}", "1E3_{16}"),
    ("1/2e3", "500"),
    ("1e3/2e3", "500000"),
    ("3e8/2e6", "1.5e14"),
    ("x/1e3", "1000x"),
    ("1/4e7", "2.6e-8"),
    ("x2e3", "2000x"),
    (".5e3", "5000"),
    (r"\approx 2e3", "10"),  # the library can't read the rest, and takes a number behind a blank
    (r"2e3\%", "10"),
    (r"\sqrt 2e3", "10"),
]


@pytest.mark.parametrize(("text", "other"), EQUAL)
def test_a_number_in_two_forms_is_right_both_ways(text: str, other: str) -> None:
    assert _verdicts(text, other) == (1.0, 1.0)


@pytest.mark.parametrize(("text", "other"), DIFFERENT)
def test_two_numbers_are_told_apart_both_ways(text: str, other: str) -> None:
    assert _verdicts(text, other) == (0.0, 0.0)
    assert _verdicts(text, text) == _verdicts(other, other) == (1.0, 1.0)


def _verdicts(text: str, other: str) -> tuple[float, float]:
    reward = rewards.get("math_verify")
    return reward(f"\\boxed{{{text}}}", other), reward(f"\\boxed{{{other}}}", text)
