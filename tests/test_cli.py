"""What a user can get wrong ends as one message that names it, before Ray or an engine is started."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import samples
import yaml
from safetensors.torch import load_file

from astar_megatron import cli, config, doctor
from astar_megatron.data.chat import tokenizer
from astar_megatron.data.contract import contract_of
from astar_megatron.data.prompts import PromptStream, read_prompts
from astar_megatron.data.v_star import VStarTable
from astar_megatron.run import resources
from astar_megatron.run.prepare import prepare
from astar_megatron.run.training import stage_1


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs `astar NAME --config <tree> ...` and gives exit status and what stderr says."""

    def run(name: str, tree: dict[str, Any], *more: str) -> tuple[int, str]:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        monkeypatch.setattr(sys, "argv", ["astar", *name.split(), "--config", str(file), *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not ray.is_initialized()
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def tree(tmp_path: Path, tied_llama: Path) -> dict[str, Any]:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n")
    model = tmp_path / "model"
    shutil.copytree(tied_llama, model)
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "data": {"path": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 30},
        "reward": {"name": "last_number"},
        "sampling": {"max_response_tokens": 8},
    }


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_model_folder_is_named(command: Any, tree: dict[str, Any]) -> None:
    status, error = command("sweep", tree, "--set", "model.path=/no/such/folder")
    assert status == 2
    assert "model.path: /no/such/folder" in error and "Traceback" not in error


def test_truncated_weights_are_named_before_anything_starts(command: Any, tree: dict[str, Any]) -> None:
    weights = Path(tree["model"]["path"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    status, error = command("sweep", tree)
    assert status == 2
    assert str(weights) in error and "truncated" in error


def fill_table(tree: dict[str, Any]) -> None:
    """Write the whole V* table of a run, as if `astar sweep` had."""
    cfg = config.validate(tree)
    prompts = read_prompts(cfg.data, cfg.model.path)
    table = VStarTable.create_or_open(cfg.table_dir, contract_of(cfg))
    rollout = samples.rollout(prompts[0])
    table.append([dataclasses.replace(rollout, sample=sample) for sample in range(cfg.sweep.num_samples)])


def write_checkpoint(tree: dict[str, Any], step: int, **contract: Any) -> None:
    """Write what the driver reads of a checkpoint."""
    folder = Path(tree["run_dir"]) / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    cfg = config.validate(tree)
    fields = contract_of(cfg).fields() | contract
    order = PromptStream(read_prompts(cfg.data, cfg.model.path), cfg.train.batch_size, cfg.seed)
    (folder / "progress.json").write_text(json.dumps({"step": step, "prompts": order.state(), "contract": fields}))
    (folder.parent / "latest").write_text(folder.name)


def test_damaged_metrics_are_named_with_their_line(command: Any, tree: dict[str, Any]) -> None:
    fill_table(tree)
    (Path(tree["run_dir"]) / "metrics.jsonl").write_text('{"step": 0}\n5\n{"step": 1}\n')
    status, error = command("train", tree)
    assert status == 2
    assert "metrics.jsonl, line 2" in error


def test_fewer_steps_than_are_done_are_refused(command: Any, tree: dict[str, Any]) -> None:
    fill_table(tree)
    write_checkpoint(tree, 7)
    status, error = command("train", tree, "--set", "train.num_steps=6")
    assert status == 2
    assert "train.num_steps: 6" in error and "after 7 steps" in error


def test_a_comparison_with_an_unknown_method_is_refused_in_a_line(command: Any, tree: dict[str, Any]) -> None:
    status, error = command("compare", tree, "--methods", "astar,dpo", "--budget", "tokens=9")
    assert status == 2
    assert error.startswith("astar: --methods: no method dpo; there are astar, ") and len(error.splitlines()) == 1


@pytest.mark.parametrize("text", ['{"st', "{}", "[]"])
def test_a_damaged_checkpoint_is_named(command: Any, tree: dict[str, Any], text: str) -> None:
    fill_table(tree)
    write_checkpoint(tree, 7)
    file = Path(tree["run_dir"]) / "checkpoints" / "step_00000007" / "progress.json"
    file.write_text(text)
    status, error = command("train", tree)
    assert status == 2
    assert str(file) in error and "another step_* folder" in error


def test_another_seed_than_the_checkpoints_is_refused(command: Any, tree: dict[str, Any]) -> None:
    fill_table(tree)
    write_checkpoint(tree, 7)
    status, error = command("train", tree, "--set", "seed=1")
    assert status == 2
    assert "seed 0, this run 1" in error


def test_a_checkpoint_of_other_settings_is_refused(command: Any, tree: dict[str, Any]) -> None:
    fill_table(tree)
    write_checkpoint(tree, 7, temperature=0.5)
    status, error = command("train", tree)
    assert status == 2
    assert "temperature: this run has 1.0, the checkpoint 0.5" in error


def test_an_export_never_replaces_a_model_that_is_no_export(command: Any, tree: dict[str, Any]) -> None:
    fill_table(tree)
    write_checkpoint(tree, 7)
    shutil.copytree(tree["model"]["path"], Path(tree["run_dir"]) / "hf")
    status, error = command("train", tree)
    assert status == 2
    assert "conversion.json" in error


def test_an_unknown_architecture_is_refused_with_the_known_ones(command: Any, tree: dict[str, Any]) -> None:
    edit_json(Path(tree["model"]["path"]) / "config.json", architectures=["MambaForCausalLM"], model_type="mamba")
    status, error = command("train", tree)
    assert status == 2
    assert "MambaForCausalLM" in error and "LlamaForCausalLM" in error and "Qwen2ForCausalLM" in error


def test_a_tokenizer_without_chat_template_is_refused(command: Any, tree: dict[str, Any]) -> None:
    model = Path(tree["model"]["path"])
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    status, error = command("sweep", tree)
    assert status == 2
    assert "chat template" in error


def test_a_tokenizer_without_eos_is_refused(command: Any, tree: dict[str, Any]) -> None:
    edit_json(Path(tree["model"]["path"]) / "tokenizer_config.json", eos_token=None)
    status, error = command("sweep", tree)
    assert status == 2
    assert "EOS" in error


CLOCK = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}<assistant>"


def test_prompts_are_the_same_on_every_day_of_a_table_s_life(
    command: Any, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "main", lambda: 0)
    (Path(tree["model"]["path"]) / "chat_template.jinja").write_text(CLOCK)
    for name in ("sweep", "train", "doctor"):
        status, error = command(name, tree)
        assert status == 2
        assert f"data.date: the chat template of {tree['model']['path']}" in error and "data.date=20" in error
    cfg = config.validate(tree | {"data": tree["data"] | {"date": "2026-11-28"}})
    try:
        for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):  # never on the same day
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            if not cfg.table_dir.exists():
                fill_table(cfg.model_dump())
            estimates = stage_1(cfg, prepare(cfg))
            assert estimates is not None and estimates.samples.tolist() == [8]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "the chat template writes the day 2026-11-28 into each prompt" in caplog.text


def test_another_day_than_the_table_s_is_refused(command: Any, tree: dict[str, Any]) -> None:
    (Path(tree["model"]["path"]) / "chat_template.jinja").write_text(CLOCK)
    tree["data"]["date"] = "2026-11-28"
    fill_table(tree)
    status, error = command("sweep", tree, "--set", "data.date=2026-11-29")
    assert status == 2 and "date: this run has 2026-11-29, the table 2026-11-28" in error


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(command: Any, tree: dict[str, Any]) -> None:
    tok = tokenizer(tree["model"]["path"])
    tok.add_tokens([f"more{i}" for i in range(300)])  # the model has 263 rows
    tok.save_pretrained(tree["model"]["path"])
    tokenizer.cache_clear()
    beyond = tok.convert_tokens_to_ids("more299")
    for key, other in (("path", "eval_path"), ("eval_path", "path")):
        good, bad = (Path(tree["run_dir"]).with_name(f"{name}.jsonl") for name in ("good", "bad"))
        good.write_text(json.dumps({"question": "1 + 1", "answer": "2"}) + "\n")
        bad.write_text(good.read_text() + json.dumps({"question": "more299", "answer": "2"}) + "\n")
        status, error = command("sweep", tree, "--set", f"data.{key}={bad}", "--set", f"data.{other}={good}")
        assert status == 2
        assert f"{bad}: 1 of 2 prompts" in error and f"line 2, has token 'more299' ({beyond})" in error
        assert "vocab_size is 263" in error
    (Path(tree["model"]["path"]) / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, beyond]}))
    status, error = command("sweep", tree)
    assert status == 2 and f"a response is to end at token 'more299' ({beyond})" in error


