"""Several processes are one run: the loss, the weights and the predictions of one process, on gloo. No GPU is needed."""

import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scale_worker
import torch
from folders import bert

from luthier import cli, ranks
from luthier.errors import LuthierError

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0"]
WAYS = ranks.WAYS


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def pair():
    """Starts two processes with the variables that torchrun sets, but without torchrun, whose way with a death is its own."""
    fork, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    fork.set_forkserver_preload(["scale_worker"])

    def start(argv, folder, **env):
        env |= dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port()))
        runs = []
        for r in "01":
            runs.append(fork.Process(target=scale_worker.child, args=(env | dict(RANK=r, LOCAL_RANK=r), argv,
                                                                      str(folder / f"said-{r}"))))
            runs[-1].start()
            runs[-1].said = folder / f"said-{r}"
        started.extend(runs)
        return runs

    started = []
    os.environ["PYTHONPATH"] = ENV["PYTHONPATH"]
    yield start
    if before is None:
        os.environ.pop("PYTHONPATH")
    else:
        os.environ["PYTHONPATH"] = before
    for r in started:
        r.kill()
        r.join()


def ended(runs, seconds=200):
    """(exit code, words) of each."""
    for r in runs:
        r.join(seconds)
    return [(r.exitcode, " ".join(r.said.read_text("utf-8").split())) for r in runs]


def worker(pair, what, way, folder):
    out = folder / f"{what}-{way}.pt"
    found = ended(pair([what, way, str(out)], folder))
    assert [code for code, _ in found] == [0, 0], found
    return torch.load(out)


# -- the same run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(pair, tmp_path_factory):
    """way -> {chain: what two processes found}; each pair of processes does all chains."""
    found, folder = {}, tmp_path_factory.mktemp("two")
    return lambda way: found[way] if way in found else found.setdefault(way, worker(pair, "both", way, folder))


