"""Adapters for vision-language models against straightforward implementations of their formulas; state that depends on a task."""

import copy
import dataclasses

import pytest
import torch
from test_golden_stream import batch, close, model, states, stir
from torch.nn import functional as F

import luthier
from luthier import attach, save, tiny
from luthier.compare.fit import aware
from luthier.errors import BadChain, DoesNotFit, NotMergeable, UnknownName
from luthier.method import Chain, Method, chosen
from luthier.methods.adapter.p_adapter import propagate

TASKS = ("caption", "vqa", "nlvr")


def t5():
    return model("t5").double()


def gelu(x):                                                # the tanh form, written out
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def t5_with(base, weights, got, norms=True):
    """A copy of a T5 with independent adapters: weights(site name) -> D, d, U, u."""
    twin = copy.deepcopy(base)
    for tower, stack in (("encoder", twin.encoder), ("decoder", twin.decoder)):
        for i, block in enumerate(stack.block):
            layers = [("attn", block.layer[0].SelfAttention, "o")]
            layers += [("cross", block.layer[1].EncDecAttention, "o")] if tower == "decoder" else []
            for place, module, o in [*layers, ("mlp", block.layer[-1].DenseReluDense, "wo")]:
                D, d, U, u = weights(f"{tower}.block.{i}.{place}.out")
                getattr(module, o).register_forward_hook(
                    lambda m, x, h, D=D, d=d, U=U, u=u: h + F.linear(gelu(F.linear(h, D, d)), U, u))
            for place, layer in zip(("attn", "cross", "mlp")[::1 if tower == "decoder" else 2], block.layer, strict=True):
                if norms and f"{tower}.block.{i}.{place}.norm" in got:
                    layer.layer_norm.weight.data += got[f"{tower}.block.{i}.{place}.norm"].W[:, 0]
        if norms and f"{tower}.final.norm" in got:
            stack.final_layer_norm.weight.data += got[f"{tower}.final.norm"].W[:, 0]
    return twin


# -- state that depends on the task ---------------------------------------------------------------------------------


def test_a_context_names_a_task_or_one_for_each_row():
    assert chosen({}, "task", ()) == chosen({"task": "anything"}, "task", ()) == 0
    assert chosen({"task": "vqa"}, "task", TASKS) == 1
    assert chosen({"task": ["nlvr", "caption"]}, "task", TASKS) == [2, 0]
    with pytest.raises(UnknownName, match="names 'vqs'. Nearest: vqa"):
        chosen({"task": "vqs"}, "task", TASKS)
    for ctx in ({}, {"task": None}):
        with pytest.raises(UnknownName, match=r"names none\. Set tuned.context = {'task': 'caption'}"):
            chosen(ctx, "task", TASKS)


def test_methods_learn_the_names_of_the_tasks():
    class data:
        kinds = TASKS
    chain = "vl_adapter(share='none') >> lora() >> vl_adapter(tasks=('a',))"
    assert repr(aware(chain, data)) == f"vl_adapter(share='none', tasks={TASKS}) >> lora() >> vl_adapter(tasks=('a',))"
    assert repr(aware("vl_adapter()", object())) == "vl_adapter()"


@pytest.mark.parametrize("how", ["share='none'", "weights='compacter', share='down'", "weights='hyperformer++', embed=16"])
def test_tasks_have_their_own_state_and_its_names_are_saved(how, tmp_path):
    base, b = t5(), batch("t5")
    tuned = stir(attach(base, f"vl_adapter(reduce=4, {how}, tasks={TASKS})")).eval()
    with torch.no_grad():
        said = {}
        for name in TASKS:
            tuned.context = {"task": name}
            said[name] = tuned(**b).logits
        assert not torch.allclose(said["vqa"], said["nlvr"], atol=1e-3)
        tuned.context = {"task": ["nlvr", "vqa"]}           # rows of several tasks in one batch
        mixed = tuned(**b).logits
        close(mixed[0], said["nlvr"][0])
        close(mixed[1], said["vqa"][1])
        tuned.context = {"task": "vqa"}
        words = tuned.generate(b["input_ids"], max_new_tokens=4, num_beams=2)
        tuned.save(tmp_path / "state")
        tuned.detach()
        again = save.load(base, tmp_path / "state")
        with pytest.raises(UnknownName, match="caption, vqa, nlvr, and the context names none"):
            again(**b)
        again.context = {"task": "vqa"}
        assert torch.equal(again(**b).logits, said["vqa"])
        assert torch.equal(again.generate(b["input_ids"], max_new_tokens=4, num_beams=2), words)
        again.context = {"task": "captions"}
        with pytest.raises(UnknownName, match="'captions'. Nearest: caption"):
            again(**b)


