"""Training: resumed equals uninterrupted, and every way to stop keeps the last good state."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier import checkpoint
from luthier.errors import BadChain, BadState, LuthierError, RunStopped
from luthier.train import rate, train

ROOT = Path(__file__).parent.parent


class ToyTask:
    """Regression on fixed random numbers; `poison` replaces the batch of that step by NaN."""

    def __init__(self, rows=40, poison=None, on_loss=None):
        g = torch.Generator().manual_seed(0)
        self.x, self.calls, self.poison, self.on_loss = torch.randn(rows, 6, generator=g), 0, poison, on_loss
        self.y = self.x @ torch.randn(6, 2, generator=g)

    def n_batches(self, split, size):
        return -(-len(self.x) // size)

    def batches(self, split, size, seed=0, epoch=0, shuffle=None, start=0):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for at in order.split(size)[start:]:
            yield {"x": self.x[at], "y": self.y[at]}

    def loss(self, model, batch):
        self.calls += 1
        if self.on_loss:
            self.on_loss(self.calls)
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        return loss * float("nan") if self.calls == self.poison else loss


class ToyTuned(nn.Module):
    """Stands in for Tuned: a frozen base, a state with dropout noise, and rows of B that grow while it trains."""

    chain, notes = ("toy",), ()

    def __init__(self, grow=False):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.base = nn.Linear(6, 2).requires_grad_(False)
        state = nn.Module()
        state.A = nn.Parameter(torch.randn(2, 6, generator=g))
        state.B = nn.Parameter(torch.zeros(2, 2))
        state.register_buffer("seen", torch.zeros(()))
        state.level = 0
        self.states, self.grow, self.k, self.stepped, self.total_steps = nn.ModuleDict({"toy": state}), grow, 0, 0, None
        with torch.no_grad():
            self.base.weight.copy_(torch.randn(2, 6, generator=g))
            self.base.bias.zero_()

    def forward(self, x):
        p = self.states["toy"]
        h = torch.nn.functional.dropout(x @ p.A.T, 0.2, self.training)
        return self.base(x) + h @ p.B[:, : h.shape[1]].T

    def trainable(self):
        return list(self.states.named_parameters())

    def penalty(self, batch=None):
        return 1e-3 * self.states["toy"].A.square().sum()

    def step(self, optimizer=None):
        self.k += 1
        p = self.states["toy"]
        p.seen += p.A.grad.norm()
        if self.grow and self.k == 7:                      # one row more; survivors keep their moments
            p.level = 1
            p.A.data = torch.cat([p.A.data, torch.randn(1, 6)])
            p.B.data = torch.cat([p.B.data, torch.zeros(2, 1)], 1)
            p.A.grad = p.B.grad = None
            for q, dim in ((p.A, 0), (p.B, 1)):
                for key in ("exp_avg", "exp_avg_sq"):
                    old = optimizer.state[q][key]
                    optimizer.state[q][key] = torch.cat([old, torch.zeros_like(old.narrow(dim, 0, 1))], dim)


def weights(tuned):
    return {n: t.clone() for n, t in tuned.states.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def whole():
    tuned = ToyTuned(grow=True)
    history = train(tuned, ToyTask(), epochs=3, batch_size=8, lr=0.05)
    return weights(tuned), history


def test_it_learns_and_is_deterministic(whole):
    again = ToyTuned(grow=True)
    history = train(again, ToyTask(), epochs=3, batch_size=8, lr=0.05)
    assert same(whole[0], weights(again)) and history["loss"] == whole[1]["loss"] and history["steps"] == 15
    assert sum(history["loss"][-5:]) < sum(history["loss"][:5])


def test_another_seed_gives_another_run(whole):
    other = ToyTuned(grow=True)
    train(other, ToyTask(), epochs=3, batch_size=8, lr=0.05, seed=1)
    assert not same(whole[0], weights(other))


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 8, 12, 15])
def test_resume_equals_uninterrupted(whole, tmp_path, stop):
    """Whatever step the run died in, before or after the parameters grew."""
    def die(calls):
        if calls == stop:
            raise MemoryError                              # any crash the loop knows nothing of
    with pytest.raises(MemoryError):
        train(ToyTuned(grow=True), ToyTask(on_loss=die), epochs=3, batch_size=8, lr=0.05, out=tmp_path, every=2, log=False)
    resumed = ToyTuned(grow=True)
    history = train(resumed, ToyTask(), epochs=3, batch_size=8, lr=0.05, out=tmp_path, every=2, resume=True, log=False)
    assert same(whole[0], weights(resumed)) and history["loss"] == whole[1]["loss"]
    assert stop - 1 - history["resumed"] <= 2 and resumed.states["toy"].level == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) <= 2


CHILD = """
    import sys, time; sys.path[:0] = [{root!r}, {tests!r}]
    import torch; torch.set_num_threads(1)
    from test_train import ToyTask, ToyTuned
    from luthier.train import train
    train(ToyTuned(grow=True), ToyTask(on_loss=lambda n: time.sleep(0.02)), epochs=12, batch_size=8, lr=0.05,
          out={out!r}, every=3, resume={resume}, log=False, progress=lambda k, total, loss: print(k, flush=True))
