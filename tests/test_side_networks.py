"""Networks beside a frozen model, and time in models of images: against straightforward implementations and by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from luthier import cost, tiny
from luthier._compat import torchvision
from luthier.attach import attach
from luthier.clips import framed
from luthier.errors import DoesNotFit
from luthier.methods.side.sherl import sherl
from luthier.procedures.m2clip import Multitask
from luthier.state import State
from luthier.tokens import Tokens, together

ROLES = {"attn.q": "attention.q_proj", "attn.k": "attention.k_proj", "attn.v": "attention.v_proj", "attn.o": "attention.o_proj",
         "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}               # in a ViTLayer


def model(name, blocks=3):
    """A tiny model of tiny.py's kind in float64, with as many blocks."""
    torchvision()
    import transformers as t

    torch.manual_seed(0)
    width = tiny.WIDTH | dict(num_hidden_layers=blocks)
    if name == "vit":
        made = t.ViTForImageClassification(t.ViTConfig(**width, **tiny.PIXELS, **tiny.DRY, num_labels=5))
    elif name == "llama":
        made = t.LlamaForCausalLM(t.LlamaConfig(**tiny.TEXT, **width, num_key_value_heads=2))
    elif name == "clip":
        both = dict(**width, projection_dim=16)
        made = t.CLIPModel(t.CLIPConfig(text_config=dict(**both, **tiny.TEXT, max_position_embeddings=64), projection_dim=16,
                                        vision_config=dict(**both, **tiny.PIXELS)))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return made.eval().double()


def batch(name, **more):
    return {k: v.double() if v.is_floating_point() else v for k, v in tiny.batch(name).items()} | more


def video(B=2, N=4):
    return torch.randn(B, N, 3, 16, 16, generator=torch.Generator().manual_seed(4)).double()


