"""What a user can get wrong ends as one message that names it, before Ray or an engine is started."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import ray
import samples
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors

from astar_megatron import config, doctor
from astar_megatron.data.contract import contract_of
from astar_megatron.data.prompts import read_prompts
from astar_megatron.data.v_star import VStarTable
from astar_megatron.run import resources
from conversion import rewrite
from conversion.ends import open_end
from conversion.tiles import ParallelLayout

type Tree = dict[str, Any]
type Command = Callable[..., tuple[int, str]]
type Refused = Callable[..., str]


@pytest.fixture
def tree(tmp_path: Path, tied_llama: Path) -> Tree:
    model = shutil.copytree(tied_llama, tmp_path / "model")
    prompts = samples.write_jsonl(tmp_path / "prompts.jsonl", [{"question": "What is 1 + 1?", "answer": "2"}])
    return samples.run_tree(
        run_dir=str(tmp_path / "run"),
        model={"path": str(model)},
        data={"path": str(prompts), "max_prompt_tokens": 30},
        sampling={"max_response_tokens": 8},
    )


@pytest.fixture
def command(tree: Tree, tmp_path: Path, astar: Any, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs `astar NAME --config <tree> --set ...` and gives exit status and what stderr says.

    `doctor` says nothing of the machine: tests/test_doctor.py has that.
    """
    monkeypatch.setattr(doctor, "main", lambda: 0)

    def run(name: str, *settings: str) -> tuple[int, str]:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        overrides = [word for setting in settings for word in ("--set", setting)]
        status, _, error = astar(*name.split(), "--config", file, *overrides)
        assert not ray.is_initialized() and "Traceback" not in error
        return status, error

    return run


def test_the_versions_of_what_is_here_are_told(astar: Any) -> None:
    status, out, _ = astar("--version")
    assert status == 0 and out.count("\n") == 1
    for name in ("astar-megatron", "megatron-core", "ray", "torch"):
        assert f"{name} {version(name).partition('+')[0]}" in out
    assert f"python {sys.version.split()[0]}" in out


@pytest.fixture
def refused(command: Command) -> Refused:
    """Return a function that runs a command as `command` does, and gives what it says when it refuses."""

    def run(name: str, *settings: str) -> str:
        status, error = command(name, *settings)
        assert status == 2, error
        return error

    return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes the machine another one in the fields it is given."""
    measured = resources.measure()

    def become(**fields: int) -> None:
        monkeypatch.setattr(resources, "measure", lambda: dataclasses.replace(measured, **fields))

    return become


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the model's folder


def test_a_template_that_writes_the_day_is_refused_without_one_and_told_with_it(
    command: Command, refused: Refused, tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    """And so is that its end of a turn ends no response."""
    turns = (
        "{% for m in messages %}{{ m.content }}<user>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (Path(tree["model"]["path"]) / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + turns)
    for name in ("sweep", "train", "doctor"):
        error = refused(name)
        assert f"data.date: the chat template of {tree['model']['path']}" in error and "data.date=20" in error
    assert command("doctor", "data.date=2026-11-28")[0] == 0
    *_, day, turn = (record.getMessage() for record in caplog.records)  # the tokenizer has no N of November either
    assert "the chat template writes the day 2026-11-28 into each prompt" in day
    assert "ends a turn with '<user>' (3), but a response ends only at '</s>' (2)" in turn


def test_a_template_whose_prompts_begin_no_answer_is_told(
    command: Command, tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (Path(tree["model"]["path"]) / "chat_template.jinja").write_text(template)
    assert command("doctor")[0] == 0
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "takes no notice of add_generation_prompt: it writes '<assistant>' before an answer" in warning


def test_a_template_whose_prompts_lack_the_bos_of_the_tokenizer_is_told(
    command: Command, tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(tree["model"]["path"])
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert command("doctor")[0] == 0
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "write {{ bos_token }} at the beginning of the folder's chat_template.jinja" in warning


def test_tokens_that_a_class_of_transformers_makes_are_told(
    command: Command, tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(tree["model"]["path"])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({token.replace(" ", "Ġ"): i for token, i in vocabulary.items()}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert command("doctor")[0] == 0
    warnings = [record.getMessage() for record in caplog.records]
    assert any("has no tokenizer.json: its tokens are what transformers' GPT2Tokenizer makes" in w for w in warnings)


def test_an_adapter_that_engines_would_load_is_refused_and_not_said_to_be_left_out(
    refused: Refused, tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    model = Path(tree["model"]["path"])
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
    for name in ("sweep", f"eval --model {model}"):
        error = refused(name)
        assert "holds adapter_model.safetensors beside model.safetensors" in error
        assert "left out" not in caplog.text + error


# --- the machine


@pytest.mark.parametrize(("field", "word"), [("memory_bytes", "memory"), ("shared_bytes", "/dev/shm")])
def test_too_little_memory_or_shared_memory_is_refused(
    field: str, word: str, refused: Refused, machine: Callable[..., None]
) -> None:
    machine(**{field: 1000})
    for name in ("sweep", "doctor"):
        assert refused(name).startswith(f"astar: {word}")


@pytest.mark.parametrize("name", ["train --dry-run", "doctor"])
@pytest.mark.parametrize("key", ["run_dir", "sweep.table"])
def test_a_folder_that_can_not_be_made_is_refused_by_what_only_looks_at_a_run(
    name: str, key: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount that can only be read, which tests that may be root's have not."""
    (locked := tmp_path / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (path != locked or mode == os.F_OK))
    error = refused(name, f"{key}={locked}/x")
    assert f"{key}: {locked}/x: {locked} is no folder that you may write to; choose another place" in error


