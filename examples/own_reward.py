"""The reward of OWN.md: 1 for a true equation that ends in the answer, 0.1 for a false one, 0 for none."""

import re


def equation(response: str, answer: str) -> float:
    """Return what a response is worth, for the answer of its problem, as "12"; the last equation in it counts."""
    right = int(answer)  # raises for a problem that this reward can't judge
    equations = re.findall(r"(\d{1,9}) \+ (\d{1,9}) = (\d{1,9})", response)
    if not equations:
        return 0.0
    first, second, total = map(int, equations[-1])
    return 1.0 if first + second == total == right else 0.1
