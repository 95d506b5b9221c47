"""The contract of every method, checked: `luthier check NAME | --all | --import my_method.py`.

Each check runs on tiny models of ten kinds in two dtypes. A check returns None when it passed or a reason why it does not
apply, and raises AssertionError when it failed. What a method cannot keep it names in `exempt`, with the reason; an exemption
that nothing needs fails, too. A method must apply to at least one of the models.
"""

import copy
import itertools
import json
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from . import save, tiny
from .attach import attach, attached
from .errors import BadOrder, DoesNotFit, LuthierError, NoSuchSite, NotMergeable, nearest
from .merging import Merged, NeedsAll
from .method import Chain, discover, lookup, parse

TOL = {torch.float32: 2e-5, torch.bfloat16: 5e-2}          # of the largest output; the only tolerances there are
DTYPES = tuple(TOL)
CHECKS = {}
RUNNING = ("output", "stream", "attend")
INAPPLICABLE = (NoSuchSite, DoesNotFit, BadOrder)


@dataclass(frozen=True)
class Row:
    method: str
    model: str
    dtype: str
    check: str
    verdict: str                           # pass | FAIL | exempt | n/a
    why: str = ""


def check(fn):
    CHECKS[fn.__name__] = fn
    return fn


# -- one chain on one model -----------------------------------------------------------------------------------
class Case:
    def __init__(self, chain, name, dtype, folder):
        self.chain, self.name, self.dtype, self.folder = chain, name, dtype, Path(folder)
        self.batch = tiny.batch(name, dtype)
        self.data = [tiny.batch(name, dtype, seed) for seed in (5, 6)]
        self.made = []
        self.renew()

    def renew(self):
        self.model = tiny.build(self.name, self.dtype)
        self.base = run(self.model, self.batch)
        self.before = Snapshot(self.model)

    def has(self, verb):
        return any(m.has(verb) for m in self.chain)

    def excused(self, name):
        return any(name in m.exempt for m in self.chain)

    def attach(self, seed=0, jiggled=True):
        """The chain on the model; jiggled: every trained tensor moved away from its start, as training would."""
        tuned = attach(self.model, self.chain, data=self.data, seed=seed, loss=loss)
        self.made.append(tuned)
        return jiggle(tuned) if jiggled else tuned

    def tidy(self):
        """The model bare again for the next check: detached where that works, else a new one."""
        try:
            for tuned in reversed(self.made):
                tuned.detach()
            self.model.eval()
            clean = not attached(self.model) and self.before.differs(self.model) is None
        except Exception:
            clean = False
        self.made = []
        if not clean:
            self.renew()

    def close(self, a, b, what):
        gap, scale = (a - b).abs().max().float(), b.abs().max().float()
        assert gap <= TOL[self.dtype] * scale, f"{what}: off by {gap / scale:.1e} of the largest value"


def run(model, batch):
    with torch.no_grad():
        return tiny.output(model, batch)


