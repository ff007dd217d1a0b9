"""Training: the data pack, clips from it, their degradation, losses. Inference imports none of it."""
