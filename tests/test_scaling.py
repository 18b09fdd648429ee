"""`astar scale run` with an `astar` made by hand: cells, budgets, stage 1, resuming, failures, results."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples
import test_compare
import yaml
from test_compare import STAGE_1_TOKENS, TOKENS

from astar_megatron import config
from astar_megatron.config import RunConfig
from astar_megatron.data.contract import contract_of
from astar_megatron.data.v_star import VStarTable
from astar_megatron.run import prepare, scores
from astar_megatron.run.tracking import read_metrics
from astar_megatron.scaling import run
from astar_megatron.studies.score_curves import read_curves
from astar_megatron.studies.study import read_study
from astar_megatron.types import Prompt

type Study = Callable[..., int]

GRID = {"objective.name": ["astar", "grpo"], "optim.lr": [1e-6, 1e-5]}
CELLS = ["name=astar,lr=1e-06", "name=astar,lr=1e-05", "name=grpo,lr=1e-06", "name=grpo,lr=1e-05"]


class Astar(test_compare.Astar):
    """Sweeps and trains without a model, and draws the samples that a configuration asks for."""

    def sweep(self, cfg: RunConfig) -> int:
        table = VStarTable.create_or_open(cfg.table_dir, contract_of(cfg))
        missing = table.missing(test_compare.read_prompts(cfg.data, cfg.model.path), cfg.sweep.num_samples)
        table.append([samples.rollout(prompt, sample=i, seed=cfg.seed, token_ids=(5,) * 5) for prompt, i in missing])
        self.drawn = len(missing)
        return 0


@pytest.fixture
def base(tmp_path: Path, tied_llama: Path) -> dict[str, Any]:
    for name, numbers in (("prompts", (1, 2)), ("held_out", (7, 8, 9))):
        rows = [{"question": f"What is 1 + {n}?", "answer": str(1 + n)} for n in numbers]
        samples.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tied_llama)},
        "data": {
            "path": str(tmp_path / "prompts.jsonl"),
            "eval_path": str(tmp_path / "held_out.jsonl"),
            "max_prompt_tokens": 30,
        },
        "reward": {"name": "last_number"},
        "sampling": {"max_response_tokens": 8},
        "sweep": {"num_samples": 4},
        "train": {"num_steps": 50, "batch_size": 2},
        "grpo": {"group_size": 2},
    }


@pytest.fixture
def study(base: dict[str, Any], tmp_path: Path) -> Study:
    def start(runner: Any, **changes: Any) -> int:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
        tree = {
            "config": str(tmp_path / "base.yaml"),
            "grid": [GRID],
            "budgets": ["tokens=60", "tokens=120"],
            "seeds": [0, 1],
            "out": str(tmp_path / "out"),
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False))
        return run(tmp_path / "study.yaml", runner)

    return start


def tree_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "scale.json").read_text())


def rows_of(tmp_path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((tmp_path / "out" / "scale.csv").open()))


# --- what is run


def test_every_cell_runs_with_every_seed_and_differs_by_its_own_keys_alone(study: Study, tmp_path: Path) -> None:
    assert study(Astar()) == 0
    assert list(tree_of(tmp_path)["cells"]) == CELLS
    flat = {}
    for cell in CELLS:
        for seed in (0, 1):
            flat[cell, seed] = config.flat(config.load(tmp_path / "out" / f"{cell}-{seed}" / "run.json"))
    first = flat[CELLS[0], 0]
    differing = {key for values in flat.values() for key in values if values[key] != first[key]}
    assert differing == {"objective.name", "optim.lr", "seed", "run_dir", "budget.tokens"}
    assert first["optim.lr"] == 1e-6 and flat[CELLS[3], 1]["objective.name"] == "grpo"


def test_a_run_is_evaluated_where_it_reaches_each_budget_with_stage_1_counted(study: Study, tmp_path: Path) -> None:
    study(Astar())
    for cell, runs in tree_of(tmp_path)["cells"].items():
        method = cell.removeprefix("name=").partition(",")[0]
        before = STAGE_1_TOKENS if method == "astar" else 0
        for result in runs["runs"].values():
            spent = [score["spent"]["tokens"] for score in result["scores"]]
            assert spent == [before + steps * TOKENS[method] for steps in ((2, 8) if before else (2, 3))]
            assert [limit <= tokens < limit + TOKENS[method] for limit, tokens in zip((60, 120), spent, strict=True)]
            assert result["spent"]["tokens"] == spent[-1]
        assert (runs["stage_1"] or {}).get("tokens", 0) == before


def test_all_cells_of_a_model_share_a_table_and_pay_for_what_they_read_of_it(study: Study, tmp_path: Path) -> None:
    runner = Astar()
    grid = [{"sweep.num_samples": [2, 4], "astar.beta1": [0.25, 0.5]}]
    assert study(runner, grid=grid, seeds=[0]) == 0
    assert [name for name, _ in runner.calls].count("sweep") == 2 and runner.drawn == 2 * 2  # 2 more of 2 prompts
    tables = list((tmp_path / "out" / "tables").iterdir())
    assert len(tables) == 1 and VStarTable.open(tables[0], None).summary().samples == 2 * 4
    cells = tree_of(tmp_path)["cells"]
    assert {name: cell["stage_1"]["tokens"] for name, cell in cells.items()} == {
        "num_samples=2,beta1=0.25": 20,
        "num_samples=2,beta1=0.5": 20,
        "num_samples=4,beta1=0.25": 40,
        "num_samples=4,beta1=0.5": 40,
    }


def test_cells_of_the_same_problems_read_them_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def read_prompts(cfg: config.DataConfig, model_path: str, *path: str) -> list[Prompt]:
        read.append(Path(*path or (str(cfg.path),)).name)
        return test_compare.read_prompts(cfg, model_path, *path)

    monkeypatch.setattr(prepare, "read_prompts", read_prompts)
    study(Astar(), seeds=[0], grid=[GRID, {"data.suffix": [" Think."]}])
    assert read == ["prompts.jsonl", "held_out.jsonl"] * 2


def test_what_else_a_table_depends_on_gets_a_table_of_its_own(study: Study, tmp_path: Path) -> None:
    study(Astar(), grid=[{"sampling.temperature": [0.5, 1.0]}], seeds=[0])
    assert len(list((tmp_path / "out" / "tables").iterdir())) == 2


def test_several_grids_are_joined_and_a_cell_of_both_runs_once(study: Study, tmp_path: Path) -> None:
    grids = [{"optim.lr": [1e-6, 1e-5]}, {"optim.lr": [1e-5, 1e-4]}]
    study(Astar(), grid=grids, seeds=[3])
    assert list(tree_of(tmp_path)["cells"]) == ["lr=1e-06", "lr=1e-05", "lr=0.0001"]


def test_a_budget_that_stage_1_alone_uses_up_has_the_score_before_training(study: Study, tmp_path: Path) -> None:
    class Evaluates(Astar):
        def train(self, cfg: RunConfig, run_dir: Path, log: Path) -> int:
            scores.write(run_dir, 0, [samples.evaluation(0.125)])
            return super().train(cfg, run_dir, log)

    runner = Evaluates()
    study(runner, budgets=["tokens=30", "tokens=60"], grid=[{"objective.name": ["astar"]}], seeds=[0])
    assert [name for name, _ in runner.calls] == ["sweep", "train"]
    (row,) = [line for line in (tmp_path / "out" / "scale.md").read_text().splitlines() if line.startswith("| name")]
    assert row.startswith("| name=astar | 1 | 0.125 | ")


# --- going on


def test_a_failed_run_is_named_and_alone_is_run_again_from_where_it_was(study: Study, tmp_path: Path) -> None:
    failing = f"{CELLS[0]}-1"
    assert study(Astar(fails=failing, at_step=5)) == 1
    states = {f"{n}-{s}": r["state"] for n, c in tree_of(tmp_path)["cells"].items() for s, r in c["runs"].items()}
    assert [name for name, state in states.items() if state == "failed"] == [failing]
    assert f"- {failing}: astar: the engine has ended" in (tmp_path / "out" / "scale.md").read_text()
    runner = Astar()
    assert study(runner) == 0
    assert runner.calls == [("train", failing)]  # the first budget was reached before
    assert [line["step"] for line in read_metrics(tmp_path / "out" / failing)] == list(range(8))
    assert len(rows_of(tmp_path)) == 4 * (1 + 8) + 4 * (1 + 3)
    assert not list((tmp_path / "out").glob("*/checkpoints"))


def test_a_study_that_ends_between_two_runs_ends_as_a_whole_would(study: Study, tmp_path: Path) -> None:
    class Killed(Astar):
        def __call__(self, name: str, config_file: Path, log: Path) -> int:
            if len(self.calls) == 4:
                raise KeyboardInterrupt
            return super().__call__(name, config_file, log)

    with pytest.raises(KeyboardInterrupt):
        study(Killed())
    study(Astar())
    killed = [(tmp_path / "out" / f"scale.{kind}").read_text() for kind in ("csv", "md", "json")]
    (tmp_path / "out").rename(tmp_path / "killed")
    study(Astar())
    assert [(tmp_path / "out" / f"scale.{kind}").read_text() for kind in ("csv", "md", "json")] == killed


def test_a_study_grows_by_cells_and_seeds_and_runs_nothing_twice(study: Study, tmp_path: Path) -> None:
    study(Astar(), grid=[{"optim.lr": [1e-6]}], seeds=[0])
    runner = Astar()
    assert study(runner, grid=[{"optim.lr": [1e-6, 1e-5]}], seeds=[0, 1]) == 0
    assert {name for _, name in runner.calls} == {"lr=1e-06-1", "lr=1e-05-0", "lr=1e-05-1"}
    nothing = Astar()
    assert study(nothing, grid=[{"optim.lr": [1e-6, 1e-5]}], seeds=[0, 1]) == 0 and nothing.calls == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"set": {"optim.weight_decay": 0.5}}, "optim.weight_decay: 0.01 there, 0.5 now"),
        ({"budgets": ["tokens=60", "tokens=121"]}, "tokens=121"),
        ({"grid": [{"optim.lr": [1e-3]}]}, "lacks lr=1e-06-0, which has finished"),
    ],
)
def test_a_folder_of_another_study_is_refused_by_field(changes: Any, words: str, study: Study, tmp_path: Path) -> None:
    same = {"grid": [{"optim.lr": [1e-6]}], "seeds": [0]}
    study(Astar(), **same)
    before = (tmp_path / "out" / "scale.json").read_text()
    runner = Astar()
    with pytest.raises(ValueError, match=words):
        study(runner, **{**same, **changes})
    assert runner.calls == [] and (tmp_path / "out" / "scale.json").read_text() == before


@pytest.mark.parametrize(
    ("file", "words"), [("prompts.jsonl", r"prompts of data\.path: "), ("held_out.jsonl", "held-out problems: ")]
)
def test_other_prompts_or_held_out_problems_are_another_study(
    file: str, words: str, study: Study, tmp_path: Path
) -> None:
    same = {"grid": [{"optim.lr": [1e-6]}], "seeds": [0]}
    study(Astar(), **same)
    samples.write_jsonl(tmp_path / file, [{"question": f"What is {n} + 5?", "answer": str(n + 5)} for n in (1, 2)])
    with pytest.raises(ValueError, match=words):
        study(Astar(), **same)


# --- refused before anything starts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": []}, "grid: expected one grid or more"),
        ({"grid": [{"optim.lr": []}]}, "grid: optim.lr can't be there, or has no value"),
        ({"grid": [{"seed": [1]}]}, "grid: seed can't be there"),
        ({"grid": [{"budget.tokens": [1]}]}, "grid: budget can't be there"),
        ({"grid": [{"eval": [{"interval": 3}]}]}, r"grid: eval\.interval can't be there"),
        ({"set": {"seed": 7}}, "set: seed can't be there; the study has its own key for it, seeds"),
        ({"set": {"run_dir": "/nowhere"}}, "set: run_dir can't be there; the study has its own key for it, out"),
        ({"grid": [{"optim.rate": [1]}]}, r"cell rate=1: optim\.rate: no such key; the nearest is "),
        ({"grid": [{"optim.lr": [-1.0]}]}, r"cell lr=-1\.0: optim\.lr"),
        ({"grid": [{"data.path": ["b x.jsonl", "b:x.jsonl"]}]}, r"would both be called path=b_x\.jsonl; rename a file"),
        ({"grid": [{"slurm.backend": ["local"]}]}, r"grid: slurm\.backend can't be there"),
        ({"set": {"slurm.backend": "nemo-run"}}, r"slurm\.backend: nemo-run submits one run; for many take sbatch or"),
        ({"budgets": []}, "budgets: expected rising amounts"),
        ({"budgets": ["tokens=9", "tokens=9"]}, "budgets: expected rising amounts"),
        ({"budgets": ["tokens=9", "flops=99"]}, "budgets: expected rising amounts"),
        ({"budgets": ["seconds=9"]}, "budgets: expected tokens=N or flops=N with"),
        ({"budgets": ["flops=-1"]}, "budgets: expected tokens=N or flops=N with"),
        ({"budgets": ["tokens"]}, "budgets: expected tokens=N or flops=N with"),
        ({"seeds": [1, 1]}, "seeds: expected one or more, each once"),
        ({"sedes": [1]}, "sedes: no such key; the nearest is seeds"),
        ({"set": {"budget.tokens": 9}}, "budget: a study takes it from its own key budgets"),
        ({"set": {"data.eval_path": None}}, r"data\.eval_path: a study's scores are of problems that no run trains on"),
    ],
)
def test_what_is_wrong_with_a_study_file_is_said_before_anything_starts(
    changes: Any, words: str, study: Study, tmp_path: Path
) -> None:
    runner = Astar()
    with pytest.raises(ValueError, match=words):
        study(runner, **changes)
    assert runner.calls == [] and not (tmp_path / "out").exists()


def test_a_held_out_problem_that_is_trained_on_is_refused(study: Study, tmp_path: Path) -> None:
    samples.write_jsonl(tmp_path / "held_out.jsonl", [{"question": "What is 1 + 2?", "answer": "3"}])
    with pytest.raises(ValueError, match=r"1 of the 1 problems of prompts are in .*'What is 1 \+ 2\?'"):
        study(Astar())


def test_a_cell_whose_stage_1_costs_the_last_budget_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 1 alone, which astar reads, will cost 8 response tokens or more"):
        study(Astar(), budgets=["tokens=8"])
    assert not (tmp_path / "out").exists()


def test_cells_of_paths_with_one_last_part_are_named_by_more_of_them(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    file = {"config": str(tmp_path / "base.yaml"), "budgets": ["tokens=9"], "out": "out"}

    def names(*paths: str) -> list[str]:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(file | {"grid": [{"data.path": list(paths)}]}))
        return list(read_study(tmp_path / "study.yaml")[0].cells)

    assert names("a/hf", "a/other") == ["path=hf", "path=other"]
    assert names("a/hf", "b/hf") == ["path=a_hf", "path=b_hf"]
    assert names("x/a/hf", "y/a/hf", "z") == ["path=x_a_hf", "path=y_a_hf", "path=z"]


def test_the_study_of_the_examples_is_one(tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[1]
    tree = yaml.safe_load((root / "examples" / "scaling.yaml").read_text())
    tree["set"] |= {"model.path": str(tied_llama)}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree).replace("0.001", "1e-3"))
    monkeypatch.chdir(root)
    example, configs = read_study(tmp_path / "study.yaml")
    assert len(example.cells) == 24 == len(configs)
    assert [budget.amount for budget in example.budgets] == [7e12, 1.4e13, 2.8e13]


# --- results


def test_the_csv_is_what_scale_fit_reads_with_a_curve_a_cell_and_a_run_a_seed(study: Study, tmp_path: Path) -> None:
    study(Astar())
    rows = rows_of(tmp_path)
    assert (rows[0]["steps"], rows[0]["spent_tokens"]) == ("0", str(STAGE_1_TOKENS))
    of_run = [row["reward_mean"] for row in rows if (row["cell"], row["seed"]) == (CELLS[0], rows[0]["seed"])]
    assert all(of_run[:-1]) and not of_run[-1]  # no step begins with the last weights
    assert (rows[0]["objective.name"], rows[0]["optim.lr"]) == ("astar", "1e-06")
    curves = read_curves([str(tmp_path / "out")])
    assert [curve.name for curve in curves] == CELLS and curves[0].compute == "spent_flops"
    assert curves[0].points.run.tolist() == [0, 0, 1, 1]
    assert curves[0].points.score.tolist() == [5 / 32, 5 / 32, 6 / 32, 6 / 32]


def test_the_table_has_means_and_errors_at_each_budget(study: Study, tmp_path: Path) -> None:
    study(Astar(), grid=[{"objective.name": ["grpo"]}])
    row = (tmp_path / "out" / "scale.md").read_text().splitlines()[2]
    assert row == "| name=grpo | 2 | 0.141 ± 0.016 | 0.141 ± 0.016 |"


def test_the_table_says_of_how_many_runs_a_mean_is_where_some_lack_it(study: Study, tmp_path: Path) -> None:
    class Uneven(Astar):
        def train(self, cfg: RunConfig, run_dir: Path, log: Path) -> int:
            ends_early = run_dir.name.endswith("-1")
            train = cfg.train.model_copy(update={"num_steps": 2 if ends_early else cfg.train.num_steps})
            return super().train(cfg.model_copy(update={"train": train}), run_dir, log)

    study(Uneven(), grid=[{"objective.name": ["grpo"]}], seeds=[0, 1, 2])
    row = (tmp_path / "out" / "scale.md").read_text().splitlines()[2]
    assert row == "| name=grpo | 3 | 0.156 ± 0.018 | 0.156 ± 0.031 (2) |"


def test_a_run_that_num_steps_ends_first_is_named(study: Study, tmp_path: Path) -> None:
    study(Astar(), grid=[{"objective.name": ["grpo"]}], seeds=[0], set={"train.num_steps": 2})
    assert "before the last budget was reached: name=grpo-0." in (tmp_path / "out" / "scale.md").read_text()