def loss(model, batch):
    """Some scalar that every output has a say in, and that no normalisation makes constant."""
    y = tiny.output(model, batch).float()
    return (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() / y.numel() ** 0.5 + 0.1 * y.square().mean()


def gradient(tuned, batch):
    """The gradients of everything that trains, in one row; zeros where there is none."""
    wanted = [p for _, p in tuned.trainable()]
    found = torch.autograd.grad(loss(tuned, batch), wanted, allow_unused=True)
    return torch.cat([p.new_zeros(p.numel()) if g is None else g.flatten() for p, g in zip(wanted, found, strict=True)])


def both_ways(tuned, fn):
    """fn() with the fast path on, and off"""
    found = []
    for tuned.fast in (True, False):
        found.append(fn())
    return found


def jiggle(tuned, seed=3):
    g = torch.Generator().manual_seed(seed)
    for _, p in tuned.trainable():
        p.data.add_(0.1 * torch.randn(p.shape, generator=g).to(p))
    return tuned


class Snapshot:
    """Everything about a model that detaching must bring back: objects by identity, tensors by their bits."""

    def __init__(self, model):
        self.things, self.tensors = {}, {}
        for path, m in model.named_modules(remove_duplicate=False):
            for k, v in vars(m).items():
                if k in ("_parameters", "_buffers"):
                    for n, t in v.items():
                        self.things[path, k, n] = t, id(t), None if t is None else (t.requires_grad, t.dtype, t.grad)
                        if t is not None and id(t) not in self.tensors:
                            self.tensors[id(t)] = f"{path}.{n}", t, t.detach().clone()
                elif k.endswith("_hooks") or "_hooks_" in k:
                    self.things[path, k] = v, None, [id(h) for h in v.values()] if isinstance(v, dict) else v
                elif k != "training":
                    plain = v is None or isinstance(v, bool | int | float | str)
                    self.things[path, k] = v, None if plain else id(v), v if plain else None
        config = getattr(model, "config", None)
        self.config = config.to_dict() if hasattr(config, "to_dict") else None

    def written(self):
        """Names of tensors whose bits changed since."""
        return [name for name, t, old in self.tensors.values() if not torch.equal(t.detach(), old)]

    def differs(self, model):
        now = Snapshot(model)
        for key in self.things.keys() | now.things.keys():
            if key not in now.things or key not in self.things or self.things[key][1:] != now.things[key][1:]:
                how = "gone" if key not in now.things else "left behind" if key not in self.things else "changed"
                return f"{'.'.join(key)} is {how}"
        if self.config != now.config:
            return "the config changed"
        return next((f"the bits of {name} changed" for name in self.written()), None)


# -- the checks -----------------------------------------------------------------------------------------------
@check
def identity_at_init(c):
    """Attached and not yet trained, the model computes what it did."""
    c.close(run(c.attach(jiggled=False), c.batch), c.base, "attaching changed the output")


@check
def acts_when_perturbed(c):
    """The state reaches the output."""
    tuned = c.attach(jiggled=False)
    start = run(tuned, c.batch) if tuned.trainable() else c.base
    if not tuned.trainable() and not c.excused("identity_at_init"):
        return "nothing trains, nothing changes"
    y = run(jiggle(tuned), c.batch)
    assert y.shape == c.base.shape, f"the output's shape became {tuple(y.shape)}"
    assert y.isfinite().all(), "the output is not finite"
    assert (y - start).abs().max() > TOL[torch.float32] * start.abs().max(), "moving every trained tensor changed nothing"


@check
def same_from_seed(c):
    """The start depends on the seed alone, and drawing it leaves torch's own generator where it was."""
    states = []
    for _ in range(2):
        torch.randn(3)
        before = torch.get_rng_state()
        tuned = c.attach(jiggled=False)
        assert torch.equal(before, torch.get_rng_state()), "attaching drew from torch's global generator"
        states.append({n: t.clone() for n, t in [*tuned.states.named_parameters(), *tuned.states.named_buffers()]})
        tuned.detach()
    assert states[0].keys() == states[1].keys(), "two attachments have other states"
    for n, t in states[0].items():
        assert torch.equal(t, states[1][n]), f"{n} differs between two attachments with one seed"


@check
def fast_equals_weight(c):
    """`fast` computes what `weight` specifies; its gradients too, in float64, where a coarse step cannot flip by rounding."""
    if not c.has("fast"):
        return "no fast verb"
    tuned = c.attach()
    c.close(*both_ways(tuned, lambda: run(tuned, c.batch)), "fast and weight differ")
    if c.dtype == torch.float32 and tuned.trainable():
        tuned.double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in c.batch.items()}
        c.close(*both_ways(tuned, lambda: gradient(tuned, batch)), "gradients of fast and weight differ")
        c.renew()


