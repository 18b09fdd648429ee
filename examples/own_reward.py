"""The reward of OWN.md: 1 for the right total as JSON, 0.1 for its form alone, else 0."""

import json
import re


def total(response: str, answer: str) -> float:
    """Return what a response is worth, for the answer of its problem, as "12"; the last JSON object in it counts."""
    objects = re.findall(r"\{[^{}]*\}", response)
    try:
        value = json.loads(objects[-1])["total"]
    except (ValueError, LookupError, RecursionError):  # no object, no JSON, no total, or thousands of brackets
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return 1.0 if value == int(answer) else 0.1
