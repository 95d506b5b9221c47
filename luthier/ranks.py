"""Several processes, one run: `torchrun --nproc-per-node N -m luthier tune ...` computes what one process computes.

    batch    --batch-size is the global one. Each process takes its rows of every batch and weighs its loss by what these are of
             the whole, so that the processes' losses add up to the loss of one process, and their gradients to its gradients.
    ddp      Every process holds the whole model. What trains is small: its gradients are summed in one all-reduce a step, after
             the backward pass. That also serves methods whose parameters grow, vanish or go unused.
    fsdp     torch's fully_shard: every process holds its share of each tensor of the frozen base, and a block whole only while it
             runs. Trained states stay whole (they are small) and are summed as under ddp, but for states that replace the weight
             of their site: these are as large as the model and are sharded with the block they belong to.
    random   Process r draws from generators seeded with (seed, r): process 0 as one process would. All are in the checkpoint.
    words    Files and words come from process 0; why a run ended is said once, by whoever knows it first.

In one process nothing here does anything.
"""

import contextlib
import copy
import os
from collections import defaultdict
from datetime import timedelta

import torch
from torch import distributed, nn

from .errors import DoesNotFit, LuthierError, RunStopped

WAYS = ("ddp", "fsdp")
BUCKET = 64 << 20                        # bytes of gradients in one all-reduce
LENT = "luthier_states"                  # where a block holds the states that are sharded with it, while it is sharded
_store = None
_spread = False


# -- who is there -----------------------------------------------------------------------------------------------------


