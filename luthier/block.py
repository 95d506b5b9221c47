"""The inside of a block: which of its leaves are attention, MLP, experts, state-space mixer, convolutions and norms.

Structure first, the names that authors use second, true exceptions last. A leaf that nothing here claims keeps its raw path."""

import re
from collections import defaultdict

import torch
from torch import nn

from .walk import LISTS, arguments, common, under, up, within, word

# ---- names authors use
_END = "(_proj|_lin|_linear|_layer|_attn|_head|_projection)?$"
ATTENTION = {role: re.compile(pattern, re.I) for role, pattern in {
    "qkv": r"^((to_|w|in_)?qkv(_proj|_linear|_layer)?|c_attn|query_key_value|w_?pack|in_proj)$",
    "q_a": r"^q_a_proj$", "q_b": r"^q_b_proj$", "kv_a": r"^kv_a_proj\w*$", "kv_b": r"^kv_b_proj$",
    "kv": r"^((to_|w)?kv(_proj|_linear)?|key_value)$",
    "q": r"^(to_|w|in_proj_|linear_)?(q|query|queries)" + _END,
    "k": r"^(to_|w|in_proj_|linear_)?(k|key|keys)" + _END,
    "v": r"^(to_|w|in_proj_|linear_)?(v|value|values)" + _END,
    "r": r"^receptance$",
    "o": r"^((to_|w|linear_)?(o|out|output)(_proj|_lin|_linear|_layer|_projection)?"
         r"|c_proj|dense|proj|projection|attn_out|post_proj)$",
}.items()}
ORDER = {role: i for i, role in enumerate("qkvro")}
CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encoder_decoder|multihead_attn|attn2$", re.I)
HEAD_NORM = re.compile(r"(q|k|v|query|key|kv_a|q_a|kv_layer)_?\w*norm", re.I)
EXPERT = re.compile(r"experts\.(?:expert_)?(\d+)\.|(shared_?\w*)\.")
STACKED = re.compile(r"gate_up_proj|gate_proj|up_proj|down_proj|w[123]|v1|input_linear|output_linear")
NOT_MLP = re.compile(r"norm|emb|mod(ulation)?$|ada|time|rel_pos|cpb|downsample|reduction|router|temporal_|quer|keys_values")
RECURRENT = ({"x_proj", "dt_proj"}, {"rg_lru"}, {"conv1d", "in_proj", "out_proj"}, {"conv", "in_proj", "out_proj"})    # kids
# ---- true exceptions
PER_HEAD = re.compile(r"GPTNeoX|Bloom|Persimmon|Fuyu|^DisentangledSelfAttention")     # fused rows: (head, qkv, width)
UP_FIRST = re.compile(r"^(GEGLU|SwiGLU)$")                          # fused up and gate: the second half is the gate


def attention_kids(module):
    """{role: child name} of an attention, else None."""
    if isinstance(module, nn.MultiheadAttention):
        return {"mha": ""}
    found = {}
    for name, kid in module._modules.items():
        role = kid is not None and next((r for r, p in ATTENTION.items() if p.match(name)), None)
        if role:
            found.setdefault(role, name)
    if "qkv" in found and "q" in found:                             # GPT-2's cross attention: c_attn is k and v
        found["kv"] = found.pop("qkv")
    if found.get("qkv") == "in_proj" and "attention" not in type(module).__name__.lower():
        return None
    has = found.keys()
    good = "qkv" in has or "q_b" in has or ("q" in has and has & {"k", "kv", "kv_b"}) or has >= {"r", "k", "o"}
    return found if good else None


def is_mixer(module):
    return "A_log" in module._parameters or any(module._modules.keys() >= kids for kids in RECURRENT)


