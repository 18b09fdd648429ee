"""What `astar plan` says beside what was measured: the table of astar_megatron/README.md, and of tests/test_plan.py.

    .venv/bin/python tests/plan_page.py

writes it there. A figure is of the run that `conditions` describes; `sets` names the constants that were chosen by it,
so it does not speak for them. What is `outside` its bound says why.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_models import SHAPES
from samples import run_config

from astar_megatron.config import RunConfig
from astar_megatron.model import gpus
from astar_megatron.planning import capacity, pace
from astar_megatron.run import accelerators, resources
from astar_megatron.run.resources import GIB
from conversion.families import Model, model_from_config

PAGE = Path(__file__).resolve().parents[1] / "astar_megatron" / "README.md"
HEAD = "| what, and where | measured | planned | difference | bound |\n| --- | --- | --- | --- | --- |\n"
MEMORY, SECONDS, RESIDENT = 0.10, 0.25, 0.15  # bounds of the difference
H200, H100 = gpus.named("H200"), gpus.named("H100")
QWEN = model_from_config(SHAPES["1.5b"])
SMOLLM = model_from_config(SHAPES["smollm2"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured figure and the planned; `places` of the decimals that are shown."""

    conditions: str
    measured: float
    planned: float
    unit: str
    bound: float
    sets: str = ""
    outside: str = ""  # why the difference is above the bound

    @property
    def difference(self) -> float:
        return self.planned / self.measured - 1

    def row(self) -> str:
        sets = f" (sets `{self.sets}`)" if self.sets else ""
        outside = f" **Outside**: {self.outside}" if self.outside else ""
        measured, planned = f"{self.measured:.3g} {self.unit}", f"{self.planned:.3g} {self.unit}"
        bound = f"{self.bound:.0%}"
        return f"| {self.conditions}{sets}.{outside} | {measured} | {planned} | {self.difference:+.0%} | {bound} |\n"


def qwen_run(batch: int, mini: int, **sections: Any) -> RunConfig:
    """Sequences of 128 + 1024 tokens in packs of 16,384."""
    train = {"batch_size": batch, "mini_batch_size": mini, "micro_batch_tokens": 16384}
    lengths = {"data": {"max_prompt_tokens": 128}, "sampling": {"max_response_tokens": 1024}}
    return run_config(train=train, **lengths, **sections)


