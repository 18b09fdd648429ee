"""The methods: a section of keys each, of which `objective.name` chooses the one that counts.

Their equations, and the papers that the defaults are from, are in astar_megatron/algorithm/, a page a method.
"""

from typing import ClassVar, Literal

from pydantic import Field

from astar_megatron.config_file import Section

type MethodName = Literal["astar", "oapl", "grpo", "rebel", "ppo", "spo"]


class ObjectiveConfig(Section):
    """Which method trains; its keys are in the section of its name, and those of the others have no effect."""

    name: MethodName = "astar"
    """The method."""


class Method(Section):
    """A method's keys, and what of it a run must know."""

    on_policy: ClassVar[str] = ""  # why the policy itself must draw the responses, where it must
    has_beta2: ClassVar[bool] = False  # its loss may be divided by 2 beta2

    @property
    def num_responses(self) -> int:
        """Responses to a prompt, of each batch: those that it compares with each other."""
        return 1

    @property
    def reads_table(self) -> bool:
        """Whether it takes something of the V* table."""
        return False

    @property
    def other_beta(self) -> float | None:
        """A second temperature at which it takes V of the table's samples."""
        return None

    @property
    def copies_reference(self) -> bool:
        """Whether the reference becomes a copy of the policy, which a checkpoint then holds."""
        return False

    @property
    def lr_of_critic(self) -> float | None:
        """The learning rate of its critic, if it has one."""
        return None

    def check(self, num_steps: int, batch_size: int) -> None:
        """Raise ValueError where its keys don't go together, or not with so many steps of so many responses."""


class AstarConfig(Method):
    """A*PO. Its two temperatures are beta1 of V* and beta2 of the regression."""

    beta1: float = Field(default=0.5, gt=0.0)
    """[reward] Of stage 1: V* = beta1 (logsumexp(r / beta1) - ln N)."""
    beta2: float = Field(default=1e-3, gt=0.0)
    """[reward a nat] Of stage 2: the loss is (beta2 ln(pi / pi_ref) - (r - V*))^2."""
    importance_cap: float | None = Field(default=None, ge=1.0)
    """Weigh each loss by min(cap, policy's / engine's probability of the response); null: 2 where engines draw ahead
    (`rollout.max_staleness`), whose responses older weights drew, else all by 1."""
    refresh_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    """[share] What earlier rewards still weigh when training adds its own to V*; null: V* stays that of stage 1."""

    has_beta2 = True

    @property
    def reads_table(self) -> bool:
        return True

    @property
    def other_beta(self) -> float:
        return self.beta2


class OaplConfig(Method):
    """OAPL: A*PO's regression against the policy that drew the response, however old."""

    beta1: float = Field(default=1.0, gt=0.0)
    """[reward] Of V: beta1 (logsumexp(r / beta1) - ln n)."""
    beta2: float = Field(default=1e-3, gt=0.0)
    """[reward a nat] The loss is (beta2 ln(pi / pi_old) - (r - V))^2."""
    value: Literal["group", "table"] = "group"
    """What V is made of: the rewards of a response's own group, or the V* table of stage 1."""
    group_size: int = Field(default=8, ge=1)
    """[responses] Responses to a prompt."""
    refresh_steps: int | None = Field(default=None, ge=1)
    """[steps] pi_old is a copy of the policy, made anew after so many steps; null: the weights that drew."""

    has_beta2 = True

    @property
    def num_responses(self) -> int:
        return self.group_size

    @property
    def reads_table(self) -> bool:
        return self.value == "table"

    @property
    def copies_reference(self) -> bool:
        return self.refresh_steps is not None

    def check(self, num_steps: int, batch_size: int) -> None:
        if (self.refresh_steps or 0) >= num_steps:
            raise ValueError(
                f"oapl.refresh_steps: {self.refresh_steps}, but the run has {num_steps} steps (train.num_steps), so "
                "pi_old would never be made anew; lower it"
            )
        if self.value == "group" and self.group_size < 2:
            raise ValueError("oapl.group_size: a group of 1 is its own value; take 2 or more, or oapl.value=table")


