"""n learned tokens in front of the input embeddings.    h = [P; E(x)],    P: (n, D)
Lester et al., Prompt Tuning, 2021. arXiv:2104.08691 §2-3.2: the rows of P start as embeddings of tokens drawn from the vocabulary
(their sampled-vocabulary init, here over the whole vocabulary); `vocab=False`, or no vocabulary at all, starts them from
N(0, std²). First in a decoder, behind the special tokens elsewhere. An encoder-decoder is prompted on its encoder side.
"""

from torch import nn

from luthier.method import Method, method


def why(site):
    """Why peft's prompt, in front of the word embeddings, is not this one; "" where it is."""
    if site.stack.embed != "ids" or site.stack.fixed:
        return ("peft puts a prompt in front of [CLS] and before positions and the norm are added, prompt behind [CLS] and after "
                "them: no setting of one is the other.")
    return "" if site.tower in ("", "encoder") else "peft prompts the encoder of an encoder-decoder."


def write(m, parts):
    (p, site), = parts
    config = site.stack.module.config
    return p.P, dict(token_dim=site.d_out, num_attention_heads=getattr(config, "num_attention_heads", 1))


@method
class prompt(Method):
    at: str = "embed"
    n: int = 20
    vocab: bool = True
    std: float = 0.02
    exempt = {"identity_at_init": "new tokens take part in attention from the first step"}
    peft = dict(type="PROMPT_TUNING", also=("P_TUNING",), given=dict(vocab=False),
                prompt=dict(why=why, write=write, read=lambda t, sites: [dict(P=t) for _ in sites]))

    def init(self, site):                  # trains n D
        embed = getattr(site.stack.embed_module, "weight", None)
        if site.tower == "decoder" and site.n_sites > 1:
            return None                    # unless it is the decoder alone that was pointed at
        if not self.vocab or embed is None or embed.dim() != 2 or embed.shape[1] != site.d_out:
            return dict(P=site.normal(self.n, site.d_out, std=self.std))
        rows = site.random(len(embed)).topk(self.n).indices            # n different tokens
        return dict(P=nn.Parameter(embed.detach()[rows].clone()))

    def stream(self, t, p):                # (B, T, D) -> (B, n + T, D)
        return t.insert(p.P, p.key)
