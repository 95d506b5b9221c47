"""Prompts in both towers of CLIP: CoOp's context in the text, VPT's prompts in the lower blocks of the image tower, CAVPT in its
`top` upper ones. Xing et al., Dual Modality Prompt Tuning (DPT), 2022. arXiv:2208.08340 §3, fig. 2; α = 0.3 and ten prompts of
both kinds as in the authors' script. Their code trains the two towers on losses of their own in its first epochs; that warm-up
is a schedule of losses, not part of the model, and is not here.
"""

from luthier.method import recipe
from luthier.methods.prompt.cavpt import cavpt
from luthier.methods.prompt.coop import coop
from luthier.methods.prompt.vpt import vpt


@recipe
def dpt(n=16, prompts=10, k=10, top=1, alpha=0.3):
    upper = f"vision.block.-{top}-.in"
    return coop(n=n) >> vpt(at=f"vision.embed vision.block.1-.in -{upper}", n=prompts) >> cavpt(at=upper, k=k, alpha=alpha)
