"""Each check of the contract catches a planted fault: in a method, or in the machinery that every method rests on."""

import os
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from luthier import Tuned, check, cost, merging, save
from luthier.host import Host
from luthier.method import REGISTRY, discover, lookup

discover()
lora, houlsby, adaptformer, prefix, prompt, randlora, ia3, bitfit = map(lookup, (
    "lora", "houlsby", "adaptformer", "prefix", "prompt", "randlora", "ia3", "bitfit"))
ATTACH = sys.modules["luthier.attach"]       # the module; luthier.attach is the function
MUTANTS = {}


def mutant(wants, model="vit"):
    """Plant the class's fault; `wants` is the check that must notice."""
    def plant(cls):
        MUTANTS[cls.__doc__] = cls, wants, model
        return cls
    return plant


def caught(cls, wants, model, monkeypatch):
    cls.__name__ = "mutant"
    monkeypatch.setitem(REGISTRY, "mutant", cls)
    return [r for r in check.cell("mutant", model, torch.float32, [wants]) if r.verdict == "FAIL"]


# -- identity_at_init -----------------------------------------------------------------------------------------
@mutant("identity_at_init")
class _(lora):
    """B does not start at zero"""
    def init(self, site):
        d = super().init(site)
        d["B"].data.normal_(generator=torch.Generator().manual_seed(0))
        return d


@mutant("identity_at_init", "bert")
class _(houlsby):
    """an adapter that starts with a small push"""
    def stream(self, t, p):
        return super().stream(t, p).map_h(lambda h: h * 1.01)


@mutant("identity_at_init", "llama")
class _(prefix):
    """a prefix without its exemption"""
    exempt = {}


@mutant("identity_at_init", "gpt2")
class _(randlora):
    """a weight that is a thousandth too large"""
    def weight(self, W, p):
        return super().weight(W, p) * 1.001


# -- acts_when_perturbed --------------------------------------------------------------------------------------
@mutant("acts_when_perturbed")
class _(lora):
    """the update is multiplied by zero"""
    def weight(self, W, p):
        return W + 0 * p.B @ p.A

    def fast(self, x, y, p):
        return y + 0 * (x @ p.A.T) @ p.B.T


@mutant("acts_when_perturbed", "t5")
class _(adaptformer):
    """the stream is computed and thrown away"""
    def stream(self, t, p):
        super().stream(t, p)
        return t


@mutant("acts_when_perturbed", "llama")
class _(prompt):
    """a prompt that is inserted and dropped at once"""
    exempt = {}

    def stream(self, t, p):
        return t


# -- same_from_seed -------------------------------------------------------------------------------------------
@mutant("same_from_seed")
class _(lora):
    """A is drawn from torch's global generator"""
    def init(self, site):
        return super().init(site) | dict(A=nn.Parameter(torch.randn(self.rank, site.d_in).to(site.like)))


@mutant("same_from_seed", "gpt2")
class _(houlsby):
    """the start depends on the time of day"""
    def init(self, site):
        d = super().init(site)
        next(v for v in d.values() if v.any()).data.mul_(1 + int.from_bytes(os.urandom(4), "little") / 2**32)
        return d


# -- fast_equals_weight ---------------------------------------------------------------------------------------
@mutant("fast_equals_weight")
class _(lora):
    """fast forgets alpha / rank"""
    def fast(self, x, y, p):
        return y + (x @ p.A.T) @ p.B.T


@mutant("fast_equals_weight")
class _(lora):
    """fast gives the right value and half of A's gradient"""
    def fast(self, x, y, p):
        return y + self.alpha / self.rank * (x @ ((p.A + p.A.detach()) / 2).T) @ p.B.T


@mutant("fast_equals_weight", "gpt2")
class _(ia3):
    """fast scales a hundredth too much"""
    def fast(self, x, y, p):
        return super().fast(x=x, y=y, p=p) * 1.01 if "x" in self.wants("fast") else y * 1.01


# -- only_declared_train --------------------------------------------------------------------------------------
@mutant("only_declared_train")
class _(lora):
    """a Parameter that nothing reads"""
    def init(self, site):
        return super().init(site) | dict(C=site.zeros(3))


