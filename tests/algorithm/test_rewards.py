"""Rewards: tables of tricky strings, linear time, and what is refused. Every response is scored as it stands: one
that the token limit cut, or that has no EOS, by what it holds."""

import importlib.util
import json
import math as mathematics
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astar_megatron.algorithm import rewards
from astar_megatron.algorithm.rewards.latex import last_boxed, normalised

NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "math_verify" and importlib.util.find_spec("math_verify") is None,
            reason="needs the package math-verify",
        ),
    )
    for name in rewards.names()
]

FORMULAS = [  # a gap behind the minus, and what stands around it
    *(
        (" $$", "$$"),
        (" **$", "$**"),
        (" $", "$"),
        (":$", "$"),
        (" ($", "$)"),
        (",$", "$."),
        (" $", r"\%$"),
        (" $", " $"),
    ),
]
RANGES = [  # what stands around an en dash between two numbers
    *(("2", ""), ("2 ", ""), ("**2**", ""), ("$2$", "$"), ("$2$ ", ""), ("$2 ", "$"), ("(2)", ""), ('"2"', '"')),
    *(("2%", "%"), ("2 %", " %"), (r"2\%", r"\%"), (r"2 \$", r"\$"), ("2\N{EURO SIGN}", ""), (r"2\,", "")),
    *((r"2^{\circ}", ""), (r"2\text{ cm}", r"\text{ cm}"), (r"2\,\mathrm{m}^{2}", "")),
]
SIGNS = [  # what stands around a sign, in ASCII a hyphen
    *(
        ("", ""),
        ("x = ", ""),
        ("x:", ""),
        ("x =", ""),
        ("<answer>", ""),
        ("|", "|"),
        ("(", ")"),
        ("**", "**"),
        ("$", "$"),
    ),
    *(("\N{ALMOST EQUAL TO}", ""), ("\N{LESS-THAN OR EQUAL TO}", ""), ("<", ""), ('"', '"'), ("`", "`"), ("_", "_")),
    *(
        ("4,", ""),
        ("4, ", ""),
        ("1. ", ""),
        ("3\n", ""),
        ("3:", ""),
        ("3/", ""),
        ("2 *", ""),
        ("5 to ", ""),
        ("US $", ""),
    ),
    *(("__", "__"), (r"\text{", "}"), ("$$", "$$"), ("x = 3 = ", ""), ("5;", ""), ("\N{EURO SIGN}", "")),
]
LAST_NUMBER = [
    ("7", "7", 1),
    ("3 + 4 = 7.", "7", 1),
    ("The answer is 7.0", "7", 1),
    ("7.50", "7.5", 1),
    ("first 7, then 8", "7", 0),
    ("It costs $1,234.50!", "1234.5", 1),
    ("It costs $1,234", "$1,234", 1),
    ("-3", "-3", 1),
    ("x = -$3", "-3", 1),
    ("10-7", "7", 1),  # a hyphen between numbers is no sign
    ("\N{MINUS SIGN}3", "-3", 1),
    *((f"It is {before}\N{EN DASH}4{after}", "-4", 1) for before, after in [("x = ", ""), ("**", "**"), ("$", "$")]),
    ("x = $- 4$", "-4", 1),
    *((f"It is{before}- 4{after}", "-4", 1) for before, after in FORMULAS),
    *((f"It is{before}\N{EN DASH} 4{after}", "-4", 1) for before, after in FORMULAS),
    ("so $x = 10 $- 4 more", "4", 1),  # what closes opens nothing
    ("so $x = 10 $- 4 more, by $y$", "4", 1),
    (r"so $x = 10 $- 4 more, by $\alpha$", "4", 1),
    ("so $x = 10 $- 4 more, by $(y)$ and $-y$", "4", 1),
    ("from 10$- 4$", "4", 1),
    (r"\$- 4$", "4", 1),
    ("so $x = 10 $- 4 more\nin $, not less", "4", 1),
    ("5 $\N{EN DASH} 7", "7", 1),
    ("the profit is = $- 5", "-5", 1),
    ("_-5_", "-5", 1),
    ("a_-5", "5", 1),
    *((f"{before}\N{EN DASH}4{after}", "4", 1) for before, after in RANGES),
    ("$6$ - 4", "4", 1),
    ("2\N{EN DASH}4", "4", 1),  # a range
    ("from $5$\N{EN DASH}$10$", "10", 1),
    ("10%\N{EN DASH}20%", "20", 1),
    ("x = - 4", "-4", 1),
    ("x =- 4", "-4", 1),
    (r"$x = -\,4$", "-4", 1),
    (r"\boxed{- $4}", "-4", 1),
    ("(- .5", "-0.5", 1),
    ("x = \N{MINUS SIGN} 4", "-4", 1),
    ("x = 5 - 4", "4", 1),
    ("x - 4", "4", 1),
    ("(5) - 4", "4", 1),
    ("We have x =\n- 4 apples", "4", 1),  # a bullet
    ("2 \N{EN DASH} 4", "4", 1),
    ("1,2,3", "3", 1),
    ("1,234,567", "1234567", 1),
    ("half is .5", "0.5", 1),
    ("007", "7", 1),
    ("**12**", "12", 1),
    ("12\N{DEGREE SIGN}", "12", 1),
    ("seven", "7", 0),
    ("", "7", 0),
    ("\N{ARABIC-INDIC DIGIT SEVEN}", "7", 0),
    ("1e5", "5", 1),  # documented: no exponents
    ("9" * 50, "9" * 49 + "8", 0),  # not compared as floats
    (r"$9{,}500$", "9500", 1),
    (r"$9{,}500$", "500", 0),
    (r"so $-1{,}234{,}567.50$", "-1234567.5", 1),
    (r"$9\,500$", "9500", 1),
    (r"$9,\!500$", "9500", 1),
    (r"$9\,500\,\text{cm}$", "9500", 1),
    ("9500", r"9{,}500", 1),
    (r"$1{,}5$", "5", 1),  # no thousands
    (r"$9\,5000$", "5000", 1),
]

