"""What a FlashVSR model is, as one frozen value, and the presets that have weights."""
from dataclasses import dataclass

BLOCK = (2, 8, 8)      # tokens of one attention block: latents, rows, columns; 128 tokens
PATCH = 16             # output pixels a token covers in each direction (8x latent, 2x patch)
TILE = 128             # output pixels a block covers: sizes inside the model are multiples of this
SCALE = 4              # output pixels per input pixel
LATENT_FRAMES = 4      # frames a latent stands for
SLICE_FRAMES = 8       # frames of a slice (two latents): what a steady chunk takes in and puts out
FIRST_LATENTS = 6      # the first chunk is three slices
FIRST_FRAMES = 25      # input frames before the first output; it then emits 4 fewer
LOOKAHEAD = 4          # input frames the newest output frame lags behind
REFERENCE_PIXELS = 768 * 1280  # the top-k budget is stated at this size (spec C.5)


@dataclass(frozen=True)
class FlashVSRConfig:
    """Sizes of the weights first (no default), then what may change from run to run.

    version: "v1" or "v1.1", the LQ projector (v1.1 carries two frames of context from clip to clip)
    decoder_channels: widths at 1/8, 1/4, 1/2 and full resolution
    sparse_ratio: key blocks a query block may keep on average, in units of 60
    local_range: side of the attention window in blocks of 128 output pixels; edge: "truncate" or "shift" at
    borders
    kv_slices: slices of keys and values kept from earlier chunks; as in the official code 1 acts as 2
    color: "adain", "wavelet" or "none"; noise: standard deviation of the noise the one step starts from
    exact_upstream: 8-bit output truncates, as the official code does, instead of rounding
    rope_positions: latents before the temporal positions are rebased
    margin: output pixels by which the picture is continued on all sides inside the model, so that its border
    is not the zero padding's; official weights have none
    """
    version: str
    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    freq_dim: int
    context_len: int
    lq_hidden: tuple[int, int]
    decoder_channels: tuple[int, int, int, int]
    latent_channels: int = 16
    sparse_ratio: float = 2.0
    local_range: int = 11
    kv_slices: int = 3
    edge: str = "truncate"
    color: str = "adain"
    seed: int = 0
    noise: float = 1.0
    exact_upstream: bool = False
    rope_positions: int = 1024
    margin: int = 0

    def __post_init__(self):
        def need(ok: bool, name: str, must: str):
            if not ok:
                raise ValueError(f"{name} must be {must}, got {getattr(self, name)!r}")
        need(self.version in ("v1", "v1.1"), "version", '"v1" or "v1.1"')
        need(self.dim % self.num_heads == 0 and self.head_dim in (64, 128),
             "dim", "64 or 128 times num_heads")
        need(len(self.lq_hidden) == 2, "lq_hidden", "two widths")
        need(len(self.decoder_channels) == 4, "decoder_channels", "four widths")
        need(0 < self.sparse_ratio <= 1e6, "sparse_ratio", "positive and at most 1e6")
        for name, least in (("local_range", 1), ("kv_slices", 1), ("margin", 0), ("rope_positions", 1)):
            value = getattr(self, name)
            need(isinstance(value, int) and value >= least, name, f"a whole number of {least} or more")
        need(self.edge in ("truncate", "shift"), "edge", '"truncate" or "shift"')
        need(self.color in ("adain", "wavelet", "none"), "color", '"adain", "wavelet" or "none"')
        need(0 <= self.noise < float("inf"), "noise", "0 or more and finite")
        need(self.rope_positions > FIRST_LATENTS + 2 * self.ring_slices, "rope_positions",
             f"more than {FIRST_LATENTS + 2 * self.ring_slices}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Complex pairs of a head for time, height and width: (22, 21, 21) of 64."""
        side = self.head_dim // 6
        return self.head_dim // 2 - 2 * side, side, side

    @property
    def ring_slices(self) -> int:
        """Slices the K/V ring holds: the cached ones and the current one; never less than the first chunk's
        three.
        """
        return max(self.kv_slices, 2) + 1

    def topk(self, height: int, width: int) -> int:
        """Budget of one query slice, in block pairs, for an output of height x width (spec C.5, float64, in
        this order).
        """
        blocks = (height // TILE) * (width // TILE)
        ratio = self.sparse_ratio * 768 * 1280 / (height * width)
        return int(blocks * blocks * ratio) - 1


_OFFICIAL = dict(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, text_dim=4096, freq_dim=256,
                 context_len=512, lq_hidden=(2048, 3072), decoder_channels=(512, 256, 128, 128))
PRESETS = {
    "v1": FlashVSRConfig(version="v1", **_OFFICIAL),
    "v1.1": FlashVSRConfig(version="v1.1", **_OFFICIAL),
    "compact": FlashVSRConfig(version="v1.1", dim=128, num_heads=2, num_layers=4, ffn_dim=512, text_dim=16,
                              freq_dim=64, context_len=4, lq_hidden=(40, 96),
                              decoder_channels=(112, 64, 32, 16), sparse_ratio=0.25, local_range=3,
                              color="wavelet", noise=0.0, margin=8),
}
