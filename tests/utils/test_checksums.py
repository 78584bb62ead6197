"""The checksum sees every bit; the sampled digest sees the base and not the dtype it was loaded in."""

import pytest
import torch

from lightning_lora.utils.checksums import RUN, RUNS, bits, checksum, sampled_digest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_sees_any_flipped_bit_and_any_swap(dtype):
    tensor = (torch.randn(7, 3) * 10).to(dtype)
    before = checksum(tensor)
    assert before == checksum(tensor.clone())
    flat = bits(tensor).flatten()
    for position in (0, 10, 20):
        for bit in range(tensor.element_size() * 8 - 1):
            changed = flat.clone()
            changed[position] ^= 1 << bit
            assert checksum(changed) != before
    swapped = tensor.clone()
    swapped[0, 0], swapped[6, 2] = tensor[6, 2], tensor[0, 0]
    assert checksum(swapped) != before


def test_checksum_tells_zeros_apart_and_nans_alike():
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([torch.nan])) == checksum(torch.tensor([torch.nan]))


def test_checksum_does_not_care_for_strides_or_pieces():
    tensor = torch.randn(6, 5)
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    big = torch.arange((1 << 22) + 3, dtype=torch.int64)
    swapped = big.clone()
    swapped[[0, 1 << 22]] = big[[1 << 22, 0]]  # the same place in two pieces
    assert checksum(big) != checksum(swapped)


def test_checksum_is_one_number_for_good():
    """It is stored beside adapters: it may not change with a version."""
    assert checksum(torch.arange(5, dtype=torch.float32)) == checksum(torch.tensor([0.0, 1, 2, 3, 4]))
    assert checksum(torch.arange(8, dtype=torch.float32) / 7) == "77cada009e85c335"
    assert checksum(torch.arange(655365, dtype=torch.float32) / 7) == "86193a73a5fd1920"  # rows and a rest
    assert checksum(torch.zeros(0)) == "0" * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sampled_digest_is_the_same_in_every_dtype_that_holds_the_values(dtype):
    tensor = torch.randn(40, 9).bfloat16()
    assert sampled_digest(tensor.float()) == sampled_digest(tensor.to(dtype))


def test_a_checkpoint_rounded_to_bf16_is_the_same_base():
    tensor = torch.randn(40, 9)
    assert sampled_digest(tensor) == sampled_digest(tensor.bfloat16())


def test_sampled_digest_sees_shape_values_and_both_ends():
    tensor = torch.randn(50, 40)
    before = sampled_digest(tensor)
    assert sampled_digest(tensor.view(40, 50)) != before
    assert sampled_digest(tensor * 1.1) != before
    for position in (0, -1):
        changed = tensor.clone()
        changed.view(-1)[position] += 1
        assert sampled_digest(changed) != before


def test_sampled_digest_reads_all_of_a_small_tensor_and_few_entries_of_a_large_one():
    small = torch.randn(RUNS * RUN)
    for position in range(RUNS * RUN):
        changed = small.clone()
        changed[position] += 1
        assert sampled_digest(changed) != sampled_digest(small)
    large = torch.zeros(200_000)
    seen = [i for i in range(64) if sampled_digest(large.index_fill(0, torch.tensor([i]), 1.0)) != sampled_digest(large)]
    assert seen == list(range(RUN))  # the first run


def test_sampled_digest_sees_scattered_changes_as_often_as_it_says():
    """1,024 of the entries are read: a change of each with probability p is missed with probability (1 − p)^1024."""
    torch.manual_seed(0)
    tensor, tries = torch.zeros(300, 400), 200
    before = sampled_digest(tensor)
    for share in (0.0005, 0.002):
        missed = sum(sampled_digest((torch.rand(tensor.shape) < share).float()) == before for _ in range(tries)) / tries
        expected = (1 - share) ** (RUNS * RUN)
        assert abs(missed - expected) < 4 * (expected * (1 - expected) / tries) ** 0.5


@pytest.mark.parametrize("change", [lambda t: t.t().contiguous().t(), lambda t: t[:, ::2], lambda t: t.expand(3, 300, 400)])
def test_sampled_digest_is_of_the_entries_however_they_lie(change):
    tensor = change(torch.randn(300, 400))
    assert sampled_digest(tensor) == sampled_digest(tensor.contiguous())


@pytest.mark.parametrize("tensor", [torch.zeros(0, 3), torch.tensor(3.0), torch.tensor([1, 2])], ids=["empty", "scalar", "integers"])
def test_sampled_digest_of_odd_tensors(tensor):
    assert len(sampled_digest(tensor)) == 16
    assert sampled_digest(tensor) == sampled_digest(tensor.clone())
