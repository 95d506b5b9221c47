"""Learned context words for the class names of CLIP.    t_c = [v_1] .. [v_n] [name of c] [.],    p(c | x) ~ exp(s cos(x, t_c))
Zhou et al., Learning to Prompt for Vision-Language Models (CoOp), 2022. arXiv:2109.01134 §3.2, eq. 2-3. v: (n, D) for all
classes, or with `own=True` (C, n, D), a context for each; drawn from N(0, 0.02²), or the embeddings of `words`, such as "a photo
of a". The name stands at the end, or with `middle=True` between two halves. Both towers stay frozen. What a task's template puts
before the name makes way, what it puts behind stays. A context for each class cannot serve classes that training never showed.
"""

from luthier.errors import DoesNotFit
from luthier.method import Method, method

from . import _texts


@method
class coop(Method):
    at: str = "words"
    n: int = 16
    words: str = ""
    own: bool = False
    middle: bool = False
    std: float = 0.02
    exempt = {"identity_at_init": "the context stands in the text from the first step"}

    def init(self, site, model):           # trains n D, with own C n D
        n, classes = len(_texts.tokens(model, self.words)) if self.words else self.n, ()
        if self.own:
            if not hasattr(model, "texts") or model.old < len(model.texts):
                raise DoesNotFit("coop(own=True) has a context for each class that training shows, and none for any other text. "
                                 "Use own=False, or data without new classes.")
            classes = (len(model.texts),)
        return dict(P=_texts.start(site, model, self.words, (*classes, n, site.d_out), self.std),
                    **_texts.order(site, model, n, self.middle))

    def stream(self, t, p):                # (C, T, D) -> (C, n + T - words before the name, D)
        return _texts.placed(t, p.P, p)
