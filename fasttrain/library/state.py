"""What the library's `Trainer` saves beside tensors by name: any state, without pickle.

State of optimizers, schedulers and loaders is whatever their classes make it. `encode` writes it as
JSON, its tensors apart, so that `decode` returns equal values of the same types. What shapes a
training without being state is told by facts: a resumed training must have the same.
"""

import inspect
import math
import operator
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from fasttrain.config import TrainConfig, UserError
from fasttrain.engine.optim import parameters_by_name

BINDING = (
    *("run.dtype", "run.fp8", "train.max_grad_norm", "train.max_grad_value", "train.ema_decay"),
    *("train.on_nonfinite", "train.label_smoothing", "train.z_loss"),
    *("eval.every_steps", "eval.min_change"),
)
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
KIND = "!"  # the key that marks what JSON does not know
MAPPINGS: dict[str, Any] = {kind.__name__: kind for kind in (dict, Counter, OrderedDict)}
PLAIN: dict[str, Callable[[str], Any]] = {"float": float, "bytes": bytes.fromhex}


def encode(value: Any, tensors: dict[str, Tensor], at: str) -> Any:
    """Return ``value`` as JSON; its tensors and arrays go to ``tensors``, not copied.

    ``at`` says where the value is: the names of its tensors begin with it, errors name it.
    """
    kind: type = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is list:
        return [encode(v, tensors, f"{at}.{n}") for n, v in enumerate(value)]
    if kind is dict and all(type(k) is str for k in value) and KIND not in value:
        return {k: encode(v, tensors, f"{at}.{k}") for k, v in value.items()}
    if kind is tuple:
        content = encode(list(value), tensors, at)
    elif kind in MAPPINGS.values():
        content = encode([list(item) for item in value.items()], tensors, at)
    elif kind in (float, bytes, torch.dtype):  # of floats inf, -inf and nan
        content = value.hex() if kind is bytes else str(value).removeprefix("torch.")
    elif isinstance(value, Tensor):
        tensors[at], content, kind = value.detach(), [at, value.is_cpu], Tensor
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        array, kind = np.asarray(value), np.ndarray
        tensors[at] = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
        content = [at, array.dtype.str, list(array.shape), isinstance(value, np.generic)]
    else:
        raise UserError(
            f"Trainer: {at} is a {kind.__name__}, which a checkpoint cannot hold without pickle; "
            "have state_dict() leave it out, or return numbers, strings, lists, dicts and tensors"
        )
    return {KIND: kind.__name__, "is": content}


