"""PROGRAM: `astar data import-stage1` makes prompts and a V* table of published stage-1 data of A*PO.

Rewards are scored anew by the run's own rule, which its contract names. The official code draws responses from the
text of a question and its suffix, with no template around it: a model folder whose template writes more is refused.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from astar_megatron.config import RunConfig, check_drawn_whole
from astar_megatron.data import chat
from astar_megatron.data.arithmetic import jsonl, write_jsonl
from astar_megatron.data.contract import contract_of
from astar_megatron.data.files import make_folder
from astar_megatron.data.prompts import usable_prompts
from astar_megatron.data.rows import Problems, PromptError
from astar_megatron.data.sources import RowSource, refuse_other, rows_of
from astar_megatron.data.stage1 import check_ends, rollouts_of, stage1_rows, without_suffix
from astar_megatron.data.v_star import VStarTable
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.run.tracking import Screen
from astar_megatron.types import Prompt, Rollout

_ROWS_A_SHARD = 512


def import_stage1(cfg: RunConfig, source: str, split: str | None) -> None:
    """Write the prompts of a published stage-1 data set to `data.path` and its responses to the run's V* table.

    Rewards are scored anew by the run's own rule, which its contract names, and compared with the published ones.
    """
    check_drawn_whole(cfg)
    problems = Problems(source)
    rows = stage1_rows(rows_of(RowSource(source, "stage1", split=split), problems), problems)
    problems.refuse(len(rows) + problems.count)
    rows = without_suffix(rows, cfg.data.suffix, source)
    used = usable_prompts([row.pair for row in rows], cfg.data, cfg.model.path, source)
    prompts, counts = list(used.values()), [len(rows[i].responses) for i in used]
    lines = [{cfg.data.prompt_field: rows[i].pair.question, cfg.data.answer_field: rows[i].pair.answer} for i in used]
    refuse_other("data.path", Path(cfg.data.path), jsonl(lines))
    _check_bare(cfg.model.path, prompts)
    contract = contract_of(cfg)
    limit = cfg.sampling.max_response_tokens
    drawn = [
        rollout
        for i, prompt in used.items()
        for rollout in rollouts_of(prompt, rows[i], cfg.model.path, limit, contract.stop_token_ids)
    ]
    published = [value for i in used for value in rows[i].evals]
    _check_lengths(cfg, drawn, source)
    _check_tokens(cfg, drawn, source)
    check_ends([rows[i].pair.where for i in used for _ in rows[i].responses], drawn, contract.stop_token_ids, source)
    with Scorer(cfg.reward) as scorer:
        scorer.check(prompts)
    table = VStarTable.create_or_open(cfg.table_dir, contract)  # from here on, things are written
    wanted = np.array([max(rows[i].samples) + 1 for i in used])
    missing = {(prompt.uid, sample) for prompt, sample in table.missing(prompts, wanted)}
    _check_there(table, drawn, missing)
    pairs = zip(drawn, published, strict=True)
    work = [(rollout, value) for rollout, value in pairs if (rollout.prompt.uid, rollout.sample) in missing]
    is_new = not Path(cfg.data.path).exists()
    if is_new:
        write_jsonl(cfg.data.path, lines)
    other, failed = _import(cfg, table, work)
    rows_shown = [
        ("prompts", f"{len(prompts)}, {'written to' if is_new else 'there already, in'} {cfg.data.path}"),
        ("rows left out", f"{len(rows) - len(prompts)} of {len(rows)}: duplicates, or prompts over the limit"),
        ("responses", f"{len(work)} imported, {len(drawn) - len(work)} were there"),
        ("responses left out", f"{sum(len(row.responses) for row in rows) - len(drawn)}, of the rows left out"),
        ("responses a prompt", f"{min(counts)} to {max(counts)}"),
        ("not scored", f"{failed} of the imported, which count as the lowest of their prompt, at most 0"),
        ("rewards", f"by {cfg.reward.name}; of the {len(work)} imported {other} differ from the published ones"),
        ("taken as given", f"that {cfg.model.path} drew them under this run's sampling"),
    ]
    Screen().table(f"V* table {table.folder}", rows_shown)


def _import(cfg: RunConfig, table: VStarTable, work: list[tuple[Rollout, float]]) -> tuple[int, int]:
    """Score (response, published reward) pairs into the table; how many rewards differ, and how many there are not."""
    other = failed = 0
    make_folder(cfg.run_dir)
    with Screen().progress("importing", len(work)) as advance, Scorer(cfg.reward, Path(cfg.run_dir)) as scorer:
        for start in range(0, len(work), _ROWS_A_SHARD):
            part = work[start : start + _ROWS_A_SHARD]
            scored = scorer.score([rollout for rollout, _ in part])
            published = [value for _, value in part]
            failed += sum(rollout.reward is None for rollout in scored)
            other += sum(rollout.reward not in (None, value) for rollout, value in zip(scored, published, strict=True))
            table.append(scored)
            advance(len(part))
    return other, failed


def _check_bare(model_path: str, prompts: Sequence[Prompt]) -> None:
    """Raises PromptError where the model is asked something else than the text of each prompt."""
    tok = chat.tokenizer(model_path)
    for prompt in prompts:
        bare = tuple(tok(prompt.text)["input_ids"])  # type: ignore[arg-type]
        if prompt.token_ids != bare:
            raise PromptError(
                f"model.path: the published responses were drawn from the text of each prompt alone, but the chat "
                f"template of {model_path} makes {tok.decode(list(prompt.token_ids))!r:.300} of {prompt.text!r:.80}: "
                f"V* would be of other prompts than training's. Let chat_template.jinja of the folder be "
                f"{chat.bare_template(model_path)}, for training too"
            )


def _check_lengths(cfg: RunConfig, drawn: list[Rollout], source: str) -> None:
    limit, lengths = cfg.sampling.max_response_tokens, [len(rollout.token_ids) for rollout in drawn]
    if over := sum(length > limit for length in lengths):
        raise PromptError(
            f"{source}: {over} of {len(drawn)} responses exceed sampling.max_response_tokens = {limit}, so this run "
            f"could not have drawn them; the longest has {max(lengths)} tokens: set the key to that of their drawing"
        )


def _check_tokens(cfg: RunConfig, drawn: list[Rollout], source: str) -> None:
    size = chat.vocab_size(cfg.model.path)
    if beyond := [most for rollout in drawn if (most := max(rollout.token_ids, default=0)) >= size]:
        raise PromptError(
            f"{source}: {len(beyond)} of {len(drawn)} responses hold what {cfg.model.path} could not have drawn, "
            f"{chat.no_row(cfg.model.path, beyond[0])}"
        )


def _check_there(table: VStarTable, drawn: list[Rollout], missing: set[tuple[str, int]]) -> None:
    """Raises PromptError where the table has another response of a prompt under the same number."""
    places = {(rollout.prompt.uid, rollout.sample): rollout for rollout in drawn}
    other = {place: rollout for place, rollout in places.items() if place not in missing}
    for row in table.responses() if other else ():
        place = row.uid, row.sample
        if place in other and other[place].token_ids == row.token_ids:
            del other[place]
    if other:
        rollout = next(iter(other.values()))
        raise PromptError(
            f"sweep.table: {table.folder} has other responses where {len(other)} of {len(drawn)} would go, for example "
            f"response_{rollout.sample} of {rollout.prompt.text!r:.80}: it holds another data set or a sweep's own; "
            "choose another sweep.table"
        )