def test_a_rack_serves_what_asks_for_no_task(tmp_path):
    base, b, alone = tiny.build("gpt2"), tiny.batch("gpt2"), {}
    for k, seed in (("one", 2), ("two", 5)):
        tuned = stir(attach(base, "vl_adapter(reduce=4)", seed=seed)).eval()
        with torch.no_grad():
            alone[k] = tuned(**b).logits
        tuned.save(tmp_path / k)
        tuned.detach()
    attach(base, f"vl_adapter(reduce=4, tasks={TASKS})").save(tmp_path / "many")
    rack = luthier.Rack(tiny.build("gpt2"))
    refused = rack.load_all(tmp_path)
    assert list(refused) == ["many"] and "the context names none" in str(refused["many"])
    out = rack(b, names=["one", "two", "one"]).logits
    for i, k in enumerate(("one", "two", "one")):
        close(out[i], alone[k][i], 1e-4)


# -- VL-Adapter --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", [True, False])
def test_bottlenecks_of_t5(norms):
    base, b = t5(), batch("t5")
    tuned = stir(attach(base, f"vl_adapter(reduce=4, norms={norms})"))
    got = states(tuned, "vl_adapter")

    def weights(name):
        p = got[name]
        return p.D[0], p.d[0], p.U[0], p.u[0]
    said = tuned(**b).logits
    tuned.detach()
    close(said, t5_with(base, weights, got, norms)(**b).logits)
    assert any("norm" in n for n in got) is norms
    assert sum("cross" in n for n in got) == 2 * (1 + norms) and all(len(p.D[0]) == 8 for n, p in got.items() if "out" in n)


@pytest.mark.parametrize("kind", ["bottleneck", "compacter"])
@pytest.mark.parametrize("share", ["all", "up", "down", "none"])
def test_what_tasks_share(kind, share):
    base, b = t5(), batch("t5")
    tuned = stir(attach(base, f"vl_adapter(weights='{kind}', reduce=4, n=4, share='{share}', norms=False, tasks={TASKS})"))
    got = states(tuned, "vl_adapter")
    down, up = {"all": (1, 1), "up": (3, 1), "down": (1, 3), "none": (3, 3)}[share]
    half = {"bottleneck": (8 * 32 + 8, 32 * 8 + 32), "compacter": (64 + 4 * 2 * 8 + 8, 64 + 4 * 8 * 2 + 32)}[kind]
    assert sum(p.numel() for _, p in tuned.trainable()) == 10 * (down * half[0] + up * half[1])
    found = {}
    for k, name in enumerate(TASKS):
        tuned.context = {"task": name}
        found[k] = tuned(**b).logits
    tuned.detach()

    def whole(A, S):                                        # a sum of Kronecker products, one after the other
        return sum(torch.kron(a, s) for a, s in zip(A, S, strict=True))
    for k in range(3):
        def weights(name, k=k):
            p, i, j = got[name], k * (down > 1), k * (up > 1)
            if kind == "bottleneck":
                return p.D[i], p.d[i], p.U[j], p.u[j]
            return whole(p.A[i], p.S[i]), p.d[i], whole(p.B[j], p.R[j]), p.u[j]
        close(found[k], t5_with(base, weights, got)(**b).logits)


@pytest.mark.parametrize("places", [False, True])
def test_hyperformer(places):
    base, b = t5(), batch("t5")
    chain = f"vl_adapter(weights='hyperformer{'++' * places}', reduce=4, code=3, hidden=6, embed=5, tasks={TASKS})"
    plain, tuned = base(**b).logits, attach(base, chain)
    tuned.context = {"task": "nlvr"}
    close(tuned(**b).logits, plain)
    got = states(stir(tuned).eval(), "vl_adapter")
    logits = tuned(**b).logits
    count = sum(p.numel() for _, p in tuned.trainable())
    tuned.detach()
    names = [n for n in got if n.endswith("out")]
    tower = sum((5 * (2 + places) + 1) * 6 + (6 + 1) * 3 + 2 * 3 + 2 * 5 for _ in ("encoder", "decoder"))
    generators = (2 if places else 5) * 4 * (8 * 32 + 8 + 32 * 8 + 32)
    embedded = 3 * 5 + (5 * 5 if places else 0)
    norms = sum(got[n].W.numel() for n in got if "norm" in n)
    assert count == embedded + tower + generators + norms

    def weights(name):
        p = got[name]
        parts = [p.t[2], p.l] + ([p.e] if places else [])
        z = F.linear(torch.relu(F.linear(torch.cat(parts), p.Q, p.q)), p.P, p.p)
        z = (z - z.mean()) / (z.var(unbiased=False) + 1e-6).sqrt() * p.gain + p.beta
        made = [F.linear(z, getattr(p, "G" + x), getattr(p, "g" + x)) for x in "DdUu"]
        return made[0].reshape(8, 32), made[1], made[2].reshape(32, 8), made[3]
    close(logits, t5_with(base, weights, got)(**b).logits)
    shared = {x: len({id(getattr(got[n], x)) for n in names}) for x in ("t", "Q", "l", "GD")}
    assert shared == {"t": 1, "Q": 2, "l": 4, "GD": 2 if places else 5}