def test_more_ranks_than_accelerators_are_refused_with_a_layout_that_fits(
    refused: Refused, machine: Callable[..., None]
) -> None:
    machine(num_accelerators=2)
    for name in ("doctor", "train --dry-run"):
        error = refused(name, "parallel.tensor=2", "cluster.share_gpus=false")
        assert "tensor=2 makes 2 ranks" in error and "there are 2, 1 node of 2" in error and "one rank" in error


def test_a_run_fits_the_only_accelerator_or_is_refused_with_the_figures(
    command: Command, refused: Refused, machine: Callable[..., None]
) -> None:
    machine(num_accelerators=1, accelerator_bytes=80 * resources.GIB)
    assert command("doctor", "rollout.gpu_memory_utilization=0.25") == (0, "")
    machine(num_accelerators=1, accelerator_bytes=4 * resources.GIB)
    assert "memory of a shared GPU: a policy rank needs about 2." in refused("doctor")
    assert "2 engines of 1 worker take 2" in refused("doctor", "rollout.num_engines=2")


def test_a_dry_run_of_training_says_who_would_get_which_gpu_and_writes_nothing(
    tree: Tree, tmp_path: Path, astar: Any, machine: Callable[..., None]
) -> None:
    machine(num_accelerators=4, accelerator_bytes=80 * resources.GIB)
    tree |= {"rollout": {"tensor": 2}, "run_dir": str(tmp_path / "none")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    status, out, _ = astar("train", "--config", tmp_path / "run.yaml", "--dry-run")
    assert status == 0 and not (tmp_path / "none").exists() and not ray.is_initialized()
    table = out[out.index("1 policy rank and 1 engine on 3 of 4 GPUs, 1 node; none shared") :].splitlines()
    assert [line.strip() for line in table[1:]] == [
        "127.0.0.1 GPU 0: rank 0",
        "127.0.0.1 GPU 1: engine 0",
        "127.0.0.1 GPU 2: engine 0",
        "127.0.0.1: 1 GPU idle",
    ]


def test_doctor_says_of_a_run_what_training_would(command: Command, refused: Refused, tree: Tree) -> None:
    assert command("doctor") == (0, "")
    cfg = config.validate(tree)
    VStarTable.create_or_open(cfg.table_dir, dataclasses.replace(contract_of(cfg), temperature=0.5))
    assert "temperature: this run has 1.0, the table 0.5" in refused("doctor")
    shutil.rmtree(cfg.table_dir)
    assert "GiB are free" in refused("doctor", "checkpoint.keep=1000000000")


def test_doctor_shows_the_first_prompt_as_the_model_reads_it(astar: Any, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree | {"data": tree["data"] | {"suffix": "+2"}}))
    status, out, _ = astar("doctor", "--config", tmp_path / "run.yaml")
    (line,) = [line for line in out.splitlines() if line.startswith("the first prompt, ")]
    assert status == 0
    assert line == 'the first prompt, 18 tokens: "<user> W h a t   i s   1   +   1 ? + 2 <assistant>"'


