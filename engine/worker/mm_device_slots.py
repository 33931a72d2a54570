"""The slots of a model that takes multimodal inputs, on an asynchronous device."""

from engine.worker.device_slots import DeviceSlots
from engine.worker.mm_slots import MMSlots


class MMDeviceSlots(MMSlots, DeviceSlots):
    """Slots whose inputs are encoded on the device, between the steps that it computes.

    The host knows the tokens of all inputs, which are part of prompts, and so where embeddings and rotary positions
    belong; only the ids of sampled tokens come later.
    """
