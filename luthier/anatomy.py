"""The finder: what each parameter and module of a model is, from its structure first and the names its authors use second.

1. walk the modules in the order `forward` calls them (walk.py: read from byte code, nothing is run);
2. an attention is a module with q and k children or a fused qkv; the list element that holds one and an MLP is a block;
3. the rest of a block is MLP, experts, state-space mixer or convolutions, with norms before, between and after (block.py);
4. blocks make towers; what comes before a tower's blocks is embedding, what comes after is final norm, pool and head.
What finds no role stays a site named by its raw parameter path."""

import inspect
import re
from collections import Counter, defaultdict
from dataclasses import replace

from torch import nn

from .block import ATTENTION, Block, attention_kids, is_mixer
from .site import Site, Stack
from .walk import LISTS, Leaf, arguments, calls, chain, common, under, up, walk, within, word

# ---- names authors use
HEAD = re.compile(
    r"(^|\.)(heads?|lm_head|cls|scores?|fc|embed_out|logits|predictions|seq_relationship|last_linear|output_layer|qa_outputs"
    r"|\w*_head|\w*classifier|\w*_predictions)(\.|$)|^(language\.)?(proj_out\w*|output_projection|conv_out)$")
SPECIAL = re.compile(r"cls_token|class_token|class_emb\w*|dist(illation)?_token|reg(ister)?_tokens?")
EMBED = {"relative": r"rel_|relative", "position": r"pos|wpe", "type": r"type|segment", "register": r"reg(ister)?_token",
         "dist": r"dist\w*_token", "cls": SPECIAL, "mask": r"mask"}
ENTRY = re.compile(r"embed|stem|patch|feature_proj|norm")           # what may stand last before the blocks
BESIDE = re.compile(r"rotary|rope|rel_|pos_(?!drop)|position|time|mask")  # what does not carry the stream
MAJOR = {"connector": r"^connector$|multi_?modal_projector|^(mm|vision|language)_projector$|^language_projection$",
         "backbone": r"backbone", "vision": r"vision|visual|image|img|pixel|^r_layers$", "text": r"text|language|^lm$",
         "audio": r"audio|speech", "qformer": r"qformer", "fusion": r"fusion|multi_?modal|mm_encoder|^x_layers$",
         "perceiver": r"perceiver|resampler"}
MINOR = {"encoder": r"encoder", "decoder": r"decoder"}
INPUTS = {"input_ids", "pixel_values", "input_features", "input_values", "past_values", "sample", "query_embeds"}
# ---- true exceptions
POOLED = re.compile(r"(CLIP|CLIPSeg|OwlViT|Blip).*Vision")          # the last norm sees the pooled vector, not the stream
WITHOUT_CLS = re.compile(r"Siglip")                                 # text encoders that do not begin with a sentence token


def find_blocks(modules, leaves, cores):
    """Paths of the blocks in data order; cores are the paths of attentions and mixers."""
    matrices = [x for x in leaves if x.matrix or any(p.dim() == 3 for p in x.own.values())]
    filled, normed = ({a for x in xs for a in chain(x.path)} for xs in (leaves, [x for x in leaves if x.kind == "norm"]))
    loose = [x.path for x in matrices if within(x.path, cores) is None and not ATTENTION["o"].match(word(x.path))]
    loose = {a for p in loose for a in chain(p)}
    stems = Counter(a.rstrip("0123456789") for a in modules if modules[a]._modules)
    for numbered, least in (False, 2), (True, 2), (False, 1):       # only if no list holds blocks: block1, block2, ...
        def elements(path, numbered=numbered):
            return [a for a in chain(path) if a and modules[a]._modules and (isinstance(modules[up(a)], LISTS) or (
                numbered and a[-1].isdigit() and stems[a.rstrip("0123456789")] > 1))]
        blocks = set()
        for core in cores:                                          # the innermost element with something beside the core in it
            around = elements(core)
            blocks.update([a for a in around if a in loose][:1] or around[:1])
        blocks -= {a for b in blocks for a in chain(b) if a != b}   # a stage is no block
        taken = {a for b in blocks for a in chain(b)}
        for home in {up(b) for b in blocks if isinstance(modules[up(b)], nn.ModuleList | nn.Sequential)}:
            for name, kid in modules[home]._modules.items():        # its neighbours, such as blocks that are only an MLP
                path = f"{home}.{name}" if home else name
                if kid._modules and path not in taken and path in filled:
                    blocks.add(path)
        region = "" if not blocks else common(blocks) if len({up(b) for b in blocks}) > 1 else None
        inside, taken = defaultdict(list), {a for b in blocks for a in chain(b)}
        senses = {"vision", "audio", "backbone"} - {label(MAJOR, b) for b in blocks}
        for x in matrices:                                          # stages without attention, towers without any
            for a in elements(up(x.path)) if within(x.path, blocks) is None else ():
                if a not in taken and (region is not None and under(a, region) or label(MAJOR, a) in senses):
                    inside[a].append(x)
        more = {a for a, xs in inside.items() if len(xs) >= least and (any(x.wide for x in xs) or (
            not blocks and (a in normed or any(x.kind != "conv" for x in xs))))}
        blocks |= more - {a for b in more for a in chain(up(b))}
        if blocks:
            break
    if not blocks and len(cores) == 1:
        blocks = {up(*cores)}
    return [p for p in modules if p in blocks and not (p and within(up(p), blocks))]


