"""The finder: what each parameter and module of a model is, from its structure first and the names its authors use second.

1. walk the modules in the order `forward` calls them (read from its byte code, nothing is run);
2. an attention is a module with q and k children (or a fused qkv); the list element that holds it and an MLP is a block;
3. in a block everything else is an MLP, convolutions, experts, a state-space mixer, or norms before and after those;
4. blocks make stacks (towers); what comes before them is embedding, what comes after is final norm, pool and head.
True exceptions are in the tables below; what finds no role stays a site named by its raw parameter path."""

import dis
import inspect
import re
from collections import defaultdict
from functools import lru_cache

import torch
from torch import nn

from .site import Site, Stack

# ---- names authors use -------------------------------------------------------------------------------------------------
ATTENTION = {r: re.compile(rf"^(?:{p})$", re.I) for r, p in {
    "qkv": r"(to_|w|in_)?qkv(_proj|_linear)?|c_attn|query_key_value|w_?pack|qkv_layer",
    "kv": r"(to_|w)?kv(_proj|_linear)?|key_value",
    "q": r"(to_|w|in_proj_|linear_)?(q|query|queries)(_proj|_lin|_linear|_layer|_attn|_projection)?|query_states",
    "k": r"(to_|w|in_proj_|linear_)?(k|key|keys)(_proj|_lin|_linear|_layer|_projection)?",
    "v": r"(to_|w|in_proj_|linear_)?(v|value|values)(_proj|_lin|_linear|_layer|_projection)?",
    "r": r"receptance",
    "o": r"(to_|w|linear_)?(o|out|output)(_proj|_lin|_linear|_layer|_projection)?|c_proj|dense|proj|projection|attn_out|attention_output",
}.items()}
CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encoder_decoder|multihead_attn|attn2$|src_attn", re.I)
GATE = re.compile(r"gate|w1$|wi_0|_g$|receptance", re.I)
HEAD = re.compile(r"^(head|heads|lm_head|classifier|\w*_classifier|cls|score|fc|classification_head|qa_outputs|embed_out|predictions|"
                  r"\w*_predictions|logits|decode_head|generator_lm_head|seq_relationship|\w*_head|last_linear|output_layer)$")
TOWER = {"vision": r"vision|visual|image|img|pixel", "text": r"text|language|lang_|^lm$", "audio": r"audio|speech|acoustic",
         "qformer": r"qformer", "fusion": r"fusion|multimodal|multi_modal|mm_encoder|cross_modal", "perceiver": r"perceiver|resampler"}
SIDE = {"encoder": r"encoder", "decoder": r"decoder"}
INPUTS = {"input_ids", "pixel_values", "input_features", "input_values", "past_values", "sample", "hidden_states_in"}
SPECIAL = r"cls_token|class_token|class_embedding|class_emb|distillation_token|dist_token|register_tokens|reg_token"

# ---- true exceptions ---------------------------------------------------------------------------------------------------
PER_HEAD = r"GPTNeoX|Bloom|Persimmon|Fuyu"            # fused rows are (head, qkv, width), not (qkv, head, width)
UP_FIRST = r"GEGLU|SwiGLU$|GluMlp|GEGLUProj"          # fused up/gate whose second half is the gate
POOLED_NORM = r"CLIP.*Vision|CLIPSegVision|AltCLIPVision"      # their last norm sees the pooled vector only
ZIPPED = (("resnets", "attentions"),)                 # sibling lists that forward walks in step


# ---- 1. walk -----------------------------------------------------------------------------------------------------------
@lru_cache(None)
def call_order(cls):
    """{name: rank} of the attributes cls.forward uses, ranked by when they are called (a(b(x)) calls b first)."""
    rank, busy = {}, set()

    def visit(code):
        ops = list(dis.get_instructions(code))
        ends = defaultdict(list)
        for op in ops:
            if op.opname.startswith("CALL") and op.positions:
                ends[op.positions.lineno, op.positions.col_offset].append(op.offset)
        when = []
        for op in ops:
            if op.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                at = op.positions and (op.positions.lineno, op.positions.col_offset)
                when.append((min((e for e in ends.get(at, ()) if e > op.offset), default=op.offset), op.argval))
            elif inspect.iscode(op.argval):
                when.append((op.offset, op.argval))
        for _, name in sorted(when, key=lambda w: w[0]):
            member = None if inspect.iscode(name) else getattr(cls, name, None)
            if inspect.iscode(name):
                visit(name)
            elif inspect.isfunction(member):
                if name not in busy:
                    busy.add(name)
                    enter(member)
            else:
                rank.setdefault(name, len(rank))

    def enter(function):
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is not None:
            visit(code)
    enter(cls.forward)
    return rank


def children(module):
    """Direct children in data order; a child that forward never names stays beside its elder sibling."""
    kids = [(n, m) for n, m in module._modules.items() if m is not None]
    if len(kids) < 2 or isinstance(module, (nn.ModuleList, nn.Sequential)):
        return kids
    rank, last, keyed = call_order(type(module)), -1, []
    for n, m in kids:
        last = rank.get(n, last)
        keyed.append((last, n, m))
    return [(n, m) for _, n, m in sorted(keyed, key=lambda k: k[0])]


def walk(model):
    """{path: module} in data order, each module once."""
    out, seen = {}, set()

    def visit(path, module):
        if id(module) in seen:
            return
        seen.add(id(module))
        out[path] = module
        kids = dict(children(module))
        dot = path + "." if path else ""
        for a, b in ZIPPED:
            if a in kids and b in kids:
                for (i, x), (j, y) in zip(kids[a]._modules.items(), kids[b]._modules.items()):
                    visit(f"{dot}{a}.{i}", x)
                    visit(f"{dot}{b}.{j}", y)
        for n, m in kids.items():
            visit(dot + n, m)
    visit("", model)
    return out


