"""The vLLM end, inside the worker: a weight-transfer backend that writes tiles into the live fused parameters.

Start the engine with `weight_transfer_config={"backend": "astar_tiles"}` and
`worker_extension_cls="conversion.vllm.WorkerExtension"`; vLLM resolves the extension in the worker before it loads the
model, and importing this module registers the backend. Then, through vLLM's own calls: init_weight_transfer_engine
once; per version, with the engine paused and its caches cleared, start_weight_update, update_weights,
finish_weight_update.

The worker derives the plan itself from the HF configuration and the trainer's layout, so only those cross the RPC.
An engine with pipeline stages is refused, and so is one whose kernel for experts lays their weights out anew at load:
tiles written into it would be right bit by bit and wrong as weights.

What a worker then holds it can prove: `WorkerExtension.audit` digests its fused parameters through the plan and
probes what vLLM derives from them: the packs of linear layers and of experts. After `open_audit` it proves so what it
loaded from a folder by itself.

On a CPU vLLM packs the weights of linear layers and of experts for its kernels at load and drops the plain ones. Here
the plain ones stay, to be written to, and are packed again after each update. The other way, no packing at all, is
slower as a whole: SmolLM2 in float32, 2 threads with AVX2, 64 requests of 24 tokens: 21.4 CPU seconds a batch without
packing, 17.6 with it, 0.33 for packing again (least of 5 alternating rounds). It costs the memory of these weights a
second time.
"""

import faulthandler
import signal
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import vllm.model_executor.layers.utils as vllm_layers
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from conversion.families import Model, model_from_config
from conversion.plan import WeightPlan, plan
from conversion.tiles import ParallelLayout, Tile
from conversion.transfer.route import Receiver, Route, here
from conversion.verify import Holdings, held_parts

Fault = tuple[str, int, str]  # name of the tensor, first bad row, what is wrong

BACKEND = "astar_tiles"


@dataclass
class TilesInitInfo(WeightTransferInitInfo):
    """What a worker needs to derive its plan: the model, the sender's layout, and the way (a `Route`).

    `engine` counts the engines that the senders send to.
    """

    config: dict[str, Any]
    layout: dict[str, Any]
    dtype: str
    route: dict[str, Any]
    engine: int = 0


@dataclass
class TilesUpdateInfo(WeightTransferUpdateInfo):
    """The version that the senders send now, or are about to."""

    version: int