def test_doctor_says_where_whoever_serves_the_export_would_read_other_tokens(
    astar: Any, tree: Tree, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    lines = []
    for kind in ("PreTrainedTokenizerFast", "GPT2Tokenizer"):
        edit_json(Path(tree["model"]["path"]) / "tokenizer_config.json", tokenizer_class=kind)
        status, out, error = astar("doctor", "--config", tmp_path / "run.yaml")
        assert status == 0, error
        lines.append([line for line in out.splitlines() if line.startswith("model.path: transformers' AutoTokenizer ")])
    assert not lines[0]
    assert "makes a GPT2Tokenizer of" in lines[1][0] and "otherwise than this run" in lines[1][0]


def test_doctor_says_that_a_login_of_the_first_prompt_is_read_and_not_shown(
    astar: Any, tree: Tree, tmp_path: Path
) -> None:
    tokenizer = Path(tree["model"]["path"]) / "tokenizer.json"
    edit_json(tokenizer, decoder={"type": "Fuse"})  # no blanks between letters
    vocabulary = tokenizer.read_text()
    for letter, other in zip("=-+", ":/@", strict=True):
        vocabulary = vocabulary.replace(f'"{letter}":', f'"{other}":')
    tokenizer.write_text(vocabulary)
    samples.write_jsonl(tmp_path / "prompts.jsonl", [{"question": "s3://me:pw@host/x", "answer": "2"}])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    status, out, error = astar("doctor", "--config", tmp_path / "run.yaml")
    (line,) = [line for line in out.splitlines() if line.startswith("the first prompt, ")]
    assert status == 0, error
    assert "what looks like a login, which the model reads and the screen does not show" in line
    assert "s3://<login>@host/x" in line and "pw" not in line


@pytest.mark.parametrize("name", ["train --dry-run", "doctor"])
def test_what_only_looks_at_a_run_leaves_a_damaged_shard_and_says_so_once(
    name: str, command: Command, tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config.validate(tree)
    table, prompts = VStarTable.create_or_open(cfg.table_dir, contract_of(cfg)), read_prompts(cfg.data, cfg.model.path)
    for sample in range(cfg.sweep.num_samples):
        table.append([samples.rollout(prompts[0], sample=sample)])
    shard = min(cfg.table_dir.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    before = sorted(cfg.table_dir.iterdir())
    assert command(name)[0] == 0
    assert caplog.text.count(f"{shard}: damaged shard, its rows count as missing") == 1
    assert sorted(cfg.table_dir.iterdir()) == before


# --- astar convert


@pytest.fixture
def convert(astar: Any) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `astar convert ...` and gives exit status, stdout and stderr."""
    return lambda *arguments: astar("convert", *arguments)


def test_a_model_goes_to_megatron_and_back(convert: Any, tied_llama: Path, tmp_path: Path) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert convert("hf-to-megatron", tied_llama, megatron, "--tp", 2, "--dry-run")[0] == 0
    assert not megatron.exists()
    for command in (
        ("hf-to-megatron", tied_llama, megatron, "--tp", 2),
        ("reshape", megatron, tmp_path / "other", "--pp", 3),
        ("megatron-to-hf", tmp_path / "other", back),
        ("verify", tied_llama, back),
        ("verify", megatron, back),
    ):
        status, out, error = convert(*command)
        assert status == 0, error
        assert ("of transformers'" in out) == (command[0] in ("hf-to-megatron", "megatron-to-hf"))
        assert ("vocabulary: 263 rows, padded to 264: the rest is left out" in out) == (command[0] == "reshape")
    for folder in (megatron, back):
        logprobs = json.loads((folder / "conversion.json").read_text())["logprobs"]
        assert 0 < logprobs["max_difference"] < 1e-4
        assert (logprobs["tokens"], logprobs["limit"]) == (129, 1e-3)
    assert "nobody has compared" in (tmp_path / "other" / "conversion.json").read_text()
    status, out, _ = convert("inspect", megatron)
    assert status == 0
    assert "LlamaForCausalLM, tied head" in out and "263, padded to 264" in out


def test_export_writes_the_newest_checkpoint_as_a_hugging_face_folder(
    astar: Any, refused: Refused, command: Command, tree: Tree, tied_llama: Path, tmp_path: Path
) -> None:
    assert "there is no checkpoint; run `astar train` first" in refused("export")
    checkpoints = Path(tree["run_dir"]) / "checkpoints"
    rewrite.write_megatron(open_end(tied_llama), checkpoints / "step_00000002", ParallelLayout())
    (checkpoints / "step_00000002" / "progress.json").write_text("{}")
    (checkpoints / "latest").write_text("step_00000002")
    export = Path(tree["run_dir"]) / "hf"
    rewrite.write_hf(open_end(checkpoints / "step_00000002"), export)
    assert "nobody has compared" in (export / "conversion.json").read_text()
    assert command("export") == (0, "")
    assert "nobody has compared" not in (export / "conversion.json").read_text()  # an older export is replaced
    assert astar("convert", "verify", tied_llama, export)[0] == 0


def test_a_folder_that_megatron_computes_otherwise_is_named(
    convert: Any, monkeypatch: pytest.MonkeyPatch, tied_llama: Path, tmp_path: Path
) -> None:
    """The right weights under another rotary base, as if the two programs read config.json differently."""
    other = tmp_path / "other"
    shutil.copytree(tied_llama, other)
    rope = json.loads((other / "config.json").read_text())["rope_parameters"]
    edit_json(other / "config.json", rope_parameters=rope | {"rope_theta": 77.0})
    run = subprocess.run

    def misled(command: list[str], **options: Any) -> Any:
        if "alone.main()" not in " ".join(command):
            return run(command, **options)
        assert command[:2] == ["env", "NVIDIA_TF32_OVERRIDE=0"]  # it computes in float32, on a GPU too
        return run([*command[:-1], str(other)], **options)

    monkeypatch.setattr(subprocess, "run", misled)
    status, _, error = convert("hf-to-megatron", tied_llama, tmp_path / "megatron")
    assert status == 2
    assert f"{tmp_path / 'megatron'} is written" in error and "nats" in error
    assert json.loads((tmp_path / "megatron" / "conversion.json").read_text())["logprobs"]["max_difference"] > 1e-3


def test_weights_that_megatron_does_not_load_are_not_called_compared(tied_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "astar_megatron.model.alone", str(tmp_path), str(tied_llama)]
    done = subprocess.run(command, input="[[1, 2]]", capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"Megatron can't load {tmp_path}: ")


def test_no_code_in_a_checkpoint_runs_when_its_log_probs_are_computed(tied_llama: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "megatron", tmp_path / "ran"
    rewrite.write_megatron(open_end(tied_llama), folder, ParallelLayout())
    torch.save({"x": samples.Trap(mark)}, folder / "common.pt")
    command = [sys.executable, "-m", "astar_megatron.model.alone", str(folder), str(tied_llama)]
    users = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run(command, input="[[1, 2]]", capture_output=True, text=True, check=False, env=users)
    assert done.returncode != 0 and "Weights only load failed" in done.stderr
    assert not mark.exists()


def test_a_dry_run_says_who_gives_how_much_to_whom(convert: Any, tied_llama: Path, tmp_path: Path) -> None:
    status, out, _ = convert("hf-to-megatron", tied_llama, tmp_path / "out", "--tp", 2, "--dry-run")
    assert status == 0
    size = sum(weight.nbytes for weight in load_file(tied_llama / "model.safetensors").values())
    shown = [line.split(": ")[1].split() for line in out.splitlines() if "-> rank" in line]
    assert [unit for _, unit in shown] == ["kB", "kB"]  # a small model's links are no 0.0 MB
    norms = 13 * 48 * 4  # which both ranks hold
    assert sum(float(number) for number, _ in shown) == pytest.approx((size + norms) / 1e3, abs=0.11)
    assert list(tmp_path.iterdir()) == []


def write_config(folder: Path, kind: str, architecture: str, **sizes: Any) -> None:
    """Write the configuration alone of a model, in bfloat16."""
    usual = {"model_type": kind, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(usual | {"architectures": [architecture]} | sizes))


def test_weights_of_another_type_than_config_json_says_are_told(convert: Any, tied_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied_llama, tmp_path / "source")
    for dtype, told in (("float32", False), ("bfloat16", True)):
        edit_json(source / "config.json", dtype=dtype)
        out = convert("hf-to-megatron", source, tmp_path / "out", "--dry-run")[1]
        assert ("float32, while config.json says bfloat16)" in out) == told


def test_a_dry_run_lists_ranks_by_their_numbers(convert: Any, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 12, "hidden_size": 4, "intermediate_size": 4, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    write_config(tmp_path, "llama", "LlamaForCausalLM", **sizes, **heads)
    out = convert("hf-to-megatron", tmp_path, tmp_path.parent / "out", "--pp", 12, "--dry-run")[1]
    shown = re.findall(r"-> rank (\d+): ([\d.]+ \w+)", out)
    assert [int(rank) for rank, _ in shown] == list(range(12))
    assert shown[1][1] == "240 bytes"


def test_a_72b_model_is_planned_from_its_configuration_alone(convert: Any, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 29568, "vocab_size": 152064}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    write_config(tmp_path, "qwen2", "Qwen2ForCausalLM", **sizes, **heads)
    command = ("hf-to-megatron", tmp_path, tmp_path.parent / "out", "--tp", 8, "--pp", 8)
    status, out, _ = convert(*command, "--dry-run")
    assert status == 0
    assert "its weights are not here" in out
    assert "72,706,203,648, 145.41 GB" in out
    assert "each of 64 ranks gets: 2.19 GB to 2.51 GB" in out
    status, _, error = convert(*command)
    assert status == 2
    assert "has neither model.safetensors nor model.safetensors.index.json" in error


def test_a_dry_run_counts_replicas_once(convert: Any, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 30, "hidden_size": 4096, "intermediate_size": 1, "vocab_size": 150_000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False}
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "norm_topk_prob": True}
    write_config(tmp_path, "qwen3_moe", "Qwen3MoeForCausalLM", **sizes, **heads, **experts)
    command = ("hf-to-megatron", tmp_path, tmp_path.parent / "out", "--tp", 2, "--pp", 2, "--ep", 8, "--dry-run")
    status, out, error = convert(*command)
    assert status == 0, error
    (size,) = re.findall(r"parameters: [\d,]+, ([\d.]+ GB)", out)
    assert f"each of 1 file gives: {size}" in out
    assert f"reads: {size} from 1 file" in out
    (disk,) = re.findall(r"disk: ([\d.]+) GB needed \(with 4 KiB a part for its archive and index\), .* free", out)
    assert float(disk) == pytest.approx(float(size.split()[0]), abs=0.1)


def test_inspect_says_whether_weights_and_configuration_are_as_recorded(
    convert: Any, tied_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "megatron"
    rewrite.write_megatron(open_end(tied_llama), folder, ParallelLayout())
    status, out, _ = convert("inspect", folder)
    assert (status, "as recorded in conversion.json" in out) == (0, True)
    assert "config.json computes as recorded" in out
    text = (folder / "config.json").read_text()
    edit_json(folder / "config.json", rms_norm_eps=0.5)
    words = "conversion.json records another computation"
    assert words in convert("inspect", folder)[1]
    for dry in ((), ("--dry-run",)):
        status, _, error = convert("megatron-to-hf", folder, tmp_path / "out", *dry)
        assert (status, words in error, "and 0.5" in error) == (2, True, True)
    (folder / "config.json").write_text(text)
    for text in ("{", "[]"):
        (folder / "conversion.json").write_text(text)
        status, out, _ = convert("inspect", folder)
        assert status == 0
        assert "conversion.json" in out and ("is no JSON" in out or "expected a JSON object" in out)
        assert "all weights are finite" in out
