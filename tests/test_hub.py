"""`astar export --push-to-hub` against a hub made by hand; the command runs in a process of its own, as it would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml
from exports import write_export
from fake_hub import FORBIDDEN, TOKENS, FakeHub, fake_hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from astar_megatron.exports import hub as hub_module
from astar_megatron.exports.hub import HubError
from astar_megatron.exports.provenance import Training
from conversion import folders

WRITER, READER, SCOPED = TOKENS
AGREES = {"max_difference": 1e-6, "limit": 1e-3, "tokens": 129, "against": "transformers 5, float32, CPU"}
# Each line of stdin is a call: the token, and the words after `astar export`. A line of JSON answers it.
PROGRAM = """
import contextlib, io, json, os, sys
from astar_megatron import cli
for line in sys.stdin:
    token, words = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    sys.argv, out, error, status = ["astar", "export", *words], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        except BaseException as end:
            status = repr(end)
    print(json.dumps([status, out.getvalue(), error.getvalue()]), flush=True)
"""
type Export = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as served:
        yield served


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tied_llama: Path) -> Path:
    """The folder of a run that has ended, without checkpoints, as `astar compare` leaves it."""
    run_dir = tmp_path_factory.mktemp("ended")
    write_run(run_dir, tied_llama, float("inf"))
    return run_dir


def write_run(run_dir: Path, model: Path, max_shard_bytes: float) -> None:
    write_export(run_dir / "hf", load_file(model / "model.safetensors"), model, max_shard_bytes)
    training = Training(
        base="tiny",
        method="astar",
        step=12,
        settings={"data.path": "mine.jsonl"},
        licence={},
        response_tokens=7,
        flops=1e9,
        versions={"python": "3"},
        earlier=[],
    )
    fields = {name: getattr(training, name) for name in Training.__slots__}
    record = folders.read_record(run_dir / "hf") or {}
    folders.write_json(run_dir / "hf" / folders.RECORD, record | {"logprobs": AGREES, "training": fields})
    (run_dir / "hf/additional_chat_templates").mkdir()
    (run_dir / "hf/additional_chat_templates/tool_use.jinja").write_text("TOOLS {{ messages }}")
    (run_dir / "run.yaml").write_text(yaml.safe_dump(samples.run_tree(run_dir=str(run_dir))))


@pytest.fixture(scope="module")
def export(hub: FakeHub, run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    """Return a function that runs `astar export` with a token and gives status, stdout and stderr."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_DISABLE_XET": "1"}
    streams: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=online() | own, **streams) as process:
        assert process.stdin and process.stdout

        def run(token: str | None, *words: str, config: Path = run_dir / "run.yaml") -> tuple[int, str, str]:
            process.stdin.write(json.dumps([token, ["--config", str(config), *words]]) + "\n")  # pyright: ignore
            process.stdin.flush()  # pyright: ignore
            status, out, error = json.loads(process.stdout.readline())  # pyright: ignore
            assert not any(planted in out + error for planted in TOKENS), "a token is shown"
            return status, out, error

        yield run
        process.stdin.close()


def online() -> dict[str, str]:
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return {name: value for name, value in os.environ.items() if name.upper() not in (*offline, *proxies)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in folders.files(folder)}


def refusal(answer: tuple[int, str, str]) -> str:
    """What a command says that is refused: one line."""
    status, _, error = answer
    assert status == 2 and len(error.splitlines()) == 1, error
    return error


def test_the_hub_has_the_bytes_of_the_folder_and_a_second_push_is_fine(
    export: Export, hub: FakeHub, run_dir: Path
) -> None:
    for count in (1, 2):
        status, out, error = export(WRITER, "--push-to-hub", "me/new", "--private")
        assert status == 0, error
        assert f"sent to {hub.url}/me/new" in out and hub.commits == count
        arrived = dict(hub.repos["me/new"])
        del arrived[".gitattributes"]
        assert arrived == files_of(run_dir / "hf")
    assert "additional_chat_templates/tool_use.jinja" in arrived
    assert "me/new" in hub.private and b"A\\*PO" in arrived["README.md"] and len(arrived) > 4


def test_shards_of_an_earlier_export_do_not_stay_beside_new_weights(
    export: Export, hub: FakeHub, tied_llama: Path, run_dir: Path, tmp_path: Path
) -> None:
    write_run(tmp_path, tied_llama, 200_000.0)
    assert export(WRITER, "--push-to-hub", "me/shards", config=tmp_path / "run.yaml")[0] == 0
    assert sum(name.endswith(".safetensors") for name in hub.repos["me/shards"]) > 1
    hub.repos["me/shards"]["notes.txt"] = b"of its owner"
    assert export(WRITER, "--push-to-hub", "me/shards")[0] == 0
    assert set(hub.repos["me/shards"]) == {*files_of(run_dir / "hf"), ".gitattributes", "notes.txt"}


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(export: Export, hub: FakeHub, run_dir: Path) -> None:
    before = files_of(run_dir / "hf")
    for words, token, expected in [
        (("--push-to-hub", "me/x"), None, "there is no token: set HF_TOKEN to one that may write, or run `hf auth"),
        (("--push-to-hub", "me/x"), "hf_planted_unknown", "answers 401: the token is refused: make a new one at"),
        (("--push-to-hub", "me/x"), READER, "the token may only read: make one that may write"),
        (("--push-to-hub", FORBIDDEN), WRITER, "answers 403 (You don't have the rights, [31m<token>): the token may"),
        (("--push-to-hub", "full/new"), WRITER, "answers 403"),
        (("--private",), WRITER, "--private: of the hub's repository; name it, as --push-to-hub ORG/NAME"),
    ]:
        assert expected in refusal(export(token, *words))
    hub.repos["me/public"] = {}
    words = "me/public is there already and public"
    assert words in refusal(export(WRITER, "--push-to-hub", "me/public", "--private"))
    assert "me/x" not in hub.repos and {**files_of(run_dir / "hf"), "README.md": b""} == {**before, "README.md": b""}


