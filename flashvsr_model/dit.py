"""The diffusion transformer, with all that is constant in FlashVSR (time step, prompt) folded into its
weights.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr_kernels import (gated_add, layer_norm_modulate, lcsa_mask, qk_norm_rope, rms_norm, sparse_attn,
                              window_order)

from .config import FlashVSRConfig
from .state import KVRing

EPS = 1e-6  # of every norm in the model


def weight(*shape: int) -> nn.Parameter:
    """A parameter without values: they come from a checkpoint, strictly."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Block(nn.Module):
    def __init__(self, config: FlashVSRConfig, layer: int):
        super().__init__()
        C, hidden, D = config.dim, config.ffn_dim, config.head_dim
        self.layer, self.head_dim = layer, D
        self.modulation = weight(6, C)  # shift, scale, gate of attention, then of the feed-forward
        self.qkv_weight, self.qkv_bias = weight(3 * C, C), weight(3 * C)
        self.norm_q, self.norm_k = weight(C), weight(C)
        self.o_weight, self.o_bias = weight(C, C), weight(C)
        self.cross_scale, self.cross_shift = weight(C), weight(C)
        self.cross_q_weight, self.cross_q_bias, self.cross_norm_q = weight(C, C), weight(C), weight(C)
        self.cross_k = weight(1, config.num_heads, config.context_len, D)
        self.cross_v = weight(1, config.num_heads, config.context_len, D)
        self.cross_o_weight, self.cross_o_bias = weight(C, C), weight(C)
        self.ffn_in_weight, self.ffn_in_bias = weight(hidden, C), weight(hidden)
        self.ffn_out_weight, self.ffn_out_bias = weight(C, hidden), weight(C)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor, Tensor], kv: KVRing, local: Tensor,
                topk: int) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation
        x = gated_add(x, self.self_attention(layer_norm_modulate(x, scale1, shift1, eps=EPS), tables, kv,
                                             local, topk), gate1)
        x = gated_add(x, self.cross_attention(layer_norm_modulate(x, self.cross_scale, self.cross_shift,
                                                                  eps=EPS)))
        y = F.linear(layer_norm_modulate(x, scale2, shift2, eps=EPS), self.ffn_in_weight, self.ffn_in_bias)
        y = F.linear(F.gelu(y, approximate="tanh"), self.ffn_out_weight, self.ffn_out_bias)
        return gated_add(x, y, gate2)

    def self_attention(self, x: Tensor, tables: tuple[Tensor, Tensor, Tensor], kv: KVRing, local: Tensor,
                       topk: int) -> Tensor:
        q, k, v = F.linear(x, self.qkv_weight, self.qkv_bias).chunk(3, -1)
        k_slot, v_slot = kv.slot(self.layer)
        q, q_mean = qk_norm_rope(q, self.norm_q, tables, self.head_dim, eps=EPS)
        k, k_mean = qk_norm_rope(k, self.norm_k, tables, self.head_dim, eps=EPS, out=k_slot)
        v = v.view(k.shape) if v_slot is None else v_slot.copy_(v.view(k.shape))
        k, v, k_mean = kv.append(self.layer, k, v, k_mean)
        mask = lcsa_mask(q_mean, k_mean, local, slices=len(tables[0]) // 2, topk=topk)
        return F.linear(sparse_attn(q, k, v, mask).flatten(2), self.o_weight, self.o_bias)

    def cross_attention(self, x: Tensor) -> Tensor:
        q = rms_norm(F.linear(x, self.cross_q_weight, self.cross_q_bias), self.cross_norm_q, eps=EPS)
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = (c.expand(q.shape[0], -1, -1, -1) for c in (self.cross_k, self.cross_v))
        y = F.scaled_dot_product_attention(q, k, v)
        return F.linear(y.transpose(1, 2).flatten(2), self.cross_o_weight, self.cross_o_bias)


class DiT(nn.Module):
    def __init__(self, config: FlashVSRConfig):
        super().__init__()
        patch = 4 * config.latent_channels
        self.patch_weight, self.patch_bias = weight(config.dim, patch), weight(config.dim)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.head_modulation = weight(2, config.dim)  # shift, scale
        self.head_weight, self.head_bias = weight(patch, config.dim), weight(patch)

    def forward(self, latent: Tensor, lq: Tensor, tables: tuple[Tensor, Tensor, Tensor], kv: KVRing,
                local: Tensor, topk: int) -> Tensor:
        """The velocity of one chunk, like latent.

        latent: (B, C, f, 2h, 2w)    lq: (B, f * h * w, dim), the projector's tokens
        tables: rotations of the chunk's latents, rows and columns    kv: written and read
        local: bool (S, S), blocks within the window    topk: budget of block pairs for a head and query slice
        """
        B, C, f, H, W = latent.shape
        # Tokens stay in window order from here to the head: only attention cares, and it wants them so.
        x = latent.view(B, C, f // 2, 2, H // 16, 8, 2, W // 16, 8, 2).permute(0, 2, 4, 7, 3, 5, 8, 1, 6, 9)
        x = F.linear(x.reshape(B, -1, 4 * C), self.patch_weight, self.patch_bias)
        x = x + window_order(lq, (f, H // 2, W // 2))
        for block in self.blocks:
            x = block(x, tables, kv, local, topk)
        shift, scale = self.head_modulation
        x = F.linear(layer_norm_modulate(x, scale, shift, eps=EPS), self.head_weight, self.head_bias)
        x = x.view(B, f // 2, H // 16, W // 16, 2, 8, 8, 2, 2, C).permute(0, 9, 1, 4, 2, 5, 7, 3, 6, 8)
        return x.reshape(B, C, f, H, W)
