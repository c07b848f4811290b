# SPDX-License-Identifier: Apache-2.0
"""fold: batch normalisation into weights; residual sums and activations into the convolutions."""

from __future__ import annotations

import copy
import math
import operator
from typing import Any, NamedTuple

from torch import fx, nn

from ..nn import SupportConv2d, SupportLinear, fuse
from ..nn.base import SupportLayer
from ..pooling import Pool
from ..support import Support
from .alias import is_after
from .layout import set_module
from .names import module_of, name_of
from .norms import NORMS, fold_norms
from .plain import Keep, _plain_conv2d

# Does nothing in evaluation mode.
_IDLE = frozenset(["dropout", "feature_dropout", "alpha_dropout", "identity"])


class Fused(NamedTuple):
    """One layer with what became part of it.

    Attributes:
        name: of the layer.
        parts: what it is now, such as ``conv + bn + residual + relu`` or ``linear + bn``.
    """

    name: str
    parts: str


class LeftAlone(NamedTuple):
    """Something that stayed a step of its own.

    Attributes:
        name: of the module or operation.
        reason: completes "left alone because …".
    """

    name: str
    reason: str


class Folded(NamedTuple):
    """What `fold` did.

    Attributes:
        fused: the convolutions and fully-connected layers.
        left: what could not be folded, and why.
        removed: how many steps that do nothing in evaluation mode are gone.
    """

    fused: tuple[Fused, ...]
    left: tuple[LeftAlone, ...]
    removed: int


def fold(traced: fx.GraphModule) -> Folded:
    """Folds a traced network in place, for inference.

    Each convolution takes over the batch normalisation after it (as scale of its weights and
    shift), a sum with a tensor of its own size, a ReLU, ReLU6, SiLU or GELU, and max-pooling, as
    one `FusedConv2d`. Each step is taken over only if nothing else reads what came before it. Where
    two convolutions meet in a sum, the one with a Support takes it: PyTorch's dense convolution
    adds in a pass of its own anyway. Layers with a Support that remain are frozen, and so are dense
    linear layers, whose weights are then laid out for the matrix product only once. Linear layers
    take over the normalisation beside them, and convolutions one before them, see `norms`.

    Args:
        traced: what `trace` gave, in evaluation mode.
    """
    removed = _remove_idle(traced)
    _protect(traced)
    beside, unmerged = fold_norms(traced)
    ahead = {b.layer for b in beside if b.before and b.kind == "conv"}
    left: list[LeftAlone] = []
    convs: list[tuple[fx.Node, nn.Conv2d | SupportConv2d]] = []
    for node in traced.graph.nodes:
        module = module_of(node)
        if module is None:
            continue
        reason = _why_not(module, node)
        if reason is not None:
            left.append(LeftAlone(str(node.target), reason))
        elif isinstance(module, nn.Conv2d | SupportConv2d):
            convs.append((node, module))
    # A stable sort: layers with a Support choose first.
    convs.sort(key=lambda pair: not isinstance(pair[1], SupportConv2d))
    changes = _Changes(traced.graph)
    chosen = [(node, conv, _chain(node, changes)) for node, conv in convs]
    done = [
        Fused(b.layer, f"bn + {b.kind}" if b.before else f"{b.kind} + bn")
        for b in beside
        if b.kind != "conv"
    ]
    taken: set[fx.Node] = set()
    for node, conv, chain in chosen:
        while chain.nodes[-1] in taken:  # another convolution has taken the sum
            chain = chain.shorter()
        taken.update(chain.nodes)
        _replace(traced, node, conv, chain)
        first = ("bn", "conv") if node.target in ahead else ("conv",)
        done.append(Fused(str(node.target), " + ".join((*first, *chain.parts))))
    known = {fused.name for fused in done}
    done += [Fused(name, "linear") for name in _freeze_linears(traced) if name not in known]
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        module = module_of(node)
        if isinstance(module, NORMS):
            more = unmerged.get(str(node.target))
            reason = "it does not follow a convolution alone" + (f"; {more}" if more else "")
            left.append(LeftAlone(str(node.target), reason))
        elif isinstance(module, SupportLayer) and not module.frozen:
            module.freeze()
    traced.delete_all_unused_submodules()
    traced.recompile()
    places = {str(node.target): place for place, node in enumerate(traced.graph.nodes)}
    # What nothing reads is gone.
    done = sorted((f for f in done if f.name in places), key=lambda f: places[f.name])
    return Folded(tuple(done), tuple(left), removed)


