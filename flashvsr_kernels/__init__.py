"""GPU and CPU kernels of FlashVSR: block-sparse attention and its mask, norms, rotary position, convolutions.
"""
from .backends import backends
from .block_mask import BLOCK, BlockMask, lcsa_mask, local_window
from .conv3d import causal_conv3d, fold_repeat
from .conv3x3 import conv3x3, fold_upsample, upsample_conv
from .linear import linear_gelu
from .norm import gated_add, gated_add_norm, layer_norm_modulate, rms_norm
from .pixels import adain_uint8, color_moments, enlarge, pixel_unshuffle, rgb_conv
from .rgb_head import rgb_head
from .rope import qk_norm_rope, qkv_norm_rope, rope_table, window_order
from .sparse_attn import sparse_attn

__version__ = "0.1.0"
__all__ = ["BLOCK", "BlockMask", "adain_uint8", "backends", "causal_conv3d", "color_moments", "conv3x3", "enlarge",
           "fold_repeat", "fold_upsample", "gated_add", "gated_add_norm", "layer_norm_modulate", "lcsa_mask",
           "linear_gelu", "local_window", "pixel_unshuffle", "qk_norm_rope", "qkv_norm_rope", "rgb_conv", "rgb_head",
           "rms_norm", "rope_table", "sparse_attn", "upsample_conv", "window_order"]
