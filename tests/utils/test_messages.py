from lightning_lora.utils.messages import listed


def test_of_many_names_the_first_are_listed():
    assert listed(["a", "b"]) == "['a', 'b']" and listed([]) == "[]"
    assert listed([str(i) for i in range(1000)], most=2) == "['0', '1', ... 1000 in all]"
