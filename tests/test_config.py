"""The configuration: its frozen set of keys, and that what can't run is refused, by name, before anything starts."""

from pathlib import Path

import pytest

from astar_megatron import config
from astar_megatron.config import ConfigError, RunConfig

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
REQUIRED = "required"

# Every key with its default. A change here is a change of what people's YAML files mean: it belongs in CHANGELOG.md.
KEYS = {
    "run_dir": REQUIRED,
    "seed": 0,
    "model.path": REQUIRED,
    "model.dtype": "auto",
    "model.fp8": None,
    "model.reference": "resident",
    "data.path": REQUIRED,
    "data.prompt_field": "question",
    "data.answer_field": "answer",
    "data.suffix": "",
    "data.max_prompt_tokens": 256,
    "data.long_prompts": "refuse",
    "data.eval_path": None,
    "data.date": None,
    "reward.name": REQUIRED,
    "reward.timeout_seconds": 10.0,
    "reward.max_failures": 100,
    "sampling.temperature": 1.0,
    "sampling.top_p": 1.0,
    "sampling.max_response_tokens": 1024,
    "sweep.table": None,
    "sweep.num_samples": 8,
    "sweep.extra_tokens": 0,
    "sweep.text": False,
    "objective.name": "astar",
    "astar.beta1": 0.5,
    "astar.beta2": 1e-3,
    "astar.importance_cap": None,
    "astar.refresh_decay": None,
    "oapl.beta1": 1.0,
    "oapl.beta2": 1e-3,
    "oapl.value": "group",
    "oapl.group_size": 8,
    "oapl.refresh_steps": None,
    "grpo.clip_low": 0.2,
    "grpo.clip_high": 0.2,
    "grpo.kl_coef": 1e-3,
    "grpo.loss": "sequence",
    "grpo.group_size": 8,
    "grpo.normalise": True,
    "rebel.eta": 1.0,
    "ppo.clip_low": 0.2,
    "ppo.clip_high": 0.2,
    "ppo.kl_coef": 1e-3,
    "ppo.loss": "token",
    "ppo.gamma": 1.0,
    "ppo.gae_lambda": 1.0,
    "ppo.value_clip": 0.2,
    "ppo.critic_lr": 1e-5,
    "spo.clip_low": 0.2,
    "spo.clip_high": 0.28,
    "spo.kl_coef": 0.0,
    "spo.loss": "token",
    "spo.least_decay": 0.875,
    "spo.most_decay": 0.96,
    "spo.half_life": 0.06,
    "spo.exploration": 0.05,
    "filter.all_wrong": 1.0,
    "filter.all_right": 1.0,
    "filter.wide": 1.0,
    "filter.max_width": 1.0,
    "train.num_steps": 100,
    "train.batch_size": 256,
    "train.mini_batch_size": None,
    "train.micro_batch_tokens": 16384,
    "train.max_skipped_steps": 3,
    "budget.tokens": None,
    "budget.flops": None,
    "budget.seconds": None,
    "optim.lr": 1e-6,
    "optim.min_lr": 0.0,
    "optim.schedule": "constant",
    "optim.adam_beta1": 0.9,
    "optim.adam_beta2": 0.999,
    "optim.adam_eps": 1e-8,
    "optim.weight_decay": 0.01,
    "optim.clip_grad": 1.0,
    "optim.warmup_steps": 0,
    "optim.decay_steps": None,
    "optim.dither": True,
    "optim.loss_scale": "paper",
    "optim.offload": False,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.virtual": 1,
    "parallel.context": 1,
    "parallel.data": 1,
    "parallel.expert": 1,
    "parallel.recompute": "none",
    "rollout.num_engines": 1,
    "rollout.tensor": 1,
    "rollout.max_num_seqs": 256,
    "rollout.kv_cache_gib": 1,
    "rollout.gpu_memory_utilization": 0.5,
    "rollout.max_staleness": 0,
    "rollout.update": "in_flight",
    "rollout.graphs": None,
    "conversion.bucket_bytes": 64 << 20,
    "cluster.address": None,
    "cluster.share_gpus": None,
    "cluster.threads": None,
    "cluster.start_timeout_seconds": 300.0,
    "checkpoint.interval": 50,
    "checkpoint.keep": 2,
    "eval.interval": None,
    "eval.benchmarks": [],
    "eval.folder": None,
    "eval.num_samples": None,
    "eval.max_prompts": None,
}

SMALLEST = """
run_dir: runs/x
model: {path: some/model}
data: {path: some.jsonl}
reward: {name: last_number}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str, text: str = SMALLEST) -> RunConfig:
    return config.load(write(folder, text), overrides)


def refusal(folder: Path, *overrides: str, text: str = SMALLEST) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, text=text)
    return str(caught.value)


def test_the_set_of_keys_and_their_defaults_is_frozen() -> None:
    fields = {key: section.model_fields[key.rpartition(".")[2]] for key, section in config.keys().items()}
    defaults = {key: REQUIRED if field.is_required() else field.default for key, field in fields.items()}
    assert defaults == KEYS
    assert list(defaults) == list(KEYS)
    assert {key: type(default) for key, default in defaults.items()} == {key: type(KEYS[key]) for key in KEYS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads(path: Path) -> None:
    cfg = config.load(path)
    assert cfg.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("name", ["gsm8k_qwen2.5_1.5b", "math_qwen2.5_1.5b"])
def test_the_papers_runs_have_the_papers_settings(name: str) -> None:
    cfg = config.load(CONFIGS[0].with_name(f"{name}.yaml"))
    assert (cfg.data.max_prompt_tokens, cfg.sampling.max_response_tokens) == (256, 1024)
    assert (cfg.train.batch_size, cfg.mini_batch_size) == (256, 128)
    assert (cfg.optim.lr, cfg.optim.adam_beta1, cfg.optim.adam_beta2) == (1e-6, 0.9, 0.999)
    assert (cfg.optim.weight_decay, cfg.optim.clip_grad, cfg.optim.warmup_steps) == (0.01, 1.0, 0)
    assert (cfg.astar.beta1, cfg.astar.beta2, cfg.sweep.num_samples) == (0.5, 1e-3, 8)
    assert (cfg.sampling.temperature, cfg.sampling.top_p) == (1.0, 1.0)
    assert cfg.parallel.world_size + cfg.rollout.num_engines * cfg.rollout.tensor == 4  # GPUs


def test_a_day_is_text_whether_yaml_reads_a_date_or_text(tmp_path: Path) -> None:
    for written in ("2026-11-28", "'2026-11-28'"):
        assert load(tmp_path, f"data.date={written}").data.date == "2026-11-28"
    for wrong in ("28.11.2026", "20261128", "2026-11-31", "2026-11-28 10:00:00", "today", "''", "[]"):
        assert refusal(tmp_path, f"data.date={wrong}").startswith("data.date: expected a day as 2026-11-28, got ")
    assert "seed: " in refusal(tmp_path, text=SMALLEST + "seed: 2026-11-31\n")


@pytest.mark.parametrize(
    ("wrong", "path", "nearest"),
    [
        ("optim.learning_rate=1e-6", "optim.learning_rate", "optim."),
        ("optim.weight_decays=0.1", "optim.weight_decays", "optim.weight_decay"),
        ("train.batchsize=8", "train.batchsize", "train.batch_size"),
        ("train.lr=1e-6", "train.lr", "optim.lr"),
        ("sampling.temprature=1.0", "sampling.temprature", "sampling.temperature"),
        ("rollouts.num_engines=2", "rollouts", "rollout."),
        ("sed=1", "sed", "seed"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_name(
    tmp_path: Path, wrong: str, path: str, nearest: str
) -> None:
    message = refusal(tmp_path, wrong)
    assert message.startswith(f"{path}: no such key; the nearest is {nearest}")
    assert message.removeprefix(f"{path}: no such key; the nearest is ").partition(";")[0] in KEYS


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        ("train.batch_size=many", "train.batch_size"),
        ("train.batch_size=8.5", "train.batch_size"),
        ("train.batch_size='8'", "train.batch_size"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.num_steps=true", "train.num_steps"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=-1e-6", "optim.lr"),
        ("optim.lr=", "optim.lr"),
        ("rollout.graphs=1", "rollout.graphs"),
        ("rollout.gpu_memory_utilization=1.0", "rollout.gpu_memory_utilization"),
        ("sampling.top_p=1.1", "sampling.top_p"),
        ("astar.beta1=0", "astar.beta1"),
        ("model.dtype=float16", "model.dtype"),
        ("model.path=3", "model.path"),
        ("seed=-1", "seed"),
        ("data=some.jsonl", "data"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path_and_what_was_given(tmp_path: Path, wrong: str, path: str) -> None:
    message = refusal(tmp_path, wrong)
    assert message.startswith(f"{path}: ")
    assert ", got " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("old", "words"),
    [
        ("rollout.eager", "it is rollout.graphs now"),
        ("conversion.verify_interval", "every publish is checked whole now"),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_what_came_of_it(tmp_path: Path, old: str, words: str) -> None:
    assert refusal(tmp_path, f"{old}=1").startswith(f"{old}: no such key any more; {words}")


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    lines = refusal(tmp_path, "optim.lr=fast", "train.batchsize=8").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["optim.lr", "train.batchsize"]


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.0e-5", "0.00001", "+1e-5", "1.e-5"])
def test_a_number_in_any_notation_is_a_number(tmp_path: Path, number: str) -> None:
    assert load(tmp_path, f"optim.lr={number}").optim.lr == 1e-5
    assert load(tmp_path, text=f"{SMALLEST}optim: {{lr: {number}}}\n").optim.lr == 1e-5


def test_text_that_only_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    assert load(tmp_path, "run_dir=runs/1e-5").run_dir == "runs/1e-5"
    assert load(tmp_path, "run_dir='1e-5'").run_dir == "1e-5"


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    text = f"{SMALLEST}optim: {{lr: 1e-4, weight_decay: 0.0}}\n"
    cfg = load(tmp_path, "optim.lr=1e-3", "optim.lr=1e-2", "cluster.address=null", text=text)
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.cluster.address) == (1e-2, 0.0, None)


@pytest.mark.parametrize("wrong", ["optim.lr", "=1", "", "optim.lr=[1"])
def test_an_override_that_is_no_key_and_value_is_refused(tmp_path: Path, wrong: str) -> None:
    assert refusal(tmp_path, wrong).startswith(f"--set {wrong}: ")


def test_a_base_file_lies_below_and_is_merged_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, f"{SMALLEST}optim: {{lr: 1e-4, weight_decay: 0.0}}\n", "below.yaml")
    cfg = load(tmp_path, text="base: below.yaml\noptim: {lr: 1e-3}\n")
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.run_dir) == (1e-3, 0.0, "runs/x")


def test_a_base_has_no_base_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, SMALLEST, "lowest.yaml")
    write(tmp_path, "base: lowest.yaml\n", "below.yaml")
    assert "one level is allowed" in refusal(tmp_path, text="base: below.yaml\n")
    assert refusal(tmp_path, text="base: 3\n").startswith("base: expected a file name")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "{file}") for text in ("", "- a list\n", "just text\n", "a: [\n", "1: 2\n")),
        (SMALLEST + "optim:\n  lr: 1e-4\n  lr: 1e-3\n", "'lr' stands twice"),
        (SMALLEST + "optim:\n  lr: 1e-4\n  lr: 1e-3\n", "line 8"),
        (SMALLEST.replace("reward: {name: last_number}", ""), "reward: this key is required"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    assert words.format(file=tmp_path / "run.yaml") in refusal(tmp_path, text=text)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such configuration file"):
        config.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("overrides", "path", "advice"),
    [
        (["train.batch_size=64", "train.mini_batch_size=48"], "train.mini_batch_size", "for example 32"),
        (["train.batch_size=64", "train.mini_batch_size=128"], "train.mini_batch_size", "for example 64"),
        (["train.batch_size=64", "parallel.data=3"], "parallel.data", "for example"),
        (["train.mini_batch_size=2", "parallel.data=4"], "parallel.data", "for example 2"),
        (["optim.schedule=cosine", "optim.min_lr=1e-5"], "optim.min_lr", "lower it"),
        (["optim.min_lr=1e-7"], "optim.min_lr", "set optim.schedule"),
        (["optim.schedule=wsd"], "optim.decay_steps", "schedule wsd needs it"),
        (["optim.schedule=cosine", "optim.decay_steps=3"], "optim.decay_steps", "no other has it"),
        (["optim.schedule=cosine", "optim.warmup_steps=100"], "optim.warmup_steps", "100 optimiser steps of the run"),
        (["optim.warmup_steps=100"], "optim.warmup_steps", "100 optimiser steps of the run"),
        (
            ["optim.schedule=wsd", "optim.decay_steps=150", "optim.warmup_steps=50", "train.mini_batch_size=128"],
            "optim.warmup_steps",
            "200 optimiser steps of the run",
        ),
        (["model.fp8=tensorwise", "model.dtype=float32"], "model.fp8", "set model.dtype=bfloat16"),
        (["eval.benchmarks=[amc23, gsm8k]"], "eval.folder", "needed for eval.benchmarks amc23, gsm8k"),
    ],
)
def test_an_impossible_combination_is_refused_with_what_would_do(
    tmp_path: Path, overrides: list[str], path: str, advice: str
) -> None:
    message = refusal(tmp_path, *overrides)
    assert message.startswith(f"{path}: ")
    assert advice in message


def test_what_is_derived_follows_the_keys(tmp_path: Path) -> None:
    cfg = load(tmp_path)
    assert (cfg.mini_batch_size, cfg.max_tokens) == (256, 1280)
    assert cfg.table_dir == Path("runs/x/v_star")
    cfg = load(tmp_path, "train.mini_batch_size=64", "sweep.table=tables/gsm8k", "parallel.tensor=2", "parallel.data=4")
    assert (cfg.mini_batch_size, cfg.table_dir, cfg.parallel.world_size) == (64, Path("tables/gsm8k"), 8)


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).seed = 1  # pyright: ignore[reportAttributeAccessIssue]