def launched():
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    return all(os.environ.get(n) for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR")) and int(os.environ.get("WORLD_SIZE") or 1) > 1


def world():
    return distributed.get_world_size() if launched() and distributed.is_initialized() else 1


def rank():
    return distributed.get_rank() if world() > 1 else 0


def patience():
    """Seconds after which a process that does not answer is given up."""
    return int(os.environ.get("LUTHIER_TIMEOUT") or 600)


def join():
    """Meet the other processes: over nccl where there are GPUs, one a process, else over gloo."""
    global _store
    if not launched() or distributed.is_initialized():
        return
    here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and here >= gpus:
        raise LuthierError(f"Process {here} of this machine has no GPU: there are {gpus}. Start --nproc-per-node {gpus}.")
    if gpus:
        torch.cuda.set_device(here)
    limit = timedelta(seconds=patience())
    try:
        _store, r, n = next(distributed.rendezvous("env://", timeout=limit))
        distributed.init_process_group("cuda:nccl,cpu:gloo" if gpus else "gloo", store=_store, rank=r, world_size=n,
                                       timeout=limit)
    except (RuntimeError, ValueError) as e:
        raise LuthierError(f"The {os.environ['WORLD_SIZE']} processes did not find each other ({str(e).splitlines()[0][:200]}). "
                           "Check that --nnodes, --rdzv-endpoint and the network agree on every machine.") from e


def leave():
    """After a run that went well."""
    if world() > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def first():
    """Whether it is this process's turn to say why the run ended: the first one that asks."""
    if not launched():
        return True
    if _store is None:
        return os.environ["RANK"] == "0"
    try:
        return _store.add("luthier/said", 1) == 1
    except RuntimeError:                                   # whoever held it is gone, too
        return True


def lost(error):
    """Whether this is what a collective raises when another process died or fell silent."""
    return world() > 1 and isinstance(error, RuntimeError) and (
        isinstance(error, distributed.DistError) or any(w in str(error).lower() for w in ("gloo", "nccl", "socket")))


@contextlib.contextmanager
def together(where=""):
    """Within, evaluation is split over the processes, and one that is lost ends the run with a message."""
    global _spread
    before, _spread = _spread, world() > 1
    try:
        yield
    except RuntimeError as e:
        if not lost(e):
            raise
        raise RunStopped(f"{silence()} {where}") from e
    finally:
        _spread = before


def fit(parallel, precision):
    """Refuse, before anything is loaded, what cannot run in this way."""
    if parallel not in (None, *WAYS):
        raise LuthierError(f"parallel={parallel!r}: there are {' and '.join(WAYS)}.")
    if parallel and world() == 1:
        raise LuthierError(f"parallel={parallel!r} is for several processes, and this one is alone. Start them with torchrun "
                           "--nproc-per-node N -m luthier tune ..., or leave it out.")
    if parallel == "fsdp" and precision == "fp16":
        raise LuthierError("precision=\"fp16\" scales the loss by what one process sees of the gradients, and fsdp keeps them in "
                           "shards. Use bf16.")


def silence():
    return (f"Another of the {world()} processes died, or did not answer for {patience()} s (LUTHIER_TIMEOUT); torchrun's own "
            "words say which.")


# -- talking ----------------------------------------------------------------------------------------------------------


def told(fn):
    """What fn() gives in process 0, in every process; what it raises there is raised everywhere."""
    if world() == 1:
        return fn()
    said = [None, None]
    if rank() == 0:
        try:
            said[0] = fn()
        except Exception as e:
            said[1] = e
    distributed.broadcast_object_list(said, 0)
    if said[1] is not None:
        raise said[1]
    return said[0]


def agree(*flags):
    """Each flag: whether it is set in any process."""
    if world() == 1:
        return flags
    t = torch.tensor([float(bool(f)) for f in flags])
    distributed.all_reduce(t, distributed.ReduceOp.MAX)
    return tuple(bool(v) for v in t.tolist())


def everyone(thing):
    """[thing of process 0, of process 1, ...]"""
    found = [thing] * world()
    if world() > 1:
        distributed.all_gather_object(found, thing)
    return found


def spread(parts, run):
    """run(part) of each part in turn; within `together`, each process runs its share and hears of the others'."""
    n = world() if _spread else 1
    for i in range(0, len(parts), n):
        mine = run(parts[min(i + rank() if n > 1 else i, len(parts) - 1)])      # one left over: a sharded model needs us all
        yield from everyone(mine)[:len(parts) - i] if n > 1 else [mine]


# -- one batch --------------------------------------------------------------------------------------------------------


def share(batch, counted):
    """(this process's rows of a batch, their part of the task's loss, their part of all rows). counted(batch): how many things
    the task's loss is the mean of. A process without a row runs the first one, at no weight."""
    n, r = world(), rank()
    if n == 1:
        return batch, 1.0, 1.0
    rows = max(len(v) for v in batch.values() if torch.is_tensor(v))
    mine = copy.copy(batch)                                 # which may be more than a dict
    mine.update({k: v[r::n] if r < rows else v[:1] for k, v in batch.items() if torch.is_tensor(v)})
    if r >= rows:
        return mine, 0.0, 0.0
    return mine, counted(mine) / max(counted(batch), 1), len(range(r, rows, n)) / rows


def total(value):
    """The sum over the processes, as a float."""
    if world() > 1:
        value = value.double()
        distributed.all_reduce(value)
    return value.item()


def sum_gradients(params):
    """Each gradient becomes the sum over the processes (None where it is None in all of them)."""
    if world() == 1:
        return
    for p in params:
        if sharded(p) and p.grad is not None:
            p.grad.mul_(world())                           # fully_shard has averaged it
    for bucket in _buckets([p for p in params if not sharded(p)]):
        there = bucket[0].new_tensor([float(p.grad is not None) for p in bucket])
        flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket), there])
        distributed.all_reduce(flat)
        *grads, there = flat.split([*(p.numel() for p in bucket), len(bucket)])
        for p, g, some in zip(bucket, grads, there.tolist(), strict=True):
            p.grad = g.view_as(p) if some else None


