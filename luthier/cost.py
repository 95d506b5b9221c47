"""What a chain costs: counted and predicted without weights, measured when they are there.

    cost(model, "lora(rank=8)", batch)            -> Cost; print(c.table())
    cost(shape("shape:llama-7b"), "lora(rank=8)") -> the same for a model that exists only as shapes

Prediction runs the very train step on fake tensors: they have shapes, dtypes and storages but no memory, so the storages that
autograd keeps, and the most bytes alive at once, are counted rather than modelled. Measurement runs it on the real ones.
"""

import itertools
import statistics
import time
import weakref
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_flop_count

from .errors import BadData, DoesNotFit, LuthierError, UnknownName, nearest
from .save import stored_bytes


# -- meters ---------------------------------------------------------------------------------------------------
class Live:
    """Bytes of the distinct storages that were added and are still alive; `peak` is the most there ever were."""

    def __init__(self, ignore=()):
        self.sizes, self.freed, self.held, self.peak = {}, deque(), 0, 0
        for t in ignore:
            self.add(t, count=False)

    def add(self, t, count=True):
        for storage in map(torch.Tensor.untyped_storage, _parts(t)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.sizes:                                    # a storage's Python face lives as long as the storage
                weakref.finalize(storage, self._gone, key).atexit = False
                self.sizes[key] = 0 if count else None
            old = self.sizes[key]
            if old is not None and size > old:                           # new, or grown in place
                self.sizes[key], self.held = size, self.now + size - old
                self.peak = max(self.peak, self.held)

    @property
    def now(self):
        while self.freed:
            self.held -= self.freed.popleft()
        return self.held

    def met(self, t):
        """Something that was there before: it is not counted, unless it was added earlier."""
        if any(s.untyped_storage()._cdata not in self.sizes for s in _parts(t)):
            self.add(t, count=False)

    def _gone(self, key):                                                # in any thread, between any two steps of add()
        self.freed.append(self.sizes.pop(key) or 0)


def _parts(t):
    """The dense tensors that `t` consists of: itself, or the indices and values of a sparse one."""
    return (t,) if t.layout is torch.strided else (t._indices(), t._values()) if t.layout is torch.sparse_coo else ()


class _Watch(TorchDispatchMode):
    """Adds what every operator returns, in the backward pass too; what an operator is given was there before."""

    def __init__(self, live):
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tree_iter((args, kwargs)):
            if isinstance(t, torch.Tensor):
                self.live.met(t)
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.live.add(t)
        return out


def peak(fn, held=()):
    """Most bytes alive at once while `fn()` runs: of the storages its operators make, plus those of `held` (weights, inputs).
    Deterministic: storages are counted, not an allocator's blocks; scratch memory inside one kernel is not seen."""
    held = list(held)
    live = Live(held)
    with _Watch(live):
        fn()
    return live.peak + nbytes(held)


def saved(fn, ignore=()):
    """Bytes that autograd holds for the backward pass when `fn()` (a forward pass) has returned: distinct storages,
    without those of `ignore` (weights and inputs, which are there anyway)."""
    live = Live(ignore)

    def pack(t):
        live.add(t)
        return t.detach()                  # the tensor itself would hold its own graph in a circle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn()
    held = live.now
    del out
    return held


def nbytes(tensors):
    """Bytes of the distinct storages under `tensors`."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _flash(q, k, v, *rest, out_shape=None, **kw):                        # torch counts the CUDA kernels only
    return sdpa_flop_count(q, k, v)


def _added(y, a, b, *rest, out_shape=None, **kw):                        # torch counts addmm, not the one in place
    return addmm_flop(y, a, b)


def flops(fn):
    """Floating-point operations of `fn()`, as torch counts them: matrix products, convolutions and attention."""
    more = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash, torch.ops.aten.addmm_: _added}
    with FlopCounterMode(display=False, custom_mapping=more) as counter, torch.no_grad():
        fn()
    return counter.get_total_flops()


def clock(fn):
    """Seconds that fn() takes, the device idle before and after."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else int
    sync()
    start = time.perf_counter()
    fn()
    sync()
    return time.perf_counter() - start


def turns(fns, rounds):
    """Seconds of each of `fns`, a row a round, after one warm-up each. A round runs each of them once, in an order that changes
    from round to round. Neighbours in time share what else the machine does: ratios within a row are steadier than the times."""
    for fn in fns:
        fn()
    orders = itertools.cycle(itertools.permutations(range(len(fns))))
    rows = [{i: clock(fns[i]) for i in next(orders)} for _ in range(rounds)]
    return [tuple(row[i] for i in range(len(fns))) for row in rows]


def latency(fns, rounds=7):
    """Median seconds of each of `fns`, run in turns."""
    return [statistics.median(column) for column in zip(*turns(fns, rounds), strict=True)]


# -- the same run on tensors without memory -------------------------------------------------------------------
@contextmanager
def faked(model, batch):
    """Within, `model` holds fake tensors of the same shapes, dtypes and flags, tied and shared ones still one, and every new
    tensor is fake. Yields the batch, fake. What is meta acts as if it lay on the CPU."""
    mode, known, swapped = FakeTensorMode(allow_non_fake_inputs=True), {}, []
    mask = batch.get("attention_mask")     # one that masks nothing is left out: models look into it to skip it, never into a fake
    if mask is not None and (mask.is_meta or bool((mask == 1).all())):
        batch = {k: v for k, v in batch.items() if k != "attention_mask"}

    def fake(t):
        if id(t) not in known:
            new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu" if t.is_meta else t.device)
            known[id(t)] = t, nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
        return known[id(t)][1]

    with mode:
        try:
            for m in model.modules():
                for table in (m._parameters, m._buffers):
                    for name, t in table.items():
                        if t is not None:
                            swapped.append((table, name, t))
                            table[name] = fake(t)
            yield tree_map_only(torch.Tensor, fake, batch)
        finally:
            for table, name, t in swapped:
                table[name] = t


# -- one train step, metered ----------------------------------------------------------------------------------
def _loss(model, batch):
    """When the caller names none: the model's own, or the log-partition of its output, which costs what a cross-entropy costs."""
    out = model(**batch)
    if getattr(out, "loss", None) is not None:
        return out.loss
    y = out if torch.is_tensor(out) else getattr(out, "logits", None)
    if y is None:
        y = next(t for t in tree_iter(dict(out) if hasattr(out, "keys") else out) if torch.is_tensor(t) and t.is_floating_point())
    return y.float().logsumexp(-1).mean()


def _held(model, batch):
    return [*model.parameters(), *model.buffers(), *(t for t in tree_iter(batch) if torch.is_tensor(t))]


def _step(model, batch, loss):
    """(bytes, step) of training with AdamW once its state exists: that state, activations for backward, most alive at once."""
    trained, held = [p for p in model.parameters() if p.requires_grad], _held(model, batch)
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, foreach=False) if trained else None

    def step(value=None):
        value = loss(model, batch) if value is None else value
        if optimizer is not None:
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

    values = []
    kept = saved(lambda: values.append(loss(model, batch)), held)
    step(values.pop())
    state = [t for s in (optimizer.state.values() if trained else ()) for t in s.values() if torch.is_tensor(t)]
    return dict(optimizer=sum(t.nbytes for t in state), activations=kept, peak=peak(step, held + state)), step


