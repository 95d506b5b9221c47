"""Where things attach: every model is read as the same small set of named sites.

A weight site is always seen as (d_out, d_in); what the model does with it (fused QKV rows, Conv1D's transposition, kernels,
stacked experts) is hidden behind `read` and `write`. A stream site is a (B, T, D) token stream, an attend site an attention
core."""

import fnmatch
import hashlib
import re
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from .errors import NoSuchSite, nearest


@dataclass(frozen=True, eq=False)
class Fixed:
    """A frozen tensor that init can recompute: it is never stored."""

    value: torch.Tensor


@dataclass(eq=False)
class Stack:
    """A run of blocks: one tower of the model."""

    name: str                        # the tower: "" when the model has only one
    module: nn.Module                # its forward takes the ids or pixels, attention_mask, position_ids
    path: str
    causal: bool = False
    fixed: int = 0                   # leading special tokens (CLS, registers) that nothing may drop or merge
    embed: str = "out"               # "ids": embed_module is called on ids inside module.forward | "out": its output is the
    embed_module: nn.Module | None = None       # stream | "in": no such module, the stream begins as the first block's input
    final_module: nn.Module | None = None       # None: the last block's output
    words_module: nn.Module | None = None       # looks tokens up before positions are added (dual encoders' text): site "words"
    blocks: tuple = ()               # the block modules, in order
    dim: int = 0
    rope: bool = False
    cross: bool = False              # attends to an encoder
    insert: str = ""                 # why no tokens may be inserted; "" when they may

    @property
    def n_blocks(self):
        return len(self.blocks)


