"""What live engines load by themselves, proved against the folder's files before they draw anything."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from drawing import drawn
from safetensors.torch import load_file, save_file

from astar_megatron import config
from astar_megatron.run.fleet import cluster_of, start_engines
from astar_megatron.run.weights import LoadedWeights
from astar_megatron.sweep import main
from astar_megatron.types import Prompt
from conversion.folders import ModelFolderError

NAME = "model.layers.3.self_attn.v_proj.weight"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("dtype", "tensor"), [("float32", 1), ("bfloat16", 2)])
def test_an_engine_that_loaded_another_file_too_is_named(
    dtype: str, tensor: int, run_tree: Any, untied_qwen2: Path, tmp_path: Path
) -> None:
    """vLLM reads every file of a folder without an index: here one more than is checked, with one row of another."""
    tree = run_tree(untied_qwen2) | {"rollout": {"max_num_seqs": 16, "tensor": tensor}}
    tree["model"]["dtype"] = dtype
    cfg = config.validate(tree | {"cluster": {"start_timeout_seconds": 900.0}})
    both, merged = (shutil.copytree(untied_qwen2, tmp_path / name) for name in ("both", "merged"))
    weights = load_file(untied_qwen2 / "model.safetensors")
    weights[NAME][37] *= 1.01
    save_file({NAME: weights[NAME]}, both / "newer.safetensors")  # vLLM reads it last
    save_file(weights, merged / "model.safetensors")
    with cluster_of(cfg, with_policy=False) as cluster, closing(start_engines(cfg, cluster, str(both))) as engines:
        checked, really_loaded = (LoadedWeights(folder, tensor, dtype) for folder in (both, merged))
        engines.start()
        really_loaded.verify(engines)
        with pytest.raises(
            ModelFolderError, match=r"of engine 0 loaded another model\.layers\.3\.self_attn\.v_proj"
        ) as error:
            checked.verify(engines)
        prompt = Prompt(uid="p", token_ids=(3, 4, 5), text="", answer="")
        assert drawn(engines, prompt, cfg.sampling)[0].token_ids
    assert "first bad row 37: digest expected" in str(error.value)


def test_a_sweep_refuses_such_a_folder_before_it_starts_anything(
    run_tree: Any, tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    folder = shutil.copytree(tied_llama, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "backup.safetensors")
    with pytest.raises(ValueError, match=r"model\.path: .* holds backup\.safetensors beside model\.safetensors"):
        main(config.validate(run_tree(folder)))
    assert not (tmp_path / "run").exists()
