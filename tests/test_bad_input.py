"""Bad input: each ends as one message that names what is wrong and what to do, before anything starts or is written.

A row is a name, how the input is broken (None: by the command alone), the command, and the words for what is wrong and
for what to do. Commands run in this process, in a folder of their own that is compared byte for byte before and after;
what they start is heard through Python's audit events and torch's registration of parameters.
"""

import contextlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_house import (
    DEEP,
    LATEST,
    PROGRESS,
    ROWS,
    Break,
    House,
    after,
    appended,
    changed,
    checkpoint,
    comparison,
    copied,
    cut,
    folder,
    header,
    linked_to_itself,
    locked,
    megatron,
    mounted,
    prompts,
    remove,
    stage_1,
    steps,
    table,
    watched,
    write,
)

WITH_CONFIG = ("train", "sweep", "eval", "compare", "doctor", "import-stage1")

# Settings of `astar train`, each with what is wrong and what would do.
SETTINGS: list[tuple[str, str, str]] = [
    # numbers that are none, or out of reach
    ("optim.lr=.nan", "optim.lr: ", "should be a finite number, got nan"),
    ("astar.beta2=.inf", "astar.beta2: ", "should be a finite number, got inf"),
    ("astar.beta1=1e999", "astar.beta1: ", "should be a finite number"),
    ("astar.beta1=1e-320", "astar.beta1: ", "from 1e-30 to 1e30"),
    ("optim.weight_decay=1e300", "optim.weight_decay: ", "from 1e-30 to 1e30"),
    ("optim.lr=-1e-6", "optim.lr: ", "greater than 0, got -1e-06"),
    ("optim.lr=fast", "optim.lr: ", "valid number, got 'fast'"),
    ("optim.lr=", "optim.lr: ", "valid number, got None"),
    ("optim.lr={x: 1}", "optim.lr: ", "valid number, got {'x': 1}"),
    ("train.num_steps=" + 30 * "9", "train.num_steps: ", "at most 10^15"),
    ("train.num_steps=true", "train.num_steps: ", "valid integer, got True"),
    ("train.num_steps=1.0", "train.num_steps: ", "valid integer, got 1.0"),
    ("train.num_steps=1:30", "train.num_steps: ", "valid integer, got '1:30'"),
    ("seed=010", "seed: ", "valid integer, got '010'"),
    ("seed=-1", "seed: ", "greater than or equal to 0"),
    ("seed=4294967296", "seed: ", "less than 4294967296"),
    ("seed=" + 5000 * "9", "--set seed=999", "not readable as YAML"),
    ("train.batch_size=0", "train.batch_size: ", "greater than or equal to 1"),
    ("train.batch_size='8'", "train.batch_size: ", "valid integer, got '8'"),
    ("train.batch_size=1000000000000", "train.batch_size: ", "less than or equal to 1000000"),
    ("sweep.num_samples=1000000000000", "sweep.num_samples: ", "less than or equal to 100000"),
    ("rollout.max_num_seqs=5000", "rollout.max_num_seqs: ", "less than or equal to 4096"),
    ("conversion.bucket_bytes=536870912", "conversion.bucket_bytes: ", "less than or equal to 268435456"),
    ("rollout.gpu_memory_utilization=1.0", "rollout.gpu_memory_utilization: ", "less than 1"),
    ("reward.timeout_seconds=1e7", "reward.timeout_seconds: ", "less than or equal to 1000000"),
    ("cluster.threads=100000", "cluster.threads: ", "less than or equal to 1024"),
    ("astar.beta1=0", "astar.beta1: ", "greater than 0, got 0"),
    ("sampling.top_p=1.1", "sampling.top_p: ", "less than or equal to 1"),
    # words
    ("model.dtype=float16", "model.dtype: ", "should be 'auto', 'bfloat16' or 'float32', got 'float16'"),
    ("objective.name=dpo", "objective.name: ", "'astar', 'oapl', 'grpo', 'rebel', 'ppo' or 'spo'"),
    ("rollout.graphs=1", "rollout.graphs: ", "should be 'none', 'decode' or 'compiled'"),
    ("model.path=3", "model.path: ", "valid string, got 3"),
    ('run_dir="a\\0b"', "run_dir: ", "without NUL"),
    ('data.path="\\ud800"', "data.path: ", "should be a valid string"),
    *(
        (f'{key}=""', f"{key}: ", "at least 1 character")
        for key in ("run_dir", "model.path", "data.path", "sweep.table", "cluster.address")
    ),
    ("cluster.address=localhost", "cluster.address: ", "expected host:port, for example 10.0.0.1:6379"),
    ("cluster.address=ray://10.0.0.1:6379", "cluster.address: ", "expected host:port"),
    ("rollout.heartbeat_seconds=1e-9", "rollout.heartbeat_seconds: ", "greater than or equal to 0.1"),
    ("run_dir=~/run", "run_dir: ", "a path without ~"),
    ("model.path=~/model", "model.path: ", "write it out"),
    ("data.path=$HOME/x.jsonl", "data.path: ", "a text without variables of a shell"),
    ("run_dir=${SCRATCH}/run", "run_dir: ", "nobody replaces here: write it out"),
    ("cluster.address=10.0.0.1:99999", "cluster.address: ", "expected host:port"),
    ("cluster.address=me:hunter2@10.0.0.1:6379", "cluster.address: ", "6379, got one with a login"),
    # keys
    ("optim.learning_rate=1", "optim.learning_rate: no such key; the nearest is optim.lr", "optim has lr, min_lr"),
    ("optim.weight_decays=0.1", "optim.weight_decays: no such key", "the nearest is optim.weight_decay;"),
    ("sampling.temprature=1.0", "sampling.temprature: no such key", "the nearest is sampling.temperature;"),
    ("rollout.num_engines=1000000", "rollout.num_engines: ", "less than or equal to 4096, got 1000000"),
    ("rollouts.num_engines=2", "rollouts: no such key", "the nearest is rollout.num_engines"),
    ("train.lr=1e-6", "train.lr: no such key", "the nearest is optim.lr;"),
    ("data.reward=math", "data.reward: no such key", "the nearest is reward.name;"),
    ("modle.path=x", "modle: no such key", "the nearest is model.path"),
    ("sed=1", "sed: no such key", "the nearest is seed"),
    ("run_dir=runs/a #1", "--set run_dir=runs/a #1: YAML takes # and what follows for a comment", "quotes of its own"),
    ("data.suffix= ####", "YAML takes # and what follows for a comment", """--set 'data.suffix=" ####"'"""),
    ("budget.tokens=[1, 2] # two", "YAML takes # and what follows for a comment", "leave the comment out"),
    ("optim=3", "optim: expected keys with values below it", "optim.lr, got 3"),
    ("data=some.jsonl", "data: expected keys with values below it", "got 'some.jsonl'"),
    ("optim=", "optim: expected keys with values below it", "leave it out if it has none"),
    ("optim={1: 2}", "--set optim={1: 2}: ", "the key '1' needs quotes"),
    ("optim={[1]: 2}", "a key that is no text", "not readable as YAML"),
    ("optim.lr", "--set optim.lr: ", "expected key=value, for example"),
    ("=1", "--set =1: ", "expected key=value"),
    ("optim..lr=1", "--set optim..lr=1: ", "expected key=value"),
    ("optim.lr=[1", "--set optim.lr=[1: ", "expected ',' or ']'"),
    # what does not go together
    ("sampling.top_p=0.9", "sampling.top_p: 0.9, but the loss is of the whole policy", "set it to 1"),
    ("train.batch_size=64 train.mini_batch_size=48", "train.mini_batch_size: 48", "for example 32"),
    ("train.batch_size=64 parallel.data=3", "parallel.data: 3", "for example 2"),
    ("train.mini_batch_size=2 parallel.data=4", "parallel.data: 4", "for example 2"),
    ("optim.schedule=cosine optim.min_lr=1e-5", "optim.min_lr: ", "lower it"),
    *(
        (f"budget.{amounts}", f"budget.{amounts.split('=')[0]}: ", "expected an amount greater than 0, or several that")
        for amounts in ("tokens=0", "tokens=[]", "tokens=[5,5]", "flops=[2e9,1e9]", "seconds=-1.0")
    ),
    ("budget.tokens=many", "budget.tokens: ", "valid list"),
    ("budget.flops=1e40", "budget.flops: ", "at most 1e+30"),
    ("optim.min_lr=1e-7", "optim.min_lr: ", "set optim.schedule"),
    ("optim.schedule=wsd", "optim.decay_steps: ", "schedule wsd needs it"),
    ("optim.schedule=cosine optim.decay_steps=3", "optim.decay_steps: ", "no other has it"),
    (
        "optim.schedule=wsd optim.decay_steps=50 optim.warmup_steps=50",
        "optim.warmup_steps: 100 with optim.decay_steps",
        "lower them",
    ),
    ("optim.warmup_steps=100", "optim.warmup_steps: ", "lower them"),
    ("model.fp8=tensorwise model.dtype=float32", "model.fp8: ", "set model.dtype=bfloat16"),
    ("eval.benchmarks=[amc23]", "eval.folder: needed for", "set it to the folder of their files"),
    ("objective.name=grpo train.batch_size=60", "grpo.group_size: groups of 8", "to multiples of 8"),
    ("objective.name=rebel train.batch_size=15", "rebel: groups of 2", "to multiples of 2"),
    ("objective.name=oapl train.mini_batch_size=4", "oapl.group_size: groups of 8", "to multiples of 8"),
    ("objective.name=oapl oapl.group_size=1", "oapl.group_size: ", "take 2 or more"),
    ("objective.name=oapl oapl.refresh_steps=100", "oapl.refresh_steps: 100, but the run has 100 steps", "lower it"),
    ("objective.name=rebel rollout.max_staleness=1", "rollout.max_staleness: 1, but rebel", "set it to 0"),
    ("objective.name=spo rollout.max_staleness=2", "rollout.max_staleness: 2, but spo", "set it to 0"),
    ("objective.name=grpo optim.loss_scale=pg", "optim.loss_scale: ", "leave the key out"),
    ("objective.name=spo train.batch_size=1", "train.batch_size: 1, but spo", "take 2 or more"),
    ("objective.name=spo spo.least_decay=0.97", "spo.least_decay: 0.97", "lower it"),
    ("sampling.max_response_tokens=1000", "1030 exceeds the 160 positions", "lower one of them"),
    ("parallel.pipeline=4", "divide by pipeline=4", "that fits: pipeline=2"),
    ("parallel.context=1000000000000", "parallel.context: ", "less than or equal to 4096"),
    ("parallel.tensor=4096 parallel.pipeline=4096", "16777216 ranks", "expected at most 65536"),
    ("parallel.tensor=5", "divide by tensor=5", "that fits: one rank"),
    ("rollout.tensor=5", "rollout.tensor: ", "it does by 1, 2"),
]