class Block:
    """Claims the leaves of one block for roles, and notes where its streams are read."""

    def __init__(self, path, number, leaves, attentions, mixers, modules, config):
        self.path, self.number, self.modules, self.config, self.module = path, number, modules, config, modules[path]
        self.leaves = {x.path: x for x in leaves}
        self.claims, self.streams, self.attends = [], [], []        # (leaf, fields of a site) | (name, path, layout, mid) | ...
        self.part, self.label = {}, {}                              # leaf path -> its sublayer, its (last) name
        self.names, self.mlp_module, self.width, self.norm = set(), None, 0, {}
        for core, kids in attentions.items():
            self.attention(core, kids)
        for core in mixers:
            self.mixer(core)
        self.experts()
        self.mlps()
        self.convs()
        self.norms()
        tail = [x for x in reversed(self.leaves.values()) if x.matrix]
        self.width = self.width or next((x.d_out for x in tail if "short" not in self.label.get(x.path, "")), 0)
        first = next((x.module for x in self.leaves.values() if x.kind == "conv"), None)
        self.width_in = self.width if self.attends or first is None else first.in_channels

    @property
    def free(self):
        return {p: x for p, x in self.leaves.items() if p not in self.part}

    def rel(self, path):
        return path[len(self.path) + 1:] if self.path else path

    def fresh(self, group):
        """attn, then attn2, attn3."""
        n = 1 + sum(re.fullmatch(group + r"\d*", g) is not None for g in self.names)
        self.names.add(group := group + str(n) * (n > 1))
        return group

    def claim(self, leaf, name, part, **more):
        self.claims.append((leaf, dict(name=name, **more)))
        self.part[leaf.path], self.label[leaf.path] = part, name

    def attention(self, core, kids):
        group, module = self.fresh("cross" if CROSS.search(self.rel(core)) else "attn"), self.modules[core]
        dot = core + "." if core else ""
        if "mha" in kids:                                           # torch's own: q, k and v are parameters of the module itself
            heads, out = (module.num_heads, module.num_heads, module.head_dim), self.leaves[dot + "out_proj"]
            whole, d = module.in_proj_weight is not None, module.embed_dim
            bias = "in_proj_bias" if whole and module.in_proj_bias is not None else ""
            for i, r in enumerate("qkv"):
                param, rows = ("in_proj_weight", (i * d, i * d + d)) if whole else (f"{r}_proj_weight", None)
                self.claim(self.leaves[core], f"{group}.{r}", group, param=param, bias=bias, rows=rows, heads=heads)
        else:
            at = {r: self.leaves.get(dot + n) or self.leaves.get(f"{dot}{n}.0") for r, n in kids.items()}
            at = {r: x for r, x in at.items() if x is not None and x.matrix}
            out = at.pop("o", None) or self.output(core)
            heads = head_shape(module, self.config, at, out)
            for r, x in sorted(at.items(), key=lambda a: ORDER.get(a[0], 0)):
                split = fused_rows(module, x, heads, r, self.config) if r in ("qkv", "kv") else {r: None}
                for one, rows in split.items():
                    self.claim(x, f"{group}.{one}", group, rows=rows, heads=heads, after=next(iter(at.values())))
        self.attends.append((group, core, heads))
        for x in self.free.values():
            if x.kind == "norm" and under(x.path, core) and HEAD_NORM.match(x.name):
                self.claim(x, f"{group}.{re.sub('_?layer_?norm|_?norm', '', x.name, flags=re.I)}_norm", group)
        if out is not None:
            self.claim(out, f"{group}.o", group, heads=heads)
            self.width = out.d_out
            inner = any(x.kind == "norm" and under(x.path, core) for x in self.free.values())       # the core adds and normalises
            whole = under(out.path, core) and core != self.path and not inner and not adds_residual(module)
            self.streams.append((f"{group}.out", core if whole else out.path, "out", None))

    def output(self, core):
        """The output projection beside an attention core (BERT: attention.self and attention.output.dense)."""
        while core not in ("", self.path) and up(core) != self.path:
            core = up(core)
            for p, x in self.free.items():
                if x.matrix and under(p, core) and ATTENTION["o"].match(word(p)):
                    return x

    def mixer(self, core):
        group = self.fresh("ssm")
        for p, x in self.free.items():
            for k in x.params if under(p, core) else ():
                name = re.sub(r"^linear_|_proj$|_?1d$|_log$", "", x.name if k == "weight" and p != core else k)
                self.claim(x, f"{group}.{'out_norm' if name == 'norm' else name}", group, param=k)
                self.width = x.d_out if name == "out" else self.width
        self.streams.append((group.replace("ssm", "mixer") + ".out", core, "out", None))

    def experts(self):
        """Experts stacked in 3-D parameters, and the router before any experts."""
        for x in self.free.values():
            for k, p in x.own.items():
                name = x.name if k == "weight" else k
                if p.dim() != 3 or not STACKED.fullmatch(name):
                    continue
                both, last = name in ("gate_up_proj", "input_linear"), re.fullmatch("down_proj|w2|output_linear", name)
                flip = getattr(x.module, "is_transposed", None)
                flip = flip if flip is not None else p.shape[1] == self.width != p.shape[2] and not last
                n, one = p.shape[2 if flip else 1], "down" if last else "gate" if re.match("gate|w1", name) else "up"
                halves = (0, n // 2), (n // 2, n)
                if not getattr(x.module, "is_concatenated", True):
                    halves = torch.arange(0, n, 2), torch.arange(1, n, 2)
                for e in range(p.shape[0]):
                    for r, rows in zip(("gate", "up"), halves, strict=True) if both else ((one, None),):
                        self.claim(x, f"mlp.expert.{e}.{r}", "mlp", param=k, rows=rows, index=e, layout="stack", turned=flip,
                                   bias=k + "_bias" if k + "_bias" in x.own else "")
                self.mlp_module = up(x.path) if k != "weight" else up(up(x.path))
        if self.mlp_module or any(EXPERT.search(p) for p in self.leaves):
            for p, x in self.free.items():
                square = "weight" in x.own and x.own["weight"].dim() == 2 and "proj" not in p
                if square and re.search(r"(^|\.)(gate|router)(\.|$)", self.rel(p)):
                    self.claim(x, "mlp.router", "mlp", bias="bias" if "bias" in x.own else "")
        if self.mlp_module:
            self.names.add("mlp")
            self.mlp_streams("mlp", self.mlp_module)

    def mlps(self):
        """Matrices left over that share a holder and fit as up (gate) and down."""
        groups, no_wide = defaultdict(list), not any(x.wide for x in self.leaves.values())
        cores = {core for _, core, _ in self.attends} - {self.path}
        for p, x in self.free.items():
            rel, expert, key = self.rel(p), EXPERT.search(self.rel(p)), ""
            pointwise = not x.wide and (no_wide or re.search(r"fc|pwconv|mlp|ffn", rel))
            if not x.matrix or within(p, cores) or x.kind == "conv" and not pointwise:
                continue
            pair = re.match(r"(intermediate|output)(_\w+)?\.", rel) if x.kind != "conv" else None
            if pair:                                                # BERT: intermediate.dense and output.dense
                groups["beside" + (pair[2] or ""), None].append(x)
                continue
            for part in rel.split(".")[:-1]:
                key = f"{key}.{part}" if key else part
                if not isinstance(self.modules[self.join(key)], nn.ModuleList) and "mixer" not in part:
                    break
            if not NOT_MLP.search(f"{key}.{word(rel)}" if key else rel):
                groups[key, expert and expert[0]].append(x)
        for (key, expert), xs in groups.items():
            number = expert and EXPERT.search(expert)[1]
            self.mlp(key, xs, f"expert.{number}." if number else "shared." if expert else "")

    def join(self, rel):
        return f"{self.path}.{rel}" if self.path else rel

    def mlp(self, key, xs, middle):
        roles = mlp_roles(xs)
        if roles is None:
            return
        group = "mlp" if middle else self.fresh("mix" if re.search("token|patch_mixer", key) else "mlp")
        fused = roles["up"].d_out == 2 * roles["down"].d_in and "gate" not in roles
        for r, x in roles.items():
            parent, half = self.modules[up(x.path)], x.d_out // 2
            if fused and r == "up":
                late = UP_FIRST.search(type(parent).__name__) or getattr(parent, "gate_last", False)
                for i, one in enumerate(("up", "gate") if late else ("gate", "up")):
                    self.claim(x, f"{group}.{middle}{one}", group, rows=(i * half, i * half + half))
            else:
                self.claim(x, f"{group}.{middle}{r}", group)
        self.width = self.width or roles["down"].d_out * (group != "mix")
        if middle and "mlp" in self.names:
            return
        self.names.add(group)
        holder = common([x.path for x in roles.values()])
        if middle:                                                  # the module that routes
            holder = self.join(re.split(r"\.(?:experts|shared_?\w*)\.", self.rel(xs[0].path))[0])
        while holder and isinstance(self.modules[holder], nn.ModuleList):       # nobody calls a list
            holder = up(holder)
        if group == "mlp" and not middle:                           # the neurons: what the last matrix reads
            self.streams.append(("mlp.act", roles["down"].path, "in", None))
        self.mlp_streams(group, holder, roles.get("gate", roles["up"]).path, roles["down"].path)

    def mlp_streams(self, group, holder, first=None, last=None):
        if holder != self.path and under(holder, self.path) and not adds_residual(self.modules[holder]):
            first = last = holder
        if group == "mlp":
            self.mlp_module = last
        self.streams += [(f"{group}.in", first, "in", None), (f"{group}.out", last, "out", None)]

    def convs(self):
        count = defaultdict(int)
        for p, x in self.free.items():
            if x.kind == "conv":
                kind = "conv.short" if re.search("downsample|shortcut", self.rel(p)) else "se" if re.search(
                    r"(^|\.)(se|squeeze\w*)\.|attention\.\d", self.rel(p)) else "conv"
                self.claim(x, kind if kind == "conv.short" and not count[kind] else f"{kind}.{count[kind]}", "conv")
                count[kind] += 1

    def norms(self):
        """Norms are told apart by where they stand: before the first sublayer, between two, or after the last."""
        runs, last = [], ""                                         # names of sublayers, and lists of norms, in data order
        for p, x in self.leaves.items():
            if x.kind != "norm" and p in self.part:
                last = self.label[p]
                runs += [self.part[p]] if not runs or runs[-1] != self.part[p] else []
            elif x.kind == "norm" and p not in self.part:
                if self.mlp_module != self.path and self.mlp_module and under(p, self.mlp_module):
                    self.claim(x, f"mlp.{x.name.lower()}", "mlp")
                elif last.startswith("conv") and not self.names:
                    self.claim(x, last + ".norm", "conv")
                elif runs and isinstance(runs[-1], list):
                    runs[-1].append(x)
                else:
                    runs.append([x])
        subs = list(dict.fromkeys(r for r in runs if isinstance(r, str)))
        flag = next((bool(getattr(self.module, f)) for f in ("norm_first", "do_layer_norm_before", "normalize_before")
                     if hasattr(self.module, f)), None)
        pre = bool(runs) and isinstance(runs[0], list) if flag is None else flag
        if flag is not None or hasattr(self.module, "use_parallel_residual"):       # forward holds two orders: one norm for each
            norms, runs = [x for r in runs if isinstance(r, list) for x in r], []
            for i, s in enumerate(subs):
                runs += [norms[i:i + 1], s] if pre else [s, norms[i:i + 1]]
        for i, run in enumerate(runs):
            if isinstance(run, list):
                before = next((r for r in reversed(runs[:i]) if isinstance(r, str)), None)
                after = [s for s in subs if s in runs[i:]]
                alone = not any(isinstance(r, list) and r for r in runs[i + 1:])
                for n, x in enumerate(run):                         # a leading pair is one for each parallel sublayer
                    ahead = after[n:] if before is None and alone else after if n == len(run) - 1 else []
                    ahead = ahead if pre or before == "conv" else []
                    name = f"{ahead[0]}.norm" if ahead else f"{before}.{'post_norm' if pre else 'norm'}" if before else ""
                    if name and name not in self.norm:
                        self.norm[name] = x
                        self.claim(x, name, "")
        self.middle(pre, subs)

    def middle(self, pre, subs):
        """The stream between attention and MLP."""
        heads = [s for s in subs[:subs.index("mlp")] if s.startswith(("attn", "ssm", "cross"))] if "mlp" in subs else []
        parallel = getattr(self.module, "use_parallel_residual", False) or getattr(self.config, "parallel_attn", False)
        before = ["mlp.norm"] if pre else [f"{s}.norm" for s in reversed(heads)]
        norm = next((self.norm[n] for n in before if n in self.norm), None)
        if not heads or parallel or norm is None or self.mlp_module is None:
            return
        both = common([norm.path, self.mlp_module + ".x"])
        if not pre:
            self.streams.append(("mid", norm.path, "out", None))
        elif both != self.path and under(both, self.path) and not isinstance(self.modules[both], LISTS):
            self.streams.append(("mid", both, "in", None))          # a sublayer that adds its own residual (T5)
        else:
            self.streams.append(("mid", norm.path, "mid", (norm.module, self.modules[self.mlp_module], self.module)))


def adds_residual(module):
    """True when forward itself is given what it adds to (BLOOM's attention, BERT's output)."""
    return bool({"residual", "input_tensor"} & arguments(module))


def mlp_roles(xs):
    """{gate?, up, down} of the matrices of one MLP by shape, by name where shapes do not tell."""
    best = None
    for down in xs:
        ins = [x for x in xs if x is not down]
        if len(ins) in (1, 2) and len({x.d_in for x in ins}) == 1 and any(down.d_in in (x.d_out, x.d_out / 2) for x in ins):
            if best is None or not re.search("down|w2|fc2|wo$", best.name):
                best = down
    if best is None:
        return None
    ins = [x for x in xs if x is not best]
    gate = next((x for x in ins if re.search("gate|w1$|wi_0|_g$|receptance", x.name)), ins[0])
    one = next((x for x in ins if x is not gate), gate)
    return {"up": one, "down": best} if len(ins) == 1 else {"gate": gate, "up": one, "down": best}


def head_shape(module, config, at, out):
    """(query heads, key/value heads, width of one), from the attention, else its config, else the shapes."""
    def number(thing, *names):
        return next((v for n in names if isinstance(v := getattr(thing, n, None), int) and not isinstance(v, bool)), 0)
    owners = [module, getattr(module, "config", None), config]
    q = next((v for o in owners if (v := number(
        o, "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nheads", "num_head", "nh", "h"))), 0)
    rows = at["q"].d_out if "q" in at else out.d_in if out is not None else 0
    width = number(module, "head_dim", "attention_head_size", "dim_head")
    width = width if width and width * q <= rows else rows // q if q and rows % q == 0 else 0
    if not q or not width:
        return None
    kv = at["k"].d_out // width if "k" in at else (at["qkv"].d_out - q * width) // (2 * width) if "qkv" in at else 0
    return q, kv or q, width


def fused_rows(module, leaf, heads, kind, config):
    """{q, k, v: rows} of a fused projection; one site when its rows do not add up to whole heads."""
    n, name = leaf.d_out, type(module).__name__
    if kind == "kv":
        return {"k": (0, n // 2), "v": (n // 2, n)}
    if heads is None:                                               # equal thirds hold for any number of equal heads
        return {r: (i * n // 3, (i + 1) * n // 3) for i, r in enumerate("qkv")} if n % 3 == 0 else {kind: None}
    q, kv, w = heads
    if (q + 2 * kv) * w != n:
        return {kind: None}
    every = torch.arange(n)
    if name.startswith("CodeGen"):                                  # four slices, each [q | v | k]
        every = every.view(4, 3, -1)
        return {"q": every[:, 0].flatten(), "k": every[:, 2].flatten(), "v": every[:, 1].flatten()}
    grouped = PER_HEAD.search(name) or (name.startswith("GPTBigCode") and kv == q) or (name.startswith("Falcon") and (
        getattr(config, "new_decoder_architecture", False) or not getattr(config, "multi_query", False)))
    if grouped:                                                     # for each kv head: its queries, its key, its value
        every, g = every.view(kv, q // kv + 2, w), q // kv
        return {"q": every[:, :g].flatten(), "k": every[:, g].flatten(), "v": every[:, g + 1].flatten()}
    return {"q": (0, q * w), "k": (q * w, (q + kv) * w), "v": ((q + kv) * w, n)}


