"""The configuration: what is refused and how, overrides, round trips, and what it imports."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.config import (
    SECTIONS,
    ConfigError,
    LoopConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    config_difference,
    config_from_dict,
    config_reference,
    config_to_toml,
    load_config,
)
from fasttrain.config.load import help_text, shipped_configs
from fasttrain.engine.schedule import context_at
from tests.support.toy import MLPS

ROOT = Path(__file__).parents[2]
STEPS = {"train": {"steps": 100}}
KEYS = [
    (section, f, section_class)
    for section, section_class in SECTIONS.items()
    for f in dataclasses.fields(section_class)
]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text('[model]\ndim = 64\n\n[train]\nsteps = 100\n\n[data]\npath = "tokens"\n')
    return path


def test_defaults_and_values(config_file):
    config = load_config(config_file)
    assert (config.model.dim, config.train.steps, config.data.path) == (64, 100, "tokens")
    assert (config.model.n_layers, config.optim.betas) == (4, (0.9, 0.95))
    assert config.run.name is None, "the run takes the file's stem, and a new one where it is taken"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.dim = 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.dim=128", "model.dim", 128),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.betas=[0, 0.99]", "optim.betas", (0.0, 0.99)),
        ("model.qk_norm=true", "model.qk_norm", True),
        ("run.device=cpu", "run.device", "cpu"),
        ("run.device=cuda:1", "run.device", "cuda:1"),
        ('run.device="cpu"', "run.device", "cpu"),
        (" run.device = cpu ", "run.device", "cpu"),
        ("run.name=2026-01-31", "run.name", "2026-01-31"),
        ("run.name=007", "run.name", "007"),
        ("run.name=42", "run.name", "42"),
        ("data.path=a/b=c d", "data.path", "a/b=c d"),
        ("data.path=~/größe", "data.path", "~/größe"),
        ("train.max_grad_norm=none", "train.max_grad_norm", None),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("run.name=none", "run.name", None),
        ('eval.prompts=["a", "b\\n"]', "eval.prompts", ("a", "b\n")),
        ("eval.prompts=[]", "eval.prompts", ()),
        ("eval.prompts=none", "eval.prompts", None),
        ("train.steps=1_000", "train.steps", 1000),
    ],
)
def test_override(config_file, override, key, value):
    section, name = key.split(".")
    found = getattr(getattr(load_config(config_file, [override]), section), name)
    assert found == value
    assert type(found) is type(value)


def test_an_override_replaces_what_the_file_says_in_another_key(config_file):
    loop = load_config(config_file, ["train.epochs=1"]).train
    assert (loop.steps, loop.epochs) == (None, 1.0)
    data = load_config(config_file, ['data.paths=["a", "b"]']).data
    assert (data.path, data.paths) == (None, ("a", "b"))
    with pytest.raises(ConfigError, match=r"data\.paths = \[.*\bdata\.path\b"):
        load_config(config_file, ["data.path=a", 'data.paths=["a", "b"]'])


def test_the_last_override_wins_and_unsets(config_file):
    config = load_config(config_file, ["train.steps=7", "train.steps=none", "train.hours=2"])
    assert (config.train.steps, config.train.hours) == (None, 2.0)


# Every kind of refusal: the key, the value given and the remedy must be in the message.
REFUSALS = [
    ("unknown key", "model.dmi=3", ["model.dmi", "model.dim?"]),
    ("key of another section", "model.lr=3", ["model.lr", "optim.lr?"]),
    ("keys of other sections", "run.steps=3", ["run.steps", "train.steps?"]),
    ("two candidates", "name=x", ["name", "run.name", "optim.name", "schedule.name?"]),
    ("another trainer's name", "optim.learning_rate=3", ["optim.lr?"]),
    ("another trainer's name alone", "block_size=3", ["data.seq_len?"]),
    ("another's name in a section", "model.activation=gellu", ["model.mlp?"]),
    ("misspelt section", "mdoel.dim=3", ["mdoel.dim", "model.dim?"]),
    ("unknown section", "zzz.q=3", ["zzz.q", "run, model, data"]),
    ("unlike any key", "log.zzzzzzzz=3", ["log.zzzzzzzz", "[log]", "every_steps, csv"]),
    ("no section", "steps=4", ["steps", "train.steps?"]),
    ("no value", "optim.lr", ['"optim.lr"', "optim.lr=1e-3"]),
    ("float for int", "model.dim=64.0", ["model.dim = 64.0", "an integer ≥ 1"]),
    ("fraction for int", "model.dim=6.5", ["model.dim = 6.5", "an integer ≥ 1"]),
    ("bool for int", "model.dim=true", ["model.dim = true", "an integer ≥ 1"]),
    ("bool for float", "optim.lr=true", ["optim.lr = true", "a number > 0"]),
    ("int for bool", "model.bias=1", ["model.bias = 1", "true or false"]),
    ("Python's True", "model.bias=True", ['"True"', "true or false"]),
    ("quoted number", 'model.dim="64"', ['model.dim = "64"', "an integer ≥ 1"]),
    ("word for optional int", "train.steps=ten", ['train.steps = "ten"', "an integer ≥ 1"]),
    ("not a number", "optim.lr=nan", ["optim.lr = nan", "a number > 0"]),
    ("no float", f"optim.lr=1{'0' * 400}", ["optim.lr = 1000", "a number > 0"]),
    ("infinite", "train.z_loss=inf", ["train.z_loss = inf", "a number ≥ 0"]),
    ("unset but not optional", "model.dim=none", ["model.dim = none", "an integer ≥ 1"]),
    ("scalar for pair", "optim.betas=0.9", ["optim.betas = 0.9", "a list of 2 numbers"]),
    ("triple for pair", "optim.betas=[0,0,0]", ["[0, 0, 0]", "a list of 2 numbers"]),
    ("string for list", "eval.prompts=Hi", ['eval.prompts = "Hi"', "a list of strings"]),
    ("mixed list", 'eval.prompts=["a", 1]', ["eval.prompts", "a list of strings"]),
    ("table for value", "model.dim={a=1}", ["model.dim", "an integer ≥ 1"]),
    ("below range", "model.dim=0", ["model.dim = 0", "an integer ≥ 1"]),
    ("at open bound", "model.dropout=1", ["model.dropout = 1", "≥ 0 and < 1"]),
    ("element out of range", "optim.betas=[0.9, 1]", ["optim.betas = [0.9, 1]", "< 1"]),
    ("above range", "data.corpus_vocab_size=65537", ["65537", "≤ 65536"]),
    ("huge", "run.seed=-1", ["run.seed = -1", "an integer ≥ 0"]),
    ("unknown choice", "model.mlp=swigl", ['"swigl"', ", ".join(MLPS), " swiglu?"]),
    ("bad device", "run.device=gpu", ['run.device = "gpu"', "auto, cpu, cuda, cuda:N"]),
    ("slash in name", "run.name=a/b", ['run.name = "a/b"', "without slashes"]),
    ("parent as name", "run.name=..", ['run.name = ".."', "without slashes"]),
    ("empty path", 'data.path=""', ['data.path = ""', "a path"]),
    ("NUL in path", 'data.path="a\\u0000"', [r"a\x00", "a path"]),
    ("control in a value", 'run.device="\\u001b[31m"', [r"\x1b[31m", "cuda:N"]),
    ("heads", "model.n_heads=3", ["model.dim = 64", "model.n_heads = 3", "model.head_dim"]),
    ("KV heads", "model.n_kv_heads=3", ["n_kv_heads = 3", "n_heads = 4", "1, 2, 4"]),
    ("odd rope", "model.head_dim=15", ["model.head_dim = 15", "positions=learned"]),
    (
        "dtype, no path",
        "data.path=none & data.dtype=uint16",
        ['data.dtype = "uint16"', "data.path"],
    ),
    (
        "tf32 on CPU",
        "run.device=cpu & run.dtype=tf32",
        ['run.dtype = "tf32"', "run.device=cuda"],
    ),
    (
        "bf16 residual in fp32",
        "model.residual_in_fp32=false & run.dtype=fp32",
        ["model.residual_in_fp32 = false", "run.dtype=bf16", "fp32", "true"],
    ),
    ("graphs on CPU", "run.device=cpu & run.compile=cuda-graphs", ["run.compile", "CUDA"]),
    ("no horizon", "train.steps=none", ["train.steps, train.epochs, train.tokens, train.hours"]),
    (
        "two horizons",
        "train.steps=100 & train.hours=1",
        ["train.steps = 100", "train.hours = 1", "train.steps=none"],
    ),
    ("long warmup", "schedule.warmup_steps=100", ["warmup_steps = 100", "train.steps = 100"]),
    ("min above lr", "schedule.min_lr=0.1", ["schedule.min_lr = 0.1", "optim.lr = 0.001"]),
    ("a key of before", "eval.stride_tokens=4", ["eval.stride_fraction?"]),
    ("another", "schedule.context_tokens=[4]", ["schedule.context_fractions?"]),
    (
        "vocabulary",
        "data.path=none & model.vocab_size=1000",
        ["model.vocab_size = 1000", "data.corpus_vocab_size = 4096"],
    ),
]


@pytest.mark.parametrize(
    ("overrides", "parts"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_refusal_names_key_value_and_remedy(config_file, overrides, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, overrides.split(" & "))
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert message.isprintable(), "one line, no control characters"
    assert ";" in message, "a remedy after the problem"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[model]\ndmi = 3", ["bad.toml", "model.dmi", "model.dim?"]),
        ("[modle]\ndim = 3", ["bad.toml", "modle.dim", "model.dim?"]),
        ("[zzzzzzz]\ndim = 3", ["bad.toml", "zzzzzzz.dim", "model.dim?"]),
        ("model = 3", ["bad.toml", "model = 3", "[model]"]),
        ("a." * 6001 + "a = 1", ["bad.toml", "6,001", "6,000"]),
        ("[modle]", ["bad.toml", "modle", " model."]),
        ("[zzz]", ["bad.toml", "zzz", "run, model, data"]),
        ("steps = 3", ["bad.toml", "steps", "train.steps?"]),
        ("[model\n", ["bad.toml", "TOML", "line 1"]),
        ("[model]\ndim = 1\ndim = 2", ["bad.toml", "TOML", "overwrite"]),
        ("[model]\ndim = nonsense", ["bad.toml", "TOML", "line 2"]),
        ('[model]\ndim = "none"\n[train]\nsteps = 1', ["model.dim = ", "an integer"]),
        ("", ["train.steps = none", "train.steps, train.epochs"]),
    ],
)
def test_bad_file(tmp_path, text, parts):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in parts:
        assert part in str(caught.value)


def test_unreadable_files(tmp_path, config_file):
    with pytest.raises(ConfigError, match=r"smal\.toml: .*\bsmall\.toml\?"):
        load_config(tmp_path / "smal.toml")
    with pytest.raises(ConfigError, match=r"/nowhere/x\.toml: .*\bTOML\b.*\bbase\b"):
        load_config(tmp_path / "nowhere" / "x.toml")
    with pytest.raises(ConfigError, match=r"\(Is a directory\)"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes("# größe\n[train]\nsteps = 1".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.toml: .*\bbyte 4\b.*\bUTF-8\b"):
        load_config(tmp_path / "latin.toml")


def test_a_config_that_comes_along_is_found_by_its_name(tmp_path, monkeypatch):
    paths = {path.stem: path for path in (ROOT / "configs").glob("*.toml")}
    assert shipped_configs() == paths
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()  # of the user's, and no config
    for name, path in paths.items():
        assert load_config(name) == load_config(f"{name}.toml") == load_config(path)
    (tmp_path / "base.toml").write_text("[train]\nsteps = 3\n")
    assert load_config("base.toml").train.steps == 3, "a file that exists wins"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bsae", "base?"),
        ("bsae.toml", "base?"),
        ("configs/base.toml", "base?"),  # as in a checkout
        ("smal.toml", "small.toml?"),
        ("pyprojekt.toml", " TOML "),
    ],
)
def test_an_unknown_config_lists_those_there_are(name, hint, tmp_path, config_file, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert hint in message
    assert message.endswith(", ".join(shipped_configs()))


def test_configs_of_runs_made_before_a_key_was_removed_are_read(tmp_path):
    path = tmp_path / "old.toml"
    old = "[train]\nsteps = 1\n[optim]\nmuon_lr_scale = {}\n"
    path.write_text(old.format("1.0"))
    assert load_config(path) == TrainConfig(train=LoopConfig(steps=1))
    as_checkpoints_do = config_from_dict(tomllib.loads(path.read_text()))
    assert as_checkpoints_do == load_config(path)
    path.write_text(old.format("2.0"))
    with pytest.raises(ConfigError, match=r"old\.toml: optim\.muon_lr_scale .*\boptim\.\w+\?"):
        load_config(path)


def test_configs_of_before_mean_what_they_did(tmp_path):
    path = tmp_path / "old.toml"
    old = """
        [data]
        seq_len = {}
        [optim]
        name = "{}"
        lr = 8e-3
        embedding_lr_scale = {}
        head_lr_scale = 1
        [schedule]
        context_tokens = [50, 75]
        [train]
        steps = 1
        [eval]
        stride_tokens = 70
        """
    path.write_text(old.format(150, "muon", 17.0))
    config = load_config(path)
    assert config_from_dict(tomllib.loads(path.read_text())) == config, "as checkpoints do"
    assert [context_at(step, 3, config.schedule, 150) for step in range(3)] == [50, 75, 150]
    assert config.eval.stride_fraction * 150 == pytest.approx(70, abs=1e-9)
    optim = config.optim
    scales = (optim.muon_embedding_lr_scale, optim.muon_head_lr_scale)
    assert (optim.peak_lr, *scales) == (8e-3, 17.0, 1.0)
    path.write_text(old.format(150, "adamw", 1.0))
    assert load_config(path).optim.peak_lr == 8e-3
    path.write_text(old.format(150, "adamw", 17.0))
    with pytest.raises(
        ConfigError, match=r"optim\.embedding_lr_scale .*\bmuon_embedding_lr_scale\b"
    ):
        load_config(path)
    # The rate with Muon had a key of its own, which no other optimizer read.
    two = '[train]\nsteps = 1\n[optim]\nname = "{}"\nlr = 3e-3\nmuon_lr = 8e-3\n'
    for name, rate in (("muon", 8e-3), ("adamw", 3e-3)):
        path.write_text(two.format(name))
        assert load_config(path).optim.lr == rate
        assert config_from_dict(tomllib.loads(path.read_text())).optim.lr == rate
    assert load_config(path, ["optim.name=muon"]).optim.lr == 8e-3
    assert load_config(path, ["optim.name=muon", "optim.lr=1e-4"]).optim.lr == 1e-4
    path.write_text(old.format('"long"', "muon", 1.0))
    with pytest.raises(ConfigError, match=r"data\.seq_len = "):
        load_config(path)


def test_a_section_checks_itself():
    with pytest.raises(ConfigError, match=r"model\.dim = -3 .*≥ 1\b"):
        ModelConfig(dim=-3)
    model = ModelConfig(dim=64)
    with pytest.raises(ConfigError, match=r"model\.n_heads = 5"):
        dataclasses.replace(model, n_heads=5)
    assert issubclass(ConfigError, UserError)


def test_surrogates_are_refused(config_file):
    """A file name that is not UTF-8 reaches Python as lone surrogates, which no file can hold."""
    with pytest.raises(ConfigError, match=r"data\.path = .*\bUnicode\b"):
        load_config(config_file, ["data.path=\udcff"])


@pytest.mark.parametrize(("section", "f", "cls"), KEYS, ids=[f"{s}.{f.name}" for s, f, _ in KEYS])
def test_every_key_is_declared_in_full(section, f, cls):
    assert cls().section == section, "defaults are valid"
    meaning = f.metadata["meaning"]
    assert meaning
    assert "\n" not in meaning
    assert "|" not in meaning, "it would break the Markdown table"
    assert f"`{section}.{f.name}`" in config_reference()
    assert meaning in " ".join(help_text().split())
    if "None" in str(f.type) and f.default is not None:
        assert "str" not in str(f.type), '"none" in TOML would be ambiguous'


def test_help_and_reference_have_every_key_once():
    table = config_reference().splitlines()
    assert len(table) == len(KEYS) + 2
    assert {row.count("|") for row in table} == {5}
    (meaning,) = (f.metadata["meaning"] for _, f, _ in KEYS if f.name == "max_rollbacks")
    assert f"| `train.max_rollbacks` | an integer ≥ 0 | `3` | {meaning} |" in table
    for section, section_class in SECTIONS.items():
        block = help_text().split(f"[{section}]")[1].split("\n\n")[0]
        keys = [line for line in block.splitlines() if re.match(r"  \w+ = ", line)]
        assert len(keys) == len(dataclasses.fields(section_class))
    assert max(map(len, help_text().splitlines())) <= 100


def test_difference(config_file):
    a = load_config(config_file)
    b = load_config(config_file, ["optim.betas=[0.8, 0.9]", "train.max_grad_norm=none"])
    assert config_difference(a, a) == []
    assert config_difference(a, b) == [
        ("optim.betas", (0.9, 0.95), (0.8, 0.9)),
        ("train.max_grad_norm", 1.0, None),
    ]


def test_round_trip_of_every_kind_of_value(tmp_path, config_file):
    hard = 'q"u\\o\te\n\x7f\x00 größe 🎉 ’'
    values = dataclasses.asdict(load_config(config_file))
    values["eval"]["prompts"] = [hard, "", "none"]
    values["train"] |= {"max_grad_norm": None, "z_loss": 1e-300}
    values["optim"] |= {"lr": math.nextafter(1.0, 2.0), "betas": [0, 1e-5], "eps": 1e-08}
    values["eval"]["top_k"] = None
    config = config_from_dict(values)
    assert config.eval.prompts[0] == hard
    path = tmp_path / "again.toml"
    path.write_text(config_to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@given(
    steps=st.integers(1, 2**63 - 1),
    lr=st.floats(1e-30, 1e30, allow_nan=False),
    beta=st.floats(0, 1, exclude_max=True),
    heads=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**63 - 1),
    bias=st.booleans(),
    prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    clip=st.none() | st.floats(1e-9, 1e9),
)
def test_overrides_give_what_they_say(tmp_path, steps, lr, beta, heads, seed, bias, prompts, clip):
    path = tmp_path / "any.toml"
    path.write_text("[run]\n")
    shown = ", ".join(json.dumps(p, ensure_ascii=False).replace("\x7f", "\\u007f") for p in prompts)
    config = load_config(
        path,
        [
            f"train.steps={steps}",
            f"optim.lr={lr!r}",
            f"optim.betas=[{beta!r}, 0]",
            f"model.n_heads={heads}",
            f"run.seed={seed}",
            f"model.bias={str(bias).lower()}",
            f"eval.prompts=[{shown}]",
            f"train.max_grad_norm={clip!r}",
        ],
    )
    assert (config.train.steps, config.optim.lr, config.optim.betas) == (steps, lr, (beta, 0.0))
    assert (config.model.n_heads, config.run.seed, config.model.bias) == (heads, seed, bias)
    assert (config.eval.prompts, config.train.max_grad_norm) == (tuple(prompts), clip)
    (tmp_path / "again.toml").write_bytes(config_to_toml(config).encode())
    assert load_config(tmp_path / "again.toml") == config


@given(st.text())
def test_any_override_is_taken_or_refused_with_a_message(tmp_path, text):
    """Nothing that a shell can pass ends in a traceback."""
    path = tmp_path / "any.toml"
    path.write_text("[train]\nsteps = 10\n")
    for override in (text, f"data.path={text}", f"model.dim={text}", f"optim.betas=[{text}]"):
        try:
            config = load_config(path, [override])
        except ConfigError as error:
            message = str(error)
            assert message.isprintable()
        else:
            assert config_from_dict(dataclasses.asdict(config)) == config


def test_a_bad_config_fails_fast_and_without_torch(tmp_path):
    (tmp_path / "bad.toml").write_text("[model]\ndmi = 3\n")
    code = """
