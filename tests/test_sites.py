"""Sites: in every architecture of the table, and the machinery around them."""

import copy
import pathlib
import re
import time
from collections import defaultdict

import architectures
import pytest
import torch
from architectures import TABLE, built, feed
from torch import nn
from torch.func import functional_call

import luthier.anatomy
from luthier import attach, tiny
from luthier.errors import NoSuchSite
from luthier.site import Fixed, Site, Stack, find, sites

torch.set_num_threads(1)
FOUND = {}


def scanned(name):
    if name not in FOUND:
        FOUND[name] = sites(built(name))
    return FOUND[name]


def weights(name):
    return [s for s in scanned(name) if s.kind == "weight"]


def owner(site, param):
    """The module that holds a (dotted) parameter, and its name there."""
    *path, last = param.split(".")
    return site.module.get_submodule(".".join(path)), last


every = pytest.mark.parametrize("name", list(TABLE))


# ---- the table
def test_a_model_without_a_head_has_none():
    for name in ("bert-model", "clip", "imagegpt", "dinov2-giant", "flava"):
        assert "head" not in scanned(name).by_name, name


def test_at_least_sixty_architectures():
    assert len(TABLE) >= 60


@every
def test_roles(name):
    """What the paper describes is found; an ordinal may follow (embed.conv.0) or stand between (conv.1.norm)."""
    roles = {s.role for s in weights(name) if s.role}
    roles |= {r.rpartition(".")[0] for r in roles if r[-1].isdigit()}
    roles |= {re.sub(r"^conv\.\d+\.norm$", "conv.norm", r) for r in roles}
    assert not TABLE[name][1] - roles


@every
def test_every_parameter_exactly_once(name):
    """The sites partition every parameter: marking each site's part counts one everywhere."""
    counts = {(id(m), k): torch.zeros_like(p) for m in built(name).modules() for k, p in m._parameters.items() if p is not None}
    for s in weights(name):
        home, last = owner(s, s.param)
        key = id(home), last
        counts[key] = counts[key] + s.write(torch.zeros_like(counts[key]), torch.ones(s.d_out, s.d_in))
        if s.bias:
            home, last = owner(s, s.bias)
            key = id(home), last
            counts[key] = counts[key] + s.write_b(torch.zeros_like(counts[key]), torch.ones(s.d_out))
    named = {id(m): n for n, m in built(name).named_modules()}
    wrong = [f"{named[m]}.{k}" for (m, k), c in counts.items() if not bool((c == 1).all())]
    assert not wrong


@every
def test_read_and_write_are_exact(name):
    for s in weights(name):
        P, new = s.parameter.detach(), torch.randn(s.d_out, s.d_in)
        assert s.W.shape == (s.d_out, s.d_in)
        assert torch.equal(s.write(P, s.read(P)), P), s.name
        assert torch.equal(s.read(s.write(P, new)), new), s.name
        if s.bias:
            assert s.b.shape == (s.d_out,)
            assert torch.equal(s.read_b(s.write_b(torch.zeros_like(s.module.get_parameter(s.bias)), new[:, 0])), new[:, 0])


@every
def test_names_are_unique_ordered_and_stable(name):
    found = scanned(name)
    assert len({s.name for s in found}) == len(found)
    again = sites(built(name))
    assert [(s.name, s.path, s.param, s.tied) for s in again] == [(s.name, s.path, s.param, s.tied) for s in found]
    for stack in found.stacks:
        inner = [s for s in found if s.stack is stack and s.block is not None]
        assert [s.block for s in inner] == sorted(s.block for s in inner)
        assert {s.block for s in inner} == set(range(stack.n_blocks))
        for s in inner:
            assert s.peers[s.name.split(f"block.{s.block}.", 1)[-1] if s.role else s.name] is not None


@every
def test_paths_lead_to_modules(name):
    model = built(name)
    for s in scanned(name):
        assert model.get_submodule(s.path) is s.module
        assert s.d_in > 0 and s.d_out > 0 or s.parameter.numel() == 0
    for stack in scanned(name).stacks:
        assert isinstance(stack, Stack) and model.get_submodule(stack.path) is stack.module and stack.dim > 0
        assert all(any(m is b for m in stack.module.modules()) for b in stack.blocks)


