"""The FlashVSR model: four times larger video, streaming."""
from .config import PRESETS, FlashVSRConfig
from .state import StreamState
from .upscaler import StreamingUpscaler
from .weights import load_upscaler

__all__ = ["PRESETS", "FlashVSRConfig", "StreamState", "StreamingUpscaler", "load_upscaler"]
