"""The finder: what each parameter and module of a model is, from its structure first and the names its authors use second.

1. walk the modules in the order `forward` calls them (read from its byte code: nothing is run);
2. an attention is a module with q and k children or a fused qkv; the list element that holds one and an MLP is a block;
3. what else is in a block is an MLP, experts, a state-space mixer or convolutions, with norms before, between and after them;
4. blocks make towers; what comes before a tower's blocks is embedding, what comes after is final norm, pool and head.
True exceptions are the few names below; what finds no role stays a site named by its raw parameter path."""

import dis
import inspect
import re
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from .site import Site, Stack

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# ---- names authors use
ATTENTION = {r: re.compile(rf"^(?:{p})$", re.I) for r, p in {
    "qkv": r"(to_|w|in_)?qkv(_proj|_linear|_layer)?|c_attn|query_key_value|w_?pack|in_proj",
    "q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": r"kv_a_proj\w*", "kv_b": "kv_b_proj",
    "kv": r"(to_|w)?kv(_proj|_linear)?|key_value",
    **{r: rf"(to_|w|in_proj_|linear_)?{n}(_proj|_lin|_linear|_layer|_attn|_projection)?" for r, n in
       {"q": "(q|query|queries)", "k": "(k|key|keys)", "v": "(v|value|values)", "r": "receptance"}.items()},
    "o": r"(to_|w|linear_)?(o|out|output)(_proj|_lin|_linear|_layer|_projection)?|c_proj|dense|proj|projection|attn_out",
}.items()}
ORDER = {r: i for i, r in enumerate("q k v r o".split())}
CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encoder_decoder|multihead_attn|attn2$", re.I)
EXPERT = re.compile(r"experts\.(?:expert_)?(\d+)\.|(shared_?\w*)\.")
STACKED = re.compile(r"gate_up_proj|gate_proj|up_proj|down_proj|w[123]|v1|input_linear|output_linear")
NOT_MLP = re.compile(r"norm|emb|mod(ulation)?$|ada|time|rel_pos|cpb|downsample|reduction|router")
HEAD = re.compile(r"(^|\.)(heads?|lm_head|cls|score|scores|fc|embed_out|logits|predictions|seq_relationship|last_linear|output_layer|\w*_head"
                  r"|qa_outputs|\w*classifier|\w*_predictions)(\.|$)|^(proj_out\w*|output_projection|conv_out)$")
SPECIAL = re.compile(r"cls_token|class_token|class_emb\w*|dist(illation)?_token|reg(ister)?_tokens?")
MAJOR = {"backbone": "backbone", "vision": "vision|visual|image|img|pixel", "text": "text|language|^lm$", "audio": "audio|speech",
         "qformer": "qformer", "fusion": "fusion|multi_?modal|mm_encoder", "perceiver": "perceiver|resampler"}
MINOR = {"encoder": "encoder", "decoder": "decoder"}
INPUTS = {"input_ids", "pixel_values", "input_features", "input_values", "past_values", "sample", "query_embeds"}
# ---- true exceptions
PER_HEAD = re.compile("GPTNeoX|Bloom|Persimmon|Fuyu|^DisentangledSelfAttention")       # fused rows are (head, qkv, width), not (qkv, head, width)
UP_FIRST = re.compile("^(GEGLU|SwiGLU)$")                           # fused up and gate: the second half is the gate
POOLED = re.compile("(CLIP|CLIPSeg|OwlViT|Blip).*Vision")           # the last norm sees the pooled vector, not the stream
WITHOUT_CLS = re.compile("Siglip")                                  # text encoders that do not begin with a sentence token
ZIPPED = (("resnets", "attentions"),)                               # sibling lists that forward walks in step
RECURRENT = ({"x_proj", "dt_proj"}, {"rg_lru"}, {"conv1d", "in_proj", "out_proj"})        # children that make a mixer


