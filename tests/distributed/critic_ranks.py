"""What rank processes do with a critic."""

from typing import Any

import ranks as work


def learns(pipe: Any, rank: int, port: int | None, *, job: Any, batches: Any, size: int, save: str, load: str) -> Any:
    """Take steps of PPO from the start or from a checkpoint; return what the reporting rank says of each.

    The last batch is trained on after a checkpoint in `save`, if that is given.
    """
    with work.started(pipe, rank, port, job) as policy:
        if load:
            policy.load(load, len(batches) - 1)
            return [policy.step(batches[-1], job.loss, work._options(job, size))]
        reports = []
        for number, batch in enumerate(batches):
            if save and number == len(batches) - 1:
                work.save_checkpoint(policy, save)
            reports.append(policy.step(batch, job.loss, work._options(job, size)))
        return reports


def copies(pipe: Any, rank: int, port: int | None, *, job: Any, batches: Any, save: str, load: str) -> Any:
    """Train against copies of the policy, one made after each step; the last step goes on from a checkpoint."""
    with work.started(pipe, rank, port, job) as policy:
        if load:
            policy.load(load, len(batches) - 1)
            return [policy.step(batches[-1], job.loss, work._options(job, len(batches[-1])))]
        reports = []
        for number, batch in enumerate(batches):
            if save and number == len(batches) - 1:
                work.save_checkpoint(policy, save)
            reports.append(policy.step(batch, job.loss, work._options(job, len(batch))))
            if number < len(batches) - 2:
                policy.refresh_reference()
        return reports


def values_and_gradient(pipe: Any, rank: int, port: int | None, *, job: Any, batch: Any, head: Any, folder: str) -> Any:
    """Return the critic's values with `head` [H] as its own weight; its gradient goes to `folder` under HF names."""
    import torch
    import torch.distributed as dist

    from astar_megatron.model.build import named_parameters
    from astar_megatron.model.micro_batches import micro_batches, mini_batches

    with work.started(pipe, rank, port, job) as policy:
        critic, options = policy._critic, work._options(job, len(batch))
        with torch.no_grad():
            critic._head.copy_(torch.tensor(head))
        groups = [
            list(micro_batches(batch, indices, options, policy.layout, policy.backend))
            for indices in mini_batches(batch, options)
        ]
        values = critic.values(groups, batch, options)
        critic.step(groups[0], batch, job.loss.value, options)
        policy._learning = critic.learning  # whose gradients are gathered
        work._gather_gradients(policy)
        parameters = named_parameters(critic.learning.chunks)
        mine = {name: getattr(p, "main_grad", torch.zeros(p.shape)) for name, p in parameters.items()}
        name = next((name for name in mine if name.endswith("value_head")), None)  # on the last stage alone
        gradient = mine.pop(name) if name else None
        if gradient is not None:
            gradient = gradient.tolist()
        work.write_gradients(policy, folder, mine)
        heads: list[Any] = [None] * policy.layout.world_size
        dist.all_gather_object(heads, gradient)
        return values.tolist(), [each for each in heads if each is not None]
