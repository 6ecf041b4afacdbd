"""Reading, writing and describing the configuration, and what older versions of it become."""

import contextlib
import difflib
import json
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from fasttrain.config.keys import ConfigError, accepts, allowed, show
from fasttrain.config.schema import HORIZON, SECTIONS, DataConfig, TrainConfig

# The configs of older runs name every key. Removed keys, with the values at which they are ignored:
_RETIRED = {
    "optim.muon_lr_scale": 1.0,
    "optim.embedding_lr_scale": 1.0,
    "optim.head_lr_scale": 1.0,
    "schedule.cycle_factor": 1.0,
}
# Numbers of tokens that are fractions of data.seq_len now:
_NOW_FRACTIONS = {
    "schedule.context_tokens": "schedule.context_fractions",
    "eval.stride_tokens": "eval.stride_fraction",
}
# Keys of which one alone is set: given on the command line it replaces those of the file.
_EXCLUSIVE = (HORIZON, ("data.path", "data.paths"))
# What other trainers and older versions call a key, where its spelling does not lead there.
_ELSEWHERE = {
    "model.dim": "n_embd hidden_size",
    "model.mlp": "activation hidden_act",
    "data.seq_len": "block_size",
    "optim.lr": "learning_rate muon_lr",
    "train.steps": "max_iters max_steps",
    "train.micro_batch": "batch_size",
    "train.tokens_per_step": "gradient_accumulation_steps",
    "train.max_grad_norm": "grad_clip",
    "eval.every_steps": "eval_interval",
    "eval.stride_fraction": "eval.stride_tokens",
    "checkpoint.every_steps": "save_steps",
    "log.every_steps": "log_interval",
}
# Of a config file: prompts aside, one has a hundred lines. For a name of n parts, a.b.c…, the
# parser takes n² of time and memory: 0.3 s and 140 MB.
_MAX_BYTES, _MAX_DOTS = 1 << 18, 6000
_FIELDS = {f"{name}.{f.name}": f for name, cls in SECTIONS.items() for f in fields(cls)}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a config file and apply overrides.

    Args:
        path: a TOML file, or the name of a config that comes with the package, such as ``base``.
        overrides: ``section.key=value`` each, the value in TOML syntax; a bare word is a string,
            and ``none`` unsets an optional key. The last one wins.

    Raises:
        ConfigError: the file cannot be read, or something in it or in the overrides is refused.
    """
    path = config_file(path)
    tables = _read(path)
    given = dict(map(_parse_override, overrides))
    try:
        values = _flat(tables, given.get("optim.name"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for group in _EXCLUSIVE:
        if any(given.get(name) for name in group):
            values = {name: value for name, value in values.items() if name not in group}
    return _config_of(values | given)


def config_file(path: str | Path) -> Path:
    """Return the file that a path, or the name of a shipped config, stands for."""
    path = Path(path)
    if str(path) == path.name and not path.is_file():
        return shipped_configs().get(path.name.removesuffix(".toml"), path)
    return path


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with the package, by name."""
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")  # of a wheel, of a checkout
    folder = next(filter(Path.is_dir, folders), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _flat(values: Mapping[str, Any], optimizer: str | None = None) -> dict[str, Any]:
    """Return the values of all sections as ``section.key``, older keys replaced by today's.

    ``optimizer`` is its name where it is not that of the file.
    """
    flat: dict[str, Any] = {}
    for section, table in values.items():
        if section not in SECTIONS and not (table and isinstance(table, Mapping)):
            _unknown_key(section)
        if not isinstance(table, Mapping):
            raise ConfigError(f"{section} = {show(table)} must be a section; write [{section}]")
        flat |= {f"{section}.{k}": value for k, value in table.items()}
    seq_len = flat.get("data.seq_len", DataConfig().seq_len)
    for old, new in _NOW_FRACTIONS.items():
        if old in flat:
            tokens = flat[new] = flat.pop(old)
            with contextlib.suppress(TypeError, ArithmeticError):  # it is refused below
                several = isinstance(tokens, list | tuple)
                flat[new] = [n / seq_len for n in tokens] if several else tokens / seq_len
    for k in ("embedding_lr_scale", "head_lr_scale"):
        if f"optim.{k}" in flat and flat.get("optim.name") == "muon":
            flat[f"optim.muon_{k}"] = flat.pop(f"optim.{k}")
    muon_lr = flat.pop("optim.muon_lr", None)  # a second key for the rate with muon alone
    if (optimizer or flat.get("optim.name")) == "muon" and muon_lr not in (None, "none", "null"):
        flat["optim.lr"] = muon_lr
    flat = {name: v for name, v in flat.items() if name not in _RETIRED or v != _RETIRED[name]}
    if unknown := [name for name in flat if name not in _FIELDS]:
        _unknown_key(unknown[0])
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"{size:,} bytes, at most {_MAX_BYTES:,} are credible")
        content = path.read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or b"\0" in content[:4]:
            raise ConfigError(f"{path}: is UTF-16 or UTF-32; save it as UTF-8")
        text = content.decode("utf-8-sig").replace("\r\n", "\n")  # Windows may begin with a mark
        if (n := text.count(".")) > _MAX_DOTS:
            raise ValueError(f"{n:,} dots, at most {_MAX_DOTS:,} are credible")
        return tomllib.loads(text)
    except FileNotFoundError:
        shipped = shipped_configs()
        beside = {p.stem: p for p in path.parent.glob("*.toml") if p.name != "pyproject.toml"}
        there = {name: name for name in shipped} | beside
        near = difflib.get_close_matches(path.stem, there, n=1)
        hint = f"did you mean {there[near[0]]}?" if near else "give the path of a TOML file."
        hint += f" By name there are {', '.join(shipped)}"
        raise ConfigError(f"{path}: there is no such config file; {hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also integers too long, nesting too deep
        raise ConfigError(f"{path}: is not valid TOML: {error}; correct that line") from None


def _parse_override(text: str) -> tuple[str, Any]:
    name, equals, raw = map(str.strip, text.partition("="))
    if not equals:
        remedy = "write it like optim.lr=1e-3"
        raise ConfigError(f"override {show(text)} is not section.key=value; {remedy}")
    if name not in _FIELDS:
        _unknown_key(name)
    if raw.lower() in ("none", "null"):
        return name, None
    value: Any = raw
    with contextlib.suppress(ValueError, RecursionError):
        (value,) = tomllib.loads(f"value = {raw}").values()  # one: no line break makes a second key
    # A string key takes what TOML reads as a number or a date: run.name=2026-01-31 is a name.
    takes_text = accepts(_FIELDS[name], "") and not accepts(_FIELDS[name], value)
    return name, raw if takes_text and not isinstance(value, dict | list | bool) else value


def nearest_keys(name: str) -> list[str]:
    """Return the keys that an unknown one, with or without a section, may stand for."""
    section, _, k = name.rpartition(".")
    within = [full for full in _FIELDS if full.startswith(f"{section}.")]
    return (
        [full for full, others in _ELSEWHERE.items() if {name, k} & {*others.split()}]
        or [full for full in _FIELDS if full.partition(".")[2] == k]
        or difflib.get_close_matches(name, within, n=1)
        or difflib.get_close_matches(name, list(_FIELDS), n=1, cutoff=0.5)
    )


def _unknown_key(name: str) -> NoReturn:
    section = name.rpartition(".")[0]
    if near := nearest_keys(name):
        remedy = f"did you mean {' or '.join(near)}?"
    elif section in SECTIONS:
        remedy = f"[{section}] takes {', '.join(f.name for f in fields(SECTIONS[section]))}"
    else:
        remedy = f"keys are section.key; the sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"{name} is not a config key; {remedy}")


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Return the config of nested dicts, section → key → value, as `dataclasses.asdict` gives."""
    return _config_of(_flat(values))


def _config_of(flat: Mapping[str, Any]) -> TrainConfig:
    tables: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        section, _, k = name.partition(".")
        tables.setdefault(section, {})[k] = value
    return TrainConfig(**{section: SECTIONS[section](**table) for section, table in tables.items()})


def config_to_toml(config: TrainConfig, shown: Callable[[str], str] = str) -> str:
    """Return the config as TOML that `load_config` reads back to an equal config.

    ``shown`` returns what to write for a string, as `fasttrain.command.redact` does. Names of
    choices, numbers and truth values stay as they are: a run must mean the same without it.
    """
    lines = []
    for section, table in asdict(config).items():
        lines.append(f"[{section}]")
        for k, value in table.items():
            f = _FIELDS[f"{section}.{k}"]
            if value is not None:
                lines.append(f"{k} = {_toml(value, str if f.metadata['choices'] else shown)}")
            elif f.default is not None:
                lines.append(f'{k} = "none"')
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any, shown: Callable[[str], str]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(element, shown) for element in value)}]"
    text = json.dumps(shown(value) if isinstance(value, str) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, which also forbids this


def config_difference(a: TrainConfig, b: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return ``(key, value in a, value in b)`` for every key in which two configs differ."""
    values = ((name, *(attrgetter(name)(config) for config in (a, b))) for name in _FIELDS)
    return [(name, left, right) for name, left, right in values if left != right]


def config_reference() -> str:
    """Return every key with what it takes, its default and its meaning as a Markdown table."""
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for name, f in _FIELDS.items():
        meaning = f.metadata["meaning"]
        lines.append(f"| `{name}` | {allowed(f)} | `{show(f.default)}` | {meaning} |")
    return "\n".join(lines) + "\n"


def help_text() -> str:
    """Return the keys section by section for ``--help``: key, default, what it takes, meaning."""
    wrap = partial(textwrap.wrap, width=100, subsequent_indent=" " * 36, break_on_hyphens=False)
    lines = ["Config keys, in the file or as section.key=value on the command line:"]
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}]  {cls.__doc__.splitlines()[0]}"]
        for f in fields(cls):
            head = f"  {f.name} = {show(f.default)} ".ljust(36)
            lines += wrap(f"{f.metadata['meaning']} [{allowed(f)}]", initial_indent=head)
    return "\n".join(lines) + "\n"