# ---- 1. the walk -------------------------------------------------------------------------------------------------------
@lru_cache(None)
def calls(cls):
    """How cls.forward uses its attributes, its own methods read in their place.

    order: {name: rank} by when each is first called, a(b(x)) calling b first; what is never called, such as a list of blocks, counts
    where it is last looked at. reads: names whose `.weight` forward takes for itself, beside asking for its dtype."""
    events, reads, busy = [], set(), set()                          # events: (name, called)

    def read(function):
        code = getattr(inspect.unwrap(function), "__code__", function if inspect.iscode(function) else None)
        if code is None or code in busy:
            return
        busy.add(code)
        ops, ends, used = list(dis.get_instructions(code)), defaultdict(list), []
        at = {op.offset: op.positions and (op.positions.lineno, op.positions.col_offset) for op in ops}
        for op in ops:
            if op.opname.startswith("CALL"):
                ends[at[op.offset]].append(op.offset)
        for op, then, after, last in zip(ops, ops[1:] + ops[:1], ops[2:] + ops[:2], ops[3:] + ops[:3], strict=True):
            if op.opname in ("LOAD_ATTR", "LOAD_METHOD") or inspect.iscode(op.argval):      # called where the call begun here ends
                call = min((e for e in ends[at[op.offset]] if e > op.offset), default=None)
                used.append((op.offset if call is None else call, op.argval, call is not None))
                asked = after.argval in ("dtype", "device", "shape", "size", "ndim") or last.argval == "Tensor"
                reads.update([op.argval] if then.argval == "weight" and not asked else [])
        for _, name, called in sorted(used, key=lambda u: u[0]):
            own = name if inspect.iscode(name) else getattr(cls, name, None)
            if inspect.iscode(own) or inspect.isfunction(own):      # a comprehension, a method
                read(own)
            else:
                events.append((name, called))
    read(cls.forward)
    names = [n for n, _ in events]
    return {n: events.index((n, True)) if (n, True) in events else len(names) - 1 - names[::-1].index(n) for n in set(names)}, reads


def walk(model):
    """({path: module} in data order, each module once; {path: place of its last descendant})."""
    modules, ends, seen = {}, {}, set()

    def visit(path, module):
        if module is None or id(module) in seen:
            return
        seen.add(id(module))
        modules[path] = module
        kids, dot = dict(module._modules), path + "." if path else ""
        for pair in ZIPPED:
            if kids.keys() >= set(pair):
                for i in kids[pair[0]]._modules:
                    for name in pair:
                        visit(f"{dot}{name}.{i}", kids[name]._modules.get(i))
        if len(kids) > 1 and not isinstance(module, LISTS):         # a child that forward never names stays beside its elder
            rank, last, keyed = calls(type(module))[0], -1, []
            for name in kids:
                last = rank.get(name, last)
                keyed.append((last, name))
            kids = {name: kids[name] for _, name in sorted(keyed, key=lambda k: k[0])}
        for name, kid in kids.items():
            visit(dot + name, kid)
        ends[path] = len(modules) - 1
    visit("", model)
    return modules, ends


class Leaf:
    """A module with parameters of its own."""

    def __init__(self, path, module):
        self.path, self.module, self.name = path, module, path.rpartition(".")[2]
        self.own = {k: p for k, p in module._parameters.items() if p is not None}
        w, name, self.kind = self.own.get("weight"), type(module).__name__, "raw"
        if w is not None and w.dim() == 1:
            self.kind = "norm" if "norm" in name.lower() or hasattr(module, "eps") else "raw"
        elif w is not None and isinstance(module, nn.modules.conv._ConvNd):
            self.kind = "raw" if module.transposed else "conv"
        elif w is not None and w.dim() == 2:
            self.kind = "embedding" if isinstance(module, nn.Embedding) else "conv1d" if name == "Conv1D" else (
                "linear" if isinstance(module, nn.Linear) or hasattr(module, "in_features") else "raw")
        self.bias = "bias" if self.kind != "raw" and "bias" in self.own else ""
        self.params = [k for k in self.own if k != self.bias]
        self.matrix = self.kind in ("linear", "conv1d", "conv")
        if self.matrix:
            self.d_out, self.d_in = w.shape[::-1] if self.kind == "conv1d" else (w.shape[0], w[0].numel())
        self.wide = self.kind == "conv" and (w[0, 0].numel() > 1 or module.groups > 1)          # looks beyond one position


def under(path, root):
    return root == "" or path == root or path.startswith(root + ".")


def up(path):
    return path.rpartition(".")[0]


def chain(path):
    """The path and its ancestors, innermost first; the root's "" last."""
    yield path
    while path:
        yield (path := up(path))


