# SPDX-License-Identifier: Apache-2.0
"""What the nodes of a traced network are called, whichever way they came into the graph.

``relu`` is the name of ``nn.ReLU``, of ``F.relu``, of ``x.relu_()`` and of ``aten::relu_``.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..nn.average import AveragePool

# One value in, one out, the same for every pixel and channel.
EACH = frozenset(
    (
        "relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "hardtanh", "hardswish",
        "hardsigmoid", "leaky_relu", "prelu", "elu", "celu", "selu", "softplus", "mish",
        "clamp", "neg", "abs", "dropout", "feature_dropout", "alpha_dropout", "identity",
        "contiguous", "clone", "channels_last", "detach", "to", "float",
    )
)  # fmt: skip
# Works on every channel by itself and in the same way.
SPATIAL = frozenset(
    (
        "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "lp_pool2d",
        "upsample", "interpolate", "upsample_nearest2d", "upsample_bilinear2d", "mean",
    )
)  # fmt: skip
# Channel i of the result is made of channel i, by numbers that may be of others too.
NORMALISATIONS = frozenset(
    ("batch_norm", "group_norm", "GroupNorm", "instance_norm", "InstanceNorm2d")
)
# Of two tensors, channel by channel (or of one and a number).
BINARY = frozenset(
    (
        "add", "sub", "mul", "div", "truediv", "maximum", "minimum",
    )
)  # fmt: skip
# Puts channels elsewhere and computes nothing.
MOVES = frozenset(
    (
        "cat", "concat", "flatten", "view", "reshape", "permute", "transpose", "chunk", "split",
        "split_with_sizes", "getitem", "slice", "select", "narrow", "squeeze", "unsqueeze",
        "pad", "constant_pad_nd", "expand", "repeat", "index_select", "unflatten",
        "channel_shuffle",
    )
)  # fmt: skip
# Asks how large a tensor is, or where, and not what is in it.
SIZES = frozenset(("getattr", "size", "dim", "sym_size", "len"))

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardtanh: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.SELU: "selu",
    nn.Softplus: "softplus",
    nn.Mish: "mish",
    nn.Dropout: "dropout",
    nn.Dropout2d: "feature_dropout",
    nn.AlphaDropout: "alpha_dropout",
    nn.Identity: "identity",
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.LPPool2d: "lp_pool2d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.Upsample: "upsample",
    nn.UpsamplingNearest2d: "upsample",
    nn.UpsamplingBilinear2d: "upsample",
    nn.Flatten: "flatten",
    nn.Unflatten: "unflatten",
    nn.ZeroPad2d: "pad",
    nn.ChannelShuffle: "channel_shuffle",
}
_ALIASES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "truediv",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "_unsafe_view": "view",
    "dropout2d": "feature_dropout",
    "concatenate": "cat",
    "native_channel_shuffle": "channel_shuffle",
}


def module_of(node: fx.Node) -> nn.Module | None:
    """Returns the module that a ``call_module`` node calls, None for other nodes."""
    if node.op != "call_module":
        return None
    root = node.graph.owning_module
    return None if root is None else root.get_submodule(str(node.target))


def name_of(node: fx.Node) -> str:
    """Returns the common name of what a node does; its op or class where it has none."""
    module = module_of(node)
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return "prelu"  # with more parameters it is not the same for every channel
    if type(module) is AveragePool:
        if not module.keepdim:
            return "mean"
        return "adaptive_avg_pool2d" if module.pool is None else "avg_pool2d"
    if module is not None:
        return _MODULES.get(type(module), type(module).__name__)
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = _function_name(node.target)
    else:
        return node.op
    name = name.rstrip("_") if not name.startswith("__") else name
    return _ALIASES.get(name, name)


def _function_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def describe_node(node: fx.Node) -> str:
    """Names a node for a report: the module's name, or what is called."""
    if node.op == "call_module":
        return str(node.target)
    if node.op in ("placeholder", "output"):
        return {"placeholder": "the input", "output": "the output"}[node.op]
    return f"{name_of(node)} ({node.name})"
