"""A batch that spoiled a step: whole on disk, and readable without this program."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import samples
import torch
from safetensors.torch import load_file

from astar_megatron.data import bad_batches
from astar_megatron.data.files import StorageError
from astar_megatron.types import Prompt, Rollout, RolloutBatch, StepStats

OPTIONS = {"sampling.temperature": 0.8}


def _rollout(index: int) -> Rollout:
    prompt = Prompt(uid=f"uid{index}", token_ids=(1, 2, 3)[: index + 1], text=f"What is {index}?", answer="ü")
    return samples.rollout(prompt, token_ids=(7, 2), text="so", token_logprobs=(-3.0, -0.5), last_version=4)


def _case(logprobs: tuple[float, ...] = (math.nan, -2.0)) -> tuple[list[Rollout], RolloutBatch, StepStats]:
    rollouts = [_rollout(0), _rollout(1)]
    batch = RolloutBatch(
        token_ids=tuple(rollout.prompt.token_ids + rollout.token_ids for rollout in rollouts),
        prompt_tokens=tuple(len(rollout.prompt.token_ids) for rollout in rollouts),
        columns={
            "reward": torch.tensor([1.0, 0.0], dtype=torch.float64),
            "v_star": torch.tensor([math.nan, 0.5], dtype=torch.float64),
        },
        token_columns={"rollout_token_logprob": torch.tensor([-3.0, -0.5, -1.0, -2.5])},
        version=4,
    )
    stats = dataclasses.replace(
        samples.STATS,
        loss=math.nan,
        grad_norm=math.nan,
        grad_norms=(math.nan, 3.0),
        skipped=(0,),
        logprobs=logprobs,
        reference_logprobs=(-1.0, -2.5),
        losses=(math.nan, 0.25),
    )
    return rollouts, batch, stats


def test_what_was_written_is_read_back_and_replaced_by_a_second_try(tmp_path: Path) -> None:
    for logprobs in ((0.0, 0.0), (math.nan, -2.0)):
        folder = bad_batches.write(tmp_path, *_case(logprobs), OPTIONS)
    assert folder == tmp_path / "bad_batches" / "step_00000004"
    assert [path.name for path in folder.parent.iterdir()] == ["step_00000004"]
    assert samples.unlike_the_umask(folder) == []
    tensors = load_file(folder / "batch.safetensors")
    assert tensors["token_ids"].split(tensors["lengths"].tolist())[1].tolist() == [1, 2, 7, 2]
    assert tensors["prompt_tokens"].tolist() == [1, 2]
    assert tensors["v_star"].isnan().tolist() == tensors["logprob"].isnan().tolist() == [True, False]
    assert tensors["rollout_token_logprob"].tolist() == [-3.0, -0.5, -1.0, -2.5]
    words = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
    assert (words["version"], words["skipped_mini_batches"]) == (4, [0])
    assert words["options"]["sampling.temperature"] == 0.8
    assert [sequence["logprob"] for sequence in words["sequences"]] == ["nan", "-2.0"]
    assert [sequence["loss"] for sequence in words["sequences"]] == ["nan", "0.25"]
    assert words["grad_norms"] == ["nan", "3.0"]
    assert (words["sequences"][1]["uid"], words["sequences"][1]["answer"]) == ("uid1", "ü")


def test_batches_of_steps_that_are_taken_again_are_set_aside(tmp_path: Path) -> None:
    for _ in range(2):
        folder = bad_batches.write(tmp_path, *_case(), OPTIONS)
        bad_batches.set_aside(tmp_path, 5)
        assert folder.is_dir()
        bad_batches.set_aside(tmp_path, 4)
        assert [path.name for path in folder.parent.iterdir()] == ["step_00000004.undone"]
    bad_batches.set_aside(tmp_path / "none", 0)


def test_a_run_dir_that_is_no_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="bad_batches"):
        bad_batches.write(tmp_path / "file", *_case(), OPTIONS)
