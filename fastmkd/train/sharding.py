"""FSDP2: every process keeps a part of each weight, its gradient and its optimizer state, split by Accelerate.

Only the forward and backward pass of the method gathers whole weights; the moving average is kept in parts too. Tests
run a `WholeCopy` in every process, and PyTorch's `torch.distributed.checkpoint.state_dict` gathers what is saved. A
frozen teacher is whole unless `shard_teacher` splits it.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .errors import UserError, shorten

__all__ = ["WholeCopy", "name_units", "settle_sharding", "shard_like", "shard_teacher"]


def settle_sharding(accelerator: Any) -> None:
    """Checks how Accelerate is set to split networks, and sets what fastmkd needs; DDP passes untouched.

    Args:
        accelerator: of Hugging Face Accelerate, before anything is prepared.

    Raises:
        UserError: DeepSpeed, Megatron or FSDP1 is asked for, or a part of FSDP2 that does not work here.
    """
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    state = accelerator.state
    asked_for = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked_for and state.distributed_type == DistributedType.MULTI_CPU:
        _switch_on_for_cpu(state)
    if state.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"Accelerate is set to {state.distributed_type.value}, which brings an engine of its own; fastmkd splits "
            "networks with FSDP2. Launch with accelerate launch --use_fsdp --fsdp_version 2, or with torchrun for DDP."
        )
    if state.distributed_type != DistributedType.FSDP:
        return
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError(
            "Accelerate is set to FSDP version 1, which joins weights to flat ones; set fsdp_version 2 "
            "(accelerate launch --fsdp_version 2, or FSDP_VERSION=2)."
        )
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise UserError(
            "FSDP_AUTO_WRAP_POLICY is SIZE_BASED_WRAP, which gathers weights apart that a method reads together; set "
            "TRANSFORMER_BASED_WRAP (a block at a time) or NO_WRAP (all at once)."
        )
    if plugin.activation_checkpointing:
        raise UserError(
            "FSDP_ACTIVATION_CHECKPOINTING is true, which wraps the blocks that a method and the moving average find "
            "by name; set it to false."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError(
            "FSDP_OFFLOAD_PARAMS is true, which takes weights off the device where fastmkd tests, averages and saves "
            "them; set it to false."
        )
    # It moves the method to the meta device and fills it from rank 0 again. The frozen teacher, which moves with the
    # method but is no part of its state, would be lost; and every process has read the same weights anyway.
    plugin.cpu_ram_efficient_loading = False
    # Autocast instead, so that run.precision means the same as under DDP: sums and losses stay in float32.
    plugin.mixed_precision_policy = None


def name_units(method: nn.Module) -> None:
    """Names the blocks of a method's ViTs as units that FSDP gathers one at a time, where Accelerate looks for it.

    Accelerate heeds it with TRANSFORMER_BASED_WRAP unless FSDP_TRANSFORMER_CLS_TO_WRAP names classes itself.

    Args:
        method: what is going to be prepared.

    Raises:
        UserError: the method has weights besides the student's and its heads': a teacher that it moves by itself in
            its forward pass, where FSDP lends gathered weights and forgets what is written to them.

    Example:
        >>> import timm
        >>> method = nn.ModuleDict({"student": timm.create_model("vit_tiny_patch16_224", depth=1)})
        >>> name_units(method)
        >>> method._no_split_modules
        ['Block']
    """
    from timm.models.vision_transformer import VisionTransformer

    own = [name for name, _ in method.named_parameters() if not name.startswith(("student.", "heads."))]
    if own:
        raise UserError(
            f"{type(method).__name__} moves weights by itself ({shorten(own, 2)}), which FSDP would forget; train it "
            "with DDP (torchrun, without ACCELERATE_USE_FSDP)."
        )
    vits = [part for part in method.modules() if isinstance(part, VisionTransformer)]
    method.__dict__["_no_split_modules"] = sorted({type(block).__name__ for vit in vits for block in vit.blocks})


def shard_like(average: nn.Module, sharded: nn.Module) -> None:
    """Splits a moving average as the network that it follows, of which it starts as a copy.

    Args:
        average: of the same structure; gets new parameters.
        sharded: whose parameters FSDP2 has split.
    """
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(average.get_submodule(owner), leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def shard_teacher(teacher: nn.Module | None, device: torch.device) -> None:
    """Splits the blocks of a frozen ViT over the processes of a node; a block is whole only while it runs.

    Beside DDP as well as FSDP2: the teacher is no part of what they see. All processes must ask it equally often. Over
    several nodes the delays of gathering would outweigh the memory (docs/scaling.md).

    Args:
        teacher: what lies outside its blocks stays whole.
        device: where it is.

    Raises:
        UserError: there is no teacher, or it has no blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = getattr(teacher, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        kind = "there is none" if teacher is None else f"{type(teacher).__name__} has no blocks"
        raise UserError(f"run.shard_teacher splits the blocks of a ViT teacher, but {kind}; set it to false.")
    world = dist.get_world_size()
    near = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % near:
        raise UserError(f"run.shard_teacher needs as many processes on every node; there are {world} with {near} here.")
    mesh = init_device_mesh(device.type, (world // near, near), mesh_dim_names=("nodes", "node"))["node"]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)


class WholeCopy:
    """Lends the whole network whose parts the processes hold, for one process to run by itself.

    Processes may then run different numbers of batches, which networks that gather their weights cannot. Between two
    loans the copy waits in the memory of the CPU.

    Args:
        network: before it is split.
        device: where to run.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = copy.deepcopy(network).cpu(), device

    @contextlib.contextmanager
    def __call__(self, sharded: nn.Module) -> Iterator[nn.Module]:
        """Yields the network with the weights of a split one; all processes must call it.

        Args:
            sharded: of the same structure. Its buffers (running statistics), which every process has its own of, come
                from rank 0, whose also go into checkpoints.
        """
        from torch.distributed.tensor import DTensor

        whole = {}
        for name, value in sharded.state_dict().items():
            if isinstance(value, DTensor):
                whole[name] = value.full_tensor()
            else:
                whole[name] = value.clone()
                dist.broadcast(whole[name], src=0)
        self.network.load_state_dict(whole)
        del whole
        yield self.network.to(self.device)
        self.network.cpu()


def _switch_on_for_cpu(state: Any) -> None:
    """Does for processes on CPUs what ``AcceleratorState.__init__`` does for those on GPUs.

    That method heeds the request for FSDP only where the distributed type is MULTI_GPU or the like; on MULTI_CPU it
    trains with DDP and says nothing. The rest of Accelerate's FSDP2 asks for no GPU.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if torch.accelerator.is_available():
        raise UserError(
            "run.device is cpu, but FSDP puts weights on the GPU of a machine that has one; hide it "
            "(CUDA_VISIBLE_DEVICES=) or leave run.device out."
        )
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = DistributedType.FSDP
