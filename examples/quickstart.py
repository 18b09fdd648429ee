"""The whole of A*PO on a laptop: SmolLM2-135M learns one-digit additions (`make demo`).

Prepares model and prompts, then stage 1, stage 2 with an evaluation before and after, export, and lets plain
transformers answer with the export. Everything is real: Megatron-Core, vLLM and Ray, on CPU. Everything it writes
lies under runs/.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from last_screen import before_and_after, next_commands, plot_rewards
from smollm2 import ensure_model

from astar_megatron import config
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import RunConfig
from astar_megatron.data.arithmetic import jsonl, one_digit_additions, write_jsonl
from astar_megatron.data.chat import tokenizer
from astar_megatron.data.v_star import MissingTableError, VStarTable
from astar_megatron.run.fleet import Fleet
from astar_megatron.run.prepare import prepare
from astar_megatron.run.tracking import Tracker
from astar_megatron.run.training import check_before_stage_1, check_training, stage_1
from astar_megatron.sweep import show, sweep
from astar_megatron.train import train

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
QUESTIONS = ("What is 7 + 8? Answer with just the number.", "What is 3 + 4? Answer with just the number.")


def main(overrides: list[str]) -> None:
    cfg = config.load(CONFIG, overrides)
    tracker = Tracker(cfg.run_dir)
    write_prompts(Path(cfg.data.path))
    with tracker.waiting(f"the model's folder {cfg.model.path}"):
        ensure_model(Path(cfg.model.path))
    inputs = prepare(cfg)
    VStarTable.create_or_open(cfg.table_dir, inputs.contract)  # a table of other settings is refused here
    check_before_stage_1(cfg, inputs)
    with suppress(MissingTableError):  # whose sweep is still to come
        check_training(cfg, inputs, stage_1(cfg, inputs))
    with Fleet(cfg, inputs.model, tracker) as fleet:
        table = sweep(cfg, inputs, fleet.engines, tracker)
        show(table, tracker)
        train(cfg, inputs, stage_1(cfg, inputs), fleet, tracker)
    plot = plot_rewards(tracker.run_dir, baseline=table.summary().mean_reward)
    with tracker.waiting("asking the export with plain transformers"):
        answers = [f"transformers with the export: {question} -> {answer(cfg, question)!r}" for question in QUESTIONS]
    for line in answers:
        tracker.say(line)
    tracker.table("the demo, before and after", before_and_after(tracker.run_dir, plot, cfg.export_dir))
    tracker.say("to go on, where the guide is examples/README.md:")
    for line in next_commands(os.path.relpath(CONFIG), overrides, cfg.train.num_steps):
        tracker.say(f"  {line}")


def write_prompts(path: Path) -> None:
    """Write the demo's prompts, but not over a file that holds others. Raises ValueError."""
    prompts = one_digit_additions()
    if path.exists() and path.read_bytes() != jsonl(prompts):
        raise ValueError(
            f"data.path: {path} holds other prompts than the demo's, which it would overwrite; choose a new name, or "
            "train on yours with `astar sweep` and `astar train`"
        )
    write_jsonl(path, prompts)


def answer(cfg: RunConfig, question: str) -> str:
    """Return what plain transformers says with the exported folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(cfg.export_dir)
    tok: Any = tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    inputs = tok.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=cfg.sampling.max_response_tokens, do_sample=False)
    return str(tok.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ClusterError) as error:
        sys.exit(f"demo: {error}")