def within(path, roots):
    """The innermost of roots that holds path, or None."""
    return next((a for a in chain(path) if a in roots), None)


def common(paths):
    """The deepest module that properly holds all of them."""
    split, n = [p.split(".")[:-1] for p in paths], 0
    while all(len(s) > n for s in split) and len({s[n] for s in split}) == 1:
        n += 1
    return ".".join(split[0][:n])


def word(path):
    """The last part of a path that says something: "output.dense" -> output, "to_out.0" -> to_out."""
    parts = path.split(".")
    while len(parts) > 1 and (parts[-1] in ("dense", "linear") or parts[-1] == "0" and "out" in parts[-2]):
        parts.pop()
    return parts[-1]


# ---- 2. attentions and blocks ------------------------------------------------------------------------------------------
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


def find_blocks(modules, leaves, cores):
    """Paths of the blocks in data order; cores are the paths of attentions and mixers."""
    matrices = [x for x in leaves if x.matrix or any(p.dim() == 3 for p in x.own.values())]
    above = {a for x in leaves for a in chain(x.path) if x.matrix or x.own}
    loose = {a for x in matrices if within(x.path, cores) is None and not ATTENTION["o"].match(word(x.path)) for a in chain(x.path)}
    for named in (False, True):                                     # only if no list holds blocks: block1, block2, ...
        def elements(path, named=named):
            return [a for a in chain(path) if a and modules[a]._modules and (
                isinstance(modules[up(a)], LISTS) or (named and a[-1].isdigit()))]
        blocks = set()
        for core in cores:
            around = elements(core)
            blocks.update([a for a in around if a in loose][:1] or around[:1])
        taken = {a for b in blocks for a in chain(b)}
        for home in {up(b) for b in blocks if isinstance(modules[up(b)], nn.ModuleList | nn.Sequential)}:
            for name, kid in modules[home]._modules.items():        # its neighbours, such as MLP-only blocks
                path = f"{home}.{name}" if home else name
                if kid._modules and path not in taken and path in above:
                    blocks.add(path)
        if len({up(b) for b in blocks}) != 1:                       # no attention at all, or stages of which some have none
            region, inside, taken = common(blocks) if blocks else "", defaultdict(list), {a for b in blocks for a in chain(b)}
            for x in matrices:
                for a in elements(up(x.path)) if within(x.path, blocks) is None else ():
                    if under(a, region) and a not in taken:
                        inside[a].append(x)
            normed = {a for x in leaves if x.kind == "norm" for a in chain(x.path)}
            more = {a for a, xs in inside.items() if len(xs) > 1 and (a in normed or any(x.wide or x.kind != "conv" for x in xs))
                    and (not blocks or any(x.wide for x in xs))}
            blocks |= more - {a for b in more for a in chain(up(b))}
        if blocks:
            break
    if not blocks and len(cores) == 1:
        blocks = {up(cores[0])}
    return [p for p in modules if p in blocks and not (p and within(up(p), blocks))]


# ---- 3. inside a block -------------------------------------------------------------------------------------------------
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
                self.claim(self.leaves[core], f"{group}.{r}", group, param="in_proj_weight" if whole else f"{r}_proj_weight", bias=bias,
                           rows=(i * d, i * d + d) if whole else None, heads=heads)
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
            if x.kind == "norm" and under(x.path, core) and re.match(r"(q|k|v|query|key|kv_a|q_a|kv_layer)_?\w*norm", x.name, re.I):
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
                if re.search(r"(^|\.)(gate|router)(\.|$)", self.rel(p)) and "weight" in x.own and x.own["weight"].dim() == 2 and "proj" not in p:
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
            pair = re.match(r"(intermediate|output)(_\w+)?\.", rel)   # BERT: intermediate.dense and output.dense
            if not x.matrix or within(p, cores) or x.kind == "conv" and (x.wide or not (no_wide or re.search(r"fc|pwconv|mlp|ffn", rel))):
                continue
            for part in rel.split(".")[:-1] if not pair or x.kind == "conv" else ():
                key = f"{key}.{part}" if key else part
                if not isinstance(self.modules[self.join(key)], nn.ModuleList) and "mixer" not in part:
                    break
            if not NOT_MLP.search(key):
                groups[pair[2] or "" if pair else key, expert and expert[0]].append(x)
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
        norm = self.norm.get("mlp.norm") if pre else next((self.norm[f"{s}.norm"] for s in reversed(heads) if f"{s}.norm" in self.norm), None)
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