def stir(tuned, std=0.2):
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in tuned.trainable():
            p.add_(std * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return tuned


def states(tuned):
    return {k.partition("@")[2].replace("/", "."): v for k, v in tuned.states.items()}


def weights(p):
    return {n: x.detach() for n, x in p.named_parameters()}


def close(a, b, tol=1e-9):
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape and (a - b).abs().max() <= tol * max(1.0, float(b.abs().max())), (a - b).abs().max()


def seen(base, run, **modules):
    """{name: output} of the modules of a bare model."""
    found, hooks = {}, []
    for name, m in modules.items():
        hooks.append(m.register_forward_hook(
            lambda m, a, o, name=name: found.update({name: o[0] if isinstance(o, tuple) else o})))
    with torch.no_grad():
        found["out"] = run()
    for h in hooks:
        h.remove()
    return found


def norm(x, g=None, s=None):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x if g is None else x * g + s


def read(h, w):
    return norm(h @ w["D"].T + w["d"], w["g"], w["s"])


# -- UniPT ----------------------------------------------------------------------------------------------------------


def unipt_alone(own, layers, last, valid, causal, residual=True):
    """UniPT for one sequence, a token at a time. layers: h_0 .. h_{L-1}; valid: the tokens that are no padding."""
    *taps, end = map(weights, own.values())
    xs, a, rows = [read(h, w) for h, w in zip(layers, taps, strict=True)], read(last, end), []
    for i in range(len(last)):
        may = [j for j in range(len(last)) if valid[j] and (j <= i or not causal)] or [i]
        pooled = torch.stack([a[j] for j in may]).mean(0)
        gathered, scores = [], []
        for x in xs:
            s = [max(0.0, float(a[i] @ x[j])) for j in may]
            m = sum(v * x[j] for v, j in zip(s, may, strict=True)) / max(sum(s), 1e-6) + x[i]
            gathered.append(m)
            scores.append(math.exp(float((pooled * torch.stack([x[j] for j in may]).mean(0)) @ end["c"])))
        mixed = sum(c / sum(scores) * m for c, m in zip(scores, gathered, strict=True))
        up = (a[i] + norm(mixed @ end["P"].T + end["e"], end["pg"], end["ps"])).clamp(min=0) @ end["U"].T + end["u"]
        rows.append(last[i] + up if residual else up)
    return torch.stack(rows)


@pytest.mark.parametrize("name, options", [("vit", ""), ("vit", ", residual=False"), ("llama", "")])
def test_unipt_against_a_token_at_a_time(name, options):
    base, b = model(name), batch(name)
    tower = base.vit if name == "vit" else base.model
    blocks = [m for m in tower.modules() if type(m).__name__ in ("ViTLayer", "LlamaDecoderLayer")]
    final = tower.layernorm if name == "vit" else tower.norm
    first = []
    hook = blocks[0].register_forward_pre_hook(lambda m, a: first.append(a[0]))
    raw = seen(base, lambda: base(**b), final=final, **{str(i): m for i, m in enumerate(blocks)})
    hook.remove()
    tuned = stir(attach(base, f"unipt(reduce=4{options})"))
    got, own = tuned(**b).logits, states(tuned)
    assert list(own) == ["block.0.in", "block.0.out", "block.1.out", "final"]
    for row in range(2):
        valid = b["attention_mask"][row].bool() if name == "llama" else [True] * raw["final"].shape[1]
        new = unipt_alone(own, [first[0][row], raw["0"][row], raw["1"][row]], raw["final"][row], valid, name == "llama",
                          not options)
        head = base.classifier if name == "vit" else base.lm_head
        want = head(new[0]) if name == "vit" else head(new)[valid]
        close(got[row] if name == "vit" else got[row][valid], want)


def test_unipt_confidences_sum_to_one_and_follow_the_layers():
    from luthier.methods.side.unipt import unipt

    p = State(dict(c=torch.randn(4), taps=3), "0:unipt", "final")
    t = Tokens(torch.zeros(2, 5, 8), {f"0:unipt@{i}": torch.randn(2, 5, 4) for i in range(3)})
    c, merged = unipt().fused(t, p, torch.randn(2, 5, 4))
    assert c.shape == (2, 1, 3) and len(merged) == 3
    close(c.sum(-1), torch.ones(2, 1), 1e-6)
    with pytest.raises(DoesNotFit, match="change the number of its tokens"):
        unipt().fused(Tokens(t.h), p, torch.randn(2, 5, 4))


@pytest.mark.parametrize("chain, kept", [("unipt(reduce=4)", ()), ("sherl(reduce=4)", (2,)), ("sherl(reduce=4, late=2)", (1, 2))])
def test_no_graph_in_the_backbone_but_the_late_blocks(chain, kept):
    base, b = model("vit"), batch("vit")
    tuned, graphs, hooks = stir(attach(base, chain)), {}, []
    blocks = [m for m in base.modules() if type(m).__name__ == "ViTLayer"]
    for i, m in enumerate(blocks):
        hooks.append(m.mlp.register_forward_hook(lambda m, a, o, i=i: graphs.update({i: o.requires_grad})))
    tuned(**b).logits.square().sum().backward()
    assert [i for i, g in graphs.items() if g] == list(kept)
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad is not None and p.grad.any() for _, p in tuned.trainable())


def test_side_networks_keep_less_than_adapters_inside():
    base, kept = model("vit", 6).float(), {}
    b = {"pixel_values": torch.randn(8, 3, 16, 16)}
    for chain in ("unipt(reduce=8)", "sherl(reduce=8)", "ladder(reduce=8)", "lora(rank=2)"):
        tuned = attach(base, chain)
        held = [*tuned.parameters(), *tuned.buffers(), *b.values()]
        kept[chain[:5]] = cost.saved(lambda tuned=tuned: tuned(**b).logits.sum(), held)
        tuned.detach()
    assert kept["unipt"] < 0.5 * kept["lora("] and kept["sherl"] < 0.6 * kept["lora("]
    assert kept["unipt"] <= kept["ladde"]