GSM8K = [  # response, answer, strict, flexible
    ("so\n#### 42", "42", 1, 1),
    ("so\n#### 42", "long solution 6*7=<<6*7=42>>42\n#### 42", 1, 1),
    ("#### 1,000", "1000", 1, 1),
    ("#### 1000", "#### 1,000", 1, 1),
    ("#### -5", "-5", 1, 1),
    ("The answer is 42.", "42", 0, 1),
    ("#### 42.", "42", 0, 1),
    ("#### $42", "42", 0, 1),
    ("####42", "42", 0, 1),
    ("#### 42 and more 43", "42", 1, 0),
    ("#### 42\nQ: ...\n#### 43", "42", 1, 0),  # the official rule takes the first
    ("42 ... , .", "42", 0, 1),
    ("#### 42.0", "42", 0, 1),
    ("#### $29.00", "29", 0, 1),
    ("It costs $1,029.50.", "1029.5", 0, 1),
    ("#### 29.01", "29", 0, 0),
    ("#### 290", "29", 0, 0),
    ("#### 0.00", "0", 0, 1),
    ("no number, at all.", "42", 0, 0),
    ("#### 7", "7.0", 1, 1),
    ("#### 7.0", "7.0", 1, 1),
    ("#### 7", "$7.00", 1, 1),
    ("#### 42", "42.", 1, 1),
    ("#### -7", "\N{MINUS SIGN}7", 1, 1),
    ("#### \N{MINUS SIGN}7", "-7", 1, 1),
    ("\N{MINUS SIGN}7", "7", 0, 0),
    (r"#### $9{,}500$", "9500", 0, 1),
    (r"#### 9{,}500", "9500", 0, 1),  # the official strict rule ends at the brace
    (r"#### 9{,}500", "500", 0, 0),
    (r"It is $9\,500$.", "9,500", 0, 1),
    (r"It is $9,\!500$.", r"#### 9{,}500", 0, 1),
    ("#### " + "9" * 50 + ".0", "9" * 50 + ".0", 1, 1),
    ("#### -$5", "5", 0, 1),  # the official flexible rule reads no sign there
    ("#### -$5", "-5", 0, 0),
    ("#### $-5", "-5", 0, 1),
    ("", "42", 0, 0),
]

MATH = [
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
    (r"so \boxed{\dfrac12}", r"\frac{1}{2}", 1),
    (r"\boxed{\frac1{72}}", r"\tfrac{1}{72}", 1),
    (r"\boxed{1/2}", r"\frac{1}{2}", 1),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1),
    (r"\boxed{.25}", "0.25", 1),
    (r"\boxed{-3/4}", r"\frac{-3}{4}", 1),
    (r"\boxed{1} then \boxed{2}", "2", 1),
    (r"\boxed{1} then \boxed{2}", "1", 0),
    (r"\boxed{\{1,\{2\},3\}}", r"\{1,\{2\},3\}", 1),
    (r"\boxed{\left\{ x \right\}}", r"\{x\}", 1),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", 1),
    (r"\boxed{x = 5}", "5", 1),
    (r"\boxed{10\%}", "10", 1),
    (r"\boxed{\$18}", "18", 1),
    (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{5 \text{ cm}}", "5", 1),
    (r"\boxed{\sqrt3}", r"\sqrt{3}", 1),
    (r"\boxed{\sqrt 3}", r"\sqrt{3}", 1),
    (r"\boxed{\sqrt[3]{2}}", r"\sqrt[3]{2}", 1),
    (r"$\boxed 5$ is it", "5", 1),
    (r"\boxed {5}", "5", 1),
    (r"\fbox{5}", "5", 1),
    (r"\boxed{5", "5", 0),  # not closed
    (r"\boxed{4} \boxed{5", "4", 0),  # the last one counts
    (r"\boxed", "5", 0),
    (r"\boxed{}", "5", 0),
    ("5", "5", 0),
    ("", "5", 0),
    (r"\boxed{5}", r"We get \boxed{1}, no: \boxed{5}.", 1),
    (r"\boxed{\text{Évelyn}}", r"\text{Évelyn}", 1),
    (r"\boxed{1+1}", "2", 0),  # nothing is computed
    (r"\boxed{-5}", "-5", 1),
    (r"\boxed{5}", "-5", 0),
    ("\\boxed{\N{MINUS SIGN}5}", "-5", 1),
    (r"\boxed{-x}", "$\N{MINUS SIGN}x$", 1),
    (r"\boxed{\frac{\sqrt{\frac{1}{2}}}{3}}", r"\dfrac{\sqrt{\tfrac{1}{2}}}{3}", 1),  # nested braces
    (r"\boxed{12\text{ m}^2}", "12", 1),
    (r"\boxed{27}", "$27$", 1),
    (r"\boxed{27}", r" \(27\) ", 1),
    (r"\boxed{27}", "$$27$$", 1),
    (r"\boxed{$27$}", r"\[27\]", 1),
    (r"\boxed{\frac12}", r"$\frac{1}{2} \text{ cm}$", 1),
    (r"\boxed{$1$ and $2$}", "1$ and $2", 0),  # not around the whole
    (r"\boxed{ k = 3}", "3", 0),  # the official rule
    (r"so \boxed{\frac{1}{2}} and then", r"\frac12", 1),  # cut by the limit after the box
]

