"""Merge tuned models: trim what each changed little, elect one sign per entry, average those who agree.
    τ_t = W_t - W;   τ̂_t = τ_t where |τ_t| is among the top `density` of the whole expert, else 0
    γ = sign Σ_t τ̂_t;   τ_m = mean of τ̂_t over {t : sign τ̂_t = γ};   W' = W + scale · τ_m
Yadav et al., TIES-Merging, 2023. arXiv:2306.01708 §4, Alg. 1. An entry whose experts balance exactly stays as it is (the
authors' code gives it the majority's sign). Stored: the merged τ_m alone, so the experts are not needed again.
"""

from luthier.method import Method, method
from luthier.methods.merge._experts import cut, elect, located, merged, near


@method
class ties(Method):
    at: str = "all"
    experts: tuple[str, ...] = ()          # folders or .safetensors files of models tuned from this base
    density: float = 0.2                   # share of an expert's entries that is kept
    scale: float = 1.0
    limits = {"density": (0, 1)}
    example = staticmethod(near)
    exempt = {"identity_at_init": "the experts act at once"}

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "experts", located(self.experts))

    def init(self, site, rows=slice(None)):
        def trim(number, expert, what, τ, rows):
            return τ.mul_(τ.abs().ge_(cut(site, self.experts, self.density)[expert]))
        return merged(site, self, trim, elect, rows)

    def weight(self, W, p, b):             # (d_out, d_in)
        return W + self.scale * p.tau, b + self.scale * p.tau_b if hasattr(p, "tau_b") else None
