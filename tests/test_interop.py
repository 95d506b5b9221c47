"""Adapters of peft's and AdapterHub's: the same logits both ways, and refusals with reasons for what is something else."""

import json
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from folders import bert, llama, reviews, run
from safetensors.torch import load_file, save_file

import luthier
from luthier import cli, interop, tiny
from luthier._compat import torchvision
from luthier.errors import BadState, DoesNotFit, LuthierError, WrongBase
from luthier.interop import files
from luthier.interop.layout import layouts

torchvision()
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent
TINY = dict(float32=3e-5, float64=1e-9)      # of logits of a few units, after two blocks whose change is as large as they are


def shaken(parameters, scale=0.3):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn(p.shape, generator=g).to(p.dtype))


def logits(model, name, dtype=torch.float32):
    """What counts: the tokens that are no padding, and none that a prompt put in front."""
    batch = tiny.batch(name, dtype)
    with torch.no_grad():
        out = model(**batch).logits
    if out.dim() == 3 and name != "t5":
        mask = batch["attention_mask"].bool()
        out = out[:, out.shape[1] - mask.shape[1]:][mask]
    return out


def same(a, b, exact, dtype=torch.float32):
    if exact:
        return a.equal(b)
    return (a - b).abs().max() <= TINY[str(dtype).removeprefix("torch.")] * max(1, a.abs().max())