def decode(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Return what `encode` was given, with tensors of its own, on the CPU or on ``device``."""
    if isinstance(value, list):
        return [decode(v, tensors, device) for v in value]
    if not isinstance(value, dict):
        return value
    if KIND not in value:
        return {k: decode(v, tensors, device) for k, v in value.items()}
    kind, content = value[KIND], value["is"]
    if kind in PLAIN:
        return PLAIN[kind](content)
    if kind == "dtype" and isinstance(dtype := getattr(torch, content), torch.dtype):
        return dtype
    if kind == "Tensor":
        return tensors[content[0]].to("cpu" if content[1] else device, copy=True)
    if kind == "ndarray":
        at, dtype, shape, is_scalar = content
        array = np.frombuffer(tensors[at].numpy().tobytes(), dtype).reshape(shape).copy()
        return array[()] if is_scalar else array
    parts = decode(content, tensors, device)
    return tuple(parts) if kind == "tuple" else MAPPINGS[kind](dict(parts))


def refuse_difference(where: str, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on where facts that both know differ."""
    if changes := [f"{k}: {saved[k]} → {v}" for k, v in now.items() if saved.get(k, v) != v]:
        more = f"; and {len(changes) - 8} more" if len(changes) > 8 else ""
        raise UserError(
            f"{where} was made with other settings: {'; '.join(changes[:8])}{more}; put them back "
            "(what is to change on purpose, change after load_checkpoint())"
        )


def facts_of_config(config: TrainConfig, scheduler: Any) -> dict[str, str]:
    """Return the keys that a checkpoint is bound to; two where evaluations decide something."""
    by_evaluations = config.eval.patience or isinstance(scheduler, ReduceLROnPlateau)
    keys = BINDING if by_evaluations else BINDING[:-2]
    return {key: str(operator.attrgetter(key)(config)) for key in keys}


def _shown(value: Any) -> str:
    plain = isinstance(value, bool | int | float | str | tuple | list | Counter | None)
    return str(value) if plain else getattr(value, "__qualname__", type(value).__name__)


def facts_of_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, str]:
    """Return its class and defaults, its groups, and which parameter is in which."""
    # A schedule moves these; a tensor among the defaults is moved too, as it is the groups' own.
    moved = {"params", "param_names", "lr", "momentum", "betas"}
    defaults, names = optimizer.defaults, {id(p): n for n, p in parameters_by_name(model).items()}
    facts = {f"optimizer {k}": _shown(v) for k, v in defaults.items() if not isinstance(v, Tensor)}
    facts["optimizer"] = type(optimizer).__name__
    facts["optimizer groups"] = str(len(optimizer.param_groups))
    for n, group in enumerate(optimizer.param_groups):
        extra = sorted(group.keys() - defaults.keys() - moved)
        facts[f"group {n}"] = f"{len(group['params'])} parameters with {extra or 'no further keys'}"
        facts |= {f"group {n} {key}": _shown(group[key]) for key in group.keys() - moved}
        for p in group["params"]:
            if id(p) not in names:
                raise UserError(
                    f"Trainer: the optimizer's group {n} has a parameter of shape {list(p.shape)} "
                    "that is not the model's: no checkpoint would hold it; add it to the model"
                )
            facts[f"group of {names[id(p)]}"] = str(n)
    return facts


def facts_of_scheduler(scheduler: Any, name: str = "scheduler") -> dict[str, str]:
    """Return its class and arguments, and those of the schedulers within it."""
    if scheduler is None:
        return {name: "none"}
    kind, state = type(scheduler), getattr(scheduler, "__dict__", {})
    facts = {name: kind.__name__}
    for key in inspect.signature(kind).parameters.keys() - {"last_epoch", "optimizer"}:
        value = state.get(key, state.get(f"_{key}"))
        if value is not None and key != "schedulers":
            facts[f"{name} {key}"] = _shown(value)
    for n, part in enumerate(state.get("_schedulers", [])):
        facts |= facts_of_scheduler(part, f"{name} {n}")
    return facts


def facts_of_callbacks(callbacks: Sequence[Any]) -> dict[str, str]:
    """Return the classes of those that have a state, in order."""
    return {"callbacks": str([type(one).__name__ for one in callbacks if is_stateful(one)])}


def _parts(loader: Any, name: str) -> dict[str, Any]:
    """Return a loader, its samplers and its data sets, by where they are."""
    found, places = {name: loader}, [name]
    for place in places:
        for key in ("sampler", "batch_sampler", "dataset"):
            part = getattr(found[place], "__dict__", {}).get(key)
            if part is not None and not any(part is other for other in found.values()):
                found[f"{place}.{key}"] = part
                places.append(f"{place}.{key}")
    return found


def facts_of_loader(loader: Any) -> dict[str, str]:
    """Return the classes and lengths of a loader and its parts, and how it makes batches."""
    facts = {"generators": str(sorted(_generators_of(loader, "loader")))}
    for place, part in _parts(loader, "loader").items():
        facts[place] = type(part).__name__
        facts[f"{place} length"] = str(operator.length_hint(part, -1))
    for key in ["batch_size", "drop_last", "num_workers", "persistent_workers", "prefetch_factor"]:
        if hasattr(loader, key):
            facts[f"loader {key}"] = str(getattr(loader, key))
    return facts


def is_stateful(part: Any) -> bool:
    """Whether a part of a training saves its own state, as torchdata's StatefulDataLoader."""
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def state_of(part: Any) -> Any:
    """Return the state of a part of a training, None where it has none."""
    return part.state_dict() if is_stateful(part) else None


def samplers(loader: Any) -> list[Any]:
    """Return a loader's samplers that are told which epoch begins, as a `DistributedSampler` is."""
    found = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    return [sampler for sampler in found if hasattr(sampler, "set_epoch")]