@dataclass(frozen=True, eq=False)
class Site:
    """One named place. For layout "raw" `param` may be dotted ("out_proj.weight"): `module` is then the one whose forward reads
    the parameter without calling the layer that holds it, so it can only be reached by substituting the parameter."""

    name: str                        # "block.3.attn.q", "vision.block.0.mlp.up", "embed", "final", "head", or a parameter's path
    kind: str                        # "weight" | "stream" | "attend"
    module: nn.Module
    path: str                        # of the module in the model
    role: str = ""                   # "attn.q", "mlp.up", "embed.token", "attn.norm", "out", "in", "mid", ...; "" when unknown
    tower: str = ""                  # "" or "vision" | "text" | "fusion" | "encoder" | "decoder" | ...
    layout: str = ""                 # linear | conv1d | conv | embedding | norm | stack | raw; stream: in | out | mid
    param: str = ""                  # the parameter's name on module
    bias: str = ""                   # the bias's name on module, "" without one
    d_in: int = 0
    d_out: int = 0
    rows: object = None              # of a fused weight: (start, stop) or a LongTensor when heads are interleaved
    index: int | None = None         # expert in a stacked 3-D parameter
    turned: bool = False             # stored as (d_in, d_out)
    block: int | None = None
    heads: tuple | None = None       # (query heads, key/value heads, head width)
    tied: tuple = ()                 # names of other sites that hold this very parameter
    stack: Stack | None = field(default=None, repr=False)
    mid: tuple | None = field(default=None, repr=False)    # layout "mid": (norm whose input is the merged stream, mlp, block)
    mates: dict = field(default_factory=dict, repr=False)  # the block's sites by name within the block
    seed: int = 0
    step: int = 0                    # which link of the chain; the next four are set by `bound`
    pool: dict = field(default_factory=dict, repr=False)
    n_sites: int = 1
    rank_of: int = 0

    # ---- stored layout <-> (d_out, d_in)
    def whole(self, P):
        """The stored tensor as one (rows, columns) matrix, all rows of a fused weight."""
        P = P if self.index is None else P[self.index]
        P = P.mT if self.turned else P
        return P.reshape(P.shape[0] if P.dim() else 1, -1)

    def read(self, P):
        """Stored tensor -> (d_out, d_in), a view where the layout allows one."""
        return _rows(self.whole(P), self.rows)

    def write(self, P, new):
        """`P` in its stored layout with this site's part replaced by new (d_out, d_in): out of place, differentiable."""
        new = _put(self.whole(P), self.rows, new.to(P.dtype))
        one = P if self.index is None else P[self.index]
        new = new.reshape(one.mT.shape).mT if self.turned else new.reshape(one.shape)
        return new if self.index is None else _put(P, (self.index, self.index + 1), new[None])

    def read_b(self, b):
        return _rows(b if self.index is None else b[self.index], self.rows)

    def write_b(self, b, new):
        new = _put(b if self.index is None else b[self.index], self.rows, new.to(b.dtype))
        return new if self.index is None else _put(b, (self.index, self.index + 1), new[None])

    @property
    def sliced(self):
        """Whether some rows of the stored tensor, and of the bias, are a site of their own."""
        return self.rows is None and self.index is None and self.parameter.dim() > 0 and not (self.turned and self.bias)

    def part(self, rows):
        """(W, b) of some rows of the stored tensor (slice(None): all): where it is turned, (d_out, d_in) is cut along d_in."""
        if rows == slice(None):
            return self.W, self.b
        return self.read(self.parameter.detach()[rows]), None if self.b is None else self.b[rows]

    @property
    def parameter(self):
        return _get(self.module, self.param)

    @property
    def W(self):
        return self.read(_whole(self.parameter.detach()))

    @property
    def b(self):
        return self.read_b(_whole(_get(self.module, self.bias).detach())) if self.bias else None

    @property
    def peers(self):
        """The sites of the same block: "attn.q" -> Site."""
        return self.mates

    @property
    def family(self):
        """A key that sites have in common which are given one input: q, k and v (q of a cross attention alone), gate and up."""
        group, _, last = self.role.rpartition(".")
        kind = {"q": "attention", "k": "attention", "v": "attention", "gate": "neurons", "up": "neurons"}.get(last)
        return None if kind is None or last == "q" and group.startswith("cross") else (self.tower, self.block, group, kind)

    # ---- state for init
    @property
    def like(self):
        """A tensor with the dtype and device that new state of this site has."""
        own = [self.parameter] if self.kind == "weight" else []
        roots = [self.module] + ([self.stack.module] if self.stack else [])
        return next((p for p in own if p.is_floating_point()), None) if own and own[0].is_floating_point() else next(
            (p for m in roots for p in m.parameters() if p.is_floating_point()), torch.empty(0))

    def bound(self, seed, step, pool, n_sites, rank):
        """This site as link `step` of a chain meets it; pool holds what the sites of one step share."""
        return replace(self, seed=seed, step=step, pool=pool, n_sites=n_sites, rank_of=rank)

    def _draw(self, shape, fill):
        like = self.like
        call = self.pool[key] = self.pool.get(key := ("calls", self.name), -1) + 1
        if like.is_meta:
            return torch.empty(shape, dtype=like.dtype, device="meta")
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{self.name}/{call}".encode(), digest_size=8).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return fill(torch.empty(shape), source).to(like.device, like.dtype)

    def zeros(self, *shape):
        return nn.Parameter(torch.zeros(shape, dtype=self.like.dtype, device=self.like.device))

    def ones(self, *shape):
        return nn.Parameter(torch.ones(shape, dtype=self.like.dtype, device=self.like.device))

    def normal(self, *shape, std=1.0):
        return nn.Parameter(self.random(*shape, std=std))

    def uniform(self, *shape, bound=1.0):
        return nn.Parameter(self._draw(shape, lambda t, g: t.uniform_(-bound, bound, generator=g)))

    def random(self, *shape, std=1.0):
        """A frozen normal tensor: wrap it in `fixed` and it costs no stored byte."""
        return self._draw(shape, lambda t, g: t.normal_(0, std, generator=g))

    def fixed(self, tensor):
        return Fixed(tensor)

    def shared(self, key, make, group=None):
        """The very same object for every site of this step that asks for (key, group); make() is called once."""
        if ("shared", key, group) not in self.pool:
            self.pool["shared", key, group] = make()
        return self.pool["shared", key, group]


def _rows(P, rows):
    return P if rows is None else P[slice(*rows)] if isinstance(rows, tuple) else P.index_select(0, rows.to(P.device))


def _put(P, rows, new):
    if rows is None:
        return new
    if isinstance(rows, tuple):
        return torch.cat([P[:rows[0]], new, P[rows[1]:]])
    return P.index_copy(0, rows.to(P.device), new)


def _whole(P):
    """All of a tensor that is spread over processes: every one of them asks."""
    return P.full_tensor() if hasattr(P, "full_tensor") else P


def _get(module, name):
    *path, last = name.split(".")
    for part in path:
        module = module._modules[part]
    return module._parameters[last]


class Sites(list):
    """Every site of a model in the order data meets them; by name: `sites["block.0.attn.q"]`."""

    def __init__(self, found, model, stacks):
        super().__init__(found)
        self.model, self.stacks = model, stacks

    @cached_property
    def by_name(self):
        return {s.name: s for s in self}

    @cached_property
    def towers(self):
        return sorted({s.tower for s in self if s.tower})

    def __getitem__(self, key):
        return self.by_name[key] if isinstance(key, str) else super().__getitem__(key)