class TilesEngine(WeightTransferEngine[TilesInitInfo, TilesUpdateInfo]):
    """Receives tiles straight into the parameters of this worker's model."""

    init_info_cls = TilesInitInfo
    update_info_cls = TilesUpdateInfo
    supports_draft_weight_update = False

    _receiver: Receiver | None = None
    _holdings: Holdings | None = None
    _addresses: dict[str, int] | None = None
    version: int | None = None

    def init_transfer_engine(self, init_info: TilesInitInfo) -> None:
        """Plans, and proves that the plan covers this worker's parameters. ValueError naming one that it does not."""
        if self.parallel_config.pipeline_parallel_size != 1:
            raise ValueError(f"{BACKEND} needs an engine with pipeline_parallel_size=1")
        self.shutdown()
        model, layout = model_from_config(init_info.config), ParallelLayout(**init_info.layout)
        self._plan(model, model.megatron_tiles(layout, layout.senders()), init_info.dtype)
        _, weights, _, rank, dtype = self._end
        route = Route(**init_info.route)
        self._receiver = route.receiver(weights, rank, _parameters(self.model), dtype, init_info.engine)

    def place(self) -> tuple[str, str]:
        """The memory and the device of this worker's parameters: the fields of a `Place`."""
        place = here(next(self.model.parameters()).device)
        return place.memory, place.device

    def _plan(self, model: Model, source: list[Tile], dtype: str) -> None:
        """Plan how this worker is filled from `source`; its holdings are those of this plan from now on."""
        if self._addresses is None:  # nobody plans before the engine has started and captured its graphs
            self._addresses = addresses(self.model)
        tensor, rank = self.parallel_config.tensor_parallel_size, get_tensor_model_parallel_rank()
        self._end = (model, plan(source, model.vllm_tiles(tensor)), tensor, rank, getattr(torch, dtype))
        self._holdings = self._held()

    def _held(self) -> Holdings:
        """What the live module holds now. ValueError if that is no longer what the plan fills."""
        model, weights, tensor, rank, dtype = self._end
        check_coverage(model, weights, tensor, rank, self.model)
        check_experts(self.model)
        parameters = _parameters(self.model)
        for copy in weights.to_rank(rank):
            own = parameters[copy.target.name].dtype
            if torch.promote_types(own, dtype) != own:
                raise ValueError(
                    f"{copy.target.name} is {own} in vLLM's model and would round the {dtype} it is sent: "
                    "give engine and policy one dtype"
                )
        return Holdings(held_parts(weights, rank), parameters, dtype)

    def open_audit(self, config: dict[str, Any], dtype: str) -> None:
        """From now on, until init_transfer_engine, an audit is of the plan that fills this worker from HF parameters.

        What the worker loaded by itself is proved so. ValueError as in init_transfer_engine.
        """
        model = model_from_config(config)
        self._plan(model, model.hf_tiles(), dtype)

    def audit(self, version: int) -> dict[str, Any]:
        """The digests of what this worker holds, in its plan's order, and the faults of its packs and addresses."""
        if self._holdings is None or self._addresses is None:
            raise RuntimeError("neither init_weight_transfer_engine nor open_audit was called")
        try:
            self._holdings = self._held()  # from the module, which may have other tensors by now
        except ValueError as error:
            return {"digests": self._holdings.digests(), "faults": [("a parameter", -1, str(error))]}
        faults = moved_parameters(self.model, self._addresses) + stale_packs(self.model, version)
        return {"digests": self._holdings.digests(), "faults": faults}

    def digest_rows(self, index: int) -> list[int]:
        """The digests of the rows of part `index` of what this worker holds; none if it has fewer parts."""
        assert self._holdings is not None
        return self._holdings.rows(index) if index < len(self._holdings.parts) else []

    def start_weight_update(self) -> None:
        """Nothing to prepare: the parameters are live."""

    def receive_weights(self, update_info: TilesUpdateInfo) -> None:
        """Takes one version, bucket after bucket as the senders pack them."""
        if self._receiver is None:
            raise RuntimeError("init_weight_transfer_engine was not called")
        self._receiver.receive(update_info.version)
        self.version = update_info.version

    def finish_weight_update(self) -> None:
        """Brings up to date what vLLM derives from the parameters."""
        repack(self.model)

    def shutdown(self) -> None:
        """Lets go of the buffers."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


class WorkerExtension:
    """Named as `worker_extension_cls`, so that the worker imports this module before it loads the model."""

    def place(self) -> tuple[str, str]:
        """Where this worker's parameters are: see TilesEngine.place."""
        return self.weight_transfer_engine.place()  # type: ignore[attr-defined]

    def open_audit(self, config: dict[str, Any], dtype: str) -> None:
        """Audit what the worker loaded by itself: see TilesEngine.open_audit."""
        self.weight_transfer_engine.open_audit(config, dtype)  # type: ignore[attr-defined]

    def audit(self, version: int) -> dict[str, Any]:
        """What this worker holds, digested from its own parameters: see TilesEngine.audit."""
        return self.weight_transfer_engine.audit(version)  # type: ignore[attr-defined]

    def digest_rows(self, index: int) -> list[int]:
        """The digests of the rows of one part, once its digest was found wrong."""
        return self.weight_transfer_engine.digest_rows(index)  # type: ignore[attr-defined]

    def free_bytes(self) -> int:
        """What nobody uses of the memory of this worker's device."""
        return torch.accelerator.get_memory_info()[0]

    def drop_cache(self) -> int:
        """Give the memory of keys and values back, and return its bytes; for a CPU, where vLLM has no sleep of its own.

        The storage is emptied in place, so that all layers' views of it are right after `remake_cache`.
        """
        (self._cache_bytes,) = {storage.nbytes() for storage in self._cache_storages()}
        for storage in self._cache_storages():
            storage.resize_(0)
        return self._cache_bytes

    def remake_cache(self) -> None:
        """Take that memory again; there are no keys and values in it."""
        for storage in self._cache_storages():
            storage.resize_(self._cache_bytes)
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()

    def _cache_storages(self) -> list[torch.UntypedStorage]:
        """One: vLLM's layers are views of it."""
        caches: list[Tensor] = self.model_runner.kv_caches  # type: ignore[attr-defined]
        return list({cache.untyped_storage()._cdata: cache.untyped_storage() for cache in caches}.values())


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.data for name, p in module.named_parameters(remove_duplicate=False)}