# -- SHERL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", ", late=2", ", weigh='guided'", ", weigh='uniform'", ", residual=False"])
def test_sherl_against_a_token_at_a_time(options):
    base, b = model("vit", 4), batch("vit")
    blocks = [m for m in base.modules() if type(m).__name__ == "ViTLayer"]
    inputs, hooks = {}, []
    for i, m in enumerate(blocks):
        hooks.append(m.register_forward_pre_hook(lambda m, a, i=i: inputs.update({i: a[0]})))
    with torch.no_grad():
        base(**b)
    for h in hooks:
        h.remove()
    tuned = stir(attach(base, f"sherl(reduce=4{options})"))
    got, own = tuned(**b).logits, states(tuned)
    end = 2 if "late" in options else 3
    assert list(own) == [f"block.{i}.in" for i in range(end + 1)]
    tuned.detach()
    ws, new = [weights(p) for p in own.values()], inputs[end].clone()
    for r in range(new.shape[0]):
        for i in range(new.shape[1]):
            *xs, g = [read(inputs[n][r, i], w) for n, w in enumerate(ws)]
            w = [1.0] * len(xs)
            if "uniform" not in options:
                w = [max(0.0, float((x * g) @ ws[-1]["c"] + ws[-1]["c0"])) for x in xs]
            if "weigh" not in options:
                w = [v / sum(max(0.0, float(x @ y / x.norm() / y.norm())) for y in xs) for v, x in zip(w, xs, strict=True)]
            g = g + sum(v / max(sum(w), 1e-6) * x for v, x in zip(w, xs, strict=True))
            gate = torch.tanh(ws[-1]["beta"] / 0.1) if "residual" in options else 1
            new[r, i] = gate * inputs[end][r, i] + g.clamp(min=0) @ ws[-1]["U"].T + ws[-1]["u"]
    with torch.no_grad():
        h = new
        for m in blocks[end:]:
            h = m(h)
            h = h[0] if isinstance(h, tuple) else h
        close(got, base.classifier(base.vit.layernorm(h)[:, 0]))


def test_sherl_gives_a_layer_that_comes_twice_half_the_weight():
    a, b, c = torch.eye(3)[:, None, None]                   # three readings with nothing in common, (1, 1, 3) each
    p = State(dict(c=torch.ones(3), c0=torch.zeros(1), taps=3), "0:sherl", "x")
    guide = torch.ones(1, 1, 3)
    close(sherl().weights([a, b, c], guide, p), torch.full((1, 1, 3), 1 / 3))
    close(sherl().weights([a, a, b, c], guide, p), torch.tensor([[[1, 1, 2, 2]]]) / 6)
    close(sherl(weigh="guided").weights([a, a, b, c], guide, p), torch.full((1, 1, 4), 1 / 4))


def test_sherl_needs_an_early_layer():
    with pytest.raises(DoesNotFit, match="smaller late"):
        attach(model("vit"), "sherl(late=3)")


# -- clips ----------------------------------------------------------------------------------------------------------


def test_a_framed_model_averages_its_frames():
    x, vit, clip = video(), framed(model("vit")), framed(model("clip"))
    close(vit(pixel_values=x).logits, vit(pixel_values=x.flatten(0, 1)).logits.unflatten(0, (2, 4)).mean(1))
    one = clip.get_image_features(pixel_values=x.flatten(0, 1))
    some = clip.get_image_features(pixel_values=x)
    one, some = (getattr(f, "pooler_output", f) for f in (one, some))
    close(some, one.unflatten(0, (2, 4)).mean(1))
    close(clip(**batch("clip")).logits_per_text, model("clip")(**batch("clip")).logits_per_text)
    with pytest.raises(DoesNotFit, match="takes no clips"):
        framed(model("llama"))


def test_streams_know_their_frames_and_what_was_given():
    from luthier.host import Host
    from luthier.methods.adapter.houlsby import houlsby

    found = []

    class Spy(houlsby):
        def stream(self, t, p):
            found.append((t.frames, tuple(t.h.shape), None if t.given is None else tuple(t.given.shape)))
            return t
    base = framed(model("vit"))
    spied = attach(base, "houlsby(norms=False)")
    for port in Host.of(base).ports.values():
        for e in port.entries:
            e.method = Spy(norms=False)
    spied(pixel_values=video())
    assert {f for f in found} == {(4, (8, 17, 32), (2, 4, 3, 16, 16))}
    found.clear()
    spied(pixel_values=video()[:, 0])
    assert {f for f in found} == {(1, (2, 17, 32), (2, 3, 16, 16))}
    with together(3), together(2):
        pass
    assert Tokens(torch.zeros(1, 1, 1)).frames == 1


