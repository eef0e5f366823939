"""Checkpoint directories: load ours and Hugging Face's, write ours.

Ours have `config.json` with the fields of `Config`, and `model.safetensors` with our names. Those
written by several ranks have one safetensors file per rank and a table of their tensors.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError

from dsv3_ref.checkpoints.atomic import OLD, atomic_dir, read_json, temp_sibling
from dsv3_ref.checkpoints.hf_config import config_from_hf, promised_mtp_layers
from dsv3_ref.checkpoints.hub import local_dir
from dsv3_ref.checkpoints.huggingface import (
    IGNORED,
    LAYER,
    hf_names,
    is_gate_bias,
    mtp_copies,
)
from dsv3_ref.checkpoints.layout import CONFIG, SHARD_TABLE, TENSORS, is_expert
from dsv3_ref.checkpoints.manifest import (
    Loaded,
    first_whole,
    require_manifest,
    verified,
    write_manifest,
)
from dsv3_ref.checkpoints.safetensors_files import (
    FP8,
    SCALE_SUFFIX,
    SHARD_BYTES,
    FlatRange,
    LazyTensor,
    TensorFiles,
    write_safetensors,
)
from dsv3_ref.checkpoints.sharded import ShardedReader, build_for_files, consolidate
from dsv3_ref.checkpoints.storage import ShardedFiles, whole_ranges
from dsv3_ref.config import Config, UserError, from_dict
from dsv3_ref.model import Transformer

AnyPath = str | PathLike[str]
STEP_NAME = re.compile(r"step_\d{7}|step_[1-9]\d{7,}", re.ASCII)

# ── Loading ──


def load(
    directory: AnyPath,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Transformer:
    """Return the model of a directory, ours or Hugging Face's, or of the hub (`owner/name`).

    Without `dtype`, tensors keep their stored dtype, and FP8 tensors get that of the embedding.
    Gate biases stay fp32. With `verify`, files are compared with the manifest if there is one, and
    the newest undamaged checkpoint of a run is loaded. Raise a `UserError` if the directory is
    invalid.
    """
    return newest_whole(directory, partial(load_dir, device=device, dtype=dtype), verify)


def load_dir(
    folder: Path, device: torch.device | str | None, dtype: torch.dtype | None
) -> Transformer:
    """Return the model of one checkpoint."""
    if is_sharded(folder):
        return consolidate(folder).to(device, dtype)
    reader = CheckpointReader(folder)
    state = {name: reader.read(name, device, dtype) for name in reader.expected}
    reader.model.load_state_dict(state, assign=True)
    return reader.model


def call_alone(make: Callable[[], Loaded]) -> Loaded:
    """Return make(), in a process that has no others to agree with."""
    return make()


def newest_whole(
    directory: AnyPath, read: Callable[[Path], Loaded], verify: bool = True, part: int = 0,
    parts: int = 1, call: Callable[[Callable[[], Loaded]], Loaded] = call_alone,
) -> Loaded:  # fmt: skip
    """Return `read(folder)` for the newest undamaged checkpoint of a run, or for the directory.

    Of several ranks, each verifies its `part` of `parts` of the files, and `call` shares errors.
    Warn of each damaged checkpoint; raise a `DamageError` if the oldest one is damaged, too.
    """
    checkpoints = list_checkpoints(directory)

    def read_verified(folder: Path) -> Loaded:
        if verify and checkpoints:
            require_manifest(folder)
        with verified(folder, verify, part, parts):
            return read(folder)

    newest_first = reversed(checkpoints or [resolve_checkpoint_dir(directory)])
    loaded, damages = first_whole(newest_first, lambda folder: call(partial(read_verified, folder)))
    for damage in damages.values() if part == 0 else ():
        warnings.warn(f"{damage}. An earlier checkpoint is loaded instead.", stacklevel=3)
    return loaded


def load_checkpoint_config(directory: AnyPath) -> Config:
    """Return the config of a directory, ours or Hugging Face's, whole or sharded."""
    folder = resolve_checkpoint_dir(directory)
    if is_sharded(folder):
        return from_dict(read_json(folder / CONFIG))
    return CheckpointReader(folder).config


def open_weights(folder: Path) -> "WeightReader":
    """Return a reader of the weights of one checkpoint of any format."""
    return ShardedReader(folder) if is_sharded(folder) else CheckpointReader(folder)


@torch.no_grad()
def load_into(model: Transformer, directory: AnyPath, verify: bool = True) -> None:
    """Copy the weights of a directory into a model of any dtype."""
    targets: dict[str, FlatRange] = {}
    for name, x in model.state_dict().items():
        targets |= whole_ranges(name, x)
    newest_whole(directory, partial(fill_weights, targets), verify)


