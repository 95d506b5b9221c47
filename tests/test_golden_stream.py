"""Methods that change token streams and attention cores: by hand, against independent modules, against peft, by brute force."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from luthier._compat import torchvision
from luthier.attach import attach
from luthier.chain import parse
from luthier.errors import BadChain, DoesNotFit
from luthier.methods.adapter.adaptformer import adaptformer
from luthier.methods.adapter.houlsby import houlsby
from luthier.methods.adapter.petl import petl
from luthier.methods.attention.prefix import prefix
from luthier.methods.tokens.pitome import energy, pitome
from luthier.state import State
from luthier.tokens import Attention, Tokens

torchvision()
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def model(name, seed=0):
    torch.manual_seed(seed)
    if name == "gpt2":
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    elif name == "llama":
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64))
    elif name == "bert":
        made = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **STILL, max_position_embeddings=64))
    elif name == "vit":
        made = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **STILL, image_size=32, patch_size=8))
    elif name == "t5":
        made = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=97, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0, decoder_start_token_id=0))
    with torch.no_grad():                                   # random initial weights are too small to show a fault
        for p in made.parameters():
            p.mul_(3) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return made.eval()


def batch(name):
    g = torch.Generator().manual_seed(1)
    if name == "vit":
        return dict(pixel_values=torch.randn(2, 3, 32, 32, generator=g))
    ids = dict(input_ids=torch.randint(1, 97, (2, 9), generator=g))
    return ids | dict(decoder_input_ids=torch.randint(1, 97, (2, 5), generator=g)) if name == "t5" else ids


def stir(tuned, std=0.2):
    """Leave the initial values, where half of a method is silent."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in tuned.trainable():
            p.add_(std * torch.randn(p.shape, generator=g))
    return tuned


def states(tuned, method):
    return {p.site_name: p for p in tuned.states.values() if p.key.endswith(":" + method)}


def state(**tensors):
    return State(tensors, "0:test", "here")


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# -- bottlenecks ----------------------------------------------------------------------------------------------------


def test_houlsby_by_hand():
    p = state(D=torch.tensor([[0.5, -0.25]]), d=torch.tensor([0.1]), U=torch.tensor([[1.0], [2.0]]), u=torch.tensor([0.0, 0.5]))
    h = houlsby().stream(Tokens(torch.tensor([[[1.0, 2.0]]])), p).h
    z = 0.1 * 0.5 * (1 + math.erf(0.1 / math.sqrt(2)))     # gelu(0.5·1 - 0.25·2 + 0.1)
    close(h, torch.tensor([[[1 + z, 2 + 2 * z + 0.5]]]))


class Bottleneck(nn.Module):                               # an independent adapter behind a layer
    def __init__(self, layer, p, act, scale=1.0, beside=False):
        super().__init__()
        self.layer, self.scale, self.beside, self.act = layer, scale, beside, act
        self.down, self.up = nn.Linear(*p.D.T.shape), nn.Linear(*p.U.T.shape)
        self.load_state_dict({"down.weight": p.D, "down.bias": p.d, "up.weight": p.U, "up.bias": p.u}, strict=False)

    def forward(self, x):
        y = self.layer(x)
        return y + self.scale * self.up(self.act(self.down(x if self.beside else y)))


@pytest.mark.parametrize("norms", [True, False])
def test_houlsby_in_bert(norms):
    base, b = model("bert"), batch("bert")
    twin = copy.deepcopy(base)
    tuned = stir(attach(base, f"houlsby(width=5, norms={norms})"))
    got = states(tuned, "houlsby")
    for i, layer in enumerate(twin.bert.encoder.layer):
        layer.attention.output.dense = Bottleneck(layer.attention.output.dense, got[f"block.{i}.attn.out"], nn.GELU())
        layer.output.dense = Bottleneck(layer.output.dense, got[f"block.{i}.mlp.out"], nn.GELU())
        for name, norm in (("attn.norm", layer.attention.output.LayerNorm), ("mlp.norm", layer.output.LayerNorm)):
            if norms:
                norm.weight.data += got[f"block.{i}.{name}"].g[:, 0]
                norm.bias.data += got[f"block.{i}.{name}"].s
    if norms:
        twin.bert.embeddings.LayerNorm.weight.data += got["embed.norm"].g[:, 0]
        twin.bert.embeddings.LayerNorm.bias.data += got["embed.norm"].s
    assert any("norm" in n for n in got) is norms
    close(tuned(**b).logits, twin(**b).logits)


def test_houlsby_std_sets_the_start():
    wide, narrow = (states(attach(model("vit"), f"houlsby(std={s})"), "houlsby")["block.0.mlp.out"].D for s in (0.1, 0.01))
    close(wide, 10 * narrow)
    assert 0.008 < narrow.std() < 0.012


