"""What can be known to fail before anything is submitted: each as one ConfigError that says what to change."""

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from astar_megatron.config import ConfigError, RunConfig, SlurmConfig, Stage, check_drawn_whole
from astar_megatron.data.files import refusal_at
from astar_megatron.launch.sbatch import logs_folder
from conversion.folders import ModelFolderError, tokenizer_files
from conversion.weight_files import weight_files

_OF_NO_TOKENS = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}  # tell of a tokenizer
_IN_MEMORY = {"tmpfs", "ramfs"}
_ON_DISK = {"ext3", "ext4", "xfs", "btrfs", "zfs", "overlay"}  # of one machine, unless it serves them to others


def of_environment(cfg: SlurmConfig) -> None:
    """Refuse variables of the batch script that are exported here: they would reach jobs past what is checked.

    And one that tells sbatch alone of a cluster, and a time limit that leaves no time for work.
    """
    if exported := sorted(name for name in os.environ if name.startswith("ASTAR_")):
        raise ConfigError(
            f"{exported[0]}: exported in this shell, and a job would take it instead of what the run's file says; "
            f"unset it, and put it into the section slurm, as slurm.env=[{exported[0]}=...] or the key for it"
        )
    if "SBATCH_CLUSTERS" in os.environ:
        raise ConfigError("SBATCH_CLUSTERS: only sbatch reads it; unset it, and export SLURM_CLUSTERS, which all do")
    limit = os.environ.get("SBATCH_TIMELIMIT", "")
    if cfg.time is None and limit[:1].isdecimal() and (problem := cfg.too_short(limit)):
        raise ConfigError(f"SBATCH_TIMELIMIT: {problem}")


def of_inputs(cfg: RunConfig, stages: Sequence[Stage]) -> None:
    """Refuse stages whose files are not here, or that can't draw as configured: they would fail as they begin."""
    if {*stages} & {"sweep", "train"}:
        check_drawn_whole(cfg)
    if cfg.slurm.image or cfg.slurm.ssh:  # what a container or another machine sees is not known here
        return
    for key, folder in (("run_dir", cfg.run_dir), *([("sweep.table", cfg.table_dir)] if "sweep" in stages else ())):
        if problem := refusal_at(folder):
            raise ConfigError(f"{key}: {folder}: {problem}; choose another place")
    if {*stages} - {"export"}:
        _model(Path(cfg.model.path))
        if {*stages} & {"sweep", "train"} or not cfg.eval.benchmarks:
            _there("data.path", Path(cfg.data.path))
        if cfg.eval.benchmarks and cfg.eval.folder:
            _there("eval.folder", Path(cfg.eval.folder))
        elif cfg.data.eval_path:
            _there("data.eval_path", Path(cfg.data.eval_path))
    reads_table = "train" in stages and "sweep" not in stages and cfg.asks_stage_1
    if reads_table and not (cfg.table_dir / "header.json").is_file():
        raise ConfigError(f"slurm.stages: train without sweep, and {cfg.table_dir} is no V* table; add sweep")
    for stage, folder in (("eval", cfg.export_dir), ("export", Path(cfg.run_dir))):
        if stage in stages and "train" not in stages and not folder.is_dir():
            raise ConfigError(f"slurm.stages: {stage} without train, and {folder} is not there; add train")


def _there(key: str, file: Path) -> None:
    if not file.exists():
        raise ConfigError(
            f"{key}: {file} is not here; name what is, or run sbatch slurm/train.sbatch yourself where only the nodes "
            "have it"
        )


def _model(folder: Path) -> None:
    """Refuse a model's folder that lacks configuration, weights or tokenizer, as a copy that did not end does."""
    _there("model.path", folder / "config.json")
    try:
        files = weight_files(folder)
        tokenizer = set(tokenizer_files(folder)) - _OF_NO_TOKENS
    except (ModelFolderError, OSError) as error:
        raise ConfigError(f"model.path: {error}") from None
    if empty := [name for name in (*files, *tokenizer) if not (folder / name).stat().st_size]:
        raise ConfigError(f"model.path: {folder / empty[0]} is empty: copy the file again")
    if not tokenizer:
        raise ConfigError(f"model.path: {folder} has no tokenizer: add tokenizer.json and tokenizer_config.json")