# ---- leaves ------------------------------------------------------------------------------------------------------------
class Leaf:
    """A module with parameters of its own."""

    def __init__(self, path, module):
        self.path, self.module, self.name = path, module, path.rpartition(".")[2]
        own = {k: p for k, p in module._parameters.items() if p is not None}
        self.own, w = own, own.get("weight")
        kind = type(module).__name__
        self.kind = "raw"
        if w is None:
            pass
        elif w.dim() == 1:
            self.kind = "norm" if "norm" in kind.lower() or hasattr(module, "eps") else "raw"
        elif isinstance(module, nn.Embedding) and w.dim() == 2:
            self.kind = "embedding"
        elif isinstance(module, nn.modules.conv._ConvNd):
            self.kind = "raw" if module.transposed else "conv"
        elif kind == "Conv1D" and w.dim() == 2:
            self.kind = "conv1d"
        elif w.dim() == 2 and (isinstance(module, nn.Linear) or hasattr(module, "in_features")):
            self.kind = "linear"
        self.bias = "bias" if self.kind != "raw" and own.get("bias") is not None else ""
        self.matrix = self.kind in ("linear", "conv1d", "conv")
        if self.matrix:
            out, inn = (w.shape[1], w.shape[0]) if self.kind == "conv1d" else (w.shape[0], w[0].numel())
            self.d_in, self.d_out = inn, out
            self.wide = self.kind == "conv" and (w[0, 0].numel() > 1 or module.groups > 1)     # mixes positions


def words(rel):
    """Path components without the wrappers that say nothing ("output.dense" -> output, "to_out.0" -> to_out)."""
    parts = rel.split(".")
    while len(parts) > 1 and (parts[-1] in ("dense", "linear", "0") and not parts[-2].isdigit() and parts[-2] not in ("mlp", "net", "ff")):
        parts.pop()
    return parts


def under(path, root):
    return root == "" or path == root or path.startswith(root + ".")


def common(paths):
    """Path of the deepest module that holds all of them (a proper ancestor)."""
    split = [p.split(".")[:-1] for p in paths]
    n = 0
    while all(len(s) > n for s in split) and len({s[n] for s in split}) == 1:
        n += 1
    return ".".join(split[0][:n])


def up(path):
    return path.rpartition(".")[0]


# ---- 2. attentions and blocks ------------------------------------------------------------------------------------------
def attention_roles(module):
    """{role: child name} when the module is an attention, else None."""
    if isinstance(module, nn.MultiheadAttention):
        return {"mha": ""}
    found = {}
    for name in module._modules:
        role = next((r for r, p in ATTENTION.items() if p.match(name)), None)
        if role:
            found.setdefault(role, name)
    if "qkv" in found and "q" in found:                 # GPT-2 cross attention: c_attn is k and v only
        found["kv"] = found.pop("qkv")
    ok = "qkv" in found or ("q" in found and ("k" in found or "kv" in found)) or ("r" in found and "k" in found and "o" in found)
    return found if ok and module._modules[found.get("qkv", found.get("q", found.get("r")))] is not None else None


def lists(path, modules, pseudo):
    """Ancestors of path (itself included), innermost first, that are elements of a list."""
    while path:
        parent = modules.get(up(path))
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) or (pseudo and re.search(r"\d$", path)):
            yield path
        path = up(path)


def find_blocks(modules, leaves, attentions, mixers):
    """Paths of the blocks, in data order."""
    matrices = [x for x in leaves if x.matrix or any(p.dim() == 3 for p in x.own.values())]
    blocks = set()
    cores = list(attentions) + mixers
    for pseudo in (False, True):
        loose = [x.path for x in matrices if not any(under(x.path, c) for c in cores) and not ATTENTION["o"].match(words(x.path)[-1])]
        for core in cores:
            around = [a for a in lists(core, modules, pseudo) if modules[a]._modules]
            full = next((a for a in around if any(under(p, a) for p in loose)), around[0] if around else None)
            if full is not None:
                blocks.add(full)
        if cores:                                       # mixer-free elements of the same list, MLP-only ones too
            for parent in {up(b) for b in blocks}:
                if isinstance(modules[parent], (nn.ModuleList, nn.Sequential)):
                    blocks |= {p for n in modules[parent]._modules if (p := f"{parent}.{n}" if parent else n) in modules
                               and modules[p]._modules and any(under(x.path, p) for x in leaves)
                               and not any(b != p and under(b, p) for b in blocks)}
        region = common(list(blocks)) if blocks else ""
        count = defaultdict(int)
        for x in matrices:
            for a in lists(up(x.path), modules, pseudo):
                if modules[a]._modules and under(a, region) and not any(under(a, b) or under(b, a) for b in blocks):
                    count[a] += 1
                    if count[a] > 1:
                        break
        convs = {a for a, n in count.items() if n > 1}
        convs = {a for a in convs if not any(b != a and under(b, a) for b in convs)}
        if not blocks or len({up(b) for b in blocks}) > 1:
            blocks |= convs
        if blocks:
            break
    if not blocks and cores:
        blocks = {up(cores[0])} if len(cores) == 1 else set()
    # a block inside another block is a part of it
    return [p for p in modules if p in blocks and not any(b != p and under(p, b) for b in blocks)]