def _buckets(params):
    kinds = defaultdict(list)
    for p in params:
        kinds[p.dtype, p.device].append(p)
    for alike in kinds.values():
        bucket, size = [], 0
        for p in alike:
            bucket.append(p)
            if (size := size + p.nbytes) >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def same(tensors):
    """Whether every process holds the same numbers."""
    if world() == 1:
        return True
    found = torch.tensor([0.0, *(t.detach().double().sum().item() for t in tensors if not sharded(t))], dtype=torch.float64)
    return all(torch.equal(f, found) for f in everyone(found))


# -- a sharded base ---------------------------------------------------------------------------------------------------


def sharded(t):
    return hasattr(t, "full_tensor")


def whole(t):
    """A tensor as one process would hold it; of a sharded one, every process must ask and process 0 gets it."""
    if not sharded(t):
        return t
    t = t.full_tensor()
    return t.cpu() if rank() == 0 else t.new_empty(0)


def like(t, p):
    """A whole tensor on p's device, cut as p is."""
    t = t.to(p.device)
    if not sharded(p):
        return t.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, p.device_mesh, p.placements)


def shard(tuned, device):
    """fully_shard the base, block by block, and with each block the trained states that replace weights in it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from . import save

    base, mesh = tuned.base, init_device_mesh(device.type, (world(),))
    odd = next((n for n, p in base.named_parameters() if type(p) is not nn.Parameter), None)
    if odd is not None:
        raise DoesNotFit(f"{odd} is of type {type(base.get_parameter(odd)).__name__}, which fully_shard cannot cut. "
                         "Use --parallel ddp.")
    base.__dict__["luthier_base"] = save._base(base)       # read now: no process alone can do it later
    names = {id(p): n for n, p in base.named_parameters()}
    flags = [(table, [(names.get(id(p)), p, flag) for p, flag in table]) for table in (tuned._host.flags, tuned._frozen)]
    blocks = list(dict.fromkeys(b for s in tuned._plan.stacks for b in s.blocks))
    home = {m: b for b in reversed(blocks) for m in b.modules()}
    lent = defaultdict(list)
    for s, p in _replacing(tuned):
        lent[home.get(s.module, base)].append(p)
    tuned.states.to(device)
    for module in [*reversed(blocks), base]:               # what is inside another comes first
        if lent[module]:
            module._modules[LENT] = nn.ModuleList(lent[module])
        fully_shard(module, mesh=mesh)
        module._modules.pop(LENT, None)
    now = dict(base.named_parameters())
    for table, kept in flags:                              # nobody holds on to a whole tensor
        table[:] = [(now.get(n, p), flag) for n, p, flag in kept]


def _replacing(tuned):
    """(site, state) of every state that is as large as the weight it replaces, and that only its own forward reads."""
    uses = defaultdict(int)
    for st in tuned.states.values():
        for p in st.parameters():
            uses[id(p)] += 1
    for step in tuned._plan.steps:
        m = step.method
        if m.discards() and not any(m.has(v) for v in ("step", "loss", "produce")):
            for s in step.sites:
                st = None if s in step.twins else tuned._states_of[step.number].get(s.name)
                if st is not None and list(st.parameters()) and all(uses[id(p)] == 1 for p in st.parameters()):
                    yield s, st


def gather(tuned, read=whole):
    """Every trained state whole again, in process 0: to be saved. The base itself stays sharded."""
    tuned.states.state_dict(keep_vars=True)                # fully_shard's hook there cuts again what a forward left whole
    for st in tuned.states.values():
        for n, p in st._parameters.items():
            if p is not None and sharded(p):
                st._parameters[n] = nn.Parameter(read(p.detach()), p.requires_grad)


def clip(params, most):
    """clip_grad_norm_ over whole and sharded gradients together."""
    grads = [p.grad for p in params if p.grad is not None]
    local = sum((g.to_local().float().square().sum() for g in grads if sharded(g)), torch.zeros((), device=grads[0].device))
    distributed.all_reduce(local)
    norm = (local + sum(g.float().square().sum() for g in grads if not sharded(g))).sqrt()
    for g in grads:
        g.mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm
