"""Evaluation: what rollouts say in numbers, files and tables. The engines are a fake that answers from a list."""

import contextlib
import dataclasses
import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples
from exports import write_export
from fake_engines import FakeEngines
from rich.console import Console
from safetensors.torch import load_file, save_file

from astar_megatron import config
from astar_megatron.algorithm import rewards
from astar_megatron.config import RewardConfig, RunConfig
from astar_megatron.data.rows import PromptError
from astar_megatron.evaluate import hugging_face, main
from astar_megatron.exports import card
from astar_megatron.exports.provenance import Training
from astar_megatron.exports.weights import weights_of
from astar_megatron.run import evaluation, scores
from astar_megatron.run.evaluation import evaluate, summary
from astar_megatron.run.prepare import EvalSet, prepare, with_room
from astar_megatron.run.scores import Evaluation, Measure, markdown
from astar_megatron.run.tracking import Tracker
from astar_megatron.types import Prompt, Request, Rollout
from conversion.ends import open_end


def _prompt(number: int, answer: str = "5") -> Prompt:
    return Prompt(uid=f"u{number}", token_ids=(1,), text=f"problem {number}", answer=answer)


def _rollout(prompt: Prompt, text: str, sample: int = 0, reward: float | None = None) -> Rollout:
    truncated = "..." in text
    return samples.rollout(prompt, sample=sample, token_ids=(1,), text=text, truncated=truncated, reward=reward)


def an_eval_set(prompts: list[Prompt], reward: str, count: int) -> EvalSet:
    rule = RewardConfig(name=reward)
    return EvalSet(name="x", source="x.jsonl", prompts=prompts, reward=rule, num_samples=count)


def engines_that(answer: Callable[[Request], str]) -> FakeEngines:
    return FakeEngines(lambda request: (tuple(answer(request).encode()), False))


def test_the_numbers_of_a_set_are_those_of_the_definitions() -> None:
    prompts = [_prompt(0), _prompt(1), _prompt(2)]
    eval_set = an_eval_set(prompts, "math", 4)
    right, wrong, other = r"\boxed{5}", r"\boxed{6}", "no answer..."
    texts = [[right, right, wrong, other], [right, wrong, wrong, other], [other, other, other, other]]
    greedy = [_rollout(prompts[0], right, reward=1.0), _rollout(prompts[1], wrong, reward=0.0)]
    greedy.append(_rollout(prompts[2], other, reward=None))  # it could not be scored: that counts 0
    sampled = [
        _rollout(prompt, text, sample, float(text == right))
        for prompt, row in zip(prompts, texts, strict=True)
        for sample, text in enumerate(row)
    ]
    score = summary(eval_set, samples.MEASURE, greedy, sampled)
    assert (score.prompts, score.num_samples, score.greedy.mean) == (3, 4, pytest.approx(1 / 3))
    assert score.greedy.error == pytest.approx(1 / 3)  # of 1, 0, 0: sqrt((4/9 + 1/9 + 1/9) / 2 / 3)
    means = {name: estimate.mean for name, estimate in score.sampled.items()}
    assert means == {
        "avg@4": pytest.approx((2 / 4 + 1 / 4 + 0) / 3),
        "maj@4": pytest.approx((1 + 0 + 0) / 3),
        "pass@1": pytest.approx((2 / 4 + 1 / 4 + 0) / 3),
        "pass@2": pytest.approx((1 - 1 / 6 + 1 / 2 + 0) / 3),
        "pass@4": pytest.approx(2 / 3),
    }
    assert score.truncated == pytest.approx((1 + 1 + 1 + 4) / 15)
    assert score.formatted == pytest.approx(1 - score.truncated)
    assert score.sampled["avg@4"].error == pytest.approx(math.sqrt((0.25**2 + 0.25**2) / 2 / 3))


