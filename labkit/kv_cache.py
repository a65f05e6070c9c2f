"""A cache of keys and values that leaves room for the tokens to come, for writing many texts at once."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, seq, head_size) each, as transformers' `DynamicLayer` has them.

    That one copies all it holds to append a token. This one copies when its room is used up, and writes new tokens into the room.
    """

    rooms: tuple[torch.Tensor, torch.Tensor] | None = None  # `keys` and `values` are the first places of these

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, new, head_size); returns all keys and all values. Raises RuntimeError where a gradient is recorded."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("this cache is written in place and cannot be trained through: use torch.no_grad(), or transformers' DynamicCache")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.numel() == 0:
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        held = self.keys.shape[-2]
        needed = held + key_states.shape[-2]
        if not self._has_room(needed):
            self.rooms = tuple(t.new_empty(*t.shape[:-2], needed + ROOM, t.shape[-1]) for t in (self.keys, self.values))
            for room, tensor in zip(self.rooms, (self.keys, self.values)):
                room[..., :held, :] = tensor
        for room, new in zip(self.rooms, (key_states, value_states)):
            room[..., held:needed, :] = new
        self.keys, self.values = (room[..., :needed, :] for room in self.rooms)
        return self.keys, self.values

    def _has_room(self, needed: int) -> bool:
        """False as well after rows were chosen or repeated: `keys` is another tensor then."""
        return self.rooms is not None and self.rooms[0].data_ptr() == self.keys.data_ptr() and self.rooms[0].shape[-2] >= needed


def roomy_cache() -> Cache:
    """An empty cache, to be handed to a causal model as `past_key_values`. It can do what transformers' `DynamicCache` can."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def writing_cache(model: PreTrainedModel) -> Cache:
    """An empty cache for a causal model to write with (`past_key_values`). Sets the model to the attention that is faster with it.

    That is `roomy_cache` and fused attention. In bf16 on a CPU without matrix tiles (AMX) the fused kernel is slow for the single query of a new
    token: there transformers' `DynamicCache` and plain attention take 0.7 of the time (an AMD EPYC; tests/benchmarks/generation.py).
    """
    tiles = torch.cpu.get_capabilities().get("amx_bf16", False)
    plain = model.device.type == "cpu" and model.dtype == torch.bfloat16 and not tiles
    model.set_attn_implementation("eager" if plain else "sdpa")
    return DynamicCache() if plain else roomy_cache()
