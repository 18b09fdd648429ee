"""`astar compare` with an `astar` made by hand: budgets, resuming, failures, results. e2e/ has the real one."""

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples

from astar_megatron import config
from astar_megatron.algorithm.packing import pack
from astar_megatron.compare import main
from astar_megatron.config import BudgetConfig, RunConfig
from astar_megatron.data.contract import contract_of
from astar_megatron.data.prompts import read_prompts
from astar_megatron.data.v_star import VStarTable
from astar_megatron.model.flops import forward_flops
from astar_megatron.run import scores
from astar_megatron.run.commands import CommandEnd, astar, last_heading, last_line
from astar_megatron.run.spending import Cost, Spending, generation_flops
from astar_megatron.run.tracking import Tracker, read_metrics
from astar_megatron.studies import comparison, comparison_files
from astar_megatron.studies.comparison import Run, Stage1Cost
from astar_megatron.studies.curves import band
from astar_megatron.types import Prompt
from conversion.families import read_model

ALL = "astar,grpo,rebel,oapl,spo"
READERS = {"astar", "spo"}
TOKENS = {"astar": 10, "grpo": 40, "rebel": 25, "oapl": 30, "spo": 7}  # a step
STAGE_1_TOKENS, STAGE_1_SECONDS = 2 * 4 * 5, 3.0  # prompts, samples, tokens of each


def line(step: int, tokens: int = 10, *, flops: float = 1e9, reward: float = 0.5) -> dict[str, Any]:
    """A line of metrics as `astar train` writes it, as far as a comparison reads it."""
    return {
        "step": step,
        "reward_mean": reward,
        "kl_token": 0.01 * step,
        "entropy": 1.0,
        "truncated": 0.0,
        "response_tokens": tokens,
        "model_flops": flops,
        "generation_flops": flops / 4,
        "peak_memory_bytes": [5, 7 + step],
        "seconds": {"total": 2.0 + tokens / 10, "eval": 2.0},
    }


class Astar:
    """Sweeps and trains without a model: a Runner. A step takes TOKENS; each method and seed has a score of its own."""

    def __init__(self, *, fails: str = "", at_step: int = 2) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails, self.at_step = fails, at_step

    def __call__(self, name: str, config_file: Path, log: Path) -> int:
        cfg = config.load(config_file)
        run_dir = Path(cfg.run_dir)
        self.calls.append((name, run_dir.name))
        log.open("a").write(f"{name} of {run_dir.name}\n")
        return self.sweep(cfg) if name == "sweep" else self.train(cfg, run_dir, log)

    def sweep(self, cfg: RunConfig) -> int:
        fill_table(cfg)
        Tracker(cfg.run_dir).log_stage_1(cfg.table_dir, 8, STAGE_1_TOKENS, STAGE_1_SECONDS)
        return 0

    def train(self, cfg: RunConfig, run_dir: Path, log: Path) -> int:
        tracker, tokens = Tracker(cfg.run_dir), TOKENS[cfg.objective.name]
        earlier = read_metrics(run_dir)
        spending = Spending(cfg.budget, cfg.train.num_steps, len(earlier), earlier)
        score = (len(cfg.objective.name) + cfg.seed) / 32
        for step in spending.steps():
            if run_dir.name == self.fails and step == self.at_step:
                log.open("a").write("astar: the engine has ended\n\n")
                return 1
            spending.add(line(step, tokens))
            tracker.log(line(step, tokens))
            if spending.has_reached_a_part or spending.ends:
                scores.write(run_dir, spending.done, [samples.evaluation(score, "prompts")])
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        return 0


def fill_table(cfg: RunConfig) -> None:
    table = VStarTable.create_or_open(cfg.table_dir, contract_of(cfg))
    for prompt in read_prompts(cfg.data, cfg.model.path):
        drawn = [samples.rollout(prompt, sample=i, seed=cfg.seed, token_ids=(5,) * 5) for i in range(4)]
        table.append(drawn)