@lru_cache(None)
def _arguments(cls):
    return frozenset(inspect.signature(inspect.unwrap(cls.forward)).parameters)


def arguments(module):
    return _arguments(type(module))


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
    return {"up": ins[0], "down": best} if len(ins) == 1 else {"gate": gate, "up": next(x for x in ins if x is not gate), "down": best}


def head_shape(module, config, at, out):
    """(query heads, key/value heads, width of one), from the attention, else its config, else the shapes."""
    def number(thing, *names):
        return next((v for n in names if isinstance(v := getattr(thing, n, None), int) and not isinstance(v, bool)), 0)
    owners = [module, getattr(module, "config", None), config]
    q = next((v for o in owners if (v := number(
        o, "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nheads", "num_head", "nh", "h"))), 0)
    rows = at["q"].d_out if "q" in at else out.d_in if out is not None else 0
    width = rows // q if q and rows % q == 0 else number(module, "head_dim", "attention_head_size", "dim_head")
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


# ---- 4. towers ---------------------------------------------------------------------------------------------------------
def towers(paths):
    """{tower name: block paths}: "" when there is only one, else the shortest telling name."""
    def first(table, path):
        return next((t for part in path.split(".") for t, p in table.items() if re.search(p, part, re.I)), "")
    keyed, named = defaultdict(list), {}
    for p in paths:
        keyed[first(MAJOR, p), first(MINOR, p)].append(p)
    majors = [major for major, _ in keyed]
    for (major, minor), ps in keyed.items():
        rest = "text" if {"vision", "audio"} & set(majors) else "encoder" if ("", "decoder") in keyed else "main"
        name = "" if len(keyed) == 1 else major if major and majors.count(major) == 1 else minor or major or rest
        named[name if name not in named else f"{major}_{minor}"] = ps
    return named


def make_stack(name, blocks, modules, others):
    home = common([b.path + ".x" for b in blocks]) if len(blocks) > 1 else up(blocks[0].path)
    while home and isinstance(modules.get(home), LISTS):
        home = up(home)
    alone = [a for a in chain(home) if not any(under(o, a) for o in others)] or [home]
    path = next((a for a in alone if INPUTS & arguments(modules[a])), next((a for a in alone[::-1] if "attention_mask" in arguments(modules[a])), home))
    module, inside = modules[path], [m for p, m in modules.items() if under(p, path)]
    return Stack(name, module, path, blocks=tuple(b.module for b in blocks), dim=blocks[-1].width,
                 cross=any(a[0].startswith("cross") for b in blocks for a in b.attends), causal=is_causal(module, blocks, modules, path),
                 rope=any(
                     re.search("rotary|rope", type(m).__name__, re.I) or hasattr(m, "rotary_dim") for m in inside), insert=why_not_insert(blocks, inside))


def is_causal(module, blocks, modules, path):
    first = [modules[a[1]] for a in blocks[0].attends[:1]]
    if any(getattr(m, f, None) is True for m in [module, blocks[0].module, *first] for f in ("is_decoder", "is_causal", "causal")) or any(
            n in ("bias", "mask", "tril", "causal_mask") and b is not None and b.dim() > 1 and b.shape[-1] == b.shape[-2] > 1
            for m in first for n, b in m._buffers.items()):
        return True
    if any("ssm" in b.names or any(c["name"] == "attn.r" for _, c in b.claims) for b in blocks):
        return True
    used = inspect.unwrap(type(module).forward).__code__.co_names
    if any(re.search(r"(create|prepare)\w*causal", n) for n in used) and not any("bidirectional" in n for n in used):
        return True
    for m in first:                                                 # a literal is_causal=True in the attention's own code
        code = inspect.unwrap(type(m).forward).__code__
        if "is_causal" not in code.co_varnames and any(isinstance(c, tuple) and "is_causal" in c for c in code.co_consts):
            return not hasattr(m, "is_causal") and True in code.co_consts
    return type(module).__name__ == "BlipTextModel" and "decoder" in path          # told by an argument of its caller


