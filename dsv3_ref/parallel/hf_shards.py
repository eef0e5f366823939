"""A Hugging Face directory that all ranks of a mesh write together, each its own tensors."""

from itertools import chain
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from dsv3_ref.checkpoints.atomic import make_staging_dir, publish_dir, temp_sibling, TMP
from dsv3_ref.checkpoints.hf_config import config_to_hf
from dsv3_ref.checkpoints.huggingface import hf_names, mtp_copy_names
from dsv3_ref.checkpoints.layout import is_expert
from dsv3_ref.checkpoints.safetensors_files import WrittenTensor, write_config, write_index
from dsv3_ref.checkpoints.sharded import first_expert
from dsv3_ref.parallel.engine import ParallelEngine


def write_hf_shards(engine: ParallelEngine, folder: Path) -> None:
    """Write the directory that `save_hf` writes for the whole model; a collective call.

    Each tensor is written by one of the ranks that hold it, and rank 0 writes the index.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = folder.resolve()
    if rank == 0:
        make_staging_dir(final)
    dist.barrier()
    tmp = temp_sibling(final, TMP)
    tensors = own_hf_tensors(engine)
    file = f"model-{rank + 1:05}-of-{world:05}.safetensors"
    if tensors:
        on_cpu = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(on_cpu, tmp / file, metadata={"format": "pt"})
    own = [WrittenTensor(name, file, x.nbytes) for name, x in tensors.items()]
    written: list[list[WrittenTensor]] = [[]] * world
    dist.all_gather_object(written, own)
    if rank == 0:
        write_index(tmp, chain.from_iterable(written))
        write_config(tmp, config_to_hf(engine.config, engine.pipeline.dtype))
        publish_dir(tmp, final)
    dist.barrier()


def own_hf_tensors(engine: ParallelEngine) -> dict[str, Tensor]:
    """Return the tensors that this rank writes, by Hugging Face's names.

    Each MTP layer has copies of embedding and head, as in the released files.
    """
    config, first = engine.config, first_expert(engine)
    tensors: dict[str, Tensor] = {}
    for name, x in engine.tensors_to_write():
        names = hf_names(name, config)
        if is_expert(name):
            tensors |= zip(names[first : first + len(x)], x.unbind(), strict=True)
        else:
            tensors |= zip(names, [x], strict=True)
            tensors |= {copy: x.clone() for copy in mtp_copy_names(name, config)}
    return tensors