@pytest.fixture
def cfg(tmp_path: Path, tied_llama: Path) -> RunConfig:
    rows = [{"question": f"What is 1 + {n}?", "answer": str(1 + n)} for n in (1, 2)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config.validate(
        {
            "run_dir": str(tmp_path / "run"),
            "seed": 5,
            "model": {"path": str(tied_llama)},
            "data": {"path": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 30},
            "reward": {"name": "last_number"},
            "sampling": {"max_response_tokens": 8},
            "sweep": {"num_samples": 4},
            "train": {"num_steps": 50, "batch_size": 2},
            "grpo": {"group_size": 2},
            "oapl": {"group_size": 2},
        }
    )


@pytest.fixture
def compare(cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that compares without a picture: to draw one after each run takes longer than all the rest."""
    monkeypatch.setattr(comparison_files, "plot", lambda results, path: None)

    def run(runner: Any, methods: str = ALL, limit: str = "tokens=100", seeds: str = "0,1,2", **changes: Any) -> int:
        own = config.validate(cfg.model_dump() | changes)
        return main(own, methods, limit, seeds, tmp_path / "out", runner)

    return run


def tree_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "compare.json").read_text())


# --- a run's own budget


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({}, 9),
        ({"tokens": 30}, 3),
        ({"tokens": 31}, 4),
        ({"flops": 2.5e9}, 2),
        ({"flops": 2.6e9}, 3),
        ({"seconds": 1.0}, 1),  # not 3.0: evaluation does not count
        ({"seconds": 4.5}, 5),
        ({"tokens": 1000, "seconds": 2.0}, 2),
        ({"tokens": 1000}, 9),
    ],
)
def test_a_run_ends_after_the_first_step_that_reaches_its_budget_resumed_or_not(
    budget: dict[str, Any], steps: int
) -> None:
    for done in range(steps + 1):
        earlier = [line(step) for step in range(done)]
        spending = Spending(BudgetConfig(**budget), 9, done, earlier)
        taken = []
        for step in spending.steps():
            taken.append(step)
            spending.add(line(step))
        assert taken == list(range(done, steps))
        assert spending.ends and spending.done == steps
        assert bool(spending.reached) == (steps < 9)


@pytest.mark.parametrize(
    ("budget", "evaluated", "steps"),
    [
        ({"tokens": [10, 25, 26, 60]}, [1, 3, 6], 6),
        ({"tokens": [10, 1000]}, [1], 9),
        ({"tokens": [35], "seconds": [2.0, 3.0]}, [2, 3], 3),
        ({"tokens": 30}, [], 3),
    ],
)
def test_the_policy_is_evaluated_after_the_steps_that_reach_the_amounts_of_a_budget_resumed_or_not(
    budget: dict[str, Any], evaluated: list[int], steps: int
) -> None:
    for done in range(steps + 1):
        spending = Spending(BudgetConfig(**budget), 9, done, [line(step) for step in range(done)])
        reached = [spending.done] if spending.has_reached_a_part else []
        for step in spending.steps():
            spending.add(line(step))
            reached += [spending.done] if spending.has_reached_a_part else []
        assert reached == [step for step in evaluated if step >= done]
        assert spending.done == steps


def test_drawing_costs_a_forward_pass_in_which_a_prompt_counts_once(tied_llama: Path) -> None:
    model = read_model(str(tied_llama))
    first, other = (Prompt(uid=uid, token_ids=ids, text="", answer="") for uid, ids in (("a", (1, 2, 3)), ("b", (4,))))
    responses = [(first, [2]), (other, [1]), (first, [3])]
    shared = pack([[1, 2, 3, 7, 8], [1, 2, 3, 9, 9, 9]], [3, 3], share_prefix=True)
    alone = pack([[4, 7]], [1], share_prefix=False)
    assert generation_flops(model, responses) == forward_flops(model, shared) + forward_flops(model, alone)
    apart = sum(generation_flops(model, [response]) for response in responses)
    again = generation_flops(model, [(first, [1])]) - generation_flops(
        model, [(Prompt(uid="c", token_ids=(3,), text="", answer=""), [1])]
    )
    assert 0 < apart - generation_flops(model, responses) <= again  # two tokens of the prompt, fed once
    assert generation_flops(model, []) == 0


# --- what is run


def test_all_runs_have_the_same_configuration_but_for_method_seed_folder_and_budget(
    compare: Any, cfg: RunConfig, tmp_path: Path
) -> None:
    assert compare(Astar()) == 0
    flat = {}
    for run in comparison.runs_of(ALL, "0,1,2"):
        own = config.load(tmp_path / "out" / run.name / "run.json")
        flat[run] = config.flat(own)
        assert (own.objective.name, own.seed, own.run_dir) == (run.cell, run.seed, str(tmp_path / "out" / run.name))
        assert own.slurm.backend == "local"
        assert own.budget.tokens == [100 - (STAGE_1_TOKENS if run.cell in READERS else 0)]
    differing = {key for values in flat.values() for key in values if values[key] != flat[Run("astar", 0)][key]}
    assert differing == {"objective.name", "seed", "run_dir", "budget.tokens"}
    changed = {key for key, value in config.flat(cfg).items() if flat[Run("astar", 0)][key] != value}
    assert changed == {"run_dir", "seed", "sweep.table", "budget.tokens", "eval.interval"}
    assert flat[Run("astar", 0)]["sweep.table"] == str(cfg.table_dir)


def test_one_table_is_filled_once_with_the_seed_of_the_configuration(
    compare: Any, cfg: RunConfig, tmp_path: Path
) -> None:
    runner = Astar()
    compare(runner)
    assert runner.calls == [("sweep", "stage-1")] + [("train", f"{m}-{s}") for m in ALL.split(",") for s in range(3)]
    assert config.load(tmp_path / "out" / "stage-1" / "run.json").seed == cfg.seed == 5
    assert VStarTable.open(cfg.table_dir, contract_of(cfg)).summary().samples == 8


def test_a_comparison_grows_and_forgets_no_finished_run(compare: Any, tmp_path: Path) -> None:
    compare(Astar(), "astar,grpo", seeds="0,1")
    grown = Astar()
    compare(grown, "rebel,grpo", seeds="1,2")
    assert [name for _, name in grown.calls] == ["rebel-1", "rebel-2", "grpo-2"]
    names = [run["name"] for run in tree_of(tmp_path)["runs"]]
    assert names == ["rebel-1", "rebel-2", "grpo-1", "grpo-2", "astar-0", "astar-1", "grpo-0"]
    assert {run["state"] for run in tree_of(tmp_path)["runs"]} == {"finished"}
    nothing = Astar()
    compare(nothing, "astar,grpo,rebel", seeds="1,2")
    assert [name for _, name in nothing.calls] == ["astar-2"]
    assert len(tree_of(tmp_path)["runs"]) == 8


def test_without_a_method_that_reads_stage_1_none_is_run_or_counted(
    compare: Any, cfg: RunConfig, tmp_path: Path
) -> None:
    runner = Astar()
    assert compare(runner, "grpo,rebel", seeds="0") == 0
    assert [name for name, _ in runner.calls] == ["train", "train"] and not cfg.table_dir.exists()
    assert tree_of(tmp_path)["stage_1"] == {}


@pytest.mark.parametrize(
    ("budget", "a_step"),
    [("tokens=100", lambda m: TOKENS[m]), ("flops=2e10", lambda m: 1.25e9), ("seconds=20", lambda m: TOKENS[m] / 10)],
)
def test_each_run_stops_at_the_first_step_at_which_it_has_cost_the_budget(
    budget: str, a_step: Any, compare: Any, tmp_path: Path
) -> None:
    compare(Astar(), limit=budget, seeds="0")
    measure, _, amount = budget.partition("=")
    tree = tree_of(tmp_path)
    assert set(tree["stage_1"]) == READERS and tree["ended_by_num_steps"] == []
    assert tree["stage_1"]["astar"]["tokens"] == STAGE_1_TOKENS
    assert tree["stage_1"]["astar"]["seconds"] == STAGE_1_SECONDS
    for run in tree["runs"]:
        stage_1 = tree["stage_1"].get(run["method"], {}).get(measure, 0)
        assert run["spent"][measure] == pytest.approx(stage_1 + run["steps"] * a_step(run["method"]))
        assert run["spent"][measure] >= float(amount) * (1 - 1e-9) > run["spent"][measure] - a_step(run["method"])


def test_stage_1_costs_what_drawing_its_responses_costs_which_are_not_read_for_it(
    compare: Any, cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(VStarTable, "responses")
    compare(Astar(), "astar", seeds="0")
    model = read_model(cfg.model.path)
    prompts = read_prompts(cfg.data, cfg.model.path)
    packs = [pack([[*p.token_ids, *(5,) * 5]] * 4, [len(p.token_ids)] * 4, share_prefix=True) for p in prompts]
    assert tree_of(tmp_path)["stage_1"]["astar"]["flops"] == sum(forward_flops(model, packed) for packed in packs)


# --- going on


def test_a_failed_run_is_named_and_loses_no_other_and_alone_is_run_again(
    compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(Astar(fails="grpo-1"), "grpo,rebel", seeds="0,1") == 1
    first = tree_of(tmp_path)
    states = {run["name"]: run["state"] for run in first["runs"]}
    assert states == {"grpo-0": "finished", "grpo-1": "failed", "rebel-0": "finished", "rebel-1": "finished"}
    assert first["runs"][1]["error"].startswith("astar: the engine has ended (exit status 1")
    assert [summary["num_runs"] for summary in first["summaries"]] == [2, 1]
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "- grpo-1: astar: the engine has ended" in text and "grpo-1: astar" in capsys.readouterr().out
    runner = Astar()
    assert compare(runner, "grpo,rebel", seeds="0,1") == 0
    assert runner.calls == [("train", "grpo-1")]
    lines = read_metrics(tmp_path / "out" / "grpo-1")
    assert [line["step"] for line in lines] == [0, 1, 2]  # went on
    resumed = tree_of(tmp_path)
    assert all(run["state"] == "finished" for run in resumed["runs"])
    assert not list((tmp_path / "out").glob("*/checkpoints"))


def test_a_comparison_that_ends_between_two_runs_ends_as_a_whole_would(cfg: RunConfig, tmp_path: Path) -> None:
    class Killed(Astar):
        def __call__(self, name: str, config_file: Path, log: Path) -> int:
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(name, config_file, log)

    def run(out: str, runner: Astar) -> Any:
        main(cfg, "astar,rebel", "tokens=100", "0,1", tmp_path / out, runner)
        return [(tmp_path / out / f"compare.{kind}").read_text() for kind in ("csv", "md", "json")]

    with pytest.raises(KeyboardInterrupt):
        run("killed", Killed())
    states = [each["state"] for each in json.loads((tmp_path / "killed" / "compare.json").read_text())["runs"]]
    assert states == ["finished", "finished", "waiting", "waiting"]
    rest = Astar()
    killed = run("killed", rest)
    assert [name for _, name in rest.calls] == ["rebel-0", "rebel-1"]
    (tmp_path / "killed" / "stage-1").rename(tmp_path / "kept")
    (tmp_path / "whole").mkdir()
    (tmp_path / "kept").rename(tmp_path / "whole" / "stage-1")
    (tmp_path / "whole" / "compare.json").write_text(json.dumps({"settings": {}, "runs": []}))
    assert run("whole", Astar()) == killed
    assert (tmp_path / "whole" / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_ends_well_without_its_evaluation_is_a_failed_one(compare: Any, tmp_path: Path) -> None:
    class Silent(Astar):
        def train(self, cfg: RunConfig, run_dir: Path, log: Path) -> int:
            status = super().train(cfg, run_dir, log)
            if run_dir.name == "grpo-0":
                next(run_dir.glob("eval_step_*.json")).unlink()
            return status

    assert compare(Silent(), "grpo,rebel", seeds="0") == 1
    first, second = tree_of(tmp_path)["runs"]
    assert "eval_step_00000003" in first["error"] and second["state"] == "finished"


# --- refused before anything starts


@pytest.mark.parametrize(
    ("budget", "changes", "words"),
    [
        ("tokens=101", {}, "--budget: tokens=100 there, tokens=101 now"),
        ("flops=100", {}, "--budget: tokens=100 there, flops=100 now"),
        ("tokens=100", {"optim": {"lr": 2e-6}}, "optim.lr: 1e-06 there, 2e-06 now"),
        ("tokens=100", {"seed": 6}, "seed: 5 there, 6 now"),
        ("tokens=100", {"sweep": {"num_samples": 4, "table": "t"}}, "sweep.table: "),
    ],
)
def test_a_folder_of_another_comparison_is_refused_by_field(
    budget: str, changes: Any, words: str, compare: Any, tmp_path: Path
) -> None:
    compare(Astar(), "grpo", seeds="0")
    before = (tmp_path / "out" / "compare.json").read_text()
    runner = Astar()
    with pytest.raises(ValueError, match="holds another comparison") as error:
        compare(runner, "grpo", budget, "0", **changes)
    assert words in str(error.value)
    assert runner.calls == [] and (tmp_path / "out" / "compare.json").read_text() == before


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("prompts.jsonl", "prompts of data.path: "),
        ("held_out.jsonl", "held-out problems: "),
        ("model/config.json", "model, tokenizer and reward: "),
    ],
)
def test_a_file_of_a_comparison_that_holds_something_else_now_is_refused(
    file: str, words: str, compare: Any, cfg: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(cfg.model.path, tmp_path / "model")
    samples.write_jsonl(tmp_path / "held_out.jsonl", [{"question": "What is 1 + 7?", "answer": "8"}])
    data = cfg.data.model_dump() | {"eval_path": str(tmp_path / "held_out.jsonl")}
    own = {"data": data, "model": cfg.model.model_dump() | {"path": str(tmp_path / "model")}}
    compare(Astar(), "grpo", seeds="0", **own)
    before = (tmp_path / "out" / "compare.json").read_text()
    with (tmp_path / file).open("a") as other:
        other.write(" \n" if file == "model/config.json" else '{"question": "What is 2 + 2?", "answer": "4"}\n')
    runner = Astar()
    with pytest.raises(ValueError, match="holds another comparison") as error:
        compare(runner, "grpo", seeds="1", **own)
    assert [line.strip().startswith(words) for line in str(error.value).splitlines()] == [False, True]
    assert runner.calls == [] and (tmp_path / "out" / "compare.json").read_text() == before


def test_a_comparison_of_an_older_version_that_did_not_keep_which_prompts_it_has_is_refused(
    compare: Any, tmp_path: Path
) -> None:
    compare(Astar(), "grpo", seeds="0")
    older = tree_of(tmp_path)
    del older["settings"]["prompts of data.path"]
    (tmp_path / "out" / "compare.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"prompts of data\.path: not known there, an older version wrote it"):
        compare(Astar(), "grpo", seeds="0")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_budget_that_stage_1_alone_reaches_is_refused_before_any_training(
    is_there: bool, compare: Any, cfg: RunConfig, tmp_path: Path
) -> None:
    if is_there:
        fill_table(cfg)
    runner = Astar()
    with pytest.raises(ValueError, match=f"stage 1 alone, which spo reads, costs {STAGE_1_TOKENS} response tokens"):
        compare(runner, "grpo,spo", f"tokens={STAGE_1_TOKENS}")
    assert runner.calls == ([] if is_there else [("sweep", "stage-1")])
    assert (tmp_path / "out").exists() != is_there  # what is refused from the beginning writes nothing
    assert compare(Astar(), "grpo,spo", f"tokens={STAGE_1_TOKENS + 1}") == 0


@pytest.mark.parametrize(("samples_there", "least"), [(0, 8), (4, STAGE_1_TOKENS + 2)])
def test_a_budget_that_stage_1_will_reach_is_refused_before_the_sweep(
    samples_there: int, least: int, compare: Any, cfg: RunConfig, tmp_path: Path
) -> None:
    """A sample that is lacking has a token at least."""
    if samples_there:
        fill_table(cfg)
    own, runner = {"sweep": {"num_samples": samples_there + 1}} if samples_there else {}, Astar()
    with pytest.raises(
        ValueError, match=f"stage 1 alone, which astar reads, will cost {least} response tokens or more"
    ):
        compare(runner, "grpo,astar", f"tokens={least}", **own)
    assert runner.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("samples_there", [0, 4])
def test_flops_that_stage_1_will_reach_are_refused_before_the_sweep(
    samples_there: int, compare: Any, cfg: RunConfig, tmp_path: Path
) -> None:
    if samples_there:
        fill_table(cfg)
    runner, own = Astar(), {"sweep": {"num_samples": samples_there + 1}}
    with pytest.raises(ValueError, match=r"stage 1 alone, which astar reads, will cost \S+ .*FLOPs or") as error:
        compare(runner, "grpo,astar", "flops=1", **own)
    assert runner.calls == [] and not (tmp_path / "out").exists()
    least = float(re.findall(r"will cost (\S+) ", str(error.value))[0])
    compare(runner, "grpo,astar", f"flops={1.001 * least}", **own)
    assert runner.calls[0] == ("sweep", "stage-1")


def test_a_key_that_a_comparison_s_record_does_not_know_had_its_default(tmp_path: Path) -> None:
    digests = dict.fromkeys(("prompts of data.path", "held-out problems", "model, tokenizer and reward"), "a")
    before = digests | {"train.batch_size": 8, "--budget": "tokens=5"}
    comparison.check_settings(tmp_path, before, before | {"grpo.kl_coef": 0.001})
    with pytest.raises(ValueError, match=r"grpo\.kl_coef: 0\.001 there, 0\.5 now"):
        comparison.check_settings(tmp_path, before, before | {"grpo.kl_coef": 0.5})


def test_what_any_method_is_refused_for_is_said_before_anything_starts(compare: Any) -> None:
    runner = Astar()
    changes = {"train": {"num_steps": 50, "batch_size": 16}}
    with pytest.raises(ValueError, match=r"spo: train\.batch_size: "):
        compare(runner, "grpo,spo", **changes)
    assert runner.calls == [] and compare(runner, "grpo", seeds="0", **changes) == 0


def test_seconds_of_a_table_that_others_filled_are_not_known(compare: Any, cfg: RunConfig, tmp_path: Path) -> None:
    fill_table(cfg)
    runner = Astar()
    with pytest.raises(ValueError, match="how long stage 1, which astar reads, took is not known"):
        compare(runner, "astar", "seconds=100")
    with pytest.raises(ValueError, match="how long stage 1"):  # nor is it where it has a part
        compare(runner, "astar", "seconds=100", sweep={"num_samples": 5})
    assert runner.calls == [] and not (tmp_path / "out").exists()
    assert compare(Astar(), "astar", "tokens=100") == 0
    assert tree_of(tmp_path)["stage_1"]["astar"]["seconds"] is None
    assert "seconds that are not known, and not counted" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.parametrize(
    ("status", "words"), [(2, "stage 1 failed: astar: no memory (exit status 2"), (0, "stage 1 left 8 samples undrawn")]
)
def test_a_stage_1_that_fails_or_stays_incomplete_loses_the_runs_that_read_it_alone(
    status: int, words: str, compare: Any, tmp_path: Path
) -> None:
    class Unable(Astar):
        def sweep(self, cfg: RunConfig) -> int:
            (Path(cfg.run_dir) / "log.txt").write_text("astar: no memory\n")
            return status

    runner = Unable()
    assert compare(runner, "astar,grpo,spo", seeds="0") == 1
    assert runner.calls == [("sweep", "stage-1"), ("train", "grpo-0")]
    runs = {run["name"]: run for run in tree_of(tmp_path)["runs"]}
    assert runs["grpo-0"]["state"] == "finished"
    assert all(runs[name]["state"] == "failed" and words in runs[name]["error"] for name in ("astar-0", "spo-0"))
    again = Astar()
    assert compare(again, "astar,grpo,spo", seeds="0") == 0
    assert again.calls == [("sweep", "stage-1"), ("train", "astar-0"), ("train", "spo-0")]


def test_a_finished_run_that_is_ended_while_its_checkpoints_are_removed_is_finished(
    compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", interrupted)
        compare(Astar(), "grpo", seeds="0")
    runner = Astar()
    assert compare(runner, "grpo", seeds="0") == 0
    assert runner.calls == []


def test_settings_that_change_no_result_may_change(compare: Any) -> None:
    compare(Astar(fails="grpo-0"), "grpo", seeds="0")
    changes = {
        "train": {"num_steps": 50, "batch_size": 2, "micro_batch_tokens": 99, "grace_seconds": 60.0},
        "cluster": {"threads": 1},
        "checkpoint": {"interval": 3},
    }
    assert compare(Astar(), "grpo", seeds="0", **changes) == 0


def test_a_kl_that_is_to_a_copy_of_the_policy_is_left_out(compare: Any, tmp_path: Path) -> None:
    compare(Astar(), "oapl,grpo", seeds="0", oapl={"refresh_steps": 2, "group_size": 2})
    kl = {summary["method"]: summary["kl_token"] for summary in tree_of(tmp_path)["summaries"]}
    assert kl["oapl"] is None and kl["grpo"] is not None


# --- results


def test_the_table_has_means_and_standard_errors_over_seeds_the_best_first(compare: Any, tmp_path: Path) -> None:
    compare(Astar(), "spo,astar")
    best, second = tree_of(tmp_path)["summaries"]
    assert (best["method"], second["method"]) == ("astar", "spo")
    scores = [(5 + seed) / 32 for seed in range(3)]  # half of the greedy responses, the failed one counts 0
    assert best["score"] == pytest.approx(np.mean(scores))
    assert best["score_error"] == pytest.approx(np.std(scores, ddof=1) / math.sqrt(3))
    assert (best["steps"], best["tokens"], best["kl_token"]) == (6, 100, pytest.approx(0.05))
    assert best["seconds"] == pytest.approx(STAGE_1_SECONDS + 6 * 1.0) and best["peak_memory_bytes"] == 12
    row = (tmp_path / "out" / "compare.md").read_text().splitlines()[4]
    assert row.startswith("| astar | 3 | 0.188 ± 0.018 | 0.0500 | 9.0 | 0.00 | 100 |") and row.endswith("| 6.0 |")


def test_a_single_seed_has_no_standard_error(compare: Any, tmp_path: Path) -> None:
    compare(Astar(), "grpo", seeds="7")
    assert tree_of(tmp_path)["summaries"][0]["score_error"] is None
    assert "±" not in (tmp_path / "out" / "compare.md").read_text().splitlines()[4]


def test_a_run_that_num_steps_ends_first_is_named(compare: Any, tmp_path: Path) -> None:
    compare(Astar(), "grpo,spo", "tokens=110", "0", train={"num_steps": 4, "batch_size": 2})
    assert tree_of(tmp_path)["ended_by_num_steps"] == ["spo-0"]
    assert (
        "Ended by train.num_steps before the budget was reached: spo-0."
        in (tmp_path / "out" / "compare.md").read_text()
    )


def test_the_csv_has_a_line_a_step_with_stage_1_counted(compare: Any, tmp_path: Path) -> None:
    compare(Astar(), "astar,grpo", seeds="0,1")
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert len(rows) == 2 * 6 + 2 * 3
    first = rows[0]
    assert (first["method"], first["seed"], first["step"]) == ("astar", "0", "0")
    assert (first["spent_tokens"], first["spent_seconds"]) == (str(STAGE_1_TOKENS + 10), str(STAGE_1_SECONDS + 1.0))
    grpo = [row for row in rows if row["method"] == "grpo"]
    assert [row["spent_tokens"] for row in grpo] == ["40", "80", "120"] * 2
    assert [row["spent_tokens_before"] for row in grpo] == ["0", "40", "80"] * 2
    assert (first["spent_tokens_before"], first["spent_seconds_before"]) == (str(STAGE_1_TOKENS), str(STAGE_1_SECONDS))


def test_the_final_score_is_the_mean_of_the_sets_of_the_last_evaluation(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in (0, 1):
        tracker.log(line(step) | ({} if step else {"eval": {"a": {"greedy": 0.1}}}))
    scores.write(tmp_path, 2, [samples.evaluation(0.5, "a"), samples.evaluation(1.0, "b")])
    scores.write(tmp_path, 1, [samples.evaluation(0.0, "a")])
    stage_1 = Stage1Cost(tokens=100, flops=1e10, seconds=None)
    result = comparison.result_of(Run("astar", 0), tmp_path, stage_1)
    assert (result.scores, result.score) == ({"a": 0.5, "b": 1.0}, 0.75)
    assert result.steps[0].scores == {"a": 0.1} and result.steps[1].scores == {}
    assert result.spent == Cost(tokens=120, flops=1e10 + 2 * 1.25e9, seconds=2.0)


@pytest.mark.parametrize("key", ["reward_mean", "truncated", "peak_memory_bytes"])
def test_a_finished_run_whose_metrics_lack_a_number_is_named_with_a_remedy(key: str, tmp_path: Path) -> None:
    Tracker(tmp_path).log(line(0) | {key: None})
    with pytest.raises(ValueError, match=f"metrics of a finished run without {key}; remove the folder"):
        comparison.result_of(Run("astar", 0), tmp_path, None)


def test_a_band_has_mean_least_and_most_and_no_point_beyond_the_end_of_any_run() -> None:
    curves = [([0.0, 10.0], [0.0, 1.0]), ([2.0, 4.0, 6.0], [1.0, 1.0, 0.5])]
    x, mean, least, most = band(curves)
    assert x[0] == 2.0 and x[-1] == 6.0
    by_hand = np.stack([x / 10, np.where(x < 4, 1.0, 1 - (x - 4) / 4)])
    assert mean == pytest.approx(by_hand.mean(0))
    assert least == pytest.approx(by_hand.min(0)) and most == pytest.approx(by_hand.max(0))
    assert (least <= mean).all() and (mean <= most).all() and (least < most).any()
    assert band([([0.0, 1.0], [0.0, 1.0]), ([2.0, 3.0], [0.0, 1.0])]).shape == (4, 0)
    assert band([([3.0], [0.5])]).tolist() == [[3.0], [0.5], [0.5], [0.5]]


# --- the real process


def test_a_command_runs_in_a_process_whose_last_line_tells_its_error(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    status = astar("train", tmp_path / "nowhere.json", log)
    assert status == 2
    assert CommandEnd(status=status, log=log).error.startswith(
        f"astar: {tmp_path}/nowhere.json: no such configuration file"
    )
    assert last_line(tmp_path / "none") == ""
    log.write_text("x" * 20_000 + "\nlast\n \n")
    assert last_line(log) == "last"


def test_what_a_run_is_at_is_the_last_line_of_its_log_that_is_no_row_of_a_table(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_heading(log) == ""
    log.write_text("step 3\nevaluation after 4 steps:\n  problems: 52\n  reward: last_number\n\n")
    assert last_heading(log) == "evaluation after 4 steps:"
