"""Two pretended devices on a CPU: every tensor carries a tag, and an operation on two tags raises, as CUDA does.

`shard(model, split)` lays the decoder's layers from `split` on onto the second device, everything else onto the first,
and moves the inputs of each module as accelerate's hooks do. `FORBID_DOUBLE` also forbids float64 on them, as MPS does.
"""

import functools

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

FORBID_DOUBLE = False


def plain(x):
    return x.inner if isinstance(x, Tagged) else x


def tag_of(x):
    return x.tag if isinstance(x, Tagged) else "cpu"


def tagged(x, tag):
    return Tagged(x, tag) if isinstance(x, torch.Tensor) and tag != "cpu" else x


def refuse(name, tags):
    raise RuntimeError(f"tensors on different devices in {name}: {sorted(tags)}")


class Tagged(torch.Tensor):
    @staticmethod
    def __new__(cls, inner, tag):
        if FORBID_DOUBLE and inner.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",
            dispatch_device=True,
            requires_grad=False,
        )

    def __init__(self, inner, tag):
        self.inner, self.tag = inner, tag

    def __repr__(self):
        return f"Tagged({self.tag}, {self.inner})"

    def tolist(self):
        if torch._C._len_torch_function_stack():  # whoever counts what the host waits for sees it
            return super().tolist()
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return torch.device(args[0].tag)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        tags, name, target = {tag_of(t) for t in tensors if plain(t).dim() > 0}, func.__name__, kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if name.startswith(("index.Tensor", "index_put", "_index_put")):  # indices from the CPU are allowed
            home = tag_of(args[0])
            if tags - {home, "cpu"} or (home == "cpu" and tags != {"cpu"}):
                refuse(name, tags)
        elif name.startswith("copy_"):
            home = tag_of(args[0])
        elif name.startswith("_to_copy"):
            home = tag_of(args[0]) if target is None else None
        elif len(tags) > 1 and target is None:
            refuse(name, tags)
        else:
            home = next(iter(tags), None) or next((tag_of(t) for t in tensors if isinstance(t, Tagged)), "cpu")
        if target is not None:
            home = str(torch.device(target))
        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        if name.startswith("_local_scalar"):
            return result
        if name.split(".")[0].endswith("_") and not name.startswith("__") and isinstance(args[0], Tagged):
            return args[0]
        return tree_map(lambda t: tagged(t, home), result)


class Devices(TorchFunctionMode):
    """Within it, factories make tensors on the pretended devices, and `to`, `where`, SDPA mind the tags."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("where", "__setitem__", "scaled_dot_product_attention", "embedding_bag"):
            tags = {
                tag_of(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor) and plain(t).dim() > 0
            }
            if name == "__setitem__":
                tags -= {"cpu"}
            if len(tags) > 1:
                refuse(name, tags)
            if name == "where" and len(args) == 3:  # an operation of the device, for whoever counts these
                return func(*(a if isinstance(a, torch.Tensor) else torch.tensor(a) for a in args))
            return tree_map(
                lambda t: tagged(t, next(iter(tags), "cpu")), func(*tree_map(plain, args), **tree_map(plain, kwargs))
            )
        if name in ("to", "meta") and isinstance(args[0], torch.Tensor):
            x, device, dtype = args[0], kwargs.get("device"), kwargs.get("dtype")
            for a in args[1:]:
                if isinstance(a, (torch.device, str)):
                    device = torch.device(a)
                elif isinstance(a, torch.dtype):
                    dtype = a
                elif isinstance(a, int) and not isinstance(a, bool):
                    device = torch.device("meta", a)
                elif isinstance(a, torch.Tensor):
                    device, dtype = a.device, dtype or a.dtype
            home = (
                tag_of(x)
                if device is None
                else "cpu"
                if torch.device(device).type == "cpu"
                else str(torch.device(device))
            )
            if dtype is None and home == tag_of(x):
                return x
            return tagged(plain(x) if dtype is None else plain(x).to(dtype), home)
        if name == "cpu" and isinstance(args[0], Tagged):
            return args[0].inner
        if name == "double" and isinstance(args[0], Tagged) and FORBID_DOUBLE:
            raise TypeError("this device has no float64")
        if name == "tolist" and isinstance(args[0], Tagged):
            return args[0].inner.tolist()
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta" and not any(isinstance(a, Tagged) for a in args):
            return Tagged(func(*args, **{**kwargs, "device": torch.device("cpu")}), str(torch.device(device)))
        return func(*args, **kwargs)


def move(x, tag):
    return tree_map(lambda t: tagged(plain(t), tag) if isinstance(t, torch.Tensor) and tag_of(t) != tag else t, x)


def place(module, tag, align=True):
    """Weights and buffers of a module onto a device; its inputs follow, as with accelerate."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for key, value in store.items():
                if value is not None and not isinstance(value, Tagged):
                    store[key] = Tagged(value.detach(), tag)
    if align:
        old = module.forward
        module.forward = functools.wraps(old)(
            lambda *a, **k: old(*move(a, tag), **{n: move(v, tag) for n, v in k.items()})
        )


def shard(model, split, second="meta:1"):
    decoder = model.get_decoder()
    for i, layer in enumerate(decoder.layers):
        place(layer, second if i >= split else "meta:0")
    place(decoder.norm, second)
    place(model.lm_head, second)
    for part in (
        decoder.embed_tokens,
        getattr(model.model, "vision_tower", None),
        getattr(model.model, "visual", None),
        getattr(model.model, "multi_modal_projector", None),
    ):
        if part is not None:
            place(part, "meta:0")
    place(model, "meta:0", align=False)
    return model
