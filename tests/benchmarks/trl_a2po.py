"""TRL's experimental A2PO trainer on the demo's work: `trl_a2po.py STEPS`; called by demo.py."""

import os
import re
import sys
import tempfile
import time
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.a2po import A2POConfig, A2POTrainer  # pyright: ignore[reportMissingImports]

from astar_megatron.data.arithmetic import one_digit_additions

MODEL = "runs/models/smollm2-135m-instruct"


def reward(completions: list[Any], truth: list[str], **_: Any) -> list[float]:
    """1 where the last number is right."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    numbers = [re.findall(r"-?\d+", text) for text in texts]
    return [float(bool(named) and named[-1] == right) for named, right in zip(numbers, truth, strict=True)]


class Clock(TrainerCallback):
    """Prints how long each step took, and its mean reward."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        print(f"step {state.global_step} {time.perf_counter() - self.start:.1f}", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "reward" in logs:
            print(f"reward {state.global_step} {logs['reward']}", flush=True)


def main(steps: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    rows = [
        {"prompt": [{"role": "user", "content": row["question"]}], "truth": row["answer"]}
        for row in one_digit_additions()
    ]
    arguments = A2POConfig(
        output_dir=tempfile.mkdtemp(),
        num_value_samples=8,
        beta1=0.5,
        beta2=1e-3,
        max_completion_length=24,
        learning_rate=1e-5,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        max_steps=steps,
        use_cpu=True,
        report_to=[],
        filter_all_incorrect=False,
        save_strategy="no",
        logging_steps=1,
        bf16=False,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        gradient_checkpointing=False,
        model_init_kwargs=None,
    )
    trainer = A2POTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        callbacks=[Clock()],
    )
    start = time.perf_counter()
    trainer._estimate_optimal_values()
    print(f"stage1 {time.perf_counter() - start:.1f}", flush=True)
    trainer.train()


if __name__ == "__main__":
    main(int(sys.argv[1]))
