"""The seconds of a planned step on GPUs, by part, from FLOPs, bytes and links; pure arithmetic, for `astar plan`.

Every prompt and response is taken as long as the run allows: an upper bound of its length. With F the FLOPs of a
forward pass (model/flops.py) of the sequences of a data rank, over the ranks that share them:

    forward     F of the layers / (LAYERS_SHARE * peak) + F of the head / (HEAD_SHARE * peak) + bytes / link
                times 1 + (stages - 1) / (virtual * micro-batches), the pipeline's bubble
    reference   a forward pass of each mini-batch, and its weights from the host with model.reference=offload
    policy      three, of the layers four with parallel.recompute=full; at least the bytes of gradients and weights over
                the link of the replicas, which are sent meanwhile; and 30 bytes a parameter for the optimiser, or with
                optim.offload a gradient and a weight over the link to the host
    critic      a forward pass for values and three to learn, without a head
    generate    prompts: forward FLOPs as above; then, in waves of as many sequences as an engine takes at once and one
                of the rest, for each token of a response the larger of (weights and keys and values) / memory rate and
                FLOPs / peak, and DRAW_SECONDS a sequence
    publish     bytes of the weights / (PUBLISH_RATE * the smaller number of senders and of an engine's workers)
    turns       TURN_SECONDS where both sides share GPUs, and what they move to the host and back

Bytes between ranks: 4 collectives of the hidden states a layer for tensor, keys and values once for context, the
tokens' way to their experts and back for expert; all at the data sheet's rates, which no run has measured yet.
Leaves out: launches of kernels (a model below about 1B is slower than this), Adam's own time on the host with
optim.offload, pipeline's own messages, the policy's scores before the step that clipped methods take, rewards,
evaluations, checkpoints, the start (minutes).
"""

from dataclasses import asdict, dataclass
from math import ceil

from astar_megatron.config import RunConfig
from astar_megatron.model.flops import drawing_flops, head_flops
from astar_megatron.model.gpus import Gpu
from astar_megatron.planning.capacity import cache
from astar_megatron.run.accelerators import number_bytes, rank_bytes, worker_bytes
from conversion.families import Model

