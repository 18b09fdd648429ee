"""A reward that a random model gets now and then: how many digits its response has."""


def reward(response: str, answer: str) -> float:
    """Return the share of digits among nine characters."""
    return sum(character.isdigit() for character in response) / 9
