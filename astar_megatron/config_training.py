"""The keys of stage 2: how long it trains, what it may cost, and the optimiser."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from astar_megatron.config_file import Name, Seconds, Section
from astar_megatron.config_machine import Offload
from astar_megatron.config_secrets import LOGIN_REFUSED, has_login

_MOST_AMOUNT = 1e30
_WANDB_NAME = r"[^/\\#?%:]{1,128}"


class TrainConfig(Section):
    """Stage 2: how long, and how much at a time."""

    num_steps: int = Field(default=100, ge=1)
    """[steps] Length of the run. A step publishes the weights, draws, scores and learns once."""
    batch_size: int = Field(default=256, ge=1, le=1_000_000)
    """[responses] Responses a step: one a prompt, or as many as the method's group has."""
    mini_batch_size: int | None = Field(default=None, ge=1)
    """[sequences] Sequences an optimiser step; null: `train.batch_size`."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """[tokens] Most tokens of a forward pass; a longer sequence goes alone."""
    max_skipped_steps: int = Field(default=3, ge=1)
    """[optimiser steps] How many lost to NaN or Inf end the run."""
    grace_seconds: Seconds | None = None
    """[seconds] How long a run may live after SIGTERM or SIGUSR1; null: until it has saved the step."""
    offload: Offload = "cache"
    """What ranks give back while engines generate on their GPUs: `cache`: what no tensor holds; `optimizer`: its states
    to host memory too; `all`: all but the policy's weights. Only with shared GPUs."""
    profile_steps: list[Annotated[int, Field(ge=0)]] = Field(default=[])
    """[steps] In which each Megatron rank writes a trace of torch's profiler, counted from 0."""

    @model_validator(mode="after")
    def _profiles(self) -> Self:
        beyond = [step for step in self.profile_steps if step >= self.num_steps]
        if beyond or len(set(self.profile_steps)) < len(self.profile_steps):
            raise ValueError(
                f"train.profile_steps: expected different steps from 0 to {self.num_steps - 1}, the last by "
                f"train.num_steps, got {self.profile_steps}; leave out "
                + (f"{beyond[0]}, or raise train.num_steps" if beyond else "what stands twice")
            )
        return self


class BudgetConfig(Section):
    """What training may cost, beside `train.num_steps`: it ends after the step that reaches one of these.

    Stage 1 and evaluations are not counted. Checkpoint, evaluation and export come at the step where it ends. Of
    several rising amounts, as `[1e15, 2e15]`, the last ends it, and the policy is evaluated where it reaches each.
    """

    tokens: list[int] | None = None
    """[tokens] Of responses; null: no limit."""
    flops: list[float] | None = None
    """[FLOPs] Of the model, in training and generation (`astar_megatron/run/spending.py`); null: no limit."""
    seconds: list[float] | None = None
    """[seconds] Of the steps; null: no limit."""

    @field_validator("*", mode="before")
    @classmethod
    def _several(cls, amounts: Any) -> Any:
        return [amounts] if isinstance(amounts, int | float) and not isinstance(amounts, bool) else amounts

    @field_validator("*")
    @classmethod
    def _rising(cls, amounts: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if amounts is not None and (not amounts or amounts[0] <= 0 or sorted({*amounts}) != amounts):
            raise ValueError(
                f"budget.{info.field_name}: expected an amount greater than 0, or several that rise, got {amounts}"
            )
        if amounts and amounts[-1] > _MOST_AMOUNT:
            raise ValueError(f"budget.{info.field_name}: expected at most {_MOST_AMOUNT:g}, got {amounts[-1]:g}")
        return amounts


class TrackingConfig(Section):
    """Where the lines of `metrics.jsonl` are shown too. Each library is an extra, of the name of its key."""

    wandb: Name | None = None
    """Project of Weights & Biases, `project` or `entity/project`; null: none."""
    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes to the run's folder alone, for `wandb sync`."""
    tensorboard: bool = False
    """Write events for TensorBoard into the run's folder."""
    mlflow: Name | None = None
    """Address of MLflow's server or database, as `sqlite:///runs/mlflow.db`; null: none."""

    @model_validator(mode="after")
    def _addresses(self) -> Self:
        if self.wandb and not re.fullmatch(rf"({_WANDB_NAME}/)?{_WANDB_NAME}", self.wandb):
            raise ValueError(
                "tracking.wandb: expected project or entity/project, each of at most 128 characters and without "
                rf"/ \ # ? % :, which W&B refuses, got {self.wandb!r}"
            )
        if self.mlflow and has_login("".join(self.mlflow.split())):  # a password may hold a blank
            raise ValueError(f"tracking.mlflow: {LOGIN_REFUSED}")
        if self.mlflow and ("://" not in self.mlflow or self.mlflow.startswith("file:")):
            raise ValueError(
                f"tracking.mlflow: expected the address of a server or a database, got {self.mlflow!r}; MLflow no "
                "longer takes a folder: write http://host:5000 or sqlite:///runs/mlflow.db"
            )
        return self


class OptimConfig(Section):
    """AdamW; biases and norms do not decay. Steps here are optimiser steps, one a mini-batch."""

    lr: float = Field(default=1e-6, gt=0.0)
    """Learning rate, after the warm-up."""
    min_lr: float = Field(default=0.0, ge=0.0)
    """What the learning rate falls to: that of a step after the last."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up. `cosine` falls until the end, `wsd` in a straight line over the last `decay_steps`."""
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of the mean of squared gradients."""
    adam_eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay: a step takes the learning rate times this off a weight."""
    clip_grad: float = Field(default=1.0, ge=0.0)
    """Largest global norm of the gradient; 0: no clipping."""
    warmup_steps: int = Field(default=0, ge=0)
    """[optimiser steps] Linear rise of the learning rate from 0."""
    decay_steps: int | None = Field(default=None, ge=1)
    """[optimiser steps] Length of the fall of `wsd`, which alone has it."""
    dither: bool = True
    """bfloat16: start each float32 master weight at a random value that rounds to it (examples/BFLOAT16.md)."""
    loss_scale: Literal["paper", "pg"] = "paper"
    """`pg`: the loss divided by 2 beta2, whose gradient is a policy gradient's."""
    offload: bool = False
    """On a GPU with Transformer Engine: optimiser states and step in host memory."""

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr: {self.min_lr} is above optim.lr {self.lr}; lower it")
        if self.schedule == "constant" and self.min_lr:
            raise ValueError("optim.min_lr: schedule constant never falls to it; leave it out or set optim.schedule")
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                f"optim.decay_steps: schedule wsd needs it, no other has it; got {self.decay_steps}, {self.schedule}"
            )
        return self