def why_not_insert(blocks, inside):
    names, convs = {n for b in blocks for n in b.names}, any("conv" in b.part.values() for b in blocks)
    if "mix" in names:
        return "its token-mixing MLPs hold a fixed number of tokens"
    if "ssm" not in names and any(x.kind == "conv" and not b.attends for b in blocks for x in b.leaves.values()):
        return "its tokens are folded to a map between blocks" if any(b.attends for b in blocks) else "its blocks work on a map of pixels"
    if any(hasattr(m, "window_size") and re.search("Swin|Window|Sam", type(m).__name__) for m in inside):
        return "its attention works in windows of the patch grid"
    if any("relative_position_bias_table" in m._parameters for m in inside):
        return "its attention adds a learned bias for each pair of grid positions"
    if any(re.search("Segformer|Pvt", type(m).__name__) for m in inside):
        return "its tokens are folded to a map inside the attention"
    return "its stream has a channel axis beside batch and time" if any(type(m).__name__.startswith("PatchTST") for m in inside) else ""


# ---- before and after the blocks ---------------------------------------------------------------------------------------
def embed_role(x, param, before):
    name = (x.path if param == "weight" else param).lower()
    if x.kind == "embedding" or param != "weight" and x.own[param].dim():
        table = {"relative": "rel_|relative", "position": "pos|wpe", "type": "type|segment", "register": "reg(ister)?_token", "dist": "dist\\w*_token", "cls": SPECIAL, "mask": "mask"}
        found = next((r for r, p in table.items() if re.search(p, name.rpartition(".")[2] if r != "position" else ".".join(name.split(".")[-2:]))), "")
        return f"embed.{found}" if found else "embed.token" if x.kind == "embedding" else ""
    if not before or param != "weight":
        return ""
    if x.kind == "conv":
        patch = x.module.kernel_size == x.module.stride and x.module.kernel_size[0] > 1 or "patch" in name
        return "embed.patch" if patch else "embed.conv"
    return "embed.norm" if x.kind == "norm" else "embed.proj" if x.matrix and re.search("emb|proj|patch", name) and "time" not in name else ""


class Outside:
    """Roles of what no block holds; also tells the stacks where their stream begins and ends."""

    def __init__(self, leaves, stacks, modules, place, block_paths):
        self.roles, used, heads = {}, defaultdict(set), []
        self.leaves, self.modules, self.place, self.block_paths = leaves, modules, place, block_paths
        for x in leaves:
            mine = [s for s in stacks if under(x.path, s.path)]
            s = max(mine, key=lambda s: len(s.path)) if mine else stacks[0] if len(stacks) == 1 else None
            before = s is not None and place[x.path] < s.start
            for param in x.params:
                role = ""
                if not before and x.kind != "embedding" and HEAD.search(x.path):
                    heads.append((x, param))
                elif x.matrix and re.search("pooler", x.path):
                    role = "pool"
                elif before or s is None or x.kind == "embedding":
                    role = embed_role(x, param, before)
                elif x.kind == "norm" and place[x.path] > s.end and not self.listed(x.path, s.path) and "final.norm" not in used[s.name] and "pool" not in x.path:
                    role = "final.norm"
                    s.final_module = None if POOLED.search(type(s.module).__name__) else x.module
                tower = s.name if s is not None and role else ""
                if role and (role == "embed.conv" or role in used[tower]):
                    role = next(r for n in range(99) if (r := f"{role}.{n}") not in used[tower])
                used[tower].add(role)
                self.roles[x.path, param] = role, tower, s
        final = [x for x, p in heads if x.matrix and p == "weight"] or [x for x in leaves[-1:] if x.matrix and "proj" not in x.name and all(
            place[x.path] > s.start for s in stacks)]
        for x, p in heads:
            self.roles[x.path, p] = "", "", None
        if final:                                                   # the last layer of all is the one that answers
            self.roles[final[-1].path, "weight"] = "head", "", stacks[0] if len(stacks) == 1 else None
        for s in stacks:
            self.begin(s)

    def listed(self, path, root):
        """True for a part of some list within root: one of many, not the end of the tower."""
        return any(isinstance(self.modules[a], LISTS) for a in chain(up(path)) if under(a, root))

    def begin(self, s):
        """A token embedding called inside the stack's own forward ("ids"), else the last module called before the blocks ("out")."""
        mine = [(x, k, r) for x in self.leaves for k in x.params if (r := self.roles[x.path, k])[2] is s and r[0].startswith("embed.")]
        first = next(p for p, m in self.modules.items() if m is s.blocks[0])
        holders = [a for a in chain(up(first)) if under(a, s.path)]
        tokens = [x for x, _, r in mine if r[0] == "embed.token"]
        if tokens and up(tokens[0].path) in holders:
            s.embed, s.embed_module = "ids", tokens[0].module
        for holder in holders if s.embed != "ids" else ():
            kids = [(p, m) for p, m in self.modules.items() if p and up(p) == holder and self.place[p] < s.start and not under(first, p)
                    and not isinstance(m, nn.ModuleList) and not any(under(b, p) for b in self.block_paths)
                    and ("Patch" in type(m).__name__ or not re.search("rotary|rope|rel_|pos_emb|position|time|mask", p[len(holder):]))]
            if kids and not isinstance(self.modules[holder], LISTS):
                path, last = kids[-1]
                plain = not last._modules and not any(p.dim() > 1 for p in last.parameters())        # dropout, norm, pool, identity
                if plain or re.search("embed|stem|patch|feature_proj|norm", path.rpartition(".")[2]) and not hasattr(last, "kernel_size"):
                    s.embed_module = last
                break
        special = [x.own[k] for x, k, r in mine if r[0].split(".")[1] in ("cls", "dist", "register")]
        known = getattr(s.module, "num_prefix_tokens", None)
        sentence = tokens and s.embed == "out" and not s.causal and not s.cross and s.name != "encoder" and not WITHOUT_CLS.search(
            type(s.module).__name__)                                # BERT's first token
        s.fixed = known if isinstance(known, int) else sum(p.shape[-2] if p.dim() > 1 else 1 for p in special) or int(bool(sentence))


