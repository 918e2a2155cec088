"""From the options of a command to a model in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hybrid_cache.device.adapted import AdaptedModel, trunk_of
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.free_memory import FreeMemory
from hybrid_cache.engine.family import difference_of
from hybrid_cache.engine.selfcheck import check_model
from hybrid_cache.errors import ConfigError, ModelError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.selfcheck import check_exact
from hybrid_cache.models import adapters, folders, loading
from hybrid_cache.models.adapters import Adapter
from hybrid_cache.models.files import errors_begin_with
from hybrid_cache.models.gguf import file as gguf
from hybrid_cache.models.registry import ShapedModel
from hybrid_cache.models.shelf import Shelf
from hybrid_cache.profile import PROFILES, Profile, load_profile
from hybrid_cache.sizes import format_bytes
from hybrid_cache.transfer import equal_layers


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Which model, and on what it runs."""

    model: str | None = None  # None is the embedded one
    backend: str = "auto"
    fast: bool = False  # as in `dispatch.select`
    dtype: str = "auto"
    threads: int = 0  # 0 keeps torch's choice
    adapter: str | None = None  # a folder in PEFT's layout, or the name of one that ships
    variants: Mapping[str, str] = field(default_factory=dict)  # name -> folder of another model of the same shape
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> adapter of a variant that is the model with it
    shares: bool = False  # more variants may come while it runs
    merges: bool = False  # these adapters are merged into copies of what they change
    max_model_len: int | None = None  # tokens of context; None: as many as the model has
    path: Path | None = None  # of the model's folder, where it has been found already
    weights: str = "auto"  # one of `names.WEIGHTS`

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters stand beside the model, or may."""
        return self.adapter is None and not self.merges and bool(self.adapters or self.shares)


@dataclass(frozen=True, slots=True)
class LoadedVariant:
    """A model of the same shape beside the first one."""

    name: str
    path: Path  # of its folder, or its adapter's
    model: HybridModel
    text_path: Path  # with its tokenizer and templates, or some of their files
    adapter: str | None
    shared: float  # part of the bytes of its matrices that other models have, too
    own_bytes: int  # of its weights, that no other model has
    equal_layers: int | None  # that it has in common with the first model, from the first on; None if not even what
    # comes before them

    @property
    def label(self) -> str:
        """What errors call it."""
        return _label(self.name, self.adapter)

    def inexact_reasons(self, model: HybridModel | None = None) -> list[str]:
        """What differs on a probe, as `check_model` says, with its name. Raises ModelError for values not finite.

        model: the same one in a form that can be run now
        """
        model = model or self.model
        with errors_begin_with(self.label), torch.inference_mode():
            return [f"{self.label}: {why}" for why in check_model(model, trunk_of(model))]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, and what people want to know about it."""

    name: str  # "embedded", the folder's name or the hub's, and "+" the adapter's
    path: Path
    model: HybridModel
    ops: Ops
    info: loading.ModelInfo
    adapter: str | None = None  # its name
    variants: tuple[LoadedVariant, ...] = ()
    shelf: Shelf | None = None  # where there are variants, or may be
    asked_dtype: str = "auto"  # that folders of variants are read in, too
    trunk: ShapedModel | None = None  # the model, where adapters may stand beside it
    limit: int | None = None  # that contexts are cut to
    weights: str = "auto"  # as they were asked for

    @property
    def dtype(self) -> torch.dtype:
        return self.model.cache_spec.hidden_dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def load(options: LoadOptions) -> Loaded:
    """Reads the model's folder. Raises HybridCacheError."""
    if options.threads:
        torch.set_num_threads(options.threads)
    path = options.path or folders.resolve(options.model)
    try:
        ops = dispatch.select(options.backend, fast=options.fast)
    except dispatch.BackendUnavailable as error:
        raise ConfigError(str(error)) from error
    config = loading.load_config(path)
    limit = options.max_model_len
    if limit is not None:
        limit = loading.context(limit, loading.describe(config).max_length)
    shelf = Shelf() if options.variants or options.adapters or options.shares else None
    trunk = None
    if options.takes_adapters:
        trunk = loading.load_trunk(
            path, dtype=options.dtype, ops=ops, shelf=shelf, max_length=limit, weights=options.weights
        )
    model = trunk or loading.load(
        path,
        dtype=options.dtype,
        ops=ops,
        adapter=options.adapter,
        shelf=shelf,
        max_length=limit,
        weights=options.weights,
    )
    dtype = str(model.cache_spec.hidden_dtype).removeprefix("torch.")
    info = replace(loading.describe(config, dtype=dtype), max_length=model.max_length)
    adapter = None if options.adapter is None else adapters.name_of(options.adapter)
    name = _name(options.model) if adapter is None else f"{_name(options.model)}+{adapter}"
    loaded = Loaded(name, path, model, ops, info, adapter, (), shelf, options.dtype, trunk, limit, options.weights)
    variants = [load_variant(loaded, name, folder) for name, folder in options.variants.items()]
    variants += [
        load_variant(loaded, name, adapter=folder, merges=options.merges) for name, folder in options.adapters.items()
    ]
    return replace(loaded, variants=tuple(variants))