@contextmanager
def _undone(tuned):
    """Within, the model is in training mode and may be stepped; afterwards modes, trained values, gradients, buffers and random
    numbers are as they were."""
    modes = {m: m.training for m in tuned.modules()}
    kept = [(t, t.detach().clone(), t.grad) for t in [*(p for _, p in tuned.trainable()), *tuned.buffers()]]
    tuned.train()
    with torch.random.fork_rng():
        try:
            for t, _, _ in kept:
                t.grad = None
            yield
        finally:
            for t, old, grad in kept:
                if not t.is_meta and not torch.equal(t.detach(), old):
                    t.data.copy_(old)
                t.grad = grad
            for m, mode in modes.items():
                m.training = mode


# -- the report -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cost:
    """Counts and bytes. `predicted` and `measured` hold the bytes of the `optimizer`, of `activations` kept for backward, and at
    the `peak` of a train step, weights included; `measured` also `base_forward`, `forward` and `step` in seconds."""

    model: str
    chain: str
    parameters: int                        # trained
    base_parameters: int
    stored: int                            # bytes of tensors in a saved folder
    resident: int                          # bytes of weights, buffers and state in memory
    flops: int | None                      # of one forward pass of this batch
    base_flops: int | None
    shapes: dict = field(default_factory=dict)             # of the batch
    predicted: dict = field(default_factory=dict)
    measured: dict = field(default_factory=dict)
    note: str = ""

    def json(self):
        return asdict(self)

    def table(self):
        more = None if self.flops is None else self.flops - self.base_flops
        share = f"{100 * self.parameters / max(self.base_parameters, 1):.3f}% of the base's"
        lines = [f"{self.chain} on {self.model}", f"batch {', '.join(f'{k} {v}' for k, v in self.shapes.items())}", "",
                 f"{'trained parameters':28}{self.parameters:>14,}  {share}",
                 f"{'stored':28}{_bytes(self.stored):>14}",
                 f"{'weights and state in memory':28}{_bytes(self.resident):>14}"]
        if more is not None:
            lines.append(f"{'added FLOPs, forward':28}{more:>14,}  {100 * more / max(self.base_flops, 1):+.2f}%")
        lines += ["", f"{'':28}{'predicted':>14}{'measured':>14}"]
        for key, words in (("optimizer", "optimizer (AdamW)"), ("activations", "activations for backward"),
                           ("peak", "peak of a train step")):
            both = (_bytes(d[key]) if key in d else "-" for d in (self.predicted, self.measured))
            lines.append(f"{words:28}" + "".join(f"{b:>14}" for b in both))
        if "forward" in self.measured:
            t = self.measured
            lines += [f"{'forward':28}{'':14}{1e3 * t['forward']:>11.1f} ms  {t['forward'] / t['base_forward']:.2f} x base",
                      f"{'train step':28}{'':14}{1e3 * t['step']:>11.1f} ms"]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def _bytes(n):
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:,} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000