import sys
from fasttrain.config import ConfigError, load_config
try:
    load_config("bad.toml")
except ConfigError as error:
    print(error)
heavy = {"torch", "triton", "numpy", "rich", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
print(len(sys.modules))
"""
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    message, n_modules = done.stdout.splitlines()
    assert re.fullmatch(r"bad\.toml: model\.dmi .*\bmodel\.dim\?", message)
    assert int(n_modules) < 180, "starting is as fast as what it imports lets it be"


def test_one_key_is_the_peak_rate_of_every_optimizer_and_an_older_one_names_it(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[train]\nsteps = 1\n[optim]\nlr = 3e-3\n")
    with pytest.raises(ConfigError, match=r"optim\.muon_lr .*\boptim\.lr\?"):
        load_config(path, ["optim.muon_lr=1e-4"])
    path.write_text("[train]\nsteps = 1\n")
    assert load_config(path).optim.lr == 1e-3
    assert load_config(path, ["optim.name=muon"]).optim.lr == 8e-3
    assert "lr = 0.008" in config_to_toml(load_config(path, ["optim.name=muon"]))


def test_a_config_may_begin_with_a_byte_order_mark_and_utf16_is_named(tmp_path):
    path = tmp_path / "c.toml"
    text = "[train]\r\nsteps = 3\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_config(path).train.steps == 3
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ConfigError, match=r"c\.toml: .*\bUTF-16\b.*\bUTF-8\b"):
            load_config(path)