def load_variant(
    loaded: Loaded,
    name: str,
    folder: str | None = None,
    *,
    adapter: str | None = None,
    merges: bool = False,
    room: FreeMemory | None = None,
) -> LoadedVariant:
    """A model of the same shape, which shares the weights that are equal: that of a folder, or the first one with an
    adapter beside it, or merged into it.

    room: for weights of an adapter; None for no bound   Raises HybridCacheError.
    """
    assert loaded.shelf is not None
    if adapter is not None and loaded.adapter is not None:
        raise ConfigError(f"adapter {loaded.adapter} is merged into the model: a variant with {name} has no base")
    with errors_begin_with(_label(name, adapter)):
        path = loaded.path if folder is None else folders.resolve(folder)
        if adapter is not None and room is not None:
            _check_room(adapters.load(adapter), room, merged=loaded.dtype if merges else None)
        loaded.shelf.begin()
        if adapter is not None and not merges:
            model, shared, own_bytes = _beside(loaded, loaded.shelf, adapters.load(adapter))
        else:
            dtype = loaded.dtype_name if folder is None else loaded.asked_dtype
            model = loading.load(
                path,
                dtype=dtype,
                ops=loaded.ops,
                adapter=adapter,
                shelf=loaded.shelf,
                max_length=loaded.limit,
                weights=loaded.weights,
            )
            shared = loaded.shelf.num_shared_bytes / max(loaded.shelf.num_bytes, 1)
            own_bytes = loaded.shelf.num_own_bytes
    difference = difference_of(loaded.model, model)
    if difference:
        raise ConfigError(f"{_label(name, adapter)}: {path} is no variant of {loaded.name}: {difference}")
    return LoadedVariant(
        name=name,
        path=path if adapter is None else adapters.resolve(adapter),
        model=model,
        text_path=path,
        adapter=None if adapter is None else adapters.name_of(adapter),
        shared=shared,
        own_bytes=own_bytes,
        equal_layers=equal_layers(loaded.model.chain, model.chain),
    )


def _check_room(adapter: adapters.Adapter, room: FreeMemory, *, merged: torch.dtype | None) -> None:
    """Raises ModelError if there is no room for the weights of an adapter, as they are read and as they are packed.

    merged: the type of the matrices that it is merged into copies of; None where it stands beside them
    """
    read_bytes = adapter.num_parameters * torch.float32.itemsize
    changed = sum(B.shape[0] * A.shape[1] for A, B in adapter.factors.values())
    needed_bytes = read_bytes + (read_bytes if merged is None else changed * merged.itemsize)
    if needed_bytes > room.num_bytes:
        needed, free = format_bytes(needed_bytes), format_bytes(room.num_bytes)
        raise ModelError(f"its weights take up to {needed}, and {free} are free by {room.bound} beside the cache")


