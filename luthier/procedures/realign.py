"""A trained connector moved to another language model: what fits is carried over, the rest starts anew.
    1. bridge and train: vision, connector, A         2. realign: vision, connector', B; connector' = connector where shapes allow
    3. tune connector' and a low-rank update of each matrix of B: full(at="connector") >> lora(at="text.attn.q ... text.mlp.down")
Geigle et al., mBLIP: Efficient Bootstrapping of Multilingual Vision-LLMs, 2024. arXiv:2307.06930. Checked in the authors' code
(gregor-ge/mBLIP, README.md, src/modules/modeling/mblip.py), not in the paper's text: the image encoder stays frozen; the Q-Former
comes from BLIP-2, and so does the last linear map where the widths agree (mT0 for Flan-T5), or it starts anew (BLOOMZ); B is kept
in 8 or 4 bits and learns through LoRA (rank 8, alpha 16, dropout 0.05) on all its matrices (use_lora=lora_all), with a rate of
its own beside the connector's. A warm-up of that last map alone, before 3, is optional there: full(at="connector.map") here.
"""

from luthier.attach import Tuned, base_of
from luthier.bridges import bridge
from luthier.errors import DoesNotFit


def realign(model, language, seed=0):
    """A new Bridged of the same eyes and `language`; `new.carried` names the connector's tensors that came along. `model` is a
    Bridged, or a Tuned whose chain trained the connector and merges."""
    base = base_of(model)
    if isinstance(model, Tuned):
        model.merge()
    trained = {n: t.clone() for n, t in base.connector.state_dict().items()}
    if isinstance(model, Tuned):
        model.unmerge()
    new = bridge(base.vision, language, base.way, seed=seed)
    start = new.connector.state_dict()
    fits = {n: t for n, t in trained.items() if n in start and start[n].shape == t.shape}
    if not any(t.dim() > 1 for t in fits.values()):
        old, own = (m.language.get_input_embeddings().weight.shape[1] for m in (base, new))
        raise DoesNotFit(f"Nothing of the connector can be carried over: it was made for embeddings of width {old}, and "
                         f"{type(new.language).__name__} has {own}. Choose a language model of width {old}, or bridge afresh.")
    new.connector.load_state_dict(start | fits)
    new.carried, new.trained = sorted(fits), True
    return new