NEVER = {"switch": "expert no token was sent to", "led": "_global", "sam": "prompt_encoder", "dpt": "residual_layer1",
         "esm": "contact_head",
         "flava": "_projection"}


@every
def test_every_module_of_a_site_is_called(name):
    """A site's module runs when the model runs: what is attached to it takes effect. Shared embeddings run as their twins."""
    called, hooks, shapes = set(), [], {}

    def note(module, args, out):
        called.add(id(module))
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, torch.Tensor):
            shapes[id(module)] = tuple(out.shape)
    for m in built(name).modules():
        hooks.append(m.register_forward_hook(note))
    with torch.no_grad():
        built(name)(**feed(name))
    for h in hooks:
        h.remove()
    silent = [s for s in scanned(name) if id(s.module) not in called and not s.tied and s.role]
    silent = [s for s in silent if name not in NEVER or not re.search(NEVER[name] + "|expert|embed.token", f"{s.path} {s.name}")]
    assert not [s.name for s in silent]
    for s in scanned(name):                                        # a stream is as wide as it says; maps are (B, C, H, W)
        if s.kind == "stream" and s.layout == "out" and s.role in ("out", "attn.out", "mlp.out",
            "cross.out") and id(s.module) in shapes:
            shape = shapes[id(s.module)]
            assert s.d_out in (shape[-1], shape[1]), (s.name, shape, s.d_out)


# ---- fused projections, against what the model itself computes
FUSED = ["gpt2", "gpt-neox", "bloom", "falcon", "falcon-40b", "falcon-rw", "gpt-bigcode", "gpt-bigcode-mha", "codegen",
         "persimmon", "mpt",
         "phi3", "modernbert", "deberta", "timm-vit", "timm-swin", "imagegpt", "hand-written", "qwen2-vl"]


@pytest.mark.parametrize("name", FUSED)
def test_fused_rows_are_what_the_model_splits(name):
    """Disturb one projection at token 0 only: a query moves that token's output alone; a key or value moves others; outputs are
    linear in values and not in keys."""
    here = scanned(name)
    tower = next((s.tower for s in here if s.role == "attn.q" and s.rows is not None), "")
    block = {r: next(s for s in here if s.role == f"attn.{r}" and s.tower == tower) for r in "qkvo"}
    assert block["q"].rows is not None and block["q"].module is block["k"].module
    fused = owner(block["q"], block["q"].param)[0]
    seen = {}
    hook = owner(block["o"], block["o"].param)[0].register_forward_pre_hook(lambda m, a: seen.update(x=a[0].detach().clone()))

    def run(site=None, size=1.0):
        def disturb(module, args, out):
            out, rows = out.clone(), site.rows
            rows = torch.arange(*rows) if isinstance(rows, tuple) else rows
            flat = out.view(-1, *out.shape[-2:]) if out.dim() > 2 else out[None]
            flat[:, 0, rows] += size * torch.linspace(-3, 3, len(rows))
            return out
        handle = fused.register_forward_hook(disturb) if site is not None else None
        with torch.no_grad():
            built(name)(**feed(name))
        if handle:
            handle.remove()
        x = seen["x"]
        return x.double().reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.double()[None]
    try:
        base = run()
        moved = {r: run(block[r]) - base for r in "qkv"}
        twice = {r: run(block[r], 2.0) - base for r in "kv"}
    finally:
        hook.remove()
    assert moved["q"][:, 0].abs().max() > 1e-6 or name in CAUSAL_FIRST(name)
    assert moved["q"][:, 1:].abs().max() < 1e-6
    for r in "kv":
        assert moved[r][:, 1:].abs().max() > 1e-6
    assert torch.allclose(twice["v"], 2 * moved["v"], atol=1e-5)
    assert not torch.allclose(twice["k"], 2 * moved["k"], atol=1e-5)


def CAUSAL_FIRST(name):
    """In a causal model token 0 sees itself only, whatever its query."""
    return [name] if scanned(name).stacks[-1].causal or scanned(name).stacks[0].causal else []


@pytest.mark.parametrize("name", ["phi3", "modernbert", "dinov2-giant", "glm4", "unet2d-condition", "cohere", "llama", "t5",
                                  "mt5"])
