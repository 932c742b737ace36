"""The shapes of published models' parameters, written down from their architectures: name to shape.

Example:
    >>> from math import prod
    >>> from lowbit_optim import estimate, shapes
    >>> {name: sum(map(prod, shapes.MODELS[name]().values())) for name in ("gpt2", "vit-s", "resnet50")}
    {'gpt2': 124439808, 'vit-s': 22050664, 'resnet50': 25557032}
    >>> round(estimate(shapes.MODELS["vit-s"](), "shampoo", base_bits=4).bytes_per_parameter, 2)
    1.78
"""

from collections.abc import Callable

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def gpt2() -> Shapes:
    """GPT-2 of 124M (Radford et al. 2019): weights are [inputs, outputs], and the head is the embedding.

    Example:
        >>> from lowbit_optim.shapes import gpt2
        >>> gpt2()["wte.weight"]
        (50257, 768)
    """
    width = 768
    shapes: Shapes = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for i in range(12):
        at = f"h.{i}"
        shapes |= _norm(f"{at}.ln_1", width)
        for name, into, out in (("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width)):
            shapes |= {f"{at}.{name}.weight": (into, out), f"{at}.{name}.bias": (out,)}
        shapes |= _norm(f"{at}.ln_2", width)
        for name, into, out in (("mlp.c_fc", width, 4 * width), ("mlp.c_proj", 4 * width, width)):
            shapes |= {f"{at}.{name}.weight": (into, out), f"{at}.{name}.bias": (out,)}
    return shapes | _norm("ln_f", width)


def vit_s() -> Shapes:
    """ViT-S/16 for 224 x 224 pixels and 1000 classes (Dosovitskiy et al. 2021; Touvron et al. 2021).

    Example:
        >>> from lowbit_optim.shapes import vit_s
        >>> vit_s()["patch_embed.weight"]
        (384, 3, 16, 16)
    """
    width = 384
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width)}
    shapes |= {"patch_embed.weight": (width, 3, 16, 16), "patch_embed.bias": (width,)}
    for i in range(12):
        at = f"blocks.{i}"
        shapes |= _norm(f"{at}.norm1", width) | _linear(f"{at}.attn.qkv", 3 * width, width)
        shapes |= _linear(f"{at}.attn.proj", width, width) | _norm(f"{at}.norm2", width)
        shapes |= _linear(f"{at}.mlp.fc1", 4 * width, width) | _linear(f"{at}.mlp.fc2", width, 4 * width)
    return shapes | _norm("norm", width) | _linear("head", 1000, width)


def resnet50() -> Shapes:
    """ResNet-50 (He et al. 2016).

    Example:
        >>> from lowbit_optim.shapes import resnet50
        >>> resnet50()["conv1.weight"]
        (64, 3, 7, 7)
    """
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7)} | _norm("bn1", 64)
    into = 64
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for i in range(count):
            at = f"layer{stage}.{i}"
            sizes = ((width, into, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            for j, size in enumerate(sizes, 1):
                shapes |= {f"{at}.conv{j}.weight": size} | _norm(f"{at}.bn{j}", size[0])
            if i == 0:
                shapes |= {f"{at}.downsample.0.weight": (4 * width, into, 1, 1)} | _norm(
                    f"{at}.downsample.1", 4 * width
                )
            into = 4 * width
    return shapes | _linear("fc", 1000, into)


def _llama(width: int, hidden: int, layers: int, vocabulary: int, keys: int) -> Shapes:
    """A LLaMA; ``keys`` is the width of its keys and values, of all heads."""
    shapes: Shapes = {"embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        at = f"layers.{i}"
        of_heads = {"q": width, "k": keys, "v": keys}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (out, width) for name, out in of_heads.items()}
        shapes |= {f"{at}.self_attn.o_proj.weight": (width, width)}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{at}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def llama2_7b() -> Shapes:
    """LLaMA2 of 7B (Touvron et al. 2023).

    Example:
        >>> from lowbit_optim.shapes import llama2_7b
        >>> llama2_7b()["lm_head.weight"]
        (32000, 4096)
    """
    return _llama(width=4096, hidden=11008, layers=32, vocabulary=32000, keys=4096)


def llama3_70b() -> Shapes:
    """Llama 3 of 70B (Grattafiori et al. 2024): 64 heads of queries, 8 of keys and values, of 128.

    Example:
        >>> from lowbit_optim.shapes import llama3_70b
        >>> llama3_70b()["lm_head.weight"]
        (128256, 8192)
    """
    return _llama(width=8192, hidden=28672, layers=80, vocabulary=128256, keys=1024)


def llama3_405b() -> Shapes:
    """Llama 3.1 of 405B (Grattafiori et al. 2024): 128 heads of queries, 8 of keys and values, of 128.

    Example:
        >>> from lowbit_optim.shapes import llama3_405b
        >>> llama3_405b()["lm_head.weight"]
        (128256, 16384)
    """
    return _llama(width=16384, hidden=53248, layers=126, vocabulary=128256, keys=1024)


#: The functions of this module by the names that ``lowbit-optim estimate`` knows.
MODELS: dict[str, Callable[[], Shapes]] = {
    "gpt2": gpt2,
    "vit-s": vit_s,
    "resnet50": resnet50,
    "llama2-7b": llama2_7b,
    "llama3-70b": llama3_70b,
    "llama3-405b": llama3_405b,
}