@pytest.mark.parametrize("chain", scale_worker.CHAINS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(two, way, chain):
    """Rows of unequal length, five batches of 4, 4, 4 and 1 rows an epoch: the last is one process's alone."""
    here, there = scale_worker.run(chain), two(way)[chain]
    assert len(here["loss"]) == len(there["loss"]) == 8
    assert max(abs(a - b) for a, b in zip(here["loss"], there["loss"], strict=True)) < 1e-5
    top = here["logits"].abs().max()
    assert (here["logits"] - there["logits"]).abs().max() < 1e-5 * top
    assert torch.equal(here["logits"].argmax(-1), there["logits"].argmax(-1))
    assert here["state"].keys() == there["state"].keys() and len(set(here["loss"])) == 8
    for name, t in here["state"].items():                  # Adam makes full steps of gradients that are rounding: not all go far
        assert t.shape == there["state"][name].shape, name
        if chain in scale_worker.CHAINS[:5]:
            assert (t - there["state"][name]).norm() < 1e-5 * t.norm(), name


@pytest.mark.parametrize("way", WAYS)
def test_resume_equals_uninterrupted_to_the_bit(pair, tmp_path, way):
    """Every process draws its own dropout, and draws it again."""
    for chain, (whole, resumed) in worker(pair, "resume", way, tmp_path).items():
        assert whole["loss"] == resumed["loss"] and torch.equal(whole["logits"], resumed["logits"]), chain
        assert all(torch.equal(t, resumed["state"][n]) for n, t in whole["state"].items()), chain
        assert whole["loss"] != scale_worker.run(chain, dropout=0.2)["loss"]           # other dropout than one process draws


def test_a_sharded_base_takes_half_the_memory(pair, tmp_path):
    """12 blocks over two processes: half of everything, and while a block runs that block and the next one whole."""
    one, half = worker(pair, "memory", "ddp", tmp_path), worker(pair, "memory", "fsdp", tmp_path)
    assert one["peak"] >= one["whole"] == half["whole"] and one["share"] == 0
    assert half["share"] == pytest.approx(half["whole"] / 2, rel=0.01) and half["kept"] == 0
    print(f"peak {one['peak'] / one['whole']:.2f} and {half['peak'] / one['whole']:.2f} of the base")
    assert half["peak"] < 0.8 * one["peak"]


def test_a_connection_that_breaks_anywhere_in_a_step(pair, tmp_path):
    """In a block's forward, in its backward, while gradients are summed: the state is the last good one, and can be saved."""
    found = worker(pair, "cut", "fsdp", tmp_path)
    assert len(found) > 10 and {k for _, k, _ in found} == {1, 2}
    kept = dict((k, state) for _, k, state in found)
    assert any((t - kept[2][n]).abs().max() > 1e-3 for n, t in kept[1].items())
    for said, k, state in found:
        assert "Step 3 of 3: Another of the 2 processes died" in said and f"after {k} steps" in said, said
        assert state.keys() == kept[k].keys() and all(torch.equal(t, kept[k][n]) for n, t in state.items()), said


def test_a_state_that_drifts_apart_is_noticed(pair, tmp_path):
    for said in worker(pair, "refused", "ddp", tmp_path):
        assert said.startswith("RunStopped: The processes no longer hold the same state") and "one process" in said
    assert len(said)


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A table and a BERT without dropout, so that one process and two compute the same."""
    import json

    folder = tmp_path_factory.mktemp("scale")
    words = ["good", "fine", "bad", "awful"]
    (folder / "reviews.csv").write_text("review,stars\n" + "".join(
        f"the film was {words[i % 4]}{' and the plot' * (i % 3)},{'no' if i % 4 > 1 else 'yes'}\n" for i in range(61)))
    bert(folder / "bert")
    config = folder / "bert" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)))
    return folder


def tune(place, out, *more, chain="lora(rank=4)"):
    return ["tune", str(place / "reviews.csv"), "--model", str(place / "bert"), "--with", chain, "--out", str(out), "--epochs",
            "2", "--batch-size", "7", "--lr", "0.03", "--logger", "none", *more]


def history(out):
    from safetensors.torch import load_file

    return load_file(max((out / "checkpoints").glob("step-*")))["history/loss"]


@pytest.mark.parametrize("more", [[], ["--parallel", "fsdp"]], ids=["", "fsdp"])
def test_two_processes_tune_as_one(pair, place, tmp_path, capsys, more):
    one, several = tmp_path / "one", tmp_path / "two"
    assert cli.main(tune(place, one)) == 0
    said = capsys.readouterr()
    (code, words), (also, other) = ended(pair(["luthier", *tune(place, several, *more)], tmp_path))
    assert code == also == 0 and "Saved in" not in other and "text-classification" not in other, (words, other)
    assert all(" ".join(line.split()) in words for line in (said.out + said.err).replace(str(one), str(several)).splitlines())
    assert (history(one) - history(several)).abs().max() < 1e-5
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in several.iterdir())
    answers = []
    for out in (one, several):
        assert cli.main(["predict", str(out), "the film was good", "the plot was awful", "--json"]) == 0
        answers.append(re.sub(r"0\.\d+", lambda m: f"{float(m[0]):.4f}", capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert cli.main(tune(place, several, "--resume")) == 2
    assert "Resume with processes=2" in " ".join(capsys.readouterr().err.split())


def until(there, runs, seconds=200):
    since = time.monotonic()
    while not there():
        assert time.monotonic() - since < seconds and all(r.exitcode is None for r in runs), [r.said.read_text() for r in runs]
        time.sleep(0.05)


@pytest.mark.parametrize("how, chain, more", [("SIGKILL", "lora()", []), ("SIGKILL", "full()", ["--parallel", "fsdp"]),
                                              ("SIGSTOP", "lora()", [])])
def test_a_process_that_dies_or_hangs_ends_the_run(pair, place, tmp_path, how, chain, more):
    out = tmp_path / "out"
    argv = ["luthier", *tune(place, out, "--epochs", "100000", "--every", "5", *more, chain=chain)]
    runs = pair(argv, tmp_path, LUTHIER_TIMEOUT="8")
    until(lambda: list(out.glob("checkpoints/step-*[1-9]?.*")), runs)
    os.kill(runs[1].pid, getattr(signal, how))
    (code, said), = ended(runs[:1])
    assert code == 2 and said.count("luthier:") == 1 and "Another of the 2 processes died" in said, said
    assert "go on with --resume" in said and (out / "state.safetensors").exists()
    assert not list(out.glob("checkpoints/.partial*")) and f"after {len(history(out))} steps" in said


def test_ctrl_c_ends_both_in_a_good_state(pair, place, tmp_path):
    """One process is told; both stop after the same step."""
    out = tmp_path / "out"
    runs = pair(["luthier", *tune(place, out, "--epochs", "100000", "--every", "5")], tmp_path)
    until(lambda: list(out.glob("checkpoints/step-*")), runs)
    os.kill(runs[1].pid, signal.SIGINT)
    found = ended(runs)
    said = "".join(words for _, words in found)
    assert [code for code, _ in found] == [130, 130] and said.count("luthier:") == 1, found
    assert "Stopped by" in said and "go on with --resume" in said and f"after {len(history(out))} steps" in said


# -- refusals ---------------------------------------------------------------------------------------------------------------


def test_several_processes_are_asked_for_where_there_is_one(place, tmp_path, capsys):
    assert cli.main(tune(place, tmp_path / "out", "--parallel", "fsdp")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "this one is alone" in said and "torchrun" in said and not (tmp_path / "out").exists()


def test_other_commands_are_the_work_of_one(monkeypatch, capsys):
    for name, value in dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="x").items():
        monkeypatch.setenv(name, value)
    assert cli.main(["zoo"]) == 2 and "--jobs and --ray" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["zoo"]) == 2 and capsys.readouterr().err == ""                    # said once


def test_what_does_not_go_together_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(LuthierError, match="Use bf16"):
        ranks.fit("fsdp", "fp16")
    with pytest.raises(LuthierError, match="ddp and fsdp"):
        ranks.fit("zero3", "no")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in dict(WORLD_SIZE="4", RANK="2", LOCAL_RANK="2", MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LuthierError, match="--nproc-per-node 2"):
        ranks.join()


def test_a_base_that_cannot_be_cut_is_refused(monkeypatch):
    class Odd(torch.nn.Parameter):
        pass

    from luthier import attach, tiny

    model = tiny.build("llama")
    tuned = attach(model, "lora()")
    model.lm_head._parameters["weight"] = Odd(model.lm_head.weight.detach())
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *a: None)
    with pytest.raises(LuthierError, match="lm_head.weight is of type Odd.*--parallel ddp"):
        ranks.shard(tuned, torch.device("cpu"))


# -- the page ---------------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") if (ROOT / "docs" / "scale.md").exists() else ""
LINES = [shlex.split(line.removeprefix("$ ")) for block in re.findall(r"```(?:console|bash)\n(.*?)```", PAGE, re.S)
         for line in re.sub(r"\\\n *", "", block).splitlines() if line.startswith(("$ ", "srun "))]


def test_the_figures_of_the_page_are_those_of_the_shape():
    from luthier import attach, cost

    model = cost.shape("shape:llama-7b")
    blocks = [sum(p.nbytes for p in b.parameters()) for b in model.model.layers]
    whole, n = sum(p.nbytes for p in model.parameters()), sum(p.numel() for _, p in attach(model, "lora()").trainable())
    beside = whole - sum(blocks)
    text = " ".join(PAGE.split())
    assert (f"the base is {whole / 1e9:.2f} GB, a block {blocks[0] / 1e9:.2f} GB, what is outside of blocks "
            f"{beside / 1e9:.2f} GB, and `lora()` (r 8, q and v) has {n / 1e6:.1f} million numbers, {8 * n / 1e6:.0f} MB with "
            "gradient and moments") in text
    assert (f"Over 8 GPUs that is {whole / 8e9:.1f} + {2 * blocks[0] / 1e9:.1f} + {beside / 1e9:.1f} GB a GPU under fsdp against "
            f"{whole / 1e9:.1f} GB under ddp") in text


@pytest.mark.parametrize("words", LINES, ids=lambda w: " ".join(w)[:60])
def test_every_command_of_the_page_is_understood(words):
    """Each goes through torchrun's own parser and ours."""
    if "torchrun" in words:
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[words.index("torchrun") + 1:])
        assert args.module and args.training_script == "luthier"
        cli._parse(args.training_script_args)
    elif words[0] == "luthier":
        cli._parse(words[1:])
    else:
        assert words[:2] == ["ray", "start"]


@pytest.mark.parametrize("words", [w for w in LINES if w[0] == "torchrun" and "--nnodes" not in w], ids=" ".join)
def test_the_commands_for_one_machine_run(place, tmp_path, words):
    """On gloo, with two processes, little data and a tiny model."""
    words = [*TORCHRUN[:3], *TORCHRUN[4:], *words[1:]]
    for flag, value in {"--nproc-per-node": "2", "--model": str(place / "bert"), "--out": str(tmp_path / "out")}.items():
        words[words.index(flag) + 1] = value
    words[words.index("tune") + 1] = str(place / "reviews.csv")
    run = subprocess.run([*words, "--epochs", "1", "--batch-size", "16", "--logger", "none"], capture_output=True, text=True,
                         env=ENV, timeout=300)
    assert run.returncode == 0 and "Saved in" in run.stdout, run.stderr[-3000:]
