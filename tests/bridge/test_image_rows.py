"""Skipping with images: gradients against TRL's own, for each way in which processors lay images out."""

import itertools

import picture_cases
import pytest
import torch
from launches import launch
from picture_cases import PLACES
from skipping_cases import ROUNDING, Steps, distances

from trl_learnalign.bridge import rollout_rows, skipping
from trl_learnalign.bridge.objective import DENOMINATORS
from trl_learnalign.bridge.rollout_rows import with_an_image
from trl_learnalign.bridge.skipping import install_skipping

WORKER = picture_cases.cases.ROOT / "tests" / "helpers" / "picture_worker.py"
FAMILIES, LOSSES = list(PLACES), list(DENOMINATORS)
POOLS = {"one": [1] * 12, "several": [2, 1, 3, 1] * 3}
GEOMETRIES = {
    "accumulated": {"gradient_accumulation_steps": 2},
    "all": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2},
}
# Every loss once, and with it every family and pool; the rest is slow.
GATED = [(FAMILIES[i % 4], loss, list(POOLS)[i // 4]) for i, loss in enumerate(LOSSES)]
PRODUCT = [
    case if case in GATED else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(FAMILIES, LOSSES, POOLS)
]


def trained(folder, skip, family, counts, **options):
    """A short run in float64, with rows without a gradient left out or not."""
    defaults = dict(
        policy=picture_cases.model(family).double(),
        data=picture_cases.dataset(counts),
        rewards=picture_cases.half_idle_reward,
        max_steps=4,
        logging_steps=100,
        max_grad_norm=0.0,
        learning_rate=1e-2,
        mixed=0 in counts,
    )
    trainer = picture_cases.trainer(folder, family, **{**defaults, **options})
    steps = Steps(trainer)
    skipper = install_skipping(trainer) if skip else None
    assert not isinstance(skipper, str), skipper
    trainer.train()
    return trainer, steps, skipper


def both(tmp_path, family, counts, **options):
    _, stock, _ = trained(tmp_path / "stock", False, family, counts, **options)
    _, ours, skipper = trained(tmp_path / "ours", True, family, counts, **options)
    assert sum(ours.rows) < sum(stock.rows)
    assert skipper.counts.rows_trained == sum(ours.rows)
    return stock, ours


@pytest.mark.parametrize(("family", "loss_type", "pool"), PRODUCT)
def test_gradients_are_those_of_all_rows(tmp_path, family, loss_type, pool):
    geometry = "all" if pool == "several" else "accumulated"
    stock, ours = both(tmp_path, family, POOLS[pool], loss_type=loss_type, **GEOMETRIES[geometry])
    assert max(distances(stock.gradients, ours.gradients)) < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_all_rows_where_some_have_no_image(tmp_path, family):
    stock, ours = both(tmp_path, family, [1, 0, 2, 0] * 3, gradient_accumulation_steps=2)
    assert max(distances(stock.gradients, ours.gradients)) < ROUNDING


def test_gradients_of_adapters_are_those_of_all_rows(tmp_path):
    options = dict(peft_config=picture_cases.adapter(), **GEOMETRIES["all"])
    stock, ours = both(tmp_path, "qwen2_vl", POOLS["several"], **options)
    assert stock.gradients[0].any()
    assert max(distances(stock.gradients, ours.gradients)) < ROUNDING


def test_images_of_other_rows_would_be_seen(tmp_path, monkeypatch):
    for_loss = rollout_rows.for_loss

    def turned(rows):
        return for_loss({**rows, "pixel_values": rows["pixel_values"][::-1]})

    monkeypatch.setattr(rollout_rows, "for_loss", turned)
    monkeypatch.setattr(skipping.rollout_rows, "for_loss", turned)
    stock, ours = both(tmp_path, "llava", POOLS["one"], gradient_accumulation_steps=2)
    assert max(distances(stock.gradients, ours.gradients)) > 1e3 * ROUNDING


def only_texts_reward(completions, images, **_):
    coins = picture_cases.cases.accuracy_reward(completions)
    return [coin * (not shown) for coin, shown in zip(coins, images, strict=True)]


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_weights_are_those_of_all_rows_where_no_useful_row_has_an_image(tmp_path, family):
    """Momentum and decay move a vision tower whose gradient is 0, and not one without a gradient."""
    adam = dict(
        max_steps=6,
        weight_decay=0.1,
        rewards=only_texts_reward,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
    )
    options = dict(counts=[1, 0, 2, 0] * 3, **adam)
    stock, _, _ = trained(tmp_path / "stock", False, family, **options)
    ours, steps, skipper = trained(tmp_path / "ours", True, family, **options)
    assert sum(steps.rows) < skipper.counts.rows_given
    for one, other in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_row_with_an_image_stays_if_no_other_row_shows_one():
    useful = [torch.tensor([True, False]).numpy(), torch.tensor([False, False]).numpy()]
    tokens = [torch.tensor([3, 9]).numpy(), torch.tensor([5, 4]).numpy()]
    images = [torch.tensor([0, 1]).numpy(), torch.tensor([2, 0]).numpy()]
    assert [rows.tolist() for rows in with_an_image(useful, images, tokens)] == [
        [True, False],
        [True, False],
    ]
    assert [rows.tolist() for rows in useful] == [[True, False], [False, False]]
    images[0][0] = 1
    assert not with_an_image(useful, images, tokens)[1].any()


def test_micro_batches_without_an_image_are_trained_on(tmp_path):
    """TRL's own are not: it passes pixels of no image. With no row left out, they are the same micro-batches."""
    options = dict(
        counts=[1, 0] * 6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        rewards=picture_cases.cases.length_reward,
    )
    with pytest.raises(ValueError, match="expected a non-empty list of Tensors"):
        trained(tmp_path / "stock", False, "qwen2_vl", **options)
    _, steps, _ = trained(tmp_path / "ours", True, "qwen2_vl", **options)
    assert all(gradient.any() for gradient in steps.gradients)


# ---- The two forms --------------------------------------------------------------------------------------------------


def generation(layout, counts):
    """A batch as TRL makes it of rows with so many images each; pixels have the image's number."""
    rows, images = len(counts), sum(counts)
    numbers = torch.arange(1.0, images + 1)
    batch = {
        "prompt_ids": torch.ones(rows, 4, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 4, dtype=torch.long),
        "completion_ids": torch.ones(rows, 3, dtype=torch.long),
        "completion_mask": torch.ones(rows, 3, dtype=torch.long),
        "advantages": torch.arange(1.0, rows + 1),
        "num_items_in_batch": torch.tensor(3 * rows),
        "num_images": list(counts),
    }
    if layout == "patches":
        grids = torch.tensor([[1, 2, 2 * (1 + i % 2)] for i in range(images)])
        batch["image_grid_thw"] = grids
        batch["pixel_values"] = numbers.repeat_interleave(grids.prod(1)).unsqueeze(1)
        batch["mm_token_type_ids"] = torch.arange(rows * 7).view(rows, 7)
    elif layout == "images":
        batch["pixel_values"] = numbers.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    elif layout == "sizes":
        batch["pixel_values"] = numbers.view(-1, 1, 1, 1, 1).expand(-1, 1 + images, 3, 2, 2)
        batch["image_sizes"] = torch.ones(images, 2)
    elif layout == "positions":
        batch["pixel_values"] = numbers.view(-1, 1, 1).expand(-1, 5, 2)
        batch["image_position_ids"] = numbers.view(-1, 1, 1).expand(-1, 5, 2)
    elif layout == "tiles":
        batch["num_tiles"] = [2 * count for count in counts]
        batch["pixel_values"] = numbers.repeat_interleave(2).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    elif layout == "shapes":
        batch["num_tiles"] = [2 * count for count in counts]
        tiles = numbers.repeat_interleave(2)
        batch["pixel_values"] = tiles.view(-1, 1, 1).expand(-1, 5, 2)
        batch["pixel_attention_mask"] = torch.ones(len(tiles), 5)
        batch["spatial_shapes"] = torch.ones(len(tiles), 2)
    else:
        most = max(counts)
        batch["pixel_values"] = torch.zeros(rows, most, 3, 2, 2)
        batch["pixel_attention_mask"] = torch.zeros(rows, most, 2, 2)
        number = iter(numbers)
        for row, count in enumerate(counts):
            for place in range(count):
                batch["pixel_values"][row, place] = next(number)
                batch["pixel_attention_mask"][row, place] = 1
    return batch


LAYOUTS = ["patches", "images", "sizes", "positions", "tiles", "shapes", "padded"]
PADDING = {
    **dict.fromkeys(["prompt_ids", "prompt_mask"], (rollout_rows.LEFT, 0)),
    **dict.fromkeys(["completion_ids", "completion_mask"], (rollout_rows.RIGHT, 0)),
    "advantages": None,
    **rollout_rows.IMAGE_PADDING,
}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 1, 3, 1], [2, 0, 0, 2], [0, 0, 3, 1]])
def test_rows_are_put_together_again(layout, counts):
    batch = generation(layout, counts)
    rows = rollout_rows.by_row(batch)
    assert not rollout_rows.unknown_entries(rows, PADDING)
    assert rollout_rows.image_counts(rows) == counts
    same(rollout_rows.for_loss(rows), batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 1, 3, 1], [2, 0, 0, 2]])