BOXED_25 = [  # response, whether it is 25 under boxed_integer
    (r"\boxed{25}", 1),
    (r"\boxed{025.0}", 1),
    (r"\boxed{\!25}", 1),
    (r"\boxed{25\text{cm}}", 1),
    (r"\boxed{25\,\text{ cm}^2}", 1),
    (r"\boxed{n=25\ \mathrm{square\ units}.}", 1),
    (r"\boxed{\text{ 25 }}", 1),
    (r"\boxed{25 \text{ or } 27}", 0),
    (r"\boxed{25 \text{ and } 30}", 0),
    (r"\boxed{25\text{ and more}}", 0),
    *[
        (rf"\boxed{{25\text{{ {word}}}}}", 0)
        for word in ("hundred", "Thousand", "million", "billion dollars", "dozens")
    ],
    (r"\boxed{25\text{ trillionths}}", 0),
    (r"\boxed{25\text{ pounds of sand}}", 1),
    (r"\boxed{25\text{ \%}}", 1),
    (r"\boxed{25\text{ US\$}}", 1),
    (r"\boxed{25\text{ m}^2\text{/s}}", 1),
    (r"\boxed{25\text{ m}\cdot\text{ s}^{-1}}", 1),
    (r"\boxed{25\text{ ways}?}", 1),
    (r"\boxed{25\mathrm{i}}", 0),
    (r"\boxed{25\mathbf{x}}", 0),
    (r"\boxed{24} or \boxed{25}", 0),
    (r"\(\boxed{24}\) and \(\boxed{25}\)", 0),
    (r"\boxed{25}, \boxed{025}", 1),
    (r"\boxed{24}. No: \boxed{25}", 1),
    (r"\boxed{2 5}", 0),
    (r"\boxed{2, 5}", 0),
    (r"\boxed{\textbf{25}}", 1),
    (r"\boxed{\text{25}}", 1),
    (r"\boxed{\mathbf{25}}", 1),
    (r"\boxed{\mathrm{ 25 }}", 1),
    (r"\boxed{\textbf{\text{25}}}", 1),
    (r"\boxed{{25}}", 1),
    (r"\boxed{25\,}", 1),
    (r"\boxed{25\ }", 1),
    (r"\boxed{\,25}", 1),
    (r"\boxed{2\,5}", 0),
    (r"\boxed{2\;5}", 0),
    (r"\boxed{m+n=25}", 1),
    (r"\boxed{\textbf{m+n = 25}}", 1),
    (r"\boxed{m+n=\mathbf{25}}", 1),
    (r"\boxed{25}\boxed{}", 1),
    (r"\boxed{25} and \boxed{ }", 1),
    (r"\boxed{25 \text{ cm}}", 1),
    (r"\boxed{250}", 0),
    (r"\boxed{2+5}", 0),
    (r"\boxed{\text{25 or 26}}", 0),
    (r"\boxed{25 \text{or} 26}", 0),
    (r"\boxed{25, 26}", 0),
    (r"\boxed{{2}{5}}", 0),
    (r"\boxed{2{5}}", 0),
    (r"\boxed{2^{25}}", 0),
    (r"\boxed{x_{25}}", 0),
    (r"\boxed{m+n=26}", 0),
    (r"\boxed{m=24=25}", 0),
    (r"\boxed{m<=25}", 0),
    (r"\boxed{m \not= 25}", 0),
    (r"\boxed{m \neq 25}", 0),
    (r"\boxed{25=m+n}", 0),
    (r"\boxed{-25}", 0),
    (r"\boxed{25}\boxed{26}", 0),
    (r"\boxed{}", 0),
    (r"\boxed{\text{}}", 0),
]

COUNTDOWN = [  # response, numbers, target, reward
    ("<answer>(44 - 19) + 35</answer>", [44, 19, 35], 60, 1),
    ("<answer>44+35-19</answer>", [44, 19, 35], 60, 1),
    ("<answer>1</answer> no: <answer> 44+35-19 </answer>", [44, 19, 35], 60, 1),
    ("<answer>44+35-19</answer> or <answer>60</answer>", [44, 19, 35], 60, 0.1),
    ("<answer>60</answer>", [44, 19, 35], 60, 0.1),  # not the given numbers
    ("<answer>44+35-19</answer>", [44, 19, 35], 61, 0.1),
    ("<answer>44+35-19+0</answer>", [44, 19, 35], 60, 0.1),
    ("<answer>44+44-28</answer>", [44, 28], 60, 0.1),  # one used twice
    ("<answer>7*(3+3/7)</answer>", [3, 3, 7, 7], 24, 1),  # exact fractions
    ("<answer>8/(3-8/3)</answer>", [3, 3, 8, 8], 24, 1),
    ("<answer>1/(3-3)</answer>", [1, 3, 3], 1, 0.1),
    ("<answer>-3+10</answer>", [3, 10], 7, 1),
    ("<answer>10 - -3</answer>", [3, 10], 13, 1),
    ("<answer>10-3-2</answer>", [10, 3, 2], 5, 1),  # from the left
    ("<answer>2+3*4</answer>", [2, 3, 4], 14, 1),
    ("<answer>2**3</answer>", [2, 3], 8, 0.1),
    ("<answer>7//2</answer>", [7, 2], 3, 0.1),
    ("<answer>3 4</answer>", [3, 4], 34, 0.1),
    ("<answer>2(3)</answer>", [2, 3], 6, 0.1),
    ("<answer>(2+3</answer>", [2, 3], 5, 0.1),
    ("<answer>2+3)</answer>", [2, 3], 5, 0.1),
    ("<answer>2+</answer>", [2, 3], 5, 0.1),
    ("<answer>()</answer>", [2, 3], 5, 0.1),
    ("<answer>none</answer>", [2, 3], 5, 0.1),
    ("<answer></answer>", [2, 3], 5, 0.1),
    ("<answer>2+3=5</answer>", [2, 3], 5, 0.1),
    ("<answer>2.0+3</answer>", [2, 3], 5, 0.1),
    ("<answer>\N{ARABIC-INDIC DIGIT TWO}+3</answer>", [2, 3], 5, 0.1),
    ("<answer>__import__('os').abort()</answer>", [2, 3], 5, 0.1),
    ("<answer>2+3", [2, 3], 5, 0),  # cut by the limit
    ("2+3</answer>", [2, 3], 5, 0),
    ("2+3", [2, 3], 5, 0),
    ("", [2, 3], 5, 0),
    ("<answer>" + "(" * 500 + "2+3" + ")" * 400 + "</answer>", [2, 3], 5, 0.1),
    ("<answer>" + "(" * 400 + "2+3" + ")" * 400 + "</answer>", [2, 3], 5, 1),
    ("<answer>" + "(" * 500_000 + "</answer>", [2, 3], 5, 0.1),
]

