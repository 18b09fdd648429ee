"""What is a secret by its form: variables by their names, and logins in addresses.

A login is all between :// and @ of a URL, the password with a slash in it as SQLAlchemy reads it, what has a secret's
name behind its ?, and in messages also user:password@ before host:port or host/ without a scheme. Patterns have
bounds, so that their time grows as a text does.
"""

import re
from collections.abc import Iterator

_WORDS = "TOKEN|KEY|SECRET|PASS|CREDENTIAL|JWT"
SECRET_NAME = re.compile(rf"{_WORDS}|AUTH|COOKIE|CONNECTION_STRING|_PWD|(^|_)(PAT|PW)($|_)", re.IGNORECASE)
_AT = "@(?!sha256:)"  # but for the digest of a container image
_IN_URL = re.compile(
    rf"(?<=\w)(:/{{1,2}})([^/\s]{{0,2000}}|[^/\s:]{{0,200}}:\S{{0,2000}}){_AT}"
)  # of a Path with one slash
_PARAMETER = rf"[^?&;=\s]{{0,50}}(?:{_WORDS}|PWD|SIGNATURE)[^?&;=\s]{{0,50}}|auth|sig"
_FILES = "ssl_?key|passfile"  # parameters that name a file
_IN_QUERY = re.compile(rf"([?&;](?!(?:{_FILES})=)(?:{_PARAMETER})=)([^&\s\"']+)", re.IGNORECASE)
_DELIMITER = r"""\s/:@"'=(,\["""
_WITHOUT_SCHEME = re.compile(
    rf"""(?<![^{_DELIMITER}])[^{_DELIMITER}]{{1,200}}:[^\s/@"']{{1,200}}{_AT}(?=[\w.\[\]-]+(?:/|:\d))"""
)
LOGIN_REFUSED = (
    "a URL with a login, which logs and checkpoints would keep; leave out all between :// and @ and what is secret "
    "behind ?, and give it to the program that opens the URL"
)


def has_login(text: str) -> bool:
    """Return whether a URL in a text has a login."""
    return "://" in text and bool(_IN_URL.search(text) or _IN_QUERY.search(text))


def without_logins(text: str) -> str:
    """Return a text with <login> and <secret> in place of the logins in it."""
    text = _IN_QUERY.sub(r"\1<secret>", _IN_URL.sub(r"\1<login>@", text))
    return _WITHOUT_SCHEME.sub("<login>@", text)


def secrets_of(text: str) -> Iterator[str]:
    """Return the passwords of the URLs in a text; where there is a user alone it is a token."""
    if not has_login(text):
        return
    for _, login in _IN_URL.findall(text):
        user, _, password = login.partition(":")
        yield password or user
    for _, value in _IN_QUERY.findall(text):
        yield value