type Row = tuple[str, Break | None, str, str, str]  # name, broken, command, what is wrong, what to do

CONFIGURATION: list[Row] = [
    ("empty", write("run.yaml", "# x\n"), "train", "run.yaml: expected a mapping of keys", "configs/"),
    ("no keys", write("run.yaml", "seed: 1\n"), "train", "reward: this key", "is required"),
    ("half a list", write("run.yaml", "a: [\n"), "train", "run.yaml: not readable as YAML", "line 2"),
    ("a list", write("run.yaml", "- a\n"), "train", "run.yaml: expected a mapping of keys", "got list"),
    ("numbers as keys", write("run.yaml", "1: 2\n"), "train", "run.yaml: not readable", "the key '1' needs quotes"),
    ("latin-1", appended("run.yaml", b"# caf\xe9\n"), "train", "run.yaml: not readable as YAML", "in UTF-8"),
    ("NUL", appended("run.yaml", b"\0"), "train", "run.yaml: not readable", "special characters are not allowed"),
    ("a tab", appended("run.yaml", b"optim:\n\tlr: 1\n"), "train", "run.yaml: not readable", "line 13"),
    ("two documents", appended("run.yaml", b"---\na: 1\n"), "train", "run.yaml: not", "expected a single document"),
    ("a tag", appended("run.yaml", b"seed: !!python/name:os.x\n"), "train", "run.yaml: not readable", "line 12"),
    ("a key twice", appended("run.yaml", b"seed: 1\nseed: 2\n"), "train", "'seed' stands twice", "line 13"),
    ("a list as key", appended("run.yaml", b"? [a]\n: b\n"), "train", "run.yaml: not", "a key that is no text"),
    ("brackets", write("run.yaml", 5000 * "["), "train", "run.yaml: not readable", "repair the file"),
    ("no file", None, "train --config {house}/absent.yaml", "absent.yaml: no such", "configs/"),
    ("a folder", None, "train --config {house}", "can't read the configuration", "name a YAML file"),
    ("a loop", linked_to_itself("a.yaml"), "train --config {house}/a.yaml", "a.yaml: can't read", "name a YAML file"),
    ("no base", appended("run.yaml", b"base: b.yaml\n"), "train", "b.yaml: no such configuration", "configs/"),
    ("base of base", appended("run.yaml", b"base: run.yaml\n"), "train", "a base of its own", "merge the two files"),
    ("base: a list", appended("run.yaml", b"base: [a]\n"), "train", "base: expected a file name", "got ['a']"),
    ("one --set", None, "compare --methods astar --budget tokens=9 --set seed=1 optim.lr=2",
     "--set seed=1 optim.lr=2", "--set seed=1 --set optim.lr=2"),
    ("no command", None, "trian", "No such command 'trian'", "Did you mean 'train'?"),
    ("no option", None, "compare --methods astar", "Missing option", "--budget"),
]  # fmt: skip