# -- ZeroI2V --------------------------------------------------------------------------------------------------------


def test_linear_adapters_against_modules_in_their_places():
    base, b = model("vit"), batch("vit")
    tuned = stir(attach(base, "linear_adapter(reduce=4, scale=0.7)"))
    got, own = tuned(**b).logits, {n: weights(p) for n, p in states(tuned).items()}
    tuned.detach()

    def a(x, w):
        return x + 0.7 * ((x @ w["W1"].T + w["b1"]) @ w["W2"].T + w["b2"])

    for i, m in enumerate(m for m in base.modules() if type(m).__name__ == "ViTLayer"):
        at = {r: own[f"block.{i}.{r}"] for r in ("attn.q", "attn.k", "attn.o", "mlp.up", "mlp.down")}
        assert torch.equal(at["attn.q"]["W1"], at["attn.k"]["W1"])
        named = dict(m.named_modules())
        for r, path in ROLES.items():
            before = r in ("attn.q", "attn.k", "attn.v", "mlp.up")
            w = own[f"block.{i}.{r}"]
            if before:
                named[path].register_forward_pre_hook(lambda m, x, w=w: (a(x[0], w),))
            else:
                named[path].register_forward_hook(lambda m, x, y, w=w: a(y, w))
    with torch.no_grad():
        close(got, base(**b).logits)


def test_merged_linear_adapters_and_shifted_heads_cost_what_the_base_costs():
    base, x = framed(model("vit")).float(), video().float()
    start = cost.flops(lambda: base(pixel_values=x))
    heads = attach(base, "stdha()")
    still = base(pixel_values=x).logits.detach()
    tuned = stir(attach(base, "linear_adapter(reduce=4)"))
    y = tuned(pixel_values=x).logits.detach()
    tuned.merge()
    close(tuned(pixel_values=x).logits.detach(), y, 1e-5)
    assert (y - still).abs().max() > 1e-2 and cost.flops(lambda: tuned(pixel_values=x)) == start
    assert not heads.trainable() and sum(p.numel() for p in base.parameters()) == sum(
        p.numel() for p in model("vit").parameters())
    tuned.detach()
    close(base(pixel_values=x).logits.detach(), still, 0)


@pytest.mark.parametrize("shift", [(1, -1), (1, -1, 2), (), (5,)])
def test_heads_look_at_other_frames(shift):
    """Against a loop over clips, frames and heads."""
    base, x = framed(model("vit", 1)), video()
    m = next(m for m in base.modules() if type(m).__name__ == "ViTLayer")
    named, raw = dict(m.named_modules()), {}
    hooks = [named[ROLES[r]].register_forward_hook(lambda m, a, o, r=r: raw.update({r: o}))
             for r in ("attn.q", "attn.k", "attn.v")]
    tuned = attach(base, f"stdha(shift={shift})")
    hooks.append(named[ROLES["attn.o"]].register_forward_pre_hook(lambda m, a: raw.update(o=a[0])))
    with torch.no_grad():
        tuned(pixel_values=x)
    for h in hooks:
        h.remove()
    q, k, v = (raw[f"attn.{r}"].unflatten(0, (2, 4)).unflatten(-1, (4, 8)) for r in "qkv")      # (B, N, T, H, Dh)
    want = torch.empty_like(q)
    for clip in range(2):
        for t in range(4):
            for h in range(4):
                s = t - shift[h] if h < len(shift) and 0 <= t - shift[h] < 4 else t
                w = (q[clip, t, :, h] @ k[clip, s, :, h].T / math.sqrt(8)).softmax(-1)
                want[clip, t, :, h] = w @ v[clip, s, :, h]
    close(raw["o"].unflatten(0, (2, 4)), want.flatten(3))