def test_adaptformer_by_hand():
    D, U = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 5.0], [2.0, 5.0]])
    p = state(D=D, d=torch.zeros(2), U=U, u=torch.zeros(2))
    m, t = adaptformer(), Tokens(torch.tensor([[[1.0, 2.0]]]))
    t = m.stream(t, State({}, "0:test", "there"))
    out = m.stream(t.map_h(lambda h: torch.zeros_like(h)), p).h        # relu([3, -1]) = [3, 0]
    close(out, torch.tensor([[[0.3, 0.6]]]))


@pytest.mark.parametrize("parallel", [True, False])
def test_adaptformer_in_vit(parallel):
    base, b = model("vit"), batch("vit")
    twin = copy.deepcopy(base)
    tuned = stir(attach(base, f"adaptformer(width=5, scale=0.3, parallel={parallel})"))
    got = states(tuned, "adaptformer")
    for i, layer in enumerate(twin.vit.layers):
        layer.mlp = Bottleneck(layer.mlp, got[f"block.{i}.mlp.out"], nn.ReLU(), 0.3, beside=parallel)
    close(tuned(**b).logits, twin(**b).logits)
    D = states(attach(model("vit"), "adaptformer()"), "adaptformer")["block.0.mlp.out"].D
    assert D.shape == (64, 32) and D.abs().max() <= 32**-0.5 and D.abs().max() > 0.9 * 32**-0.5


# -- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompt_equals_peft(name):
    peft = pytest.importorskip("peft")
    base, b = model(name), batch(name)
    b["attention_mask"] = torch.ones_like(b["input_ids"])
    other = peft.get_peft_model(copy.deepcopy(base), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    tuned = attach(base, "prompt(n=4)")
    other.prompt_encoder["default"].embedding.weight.data.copy_(states(tuned, "prompt")["embed"].P)
    close(tuned(**b).logits, other(**b).logits[:, 4:])


def test_prompt_starts_as_words():
    base = model("gpt2")
    P = states(attach(base, "prompt(n=12)"), "prompt")["embed"].P
    rows = [(base.transformer.wte.weight == r).all(1).nonzero().item() for r in P]
    assert len(set(rows)) == 12
    P = states(attach(base, "prompt(n=50, vocab=False, std=0.5)", name="other"), "prompt")["embed"].P
    assert 0.45 < P.std() < 0.55
    assert [*states(attach(model("t5"), "prompt(n=3)"), "prompt")] == ["encoder.embed"]


@pytest.mark.parametrize("deep", [True, False])
def test_vpt_by_hand_written_forward(deep):
    base, b = model("vit"), batch("vit")
    with torch.no_grad():
        tuned = attach(base, f"vpt(n=4, deep={deep})")
        P = [p.P for p in states(tuned, "vpt").values()]
        got = tuned(**b).logits
        tuned.detach()
        h = base.vit.embeddings(b["pixel_values"])
        for i, layer in enumerate(base.vit.layers):
            if i == 0:
                h = torch.cat([h[:, :1], P[0].expand(2, -1, -1), h[:, 1:]], 1)
            elif deep:
                h = torch.cat([h[:, :1], P[i].expand(2, -1, -1), h[:, 5:]], 1)
            h = layer(h)
        close(got, base.classifier(base.vit.layernorm(h)[:, 0]))
    bound = math.sqrt(6 / (3 * 8 * 8 + 32))
    assert len(P) == (3 if deep else 1)
    assert all(0.8 * bound < p.abs().max() <= bound for p in P)


def test_vpt_finds_the_patch_size_in_timm():
    timm = pytest.importorskip("timm")
    tuned = attach(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval(), "vpt(n=20)")
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    assert [*states(tuned, "vpt")] == ["embed", "block.1.in"]
    assert all(0.99 * bound < p.P.abs().max() <= bound for p in states(tuned, "vpt").values())


# -- prefixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, reparam", [("gpt2", False), ("gpt2", True), ("llama", False)])
def test_prefix_equals_peft(name, reparam):
    """peft puts the prefix where a KV cache would be, and so shifts all positions by n; with the same shift both agree. (Under
    grouped queries peft narrows the whole MLP to the key/value width, so there only the direct form can be compared.)"""
    peft = pytest.importorskip("peft")
    base, b, n = model(name), batch(name), 3
    b["attention_mask"] = torch.ones_like(b["input_ids"])
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n, prefix_projection=reparam,
                                     encoder_hidden_size=7)
    other = peft.get_peft_model(copy.deepcopy(base), config).eval()
    tuned = stir(attach(base, f"prefix(n={n}, reparam={reparam}, mid=7)"))
    got, theirs = [*states(tuned, "prefix").values()], other.prompt_encoder["default"]
    if reparam:
        theirs.embedding.weight.data.copy_(got[0].E)
        theirs.transform[0].weight.data.copy_(got[0].W)
        theirs.transform[0].bias.data.copy_(got[0].w)
        theirs.transform[2].weight.data.copy_(torch.cat([p.Wl for p in got]))
        theirs.transform[2].bias.data.copy_(torch.cat([p.wl for p in got]))
    else:
        rows = torch.stack([torch.stack([p.K, p.V], 1) for p in got], 1)           # (n, layers, 2, Hkv, Dh)
        theirs.embedding.weight.data.copy_(rows.flatten(1))
    shifted = torch.arange(n, n + 9).expand(2, -1)
    close(tuned(**b, position_ids=shifted).logits, other(**b).logits)
    assert (tuned(**b).logits - other(**b).logits).abs().max() > 1e-4              # and without it they differ