# ---- towers and stacks -------------------------------------------------------------------------------------------------
def label(table, path):
    return next((t for part in path.split(".") for t, p in table.items() if re.search(p, part, re.I)), "")


def towers(paths):
    """{tower name: block paths}: "" when there is only one, else the shortest telling name."""
    keyed, named = defaultdict(list), {}
    for p in paths:
        keyed[label(MAJOR, p), label(MINOR, p)].append(p)
    majors = [major for major, _ in keyed]
    rest = "text" if {"vision", "audio"} & set(majors) else "encoder" if ("", "decoder") in keyed else "main"
    for (major, minor), ps in keyed.items():
        name = "" if len(keyed) == 1 else major if major and majors.count(major) == 1 else minor or major or rest
        named[name if name not in named else f"{major}_{minor}"] = ps
    return named


def make_stack(name, blocks, modules, others):
    """The Stack of these blocks; others are the blocks of the other towers, above which its module must not lie."""
    home = common([b.path + ".x" for b in blocks]) if len(blocks) > 1 else up(blocks[0].path)
    while home and isinstance(modules[home], LISTS):
        home = up(home)
    alone = [a for a in chain(home) if not any(under(o, a) for o in others)] or [home]
    masked = [a for a in alone if "attention_mask" in arguments(modules[a])]
    path = next((a for a in alone if INPUTS & arguments(modules[a])), (masked or [home])[-1])
    module, inside = modules[path], [m for p, m in modules.items() if under(p, path)]
    return Stack(
        name, module, path, blocks=tuple(b.module for b in blocks), dim=blocks[-1].width,
        causal=is_causal(module, blocks, modules, path),
        rope=any(re.search("rotary|rope", type(m).__name__, re.I) or hasattr(m, "rotary_dim") for m in inside),
        cross=any(group.startswith("cross") for b in blocks for group, _, _ in b.attends), insert=why_not_insert(blocks, inside))


def is_causal(module, blocks, modules, path):
    core = [modules[c] for _, c, _ in blocks[0].attends[:1]]
    for m in [module, blocks[0].module, *core]:
        if any(getattr(m, flag, None) is True for flag in ("is_decoder", "is_causal", "causal")):
            return True
    if any("ssm" in b.names or any(c["name"] == "attn.r" for _, c in b.claims) for b in blocks):        # recurrent
        return True
    used = inspect.unwrap(type(module).forward).__code__.co_names
    if any(re.search(r"(create|prepare)\w*causal", n) for n in used) and not any("bidirectional" in n for n in used):
        return True
    for m in core:
        for n, b in m._buffers.items():                             # GPT's triangle of ones
            if n in ("bias", "mask", "tril", "causal_mask") and b is not None and b.dim() > 1 and b.shape[-1] == b.shape[-2] > 1:
                return True
        code = inspect.unwrap(type(m).forward).__code__             # a literal is_causal=True in the attention's own code
        if "is_causal" not in code.co_varnames and any(isinstance(c, tuple) and "is_causal" in c for c in code.co_consts):
            return not hasattr(m, "is_causal") and any(c is True for c in code.co_consts)
    return type(module).__name__ == "BlipTextModel" and "decoder" in path          # told by an argument of its caller