@check
def only_declared_train(c):
    """Exactly the tensors that init returned as Parameters get gradients, and each of them does."""
    tuned = c.attach()
    total = loss(tuned, c.batch) + tuned.penalty()
    leaves, todo, seen = [], [total.grad_fn], set()
    while todo:                            # every leaf that the graph would write a gradient to
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves += [node.variable] if hasattr(node, "variable") else []
        todo += [n for n, _ in node.next_functions]
    mine = {id(p): n for n, p in tuned.trainable()}
    base = {id(t): n for n, t, _ in c.before.tensors.values()}
    for leaf in leaves:
        assert id(leaf) in mine, f"{base.get(id(leaf), 'a tensor outside the state')} {tuple(leaf.shape)} would be trained"
    assert not mine or total.requires_grad, "nothing that trains reaches the loss"
    if not mine:
        return "nothing trains"
    total.backward()
    dead = [n for n, p in tuned.trainable() if p.grad is None or not p.grad.any()]
    assert not dead, f"no gradient reaches {', '.join(dead[:3])} ({len(dead)} of {len(mine)})"
    assert all(p.grad.isfinite().all() for _, p in tuned.trainable()), "a gradient is not finite"
    assert all(t.grad is None for _, t, _ in c.before.tensors.values()), "a base tensor has a gradient"


@check
def base_never_written(c):
    """Forward, backward, optimizer and schedule leave every base tensor, buffers included, as it was to the bit."""
    tuned = c.attach().train()
    if tuned.trainable():
        optimizer = torch.optim.AdamW([p for _, p in tuned.trainable()], lr=1e-2)
        (loss(tuned, c.batch) + tuned.penalty()).backward()
        optimizer.step()
        tuned.total_steps = 2
        tuned.step(optimizer)
        optimizer.zero_grad()
    run(tuned, c.batch)
    tuned.eval()
    run(tuned, c.batch)
    written = c.before.written()
    assert not written, f"{', '.join(written[:3])} changed"


@check
def merge_equals_forward(c):
    """Merged weights give the same output, and unmerging the very same; what is not a weight change is refused."""
    tuned = c.attach()
    y, weights = run(tuned, c.batch), all(m.has("weight") and not any(map(m.has, RUNNING)) for m in c.chain)
    try:
        tuned.merge()
    except NotMergeable as e:
        assert not weights or "bias" in str(e), f"refused to merge a change of weights: {e}"
        assert torch.equal(run(tuned, c.batch), y), "a refused merge changed the output"
        return None
    assert weights, "merged what is not a change of weights"
    c.close(run(tuned, c.batch), y, "merged and unmerged differ")
    c.close(run(c.model, c.batch), y, "the merged model by itself differs")
    tuned.unmerge()
    assert torch.equal(run(tuned, c.batch), y), "unmerging did not bring back the same output"


@check
def written_equals_merged(c):
    """What is written to disk site by site, without attaching, is to the bit what merging in memory gives."""
    tuned = c.attach()
    tuned.save(c.folder / "tuned")
    try:
        tuned.merge()
    except NotMergeable:
        return "does not merge"
    want, names, fixed = {n: p.detach() for n, p in c.model.named_parameters()}, [], not tuned.trainable()
    tuned.detach()
    recipe, chain, state = save.contents(c.model, c.folder / "tuned", lazy=True)
    for source in (state, None) if fixed and not any(m.observes for m in chain) else (state,):    # from its file, and made anew
        try:
            lean = Merged(c.model, chain, recipe["seed"], source, size=300)
            lean.save_file(dict(c.model.named_parameters()), c.folder / "written.safetensors")
            lean.check()
        except NeedsAll:
            return "merges in memory only"
        with safe_open(c.folder / "written.safetensors", "pt") as f:
            names = [n for n in f.keys() if not torch.equal(f.get_tensor(n), want[n])]
        assert not names, f"{', '.join(names[:3])} differ"


@check
def detach_restores(c):
    """The very same tensors, flags, hooks, forwards, dtype and tied-ness; after use, after training, after merging."""
    for merged in (False, True):
        tuned = c.attach()
        run(tuned, c.batch)
        if tuned.trainable():
            loss(tuned, c.batch).backward()
        if merged:
            try:
                tuned.merge()
            except NotMergeable:
                pass
        assert tuned.detach() is c.model, "detach() returned another model"
        odd = c.before.differs(c.model)
        assert odd is None, f"{'after merging, ' if merged else ''}{odd}"
        assert torch.equal(run(c.model, c.batch), c.base), "the detached model computes something else"