def test_prefix_shares_its_mlp_and_starts_as_the_authors_do():
    tuned = attach(model("llama"), "prefix(n=200, mid=30)")
    first, *rest = states(tuned, "prefix").values()
    assert all(p.E is first.E and p.W is first.W and p.w is first.w for p in rest)
    assert first.Wl.shape == (2 * 2 * 8, 30) and 0.95 < first.E.std() < 1.05
    assert first.W.abs().max() <= 32**-0.5 and first.Wl.abs().max() <= 30**-0.5
    direct = states(attach(model("llama"), "prefix(n=200, reparam=False, std=0.3)"), "prefix")["block.0.attn"]
    assert direct.K.shape == (200, 2, 8) and 0.28 < direct.K.std() < 0.32


# -- the unified view -----------------------------------------------------------------------------------------------


def pair(name, one, other, rename):
    """Logits of two chains with the same tensors: rename maps a tensor of `other` to one of `one`."""
    outs, first = [], None
    for chain in (one, other):
        tuned = attach(model(name), chain)
        own = [p for p in tuned.states.values() if p._parameters or p._buffers]
        if first is None:
            stir(tuned)
            first = own
            for p in own:                                   # the paper's forms have no biases
                for n in ("d", "u"):
                    if n in p._parameters:
                        p._parameters[n].data.zero_()
        else:
            for p, q in zip(own, first, strict=True):
                for n, source in rename.items():
                    getattr(p, n).data.copy_(getattr(q, source))
        outs.append(tuned(**batch(name)).logits)
    close(outs[0], outs[1])
    return outs[0]


SAME = {"D": "D", "U": "U"}
GATED = "petl(at='attn', form='softmax', composition='gated', width=5)"


@pytest.mark.parametrize("name, one, other, rename", [
    ("llama", "lora(rank=3, alpha=6)", "petl(at='attn.q attn.v', form='linear', scale=2, width=3)", {"D": "A", "U": "B"}),
    ("vit", "adaptformer(width=5, scale=4)", "petl(width=5)", SAME),
    ("vit", "adaptformer(width=5, scale=1)", "petl(width=5, composition='add')", SAME),
    ("vit", "adaptformer(width=5, scale=4, parallel=False)", "petl(width=5, insertion='sequential')", SAME),
    ("llama", "prefix(n=5, reparam=False)", GATED, {"D": "K", "U": "V"}),
    ("bert", "prefix(n=5, reparam=False)", GATED, {"D": "K", "U": "V"}),
])
def test_petl_yields(name, one, other, rename):
    with torch.no_grad():
        pair(name, one, other, rename)


def test_petl_as_a_weight():
    p, W, x = state(D=torch.randn(2, 6), U=torch.randn(4, 2)), torch.randn(4, 6), torch.randn(3, 6)
    m = petl(at="attn.q", form="linear", scale=0.5, width=2)
    close(m.weight(W, p), W + 0.5 * p.U @ p.D)
    close(m.fast(x, x @ W.T, p), x @ m.weight(W, p).T)


def test_petl_yields_the_sequential_adapter():
    """Houlsby's adapter has gelu where the view has relu: the two differ by that and nothing else."""
    base, b = model("bert"), batch("bert")
    twin = copy.deepcopy(base)
    tuned = stir(attach(base, "petl(at='attn.out mlp.out', insertion='sequential', composition='add', width=5)"))
    got = states(tuned, "petl")
    for p in got.values():
        p.d, p.u = torch.zeros(5), torch.zeros(32)
    for i, layer in enumerate(twin.bert.encoder.layer):
        layer.attention.output.dense = Bottleneck(layer.attention.output.dense, got[f"block.{i}.attn.out"], nn.ReLU())
        layer.output.dense = Bottleneck(layer.output.dense, got[f"block.{i}.mlp.out"], nn.ReLU())
    close(tuned(**b).logits, twin(**b).logits)