@pytest.mark.parametrize(
    ("name", "answer", "texts", "formatted"),
    [
        ("last_number", "7", ["7", "7.0", "$7.00", "5", "5"], 1),
        ("last_number", "1000", ["1,000", "1000", "5"], 1),
        ("gsm8k_strict", "12", ["#### 12", "#### .", "#### .", "#### ,"], 1 / 4),
        ("multiply", "12", ["<answer>12</answer>", "<answer>+12</answer>", *["<answer>abc</answer>"] * 3], 2 / 5),
        ("multiply", "12", ["<answer>12</answer>", "<answer></answer>", "<answer></answer>"], 1 / 3),
        ("math", "5", [r"\boxed{5}", r"\boxed{}", r"\boxed{}"], 1 / 3),
        ("boxed_integer", "25", [r"\boxed{025}", r"\boxed{25.0}", r"\boxed{4}", *[r"\boxed{x}"] * 3], 1 / 2),
        (
            "countdown",
            '{"numbers": [3, 4], "target": 7}',
            ["<answer>3+4</answer>", "<answer>4 + 3</answer>", "<answer>7</answer>", *["<answer>none</answer>"] * 3],
            1 / 2,
        ),
    ],
)
def test_the_vote_is_by_the_value_that_the_reward_compares(
    name: str, answer: str, texts: list[str], formatted: float
) -> None:
    prompt, reward = _prompt(0, answer), rewards.get(name)
    eval_set = an_eval_set([prompt], name, len(texts))
    sampled = [_rollout(prompt, text, i, reward(text, answer)) for i, text in enumerate(texts)]
    score = summary(eval_set, samples.MEASURE, sampled[:1], sampled)
    assert score.sampled[f"maj@{len(texts)}"].mean == 1
    count = len(texts)
    assert score.formatted == pytest.approx((1 + count * formatted) / (count + 1))  # the greedy one too


def test_answers_of_a_reward_of_another_are_not_compared() -> None:
    eval_set = an_eval_set([_prompt(0)], "some.module:f", 2)
    sampled = [_rollout(_prompt(0), "a", sample, 0.5) for sample in range(2)]
    score = summary(eval_set, samples.MEASURE, [_rollout(_prompt(0), "a", reward=0.5)], sampled)
    assert list(score.sampled) == ["avg@2", "pass@1", "pass@2"]
    assert score.formatted is None and math.isnan(score.greedy.error)
    assert "in the asked form" not in markdown([score])


@pytest.fixture
def run(tmp_path: Path, tied_llama: Path) -> Callable[..., RunConfig]:
    """Return a function that gives the configuration of a run with two small benchmarks beside its prompts."""
    files = {
        "amc23.jsonl": [{"problem": f"{i} + {i}?", "answer": 2.0 * i} for i in range(3)],
        "gsm8k_test.jsonl": [{"question": "How many? " * 20, "answer": "thinking\n#### 7"}],
    }
    for name, rows in files.items():
        samples.write_jsonl(tmp_path / name, rows)
    samples.write_jsonl(tmp_path / "prompts.jsonl", [{"question": "1 + 1?", "answer": "2"}])

    def make(**changes: Any) -> RunConfig:
        sections: dict[str, dict[str, Any]] = {
            "model": {"path": str(tied_llama), "dtype": "float32"},
            "data": {"path": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 120},
            "sampling": {"max_response_tokens": 8},
            "eval": {"folder": str(tmp_path)},
        }
        merged = changes | {name: section | changes.get(name, {}) for name, section in sections.items()}
        return samples.run_config(run_dir=str(tmp_path / "run"), **merged)

    return make


def test_benchmarks_are_scored_by_their_own_rule_and_written_to_files(run: Callable[..., RunConfig]) -> None:
    cfg = run(eval={"benchmarks": ["amc23"], "num_samples": 3}, data={"path": "not/there.jsonl"})
    inputs = prepare(cfg, for_training=False)
    tracker = Tracker(cfg.run_dir, Console(quiet=True))
    engines = engines_that(lambda asked: rf"\boxed{{{asked.prompt.answer if asked.greedy or asked.sample else 'no'}}}")
    ((score, responses),) = evaluate(cfg, inputs, engines, tracker, "eval")
    assert (score.name, score.reward, score.greedy.mean) == ("amc23", "boxed_integer", 1.0)
    assert score.sampled["avg@3"].mean == pytest.approx(2 / 3) and score.sampled["maj@3"].mean == 1.0
    requests = [request for _, request in engines.asked]
    assert [request.greedy for request in requests] == [True] * 3 + [False] * 9
    assert len({request.seed for request in requests[3:]}) == 9  # one for each sample of each problem
    rows = [json.loads(line) for line in responses]
    assert [row["sample"] for row in rows] == ["greedy"] * 3 + [0, 1, 2] * 3
    assert [row["answer"] for row in rows[:3]] == ["0", "2", "4"]
    assert rows[3] | {"uid": ""} == {
        "uid": "",
        "prompt": rows[0]["prompt"],
        "answer": "0",
        "sample": 0,
        "response": r"\boxed{no}",
        "extracted": None,
        "reward": 0.0,
        "truncated": False,
    }
    assert "| amc23 | 3 | 100.00 ± 0.00 | 66.67 ± 0.00 | 100.00 ± 0.00 |" in markdown([score])
    assert "| temperature 1, top_p 1, 8 tokens |" in markdown([score])


