from lightning_lora.utils.messages import counted, listed


def test_of_many_names_the_first_are_listed():
    assert listed(["a", "b"]) == "['a', 'b']" and listed([]) == "[]"
    assert listed([str(i) for i in range(1000)], most=2) == "['0', '1', ... 1000 in all]"


def test_a_number_with_its_noun_and_verb():
    assert counted(1, "module") == "1 module" and counted(0, "module") == "0 modules" and counted(1000, "module") == "1,000 modules"
    assert [counted(2, noun) for noun in ("batch", "process", "entry", "key")] == ["2 batches", "2 processes", "2 entries", "2 keys"]
    assert [counted(n, "tensor", "are") for n in (1, 2)] == ["1 tensor is", "2 tensors are"]
    assert counted(1, "parameter", "that should train are") == "1 parameter that should train is"