def core(masked=True):
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    return Attention(q, k, v, mask=torch.rand(2, 1, 6, 6) > 0.3 if masked else None, causal=not masked, grouped=True)


@pytest.mark.parametrize("masked", [True, False])
def test_gated_form_is_the_prefix(masked):                  # paper eq. 5-7: λ moves weight from the sequence to the prefix
    K, V = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    a = core(masked)
    one = prefix(reparam=False).attend(a, state(K=K, V=V)).run()
    two = petl(at="attn", form="softmax", composition="gated", width=3).attend(a, state(D=K, U=V))
    assert (one - two).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["relu", "linear", "softmax"])
def test_petl_heads_by_loops(form):
    """The multi-head adapter: every head reads its own query, without a gate."""
    a, D, U = core(), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    got = petl(at="attn", form=form, composition="scaled", scale=2.0, width=3).attend(a, state(D=D, U=U))
    base, want = a.run(), torch.empty(2, 4, 6, 8)
    for b in range(2):
        for h in range(4):
            for t in range(6):
                z = D[:, h // 2] @ a.q[b, h, t]
                z = {"relu": z.clamp(min=0), "linear": z, "softmax": torch.softmax(z / math.sqrt(8), 0)}[form]
                want[b, h, t] = base[b, h, t] + 2 * z @ U[:, h // 2]
    close(got, want)


@pytest.mark.parametrize("form", ["softmax", "linear"])
def test_petl_streams(form):
    p, h = state(D=torch.randn(3, 8), U=torch.randn(8, 3)), torch.randn(1, 4, 8)
    got = petl(at="mlp.out", form=form, insertion="sequential", composition="add").stream(Tokens(h), p).h
    z = h @ p.D.T
    close(got, h + (z.softmax(-1) if form == "softmax" else z) @ p.U.T)


@pytest.mark.parametrize("text", ["form='tanh'", "insertion='besides'", "composition='mul'"])
def test_petl_knows_its_words(text):
    with pytest.raises(BadChain, match="must be one of"):
        parse(f"petl({text})")


@pytest.mark.parametrize("text", ["at='attn.q'", "at='mlp.out', composition='gated'", "at='attn', composition='gated'",
                                  "at='attn', insertion='sequential'", "at='attn.q', form='linear', insertion='sequential'"])
def test_petl_refuses_what_has_no_meaning(text):
    with pytest.raises(DoesNotFit, match="no meaning"):
        attach(model("vit"), f"petl({text})")


def test_mam_is_a_chain():
    assert repr(parse("mam()")) == "prefix(n=30) >> adaptformer(width=512, scale=4.0)"
    assert parse("mam(n=2, width=3, scale=1.0, reparam=False)") == parse(
        "prefix(n=2, reparam=False) >> adaptformer(width=3, scale=1.0)")
    base, b = model("bert"), batch("bert")
    by_four = attach(copy.deepcopy(base), "petl(at='attn', form='softmax', composition='gated', width=2) >> petl(width=3)")
    tuned = stir(attach(base, "mam(n=2, width=3, reparam=False)"))
    own = [p for p in tuned.states.values() if p._parameters]
    for p, q in zip([p for p in by_four.states.values() if p._parameters], own, strict=True):
        for n, source in (("D", "K"), ("U", "V")) if hasattr(q, "K") else SAME.items():
            getattr(p, n).data.copy_(getattr(q, source))
        for n in ("d", "u"):
            if hasattr(q, n):
                getattr(q, n).data.zero_()
    close(tuned(**b).logits, by_four(**b).logits)


# -- merging tokens -------------------------------------------------------------------------------------------------


def merged_by_hand(h, keys, size, r, m, alpha, protect, fixed=1):
    """PiToMe's algorithm 1 (or ToMe's matching) for one image, token by token."""
    T = len(h)
    free = list(range(fixed, T))

    def cos(i, j):
        return float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm())

    if protect:
        score = {}
        for i in free:
            total = 0.0
            for j in free:
                x = cos(i, j)
                total += x - m if x >= m else alpha * (math.exp(x - m) - 1)
            score[i] = total / len(free)
        order = sorted(free, key=lambda i: -score[i])[:2 * r]
        A, B = order[0::2], order[1::2]
    else:
        A, B = free[0::2], free[1::2]
    pairs = sorted(((max(B, key=lambda j: cos(i, j)), i) for i in A), key=lambda ji: -cos(*ji))[:r]
    h, size = h.clone() * size[:, None], size.clone()
    gone = set()
    for j, i in pairs:
        h[j] += h[i]
        size[j] += size[i]
        gone.add(i)
    left = [t for t in range(T) if t not in gone]
    return h[left] / size[left, None], size[left], gone


def crowd(B=2, T=14, D=6, seed=0):
    torch.manual_seed(seed)
    centres = torch.randn(3, D)
    keys = centres[torch.randint(0, 3, (B, T))] + 0.3 * torch.randn(B, T, D)
    size = torch.randint(1, 4, (B, T, 1)).float()
    return Tokens(torch.randn(B, T, 5), {"0:test": keys, "size": size}, fixed=1)


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("keep, margin, alpha, seed", [
    (0.7, 0.9, 1.0, 0), (0.5, 0.5, 1.0, 1), (0.6, 0.9, 0.3, 2), (0.85, 0.2, 2.0, 3)])
def test_pitome_by_brute_force(protect, keep, margin, alpha, seed):
    t = crowd(seed=seed)
    p = State(dict(m=margin), "0:test", "block.0.mid")
    got = pitome(keep=keep, protect=protect, alpha=alpha).stream(t, p)
    r = int(13 * (1 - keep) + 1e-6)
    for b in range(2):
        h, size, _ = merged_by_hand(t.h[b], t.lanes["0:test"][b], t.size[b, :, 0], r, margin, alpha, protect)
        close(got.h[b], h)
        close(got.size[b, :, 0], size)
    close((got.h * got.size).sum(1), (t.h * t.size).sum(1))           # nothing is lost
    close(got.h[:, 0], t.h[:, 0])                                     # [CLS] is left alone


def test_energy_by_loops():
    c = torch.rand(1, 5, 5) * 2 - 1
    want = [sum(x - 0.4 if x >= 0.4 else 0.7 * (math.exp(x - 0.4) - 1) for x in row) / 5 for row in c[0].tolist()]
    close(energy(c, 0.4, 0.7)[0], torch.tensor(want))


def test_isolated_tokens_survive():
    torch.manual_seed(0)
    crowd = torch.eye(8)[0] + 0.05 * torch.randn(20, 8)
    alone = 3 * torch.eye(8)[[2, 3, 4]]
    keys = torch.cat([torch.eye(8)[7:], crowd[:8], alone[:1], crowd[8:19], alone[1:2], crowd[19:], alone[2:]])[None]
    t = Tokens(torch.arange(24.0).view(1, 24, 1), {"0:test": keys}, fixed=1)
    got = pitome(keep=0.6).stream(t, State(dict(m=0.9), "0:test", "block.0.mid"))
    assert got.h.shape[1] == 24 - 9
    assert all((got.h == x).any() for x in (9.0, 21.0, 23.0))         # untouched, exactly
    plain = pitome(keep=0.5, protect=False).stream(t, State(dict(m=0.9), "0:test", "block.0.mid"))
    assert not all((plain.h == x).any() for x in (9.0, 21.0, 23.0))   # ToMe's matching sacrifices some


def test_pitome_pays_no_heed_to_padding():
    t = crowd()
    keys = t.lanes["0:test"]
    mask = torch.ones(2, 14, 1, dtype=torch.bool)
    mask[0, 9:] = False
    keys[0, 9:] = keys[0, 3]                                          # padding that looks just like a word
    long = pitome(keep=0.6).stream(t.lane("mask", mask), State(dict(m=0.9), "0:test", "block.0.mid"))
    real = long.mask
    close((long.h * long.size * real[..., None])[0].sum(0), (t.h * t.size)[0, :9].sum(0), 1e-4)
    assert long.size[0][~real[0]].max() < 1e-3 if (~real[0]).any() else True


def test_pitome_in_vit_layer_by_layer():
    """The whole model against a hand-written forward: keys, proportional attention, merge between attention and MLP."""
    base, b = model("vit"), batch("vit")
    with torch.no_grad():
        tuned = attach(base, "pitome(keep=0.75)")
        got = tuned(**b)
        tuned.detach()
        rows, lengths = base.vit.embeddings(b["pixel_values"]), []
        outs = []
        for h in rows:
            size = torch.ones(len(h))
            for i, layer in enumerate(base.vit.layers):
                x, att = layer.layernorm_before(h), layer.attention
                q, k, v = (f(x).view(-1, 4, 8).transpose(0, 1) for f in (att.q_proj, att.k_proj, att.v_proj))
                w = (q @ k.mT / math.sqrt(8) + size.log()).softmax(-1)
                h = h + att.o_proj((w @ v).transpose(0, 1).flatten(1))
                r = int((len(h) - 1) * 0.25 + 1e-6)
                h, size, _ = merged_by_hand(h, k.mean(0), size, r, 0.9 - 0.9 * i / 3, 1.0, True)
                h = h + layer.mlp(layer.layernorm_after(h))
                lengths.append(len(h))
            outs.append(base.classifier(base.vit.layernorm(h)[0]))
    close(got.logits, torch.stack(outs), 1e-4)
    assert lengths[:3] == [13, 10, 8]                                 # 17 tokens: 16 -> 12 -> 9 -> 7 beside [CLS]


def test_pitome_behind_a_prefix():
    """Keys that are no tokens are not merged and weigh as one each."""
    torch.manual_seed(0)
    t = Tokens(torch.randn(1, 4, 8), {"size": torch.tensor([1.0, 2.0, 1.0, 3.0]).view(1, 4, 1)}, fixed=1)
    q, k, v = torch.randn(3, 1, 2, 4, 4)
    K, V = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    a = prefix(reparam=False).attend(Attention(q, k, v, t), state(K=K, V=V))
    a = pitome().attend(a, state())
    close(a.t.lanes["0:test"], k.mean(1))
    every, size = torch.cat([K.transpose(0, 1)[None], k], 2), torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0, 3.0])
    w = size * torch.exp(q @ every.mT / 2)
    close(a.run(), w / w.sum(-1, keepdim=True) @ torch.cat([V.transpose(0, 1)[None], v], 2))


