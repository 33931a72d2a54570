"""Builds the runner of a rank in a pipeline stage."""

from engine.config import EngineConfig
from engine.model.loading.meta_model import MetaModel
from engine.model.model_info import ModelInfo
from engine.model.runtime.rank_group import RankGroup
from engine.model.sharding.stage_model import keep_layers, layers_path
from engine.model.sharding.tp_plan import TPPlan
from engine.resolved_config import ResolvedConfig
from engine.worker.backend_builder import BuiltBackend
from engine.worker.mm_slots import LaterStageSlots
from engine.worker.mm_start import input_tokens
from engine.worker.pooling_runner import PoolingRunner
from engine.worker.pooling_stages import PoolingStageRunner, build_pooling_stage
from engine.worker.rank_causes import Agree, agreement
from engine.worker.runner import Runner, build_parts, build_slots, slots_shape
from engine.worker.slots import WorkerSlots
from engine.worker.stage_adapters import StageAdapters
from engine.worker.stage_links import StageLinks
from engine.worker.stage_runners import LastStageRunner, StageRunner


def build_stage_runner(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    tp_plan: TPPlan | None,
    links: StageLinks,
) -> tuple[Runner | StageRunner | PoolingStageRunner | PoolingRunner, BuiltBackend]:
    """Like `build_runner`.

    Args:
        model_info: of the rank, with its stage.
        meta_model: with all layers, sharded for the rank.
        links: to the other stages.
    """
    keep_layers(meta_model, links.stage)
    if model_info.pooling is not None:
        return build_pooling_stage(config, model_info, resolved, meta_model, links)
    layers = layers_path(meta_model)
    built, sharding = build_parts(config, model_info, resolved, meta_model, tp_plan, links)
    slots = _build_slots(resolved, model_info, meta_model, links)
    ranks = StageAdapters(links, layers, model_info.num_layers, sharding)
    if links.stage.is_last:
        return LastStageRunner(built.backend, slots, links, ranks, built.blocks), built
    return StageRunner(built.backend, slots, links, ranks, built.blocks, resolved.most_steps_in_flight), built


def _build_slots(
    resolved: ResolvedConfig, model_info: ModelInfo, meta_model: MetaModel, links: StageLinks
) -> WorkerSlots:
    """The slots of a stage; of a model that takes multimodal inputs only the first stage has an encoder."""
    mm, model, stage = model_info.mm, meta_model.model, links.stage
    shard = meta_model.vocab_shard
    if mm is None or stage.is_first:
        agree = reporting(links, None if shard is None else shard.group)
        return build_slots(resolved, model_info, meta_model, agree)
    causes = links.receive_causes if stage.is_last else no_causes
    return LaterStageSlots(model_info.hidden_size, causes, input_tokens(model, mm), *slots_shape(resolved))


def reporting(links: StageLinks, group: RankGroup | None) -> Agree:
    """As `agreement` of the ranks of the first stage; also sends the causes to the last one, which reports them."""
    agree = agreement(group)

    def agree_and_send(causes: list[str]) -> list[str]:
        agreed = agree(causes)
        links.send_causes(agreed)
        return agreed

    return agree_and_send


def no_causes(_: int) -> list[str]:
    """The causes in a stage that neither encodes nor reports."""
    return []