def test_gate_and_up(name):
    """What reaches `down` is linear in up and not in gate; without a gate it is not linear in up."""
    here = scanned(name)
    up = next(s for s in here if s.role == "mlp.up")
    gate = next((s for s in here if s.role == "mlp.gate" and s.path.rpartition(".")[0] == up.path.rpartition(".")[0]), None)
    down = next(s for s in here if s.role == "mlp.down" and s.stack is up.stack and s.block == up.block)
    x = torch.randn(2, 3, up.d_in)
    holder = built(name).get_submodule(luthier.anatomy.common([up.path, down.path]))
    holder = built(name).get_submodule(luthier.anatomy.common([up.path, down.path]).rpartition(".")[0]) if isinstance(holder,
        nn.ModuleList) else holder
    seen = {}
    hook = down.module.register_forward_pre_hook(lambda m, a: seen.update(x=a[0].detach()))

    def reach(site, factor):
        changed = {f"{site.path}.{site.param}": site.write(site.parameter, factor * site.W)}
        if site.bias:
            changed[f"{site.path}.{site.bias}"] = site.write_b(site.module.get_parameter(site.bias), factor * site.b)
        root = next(p for p, m in built(name).named_modules() if m is holder) + "."
        with torch.no_grad():
            functional_call(holder, {k.removeprefix(root): v for k, v in changed.items()}, (x,))
        return seen["x"]
    try:
        base = reach(up, 1.0)
        if gate is None:
            assert not torch.allclose(reach(up, -1.0), -base, atol=1e-6)        # an activation stands between (ReLU, GELU)
            return
        assert torch.allclose(reach(up, 2.0), 2 * base, atol=1e-5)
        assert not torch.allclose(reach(gate, -1.0), -base, atol=1e-6)
        assert torch.allclose(reach(gate, 0.0), torch.zeros_like(base), atol=1e-6)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "olmoe", "gpt-oss"])
