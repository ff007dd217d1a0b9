"""The FlashVSR model: four times larger video, streaming."""
from .config import PRESETS, FlashVSRConfig
from .memory import keep_freed_memory
from .state import StreamState
from .upscaler import StreamingUpscaler
from .weights import load_upscaler

__all__ = ["PRESETS", "FlashVSRConfig", "StreamState", "StreamingUpscaler", "keep_freed_memory",
           "load_upscaler"]
