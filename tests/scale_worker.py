"""What tests/test_scale.py runs in two processes, and for comparison in one. A fork server imports this once for all of them."""

import gc
import os
import sys
import weakref
from pathlib import Path

import torch

from luthier import attach, cli, ranks, tiny
from luthier._compat import torchvision
from luthier.method import Method, discover, method
from luthier.train import train

torchvision()
torch.set_num_threads(1)
tiny.build("llama")                      # imports what takes long, before any fork
CHAINS = ["lora(at='linear')", "ia3()", "prompt(n=3)", "ladder(reduce=2)", "full()", "adalora(rank=4, target=2)",
          "deft(weight_l=0.01) >> houlsby(width=4)", "pego()", "gptq(bits=4, at='attn.q') >> lora(rank=2, at='attn.v')"]


class Lines:
    """Next tokens of random lines of unequal length; the last batch of an epoch has one row."""

    def __init__(self, rows=13, crash=None):
        g = torch.Generator().manual_seed(5)
        self.ids, self.crash, self.calls = torch.randint(4, 64, (rows, 12), generator=g), crash, 0
        self.mask = (torch.arange(12) < 12 - torch.arange(rows)[:, None] % 5).long()

    def n_batches(self, split, size):
        return -(-len(self.ids) // size)

    def batches(self, split, size, seed=0, epoch=0, shuffle=None, start=0):
        order = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for at in order.split(size)[start:]:
            yield {"input_ids": self.ids[at], "attention_mask": self.mask[at],
                   "labels": torch.where(self.mask[at] > 0, self.ids[at], -100)}

    def counted(self, batch):
        return int((batch["labels"][:, 1:] >= 0).sum())

    def loss(self, model, batch):
        self.calls += 1
        if self.calls == self.crash:
            raise MemoryError
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def ready(chain, dropout=0.0):
    model = tiny.build("llama")
    model.config.attention_dropout = dropout
    for block in model.model.layers:
        block.self_attn.attention_dropout = dropout
    ids = torch.randint(4, 64, (3, 12), generator=torch.Generator().manual_seed(9))
    return attach(model, chain, data=[dict(input_ids=ids)])


def run(chain, parallel=None, task=None, dropout=0.0, **more):
    """{"loss": history, "logits": of a fixed input, "state": name -> tensor}"""
    tuned = ready(chain, dropout)
    history = train(tuned, task or Lines(), batch_size=4, lr=3e-3, parallel=parallel, log=False, progress=False,
                    **{"epochs": 2, **more})
    with torch.no_grad():
        logits = tuned.eval()(input_ids=Lines().ids[:4]).logits
    ranks.gather(tuned)
    return dict(loss=history["loss"], logits=logits, state={n: p.detach().clone() for n, p in tuned.states.named_parameters()})


def both(parallel, out):
    return {chain: run(chain, parallel) for chain in CHAINS}


def resume(parallel, out):
    """With dropout, and a batch that both processes die in: {chain: (uninterrupted, resumed)}."""
    found = {}
    for chain in ("lora(dropout=0.2)", "full()"):
        whole, folder = run(chain, parallel, dropout=0.2), out.parent / f"{chain[:4]}-{parallel}"
        try:
            run(chain, parallel, Lines(crash=6), 0.2, out=folder, every=2)
        except MemoryError:
            pass
        ranks.everyone(None)                               # nobody goes on before everybody stopped
        found[chain] = whole, run(chain, parallel, dropout=0.2, out=folder, every=2, resume=True)
    return found


def refused(parallel, out):
    """What goes by one process's own random numbers is noticed."""
    class drifts(Method):
        at: str = "attn.q"

        def init(self, site):
            return dict(g=site.zeros(site.d_out, 1))

        def weight(self, W, p):
            return (1 + p.g) * W

        @torch.no_grad()
        def step(self, run):
            for p in run.states.values():
                p.g += torch.rand(()) * 1e-3

    discover()
    drifts.__module__, said = "__main__", []
    chain = method(drifts)()
    for where in (None, out.parent / "drift"):
        try:
            train(ready(chain), Lines(), epochs=1, batch_size=4, out=where, log=False, progress=False)
        except Exception as e:
            said.append(f"{type(e).__name__}: {e}")
    return said


def memory(parallel, out):
    """Bytes of the base: whole, the share between steps, and the most that lives while the blocks run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    gc.collect()
    gc.freeze()                                            # what was there before is not looked at
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            **tiny.TEXT, hidden_size=128, intermediate_size=384, num_hidden_layers=12, num_attention_heads=4))
    whole, held = sum(p.nbytes for p in model.parameters()), []
    tuned = attach(model, "lora()")
    once = [weakref.ref(p) for p in model.parameters()]
    for block in model.model.layers:
        block.register_forward_hook(lambda *a: held.append(alive()))
        block.register_full_backward_hook(lambda *a: held.append(alive()))
    train(tuned, Lines(4), steps=2, batch_size=2, parallel=parallel, log=False, progress=False)
    gc.collect()
    share = sum(p.to_local().nbytes for p in model.parameters() if ranks.sharded(p))
    return dict(whole=whole, share=share, peak=max(held), kept=sum(r() is not None for r in once))


def cut(parallel, out):
    """The connection breaks at the n-th exchange of the third step, for each n: [(words, step, what was saved then)]."""
    from safetensors.torch import load_file
    from torch import distributed

    from luthier.errors import RunStopped

    found, left, task = [], -1, None
    plain = {n: getattr(distributed, n) for n in dir(distributed) if n.startswith(("all_", "reduce_"))}

    def breaks(fn):
        def call(*args, **more):
            nonlocal left
            left -= task.calls == 3
            if left < 0:
                raise RuntimeError("gloo: connection closed by peer")
            return fn(*args, **more)
        return call

    try:
        for name, fn in plain.items():
            setattr(distributed, name, breaks(fn) if callable(fn) else fn)
        while left < 0:
            left, task, tuned, folder = len(found), Lines(), ready("full()"), out.parent / f"{parallel}-{len(found)}"
            try:
                train(tuned, task, batch_size=4, steps=3, parallel=parallel, out=folder, every=1, log=False, progress=False)
            except RunStopped as e:
                if ranks.rank() == 0:
                    tuned.save(folder)
                found.append((str(e), tuned.k, load_file(folder / "state.safetensors") if ranks.rank() == 0 else None))
    finally:
        for name, fn in plain.items():
            setattr(distributed, name, fn)
    return found


def alive():
    """Bytes of every tensor that Python can reach, made since gc.freeze()."""
    found = {}
    for t in gc.get_objects():
        if isinstance(t, torch.Tensor) and type(t) in (torch.Tensor, torch.nn.Parameter):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(found.values())


def child(env, argv, said):
    """One of several processes as torchrun starts them: `luthier ARGV`, or WHAT WAY OUT of this file. Its words go to a file."""
    os.environ.update(env)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    if argv[0] == "luthier":
        sys.exit(cli.main(argv[1:]))
    what, parallel, out = argv[0], argv[1], Path(argv[2])
    ranks.join()
    found = {"both": both, "resume": resume, "refused": refused, "memory": memory, "cut": cut}[what](parallel, out)
    if ranks.rank() == 0:
        torch.save(found, out)
    ranks.leave()