def test_what_shifted_heads_see_and_frames_without():
    """Played backwards a clip is the same to frame averages, and not to shifted heads; a single image is left alone."""
    base, x = framed(model("vit")), video()
    close(base(pixel_values=x).logits, base(pixel_values=x.flip(1)).logits)
    want = base(pixel_values=x[:, 0]).logits
    tuned = attach(base, "stdha()")
    assert (tuned(pixel_values=x).logits - tuned(pixel_values=x.flip(1)).logits).abs().max() > 1e-3
    assert torch.equal(tuned(pixel_values=x[:, 0]).logits, want)
    with pytest.raises(DoesNotFit, match="Shift fewer"):
        attach(model("vit"), "stdha(shift=(1, -1, 2, -2, 3))")


def test_frames_have_places():
    base, x = framed(model("vit")), video()
    tuned = stir(attach(base, "frame_embed(frames=5)"))
    got, e = tuned(pixel_values=x).logits, states(tuned)["embed"].e.detach()
    tuned.detach()
    emb = base.vit.embeddings
    hook = emb.register_forward_hook(lambda m, a, o: o + e[torch.arange(8) % 4][:, None])
    close(got, base(pixel_values=x).logits)
    hook.remove()
    with pytest.raises(DoesNotFit, match="frames=4"):
        attach(base, "frame_embed(frames=3)")(pixel_values=x)


# -- M2-CLIP --------------------------------------------------------------------------------------------------------


def ted_alone(x, w, N):
    """One TED-Adapter with torch's own convolutions. x: (B N, 1 + h h, D)."""
    (BN, T, D), side = x.shape, round((x.shape[1] - 1) ** 0.5)
    B, out = BN // N, x.clone()
    if "eD" in w:
        z = (x @ w["eD"].T + w["ed"]).view(B, N, T, -1)
        rows = z.permute(0, 2, 3, 1).reshape(B * T, -1, N)
        rows = F.conv1d(rows, w["eK"].T[:, None], w["ek"], padding=1, groups=rows.shape[1])
        out = out + rows.view(B, T, -1, N).permute(0, 3, 1, 2).reshape(BN, T, -1) @ w["eU"].T + w["eu"]
    if "oD" in w:
        patches = x[:, 1:].view(B, N, T - 1, D)
        before = patches[:, [0, *range(N - 1)]]
        z = ((patches - before) @ w["oD"].T + w["od"]).view(B, N, side, side, -1).permute(0, 4, 1, 2, 3)
        z = F.conv3d(z, w["oK"][:, :, None], w["ok"], padding=(0, 1, 1), groups=z.shape[1])
        out[:, 1:] += z.permute(0, 2, 3, 4, 1).reshape(BN, T - 1, -1) @ w["oU"].T + w["ou"]
    return out


@pytest.mark.parametrize("options", ["", ", enhance=False", ", difference=False"])
def test_ted_against_torch_convolutions(options):
    base, x = framed(model("vit")), video()
    want = base(pixel_values=x).logits
    tuned = attach(base, f"ted(at='block.*.in final', reduce=4{options})")
    close(tuned(pixel_values=x).logits, want)               # the identity at init
    got, own = stir(tuned)(pixel_values=x).logits, {n: weights(p) for n, p in states(tuned).items()}
    assert set(own) == {f"block.{i}.in" for i in range(3)} | ({"final"} if "enhance" not in options else set())
    tuned.detach()
    h = base.vit.embeddings(x.flatten(0, 1))
    for i, m in enumerate(m for m in base.modules() if type(m).__name__ == "ViTLayer"):
        h = m(ted_alone(h, own[f"block.{i}.in"], 4))
        h = h[0] if isinstance(h, tuple) else h
    h = base.vit.layernorm(h)
    h = ted_alone(h, own["final"], 4) if "final" in own else h
    close(got, base.classifier(h[:, 0]).view(2, 4, -1).mean(1))


