"""A learned place in time for every token of a frame.    h_t' = h_t + e_t,    e: (frames, D) = 0 at init
As ZeroI2V (arXiv:2310.01324, the authors' vit_zero_clip.py: `temporal_embedding`) and most video transformers have it. It is
added to the stream as it enters the blocks: behind CLIP's first norm, where the authors add it before that norm. Clips of fewer
frames use the first places.
"""

from luthier.errors import DoesNotFit
from luthier.method import Method, method


@method
class frame_embed(Method):
    at: str = "embed"
    frames: int = 8

    def init(self, site):                  # trains frames D
        return dict(e=site.zeros(self.frames, site.d_out))

    def stream(self, t, p):                # t.h: (B N, T, D), the N frames of a clip in turn
        if t.frames > len(p.e):
            raise DoesNotFit(f"{self!r} has {len(p.e)} places in time, and this clip has {t.frames} frames. "
                             f"Use frame_embed(frames={t.frames}).")
        return t.map_h(lambda h: h + p.e[:t.frames].repeat(len(h) // t.frames, 1)[:, None])