def fill_weights(targets: dict[str, FlatRange], folder: Path) -> None:
    """Fill ranges of our tensors from one checkpoint; of its files only these are read.

    targets: by our names; experts are named one by one, `<name>.<i>`.
    """
    reader = open_weights(folder)
    for name, target in targets.items():
        try:
            reader.fill(name, target)
        except (LookupError, RuntimeError):
            raise UserError(f"{folder} does not fit this model: {name}") from None


def split_expert_name(name: str) -> tuple[str, int | None]:
    """Split `<name>.<i>` of an expert into the name of the stack and i; other names have none."""
    stack, _, index = name.rpartition(".")
    return (stack, int(index)) if is_expert(name) and index.isdigit() else (name, None)


def fill_tensors(folder: Path, targets: dict[str, FlatRange]) -> None:
    """Fill ranges of the tensors of a run's checkpoint, whole or sharded, by their global names.

    targets: `model.<name>`, `exp_avg.<name>`, `ema.<name>` and so on; experts are named one by one,
    `<name>.<i>`. Raise a `UserError` if a tensor is missing or has another shape: an incomplete
    optimizer state is not resumed.
    """
    if is_sharded(folder):
        files = ShardedFiles(folder)
        for key, target in targets.items():
            files.fill(key, target)
        return
    weights, training = TensorFiles(folder), TensorFiles(folder, (TENSORS,))
    for key, target in targets.items():
        is_weight = key.startswith("model.")
        name, expert = split_expert_name(key.removeprefix("model.") if is_weight else key)
        try:
            (weights if is_weight else training).fill(name, target, expert)
        except (LookupError, RuntimeError, SafetensorError) as e:
            raise UserError(f"{folder} lacks {key}, or it has another shape ({e})") from None


