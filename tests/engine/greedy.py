"""What an engine must answer: the greedy reply of the packed forward, one whole forward per token, or the mean of its states."""

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
def packed_mean(model: Model, prompt: Prompt) -> torch.Tensor:
    """[D] of length 1: the mean of the states that the head reads."""
    features, llama4, length = features_of(model, prompt), model.llama4, len(prompt.tokens)
    attend = Packed([length], llama4.config.chunk_tokens)
    states = llama4.norm(llama4.states(torch.tensor(prompt.tokens), torch.arange(length), attend, features))
    return torch.nn.functional.normalize(states.mean(0), dim=0)


def features_of(model: Model, prompt: Prompt) -> torch.Tensor | None:
    """Of its images, where there are any."""
    return torch.cat([model.llama4.see(torch.from_numpy(tiles.pixels)) for tiles in prompt.images]) if prompt.images else None


@torch.inference_mode()
def greedy_reply(model: Model, prompt: Prompt, max_tokens: int) -> list[int]:
    """The reply's ids, stop token included."""
    features = features_of(model, prompt)
    reply: list[int] = []
    while len(reply) < max_tokens:
        reply.append(int(packed_logits(model.llama4, [*prompt.tokens, *reply], features)[-1].argmax()))
        if reply[-1] in model.config.stop_ids:
            break
    return reply