# ---- the scan ----------------------------------------------------------------------------------------------------------
def scan(model):
    """(sites, model, stacks)."""
    modules, ends = walk(model)
    place = {p: i for i, p in enumerate(modules)}
    leaves = [Leaf(p, m) for p, m in modules.items() if any(v is not None for v in m._parameters.values())]
    attentions = {p: kids for p, m in modules.items() if (kids := attention_kids(m))}
    mixers = [p for p, m in modules.items() if is_mixer(m) and p not in attentions]
    cores = dict.fromkeys([*attentions, *mixers])
    paths = find_blocks(modules, leaves, cores)
    home = {x.path: within(x.path, set(paths)) for x in leaves}
    of = defaultdict(lambda: ([], {}, []))                          # block path -> its leaves, attentions, mixers
    for x in leaves:
        of[home[x.path]][0].append(x)
    for core in cores:
        at = of[within(core, set(paths))]
        at[1].update({core: attentions[core]}) if core in attentions else at[2].append(core)
    found, stacks = [], []                                          # found: ((place, rank), site)
    for name, group in towers(paths).items() if paths else ():
        blocks = []
        for i, p in enumerate(group):
            config = next((c for a in chain(p) if (c := getattr(modules[a], "config", None)) is not None), None)
            blocks.append(Block(p, i, *of[p], modules, config))
        stack = make_stack(name, blocks, modules, set(paths) - set(group))
        stack.start, stack.end = place[group[0]], ends[group[-1]]
        stacks.append(stack)
        for b in blocks:
            block_sites(b, stack, found, place, ends)
    outside = Outside(of[None][0], stacks, modules, place, paths)
    for x in outside.leaves:
        for param in x.params:
            role, tower, stack = outside.roles[x.path, param]
            found.append(((place[x.path], 0), weight(x, role, f"{tower}.{role}" if tower and role else role, modules, param, tower=tower,
                                                 stack=stack)))
    paths = {id(m): p for p, m in modules.items()}
    for s in stacks:
        at, dot = place[paths[id(s.blocks[0])]], s.name + "." if s.name else ""
        last = s.final_module if s.final_module is not None else s.blocks[-1]
        if s.embed_module is None:
            s.embed, s.embed_module = "in", s.blocks[0]
        for name, m, layout, key in (("embed", s.embed_module, "in" if s.embed == "in" else "out", (at, -3)),
                                     ("final", last, "out", (max(ends[paths[id(last)]], ends[paths[id(s.blocks[-1])]]), 9))):
            found.append((key, Site(dot + name, "stream", m, paths[id(m)], name, s.name, layout, d_in=s.dim, d_out=s.dim, stack=s)))
    return named([s for _, s in sorted(found, key=lambda f: f[0])]), model, tuple(stacks)