def test_a_set_is_handed_on_before_the_next_is_asked(run: Callable[..., RunConfig], tmp_path: Path) -> None:
    def answer(asked: Request) -> str:
        if "How many?" in asked.prompt.text:
            raise RuntimeError("the engines are gone")
        return r"\boxed{0}"

    samples.write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"question": "How many?", "answer": "#### 7"}])
    cfg = run(eval={"benchmarks": ["amc23", "gsm8k"], "num_samples": 1})
    tracker = Tracker(cfg.run_dir, Console(quiet=True))
    evaluations = evaluate(cfg, prepare(cfg, for_training=False), engines_that(answer), tracker, "eval")
    evaluation, responses = next(evaluations)
    assert (evaluation.name, len(responses)) == ("amc23", 2 * 3)
    with pytest.raises(RuntimeError, match="the engines are gone"):
        next(evaluations)


def test_tokens_are_not_kept_until_all_problems_are_answered(
    run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Rollout] = []

    def seen(eval_set: EvalSet, measure: Measure, greedy: list[Rollout], sampled: list[Rollout]) -> Evaluation:
        kept.extend([*greedy, *sampled])
        return summary(eval_set, measure, greedy, sampled)

    monkeypatch.setattr(evaluation, "summary", seen)
    cfg = run(eval={"benchmarks": ["amc23"], "num_samples": 2})
    engines = engines_that(lambda asked: "some tokens")
    list(evaluate(cfg, prepare(cfg, for_training=False), engines, Tracker(cfg.run_dir, Console(quiet=True)), "eval"))
    assert len(kept) == 3 * (1 + 2) and not any(rollout.token_ids or rollout.token_logprobs for rollout in kept)
    assert {rollout.text for rollout in kept} == {"some tokens"}