def check_coverage(model: Model, weights: WeightPlan, tensor: int, rank: int, module: nn.Module) -> None:
    """Raises ValueError, naming the parameter, unless the plan writes every element this worker computes with.

    By storage: a tied head is another name of the embedding's. Only vLLM's own vocabulary padding may stay unwritten.
    Also the proof that loading left the parameters in place and whole; some CPU paths empty them.
    """
    expected = model.vllm_shapes(tensor, rank)
    written = Counter[str]()
    for copy in weights.to_rank(rank):
        written[copy.target.name] += copy.target.num_elements
    padding = {
        f"{name}.weight": layer.shard_indices.num_org_vocab_padding * layer.embedding_dim
        for name, layer in module.named_modules()
        if isinstance(layer, VocabParallelEmbedding)
    }
    parameters = dict(module.named_parameters(remove_duplicate=False))
    storages = {_place(parameters[name]) for name in expected if name in parameters}
    for name in [*expected, *(name for name in parameters if name not in expected)]:
        if name not in parameters:
            raise ValueError(f"vLLM's model has no parameter {name}, which the tiles of {model.architecture} fill")
        shape = tuple(parameters[name].shape)
        if name not in expected and _place(parameters[name]) not in storages:
            raise ValueError(f"no tile fills {name} {shape} of vLLM's model")
        if name in expected and shape != expected[name]:
            raise ValueError(f"{name} has shape {shape} in vLLM's model, expected {expected[name]}")
        if name in expected and written[name] != parameters[name].numel() - padding.get(name, 0):
            raise ValueError(f"{written[name]} elements of {name} {shape} would be written, all must be")


def check_experts(module: nn.Module) -> None:
    """Raises ValueError if a layer's experts lie in another order than they are loaded in."""
    for name, layer in module.named_modules():
        if hasattr(layer, "w13_weight"):
            kernel = getattr(getattr(layer, "quant_method", None), "unquantized_backend", None)
            kind = getattr(kernel, "name", "unknown")
            if kind not in _PLAIN_EXPERTS:
                raise ValueError(
                    f"{name}: vLLM's kernel for its experts is {kind}, which lays their weights out anew at load; "
                    f"expected one of {sorted(_PLAIN_EXPERTS)}: start the engine with moe_backend='triton'"
                )


_PLAIN_EXPERTS = {"CPU", "TRITON", "BATCHED_TRITON"}  # kernels that take experts as they are loaded, or as packed here


def addresses(module: nn.Module) -> dict[str, int]:
    """Where each parameter's bytes are."""
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters(remove_duplicate=False)}


def moved_parameters(module: nn.Module, before: dict[str, int]) -> list[Fault]:
    """The parameters that are no longer where they were when graphs were captured.

    A graph reads the address that it was captured with: it would go on with old bytes while all digests, which are of
    the parameters, are right.
    """
    return [
        (
            name,
            0,
            f"its bytes lie at {now:#x}, but at {before.get(name, 0):#x} when graphs were captured, which read those",
        )
        for name, now in addresses(module).items()
        if before.get(name) != now
    ]


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


_dispatch = vllm_layers.dispatch_cpu_unquantized_gemm


def _dispatch_and_keep(layer: nn.Module, remove_weight: bool = False) -> None:
    """vLLM's packing of one linear layer, except that the plain weight stays.

    An embedding is left out: vLLM packs it too but never multiplies with it.
    """
    if isinstance(layer, ParallelLMHead) or not isinstance(layer, VocabParallelEmbedding):
        _dispatch(layer, remove_weight=False)