MULTIPLY = [
    ("<answer>42</answer>", "42", 1),
    ("<answer> 42\n</answer>.", "42", 1),
    ("<answer>+42</answer>", "42", 1),
    ("<answer>-42</answer>", "-42", 1),
    ("<answer>042</answer>", "42", 1),
    ("<answer>41</answer> <answer>42</answer>", "42", 1),
    ("<answer>42</answer> <answer>41</answer>", "42", 0.1),
    ("<answer>-42</answer>", "42", 0.1),
    ("<answer>1,042</answer>", "1042", 0),  # no integer
    ("<answer>42.0</answer>", "42", 0),
    ("<answer>$42</answer>", "42", 0),
    ("<answer>6*7</answer>", "42", 0),
    ("<answer>\N{ARABIC-INDIC DIGIT FOUR}</answer>", "4", 0),
    ("<answer>42", "42", 0),
    ("42", "42", 0),
    ("", "42", 0),
    ("<answer>" + "9" * 5000 + "</answer>", "42", 0),
]

THOUSANDS_AND_A_HALF = [
    *("1.5e3", "+1.5e3", "(1.5e3)", "{1.5e3}", "$1.5e3$", "1.5e3 m", "1.5E+3", "L = 1.5e3"),
    *(r"\,1.5e3", r"1.5e3\text{ m}", r"1.5 \times 10^3\text{ m}"),
]
BASE_EIGHT = [
    *("52_8", "52_{(8)}", "52_{[8]}", "52_{eight}", "(52)_8", "052_8", "N=52_8", "$52_8$"),
    *(r"52_{\,8}", r"52\,_8", r"52_\text{8}", r"52_{\text{ eight}}", r"52_{\text{base }8}", r"52_{\rm eight}"),
]


def _both_ways(text: str, other: str) -> list[tuple[str, str, float]]:
    return [(f"\\boxed{{{text}}}", other, 1), (f"\\boxed{{{other}}}", text, 1)]