class _Chain(NamedTuple):
    """A convolution and the steps after it that it can take over.

    Attributes:
        nodes: the convolution first.
        parts: names of the other steps.
        bn: the batch normalisation.
        act: the activation.
        pool: the max-pooling, which is the last.
    """

    nodes: tuple[fx.Node, ...]
    parts: tuple[str, ...] = ()
    bn: nn.BatchNorm2d | None = None
    act: str = "none"
    pool: Pool | None = None

    @property
    def residual(self) -> fx.Node | None:
        """What is added, as the graph is now."""
        if "residual" not in self.parts:
            return None
        total = self.nodes[self.parts.index("residual") + 1]
        return next(n for n in total.all_input_nodes if n not in self.nodes)

    def shorter(self) -> _Chain:
        """Gives up everything from the sum on."""
        place = self.parts.index("residual")
        nodes, parts = self.nodes[: place + 1], self.parts[:place]
        return self._replace(nodes=nodes, parts=parts, act="none", pool=None)


class _Changes:
    """Where tensors are changed in place: what reads one may not be moved beyond that.

    Args:
        graph: each node's ``meta`` has ``alias`` and ``mutates``, where there are such.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.place = {node: place for place, node in enumerate(graph.nodes)}
        self._places: dict[fx.Node, list[int]] = {}
        for node, place in self.place.items():
            if "mutates" in node.meta:
                self._places.setdefault(_owner(node.meta["mutates"]), []).append(place)

    def next_of(self, tensor: Any, after: fx.Node) -> float:
        """Returns the place of the first change of a tensor's memory after a node."""
        if not isinstance(tensor, fx.Node):
            return math.inf
        places = self._places.get(_owner(tensor), [])
        return min((place for place in places if place > self.place[after]), default=math.inf)


def _owner(node: fx.Node) -> fx.Node:
    """Returns the node that made the memory in which a node's value lies."""
    while isinstance(node.meta.get("alias"), fx.Node):
        node = node.meta["alias"]
    return node


def _chain(conv: fx.Node, changes: _Changes) -> _Chain:
    chain = _Chain((conv,))
    end = changes.next_of(conv.args[0] if conv.args else None, conv)
    while len(chain.nodes[-1].users) == 1 and chain.pool is None:
        last, user = chain.nodes[-1], next(iter(chain.nodes[-1].users))
        if changes.place[user] > end:
            break
        module = module_of(user)
        summed = _is_sum(user, last)
        act, pool = _activation(user), _pool(user)
        step: dict[str, Any]
        if pool is not None:
            step = {"parts": (*chain.parts, "maxpool"), "pool": pool}
        elif chain.act != "none":
            break
        elif type(module) is nn.BatchNorm2d and not chain.parts and module.running_mean is not None:
            step = {"parts": ("bn",), "bn": module}
        elif summed and "residual" not in chain.parts:
            step = {"parts": (*chain.parts, "residual")}
            for other in user.all_input_nodes:
                end = min(end, changes.next_of(other, user))
        elif act is not None:
            step = {"parts": (*chain.parts, act), "act": act}
        else:
            break
        chain = chain._replace(nodes=(*chain.nodes, user), **step)
    return chain


def _is_sum(node: fx.Node, of: fx.Node) -> bool:
    """Tells whether a node is the plain sum of a value and another one of its shape."""
    others = [n for n in node.all_input_nodes if n is not of]
    if name_of(node) != "add" or len(others) != 1 or set(node.args) != {of, others[0]}:
        return False
    same = others[0].meta.get("shape") == of.meta.get("shape")
    return bool(same and node.kwargs.get("alpha", 1) == 1)


def _activation(node: fx.Node) -> str | None:
    name = name_of(node)
    module = module_of(node)
    if name in ("relu", "relu6", "silu"):
        return name
    if name == "gelu":
        exact = getattr(module, "approximate", node.kwargs.get("approximate", "none"))
        return "gelu" if exact == "none" and len(node.args) == 1 else None
    if name == "hardtanh":
        if isinstance(module, nn.Hardtanh):
            bounds: tuple[Any, ...] = (module.min_val, module.max_val)
        else:
            bounds = (
                *node.args[1:],
                *(node.kwargs[k] for k in ("min_val", "max_val") if k in node.kwargs),
            )
        return "relu6" if tuple(map(float, bounds)) == (0.0, 6.0) else None
    return None


