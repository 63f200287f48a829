"""What an engine must answer: the greedy reply of the packed forward, one whole forward per token."""

import torch

from herd.engine.local import Model
from herd.model.llama4 import Llama4
from herd.ops.attend import Packed
from herd.text.prompt import Prompt


@torch.inference_mode()
def packed_logits(model: Llama4, tokens: list[int], features: torch.Tensor | None = None) -> torch.Tensor:
    """[T, V] of one sequence. The first patch tokens are the images'; later ones the model may have written itself."""
    attend = Packed([len(tokens)], model.config.chunk_tokens)
    patches = None
    if features is not None:
        patches = torch.tensor([i for i, token in enumerate(tokens) if token == model.config.patch_id][: len(features)])
    return model(torch.tensor(tokens), torch.arange(len(tokens)), attend, features, patches=patches)


@torch.inference_mode()
def greedy_reply(model: Model, prompt: Prompt, max_tokens: int) -> list[int]:
    """The reply's ids, stop token included."""
    features = None
    if prompt.images:
        features = torch.cat([model.llama4.see(torch.from_numpy(tiles.pixels)) for tiles in prompt.images])
    reply: list[int] = []
    while len(reply) < max_tokens:
        reply.append(int(packed_logits(model.llama4, [*prompt.tokens, *reply], features)[-1].argmax()))
        if reply[-1] in model.config.stop_ids:
            break
    return reply