def doubts(loader: Any, *, n_ranks: int = 1, saves: bool = True) -> Iterator[str]:
    """Yield what may make the batches others than they should be, of ranks or after a resume."""
    kind, dataset = type(loader).__name__, getattr(loader, "dataset", None)
    of_a_map = isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset)
    if n_ranks > 1 and of_a_map and not samplers(loader):
        yield "each rank trains on all of the data; give the DataLoader a DistributedSampler"
    if is_stateful(loader) or not saves:
        return
    if getattr(loader, "persistent_workers", False):
        yield (
            f"the {kind}'s persistent workers keep their random numbers from epoch to epoch, and "
            "no checkpoint holds these: a data set that draws some will draw others after a "
            "resume; unset persistent_workers"
        )
    if not (of_a_map or hasattr(loader, "__getitem__")):
        kind = kind if dataset is None else type(dataset).__name__
        yield (
            f"a resumed training takes {kind} from its beginning and passes over the batches "
            "that it was trained on, which are the same only where every pass gives the same; "
            "otherwise give a loader with state_dict() and load_state_dict()"
        )


def own_values(loader: Any) -> dict[str, Any]:
    """Return the numbers and strings that a loader, its samplers and its data sets hold."""
    return {} if is_stateful(loader) else _attributes(loader, "loader", (int, float, str))


def _attributes(loader: Any, name: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    return {
        f"{place}.{key}": value
        for place, part in _parts(loader, name).items()
        for key, value in getattr(part, "__dict__", {}).items()
        if isinstance(value, kinds)
    }


def _generators_of(loader: Any, name: str) -> dict[str, Any]:
    """Return the generators that a loader, its samplers and its data sets hold, each once."""
    found: dict[str, Any] = {}
    for at, generator in _attributes(loader, name, GENERATORS).items():
        found |= {} if generator in found.values() else {at: generator}
    return found


def generators(device: torch.device, **loaders: Any) -> dict[str, Any]:
    """Return what a training draws from, by name: generators, modules and the GPU."""
    found: dict[str, Any] = {"cpu": torch.default_generator, "python": random, "numpy": np.random}
    for name, loader in loaders.items():
        found |= _generators_of(loader, name)
    return found | ({"cuda": device} if device.type == "cuda" else {})


def _accessors(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """Return what reads and what sets a state."""
    if isinstance(generator, torch.device):
        put = partial(torch.cuda.set_rng_state, device=generator)
        return partial(torch.cuda.get_rng_state, generator), put
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    if hasattr(generator, "get_state"):
        return generator.get_state, generator.set_state

    def get() -> tuple[Any, ...]:
        version, words, gauss = generator.getstate()
        return version, np.array(words, np.uint32), gauss  # not one by one

    return get, lambda s: generator.setstate((s[0], tuple(s[1].tolist()), s[2]))


def read(generators: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of each generator, for `encode`."""
    return {name: _accessors(generator)[0]() for name, generator in generators.items()}


def write(generators: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Put back the states that there are."""
    for name in generators.keys() & states.keys():
        _accessors(generators[name])[1](states[name])


def optimizer_values(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return what `optimizer_tensors` leaves out: all of the groups' values, state of no tensor."""
    names = {id(p): name for name, p in parameters_by_name(model).items()}
    for key in optimizer.state:
        if id(key) not in names:
            raise UserError(
                f"Trainer: the optimizer keeps state under {_shown(key)!r}, which is no parameter "
                "of the model: no checkpoint would hold it; keep it in its groups or as the state "
                "of a parameter"
            )
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    values = {
        names[id(p)]: {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        for p, state in optimizer.state.items()
    }
    return {"groups": groups, "values": values}


def set_optimizer_values(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Any) -> None:
    """Put back `optimizer_values`, once the tensors are."""
    parameters = parameters_by_name(model)
    for name, values in saved["values"].items():
        optimizer.state[parameters[name]].update(values)
    for group, own in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in own.items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                group[key].copy_(value)  # compiled optimizers know it by its address
            else:
                group[key] = value
