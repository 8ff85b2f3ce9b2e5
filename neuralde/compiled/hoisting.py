"""What a loop in a program would compute anew at every turn although it never changes: computed once, before the loop.

In f(z, x) = tanh(W z + U x) that is U x; in a vector-Jacobian product of f at one state, all but the product itself.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, fx

_NUMBERS = itertools.count()


def hoist(graph: fx.Graph) -> None:
    """Moves it out of every `while_loop` of a graph of aten's operations. It changes numbers by rounding only."""
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) == "auto_functionalized_v2":
            node = _overwriting(graph, node) or node
        if node.op == "call_function" and str(node.target) == "while_loop":
            _Loop(graph, node).hoist()


@functools.cache
def as_pass():
    """`hoist` as Inductor takes a pass, with what its cache has to know of it."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Hoist(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            hoist(graph)

        def uuid(self):
            return get_hash_for_files((__file__,))

    return Hoist()


def _overwriting(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A loop that overwrites inputs of the program as what it is, and not as one that makes new ones of them.

    None where it is not known that nobody looks at what they were before.
    """
    (target,), given = node.args, dict(node.kwargs)
    bases = given.pop("_all_bases")
    if str(target) != "while_loop" or any(x.op != "placeholder" for x in bases):
        return None
    copies = {x for base in bases for x in base.users if x is not node}
    if any(x.target is not torch.ops.aten.copy_.default or x.args[1] not in node.users for x in copies):
        return None
    inputs = {}
    for kind in ("carried", "additional"):
        inputs[kind] = []
        for i in itertools.count():
            name = f"{kind}_input{i}"
            base = given.pop(f"_{name}_base_index", None)
            if name not in given and base is None:
                break
            inputs[kind].append(given.pop(name) if base is None else bases[base])
    if given.keys() != {"cond_fn", "body_fn", "_op_schema"}:  # views of them
        return None
    with graph.inserting_before(node):
        loop = graph.call_function(target, (given["cond_fn"], given["body_fn"], *map(tuple, inputs.values())))
    count = len(inputs["carried"])
    loop.meta.update(node.meta, val=node.meta["val"][:count])
    for x in copies:
        x.replace_all_uses_with(x.args[0])
        graph.erase_node(x)
    for part in list(node.users):
        if part.args[1] < count:
            part.replace_input_with(node, loop)
        else:
            part.replace_all_uses_with(bases[part.args[1] - count])
            graph.erase_node(part)
    graph.erase_node(node)
    return loop


class _Loop:
    """A loop, its two graphs, and where what they are given comes from."""

    def __init__(self, graph: fx.Graph, node: fx.Node):
        self.graph, self.node, self.owner = graph, node, graph.owning_module
        test, body, carried, captured = node.args
        self.parts = [getattr(self.owner, part.target) for part in (test, body)]
        self.body = self.parts[1].graph
        places = [x for x in self.body.nodes if x.op == "placeholder"]
        # What of the body there is in the graph around it: node -> node.
        self.outside = dict(zip(places[len(carried) :], captured, strict=True))

    def hoist(self) -> None:
        """Moves what never changes in front of the loop."""
        fixed = self._fixed()
        wanted = [x for x in fixed if _computes(x) and _leads_out(x, fixed)]
        if not wanted:
            return
        needed = _behind(wanted)
        with self.graph.inserting_before(self.node):
            for x in fixed:
                if x in needed and x not in self.outside:
                    self.outside[x] = self._copied(x)
        for part in self.parts:
            places = [x for x in part.graph.nodes if x.op == "placeholder"]
            for x in wanted:
                with part.graph.inserting_after(places[-1]):
                    places.append(part.graph.placeholder(f"hoisted_{next(_NUMBERS)}"))
                places[-1].meta.update(x.meta)
                if part is self.parts[1]:
                    x.replace_all_uses_with(places[-1])
            part.graph.eliminate_dead_code()
            part.recompile()
        test, body, carried, captured = self.node.args
        self.node.args = test, body, carried, (*captured, *(self.outside[x] for x in wanted))

    def _fixed(self) -> dict[fx.Node, None]:
        """The nodes of the body that are the same at every turn, in order."""
        written = {_root(x) for node in self.body.nodes for x in _overwritten(node)}
        # A loop may hand back nothing that it was given.
        (output,) = (x for x in self.body.nodes if x.op == "output")
        handed = {_root(x) for x in output.all_input_nodes}
        fixed = {}
        for x in self.body.nodes:
            if x.op == "call_function":
                same = _is_pure(x) and x not in handed and all(y in fixed for y in x.all_input_nodes)
            else:
                same = x.op == "get_attr" or x in self.outside
            if same and x not in written:
                fixed[x] = None
        return fixed

    def _copied(self, x: fx.Node) -> fx.Node:
        if x.op != "get_attr":
            return self.graph.node_copy(x, lambda y: self.outside[y])
        name = f"_hoisted_{next(_NUMBERS)}"
        setattr(self.owner, name, getattr(self.parts[1], x.target))
        copy = self.graph.get_attr(name)
        copy.meta.update(x.meta)
        return copy


def _is_pure(x: fx.Node) -> bool:
    """Whether a call gives the same for the same, and does nothing else."""
    if not isinstance(x.target, torch._ops.OpOverload):
        return getattr(x.target, "__module__", None) == "_operator"
    return not x.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in x.target.tags


def _is_view(x: fx.Node) -> bool:
    """Whether what a node gives is what it was given, looked at in another way."""
    target = x.target
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)


def _computes(x: fx.Node) -> bool:
    """Whether a node of the body is worth to be moved: not what is made of nothing, and no view."""
    if x.op != "call_function" or not x.all_input_nodes or not isinstance(x.meta.get("val"), Tensor):
        return False
    source = x.args[0] if getattr(x.target, "__name__", "") == "getitem" else x
    return not _is_view(source)


def _leads_out(x: fx.Node, fixed: dict[fx.Node, None]) -> bool:
    """Whether a node, or a view of it, is used by one that changes."""
    return any(user not in fixed or (not _computes(user) and _leads_out(user, fixed)) for user in x.users)


def _behind(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are made of."""
    found, todo = set(), list(nodes)
    while todo:
        x = todo.pop()
        if x not in found:
            found.add(x)
            todo += x.all_input_nodes
    return found


def _overwritten(x: fx.Node) -> list[fx.Node]:
    """What a call changes in place."""
    if x.kwargs.get("mutated_arg_indices"):  # of a loop inside
        return x.all_input_nodes
    if x.op != "call_function" or not isinstance(x.target, torch._ops.OpOverload):
        return []
    named = {**dict(zip((a.name for a in x.target._schema.arguments), x.args, strict=False)), **x.kwargs}
    writes = {a.name for a in x.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return [y for name, y in named.items() if name in writes and isinstance(y, fx.Node)]


def _root(x: fx.Node) -> fx.Node:
    """What a view is a view of."""
    while x.op == "call_function" and _is_view(x) and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x