def test_pitome_keeps_everything_or_refuses():
    base, b = model("vit"), batch("vit")
    want = base(**b).logits
    close(attach(base, "pitome(keep=1.0)")(**b).logits, want)
    with pytest.raises(DoesNotFit, match="read the future"):
        attach(model("gpt2"), "pitome()")
    tuned = attach(model("vit"), "pitome(margin=0.3)")
    assert [round(p.m, 6) for n, p in states(tuned, "pitome").items() if n.endswith("mid")] == [0.3, 0.2, 0.1]


# -- a network beside the model -------------------------------------------------------------------------------------


class Side(nn.Module):
    """Ladder side-tuning written again, in float64 and for one sequence at a time."""

    def __init__(self, p, causal):
        super().__init__()
        self.p, self.causal = {k: {n: x.detach().double() for n, x in v.named_parameters()} | {"heads": getattr(v, "heads", 0)}
                               for k, v in p.items()}, causal

    def forward(self, taps, last, residual):
        (_, first), *rungs, (_, end) = self.p.items()
        s = taps["block.0.in"] @ first["D"].T + first["d"]
        for name, w in [x for x in self.p.items() if x[0].endswith(".out")]:
            mu = 1 / (1 + torch.exp(-w["a"] / 0.1))
            s = mu * (taps[name] @ w["D"].T + w["d"]) + (1 - mu) * s
            n = nn.functional.layer_norm(s, s.shape[-1:]) * w["g1"]
            e, mixed = len(w["q"]) // w["heads"], []
            per = w["heads"] // (len(w["k"]) // e)
            for h in range(w["heads"]):
                q = n @ w["q"][h * e:(h + 1) * e].T
                k, v = (n @ w[r][h // per * e:(h // per + 1) * e].T for r in "kv")
                score = q @ k.T / math.sqrt(e)
                if self.causal:
                    score = score.masked_fill(torch.ones_like(score).triu(1).bool(), -math.inf)
                mixed.append(score.softmax(-1) @ v)
            s = s + torch.cat(mixed, -1) @ w["o"].T
            n = nn.functional.layer_norm(s, s.shape[-1:]) * w["g2"]
            up = n @ w["up"].T
            up = up * nn.functional.silu(n @ w["gate"].T) if "gate" in w else gelu(up)
            s = s + up @ w["down"].T
        top = nn.functional.layer_norm(s, s.shape[-1:]) * end["g"] @ end["U"].T
        return last + top if residual else top


@pytest.mark.parametrize("name, options", [
    ("llama", "reduce=2"), ("vit", "reduce=2, every=2"), ("gpt2", "reduce=4, start='random'"),
    ("llama", "reduce=4, residual=False")])
def test_ladder_against_an_independent_network(name, options):
    base, b = model(name).double(), batch(name)
    b = {k: v.double() if v.is_floating_point() else v for k, v in b.items()}
    stack = {"llama": "model", "vit": "vit", "gpt2": "transformer"}[name]
    tower = getattr(base, stack)
    blocks = getattr(tower, "h" if name == "gpt2" else "layers")
    norm = {"llama": "norm", "vit": "layernorm", "gpt2": "ln_f"}[name]
    taps, hooks = {}, []
    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(
            lambda m, a, o, i=i: taps.update({f"block.{i}.out": o[0] if isinstance(o, tuple) else o})))
    hooks.append(blocks[0].register_forward_pre_hook(lambda m, a: taps.update({"block.0.in": a[0]})))
    hooks.append(getattr(tower, norm).register_forward_hook(lambda m, a, o: taps.update(last=o)))
    with torch.no_grad():
        base(**b)
        for h in hooks:
            h.remove()
        tuned = stir(attach(base, f"ladder({options})"))
        got = tuned(**b).logits
        own = states(tuned, "ladder")
        side, residual = Side(own, causal=name != "vit"), "residual" not in options
        tuned.detach()
        head = base.classifier if name == "vit" else base.lm_head
        for row in range(2):
            h = side({k: v[row] for k, v in taps.items()}, taps["last"][row], residual)
            close(got[row], head(h[0] if name == "vit" else h), 1e-9)
    rungs = [n for n in own if n.endswith(".out")]
    assert rungs == (["block.0.out", "block.2.out"] if "every" in options else [f"block.{i}.out" for i in range(len(blocks))])


def test_ladder_is_cut_from_the_backbone():
    """Every entry of a pruned block is an entry of the frozen one, at places that all its matrices agree on."""
    base = model("llama")
    own = states(attach(base, "ladder(reduce=4)"), "ladder")
    p, layer = own["block.1.out"], base.model.layers[1]
    cut = p.D.argmax(1)
    close(p.D, torch.eye(32)[cut])
    att, mlp = base.model.layers[0].self_attn, base.model.layers[0].mlp
    norms = sum(m.weight.norm(dim=0).log() for m in (att.q_proj, att.k_proj, att.v_proj, mlp.up_proj, mlp.gate_proj))
    norms = norms + sum(m.weight.norm(dim=1).log() for m in (att.o_proj, mlp.down_proj))
    assert cut.tolist() == sorted(sorted(range(32), key=lambda i: -norms[i])[:8])
    mlp = layer.mlp
    neurons = mlp.up_proj.weight.norm(dim=1) * mlp.gate_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
    kept = sorted(sorted(range(48), key=lambda i: -neurons[i])[:12])
    close(p.up, layer.mlp.up_proj.weight[kept][:, cut])
    close(p.gate, layer.mlp.gate_proj.weight[kept][:, cut])
    close(p.down, layer.mlp.down_proj.weight[cut][:, kept])
    q, k, v, o = (getattr(layer.self_attn, f"{r}_proj").weight for r in "qkvo")
    for g in range(2):                                      # 2 key/value heads of width 8 serve 2 query heads each; 2 places stay
        pair = (2 * g, 2 * g + 1)
        places = [(k[8 * g + j].norm() * v[8 * g + j].norm()).log()
                  + sum((q[8 * h + j].norm() * o[:, 8 * h + j].norm()).log() for h in pair) / 2 for j in range(8)]
        best = sorted(sorted(range(8), key=lambda j: -places[j])[:2])
        close(p.k[2 * g:2 * g + 2], k[[8 * g + j for j in best]][:, cut])
        close(p.v[2 * g:2 * g + 2], v[[8 * g + j for j in best]][:, cut])
        for h in pair:
            close(p.q[2 * h:2 * h + 2], q[[8 * h + j for j in best]][:, cut])
            close(p.o[:, 2 * h:2 * h + 2], o[cut][:, [8 * h + j for j in best]])


def test_ladder_cut_by_fisher_information():
    """The same choice of residual dimensions and neurons from squared gradients of single samples."""
    base, b = model("llama"), batch("llama")
    b = {**b, "labels": b["input_ids"]}
    layers, fisher = base.model.layers, {}
    for i in range(len(b["input_ids"])):
        base(**{k: v[i:i + 1] for k, v in b.items()}).loss.backward()
        for n, p in base.named_parameters():
            fisher[n] = fisher.get(n, 0) + p.grad.square()
        base.zero_grad(set_to_none=True)
    own = states(attach(base, "ladder(reduce=4, start='fisher')", data=[b]), "ladder")
    F = {n.removeprefix("model.layers.0.").removesuffix("_proj.weight"): v for n, v in fisher.items() if ".layers.0." in n}
    score = sum(F[n].sum(0).log() for n in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.up", "mlp.gate"))
    score = score + sum(F[n].sum(1).log() for n in ("self_attn.o", "mlp.down"))
    cut = sorted(sorted(range(32), key=lambda i: -score[i])[:8])
    assert own["block.1.out"].D.argmax(1).tolist() == cut
    neurons = F["mlp.up"].sum(1).log() + F["mlp.gate"].sum(1).log() + F["mlp.down"].sum(0).log()
    kept = sorted(sorted(range(48), key=lambda i: -neurons[i])[:12])
    close(own["block.0.out"].up, layers[0].mlp.up_proj.weight[kept][:, cut])
    by_norm = states(attach(model("llama"), "ladder(reduce=4)"), "ladder")
    assert cut != by_norm["block.1.out"].D.argmax(1).tolist()
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "t5"])
def test_ladder_leaves_the_backbone_without_a_graph(name):
    """No base tensor gets a gradient; of the frozen blocks nothing is saved but their outputs, which the rungs read."""
    base, b = model(name), batch(name)
    tuned = stir(attach(base, "ladder(reduce=2)"))
    inside, saved, outputs, hooks = {}, set(), set(), []
    side = set(tuned.states.modules())
    for path, m in base.named_modules():
        def keep(m, a, o, path=path):
            for x in [*a, *(o if isinstance(o, tuple) else (o,))]:
                if torch.is_tensor(x) and x.is_floating_point():
                    inside[x.data_ptr()] = (path, x)
        if m not in side:
            hooks.append(m.register_forward_hook(keep))
    for s in tuned._plan.steps[0].sites:
        hooks.append(s.module.register_forward_hook(
            lambda m, a, o: outputs.add((o[0] if isinstance(o, tuple) else o).data_ptr()), prepend=True))
        hooks.append(s.module.register_forward_pre_hook(lambda m, a, k: outputs.update(
            x.data_ptr() for x in [*a, *k.values()] if torch.is_tensor(x)), with_kwargs=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.add(x.data_ptr()), x)[1], lambda x: x):
        out = tuned(**b).logits
    head = {out.data_ptr()} | {x.data_ptr() for x in base.parameters()}
    stray = {inside[x][0] for x in saved & inside.keys() - outputs - head}
    stray = {n for n in stray if not n.startswith(("classifier", "lm_head", "bert.pooler"))}
    assert not stray, stray
    out.pow(2).sum().backward()
    assert all(p.grad is None for p in base.parameters())
    for _, p in tuned.trainable():
        assert p.grad is not None and p.grad.abs().max() > 0