def _pool(node: fx.Node) -> Pool | None:
    """Returns the max-pooling that a node is; None for another step, or a form we do not have."""
    if name_of(node) != "max_pool2d":
        return None
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    module = module_of(node)
    given: Any = node.args[1:] if module is None else [getattr(module, name) for name in names]
    found = dict(zip(names, given, strict=False))
    if module is None:
        found |= node.kwargs
    kernel = found["kernel_size"]
    pairs = [
        (v, v) if isinstance(v, int) else tuple(v)
        for v in (kernel, found.get("stride") or kernel, found.get("padding", 0))
    ]
    others = found.get("dilation", 1), found.get("ceil_mode"), found.get("return_indices")
    plain = others[0] in (1, (1, 1), [1, 1]) and not others[1] and not others[2]
    same = all(len(pair) == 2 and all(isinstance(v, int) for v in pair) for pair in pairs)
    return Pool(*pairs) if plain and same else None


def _why_not(module: nn.Module, node: fx.Node) -> str | None:
    """Says why a convolution cannot be fused; None also for what is no convolution."""
    if isinstance(module, nn.Conv2d):
        answer = _plain_conv2d(module)
        if isinstance(answer, Keep):
            return answer.reason
    elif not isinstance(module, SupportConv2d):
        return None
    if module.padding_mode != "zeros":
        return f"its padding mode is {module.padding_mode}"
    if isinstance(module, SupportConv2d) and not module._owns_weight:
        return "its weight is computed by a parametrisation"
    if len(node.meta.get("shape", ())) != 4:
        return "its input is a single image"
    calls = sum(n.op == "call_module" and n.target == node.target for n in node.graph.nodes)
    return f"it is called {calls} times" if calls > 1 else None


def _replace(
    traced: fx.GraphModule, node: fx.Node, conv: nn.Conv2d | SupportConv2d, chain: _Chain
) -> None:
    """Puts one fused layer in the place of a chain: at its end, where all operands are there."""
    set_module(traced, str(node.target), fuse(conv, chain.bn, chain.act, chain.pool).eval())
    residual = chain.residual
    data = node.args if residual is None else (*node.args, residual)
    last = chain.nodes[-1]
    with traced.graph.inserting_before(last):
        new = traced.graph.call_module(str(node.target), data)
    new.meta["shape"] = last.meta["shape"]
    last.replace_all_uses_with(new)
    for old in reversed(chain.nodes):
        traced.graph.erase_node(old)


def _freeze_linears(traced: fx.GraphModule) -> list[str]:
    """Freezes dense linear layers that share no weight; returns their names."""
    owners: dict[int, int] = {}
    for owner in traced.modules():
        for parameter in owner.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    done: list[str] = []
    for node in traced.graph.nodes:
        module = module_of(node)
        if type(module) is not nn.Linear or owners[id(module.weight)] > 1:
            continue
        support = Support.dense(module.in_features, module.out_features, 1)
        done.append(str(node.target))
        set_module(traced, done[-1], SupportLinear.from_linear(module, support).eval().freeze())
    return done


def _remove_idle(traced: fx.GraphModule) -> int:
    removed = 0
    for node in list(traced.graph.nodes):
        if name_of(node) in _IDLE and node.args and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
            removed += 1
    return removed


def _protect(traced: fx.GraphModule) -> None:
    """Makes what works in place on a tensor with other readers work out of place.

    A fused layer reads its input later than the convolution did; it must not have changed by then.
    """
    for node in traced.graph.nodes:
        if not node.args or not isinstance(node.args[0], fx.Node) or len(node.args[0].users) < 2:
            continue
        if any(is_after(user) and node in user.args[1:] for user in node.users):
            continue  # it changes a view: others read the memory that it changes
        module = module_of(node)
        if module is not None and getattr(module, "inplace", False):
            own = copy.copy(module)
            own.inplace = False  # type: ignore[assignment]
            name = f"{str(node.target).replace('.', '_')}_of_{node.name}"
            traced.add_submodule(name, own)
            node.target = name
        elif node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.target is operator.iadd:
            node.target = operator.add
        else:
            continue
        for key in ("alias", "mutates"):
            node.meta.pop(key, None)
    traced.recompile()
