"""A model of images made one of videos at no cost: heads that look at other frames, and linear adapters that fold away.
Li et al., ZeroI2V, 2023. arXiv:2310.01324; as in the authors' code frames have learned places, too (and the last norm trains:
add `full(at="final.norm")` where there is one). A chain with `stdha` in it cannot be merged whole; for inference at the base's
cost attach `stdha() >> frame_embed()` and, on top of it, `linear_adapter()`, and merge the latter.
"""

from luthier.method import recipe
from luthier.methods.adapter.linear_adapter import linear_adapter
from luthier.methods.attention.stdha import stdha
from luthier.methods.prompt.frame_embed import frame_embed


@recipe
def zeroi2v(shift: tuple = (1, -1), frames: int = 8, reduce: int = 4, scale: float = 0.5):
    return stdha(shift=shift) >> frame_embed(frames=frames) >> linear_adapter(reduce=reduce, scale=scale)
