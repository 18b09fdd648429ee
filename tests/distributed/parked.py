"""What a policy of test_parked.py does between its steps."""

from typing import Any

from astar_megatron.config import Offload


def give_back_before_each_step(policy: Any, offload: Offload) -> None:
    """Make each step begin with a rest, in which only the policy's weights are there."""
    step, released = policy.step, []

    def step_after_rest(*arguments: Any) -> Any:
        weights = {name: weight.clone() for name, weight in policy.weights().items()}
        released.append(policy.release(offload)[0])
        assert policy.release(offload)[0] == 0  # nothing is left of it
        assert all(weight.equal(weights[name]) for name, weight in policy.weights().items())
        policy.resume()
        assert (released[-1] > 0) == (offload in ("optimizer", "all"))
        assert released[-1] == released[0]  # from the beginning: before the first step too
        return step(*arguments)

    policy.step = step_after_rest