def test_a_vision_model_is_left_alone_and_the_projection_trains_beside():
    base = tiny.build("bridged")
    tuned = attach(base, "full(at='connector') >> vl_adapter(reduce=4)")
    names = [p.site_name for p in tuned.states.values()]
    assert any(n.startswith("connector") for n in names) and any(n.startswith("text.block.0.mlp") for n in names)
    assert not any(n.startswith("vision") for n in names)


def test_what_a_hypernetwork_and_kronecker_products_refuse():
    with pytest.raises(BadChain, match="a hypernetwork is what tasks share"):
        luthier.parse("vl_adapter(weights='hyperformer', share='up')")
    with pytest.raises(DoesNotFit, match="n=3 must divide the widths 32 and 8"):
        attach(t5(), "vl_adapter(weights='compacter', n=3, reduce=4)")


# -- what acts on a linear layer's output ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class squared(Method):
    """y + (x ⊙ x)[:d] W^T m, which no weight can do; with W, so that it must come after all that changes it."""
    at: str = "attn.v"

    def init(self, site):
        return dict(m=site.normal(site.d_in))

    def output(self, x, y, p, W):
        return y + (x * x * p.m) @ W.T


def test_an_output_comes_after_all_changes_of_the_weight():
    b = batch("gpt2")
    for chain in (Chain((squared(), *luthier.parse("lora(at='attn.v')"))), luthier.parse("lora(at='attn.v')") >> squared()):
        base = model("gpt2").double()
        tuned = stir(attach(base, chain))
        p, q = states(tuned, "squared"), states(tuned, "lora")
        for fast in (True, False):
            tuned.fast = fast
            said = tuned(**b).logits
            with pytest.raises(NotMergeable, match="squared changes the running model"):
                tuned.merge()
        tuned.detach()
        for i, block in enumerate(base.transformer.h):
            mine, low = p[f"block.{i}.attn.v"], q[f"block.{i}.attn.v"]

            def hook(m, x, y, mine=mine, low=low):          # queries, keys, values: of 32 channels each
                W = m.weight[:, 64:].T + 16 / 8 * low.B @ low.A
                v = F.linear(x[0] + x[0] ** 2 * mine.m, W, m.bias[64:])
                return torch.cat([y[..., :64], v], -1)
            block.attn.c_attn.register_forward_hook(hook)
        close(said, base(**b).logits)


def test_an_output_needs_a_linear_layer():
    with pytest.raises(DoesNotFit, match="squared acts on output, and block.0.attn.norm is a weight site"):
        attach(model("gpt2"), Chain((squared(at="attn.norm"),)))


def test_rows_of_a_rack_have_outputs_of_their_own(tmp_path):
    b, alone = tiny.batch("gpt2"), {None: tiny.build("gpt2")(**tiny.batch("gpt2")).logits}
    for k in ("one", "two"):
        base = tiny.build("gpt2")
        tuned = stir(attach(base, "vl_pet(at='attn.v', values=4)", seed=len(alone))).eval()
        alone[k] = tuned(**b).logits
        tuned.save(tmp_path / k)
    rack, names = luthier.Rack(tiny.build("gpt2")), ["two", None, "one"]
    rack.load_all(tmp_path)
    out = rack(b, names=names).logits
    for i, k in enumerate(names):
        close(out[i], alone[k][i].detach(), 1e-4)
    assert rack.cost()["kinds"][0]["served"] == "row by row"