class Clipped(Method):
    """What the methods have in common that clip the ratio of new to old policy, token by token."""

    clip_low: float = Field(default=0.2, ge=0.0, lt=1.0)
    """The ratio pi / pi_old of a token counts down to 1 - this."""
    clip_high: float = Field(default=0.2, ge=0.0)
    """It counts up to 1 + this."""
    kl_coef: float = Field(default=1e-3, ge=0.0)
    """[reward a nat] Weight of a token's KL to the reference in the loss."""
    loss: Literal["token", "sequence", "constant"] = "token"
    """`token`: mean over the tokens of an optimiser step, `sequence`: over each response's first, `constant`: sum of
    each response's over `sampling.max_response_tokens`."""


class GrpoConfig(Clipped):
    """GRPO: advantages within a group. DAPO: `clip_high` 0.28, `kl_coef` 0, `loss` token; Dr. GRPO: `normalise` false,
    `kl_coef` 0, `loss` constant."""

    loss: Literal["token", "sequence", "constant"] = "sequence"
    """`token`: mean over the tokens of an optimiser step, `sequence`: over each response's first, `constant`: sum of
    each response's over `sampling.max_response_tokens`."""
    group_size: int = Field(default=8, ge=2)
    """[responses] Responses to a prompt."""
    normalise: bool = True
    """Divide advantages by the standard deviation of the group's rewards."""

    @property
    def num_responses(self) -> int:
        return self.group_size


class RebelConfig(Method):
    """REBEL: regress the difference of two responses to a prompt on that of their rewards."""

    eta: float = Field(default=1.0, gt=0.0)
    """[nats a reward] The loss is ((ln(pi / pi_old)(y) - ln(pi / pi_old)(y')) / eta - (r - r'))^2."""

    on_policy = "compares with the policy before the step, which must have drawn the responses"

    @property
    def num_responses(self) -> int:
        return 2


class PpoConfig(Clipped):
    """PPO, with a critic: a Megatron model of its own in the policy's layout, which begins as the policy does."""

    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount a token."""
    gae_lambda: float = Field(default=1.0, ge=0.0, le=1.0)
    """1: advantages by the rewards alone, 0: by the critic's next value."""
    value_clip: float = Field(default=0.2, gt=0.0)
    """[reward] How far a step may move a value before its loss stops falling."""
    critic_lr: float = Field(default=1e-5, gt=0.0)
    """Learning rate of the critic, constant after the warm-up; its other settings are the policy's."""

    @property
    def lr_of_critic(self) -> float:
        return self.critic_lr


class SpoConfig(Clipped):
    """SPO: one response a prompt against a value that is tracked over the steps, and prompts by what they teach."""

    clip_high: float = Field(default=0.28, ge=0.0)
    """It counts up to 1 + this."""
    kl_coef: float = Field(default=0.0, ge=0.0)
    """[reward a nat] Weight of a token's KL to the reference in the loss."""
    least_decay: float = Field(default=0.875, gt=0.0, lt=1.0)
    """[share] What earlier rewards of a prompt weigh at least when it gets a new one."""
    most_decay: float = Field(default=0.96, gt=0.0, lt=1.0)
    """[share] What they weigh at most."""
    half_life: float = Field(default=0.06, gt=0.0)
    """[nats a token] Change of the KL to the reference since the last one at which they weigh half."""
    exploration: float = Field(default=0.05, gt=0.0)
    """Added to the weight of each prompt, sqrt(v (1 - v)), so that every prompt comes again."""

    on_policy = "chooses its prompts by what it has learnt of all before"

    @property
    def reads_table(self) -> bool:
        return True

    def check(self, num_steps: int, batch_size: int) -> None:
        if self.least_decay > self.most_decay:
            raise ValueError(f"spo.least_decay: {self.least_decay} is above spo.most_decay {self.most_decay}; lower it")
        if batch_size == 1:
            raise ValueError("train.batch_size: 1, but spo takes the batch's mean off each advantage; take 2 or more")