@check
def save_load_equal(c):
    """A loaded state is the saved one to the bit, trains the same tensors, and takes no more room than its tensors need."""
    tuned = c.attach()
    run(tuned, c.batch)                    # it has been in use: what that left behind is saved, too
    y, names = run(tuned, c.batch), [n for n, _ in tuned.trainable()]
    values = [p.detach().clone() for _, p in tuned.trainable()]
    tuned.save(c.folder / "state", extra={"a": [1]})
    need, size = save.stored_bytes(tuned), (c.folder / "state" / save.STATE).stat().st_size
    keys = sum(len(step["tensors"]) for step in save.packed(tuned)[0])
    assert need <= size <= need + 256 + 256 * keys, f"{size} bytes on disk for {need} bytes of tensors"
    tuned.detach()
    again = save.load(c.model, c.folder / "state")
    assert torch.equal(run(again, c.batch), y), "the loaded state computes something else"
    assert [n for n, _ in again.trainable()] == names, "the loaded state trains other tensors"
    assert all(map(torch.equal, values, (p for _, p in again.trainable()))), "a loaded tensor differs"


@check
def loads_no_code(c):
    """A saved folder is safetensors and JSON, and loading it runs nothing that came with it."""
    c.attach().save(c.folder / "inert")
    files = sorted(p.name for p in (c.folder / "inert").iterdir())
    assert files == [save.RECIPE, save.STATE], f"the folder holds {files}"
    json.loads((c.folder / "inert" / save.RECIPE).read_text())
    c.renew()
    with _watched() as events:
        save.load(c.model, c.folder / "inert")
    assert not events, f"loading ran {events[0]}"


@check
def cost_is_counted(c):
    """What cost() says is what is there: parameters, bytes in the file, FLOPs of a forward pass."""
    from . import cost

    if c.dtype != torch.float32:
        return "counted in fp32"
    tuned = c.attach()
    said = cost.counted(tuned, c.batch)
    assert said.parameters == sum(p.numel() for _, p in tuned.trainable()), "trained parameters"
    tuned.save(c.folder / "bytes")
    raw = (c.folder / "bytes" / save.STATE).read_bytes()
    there = len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert 0 <= there - said.stored < 8, f"{said.stored} bytes said, {there} in the file"
    there = cost.flops(lambda: run(tuned, c.batch))
    assert said.flops == there, f"{said.flops} FLOPs said, {there} counted"
    tuned.detach()
    there = cost.flops(lambda: run(c.model, c.batch))
    assert said.base_flops == there, f"{said.base_flops} FLOPs said of the base, {there} counted"


@check
def survives_deepcopy(c):
    """A copy computes the same, and neither knows of the other afterwards."""
    tuned = c.attach()
    y = run(tuned, c.batch)
    twin = copy.deepcopy(tuned)
    assert torch.equal(run(twin, c.batch), y), "the copy computes something else"
    jiggle(twin, seed=4)
    if tuned.trainable():
        assert not torch.equal(run(twin, c.batch), y), "changing the copy's state changes nothing: it uses the original's"
        loss(twin, c.batch).backward()
        assert all(p.grad is None for _, p in tuned.trainable()), "training the copy gave the original gradients"
    assert torch.equal(run(tuned, c.batch), y), "changing the copy changed the original"
    assert torch.equal(run(twin.detach(), c.batch), c.base), "the copy's base differs after detaching"
    assert torch.equal(run(tuned, c.batch), y), "detaching the copy changed the original"
    tuned.detach()
    odd = c.before.differs(c.model)
    assert odd is None, f"after a copy was made, {odd}"


