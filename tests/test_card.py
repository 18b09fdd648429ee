"""The model card of an export: what it says, what it never says, and whose card it does not touch."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import samples
from exports import write_export
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from astar_megatron import config
from astar_megatron.exports import card
from astar_megatron.exports.provenance import Training
from astar_megatron.run import scores
from astar_megatron.run.scores import Estimate, Evaluation
from conversion import folders
from conversion.folders import ModelFolderError

SECRET = "planted-secret-of-a-variable"


def evaluation(mean: float, name: str = "gsm8k") -> Evaluation:
    estimate = Estimate(mean, 0.0125)
    return Evaluation(
        name=name,
        reward="gsm8k_strict",
        prompts=1319,
        num_samples=4,
        greedy=estimate,
        sampled={"avg@4": estimate, "pass@4": Estimate(1.0, float("nan"))},
        truncated=0.25,
        formatted=None,
    )


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Of a run whose folders have telling names."""
    base = tmp_path / "private" / "tiny-base"
    base.mkdir(parents=True)
    tree = samples.run_tree(
        run_dir=str(tmp_path / "run"),
        model={"path": str(base)},
        data={"path": str(tmp_path / "private/mine.jsonl"), "suffix": " a | b, and/or\n"},
        optim={"lr": 3e-6},
        grpo={"group_size": 4},
        slurm={"account": "hush"},
    )
    return config.flat(config.validate(tree))


@pytest.fixture
def export(tied_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "hf"
    write_export(folder, load_file(tied_llama / "model.safetensors"), tied_llama)
    return folder


def text(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_evaluations_come_back_from_their_files(tmp_path: Path) -> None:
    both = [evaluation(0.5), evaluation(0.25, "prompts")]
    for name, weights in (("eval_step_00000000", None), ("eval_step_00000005", None), ("eval", "abc")):
        scores.write(tmp_path, name, both, weights)
    (tmp_path / "eval_step_00000009.json").write_text("{")  # of later steps, which are not asked for
    first, last = scores.scores_of(tmp_path, 7, None)
    assert (first.step, last.step) == (0, 5)
    assert repr(first.evaluations) == repr(both)  # NaN is not equal to itself
    assert [each.step for each in scores.scores_of(tmp_path, 7, "abc")] == [0, 5, 7]
    with pytest.raises(ValueError, match=r"eval_step_00000009.json: no scores of an evaluation: .*; remove it"):
        scores.scores_of(tmp_path, 9, None)
    scores.forget(tmp_path, 5)  # a run that begins anew at step 5
    assert [each.step for each in scores.scores_of(tmp_path, 9, None)] == [0]


def test_a_card_says_what_is_known_and_the_library_reads_it(export: Path, settings: dict[str, Any]) -> None:
    run_dir = export.parent
    lines = [{"step": n, "spent_tokens": 100 * (n + 1), "model_flops": 2e9, "generation_flops": 1e9} for n in range(6)]
    samples.write_jsonl(run_dir / "metrics.jsonl", lines)
    scores.write(run_dir, "eval_step_00000000", [evaluation(0.25)], None)
    card.write(export, Training.of_run(settings, 5, run_dir), run_dir)
    assert "None are recorded of these weights, those after 5 steps." in text(export)
    assert "model-index" not in ModelCard.load(export / "README.md").data.to_dict()
    scores.write(run_dir, "eval", [evaluation(0.5)], scores.weights_digest(folders.read_record(export)))
    card.write(export, Training.of_folder(export), run_dir)  # as `astar eval` and `astar export` do
    data: Any = ModelCard.load(export / "README.md").data
    assert (data.base_model, data.pipeline_tag, data.library_name) == (None, "text-generation", "transformers")
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_value) == ("gsm8k", 50.0)
    words = text(export)
    assert "After 0 steps:" in words and "After 5 steps (these weights):" in words and "50.00 ± 1.25" in words
    assert "[arXiv 2505.20686](https://arxiv.org/abs/2505.20686)" in words and "nobody has compared" in words
    assert "500 response tokens" in words and "1.5e+10 FLOPs" in words
    assert "| `optim.lr` | `3e-06` |" in words and r'`" a \| b, and/or\n"`' in words
    assert "grpo" not in words and "batch_size" not in words  # another method's keys, and defaults


def test_no_path_secret_or_account_goes_into_a_card(
    export: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    settings |= {"data.suffix": f" {SECRET}", "of.a.later.version": [str(tmp_path), "~/x"]}
    card.write(export, Training.of_run(settings, 5, None), None)
    for words in (text(export), (export / "conversion.json").read_text()):
        assert "mine.jsonl" in words and "<MY_API_KEY>" in words
        assert not [part for part in (str(tmp_path), "private", SECRET, "hush", "~") if part in words]


def test_a_slash_in_the_prompts_suffix_makes_it_no_path(export: Path, settings: dict[str, Any]) -> None:
    card.write(export, Training.of_run(settings | {"data.suffix": "/no_think"}, 5, None), None)
    assert '| `data.suffix` | `"/no_think"` |' in text(export)


@pytest.mark.parametrize(
    ("folder", "name"), [("models--Org--Base-1B/snapshots/0a1b", "Org/Base-1B"), ("a b", None), ("x/..", None)]
)
def test_the_base_is_named_as_the_hub_names_it(
    settings: dict[str, Any], tmp_path: Path, folder: str, name: str | None
) -> None:
    path = tmp_path / "base" / folder
    (tmp_path / "base" / "x").mkdir(parents=True)
    training = Training.of_run(settings | {"model.path": str(path)}, 0, None)
    assert ModelCard(card.text_of({}, training, [])).data.to_dict().get("base_model") == name


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: other\nlicense_name: own\nlicense_link: https://x.org/l", {"license": "other"}),
        ("license: mit\nlicense_link: LICENSE", {"license": "mit"}),
        ("license: [1", {}),
        ("license: {a: b}", {}),
        ("- a", {}),
        ("model-index:\n- name: a\n  results: 5\nlicense: mit", {"license": "mit"}),
        ("\x00", {}),
    ],
)
def test_the_licence_of_the_base_goes_on_and_its_text_does_not(
    settings: dict[str, Any], tmp_path: Path, front: str, expected: dict[str, str]
) -> None:
    base = Path(settings["model.path"])
    (base / "README.md").write_text(f"---\n{front}\n---\n# The base's own words\n")
    words = card.text_of({}, Training.of_run(settings, 3, None), [])
    data = ModelCard(words).data.to_dict()
    assert "own words" not in words and data.items() >= expected.items() and ("license" in data) == bool(expected)
    assert data.get("license_link") in (None, "https://x.org/l")
    assert (base / "README.md").read_text().endswith("own words\n")