# -- VL-PET ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["large", "middleX", "middleY", "small"])
@pytest.mark.parametrize("paired", [False, True])
def test_vl_pet_of_t5(gate, paired):
    base, b = t5(), batch("t5") | dict(attention_mask=torch.tensor([[1] * 9, [1] * 6 + [0] * 3]))
    tuned = stir(attach(base, f"vl_pet(gate='{gate}', width=8, heads=2, paired={paired}, rank=3, values=5, scale=1.5)"))
    got, said = states(tuned, "vl_pet"), tuned(**b).logits
    tuned.detach()
    real = b["attention_mask"][..., None].double()

    def adapted(h, p):
        z = gelu(F.linear(h, p.D, p.d))
        if not paired or len(p.U) == 1:
            return h.new_zeros(()) + F.linear(z, p.U[0], p.u)
        return torch.cat([F.linear(z[..., :4], p.U[0]), F.linear(z[..., 4:], p.U[1])], -1) + p.u

    def opened(x, y, p):
        if gate == "large":
            return torch.sigmoid(F.linear(gelu(F.linear(x, p.A, p.a)), p.V, p.v))
        if gate == "middleX":
            return torch.sigmoid(F.linear(x + y, p.A, p.a))
        if gate == "middleY":
            return 1 + p.g
        return ((torch.sigmoid(F.linear(torch.cat([x, y], 2), p.A, p.a)) * real).sum(1) / real.sum(1))[:, None]

    def wrap(layer, out, p):
        layer.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0]))

        def hook(m, args, h):
            y = h + adapted(h, p)
            return 1.5 * y * opened(seen[layer], y, p)
        out.register_forward_hook(hook)
    seen = {}
    for i, (block, other) in enumerate(zip(base.encoder.block, base.decoder.block, strict=True)):
        wrap(block.layer[0], block.layer[0].SelfAttention.o, got[f"encoder.block.{i}.attn.out"])
        wrap(block.layer[1], block.layer[1].DenseReluDense.wo, got[f"encoder.block.{i}.mlp.out"])
        for place, layer in zip(("attn", "mlp"), block.layer, strict=True):
            layer.layer_norm.weight.data += got[f"encoder.block.{i}.{place}.norm"].W[:, 0]
        p = got[f"decoder.block.{i}.cross.v"]
        other.layer[1].EncDecAttention.v.register_forward_hook(lambda m, x, y, p=p: y + adapted(x[0], p))
    base.encoder.final_layer_norm.weight.data += got["encoder.final.norm"].W[:, 0]
    close(said, base(**b).logits)


def test_granularities():
    base, x, counts = t5(), torch.randn(2, 9, 32, dtype=torch.float64), {}
    for gate, shape in dict(large=(2, 9, 32), small=(2, 1, 1), middleX=(2, 9, 1), middleY=(1, 1, 32)).items():
        method, = chain = luthier.parse(f"vl_pet(gate='{gate}', width=8, rank=3)")
        tuned = attach(base, chain)
        got = states(tuned, "vl_pet")
        assert method.granularity(x, x + 1, got["encoder.block.0.attn.out"]).shape == shape
        counts[gate] = sum(p.numel() for _, p in tuned.trainable())
        assert not any(n.startswith("decoder") and not n.endswith("cross.v") for n in got)
        tuned.detach()
    gates = dict(large=3 * 32 + 3 + 32 * 3 + 32, small=2 * 32 + 1, middleX=32 + 1, middleY=32)
    rest = 4 * (8 * 32 + 8 + 32 * 8 + 32) + 5 * 32 + 2 * (96 * 32 + 96 + 32 * 96 + 32)
    assert counts == {k: rest + 4 * n for k, n in gates.items()} and list(counts) == sorted(counts, key=counts.get)[::-1]


def test_heads_joined_are_one_matrix_and_the_start_may_be_the_base():
    base, b = t5(), batch("t5")
    plain, said = base(**b).logits, []
    for heads in (1, 4):
        tuned = attach(base, f"vl_pet(width=8, heads={heads}, scale=2.0)")
        close(tuned(**b).logits, plain)
        said.append(stir(tuned)(**b).logits)
        tuned.detach()
    assert torch.equal(*said)
    with pytest.raises(DoesNotFit, match="heads=3 must divide width=8"):
        attach(base, "vl_pet(width=8, heads=3)")
    with pytest.raises(DoesNotFit, match="encoder.embed is none of them"):
        attach(base, "vl_pet(at='encoder.embed')")


# -- p-Adapter ---------------------------------------------------------------------------------------------------------