def _label(name: str, adapter: str | None) -> str:
    return f"variant {name}" if adapter is None else f"adapter {name}"


def _beside(loaded: Loaded, shelf: Shelf, adapter: Adapter) -> tuple[HybridModel, float, int]:
    """The first model with an adapter beside it, or a copy with other modules; which part of its bytes is shared, and
    how many are not.
    """
    trunk, own_bytes = loaded.trunk, 0
    if trunk is None or adapter.replaced:
        trunk = loading.load_trunk(
            loaded.path,
            dtype=loaded.dtype_name,
            ops=loaded.ops,
            shelf=shelf,
            adapter=adapter,
            max_length=loaded.limit,
            weights=loaded.weights,
        )
        num_bytes, num_shared, own_bytes = shelf.num_bytes, shelf.num_shared_bytes, shelf.num_own_bytes
    else:
        assert trunk.bank is not None
        num_bytes = num_shared = trunk.bank.num_bytes
    model = loading.beside(trunk, adapter)
    factor_bytes = model.factors.num_bytes
    return model, num_shared / (num_bytes + factor_bytes), own_bytes + factor_bytes


def apart(loaded: Loaded, model: HybridModel) -> HybridModel:
    """The same model, for use while others run those that are loaded: with equal matrices, and nothing that changes."""
    if loaded.trunk is None or trunk_of(model) is not loaded.trunk:
        return model
    twin = loading.load_trunk(
        loaded.path,
        dtype=loaded.dtype_name,
        ops=loaded.ops,
        shelf=loaded.shelf,
        max_length=loaded.limit,
        weights=loaded.weights,
    )
    return model.on(twin) if isinstance(model, AdaptedModel) else twin


def _name(model: str | None) -> str:
    if model is None:
        return "embedded"
    if (file := folders.find_gguf(Path(model))) is not None:
        return gguf.title_of(file)
    return Path(model).resolve().name if Path(model).is_dir() else model


def inexact_reasons(loaded: Loaded) -> list[str]:
    """Why the cache is not exact here: what the backend says of itself, then probes that failed. Empty if it is."""
    said = [loaded.ops.inexact] if loaded.ops.inexact else []
    with torch.inference_mode():  # as when it serves
        own = check_exact(loaded.ops, loaded.dtype) + check_model(loaded.model)
        checked = {loaded.model.fingerprint}
        for variant in loaded.variants:
            if variant.model.fingerprint not in checked:
                own += variant.inexact_reasons()
                checked.add(variant.model.fingerprint)
        return said + own


def profile_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(PROFILES))


def profiles_in(folder: Path) -> list[Profile]:
    """Raises ConfigError for a file that is no profile."""
    return [load_profile(path) for path in profile_files(folder)]


def find_profiles(loaded: Loaded, given: Sequence[Path]) -> tuple[list[Profile], list[Path]]:
    """Those that are given and those beside the models -> what applies to these, and files that do not.

    Raises ConfigError for a file that is no profile, or a given one of other weights.
    """
    here = {loaded.model.fingerprint, *(each.model.fingerprint for each in loaded.variants)}
    found, others = [load_profile(path) for path in given], list[Path]()
    for path, profile in zip(given, found, strict=True):
        missing = {profile.sender, profile.receiver} - here
        if missing:
            raise ConfigError(f"profile {path} is of other weights: no model here is {' or '.join(sorted(missing))}")
    folders = dict.fromkeys((loaded.path, *(each.path for each in loaded.variants)))
    for path in (path for folder in folders for path in profile_files(folder)):
        profile = load_profile(path)
        if {profile.sender, profile.receiver} <= here:
            found.append(profile)
        else:
            others.append(path)
    return found, others if len(folders) > 1 else []
