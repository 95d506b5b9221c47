"""Lottery-ticket sparse tuning against its four steps done by hand."""

import torch
from safetensors.torch import load_file
from torch import nn

from luthier import load
from luthier.procedures.lt_sft import lt_sft


class Task:
    """Regression onto a fixed map; just what training asks of a task."""

    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(64, 6, generator=g), torch.randn(64, 3, generator=g)

    def n_batches(self, split, size):
        return 64 // size

    def batches(self, split, size, seed=0, epoch=0, start=0):
        for i in range(start * size, 64, size):
            yield {"x": self.x[i:i + size], "y": self.y[i:i + size]}

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def test_the_ticket_is_the_most_moved_places_rewound_and_trained_alone(tmp_path):
    model, task, base = network(), Task(), network()
    tuned = lt_sft(model, task, tmp_path, density=0.1, steps=8, lr=1e-2, batch_size=16, progress=False, log=False)

    full = load(network(), tmp_path / "full").merge().model
    moved = torch.cat([(a - b).abs().flatten() for (n, a), (_, b) in
                       zip(full.named_parameters(), base.named_parameters(), strict=True) if not n.startswith("4.")])
    K = round(0.1 * len(moved))
    chosen = torch.zeros(len(moved), dtype=torch.bool)
    chosen[moved.topk(K).indices] = True

    merged = tuned.merge().model
    change = torch.cat([(a - b).flatten() for (n, a), (_, b) in
                        zip(merged.named_parameters(), base.named_parameters(), strict=True) if not n.startswith("4.")])
    assert K == 13 and (change[~chosen] == 0).all() and (change[chosen] != 0).all()
    assert not torch.equal(merged[4].weight, base[4].weight)                              # the head trains beside
    phi = load_file(tmp_path / "phi" / "state.safetensors")
    assert sum(t.numel() for n, t in phi.items() if ".v" in n) == K                       # what is stored is K numbers
    tuned.unmerge()
    y = tuned(task.x)
    assert torch.equal(tuned.detach()(task.x), base(task.x))
    assert torch.equal(load(model, tmp_path / "phi")(task.x), y)


def test_phases_start_alike_so_that_the_ticket_is_a_rewind(tmp_path):
    model, task = network(), Task()
    tuned = lt_sft(model, task, tmp_path, density=1.0, steps=4, lr=1e-2, batch_size=16, progress=False, log=False)
    full = load(network(), tmp_path / "full")
    torch.testing.assert_close(tuned(task.x), full(task.x))         # every place kept: the same training twice
