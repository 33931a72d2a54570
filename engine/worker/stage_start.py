"""Builds the runner of a rank in a pipeline stage."""

from engine.config import EngineConfig
from engine.model.loading.meta_model import MetaModel
from engine.model.model_info import ModelInfo
from engine.model.sharding.stage_model import keep_layers
from engine.model.sharding.tp_plan import TPPlan
from engine.resolved_config import ResolvedConfig
from engine.worker.backend_builder import BuiltBackend
from engine.worker.runner import Runner, build_parts, build_slots
from engine.worker.stage_links import StageLinks
from engine.worker.stage_runners import LastStageRunner, StageRunner


def build_stage_runner(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    tp_plan: TPPlan | None,
    links: StageLinks,
) -> tuple[Runner | StageRunner, BuiltBackend]:
    """Like `build_runner`.

    Args:
        model_info: of the rank, with its stage.
        meta_model: with all layers, sharded for the rank.
        links: to the other stages.
    """
    keep_layers(meta_model, links.stage)
    built, _ = build_parts(config, model_info, resolved, meta_model, tp_plan, links)
    slots = build_slots(resolved, model_info, meta_model)
    if links.stage.is_last:
        return LastStageRunner(built.backend, slots, links), built
    return StageRunner(built.backend, slots, links, resolved.most_steps_in_flight), built