@mutant("only_declared_train", "bert")
class _(houlsby):
    """the stream is cut off from its gradients"""
    def stream(self, t, p):
        out = super().stream(t, p)
        return out.map_h(lambda h: t.h + (h - t.h).detach())


@mutant("only_declared_train", "llama")
class _(lora):
    """the base is unfrozen at one site"""
    def fast(self, x, y, p):
        return super().fast(x, y, p) + 0 * self.base.sum()

    def init(self, site):
        site.parameter.requires_grad_(True)
        self.__dict__["base"] = site.parameter
        return super().init(site)


@mutant("only_declared_train", "vit")
class _(lora):
    """something trains that is not in the state"""
    def init(self, site):
        self.__dict__.setdefault("own", nn.Parameter(torch.zeros(1)))
        return super().init(site)

    def fast(self, x, y, p):
        return super().fast(x, y, p) + self.own


@mutant("only_declared_train", "clip")
class _(ia3):
    """gradients that are not finite"""
    def fast(self, x, y, p):
        q = next(p.parameters())
        return y + (q - q).sqrt().sum()


# -- base_never_written ---------------------------------------------------------------------------------------
@mutant("base_never_written")
class _(randlora):
    """weight works in place"""
    def weight(self, W, p):
        W.data.add_(1e-4)
        return super().weight(W, p)


@mutant("base_never_written", "resnet")
class _(bitfit):
    """a schedule that writes the base's bias"""
    def step(self, run):
        for s in run.sites.values():
            s.module.bias.data.mul_(0.9)


@mutant("base_never_written", "gpt2")
class _(houlsby):
    """init normalises a base tensor"""
    def init(self, site):
        next(site.module.parameters()).data.mul_(1.01)
        return super().init(site)


# -- merge_equals_forward -------------------------------------------------------------------------------------
@mutant("merge_equals_forward")
class _(randlora):
    """a weight that is drawn anew each time"""
    def weight(self, W, p):
        return super().weight(W, p) + 0.3 * torch.randn_like(W)


@mutant("merge_equals_forward", "bert")
class _(lora):
    """weight and fast are not the same change"""
    def weight(self, W, p):
        return super().weight(W, p) * 1.01


# -- written_equals_merged ------------------------------------------------------------------------------------
@mutant("written_equals_merged", "llama")
class _(lookup("dare")):
    """rows that are in another order when they are made alone"""
    def init(self, site, rows=slice(None)):
        d = super().init(site, rows)
        return d if rows.start in (None, 0) else {n: t.flip(0) for n, t in d.items()}


# -- detach_restores ------------------------------------------------------------------------------------------
@mutant("detach_restores")
class _(lora):
    """init leaves a hook behind"""
    def init(self, site):
        site.module.register_forward_hook(lambda m, a, o: None)
        return super().init(site)


@mutant("detach_restores", "gpt2")
class _(houlsby):
    """init leaves a note on the module"""
    def init(self, site):
        site.module.adapted = True
        return super().init(site)


@mutant("detach_restores", "llama")
class _(lora):
    """init puts an equal tensor in the base's place"""
    def init(self, site):
        site.module.weight = nn.Parameter(site.module.weight.detach().clone())
        return super().init(site)


@mutant("detach_restores", "vit")
class _(prefix):
    """init changes the configuration"""
    def init(self, site):
        site.module.config.hidden_act = "relu"
        return super().init(site)


# -- save_load_equal ------------------------------------------------------------------------------------------
@mutant("save_load_equal")
class _(lora):
    """half of the state lies in the method"""
    def init(self, site):
        self.__dict__.setdefault("own", {})[site.name] = 1 + os.urandom(1)[0] / 256
        return super().init(site)

    def fast(self, x, y, p):
        return super().fast(x, y * self.own[p.site_name], p)


@mutant("save_load_equal", "llama")
class _(lora):
    """a fixed tensor that init cannot make again"""
    def init(self, site):
        return super().init(site) | dict(R=site.fixed(torch.full((site.d_out,), os.urandom(1)[0] / 256)))

    def fast(self, x, y, p):
        return super().fast(x, y + p.R, p)


@mutant("save_load_equal", "bert")
class _(houlsby):
    """a count that is hidden from the file"""
    def stream(self, t, p):
        p.__dict__["_runs"] = p.__dict__.get("_runs", 0) + 1
        return super().stream(t, p).map_h(lambda h: h * (1 + 0.01 * p._runs))