def test_an_adapter_that_engines_would_load_is_refused_and_not_said_to_be_left_out(
    command: Any, tree: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = Path(tree["model"]["path"])
    shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
    for arguments in (["sweep", tree], ["eval", tree, "--model", str(model)]):
        status, error = command(*arguments)
        assert status == 2 and "holds adapter_model.safetensors beside model.safetensors" in error
        assert "left out" not in caplog.text + error


def test_a_template_whose_end_of_a_turn_ends_no_response_is_told(
    command: Any, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "main", lambda: 0)
    turn = (
        "{% for m in messages %}{{ m.content }}<user>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (Path(tree["model"]["path"]) / "chat_template.jinja").write_text(turn)
    assert command("doctor", tree)[0] == 0
    (said,) = [record.getMessage() for record in caplog.records]
    assert "ends a turn with '<user>' (3), but a response ends only at '</s>' (2)" in said


def test_prompts_over_the_limit_are_refused_with_their_number(command: Any, tree: dict[str, Any]) -> None:
    status, error = command("sweep", tree, "--set", "data.max_prompt_tokens=5")
    assert status == 2
    assert "data.max_prompt_tokens" in error and "1 of 1 prompts" in error


def test_a_run_longer_than_the_model_is_refused(command: Any, tree: dict[str, Any]) -> None:
    status, error = command("sweep", tree, "--set", "sampling.max_response_tokens=1000")
    assert status == 2
    assert "1030" in error and "160" in error


def test_a_reward_that_returns_nan_is_named_with_its_prompt(
    command: Any, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text("def reward(response, answer):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    status, error = command("sweep", tree, "--set", "reward.name=broken_reward:reward")
    assert status == 2
    assert "broken_reward" in error and "nan" in error and "What is 1 + 1?" in error


def test_a_reward_module_that_can_t_be_imported_is_named(
    command: Any, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unfinished_reward.py").write_text("def reward(:\n")
    (tmp_path / "undefined_reward.py").write_text("reward = nothing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, why in (("unfinished_reward", "SyntaxError"), ("undefined_reward", "NameError")):
        status, error = command("sweep", tree, "--set", f"reward.name={name}:reward")
        assert status == 2
        assert name in error and why in error


def test_benchmarks_need_their_folder_and_their_files(command: Any, tree: dict[str, Any], tmp_path: Path) -> None:
    status, error = command("eval", tree, "--benchmarks", "amc23,aime24")
    assert status == 2
    assert "eval.folder: needed for eval.benchmarks amc23, aime24" in error
    model = tree["model"]["path"]
    status, error = command("eval", tree, "--benchmarks", "amc23", "--data", str(tmp_path), "--model", model)
    assert status == 2
    assert f"amc23 is read from amc23.jsonl, which is not in {tmp_path}" in error


def test_too_little_memory_or_shared_memory_is_refused(
    command: Any, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = resources.measure()
    for field, word in (("memory_bytes", "memory"), ("shared_bytes", "/dev/shm")):
        small = dataclasses.replace(machine, **{field: 1000})
        monkeypatch.setattr(resources, "measure", lambda small=small: small)
        status, error = command("sweep", tree)
        assert status == 2
        assert error.startswith(f"astar: {word}")


def test_a_layout_that_does_not_divide_is_refused(command: Any, tree: dict[str, Any]) -> None:
    for key, number in (("parallel.pipeline", 4), ("parallel.tensor", 5), ("rollout.tensor", 5)):
        status, error = command("train", tree, "--set", f"{key}={number}")
        assert status == 2, key
        assert str(number) in error and ("divide" in error or "choose tensor <= 2" in error), error


def test_more_ranks_than_accelerators_are_refused_with_a_layout_that_fits(
    command: Any, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "main", lambda: 0)
    small = dataclasses.replace(resources.measure(), num_accelerators=2)
    monkeypatch.setattr(resources, "measure", lambda: small)
    status, error = command("doctor", tree, "--set", "parallel.tensor=2")
    assert status == 2
    assert "tensor=2 makes 2 ranks" in error and "room for 1" in error and "one rank" in error


def test_a_run_fits_the_only_accelerator_or_is_refused_with_the_figures(
    command: Any, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "main", lambda: 0)
    one = dataclasses.replace(resources.measure(), num_accelerators=1, accelerator_bytes=80 * resources.GIB)
    monkeypatch.setattr(resources, "measure", lambda: one)
    status, out = command("doctor", tree, "--set", "rollout.gpu_memory_utilization=0.25")
    assert status == 0, out
    small = dataclasses.replace(one, accelerator_bytes=4 * resources.GIB)
    monkeypatch.setattr(resources, "measure", lambda: small)
    status, error = command("doctor", tree)
    assert status == 2 and "memory of the one GPU: the policy needs about 2." in error
    status, error = command("doctor", tree, "--set", "rollout.num_engines=2")
    assert status == 2 and "of 1 accelerators the engines take 2" in error


def test_training_without_a_table_says_to_sweep_first(command: Any, tree: dict[str, Any]) -> None:
    status, error = command("train", tree)
    assert status == 2
    assert "astar sweep" in error


def test_evaluation_without_a_model_says_so(command: Any, tree: dict[str, Any]) -> None:
    status, error = command("eval", tree)
    assert status == 2
    assert "astar train" in error


def test_empty_names_are_refused(command: Any, tree: dict[str, Any]) -> None:
    for key in ("run_dir", "model.path", "data.path", "data.eval_path", "sweep.table", "cluster.address"):
        status, error = command("sweep", tree, "--set", f'{key}=""')
        assert status == 2
        assert key in error


def test_another_tokenizer_than_the_runs_is_refused_by_eval(
    command: Any, tree: dict[str, Any], tmp_path: Path, untied_qwen2: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(untied_qwen2, other)
    edit_json(other / "tokenizer_config.json", chat_template="{{ messages }}")
    status, error = command(f"eval --model {other}", tree)
    assert status == 2
    assert str(other) in error and "tokenizer" in error


def test_doctor_says_whether_a_run_fits(command: Any, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "main", lambda: 0)
    assert command("doctor", tree) == (0, "")
    small = dataclasses.replace(resources.measure(), memory_bytes=1000)
    monkeypatch.setattr(resources, "measure", lambda: small)
    status, error = command("doctor", tree)
    assert status == 2
    assert error.startswith("astar: memory")


def test_doctor_says_of_a_run_what_training_would(
    command: Any, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "main", lambda: 0)
    cfg = config.validate(tree)
    VStarTable.create_or_open(cfg.table_dir, dataclasses.replace(contract_of(cfg), temperature=0.5))
    status, error = command("doctor", tree)
    assert status == 2 and "temperature: this run has 1.0, the table 0.5" in error
    shutil.rmtree(cfg.table_dir)
    status, error = command("doctor", tree, "--set", "checkpoint.keep=1000000000")
    assert status == 2 and "GiB are free" in error


def test_an_unknown_key_is_refused_with_the_nearest(command: Any, tree: dict[str, Any]) -> None:
    status, error = command("sweep", tree, "--set", "optim.learning_rate=1")
    assert status == 2
    assert "optim.learning_rate: no such key; the nearest is optim.lr; optim has lr, min_lr, schedule" in error


def test_a_cluster_that_does_not_answer_is_named(command: Any, tree: dict[str, Any]) -> None:
    status, error = command("sweep", tree, "--set", "cluster.address=127.0.0.1:1")
    assert status == 1
    assert "cluster.address" in error and "127.0.0.1:1" in error


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs `astar convert ...` and gives exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["astar", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, error = capsys.readouterr()
        return int(stop.value.code or 0), out, error

    return run


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
    for folder in (megatron, back):
        found = json.loads((folder / "conversion.json").read_text())["logprobs"]
        assert 0 < found["max_difference"] < 1e-4
        assert (found["tokens"], found["limit"]) == (129, 1e-3)
    assert "nobody has compared" in (tmp_path / "other" / "conversion.json").read_text()
    status, out, _ = convert("inspect", megatron)
    assert status == 0
    assert "LlamaForCausalLM, tied head" in out and "263, padded to 264" in out


def test_a_folder_that_megatron_computes_otherwise_is_named(
    convert: Any, monkeypatch: pytest.MonkeyPatch, tied_llama: Path, tmp_path: Path
) -> None:
    """The right weights under another rotary base, as if the two programs read config.json differently."""
    other = tmp_path / "other"
    shutil.copytree(tied_llama, other)
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (other / "config.json").write_text(json.dumps(config))
    run = subprocess.run

    def misled(command: list[str], **options: Any) -> Any:
        if "astar_megatron.model.alone" not in command:
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


def test_a_dry_run_says_who_gives_how_much_to_whom(convert: Any, tied_llama: Path, tmp_path: Path) -> None:
    status, out, _ = convert("hf-to-megatron", tied_llama, tmp_path / "out", "--tp", 2, "--dry-run")
    assert status == 0
    size = sum(weight.nbytes for weight in load_file(tied_llama / "model.safetensors").values())
    shown = [line.split(": ")[1].split() for line in out.splitlines() if "-> rank" in line]
    assert [unit for _, unit in shown] == ["kB", "kB"]  # a small model's links are no 0.0 MB
    norms = 13 * 48 * 4  # which both ranks hold
    assert sum(float(number) for number, _ in shown) == pytest.approx((size + norms) / 1e3, abs=0.11)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_ranks_by_their_numbers(convert: Any, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 12, "hidden_size": 4, "intermediate_size": 4, "vocab_size": 8, "rms_norm_eps": 1e-6}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(sizes | heads | {"architectures": ["LlamaForCausalLM"]}))
    out = convert("hf-to-megatron", tmp_path, tmp_path.parent / "out", "--pp", 12, "--dry-run")[1]
    shown = re.findall(r"-> rank (\d+): ([\d.]+ \w+)", out)
    assert [int(rank) for rank, _ in shown] == list(range(12))
    assert shown[1][1] == "240 bytes"


def test_a_72b_model_is_planned_from_its_configuration_alone(convert: Any, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 29568, "vocab_size": 152064}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768}
    kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(sizes | heads | kind))
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
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6}
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "norm_topk_prob": True}
    kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16"}
    more = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(sizes | heads | experts | kind | more))
    command = ("hf-to-megatron", tmp_path, tmp_path.parent / "out", "--tp", 2, "--pp", 2, "--ep", 8, "--dry-run")
    status, out, error = convert(*command)
    assert status == 0, error
    size = re.search(r"parameters: [\d,]+, ([\d.]+ GB)", out)
    assert size is not None
    assert f"each of 1 file gives: {size[1]}" in out
    assert f"reads: {size[1]} from 1 file" in out
    disk = re.search(
        r"disk: ([\d.]+) GB needed \(with 4 KiB a part for its archive and index\), [\d.]+ [GM]B free", out
    )
    assert disk is not None
    assert float(disk[1]) == pytest.approx(float(size[1].split()[0]), abs=0.1)


def test_a_dry_run_refuses_what_the_conversion_would(convert: Any, tied_llama: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(tied_llama, gone)
    (gone / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    (gone / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    (tmp_path / "file").write_text("")
    for source, place, word in (
        (gone, tmp_path / "out", f"names {shard}, which is missing"),
        (tied_llama, tmp_path / "file" / "below", "can't write"),
        (tied_llama, Path("/sys/out"), "can't write /sys/out"),
    ):
        for dry in ((), ("--dry-run",)):
            status, _, error = convert("hf-to-megatron", source, place, *dry)
            assert status == 2
            assert word in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gone"]


def test_inspect_says_whether_weights_and_configuration_are_as_recorded(
    convert: Any, tied_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "megatron"
    convert("hf-to-megatron", tied_llama, folder)
    status, out, _ = convert("inspect", folder)
    assert (status, "as recorded in conversion.json" in out) == (0, True)
    assert "config.json computes as recorded" in out
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 0.5}))
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


def test_conversions_that_can_t_be_are_refused(convert: Any, tied_llama: Path, tmp_path: Path) -> None:
    somebodys, loop = tmp_path / "somebodys", tmp_path / "loop"
    shutil.copytree(tied_llama, somebodys)
    loop.symlink_to(loop)
    for command, word in (
        (("hf-to-megatron", tied_llama, loop), str(loop)),
        (("hf-to-megatron", tied_llama, loop, "--dry-run"), str(loop)),
        (("hf-to-megatron", tied_llama, somebodys), "conversion.json"),
        (("hf-to-megatron", tied_llama, tmp_path / "out", "--pp", 4), "divide"),
        (("hf-to-megatron", tied_llama, tmp_path / "out", "--ep", 2), "no experts"),
        (("megatron-to-hf", tmp_path / "nothing", tmp_path / "out"), "nothing"),
        (("inspect", tmp_path), "neither a Hugging Face folder"),
    ):
        status, _, error = convert(*command)
        assert status == 2
        assert word in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "somebodys"]


TWICE = """
import os, signal, sys, time
from astar_megatron import cli
signal.signal(signal.SIGTERM, cli._stop)
try:
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGTERM)
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize(("seconds", "status", "said"), [(0.0, 143, "cleaned up\n"), (1.2, -15, "")])
def test_the_same_sigterm_again_lets_a_program_clean_up_and_a_later_one_ends_it(
    seconds: float, status: int, said: str
) -> None:
    done = subprocess.run([sys.executable, "-c", TWICE, str(seconds)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, said)
