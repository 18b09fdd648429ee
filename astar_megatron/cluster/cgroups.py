"""Where the kernel says what a process may use: the folders of its control groups, of version 1 and 2.

A limit may be set for the process's own group or for one above it, as a job's is by Slurm or systemd: each counts.
"""

from pathlib import Path


def group_folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """Return the folders of this process's groups for `controller`, such as memory or cpu, from its own up.

    First those of version 2, then those of version 1; their files have other names. The root of each tree is always
    among them: in a container that is often the process's own group, whatever the path says.
    """
    groups = root / "sys/fs/cgroup"
    own, mounted, own_in_1 = "/", controller, "/"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)  # 0::/system.slice/job_7, or of version 1 4:cpu,cpuacct:/docker/abc
        if not names:
            own = path
        elif controller in names.split(","):
            own_in_1 = path
            if not (groups / controller).exists():  # nobody has made a link of that name
                mounted = names
    return [*_upwards(groups, own), *_upwards(groups / mounted, own_in_1)]


def read_text(path: Path) -> str:
    """Return what a file of the kernel's says; nothing where it is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _upwards(top: Path, path: str) -> list[Path]:
    """Return the folder of a group below `top` and all above it; `top` alone for a group outside of what is seen."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        return [top]
    return [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