# Shares of the peak that products reach: layers of Qwen2.5-1.5B in packs of 16,384 tokens on one H200, forward and
# backward; the head's kernels with T 8192, H 4096, V 131072 on one H100.
LAYERS_SHARE, HEAD_SHARE = 0.5, 0.63
FP8_SPEED = 1.07  # of the same layers with model.fp8
# A token of a sequence beside others, over what bytes and FLOPs explain: a seed of its own, log-probs, the scheduler.
DRAW_SECONDS = 43e-6  # 256 at once, Qwen2.5-1.5B, one H200
PUBLISH_RATE = 8e9  # bytes a second of a sender, with the digests of both ends: 3.1 GB in 0.39 s, on one GPU
TURN_SECONDS = 0.26  # an engine's sleep and its two wakes: 0.06, 0.03, 0.17
NETWORK_RATE = 50e9  # bytes a second of a GPU to another node: a card of 400 Gbit/s for each
_OPTIMIZER_BYTES = 30  # a parameter: gradient, master weight and moments read, all but the first and the weight written


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Of a step, by part, with the names of `seconds` in metrics.jsonl."""

    generate: float
    reference: float
    policy: float
    critic: float
    publish: float
    turns: float
    ahead: bool  # engines draw while ranks learn

    @property
    def total(self) -> float:
        learning = self.reference + self.policy + self.critic
        both = max(self.generate, learning) if self.ahead else self.generate + learning
        return both + self.publish + self.turns

    def parts(self) -> dict[str, float]:
        """Return the seconds by part and in all."""
        return {name: value for name, value in asdict(self).items() if name != "ahead"} | {"total": self.total}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forward:
    """A forward pass of a mini-batch on one rank: seconds of products and of what is sent between."""

    layers: float
    head: float
    sent: float
    bubble: float

    def times(self, layers: int, head: int) -> float:
        return (layers * (self.layers + self.sent) + head * self.head) * self.bubble


def step_seconds(cfg: RunConfig, model: Model, gpu: Gpu, *, shared: bool, num_nodes: int) -> StepSeconds:
    """Return the seconds of a step whose policy lies on `num_nodes` nodes, on GPUs `shared` with engines or not."""
    steps = cfg.train.batch_size // cfg.mini_batch_size
    forward = _forward(cfg, model, gpu, num_nodes)
    layers = 4 if cfg.parallel.recompute == "full" else 3
    policy = max(forward.times(layers, 3), _replicas_seconds(cfg, model, gpu, num_nodes))
    learning = policy + _optimizer_seconds(cfg, model, gpu)
    moved = number_bytes(cfg) * _parameters(cfg, model) if cfg.model.reference == "offload" else 0
    return StepSeconds(
        generate=generation_seconds(cfg, model, gpu, cfg.train.batch_size, cfg.train.batch_size // cfg.group_size),
        reference=steps * forward.times(1, 1) + moved / gpu.host_rate,
        policy=steps * learning,
        critic=0.0 if cfg.critic_lr is None else steps * (forward.times(1 + layers, 0)),
        publish=_publish_seconds(cfg, model),
        turns=TURN_SECONDS + _offload_seconds(cfg, model, gpu) if shared else 0.0,
        ahead=cfg.rollout.max_staleness > 0,
    )


def generation_seconds(cfg: RunConfig, model: Model, gpu: Gpu, num_responses: int, num_prompts: int) -> float:
    """Return the seconds in which the engines, each with its share, draw so many responses to so many prompts."""
    prompt, response, workers = cfg.data.max_prompt_tokens, cfg.sampling.max_response_tokens, cfg.rollout.tensor
    own = ceil(num_responses / cfg.rollout.num_engines)
    mean_tokens = prompt + response // 2
    room = cache(cfg, model, gpu)
    at_once = max(1, min(own, cfg.rollout.max_num_seqs, room.num_tokens // mean_tokens))
    token_flops = (drawing_flops(model, prompt, [response]) - drawing_flops(model, prompt, [1])) / response

    def token(sequences: int) -> float:
        """Seconds in which each of these gets its next token."""
        memory = (worker_bytes(cfg, model) + sequences * mean_tokens * room.token_bytes) / gpu.memory_rate
        compute = sequences * token_flops / workers / gpu.peak_flops
        hidden = sequences * model.hidden_size * number_bytes(cfg) * (workers - 1) / workers
        sent = model.num_layers * 4 * hidden / gpu.link_rate  # two sums a layer, each there and back
        return max(memory, compute) + sent + sequences * DRAW_SECONDS

    waves, rest = divmod(own, at_once)
    tokens = response * (waves * token(at_once) + (token(rest) if rest else 0.0))
    prefill = ceil(num_prompts / cfg.rollout.num_engines) * drawing_flops(model, prompt, [1])
    return tokens + prefill / workers / (LAYERS_SHARE * gpu.peak_flops)


def _forward(cfg: RunConfig, model: Model, gpu: Gpu, num_nodes: int) -> _Forward:
    """Of the sequences that a data rank has of a mini-batch."""
    parallel, response = cfg.parallel, cfg.sampling.max_response_tokens
    sequences = cfg.mini_batch_size // parallel.data
    head = sequences * head_flops(model, response)
    layers = sequences * drawing_flops(model, cfg.data.max_prompt_tokens, [response]) - head
    packs = ceil(sequences / max(1, cfg.train.micro_batch_tokens // cfg.max_tokens))
    sharing = parallel.tensor * parallel.context
    speed = gpu.peak_flops * (FP8_SPEED if cfg.model.fp8 else 1.0)
    return _Forward(
        layers=layers / (sharing * parallel.pipeline) / (LAYERS_SHARE * speed),
        head=head / sharing / (HEAD_SHARE * gpu.peak_flops),
        sent=_sent_seconds(cfg, model, gpu, sequences * cfg.max_tokens / parallel.context, num_nodes),
        bubble=1 + (parallel.pipeline - 1) / (parallel.virtual * packs),
    )


def _sent_seconds(cfg: RunConfig, model: Model, gpu: Gpu, tokens: float, num_nodes: int) -> float:
    """Of `tokens` that a rank's tensor group has, through the layers of its stage."""
    parallel, dims = cfg.parallel, model.dims
    size = tokens * number_bytes(cfg) * dims.num_layers / parallel.pipeline
    tensor = 4 * size * dims.hidden_size * (parallel.tensor - 1) / parallel.tensor
    keys = 2 * size * dims.num_kv_heads * dims.head_dim * (parallel.context - 1) / parallel.tensor
    routed = 2 * size * dims.hidden_size * dims.experts_per_token / parallel.tensor
    experts = routed * (parallel.expert - 1) / parallel.expert
    return tensor / gpu.link_rate + (keys + experts) / _far_rate(gpu, num_nodes)


def _replicas_seconds(cfg: RunConfig, model: Model, gpu: Gpu, num_nodes: int) -> float:
    """Gradients, reduced, and weights, gathered, between the replicas; once an optimiser step."""
    replicas = cfg.parallel.replicas
    size = (4 + number_bytes(cfg)) * _parameters(cfg, model) * (replicas - 1) / replicas
    return size / _far_rate(gpu, num_nodes)


def _optimizer_seconds(cfg: RunConfig, model: Model, gpu: Gpu) -> float:
    own = _parameters(cfg, model) / cfg.parallel.replicas
    if cfg.optim.offload:
        return own * (4 + number_bytes(cfg)) / gpu.host_rate
    return own * _OPTIMIZER_BYTES / gpu.memory_rate


def _publish_seconds(cfg: RunConfig, model: Model) -> float:
    ends = min(cfg.rollout.tensor, cfg.parallel.tensor * cfg.parallel.pipeline)
    return number_bytes(cfg) * model.num_parameters() / (ends * PUBLISH_RATE)


def _offload_seconds(cfg: RunConfig, model: Model, gpu: Gpu) -> float:
    """What `train.offload` moves to the host and back; gradients and activations are made anew."""
    rank = rank_bytes(cfg, model)
    moved = {"optimizer": rank.optimizer, "all": rank.optimizer + rank.reference + rank.critic}
    return 2 * moved.get(cfg.train.offload, 0) / gpu.host_rate


def _parameters(cfg: RunConfig, model: Model) -> int:
    """Of the stage that has most."""
    return rank_bytes(cfg, model).weights // number_bytes(cfg)


def _far_rate(gpu: Gpu, num_nodes: int) -> float:
    return gpu.link_rate if num_nodes == 1 else min(gpu.link_rate, NETWORK_RATE)
