"""A reward that a random model gets now and then: how many digits its response has."""


def reward(response: str, answer: str) -> float:
    """Return how many ninths of a response of nine characters digits would fill, at most 1."""
    return min(sum(character.isdigit() for character in response) / 9, 1.0)