def of_sbatch(cfg: SlurmConfig, *, dry_run: bool) -> None:
    """Check what jobs of sbatch need, or stages run here. Makes the folder of logs, but for a dry run."""
    for key, value in (("ssh", cfg.ssh), ("packager", cfg.packager)):
        if value is not None:
            raise ConfigError(f"slurm.{key}: {value}, which only nemo-run knows; set slurm.backend=nemo-run")
    _image(cfg)
    if cfg.image and cfg.backend == "local":
        raise ConfigError(f"slurm.image: {cfg.image}, but local has no containers; set slurm.image=null, or sbatch")
    if dry_run:
        return
    if cfg.backend != "local" and shutil.which("sbatch") is None:
        raise ConfigError("slurm.backend: sbatch is not here; run this on a login node, or set slurm.backend=local")
    folder = logs_folder(cfg)
    if cfg.backend != "local":
        of_log(folder, "launch from another folder, or set slurm.env=[ASTAR_LOGS=/folder]")
    try:
        folder.mkdir(parents=True, exist_ok=True)  # Slurm does not make it
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(
            f"{folder.absolute()}: can't write logs there: {error.strerror}; set slurm.env=[ASTAR_LOGS=/folder] to one "
            "that you may write to and all nodes share"
        ) from None


def of_log(path: Path, change: str) -> None:
    """Refuse a place of logs that sbatch would read otherwise: the job would fail without a word."""
    if sign := re.search(r"[%\\]", str(path.absolute())):
        raise ConfigError(
            f"{path.absolute()}: logs would go there, and sbatch takes {sign[0]} for one of its own signs; {change}"
        )


def of_nemo_run(cfg: RunConfig, config_file: str, mounts: Path = Path("/proc/mounts")) -> None:
    """Check what an experiment of nemo-run needs; `mounts` is the kernel's list of file systems."""
    if cfg.slurm.packager == "git":
        _committed(config_file)
    elif cfg.slurm.packager is not None and not glob.glob(cfg.slurm.packager):  # noqa: PTH207 (takes full paths)
        raise ConfigError(f"slurm.packager: no file here matches {cfg.slurm.packager}; name a pattern that some do")
    home = os.environ.get("NEMORUN_HOME")
    if home and not re.fullmatch(r"/[\w./-]*", home):
        raise ConfigError(
            f"NEMORUN_HOME: {home!r}: nemo-run's scripts take a full path of letters, digits and . _ - / alone; set it "
            "to such a one"
        )
    if cfg.slurm.ssh is not None:  # what lies over there is not known here
        return
    _image(cfg.slurm)
    if not home:
        raise ConfigError(
            "NEMORUN_HOME: not set; jobs read and write below it: set it to a folder that all nodes share, as in "
            "export NEMORUN_HOME=$PWD/runs/nemo"
        )
    own, shared = (file_system(Path(path), mounts) for path in (home, cfg.run_dir))
    if own in _IN_MEMORY or (own in _ON_DISK and shared != own):
        raise ConfigError(
            f"NEMORUN_HOME: {home} is on {own}, which each node has for itself (run_dir is on {shared}); set it to a "
            "folder that all nodes share"
        )
    if problem := refusal_at(home):
        raise ConfigError(f"NEMORUN_HOME: {home}: {problem}; set it to another")


def file_system(path: Path, mounts: Path) -> str:
    """Return the type of the file system that holds `path`, as ext4 or nfs4."""
    path, nearest = Path(os.path.realpath(path)), ("", "")
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, place, kind, *_ = line.split(" ")
        if path.is_relative_to(place) and len(place) >= len(nearest[0]):
            nearest = place, kind
    return nearest[1]


def _image(cfg: SlurmConfig) -> None:
    if cfg.mounts and not cfg.image:
        raise ConfigError(f"slurm.mounts: {cfg.mounts[0]}, but no container would see it; set slurm.image")
    if cfg.image and re.search("[,:]", str(Path.cwd())):
        raise ConfigError(f"slurm.image: {Path.cwd()}, with , or :, can't be mounted; launch from another folder")
    if cfg.image and cfg.image.startswith(("/", "./")) and not Path(cfg.image).is_file():
        raise ConfigError(f"slurm.image: {cfg.image}: no such file; a name of a registry has no leading / or ./")


def _committed(config_file: str) -> None:
    """Refuse where `git archive` would ship other files than those that are here."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/").splitlines()
        name = _git("ls-files", "--error-unmatch", "--full-name", "--", config_file).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        raise ConfigError(f"slurm.packager: git ships what is committed, and {config_file} is not: {reason}") from None
    if changed:
        raise ConfigError(
            f"slurm.packager: git ships what is committed, and {len(changed)} files have changed since, as "
            f"{changed[0][3:]}; commit them, or name a pattern of files"
        )
    if name != config_file:
        raise ConfigError(f"slurm.packager: git ships the repository, where the file is {name}; launch at its root")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout
