"""GPU and CPU kernels of FlashVSR: block-sparse attention and its mask, norms, rotary position, convolutions.
"""
from .backends import backends
from .block_mask import BLOCK, BlockMask, lcsa_mask, local_window
from .conv3d import causal_conv3d
from .conv3x3 import conv3x3
from .norm import gated_add, layer_norm_modulate, rms_norm
from .rope import qk_norm_rope, raster_order, rope_table, window_order
from .sparse_attn import sparse_attn

__version__ = "0.1.0"
__all__ = ["BLOCK", "BlockMask", "backends", "causal_conv3d", "conv3x3", "gated_add", "layer_norm_modulate",
           "lcsa_mask", "local_window", "qk_norm_rope", "raster_order", "rms_norm", "rope_table",
           "sparse_attn", "window_order"]
