"""What is a secret by its form: variables by their names, and logins in addresses.

A login is all between :// and @ of a URL, of a database's with the slashes in it as SQLAlchemy reads them; the values
of parameters that have a secret's name, behind a URL's ? or #; and in messages also user:password@ before a host
without a scheme. Patterns have bounds, so that their time grows as a text does.
"""

import re
from collections.abc import Iterator
from urllib.parse import unquote

SECRET_NAME = re.compile(
    r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|JWT|AUTH|COOKIE|CONNECTION_STRING|_PWD|(^|_)(PAT|PW)($|_)", re.IGNORECASE
)
_AT = "@(?!sha256:)"  # but for the digest of a container image
_DATABASES = r"(?:postgres(?:ql)?|mysql|mariadb|mssql|oracle)(?:\+\w{1,50})?"
_LOGINS = (  # of a Path too, which has one slash
    re.compile(rf"({_DATABASES}:/{{1,2}})([^/\s:]{{0,200}}:\S{{0,2000}}){_AT}"),
    re.compile(rf"(?<=\w)(:/{{1,2}})([^/\s]{{0,2000}}){_AT}"),
    # A password with blanks, which no URL may have and libraries take; behind a port comes none.
    re.compile(rf"""(?<=\w)(:/{{1,2}})([^/\s:@]{{1,200}}:(?!\d{{1,5}}\b)(?=\S)[^/\n"'<>@]{{1,200}}){_AT}(?=[\w\[])"""),
)
_URL = re.compile(r"""\w:/{1,2}[^\s"'<>\\]{1,4000}""")
_PARAMETER, _VALUE = re.compile(r"[?&;#]([^?&;#=\s]{1,200})="), re.compile(r"[^&;\s]+")
_MORE_NAMES = re.compile(r"SIGNATURE|(^|_)(PWD|SIG)$", re.IGNORECASE)  # of parameters
_NO_SECRET = re.compile(  # words, numbers, and paths of files that hold secrets
    r"author(?!i[sz])|keyboard|keyword|monkey|compass|passage|tokenizer"
    r"|(?<![a-z])(max|min|num)_([a-z]+_)?tokens|ssl_?key|passfile",
    re.IGNORECASE,
)
_VERSION = r"v?\d+(?:\.\d+){1,2}(?![\w-]|[.:]\w)"  # of a data set or a model, hf:set@v1.0: an address has four numbers
_DELIMITER = r"""\s/:@"'=(,\["""
_WITHOUT_SCHEME = re.compile(
    rf"""(?<![^{_DELIMITER}])[^{_DELIMITER}]{{1,200}}:[^\s/@"']{{1,200}}{_AT}(?!{_VERSION})(?=[\w\[\]-]+(?:[/.]|:[\d/]))"""
)
# An escape sequence of a response could move the cursor, hide lines, or set a terminal's title and clipboard.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
LOGIN_REFUSED = (
    "a URL with a login, which logs and checkpoints would keep; leave out all between :// and @ and what is secret "
    "behind ? or #, and give it to the program that opens the URL"
)


def has_login(text: str) -> bool:
    """Return whether a URL in a text has a login."""
    return "://" in text and any(True for _ in secrets_of(text))


def without_logins(text: str) -> str:
    """Return a text with <login> and <secret> in place of the logins in it."""
    for login in _LOGINS:
        text = login.sub(r"\1<login>@", text)
    text = _URL.sub(lambda url: _without_values(url[0]), text)
    return _WITHOUT_SCHEME.sub("<login>@", text)


def shown(text: str) -> str:
    """Return a text as a person is shown it: without logins, and with escapes in place of control characters."""
    return without_logins(text).translate(_CONTROLS)


def secrets_of(text: str) -> Iterator[str]:
    """Yield the passwords of the URLs in a text; where there is a user alone it is a token."""
    for pattern in _LOGINS:
        for _, login in pattern.findall(text):
            user, _, password = login.partition(":")
            yield password or user
    for url in _URL.findall(text):
        for start, end in _secret_values(url):
            yield url[start:end]


def _without_values(url: str) -> str:
    for start, end in reversed([*_secret_values(url)]):
        url = f"{url[:start]}<secret>{url[end:]}"
    return url


def _secret_values(url: str) -> Iterator[tuple[int, int]]:
    """Where the values of a URL's parameters that are secrets by their names begin and end."""
    last = 0
    for parameter in _PARAMETER.finditer(url):
        name = _NO_SECRET.sub("", re.sub(r"\W", "_", unquote(parameter[1])))
        is_secret = SECRET_NAME.search(name) or _MORE_NAMES.search(name)
        if parameter.start() >= last and is_secret and (value := _VALUE.match(url, parameter.end())):
            last = value.end()
            yield value.span()
