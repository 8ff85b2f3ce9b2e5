"""What never changes in a program's loop is computed once."""

import pytest
import torch
from torch import fx

from neuralde.compiled.hoisting import hoist

ATEN, LOOP = torch.ops.aten, torch.ops.higher_order.while_loop


def part(make, inputs):
    """A graph of a loop: make(graph, *placeholders) -> its outputs."""
    graph = fx.Graph()
    places = []
    for i, x in enumerate(inputs):
        places.append(graph.placeholder(f"arg{i}"))
        places[-1].meta["val"] = x
    graph.output(make(graph, *places))
    return fx.GraphModule({}, graph)


def call(graph, target, *arguments):
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*fx.node.map_arg(arguments, lambda x: x.meta["val"]))
    return node


def looped(body, z, *captured):
    """The graph of a loop of three turns, carrying a number and z, of body(graph, z, *captured) -> z."""
    inputs = torch.zeros((), dtype=torch.int64), z, *captured
    root = torch.nn.Module()
    root.test = part(lambda graph, turn, *_: call(graph, ATEN.lt.Scalar, turn, 3), inputs)
    root.body = part(lambda graph, turn, *rest: (call(graph, ATEN.add.Scalar, turn, 1), body(graph, *rest)), inputs)
    graph = fx.Graph()
    places = [graph.placeholder(f"arg{i}") for i in range(len(inputs))]
    for place, x in zip(places, inputs, strict=True):
        place.meta["val"] = x
    parts = graph.get_attr("test"), graph.get_attr("body")
    loop = graph.call_function(LOOP, (*parts, tuple(places[:2]), tuple(places[2:])))
    graph.output(loop)
    return fx.GraphModule(root, graph), inputs


def targets(graph):
    return [x.target for x in graph.nodes if x.op == "call_function"]


def moved(made, inputs):
    """The operations in front of the loop and in it, after `hoist`; the results have to be what they were."""
    wanted = fx.Interpreter(made).run(*(x.clone() for x in inputs))
    hoist(made.graph)
    made.graph.lint()
    made.recompile()
    found = fx.Interpreter(made).run(*(x.clone() for x in inputs))
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    return targets(made.graph)[:-1], targets(made.body.graph)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def test_what_depends_on_nothing_carried_is_moved_with_the_views_behind_it():
    def body(graph, z, x, w):
        turned = call(graph, ATEN.permute.default, w, [1, 0])
        fixed = call(graph, ATEN.tanh.default, call(graph, ATEN.mm.default, x, turned))
        seen = call(graph, ATEN.view.default, fixed, [3, 2])
        return call(graph, ATEN.add.Tensor, call(graph, ATEN.mm.default, z, turned), seen)

    before, inside = moved(*looped(body, numbers(3, 2), numbers(3, 2), numbers(2, 2)))
    assert before == [ATEN.permute.default, ATEN.mm.default, ATEN.tanh.default]
    assert ATEN.tanh.default not in inside and inside.count(ATEN.mm.default) == 1
    assert ATEN.permute.default in inside and ATEN.view.default in inside  # views cost nothing where they are


def test_what_is_handed_back_stays():
    def body(graph, z, x):
        return call(graph, ATEN.mul.Scalar, x, 2.0)

    before, inside = moved(*looped(body, numbers(3), numbers(3)))
    assert before == [] and ATEN.mul.Scalar in inside


def test_what_is_overwritten_stays():
    def body(graph, z, x):
        fixed = call(graph, ATEN.mul.Scalar, x, 2.0)
        graph.call_function(ATEN.copy_.default, (x, z))
        return call(graph, ATEN.add.Tensor, z, fixed)

    made, _ = looped(body, numbers(3), numbers(3))
    hoist(made.graph)
    assert targets(made.graph) == [LOOP] and ATEN.mul.Scalar in targets(made.body.graph)


@pytest.mark.parametrize("target", [ATEN.rand_like.default, ATEN.bernoulli.default])
def test_random_numbers_stay(target):
    def body(graph, z, x):
        return call(graph, ATEN.add.Tensor, z, call(graph, target, call(graph, ATEN.sigmoid.default, x)))

    made, _ = looped(body, numbers(3), numbers(3))
    hoist(made.graph)
    assert targets(made.graph) == [ATEN.sigmoid.default, LOOP]
    assert target in targets(made.body.graph)
