"""Full fine-tuning above the bottom K layers: K layers and the embeddings stay frozen, and the backward pass ends above them.
Shi et al., Towards Efficient Fine-tuning of Pre-trained Code Models (Telly-K), 2023. arXiv:2304.05216 §5: fine-tuning changes
mostly the top two layers of an encoder. luthier.procedures.layers shows by how much, for any two models. `embed=True` tunes the
embeddings too.
"""

from luthier.method import recipe
from luthier.methods.head.full import full


@recipe
def telly(freeze: int = 6, embed: bool = False, at: str = "all"):
    frozen = ([] if embed else ["-embed.*"]) + ([f"-block.0-{freeze - 1}.weights"] if freeze else [])
    return full(at=" ".join([at, *frozen])) >> ()


telly.example = {"freeze": 1}              # tiny models have two layers