def test_ted_trains_both_halves_on_clips_and_tells_time():
    base, x = framed(model("vit")), video()
    tuned = stir(attach(base, "ted(reduce=4)"))
    tuned(pixel_values=x).logits.square().sum().backward()
    assert all(p.grad.any() for _, p in tuned.trainable())
    assert (tuned(pixel_values=x).logits - tuned(pixel_values=x.flip(1)).logits).abs().max() > 1e-3
    with pytest.raises(DoesNotFit, match="no map"):
        attach(base, "vpt(n=2) >> ted()").detach()
        attach(base, "pitome(keep=0.8) >> ted()")(pixel_values=x)


def test_m2clip_tunes_both_towers():
    base = framed(model("clip"))
    tuned = attach(base, "m2clip(width=8)")
    assert {n.split(".")[0] for n in states(tuned)} == {"vision", "text"}
    b = batch("clip", pixel_values=video(3, 2))
    close(tuned(**b).logits_per_image, base(**b).logits_per_image)
    tuned.detach()
    assert {n.split(".")[0] for n in states(attach(base, "m2clip(text=False)"))} == {"vision"}


# -- DiST -----------------------------------------------------------------------------------------------------------


def dist_alone(own, x, hs, last, fixed=1):
    """DiST on clips with torch's own convolutions and attention. x: (B, N, 3, H, W); hs: block outputs, (B N, 1 + h w, D)."""
    (B, N), start, *blocks, end = x.shape[:2], *own

    def lin(z, w, n):
        return F.linear(z, w[n], w[n + "_b"])

    def ln(z, w, n):
        return F.layer_norm(z, z.shape[-1:], w[n + "_g"], w[n + "_s"])

    def gelu(z):
        return z * torch.sigmoid(1.702 * z)

    v = F.conv3d(x.transpose(1, 2), start["stem"], start["stem_b"], stride=(1, 4, 4), padding=(2, 0, 0))    # (B, C, N, h, w)
    side, r = v.shape[-1], 0
    for i, (w, h) in enumerate(zip(blocks, hs, strict=True)):
        z = ln(v.permute(0, 2, 3, 4, 1), w, "x").permute(0, 4, 1, 2, 3)
        z = F.conv3d(z, w["T"].permute(1, 2, 0)[..., None, None], w["T_b"], padding=(1, 0, 0))
        v = gelu(v + F.conv3d(gelu(z), w["S"][:, :, None], w["S_b"], padding=(0, 1, 1)))
        m = lin(h, w, "D") + r
        new = lin(v.permute(0, 2, 3, 4, 1).reshape(B * N, side * side, -1), w, "F")
        n = m + torch.cat([w["c"][:N].repeat(B, 1, 1), new], 1)
        t = lin(ln(n, w, "m"), w, "V1").view(B, N, n.shape[1], -1).permute(0, 3, 1, 2)[..., None]           # (B, C, N, T, 1)
        t = gelu(F.conv3d(t, w["V"].permute(1, 2, 0)[..., None, None], w["V_b"], padding=(1, 0, 0)))
        t = lin(t[..., 0].permute(0, 2, 3, 1).reshape(B * N, n.shape[1], -1), w, "V2")
        r = lin(gelu(lin(ln(n, w, "n"), w, "W1")), w, "W2") + t
        if i < len(blocks) - 1:
            v = v + lin(m[:, 1:], w, "A").view(B, N, side, side, -1).permute(0, 4, 1, 2, 3)

    def look(q, z, n):
        att = nn.MultiheadAttention(q.shape[-1], 1, batch_first=True).double().eval()
        zero = torch.zeros_like(end[n + "q_b"])
        att.load_state_dict(dict(in_proj_weight=torch.cat([end[n + "q"], end[n + "k"], end[n + "v"]]),
                                 in_proj_bias=torch.cat([end[n + "q_b"], zero, end[n + "v_b"]]),
                                 **{"out_proj.weight": end[n + "o"], "out_proj.bias": end[n + "o_b"]}))
        q = q + att(ln(q, end, n), ln(z, end, n), ln(z, end, n), need_weights=False)[0]
        return q + lin(gelu(lin(ln(q, end, n + "n"), end, n + "1")), end, n + "2")

    s, top = end["s"].expand(B * N, 1, -1), end["v"].expand(B, 1, -1)
    for i in range(2):
        s = look(s, r + n, f"s{i}")
        top = look(top, s.view(B, N, -1) + end[f"e{i}"][:N], f"v{i}")
    out = ln(top[:, 0] + lin(last[:, 0].view(B, N, -1).mean(1), end, "P"), end, "end")
    return out @ end["U"].T + end["u"]


