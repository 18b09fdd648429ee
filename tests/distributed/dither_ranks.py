"""What the rank processes of test_dithered_ranks.py do."""

from typing import Any

from ranks import Job, started


def masters(pipe: Any, rank: int, port: int | None, *, job: Job, folder: str, shared: str) -> list[Any]:
    """Return (HF name, rows, columns, values) of the masters that this rank optimises; export to `folder`.

    Elements that another replica optimises are NaN.
    """
    import torch

    from astar_megatron.model.build import named_parameters

    with started(pipe, rank, port, job) as policy:
        whole = {}
        names = {id(parameter): name for name, parameter in named_parameters(policy._learning.chunks).items()}
        for inner in policy._learning.optimizer.chained_optimizers:
            for parameter in inner.model_param_group_index_map:
                span = inner._get_model_param_range_map(parameter)["param"]
                local = torch.full((parameter.numel(),), float("nan"))
                local[span.start : span.end] = inner._get_main_param_and_optimizer_states(parameter)["param"].detach()
                whole[names[id(parameter)]] = local.view(parameter.shape)
        policy.export(folder, shared)
        tiles = [tile for tile in policy.model.megatron_tiles(policy.layout) if tile.rank == rank]
        return [
            (tile.hf, tile.rows, tile.cols, _held(whole[tile.name], tile).numpy())
            for tile in tiles
            if tile.name in whole
        ]


def _held(local: Any, tile: Any) -> Any:
    rows = local[tile.row0 : tile.row0 + tile.rows[1] - tile.rows[0]]
    return rows if tile.cols is None else rows[:, tile.col0 : tile.col0 + tile.cols[1] - tile.cols[0]]