def counted(tuned, batch, note=""):
    """Parameters, bytes and FLOPs of an attached chain; nothing is run but fakes."""
    every, base = _held(tuned, {}), list(tuned.base.parameters())
    try:
        with faked(tuned, batch) as small, _eval(tuned):
            mine = flops(lambda: tuned(**small))
            with tuned.off():
                theirs = flops(lambda: tuned(**small))
    except (LuthierError, TypeError):
        raise
    except Exception as e:                 # a model that looks at values (which expert, how long) has no shapes without them
        mine, theirs, note = None, None, f"Not predicted: {type(e).__name__}: {' '.join(str(e).split())[:150]}"
    return Cost(type(tuned.base).__name__, repr(tuned.chain), sum(p.numel() for _, p in tuned.trainable()),
                sum(p.numel() for p in base), stored_bytes(tuned), nbytes(every), mine, theirs,
                {k: tuple(t.shape) for k, t in batch.items() if torch.is_tensor(t)}, note=note)


@contextmanager
def _eval(model):
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def cost(model, chain=None, batch=None, *, data=(), loss=None, rounds=5, seed=0):
    """Cost of `chain` on `model` (or of a Tuned as it is) for `batch`, a dict of the model's arguments (default: one row).
    `loss(model, batch)` is what a train step minimises. Whatever it attaches it takes off again."""
    from .attach import Tuned, attach

    batch = batch if batch is not None else example(model)
    @torch.no_grad()
    def forward():
        tuned(**batch)

    def base():
        with tuned.off():
            forward()

    own = not isinstance(model, Tuned) or chain is not None
    seen = data or [{k: v for k, v in batch.items() if k != "attention_mask"}]             # what it costs depends on shapes alone
    tuned = attach(model, chain, data=seen, seed=seed) if own else model
    try:
        found = counted(tuned, batch)
        if not found.note:
            with _undone(tuned), faked(tuned, batch) as small:
                found = replace(found, predicted=_step(tuned, small, loss or _loss)[0])
        if not any(p.is_meta for p in tuned.parameters()):
            with _undone(tuned):
                measured, step = _step(tuned, batch, loss or _loss)

                times = latency([base, forward, step], rounds)
                times = dict(zip(("base_forward", "forward", "step"), times, strict=True))
                found = replace(found, measured=measured | times)
    finally:
        if own:
            tuned.detach()
    return found


