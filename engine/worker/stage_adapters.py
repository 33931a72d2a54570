"""What a rank of a pipeline stage has of LoRA adapters: its own layers, and with `--tp` its shard of these."""

from dataclasses import dataclass

from engine.model.lora.lora_weights import Adapter, stage_adapter
from engine.worker.adapter_manager import AdapterSharding
from engine.worker.stage_links import StageLinks


@dataclass(frozen=True, slots=True)
class StageAdapters:
    """Implements `engine.worker.adapter_manager.AdapterRanks` for all ranks of all stages.

    Args:
        links: to the other stages.
        layers: the path of the list of layers.
        num_layers: of the whole model.
        sharding: how the ranks of a stage divide its layers; None: it has one rank.
    """

    links: StageLinks
    layers: str
    num_layers: int
    sharding: AdapterSharding | None

    def own_part(self, adapter: Adapter) -> Adapter:
        own = stage_adapter(adapter, self.links.stage, self.layers, self.num_layers)
        return own if self.sharding is None else self.sharding.own_part(own)

    def agree(self, cause: str) -> str:
        of_stage = cause if self.sharding is None else self.sharding.agree(cause)
        return self.links.agree(of_stage)

    def wait(self) -> None:
        if self.sharding is not None:
            self.sharding.wait()
        self.links.wait()
