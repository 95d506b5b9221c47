"""Mix-and-match adapter: a short prefix at the attention, a wide scaled parallel adapter beside the MLP.
He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2021. arXiv:2110.04366 §4.6: prefix length 30,
width 512, s = 4, U = 0 ("LoRA init"). They find that small changes suit the attention and large ones the MLP.
"""

from luthier.method import recipe
from luthier.methods.adapter.adaptformer import adaptformer
from luthier.methods.attention.prefix import prefix


@recipe
def mam(n: int = 30, width: int = 512, scale: float = 4.0, reparam: bool = True):
    return prefix(n=n, reparam=reparam) >> adaptformer(width=width, scale=scale)
