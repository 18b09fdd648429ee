"""No message of the command line repeats a login, whatever it is given as: path, address, key or part of a file."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml

from astar_megatron.config_secrets import has_login, without_logins
from astar_megatron.run import bundle

SECRET = "S3cretPw"
URLS = [
    f"postgresql://me:p/{SECRET}@host/db",
    f"s3://me:{SECRET}@host/x",
    f"s3://{SECRET}@host/x",
    f"https://me:with blanks {SECRET}@host/x",
    f"mysql://host/db?user=me&password={SECRET}",
    f"https://host/x?page=2#x-api-key={SECRET}",
]
WITHOUT_SCHEME = f"me:{SECRET}@host:6379"
WITH_CONFIG = ("eval", "export", "train")
COMMANDS = [
    "convert inspect URL",
    "convert verify URL URL",
    "convert hf-to-megatron URL out",
    "eval --model URL",
    "eval --model=URL",
    "show URL",
    "show run URL",
    "data jsonl URL --out x",
    "data hf URL --out x",
    "scale fit URL",
    "scale fit curve=URL",
    "scale run URL",
    "doctor --cluster URL",
    "export --push-to-hub URL",
    "train --config URL",
    "train --set tracking.mlflow=URL",
    "train --set tracking.mlflow=[URL]",
    "train --set tracking.mlflow=[URL",
    "train --set 'tracking.mlflow={a: URL}'",
    "train --set cluster.address=URL",
    "train --set slurm.env=[URL]",
    "train --set URL",
    "show --URL",
    "URL",
]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(samples.run_tree(run_dir=str(tmp_path / "run"))))
    return file


@pytest.mark.parametrize("command", COMMANDS)
def test_a_login_on_the_command_line_is_refused_and_not_repeated(command: str, run_file: Path, astar: Any) -> None:
    for url in (*URLS, WITHOUT_SCHEME):
        words = [word.replace("URL", url) for word in shlex.split(command)]
        config = ["--config", run_file] if words[0] in WITH_CONFIG and "--config" not in words else []
        status, out, error = astar(*words, *config)
        assert status == 2 and error
        assert SECRET not in out + error, words
        assert url == WITHOUT_SCHEME or "a URL with a login" in error, words


@pytest.mark.parametrize(
    "text",
    [
        "tracking: {mlflow: [URL]}",
        "tracking: {mlflow: {a: 'URL'}}",
        "tracking: {mlflow: 'URL', mlflow: 'URL'}",
        "tracking: {mlflow: 'URL'",
        "tracking: 'URL'",
        "- 'URL'",
        "base: 'URL'",
        "model: {path: [{x: '" + 150 * "x" + "URL'}]}",
        "cluster: {address: ['URL']}",
        "slurm: {flags: ['URL']}",
    ],
)
def test_a_login_in_a_file_is_not_repeated(text: str, tmp_path: Path, astar: Any) -> None:
    for url in (*URLS, WITHOUT_SCHEME):
        (tmp_path / "run.yaml").write_text(text.replace("URL", url))
        for command in ("train --config", "scale run"):
            status, out, error = astar(*command.split(), tmp_path / "run.yaml")
            assert status == 2 and error and SECRET not in out + error


@pytest.mark.parametrize("grid", [{"tracking.mlflow": ["URL"]}, {"cluster": [{"address": "URL"}]}, {"a.URL": [1]}])
def test_a_login_in_a_study_is_refused_before_a_cell_is_named_by_it(
    grid: dict[str, Any], run_file: Path, tmp_path: Path, astar: Any
) -> None:
    study = {"config": str(run_file), "grid": [grid], "budgets": ["tokens=9"], "out": str(tmp_path / "out")}
    for url in (*URLS, WITHOUT_SCHEME):
        (tmp_path / "study.yaml").write_text(json.dumps(study).replace("URL", url))
        status, out, error = astar("scale", "run", tmp_path / "study.yaml")
        assert status == 2 and "a URL with a login" in error and SECRET not in out + error


@pytest.mark.parametrize(
    "name",
    [
        *("api-key", "x-api-key", "subscription-key", "key", "private_key", "sharedaccesskey", "pass%77ord", "cookie"),
        *("pw", "pat", "pwd", "sig", "X-Amz-Signature", "authorization", "connection_string", "user[password]"),
        *(
            "sslpassword",
            "authorisation",
            "primary_access_key",
            "account_primary_key",
            "admin_tokens",
            "monkey_token",
            "max_tokens_key",
        ),
    ],
)
def test_a_parameter_under_a_secret_s_name_is_a_login(name: str) -> None:
    for mark in ("?", "#", "?a=b&", "?a=b#", "?a=b;"):
        url = f"https://host/x{mark}{name}="
        assert has_login(f"{url}{SECRET}") and without_logins(f"{url}{SECRET}#{SECRET} x") == f"{url}<secret> x"


@pytest.mark.parametrize(
    "text", ["docker://nvcr.io:5000#nvidia/pytorch@sha256:ab", "docker://nvcr.io#nvidia/pytorch@sha256:ab"]
)
def test_a_digest_is_no_login(text: str) -> None:
    assert not has_login(text) and without_logins(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "https://x.org/?page=5. and ?sort_key=a",
        "https://x.org/?author=a&tokenizer=b&max_tokens=9&passages=3&keywords=c#top",
        "https://x.org/?keyboard=1&max_new_tokens=2&num_tokens=3&monkey=d&authority=e&compass=n",
        "mysql+pymysql://db/mlflow?ssl_ca=/keys/ca.pem&ssl_key=/keys/client-key.pem",
        "postgresql://db/mlflow?sslkey=/keys/key.pem&passfile=/keys/.pgpass",
        "hdfs://nn:8020/user/me@REALM/data",
        "s3://bucket/user@x",
        'Is it right?\nkey="yes" Think;answer_key=A',
        "git@github.com:me/x.git",
        "http://localhost:8080 is up, and https://x.org: ask me@y.org",
        "hf:set@v1.0, data/hf:set@1.0.12/train.jsonl: no such file. Is it in hf:set@v1.0.",
    ],
)
def test_what_only_looks_like_a_login_is_none(text: str) -> None:
    assert not has_login(text) and without_logins(text) == text
    assert bundle.values_without_secrets({"suffix": [text]}) == {"suffix": [text]}


@pytest.mark.parametrize(
    "host",
    [
        *("ml.example.org", "host:/jobs", "host:6379", "10.0.0.12", "10.0.0.12/x", "v1.0.example.org", "127.1:6379"),
        *("v1.0-a.example.org", "1.0:6379/x"),
    ],
)
def test_a_login_without_a_scheme_is_not_repeated(host: str) -> None:
    assert without_logins(f"got 'me:{SECRET}@{host}'") == f"got '<login>@{host}'"