MATH_VERIFY = [
    (r"\boxed{1/2}", r"\frac{1}{2}", 1),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1),
    (r"\boxed{1,000}", "1000", 1),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", 1),
    (r"\boxed{(1,2)}", "(2,1)", 0),
    (r"\boxed{x = 5}", "5", 1),
    (r"\boxed{-5}", "5", 0),
    (r"\boxed{5} or \boxed{6}", "6", 0),  # a list
    (r"\boxed{5}. So \boxed{6}", "6", 1),
    (r"so $\boxed{1}$ and $\boxed{2}$.", "1,2", 1),
    (r"$\boxed{3}$, $\boxed{5}$, and $\boxed{7}$", "3, 5, 7", 1),
    (r"\boxed{3}\text{ or }\boxed{-2}", "-2,3", 1),
    (r"{9}, \boxed{7}", "9,7", 0),
    (r"\(\boxed{1}\) and \(\boxed{2}\)", "1,2", 1),
    (r"**\boxed{5}** or **\boxed{6}**", "6", 0),
    (r"\boxed{1},\quad\text{ and }\ \boxed{2}", "1,2", 1),
    (r"\boxed{50\%} or \boxed{0.5}", "0.5", 1),  # one answer in two forms
    (r"$\boxed{x = 3}$, $\boxed{3}$", "3", 1),
    (r"\boxed{ } and \boxed{5}", "5", 1),
    ("the answer is 42", "42", 0),  # no box, as under math
    ("so $42$", "42", 0),
    (r"\boxed{42} wait, \boxed{42", "42", 0),  # the last one is not closed
    (r"\boxed{} 42", "42", 0),
    (r"\boxed{\text{ 42}}", "42", 1),
    (r"\boxed{\text{Paris}}", r"\text{Paris}", 1),
    (r"\boxed{\frac{1}{0}}", "5", 0),
    (r"\boxed{5", "7", 0),
    ("", "5", 0),
    (r"\boxed{9^{9^{9^9}}}", "3", 0),  # the library gives up after its seconds
    (r"\boxed{10^{10^{10}}}", r"10^{10^{10}}", 1),
    (r"\boxed{9.1\times10^{-31}}", r"1.6\times 10^{-19}", 0),  # both are 0 to the library
    (r"\boxed{\frac{1}{2^{99}}}", r"\frac{1}{2^{98}}", 0),
    (r"\boxed{0.00000042}", "0.00000011", 0),
    (r"\boxed{x = 0.0000004}", "0.0000001", 0),
    (r"\boxed{2^{-99}}", r"\frac{1}{2^{99}}", 1),
    (r"\boxed{\frac{16}{10^{20}}}", r"1.6\times 10^{-19}", 1),
    (r"\boxed{\sin(\pi)}", "0", 1),
    (r"\boxed{0.3333333}", r"\frac13", 1),
    (r"\boxed{0.166667}", r"\frac16", 1),
    (r"\boxed{50\%}", "0.5", 1),
    (r"\boxed{50\%}", "50", 1),
    (r"\boxed{5\%}", "0.05", 1),
    (r"\boxed{\neq 5}", "5", 0),
    ("so it is $\\not= 5$", "5", 0),
    ("\\boxed{\N{NOT EQUAL TO} 5}", "5", 0),
    (r"\boxed{\geq 5}", "5", 0),
    (r"\boxed{\geq 5}", r"\leq 5", 0),
    (r"\boxed{\ge 5}", r"\geq 5", 1),
    (r"\boxed{\gt 5}", "5", 0),
    (r"\boxed{\lt 5}", r"\gt 5", 0),
    ("\\boxed{\N{GREATER-THAN OR EQUAL TO} 5}", "5", 0),
    ("\\boxed{\N{GREATER-THAN OR EQUAL TO} 5}", r"\geqslant 5", 1),
    (r"\boxed{{\neq 5}}", "5", 0),
    (r"\boxed{\;\ge 5}", "5", 0),
    (r"\boxed{\notin 5}", "5", 0),
    (r"\boxed{< 5}", "5", 0),
    (r"\boxed{0.001235}", r"\frac{1}{810}", 1),
    (r"\boxed{\frac{1}{810}}", "0.001235", 1),
    (r"\boxed{0.000495}", r"\frac{1}{2020}", 1),
    (r"\boxed{10^{10^{100}}}", "7", 0),
    (r"\boxed{\left[1,2\right]}", "[1,2]", 1),
    (r"\boxed{2516_7}", "2516_8", 0),
    (r"\boxed{2516}", "2516_8", 0),
    (r"\boxed{2516_8}", "2516", 0),
    (r"\boxed{n = 2516_{8}}", "2516_8", 1),
    (r"\boxed{2516_{\text{seven}}}", r"2516_{\text{eight}}", 0),
    (r"\boxed{2516_{\text{eight}}}", r"2516_{\text{eight}}", 1),
    (r"\boxed{12_4}, \boxed{11_3}", "11_3, 12_4", 1),
    (r"\boxed{11_4}, \boxed{12_3}", "11_3, 12_4", 0),
    (r"\boxed{x_1 = 5}", "5", 1),
    (r"\boxed{42_{10}}", "42", 1),
    (r"\boxed{11111_2 = 31}", "31", 1),
    (r"\boxed{42_{10} = 52_8}", "52_8", 1),
    (r"\boxed{42_{10} = 52_7}", "52_8", 0),
    (r"\boxed{v^2_0}", "v_0^2", 1),
    (r"\boxed{\log_2 5}", r"\log_{2}5", 1),
    (r"\boxed{1\,000}", "1000", 1),
    (r"\boxed{1{,}000\,000 \text{ m}}", "10^6", 1),
    (r"\boxed{(1,\,200)}", "(1,200)", 1),
    (r"\boxed{1.5e3}", "1500", 1),
    (r"\boxed{1500}", "1.5e3", 1),
    (r"\boxed{-2.5E-3}", "-0.0025", 1),
    (r"\boxed{1e-19}", "2e-19", 0),
    (r"\boxed{2e^3}", r"2e^{3}", 1),
    (r"\boxed{2e^3}", "2000", 0),
    (r"\boxed{(e-1)(2e-1)}", "2e^2-3e+1", 1),
    (r"\boxed{\ln(2e-1)}", r"\ln(2e - 1)", 1),
    *[pair for text in (*THOUSANDS_AND_A_HALF, "1500") for pair in _both_ways(text, "1.5e3")],
    *[pair for text in (r"2e-19\text{ m}", r"2 \times 10^{-19}", "L=2e-19") for pair in _both_ways(text, "2e-19")],
    *[pair for text in ("2e - 19", "-19+2e") for pair in _both_ways(text, "2e-19")],
    ("\\boxed{\N{MINUS SIGN}3e8}", "-3e8", 1),
    (r"\boxed{1.5e3}, \boxed{2}", "1.5e3,2", 1),
    (r"\boxed{1e-19\text{ m}}", "2e-19", 0),
    (r"\boxed{8e3}", "3e8", 0),
    (r"\boxed{8e3\text{ m}}", "3e8", 0),
    (r"\boxed{3e2x}", "300x", 0),
    *[pair for text in BASE_EIGHT for pair in _both_ways(text, "52_8")],
    *[(f"\\boxed{{{text.replace('8', '7')}}}", text, 0) for text in BASE_EIGHT if "8" in text],
    (r"\boxed{x=5_8\text{ and }y=6_8}", "5_8,6_8", 1),
    (r"\boxed{A=5_7, B=6_8}", "A=5_8, B=6_8", 0),
    (r"\boxed{1000_{two}}", "1000_2", 1),
    (r"\boxed{1.10_2}", "1.1_2", 1),
    (r"\boxed{1,000_2}", "1{,}000_2", 1),
    (r"\boxed{52_b}", "52_c", 0),
    (r"\boxed{k_{\text{B}} T_{\text{hot}}}", "k_B T_{hot}", 1),
    (r"\boxed{A_{\text{log}}}", r"A_{\text{sum}}", 0),
]


@pytest.mark.parametrize(("response", "answer", "expected"), LAST_NUMBER)
def test_last_number(response: str, answer: str, expected: float) -> None:
    assert rewards.get("last_number")(response, answer) == expected


@pytest.mark.parametrize(("before", "after"), SIGNS)
def test_an_en_dash_is_a_minus_where_a_hyphen_is_one(before: str, after: str) -> None:
    for sign in ("-", "\N{EN DASH}", "\N{MINUS SIGN}"):
        assert rewards.get("last_number")(f"{before}{sign}5{after}", "-5") == 1.0, sign