def weight(x, role, name, modules, param="weight", bias=None, layout=None, turned=None, after=None, **more):
    """The Site of a leaf's parameter."""
    p, module, path, rows = x.own[param], x.module, x.path, more.get("rows")
    layout = layout or (x.kind if param == "weight" else "raw")
    turned = layout in ("conv1d", "embedding") if turned is None else turned
    bias = x.bias if bias is None and param == "weight" else bias or ""
    shape = p.shape if more.get("index") is None else p.shape[1:]
    shape = (shape[0], shape[1:].numel()) if len(shape) else (1, 1)
    d_out, d_in = shape[::-1] if turned else shape
    if rows is not None:
        d_out = rows[1] - rows[0] if isinstance(rows, tuple) else len(rows)
    reader = up(path) if path and x.name in calls(type(modules[up(path)]))[1] else None
    if (above := up(path if reader is None else reader)) in modules and isinstance(modules[above], nn.TransformerEncoderLayer):
        reader = above                                              # torch's fast path takes every weight in the layer itself
    if reader is not None:
        inner = path[len(reader) + 1:] if reader else path
        param, bias, path, module, layout = f"{inner}.{param}", f"{inner}.{bias}" if bias else "", reader, modules[reader], "raw"
    return Site(name or (f"{path}.{param}" if path else param), "weight", module, path, role, layout=layout, param=param, bias=bias,
                d_in=d_in, d_out=d_out, turned=turned, **more)


def block_sites(b, stack, found, place, ends):
    """Append ((place, rank), site) for everything in one block."""
    mates, at = {}, f"{stack.name}.block.{b.number}" if stack.name else f"block.{b.number}"

    def put(key, tail, site):
        mates[tail] = site
        found.append((key, site))

    def stream(tail, path, layout, key, mid=None, kind="stream", heads=None, d=b.width):
        put(key, tail, Site(f"{at}.{tail}", kind, b.modules[path], path, tail, stack.name, layout, d_in=d, d_out=d, block=b.number,
                            heads=heads, stack=stack, mid=mid, mates=mates))
    where = dict(modules=b.modules, tower=stack.name, stack=stack, block=b.number, mates=mates)
    stream("in", b.path, "in", (place[b.path], -2), d=b.width_in)
    claimed = defaultdict(set)
    for rank, (x, c) in enumerate(b.claims):
        name, start = c["name"], c.get("after") or x
        claimed[x.path] |= {c.get("param", "weight"), x.bias if c.get("bias") is None else c["bias"]}
        put((place[start.path], rank / 1e6), name, weight(x, re.sub(r"expert\.\d+", "expert", name), **c | where | dict(name=f"{at}.{name}")))
    for p, x in b.leaves.items():
        for param in (k for k in x.params if k not in claimed[p]):
            site = weight(x, "", "", param=param, **where)
            put((place[p], 1), site.name, site)
    for group, path, heads in b.attends:
        stream(group, path, "", (place[path], -1), kind="attend", heads=heads)
    for tail, path, layout, mid in b.streams:
        stream(tail, path, layout, (ends[path], 5) if layout == "out" else (place[path], -1), mid)
    stream("out", b.path, "out", (ends[b.path], 8))


def named(found):
    """Every name once (a second claim to one falls back to the parameter's path), and the other holders of a tied parameter."""
    names, holders = set(), defaultdict(list)
    for i, s in enumerate(found):
        if s.name in names:
            found[i] = s = replace(s, name=f"{s.path}.{s.param or s.role}", role="" if s.param else s.role)
        names.add(s.name)
        if s.param:
            holders[id(s.parameter)].append((s.path, s.param, s.name))
    for i, s in enumerate(found):
        same = holders[id(s.parameter)] if s.param else ()
        if len({h[:2] for h in same}) > 1:
            found[i] = replace(s, tied=tuple(n for path, param, n in same if (path, param) != (s.path, s.param)))
    return found