def test_rows_that_are_taken_bring_their_images(layout, counts):
    rows = rollout_rows.by_row(generation(layout, counts))
    taken = rollout_rows.for_loss(rollout_rows.take(rows, [3, 0]))
    numbers = torch.arange(1.0, sum(counts) + 1).split(counts)
    pixels = taken["pixel_values"]
    shown = pixels.flatten()[pixels.flatten() > 0].unique_consecutive()
    assert torch.equal(shown, torch.cat([numbers[3], numbers[0]]))
    assert taken["num_images"] == [counts[3], counts[0]]
    if layout == "patches":
        assert taken["image_grid_thw"].prod(1).sum() == len(pixels)
        assert torch.equal(taken["mm_token_type_ids"][0], torch.arange(21, 28))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_several_batches_are_joined(layout):
    """Also those of a batch in which no row has an image: TRL makes no entries for it."""
    first, second = (rollout_rows.by_row(generation(layout, c)) for c in ([1, 1], [3, 0]))
    texts = rollout_rows.by_row(
        {
            k: v
            for k, v in generation("images", [0, 0]).items()
            if k not in ("num_images", "pixel_values")
        }
    )
    assert rollout_rows.layout(texts) == []
    assert rollout_rows.layout(first) == rollout_rows.layout(second)
    whole = rollout_rows.join([texts, first, second], PADDING)
    assert rollout_rows.image_counts(whole) == [0, 0, 1, 1, 3, 0]
    batch = rollout_rows.for_loss(rollout_rows.take(whole, [0, 2, 3, 4]))
    expected = rollout_rows.by_row(generation(layout, [1, 1]))
    pixels = batch["pixel_values"].flatten()
    assert torch.equal(
        pixels[pixels > 0].unique_consecutive(), torch.tensor([1.0, 2.0, 1.0, 2.0, 3.0])
    )
    assert batch.keys() == rollout_rows.for_loss(expected).keys()
    assert not any(
        name in rollout_rows.for_loss(rollout_rows.take(whole, [0, 1]))
        for name in ("pixel_values",)
    )


