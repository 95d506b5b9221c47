"""A dual encoder of images and text made one of clips: TED-Adapters before every visual block and behind the last, bottlenecks
h + U gelu(D h + d) + u before every text block. Wang et al., M2-CLIP, 2024. arXiv:2401.11649 §3.2; widths as in the authors' code
(384 of 768 and 512). Their text adapters start at random; here U = 0, so that zero-shot use is kept at the start. What trains
them with four losses at once: luthier/procedures/m2clip.py.
"""

from luthier.method import recipe
from luthier.methods.adapter.houlsby import houlsby
from luthier.methods.adapter.ted import ted


@recipe
def m2clip(reduce: int = 2, width: int = 384, text: bool = True):
    visual = ted(at="vision.block.*.in vision.final", reduce=reduce)
    return visual >> houlsby(at="text.block.*.in", width=width, norms=False) if text else visual