@check
def autocast(c):
    """Runs, trains and starts as an identity under automatic mixed precision."""
    if c.dtype != torch.float32:
        return "fp32 models only"
    with torch.autocast("cpu", torch.bfloat16):
        base = run(c.model, c.batch).float()
        tuned = c.attach(jiggled=False)
        y = run(tuned, c.batch).float()
        if not c.excused("identity_at_init"):
            gap = (y - base).abs().max() / base.abs().max()
            assert gap <= TOL[torch.bfloat16], f"attaching changed the output by {gap:.1e}"
        y = run(jiggle(tuned), c.batch)
        assert y.isfinite().all(), "the output is not finite"
        if tuned.trainable():
            loss(tuned, c.batch).backward()
            bad = [n for n, p in tuned.trainable() if p.grad is None or not p.grad.isfinite().all()]
            assert not bad, f"no finite gradient at {bad[0]}"


@check
def checkpointing(c):
    """Gradient checkpointing gives the gradients that there are without it."""
    if c.dtype != torch.float32:
        return "fp32 models only: in bf16 the bare model's own gradients differ"
    if not getattr(c.model, "supports_gradient_checkpointing", False):
        return "the model has no gradient checkpointing"
    grads = []
    for on in (False, True):
        tuned = c.attach().train()
        if not tuned.trainable():
            tuned.detach()
            return "nothing trains"
        if on:
            c.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss(tuned, c.batch).backward()
        grads.append(torch.cat([p.grad.flatten() for _, p in tuned.trainable()]))
        tuned.detach()
    c.renew()                              # all together: some gradients are rounding noise about zero, such as a key's bias
    c.close(grads[1], grads[0], "gradients with and without checkpointing")


@check
def generates(c):
    """Generation with a KV cache gives the tokens and scores that recomputing everything gives."""
    if c.dtype != torch.float32 or not hasattr(c.model, "generate") or "input_ids" not in c.batch:
        return "fp32 generators only"
    if not c.model.can_generate():
        return "does not generate"
    tuned, outs = c.attach(), []
    batch = {k: v for k, v in c.batch.items() if not k.startswith("decoder")}
    for cached in (True, False):
        out = tuned.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=cached, output_logits=True, eos_token_id=None,
                             return_dict_in_generate=True)
        outs.append(torch.stack(out.logits))
    c.close(outs[0], outs[1], "logits with and without a cache")


@check
def compiles(c):
    """torch.compile gives the same output."""
    import torch._dynamo

    tuned = c.attach()
    y = run(tuned, c.batch)
    torch._dynamo.reset()
    try:
        c.close(run(torch.compile(tuned, backend="aot_eager"), c.batch), y, "compiled and eager differ")
    finally:
        torch._dynamo.reset()


SLOW = ("compiles",)                       # a second or more each: on the first model that takes the method, in fp32, only
_events = None