def read_other_tensors(folder: Path, targets: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's state that `fill_tensors` has not read into `targets`."""
    training, filled = TensorFiles(folder, (TENSORS,)), {split_expert_name(x)[0] for x in targets}
    return {name: training.read(name) for name in training.files if name not in filled}


class CheckpointReader:
    """A directory whose tensors match its config; they are read on demand."""

    def __init__(self, directory: Path):
        self.directory = directory
        values = read_json(directory / CONFIG)
        self.is_hf = "model_type" in values
        self.stored = TensorFiles(directory)
        try:
            if self.is_hf:
                promised = config_from_hf(values)
                n_mtp_layers = self.count_mtp_layers(promised_mtp_layers(values), promised)
                self.config = replace(promised, n_mtp_layers=n_mtp_layers)
            else:
                self.config = from_dict(values)
        except (UserError, TypeError) as e:
            raise UserError(f"{directory / CONFIG}: {e}") from None
        n_stored = len(self.stored.files)
        self.model = build_for_files(self.config, n_stored, directory)
        self.expected = self.model.state_dict()
        n_experts = max((len(x) for x in self.expected.values() if x.ndim == 3), default=0)
        if self.is_hf and n_experts > n_stored:
            raise UserError(
                f"{directory / CONFIG} asks for {n_experts:,} experts per layer, but {n_stored:,} "
                "tensors are stored: copy the directory again"
            )
        self.check_tensors()

    def count_mtp_layers(self, promised: int | None, config: Config) -> int:
        """Return the promised MTP layers, all that are stored without a promise, or 0 if none is.

        transformers keeps the promise in its config.json and drops the layers.
        """
        layers = {int(m[1]) for m in map(LAYER.match, self.stored.files) if m}
        n_stored = sum(i >= config.n_layers for i in layers)
        if promised and not n_stored:
            warnings.warn(f"{self.directory} has no MTP layer: loaded without", stacklevel=4)
        return n_stored if promised is None else promised * bool(n_stored)

    def stored_names(self, name: str) -> list[str]:
        """Return the stored names of our tensor: itself, or Hugging Face's, one per expert."""
        return hf_names(name, self.config) if self.is_hf else [name]

    def expert_slices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the slice of our tensor for each of its stored names: all of it, or an expert."""
        return list(tensor.unbind()) if self.is_hf and tensor.ndim == 3 else [tensor]

    def check_tensors(self) -> None:
        """Raise a `UserError` unless exactly the expected tensors are stored, in their shapes."""
        slices: dict[str, torch.Tensor] = {}
        for name, x in self.expected.items():
            slices |= zip(self.stored_names(name), self.expert_slices(x))
        files = self.stored.files
        if missing := [name for name in slices if name not in files]:
            raise UserError(f"{self.directory} lacks {abbreviate(missing)}")
        scales = {name + SCALE_SUFFIX for name in slices if self.stored.dtype(name) == FP8}
        if missing := sorted(scales - set(files)):
            raise UserError(f"{self.directory} has FP8 weights but lacks {abbreviate(missing)}")
        stems = {name: name.removesuffix(SCALE_SUFFIX) for name in files}
        unknown = [n for n, stem in stems.items() if n not in slices and stem not in slices]
        if unknown := [n for n in unknown if not (self.is_hf and IGNORED.fullmatch(stems[n]))]:
            raise UserError(
                f"{self.directory} has tensors that {CONFIG} does not call for: "
                f"{abbreviate(unknown)}"
            )
        for name, x in slices.items():
            self.check_shape(name, tuple(x.shape))

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Raise a `UserError` if the shape of a stored tensor is not that of the config."""
        shape = self.stored.shape(name)
        if shape == expected:
            return
        vocabulary = self.stored_names("embed.weight") + self.stored_names("head.weight")
        if name in vocabulary and shape[1:] == expected[1:]:
            raise UserError(
                f"{self.directory}: {name} has {shape[0]} rows, but vocab_size in {CONFIG} is "
                f"{expected[0]}: weights and vocabulary do not belong together"
            )
        raise UserError(
            f"{self.directory}: {name} has shape {shape}, but {CONFIG} asks for {expected}"
        )

    def target_dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype; for an FP8 weight the embedding's, for a gate bias fp32."""
        dtype = self.stored.dtype(self.stored_names(name)[0])
        if dtype == FP8:
            dtype = self.stored.dtype(self.stored_names("embed.weight")[0])
        return torch.float32 if is_gate_bias(name) else dtype

    def fill(self, name: str, target: FlatRange) -> None:
        """Fill a range of one of our tensors; experts are named one by one."""
        stack, expert = split_expert_name(name)
        if self.is_hf and expert is not None:
            stored, expert = self.stored_names(stack)[expert], None
        else:
            [stored] = self.stored_names(stack)
        self.stored.fill(stored, target, expert)

    def read(
        self,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Read one of our tensors into new memory, with its experts stacked."""
        dtype = self.target_dtype(name) if dtype is None or is_gate_bias(name) else dtype
        tensor = torch.empty(self.expected[name].shape, dtype=dtype, device=device)
        for row, stored in zip(self.expert_slices(tensor), self.stored_names(name), strict=True):
            row.copy_(self.stored.read(stored))
        return tensor


WeightReader = ShardedReader | CheckpointReader


def hf_tensors(reader: WeightReader) -> dict[str, LazyTensor]:
    """Return the tensors of a checkpoint by Hugging Face's names, each read when it is written."""
    tensors: dict[str, LazyTensor] = {}
    for name, x in reader.expected.items():
        dtype = reader.target_dtype(name)
        parts = whole_ranges(name, x)
        for hf_name, (key, part) in zip(hf_names(name, reader.config), parts.items(), strict=True):
            nbytes = part.shape.numel() * dtype.itemsize
            tensors[hf_name] = LazyTensor(
                nbytes, partial(read_whole, reader, key, part.shape, dtype)
            )
    return tensors | mtp_copies(tensors, reader.config)


def read_whole(
    reader: WeightReader, name: str, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Read one of our tensors, or one expert, into new memory."""
    x = torch.empty(shape, dtype=dtype)
    reader.fill(name, FlatRange(shape, 0, x.view(-1)))
    return x


def abbreviate(names: list[str]) -> str:
    """Return `a, b, c and 4 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ── Saving ──


def save(model: Transformer, directory: AnyPath, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model in our own format, atomically."""
    with atomic_dir(directory) as tmp:
        write_safetensors(tmp, asdict(model.config), model.state_dict(), shard_bytes)
        write_manifest(tmp)


# ── Directories ──


def is_sharded(folder: Path) -> bool:
    """Return whether several ranks wrote this checkpoint."""
    return (folder / SHARD_TABLE).is_file()


def list_checkpoints(run: AnyPath) -> list[Path]:
    """Return the checkpoints of a training run, oldest first, without other files there."""
    folders = (Path(run) / "checkpoints").glob("step_*")
    own = [p for p in folders if STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(own, key=step_number)


def step_number(folder: Path) -> int:
    """Return the step of a checkpoint: `step_0000012` → 12."""
    return int(folder.name.removeprefix("step_"))


def resolve_checkpoint_dir(directory: AnyPath) -> Path:
    """Return the directory to load: the newest checkpoint of a run, or the directory itself.

    A model of the Hugging Face Hub is downloaded (`owner/name`, `owner/name@revision`). If a
    process was killed while replacing the directory, return the one that it had set aside.
    """
    path = local_dir(directory)
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; a checkpoint is a directory")
    if path.name and (aside := temp_sibling(path, OLD)).is_dir():
        return aside
    raise UserError(f"there is no directory {path}: check the path")


def find_tokenizer_dir(path: Path) -> Path:
    """Return the folder with the tokenizer: the path itself, or the run of a checkpoint."""
    path = local_dir(path)
    places = [path, *path.resolve().parents[:2]]
    names = "tokenizer.json", "tiktoken.model", "tokenizer.model"
    return next((p for p in places if any((p / name).is_file() for name in names)), path)