def test_a_problem_is_drawn_with_the_same_seeds_wherever_it_stands(
    run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    drawn = []
    for changed in (lambda rows: rows, lambda rows: rows[:0:-1]):
        samples.write_jsonl(tmp_path / "amc23.jsonl", changed(samples.read_jsonl(tmp_path / "amc23.jsonl")))
        cfg, engines = run(eval={"benchmarks": ["amc23"], "num_samples": 2}), engines_that(lambda asked: "")
        tracker = Tracker(cfg.run_dir, Console(quiet=True))
        list(evaluate(cfg, prepare(cfg, for_training=False), engines, tracker, "eval"))
        drawn.append({(request.prompt.uid, request.sample, request.seed) for _, request in engines.asked})
    assert len(drawn[1]) == 2 * 2 and drawn[1] < drawn[0]


def test_amc23_is_asked_for_32_samples_as_in_the_paper(run: Callable[..., RunConfig]) -> None:
    cfg = with_room(run(eval={"benchmarks": ["amc23", "gsm8k"], "max_prompts": 2}, sampling={"max_response_tokens": 1}))
    with pytest.raises(ValueError, match="exceeds the 160 positions"):  # with room for the long one it is too long
        prepare(cfg, for_training=False)
    cfg = with_room(run(eval={"benchmarks": ["amc23"], "max_prompts": 2}))
    (amc,) = prepare(cfg, for_training=False).eval_sets
    assert (amc.num_samples, len(amc.prompts), amc.reward.name) == (32, 2, "boxed_integer")
    (own,) = prepare(run(eval={"folder": None})).eval_sets
    assert (own.name, own.num_samples, len(own.prompts), own.reward.name) == ("prompts", 0, 1, "last_number")


def test_training_refuses_benchmarks_that_do_not_fit_its_engines(run: Callable[..., RunConfig]) -> None:
    with pytest.raises(PromptError, match=r"1 of 1 prompts of gsm8k exceed data\.max_prompt_tokens = 120; raise it"):
        prepare(run(eval={"benchmarks": ["gsm8k"]}))
    with pytest.raises(PromptError, match="no benchmark 'amc24'; there are gsm8k"):
        prepare(run(eval={"benchmarks": ["amc24"]}))


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that has `astar eval` evaluate engines that give this answer to each problem."""

    def answer(text: str) -> None:
        engines = engines_that(lambda _: text)
        monkeypatch.setattr("astar_megatron.evaluate.engines_of", lambda *_: contextlib.nullcontext(engines))

    return answer


def an_export(cfg: RunConfig) -> Path:
    """The export of a run that has made 12 steps."""
    model = Path(cfg.model.path)
    write_export(cfg.export_dir, load_file(model / "model.safetensors"), model)
    card.write(cfg.export_dir, Training.of_run(config.flat(cfg), 12, None), None)
    return cfg.export_dir


def scores_in_card(export: Path) -> list[str]:
    """The rows of the tables of the export's card: the set, how many problems, the greedy score."""
    lines = (export / "README.md").read_text().splitlines()
    return [" ".join(line.split(" | ")[:3]).strip("| ") for line in lines if line.startswith("| prompts")]


def test_other_weights_beside_a_copy_of_the_record_are_not_taken_for_the_export(
    run: Callable[..., RunConfig], answering: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = run()
    export = an_export(cfg)
    answering("2")
    main(cfg)
    (known,) = scores_in_card(export)
    assert known.endswith(" 100.00")
    averaged = shutil.copytree(export, tmp_path / "averaged")
    weights = {name: 0 * tensor for name, tensor in load_file(averaged / "model.safetensors").items()}
    save_file(weights, averaged / "model.safetensors", metadata={"format": "pt"})
    answering("3")
    main(cfg, str(averaged))
    words = " ".join(capsys.readouterr().out.split())
    assert "not as recorded in conversion.json: model.embed_tokens.weight" in words
    assert scores_in_card(export) == [known] and len(list(Path(cfg.run_dir).glob("eval_*.json"))) == 2
    true = export.rename(tmp_path / "true")
    averaged.rename(export)  # changed in its place
    (export / "README.md").unlink()
    for model in (None, str(true)):
        main(cfg, model)
        assert not (export / "README.md").exists()


def test_another_measurement_of_the_same_weights_replaces_none_and_is_named_in_the_card(
    run: Callable[..., RunConfig], answering: Callable[[str], None], tmp_path: Path
) -> None:
    export = an_export(run())
    easy = str(samples.write_jsonl(tmp_path / "easy.jsonl", [{"question": f"{i} + 1?", "answer": "3"} for i in (1, 2)]))
    for text, changes in [
        ("2", {}),
        ("3", {"data": {"eval_path": easy}}),
        ("3", {"eval": {"num_samples": 2}}),
        ("3", {"eval": {"num_samples": 2}, "sampling": {"temperature": 0.5}}),
        ("2", {"eval": {"num_samples": 2}, "sampling": {"temperature": 0.5}}),  # measured again: it replaces
    ]:
        answering(text)
        main(run(**changes))
    greedy = sorted(scores_in_card(export))
    assert [row for row in greedy if "prompts.jsonl" in row] == [
        *["prompts of prompts.jsonl 1 0.00"],
        *["prompts of prompts.jsonl 1 100.00"] * 2,
    ]
    assert [row for row in greedy if "easy.jsonl" in row] == ["prompts of easy.jsonl 2 100.00 ± 0.00"]
    assert str(tmp_path) not in (export / "README.md").read_text()
    kept = scores.kept(Path(run().run_dir), weights_of(export)[0])
    measures = [(each.num_samples, each.measure.problems, each.measure.temperature) for each in kept]
    own = str(tmp_path / "prompts.jsonl")
    assert sorted(measures) == sorted([(0, own, 1.0), (0, easy, 1.0), (2, own, 1.0), (2, own, 0.5)])
    for file in Path(run().run_dir).glob("eval_*.json"):
        assert len(samples.read_jsonl(file.with_suffix(".jsonl"))) in (1, 2, 3)


def test_what_is_measured_is_known_by_its_problems_and_not_by_where_they_lie(
    run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def key(**changes: Any) -> str:
        cfg, engines = run(**changes), engines_that(lambda _: "2")
        tracker = Tracker(cfg.run_dir, Console(quiet=True))
        ((evaluation, _),) = evaluate(cfg, prepare(cfg, for_training=False), engines, tracker, "eval")
        assert Evaluation.of(dataclasses.asdict(evaluation)).key == evaluation.key
        return evaluation.key

    copy = shutil.copy(tmp_path / "prompts.jsonl", tmp_path / "copy.jsonl")
    others = samples.write_jsonl(tmp_path / "others.jsonl", [{"question": "1 + 1?", "answer": "3"}])
    assert key() == key(data={"path": str(copy)})
    assert len({key(), key(data={"path": str(others)}), key(reward={"name": "gsm8k_strict"})}) == 3


def test_scores_are_shown_and_kept_where_there_is_no_room_for_responses(
    run: Callable[..., RunConfig],
    answering: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".jsonl":
            raise OSError(errno.ENOSPC, "no room")
        path.write_bytes(content)

    cfg = run()
    export = an_export(cfg)
    answering("2")
    monkeypatch.setattr(scores, "write_atomic", full)
    with pytest.raises(OSError, match="no room"):
        main(cfg)
    (kept,) = scores.kept(Path(cfg.run_dir), weights_of(export)[0])
    assert kept.greedy.mean == 1.0 and "100.00" in capsys.readouterr().out


def test_a_hugging_face_folder_is_evaluated_as_it_is(tied_llama: Path, tmp_path: Path) -> None:
    with hugging_face(open_end(tied_llama), Tracker(tmp_path, Console(quiet=True))) as folder:
        assert folder == tied_llama
    assert not list(tmp_path.iterdir())