@pytest.fixture
def no_run(tmp_path: Path) -> Path:
    """The configuration of a run that has made nothing: an export that begins fails for want of a checkpoint."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(samples.run_tree(run_dir=str(tmp_path))))
    return tmp_path / "run.yaml"


def test_a_token_that_may_not_write_there_is_refused_before_the_export(
    export: Export, hub: FakeHub, no_run: Path
) -> None:
    def words_for(token: str, repo: str) -> str:
        return refusal(export(token, "--push-to-hub", repo, config=no_run))

    for repo in ("others/new", "watched/new"):
        words = f"may not write to what is {repo[:-4]}'s: take another ORG (me, team, full), or another token"
        assert words in words_for(WRITER, repo)
    for repo in ("me/x", "Me/x", "team/x"):
        assert "there is no checkpoint" in words_for(WRITER, repo)

    read, write = ["repo.content.read"], ["repo.content.read", "repo.write"]
    for kind, name, permissions, repo, may in [
        ("user", "me", write, "me/x", True),
        ("org", "team", write, "team/x", True),
        ("model", "team/x", write, "team/x", True),
        ("user", "me", read, "me/x", False),
        ("user", "me", write, "team/x", False),
        ("model", "team/y", write, "team/x", False),
        ("dataset", "team/x", write, "team/x", False),
    ]:
        hub.scopes = [{"entity": {"_id": "1", "type": kind, "name": name}, "permissions": permissions}]
        words = "there is no checkpoint" if may else "the fine-grained token may not write there: give it write access"
        assert words in words_for(SCOPED, repo), (kind, name, permissions, repo)
    hub.scopes = []
    assert "the fine-grained token may not write there" in words_for(SCOPED, "me/x")


@pytest.mark.parametrize(
    ("account", "words"),
    [
        ({"name": "me", "auth": None}, "there is no checkpoint"),
        ({"name": "me", "orgs": None, "auth": {"type": "oauth"}}, "there is no checkpoint"),
        ({"name": "me", "auth": {"accessToken": {"role": "fineGrained"}}}, "there is no checkpoint"),
        ({"name": "me", "orgs": 7, "auth": {"accessToken": 7}}, "there is no checkpoint"),
        ({"name": "me", "orgs": ["team", None], "auth": []}, "there is no checkpoint"),
        ([], "the answer to whoami has no account: is HF_ENDPOINT that of a hub?"),
        ({"auth": {}}, "the answer to whoami has no account: is HF_ENDPOINT that of a hub?"),
    ],
)
def test_an_account_of_another_form_gives_no_traceback(
    account: Any, words: str, export: Export, hub: FakeHub, no_run: Path
) -> None:
    hub.account = account
    answer = export(WRITER, "--push-to-hub", "me/x", config=no_run)
    hub.account = None
    assert words in refusal(answer)


def test_an_export_that_is_not_sound_or_holds_others_files_is_not_sent(
    export: Export, hub: FakeHub, tied_llama: Path, tmp_path: Path
) -> None:
    write_run(tmp_path, tied_llama, float("inf"))
    record = folders.read_record(tmp_path / "hf") or {}
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    words = ("--push-to-hub", "me/unsound")
    assert "holds files that no export has: notes.txt" in refusal(export(WRITER, *words, config=tmp_path / "run.yaml"))
    (tmp_path / "hf" / "notes.txt").unlink()
    doubted = AGREES | {"reason": "log-probs differ by 9 nats"}
    folders.write_json(tmp_path / "hf" / folders.RECORD, record | {"logprobs": doubted})
    # Not sound, so it would be written anew, and there is nothing to make it of.
    assert "there is no checkpoint" in refusal(export(WRITER, *words, config=tmp_path / "run.yaml"))
    with pytest.raises(HubError, match="not to be given to others: log-probs differ by 9 nats"):
        hub_module.check(tmp_path / "hf")
    assert "me/unsound" not in hub.repos


def test_weights_that_the_record_is_not_of_are_not_sent_nor_described(
    export: Export, hub: FakeHub, tied_llama: Path, tmp_path: Path
) -> None:
    write_run(tmp_path, tied_llama, float("inf"))
    weights = {name: 0 * tensor for name, tensor in load_file(tied_llama / "model.safetensors").items()}
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    words = refusal(export(WRITER, "--push-to-hub", "me/changed", config=tmp_path / "run.yaml"))
    assert "not as recorded in conversion.json: model.embed_tokens.weight" in words and "nothing is sent" in words
    assert "me/changed" not in hub.repos and not (tmp_path / "hf" / "README.md").exists()


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/", "/x", "me/a b", "me/a--b", "me/.x", "-me/x", "me/x.git"])
def test_a_name_that_no_repository_has_is_refused(name: str) -> None:
    with pytest.raises(HubError, match=r"expected ORG/NAME"):
        hub_module.destination(name, private=False)


def test_offline_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so nothing can be sent: unset it"):
        hub_module.destination("me/x", private=False)


def test_without_an_answer_it_says_so(export: Export, hub: FakeHub) -> None:
    hub.is_down = True
    words = refusal(export(WRITER, "--push-to-hub", "me/x"))
    hub.is_down = False
    assert f"no answer from {hub.url} (RemoteProtocolError" in words and "look at the network" in words