DATA: list[Row] = [
    ("empty", write("prompts.jsonl", b"\n\n"), "train", "prompts.jsonl: holds no prompt", "one JSON object a line"),
    ("latin-1", write("prompts.jsonl", b'\n\n{"question": "\xe9"}'), "train", "line 3: not UTF-8", "to UTF-8"),
    ("text", prompts(ROWS[0], "text"), "train", "line 2: expected a JSON object", "got str"),
    ("half a line", appended("prompts.jsonl", b'{"question":'), "train", "line 3: not JSON", "one object a line"),
    ("brackets", write("prompts.jsonl", DEEP), "train", "line 1: not JSON", "one object a line"),
    ("a key twice", write("prompts.jsonl", b'{"a": 1, "a": 2}'), "train", "the key 'a' stands twice", "line 1"),
    ("no answer", prompts(ROWS[0], {"question": "a"}), "train", "line 2: no field 'answer'", "set data.answer_field"),
    ("no question", prompts({"problem": "a"}), "train", "line 1: no field 'question'", "set data.prompt_field"),
    ("blank", prompts({"question": " \n", "answer": "1"}), "train", "'question' is empty", "remove the line"),
    ("null", prompts({"question": "a", "answer": None}), "train", "'answer' is None", "fill it"),
    ("a truth", prompts({"question": "a", "answer": True}), "train", "is bool, expected text", "data.answer_field"),
    ("a number", prompts({"question": 4, "answer": "4"}), "train", "is int, expected text", "data.prompt_field"),
    ("half a pair", write("prompts.jsonl", b'{"question": "\\ud800"}'), "train", "half a surrogate pair", "repair it"),
    ("1e-300000000", write("prompts.jsonl", b'{"question": "a", "answer": 1e-300000000}'),
     "train", "the number 1e-300000000 has more than", "write it as text"),
    ("two answers", prompts(*ROWS, ROWS[0] | {"answer": "5"}), "train",
     "line 3: its prompt has two answers, '2' (line 1) and '5' (line 3)", "one, of two spellings either ("),
    ("one prompt of two", write("model/chat_template.jinja", "x"), "train", "are the same to the model", "repair its"),
    ("no number", prompts({"question": "a", "answer": "x"}), "train", "expected a number, got 'x'",
     "repair the reward"),
    ("too long", None, "train --set data.max_prompt_tokens=5", "2 of 2 prompts exceed", "raise data.max_prompt_tokens"),
    ("no file", remove("prompts.jsonl"), "train", "prompts.jsonl: can't read", "of a run data.path"),
    ("a folder", folder("prompts.jsonl"), "sweep", "prompts.jsonl: holds no prompt", "one JSON object a line"),
    ("a loop", linked_to_itself("prompts.jsonl"), "sweep", "prompts.jsonl: can't read", "of a run data.path"),
    ("no evaluation", None, "train --set data.eval_path=/nowhere.jsonl", "/nowhere.jsonl: can't", "data.eval_path"),
    ("no Parquet", write("x.parquet", b"PAR1xx"), "train --set data.path={house}/x.parquet", "x.parquet", "copy it"),
    ("unknown reward", None, "sweep --set reward.name=last_numbr", "no reward 'last_numbr'", "is last_number"),
    ("no module", None, "sweep --set reward.name=nowhere:f", "'nowhere:f'", "expected package.module:function"),
    ("a reward of NaN", write("desk/gives_nan.py", "def f(response, answer):\n    return float('nan')\n"),
     "sweep --set reward.name=gives_nan:f", "reward gives_nan:f returned nan", "repair the reward"),
    ("no Python", write("desk/no_python.py", "def f(:"), "sweep --set reward.name=no_python:f", "SyntaxError",
     "expected"),
    ("a reward that exits", write("desk/exits.py", "raise SystemExit"), "sweep --set reward.name=exits:f",
     "reward.name: exits:f can't be loaded", "expected package.module:function"),
    ("a reward that hangs", write("desk/hangs.py", "def f(response, answer):\n    while True: pass\n"),
     "sweep --set reward.name=hangs:f --set reward.timeout_seconds=0.3", "took more than 0.3 s", "repair the reward"),
    ("jsonl: no source", None, "data jsonl no.jsonl --out x.jsonl", "no.jsonl: can't read", "check"),
    ("jsonl: a folder as --out", None, "data jsonl {house}/prompts.jsonl --out .", "--out: '.' is",
     "name a file in it"),
    ("jsonl: --out is the source", None, "data jsonl {house}/prompts.jsonl --out {house}/prompts.jsonl",
     "which the rows come from", "choose another path"),
    ("jsonl: --out is there", write("out.jsonl", "mine"), "data jsonl {house}/prompts.jsonl --out {house}/out.jsonl",
     "is there with other prompts", "remove it"),
    ("jsonl: --out in a file", None, "data jsonl {house}/prompts.jsonl --out {house}/prompts.jsonl/x",
     "is no folder that you may write to", "choose another path"),
    ("jsonl: no field", None, "data jsonl {house}/prompts.jsonl --out x --question-field q",
     "no field 'q'", "set --question-field"),
    ("jsonl: no answer", None, "data jsonl {house}/prompts.jsonl --out x --answer-field a",
     "no field 'a'", "set --answer-field"),
    ("jsonl: no file", None, "data jsonl {house}/no.jsonl --out x", "no.jsonl: can't read", "check the path"),
    ("math: no question", None, "data math {house}/prompts.jsonl --out x", "no field 'problem'",
     "rename the field, or use astar data jsonl with --question-field"),
    ("jsonl: unknown reward", None, "data jsonl {house}/prompts.jsonl --out x --reward mth",
     "no reward 'mth'", "the nearest is math"),
    *((f"gsm8k: {name}", None, f"data gsm8k {name} --out x.jsonl", f"{name}: no such file", "owner/name")
      for name in ("gsm8k.jsonl", "./gsm8k", "/no/such/file", "a/b/c")),
    ("math: no answer", prompts({"problem": "a", "solution": "b"}), "data math {house}/prompts.jsonl --out x",
     "line 1: field 'solution'", "has no closed \\boxed{...}"),
    ("made: too many", None, "data countdown --rows 1000000000000 --out x", "'--rows'",
     "less than or equal to 1000000"),
    ("import: other columns", None, "data import-stage1 {house}/prompts.jsonl", "no stage-1 data set", "response_0"),
    ("import: a suffix", stage_1(), "data import-stage1 {house}/stage_1.jsonl --set data.suffix=y",
     "data.suffix: 1 of 1 prompts", "set it to what all end with"),
    ("import: sample 10^17", stage_1(**{"response_" + "9" * 17: "2", "eval_" + "9" * 17: 1.0}),
     "data import-stage1 {house}/stage_1.jsonl", "is beyond response_99999", "number them from 0"),
    ("import: other prompts", stage_1(), "data import-stage1 {house}/stage_1.jsonl",
     "is there with other prompts", "choose another path"),
]  # fmt: skip