def why_not_insert(blocks, inside):
    """Why no tokens may be inserted into a stack with these modules inside; "" when they may."""
    names, kinds = {n for b in blocks for n in b.names}, " ".join({type(m).__name__ for m in inside})
    if "mix" in names:
        return "its token-mixing MLPs hold a fixed number of tokens"
    if "ssm" not in names and any(x.kind == "conv" and not b.attends for b in blocks for x in b.leaves.values()):
        mixed = any(b.attends for b in blocks)
        return "its tokens are folded to a map between blocks" if mixed else "its blocks work on a map of pixels"
    if any(hasattr(m, "window_size") and re.search("Swin|Window|Sam", type(m).__name__) for m in inside):
        return "its attention works in windows of the patch grid"
    if any("relative_position_bias_table" in m._parameters for m in inside):
        return "its attention adds a learned bias for each pair of grid positions"
    if re.search("Segformer|Pvt|Hiera", kinds):
        return "its tokens are folded to a map inside the attention"
    return "its stream has a channel axis beside batch and time" if "PatchTST" in kinds else ""


# ---- before and after the blocks ---------------------------------------------------------------------------------------
def embed_role(x, param, before):
    """The role of a parameter outside the blocks that is no head, pool or final norm."""
    name = (x.path if param == "weight" else param).lower()
    if x.kind == "embedding" or param != "weight" and x.own[param].dim():
        parts = name.split(".")
        found = next((r for r, p in EMBED.items() if re.search(p, ".".join(parts[-2:] if r == "position" else parts[-1:]))), "")
        return f"embed.{found}" if found else "embed.token" if x.kind == "embedding" else ""
    if not before or param != "weight":
        return ""
    if x.kind == "conv":
        size = x.module.kernel_size
        return "embed.patch" if size == x.module.stride and size[0] > 1 or "patch" in name else "embed.conv"
    if x.matrix:
        return "embed.proj" if re.search("emb|proj|patch", name) and "time" not in name else ""
    return "embed.norm" if x.kind == "norm" else ""


def outer_roles(leaves, stacks, modules, place, span):
    """{(leaf path, parameter): (role, tower, stack)} of what no block holds. Tells the stacks their final norm."""
    roles, used, heads = {}, defaultdict(set), []
    for x in leaves:
        only = stacks[0] if len(stacks) == 1 else None
        s = max((s for s in stacks if under(x.path, s.path)), key=lambda s: len(s.path), default=only)
        before = s is not None and place[x.path] < span[s][0]
        last = s is not None and place[x.path] > span[s][1] and not any(
            isinstance(modules[a], LISTS) for a in chain(up(x.path)) if under(a, s.path))           # not one of a list
        for param in x.params:
            role, tower = "", s.name if s is not None else ""
            if not before and x.kind != "embedding" and HEAD.search(x.path):
                heads.append((x, param))
            elif x.matrix and "pooler" in x.path:
                role = "pool"
            elif before or s is None or x.kind == "embedding":
                role = embed_role(x, param, before)
            elif x.kind == "norm" and last and "final.norm" not in used[tower] and "pool" not in x.path:
                role = "final.norm"
                s.final_module = None if POOLED.search(type(s.module).__name__) else x.module
            if role and (role == "embed.conv" or role in used[tower]):
                role = next(r for n in range(99) if (r := f"{role}.{n}") not in used[tower])
            used[tower].add(role)
            tower = tower if role else "connector" if label(MAJOR, x.path) == "connector" else ""
            roles[x.path, param] = role, tower, s
    final = [x for x, p in heads if x.matrix and p == "weight"]
    last = leaves[-1] if leaves else None
    if not final and last and last.matrix and "proj" not in last.name and label(MAJOR, last.path) != "connector":
        final = [x for x in [last] if all(place[x.path] > span[s][0] for s in stacks) and not roles[x.path, "weight"][0]]
    roles.update({(x.path, p): ("", "", None) for x, p in heads})
    if final:                                                       # the last layer of all is the one that answers
        roles[final[-1].path, "weight"] = "head", "", stacks[0] if len(stacks) == 1 else None
    return roles


