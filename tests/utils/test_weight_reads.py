"""Which layers' weights a forward reads without calling the layer, by its source: what counts, and what only asks about a weight."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora.utils.weight_reads import weight_reads


def project(x, layer):
    return F.linear(x, weight=layer.weight)


def with_parent(module, x):
    return x @ module.b.weight


def read_before(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return function(self, x) + x @ self.b.weight

    return wrapper


def hidden(function):
    def wrapper(self, x):
        return function(self, x)

    return wrapper


class Own(nn.Linear):
    def as_output(self, x):
        return x @ self.weight


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.own = nn.Linear(2, 2), nn.Linear(2, 2), Own(2, 2)
        self.items, self.named = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.ModuleDict({"k": nn.Linear(2, 2)})
        self.inner = nn.ModuleDict({"deep": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
        self.__dict__["beside"], self.__dict__["weights"] = [self.b], [self.b.weight]
        self.alias, self.sizes = self.b.weight, [3, object()]
        layer = self.b
        self.by_self, self.by_layer = (lambda x: x @ self.b.weight), (lambda x: F.linear(x, layer.weight))
        self.calls = lambda x: self.a(self.own(x))
        self.kept_method = self.helper

    def forward(self, x):
        return self.a(x) @ self.b.weight

    def helper(self, x, layer=None):
        return x @ (self.a if layer is None else layer).weight

    def last(self):
        return self.b

    def around(self):
        return self.around()

    @property
    def first(self):
        return self.a

    @property
    def scale(self):
        return self.a.weight.mean()


class Reads:
    """Each reads what its name says, and calls what it likes."""

    def b(self, x):
        return F.linear(x, self.b.weight, self.b.bias) + self.a(x)

    def b__in_a_branch(self, x):
        if self.training:
            return self.b(x)
        return torch.stack([x @ self.b.weight.t()])

    def b__by_a_variable(self, x):
        w = self.b.weight
        return x @ w.to(x.dtype)

    def b__by_a_module_variable(self, x):
        layer, other = self.b, self.a
        return x @ layer.weight + other(x)

    def b__by_getattr(self, x):
        return x @ getattr(self, "b").weight  # noqa: B009

    def b__walrus(self, x):
        return x @ w if (w := self.b.weight) is not None else x

    def b__by_its_name_among_parameters(self, x):
        named = dict(self.named_parameters())
        return self.a(x) @ named["b.weight"]

    def inner_deep__by_its_name_in_a_state(self, x):
        return F.linear(x, self.inner.state_dict(keep_vars=True)["deep.weight"])

    def b__by_a_getter(self, x):
        return x @ self.last().weight

    def b__in_a_function(self, x):
        return project(x, self.b)

    def b__in_a_function_of_self(self, x):
        return with_parent(self, x)

    @read_before
    def a_and_b__decorated(self, x):
        return x @ self.a.weight

    @hidden
    def b__behind_a_closure(self, x):
        return x @ self.b.weight

    def a__by_a_method(self, x):
        return self.helper(x)

    def a__by_a_method_handed_on(self, x):
        return torch.utils.checkpoint.checkpoint(self.helper, x)

    def a_and_b__by_a_method_with_an_argument(self, x):
        return self.helper(x, layer=self.b)

    def a__by_a_property(self, x):
        return x @ self.first.weight

    def a__in_a_property(self, x):
        return x * self.scale

    def b__by_a_lambda_on_self(self, x):
        return self.calls(self.by_self(x))

    def b__by_a_lambda_on_a_layer(self, x):
        return self.by_layer(x)

    def a__by_a_method_on_self(self, x):
        return self.kept_method(x)

    def own_and_b__by_a_method_of_their_class(self, x):
        return self.own.as_output(x) + nn.Linear.forward(self.b, x)

    def items_0_and_items_1__in_a_loop(self, x):
        for i, layer in enumerate(self.items):
            x = x @ layer.weight + i
        return x

    def items_0_and_items_1__zipped(self, x):
        return sum(x @ layer.weight for _, layer in zip(range(2), self.items, strict=True))

    def items_0_and_items_1__by_index(self, x):
        return x @ self.items[1].weight

    def named_k(self, x):
        return x @ self.named["k"].weight

    def named_k__by_values(self, x):
        for layer in self.named.values():
            x = x @ layer.weight
        return x

    def inner_deep__by_key(self, x):
        return self.inner["other"](x) @ self.inner["deep"].weight

    def inner_deep(self, x):
        return x @ self.inner.deep.weight

    def b__beside(self, x):
        return x @ self.beside[0].weight

    def b__around(self, x):
        return self.around() or x @ self.b.weight

    def b__cast(self, x):
        return torch.nn.functional.linear(x.type(torch.float32), self.b.weight.type(torch.float32))

    def b__by_get_parameter(self, x):
        return x @ self.get_parameter("b.weight")

    def b__by_the_table(self, x):
        return x @ self._modules["b"]._parameters["weight"]

    def b__by_its_parameters(self, x):
        weight, bias = self.b.parameters()
        return x @ weight + bias

    def b__by_a_list_of_parameters(self, x):
        return x @ list(self.b.parameters())[0]  # noqa: RUF015

    def b__by_named_parameters(self, x):
        return torch.func.functional_call(self.b, {name: 2 * p for name, p in self.b.named_parameters()}, (x,))

    def b__by_its_state_dict(self, x):
        return x @ self.b.state_dict()["weight"]

    def b__by_another_name(self, x):
        return x @ self.alias

    def b__in_a_list_of_weights(self, x):
        return x @ self.weights[0]

    def items_0_and_items_1__under_one_name(self, x):
        items = self.items
        for items in items:  # noqa: B020 (as SAM 2 does)
            x = x @ items.weight
        return x


class Asks:
    """None of these is a read."""

    def calls(self, x):
        return self.a(x) + self.b.forward(x) + self.own(x)

    def dtype(self, x):
        return self.a(x.to(self.a.weight.dtype).to(self.a.weight.device)) * self.b.weight.shape[0] + self.b.weight.size(0)

    def like(self, x):
        return self.a(x.to(self.a.weight)) + torch.zeros_like(self.b.weight) + self.b.weight.data_ptr()

    def types(self, x):
        return self.a(x) if isinstance(self.b.weight, torch.Tensor) and self.b.weight is not None and hasattr(self.b, "weight") else x

    def metadata_by_a_variable(self, x):
        w = self.b.weight
        return self.a(x.to(w.dtype))

    def bias(self, x):
        return self.a(x) - self.a.bias

    def type_of_tensor(self, x):
        return self.a(x.type(self.a.weight.type()))

    def first_parameter(self, x):
        dtype, device = next(self.b.parameters()).dtype, next(iter(self.b.parameters())).device
        return self.a(x.to(dtype).to(device)) * sum(p.numel() for p in self.b.parameters()) + list(self.b.parameters())[0].shape[0]  # noqa: RUF015

    def a_name_among_parameters(self, x):
        return self.a(x.to(dict(self.named_parameters())["b.weight"].dtype)) + self.state_dict()["b.bias"]

    def elements_of_other_lists(self, x):
        return self.a(x) * sum(size["x"] for size in self.sizes)

    def hands_on(self, x):
        return torch.utils.checkpoint.checkpoint(self.a, x) + sum(layer(x) for layer in self.items)


def names(cls):
    model = cls()
    found = weight_reads(model)
    return {name.replace(".", "_") for name, module in model.named_modules() if module in found}


@pytest.mark.parametrize("form", [name for name in vars(Reads) if not name.startswith("_")])
def test_what_is_read(form):
    read = names(type("Module", (Base,), {"forward": getattr(Reads, form)}))
    assert read == set(form.partition("__")[0].split("_and_"))


@pytest.mark.parametrize("form", [name for name in vars(Asks) if not name.startswith("_")])
def test_what_is_only_asked_about(form):
    assert names(type("Module", (Base,), {"forward": getattr(Asks, form)})) == set()


def test_the_base_class_is_followed():
    class Sub(Base):
        def forward(self, x):
            return super().forward(x) + super().helper(x)

    assert names(Sub) == {"a", "b"}


def test_a_forward_without_source_is_read_by_its_names():
    scope = {}
    exec("def forward(self, x):\n    return self.a(x) @ self.b.weight\ndef calls(self, x):\n    return self.a(x) + self.b(x)", scope)
    assert names(type("Module", (Base,), {"forward": scope["forward"]})) >= {"b"}
    assert names(type("Module", (Base,), {"forward": scope["calls"]})) == set()


def test_a_module_reads_its_own_weight():
    assert names(type("Module", (Base,), {"forward": Asks.calls})) == set()  # nn.Linear's forward has self.weight
    layer = nn.Linear(2, 2)
    layer.child = nn.Identity()
    assert weight_reads(layer) == {}


def test_the_function_that_reads_is_named():
    model = Base()
    assert weight_reads(model) == {model.b: "Base.forward"}
