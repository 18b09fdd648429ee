"""The model card of an export: what it says, what it never says, and whose card it does not touch."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import samples
from exports import write_export
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from astar_megatron import config, convert
from astar_megatron.exports import card, conversions
from astar_megatron.exports import weights as identity
from astar_megatron.exports.provenance import Training
from astar_megatron.run import scores
from astar_megatron.run.scores import Evaluation
from conversion import folders, rewrite
from conversion.ends import open_end
from conversion.folders import ModelFolderError
from conversion.tiles import ParallelLayout

SECRET = "planted-secret-of-a-variable"


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
    both = [samples.evaluation(0.5), samples.evaluation(0.25, "prompts")]
    for step in (0, 5):
        scores.write(tmp_path, step, both)
    assert (tmp_path / "eval_step_00000005.md").read_text() == scores.markdown(both)
    for each in both:
        scores.keep(tmp_path, "abc", each)
    (tmp_path / "eval_step_00000009.json").write_text("{")  # of later steps, which are not asked for
    first, last = scores.scores_of(tmp_path, 7, None)
    assert (first.step, last.step) == (0, 5)
    assert repr(first.evaluations) == repr(both)  # NaN is not equal to itself
    assert [each.step for each in scores.scores_of(tmp_path, 7, "abc")] == [0, 5, 7]
    with pytest.raises(ValueError, match=r"eval_step_00000009.json: no scores of an evaluation: .*; remove it"):
        scores.scores_of(tmp_path, 9, None)
    for step, ending in ((0, "_gsm8k.jsonl"), (5, ".jsonl"), (5, "_gsm8k.jsonl"), (9, ".md")):
        (tmp_path / f"{scores.name_of_step(step)}{ending}").write_text("")
    scores.forget(tmp_path, 5)  # a run that goes on after step 5, whose weights are those of the checkpoint
    assert [each.step for each in scores.scores_of(tmp_path, 9, None)] == [0, 5]
    assert not list(tmp_path.glob("eval_step_00000009*"))
    scores.forget(tmp_path, 4)
    of_steps = {path.name for path in tmp_path.glob("eval_step_*")}
    assert of_steps == {f"eval_step_00000000{ending}" for ending in (".json", ".md", "_gsm8k.jsonl")}
    assert (repr(scores.of_step(tmp_path, 0)), scores.of_step(tmp_path, 5)) == (repr(both), [])
    scores.forget(tmp_path, 0)  # a run that begins, perhaps with another model
    assert not list(tmp_path.glob("eval_step_*"))


def means(evaluations: list[Evaluation]) -> dict[str, float]:
    return {evaluation.name: evaluation.greedy.mean for evaluation in evaluations}


def test_a_newer_evaluation_replaces_those_of_the_same_set_of_the_same_weights_alone(tmp_path: Path) -> None:
    own, other = 64 * "a", 64 * "b"
    for weights, mean, name in [
        (own, 0.5, "prompts"),
        (own, 0.5, "gsm8k"),
        (other, 0.125, "prompts"),
        (other, 0.125, "gsm8k"),
        (own, 0.75, "gsm8k"),
        (own, 0.75, "math500"),
    ]:
        scores.keep(tmp_path, weights, samples.evaluation(mean, name))
    assert means(scores.kept(tmp_path, own)) == {"prompts": 0.5, "gsm8k": 0.75, "math500": 0.75}
    assert means(scores.kept(tmp_path, other)) == {"prompts": 0.125, "gsm8k": 0.125}
    table = (tmp_path / "eval_aaaaaaaaaaaa.md").read_text()
    assert [line.split()[1] for line in table.splitlines()[2:5]] == ["prompts", "gsm8k", "math500"]
    scores.write(tmp_path, 7, [samples.evaluation(0.25, "prompts"), samples.evaluation(0.25, "amc23")])
    (scored,) = scores.scores_of(tmp_path, 7, own)  # in training too: of the same weights
    assert means(scored.evaluations) == {"prompts": 0.5, "amc23": 0.25, "gsm8k": 0.75, "math500": 0.75}
    (tmp_path / "eval_aaaaaaaaaaaa_gsm8k_1.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval_aaaaaaaaaaaa_gsm8k_1\.json: no scores of an evaluation"):
        scores.kept(tmp_path, own)
    assert means(scores.kept(tmp_path, other)) == {"prompts": 0.125, "gsm8k": 0.125}


def weights_of(folder: Path) -> str:
    return identity.weights_of(folder)[0]


def test_weights_are_known_by_what_is_read_and_by_their_record_where_both_agree(
    tied_llama: Path, export: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tied_llama, tmp_path / "model")
    (folder / "README.md").write_text("of no weight")
    assert weights_of(folder) == weights_of(tied_llama)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-99] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert weights_of(folder) != weights_of(tied_llama)
    record = folders.read_record(export)
    assert identity.weights_of(export) == (scores.weights_digest(record), "")
    shutil.copy(folder / "model.safetensors", export)  # of other weights, beside the record of the old
    changed, reason = identity.weights_of(export)
    assert changed not in (scores.weights_digest(record), weights_of(tied_llama))
    assert reason == "not as recorded in conversion.json: model.norm.weight"


@pytest.mark.parametrize("is_recorded", [True, False])
def test_the_same_weights_that_compute_otherwise_are_another_model(export: Path, is_recorded: bool) -> None:
    known, fields = weights_of(export), json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.5}))
    if not is_recorded:
        (export / folders.RECORD).unlink()
    changed, reason = identity.weights_of(export)
    assert changed != known and ("rms_norm_eps" if is_recorded else "nothing records") in reason


def test_a_card_keeps_its_scores_when_another_set_or_model_is_evaluated(
    export: Path, settings: dict[str, Any], tied_llama: Path
) -> None:
    run_dir = export.parent
    scores.keep(run_dir, weights_of(export), samples.evaluation(0.9438))
    scores.keep(run_dir, weights_of(export), samples.evaluation(0.5, "math500"))
    scores.keep(run_dir, weights_of(tied_llama), samples.evaluation(0.25))
    card.write(export, Training.of_run(settings, 5, run_dir), run_dir)
    results: Any = ModelCard.load(export / "README.md").data
    assert [(each.dataset_name, each.metric_value) for each in results.eval_results] == [
        ("gsm8k", 94.38),
        ("math500", 50.0),
    ]


def test_a_card_says_what_is_known_and_the_library_reads_it(export: Path, settings: dict[str, Any]) -> None:
    run_dir = export.parent
    lines = [{"step": n, "spent_tokens": 100 * (n + 1), "model_flops": 2e9, "generation_flops": 1e9} for n in range(6)]
    samples.write_jsonl(run_dir / "metrics.jsonl", lines)
    scores.write(run_dir, 0, [samples.evaluation(0.25)])
    card.write(export, Training.of_run(settings, 5, run_dir), run_dir)
    assert "None are recorded of these weights, those after 5 steps." in text(export)
    assert "model-index" not in ModelCard.load(export / "README.md").data.to_dict()
    scores.keep(run_dir, weights_of(export), samples.evaluation(0.5))
    card.write(export, Training.of_folder(export), run_dir)  # as `astar eval` and `astar export` do
    data: Any = ModelCard.load(export / "README.md").data
    assert (data.base_model, data.pipeline_tag, data.library_name) == (None, "text-generation", "transformers")
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_value) == ("gsm8k", 50.0)
    words = text(export)
    assert "After 0 steps:" in words and "After 5 steps (these weights):" in words and "50.00 ± 1.25" in words
    assert "[arXiv 2505.20686](https://arxiv.org/abs/2505.20686)" in words and "nobody has compared" in words
    assert "500 response tokens, with those of stage 1 if" in words
    assert "1.5e+10 FLOPs of the model, in training and in generation, without stage 1\n" in words
    assert "| `optim.lr` | `3e-06` |" in words and r'`" a \| b, and/or\n"`' in words
    for key, value in (("astar.beta1", 0.5), ("astar.beta2", 0.001), ("sampling.temperature", 1.0)):
        assert f"| `{key}` | `{json.dumps(value)}` |" in words
    assert "`sweep.num_samples`" in words and "`train.batch_size`" in words
    assert "grpo" not in words and "optim.clip_grad" not in words  # another method's keys, and defaults
    only_groups = Training.of_run(settings | {"objective.name": "oapl"}, 5, run_dir).settings
    assert only_groups["oapl.group_size"] == 8 and not {"sweep.num_samples", "astar.beta1"} & only_groups.keys()
    with_table = settings | {"objective.name": "oapl", "oapl.value": "table"}
    assert "sweep.num_samples" in Training.of_run(with_table, 5, run_dir).settings


def test_no_path_secret_or_account_goes_into_a_card(
    export: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    settings |= {"data.suffix": f" {SECRET}", "of.a.later.version": [str(tmp_path), "~/x"]}
    card.write(export, Training.of_run(settings, 5, None), None)
    for words in (text(export), (export / "conversion.json").read_text()):
        assert "mine.jsonl" in words and "<MY_API_KEY>" in words
        assert not [part for part in (str(tmp_path), "private", SECRET, "hush", "~") if part in words]


def test_a_card_says_which_settings_were_others_until_when(export: Path, settings: dict[str, Any]) -> None:
    before = {"optim.lr": 1e-6, "run_dir": "/somewhere", "data.path": "/data/of/me/first.jsonl", "grpo.group_size": 8}
    earlier = [{"until": 3, "settings": before}, {"until": 4, "settings": {"run_dir": "/else"}}]
    training = Training.of_run(settings | {"optim.lr": 1e-4}, 5, None, earlier)
    card.write(export, training, None)
    told = (export / folders.CARD).read_text()
    first, second = told.index("| `optim.lr` | `0.0001` |"), told.index("| `optim.lr` | `1e-06` |")
    assert first < told.index("Until step 3 others:") < second < told.index('| `data.path` | `"first.jsonl"` |')
    assert not any(word in told for word in ("/somewhere", "/data/of/me", "Until step 4", "grpo.group_size"))
    assert Training.of_folder(export) == training


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


def test_only_the_card_of_a_run_s_export_promises_scores(export: Path, settings: dict[str, Any]) -> None:
    training, run_dir = Training.of_run(settings, 5, None), export.parent
    assert card.write(export, training, run_dir).endswith("; `astar eval` adds scores")
    elsewhere = export.rename(run_dir / "elsewhere")
    assert card.write(elsewhere, training, run_dir).endswith("describes the model")


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


def test_what_is_known_of_a_model_goes_through_every_conversion(
    export: Path, settings: dict[str, Any], tied_llama: Path, tmp_path: Path
) -> None:
    (export / "README.md").write_text("---\nlicense: mit\n---\n")
    for training in (None, Training.of_run(settings, 5, None)):
        expected = {"licence": {"license": "mit"}} if training is None else {"training": dataclasses.asdict(training)}
        if training is not None:
            card.write(export, training, None)
        convert.to_hf(str(export), str(tmp_path / "hf"), like=None, dry_run=False)
        rewrite.write_megatron(open_end(tied_llama), tmp_path / "megatron", ParallelLayout())
        record: Any = folders.read_record(tmp_path / "megatron")
        folders.write_json(tmp_path / "megatron" / folders.RECORD, record | expected)
        arguments: Any = {"like": None, "dry_run": False}
        convert.to_megatron(str(tmp_path / "megatron"), str(tmp_path / "other"), ParallelLayout(tensor=2), **arguments)
        for name in ("hf", "other"):
            record = folders.read_record(tmp_path / name)
            assert {key: record[key] for key in ("licence", "training") if key in record} == expected
        title = "# A conversion of hf" if training is None else "# tiny-base, trained with"
        assert title in text(tmp_path / "hf")
        assert ModelCard.load(tmp_path / "hf" / "README.md").data.to_dict().get("license") == (
            "mit" if training is None else None
        )


def test_a_card_of_several_conversions_names_what_the_first_was_made_of(
    tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversions, "certify_conversion", lambda *_: "")  # no log-probs: they take seconds
    arguments: Any = {"like": None, "dry_run": False}
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    convert.to_megatron(str(tied_llama), first, ParallelLayout(tensor=2), **arguments)
    convert.to_megatron(first, second, ParallelLayout(), **arguments)
    convert.to_hf(second, third, **arguments)
    assert f"# A conversion of {tied_llama.name}\n" in text(tmp_path / "third")
    records: Any = [folders.read_record(tmp_path / name) for name in ("first", "second", "third")]
    assert [record["source"] for record in records] == [tied_llama.name, "first", "second"]


def test_words_of_an_error_stay_out_of_a_card() -> None:
    words = card.text_of({"logprobs": {"max_difference": None, "reason": "not compared, OSError: /a/b"}}, None, [])
    assert "not compared, OSError." in words and "/a/b" not in words


@pytest.mark.parametrize(
    "change",
    [
        {"step": "7"},
        {"settings": None},
        {"licence": {"license": 5}},
        {"versions": ["torch"]},
        {"flops": "many"},
        {"earlier": [{"until": 3}]},
        {"more": 1},
    ],
)
def test_a_record_that_no_program_here_writes_is_not_told(
    change: dict[str, Any], export: Path, settings: dict[str, Any]
) -> None:
    training = dataclasses.asdict(Training.of_run(settings, 5, None))
    folders.add_to_record(export, {"training": training | change})
    assert Training.of_folder(export) is None


def test_a_record_from_elsewhere_writes_no_markup_and_no_fields_of_the_hub_s(
    export: Path, settings: dict[str, Any]
) -> None:
    words = "x\n\n<img src=https://evil.example/a.png>\n[click](https://evil.example) `<b>` | "
    own = dataclasses.replace(
        Training.of_run(settings, 5, None),
        base=words,
        method=words,
        settings={words: words, "data.path": words, "reward.name": words},
        licence={"license": "mit", "base_model": "meta/other", "library_name": "evil"},
        versions={words: words},
        earlier=[{"until": 3, "settings": {words: words}}],
    )
    folders.add_to_record(export, {"training": dataclasses.asdict(own), "origin": words})
    for training in (Training.of_folder(export), None):
        told = card.text_of(folders.read_record(export) or {}, training, [])
        data = ModelCard(told).data.to_dict()
        assert (data.get("base_model"), data["library_name"]) == (None, "transformers")
        body = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", told.rpartition("---\n")[2].replace(r"\`", ""))
        assert not re.search(r"(?<!\\)[<\[](?!arXiv)", body)