# -- models and inputs that exist only as shapes --------------------------------------------------------------
SHAPES = {
    "llama-7b": dict(model_type="llama"),
    "llama-13b": dict(model_type="llama", hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                      num_attention_heads=40),
    "llama-3-8b": dict(model_type="llama", intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, rope_theta=5e5),
    "mistral-7b": dict(model_type="mistral", sliding_window=None),
    "gpt2": dict(model_type="gpt2"),
    "gpt2-xl": dict(model_type="gpt2", n_embd=1600, n_layer=48, n_head=25),
    "bert-base": dict(model_type="bert"),
    "vit-b": dict(model_type="vit"),
    "vit-l": dict(model_type="vit", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
}
HEADS = ("AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification",
         "AutoModel")


def shape(ref, dtype=torch.bfloat16):
    """A model without weights: `shape:llama-7b` (see SHAPES), or `config:FOLDER` for a folder or hub id with a config.json."""
    from ._compat import torchvision

    torchvision()
    import transformers

    kind, _, name = ref.partition(":")
    if kind == "shape":
        if name not in SHAPES:
            raise UnknownName(f"No shape is named {name!r}. {nearest(name, SHAPES)} Known: {', '.join(SHAPES)}; config:FOLDER.")
        config = transformers.AutoConfig.for_model(**SHAPES[name])
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise BadData(f"config:{name} has no readable config.json ({' '.join(str(e).split())[:150]}). Give a folder or id "
                          f"with one, or a built-in shape: {', '.join('shape:' + s for s in SHAPES)}.") from e
    with torch.device("meta"):
        for auto in HEADS:
            auto = getattr(transformers, auto)
            if type(config) in auto._model_mapping.keys():
                return auto.from_config(config, dtype=dtype).eval()
    raise DoesNotFit(f"transformers knows no model for the configuration {type(config).__name__} of {ref}. "
                     f"Known without a file: {', '.join('shape:' + s for s in SHAPES)}.")


def example(model, rows=1, tokens=128):
    """One batch such as the model takes, on its device: random ids, zero pixels."""
    model = getattr(model, "base", model)
    if hasattr(model, "example"):
        return model.example(rows, tokens)
    config, device = getattr(model, "config", None), next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    name = getattr(model, "main_input_name", None)
    if name is None or config is None:
        size = getattr(model, "pretrained_cfg", {}).get("input_size")
        if size is None:
            raise DoesNotFit(f"What a {type(model).__name__} takes cannot be guessed. Pass batch=dict(argument=tensor).")
        return dict(x=torch.zeros(rows, *size, dtype=dtype, device=device))
    found, vision = {}, getattr(config, "vision_config", config)
    text = getattr(config, "text_config", config)
    names = {name, *(("pixel_values",) if vision is not config else ()), *(("input_ids",) if text is not config else ())}
    if "input_ids" in names:
        found["input_ids"] = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    if "pixel_values" in names:
        side = getattr(vision, "image_size", 224)
        side = tuple(side) if isinstance(side, list | tuple) else (side, side)
        found["pixel_values"] = torch.zeros(rows, getattr(vision, "num_channels", 3), *side, dtype=dtype, device=device)
    if not found:
        raise DoesNotFit(f"What a {type(model).__name__} takes ({name}) cannot be guessed. Pass batch=dict({name}=tensor).")
    return found