def begin(s, first, leaves, roles, modules, place, paths):
    """Where a stack's stream begins: a token embedding called inside the stack's own forward ("ids"), else the last module called
    before the blocks ("out"), else the first block's input ("in"). And how many special tokens come first."""
    mine = [(x, k, r[0]) for x in leaves for k in x.params if (r := roles[x.path, k])[2] is s and r[0].startswith("embed.")]
    holders = [a for a in chain(up(first)) if under(a, s.path)]
    tokens = [x for x, _, role in mine if role == "embed.token"]
    takes = arguments(s.module)
    s.embed, s.embed_module = "in", s.blocks[0]
    if tokens and up(tokens[0].path) in holders and ("input_ids" in takes or not takes & INPUTS):
        s.embed, s.embed_module, holders = "ids", tokens[0].module, []
    for holder in holders:
        kids = [p for p in modules if p and up(p) == holder and place[p] < place[first] and not any(under(b, p) for b in paths)]
        kids = [p for p in kids if not isinstance(modules[p], nn.ModuleList) and (
            "Patch" in type(modules[p]).__name__ or not BESIDE.search(p[len(holder):]))]
        if kids and not isinstance(modules[holder], LISTS):
            last = modules[kids[-1]]                                # a dropout, norm, pool or identity, or an embedding by name
            plain = not last._modules and all(p.dim() < 2 for p in last.parameters())
            if plain or ENTRY.search(kids[-1].rpartition(".")[2]) and not hasattr(last, "kernel_size"):
                s.embed, s.embed_module = "out", last
            break
    special = [x.own[k] for x, k, role in mine if role.split(".")[1] in ("cls", "dist", "register")]
    known = getattr(s.module, "num_prefix_tokens", None)
    s.fixed = known if isinstance(known, int) else sum(p.shape[-2] if p.dim() > 1 else 1 for p in special)
    if tokens and s.embed == "out" and not (s.fixed or s.causal or s.cross or s.name == "encoder"):
        s.fixed = int(not WITHOUT_CLS.search(type(s.module).__name__))          # BERT's sentence token
    if len(tokens) == 1 and s.embed == "out" and "input_ids" in takes and (s.name == "text" or "token_type_ids" not in takes):
        s.words_module = tokens[0].module