# ---- 3. inside a block -------------------------------------------------------------------------------------------------
class Block:
    """Roles of one block's leaves, and the modules its streams are read from."""

    def __init__(self, path, number, leaves, modules, attentions, mixers, config):
        self.path, self.number, self.modules, self.config = path, number, modules, config
        self.module = modules[path]
        self.leaves = [x for x in leaves if under(x.path, path)]
        self.roles = {}              # (leaf path, param) -> list of dict(role, rows, index, ...)
        self.streams = []            # (name, module path, layout, mid)
        self.attends = []            # (name, module path, heads)
        self.part = {}               # leaf path -> the sublayer it belongs to
        self.taken = set()
        self.width = 0
        for core in attentions:
            if under(core, path):
                self.attention(core, attentions[core])
        for core in mixers:
            if under(core, path):
                self.mixer(core)
        self.experts()
        self.mlps()
        self.convs()
        self.norms()
        self.width = self.width or next((x.d_out for x in reversed(self.leaves) if x.matrix), 0) or next(
            (p.shape[-1] for x in self.leaves for p in x.own.values()), 0)

    def rel(self, path):
        return path[len(self.path) + 1:] if self.path else path

    def fresh(self, group):
        """group, or group2, group3 when the block already has one."""
        n = 1
        while (name := group + (str(n) if n > 1 else "")) in self.taken:
            n += 1
        self.taken.add(name)
        return name

    def put(self, leaf, role, param="weight", bias=None, part="", **more):
        name = role if "name" not in more else more.pop("name")
        self.roles.setdefault((leaf.path, param), []).append(
            dict(role=role, tail=name, bias=leaf.bias if bias is None else bias, **more))
        self.part[leaf.path] = part

    def free(self, leaf):
        return leaf.path not in self.part

    # attention
    def attention(self, core, kids):
        group = self.fresh("cross" if CROSS.search(self.rel(core)) else "attn")
        here = {x.path: x for x in self.leaves}
        module = self.modules[core]
        if "mha" in kids:
            leaf, out = here.get(core), here[core + ".out_proj"]
            heads = (module.num_heads, module.num_heads, module.head_dim)
            d, bias = module.embed_dim, "in_proj_bias" if module.in_proj_bias is not None else ""
            for i, r in enumerate("qkv"):
                if module.in_proj_weight is not None:
                    self.put(leaf, f"{group}.{r}", "in_proj_weight", bias, group, rows=(i * d, i * d + d), heads=heads, layout="raw")
                else:
                    self.put(leaf, f"{group}.{r}", f"{r}_proj_weight", "", group, heads=heads, layout="raw")
            self.put(out, f"{group}.o", part=group, heads=heads, owner=core, layout="raw")
        else:
            at = {r: here.get(f"{core}.{n}" if core else n) for r, n in kids.items()}
            out = at.get("o") or self.output(core)
            heads = head_shape(module, self.config, at, out)
            for r, leaf in at.items():
                if leaf is None or not leaf.matrix or r == "o":
                    continue
                split = fused_rows(module, leaf, heads, r, self.config) if r in ("qkv", "kv") else None
                if split is None:
                    self.put(leaf, f"{group}.{r}", part=group, heads=heads)
                for one, rows in (split or {}).items():
                    self.put(leaf, f"{group}.{one}", part=group, rows=rows, heads=heads)
            if out is not None:
                self.put(out, f"{group}.o", part=group, heads=heads)
        for x in self.leaves:                           # q_norm, k_norm, MLA's norms
            if self.free(x) and under(x.path, core) and core != self.path:
                if x.kind == "norm":
                    self.put(x, f"{group}.{x.name.lower()}" if x.name.endswith("norm") else f"{group}.{x.name.lower()}_norm", part=group)
        self.attends.append((group, core, heads))
        if out is not None:
            self.width = getattr(out, "d_out", self.width)
            whole = under(out.path, core) and core != self.path and not adds_residual(module)
            self.streams.append((f"{group}.out", core if whole else out.path, "out", None))

    def output(self, core):
        """The output projection beside an attention core (BERT: attention.self and attention.output.dense)."""
        root = core
        while root != self.path:
            for x in self.leaves:
                if x.matrix and self.free(x) and under(x.path, root) and not under(x.path, core):
                    if ATTENTION["o"].match(words(self.rel(x.path))[-1]):
                        return x
            root = up(root)
            if root == self.path:
                break
        return None

    # state-space and other recurrent mixers
    def mixer(self, core):
        group = self.fresh("ssm")
        out = None
        for x in self.leaves:
            if under(x.path, core) and self.free(x):
                rel = x.path[len(core) + 1:]
                for param in x.own:
                    if param == x.bias:
                        continue
                    name = rel if param == "weight" else param
                    name = re.sub(r"(_proj|1d|_log|_layernorm|norm)$", lambda m: "_norm" if "norm" in m[0] else "", name.split(".")[-1])
                    name = name.strip("_") or "norm"
                    self.put(x, f"{group}.{name}", param, "dt_bias" if False else None, group)
                    if name == "out":
                        out = x
        if out is not None:
            self.width = out.d_out
        self.streams.append((f"{group}.out", core, "out", None))

    # experts
    def experts(self):
        for x in self.leaves:
            stacks = {k: p for k, p in x.own.items() if p.dim() == 3 and re.search(r"gate|up|down|w1|w2|w3|v1", k)}
            if not stacks or not self.free(x):
                continue
            flip = bool(getattr(x.module, "is_transposed", False))
            for k, p in stacks.items():
                bias = k + "_bias" if k + "_bias" in x.own else ""
                for e in range(p.shape[0]):
                    n = p.shape[2] if flip else p.shape[1]
                    both = "gate" in k and "up" in k
                    inter = both and "GptOss" in type(x.module).__name__
                    halves = {"gate": torch.arange(0, n, 2) if inter else (0, n // 2),
                              "up": torch.arange(1, n, 2) if inter else (n // 2, n)} if both else {
                        "down" if re.search("down|w2", k) else "gate" if re.search("gate|w1", k) else "up": None}
                    for r, rows in halves.items():
                        self.put(x, f"mlp.expert.{r}", k, bias, "mlp", name=f"mlp.expert.{e}.{r}", rows=rows, index=e, layout="stack", turned=flip)
            self.expert_root = up(x.path)
        for x in self.leaves:
            if self.free(x) and re.search(r"(^|\.)(gate|router|gate\.wg|router\.classifier)$", self.rel(x.path)) and x.own.get("weight") is not None:
                if x.own["weight"].dim() == 2 and any(".experts" in k[0] for k in self.roles) or ".experts." in "".join(y.path for y in self.leaves):
                    self.put(x, "mlp.router", part="mlp")

    # MLPs
    def mlps(self):
        groups = defaultdict(list)
        for x in self.leaves:
            if not (self.free(x) and x.matrix):
                continue
            rel = self.rel(x.path)
            parts = words(rel)
            if x.kind == "conv" and (x.wide or not re.search(r"fc|pwconv|mlp|ffn|dense", rel)):
                continue
            holder = self.path
            key = []
            for n, comp in enumerate(parts[:-1]):
                key.append(comp)
                holder = f"{holder}.{comp}" if holder else comp
                if not isinstance(self.modules.get(holder), nn.ModuleList) and not re.match(r"experts?$|shared", parts[n + 1]):
                    break
            key = ".".join(key)
            if re.search(r"norm|emb|mod(ulation)?$|ada|time|rel_pos|cpb|downsample|reduction", key):
                continue
            if len(parts) == 1 or not key:
                key = ""
            m = re.match(r"(intermediate|output)(_\w+)?$", parts[0])
            if m:
                key = m[2] or ""
            expert = re.search(r"(shared\w*)|experts\.(\d+)", rel)
            groups[key, expert[0] if expert else ""].append(x)
        for (key, expert), xs in groups.items():
            self.mlp(key, expert, xs)

    def mlp(self, key, expert, xs):
        roles = mlp_roles(xs)
        if roles is None:
            return
        prefix = "mlp"
        if not expert:
            prefix = self.fresh("mix" if re.search(r"token", key) else "mlp")
        number = re.search(r"\d+$", expert)
        middle = "" if not expert else f"expert.{number[0]}." if number else "shared."
        gate_up = self.modules[up(roles["up"].path)]
        for r, x in roles.items():
            tail, role = f"{prefix}.{middle}{r}", f"{prefix}.{'expert.' if number else middle}{r}"
            if r == "up" and x.d_out == 2 * roles["down"].d_in and "gate" not in roles:
                names = ("up", "gate") if re.search(UP_FIRST, type(gate_up).__name__) else ("gate", "up")
                for i, one in enumerate(names):
                    half = x.d_out // 2
                    self.put(x, role[:-2] + one, part=prefix, name=tail[:-2] + one, rows=(i * half, i * half + half))
            else:
                self.put(x, role, part=prefix, name=tail)
        if expert and "mlp" in self.taken:
            return
        self.taken.add("mlp")
        self.width = self.width or roles["down"].d_out
        holder = common([x.path for x in roles.values()])
        if expert:                                      # the module that routes
            holder = re.split(r"\.?(shared\w*|experts)(\.|$)", holder)[0]
        whole = holder != self.path and under(holder, self.path) and not adds_residual(self.modules[holder])
        first = roles.get("gate", roles["up"])
        self.holder = getattr(self, "holder", None) or (holder if whole else None)
        self.streams.append((f"{prefix}.in", holder if whole else first.path, "in", None))
        self.streams.append((f"{prefix}.out", holder if whole else roles["down"].path, "out", None))

    # convolutions
    def convs(self):
        n = defaultdict(int)
        for x in self.leaves:
            if self.free(x) and x.kind == "conv":
                rel = self.rel(x.path)
                kind = "conv.short" if re.search(r"downsample|shortcut", rel) else "se" if re.search(
                    r"(^|\.)(se|squeeze\w*)(\.|$)|attention\.\d", rel) else "conv"
                i = n[kind]
                n[kind] += 1
                self.put(x, kind if kind == "conv.short" and not i else f"{kind}.{i}", part="conv")

    # norms: before the first sublayer, between two, after the last
    def norms(self):
        runs = []                                       # [sublayer name] or [norm, norm, ...] in data order
        for x in self.leaves:
            if x.kind == "norm" and self.free(x):
                inner = getattr(self, "holder", None)
                if inner and inner != self.path and under(x.path, inner):
                    self.put(x, f"mlp.{x.name.lower()}", part="mlp")
                    continue
                if runs and isinstance(runs[-1], list):
                    runs[-1].append(x)
                else:
                    runs.append([x])
            elif self.part.get(x.path) and (not runs or isinstance(runs[-1], list) or runs[-1] != self.part[x.path]):
                runs.append(self.part[x.path])
        subs = [r for r in runs if isinstance(r, str)]
        flag = next((bool(getattr(self.module, f)) for f in ("norm_first", "do_layer_norm_before", "normalize_before")
                     if hasattr(self.module, f)), None)
        pre = bool(runs) and isinstance(runs[0], list) if flag is None else flag
        if flag and runs and not isinstance(runs[0], list) or (flag is False and runs and isinstance(runs[0], list)):
            norms, runs = [x for r in runs if isinstance(r, list) for x in r], []     # forward holds both orders
            for i, s in enumerate(dict.fromkeys(subs)):
                pair = norms[i:i + 1]
                runs += [pair, s] if pre else [s, pair]
        self.norm_of, last = {}, {}
        for i, run in enumerate(runs):
            if isinstance(run, str):
                continue
            before = next((r for r in reversed(runs[:i]) if isinstance(r, str)), None)
            after = [r for r in runs[i + 1:] if isinstance(r, str)]
            for n, x in enumerate(run):
                if before == "conv" and not re.match("mlp", after[0] if after else ""):
                    owner, kind = "conv", "norm"
                elif pre and before is None and len(run) > 1:
                    owner, kind = after[n] if n < len(after) else "", "norm"
                elif pre and after and n == len(run) - 1:
                    owner, kind = after[0], "norm"
                else:
                    owner, kind = before, "post_norm" if pre else "norm"
                name = f"{owner}.{kind}" if owner else ""
                if name and owner != "conv" and name in self.norm_of:
                    name = f"{name}2" if f"{name}2" not in self.norm_of else ""
                if owner == "conv":
                    last["conv"] = last.get("conv", -1) + 1
                    name = f"conv.{last['conv']}.norm"
                if name:
                    self.norm_of[name] = x
                    self.put(x, name, part="")
        self.middle(pre, subs)

    def middle(self, pre, subs):
        """The stream between attention and MLP."""
        if "mlp" not in subs or not any(s.startswith(("attn", "ssm")) for s in subs) or getattr(self.module, "use_parallel_residual", False):
            return
        norm = self.norm_of.get("mlp.norm") if pre else next(
            (self.norm_of[f"{s}.norm"] for s in reversed(subs[:subs.index("mlp")]) if f"{s}.norm" in self.norm_of), None)
        if norm is None:
            return
        if not pre:
            self.streams.append(("mid", norm.path, "out", None))
            return
        holder = getattr(self, "holder", None)
        if holder is None or getattr(self.config, "parallel_attn", False):
            return
        both = common([norm.path, holder])
        if both != self.path and under(both, self.path) and not isinstance(self.modules[both], nn.ModuleList):
            self.streams.append(("mid", both, "in", None))          # a sublayer that adds its own residual (T5)
        else:
            self.streams.append(("mid", norm.path, "mid", (norm.module, self.modules[holder], self.module)))


def adds_residual(module):
    """True when forward itself is given what it is to be added to (BLOOM, BERT's output)."""
    try:
        return bool({"residual", "input_tensor"} & set(inspect.signature(inspect.unwrap(type(module).forward)).parameters))
    except (TypeError, ValueError):
        return False


def mlp_roles(xs):
    """{up, gate?, down} of the matrices of one MLP, by shape, with names where shapes do not tell."""
    if len(xs) == 2:
        a, b = xs
        if a.d_out not in (b.d_in, 2 * b.d_in) and b.d_out in (a.d_in, 2 * a.d_in):
            a, b = b, a
        return {"up": a, "down": b} if a.d_out in (b.d_in, 2 * b.d_in) else None
    if len(xs) == 3:
        for down in reversed(xs):
            a, b = (x for x in xs if x is not down)
            if a.d_in == b.d_in and down.d_in in (a.d_out, b.d_out):
                if re.search(r"down|w2|fc2|wo$", down.name) or down is xs[-1] and not re.search(r"down|w2", a.name + b.name):
                    gate = next((x for x in (a, b) if GATE.search(x.name)), a)
                    return {"gate": gate, "up": b if gate is a else a, "down": down}
    return None


def number(thing, *names):
    return next((v for n in names if isinstance(v := getattr(thing, n, None), int) and not isinstance(v, bool)), 0)


def head_shape(module, config, at, out):
    """(query heads, key/value heads, width of one), from the attention, else its config, else the shapes."""
    owners = [o for o in (module, getattr(module, "config", None), config) if o is not None]
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nheads", "num_head", "nh", "h")
    q = next((v for o in owners if (v := number(o, *names))), 0)
    if not q:
        return None
    width = next((v for o in owners[:1] if (v := number(o, "head_dim", "attention_head_size", "dim_head", "head_size", "key_value_proj_dim"))), 0)
    rows = at["q"].d_out if at.get("q") is not None and at["q"].matrix else getattr(out, "d_in", 0)
    width = rows // q if rows and rows % q == 0 else width
    if not width:
        return None
    kv = at["k"].d_out // width if at.get("k") is not None and at["k"].matrix else 0
    if not kv and at.get("qkv") is not None and at["qkv"].matrix:
        kv = (at["qkv"].d_out - q * width) // (2 * width)
    return q, kv or q, width


def fused_rows(module, leaf, heads, kind, config):
    """{q, k, v: rows} of a fused projection; None when its rows do not add up to whole heads."""
    if heads is None:                                   # nobody says how many heads: thirds, which holds for any equal heads
        third = leaf.d_out // 3
        return {r: (i * third, i * third + third) for i, r in enumerate("qkv")} if kind == "qkv" and leaf.d_out % 3 == 0 else None
    q, kv, w = heads
    if kind == "kv":
        half = leaf.d_out // 2
        return {"k": (0, half), "v": (half, 2 * half)}
    if (q + 2 * kv) * w != leaf.d_out:
        return None
    name, every = type(module).__name__, torch.arange(leaf.d_out)
    grouped = re.search(PER_HEAD, name) is not None
    if name.startswith("Falcon"):
        grouped = getattr(config, "new_decoder_architecture", False) or not getattr(config, "multi_query", False)
    if name.startswith("GPTBigCode"):
        grouped = kv == q
    if name.startswith("CodeGen"):                      # (4 slices, [q | v | k], width)
        every = every.view(4, 3, -1)
        return {"q": every[:, 0].flatten(), "v": every[:, 1].flatten(), "k": every[:, 2].flatten()}
    if grouped:
        every, g = every.view(kv, q // kv + 2, w), q // kv
        return {"q": every[:, :g].flatten(), "k": every[:, g].flatten(), "v": every[:, g + 1].flatten()}
    a, b = q * w, (q + kv) * w
    return {"q": (0, a), "k": (a, b), "v": (b, leaf.d_out)}


# ---- 4. towers ---------------------------------------------------------------------------------------------------------
def tower_key(path):
    major = next((t for part in path.split(".") for t, p in TOWER.items() if re.search(p, part, re.I)), "")
    minor = next((t for part in path.split(".") for t, p in SIDE.items() if re.search(p, part, re.I)), "")
    return major, minor


def towers(paths):
    """{tower name: block paths}: no name when there is only one, the shortest telling name otherwise."""
    keyed = defaultdict(list)
    for p in paths:
        keyed[tower_key(p)].append(p)
    if len(keyed) == 1:
        return {"": paths}
    majors = [k[0] for k in keyed]
    named = {}
    for (major, minor), ps in keyed.items():
        name = major if major and majors.count(major) == 1 else minor or major or "main"
        name = name if name not in named else f"{major}_{minor}"
        named[name] = ps
    return named


def build_stack(name, blocks, modules, leaves):
    paths = [b.path for b in blocks]
    lca = common([p + ".x" for p in paths]) if len(paths) > 1 else up(paths[0])
    while isinstance(modules.get(lca), (nn.ModuleList, nn.Sequential)) and lca:
        lca = up(lca)
    home = lca
    while True:
        names = set(inspect.signature(inspect.unwrap(type(modules[home]).forward)).parameters)
        if names & INPUTS or not home:
            break
        home = up(home)
    home = home if names & INPUTS else lca
    module, first = modules[home], blocks[0].module
    config = getattr(module, "config", None)
    stack = Stack(name, module, home, blocks=tuple(b.module for b in blocks), dim=blocks[-1].width)
    stack.cross = any(a[0].startswith("cross") for b in blocks for a in b.attends)
    stack.causal = is_causal(module, blocks, modules, config)
    mine = [m for p, m in modules.items() if under(p, home)]
    stack.rope = any(re.search(r"rotary|rope", type(m).__name__, re.I) for m in mine) or bool(
        getattr(config, "rope_theta", None) or getattr(config, "rope_parameters", None))
    stack.insert = why_not_insert(blocks, mine)
    return stack


def is_causal(module, blocks, modules, config):
    for thing in [module, blocks[0].module] + [modules[c] for _, c, _ in blocks[0].attends[:1]]:
        for flag in ("is_decoder", "causal", "is_causal"):
            value = getattr(thing, flag, None)
            if isinstance(value, bool) and (value or flag != "is_causal"):
                return value
    if any(g.startswith("ssm") for b in blocks for g in b.taken) or any("r" in r["role"].split(".") for b in blocks for v in b.roles.values() for r in v):
        return True
    used = call_order(type(module)).keys() | set(inspect.unwrap(type(module).forward).__code__.co_names)
    return any("causal_mask" in n for n in used)


def why_not_insert(blocks, mine):
    if not any(b.attends or "ssm" in b.taken for b in blocks):
        return "its blocks are convolutions over a map" if not any("mix" in b.taken for b in blocks) else \
            "its token-mixing MLPs have a fixed number of tokens"
    if any("conv" in b.part.values() and not b.attends for b in blocks):
        return "its tokens are folded to a map and back between blocks"
    if any(isinstance(getattr(m, "window_size", None), (int, tuple)) and getattr(m, "window_size") for m in mine if hasattr(m, "window_size")
           and re.search(r"Swin|Window|Sam", type(m).__name__)):
        return "its attention works in windows of the patch grid"
    if any(re.search(r"SegformerEfficient|Pvt|spatial_reduction", type(m).__name__) for m in mine):
        return "its tokens are folded to a map inside the attention"
    return ""


# ---- the scan ----------------------------------------------------------------------------------------------------------
def scan(model):
    """(sites, model, stacks)."""
    modules = walk(model)
    leaves = [Leaf(p, m) for p, m in modules.items() if any(v is not None for v in m._parameters.values())]
    attentions = {p: r for p, m in modules.items() if (r := attention_roles(m))}
    mixers = [p for p, m in modules.items() if hasattr(m, "_parameters") and ("A_log" in m._parameters or {"x_proj", "dt_proj"} <= m._modules.keys())]
    config = getattr(model, "config", None)
    found, position = [], {p: i for i, p in enumerate(modules)}
    stacks, blocks_of = [], {}
    for name, paths in towers(find_blocks(modules, leaves, attentions, mixers)).items():
        if not paths:
            continue
        made = []
        for i, p in enumerate(paths):
            near = p
            while near and not hasattr(modules[near], "config"):
                near = up(near)
            made.append(Block(p, i, leaves, modules, attentions, mixers, getattr(modules[near], "config", config)))
        stack = build_stack(name, made, modules, leaves)
        stacks.append(stack)
        blocks_of[id(stack)] = made
    inside = {x.path for bs in blocks_of.values() for b in bs for x in b.leaves}
    outside = outer_roles(model, modules, leaves, inside, stacks, blocks_of, position)
    # assemble
    for stack in stacks:
        stack_sites(stack, blocks_of[id(stack)], found, position, modules)
    for (path, param), (role, tower, stack) in outside.items():
        leaf = next(x for x in leaves if x.path == path)
        found.append((position[path], weight_site(leaf, param, role, f"{tower}.{role}" if tower and role else role, tower, stack)))
    found.sort(key=lambda f: f[0])
    found = [s for _, s in found]
    return tie(found), model, tuple(stacks)


def weight_site(leaf, param, role, name, tower, stack, block=None, tail=None, layout=None, bias=None, owner=None, **more):
    p = leaf.own[param]
    layout = layout or (leaf.kind if param == "weight" else "raw")
    turned = more.pop("turned", layout in ("conv1d", "embedding"))
    bias = leaf.bias if bias is None and param == "weight" else bias or ""
    whole = p if more.get("index") is None else p[more["index"]]
    shape = (whole.shape[0] if p.dim() else 1, whole[0].numel() if p.dim() else 1)
    d_out, d_in = shape[::-1] if turned else shape
    rows = more.get("rows")
    if rows is not None:
        d_out = rows[1] - rows[0] if isinstance(rows, tuple) else len(rows)
    path, module = leaf.path, leaf.module
    if owner is not None:                               # the layer's own forward is never called
        inner = path[len(owner) + 1:]
        param, bias, path = f"{inner}.{param}", f"{inner}.{bias}" if bias else "", owner
        module = more.pop("owner_module")
    return Site(name or (f"{path}.{param}" if path else param), "weight", module, path, role, tower, layout, param, bias, d_in, d_out,
                turned=turned, block=block, stack=stack, **more)


def stack_sites(stack, blocks, found, position, modules):
    prefix = stack.name + "." if stack.name else ""
    for b in blocks:
        mates, at = {}, f"{prefix}block.{b.number}"

        def stream(name, path, layout, d, mid=None, order=0.0, kind="stream", heads=None, b=b, at=at, mates=mates):
            site = Site(f"{at}.{name}", kind, modules[path], path, name, stack.name, layout, d_in=d, d_out=d, block=b.number,
                        stack=stack, mid=mid, mates=mates, heads=heads)
            mates[name] = site
            found.append((position[path] + order, site))
        stream("in", b.path, "in", b.width)
        for x in b.leaves:
            for param in x.own:
                if param == "bias" and x.bias:
                    continue
                if any(param == r["bias"] for k, v in b.roles.items() if k[0] == x.path for r in v):
                    continue
                for spec in b.roles.get((x.path, param), [dict(role="", tail="", bias=None)]):
                    spec = dict(spec)
                    tail = spec.pop("tail")
                    if spec.get("owner") is not None:
                        spec["owner_module"] = modules[spec["owner"]]
                    role = spec.pop("role")
                    site = weight_site(x, param, role, f"{at}.{tail}" if tail else "", stack.name, stack, b.number, mates=mates, **spec)
                    mates[tail or site.name] = site
                    found.append((position[x.path] + 0.2, site))
        for group, path, heads in b.attends:
            stream(group, path, "", b.width, kind="attend", heads=heads, order=0.1)
        for name, path, layout, mid in b.streams:
            d = b.width
            last = max(position[x.path] for x in b.leaves if under(x.path, path))
            found_at = position[path] + 0.1 if layout in ("in", "mid") else last + 0.5
            stream(name, path, layout, d, mid, found_at - position[path])
        stream("out", b.path, "out", b.width, order=max(position[x.path] for x in b.leaves) + 0.9 - position[b.path])
    end = max(position[x.path] for x in blocks[-1].leaves)
    if stack.embed_module is None:
        stack.embed, e_path, layout = "in", blocks[0].path, "in"
        stack.embed_module = blocks[0].module
    else:
        e_path, layout = next(p for p, m in modules.items() if m is stack.embed_module), "out"
    first = blocks[0].width
    found.append((position[blocks[0].path] - 0.5, Site(prefix + "embed", "stream", stack.embed_module, e_path, "embed", stack.name, layout,
                                                       d_in=first, d_out=first, stack=stack)))
    final = stack.final_module or blocks[-1].module
    f_path = next(p for p, m in modules.items() if m is final)
    found.append((max(end, position[f_path]) + 0.95, Site(prefix + "final", "stream", final, f_path, "final", stack.name, "out", d_in=stack.dim,
                                                          d_out=stack.dim, stack=stack)))


def outer_roles(model, modules, leaves, inside, stacks, blocks_of, position):
    """{(leaf path, param): (role, tower, stack)} of everything outside the blocks; sets the stacks' ends."""
    out, used = {}, defaultdict(set)
    spans = {}
    for s in stacks:
        bs = blocks_of[id(s)]
        spans[id(s)] = position[bs[0].path], max(position[x.path] for b in bs for x in b.leaves)
    heads = []
    free = [x for x in leaves if x.path not in inside]
    for x in free:
        mine = [s for s in stacks if under(x.path, s.path)]
        stack = max(mine, key=lambda s: len(s.path)) if mine else None
        if stack is None and len(stacks) == 1:
            stack = stacks[0]
        before = stack is not None and position[x.path] < spans[id(stack)][0]
        tower = stack.name if stack else ""
        parts = words(x.path)
        for param in x.own:
            if param == "bias" and x.bias:
                continue
            role = ""
            if not before and x.kind != "embedding" and any(HEAD.match(p) for p in x.path.split(".")):
                heads.append((x, param))
            elif any(re.search("pooler", p) for p in parts) and x.matrix:
                role = "pool"
            elif before or stack is None:
                role = embed_role(x, param, parts, before)
            elif x.kind == "norm" and stack is not None and stack.final_module is None:
                role = "final.norm"
                if not re.search(POOLED_NORM, type(stack.module).__name__) and not any(re.search("pool", p) for p in parts):
                    stack.final_module = x.module
            if role in ("embed.conv", ) or role in used[tower]:
                n = 0
                while f"{role}.{n}" in used[tower]:
                    n += 1
                role = f"{role}.{n}" if role else ""
            if role:
                used[tower].add(role)
            out[x.path, param] = (role, tower if role else tower, stack if mine or len(stacks) == 1 else None)
    linear = [(x, p) for x, p in heads if x.matrix and p == "weight"]
    if not linear:                                      # structure: the last layer of all, past every block
        tail = [x for x in leaves if x.matrix]
        if tail and tail[-1].path not in inside and "proj" not in tail[-1].name and not any(
                position[tail[-1].path] < spans[id(s)][1] for s in stacks):
            linear = [(tail[-1], "weight")]
    root = linear[-1][0] if linear else None
    for x, p in heads:
        out[x.path, p] = ("", "", None)
    if root is not None:
        out[root.path, "weight"] = ("head", "", stacks[0] if len(stacks) == 1 else None)
    for s in stacks:
        find_embed(s, blocks_of[id(s)], modules, leaves, out, position, spans[id(s)][0])
    return out


def embed_role(x, param, parts, before):
    name = (param if param != "weight" else ".".join(parts[-2:])).lower()
    if x.kind == "embedding" or (param != "weight" and x.own[param].dim() >= 1):
        if "pos" in name or "wpe" in name:
            return "embed.position"
        if re.search("type|segment", name):
            return "embed.type"
        if re.search(SPECIAL, name):
            return "embed.register" if "reg" in name else "embed.dist" if "dist" in name else "embed.cls"
        if "mask" in name:
            return "embed.mask"
        return "embed.token" if x.kind == "embedding" else ""
    if param != "weight" or not before:
        return ""
    if x.kind == "conv":
        k, s = x.module.kernel_size, x.module.stride
        return "embed.patch" if k == s and k[0] > 1 or re.search("patch", x.path) else "embed.conv"
    return "embed.norm" if x.kind == "norm" else "embed.proj" if x.kind in ("linear", "conv1d") and re.search("emb|proj", x.path) else ""


def find_embed(stack, blocks, modules, leaves, out, position, start):
    """Where the stack's stream begins, and how many of its first tokens are special."""
    first = blocks[0].path
    holders = [p for p in modules if under(first, p) and p != first and under(p, stack.path)]
    mine = [x for x in leaves if under(x.path, stack.path) and (out.get((x.path, "weight")) or ("",))[0].startswith("embed.")
            or under(x.path, stack.path) and any((out.get((x.path, k)) or ("",))[0].startswith("embed.") for k in x.own)]
    mine = [x for x in mine if position[x.path] < start]
    tokens = [x for x in mine if x.kind == "embedding" and out[x.path, "weight"][0] == "embed.token"]
    if hasattr(stack.module, "norm_pre") and hasattr(stack.module, "patch_embed"):       # timm: after CLS and positions
        stack.embed_module = stack.module.norm_pre
    elif tokens and up(tokens[0].path) in holders:
        stack.embed, stack.embed_module = "ids", tokens[0].module
    else:
        roots = [p for x in mine for p in [x.path] for h in holders if under(p, h)]
        tops = []
        for x in mine:
            h = max((h for h in holders if under(x.path, h)), key=len, default=None)
            if h is not None and x.path != h:
                rest = x.path[len(h) + 1:] if h else x.path
                tops.append((h + "." if h else "") + rest.split(".")[0])
        tops = [t for t in dict.fromkeys(tops) if re.search(r"embed|stem|patch|feature_proj|embeddings", t.rpartition(".")[2]) and t in modules]
        if tops and roots:
            stack.embed_module = modules[tops[0]]
    if isinstance(n := getattr(stack.module, "num_prefix_tokens", None), int):
        stack.fixed = n
    else:
        special = [p for x in mine + [y for y in leaves if y.path == stack.path] for k, p in x.own.items() if re.fullmatch(SPECIAL, k)]
        stack.fixed = sum(p.shape[-2] if p.dim() > 1 else 1 for p in special)
        if not special and tokens and not stack.causal and stack.name != "encoder" and not stack.cross and stack.embed == "out":
            stack.fixed = 1


def tie(found):
    """Name on every site of a shared parameter the other sites of it; a name used twice falls back to the parameter's path."""
    holders = defaultdict(list)
    names = set()
    out = []
    from dataclasses import replace
    for s in found:
        if s.name in names:
            s = replace(s, name=f"{s.path}.{s.param}" if s.param else f"{s.path}.{s.role}", role="" if s.param else s.role)
        names.add(s.name)
        out.append(s)
        if s.param:
            holders[id(s.parameter)].append(s)
    twins = {k: v for k, v in holders.items() if len({(s.path, s.param) for s in v}) > 1}
    for i, s in enumerate(out):
        if s.param and (k := id(s.parameter)) in twins:
            out[i] = replace(s, tied=tuple(o.name for o in twins[k] if (o.path, o.param) != (s.path, s.param)))
    return out