def test_stacked_experts(name):
    """What the stacked experts compute is what the sites of one expert say; writing one leaves the others alone."""
    here = scanned(name)
    down = here["block.0.mlp.expert.1.down"]
    up, gate = here["block.0.mlp.expert.1.up"], here["block.0.mlp.expert.1.gate"]
    assert (up.d_in, down.d_out) == (32, 32) and up.d_out == gate.d_out == down.d_in and up.layout == "stack"
    P = down.parameter.detach()
    changed = down.write(P, 2 * down.W)
    others = [e for e in range(P.shape[0]) if e != 1]
    assert torch.equal(changed[others], P[others]) and torch.equal(changed[1], 2 * P[1])
    experts, x = down.module, torch.randn(1, 32)
    index, weight = torch.tensor([[1]]), torch.ones(1, 1)
    with torch.no_grad():
        h = x @ up.W.T + (0 if up.b is None else up.b)
        g = x @ gate.W.T + (0 if gate.b is None else gate.b)
        if name == "gpt-oss":
            g, h = g.clamp(max=experts.limit), h.clamp(-experts.limit, experts.limit) + 1
            g = g * torch.sigmoid(experts.alpha * g)
        else:
            g = torch.nn.functional.silu(g)
        want = (g * h) @ down.W.T + (0 if down.b is None else down.b)
        got = experts(x, index, weight)
    assert torch.allclose(got.reshape(want.shape), want, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_stacked_experts_are_kept_whole(name):
    """With biases and without: a method that asks for the bias gets that of one expert."""
    model, ids = copy.deepcopy(built(name)).eval(), torch.arange(10, 18)[None]
    with torch.no_grad():
        want = model(ids).logits
        tuned = attach(model, "full(at='mlp.expert.1.gate mlp.expert.*.down')").eval()
        assert torch.equal(tuned(ids).logits, want)
        tuned.states["0:full@block/0/mlp/expert/1/down"].W.mul_(2)
        assert not torch.equal(tuned(ids).logits, want) and torch.equal(tuned.merge()(ids).logits, tuned.unmerge()(ids).logits)


def test_torch_multihead_attention():
    """q, k, v rows of in_proj and the output projection reach torch's own attention."""
    m = nn.MultiheadAttention(8, 2, batch_first=True)
    holder = nn.ModuleDict({"only": nn.ModuleDict({"attn": m, "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})})
    here = {s.role: s for s in sites(nn.Sequential(holder["only"])) if s.kind == "weight"}
    x = torch.randn(1, 3, 8)
    q, k, v = (x @ here[f"attn.{r}"].W.T + here[f"attn.{r}"].b for r in "qkv")
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = y @ here["attn.o"].W.T + here["attn.o"].b
    assert torch.allclose(y, m(x, x, x, need_weights=False)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "nn.Transformer", "wavlm", "timm-beit", "deberta", "mamba", "siglip"])
def test_a_weight_that_another_module_reads_takes_effect(name):
    """Where a layer's own forward is never called, what is written into its site still changes what the model computes."""
    model, given = built(name), feed(name)
    raw = [s for s in weights(name) if s.layout == "raw" and "." in s.param and re.match("attn|cross|mlp|ssm", s.role)]
    raw = raw or [s for s in weights(name) if s.param == "out_proj.weight"]
    assert raw

    def run(changed):
        with torch.no_grad():
            out = functional_call(model, changed, kwargs=given)
        out = out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else next(iter(out.values()))
        return out.double()
    base, scale = run({}), {}
    for s in raw[:8]:
        path = f"{s.path}.{s.param}" if s.path else s.param
        scale[s.name] = float((run({path: s.write(s.parameter.detach(), 3 * s.W + 0.1)}) - base).abs().max())
    assert all(v > 0 for v in scale.values()), scale


# ---- shapes of particular kinds
def test_layouts():
    gpt2, resnet = scanned("gpt2"), scanned("resnet")
    up = gpt2["block.0.mlp.up"]
    assert up.layout == "conv1d" and torch.equal(up.W, up.module.weight.detach().T)
    token = gpt2["embed.token"]
    assert token.layout == "embedding" and (token.d_out, token.d_in) == (32, 60)
    conv = next(s for s in resnet if s.role == "conv.1")
    assert conv.W.shape == (conv.module.out_channels, conv.module.in_channels * 9)
    assert gpt2["final.norm"].W.shape == (32, 1)
    assert scanned("hand-written")["curious"].W.shape == (3, 1)
    assert scanned("clip")["logit_scale"].W.shape == (1, 1)


def test_grouped_query_heads():
    here = scanned("llama")
    assert here["block.0.attn"].heads == here["block.0.attn.k"].heads == (4, 2, 8)
    assert here["block.0.attn.k"].d_out == 16 and scanned("falcon")["block.0.attn.v"].heads == (4, 1, 8)


TIES = {"gpt2": {("embed.token", "head")}, "t5": {("embed.token", "encoder.embed.token", "decoder.embed.token", "head")},
        "bart": {("embed.token", "encoder.embed.token", "decoder.embed.token", "head")}, "llama": set(), "bert": set()}


@pytest.mark.parametrize("name", TIES)
def test_tied(name):
    groups = defaultdict(list)
    for s in weights(name):
        groups[id(s.parameter)].append(s.name)
    shared = {tuple(sorted(g)) for g in groups.values() if len(g) > 1 and "attn" not in g[0]}
    assert shared == {tuple(sorted(t)) for t in TIES[name]}
    for s in weights(name):
        others = {t for g in TIES[name] if s.name in g for t in g if t != s.name}
        assert set(s.tied) == others


# ---- stacks
#        name: {tower: (class of stack.module, causal, fixed, embed, n_blocks, class of the final module or None)}
STACKS = {
    "gpt2": {"": ("GPT2Model", True, 0, "ids", 2, "LayerNorm")},
    "llama": {"": ("LlamaModel", True, 0, "ids", 2, "LlamaRMSNorm")},
    "bert": {"": ("BertModel", False, 1, "out", 2, None)},
    "roberta": {"": ("RobertaModel", False, 1, "out", 2, None)},
    "distilbert": {"": ("DistilBertModel", False, 1, "out", 2, None)},
    "esm": {"": ("EsmModel", False, 1, "out", 2, "LayerNorm")},
    "openai-gpt": {"": ("OpenAIGPTModel", True, 0, "ids", 2, None)},
    "bloom": {"": ("BloomModel", True, 0, "ids", 2, "LayerNorm")},
    "opt": {"": ("OPTDecoder", True, 0, "ids", 2, "LayerNorm")},
    "mamba": {"": ("MambaModel", True, 0, "ids", 2, "MambaRMSNorm")},
    "rwkv": {"": ("RwkvModel", True, 0, "ids", 2, "LayerNorm")},
    "vit": {"": ("ViTModel", False, 1, "out", 2, "LayerNorm")},
    "deit": {"": ("DeiTModel", False, 2, "out", 2, "LayerNorm")},
    "dinov2": {"": ("Dinov2Model", False, 1, "out", 2, "LayerNorm")},
    "dinov2-reg": {"": ("Dinov2WithRegistersModel", False, 5, "out", 2, "LayerNorm")},
    "timm-vit": {"": ("VisionTransformer", False, 1, "out", 2, "LayerNorm")},
    "timm-vit-reg": {"": ("VisionTransformer", False, 5, "out", 2, "LayerNorm")},
    "t5": {"encoder": ("T5Stack", False, 0, "ids", 2, "T5LayerNorm"), "decoder": ("T5Stack", True, 0, "ids", 2, "T5LayerNorm")},
    "bart": {"encoder": ("BartEncoder", False, 0, "ids", 2, None), "decoder": ("BartDecoder", True, 0, "ids", 2, None)},
    "whisper": {"encoder": ("WhisperEncoder", False, 0, "in", 2, "LayerNorm"),
                "decoder": ("WhisperDecoder", True, 0, "ids", 2, "LayerNorm")},
    "clip": {"vision": ("CLIPVisionModel", False, 1, "out", 2, None), "text": ("CLIPTextModel", True, 0, "out", 2, "LayerNorm")},
    "siglip": {"vision": ("SiglipVisionModel", False, 0, "out", 2, "LayerNorm"),
               "text": ("SiglipTextModel", False, 0, "out", 2, "LayerNorm")},
    "llava": {"vision": ("CLIPVisionModel", False, 1, "out", 2, None), "text": ("LlamaModel", True, 0, "ids", 2, "LlamaRMSNorm")},
    "blip-vqa": {"vision": ("BlipVisionModel", False, 1, "out", 2, None), "encoder": ("BlipTextModel", False, 0, "out", 2, None),
                 "decoder": ("BlipTextModel", True, 0, "out", 2, None)},
    "flava": {"vision": ("FlavaImageModel", False, 1, "out", 2, "LayerNorm"),
              "text": ("FlavaTextModel", False, 1, "out", 2, "LayerNorm"),
              "fusion": ("FlavaMultimodalModel", False, 1, "in", 2, "LayerNorm")},
    "wav2vec2": {"": ("Wav2Vec2Model", False, 0, "out", 2, None)},
    "resnet": {"": ("ResNetModel", False, 0, "out", 3, None)},
    "hand-written": {"": ("Hand", True, 0, "ids", 2, "LayerNorm")},
    "hand-blocks": {"": ("Numbered", True, 0, "out", 2, None)},
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name):
    got = {k.name: (type(k.module).__name__, k.causal, k.fixed, k.embed, k.n_blocks,
                    k.final_module and type(k.final_module).__name__)
           for k in scanned(name).stacks}
    assert got == STACKS[name]


INSERT = {"swin": "windows", "resnet": "map", "convnext": "map", "timm-mixer": "token-mixing", "segformer": "map",
          "beit": "bias", "mobilevit": "map"}


@pytest.mark.parametrize("name", [*INSERT, "bert", "gpt2", "llama", "t5", "vit", "dinov2", "clip", "timm-vit", "mamba"])
def test_where_tokens_may_be_inserted(name):
    reason = scanned(name).stacks[0].insert
    assert INSERT[name] in reason if name in INSERT else reason == ""


def test_cross_and_rope():
    assert [k.cross for k in scanned("t5").stacks] == [False, True]
    assert scanned("llama").stacks[0].rope and scanned("gpt-j").stacks[0].rope and not scanned("gpt2").stacks[0].rope


# ---- streams
def test_an_attention_that_torch_may_pass_by_is_reached_through_its_layer():
    here = scanned("nn.TransformerEncoder")
    assert isinstance(here["block.0.attn"].module, nn.TransformerEncoderLayer)


def test_streams_of_a_block():
    names = [s.name for s in scanned("llama") if s.kind != "weight"]
    block = ["in", "attn", "attn.out", "mid", "mlp.in", "mlp.act", "mlp.out", "out"]
    assert names == ["embed", *[f"block.{i}.{n}" for i in range(2) for n in block], "final"]


def test_streams_stand_before_the_residual_is_added():
    bert, bloom, bart = scanned("bert"), scanned("bloom"), scanned("bart")
    assert bert["block.0.attn.out"].path.endswith("attention.output.dense")
    assert bert["block.0.attn"].path.endswith("attention.self")
    assert bert["block.0.mlp.out"].path.endswith("layer.0.output.dense")
    assert bloom["block.0.attn.out"].path.endswith("dense") and bloom["block.0.mlp.out"].path.endswith("dense_4h_to_h")
    assert bart["encoder.block.0.mlp.out"].path.endswith("fc2")


def test_mid():
    for name in ("llama", "gpt2", "vit", "dinov2", "timm-vit", "hand-written"):
        mid = scanned(name)["block.0.mid"]
        norm, mlp, block = mid.mid
        assert mid.layout == "mid" and norm is mid.module and block is scanned(name)["block.0.in"].module
    assert scanned("bert")["block.0.mid"].layout == "out" and scanned("t5")["encoder.block.0.mid"].layout == "in"
    for name in ("gpt-j", "phi", "falcon", "gpt-neox", "cohere"):             # attention and MLP side by side: nothing in between
        assert "block.0.mid" not in scanned(name).by_name


@pytest.mark.parametrize("name", ["bert", "roberta", "bart", "distilbert", "openai-gpt", "nn.Transformer"])
def test_mid_of_a_post_norm_block_is_what_the_mlp_reads(name):
    seen, here = {}, [s for s in scanned(name) if s.block == 0]
    mid, mlp = (next(s for s in here if s.role == r) for r in ("mid", "mlp.in"))
    a = mid.module.register_forward_hook(lambda m, i, o: seen.update(mid=o))
    b = mlp.module.register_forward_pre_hook(lambda m, i: seen.update(mlp=i[0]))
    built(name)(**feed(name))
    a.remove(), b.remove()
    assert torch.equal(seen["mid"], seen["mlp"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "dinov2", "t5", "opt", "mbart", "timm-vit", "bloom"])
def test_mid_of_a_pre_norm_block_is_the_merged_stream(name):
    """mid is the block's input plus the attention's output (with LayerScale when there is one)."""
    seen, here = {}, [s for s in scanned(name) if s.block == 0]
    at = {r: next(s for s in here if s.role == r) for r in ("mid", "in", "attn.out")}

    def first(o):
        return o[0] if isinstance(o, tuple) else o
    hooks = [at["mid"].module.register_forward_pre_hook(lambda m, i: seen.update(mid=i[0])),
             at["in"].module.register_forward_pre_hook(lambda m, i, k: seen.update({"in": i[0] if i else k["hidden_states"]}),
                 with_kwargs=True),
             at["attn.out"].module.register_forward_hook(lambda m, i, o: seen.update(out=first(o)))]
    with torch.no_grad():
        built(name)(**feed(name))
    for h in hooks:
        h.remove()
    assert torch.allclose(seen["mid"].flatten(), (seen["in"] + seen["out"]).flatten(), atol=1e-5)


# ---- selectors
def names(name, selector):
    return [s.name for s in find(built(name), selector)]


def test_selectors():
    assert names("llama", "attn.q attn.v") == ["block.0.attn.q", "block.0.attn.v", "block.1.attn.q", "block.1.attn.v"]
    assert names("llama", "attn.v attn.q") == names("llama", "attn.q attn.v")
    assert names("llama", "block.-1.out") == ["block.1.out"] and names("llama", "block.1-.out") == ["block.1.out"]
    assert names("llama", "block.0-1.attn.q -block.1.attn.q") == ["block.0.attn.q"]
    assert names("llama", "attn") == ["block.0.attn", "block.1.attn"] and names("llama", "attn.out") == ["block.0.attn.out",
        "block.1.attn.out"]
    assert names("llama", "embed") == ["embed"] and names("llama", "head") == ["head"] and names("llama",
        "embed.*") == ["embed.token"]
    assert names("llama", "block.*.mlp.*e")[:2] == ["block.0.mlp.gate", "block.1.mlp.gate"]
    assert names("llama", "norm") == ["block.0.attn.norm", "block.0.mlp.norm", "block.1.attn.norm", "block.1.mlp.norm",
                                      "final.norm"]
    assert len(names("llama", "linear")) == 14 and len(names("llama", "weights")) == 18 and len(names("llama", "all")) == 21
    assert names("mixtral", "block.0.mlp.expert.1-2.up") == ["block.0.mlp.expert.1.up", "block.0.mlp.expert.2.up"]
    assert len(names("mixtral", "linear")) == 2 * (4 + 3 * 4)
    assert names("gpt2", "linear -mlp.*") == [f"block.{i}.attn.{r}" for i in range(2) for r in "qkvo"]
    assert all(s.bias for s in find(built("gpt2"), "bias")) and len(names("gpt2", "bias")) == 17
    assert all(s.layout == "conv" for s in find(built("resnet"), "conv"))
    assert names("hand-written", "curious") == ["curious"]


def test_selectors_with_towers():
    both = names("clip", "attn.q")
    assert both == [f"{t}.block.{i}.attn.q" for t in ("vision", "text") for i in range(2)]
    assert names("clip", "vision.attn.q") == both[:2] == names("clip", "vision.block.*.attn.q")
    assert names("clip", "vision.block.-1.attn.q") == both[1:2] and names("clip",
        "text.linear -text.mlp.*")[0] == "text.block.0.attn.q"
    assert names("t5", "decoder.cross.q") == ["decoder.block.0.cross.q", "decoder.block.1.cross.q"]


def test_star_never_crosses_a_dot():
    assert names("llama", "block.0.*") == ["block.0.in", "block.0.attn", "block.0.mid", "block.0.out"]
    for word in ("block.*", "block*q", "*", "b*"):
        with pytest.raises(NoSuchSite):
            find(built("gpt-j"), word) if word != "*" else find(nn.Sequential(nn.Linear(2, 2)), "block.*")


@pytest.mark.parametrize("selector,near", [("attnq", "attn.q"), ("mlp.upp", "mlp.up"), ("block.0.attn.qq", "attn.q"),
    ("haed", "head"),
                                           ("block.7.attn.q", "attn.q"), ("vision.attn.q", "attn.q")])
def test_no_match_names_the_nearest(selector, near):
    with pytest.raises(NoSuchSite, match="LlamaForCausalLM") as error:
        find(built("llama"), selector)
    assert near in str(error.value) and "luthier sites" in str(error.value) and selector in str(error.value)


def test_selecting_nothing_is_an_error():
    for selector in ("", "attn.q -attn.q", "-head", "linear -attn.qq"):
        with pytest.raises(NoSuchSite):
            find(built("llama"), selector)


# ---- the scan as such
def big_llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=32, num_attention_heads=4, intermediate_size=64,
            vocab_size=99))


def test_speed():
    """224 linear sites in under 30 ms, and a selector in far less."""
    model = big_llama()
    assert len(find(model, "linear")) == 224

    def best(run):
        took = []
        for _ in range(7):
            start = time.process_time()
            run()
            took.append(time.process_time() - start)
        return min(took)
    found = sites(model)
    assert best(lambda: sites(model)) < 0.030
    assert best(lambda: find(found, "attn.q attn.v mlp.*")) < 0.010


def test_the_scan_leaves_the_model_alone():
    model = architectures.Hand()
    before = copy.deepcopy(model.state_dict())
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    sites(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_sees_through_wrappers():
    class Tuned(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.chain = model, ()
    model = built("llama")
    assert [s.name for s in sites(Tuned(model))] == [s.name for s in scanned("llama")]
    assert [s.name for s in sites(torch.compile(model))] == [s.name for s in scanned("llama")]


def test_a_patched_forward_changes_nothing():
    model = architectures.Hand()
    names = [(s.name, s.path) for s in sites(model)]
    for m in model.modules():
        m.forward = lambda *a, **k: None
    assert [(s.name, s.path) for s in sites(model)] == names


def test_models_without_any_structure():
    assert [s.name for s in sites(nn.Linear(3, 2))] == ["weight"] or [s.name for s in sites(nn.Linear(3, 2))] == ["head"]
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert {s.path for s in sites(plain)} == {"0", "2"} and sites(plain).stacks == ()
    assert list(sites(nn.Identity())) == []
    assert [s.name for s in sites(nn.ParameterList([nn.Parameter(torch.ones(2))]))] == ["0"]


# ---- helpers for init
def bound(seed=0, step=0, name="block.0.attn.q", pool=None):
    return scanned("llama")[name].bound(seed, step, {} if pool is None else pool, 4, 2)


def test_draws_depend_on_seed_step_name_and_call_only():
    a, b = bound(), bound()
    first = a.normal(3, 4)
    assert isinstance(first, nn.Parameter) and first.requires_grad and torch.equal(first, b.normal(3, 4))
    assert not torch.equal(first, a.normal(3, 4))                   # the next call
    torch.manual_seed(5)
    assert torch.equal(first, bound().normal(3, 4))
    for other in (bound(seed=1), bound(step=1), bound(name="block.1.attn.q")):
        assert not torch.equal(first, other.normal(3, 4))
    assert (a.n_sites, a.rank_of, a.peers["attn.k"].name) == (4, 2, "block.0.attn.k")


def test_draws_have_their_distribution():
    s = bound()
    assert abs(float(s.normal(4000, std=2.0).detach().std()) - 2) < 0.1
    u = s.uniform(4000, bound=0.5).detach()
    assert float(u.abs().max()) <= 0.5 and abs(float(u.mean())) < 0.03
    r = s.random(5, 5)
    assert not isinstance(r, nn.Parameter) and not r.requires_grad
    assert isinstance(s.fixed(r), Fixed) and s.fixed(r).value is r
    assert not bool(s.zeros(2).any()) and bool((s.ones(2) == 1).all())


def test_draws_take_dtype_and_device_of_the_site():
    half = sites(copy.deepcopy(built("llama")).bfloat16())
    assert half["block.0.attn.q"].normal(2).dtype == torch.bfloat16 == half["block.0.out"].normal(2).dtype
    meta = sites(big_llama())
    assert meta["block.0.attn.q"].normal(2,
        2).is_meta and meta["block.0.out"].zeros(2).is_meta and meta["block.0.attn.q"].W.shape == (64, 64)


def test_shared_state_is_the_very_same_object():
    pool, made = {}, []
    a, b = bound(pool=pool), bound(name="block.1.attn.q", pool=pool)
    x = a.shared("basis", lambda: made.append(1) or a.normal(3))
    assert b.shared("basis", lambda: made.append(1) or b.normal(3)) is x and made == [1]
    assert a.shared("basis", lambda: a.normal(3), group=1) is not x


def test_write_carries_gradients():
    for name, key in (("gpt2", "block.0.attn.k"), ("gpt-neox", "block.0.attn.k"), ("mixtral", "block.0.mlp.expert.1.up")):
        s = scanned(name)[key]
        new = s.W.clone().requires_grad_()
        s.write(s.parameter.detach(), new).square().sum().backward()
        assert torch.allclose(new.grad, 2 * s.W)


def test_a_site_says_what_it_is():
    s = scanned("llama")["block.0.attn.q"]
    assert isinstance(s, Site) and "block.0.attn.q" in repr(s)


# ---- the page
def test_the_page_is_fresh():
    page = pathlib.Path(__file__).parent.parent / "docs" / "sites.md"
    assert page.read_text() == architectures.table(), "docs/sites.md is stale: run python tests/architectures.py"


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_change_of_the_token_embedding_reaches_the_output(name):
    """T5 keeps the table under four names, and runs those in its towers."""
    model, batch = tiny.build(name), tiny.batch(name)
    before = tiny.output(model, batch)
    tuned = attach(model, "full(at='embed.token')").eval()
    for _, p in tuned.trainable():
        p.data *= 1.5
    assert not torch.allclose(tiny.output(tuned, batch), before)