def on_gpus() -> Iterator[Figure]:
    rank = "1.5B, a rank"
    alone = qwen_run(128, 64)
    policy, _ = capacity.processes(alone, QWEN, H200)
    tensors = accelerators.rank_bytes(alone, QWEN).most
    yield Figure(
        conditions=f"{rank}: its tensors at the peak", measured=60.4, planned=tensors / GIB, unit="GiB", bound=MEMORY
    )
    card = (policy.total_bytes + accelerators.CONTEXT_BYTES // 2) / GIB  # and the context of the engine that sleeps
    yield Figure(
        conditions=f"{rank}: in use on the card after a step, nothing given back, the engine asleep",
        measured=67.3, planned=card, unit="GiB", bound=MEMORY, sets="RESERVE_SHARE",
    )  # fmt: skip
    saved = resources.checkpoint_bytes(alone, QWEN.num_parameters(), "bfloat16")
    yield Figure(conditions=f"{rank}: a checkpoint on disk", measured=21, planned=saved / 1e9, unit="GB", bound=MEMORY)
    yield Figure(
        conditions="the head on one H100: memory", measured=2.13,
        planned=accelerators.HEAD_BYTES / GIB, unit="GiB", bound=MEMORY,
    )  # fmt: skip
    for words, dtype, seconds, sets in (
        ("", {}, 3.85, "LAYERS_SHARE"),
        (" in FP8", {"fp8": "tensorwise"}, 3.62, "FP8_SPEED"),
    ):
        step = pace.step_seconds(qwen_run(128, 64, model=dtype), QWEN, H200, shared=False, num_nodes=1)
        yield Figure(
            conditions=f"{rank}{words}: a step of 128 sequences",
            measured=seconds, planned=step.reference + step.policy, unit="s", bound=SECONDS, sets=sets,
        )  # fmt: skip
    yield from parts_of_a_run()
    tiny = run_config(data={"max_prompt_tokens": 40}, sampling={"max_response_tokens": 24}, train={"batch_size": 64})
    step = pace.step_seconds(tiny, SMOLLM, H200, shared=False, num_nodes=1)
    yield Figure(
        conditions="135M, a rank: a step of 64 sequences of 40 + 24 tokens",
        measured=0.5, planned=step.reference + step.policy, unit="s", bound=SECONDS,
        outside="launches of kernels take the time of a model so small, and the plan leaves them out",
    )  # fmt: skip
    yield from head_passes()


def parts_of_a_run() -> Iterator[Figure]:
    """The lengths of the prompts were not written down: 128 tokens each, as in the rank's benchmark."""
    run = "1.5B, a run"
    step = pace.step_seconds(qwen_run(256, 128), QWEN, H200, shared=True, num_nodes=1)
    for name, measured, planned, sets in (
        ("generate (12.8 to 13.2)", 13.0, step.generate, "DRAW_SECONDS"),
        ("reference", 1.9, step.reference, "LAYERS_SHARE"),
        ("policy", 5.2, step.policy, "LAYERS_SHARE"),
        ("publish (0.34 to 0.43)", 0.385, step.publish, "PUBLISH_RATE"),
        ("the whole step", 20.7, step.total, ""),
    ):
        yield Figure(
            conditions=f"{run}: {name}", measured=measured, planned=planned, unit="s", bound=SECONDS, sets=sets
        )


def head_passes() -> Iterator[Figure]:
    flops = 2 * 8192 * 4096 * 131072
    for gpu, score, learn, sets in ((H100, 12.89, 43.88, "HEAD_SHARE"), (H200, 13.26, 44.2, "")):
        for name, products, measured in (("scored", 1, score), ("learnt from", 3, learn)):
            planned = 1e3 * products * flops / (pace.HEAD_SHARE * gpu.peak_flops)
            yield Figure(
                conditions=f"the head on one {gpu.name}: {name}",
                measured=measured, planned=planned, unit="ms", bound=SECONDS, sets=sets,
            )  # fmt: skip


def on_cores() -> Iterator[Figure]:
    """Resident memory at its peak, `peak_memory_bytes` of metrics.jsonl, of runs with three checkpoints each.

    The demo has 12 steps, with a critic 13, the model with a head of its own 6; the engine's is of earlier runs.
    """
    demo = "135M on cores, a rank"
    for words, method, before, most in (("", "astar", 5.31, 5.83), (" with a critic", "ppo", 7.43, 9.71)):
        rank, engine, _ = capacity.processes(demo_run(method), SMOLLM, None)
        saving = rank.parts["saving"]
        conditions, planned = f"{demo}{words}", rank.total_bytes
        sets = "" if words else "SAVED_SHARE"
        yield Figure(
            conditions=f"{conditions}: before the first checkpoint", measured=before,
            planned=(planned - saving) / GIB, unit="GiB", bound=RESIDENT,
        )  # fmt: skip
        yield Figure(
            conditions=f"{conditions}: the whole run", measured=most, planned=planned / GIB, unit="GiB",
            bound=RESIDENT, sets=sets,
        )  # fmt: skip
    yield Figure(
        conditions="135M on cores, an engine with a cache of 1 GiB (3.2 to 3.7)", measured=3.45,
        planned=engine.total_bytes / GIB, unit="GiB", bound=RESIDENT,
    )  # fmt: skip
    untied = demo_run("grpo", batch_size=32)
    rank, *_ = capacity.processes(untied, untied_qwen(), None)
    measured = (("before the first checkpoint", 6.28, rank.parts["saving"]), ("the whole run", 8.96, 0))
    for words, most, left_out in measured:
        yield Figure(
            conditions=f"236M with a head of its own, on cores, a rank: {words}", measured=most,
            planned=(rank.total_bytes - left_out) / GIB, unit="GiB", bound=RESIDENT,
        )  # fmt: skip
    tiny = run_config(
        model={"dtype": "float32"},
        data={"max_prompt_tokens": 100},
        sampling={"max_response_tokens": 9},
        train={"batch_size": 10, "mini_batch_size": 5, "micro_batch_tokens": 90},
    )
    rank, *_ = capacity.processes(tiny, tests_llama(), None)
    yield Figure(
        conditions="the tests' Llama on cores, 6 layers of 48: a rank", measured=0.79,
        planned=rank.total_bytes / GIB, unit="GiB", bound=RESIDENT,
    )  # fmt: skip


def demo_run(method: str, batch_size: int = 64) -> RunConfig:
    return run_config(
        model={"dtype": "bfloat16"},
        data={"max_prompt_tokens": 64},
        sampling={"max_response_tokens": 24},
        train={"batch_size": batch_size, "micro_batch_tokens": 2048},
        objective={"name": method},
    )


def untied_qwen() -> Model:
    """A Qwen2 of random weights, with the demo's tokens and settings."""
    sizes = {"num_hidden_layers": 12, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 49157, "tie_word_embeddings": False}
    return model_from_config(SHAPES["1.5b"] | sizes)


def tests_llama() -> Model:
    sizes = {"num_hidden_layers": 6, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 263, "tie_word_embeddings": True}
    return model_from_config(SHAPES["smollm2"] | sizes)


def figures() -> list[Figure]:
    return [*on_gpus(), *on_cores()]


def page(text: str) -> str:
    """Return the page with its table made anew; `text` is the page as it is."""
    pattern = re.escape(HEAD) + r"(?:\|.*\n)*"
    if len(re.findall(pattern, text)) != 1:
        raise ValueError(f"{PAGE}: expected one table with the head {HEAD.splitlines()[0]!r}")
    rows = HEAD + "".join(figure.row() for figure in figures())
    return re.sub(pattern, lambda _: rows, text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
