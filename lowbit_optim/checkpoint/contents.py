"""What a save writes: the files of each kind, from the live objects."""

import json
from typing import Any

import torch

from lowbit_optim.checkpoint.live import class_name, parameter_names, parameter_shapes
from lowbit_optim.checkpoint.manifest import LARGEST_JSON, library_version, version_for
from lowbit_optim.checkpoint.ranks import ALONE, Ranks
from lowbit_optim.checkpoint.tensors import Part, Pool, codec_metadata, codecs_of
from lowbit_optim.checkpoint.values import encode

_LARGEST = 5 * 10**9  # bytes of the tensors in a file


def contents_of(
    model: torch.nn.Module | None,
    optimizer: Any,
    scheduler: Any,
    trainer: dict[str, Any],
    largest: int = _LARGEST,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, list[Part]], list[Pool]]:
    """The files of each kind that this rank writes, and all tensors; ``trainer`` has "step", "extras" and "random"."""
    library = {"format": "pt", "format_version": str(version_for(ranks.size)), "library_version": library_version()}
    contents: dict[str, list[Part]] = {}
    pools: list[Pool] = []
    sections: dict[str, Any] = {"model": None, "optimizer": None, "scheduler": None}
    # Both first: an optimizer's may be an exchange between the ranks, which must not wait for one that raised before.
    state = None if model is None else model.state_dict()
    state_dict = None if optimizer is None else optimizer.state_dict()
    if state is not None:
        tensors = Pool("model", ranks)
        pools.append(tensors)
        sections["model"] = {
            "state_dict": {name: tensors.put(name, value) for name, value in state.items()},
            "versions": getattr(state, "_metadata", None),  # of the modules' state, which load_state_dict looks at
        }
        contents["model"] = tensors.parts(largest, lambda _: library)
    if state_dict is not None:
        tensors = Pool("optimizer", ranks)
        pools.append(tensors)
        names = parameter_names(optimizer, state_dict, model)
        stored = {
            index: {key: tensors.put(f"{names.get(index, index)}/{key}", value) for key, value in entry.items()}
            for index, entry in state_dict["state"].items()
        }
        sections["optimizer"] = {
            "class": class_name(optimizer),
            "names": None if model is None else list(names.values()),
            "shapes": parameter_shapes(optimizer),
            "state_dict": state_dict | {"state": stored},
        }
        codecs = codecs_of(optimizer, names)
        contents["optimizer"] = tensors.parts(largest, lambda part: library | codec_metadata(codecs, part))
    if not ranks.first:
        return contents | {"random": [_json_part(encode(trainer["random"], "random"))]}, pools
    if scheduler is not None:
        sections["scheduler"] = {"class": class_name(scheduler), "state_dict": scheduler.state_dict()}
    encoded = {key: encode(value, key) for key, value in (sections | trainer).items()}
    contents["trainer"] = [_json_part(encoded)]
    return contents, pools


def _json_part(content: Any) -> Part:
    text = json.dumps(content, allow_nan=False).encode()
    if len(text) > LARGEST_JSON:
        raise ValueError(
            f"the extras, with all else that is no tensor of the model or optimizer, are {len(text)} bytes of JSON, "
            f"more than {LARGEST_JSON}: keep what is large in a file of its own, or as buffers of the model"
        )
    return Part(text, {})


def check_same(ranks: Ranks, pools: list[Pool], arguments: dict[str, Any]) -> None:
    """Raise ValueError on all ranks if one would not write its part of what the first is about to write."""
    own = {what: repr(value) for what, value in arguments.items()}
    own |= {f"{pool.kind} tensor {name!r}": said for pool in pools for name, said in pool.outline.items()}
    tied = {f"{pool.kind} tensor {name!r}": other for pool in pools for name, other in pool.tied.items()}
    of_first, tied_there = ranks.from_first((own, tied))
    with ranks.agreed():
        for what in {**of_first, **own}:
            here, there = own.get(what, "missing"), of_first.get(what, "missing")
            if here == there and what in tied:  # a rank without rows sees no ties
                here, there = f"tied to {tied[what]!r}", f"tied to {tied_there.get(what)!r}"
            if here != there:
                raise ValueError(
                    f"{what} is {here} on rank {ranks.rank}, and {there} on the first: all ranks save the same model "
                    "and optimizer, with the same arguments"
                )