@pytest.mark.parametrize("residual", [True, False])
def test_dist_against_torch_modules(residual):
    base, x = framed(model("vit")), video()
    blocks = [m for m in base.modules() if type(m).__name__ == "ViTLayer"]
    raw = seen(base, lambda: base(pixel_values=x).logits, final=base.vit.layernorm, **{str(i): m for i, m in enumerate(blocks)})
    tuned = attach(base, f"dist(frames=5, pool=2, residual={residual})")
    if residual:
        close(tuned(pixel_values=x).logits, raw["out"])
    got, own = stir(tuned, 0.1)(pixel_values=x).logits, [weights(p) for p in states(tuned).values()]
    new = dist_alone(own, x, [raw[str(i)] for i in range(3)], raw["final"])
    with torch.no_grad():
        h = raw["final"][:, 0].view(2, 4, -1).mean(1)
        close(got, base.classifier(h + new if residual else new))


def test_dist_leaves_the_backbone_without_a_graph_and_trains_everything():
    base, x = framed(model("vit")), video()
    tuned, graphs = stir(attach(base, "dist(pool=1)"), 0.1), []
    hooks = [m.register_forward_hook(lambda m, a, o: graphs.append(o.requires_grad)) for m in base.vit.modules()
             if isinstance(m, nn.Linear)]
    tuned(pixel_values=x).logits.square().sum().backward()
    for h in hooks:
        h.remove()
    assert graphs and not any(graphs) and all(p.grad is None for p in base.parameters())
    used = [n for n, p in tuned.trainable() if p.grad is None or not p.grad.any()]
    assert not used, used
    assert (tuned(pixel_values=x).logits - tuned(pixel_values=x.flip(1)).logits).abs().max() > 1e-3
    with pytest.raises(DoesNotFit, match="frames=12"):
        tuned(pixel_values=video(1, 12))
    with pytest.raises(DoesNotFit, match="finds nothing to change"):
        attach(model("llama"), "dist()")


def test_dist_keeps_less_than_adapters_inside():
    base, x, kept = framed(model("vit", 6)).float(), video(2, 8).float(), {}
    for chain in ("dist(pool=1, reduce=4)", "ted()", "adaptformer(width=16)"):
        tuned = attach(base, chain)
        held = [*tuned.parameters(), *tuned.buffers(), x]
        kept[chain[:4]] = cost.saved(lambda tuned=tuned: tuned(pixel_values=x).logits.sum(), held)
        tuned.detach()
    assert kept["dist"] < kept["adap"] and kept["dist"] < kept["ted("]


# -- M2-CLIP's decoder ----------------------------------------------------------------------------------------------


def multitask(**options):
    torchvision()
    import transformers as t

    torch.manual_seed(0)
    both = dict(**tiny.WIDTH, projection_dim=32)
    clip = t.CLIPModel(t.CLIPConfig(text_config=dict(**both, **tiny.TEXT, max_position_embeddings=64), projection_dim=32,
                                    vision_config=dict(**both, **tiny.PIXELS))).eval()
    g = torch.Generator().manual_seed(0)
    ids, there = torch.randint(4, 64, (5, 9), generator=g), torch.ones(5, 9, dtype=torch.long)
    ids[:, 6], ids[0, 5], ids[0, 6], there[:, 7:], there[0, 6] = 3, 3, 1, 0, 0                # texts of 6 and 7 tokens, padded
    return Multitask(clip, dict(input_ids=ids, attention_mask=there), mask_id=2, **options).double().eval()