CONFIG, WEIGHTS = "model/config.json", "model/model.safetensors"
MODELS: list[Row] = [
    ("no folder", None, "train --set model.path=/no/folder", "model.path: /no/folder", "name one that has"),
    ("a name of the hub", None, "train --set model.path=Qwen/Qwen2.5-1.5B", "model.path: Qwen/Qwen2.5-1.5B is no",
     "If it is a name of the hub: .venv/bin/hf download Qwen/Qwen2.5-1.5B --local-dir runs/models/Qwen2.5-1.5B, then"),
    ("a CPU without such heads", changed(CONFIG, head_dim=20), "doctor", "model.path: its attention heads have 20",
     "heads on a CPU of 32, 64, 80, 96, 112"),
    ("a file", None, "train --set model.path={house}/run.yaml", "Not a directory", "name a model folder"),
    ("a loop", linked_to_itself("loop"), "train --set model.path={house}/loop", "model.path: ", "name a model folder"),
    ("config.json: a folder", folder(CONFIG), "train", "config.json: can't be read", "name a model folder"),
    ("config.json: empty", write(CONFIG, ""), "train", "config.json is no JSON", "copy the file again"),
    ("config.json: byte order mark", write(CONFIG, b"\xef\xbb\xbf{}"), "train", "is no JSON", "copy the file again"),
    ("config.json: brackets", write(CONFIG, DEEP), "train", "config.json is no JSON", "copy the file again"),
    ("config.json: a list", write(CONFIG, "[]"), "train", "expected a JSON object", "copy the file again"),
    ("another family", changed(CONFIG, architectures=["MambaForCausalLM"], model_type="mamba"), "train",
     "MambaForCausalLM", "known are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
    ("Gemma", changed(CONFIG, architectures=["Gemma2ForCausalLM"]), "sweep", "Gemma2ForCausalLM is not",
     "megatron-core"),
    ("code of its own", changed(CONFIG, auto_map={}), "train", "auto_map={}", "is not modelled"),
    ("quantised", changed(CONFIG, quantization_config={"bits": 4}), "train", "quantization_config", "only None"),
    ("a rope of its own", changed(CONFIG, rope_parameters={"rope_type": "yarn"}), "train", "'yarn'", "only 'default'"),
    ("NaN", changed(CONFIG, rms_norm_eps=float("nan")), "train", "rms_norm_eps=nan", "expected a number above 0"),
    ("vocabulary: text", changed(CONFIG, vocab_size="263"), "train", "vocab_size='263'", "expected a whole number"),
    ("vocabulary: smaller", changed(CONFIG, vocab_size=10), "train", "expected (10, 48)", "from the same model"),
    ("10^9 layers", changed(CONFIG, num_hidden_layers=10**9), "train", "num_hidden_layers=1000000000", "damaged?"),
    ("a layer more", changed(CONFIG, num_hidden_layers=7), "train", "does not hold model.layers.6", "the same model"),
    ("weights: none", remove(WEIGHTS), "train", "has neither model.safetensors nor", "copy the weights there too"),
    ("weights: a folder", folder(WEIGHTS), "train", "model.safetensors is damaged", "copy it again"),
    ("weights: empty", write(WEIGHTS, ""), "train", "header too small", "copy it again"),
    ("weights: cut", cut(WEIGHTS), "sweep", "model.safetensors is damaged, truncated", "copy it again"),
    ("weights: header of 2^64", write(WEIGHTS, b"\xff" * 99), "train", "header too large", "copy it again"),
    ("weights: no header", write(WEIGHTS, b"\x04" + 7 * b"\0" + b"junk"), "train", "invalid JSON", "copy it again"),
    ("weights: unknown type", header(dtype="FOO"), "train", "unknown variant `FOO`", "copy it again"),
    ("weights: another type", header(dtype="I64"), "train", "invalid shape, data type, or offset", "copy it again"),
    ("weights: whole numbers", header(dtype="I32"), "train", "has dtype I32", "convert it"),
    ("weights: behind zero", header(data_offsets=[-4, 8]), "train", "invalid value: integer `-4`", "copy it again"),
    ("weights: pickled", after(remove(WEIGHTS), write("model/pytorch_model.bin", "")), "train",
     "pytorch_model.bin is a pickle checkpoint", "use safetensors"),
    ("index: brackets", write(f"{WEIGHTS}.index.json", DEEP), "train", "no safetensors index", "copy the file again"),
    ("index: another folder", after(remove(WEIGHTS), write(f"{WEIGHTS}.index.json", '{"weight_map": {"a": ".."}}')),
     "train", "names '..'", "which is not a file of this folder"),
    ("index: a missing file", after(remove(WEIGHTS), write(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "x"}}')),
     "train", "names x, which is missing", "copy it there too"),
    ("tokenizer: none", remove("model/tokenizer.json"), "train", "has no tokenizer that", "add tokenizer.json"),
    ("tokenizer: damaged", write("model/tokenizer.json", "{}"), "train", "has no tokenizer that", "add tokenizer.json"),
    ("template: none", remove("model/chat_template.jinja"), "train", "no chat template", "add chat_template.jinja"),
    ("template: no template", write("model/chat_template.jinja", "{% for %}"), "train", "can't format", "repair the"),
    ("template: refuses", write("model/chat_template.jinja", "{{ raise_exception('system first') }}"), "train",
     "system first", "repair the template"),
    ("template: endless", write("model/chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}"), "train",
     "Range too big", "repair the template"),
    ("ends: text", write("model/generation_config.json", '{"eos_token_id": "x"}'), "train", "'x'", "repair gen"),
    ("ends: brackets", write("model/generation_config.json", DEEP), "train", "generation_config.json: not", "repair"),
    ("ends: no such token", write("model/generation_config.json", '{"eos_token_id": 999}'), "train",
     "token 999, for which the model has no row", "eos_token_id in generation_config.json"),
    ("eval: no export", None, "eval", "no model to evaluate", "run `astar train` first"),
    ("eval: no folder", None, "eval --model {house}/no", "no model to evaluate", "name a folder with --model"),
    ("eval: a run", folder("run/hf"), "eval --model {house}/run", "that is a folder of a run", "run/hf"),
    ("eval: checkpoints", folder("run/checkpoints/step_00000007"), "eval --model {house}/run/checkpoints",
     "that is a folder of a run", "run/checkpoints/step_00000007"),
    ("eval: another tokenizer", after(copied("model", "other"), write("other/tokenizer_config.json", "{}")),
     "eval --model {house}/other", "its tokenizer is not that of model.path", "set model.path to it"),
    ("eval: no weights", after(copied("model", "other"), remove("other/model.safetensors")),
     "eval --model {house}/other", "other has neither", "copy the weights there too"),
    ("eval: no benchmark", None, "eval --model {house}/model --benchmarks [ --data .", "benchmark '['",
     "there are gsm8k"),
    ("eval: no name of a benchmark", None, "eval --model {house}/model --benchmarks ,", "--benchmarks: expected names",
     "without it the run's prompts are asked"),
    ("eval: a folder of no benchmarks", None, "eval --model {house}/model --data .", "--data: the folder of benchmarks",
     "name them too, as --benchmarks"),
    ("eval: a benchmark twice", None, "eval --model {house}/model --benchmarks amc23,amc23 --data .",
     "eval.benchmarks: amc23 more than once", "name each once"),
    ("eval: no files", None, "eval --model {house}/model --benchmarks amc23 --data /", "eval.folder: amc23",
     "amc23.jsonl"),
    ("eval: no folder of files", None, "eval --benchmarks amc23,aime24 --model {house}/model",
     "eval.folder: needed for eval.benchmarks amc23, aime24", "for `astar eval` also by --data"),
]  # fmt: skip

CHECKPOINTS: list[Row] = [
    ("no table", None, "train", "no V* table here", "run `astar sweep`"),
    ("table: no folder", write("run/v_star", "x"), "sweep", "run/v_star: can't create", "choose another folder"),
    ("table: of another model", table(model_digest="f" * 64), "train", "the table ffffffffffff", "choose another"),
    ("table: of other sampling", table(temperature=0.5), "doctor", "this run has 1.0", "set your settings"),
    ("table: header of a list", after(table(), write("run/v_star/header.json", "[]")), "train",
     "header.json: not the header of a V* table", "restore it"),
    ("table: header of later", after(table(), changed("run/v_star/header.json", format=9)), "train",
     "has format 9", "use the version that wrote it"),
    *((f"table: no header, {command[:8]}", after(table(), remove("run/v_star/header.json")), command,
       "V* shards without header", "restore")
      for command in ("sweep", "train", "doctor", "compare --methods astar --budget tokens=9")),
    ("table: all left out", table(), "train --set filter.all_right=0", "filter: none of the 2", "raise filter"),
    ("table: in the model", None, "sweep --set sweep.table={house}/model", "sweep.table: ", "choose another place"),
    ("run_dir: in the model", None, "sweep --set run_dir={house}/model/run", "run_dir: ", "choose another place"),
    ("run_dir: the model in it", lambda house: shutil.move(house / "model", house / "run/hf"),
     "sweep --set model.path={house}/run/hf", "model.path: ", "choose another run_dir"),
    ("run_dir: a file", write("run", "x"), "sweep", "run_dir: can't make", "choose another folder"),
    ("run_dir: a loop", linked_to_itself("run"), "sweep", "run_dir: can't make", "choose another folder"),
    ("run_dir: of the kernel", None, "sweep --set run_dir=/sys/run", "run_dir: can't make /sys/run", "choose another"),
    ("run_dir: in use", locked("run/train.lock"), "train --set objective.name=grpo", "is running", "wait for its end"),
    ("rollouts: a file", after(table(), write("run/rollouts", "x")), "train", "run/rollouts is no folder", "move it"),
    ("bad batches: a file", after(table(), write("run/bad_batches", "x")), "train", "bad_batches is no folder", "move"),
    ("placement: a folder", after(table(), folder("run/placement.json")), "train", "placement.json is a folder",
     "move it away"),
    ("address: no name of a host", table(), "train --set cluster.address=xn--a:6379",
     "cluster.address: no Ray cluster answers at 'xn--a:6379'", "leave the key out"),
    ("metrics: a line", after(table(), write("run/metrics.jsonl", '{"step": 0}\n5\n{"step": 1}\n')), "train",
     "metrics.jsonl, line 2", "repair or remove the file"),
    ("metrics: latin-1", after(table(), write("run/metrics.jsonl", b"\xe9")), "train", "metrics.jsonl: can't",
     "remove"),
    ("metrics: brackets", after(table(), write("run/metrics.jsonl", DEEP + b"\n{}")), "train", "line 1", "remove"),
    ("metrics: fewer steps", after(checkpoint(), write("run/metrics.jsonl", steps(6))), "train",
     "metrics.jsonl: it has 6 of the 7 steps", "put the file there as it was"),
    ("metrics: of an end", after(table(), write("run/metrics.jsonl", steps(4)), write("run/hf/conversion.json", "{}")),
     "train", "metrics.jsonl: this run has ended after 4 steps, and there is no checkpoint", "new run_dir"),
    ("metrics: a folder", after(table(), folder("run/metrics.jsonl")), "train", "metrics.jsonl: can't", "remove it"),
    ("export: a model", after(table(), copied("model", "run/hf")), "train", "it has no conversion.json",
     "another place"),
    ("export: a loop", after(table(), linked_to_itself("run/hf")), "train", "can't write", "choose another"),
    ("fewer steps", checkpoint(), "train --set train.num_steps=6", "written after 7 steps", "raise it"),
    ("another seed", checkpoint(), "train --set seed=1", "seed: 1, but the checkpoint's order of prompts is of 0",
     "set it as it was"),
    ("other prompts", after(checkpoint(), prompts(ROWS[0])), "train", "data.path: its prompts are not",
     "new run_dir"),
    ("another method", checkpoint(), "train --set objective.name=grpo", "was trained with astar", "set it to astar"),
    ("another type", checkpoint(dtype="bfloat16"), "train --set model.dtype=float32", "model.dtype: this run computes",
     "set it to bfloat16"),
    ("another contract", checkpoint(contract={"temperature": 0.5}), "train", "the checkpoint 0.5",
     "choose a new run_dir"),
    *((f"progress: {data[:3]!r}", after(checkpoint(), write(PROGRESS, data)), "train",
       "step_00000007 is damaged: progress.json ", "to start over")
      for data in (b'{"st', b"{}", b"[]", b"\xe9", DEEP)),
    *((f"progress: {name} of {value!r}", checkpoint(**{name: value}), "train", f"missing or damaged ({name})",
       "to start over") for name, value in
      (("step", "x"), ("step", -1), ("step", 7.5), ("contract", None), ("settings", [1]), ("prompts", []))),
    *((f"latest: {data[:3]!r}", after(checkpoint(), write(LATEST, data)), "train", "latest names",
       "step_00000007 is whole")
      for data in (b"", b"\xe9", b"step_00000009", b"/etc", 5000 * b"a")),
    ("latest: a folder", after(checkpoint(), folder(LATEST)), "train", "latest: can't read", "to start over"),
    ("checkpoints: a file", after(table(), write("run/checkpoints", "")), "train", "latest: can't read", "new run_dir"),
    ("checkpoints: a loop", after(table(), linked_to_itself("run/checkpoints")), "train", "latest: can't",
     "new run_dir"),
]  # fmt: skip

CONVERT, BACK = "convert hf-to-megatron {house}/model", "convert megatron-to-hf {house}/megatron out"
RECORD, INDEX = "megatron/conversion.json", "megatron/.metadata"
PLANNED: list[Row] = [  # which a dry run refuses too
    ("no source", None, "convert hf-to-megatron {house}/no out", "{house}/no does not exist",
     "name a model's folder"),
    ("onto itself", None, f"{CONVERT} {{house}}/model", "no export of this project", "choose another place"),
    ("into itself", None, f"{CONVERT} {{house}}/model/out", "lies in the other", "beside the source"),
    ("onto a model", copied("model", "other"), f"{CONVERT} {{house}}/other", "it has no conversion.json", "another"),
    ("onto a loop", linked_to_itself("loop"), f"{CONVERT} {{house}}/loop", "can't write", "another destination"),
    ("from a loop", linked_to_itself("loop"), "convert hf-to-megatron {house}/loop out", "loop", "another path"),
    ("into a file", None, f"{CONVERT} {{house}}/run.yaml/out", "can't write", "another destination"),
    ("into the kernel", None, f"{CONVERT} /sys/out", "can't write /sys/out", "another destination"),
    ("too long a name", None, f"{CONVERT} {300 * 'x'}", "File name too long", "another destination"),
    ("no such share", None, f"{CONVERT} out --pp 4", "pipeline=4", "it does by 1, 2, 3, 6"),
    ("no experts", None, f"{CONVERT} out --ep 2", "expert", "no experts"),
    ("no rank", None, f"{CONVERT} out --tp 0", "tensor=0", "at least 1"),
    ("10^12 ranks", None, f"{CONVERT} out --pp 1000000000000", "1000000000000 ranks", "expected at most 65536"),
    ("a missing shard", after(remove(WEIGHTS), write(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "x"}}')),
     f"{CONVERT} out", "names x, which is missing", "copy it there too"),
]  # fmt: skip
CONVERSION: list[Row] = [
    *PLANNED,
    *((f"{name}, dry", broken, f"{command} --dry-run", wrong, remedy)
      for name, broken, command, wrong, remedy in PLANNED),
    ("a file", None, "convert inspect {house}/run.yaml", "run.yaml is neither", "config.json and safetensors"),
    ("metadata.json: brackets", after(megatron, write("megatron/metadata.json", DEEP)), BACK, "metadata.json", "is no"),
    ("metadata.json: another kind", after(megatron, changed("megatron/metadata.json", sharded_backend="zarr")), BACK,
     "sharded_backend 'zarr'", "expected 'torch_dist'"),
    ("index: damaged", after(megatron, write(INDEX, "junk")), BACK, ".metadata is damaged", "no index of a checkpoint"),
    ("index: a program", after(megatron, write(INDEX, b"cos\nsystem\n(S'true'\ntR.")), BACK, "os.system", "no index"),
    ("parts: none", after(megatron, remove("megatron/__0_0.distcp")), BACK, "__0_0.distcp is missing",
     ".metadata names"),
    ("like: of no checkpoint", None, "convert inspect {house}/model --like {house}/model",
     "--like: of a checkpoint of Megatron, but", "leave it out"),
    ("like: of two folders", None, "convert verify {house}/model {house}/model --like {house}/model",
     "--like: of a checkpoint of Megatron, but", "leave it out"),
    ("config.json: none", after(megatron, remove("megatron/config.json")), BACK, "has no config.json", "with --like"),
    ("config.json: another", after(megatron, changed("megatron/config.json", rms_norm_eps=0.5)), BACK,
     "conversion.json records another computation", "restore config.json"),
    ("record: damaged", after(megatron, write(RECORD, "{")), BACK, "conversion.json is no JSON", "remove it if"),
    ("record: brackets", after(megatron, write(RECORD, DEEP)), BACK, "conversion.json is no JSON", "remove it if"),
    ("record: a folder", after(megatron, folder(RECORD)), BACK, "conversion.json can't be read", "remove it"),
    ("record: another's digests", after(megatron, changed(RECORD, digests={"lm_head.weight": "0"})), BACK,
     "not what conversion.json there records", "take it from a copy"),
    ("verify: one", None, "convert verify {house}/model", "Missing argument", "'b'"),
]  # fmt: skip

COMPARE = "compare --methods grpo --budget tokens=9"
COMPARISON: list[Row] = [
    *((f"methods {methods!r}", None, f"compare --methods '{methods}' --budget tokens=9", "--methods: ", words)
      for methods, words in (("astar,dpo", "there are astar"), (",", "expected one"), ("grpo,grpo", "name each once"))),
    *((f"seeds {seeds[:9]!r}", None, f"{COMPARE} --seeds '{seeds}'", "--seeds: ", words)
      for seeds, words in (("", "expected"), ("0,-1", "expected"), ("x", "expected"), (5000 * "9", "below 2**32"),
                           ("1,0,01", "name each once"))),
    *((f"budget {budget!r}", None, f"compare --methods grpo --budget {budget}", "--budget: ", "expected tokens=N")
      for budget in ("token=9", "tokens", "tokens=many", "tokens=0", "flops=-1", "seconds=nan", "flops=inf",
                     "tokens=1.5", "tokens=1e300")),
    ("two budgets", None, f"{COMPARE} --set budget.tokens=5", "budget: ", "leave the keys out"),
    ("a method that can't", None, f"{COMPARE} --set train.batch_size=60", "grpo.group_size: groups of",
     "multiples of 8"),
    ("out: a file", write("out", ""), f"{COMPARE} --out {{house}}/out", "out: is a file", "choose another --out"),
    ("out: a loop", linked_to_itself("out"), f"{COMPARE} --out {{house}}/out", "out: can't create", "choose another"),
    ("out: a model", None, f"{COMPARE} --out {{house}}/model", "holds files but no compare.json", "another --out"),
    *((f"out: {text[:9]!r}", comparison(text), f"{COMPARE} --out {{house}}/out", "compare.json: not a comparison's",
       "remove the file") for text in
      ("[]", "{", DEEP, '{"settings": {}, "runs": [{"method": "dpo", "seed": 1, "state": "finished"}]}')),
    ("out: other settings", comparison('{"settings": {"optim.lr": 9}, "runs": []}'), f"{COMPARE} --out {{house}}/out",
     "optim.lr: 9 there, 1e-06 now", "choose another --out"),
]  # fmt: skip

ENVIRONMENT: list[Row] = [
    ("too little memory", None, "sweep --set rollout.kv_cache_gib=1000000", "memory: this run needs",
     "lower rollout.kv"),
    ("too small a disk", table(), "train --set checkpoint.keep=1000000000", "training will write", "checkpoint.keep"),
    ("a full disk", mounted("small", "size=64k"), "data multiply --rows 2000 --out {house}/small/out.jsonl",
     "No space left on device", "free some space"),
    ("a full disk for a model", mounted("small", "size=64k"), f"{CONVERT} {{house}}/small/out", "no room for",
     "are free"),
    ("a read-only disk", mounted("small", "ro"), "sweep --set run_dir={house}/small/run",
     "run_dir: can't make", "choose another folder"),
    *((f"a read-only run: {command.split()[0]}", mounted("run", "ro"), command, "run_dir: can't write to", "another")
      for command in ("train --set objective.name=grpo", "eval --model {house}/model")),
    ("no cluster", None, "sweep --set cluster.address=127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'",
     "ray start"),
    ("graphs without a GPU", None, "train --set rollout.graphs=decode", "rollout.graphs=decode", "leave the key out"),
]  # fmt: skip


def _of_setting(settings: str, wrong: str, remedy: str) -> Row:
    """A space before a key divides several."""
    overrides = " ".join(f"--set {shlex.quote(setting)}" for setting in re.split(r" (?=\w+\.)", settings))
    return settings[:60], None, f"train {overrides}", wrong, remedy


FIELDS: dict[str, list[Row]] = {
    "setting": [_of_setting(*row) for row in SETTINGS],
    "configuration": CONFIGURATION,
    "data": DATA,
    "model": MODELS,
    "checkpoint": CHECKPOINTS,
    "conversion": CONVERSION,
    "comparison": COMPARISON,
    "environment": ENVIRONMENT,
}


def test_the_watch_hears_of_processes_and_models_and_files_that_change(tmp_path: Path, tied_llama: Path) -> None:
    with watched() as started:
        subprocess.run(["true"], check=True)
        torch.nn.Linear(1, 1)
    assert [word.split()[0] for word in started] == ["subprocess.Popen", "Linear", "Linear"]
    house = House.build(tmp_path / "house", tied_llama)
    before = house.digests()
    appended("model/config.json", b" ")(house)
    assert [name for name, digest in house.digests().items() if before[name] != digest] == ["model/config.json"]


@pytest.fixture(scope="module")
def whole_house(tmp_path_factory: pytest.TempPathFactory, tied_llama: Path) -> House:
    return House.build(tmp_path_factory.mktemp("house"), tied_llama)


@pytest.mark.timeout(120)  # what hangs is found
@pytest.mark.parametrize(
    ("broken", "command", "wrong", "remedy"),
    [pytest.param(*row, id=f"{name}, {title}") for name, rows in FIELDS.items() for title, *row in rows],
)
def test_bad_input_is_named_before_anything_starts_or_is_written(
    broken: Break | None, command: str, wrong: str, remedy: str, astar: Any, whole_house: House, tmp_path: Path
) -> None:
    house = House.build(tmp_path / "house", whole_house / "model") if broken else whole_house
    (house / "desk").mkdir(exist_ok=True)
    words = [word.replace("{house}", str(house.folder)) for word in shlex.split(command)]
    words += ["--config", str(house / "run.yaml")] if set(WITH_CONFIG) & {*words} and "--config" not in words else []
    with house.ends:
        if broken:
            broken(house)
        before = house.digests()
        with contextlib.chdir(house / "desk"), watched() as started:
            status, _, error = astar(*words)
        after_it = house.digests()
    assert status == (1 if "Ray" in wrong else 2), error
    wanted = (wrong.replace("{house}", str(house.folder)), remedy)
    assert [word for word in wanted if word not in error] == [], error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith(("astar: ", "Error: "))]) == 1, error
    assert started == []
    assert after_it == before
