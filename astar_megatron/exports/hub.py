"""Exports to the Hugging Face hub: what can be known to fail before anything is written, and the upload, one commit.

Token, endpoint and proxies are huggingface_hub's own: HF_TOKEN or `hf auth login`, HF_ENDPOINT. Nothing here shows a
token, nor what a server says without it being taken out.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever httpx it is built on
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from astar_megatron.exports.weights import weights_of
from astar_megatron.run import certificate
from conversion import folders

_OF_WEIGHTS = (".safetensors", ".safetensors.index.json")
_MOST_WORDS = 200  # characters of a server's that are shown


class HubError(ValueError):
    """The hub can't take an export, or does not; the message is one line and says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A repository of models that there is, or that will be made, as the owner of a token."""

    repo: str  # ORG/NAME
    private: bool
    api: HfApi


def destination(repo: str, *, private: bool) -> Destination:
    """Return where to push, once the hub knows the token. Raises HubError."""
    try:
        validate_repo_id(repo)
        is_named = repo.count("/") == 1
    except HFValidationError:
        is_named = False
    if not is_named:
        raise HubError(f"--push-to-hub {repo}: expected ORG/NAME, of letters, digits, '-', '_' and '.'")
    if constants.is_offline_mode():
        raise HubError("--push-to-hub: HF_HUB_OFFLINE is set, so nothing can be sent: unset it, or leave the flag out")
    token = get_token()
    if token is None:
        raise HubError("--push-to-hub: there is no token: set HF_TOKEN to one that may write, or run `hf auth login`")
    api = HfApi(token=token, library_name="astar-megatron")
    with _in_words(repo, api):
        _check_account(repo, api)
        try:
            info = api.repo_info(repo)
        except RepositoryNotFoundError:
            info = None
        if info is not None and private and not info.private:
            raise HubError(f"--private: {repo} is there already and public: choose another name, or make it private")
    return Destination(repo=repo, private=private, api=api)


def check(folder: Path) -> None:
    """Raise HubError for an export that can't be trusted, was changed by hand or holds somebody's own files."""
    record = folders.read_record(folder)
    if record is None:
        raise HubError(f"{folder}: no {folders.RECORD}, so it is no export: nothing is sent")
    if reason := certificate.doubt(record):
        raise HubError(f"{folder}: not to be given to others: {reason}: nothing is sent; export it again")
    if others := [name for name in folders.strangers(folder) if name != folders.CARD]:
        raise HubError(f"{folder} holds files that no export has: {', '.join(others)}: nothing is sent; move them away")
    if reason := weights_of(folder)[1]:
        raise HubError(
            f"{folder}: {reason}: nothing is sent; put what you changed elsewhere and export again, or send it yourself"
        )


def push(folder: Path, to: Destination) -> str:
    """Send all of a checked export to the hub in one commit, so that nobody gets half of it; return its address.

    Weights of an earlier export under other names are removed in it. Raises HubError.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    files = folders.files(folder)
    with _in_words(to.repo, to.api):
        to.api.create_repo(to.repo, private=to.private or None, exist_ok=True)
        there = [name for name in to.api.list_repo_files(to.repo) if name.endswith(_OF_WEIGHTS) and "/" not in name]
        old = sorted(set(there).difference(files))
        operations = [*(CommitOperationAdd(name, folder / name) for name in files), *map(CommitOperationDelete, old)]
        to.api.create_commit(to.repo, operations, commit_message="Export of astar-megatron")
    return f"{to.api.endpoint}/{to.repo}"


def _check_account(repo: str, api: HfApi) -> None:
    """Raise HubError where the hub's whoami tells that the token can't write to `repo`.

    A fine-grained token has `scoped`: of users, organisations and repositories what it may do there. Any other may
    write to the repositories of its account and of its account's organisations.
    """
    account, owner = api.whoami(), repo.partition("/")[0]
    access = _part(account, "auth", "accessToken")
    if access.get("role") == "read":
        raise HubError("--push-to-hub: the token may only read: make one that may write, and set HF_TOKEN to it")
    scopes = _part(access, "fineGrained").get("scoped")
    if access.get("role") == "fineGrained" and isinstance(scopes, list):
        if not any(_may_write(scope, repo) for scope in scopes):
            raise HubError(
                f"--push-to-hub {repo}: the fine-grained token may not write there: give it write access to the "
                f"repositories of {owner}, or set HF_TOKEN to another"
            )
        return
    writable = [_part(org) for org in _list(account, "orgs") if _part(org).get("roleInOrg") != "read"]
    owners = [str(each["name"]) for each in (_part(account), *writable) if each.get("name")]
    if not owners:
        raise HubError(f"--push-to-hub {repo}: the answer to whoami has no account: is HF_ENDPOINT that of a hub?")
    if owner.casefold() not in map(str.casefold, owners):
        raise HubError(
            f"--push-to-hub {repo}: the token's account may not write to what is {owner}'s: take another ORG"
            f"{_shown(', '.join(owners), api)}, or another token"
        )


def _may_write(scope: object, repo: str) -> bool:
    """Whether an entry of `scoped` is of the repository or its owner; a model's name may lack the owner."""
    owner, _, name = repo.casefold().partition("/")
    entity = _part(scope, "entity")
    places = {"user": {owner}, "org": {owner}, "model": {repo.casefold(), name}}.get(str(entity.get("type")), set())
    return str(entity.get("name")).casefold() in places and "repo.write" in _list(scope, "permissions")


def _part(tree: object, *path: str) -> Mapping[str, Any]:
    """What lies there in an answer of the hub; empty where there is none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def _list(tree: object, name: str) -> Sequence[object]:
    """What lies there as a list; empty where there is none."""
    items = _part(tree).get(name)
    return items if isinstance(items, list) else []


@contextmanager
def _in_words(repo: str, api: HfApi) -> Iterator[None]:
    """Raise what goes wrong between here and the hub as a HubError of one line."""
    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"--push-to-hub {repo}: {_words(error, api)}") from None


def _words(error: BaseException, api: HfApi) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):  # threads of uploads wrap it
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, HfHubHTTPError):
        status, said_by_hub = cause.response.status_code, cause.server_message
        remedy = {
            401: f"the token is refused: make a new one at {api.endpoint}/settings/tokens, then set HF_TOKEN to it",
            403: "the token may not write there: take one with the right to write, or another ORG/NAME",
        }
        words = remedy.get(status, "try again later" if status >= 429 else "choose another ORG/NAME")
        return f"{api.endpoint} answers {status}{_shown(said_by_hub, api)}: {words}"
    if cause is not None or isinstance(error, OSError):
        reason = _shown(f"{type(cause or error).__name__}: {cause or error}", api)
        return f"no answer from {api.endpoint}{reason}: look at the network, proxies and HF_ENDPOINT, and try again"
    return f"nothing was sent{_shown(f'{type(error).__name__}: {error}', api)}: mend that, and try again"


def _shown(text: str | None, api: HfApi) -> str:
    """What a server says, in brackets: a line of what can be printed, and never the token."""
    words = " ".join("".join(character if character.isprintable() else " " for character in text or "").split())
    words = words.replace(str(api.token), "<token>") if api.token else words
    return f" ({words[:_MOST_WORDS]})" if words else ""
