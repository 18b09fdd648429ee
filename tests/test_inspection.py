"""`astar sweep --inspect`: what it says of a table, without a model, Ray or vLLM."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
from sweep_jobs import CONTRACT, PROMPTS, answer

from astar_megatron.data.contract import contract_of
from astar_megatron.data.v_star import MissingTableError, TableError, VStarTable
from astar_megatron.inspection import _histogram, main


def shown_of(folder: Path, capsys: pytest.CaptureFixture[str], **sections: Any) -> str:
    """What `--inspect` prints of the table in `folder`, as one line."""
    main(samples.run_config(run_dir=str(folder), **sections))
    return " ".join(capsys.readouterr().out.split())


def fill(folder: Path, values: tuple[float, ...]) -> None:
    table = VStarTable.create_or_open(folder, CONTRACT)
    drawn = random.Random(0)
    table.append(
        [
            dataclasses.replace(answer(prompt, n, n), reward=drawn.choice(values))
            for prompt in PROMPTS[:40]
            for n in range(4 + 4 * (prompt is PROMPTS[7]))
        ]
    )


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.1, 1.0), (0.3,)], ids=str)
def test_inspect_shows_shares_quantiles_and_tokens_and_draws(
    tmp_path: Path, values: tuple[float, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "v_star", values)
    shown = shown_of(tmp_path, capsys)
    summary = VStarTable.open(tmp_path / "v_star", None).summary()
    assert "samples a prompt: 4: 39 prompts, 8: 1 prompts" in shown
    assert f"{summary.all_wrong:.1%} / {summary.all_right:.1%} of the prompts" in shown
    assert f"response tokens: {summary.response_tokens}, " in shown
    assert "width of the 95 % interval: " in shown and "nan" not in shown
    assert (tmp_path / "v_star.png").stat().st_size > 5000


def test_inspect_leaves_a_shard_as_it_is_whose_name_or_content_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        fill(tmp_path / "v_star", (0.0, 1.0))
    first, second = sorted((tmp_path / "v_star").glob("shard-*"))
    first = first.rename(first.with_stem(f"{first.stem} (1)"))
    before = sorted((tmp_path / "v_star").iterdir())
    assert "samples: 164 " in shown_of(tmp_path, capsys)
    assert f"{first}: damaged shard, its rows count as missing" in caplog.text and second.name not in caplog.text
    assert sorted((tmp_path / "v_star").iterdir()) == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("counts", "words"), [((1, 1), "unknown: it takes more"), ((1, 3), "(of 1 prompts; the others have one sample)")]
)
def test_prompts_with_one_sample_show_no_nan(
    tmp_path: Path, counts: tuple[int, int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dataclasses.replace(answer(PROMPTS[i], n, n), reward=0.1 + i / 2) for i in (0, 1) for n in range(counts[i])]
    VStarTable.create_or_open(tmp_path / "v_star", CONTRACT).append(rows)
    shown = shown_of(tmp_path, capsys)
    assert words in shown and "nan" not in shown and "inf" not in shown


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"num_samples": 8}, "V* is shown of all these samples made under"),
        ({"num_samples": 4}, "training with this configuration takes the first 4 of a prompt (sweep.num_samples) made"),
        ({"num_samples": 4, "extra_tokens": 9}, "(sweep.num_samples), and as many more as sweep.extra_tokens=9 bought"),
    ],
)
def test_inspect_says_of_which_samples_its_v_star_is_and_training_s(
    tmp_path: Path, sweep: dict[str, int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "v_star", (0.0, 1.0))
    assert words in shown_of(tmp_path, capsys, sweep=sweep)


@pytest.mark.parametrize(
    ("mean", "ends", "counts"),
    [
        ([0.0, 0.0, 0.05, 0.1, 0.999, 1.0, 0.55], ("0 or less", "1 or more"), [2, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1]),
        ([-1.0, -0.95, -0.5, 0.0, 0.5, 1.0], ("-1 or less", "1 or more"), [1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1]),
        ([-0.7, 1.5], ("-1 or less", "2 or more"), [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]),
    ],
)
def test_every_prompt_is_in_one_bar_and_the_bars_reach_the_least_and_largest_reward(
    mean: list[float], ends: tuple[str, str], counts: list[int]
) -> None:
    names, bars = zip(*_histogram(np.array(mean)), strict=True)
    assert (names[0], names[-1]) == ends and len(set(names)) == 12
    assert [int(bar.split()[0]) for bar in bars] == counts


def test_a_table_without_rows_or_none_at_all_is_a_clear_error(tmp_path: Path) -> None:
    cfg = samples.run_config(run_dir=str(tmp_path))
    with pytest.raises(MissingTableError, match="run `astar sweep`"):
        main(cfg)
    VStarTable.create_or_open(tmp_path / "v_star", CONTRACT)
    with pytest.raises(TableError, match="no rows yet"):
        main(cfg)


def test_it_says_what_the_table_was_made_under_and_whether_this_run_could_use_it(
    tmp_path: Path, tied_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"path": str(tied_llama)}
    contract = contract_of(samples.run_config(model=model))
    rows = [dataclasses.replace(answer(PROMPTS[0], n, n), reward=1.0) for n in range(2)]
    table = VStarTable.create_or_open(tmp_path / "v_star", dataclasses.replace(contract, temperature=0.5))
    table.append(rows)
    shown = shown_of(tmp_path, capsys, model=model)
    assert "temperature: 0.5" in shown and f"reward: {contract.reward}" in shown
    assert "this run can't use it: temperature: this run has 1.0, the table 0.5" in shown
    shutil.rmtree(tmp_path / "v_star")
    VStarTable.create_or_open(tmp_path / "v_star", contract).append(rows)
    assert "this run's contract is the same" in shown_of(tmp_path, capsys, model=model)


def test_inspect_runs_on_a_machine_without_ray_vllm_megatron_and_transformers(tmp_path: Path) -> None:
    fill(tmp_path / "v_star", (0.0, 1.0))
    (tmp_path / "run.yaml").write_text(str(samples.run_tree(run_dir=str(tmp_path))))
    program = (
        "import runpy, sys\n"
        "for name in ('ray', 'vllm', 'megatron', 'transformers'): sys.modules[name] = None\n"
        f"sys.argv = ['astar', 'sweep', '--inspect', '--config', {str(tmp_path / 'run.yaml')!r}]\n"
        "runpy.run_module('astar_megatron.cli', run_name='__main__')\n"
    )
    shown = samples.output_of(program, PYTHONPATH=str(Path(__file__).parents[1]))
    assert "prompts by mean reward" in shown
    assert "not compared with this run's contract: " in shown