"""


def child(out, resume=False):
    code = textwrap.dedent(CHILD).format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(out), resume=resume)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_kill_minus_nine_and_resume_to_the_bit(tmp_path):
    one = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned = ToyTuned(grow=True)
    train(tuned, ToyTask(), epochs=12, batch_size=8, lr=0.05)
    torch.set_num_threads(one)
    resume = False
    for at in (2, 9, 23):                                  # killed three times on the way
        run = child(tmp_path, resume)
        for line in run.stdout:
            if int(line) >= at:
                run.kill()
                break
        assert run.wait() == -signal.SIGKILL
        resume = True
    run = child(tmp_path, True)
    first = int(run.stdout.readline())
    assert 20 < first <= 25 and run.wait() == 0            # at most one interval of 3 was lost
    tensors, facts, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert facts["step"] == 60
    final = {n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")}
    assert same(weights(tuned), final)


def test_killed_while_writing_leaves_the_older_ones(tmp_path):
    train(ToyTuned(), ToyTask(), steps=4, batch_size=8, out=tmp_path, every=2, log=False)
    folder = tmp_path / "checkpoints"
    (folder / ".partial-1").write_bytes(b"half")           # what a kill in the middle of a write leaves
    newest = sorted(folder.glob("step-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:200])          # and a disk that lost the end of a file
    history = train(ToyTuned(), ToyTask(), steps=4, batch_size=8, out=tmp_path, every=2, resume=True, log=False)
    assert history["resumed"] == 2 and not list(folder.glob(".partial-*"))


def test_nan_loss_stops_with_the_last_good_state(tmp_path):
    tuned = ToyTuned()
    with pytest.raises(RunStopped, match="loss became nan at step 6 of 15.*after 4 steps.*lower learning rate"):
        train(tuned, ToyTask(poison=6), epochs=3, batch_size=8, out=tmp_path, every=2, log=False)
    good = ToyTuned()
    train(good, ToyTask(), steps=4, batch_size=8, schedule="constant", warmup=3 / 4)
    tensors, facts, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert facts["step"] == tuned.k == 4
    assert all(torch.equal(tensors["state/" + n], t) and t.isfinite().all() for n, t in weights(tuned).items())


def test_nan_gradient_stops_before_it_does_harm(tmp_path):
    tuned, task = ToyTuned(), ToyTask()
    tuned.states["toy"].A.register_hook(lambda g: g * float("nan") if task.calls == 3 else g)
    with pytest.raises(RunStopped, match="gradient became nan at step 3"):
        train(tuned, task, steps=9, batch_size=8, out=tmp_path, log=False)
    assert tuned.k == 2 and all(t.isfinite().all() for t in weights(tuned).values())


def test_nan_at_once_says_that_nothing_was_written(tmp_path):
    with pytest.raises(RunStopped, match="Nothing was written yet"):
        train(ToyTuned(), ToyTask(poison=1), steps=3, batch_size=8, out=tmp_path, log=False)
    assert not list(tmp_path.iterdir())


def test_full_disk_stops_with_the_last_good_state(tmp_path, monkeypatch):
    real = checkpoint._store

    def full(tensors, facts, path):
        if facts["step"] < 4:
            return real(tensors, facts, path)
        path.write_bytes(b"as much as fitted")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_store", full)
    tuned = ToyTuned()
    with pytest.raises(RunStopped, match="disk is full at step 5 of 15.*after 2 steps.*more free space"):
        train(tuned, ToyTask(), epochs=3, batch_size=8, out=tmp_path, every=2, log=False)
    assert sorted(p.stem for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000000", "step-00000002"]
    monkeypatch.undo()
    assert train(ToyTuned(), ToyTask(), epochs=3, batch_size=8, out=tmp_path, resume=True, log=False)["resumed"] == 2


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_loses_nothing(whole, tmp_path, sig):
    tuned = ToyTuned(grow=True)
    with pytest.raises(RunStopped, match="Stopped by .* before step 4 of 15.*after 3 steps.*--resume") as e:
        train(tuned, ToyTask(on_loss=lambda n: n == 3 and os.kill(os.getpid(), sig)), epochs=3, batch_size=8, lr=0.05,
              out=tmp_path, every=10, log=False)
    assert e.value.interrupted and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = ToyTuned(grow=True)
    train(resumed, ToyTask(), epochs=3, batch_size=8, lr=0.05, out=tmp_path, resume=True, log=False)
    assert same(whole[0], weights(resumed))


def test_second_ctrl_c_does_not_wait(tmp_path):
    def impatient(n):
        if n == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    with pytest.raises(RunStopped, match="in step 5 of 15.*after 2 steps"):
        train(ToyTuned(), ToyTask(on_loss=impatient), epochs=3, batch_size=8, out=tmp_path, every=2, log=False)


def test_old_runs_are_not_overwritten_or_mixed(tmp_path):
    train(ToyTuned(), ToyTask(), steps=2, batch_size=8, out=tmp_path, log=False)
    with pytest.raises(BadState, match="earlier run.*--resume"):
        train(ToyTuned(), ToyTask(), steps=2, batch_size=8, out=tmp_path, log=False)
    with pytest.raises(BadState, match="batch_size=8, and now batch_size=4"):
        train(ToyTuned(), ToyTask(), steps=2, batch_size=4, out=tmp_path, resume=True, log=False)
    other = ToyTuned()
    other.chain = ("another",)
    with pytest.raises(BadState, match="belongs to the chain"):
        train(other, ToyTask(), steps=2, batch_size=8, out=tmp_path, resume=True, log=False)
    fewer = ToyTuned()
    del fewer.states["toy"].seen
    with pytest.raises(BadState, match="another chain or model"):
        train(fewer, ToyTask(), steps=2, batch_size=8, out=tmp_path, resume=True, log=False)
    for p in (tmp_path / "checkpoints").iterdir():
        p.write_bytes(b"junk")
    with pytest.raises(BadState, match="None of the checkpoints"):
        train(ToyTuned(), ToyTask(), steps=2, batch_size=8, out=tmp_path, resume=True, log=False)


BAD = [dict(lr=0), dict(lr=float("nan")), dict(lr=-1), dict(lr="fast"), dict(batch_size=0), dict(epochs=0), dict(epochs=-1),
       dict(steps=-3),
       dict(epochs=float("inf")), dict(clip=0), dict(warmup=2), dict(schedule="cosin"),
       dict(schedule="uba"), dict(schedule="uba(phi=0)"), dict(schedule="__import__"), dict(precision="int3"),
       dict(log="wandb"),
       dict(every=-1), dict(resume=True)]


@pytest.mark.parametrize("bad", BAD)
def test_bad_options_are_refused(bad):
    before = ToyTuned()
    with pytest.raises(LuthierError):
        train(before, ToyTask(), **{"steps": 2, **bad})
    assert same(weights(before), weights(ToyTuned()))


def test_nothing_to_train_or_to_train_on():
    frozen = ToyTuned()
    frozen.trainable = lambda: []
    with pytest.raises(BadChain, match="Nothing in"):
        train(frozen, ToyTask(), steps=1)
    with pytest.raises(LuthierError, match="train split is empty"):
        train(ToyTuned(), ToyTask(rows=0), steps=1)


def test_checkpoints_hold_no_code_and_come_once_a_minute_by_default(tmp_path):
    train(ToyTuned(), ToyTask(), epochs=2, batch_size=8, out=tmp_path, log=False)
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [f.name for f in files] == ["step-00000000.safetensors", "step-00000010.safetensors"]      # the start and the end
    head = int.from_bytes(files[-1].read_bytes()[:8], "little")
    assert "luthier" in json.loads(files[-1].read_bytes()[8:8 + head])["__metadata__"]


def test_tensorboard_is_written_when_there(tmp_path):
    pytest.importorskip("tensorboard")
    train(ToyTuned(), ToyTask(), steps=2, batch_size=8, out=tmp_path)
    assert list((tmp_path / "logs").glob("events*"))


def test_learning_rate_rises_then_falls():
    rates = [rate(k, 100, 1.0) for k in range(100)]
    assert rates[:3] == [1 / 6, 2 / 6, 3 / 6] and max(rates) == rates[5] == 1.0 and 0 < rates[-1] < 0.02
    assert rate(50, 100, 1.0, schedule="constant") == 1.0


def test_bf16_runs():
    assert len(train(ToyTuned(), ToyTask(), steps=2, batch_size=8, precision="bf16")["loss"]) == 2
