"""The configuration: its frozen set of keys, and that what can't run is refused, by name, before anything starts."""

import json
from pathlib import Path

import pytest
import yaml

from astar_megatron import config
from astar_megatron.config import ConfigError, RunConfig
from astar_megatron.run.bundle import settings_without_secrets

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
    "reward.memory_gib": 4.0,
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
    "train.grace_seconds": None,
    "train.offload": "cache",
    "train.profile_steps": [],
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
    "rollout.heartbeat_seconds": 60.0,
    "rollout.keep": None,
    "rollout.graphs": None,
    "conversion.bucket_bytes": 64 << 20,
    "cluster.address": None,
    "cluster.share_gpus": None,
    "cluster.threads": None,
    "cluster.start_timeout_seconds": 300.0,
    "cluster.call_timeout_seconds": 3600.0,
    "checkpoint.interval": 50,
    "checkpoint.keep": 2,
    "checkpoint.keep_every": None,
    "eval.interval": None,
    "eval.benchmarks": [],
    "eval.folder": None,
    "eval.num_samples": None,
    "eval.max_prompts": None,
    "tracking.wandb": None,
    "tracking.wandb_mode": "online",
    "tracking.tensorboard": False,
    "tracking.mlflow": None,
    "supervise.max_restarts_per_hour": 5,
    "slurm.backend": None,
    "slurm.stages": None,
    "slurm.nodes": 1,
    "slurm.gpus_per_node": 8,
    "slurm.account": None,
    "slurm.partition": None,
    "slurm.time": None,
    "slurm.flags": [],
    "slurm.image": None,
    "slurm.mounts": [],
    "slurm.setup": None,
    "slurm.env": [],
    "slurm.ssh": None,
    "slurm.packager": None,
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


PAPERS = [path for path in CONFIGS if path.stem != "demo"]


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_papers_runs_have_the_papers_settings(path: Path) -> None:
    cfg = config.load(path)
    assert (cfg.data.max_prompt_tokens, cfg.sampling.max_response_tokens) == (256, 1024)
    assert (cfg.train.batch_size, cfg.mini_batch_size) == (256, 128)
    assert (cfg.optim.lr, cfg.optim.adam_beta1, cfg.optim.adam_beta2) == (1e-6, 0.9, 0.999)
    assert (cfg.optim.weight_decay, cfg.optim.clip_grad, cfg.optim.warmup_steps) == (0.01, 1.0, 0)
    assert (cfg.astar.beta1, cfg.astar.beta2, cfg.sweep.num_samples) == (0.5, 1e-3, 8)
    assert (cfg.sampling.temperature, cfg.sampling.top_p) == (1.0, 1.0)
    dataset, _, size = path.stem.removesuffix("_2x8").split("_")
    assert cfg.model.path == f"runs/models/qwen2.5-{size}"
    assert (dataset, cfg.data.path, cfg.data.long_prompts, cfg.reward.name, cfg.train.num_steps) in [
        ("gsm8k", "runs/data/gsm8k_train.jsonl", "refuse", "gsm8k_strict", 730),
        ("math", "runs/data/math_train.jsonl", "drop", "math", 733),
    ]


def test_a_day_is_text_whether_yaml_reads_a_date_or_text(tmp_path: Path) -> None:
    for written in ("2026-11-28", "'2026-11-28'"):
        assert load(tmp_path, f"data.date={written}").data.date == "2026-11-28"
    for wrong in ("28.11.2026", "20261128", "2026-11-31", "2026-11-28 10:00:00", "today", "''", "[]"):
        assert refusal(tmp_path, f"data.date={wrong}").startswith("data.date: expected a day as 2026-11-28, got ")
    assert "seed: " in refusal(tmp_path, text=SMALLEST + "seed: 2026-11-31\n")


def test_a_step_to_profile_is_one_of_the_runs_and_stands_once(tmp_path: Path) -> None:
    assert load(tmp_path, "train.num_steps=8", "train.profile_steps=[7, 0]").train.profile_steps == [7, 0]
    beyond = refusal(tmp_path, "train.num_steps=8", "train.profile_steps=[3, 8]")
    assert "train.profile_steps: expected different steps from 0 to 7" in beyond
    assert "leave out 8, or raise train.num_steps" in beyond
    assert "leave out what stands twice" in refusal(tmp_path, "train.profile_steps=[3, 3]")
    assert "train.profile_steps" in refusal(tmp_path, "train.profile_steps=[-1]")


def test_a_url_with_a_password_is_refused_without_saying_it(tmp_path: Path) -> None:
    for key in ("data.path", "model.path", "cluster.address"):
        for url in ("s3://me:hunter2@host/x.jsonl", "ray://hunter2@host:10001", "mysql://me:p/hunter2@host:10001"):
            message = refusal(tmp_path, f"{key}={url}")
            assert message.startswith(f"{key}: a URL with a login") and "hunter2" not in message
    for key, value in (
        ("tracking.mlflow", "postgresql://me:p/hunter2@host/db"),
        ("tracking.mlflow", "postgresql://me:p hunter2@host/db"),
        ("tracking.mlflow", "mysql://host/db?user=me&password=hunter2"),
        ("tracking.mlflow", "[postgresql://me:p/hunter2@host/db]"),
        ("slurm.env", "[HTTPS_PROXY=socks5://me:hunter2@host]"),
    ):
        message = refusal(tmp_path, f"{key}={value}")
        assert message.startswith(f"{key}: a URL with a login") and "hunter2" not in message
    for url in (
        "sqlite:///my runs/a@b.db",
        "postgresql://host/db?sslmode=verify-full&sslkey=a.key",
        "https://host:5000",
    ):
        assert load(tmp_path, f"tracking.mlflow={url}").tracking.mlflow == url
    assert load(tmp_path, "data.path=hf://datasets/x@main/y").run_dir


def test_what_a_run_keeps_of_its_settings_says_nothing_of_how_it_is_started(tmp_path: Path) -> None:
    cfg = load(tmp_path, "slurm.env=[MY_OWN=hunter2]", "slurm.setup=export MY_OWN=hunter2")
    kept = {"progress.json": config.flat(cfg), "the bundle": settings_without_secrets(cfg)}
    assert [name for name, values in kept.items() if "hunter2" in json.dumps(values)] == []
    assert kept["progress.json"].keys() == {key for key in KEYS if not key.startswith("slurm.")}


def test_a_key_with_dots_in_a_file_is_refused_with_how_it_is_written_there(tmp_path: Path) -> None:
    for key in ("optim.lr", "optim.learning_rate"):
        message = refusal(tmp_path, text=f"{SMALLEST}{key}: 1e-6\n")
        assert message == f"{key}: in a file keys are nested; write `optim:` and, indented below it, `lr:`"


def test_a_value_that_is_set_may_hold_what_begins_a_comment_in_quotes_or_within_a_word(tmp_path: Path) -> None:
    assert load(tmp_path, 'data.suffix=" ####"').data.suffix == " ####"
    assert load(tmp_path, "data.suffix=' # it''s'").data.suffix == " # it's"
    assert load(tmp_path, "run_dir =runs/a#1").run_dir == "runs/a#1"
    assert load(tmp_path, 'eval.benchmarks=["#1", a#b]', "eval.folder=x").eval.benchmarks == ["#1", "a#b"]
    for value in ("runs/a #1", "#1", "'runs/a' #1", "[runs/a] #1", "|\n  runs/a\n#1"):
        assert "YAML takes # and what follows for a comment" in refusal(tmp_path, f"run_dir={value}")


@pytest.mark.parametrize("value", [" Go.", "Go. ", "a\nb", " runs/a"])
def test_a_text_that_is_set_is_taken_whole_or_refused(value: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, f"data.suffix={value}")
    assert f"YAML would read the text {yaml.safe_load(value)!r}; put it into quotes of its own, as --set '" in message
    assert load(tmp_path, f"data.suffix={json.dumps(value)}").data.suffix == value


@pytest.mark.parametrize("value", ["%x", "@x", "[a].jsonl", "*.jsonl"])
def test_a_text_that_is_set_and_no_yaml_is_refused_with_the_quotes_it_needs(value: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, f"data.path={value}")
    assert message.endswith("""; if it is a text, put it into quotes of its own, as --set 'data.suffix=" ####"'""")


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


def test_a_base_file_lies_below_and_is_merged_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, f"{SMALLEST}optim: {{lr: 1e-4, weight_decay: 0.0}}\n", "below.yaml")
    cfg = load(tmp_path, text="base: below.yaml\noptim: {lr: 1e-3}\n")
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.run_dir) == (1e-3, 0.0, "runs/x")


def test_json_that_is_written_for_yaml_is_read_as_it_was(tmp_path: Path) -> None:
    suffix = " \N{GRINNING FACE} \x7f\x85\u2028 x\ufeff # 1e-5\n"  # JSON as usual has an emoji as two escapes
    tree = yaml.safe_load(SMALLEST) | {"seed": 7, "optim": {"lr": 1e-7}}
    tree["data"]["suffix"] = suffix
    cfg = load(tmp_path, text=config.as_json(tree))
    assert (cfg.data.suffix, cfg.seed, cfg.optim.lr) == (suffix, 7, 1e-7)
    assert json.loads(config.as_json(tree)) == tree


@pytest.mark.parametrize("line", ["on: 1", "optim: {off: 1}", "1: x", "data: {null: x}"])
def test_a_key_that_yaml_reads_as_no_text_is_named_as_it_stands(tmp_path: Path, line: str) -> None:
    key = line.rpartition("{")[2].partition(":")[0]
    assert f"the key {key!r} needs quotes: YAML reads on, off, yes, no as true" in refusal(tmp_path, text=f"{line}\n")


@pytest.mark.parametrize("value", ["", "''", "[x]"])
def test_a_base_that_names_no_file_is_refused(tmp_path: Path, value: str) -> None:
    assert "base: expected a file name beside" in refusal(tmp_path, text=f"base: {value}\n{SMALLEST}")


def test_what_is_derived_follows_the_keys(tmp_path: Path) -> None:
    cfg = load(tmp_path)
    assert (cfg.mini_batch_size, cfg.max_tokens) == (256, 1280)
    assert cfg.table_dir == Path("runs/x/v_star")
    cfg = load(tmp_path, "train.mini_batch_size=64", "sweep.table=tables/gsm8k", "parallel.tensor=2", "parallel.data=4")
    assert (cfg.mini_batch_size, cfg.table_dir, cfg.parallel.world_size) == (64, Path("tables/gsm8k"), 8)


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).seed = 1  # pyright: ignore[reportAttributeAccessIssue]
