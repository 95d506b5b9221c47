"""Weights of an adapter out of embeddings of its task, its layer and, with `places`, its place in the block.
Karimi Mahabadi et al., 2021. arXiv:2106.04489 §2.1-2.4:    z = LN(P relu(Q [t; l; e] + q) + p),  W = G z + g
t is the model's, l, e and Q, q, P, p, LN are a tower's; (G, g) is a tower's with `places`, else each place has its own. Init as
in the authors' code, embeddings ~ N(0, 1) and maps ~ N(0, 0.01²), but G and g of U and u are 0: the adapter is the identity.
"""

import torch
from torch.nn.functional import layer_norm, relu


def state(site, d, w, tasks, embed, hidden, code, places):
    """t: (tasks, embed), the rest of z, and G and g of D: (w, d), d: (w,), U: (d, w) and u: (d,)"""
    def of(group, name, make):
        return site.shared((name, d), make, group)
    net = dict(t=of(None, "t", lambda: site.normal(tasks, embed)),
               l=of((site.tower, site.block), "l", lambda: site.normal(embed)))
    if places:
        net["e"] = of((site.tower, site.role), "e", lambda: site.normal(embed))
    maps, where = dict(Q=(hidden, embed * len(net)), P=(code, hidden)), (site.tower, None if places else site.role)
    net |= {k: of(site.tower, k, lambda s=s: site.normal(*s, std=0.01)) for k, s in maps.items()}
    net |= {k: of(site.tower, k, lambda n=n: site.zeros(n)) for k, n in dict(q=hidden, p=code, beta=code).items()}
    net["gain"] = of(site.tower, "gain", lambda: site.ones(code))
    for k, n in dict(D=w * d, d=w, U=d * w, u=d).items():
        std = 0.01 * (k in "Dd")
        net[f"G{k}"] = of(where, f"G{k}", lambda n=n, std=std: site.normal(n, code, std=std))
        net[f"g{k}"] = of(where, f"g{k}", lambda n=n: site.zeros(n))
    return net


def weights(p, k):
    """D, d, U and u of task k, or of the tasks of all rows where k is a list."""
    t = p.t[k]
    z = torch.cat([t, *(x.expand_as(t) for x in ([p.l, p.e] if hasattr(p, "e") else [p.l]))], -1)
    z = relu(z @ p.Q.T + p.q) @ p.P.T + p.p
    z = layer_norm(z, z.shape[-1:], p.gain, p.beta, 1e-6)
    D, d, U, u = (z @ getattr(p, f"G{x}").T + getattr(p, f"g{x}") for x in "DdUu")
    w, d_out = d.shape[-1], u.shape[-1]
    return dict(D=D.unflatten(-1, (w, d_out)), d=d, U=U.unflatten(-1, (d_out, w)), u=u)