@torch.no_grad()
def repack(module: nn.Module) -> None:
    """Packs the plain weights of all linear layers and experts again, a tied head's too; vLLM's reload forgets it."""
    for layer in module.modules():
        if hasattr(layer, "cpu_linear"):
            _dispatch_and_keep(layer)
        if hasattr(layer, _EXPERTS):
            _pack_and_keep(getattr(layer, _EXPERTS), layer)


_EXPERTS = "astar_experts"  # on a layer of fused experts: what packed it
_pack, _apply = CPUUnquantizedExperts.process_weights_after_loading, CPUUnquantizedExperts.apply


_PACKED_AS = {"w1": "w13_weight", "w2": "w2_weight"}  # as vLLM's computation calls them: the layer's parameters


def _pack_and_keep(self: Any, layer: nn.Module) -> None:
    """vLLM's packing of one layer's experts, except that the plain weights stay its parameters."""
    self.packed = _packed(self, layer, {name: getattr(layer, name) for name in _PACKED_AS.values()})
    setattr(layer, _EXPERTS, self)


def _packed(experts: Any, layer: nn.Module, weights: dict[str, Any]) -> dict[str, Tensor]:
    """vLLM's packs of such weights; the layer keeps its own."""
    plain = {name: getattr(layer, name) for name in _PACKED_AS.values()}
    for name, weight in weights.items():
        setattr(layer, name, weight)
    _pack(experts, layer)
    packed = {short: getattr(layer, name).data for short, name in _PACKED_AS.items()}
    for name, parameter in plain.items():
        setattr(layer, name, parameter)
    return packed


def _apply_packed(self: Any, **arguments: Any) -> None:
    """vLLM's computation with the packed weights, although the layer's parameters are the plain ones."""
    _apply(self, **{**arguments, **self.packed})


@torch.no_grad()
def stale_packs(module: nn.Module, seed: int, num_columns: int = 16) -> list[Fault]:
    """The packed layers that do not compute with their plain weight, by the name of that weight.

    Experts are packed again and compared; `row` is the first of the first stale expert, among the rows of all. Linear
    layers are asked: a product with a unit vector is a column of the weight, exactly, in every dtype: so a pack that is
    old by the smallest step shows, where the rounding of a product with a random vector would hide it. The columns are
    random, by `seed`. A weight with a NaN or an infinity is found as well: no product of it is its column.
    """
    faults: list[Fault] = _stale_experts(module)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in module.named_modules():
        multiply: Any = getattr(layer, "cpu_linear", None)
        weight: Any = getattr(layer, "weight", None)
        if multiply is None or weight.dim() != 2:
            continue
        columns = torch.randperm(weight.shape[1], generator=generator)[:num_columns]
        probe = torch.zeros(len(columns), weight.shape[1], dtype=weight.dtype)
        probe[torch.arange(len(columns)), columns] = 1
        product = multiply(probe, weight, None).t()
        wrong = (product != weight[:, columns]).any(1).nonzero()
        if len(wrong):
            faults.append((f"{name}.weight", int(wrong[0]), _STALE))
    return faults


_STALE = "vLLM's packed copy of it is not what it is packed from"


def _stale_experts(module: nn.Module) -> list[Fault]:
    faults: list[Fault] = []
    for name, layer in module.named_modules():
        experts = getattr(layer, _EXPERTS, None)
        if experts is None:
            continue
        fresh = _packed(experts, layer, {weight: getattr(layer, weight) for weight in _PACKED_AS.values()})
        for short, weight in _PACKED_AS.items():
            stale = (fresh[short] != experts.packed[short]).flatten(1).any(1).nonzero()  # packing keeps experts apart
            if len(stale):
                expert = int(stale[0])
                detail = f"{_STALE}; rows of expert {expert} of this worker"
                faults.append((f"{name}.{weight}", expert * getattr(layer, weight).shape[1], detail))
    return faults


def _register() -> None:
    """Registers the backend and what becomes of plain weights, once per process; SIGUSR2 shows the process's stacks."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, TilesEngine)
    if current_platform.is_cpu():
        vllm_layers.dispatch_cpu_unquantized_gemm = _dispatch_and_keep
        CPUUnquantizedExperts.process_weights_after_loading = _pack_and_keep
        CPUUnquantizedExperts.apply = _apply_packed  # type: ignore[method-assign]


_register()