# ---- the scan ----------------------------------------------------------------------------------------------------------
def scan(model):
    """(sites in data order, model, stacks)."""
    modules, ends = walk(model)
    place, path_of = {p: i for i, p in enumerate(modules)}, {id(m): p for p, m in modules.items()}
    leaves = [Leaf(p, m) for p, m in modules.items() if any(v is not None for v in m._parameters.values())]
    attentions = {p: kids for p, m in modules.items() if (kids := attention_kids(m))}
    mixers = {p: None for p, m in modules.items() if is_mixer(m) and p not in attentions}
    cores = attentions | mixers
    paths = dict.fromkeys(find_blocks(modules, leaves, cores))
    held = defaultdict(lambda: ([], {}, []))                        # block path -> its leaves, attentions, mixers
    for x in leaves:
        held[within(x.path, paths)][0].append(x)
    for core, kids in cores.items():
        at = held[within(core, paths)]
        at[1].update({core: kids}) if kids else at[2].append(core)
    found, stacks, span = [], [], {}                                # found: ((place, rank), site)
    for name, group in towers(paths).items() if paths else ():
        configs = [next((c for a in chain(p) if (c := getattr(modules[a], "config", None)) is not None), None) for p in group]
        blocks = [Block(p, i, *held[p], modules, c) for i, (p, c) in enumerate(zip(group, configs, strict=True))]
        stacks.append(s := make_stack(name, blocks, modules, [p for p in paths if p not in group]))
        span[s] = place[group[0]], ends[group[-1]], blocks[0].width_in
        for b in blocks:
            block_sites(b, s, found, place, ends)
    roles = outer_roles(held[None][0], stacks, modules, place, span)
    for x in held[None][0]:
        for param in x.params:
            role, tower, s = roles[x.path, param]
            name = f"{tower}.{role}" if tower and role else role
            found.append(((place[x.path], 0), weight(x, role, name, modules, param, tower=tower, stack=s)))
    for s in stacks:
        start, end, width = span[s]
        begin(s, path_of[id(s.blocks[0])], held[None][0], roles, modules, place, paths)
        speaks = "CausalLM" in type(model).__name__ and s.name in ("", "text")
        s.causal = s.causal or s.embed == "ids" and (speaks or s.name == "decoder" and s.cross)
        last, dot = s.final_module if s.final_module is not None else s.blocks[-1], s.name + "." if s.name else ""
        looked = [("words", s.words_module, "out", width, (start, -4))] if s.words_module is not None else []
        for name, m, layout, d, key in (*looked,
                                        ("embed", s.embed_module, "in" if s.embed == "in" else "out", width, (start, -3)),
                                        ("final", last, "out", s.dim, (max(ends[path_of[id(last)]], end), 9))):
            found.append((key, Site(dot + name, "stream", m, path_of[id(m)], name, s.name, layout, d_in=d, d_out=d, stack=s)))
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
    if isinstance(modules.get(above := up(path if reader is None else reader)), nn.TransformerEncoderLayer):
        reader = above                                              # torch's fast path takes every weight in the layer itself
    if reader is not None:
        inner = path[len(reader) + 1:] if reader else path
        param, bias, path, module, layout = f"{inner}.{param}", f"{inner}.{bias}" if bias else "", reader, modules[reader], "raw"
    name = name or (f"{path}.{param}" if path else param)
    return Site(name, "weight", module, path, role, layout=layout, param=param, bias=bias, d_in=d_in, d_out=d_out, turned=turned,
                **more)


def block_sites(b, stack, found, place, ends):
    """Append ((place, rank), site) for everything in one block."""
    at, claimed = f"{stack.name}.block.{b.number}" if stack.name else f"block.{b.number}", defaultdict(set)
    where = dict(tower=stack.name, stack=stack, block=b.number, mates={})

    def stream(tail, path, layout, key, d=b.width, kind="stream", **more):
        site = Site(f"{at}.{tail}", kind, b.modules[path], path, tail, layout=layout, d_in=d, d_out=d, **more, **where)
        found.append((key, site))
    stream("in", b.path, "in", (place[b.path], -2), b.width_in)
    for rank, (x, c) in enumerate(b.claims):
        name, start = c["name"], c.get("after") or x
        claimed[x.path] |= {c.get("param", "weight"), x.bias if c.get("bias") is None else c["bias"]}
        site = weight(x, re.sub(r"expert\.\d+", "expert", name), modules=b.modules, **where, **c | dict(name=f"{at}.{name}"))
        found.append(((place[start.path], rank / 1e6), site))
    for p, x in b.leaves.items():
        found += [((place[p], 1), weight(x, "", "", b.modules, k, **where)) for k in x.params if k not in claimed[p]]
    for group, core, heads in b.attends:                            # in its fast path torch's layer passes its attention by
        path = up(core) if isinstance(b.modules[up(core)], nn.TransformerEncoderLayer) else core
        stream(group, path, "", (place[core], -1), kind="attend", heads=heads)
    for tail, path, layout, mid in b.streams:
        more = dict(d=b.leaves[path].d_in) if tail == "mlp.act" else {}
        stream(tail, path, layout, (ends[path], 5) if layout == "out" else (place[path], -1), mid=mid, **more)
    stream("out", b.path, "out", (ends[b.path], 8))


def named(found):
    """Every name once (a second claim falls back to the parameter's path); each knows its block mates, and the other holders of a
    tied parameter."""
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
            found[i] = s = replace(s, tied=tuple(n for path, param, n in same if (path, param) != (s.path, s.param)))
        if s.block is not None:
            s.mates[s.name.split(f"block.{s.block}.", 1)[-1] if s.role else s.name] = s
    return found