@pytest.mark.parametrize("chain, name, exactly", [
    ("houlsby(width=4)", "bert", True), ("adaptformer(width=4)", "vit", True), ("ladder(reduce=2)", "llama", True),
    ("petl(width=4)", "gpt2", True), ("prompt(n=2)", "gpt2", False), ("vpt(n=2)", "vit", False),
    ("prefix(n=2, mid=3)", "llama", False), ("mam(n=2, width=3)", "vit", False), ("pitome(keep=0.7)", "vit", False),
    ("houlsby(width=4)", "t5", True), ("prompt(n=2)", "t5", False)])
def test_on_and_off_a_model(chain, name, exactly):
    """Identity at init where claimed; gradients to exactly the declared parameters; nothing left behind."""
    base, b = model(name), batch(name)
    before = {n: (p, p.clone(), p.requires_grad) for n, p in base.named_parameters()}
    with torch.no_grad():
        want = base(**b).logits
    tuned = attach(base, chain)
    with torch.no_grad():
        assert torch.equal(tuned(**b).logits, want) is exactly
    stir(tuned)
    if [*tuned.trainable()]:
        tuned(**b).logits.pow(2).sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in tuned.trainable())
    tuned.detach()
    assert all(p is q and torch.equal(p, c) and p.requires_grad is f and p.grad is None
               for (n, p), (q, c, f) in zip(base.named_parameters(), before.values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in base.modules())
    with torch.no_grad():
        assert torch.equal(base(**b).logits, want)


@pytest.mark.parametrize("chain, name", [("ladder(reduce=2)", "gpt2"), ("ladder(reduce=2)", "llama"), ("ladder(reduce=2)", "t5"),
                                         ("prefix(n=3)", "llama"), ("prompt(n=3)", "gpt2"), ("adaptformer(width=4)", "t5")])
def test_generation_with_a_cache_is_recomputation(chain, name):
    base = model(name)
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = None, 0
    tuned = stir(attach(base, chain), 0.05)
    torch.manual_seed(0)
    ids = torch.randint(1, 97, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, slice(3, None) if name == "t5" else slice(0, 3)] = 0
    kw = dict(max_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True)
    cached, anew = (tuned.generate(input_ids=ids, attention_mask=mask, use_cache=c, **kw).scores for c in (True, False))
    close(torch.stack(cached), torch.stack(anew), 1e-4)
    alone = tuned.generate(input_ids=ids[:1][mask[:1] == 1][None], **kw).scores
    close(torch.stack(cached)[:, :1], torch.stack(alone), 1e-4)