def test_other_sizes_of_images_are_another_layout():
    one = rollout_rows.by_row(generation("images", [1, 1]))
    other = rollout_rows.by_row(generation("images", [1, 1]))
    other["pixel_values"] = [pixels[..., :1] for pixels in other["pixel_values"]]
    assert rollout_rows.layout(one) != rollout_rows.layout(other)


def test_images_that_trl_does_not_split_are_not_known():
    batch = generation("images", [1, 1])
    batch["pixel_values"] = batch["pixel_values"].repeat(3, 1, 1, 1)
    assert rollout_rows.unknown_entries(rollout_rows.by_row(batch), PADDING) == ["pixel_values"]


# ---- Two processes --------------------------------------------------------------------------------------------------

# Where some rows have no image, each process has others: TRL gathers images, and hangs if a process has none.
TWO = {
    "several": {"counts": [2, 1, 3, 1] * 4},
    "mixed": {"counts": [1, 0] * 8, "shuffle_dataset": False},
}
SCENARIOS = {
    f"{family}, {pool}": {"pictures": family, **options, **GEOMETRIES["accumulated"]}
    for family in FAMILIES
    for pool, options in TWO.items()
}


# Where gradients or weights are partitioned: one family, all of it and LoRA. With FSDP2 a stock trainer fails, because
# transformers calls the vision tower for generation outside of the pass that gathers its weights.
PARTITIONED = {
    name: {"pictures": "qwen2_vl", **TWO["several"], **GEOMETRIES["accumulated"], **options}
    for name, options in {"full": {}, "lora": {"lora": True}}.items()
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
def test_steps_of_two_processes_are_those_of_all_rows(tmp_path, backend):
    scenarios = SCENARIOS if backend == "ddp" else PARTITIONED
    for family in {options["pictures"] for options in scenarios.values()}:
        picture_cases.model(family).save_pretrained(tmp_path / family)
    found = launch(backend, tmp_path, scenarios, worker=WORKER)
    for name in scenarios:
        result = found[f"{name}, skipped"]
        assert result["processes"] == 2
        assert result["zero_stage"] == (int(backend[4]) if "zero" in backend else 0)
        assert result["sharded"] == (backend == "zero3")
        assert result["rows"][0] == result["rows"][1]
        assert sum(map(sum, result["rows"])) < sum(map(sum, found[name]["rows"]))
        stock = torch.load(tmp_path / f"{name}.pt")
        ours = torch.load(tmp_path / f"{name}, skipped.pt")
        assert float(((stock - ours).norm(dim=1) / stock.norm(dim=1)).max()) < 1e-4, name
