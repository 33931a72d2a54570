"""Plans how pipeline stages divide the layers of a model, by the bytes of their weights, before anything is loaded."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model.kv_groups import groups_of_stage
from engine.model.model_info import ITEMSIZE, QUANTIZED_BYTES, ModelInfo, weight_shapes
from engine.model.stage import Stage

_LAYER = re.compile(r"\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.(?:weight|bias)$")


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """How the stages divide a model.

    Args:
        stages: in the order in which a token passes them.
        shares: the fraction of the model's weights that each stage holds. An embedding that is also the head is held by
            the first stage and by the last one, so the sum can exceed 1.
    """

    stages: tuple[Stage, ...]
    shares: tuple[float, ...]

    def rank_info(self, number: int, info: ModelInfo) -> ModelInfo:
        """The model as a rank of a stage runs it; `info` is that of all stages, or of one rank's shard of them."""
        stage = self.stages[number]
        groups = info.kv_groups
        return replace(
            info,
            stage=stage,
            weight_bytes=int(info.weight_bytes * self.shares[number]),
            kv_bytes_per_token=info.kv_bytes_per_token
            // groups.group_size
            * groups_of_stage(groups, stage.layers).group_size,
        )


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Bytes of a model's weights.

    first: those of the first stage, the embedding and towers. everywhere: what each stage has, such as tables of
    positions.
    """

    layers: tuple[float, ...]
    first: float
    head: float  # of a model that pools: none is needed
    everywhere: float
    whole: float


def plan_pipeline(config: EngineConfig, model_info: ModelInfo) -> PipelinePlan:
    """Divide the layers among `--pp` stages, so that the largest stage is as small as possible.

    Layers to which features of inputs are added are all in the first stage, which has these features.

    Raises ConfigError if there are more stages than layers, ModelError if the names of weights show no layers.
    """
    count = config.pipeline_parallel_size
    together = max(1, 0 if model_info.mm is None else model_info.mm.deepstack_layers)
    most = model_info.num_layers - together + 1
    if count > most:
        at_least = "each stage computes at least one layer"
        if together > 1:
            at_least += f", the first one the {together} to which features of images are added"
        raise ConfigError(
            f"--pp {count}: {at_least}, but {config.model} has {model_info.num_layers}; use --pp {most} or less"
        )
    weights = _weigh(config, model_info)
    units = sum(weights.layers[:together]), *weights.layers[together:]
    ends = [end + together - 1 for end in divide(units, count, weights.first, weights.head)]
    pools = model_info.pooling is not None
    stages = tuple(Stage(number, count, begin, end, pools) for number, (begin, end) in enumerate(pairwise((0, *ends))))
    held = [
        sum(weights.layers[stage.begin : stage.end])
        + weights.everywhere
        + stage.is_first * weights.first
        + stage.is_last * weights.head
        for stage in stages
    ]
    return PipelinePlan(stages, tuple(one / weights.whole for one in held))


def divide(layers: Sequence[float], count: int, first: float, last: float) -> tuple[int, ...]:
    """The ends of `count` runs of layers, at least one layer each, of which the largest is as small as possible.

    Args:
        layers: bytes of each layer.
        first, last: bytes that the first and the last run have besides.

    Example: layers of 4 bytes each, `first` 0 and `last` 4 give 5 layers in two runs the ends (3, 5): 12 and 12 bytes.
    """
    before = (0.0, *accumulate(layers))
    # best[end]: the smallest possible largest run if the runs so far end there, and where the newest of them begins.
    best: list[dict[int, tuple[float, int]]] = []
    for run in range(count):
        extra = (first if run == 0 else 0.0) + (last if run == count - 1 else 0.0)
        begins = {0: (0.0, 0)} if run == 0 else best[-1]
        best.append(
            {
                end: min(
                    (max(largest, before[end] - before[begin] + extra), begin)
                    for begin, (largest, _) in begins.items()
                    if begin < end
                )
                for end in range(run + 1, len(layers) - (count - run - 1) + 1)
            }
        )
    ends = [len(layers)]
    for found in reversed(best[1:]):
        ends.append(found[ends[-1]][1])
    return tuple(reversed(ends))


def _weigh(config: EngineConfig, model_info: ModelInfo) -> _Bytes:
    layers = [0] * model_info.num_layers
    embedding = towers = head = everywhere = 0
    for name, shape in weight_shapes(config, model_info).items():
        size, number = math.prod(shape), _LAYER.search(name)
        if number is not None:
            if int(number[1]) < len(layers):  # layers beyond are for predicting several tokens, and aren't loaded
                layers[int(number[1])] += size
        elif "/" in name:  # see `weight_shapes`
            towers += size
        elif _EMBEDDING.search(name):
            embedding += size
        elif _HEAD.search(name):
            head += size
        else:
            everywhere += size
    if not all(layers):
        raise ModelError(
            f"{config.model} can't be divided into stages (--pp): its weights are not those of a list of layers"
        )
    item, kind = ITEMSIZE[model_info.dtype], config.quantization
    head_item = item if kind is None else QUANTIZED_BYTES["int8" if kind == "int4" else kind]
    head_bytes = (head or embedding) * head_item
    counted = head_bytes if head or kind else 0.0  # a tied head that is not quantized is the embedding itself
    of_layers = model_info.weight_bytes - (embedding + towers + everywhere) * item - counted
    per_element = max(of_layers, 1.0) / sum(layers)
    if model_info.pooling is not None:
        head_bytes = 0.0
    return _Bytes(
        tuple(size * per_element for size in layers), (embedding + towers) * item, head_bytes, everywhere * item,
        model_info.weight_bytes,
    )  # fmt: skip