def test_m2clip_losses_by_hand():
    m, x, y = multitask(), video(4, 3), torch.tensor([0, 2, 2, 4])
    with torch.no_grad():
        f = m.clip.get_image_features(pixel_values=x.flatten(0, 1))
        f = getattr(f, "pooler_output", f).view(4, 3, -1)
        w = m.clip.get_text_features(input_ids=m.ids, attention_mask=m.there.long())
        w = getattr(w, "pooler_output", w)
        v, w = f.mean(1) / f.mean(1).norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
        s, total = m.clip.logit_scale.exp() * v @ w[y].T, 0.0
        for table in (s, s.T):
            for i in range(4):
                p = torch.tensor([math.exp(10.0 * float(y[i] == y[j])) for j in range(4)]).double()
                p = p / p.sum()
                total += sum(p[j] * (p[j].log() - table[i].log_softmax(0)[j]) for j in range(4)) / 4
        cls = -sum((100 * v @ w.T)[i].log_softmax(0)[y[i]] for i in range(4)) / 4
        fc = -sum(m.decoder["fc"](f.mean(1))[i].log_softmax(0)[y[i]] for i in range(4)) / 4
        out = m(pixel_values=x, labels=y)
        close(out.loss, (total / 2 + cls) / 2 + fc)
        close(out.logits, 100 * v @ w.T)
        close(m(pixel_values=x, texts=dict(input_ids=m.ids[:2], attention_mask=m.there[:2])).logits, (100 * v @ w.T)[:, :2])
        m.train()                                           # now words are filled in, too
        m.clip.eval()
        assert float(m(pixel_values=x, labels=y).loss) > float(out.loss)


def test_m2clip_masks_words_and_crosses_frames():
    m, y = multitask(), torch.tensor([0, 1, 0, 3])
    ids, hide, _ = m.masked(y, rate=0.6)
    assert hide.sum(1).tolist() == [2, 3, 2, 3]             # of 4 and of 5 words between the first and the last token
    assert (ids[hide] == 2).all() and torch.equal(ids[~hide], m.ids[y][~hide])
    assert not hide[:, 0].any() and not (hide & (m.ids[y] == 3)).any() and not (hide & ~m.there[y]).any()
    layer, x, f = m.clip.text_model.encoder.layers[-1], torch.randn(2, 5, 32).double(), torch.randn(2, 3, 32).double()
    with torch.no_grad():
        n, z, mixed = layer.layer_norm1(x), layer.layer_norm1(f), []
        q, k, v = layer.self_attn.q_proj(n), layer.self_attn.k_proj(z), layer.self_attn.v_proj(z)
        for h in range(4):
            at = slice(8 * h, 8 * h + 8)
            mixed.append((q[..., at] @ k[..., at].mT / math.sqrt(8)).softmax(-1) @ v[..., at])
        want = x + layer.self_attn.out_proj(torch.cat(mixed, -1))
        close(m.crossed(x, f), want + layer.mlp(layer.layer_norm2(want)))


def test_m2clip_trains_all_of_it_and_nothing_else():
    m, x, y = multitask(width=8), video(4, 3), torch.tensor([0, 2, 2, 4])
    tuned = attach(m, f"m2clip(width=8) >> full(at={m.heads!r})").train()
    before, first = [p.detach().clone() for p in m.parameters()], None
    optimizer = torch.optim.Adam([p for _, p in tuned.trainable()], 3e-3)
    for _ in range(12):
        out = tuned(pixel_values=x, labels=y)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        first = first or float(out.loss)
    assert float(out.loss) < 0.7 * first
    assert all(p.grad is not None and p.grad.any() for _, p in tuned.trainable())
    assert all(map(torch.equal, before, m.parameters()))
    with pytest.raises(DoesNotFit, match="no dual encoder"):
        Multitask(model("vit"), dict(input_ids=m.ids, attention_mask=m.there), 2)


@pytest.mark.parametrize("at", ["block.*.out final", "final"])
def test_a_ladder_without_a_beginning_is_refused(at):
    model = tiny.build("bert")
    with pytest.raises(DoesNotFit, match="no beginning before .*block.0.in"):
        attach(model, f"ladder(reduce=2, at='{at}')")(**tiny.batch("bert"))