def sites(model):
    """Scan a model once. Sees through a Tuned, DistributedDataParallel and torch.compile; never touches the model."""
    from .anatomy import scan
    while True:
        if hasattr(model, "chain") and isinstance(getattr(model, "model", None), nn.Module):
            model = model.model
        elif type(model).__name__ == "DistributedDataParallel":
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        else:
            return Sites(*scan(model))


GROUPS = {
    "linear": lambda s: s.block is not None and s.role != "mlp.router" and (
        s.layout in ("linear", "conv1d", "stack") or s.layout == "raw" and s.role and s.param.endswith("weight")
        and s.parameter.dim() == 2),
    "conv": lambda s: s.block is not None and (s.layout == "conv" or s.layout == "raw" and s.parameter.dim() > 2),
    "norm": lambda s: s.layout == "norm",
    "bias": lambda s: bool(s.bias),
    "weights": lambda s: s.block is not None,
    "all": lambda s: True,
}


def find(model, selector):
    """Sites that any word of the selector names, in the order data meets them.

    `attn.q` is short for `block.*.attn.q`; towers may be left out, and one alone (`connector`) is every weight in it; `*` never
    crosses a dot; `block.0-3.out`, `block.6-.out`,
    `block.-1.out`; `linear conv norm bias weights all` are groups of weight sites, of which some may be empty, and
    `block.6-.linear` is one in some blocks; `-WORD` takes sites away again (`-head` also where a model has none)."""
    every = model if isinstance(model, Sites) else sites(model)
    chosen = set()
    for word in selector.split():
        drop, word = word[0] == "-" and len(word) > 1, word.removeprefix("-")
        got = _match(every, word)
        if not got and word.rpartition(".")[2] not in GROUPS and not (drop and word == "head"):
            tails = dict.fromkeys(re.sub(r"^.*?block\.\d+\.", "", s.name) for s in every)
            raise NoSuchSite(f"{word!r} matches no site of {type(every.model).__name__}. "
                             f"{nearest(word, [*tails, *every.by_name, *GROUPS])} List its sites with `luthier sites MODEL`.")
        chosen = chosen - got if drop else chosen | got
    if not chosen:
        raise NoSuchSite(f"The selector {selector!r} leaves no site of {type(every.model).__name__}. "
                         "Name at least one site before taking any away; `luthier sites MODEL` lists them.")
    return [s for s in every if s in chosen]


_BLOCKS = re.compile(r"block\.-?\d+(-(-?\d+)?)?")


def _match(every, word):
    if word in every.by_name:
        named = every.by_name[word]                         # of a tied embedding, a model may run another view (T5's encoder's)
        return {named} | {s for s in every if s.name in named.tied and s.role == named.role and s.kind == named.kind
                          and named.tower == "" != s.tower}
    word += ".all" * (word in every.towers)
    tower, _, rest = word.partition(".")
    tower, rest = (tower, rest) if tower in every.towers and rest else (None, word)
    here = [s for s in every if tower in (None, s.tower)]
    span, _, group = rest.rpartition(".")
    if group in GROUPS and (not span or _BLOCKS.fullmatch(span)):
        flat = all(s.block is None for s in every)          # a model without blocks: all of it but the head counts as one
        return {s for s in here if s.kind == "weight"
                and GROUPS[group](replace(s, block=0) if flat and s.role != "head" else s)
                and (not span or s.block is not None and _in_range(span.removeprefix("block."), str(s.block), s.stack.n_blocks))}
    wanted = [rest.split("."), ["block", "*", *rest.split(".")]]
    return {s for s in here for w in wanted if _same(w, s)}


def _same(wanted, site):
    parts = (site.name.removeprefix(site.tower + ".") if site.tower else site.name).split(".")
    return len(parts) == len(wanted) and all(
        w == p or _in_range(w, p, site.stack.n_blocks if site.stack and before == "block" else 0) or fnmatch.fnmatchcase(p, w)
        for w, p, before in zip(wanted, parts, ["", *parts], strict=False))


def _in_range(wanted, part, n):
    """`3-5`, `6-`, `-1`, `-4-` against a number; negative counts from the last block."""
    span = part.isdigit() and re.fullmatch(r"(-?\d+)(-(-?\d+)?)?", wanted)
    if not span:
        return False
    start, stop = (int(x) + n * (x[0] == "-") for x in (span[1], span[3] or span[1]))
    return start <= int(part) and (bool(span[2] and not span[3]) or int(part) <= stop)
