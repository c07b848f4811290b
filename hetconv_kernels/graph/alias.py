# SPDX-License-Identifier: Apache-2.0
"""Views and what changes them in place, said in the graph.

``y[:, :4].mul_(2)`` changes y, though no node that reads y shows it. `say` lets every node read the
value that it gets: after a change, readers of the changed tensor read the result of the change, and
readers of other tensors in the same memory read ``after(tensor, ...)``, which is that tensor and
costs nothing.

Example: ``y = conv(x); v = y[:, :4]; m = v.mul_(2); z = head(y)`` reads ``head(after(y, m, v))`` at
its end: y as it is when m has changed its view v.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


def after(tensor: Tensor, *changes: Any) -> Tensor:
    """Returns a tensor as it is after what changed its memory.

    Args:
        tensor: whose memory was changed.
        changes: of the tensor that owns the memory, the result of the change and the view that it
            changed; of another view, the owner as it is after the change.
    """
    return tensor


def is_after(node: Any) -> bool:
    """Tells whether a node is such a tensor."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is after


def changed_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Finds the values that share memory with one that is changed and then read.

    A copy of such a value, in another dtype for example, would not change with it.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not is_after(node):
            continue
        found.add(node)
        owner = node.args[0]
        for part in node.args:
            while isinstance(part, fx.Node) and part is not owner and part.op != "call_module":
                found.add(part)
                part = part.args[0] if part.args else None
            if isinstance(part, fx.Node):
                found.add(part)
    return found


def say(traced: fx.GraphModule) -> bool:
    """Rewrites a recorded graph; tells whether anything was changed in place.

    Args:
        traced: each node's ``meta`` has ``alias`` (the operand whose memory its value shares) and
            ``mutates`` (the operand that it changes), where there are such.
    """
    nodes = list(traced.graph.nodes)
    if not any("mutates" in node.meta for node in nodes):
        return False
    owner: dict[fx.Node, fx.Node] = {}
    now: dict[fx.Node, fx.Node] = {}  # what stands for a node's value at this point
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        node.args, node.kwargs = (
            fx.map_arg(part, lambda n: _current(n, owner, now)) for part in (node.args, node.kwargs)
        )
        alias = node.meta.get("alias")
        owner[node] = node if alias is None else owner[alias]
        family.setdefault(owner[node], []).append(node)
        changed = node.meta.get("mutates")
        if changed is None:
            continue
        root = owner[changed]
        old_root, view = now.get(root, root), now.get(changed, changed)
        result = node
        if alias is None:  # gives something else than what it changes
            with traced.graph.inserting_after(node):
                result = traced.graph.call_function(after, (view, node, view))
        if changed is root:
            new_root = result
        else:
            with traced.graph.inserting_after(result):
                new_root = traced.graph.call_function(after, (old_root, result, view))
        now[root] = new_root
        for other in family[root]:
            if other not in (root, changed, node):
                now.pop(other, None)
                _stale(now, other, new_root)
        now[changed] = result
        now.pop(node, None)
    traced.graph.lint()
    traced.recompile()
    return True


class _Later:
    """A view that nobody has read yet since the owner of its memory was changed."""

    def __init__(self, root: fx.Node) -> None:
        self.root = root


def _stale(now: dict[fx.Node, Any], view: fx.Node, root: fx.Node) -> None:
    now[view] = _Later(root)


def _current(node: fx.Node, owner: dict[fx.Node, fx.Node], now: dict[fx.Node, Any]) -> fx.Node:
    """Returns what stands for a node's value, made where it is first read."""
    found = now.get(node, node)
    if isinstance(found, _Later):
        with node.graph.inserting_after(found.root):
            found = node.graph.call_function(after, (node, found.root))
        now[node] = found
    assert isinstance(found, fx.Node)
    return found