def messages(A, Q, V, p, mu):
    """The formula, a node at a time. A: (T, S), Q: (T, k), V: (S, k)."""
    out = torch.zeros_like(Q)
    for i in range(len(Q)):
        a = torch.stack([A[i, j] * (A[i, j] * ((Q[i] - V[j]) ** 2).sum() + 1e-6) ** ((p - 2) / 2) for j in range(len(V))])
        alpha = 1 / (a.sum() + 2 * mu / p)
        out[i] = alpha * sum(a[j] * V[j] for j in range(len(V))) + alpha * (2 * mu / p) * Q[i]
    return out


@pytest.mark.parametrize("p", [1.25, 2.0, 3.0])
def test_messages_on_the_graph_of_attention(p):
    A, Q, V = torch.rand(2, 5, 7).double().softmax(-1), torch.randn(2, 5, 3).double(), torch.randn(2, 7, 3).double()
    got = propagate(A, Q, V, p, 0.4)
    for h in range(2):
        close(got[h], messages(A[h], Q[h], V[h], p, 0.4))
    if p == 2:                                              # plain propagation
        close(got, (A @ V + 0.4 * Q) / 1.4)


@pytest.mark.parametrize("p, learn", [(1.5, True), (2.0, False)])
def test_p_adapter_of_t5(p, learn):
    base, b = t5(), batch("t5")
    plain, tuned = base(**b).logits, attach(base, f"p_adapter(reduce=4, p={p}, mu=0.3, learn={learn})")
    close(tuned(**b).logits, plain)
    got, said = states(stir(tuned, 0.1), "p_adapter"), tuned(**b).logits
    assert {n.split(".", 3)[-1] for n in got} == {"attn", "cross", "attn.out", "cross.out", "mlp.in", "mlp.out"}
    assert got["decoder.block.0.cross"].p.requires_grad is learn
    tuned.detach()
    handles = []

    def beside(dense, q):
        return dense.register_forward_hook(lambda m, x, h: h + F.linear(torch.relu(F.linear(x[0], q.D, q.d)), q.U, q.u))

    def behind(module, core, out, alone):
        def hook(m, args, kwargs, result):
            x = args[0] if args else kwargs["hidden_states"]
            z = kwargs.get("key_value_states")
            z = x if z is None else z
            q, k, v = (f(y).unflatten(-1, (4, 8)).transpose(1, 2) for f, y in ((m.q, x), (m.k, z), (m.v, z)))
            s = q @ k.mT + kwargs_bias(m, q, k, alone)
            A = s.softmax(-1)
            V, Q = (F.linear(m.o(y.transpose(1, 2).flatten(2)), core.D, core.d).unflatten(-1, (4, -1)).transpose(1, 2)
                    for y in (v, q))
            mu = 0.3 * (2 + torch.tanh(core.m))
            made = torch.stack([torch.stack([messages(A[i, h], (V if alone else Q)[i, h], V[i, h], core.p, mu)
                                             for h in range(4)]) for i in range(2)])
            made = made.transpose(1, 2).flatten(2)
            h = result[0]
            change = F.linear(F.gelu(F.linear(h, out.G, out.g)) * made, out.U, out.u)
            return (h + change, *result[1:])
        return module.register_forward_hook(hook, with_kwargs=True)

    def kwargs_bias(m, q, k, alone):                        # T5's own bias of positions, of the first block, and causality
        T, S = q.shape[2], k.shape[2]
        if m.is_decoder is False or alone:
            return base.encoder.block[0].layer[0].SelfAttention.compute_bias(T, S)
        if T != S:
            return 0.0
        causal = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)
        return base.decoder.block[0].layer[0].SelfAttention.compute_bias(T, T) + causal
    for tower, stack in (("encoder", base.encoder), ("decoder", base.decoder)):
        for i, block in enumerate(stack.block):
            at = f"{tower}.block.{i}."
            handles.append(behind(block.layer[0].SelfAttention, got[at + "attn"], got[at + "attn.out"], tower == "encoder"))
            if tower == "decoder":
                handles.append(behind(block.layer[1].EncDecAttention, got[at + "cross"], got[at + "cross.out"], False))
            handles.append(beside(block.layer[-1].DenseReluDense, got[at + "mlp.out"]))
    close(said, base(**b).logits)


def test_parts_of_p_adapter_can_be_left_out():
    tuned = attach(tiny.build("bridged"), "p_adapter(reduce=4, ffn=False)")
    assert {n.rpartition(".block.")[0] for n in states(tuned, "p_adapter")} == {"text"}
    assert not any("mlp" in n for n in states(tuned, "p_adapter"))
