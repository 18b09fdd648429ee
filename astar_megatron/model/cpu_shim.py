"""Makes megatron-core 0.19 run without CUDA, over gloo. Imported by backend.py alone.

Megatron assumes CUDA in three ways: it calls torch.cuda, it writes device="cuda", and it patches its own random
state and optimizer code around CUDA or Transformer Engine. Each part below names the failure that it prevents.
What a configuration option can do is not here but in backend.py.

The torch mode of part 2 is thread-local: install in the thread that builds and runs the model, never in a process
that runs vLLM.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _Stream:
    """Stands for a CUDA stream or event: on CPU all work is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> "_Stream":
        return self

    def synchronize(self) -> None: ...


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Reads device="cuda", Tensor.cuda() and pin_memory=True as their CPU meaning."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer and the gradient clipping compare type() with 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        return func(*args, **kwargs)


_installed: _CudaMeansCpu | None = None


def install() -> None:
    """Patch torch and megatron-core in this process, once. Call before the model is built, in its thread."""
    global _installed
    if _installed is not None:
        return
    if torch.cuda.is_available():
        raise AssertionError("the CPU shim must not be installed on a machine with CUDA")
    _patch_torch_cuda()  # 1
    _installed = _CudaMeansCpu()  # 2
    _installed.__enter__()
    _patch_random()  # 3
    _patch_moe()  # 4
    repair_optimizer_state()  # 5
    _patch_uneven_parts()  # 6
    _patch_lone_replica()  # 7


def _patch_torch_cuda() -> None:
    """Part 1: megatron asks for the current device, synchronises and opens streams everywhere."""
    stream = _Stream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *_, **__: None
    cuda.set_device = lambda *_, **__: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: stream
    cuda.stream = lambda _: contextlib.nullcontext()


def _patch_random() -> None:
    """Part 3: the tracker of per-rank random states, over the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise AssertionError(f"random state {name} was never added to the tracker")
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    module: Any = megatron_random
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    module.CudaRNGStatesTracker = CpuRNGStatesTracker


def _patch_moe() -> None:
    """Part 4: without Transformer Engine the router's name is undefined, and split sizes stay tensors on CPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    utils: Any = moe_utils
    dispatcher: Any = token_dispatcher
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None
    utils.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = to_host


def _patch_uneven_parts() -> None:
    """Part 6: experts that tensor ranks share gather unequal numbers of tokens; gloo takes equal parts only."""
    from megatron.core.tensor_parallel import mappings

    module: Any = mappings
    gather, reduce_scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def lengthened(part: torch.Tensor, size: int) -> torch.Tensor:
        return torch.cat((part, part.new_zeros(size - len(part), *part.shape[1:])))

    def gather_parts(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        size = max(output_split_sizes)
        parts = gather(lengthened(input_, size), group).split(size) if size else [input_] * group.size()
        return torch.cat([part[:own] for part, own in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_parts(
        input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, use_global_buffer)
        size = max(input_split_sizes)
        if size == 0:
            return input_
        parts = [lengthened(part, size) for part in input_.split(input_split_sizes)]
        return reduce_scatter(torch.cat(parts), group)[: input_split_sizes[group.rank()]]

    module._gather_along_first_dim, module._reduce_scatter_along_first_dim = gather_parts, reduce_scatter_parts


def _patch_lone_replica() -> None:
    """Part 7: over one replica NCCL reduces and gathers in place; gloo copies all gradients and weights, every step."""
    from megatron.core.distributed import param_and_grad_buffer

    def in_place(collective: Any) -> Any:
        def run(output: torch.Tensor, source: torch.Tensor, *, group: Any, async_op: bool, **options: Any) -> Any:
            is_done = output.data_ptr() == source.data_ptr() and output.numel() == source.numel()
            if is_done and not async_op:
                return None
            return collective(output, source, group=group, async_op=async_op, **options)

        return run

    module: Any = param_and_grad_buffer
    module.dist_reduce_scatter_func = in_place(module.dist_reduce_scatter_func)
    module.dist_all_gather_func = in_place(module.dist_all_gather_func)


def repair_optimizer_state() -> None:
    """Part 5: over torch's AdamW a load shares ONE `step` among all parameters and then advances it once for each.

    Needed on a GPU too where neither Transformer Engine nor apex brings an optimizer.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer: Any = distrib_optimizer.DistributedOptimizer
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: Any, tensors: Any) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        return original(self, model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_states