def _audit(event, args):
    if _events is not None and (event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn")):
        _events.append(f"{event} {args}")


@contextmanager
def _watched():
    """Collects what Python itself reports of unpickling and of starting programs."""
    global _events
    if not getattr(sys, "_luthier_audit", False):
        sys.addaudithook(_audit)
        sys._luthier_audit = True
    _events = []
    try:
        yield _events
    finally:
        _events = None


# -- running them ---------------------------------------------------------------------------------------------
def example(name, model, folder):
    """A method (or recipe) with the hyperparameters it names for tiny models, as a Chain."""
    found = lookup(name) if isinstance(name, str) else name
    given = getattr(found, "example", {})
    made = found(**(given(model, folder) if callable(given) else given))
    return made if isinstance(made, Chain) else Chain((made,))


def cell(name, model, dtype, checks=None, chain=None, folder=None):
    """Rows of one method (or a chain) on one tiny model in one dtype."""
    label, short = name if isinstance(name, str) else name.__name__, str(dtype).removeprefix("torch.")
    if folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return cell(name, model, dtype, checks, chain, folder)

    def row(check, verdict, why=""):
        return Row(label, model, short, check, verdict, " ".join(str(why).split())[:300])

    wanted = checks or [k for k in CHECKS if k not in SLOW]
    chain = parse(chain) if chain else example(name, tiny.build(model, dtype), Path(folder))
    case, rows = Case(chain, model, dtype, folder), []
    try:
        case.attach(jiggled=False).detach()
    except INAPPLICABLE as e:
        return [row(k, "n/a", e) for k in wanted]
    except Exception as e:                 # a check must never take the others with it
        return [row(k, "FAIL", f"attach: {type(e).__name__}: {e}") for k in wanted]
    for k in wanted:
        try:
            why = CHECKS[k](case)
            rows.append(row(k, "pass" if why is None else "n/a", why or ""))
        except DoesNotFit as e:            # refused, with a reason, when it ran
            rows.append(row(k, "n/a", e))
        except Exception as e:
            said = str(e) if type(e) is AssertionError else f"{type(e).__name__}: {e}"
            rows.append(row(k, "exempt" if case.excused(k) else "FAIL", said))
        finally:
            case.tidy()
    return rows


def judge(name, rows):
    """The rows of one method, with what can only be said of all models together: needless exemptions, and that it applies."""
    found = lookup(name) if isinstance(name, str) else name
    label, own = rows[0].method, dict(getattr(found, "exempt", {})) if not isinstance(found, Chain) else {}
    rows = list(rows)
    for k, reason in own.items():
        mine = [r for r in rows if r.check == k]
        if k not in CHECKS:
            rows.append(Row(label, "all", "", k, "FAIL", f"exempt names no check. {nearest(k, CHECKS)}"))
        elif mine and not any(r.verdict == "exempt" for r in mine) and any(r.verdict == "pass" for r in mine):
            rows.append(Row(label, "all", "", k, "FAIL", f"needless exemption ({reason}): it passes everywhere"))
    if all(r.verdict == "n/a" for r in rows):
        rows.append(Row(label, "all", "", "applies", "FAIL", f"applies to none of the tiny models: {rows[0].why}"))
    return rows


def run_all(names, models=None, dtypes=DTYPES, checks=None, slow=True, progress=None):
    """Rows of every method in `names` on every tiny model in every dtype."""
    everything = []
    for name in names:
        rows, done = [], False
        for model, dtype in itertools.product(models or [*tiny.MODELS, *tiny.MORE], dtypes):
            if not models and model in tiny.MORE and any(r.verdict == "pass" for r in rows if r.model in tiny.MODELS):
                continue
            rows += cell(name, model, dtype, checks)
            if slow and not checks and not done and dtype == torch.float32 and any(r.verdict == "pass" for r in rows):
                rows, done = rows + cell(name, model, dtype, SLOW), True
            if progress:
                progress(name, model, dtype)
        everything += judge(name, rows)
    return everything


MARKS = {"pass": "+", "exempt": "e", "n/a": ".", "FAIL": "X"}


def table(rows):
    """One method: checks by models. Several: methods by checks. The worst verdict of a field; below, what failed and why."""
    methods, checks = list(dict.fromkeys(r.method for r in rows)), list(dict.fromkeys(r.check for r in rows))
    one = len(methods) == 1
    across = list(dict.fromkeys(r.model for r in rows if r.model != "all")) if one else [str(i + 1) for i in range(len(checks))]
    down, width = checks if one else methods, max(map(len, checks if one else [*methods, "method"]))
    lines = [" ".join([f"{'check' if one else 'method':{width}} ", *across])]
    for name in down:
        fields = []
        for i, column in enumerate(across):
            mine = (column, name) if one else (name, checks[i])
            here = {r.verdict for r in rows if ((r.model, r.check) if one else (r.method, r.check)) == mine}
            fields.append(f"{next((MARKS[v] for v in ('FAIL', 'exempt', 'pass', 'n/a') if v in here), ' '):{len(column)}}")
        lines.append(" ".join([f"{name:{width}} ", *fields]).rstrip())
    lines += ["", "+ passes   e exempt, with a reason   . does not apply   X fails"]
    said = {k: (fn.__doc__ or "").splitlines()[0] for k, fn in CHECKS.items()}
    lines += [] if one else ["", *(f"{i + 1:2} {k:22}{said.get(k, '')}" for i, k in enumerate(checks))]
    bad = [r for r in rows if r.verdict == "FAIL"]
    lines += ["", *(f"FAIL {r.method} on {r.model} {r.dtype}: {r.check}: {r.why}" for r in bad)] if bad else []
    count = {v: sum(r.verdict == v for r in rows) for v in MARKS}
    return "\n".join([*lines, "", ", ".join(f"{n} {v}" for v, n in count.items())])


def as_json(rows):
    return [asdict(r) for r in rows]


# -- pairs ----------------------------------------------------------------------------------------------------
PAIR_MODELS = ("llama", "vit")


def pair(a, b, model, bench=None):
    """"ok" when `a >> b` runs on the tiny model and comes off again exactly; "refused: why" when the order would lose work; "n/a:
    why" when one of them does not fit the model; all else raises. `bench`: a dict that keeps the model for the next pair."""
    bench = {} if bench is None else bench
    with tempfile.TemporaryDirectory() as folder:
        case = bench.pop(model, None) or Case(None, model, torch.float32, folder)
        case.chain = example(a, case.model, Path(folder)) >> example(b, case.model, Path(folder))
        tuned, y, said = None, case.base, "ok"
        try:
            tuned = case.attach()
            y = run(tuned, case.batch)
        except LuthierError as e:
            said = f"{'refused' if isinstance(e, BadOrder) else 'n/a'}: {' '.join(str(e).split())}"
        finally:
            if tuned is not None:
                tuned.detach()
        assert y.shape == case.base.shape, f"{a} >> {b} on {model}: the output's shape became {tuple(y.shape)}"
        assert y.isfinite().all(), f"{a} >> {b} on {model}: the output is not finite"
        odd = case.before.differs(case.model)
        assert odd is None, f"{a} >> {b} on {model}: after detaching, {odd}"
        assert torch.equal(run(case.model, case.batch), case.base), f"{a} >> {b} on {model}: the base computes something else"
        bench[model], case.made = case, []
        return said


def pairs(names=None, models=PAIR_MODELS, progress=None):
    """(first, second, model) -> what `pair` says, for every ordered pair of methods."""
    found, bench = {}, {}
    for a, b, model in itertools.product(names or sorted(discover()), names or sorted(discover()), models):
        found[a, b, model] = pair(a, b, model, bench)
        if progress:
            progress(a, b, model)
    return found


def pair_lines(found, first, model):
    """The row of `first` in the matrix, and a sentence for each reason that stands in it."""
    row = {b: said for (a, b, m), said in found.items() if (a, m) == (first, model)}
    marks = {"ok": "+", "refused": "r", "n/a": "."}
    cells = [marks[said.partition(":")[0]] for said in row.values()]
    reasons = [f"- `{first} >> {b}`: {said.removeprefix('refused: ')}" for b, said in row.items() if said.startswith("refused")]
    return f"| {first} | {' | '.join(cells)} |", reasons


def pair_page(found=None):
    """{"pairs.md": text} for `luthier docs`."""
    found = found or pairs()
    names, lines = list(dict.fromkeys(a for a, _, _ in found)), [
        "<!-- Generated by `luthier docs`. Edit the source, not this page. -->", "", "# Which methods chain", "",
        "Each cell is `row >> column`, attached, run and taken off again on a tiny model: `+` it runs, and undoing it restores "
        "every bit; `r` refused, because the second would lose the first one's work; `.` one of the two does not fit this model."]
    for model in dict.fromkeys(m for _, _, m in found):
        rows = [pair_lines(found, a, model) for a in names]
        lines += ["", f"## {model}", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}", *(row for row, _ in rows)]
        lines += ["", *(reason for _, reasons in rows for reason in reasons)]
    return {"pairs.md": "\n".join(lines) + "\n"}
