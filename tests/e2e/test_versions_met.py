"""With the real stack: what a response is made of when the weights change while it is drawn."""

import dataclasses
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from drawing import answers

from astar_megatron import config
from astar_megatron.rollout.engine import Response
from astar_megatron.rollout.requests import seed_of
from astar_megatron.rollout.source import RolloutSource
from astar_megatron.run.fleet import Fleet
from astar_megatron.run.prepare import Inputs, prepare
from astar_megatron.run.steps import batch_of, step_options
from astar_megatron.run.tracking import Clock, Tracker
from astar_megatron.run.training import objective_of
from astar_megatron.types import Request

WANTED, MOST_ROUNDS = 5, 100  # responses that met the same two versions at the same token in both engines


@pytest.mark.slow
def test_responses_depend_on_their_seed_and_the_versions_they_met_not_on_who_asked_when(
    run_tree: Any, tied_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines draw the same requests, in another order and in other company, while one publish reaches both."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    tree = run_tree(tied_llama) | {"objective": {"name": "oapl"}, "oapl": {"group_size": 5}}
    tree["sampling"], tree["rollout"] = {"max_response_tokens": 60}, {"num_engines": 2, "max_num_seqs": 5}
    cfg = config.validate(tree | {"optim": {"lr": 1e-3}})
    inputs, tracker = prepare(cfg), Tracker(cfg.run_dir)
    objective = objective_of(cfg, None)
    met_one = met_two = 0
    with Fleet(cfg, inputs.model, tracker) as fleet:
        with RolloutSource(fleet.engines, cfg.sampling, cfg.reward, tracker.run_dir) as source:
            batch = batch_of(source.ask(asked(cfg, inputs, range(5))).rollouts(), objective, 0)
        for version in range(1, MOST_ROUNDS):
            batch = dataclasses.replace(batch, version=version - 1)
            fleet.policy.step(batch, objective.loss, step_options(cfg))  # what the engines get in a moment
            few, more = asked(cfg, inputs, range(3)), asked(cfg, inputs, [2, 5, 0, 1])
            streams = [
                fleet.engines.generate(0, [(request.seed, request) for request in few], cfg.sampling),
                fleet.engines.generate(1, [(request.seed, request) for request in more], cfg.sampling),
            ]
            with fleet.generating(version, Clock()):
                in_few = answers(fleet.engines, streams[0], len(few))
                in_more = answers(fleet.engines, streams[1], len(more))
            for seed, response in in_few.items():
                other = in_more[seed]
                count = len(drawn_by_the_same(response, other))
                assert response.token_ids[:count] == other.token_ids[:count]
                assert response.token_logprobs[:count] == pytest.approx(other.token_logprobs[:count], abs=1e-4)
                if count == len(response.token_ids):
                    num_versions = len(set(versions(response)))
                    met_one += num_versions == 1
                    met_two += num_versions == 2
            if met_one and met_two >= WANTED:
                return
    raise AssertionError(f"{met_one} responses met one version and {met_two} two at the same token in both engines")


def asked(cfg: config.RunConfig, inputs: Inputs, samples: Sequence[int]) -> list[Request]:
    """Requests for these samples of two prompts: a request has the same seed in each call."""
    return [
        Request(prompt=prompt, sample=sample, seed=seed_of(cfg.seed, prompt.uid, sample))
        for prompt in inputs.prompts[:2]
        for sample in samples
    ]


def versions(response: Response) -> list[int]:
    """Which weights drew each token."""
    numbered = enumerate(response.tokens_by_version, response.first_version)
    return [version for version, count in numbered for _ in range(count)]


def drawn_by_the_same(response: Response, other: Response) -> list[int]:
    """The versions of the tokens, from the first, that both got from the same weights."""
    pairs = zip(versions(response), versions(other), strict=False)
    return [version for version, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
