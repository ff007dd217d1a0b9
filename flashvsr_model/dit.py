"""The diffusion transformer, with all that is constant in FlashVSR (time step, prompt) folded into its
weights.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr_kernels import (gated_add_norm, layer_norm_modulate, lcsa_mask, linear_gelu, qkv_norm_rope, rms_norm,
                              sparse_attn, window_order)

from .config import FlashVSRConfig
from .state import KVRing

EPS = 1e-6  # of every norm in the model
Tables = tuple[Tensor, Tensor, Tensor]


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

    def forward(self, stream: list[Tensor], following: tuple[Tensor, Tensor], tables: Tables, kv: KVRing,
                local: Tensor, topk: int) -> None:
        """stream: the residual stream, and the same normed and modulated for this block; replaced by the two for what
        follows. In a list, so that nobody holds what this block has used: it is a fifth of a first chunk's memory.
        following: scale and shift of the norm behind this block
        """
        _, _, gate1, shift2, scale2, gate2 = self.modulation
        y = self.self_attention(stream, tables, kv, local, topk)
        x = stream.pop()
        x, y = gated_add_norm(x, y, gate1, self.cross_scale, self.cross_shift, eps=EPS)
        x, y = gated_add_norm(x, self.cross_attention(y), None, scale2, shift2, eps=EPS)
        stream += gated_add_norm(x, self.feed_forward(y, len(tables[0]) // 2), gate2, *following, eps=EPS)

    def self_attention(self, stream: list[Tensor], tables: Tables, kv: KVRing, local: Tensor, topk: int) -> Tensor:
        qkv = F.linear(stream.pop(), self.qkv_weight, self.qkv_bias)
        q, k, v, q_mean, k_mean = qkv_norm_rope(qkv, self.norm_q, self.norm_k, tables, self.head_dim, eps=EPS,
                                                out=kv.slot(self.layer))
        del qkv  # a third of the memory that attention works in
        k, v, k_mean = kv.append(self.layer, k, v, k_mean)
        mask = lcsa_mask(q_mean, k_mean, local, slices=len(tables[0]) // 2, topk=topk, columns=len(tables[2]) // 8)
        return F.linear(sparse_attn(q, k, v, mask).flatten(2), self.o_weight, self.o_bias)

    def cross_attention(self, x: Tensor) -> Tensor:
        q = rms_norm(F.linear(x, self.cross_q_weight, self.cross_q_bias), self.cross_norm_q, eps=EPS)
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = (c.expand(q.shape[0], -1, -1, -1) for c in (self.cross_k, self.cross_v))
        y = F.scaled_dot_product_attention(q, k, v)
        del q
        return F.linear(y.transpose(1, 2).flatten(2), self.cross_o_weight, self.cross_o_bias)

    def feed_forward(self, x: Tensor, slices: int) -> Tensor:
        """Slice by slice: in between is the model's widest tensor, and a stream's first chunk has three slices."""
        done = [F.linear(linear_gelu(part, self.ffn_in_weight, self.ffn_in_bias), self.ffn_out_weight,
                         self.ffn_out_bias) for part in x.chunk(slices, 1)]
        return torch.cat(done, 1) if slices > 1 else done[0]


class DiT(nn.Module):
    def __init__(self, config: FlashVSRConfig):
        super().__init__()
        patch = 4 * config.latent_channels
        self.patch_weight, self.patch_bias = weight(config.dim, patch), weight(config.dim)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.head_modulation = weight(2, config.dim)  # shift, scale
        self.head_weight, self.head_bias = weight(patch, config.dim), weight(patch)

    def forward(self, latent: Tensor, lq: Tensor, tables: Tables, kv: KVRing,
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
        norms = [(block.modulation[1], block.modulation[0]) for block in self.blocks]
        norms.append((self.head_modulation[1], self.head_modulation[0]))
        stream = [x, layer_norm_modulate(x, *norms[0], eps=EPS)]
        del x
        for block, following in zip(self.blocks, norms[1:]):
            block(stream, following, tables, kv, local, topk)
        x = F.linear(stream[1], self.head_weight, self.head_bias)
        x = x.view(B, f // 2, H // 16, W // 16, 2, 8, 8, 2, 2, C).permute(0, 9, 1, 4, 2, 5, 7, 3, 6, 8)
        return x.reshape(B, C, f, H, W)