@pytest.mark.parametrize("before", ["x", "x_", "A", "5 km"])
def test_neither_is_one_behind_a_letter(before: str) -> None:
    for sign in ("-", "\N{EN DASH}"):
        assert rewards.get("last_number")(f"{before}{sign}$5", "5") == 1.0, sign


@pytest.mark.parametrize(("response", "answer", "strict", "flexible"), GSM8K)
def test_gsm8k(response: str, answer: str, strict: float, flexible: float) -> None:
    assert rewards.get("gsm8k_strict")(response, answer) == strict
    assert rewards.get("gsm8k_flexible")(response, answer) == flexible


@pytest.mark.parametrize(("response", "answer", "expected"), MATH)
def test_math(response: str, answer: str, expected: float) -> None:
    assert rewards.get("math")(response, answer) == expected


@pytest.mark.parametrize("blank", ["\r", "\t", "\xa0", "\r\n", " ", "\u2003", "\u3000", "\u2028"])
def test_white_space_around_a_gold_answer_is_none_of_its_own(blank: str) -> None:
    response = "<answer>18</answer> \\boxed{18}\n#### 18"
    for name in sorted({*rewards.names()} - {"countdown", "math_verify"}):  # JSON; a library's reading
        for answer in (f"{blank}18", f"18{blank}"):
            assert rewards.get(name)(response, answer) == 1.0, name
    math = rewards.get("math")
    for answer in (f"{blank}x = 18", f"x = 18{blank}"):
        assert math("\\boxed{x = 18}", answer) == 1.0
    with pytest.raises(ValueError, match="expected LaTeX"):
        math("\\boxed{}", blank)


@pytest.mark.parametrize(("response", "expected"), BOXED_25)
def test_an_integer_in_a_box_may_be_dressed(response: str, expected: float) -> None:
    assert rewards.get("boxed_integer")(response, "25") == expected


def test_an_integer_in_a_box_may_have_any_sign_of_minus() -> None:
    for sign in ("-", "\N{MINUS SIGN}"):
        assert rewards.get("boxed_integer")(f"\\boxed{{{sign}25}}", "-25") == 1.0
        assert rewards.get("boxed_integer")(r"\boxed{-25}", f"{sign}25") == 1.0
        assert rewards.get("boxed_integer")(f"\\boxed{{{sign}25}}", "25") == 0.0


@pytest.mark.parametrize(("response", "numbers", "target", "expected"), COUNTDOWN)
def test_countdown(response: str, numbers: list[int], target: int, expected: float) -> None:
    answer = f'{{"numbers": {numbers}, "target": {target}}}'
    assert rewards.get("countdown")(response, answer) == expected


def _leaf(number: int) -> tuple[str, Fraction | None, list[int]]:
    return str(number), Fraction(number), [number]


def _joined(left: Any, sign: str, right: Any, space: str) -> tuple[str, Fraction | None, list[int]]:
    """Text, value and numbers of (left sign right), with all its brackets."""
    (a, x, m), (b, y, n) = left, right
    value = None
    if x is not None and y is not None and (sign != "/" or y):
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[sign]
    return f"({a}{space}{sign}{b})", value, m + n


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(_leaf),
    lambda inner: st.builds(_joined, inner, st.sampled_from("+-*/"), inner, st.sampled_from(["", " ", "\n"])),
    max_leaves=6,
)


@given(EXPRESSIONS, st.integers(1, 9))
def test_countdown_computes_exactly_and_counts_the_numbers(expression: Any, other: int) -> None:
    text, value, numbers = expression
    reward = rewards.get("countdown")

    def score(numbers: list[int], target: int) -> float:
        return reward(f"<answer>{text}</answer>", json.dumps({"numbers": numbers, "target": target}))

    whole = value is not None and value.denominator == 1
    target = int(value) if value is not None else 0
    assert score(numbers[::-1], target) == (1.0 if whole else 0.1)
    assert score(numbers, target + other) == 0.1
    assert score([*numbers, other], target) == 0.1


@pytest.mark.parametrize(("response", "answer", "expected"), MULTIPLY)
def test_multiply_and_arithmetic(response: str, answer: str, expected: float) -> None:
    assert rewards.get("multiply")(response, answer) == expected
    assert rewards.get("arithmetic")(response, answer) == expected


@pytest.mark.parametrize(("response", "answer", "expected"), MATH_VERIFY)
def test_math_verify(response: str, answer: str, expected: float) -> None:
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    assert rewards.get("math_verify")(response, answer) == expected


def test_without_its_library_math_verify_is_refused_by_name() -> None:
    if importlib.util.find_spec("math_verify") is not None:
        pytest.skip("the package math-verify is installed")
    with pytest.raises(ValueError, match="needs the package math-verify"):
        rewards.version("math_verify")


def test_the_parts_of_math_by_themselves() -> None:
    assert last_boxed(r"a \boxed{x\{y} z") == r"x\{y"
    assert last_boxed("nothing") is None
    assert normalised("k = 3") == "3"
    assert normalised("ab = 3") == "ab=3"


