"""Wrappers: modules that run another one and compute what it computes; they are taken off while it is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from featstore.errors import ModelError


@contextmanager
def unwrapped(module: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """`module` without the wrappers around it and around its parts, for the block, and sentences about them.

    Those are `DataParallel`, `DistributedDataParallel` and `torch.compile`, in place too. The caller's module is put
    back as it was: while it is without them, it computes the same. A layer that is left compiled in place is refused
    by whoever runs it.

    Raises:
        TypeError: for what is no module.
        ModelError: for a module of which this process holds a share alone.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"A {type(module).__name__} is no torch.nn.Module, which is expected. In place of what was made from one "
            "(an exported program, its tensors) hand over the module itself."
        )
    found: list[str] = []
    compiled = [part for part in module.modules() if getattr(part, "_compiled_call_impl", None) is not None]
    found += [f"{_where(module, part)} (compiled in place)" for part in compiled]
    impls = [part._compiled_call_impl for part in compiled]
    inner = _inside(module, "the model", found)
    swapped = []
    for path, part in list(inner.named_modules()):
        for name, child in part._modules.items():
            if child is not None and (bare := _inside(child, f"{path}.{name}".lstrip("."), found)) is not child:
                swapped.append((part, name, child, bare))
    try:
        for part in compiled:
            part._compiled_call_impl = None
        for part, name, _, bare in swapped:
            part._modules[name] = bare
        yield inner, tuple(f"{each}: taken off; the module inside is run and keyed as it is" for each in found)
    finally:
        for part, name, child, _ in swapped:
            part._modules[name] = child
        for part, impl in zip(compiled, impls, strict=True):
            part._compiled_call_impl = impl


def _inside(module: nn.Module, where: str, found: list[str]) -> nn.Module:
    """What the wrappers around `module` run, itself where there are none; adds them to `found`."""
    while True:
        names = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.distributed.")}
        if names & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ModelError(
                f"{where} ({type(module).__name__}) is sharded: this process holds a share of each tensor, of which no "
                "key can be made. Hand over the network as it was before, with the whole tensors loaded into it: "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(net, options=StateDictOptions("
                "full_state_dict=True))."
            )
        if module._forward_hooks or module._forward_pre_hooks:
            return module  # which refuses them by name
        if type(module) in (nn.DataParallel, nn.parallel.DistributedDataParallel) and "forward" not in vars(module):
            kind, inner = type(module).__name__, module.module
        elif type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo"):
            kind, inner = "torch.compile", module._orig_mod
        else:
            return module
        assert isinstance(inner, nn.Module)
        found.append(f"{where} ({kind})")
        module = inner


def _where(module: nn.Module, part: nn.Module) -> str:
    return next(path for path, each in module.named_modules() if each is part) or "the model"