def test_a_card_that_somebody_changed_is_neither_overwritten_nor_replaced(
    export: Path, settings: dict[str, Any], tied_llama: Path
) -> None:
    training = Training.of_run(settings, 5, None)
    for _ in range(2):  # its own it writes anew
        assert "describes the model" in card.write(export, training, None)
        folders.check_destination(export)
    changed = text(export).replace("# tiny-base", "# My model")
    (export / "README.md").write_text(changed)
    assert "was changed by hand and is left as it is" in card.write(export, dataclasses.replace(training, step=6), None)
    assert text(export) == changed and folders.read_record(export)["training"]["step"] == 6  # type: ignore[index]
    with pytest.raises(
        ModelFolderError, match=r"holds files that no export has: README\.md \(README\.md was changed by"
    ):
        write_export(export, load_file(tied_llama / "model.safetensors"), tied_llama)
    assert text(export) == changed


def test_a_folder_without_a_run_gets_the_card_that_can_be_written(export: Path) -> None:
    card.write(export, Training.of_folder(export), None)
    assert "# A conversion of " in text(export) and "## Certificate" in text(export)
    assert "base_model" not in ModelCard.load(export / "README.md").data.to_dict()


def test_words_of_an_error_stay_out_of_a_card() -> None:
    words = card.text_of({"logprobs": {"max_difference": None, "reason": "not compared, OSError: /a/b"}}, None, [])
    assert "not compared, OSError." in words and "/a/b" not in words
