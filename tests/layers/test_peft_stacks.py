"""PEFT's two forms of the factors of stacked weights."""

import pytest
import torch

from lightning_lora.layers.peft_stacks import from_file, is_exchanged, to_file

E, R, IN, OUT = 3, 2, 5, 4
A, B = torch.arange(E * R * IN).view(E, R, IN).double(), torch.arange(E * OUT * R).view(E, OUT, R).double() + 100


@pytest.mark.parametrize("exchanged", [False, True])
def test_there_and_back_and_the_update_as_peft_computes_it(exchanged):
    first, second = to_file(A, B, exchanged=exchanged)
    assert first.shape == (E * R, OUT if exchanged else IN) and second.shape == (IN if exchanged else OUT, R * E)
    assert all(torch.equal(*pair) for pair in zip(from_file(first, second, E, exchanged=exchanged), (A, B), strict=True))
    # ParamWrapper.get_delta_weight
    delta = torch.einsum("o r e, e r i -> e o i", second.reshape(len(second), -1, E), first.reshape(E, -1, first.shape[-1]))
    assert torch.equal(delta.mT if exchanged else delta, B @ A)


@pytest.mark.parametrize(
    ("shape", "transposed", "flagged", "version", "expected"),
    [
        ((E, OUT, IN), False, False, None, True),  # the sizes tell
        ((E, OUT, IN), True, True, "0.18.1", True),
        ((E, IN, OUT), False, False, "0.18.0", False),
        ((E, IN, OUT), True, False, None, False),
    ],
)
def test_sizes_decide(shape, transposed, flagged, version, expected):
    first, second = torch.zeros(E * R, OUT), torch.zeros(IN, R * E)
    assert is_exchanged(first, second, shape, transposed, flagged, version) is expected


@pytest.mark.parametrize(
    ("transposed", "flagged", "version", "expected"),
    [
        (False, False, "0.21.2", False),
        (False, False, "0.18.0", True),
        (True, True, "0.19.0.dev0", False),
        (True, True, "0.17.1", False),
        (True, False, "1.0", True),  # Llama 4
        (True, False, "0.18", False),
    ],
)
def test_square_matrices_go_by_the_release(transposed, flagged, version, expected):
    assert is_exchanged(torch.zeros(E * R, 4), torch.zeros(4, R * E), (E, 4, 4), transposed, flagged, version) is expected


@pytest.mark.parametrize("version", [None, "", "main"])
def test_without_a_release_they_are_refused(version):
    with pytest.raises(ValueError, match=r"its matrices are square \(4\)"):
        is_exchanged(torch.zeros(E * R, 4), torch.zeros(4, R * E), (E, 4, 4), False, False, version)


@pytest.mark.parametrize(
    ("first", "second"), [((7, IN), (OUT, 7)), ((6, IN), (OUT, 3)), ((6, IN), (IN, 6)), ((6, 9), (OUT, 6)), ((6, IN, 1), (OUT, 6))]
)
def test_other_shapes_are_no_pair(first, second):
    with pytest.raises(ValueError, match="are no pair for 3 experts of 5 inputs and 4 outputs"):
        is_exchanged(torch.zeros(first), torch.zeros(second), (E, OUT, IN), False, False, "0.21.0")