MILLION = 1_000_000
HUGE = {
    "digits": "1" * MILLION,
    "commas": "," * MILLION,
    "groups": "123," * (MILLION // 4),
    "numbers": "7 " * (MILLION // 2),
    "minus": "-" * MILLION,
    "hashes": "#" * MILLION,
    "marks": "#### " * (MILLION // 5),
    "boxes": r"\boxed{" * (MILLION // 7),
    "open": r"\boxed{" + "{" * MILLION,
    "box": r"\boxed{" + "x" * MILLION + "}",
    "fractions": r"\boxed{" + r"\frac12" * (MILLION // 7) + "}",
    "backslashes": r"\boxed{" + "\\" * MILLION + "}",
    "slash": r"\boxed{" + "1" * MILLION + "/" + "2" * MILLION + "}",
    "spaces": r"\boxed" + " " * MILLION,
    "tags": "<answer>" * (MILLION // 8),
    "brackets": "<answer>" + "(" * MILLION + "</answer>",
    "sum": "<answer>" + "1+" * (MILLION // 2) + "1</answer>",
    "pairs": "<answer></answer>" * (MILLION // 17),
    "thousands": "1{,}234" * (MILLION // 7),
    "braces": r"\boxed{" + "{" * (MILLION // 2) + "}" * (MILLION // 2) + "}",
    "fonts": r"\boxed{" + r"\text{" * (MILLION // 6) + "}",
    "empty boxes": r"\boxed{} " * (MILLION // 9),
    "equations": r"\boxed{" + "m=" * (MILLION // 2) + "}",
    "thin spaces": "\\,\\!" * (MILLION // 4),
    "blanks in a list": r"\boxed{1}\text{" + " " * MILLION + r"x \boxed{2}",
    "boxes of blanks": (r"\boxed{" + " " * 4900 + "x}, ") * (MILLION // 4900),
    "boxes of units": (r"\boxed{" + r"\text{ m}" * 600 + "x}, ") * (MILLION // 4900),
}
ANSWERS = {"countdown": '{"numbers": [44, 19, 35], "target": 60}'}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
@pytest.mark.timeout(300)  # quadratic time would be hours
def test_a_response_of_a_megabyte_takes_linear_time(name: str, text: str) -> None:
    assert rewards.get(name)(text, ANSWERS.get(name, "42")) <= 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("response", ["", "5", r"\boxed{5}", "<answer>5</answer>"])
def test_an_answer_that_a_reward_cannot_read_is_refused_whatever_the_response(name: str, response: str) -> None:
    answer = r"\boxed{5" if name.startswith("math") else "Paris"
    with pytest.raises(ValueError, match="answer: expected"):
        rewards.get(name)(response, answer)


@pytest.mark.parametrize("name", ["gsm8k_strict", "gsm8k_flexible", "last_number"])
@pytest.mark.parametrize("answer", ["1/2", "50%", "70 dollars", "1.2.3", "1 2", "7-", "1e3", "", ".", "1,5x"])
def test_an_answer_that_is_not_one_number_is_refused(name: str, answer: str) -> None:
    with pytest.raises(ValueError, match="answer: expected"):
        rewards.get(name)(f"#### {answer}", answer)


def test_a_decimal_comma_is_no_answer_for_the_last_number() -> None:
    with pytest.raises(ValueError, match="answer: expected one number, got '1,5'"):
        rewards.get("last_number")("1,5", "1,5")


@pytest.mark.parametrize("answer", [r"\text{ cm}", r"\boxed{\$}", r"\left\right"])
def test_an_answer_of_which_normalisation_leaves_nothing_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="answer: expected"):
        rewards.get("math")(r"\boxed{}", answer)


@pytest.mark.parametrize(
    "answer",
    [
        *("", "5", "[]", "{}", '{"numbers": [], "target": 5}', '{"numbers": [1.5], "target": 5}', '{"numbers": [5]}'),
        *('{"numbers": 5, "target": 5}', '{"numbers": [5], "target": "5"}', '{"numbers": [-5], "target": 5}'),
    ],
)
def test_a_countdown_problem_that_is_none_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="expected JSON like"):
        rewards.get("countdown")("<answer>5</answer>", answer)


def _raises(response: str, answer: str) -> float:
    raise KeyError("boom")


class _MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def _raises_mute(response: str, answer: str) -> float:
    raise _MuteError


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (_raises_mute, "raised _MuteError: <_MuteError without a text>"),
        (lambda response, answer: 10**5000, "returned <int without a text>, expected a number from -1 to 1"),
        (lambda response, answer: cast(Any, _MuteError()), "returned <_MuteError without a text>, expected"),
        (_raises, "raised KeyError: 'boom'"),
        (lambda response, answer: mathematics.nan, "returned nan, expected a number from -1 to 1"),
        (lambda response, answer: -mathematics.inf, "returned -inf"),
        (lambda response, answer: 1.01, "returned 1.01"),
        (lambda response, answer: "1.0", "returned '1.0'"),
        (lambda response, answer: None, "returned None"),
    ],
)
def test_what_is_no_reward_is_told_why(reward: rewards.Reward, reason: str) -> None:
    value, why = rewards.judge(reward, "response", "7")
    assert value is None and why.startswith(reason)
    assert rewards.judge(rewards.get("last_number"), "7", "7") == (1.0, "")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (True, 1.0),
        (Fraction(1, 2), 0.5),
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (np.array(-0.5), -0.5),
        (np.array(False), 0.0),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(True), 1.0),
        (torch.tensor(0.25, requires_grad=True), 0.25),
    ],
)
def test_numbers_of_numpy_and_torch_are_rewards(number: Any, expected: float) -> None:
    value, why = rewards.judge(lambda response, answer: number, "response", "7")
    assert (type(value), value, why) == (float, expected, "")


@pytest.mark.parametrize("number", [np.array([1.0]), torch.ones(1), np.array(2.0), np.array(1j), np.array("1.0")])
def test_arrays_that_are_no_number_from_minus_1_to_1_are_no_rewards(number: Any) -> None:
    value, why = rewards.judge(lambda response, answer: number, "response", "7")
    assert value is None and why.startswith("returned ") and why.endswith("expected a number from -1 to 1")


@pytest.mark.parametrize(
    ("name", "response", "answer"),
    [
        ("last_number", "first 3, then -$1,200.0", "-1200"),
        ("gsm8k_strict", "3 #### 1,200", "1200"),
        ("gsm8k_flexible", "it is 1,200.", "1200"),
        ("gsm8k_flexible", "it is $5.00", "5"),
        ("math", r"\boxed{\dfrac12}", r"\frac{1}{2}"),
        ("countdown", "<answer> 2+1/3 </answer>", "7/3 of 1, 2, 3"),
        ("countdown", "<answer>2/0</answer>", "nothing of 0, 2"),
        ("multiply", "<answer> +012 </answer>", "12"),
        ("boxed_integer", r"\boxed{012.0}", "12"),
        ("boxed_integer", r"\boxed{3,159}", "3159"),
        ("boxed_integer", r"\boxed{3,\!159}", "3159"),
        ("boxed_integer", r"\boxed{3 159}", "3159"),
        ("last_number", r"$3{,}159$", "3159"),
        ("gsm8k_flexible", r"$3\,159$", "3159"),
        ("boxed_integer", r"\boxed{1{,}003\,159}", "1003159"),
    ],
)
def test_the_answer_that_a_reward_compares_can_be_extracted(name: str, response: str, answer: str) -> None:
    extract = rewards.extractor(name)
    assert extract is not None
    assert extract(response) == answer
    assert extract("none") is None
    assert rewards.extractor("os.path:join") is None


RIGHT = [
    *[("last_number", response) for response, _, expected in LAST_NUMBER if expected == 1],
    *[("gsm8k_strict", response) for response, _, strict, _ in GSM8K if strict == 1],
    *[("gsm8k_flexible", response) for response, _, _, flexible in GSM8K if flexible == 1],
    *[("math", response) for response, _, expected in MATH if expected == 1],
    *[("math_verify", response) for response, _, expected in MATH_VERIFY if expected == 1],
    *[("boxed_integer", response) for response, expected in BOXED_25 if expected == 1],
    *[("countdown", response) for response, _, _, expected in COUNTDOWN if expected == 1],
    *[(name, response) for name in ("multiply", "arithmetic") for response, _, expected in MULTIPLY if expected == 1],
]


def test_what_is_right_has_a_value_that_a_majority_can_be_of() -> None:
    assert {name for name, _ in RIGHT} == set(rewards.names())
    for name, response in RIGHT:
        extract = rewards.extractor(name)
        assert extract is not None and extract(response), (name, response)


PIECES = [
    *("5", "$5$", "= 5", " ", ".", ",", " and ", "{", "}", "$", "#### 5", "#### ", "<answer>5</answer>", "<answer>5"),
    *(r"\boxed{5}", r"\boxed 5", r"\boxed{", r"\boxed{}", r"\boxed{ }", r"\fbox{5}", r"\boxed{\text{ 5}}", r"\text{ }"),
]


@pytest.mark.parametrize("name", NAMES)
@given(response=st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
def test_no_response_is_right_without_a_value(name: str, response: str) -> None:
    extract = rewards.extractor(name)
    assert extract is not None
    if rewards.get(name)(response, ANSWERS.get(name, "5")) == 1.0:
        assert extract(response)


def test_a_reward_is_found_by_name_or_by_import() -> None:
    assert rewards.get("math") is rewards.math
    assert rewards.get("astar_megatron.algorithm.rewards.latex:math") is rewards.math


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8k_strikt", "nearest is gsm8k_strict, all are arithmetic, boxed_integer, countdown, gsm8k_flexible"),
        ("no_such_package.x:f", "can't import"),
        ("os.path:no_such_function", "can't import"),
        ("os.path:sep", "is str, expected a function"),
        (":f", "can't import"),
    ],
)
def test_an_unknown_reward_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.get(name)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], rewards.Reward]:
    """Return a function that loads the reward `f` of a module's text."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "other_form", raising=False)

    def load(definition: str) -> rewards.Reward:
        (tmp_path / "other_form.py").write_text(definition)
        return rewards.get("other_form:f")

    return load


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        ("def f(completions, **kwargs): ...", r"takes \(completions, \*\*kwargs\)"),
        ("def f(*, response, answer): ...", r"takes \(\*, response, answer\)"),
        ("def f(response, answer, extra): ...", r"takes \(response, answer, extra\)"),
        ("def f(answer, response): ...", r"takes \(answer, response\)"),
        ("async def f(response, answer): ...", "is async"),
        ("class f:\n  def __init__(self, response, answer): ...", "is a class"),
        ("class F:\n  async def __call__(self, response, answer): ...\nf = F()", "is async"),
    ],
)
def test_a_function_that_cannot_be_called_with_response_and_answer_is_refused_when_it_is_loaded(
    definition: str, reason: str, own: Callable[[str], rewards.Reward]
) -> None:
    with pytest.raises(ValueError, match=rf"'other_form:f' {reason}, expected a function \(response, answer\)"):
        own(definition)


@pytest.mark.parametrize(
    "definition",
    [
        "def f(completion, truth, extra=None): return 0.5",
        "def f(*arguments, **others): return 0.5",
        "class F:\n  def __call__(self, response, answer): return 0.5\nf = F()",
        "import functools\ndef g(answer, response, strict): return 0.5\n"
        "@functools.wraps(g)\ndef f(response, answer): return g(answer, response, True)",
    ],
)
def test_any_function_that_can_be_called_with_both_is_a_reward(
    definition: str, own: Callable[[str], rewards.Reward]
) -> None:
    assert own(definition)("", "") == 0.5


@pytest.mark.parametrize("text", [r"\boxed{ n = 5}", "\\boxed{\t1/2}", "\\boxed{1/2\t}", "x = \\boxed{ x = 3 }"])
def test_a_solution_is_right_by_its_own_box_whatever_blanks_are_in_it(text: str) -> None:
    assert rewards.get("math")(f"so {text}.", text) == 1.0
