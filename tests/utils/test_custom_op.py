"""Operations that a compiler does not look into."""

import torch

from lightning_lora.utils.custom_op import dispatch, register_custom_op


def first_and_double(x):
    return [x, x * 2]


def twice(x):
    return [torch.empty_like(x), torch.empty_like(x)]


register_custom_op("first_and_double(Tensor x) -> Tensor[]", first_and_double, twice)


register_custom_op(
    "last_of(Tensor x, Tensor?[] others) -> Tensor[]", lambda x, others: [others[-1]], lambda x, others: [others[-1].clone()]
)


def test_eager_code_calls_the_function_itself():
    x = torch.ones(3)
    assert dispatch(first_and_double, x)[0] is x


def test_as_an_operation_it_hands_back_no_argument():
    x = torch.ones(3)
    same, double = torch.ops.lightning_lora.first_and_double(x)
    assert torch.equal(same, x) and same.data_ptr() != x.data_ptr()
    assert torch.equal(double, x * 2)


def test_nor_one_from_a_list():
    x = torch.ones(3)
    (last,) = torch.ops.lightning_lora.last_of(torch.zeros(3), [None, x])
    assert torch.equal(last, x) and last.data_ptr() != x.data_ptr()


def test_a_compiler_sees_one_operation():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: dispatch(first_and_double, x + 1)[1] * 3, backend=backend, fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 12.0))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count("lightning_lora.first_and_double.default") == 1
    assert sum("mul" in name for name in called) == 1  # the one after it: what is inside is not looked into


def test_a_compiled_operation_gives_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dispatch(first_and_double, x + 1)[1] * 3, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 12.0))
