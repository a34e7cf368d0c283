import pytest

from trl_learnalign.cli.arguments import Batch, batch_of, resolve_batch


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_processes_that_divide_the_batch_make_exactly_it(processes):
    batch = batch_of(48, 8, processes, 8)
    assert batch.completions == batch.per_device * processes * batch.accumulation == 48
    assert batch.per_device <= 8


@pytest.mark.parametrize(
    ("processes", "completions"), [(5, 40), (7, 56), (9, 72), (32, 64), (64, 64)]
)
def test_others_make_the_nearest_with_whole_groups(processes, completions):
    batch = batch_of(48, 8, processes, 8)
    assert batch.completions == completions
    assert completions % 8 == completions % processes == 0


def test_memory_decides_the_micro_step():
    assert batch_of(48, 8, 1, 8) == Batch(8, 1, 6)
    assert batch_of(48, 64, 1, 8) == Batch(48, 1, 1)
    assert batch_of(48, 1, 2, 8) == Batch(1, 2, 24)
    assert batch_of(64, 8, 6, 1).completions == 66  # no groups to keep: the nearest multiple of 6


@pytest.mark.parametrize(
    ("wanted", "per_device", "message"),
    [
        (
            50,
            8,
            r"completions_per_step=50 is not a multiple of num_generations=8.*Set it to 48 or 56",
        ),
        (4, 8, r"completions_per_step=4 is not a multiple.*Set it to 8\."),
        (0, 8, r"completions_per_step=0: give a whole number of at least 1"),
        (48, 0, r"per_device_train_batch_size=0: give a whole number"),
    ],
)
def test_batches_that_cannot_be(wanted, per_device, message):
    with pytest.raises(ValueError, match=message):
        batch_of(wanted, per_device, 1, 8)


def settle(command_line, file, processes=1, per_device=8):
    names = {"completions": "completions_per_step", "accumulation": "gradient_accumulation_steps"}
    given = (
        {names[name]: value for name, value in place.items()} for place in (command_line, file)
    )
    return resolve_batch(*given, per_device, processes, 8)


def test_the_command_line_wins_and_says_so():
    batch, remarks = settle({"accumulation": 1}, {"completions": 48})
    assert batch == Batch(8, 1, 1)
    assert remarks == [
        "gradient_accumulation_steps=1 was given on the command line: an optimizer step has 8 completions (8 per "
        "device x 1 process(es) x 1 accumulated), not the 48 of completions_per_step."
    ]
    assert settle({"completions": 16}, {"completions": 48, "accumulation": 6}) == (
        Batch(8, 1, 2),
        [],
    )


def test_an_accumulation_that_agrees_is_no_contradiction():
    assert settle({"accumulation": 1}, {"completions": 48}, processes=6) == (Batch(8, 6, 1), [])
    assert settle({"accumulation": 1}, {"completions": 48}, processes=8) == (Batch(6, 8, 1), [])
    assert settle({}, {"completions": 48, "accumulation": 6}) == (Batch(8, 1, 6), [])


@pytest.mark.parametrize("place", [0, 1])
def test_a_contradiction_at_one_place_is_refused(place):
    given = [{}, {}]
    given[place] = {"completions": 48, "accumulation": 3}
    with pytest.raises(
        ValueError,
        match=r"means gradient_accumulation_steps=6 .*=3 is also given, which means 24 compl",
    ):
        settle(*given)


def test_what_cannot_be_met_is_said():
    batch, (remark,) = settle({}, {"completions": 48}, processes=7)
    assert batch.completions == 56
    assert "is not possible with 7 processes: an optimizer step has 56 completions" in remark
    batch, (remark,) = settle({}, {"completions": 48}, per_device=7)
    assert batch == Batch(6, 1, 8)
    assert "per_device_train_batch_size=7 does not divide the 48 completions" in remark
