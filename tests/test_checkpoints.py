"""Which checkpoints of a run are kept, when they count, how a damaged one is named; the policy is a fake."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import samples
from samples import CONTRACT

from astar_megatron.algorithm.astar import Astar
from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import AstarConfig, CheckpointConfig
from astar_megatron.data.contract import Contract, ContractError
from astar_megatron.data.files import StorageError
from astar_megatron.data.manifest import FileDigest, digest_of
from astar_megatron.data.prompts import PromptStream
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.run.checkpoints import Checkpoints, DamagedCheckpointError, newest
from astar_megatron.run.saving import Saves
from astar_megatron.types import Prompt, Rollout, SaveState

FIXED = Astar(AstarConfig(), LiveVStar({}, {}, 0.5, None))
PROMPTS = [Prompt(uid=str(i), token_ids=(i,), text="", answer="") for i in range(3)]


class FakePolicy:
    """Two ranks that each write the number of steps they have taken to a file, at the `polls`th question for it.

    `problems` are those of the saves, in order: at its beginning, of rank 1's write, at its end; "" is none.
    """

    dtype = "float32"

    def __init__(self, polls: int = 1, problems: Sequence[tuple[str, str, str]] = ()) -> None:
        self.steps, self.loaded = 0, ""
        self._polls, self._problems, self._calls = polls, iter(problems), 0
        self._folder, self._copy = Path(), 0

    def begin_save(self, folder: Path) -> dict[str, Any]:
        assert not list(folder.iterdir())
        at_begin, self._of_rank_1, self._at_end = next(self._problems, ("", "", ""))
        if at_begin:
            raise StorageError(at_begin)
        self._folder, self._copy, self._calls = folder, self.steps, 0
        return {"layout": {}, "reference_is_copy": False, "dtype": self.dtype}

    def save_states(self, timeout_seconds: float | None = None, *, wait: bool = False) -> list[SaveState]:
        self._calls = self._polls if wait else self._calls + 1
        (self._folder / "__0_0.distcp").write_text(f"{self._copy} steps of rank 0")
        if self._calls < self._polls:
            return [SaveState(done=True), SaveState(done=False)]
        (self._folder / "__1_0.distcp").write_text(f"{self._copy} steps of rank 1")
        return [SaveState(done=True), SaveState(done=True, problem=self._of_rank_1)]

    def finish_save(self) -> dict[str, FileDigest]:
        (self._folder / "metadata.json").write_text("{}")
        if self._at_end:
            raise StorageError(self._at_end)
        return {name: digest_of(self._folder / name) for name in ("__0_0.distcp", "__1_0.distcp")}

    def load(self, folder: Path, version: int) -> None:
        self.loaded = f"{folder.name} at {version}"


def checkpoints_of(
    run_dir: Path,
    contract: Contract = CONTRACT,
    settings: dict[str, Any] | None = None,
    keep: int = 2,
    keep_every: int | None = None,
) -> Checkpoints:
    cfg = CheckpointConfig(interval=1, keep=keep, keep_every=keep_every)
    return Checkpoints(run_dir, cfg, contract, settings or {"objective.name": "astar"})


def stream() -> PromptStream:
    return PromptStream(PROMPTS, 2, 0)


class FakeBatches:
    """Where training goes on, and what has been drawn ahead of it."""

    def __init__(self, drawn: Sequence[Rollout]) -> None:
        self._drawn = drawn

    def state(self) -> dict[str, Any]:
        return stream().state()

    def in_flight(self) -> Sequence[Rollout]:
        return self._drawn


def saves_of(checkpoints: Checkpoints, policy: FakePolicy | None = None, say: Callable[[str], None] = print) -> Saves:
    return checkpoints.saves(cast(PolicyGroup, policy or FakePolicy()), say)


def begin(saves: Saves, step: int, objective: Astar = FIXED, drawn: Sequence[Rollout] = ()) -> None:
    saves.begin(step, cast(TrainingRollouts, FakeBatches(drawn)), objective)


def save(checkpoints: Checkpoints, step: int, objective: Astar = FIXED, drawn: Sequence[Rollout] = ()) -> None:
    with saves_of(checkpoints) as saves:
        begin(saves, step, objective, drawn)


def astar(live: LiveVStar) -> Astar:
    return Astar(AstarConfig(), live)


def steps_in(run_dir: Path) -> list[int]:
    """The steps whose checkpoints are there; nothing else is, beside `latest`."""
    names = {path.name for path in (run_dir / "checkpoints").iterdir()} - {"latest"}
    return sorted(int(name.removeprefix("step_")) for name in names)


def kept(run_dir: Path, keep: int, steps: Iterable[int], keep_every: int | None = None) -> list[int]:
    """The steps whose checkpoints are there once those of `steps` were saved."""
    checkpoints = checkpoints_of(run_dir, keep=keep, keep_every=keep_every)
    for step in steps:
        save(checkpoints, step)
    return steps_in(run_dir)


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 6, 9])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    assert kept(tmp_path, keep, range(1, 9)) == list(range(1, 9))[-keep:]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000008"


@pytest.mark.parametrize(("keep", "keep_every", "left"), [(1, 3, [3, 6, 8]), (2, 3, [3, 6, 7, 8]), (3, 1, range(1, 9))])
def test_every_nth_step_is_kept_for_ever(keep: int, keep_every: int, left: Iterable[int], tmp_path: Path) -> None:
    assert kept(tmp_path, keep, range(1, 9), keep_every) == list(left)


def test_steps_to_keep_that_are_never_saved_are_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.keep_every: 75 is no multiple of checkpoint\.interval, 50"):
        CheckpointConfig(interval=50, keep_every=75)


def test_later_ones_of_a_run_that_was_set_back_neither_count_nor_vanish(tmp_path: Path) -> None:
    assert kept(tmp_path, 2, [10, 20]) == [10, 20]
    assert kept(tmp_path, 2, [5, 6, 7]) == [6, 7, 10, 20]


def test_what_was_drawn_ahead_is_in_the_checkpoint_and_its_loss_is_named(tmp_path: Path) -> None:
    drawn = [samples.rollout(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    save(checkpoints_of(tmp_path), 1)
    assert checkpoints_of(tmp_path).in_flight(PROMPTS) == []
    save(checkpoints_of(tmp_path), 2, drawn=drawn)
    assert checkpoints_of(tmp_path).in_flight(PROMPTS) == drawn
    (tmp_path / "checkpoints" / "step_00000002" / "in_flight.parquet").unlink()
    with pytest.raises(ValueError, match=r"step_00000002/in_flight\.parquet: missing or damaged .*latest"):
        checkpoints_of(tmp_path).in_flight(PROMPTS)


@pytest.mark.parametrize(
    "damage",
    [{"prompts": None}, {"prompts": []}, {"v_star": {"beta1": 0.5, "decay": 0.9}}, {"v_star": 7}, {"step": None}],
)
def test_progress_that_is_damaged_inside_is_said_to_be(damage: dict[str, Any], tmp_path: Path) -> None:
    checkpoints, live = checkpoints_of(tmp_path), LiveVStar({}, {}, 0.5, 0.9)
    save(checkpoints, 3, astar(live))
    path = tmp_path / "checkpoints" / "step_00000003" / "progress.json"
    if "beta1" in str(damage):
        damage = {"v_star": damage["v_star"] | {"stage_1": live._digest()}}
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=r"progress\.json: missing or damaged"):
        checkpoints.restore(stream(), astar(live))


def test_a_run_whose_rewards_read_no_special_tokens_is_not_continued_with_those_that_do(tmp_path: Path) -> None:
    save(checkpoints_of(tmp_path), 3)
    now = dataclasses.replace(CONTRACT, kept_token_ids=(5,))
    words = r"kept token ids: this run has \[5\], the checkpoint none"
    with pytest.raises(ContractError, match=words):
        checkpoints_of(tmp_path, now).restore(stream(), FIXED)


def test_v_star_refreshed_under_another_beta1_is_refused_before_a_policy_starts(tmp_path: Path) -> None:
    def live(beta1: float) -> LiveVStar:
        return LiveVStar({"0": 0.5}, {"0": 4}, beta1, 0.9)

    checkpoints, before, after = checkpoints_of(tmp_path), live(0.5), live(0.5)
    before.add([("0", 1.0)])
    save(checkpoints, 3, astar(before))
    assert checkpoints.restore(stream(), astar(after)) == 3 and after["0"] == before["0"] != 0.5
    with pytest.raises(ValueError, match=r"astar\.beta1: the checkpoint's V\* was refreshed with astar\.beta1 0\.5"):
        checkpoints.restore(stream(), astar(live(0.25)))


def test_what_a_method_keeps_of_each_prompt_is_not_kept_by_the_checkpoints_too(tmp_path: Path) -> None:
    checkpoints, uid = checkpoints_of(tmp_path), "uid of a prompt"
    live = LiveVStar({uid: 0.5}, {uid: 4}, 0.5, 0.9)
    live.add([(uid, 1.0)])
    save(checkpoints, 3, astar(live))
    assert uid in (tmp_path / "checkpoints" / "step_00000003" / "progress.json").read_text()
    policy = cast(PolicyGroup, FakePolicy())
    assert checkpoints.resume(policy, stream(), astar(live), print) == 3 == checkpoints.steps
    assert uid.encode() not in pickle.dumps(checkpoints)  # all that they hold in memory


def test_what_dither_changes_in_a_run_that_goes_on_is_said(tmp_path: Path) -> None:
    def changed(written: dict[str, Any], settings: dict[str, Any]) -> list[str]:
        save(checkpoints_of(tmp_path, settings=written), 1)
        return checkpoints_of(tmp_path, settings=settings).changed_settings()

    as_saved = "(master weights go on as the checkpoint has them)"
    assert changed({"optim.dither": False}, {"optim.dither": True}) == [f"optim.dither False -> True {as_saved}"]
    assert changed({"optim.dither": True}, {"optim.dither": False}) == [f"optim.dither True -> False {as_saved}"]
    assert changed({"optim.dither": True, "seed": 1}, {"seed": 2, "optim.dither": True}) == ["seed 1 -> 2"]
    later = {"seed": 1, "grpo.kl_coef": 0.5, "optim.clip_grad": 1.0}  # the second is not the default, the third is
    assert changed({"seed": 1}, later) == ["grpo.kl_coef 0.001 -> 0.5"]


def test_a_checkpoint_of_a_version_that_knew_less_is_not_called_damaged(tmp_path: Path) -> None:
    save(checkpoints_of(tmp_path), 3)
    file = tmp_path / "checkpoints" / "step_00000003" / "progress.json"
    whole = json.loads(file.read_text())
    for key in ("earlier", "dtype", "settings"):
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(ValueError, match=rf"has no {key}: another version wrote the checkpoint") as error:
            checkpoints_of(tmp_path).restore(stream(), FIXED)
        assert "begin a new run_dir from an export" in str(error.value) and "damaged" not in str(error.value)


def test_the_newest_checkpoint_of_a_run_is_known_by_its_folder_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}: there is no checkpoint; run `astar train` first"):
        newest(tmp_path)
    for step in (1, 2):
        save(checkpoints_of(tmp_path), step)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step_00000002"
    shutil.rmtree(newest(tmp_path))
    with pytest.raises(DamagedCheckpointError, match="step_00000001 is whole"):
        newest(tmp_path)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    save(checkpoints_of(tmp_path), 3)
    assert checkpoints_of(tmp_path).restore(stream(), FIXED) == 3
    with pytest.raises(ValueError, match=r"objective\.name: ppo, but .*step_00000003 was trained with astar; set it"):
        checkpoints_of(tmp_path, settings={"objective.name": "ppo"}).restore(stream(), FIXED)


def test_a_checkpoint_keeps_which_settings_were_others_until_when(tmp_path: Path) -> None:
    for step, settings in ((2, {"a": 1, "b": 5}), (4, {"a": 1, "b": 6}), (5, {"a": 2, "b": 6}), (7, {"a": 2, "b": 6})):
        save(checkpoints_of(tmp_path, settings=settings), step)
    progress = json.loads((tmp_path / "checkpoints" / "step_00000007" / "progress.json").read_text())
    assert progress["earlier"] == [{"until": 2, "settings": {"b": 5}}, {"until": 4, "settings": {"a": 1}}]


def test_a_checkpoint_that_was_trained_in_another_type_is_refused_before_ranks_load_it(tmp_path: Path) -> None:
    save(checkpoints_of(tmp_path), 3)
    checkpoints_of(tmp_path).check_type("float32")
    policy = FakePolicy()
    policy.dtype = "bfloat16"
    with pytest.raises(
        ValueError, match=r"model\.dtype: this run computes in bfloat16, .*step_00000003 was trained in f"
    ):
        checkpoints_of(tmp_path).resume(cast(PolicyGroup, policy), stream(), FIXED, print)
    assert policy.loaded == ""


def test_a_reference_that_is_a_copy_is_not_continued_as_one_that_is_not(tmp_path: Path) -> None:
    oapl: dict[str, Any] = {"objective.name": "oapl", "oapl.refresh_steps": 5}
    save(checkpoints_of(tmp_path, settings=oapl), 3)
    checkpoints_of(tmp_path, settings=oapl | {"oapl.refresh_steps": 7}).check_method()
    with pytest.raises(ValueError, match=r"step_00000003 was trained with oapl\.refresh_steps=5, and its"):
        checkpoints_of(tmp_path, settings=oapl | {"oapl.refresh_steps": None}).check_method()


# --- a checkpoint is written while training goes on


def test_latest_moves_and_old_ones_go_only_when_all_ranks_have_written(tmp_path: Path) -> None:
    checkpoints, policy = checkpoints_of(tmp_path, keep=1), FakePolicy(polls=3)
    save(checkpoints, 1)
    with saves_of(checkpoints, policy) as saves:
        policy.steps = 2
        begin(saves, 2)
        for policy.steps in (3, 4):
            saves.poll()
            assert checkpoints.latest == tmp_path / "checkpoints" / "step_00000001"
        saves.poll()
        assert checkpoints.latest == tmp_path / "checkpoints" / "step_00000002"
    assert steps_in(tmp_path) == [2]
    assert (tmp_path / "checkpoints" / "step_00000002" / "__1_0.distcp").read_text() == "2 steps of rank 1"


def test_the_next_save_and_the_end_wait_for_what_is_under_way(tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path)
    with saves_of(checkpoints, FakePolicy(polls=3)) as saves:
        begin(saves, 1)
        begin(saves, 2)
        assert checkpoints.latest == tmp_path / "checkpoints" / "step_00000001"
        assert sum(end - start for start, end in saves.take_waits()) > 0.0 and not saves.take_waits()
    assert checkpoints.latest == tmp_path / "checkpoints" / "step_00000002"


def test_an_error_waits_for_what_is_under_way_and_stays_the_error_to_see(tmp_path: Path) -> None:
    checkpoints, lines = checkpoints_of(tmp_path), []
    with pytest.raises(ZeroDivisionError), saves_of(checkpoints, FakePolicy(polls=3)) as saves:
        begin(saves, 1)
        raise ZeroDivisionError
    assert checkpoints.latest == tmp_path / "checkpoints" / "step_00000001"

    class Silent(FakePolicy):
        def save_states(self, timeout_seconds: float | None = None, *, wait: bool = False) -> list[SaveState]:
            raise ClusterError(f"no answer in {timeout_seconds} s")

    with pytest.raises(ZeroDivisionError), saves_of(checkpoints, Silent(), lines.append) as saves:
        begin(saves, 2)
        raise ZeroDivisionError
    assert checkpoints.latest == tmp_path / "checkpoints" / "step_00000001"
    assert lines == ["step_00000002 was not saved: no answer in 30.0 s"]


def test_ranks_that_never_end_their_writing_end_training_and_hold_no_error_up(tmp_path: Path) -> None:
    class Stuck(FakePolicy):
        def save_states(self, timeout_seconds: float | None = None, *, wait: bool = False) -> list[SaveState]:
            if wait:
                raise ClusterError("policy: save_state: no answer in 3600 s")
            return super().save_states()

    checkpoints, lines = checkpoints_of(tmp_path), list[str]()
    with pytest.raises(ClusterError), saves_of(checkpoints, Stuck(polls=9), lines.append) as saves:
        begin(saves, 1)
        begin(saves, 2)
    assert lines == ["step_00000001 was not saved"]  # not waited for once more
    lines.clear()
    with pytest.raises(ZeroDivisionError), saves_of(checkpoints, Stuck(polls=9), lines.append) as saves:
        begin(saves, 1)
        raise ZeroDivisionError
    assert lines == [
        "step_00000001 is being written: waits for it",
        "step_00000001 was not saved: policy: save_state: no answer in 3600 s",
    ]
    with pytest.raises(KeyboardInterrupt), saves_of(checkpoints, Stuck(polls=9), lines.append) as saves:
        begin(saves, 1)
        raise KeyboardInterrupt
    assert len(lines) == 2 and checkpoints.latest is None


def test_what_a_killed_run_has_left_is_removed(tmp_path: Path) -> None:
    rest = tmp_path / "checkpoints" / "step_00000009.incomplete"
    rest.mkdir(parents=True)
    (pointer := rest.with_name(".latest.4711.0123abcd.tmp")).write_text("step_0000")
    save(checkpoints_of(tmp_path), 1)
    assert steps_in(tmp_path) == [1] and not pointer.exists()


FULL = "x: can't be written: No space left on device; free some space"


@pytest.mark.parametrize("problem", [(FULL, "", ""), ("", FULL, ""), ("", "", FULL)])
def test_a_save_that_fails_changes_nothing_that_was_saved_and_is_tried_again(
    problem: tuple[str, str, str], tmp_path: Path
) -> None:
    checkpoints, lines = checkpoints_of(tmp_path, keep=1), list[str]()
    save(checkpoints, 1)
    with saves_of(checkpoints, FakePolicy(problems=[problem]), lines.append) as saves:
        begin(saves, 2)
        saves.wait()
        assert steps_in(tmp_path) == [1]
        checkpoints.verify()
        begin(saves, 3)
    (line,) = lines
    assert line.startswith("the checkpoint after 2 steps was not saved: x: can't be written: No space left on device. ")
    assert "Nothing that was saved is changed" in line and "tries again 1 steps later" in line
    assert steps_in(tmp_path) == [3]


def test_a_last_save_that_fails_is_an_error_at_the_end(tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path)
    save(checkpoints, 1)
    failing = FakePolicy(problems=[("", "", ""), ("", FULL, "")])
    words = r"^the checkpoint after 3 steps was not saved: x: .* free some space$"
    with pytest.raises(StorageError, match=words), saves_of(checkpoints, failing) as saves:
        begin(saves, 2)
        begin(saves, 3)
    assert checkpoints.latest == tmp_path / "checkpoints" / "step_00000002"


# --- and found whole, or not, before anything else


def damaged(run_dir: Path) -> Path:
    """Three checkpoints, and the folder of the newest, step 30."""
    for step in (10, 20, 30):
        save(checkpoints_of(run_dir, keep=3), step, drawn=[samples.rollout(prompt) for prompt in PROMPTS])
    return run_dir / "checkpoints" / "step_00000030"


def flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def half_copied(folder: Path) -> None:
    """Its first files by name: the manifest is not among them."""
    for path in sorted(folder.iterdir())[2:]:
        if path.name != "progress.json":
            path.unlink()


def listed(folder: Path, name: str) -> None:
    """Put a name into the manifest, as a stranger may."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "xxh3_128": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def linked(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: flip(folder, "__0_0.distcp"), "__0_0.distcp holds other bytes than were written"),
    (lambda folder: flip(folder, "metadata.json"), "metadata.json holds other bytes than were written"),
    (lambda folder: flip(folder, "progress.json"), "progress.json holds other bytes than were written"),
    (lambda folder: flip(folder, "in_flight.parquet"), "in_flight.parquet holds other bytes than were written"),
    (lambda folder: (folder / "__1_0.distcp").write_text("30 s"), "__1_0.distcp has 4 bytes instead of 17"),
    (lambda folder: (folder / "__1_0.distcp").write_text(""), "__1_0.distcp has 0 bytes instead of 17"),
    (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    (lambda folder: (folder / "in_flight.parquet").unlink(), "in_flight.parquet is missing"),
    (half_copied, "manifest.json is missing, or no regular file"),
    (lambda folder: (folder / "manifest.json").write_text('{"fi'), "manifest.json can't be read"),
    (lambda folder: (folder / "manifest.json").write_text('{"files": [1]}'), "manifest.json can't be read"),
    (
        lambda folder: shutil.copy(folder.with_name("step_00000020") / "manifest.json", folder),
        "progress.json holds other bytes than were written",
    ),
    (lambda folder: listed(folder, "/dev/zero"), "'/dev/zero' is no name of a file in it"),
    (lambda folder: listed(folder, "../latest"), "'../latest' is no name of a file in it"),
    (lambda folder: linked(folder, "__1_0.distcp"), "__1_0.distcp is no regular file"),
    (lambda folder: linked(folder, "manifest.json"), "manifest.json is missing, or no regular file"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_damage_is_named_with_the_checkpoint_that_is_whole(
    damage: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    folder = damaged(tmp_path)
    checkpoints_of(tmp_path).verify()
    damage(folder)
    pointer = folder.parent / "latest"
    with pytest.raises(DamagedCheckpointError) as caught:
        checkpoints_of(tmp_path).verify()
    assert str(caught.value).startswith(f"{folder} is damaged: ") and words in str(caught.value)
    assert str(caught.value).endswith(
        f"; step_00000020 is whole: write its name into {pointer} and run the same command again"
    )
    pointer.write_text("step_00000020\n")  # the remedy
    checkpoints_of(tmp_path).verify()
    policy = FakePolicy()
    assert checkpoints_of(tmp_path).resume(cast(PolicyGroup, policy), stream(), FIXED, print) == 20
    assert policy.loaded == "step_00000020 at 20"


def test_files_that_are_not_of_a_checkpoint_are_to_be_moved_away(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    for name in ("__2_0.distcp", ".DS_Store"):
        (folder / name).write_text("of 4 ranks")
    words = (
        r"step_00000030 is whole, but holds files that are not in manifest\.json: \.DS_Store, __2_0\.distcp; move them"
    )
    with pytest.raises(DamagedCheckpointError, match=words):
        checkpoints_of(tmp_path).verify()


def test_a_run_whose_latest_is_gone_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    (folder.parent / "latest").unlink()
    folder.rename(folder.with_name("step_00000030.incomplete"))
    checkpoints_of(tmp_path).verify()
    policy = FakePolicy()
    assert checkpoints_of(tmp_path).resume(cast(PolicyGroup, policy), stream(), FIXED, print) == 20


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"step_00000040", "'step_00000040'"),
        (b"", "''"),
        (b"\xff", "'\ufffd'"),
        (b".", "'.'"),
        (b"../../other", "'../../other'"),
        (b"/", "'/'"),
    ],
)
def test_latest_that_names_no_checkpoint_is_refused_with_one_to_name(text: bytes, name: str, tmp_path: Path) -> None:
    pointer = damaged(tmp_path).parent / "latest"
    pointer.write_bytes(text)
    with pytest.raises(DamagedCheckpointError) as caught:
        checkpoints_of(tmp_path).verify()
    assert str(caught.value).startswith(f"{pointer} names {name}, which ")
    assert "; step_00000030 is whole: write its name" in str(caught.value)


def test_the_remedy_is_the_newest_before_it_that_is_whole_and_starting_over_without_one(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    for step in (30, 20):
        (folder.with_name(f"step_000000{step}") / "progress.json").unlink()
    words = r"names 'step_00000030', which has no progress\.json; step_00000010 is whole"
    with pytest.raises(DamagedCheckpointError, match=words):
        checkpoints_of(tmp_path).verify()
    flip(folder.with_name("step_00000010"), "__0_0.distcp")
    with pytest.raises(
        DamagedCheckpointError, match=r"no other checkpoint there is whole: choose a new run_dir to start"
    ):
        checkpoints_of(tmp_path).verify()
