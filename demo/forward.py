"""A forward pass over batches of pictures of equal size, faster on a CPU than the library's, with the same result.

transformers loops over images in the vision attention and computes logits at every position. Here, pictures of equal
size pass the vision tower as one batch, and logits are computed only at positions that predict an answer token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from demo.model import IMAGE_TOKENS
from demo.packing import Batch
from demo.world import COLUMNS, ROWS


def _vision_positions() -> torch.Tensor:
    """[2, patches] row and column of each patch, in the merge order of ``patchify``."""
    rows, columns = torch.meshgrid(torch.arange(2 * ROWS), torch.arange(2 * COLUMNS), indexing="ij")
    grid = torch.stack([rows, columns]).view(2, ROWS, 2, COLUMNS, 2)
    return grid.permute(0, 1, 3, 2, 4).reshape(2, -1)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def encode_images(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Merged vision tokens [B, cells, hidden] of pixels [B, patches, .]; equal to ``visual(...)`` on each image."""
    weight = visual.patch_embed.proj.weight.flatten(1)
    size, patches, _ = pixels.shape
    hidden = F.linear(pixels.to(weight.dtype), weight)
    position = _vision_positions()
    angles = position.T[..., None].float() * visual.rotary_pos_emb.inv_freq.float()  # [patches, 2, head_dim / 4]
    angles = angles.flatten(1).repeat(1, 2)
    cos, sin = angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)
    for block in visual.blocks:
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(hidden)).view(size, patches, 3, heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query = query * cos + _rotate_half(query) * sin
        key = key * cos + _rotate_half(key) * sin
        attended = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + block.attn.proj(attended.transpose(1, 2).reshape(size, patches, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(size, IMAGE_TOKENS, -1)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Grouped-query attention as two batched products, with the signature of transformers' attention interface.

    Shapes: query [B, heads, L, d], key and value [B, kv heads, L, d], attention_mask [B, 1, L, L], added to the scores.
    At these lengths and with a mask, the backward pass on a CPU is twice as fast as that of the fused kernel.
    """
    size, heads, length, width = query.shape
    groups = key.shape[1]
    stacked = (query * scaling).reshape(size, groups, -1, width)
    scores = (stacked @ key.transpose(2, 3)).view(size, heads, length, length) + attention_mask
    attended = scores.softmax(-1).view(size, groups, -1, length) @ value
    return attended.view(size, heads, length, width).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)


def use_grouped_attention(model: Any) -> None:
    """Make the decoder use ``grouped_attention``; for training only, a saved checkpoint does not store it."""
    model.model.language_model.config._attn_implementation = "grouped"


def answer_logits(model: Any, batch: Batch, image_embeds: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] for every answer token of a batch with the embeddings [B, image tokens, hidden]."""
    embeds = model.model.language_model.embed_tokens(batch.input_ids)
    image = batch.input_ids == model.config.image_token_id
    embeds = embeds.masked_scatter(image[..., None], image_embeds.to(embeds.dtype))
    mask = torch.zeros(batch.attention_mask.shape, dtype=embeds.dtype).masked_fill_(~batch.attention_mask, -1e4)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=batch.position_ids if len(batch.position_ids) > 1 else batch.position_ids[0],
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.sources])


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the answers; a turn of n answer tokens has weight sqrt(n), so long lists do not dominate."""
    length = torch.bincount(batch.turns)
    weight = length.float().rsqrt()[batch.turns]
    losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def turns_right(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[turns] bool: whether greedy decoding gives exactly the answer.

    Greedy generation gives exactly the answer if and only if every answer token, including the closing one, has the
    highest logit after the right tokens before it. So no generation is needed.
    """
    wrong = (logits.argmax(-1) != batch.targets).long()
    return torch.zeros(len(batch.skills), dtype=torch.long).index_add_(0, batch.turns, wrong) == 0