def to_peft(folder, name, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(tiny.build(name, dtype), folder).eval()


# -- Luthier -> peft -> Luthier ---------------------------------------------------------------------------------------------

EVERY = ("gpt2", "llama", "bert", "vit", "t5")
WRITTEN = [                                  # chain, models, equal to the bit (else to rounding, for the reason in the docs)
    ("lora()", ("llama", "bert", "vit", "t5"), True),
    ("lora(at='attn.q')", EVERY, True),
    ("full(at='embed.token head')", ("gpt2", "t5"), True),             # tied: one state, two views of it
    ("lora(at='embed.token')", ("gpt2",), False),
    ("lora(at='embed.token head')", ("llama",), False),         # an embedding's change is added to its table here
    ("lora()", ("gpt2",), False),            # two of three parts of c_attn: ranks are stacked, another product
    ("lora(at='attn.o mlp.down', rank=2, alpha=4.0) >> lora(at='attn.q')", EVERY, True),
    ("lora(alpha=12.0)", ("gpt2", "llama"), False),
    ("lora(at='attn.o') >> lora(at='attn.o', rank=3, alpha=2.5)", ("gpt2", "t5"), False),
    ("lora(dropout=0.1) >> probe()", ("bert", "vit"), True),
    ("dora(rank=4)", EVERY, False),
    ("ia3(at='attn.k attn.v')", ("llama", "bert", "vit", "t5"), True),
    ("ia3()", EVERY, False),
    ("adalora(rank=4, target=2)", EVERY, False),
    ("randlora(at='attn.o', rank=5)", EVERY, False),
    ("bitfit(at='attn.q attn.o')", ("bert", "vit"), True),
    ("prompt(n=4)", ("gpt2", "llama", "t5"), True),
    ("prefix(n=3, mid=16)", ("llama",), False),
    ("full(at='norm')", EVERY, True),
    ("full(at='attn.o head')", ("gpt2", "bert"), True),
    ("probe()", ("gpt2", "bert", "t5"), True),
    ("spiel(at='attn.q mlp.down', density=0.2)", ("llama", "vit"), False),
]
WRITTEN = [(c, n, e) for c, names, e in WRITTEN for n in names]


@pytest.mark.parametrize("chain, name, exact", WRITTEN, ids=[f"{c}-{n}" for c, n, _ in WRITTEN])
def test_what_luthier_writes_peft_computes(chain, name, exact, tmp_path):
    tuned = luthier.attach(tiny.build(name), chain).eval()
    shaken(p for _, p in tuned.trainable())
    want = logits(tuned, name)
    interop.export(tuned, tmp_path / "a")
    there = to_peft(tmp_path / "a", name)
    assert same(logits(there, name), want, exact)
    assert not same(want, logits(tiny.build(name), name), False)
    back = interop.read(tmp_path / "a", tiny.build(name)).eval()       # what comes back is what went out
    turned = {"prefix", "lora"} & {type(m).__name__ for m in tuned.chain}                  # turned keys, stacked ranks
    same_here = exact or not turned
    assert same(logits(back, name), want, same_here)
    there.save_pretrained(tmp_path / "b")                              # and what peft saves of it is read the same
    assert logits(interop.read(tmp_path / "b", tiny.build(name)).eval(), name).equal(logits(back, name))


@pytest.mark.parametrize("chain", ["lora(alpha=12.0)", "dora(rank=4)", "ia3()", "adalora(rank=4, target=2)",
                                   "prefix(n=3, mid=16)", "spiel(at='attn.q mlp.down', density=0.2)",
                                   "lora() >> lora(rank=3, alpha=2.5)"])
def test_what_is_not_to_the_bit_is_rounding_and_nothing_else(chain, tmp_path):
    """In double precision the difference is smaller by as much as the numbers are finer."""
    name, f64 = "llama", torch.float64
    tuned = luthier.attach(tiny.build(name, f64), chain).eval()
    shaken(p for _, p in tuned.trainable())
    interop.export(tuned, tmp_path / "a")
    there = to_peft(tmp_path / "a", name, f64)
    single = "adalora" in chain or "prefix" in chain       # peft keeps rank + 1e-5, Llama its angles, in single precision
    eps = 1e-5 if single else TINY["float64"]
    assert (logits(there, name, f64) - logits(tuned, name, f64)).abs().max() < eps


def test_spiel_by_its_specification_is_equal_to_the_bit(tmp_path):
    tuned = luthier.attach(tiny.build("llama"), "spiel(at='attn.q mlp.down', density=0.2)").eval()
    shaken(p for _, p in tuned.trainable())
    tuned.fast = False
    interop.export(tuned, tmp_path / "a")
    assert logits(to_peft(tmp_path / "a", "llama"), "llama").equal(logits(tuned, "llama"))


def test_the_keys_are_those_that_vllm_and_the_hub_expect(tmp_path):
    interop.export(luthier.attach(tiny.build("llama"), "lora(rank=4)"), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.model.layers.{i}.self_attn.{m}_proj.lora_{x}.weight"
                            for i in (0, 1) for m in "qv" for x in "AB"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"], config["target_modules"]) == (
        "LORA", "CAUSAL_LM", 4, 16, ["q_proj", "v_proj"])
    assert type(config["lora_alpha"]) is int and config["rank_pattern"] == config["alpha_pattern"] == {}


def test_adalora_that_lost_triplets_keeps_its_ranks(tmp_path):
    tuned = luthier.attach(tiny.build("llama"), "adalora(at='attn.q attn.v', rank=4, target=2)").eval()
    shaken(p for _, p in tuned.trainable())
    for i, p in enumerate(tuned.states.values()):
        for n in ("P", "lam", "Q"):
            p.resize(n, getattr(p, n)[:i], torch.arange(i))            # ranks 0, 1, 2, 3
    interop.export(tuned, tmp_path / "a")
    assert same(logits(to_peft(tmp_path / "a", "llama"), "llama"), logits(tuned, "llama"), False)
    back = interop.read(tmp_path / "a", tiny.build("llama")).eval()
    assert [len(p.lam) for p in back.states.values()] == [0, 1, 2, 3]
    assert same(logits(back, "llama"), logits(tuned, "llama"), False)


# -- peft -> Luthier -> peft ------------------------------------------------------------------------------------------------


def L(**more):
    return peft.LoraConfig(**dict(r=4, lora_alpha=8, init_lora_weights=False) | more)


READ = [                                     # label, model, config, chain, equal to the bit
    ("fused", "gpt2", lambda: L(target_modules=["c_attn"]), "lora(at='attn.q attn.k attn.v', rank=4, alpha=8.0)", True),
    ("all", "gpt2", lambda: L(target_modules="all-linear", fan_in_fan_out=True), "lora(at='attn.q attn.k attn.v attn.o mlp.up "
     "mlp.down', rank=4, alpha=8.0)", True),
    ("stabilised", "gpt2", lambda: L(target_modules=["c_attn", "mlp.c_proj"], use_rslora=True),
     "lora(at='attn.q attn.k attn.v mlp.down', rank=4)", True),
    ("fused-dora", "gpt2", lambda: L(target_modules=["c_attn", "c_fc"], use_dora=True),
     "dora(at='attn.q attn.k attn.v mlp.up', rank=4, alpha=8.0)", False),
    ("fused-ia3", "gpt2", lambda: peft.IA3Config(task_type="CAUSAL_LM"), "ia3(at='attn.q attn.k attn.v mlp.down')", False),
    ("fused-adalora", "gpt2", lambda: peft.AdaLoraConfig(total_step=9, target_modules=["c_attn"]), None, False),
    ("bases", "gpt2", lambda: peft.RandLoraConfig(target_modules=["attn.c_proj"], r=4),
     "randlora(at='attn.o', rank=4, scale=160.0, stored=True)", False),
    ("patterns", "llama", lambda: L(target_modules=r".*\.(q|v|down)_proj", alpha_pattern={"layers.0.*v_proj": 32},
                                    rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 8}), None, True),
    ("layers", "llama", lambda: L(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"),
     "lora(at='block.1.attn.q block.1.mlp.up', rank=4, alpha=8.0)", True),
    ("layer", "llama", lambda: L(target_modules=["q_proj"], layers_to_transform=0),
     "lora(at='block.0.attn.q', rank=4, alpha=8.0)", True),
    ("excluded", "llama", lambda: L(target_modules="all-linear", exclude_modules=["k_proj", "down_proj"]),
     "lora(at='attn.q attn.v attn.o mlp.gate mlp.up', rank=4, alpha=8.0)", True),
    ("dora", "llama", lambda: L(target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=True),
     "dora(at='attn.q mlp.up', rank=4)", False),
    ("tokens", "gpt2", lambda: L(target_modules=["wte", "c_fc"]), "lora(at='embed.token mlp.up', rank=4, alpha=8.0)", False),
    ("both-tied", "gpt2", lambda: L(target_modules=["wte", "lm_head"]),
     "lora(at='head', rank=4, alpha=8.0) >> lora(at='embed.token', rank=4, alpha=8.0)", True),
    ("two-views", "t5", lambda: L(target_modules=["embed_tokens", "q"]), None, True),
    ("no-view", "t5", lambda: L(target_modules=["shared", "q"]), "lora(at='embed.token attn.q cross.q -encoder.embed.token "
     "-decoder.embed.token', rank=4, alpha=8.0)", True),
    ("saved", "llama", lambda: L(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
     "lora(at='attn.q', rank=4, alpha=8.0) >> full(at='embed.token head')", True),
    ("shapes", "llama", lambda: peft.RandLoraConfig(target_modules=["q_proj", "k_proj", "down_proj"], r=4),
     "randlora(at='attn.q attn.k mlp.down', rank=4, scale=160.0, stored=True)", False),
    ("ternary", "llama", lambda: peft.RandLoraConfig(target_modules=["q_proj", "k_proj"], r=5, sparse=True, randlora_alpha=30),
     "randlora(at='attn.q attn.k', rank=5, scale=6.0, stored=True)", False),
    ("norms", "llama", lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"), "full(at='attn.norm mlp.norm final.norm')", True),
    ("sparse", "llama", lambda: peft.ShiraConfig(target_modules=["q_proj", "down_proj"], r=2), None, False),
    ("encoder", "llama", lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
     "prompt(n=3, vocab=False)", True),
    ("prompt", "gpt2", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
     "prompt(n=3, vocab=False)", True),
    ("prefix", "llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True),
     "prefix(n=3, reparam=False)", False),
    ("prompt", "t5", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
     "prompt(at='encoder.embed', n=3, vocab=False)", True),
    ("default", "t5", lambda: L(task_type="SEQ_2_SEQ_LM"), "lora(at='attn.q attn.v cross.q cross.v', rank=4, alpha=8.0)", True),
    ("ia3", "t5", lambda: peft.IA3Config(task_type="SEQ_2_SEQ_LM"), "ia3(at='attn.k attn.v mlp.down cross.k cross.v')", False),
    ("ia3", "bert", lambda: peft.IA3Config(task_type="SEQ_CLS"), "ia3(at='attn.o', into='attn.o') >> "
     "ia3(at='attn.k attn.v mlp.down') >> probe()", False),
    ("behind", "llama", lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[]),
     "ia3(at='mlp.down', into='') >> ia3(at='attn.k')", True),
    ("classifier", "bert", lambda: L(task_type="SEQ_CLS"), "lora(rank=4, alpha=8.0) >> probe()", True),
    ("bias", "bert", lambda: peft.BeftConfig(target_modules=["value"]), "bitfit(at='attn.v')", True),
    ("head", "vit", lambda: L(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
     "lora(rank=4, alpha=8.0) >> probe()", True),
    ("adalora", "vit", lambda: peft.AdaLoraConfig(total_step=9, target_modules=["fc1"]), None, False),
]


def peft_made(name, config, folder, dtype=torch.float32):
    """An adapter that peft makes and saves."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.build(name, dtype), config)
    shaken(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("label, name, config, chain, exact", READ, ids=[f"{r[0]}-{r[1]}" for r in READ])
def test_what_peft_writes_luthier_computes(label, name, config, chain, exact, tmp_path):
    peft_made(name, config(), tmp_path / "a")
    want = logits(to_peft(tmp_path / "a", name), name)
    tuned = interop.read(tmp_path / "a", tiny.build(name)).eval()
    assert same(logits(tuned, name), want, exact) and not same(want, logits(tiny.build(name), name), False)
    assert chain is None or luthier.parse(repr(tuned.chain)) == luthier.parse(chain)
    interop.export(tuned, tmp_path / "b")                              # back to peft: the very same function
    again = logits(to_peft(tmp_path / "b", name), name)
    assert same(again, want, label not in ("prefix", "adalora", "fused-adalora"))
    tuned.save(tmp_path / "c")                                         # and through Luthier's own format
    assert logits(luthier.load(tiny.build(name), tmp_path / "c").eval(), name).equal(logits(tuned, name))


def test_an_adapter_that_peft_trained(tmp_path):
    """AdaLoRA with ranks that peft itself took away, LoRA with a head."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(total_step=8, tinit=1, tfinal=2, init_r=4, target_r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny.build("llama"), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    batch = tiny.batch("llama")
    for k in range(8):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(k)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"]
    tuned = interop.read(tmp_path / "a", tiny.build("llama")).eval()
    assert len({len(p.lam) for p in tuned.states.values()}) > 1
    assert same(logits(tuned, "llama"), logits(to_peft(tmp_path / "a", "llama"), "llama"), False)


@pytest.mark.parametrize("name, block, q, down", [
    ("vit", ("vit.layers", "vit.encoder.layer"), ("attention.q_proj", "attention.attention.query"), ("mlp.fc2", "output.dense")),
    ("dinov2", ("", ""), ("attention.q_proj", "attention.attention.query"), ("mlp.fc2", "mlp.fc2"))])
def test_an_adapter_from_before_transformers_renamed_its_modules(name, block, q, down, tmp_path):
    """As transformers 4 named them; peft reads such a folder by the same table of renamings."""
    config = L(target_modules=["q_proj", "fc2"], modules_to_save=["classifier"], rank_pattern={"fc2": 2})
    peft_made(name, config, tmp_path / "a")
    want = logits(to_peft(tmp_path / "a", name), name)
    t = load_file(tmp_path / "a" / files.WEIGHTS)
    for new, old in (block, q, down):
        t = {k.replace(new, old): v for k, v in t.items()}
    save_file(t, tmp_path / "a" / files.WEIGHTS)
    changed(target_modules=["query", down[1]], rank_pattern={down[1]: 2})(tmp_path / "a")
    tuned = interop.read(tmp_path / "a", tiny.build(name)).eval()
    assert logits(tuned, name).equal(want)
    tensors(lambda t: t.pop(next(k for k in t if "layer.0" in k and "lora_B" in k)))(tmp_path / "a")
    with pytest.raises(BadState, match="lacks lora_B"):
        interop.read(tmp_path / "a", tiny.build(name))


def test_diffusers_reads_it_too(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    def unet():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=16, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8).eval()

    tuned = luthier.attach(unet(), "lora(at='*.q *.v')").eval()
    shaken(p for _, p in tuned.trainable())
    interop.export(tuned, tmp_path / "a")
    x = torch.randn(2, 4, 8, 8), torch.tensor([1, 5]), torch.randn(2, 5, 16)
    config, theirs = json.loads((tmp_path / "a" / files.CONFIG).read_text()), unet()
    found = {k.removeprefix("base_model.model."): t for k, t in load_file(tmp_path / "a" / files.WEIGHTS).items()}
    theirs.load_lora_adapter(found, prefix=None, metadata={k: config[k] for k in ("r", "lora_alpha", "target_modules")})
    with torch.no_grad():
        want = tuned(*x).sample
        assert theirs(*x).sample.equal(want) and peft.PeftModel.from_pretrained(unet(), tmp_path / "a")(*x).sample.equal(want)


def test_a_half_precision_base(tmp_path):
    """A bf16 adapter goes both ways whole; a single-precision one on a bf16 base would be rounded, and is refused."""
    tuned = luthier.attach(tiny.build("llama", torch.bfloat16), "lora()").eval()
    shaken(p for _, p in tuned.trainable())
    interop.export(tuned, tmp_path / "a")
    back = interop.read(tmp_path / "a", tiny.build("llama", torch.bfloat16)).eval()
    assert logits(back, "llama", torch.bfloat16).equal(logits(tuned, "llama", torch.bfloat16))
    peft_made("llama", L(target_modules=["q_proj"]), tmp_path / "b")
    with pytest.raises(DoesNotFit, match="precision"):
        interop.read(tmp_path / "b", tiny.build("llama", torch.bfloat16))


# -- the command line, and what docs/interop.md says --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop")
    reviews(folder)
    bert(folder / "bert")
    llama(folder / "llama")
    assert cli.main(["tune", str(folder / "reviews.csv"), "--model", str(folder / "bert"), "--with", "lora(rank=4)", "--out",
                     str(folder / "tuned"), "--epochs", "2", "--batch-size", "8", "--lr", "0.03", "--log", "none"]) == 0
    return folder


def test_the_page_s_commands_run(place, capsys, monkeypatch):
    """Every command of docs/interop.md, in order."""
    monkeypatch.chdir(place)
    commands = re.findall(r"^    (luthier .+)$", (ROOT / "docs" / "interop.md").read_text(), re.M)
    assert len(commands) >= 5
    for command in commands:
        code, out, err = run(capsys, *shlex.split(command)[1:])
        assert code == 0, (command, err)
    assert (place / "adapter" / "adapter_config.json").exists() and (place / "merged" / "config.json").exists()


def test_the_page_s_table_is_that_of_the_declarations():
    page = (ROOT / "docs" / "interop.md").read_text()
    rows = {f"| `{m}` | {there} | {what} | {exact} |" for m, there, what, exact in interop.table()}
    assert set(re.findall(r"^\| `.*$", page, re.M)) == rows


def test_a_tuned_head_travels_beside_the_adapter(place, tmp_path, capsys):
    """tune -> export -> peft (with the head) and import -> predict: all the same."""
    from transformers import BertModel

    from luthier.tasks.headed import pooled
    from luthier.tune import reopen

    code, out, _ = run(capsys, "export", place / "tuned", "--to", "peft", "--out", tmp_path / "a", "--json")
    assert code == 0 and set(json.loads(out)["files"]) == {files.CONFIG, files.WEIGHTS, files.OURS, files.HEAD}
    task, tuned = reopen(place / "tuned")
    batch = task.collate(task.encode(task.rows(["the film was good", "awful plot"])))
    batch = {k: v for k, v in batch.items() if k != "labels"}
    there = peft.PeftModel.from_pretrained(BertModel.from_pretrained(place / "bert"), tmp_path / "a").eval()
    head = load_file(tmp_path / "a" / files.HEAD)
    with torch.no_grad():
        h = pooled(there(**batch).last_hidden_state, "mean", batch["attention_mask"])
        assert torch.nn.functional.linear(h, head["weight"], head["bias"]).equal(tuned(**batch).logits)
    alone = interop.read(tmp_path / "a", BertModel.from_pretrained(place / "bert")).eval()             # without the head: said
    with torch.no_grad():
        assert alone(**batch).last_hidden_state.equal(there(**batch).last_hidden_state) and "left aside" in alone.told[0]
        other = alone.detach()
        other.encoder.layer[0].attention.self.query.weight.mul_(2)
    with pytest.raises(WrongBase, match="other weights"):
        interop.read(tmp_path / "a", other)
    code, out, _ = run(capsys, "import", tmp_path / "a", "--model", place / "bert", "--out", tmp_path / "b", "--json")
    assert code == 0 and json.loads(out)["chain"] == "lora(rank=4) >> probe()"
    said = [run(capsys, "predict", d, "the film was good", "--json")[1] for d in (place / "tuned", tmp_path / "b")]
    assert said[0] == said[1] and json.loads(said[0])[0]["label"] in ("yes", "no")


def test_a_folder_of_others_predicts_and_merges(place, tmp_path, capsys):
    """A classifier and a language model that peft adapted: no word of Luthier in the folder."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

    torch.manual_seed(0)
    config = BertConfig.from_pretrained(place / "bert", id2label={0: "bad", 1: "good", 2: "so so"}, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    for f in (place / "bert").glob("tokenizer*"):
        (tmp_path / "base" / f.name).write_bytes(f.read_bytes())
    model = peft.get_peft_model(BertForSequenceClassification.from_pretrained(tmp_path / "base"), L(task_type="SEQ_CLS"))
    shaken(p for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path / "a")
    assert run(capsys, "import", tmp_path / "a", "--model", tmp_path / "base", "--out", tmp_path / "b")[0] == 0
    code, out, _ = run(capsys, "predict", tmp_path / "b", "the film was good", "--json")
    found = json.loads(out)[0]
    assert code == 0 and set(found["scores"]) == {"bad", "good", "so so"}
    assert run(capsys, "merge", tmp_path / "b", "--out", tmp_path / "m")[0] == 0
    merged, ids = BertForSequenceClassification.from_pretrained(tmp_path / "m").eval(), torch.tensor([[2, 8, 9, 10, 4, 3]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(place / "llama"), L(task_type="CAUSAL_LM"))
    shaken(p for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path / "c")
    code, out, _ = run(capsys, "import", tmp_path / "c", "--model", place / "llama", "--out", tmp_path / "d")
    assert code == 0 and "lora(rank=4, alpha=8.0)" in out
    assert run(capsys, "predict", tmp_path / "d", "the film", "--json")[0] == 0


def test_a_folder_saved_from_python_names_its_base(place, tmp_path, capsys):
    from luthier import zoo

    tuned = luthier.attach(zoo.load(str(place / "llama")), "ia3()")
    shaken(p for _, p in tuned.trainable())
    tuned.save(tmp_path / "t")
    code, _, err = run(capsys, "export", tmp_path / "t", "--out", tmp_path / "a")
    assert code == 2 and "--model" in err
    assert run(capsys, "export", tmp_path / "t", "--out", tmp_path / "a", "--model", place / "llama")[0] == 0
    assert json.loads((tmp_path / "a" / files.CONFIG).read_text())["feedforward_modules"] == ["down_proj"]
    code, _, err = run(capsys, "export", tmp_path / "t", "--out", tmp_path / "a", "--model", place / "llama")
    assert code == 2 and "new folder" in err


# -- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, chain, says", [
    ("llama", "ssf()", "merge"), ("llama", "houlsby()", "nothing that computes"), ("bert", "bitfit()", "norm"),
    ("bert", "prompt(n=2)", r"\[CLS\]"), ("gpt2", "prefix(n=2)", "shifted"), ("t5", "prefix(n=2)", "shifted"),
    ("llama", "dora(at='embed.token')", "embedding"), ("gpt2", "randlora(rank=4)", "several weights"),
    ("llama", "randlora(at='attn.q attn.k', rank=4)", "shape"), ("llama", "lora() >> dora(at='attn.o')", "one kind"),
    ("llama", "full(at='attn.o') >> lora(at='attn.o')", "both"), ("vit", "full(at='embed')", "layer|matches|holds more|verb"),
    ("llama", "dora() >> dora()", "twice"),
    ("gpt2", "lora(at='embed.token head')", "tied"),
    ("llama", "adalora(at='attn.q') >> adalora(at='attn.o', alpha=3.0)", "different"),
    ("vit", "full(at='embed.cls')", "holds more"), ("llama", "spiel(at='attn.k', density=1.0)", "entries"),
    ("bert", "prefix(n=2)", "shifted"), ("gpt2", "full(at='attn.k') >> lora(at='attn.q')", "both"),
])
def test_what_peft_has_not_is_not_written(name, chain, says, tmp_path):
    with pytest.raises(LuthierError, match=says):
        interop.export(luthier.attach(tiny.build(name), chain), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_export_needs_the_state_and_the_base_to_itself(tmp_path):
    model = tiny.build("llama")
    first = luthier.attach(model, "lora()")
    second = luthier.attach(model, "lora(at='attn.o')")
    with pytest.raises(DoesNotFit, match="attached to the same base"):
        interop.export(second, tmp_path / "a")
    first.active = False
    interop.export(second, tmp_path / "a")
    with pytest.raises(luthier.LuthierError, match="Nearest: peft"):
        interop.export(second, tmp_path / "b", to="peff")
    second.detach()
    with pytest.raises(BadState, match="detached"):
        interop.export(second, tmp_path / "b")


def changed(**config):
    return lambda d: (d / files.CONFIG).write_text(json.dumps(json.loads((d / files.CONFIG).read_text()) | config))


def tensors(change):
    def edit(d):
        found = load_file(d / files.WEIGHTS)
        change(found)
        save_file(found, d / files.WEIGHTS)
    return edit


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def text(name, content):
    return lambda d: (d / name).write_text(content) if isinstance(content, str) else (d / name).write_bytes(content)


def pickled(d):
    (d / files.WEIGHTS).unlink()
    torch.save({}, d / "adapter_model.bin")


def linked(d):
    (d / files.WEIGHTS).rename(d.parent / "elsewhere.safetensors")
    (d / files.WEIGHTS).symlink_to(d.parent / "elsewhere.safetensors")


def longer(d):
    content = (d / files.WEIGHTS).read_bytes()
    (d / files.WEIGHTS).write_bytes(content[:len(content) // 2])


def stolen(d):
    tensors(lambda t: t.__setitem__(A0, t[A0] * torch.nan))(d)


MALFORMED = {                                # what was done to a good folder: the error, and what it says
    "no config": (lambda d: (d / files.CONFIG).unlink(), BadState, "holds no adapter_config.json"),
    "config is a list": (text(files.CONFIG, "[1]"), BadState, "JSON object"),
    "config is no JSON": (text(files.CONFIG, "{'a': 1}"), BadState, "not JSON"),
    "config is nested beyond reason": (text(files.CONFIG, "[" * 100000), BadState, "not JSON"),
    "config is binary": (text(files.CONFIG, b"\xff\xfe\x00"), BadState, "not JSON"),
    "no type": (changed(peft_type=None), DoesNotFit, "None"),
    "a type nobody knows": (changed(peft_type="LORAA"), DoesNotFit, "Nearest: LORA"),
    "a type that is a list": (changed(peft_type=["LORA"]), DoesNotFit, "no method"),
    "a type Luthier has not": (changed(peft_type="VERA"), DoesNotFit, "VERA"),
    "no weights": (lambda d: (d / files.WEIGHTS).unlink(), BadState, "holds no adapter_model.safetensors"),
    "pickled weights": (pickled, BadState, "never read.*weights_only"),
    "a pickle by another name": (lambda d: torch.save({}, d / files.WEIGHTS), BadState, "pickle under another name"),
    "a link out of the folder": (linked, BadState, "leads out"),
    "cut short": (longer, BadState, "corrupt or cut"),
    "empty weights": (text(files.WEIGHTS, b""), BadState, "corrupt"),
    "no tensors": (lambda d: save_file({}, d / files.WEIGHTS), BadState, "no tensor"),
    "NaN": (stolen, BadState, "NaN"),
    "one tensor lost": (tensors(lambda t: t.pop(A0)), BadState, "lacks lora_A"),
    "one module lost": (tensors(lambda t: [t.pop(k) for k in list(t) if "layers.0.self_attn.q" in k]), BadState,
                        "no tensor for it"),
    "a strange tensor": (tensors(lambda t: t.__setitem__("x.y", t[A0].clone())), BadState, "x.y"),
    "a module that is not there": (tensors(lambda t: t.__setitem__(A0.replace("layers.0", "layers.7"), t[A0].clone())), WrongBase,
                                   "no such module"),
    "a module nobody targeted": (tensors(lambda t: t.update({k.replace("q_proj", "o_proj"): v.clone() for k, v in list(t.items())
                                                             if "q_proj" in k})), BadState, "does not select"),
    "another width": (tensors(lambda t: t.__setitem__(A0, torch.zeros(4, 48))), WrongBase, "this base's"),
    "three axes": (tensors(lambda t: t.__setitem__(A0, torch.zeros(4, 32, 1))), WrongBase, "does not fit"),
    "another rank": (changed(r=8), BadState, "has rank 4"),
    "a rank that is no number": (changed(r="4"), BadState, "no value"),
    "a negative rank": (changed(r=-4), BadState, "whole number"),
    "alpha that is no number": (changed(lora_alpha="big"), BadState, "must be a number"),
    "alpha beyond all numbers": (changed(lora_alpha=10**400), BadState, "must be a number"),
    "whole numbers for weights": (tensors(lambda t: t.__setitem__(A0, t[A0].long())), BadState, "int64"),
    "eight-bit floats": (tensors(lambda t: t.__setitem__(A0, t[A0].to(torch.float8_e4m3fn))), BadState, "float8"),
    "an embedding's tensor at a layer": (tensors(lambda t: t.__setitem__(A0.replace("lora_A.weight", "lora_embedding_A"),
                                                                         t[A0].clone())), BadState, "means nothing"),
    "alpha that is not finite": (changed(lora_alpha=float("inf")), BadState, "must be a number"),
    "targets that are a number": (changed(target_modules=3), BadState, "target_modules must be"),
    "targets that are no names": (changed(target_modules=[1, None]), BadState, "target_modules must be"),
    "no targets": (changed(target_modules=None), BadState, "names no target_modules"),
    "a broken pattern": (changed(target_modules="(q_proj"), BadState, "no regular expression"),
    "a pattern that takes for ever": (changed(target_modules=r"(a*)*b"), BadState, "take for ever"),
    "a rank pattern that is a list": (changed(rank_pattern=["q_proj"]), BadState, "rank_pattern must be"),
    "a rank pattern of text": (changed(rank_pattern={"q_proj": "x"}), BadState, "rank"),
    "a switch that is no switch": (changed(use_dora="yes"), BadState, "use_dora"),
    "a switch that is a table": (changed(use_dora={"a": 1}), BadState, "use_dora"),
    "a switch that is no number": (changed(use_rslora=float("nan")), BadState, "use_rslora"),
    "a dropout that is a list": (changed(lora_dropout=[0.1]), BadState, "lora_dropout"),
    "layers of a pattern": (changed(target_modules=".*q_proj", layers_to_transform=[0]), BadState, "layers_to_transform"),
    "dora without magnitudes": (changed(use_dora=True), BadState, "lacks lora_magnitude_vector"),
    "a saved module that is not in the file": (changed(modules_to_save=["lm_head"]), BadState, "has no tensor of it"),
    "trained biases": (changed(bias="all"), DoesNotFit, "bias=.*own biases"),
    "a bias on B": (changed(lora_bias=True), DoesNotFit, "lora_bias"),
    "a start that changes the base": (changed(init_lora_weights="pissa"), DoesNotFit, "path_initial_model"),
    "repeated layers": (changed(layer_replication=[[0, 2], [1, 2]]), DoesNotFit, "layer_replication"),
    "retrained tokens": (changed(trainable_token_indices=[1, 2]), DoesNotFit, "trainable_token_indices"),
    "bare parameters": (changed(target_parameters=["experts.down"]), DoesNotFit, "target_parameters"),
    "an activated adapter": (changed(alora_invocation_tokens=[1]), DoesNotFit, "alora"),
    "pooled inputs": (changed(use_qalora=True), DoesNotFit, "use_qalora"),
    "a setting of tomorrow": (changed(use_everything=True), DoesNotFit, "use_everything.*not known"),
    "an impossible dropout": (changed(lora_dropout=7.0), DoesNotFit, "dropout"),
    "the record of another base": (text(files.OURS, json.dumps({"base": {"model": "X", "fingerprint": "0:0"}})), WrongBase,
                                   "other names"),
    "a record that is no JSON": (text(files.OURS, "{"), BadState, "not JSON"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "a"
    peft_made("llama", L(target_modules=["q_proj", "v_proj"]), folder)
    return folder


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_folders_are_refused_and_the_model_stays_as_it_was(what, good, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for f in good.iterdir():
        (folder / f.name).write_bytes(f.read_bytes())
    edit, error, says = MALFORMED[what]
    edit(folder)
    model = tiny.build("llama")
    before = logits(model, "llama")
    with pytest.raises(error, match=re.compile(says, re.S)):
        interop.read(folder, model)
    assert luthier.attached(model) == {} and logits(model, "llama").equal(before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_wrong_base_is_refused(good, tmp_path):
    for name in ("gpt2", "bert", "vit", "t5", "resnet"):
        with pytest.raises(WrongBase, match="no such module"):
            interop.read(good, tiny.build(name))
    interop.export(luthier.attach(tiny.build("llama"), "lora()"), tmp_path / "a")
    other = tiny.build("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    with pytest.raises(WrongBase, match="same shapes with other weights"):
        interop.read(tmp_path / "a", other)


@pytest.mark.parametrize("config, error, says", [
    (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), DoesNotFit, "SEQ_CLS"),
    (lambda: L(target_modules=["word_embeddings"], use_dora=True), DoesNotFit, "dora is read at linear or conv1d layers only"),
    (lambda: peft.BeftConfig(target_modules=["intermediate.dense"], modules_to_save=["attention.output"]), None, ""),
])
def test_forms_that_a_model_cannot_take(config, error, says, tmp_path):
    peft_made("bert", config(), tmp_path / "a")
    if error is None:
        tuned = interop.read(tmp_path / "a", tiny.build("bert")).eval()
        assert logits(tuned, "bert").equal(logits(to_peft(tmp_path / "a", "bert"), "bert"))
        return
    with pytest.raises(error, match=says):
        interop.read(tmp_path / "a", tiny.build("bert"))


def test_random_bases_that_were_not_saved_are_refused(tmp_path):
    peft_made("llama", peft.RandLoraConfig(target_modules=["q_proj"], r=4, save_projection=False), tmp_path / "a")
    with pytest.raises(WrongBase, match="save_projection=True"):
        interop.read(tmp_path / "a", tiny.build("llama"))


def test_the_command_line_says_so_in_a_paragraph(good, place, tmp_path, capsys):
    for argv in (["import", good, "--model", place / "bert", "--out", tmp_path / "o"],
                 ["import", tmp_path / "no", "--model", place / "bert", "--out", tmp_path / "o"],
                 ["import", place / "tuned", "--model", place / "bert", "--out", tmp_path / "o"],
                 ["import", good, "--model", "no-such-model", "--out", tmp_path / "o"],
                 ["import", good, "--model", place / "llama", "--out", place / "tuned"],
                 ["export", place / "bert", "--out", tmp_path / "o"], ["export", tmp_path / "no", "--out", tmp_path / "o"],
                 ["export", place / "tuned", "--to", "onnx", "--out", tmp_path / "o"]):
        code, out, err = run(capsys, *argv)
        assert code == 2 and out == "" and err.startswith("luthier:") and "Traceback" not in err, err       # then wrapped
        assert "defect" not in err, err
    assert not (tmp_path / "o").exists()


# -- AdapterHub -----------------------------------------------------------------------------------------------------------------


def xlmr(**more):
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    torch.manual_seed(0)
    config = XLMRobertaConfig(**dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=48, max_position_embeddings=66, num_labels=3) | more)
    return XLMRobertaForSequenceClassification(config).eval()


def by_hand(model, t, key, both=False, act=torch.relu):
    """AdapterHub's own order of things (methods/modeling.py), on a plain model: pre_forward, forward, post_forward."""
    F = torch.nn.functional

    class Output(torch.nn.Module):
        def __init__(self, out, key, normed):
            super().__init__()
            self.out, self.key, self.normed = out, key, normed

        def forward(self, hidden, residual):
            h = self.out.dense(hidden)
            x = self.out.LayerNorm(h + residual) if self.normed else h
            down = act(F.linear(x, t[self.key + "adapter_down.0.weight"], t[self.key + "adapter_down.0.bias"]))
            up = F.linear(down, t[self.key + "adapter_up.weight"], t[self.key + "adapter_up.bias"])
            return self.out.LayerNorm(up + h + residual)

    for i, layer in enumerate(model.roberta.encoder.layer):
        layer.output = Output(layer.output, key.format(i=i, at="output"), not both)
        if both:
            layer.attention.output = Output(layer.attention.output, key.format(i=i, at="attention.output"), False)
    return model


IDS = torch.tensor([[5, 9, 20, 33, 4, 60], [8, 7, 6, 10, 11, 12]])


def hub(folder, model, said, places, width=4, name="mine"):
    g, D = torch.Generator().manual_seed(0), model.config.hidden_size
    shapes = {"adapter_down.0.weight": (width, D), "adapter_down.0.bias": (width,), "adapter_up.weight": (D, width),
              "adapter_up.bias": (D,)}
    t = {f"roberta.encoder.layer.{i}.{at}.adapters.{name}.{k}": torch.randn(s, generator=g)
         for i in range(model.config.num_hidden_layers) for at in places for k, s in shapes.items()}
    folder.mkdir()
    save_file(t, folder / "adapter.safetensors")
    (folder / files.CONFIG).write_text(json.dumps(dict(config=said, hidden_size=D, model_type="xlm-roberta", name=name)))
    return t


SEQ = dict(mh_adapter=False, output_adapter=True, original_ln_before=True, original_ln_after=True, residual_before_ln=True,
           adapter_residual_before_ln=False, ln_before=False, ln_after=False, non_linearity="relu", reduction_factor=8,
           leave_out=[], scaling=1.0, use_gating=False, is_parallel=False)
DOUBLE = SEQ | dict(mh_adapter=True, original_ln_before=False, non_linearity="gelu")


@pytest.mark.parametrize("said, places, chain", [
    (SEQ, ("output",), "pfeiffer(width=4)"),
    (DOUBLE, ("attention.output", "output"), "houlsby(at='attn.out mlp.out', width=4, norms=False)")])
def test_bottlenecks_of_adapterhub(said, places, chain, tmp_path):
    model, act = xlmr(), torch.nn.functional.gelu if said["mh_adapter"] else torch.relu
    t = hub(tmp_path / "a", model, said, places)
    tuned = interop.read(tmp_path / "a", model).eval()
    assert luthier.parse(repr(tuned.chain)) == luthier.parse(chain)
    tuned.save(tmp_path / "b")
    with torch.no_grad():
        got = tuned(IDS).logits
        base = tuned.detach()(IDS).logits
        again = luthier.load(model, tmp_path / "b").eval()
        assert again(IDS).logits.equal(got)
        again.detach()
        want = by_hand(model, t, "roberta.encoder.layer.{i}.{at}.adapters.mine.", said["mh_adapter"], act)(IDS).logits
    assert (got - want).abs().max() < 2e-6 and (got - base).abs().max() > 1e-2


HUB = {
    "another width": (lambda d: None, WrongBase, "width 32"),
    "norms of its own": (lambda d: edit_hub(d, ln_before=True), DoesNotFit, "ln_before"),
    "a learned scale": (lambda d: edit_hub(d, scaling="learned"), DoesNotFit, "scaling"),
    "gates": (lambda d: edit_hub(d, use_gating=True), DoesNotFit, "use_gating"),
    "another form": (lambda d: edit_hub(d, mh_adapter=True), DoesNotFit, "no method"),
    "an act nobody has": (lambda d: edit_hub(d, non_linearity="mish"), DoesNotFit, "mish"),
    "a name for a config": (text(files.CONFIG, json.dumps(dict(config="pfeiffer", model_type="x"))), DoesNotFit, "name"),
    "a block without": (lambda d: cut_hub(d, "layer.1"), BadState, "block 1 has no adapter"),
    "half of one": (lambda d: cut_hub(d, "layer.1.output.adapters.mine.adapter_up.weight"), BadState, "incomplete"),
    "pickled": (lambda d: ((d / "adapter.safetensors").unlink(), torch.save({}, d / "pytorch_adapter.bin")), BadState,
                "weights_only"),
}


def edit_hub(d, **more):
    found = json.loads((d / files.CONFIG).read_text())
    found["config"] |= more
    (d / files.CONFIG).write_text(json.dumps(found))


def cut_hub(d, word):
    t = load_file(d / "adapter.safetensors")
    save_file({k: v for k, v in t.items() if word not in k}, d / "adapter.safetensors")


@pytest.mark.parametrize("what", HUB)
def test_bottlenecks_that_do_not_fit(what, tmp_path):
    hub(tmp_path / "a", xlmr(), SEQ, ("output",))
    edit, error, says = HUB[what]
    edit(tmp_path / "a")
    model = xlmr(hidden_size=48) if what == "another width" else xlmr()
    with pytest.raises(error, match=says):
        interop.read(tmp_path / "a", model)
    assert luthier.attached(model) == {}


def test_the_published_checkpoint(data, tmp_path, monkeypatch):
    """xlm-t-sentiment of AdapterHub, converted by the very command that the refusal prints; its base has random weights here."""
    source = data / "models_small" / "xlmt_sentiment_adapter"
    folder = tmp_path / "a"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for f in source.iterdir():
        (folder / f.name).write_bytes(f.read_bytes())
    model = xlmr(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    for said in ("adapter", "head"):
        if said == "adapter":
            with pytest.raises(BadState, match="never read") as refused:
                interop.read(folder, model)
            remedy = str(refused.value)
        else:
            tuned = interop.read(folder, model)
            assert repr(tuned.chain) == "pfeiffer()"
            remedy = tuned.told[0]
            tuned.detach()
        exec(shlex.split(remedy[remedy.index("python -c"):])[2], {})
    tuned = interop.read(folder, model).eval()
    assert repr(tuned.chain) == "pfeiffer() >> full(at='classifier.dense.weight head')"
    assert tuned.extra["labels"] == ["Neg", "Neu", "Pos"]
    with torch.no_grad():
        got = tuned(IDS).logits
        tuned.detach()
        t, h = load_file(folder / "adapter.safetensors"), load_file(folder / "model_head.safetensors")
        by_hand(model, t, "roberta.encoder.layer.{i}.{at}.layer_text_task_adapters.xlm-t-sentiment.")
        for module, n in ((model.classifier.dense, 1), (model.classifier.out_proj, 4)):
            module.load_state_dict({k: h[f"heads.xlm-t-sentiment.{n}.{k}"] for k in ("weight", "bias")})
        assert (got - model(IDS).logits).abs().max() < 5e-6


def test_a_bottleneck_with_its_head_and_labels_by_the_command_line(tmp_path, capsys):
    model = xlmr()
    model.save_pretrained(tmp_path / "base")
    hub(tmp_path / "a", model, SEQ, ("output",))
    shapes = {"1.weight": (32, 32), "1.bias": (32,), "4.weight": (3, 32), "4.bias": (3,)}
    head = {f"heads.mine.{k}": torch.randn(s) for k, s in shapes.items()}
    save_file(head, tmp_path / "a" / "model_head.safetensors")
    said = dict(head_type="classification", layers=2, activation_function="tanh", label2id=dict(Neg=0, Neu=1, Pos=2))
    (tmp_path / "a" / "head_config.json").write_text(json.dumps(dict(config=said)))
    code, out, err = run(capsys, "import", tmp_path / "a", "--model", tmp_path / "base", "--out", tmp_path / "b", "--json")
    assert code == 0 and json.loads(out) == {"chain": "pfeiffer(width=4) >> full(at='classifier.dense.weight head')", "notes": []}
    task = json.loads((tmp_path / "b" / "recipe.json").read_text())["extra"]["task"]
    assert task["labels"] == ["Neg", "Neu", "Pos"] and task["options"] == {"own": True}
    tuned = luthier.load(model, tmp_path / "b").eval()
    with torch.no_grad():
        dense = [p for p in tuned.states.values() if hasattr(p, "W")]
        assert dense[0].W.equal(head["heads.mine.1.weight"]) and dense[1].b.equal(head["heads.mine.4.bias"])


@pytest.mark.parametrize("record", [
    '{"extra": 5}', '{"extra": {"task": 5}}', '{"extra": {"task": {"kind": "nothing"}}}', '[]',
    '{"extra": {"task": {"kind": "text-classification", "roles": 1, "metric": [], "options": {}}}}'])
def test_a_record_that_makes_no_sense_is_refused(record, good, place, tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    for f in good.iterdir():
        (folder / f.name).write_bytes(f.read_bytes())
    (folder / files.OURS).write_text(record)
    code, _, err = run(capsys, "import", folder, "--model", place / "llama", "--out", tmp_path / "o")
    assert code == 2 and "defect" not in err and not (tmp_path / "o").exists(), err


@pytest.fixture(scope="module")
def data():
    import os

    root = Path(os.environ.get("LUTHIER_DATA", "/nowhere"))
    if not (root / "models_small").is_dir():
        pytest.skip("LUTHIER_DATA is not set")
    return root


# -- how it is built ------------------------------------------------------------------------------------------------------------


def test_no_method_is_named_in_the_generic_code():
    words = set(re.findall(r"\w+", " ".join(re.sub(r'"""(.|\n)*?"""|#.*', "", f.read_text())
                                           for f in (ROOT / "luthier" / "interop").glob("*.py"))))
    own = {"sparse", "full", "prefix", "prompt", "said", "ties"}       # words of English, or of peft's settings
    assert not (set(luthier.discover()) - own) & words


def test_declarations_say_nothing_that_nobody_reads():
    known = set("type also when layers tensors of fields factor scale patterns rest sums listed given makes settings prepare "
                "write read common prompt copies rounds names shared reads".split())
    text = (ROOT / "luthier" / "interop" / "settings.py").read_text().partition("import json")[0]
    for name, m in luthier.discover().items():
        d = getattr(m, "peft", None) or {}
        assert set(d) <= known, (name, set(d) - known)
        assert all(re.search(rf"^    .*\b{k}\b", text, re.M) for k in d), name


def test_layouts():
    one, = layouts("P: r out -> out r")
    t = torch.arange(6.0).view(2, 3)
    assert one.write(t).equal(t.T) and one.read(one.write(t)).equal(t) and one.axis("out") == 0 and one.axis("in") is None
    m, into = layouts("m: out 1 -> out | into: in -> 1 in")
    assert m.write(torch.ones(3, 1)).shape == (3,) and m.read(torch.ones(3)).shape == (3, 1)
    assert into.read(torch.ones(1, 5)).shape == (5,)
    with pytest.raises(ValueError):
        into.read(torch.ones(2, 5))
