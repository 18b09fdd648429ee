"""The batch scripts, from a wheel as from a checkout; and the body of slurm/train.sbatch as nemo-run takes it."""

import hashlib
from pathlib import Path

from astar_megatron.data.files import make_folder, write_atomic

_PACKAGE = Path(__file__).resolve().parents[1]
# What nemo-run fills in before the body. Its job folder is called /nemo_run where it says what to run.
_HEAD = """
{%- for flag in sbatch_flags %}
{{ flag }}
{%- endfor %}
{%- for variable in env_vars %}
{{ variable }}
{%- endfor %}
ASTAR_LOGS="${ASTAR_LOGS:+$ASTAR_LOGS/$SLURM_JOB_NAME}"
export ASTAR_LOGS="${ASTAR_LOGS:-{{ log_dir }}}"
code={{ command_workdir.replace("/nemo_run", cluster_dir.removesuffix("/ray")) }}
{%- set words = common_srun_args.split() %}
{%- for word in words if word.startswith("--container-image=") %}
export ASTAR_IMAGE={{ word.removeprefix("--container-image=") }}
export ASTAR_MOUNTS={{ words[words.index("--container-mounts") + 1] }},$code:$code
{%- endfor %}
{%- if setup_lines %}
{{ setup_lines }}
{%- endif %}
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"
# A command such as `python -m astar_megatron.cli train --config C --set k=v`, as the words that the body takes: C ...
set -- {{ command }}
given="$*"
while [ $# -gt 0 ] && [ "$1" != --config ]; do export ASTAR_PROGRAM="$1"; shift; done
[ $# -gt 1 ] || { echo "astar: expected a command with --config FILE, got: $given" >&2; exit 2; }
shift
if [ -f "$code/$1" ]; then config="$code/$1"; shift; set -- "$config" "$@"; fi
"""


def path(name: str) -> Path:
    """Return the file of a script such as `train.sbatch`. Raises FileNotFoundError where neither place has it."""
    files = [_PACKAGE / "slurm" / name, _PACKAGE.parent / "slurm" / name]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f"{name}: not in {' or '.join(str(file.parent) for file in files)}; install it again")


def write_ray_template(folder: Path) -> Path:
    """Write slurm/train.sbatch as an `executor.ray_template` of nemo-run into `folder`, and return its file.

    Its name has a digest, so that experiments of two versions don't meet. Nothing is written where it is there.
    """
    shebang, *lines = path("train.sbatch").read_text(encoding="utf-8").splitlines()
    flags = [line for line in lines if line.startswith("#SBATCH ")]  # nemo-run's come after them, and win
    body = "\n".join(line for line in lines if not line.startswith("#SBATCH "))
    text = "\n".join([shebang, *flags]) + _HEAD + "{% raw %}" + body + "\n{% endraw %}\n"
    file = folder / f"train-{hashlib.sha256(text.encode()).hexdigest()[:12]}.sub.j2"
    if not file.exists():
        make_folder(folder)
        write_atomic(file, text.encode())
    return file