# -- loads_no_code --------------------------------------------------------------------------------------------
class Bomb:
    def __reduce__(self):
        return len, ("",)


@mutant("loads_no_code")
class _(lora):
    """init unpickles something"""
    def init(self, site):
        pickle.loads(pickle.dumps(Bomb()))
        return super().init(site)


@mutant("loads_no_code", "gpt2")
class _(houlsby):
    """init starts a program"""
    def init(self, site):
        os.system("true")
        return super().init(site)


# -- cost_is_counted ------------------------------------------------------------------------------------------
@mutant("cost_is_counted")
class _(lora):
    """work that depends on values, so that no forecast of it is right"""
    def fast(self, x, y, p):
        return super().fast(x, y, p) if p.A.sum() > 1e9 else super().fast(x, y, p) + 0 * super().fast(x, y, p)


@mutant("cost_is_counted", "bert")
class _(houlsby):
    """work that is not done when somebody counts"""
    def stream(self, t, p):
        from torch._subclasses.fake_tensor import FakeTensor

        return t if isinstance(t.h, FakeTensor) else super().stream(t, p)


# -- survives_deepcopy ----------------------------------------------------------------------------------------
@mutant("survives_deepcopy")
class _(lora):
    """the state is held by a function, which a copy shares"""
    def init(self, site):
        d = super().init(site)
        return d | dict(change=lambda x: x @ d["A"].T @ d["B"].T)

    def fast(self, x, y, p):
        return y + p.change(x)


class Uncopied(nn.Parameter):
    def __deepcopy__(self, memo):
        return self


@mutant("survives_deepcopy", "llama")
class _(houlsby):
    """tensors that refuse to be copied"""
    def init(self, site):
        return {n: Uncopied(v.data) for n, v in super().init(site).items()}


# -- autocast -------------------------------------------------------------------------------------------------
@mutant("autocast")
class _(lora):
    """fast insists on one dtype"""
    def fast(self, x, y, p):
        assert y.dtype == p.A.dtype, "wrong dtype"
        return super().fast(x, y, p)


@mutant("autocast", "gpt2")
class _(houlsby):
    """overflows in half precision"""
    def stream(self, t, p):
        return super().stream(t, p).map_h(lambda h: h + (h * torch.inf * 0 if torch.is_autocast_enabled("cpu") else 0))


# -- checkpointing --------------------------------------------------------------------------------------------
@mutant("checkpointing")
class _(houlsby):
    """a stream that is another one the second time it runs"""
    def stream(self, t, p):
        p.__dict__["_runs"] = p.__dict__.get("_runs", 0) + 1
        return super().stream(t, p).map_h(lambda h: h * p._runs)


@mutant("checkpointing", "llama")
class _(lora):
    """no gradient while it is recomputed"""
    def fast(self, x, y, p):
        out = super().fast(x, y, p)
        return y + (out - y) * (2 if torch._C._current_graph_task_id() != -1 else 1)


# -- generates ------------------------------------------------------------------------------------------------
@mutant("generates", "llama")
class _(houlsby):
    """reads all earlier tokens, which are not there when one is decoded at a time"""
    def stream(self, t, p):
        return super().stream(t, p).map_h(lambda h: h + 0.1 * h.cumsum(1))


@mutant("generates", "gpt2")
class _(houlsby):
    """depends on how many tokens there are"""
    def stream(self, t, p):
        return t.map_h(lambda h: h * (1 + 0.1 * (h.shape[1] > 1)) + 0 * next(iter(p.parameters())).sum())


# -- compiles -------------------------------------------------------------------------------------------------
@mutant("compiles")
class _(lora):
    """another method when it is compiled"""
    def fast(self, x, y, p):
        return super().fast(x, y, p) + (1.0 if torch.compiler.is_compiling() else 0.0)


@mutant("compiles", "llama")
class _(houlsby):
    """tracing leaves something out"""
    def stream(self, t, p):
        return t if torch.compiler.is_compiling() else super().stream(t, p)


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_fault_is_caught(fault, monkeypatch):
    assert caught(*MUTANTS[fault], monkeypatch), f"{MUTANTS[fault][1]} did not notice: {fault}"


def test_every_check_has_a_mutant_and_more_than_one_method_is_mutated():
    assert {wants for _, wants, _ in MUTANTS.values()} == set(check.CHECKS)
    assert len({cls.__mro__[1].__name__ for cls, _, _ in MUTANTS.values()}) > 5
    assert len({model for _, _, model in MUTANTS.values()}) > 5


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_method_itself_passes_there(fault, monkeypatch):
    """Else the mutant would prove nothing."""
    cls, wants, model = MUTANTS[fault]
    rows = check.cell(cls.__mro__[1].__name__, model, torch.float32, [wants])
    assert [r.verdict for r in rows][0] in ("pass", "exempt", "n/a"), rows


# -- what is judged over all models ---------------------------------------------------------------------------
def test_exemptions_are_strict(monkeypatch):
    def faults(name, **over):
        cls = type("mutant", (lookup(name),), over)
        monkeypatch.setitem(REGISTRY, "mutant", cls)
        rows = [r for m in ("vit", "resnet") for r in check.cell("mutant", m, torch.float32, ["identity_at_init"])]
        return [r.why for r in check.judge("mutant", rows) if r.verdict == "FAIL"]

    assert faults("lora") == []
    assert "needless exemption" in faults("houlsby", exempt={"identity_at_init": "?"})[0]
    assert "names no check. Nearest: identity_at_init" in faults("lora", exempt={"identity": "?"})[0]
    assert "applies to none" in faults("lora", example={"at": "no.such.site"})[-1]


# -- faults of the machinery ----------------------------------------------------------------------------------
def fails(wants, name="lora", model="llama"):
    return [r for r in check.cell(name, model, torch.float32, [wants]) if r.verdict == "FAIL"]


def wrap(monkeypatch, where, name, change):
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: change(real, *a, **k))


MACHINE = {
    "flags are not put back": ("detach_restores", lambda mp: wrap(
        mp, Host, "drop", lambda real, self, o: (real(self, o), [p.requires_grad_(False) for p in self.model.parameters()]))),
    "a hook is forgotten": ("detach_restores", lambda mp: wrap(
        mp, Host, "drop", lambda real, self, o: (real(self, o), self.model.register_forward_hook(lambda *a: None)))),
    "a schedule writes the base": ("base_never_written", lambda mp: wrap(
        mp, Tuned, "step", lambda real, self, o=None: (real(self, o), next(self.base.parameters()).data.add_(1)))),
    "bytes are rounded": ("cost_is_counted", lambda mp: wrap(mp, cost, "stored_bytes", lambda real, t: real(t) // 1000 * 1000)),
    "attention is not counted": ("cost_is_counted", lambda mp: wrap(mp, cost, "counted", _less)),
    "loaded tensors are rounded": ("save_load_equal", lambda mp: wrap(
        mp, save._Filler, "_of", lambda real, self, v, t: real(self, v.bfloat16().float(), t))),
    "loaded tensors are frozen": ("save_load_equal", lambda mp: wrap(
        mp, save._Filler, "_of", lambda real, self, v, t: real(self, v, t | dict(trained=False)))),
    "a stray file is written": ("loads_no_code", lambda mp: wrap(
        mp, save, "write", lambda real, f, files: real(f, files | {"more.bin": lambda p: p.write_bytes(b"")}))),
    "written weights are rounded": ("written_equals_merged", lambda mp: wrap(
        mp, merging, "composed", lambda real, P, b, es: tuple(t if t is None else t.bfloat16().float() for t in real(P, b, es)))),
    "merged weights are rounded": ("merge_equals_forward", lambda mp: wrap(
        mp, ATTACH, "_frozen", lambda real, t: real(t.bfloat16().float()))),
}


def _less(real, tuned, batch):
    found = real(tuned, batch)
    return replace(found, flops=found.flops - 1)


@pytest.mark.parametrize("fault", MACHINE)
def test_a_fault_of_the_machinery_is_caught(fault, monkeypatch):
    wants, plant = MACHINE[fault]
    assert not fails(wants)
    with monkeypatch.context() as m:
        plant(m)
        assert fails(wants), f"{wants} did not notice: {fault}"
