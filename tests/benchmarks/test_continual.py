"""The continual table: the quick loop against transformers and TRL, what lines are charged, how curves are read."""

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("reasoning_gym")

import cases
from loading import benchmark_modules
from transformers import AutoModelForCausalLM

MODULES = (
    *("continual.product", "continual.report", "continual.table", "continual.quick"),
    *(
        "continual.group_size",
        "continual.cells",
        "continual.loop",
        "selection.table",
        "selection.cells",
    ),
    *("selection.report", "common"),
)


@pytest.fixture(scope="module")
def bench():
    with benchmark_modules(*MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def base(bench):
    return bench["selection.cells"].PUBLISHED_BASE


@pytest.fixture
def policy(bench, base):
    return bench["continual.loop"].Policy(base, 2e-4, seed=1)


@pytest.fixture(scope="module")
def pool(bench):
    return bench["selection.cells"].tasks("longtail", 60, 3, "dev")


@pytest.fixture
def rollouts(policy, pool):
    rows = np.arange(12)
    return policy.roll_out(rows, policy.tokens_of(pool)[:12], pool["answer"][:12], 8, 5)


# ---- the quick loop -------------------------------------------------------------------------------------------------


def texts(rollouts):
    """Prompts and completions side by side, `(P G, L + T)`, and their mask."""
    group = rollouts.rewards.shape[1]
    tokens = torch.cat(
        [rollouts.prompt_tokens.repeat_interleave(group, 0), rollouts.tokens.flatten(0, 1)], dim=1
    )
    mask = torch.cat(
        [rollouts.prompt_mask.repeat_interleave(group, 0), rollouts.mask.flatten(0, 1).long()],
        dim=1,
    )
    return tokens, mask


def test_states_are_those_of_transformers(bench, policy, rollouts):
    tokens, mask = texts(rollouts)
    positions, allowed = bench["continual.loop"]._reading(mask)
    own = policy.model.logits(policy.model.states(tokens, positions, allowed)[0])
    theirs = policy.hf_model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(own[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)


def test_prompts_are_tokenised_as_the_chat_template_does(policy, pool):
    wanted = policy.tokenizer.apply_chat_template(list(pool["prompt"]), add_generation_prompt=True)
    wanted = wanted if isinstance(wanted, list) else wanted["input_ids"]
    assert policy.tokens_of(pool) == wanted


def test_rollouts_are_drawn_from_the_policy(bench, policy, pool):
    rows = np.arange(6)
    prompts, answers = policy.tokens_of(pool)[:6], pool["answer"][:6]
    right = (
        sum(policy.roll_out(rows, prompts, answers, 200, number).right for number in range(5))
        / 1000
    )
    truth = bench["continual.loop"].success_rates(policy, prompts, answers)
    assert np.abs(right - truth).max() < 4 * np.sqrt(0.25 / 1000)
    assert truth.max() > 0.05


def test_rollouts_are_a_function_of_seed_and_number(bench, base, policy, pool, rollouts):
    again = bench["continual.loop"].Policy(base, 2e-4, seed=1)
    same = again.roll_out(np.arange(12), again.tokens_of(pool)[:12], pool["answer"][:12], 8, 5)
    assert torch.equal(same.tokens, rollouts.tokens)
    other = again.roll_out(np.arange(12), again.tokens_of(pool)[:12], pool["answer"][:12], 8, 6)
    assert not torch.equal(other.rewards, rollouts.rewards)


def test_rewards_are_those_of_the_toy_tasks(policy, pool, rollouts):
    from trl_learnalign.toy.tasks import accuracy_reward

    completions = policy.tokenizer.batch_decode(
        rollouts.tokens.flatten(0, 1), skip_special_tokens=True
    )
    wanted = [answer for answer in pool["answer"][:12] for _ in range(8)]
    assert rollouts.rewards.flatten().tolist() == accuracy_reward(completions, wanted)


@pytest.mark.parametrize("baseline", ["group", "other"])
def test_the_update_is_trls(policy, base, rollouts, tmp_path, baseline):
    """Gradient of TRL's own loss, of all rows, those without an advantage too."""
    assert 0 < (rollouts.rewards.std(dim=1) == 0).sum() < 12  # some groups have no gradient
    rewards = rollouts.rewards
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    if baseline == "other":
        advantages = rewards - torch.linspace(0.2, 1, 12).unsqueeze(1)
        advantages[advantages.abs() < 0.3] = 0.0
        assert ((advantages == 0).any(1) & (advantages != 0).any(1)).any()  # rows, not groups
    loss = policy.loss(rollouts, None if baseline == "group" else advantages)
    loss.backward()
    trainer = cases.trainer(
        tmp_path,
        AutoModelForCausalLM.from_pretrained(base),
        num_generations=8,
        max_completion_length=10,
    )
    inputs = {
        "prompt_ids": rollouts.prompt_tokens.repeat_interleave(8, 0),
        "prompt_mask": rollouts.prompt_mask.repeat_interleave(8, 0),
        "completion_ids": rollouts.tokens.flatten(0, 1),
        "completion_mask": rollouts.mask.flatten(0, 1).long(),
        "advantages": advantages.flatten(),
        "num_items_in_batch": rollouts.mask.sum(),
    }
    trainer.model.eval()
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-6)
    for own, other in zip(policy.hf_model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_a_batch_without_a_gradient_still_makes_a_step(policy, rollouts):
    solved = np.flatnonzero((rollouts.rewards.std(dim=1) == 0).numpy())
    assert policy.loss(rollouts.select(solved)) is None
    policy.update(rollouts)
    before = [parameter.clone() for parameter in policy.hf_model.parameters()]
    policy.update(rollouts.select(solved))  # the optimizer's momentum goes on, as in the trainer
    assert any((a != b).any() for a, b in zip(before, policy.hf_model.parameters(), strict=True))


def test_joined_batches_have_the_loss_of_their_rows(bench, policy, pool, rollouts):
    rows = np.arange(12, 20)
    more = policy.roll_out(rows, policy.tokens_of(pool)[12:20], pool["answer"][12:20], 8, 9)
    joined = bench["continual.loop"].Rollouts.joined([rollouts, more])
    parts = [policy.loss(part).item() * int(part.mask.sum()) for part in (rollouts, more)]
    assert policy.loss(joined).item() == pytest.approx(
        sum(parts) / int(joined.mask.sum()), rel=1e-4, abs=1e-6
    )


# ---- lines, curves, the table ---------------------------------------------------------------------------------------


def test_tokens_are_charged_as_the_ledger_charges_them(bench):
    from trl_learnalign.records.notes import Cost

    spent = bench["continual.cells"].Spent(generated=10, read=7, trained=5)
    assert (
        spent.compute(1)
        == Cost(tokens_generated=10, tokens_prompt=7, tokens_trained=5).forward_equivalents
    )
    assert spent.compute(3) == spent.compute(1) + 20


def test_budgets_are_learnaligns_compute(bench):
    found = bench["continual.cells"].learnalign_compute("sparse")
    assert found[1] == pytest.approx(516_242, rel=1e-3)
    assert found[3] > found[1]


def test_a_curve_is_evaluated_whenever_a_mark_of_any_price_is_passed(bench):
    cells = bench["continual.cells"]
    curve, due = cells.Curve({1: 100.0, 3: 400.0}), []
    for step in range(1, 200):
        spent = cells.Spent(generated=step, read=0, trained=0)
        if curve.due(spent):
            due.append(step)
            curve.add(step, spent, step / 1000)
        if curve.finished:
            break
    # Every 10 tokens of the first budget, every 40 / 3 of the second.
    assert due == sorted({*range(10, 101, 10), *(-(-40 * k // 3) for k in range(1, 11))})
    assert curve.at(1, 0.2)["step"] == 20
    assert curve.at(3, 0.5)["step"] == 67
    assert len(curve.rows()) == 20
    assert {row["accuracy"] for row in curve.rows() if row["mark"] == 1.0} == {0.1, 0.134}


def test_the_compute_that_reaches_an_accuracy_lies_between_points(bench):
    reach = bench["continual.cells"].compute_to_reach
    assert reach([1, 2, 3], [0.1, 0.3, 0.2], 0.2) == pytest.approx(1.5)
    assert reach([1, 2, 3], [0.1, 0.3, 0.2], 0.05) == 1
    assert reach([1, 2, 3], [0.1, 0.3, 0.2], 0.4) is None


def rows_of(name, seed, accuracies, regime="sparse"):
    return [
        {
            "regime": regime,
            "selector": name,
            "seed": seed,
            "price": 1,
            "mark": mark,
            "accuracy": value,
        }
        for mark, value in zip((0.5, 1.0), accuracies, strict=True)
    ]


def test_compute_to_full_is_measured_against_the_whole_pools_mean(bench, tmp_path):
    rows = bench["continual.table"].Rows(tmp_path / "table.parquet")
    rows.add(rows_of("full", 0, (0.2, 0.4)) + rows_of("full", 1, (0.2, 0.2)))  # 0.3 on average
    rows.add(rows_of("adaptive", 0, (0.2, 0.4)) + rows_of("skip", 0, (0.1, 0.2)))
    again = bench["continual.table"].Rows(tmp_path / "table.parquet")
    assert again.done == {
        ("sparse", *key) for key in (("full", 0), ("full", 1), ("adaptive", 0), ("skip", 0))
    }
    found = again.frame().set_index(["selector", "seed", "mark"])["compute_to_full"]
    assert found["adaptive", 0, 1.0] == pytest.approx(0.75)
    assert np.isnan(found["skip", 0, 1.0])
    assert np.isnan(found["full", 1, 0.5])
    # Asked again, with more of the whole pool's runs: the mean moves, and nothing is there twice.
    again.add(rows_of("full", 2, (0.2, 0.0)))
    found = again.frame()
    assert len(found) == 10
    assert found.set_index(["selector", "seed", "mark"])["compute_to_full"][
        "adaptive", 0, 1.0
    ] == pytest.approx(0.5)


SMALL = {"pool": 40, "held_out": 20, "prompts_per_step": 4}
BUDGETS = {1: 20_000.0, 3: 25_000.0}


@pytest.fixture(scope="module")
def curves(bench):
    """Every line at a tiny size."""
    driver = bench["continual.quick"].QuickDriver(bench["selection.cells"].Settings(**SMALL))
    lines = {
        name: line for name, line in bench["continual.cells"].LINES.items() if line.selector is None
    }
    return {name: driver("sparse", 100, line, BUDGETS, "dev") for name, line in lines.items()}


@pytest.fixture(scope="module")
def products(bench):
    """Lines as the package's callback trains them."""
    driver = bench["continual.product"].CallbackDriver(
        bench["selection.cells"].Settings(**SMALL, warmup=8, feature_dim=64)
    )
    lines = bench["continual.cells"].LINES
    names = "full", "skip", "posterior", "adaptive_oversampled", "learnalign", "learnalign_adaptive"
    names += ("full, G = 4",)
    return {name: driver("sparse", 100, lines[name], BUDGETS, "dev") for name in names}


def test_the_callback_spends_the_budgets_and_little_more(bench, products):
    for name, curve in products.items():
        rows = curve.rows()
        assert {row["price"] for row in rows} == {1, 3}
        for row in rows:
            spent = (
                bench["continual.cells"]
                .Spent(*(row[part] for part in ("generated", "read", "trained", "forward")))
                .compute(row["price"])
            )
            assert spent >= row["mark"] * row["budget_compute"]
            if row["mark"] == 1.0 and "learnalign" not in name:  # a step is a twentieth of it
                assert spent < 1.15 * row["budget_compute"]


def test_what_the_callback_charges_is_what_was_done(products):
    last = {name: curve.points[-1] for name, curve in products.items()}
    full, skip = last["full"], last["skip"]
    assert full["trained"] == full["generated"] + full["read"]
    assert skip["trained"] < skip["generated"] + skip["read"]
    assert full["forward"] == skip["forward"] == last["posterior"]["forward"] == 0
    assert last["adaptive_oversampled"]["forward"] > 0  # the initial policy reads the prompts
    # Half as many rollouts a prompt, for twice as many prompts a step.
    for name, prompts in (("full", 4), ("full, G = 4", 8)):
        assert products[name].groups == prompts * last[name]["step"]
    # Forty prompts are rolled out to be scored, ten times as many as for a step.
    generated = [point["generated"] for point in products["learnalign"].points]
    assert max(np.diff(generated)) > 5 * full["generated"] / full["step"]


def test_the_belief_is_summed_up_where_there_is_one(products):
    assert set(products["skip"].notes) == {"cpu_seconds"}
    for name in ("posterior", "adaptive_oversampled", "learnalign_adaptive"):
        notes = products[name].notes
        assert 0 < notes["brier"] < 0.4
        assert 0 < notes["predicted"] < 1


def test_the_quick_driver_does_not_select(bench):
    driver = bench["continual.quick"].QuickDriver(bench["selection.cells"].Settings(**SMALL))
    line = bench["continual.cells"].LINES["learnalign"]
    with pytest.raises(ValueError, match="does not select"):
        driver("sparse", 100, line, BUDGETS, "dev")


def test_every_line_spends_its_budgets_and_little_more(curves):
    for curve in curves.values():
        for row in curve.rows():
            spent = row["price"] * row["generated"] + row["read"] + 3 * row["trained"]
            assert (
                row["mark"] * row["budget_compute"]
                <= spent
                < row["mark"] * row["budget_compute"] + 5_000
            )
            assert 0 <= row["accuracy"] <= 1


def test_the_whole_pool_pays_for_rows_without_a_gradient_and_skipping_does_not(curves):
    full, skip = curves["full"], curves["skip"]
    for point in full.points:
        assert point["trained"] == point["generated"] + point["read"]
    assert skip.points[-1]["trained"] < skip.points[-1]["generated"] + skip.points[-1]["read"]
    assert skip.points[-1]["step"] > full.points[-1]["step"]
    # It is the same training: at the same step the same accuracy.
    at_step = {point["step"]: point for point in skip.points}
    shared = [point for point in full.points if point["step"] in at_step]
    assert shared
    for point in shared:
        assert at_step[point["step"]]["accuracy"] == point["accuracy"]
        assert at_step[point["step"]]["generated"] == point["generated"]


def test_sampling_more_than_is_trained_on_is_charged(bench, curves):
    oversampling = bench["continual.cells"].LINES["adaptive_oversampled"].oversampling
    for name in ("dynamic_sampling", "adaptive_oversampled"):
        last = curves[name].points[-1]
        assert curves[name].groups > 4 * last["step"]
        assert last["trained"] < last["generated"] + last["read"]
    assert curves["adaptive"].groups == 4 * curves["adaptive"].points[-1]["step"]
    last = curves["adaptive_oversampled"].points[-1]
    assert curves["adaptive_oversampled"].groups == np.ceil(4 * oversampling) * last["step"]


def test_a_cell_repeats_to_the_bit(bench, curves):
    line = bench["continual.cells"].LINES["adaptive_oversampled"]
    driver = bench["continual.quick"].QuickDriver(bench["selection.cells"].Settings(**SMALL))
    assert (
        driver("sparse", 100, line, BUDGETS, "dev").points == curves["adaptive_oversampled"].points
    )


def test_a_driver_is_named_by_a_dotted_path(bench):
    table = bench["continual.table"]
    assert isinstance(table.driver_of(table.QUICK), bench["continual.quick"].QuickDriver)
    with pytest.raises(
        ValueError,
        match=r"--driver nonsense: give module:class, like continual\.quick:QuickDriver",
    ):
        table.driver_of("nonsense")


def test_all_lines_regimes_and_seeds_are_in_the_table_once(bench):
    table = bench["continual.table"]
    found = list(table.cells(table.REGIMES, range(8)))
    assert len(set(found)) == len(found) == 8 * 4 * len(bench["continual.cells"].LINES)


# ---- the report -----------------------------------------------------------------------------------------------------


def curve_rows(name, seed, final):
    """A straight line up to the final accuracy, at both prices and so at any: all grows with the steps."""
    tokens = {"generated": 0, "read": 1, "trained": 1, "forward": 0}
    return [
        {
            **{
                "regime": "sparse",
                "selector": name,
                "seed": seed,
                "price": price,
                "mark": mark / 10,
            },
            **{"accuracy": final * mark / 10, "useful": 0.5, "notes": "{}"},
            **{name: 100 * mark * count for name, count in tokens.items()},
        }
        for price in (1, 3)
        for mark in range(1, 11)
    ]


def test_the_report_pairs_seeds_and_reads_the_mean_curve(bench, tmp_path):
    rows = bench["continual.table"].Rows(tmp_path / "table.parquet")
    for seed, (full, adaptive, posterior) in enumerate(
        [(0.5, 0.6, 0.1), (0.6, 0.7, 0.9), (0.1, 0.2, 0.4)]
    ):
        rows.add(curve_rows("full", seed, full) + curve_rows("adaptive", seed, adaptive))
        rows.add(curve_rows("posterior", seed, posterior))
    report = bench["continual.report"]
    page = report.write(tmp_path / "table.parquet")
    first = page.read_text()
    report.write(tmp_path / "table.parquet")
    assert page.read_text() == first
    text = first.split("## A generated token costs 3 forward equivalents")[0]
    assert "| **adaptive** | 50.0 ± 65.7 |" in text
    # Ten points ahead with every seed, in either direction; the posterior is not told apart.
    assert "| whole pool, shuffled | **+10.0 [+10.0, +10.0]** |" in text
    assert "| **adaptive** | **+10.0 [+10.0, +10.0]** |" in text
    assert "| posterior for each prompt | +3.3 [" in text
    # 0.4 of 0.5 on a straight line.
    assert "| **adaptive** | 0.80 (2 of 3) |" in text
    assert "at price 1 / 3 / 8 (" in text
    assert "| **adaptive** | 0.80 / 0.80 / 0.80 |" in text
    for name in ("continual_curves.png", "accuracy_over_compute.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_price_that_a_run_was_not_evaluated_for_lies_between_its_evaluations(bench):
    """Accuracy that grows with the steps, and so in a straight line with what is spent at any price."""

    def run(name, generated, trained):
        curve = bench["continual.cells"].Curve({1: 1000.0, 3: 2000.0})
        for step in range(1, 100):
            spent = bench["continual.cells"].Spent(step * generated, step, step * trained)
            if curve.due(spent):
                curve.add(step, spent, step / 1000)
        keys = {"regime": "sparse", "selector": name, "seed": 0, "useful": 0.5, "notes": "{}"}
        return [{**keys, **row} for row in curve.rows()]

    measured = pd.DataFrame(run("full", 10, 4) + run("skip", 12, 1))
    found = bench["continual.report"].at_all_prices(measured)
    assert sorted(found["price"].unique()) == [1, 3, 8]
    kept = found[found["price"] < 8].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept[measured.columns], measured, check_dtype=False)
    for name in ("full", "skip"):
        ours = found[(found["selector"] == name) & (found["price"] == 8)]
        # The whole pool's run spends less at this price: 47 steps of 80 generated, 1 read and 3 * 4 trained on.
        assert set(ours["budget_compute"]) == {47 * 93}
        per_step = {"full": 93, "skip": 8 * 12 + 1 + 3}[name]
        wanted = ours["mark"] * 47 * 93 / per_step / 1000
        first = measured[measured["selector"] == name]["accuracy"].min()
        np.testing.assert_allclose(ours["accuracy"], np.maximum(wanted, first))


def test_group_sizes_are_held_against_the_best_line_of_the_shuffled_pool(bench):
    finals = {("full", 8): 0.4, ("full", 4): 0.5, ("adaptive", 2): 1.0, ("skip", 2): 0.3}
    named = bench["continual.group_size"].named
    rows = []
    for way, final in finals.items():
        rows += curve_rows(named(*way, 1.0), 0, final)
    found = bench["continual.group_size"].compute_to_best_full(pd.DataFrame(rows))
    assert list(found.columns) == ["sparse"]
    for price in (1, 3):
        reached = {way: found["sparse"][price, named(*way, 1.0)] for way in finals}
        # A straight line up to 1 passes 0.5 halfway, one up to 0.3 never.
        assert reached["adaptive", 2] == pytest.approx(0.5)
        assert reached["full", 4] == 1
        assert np.isnan([reached["full", 8], reached["skip", 2]]).all()


def test_constants_are_compared_with_the_defaults_by_seed_and_regime(bench):
    sizes = bench["continual.group_size"]
    rows = []
    for seed, lead in ((0, 0.02), (1, 0.06)):
        rows += curve_rows(sizes.named("adaptive", 2, 1.0), seed, 0.5)
        rows += curve_rows(sizes.named("adaptive, exploration 0.25", 2, 1.0), seed, 0.5 + lead)
    rows += curve_rows(sizes.named("adaptive", 2, 2.0), 0, 0.9)  # of another rate: not compared
    found = sizes.changes(pd.DataFrame(rows))
    means = pd.DataFrame(rows).groupby("selector")["accuracy"].mean()
    base = pd.DataFrame(rows).query("selector == 'adaptive, G = 2, rate × 1'")["accuracy"].mean()
    lead = 100 * (means["adaptive, exploration 0.25, G = 2, rate × 1"] - base)
    assert list(found.index) == ["adaptive, exploration 0.25"]
    np.testing.assert_allclose(found.to_numpy(), [[lead, lead]])


def test_cells_of_two_drivers_do_not_mix(bench, tmp_path):
    table = bench["continual.table"]
    table.Rows(tmp_path / "table.parquet", table.QUICK).add(curve_rows("full", 0, 0.5))
    with pytest.raises(ValueError, match=r"holds cells of continual\.quick:QuickDriver"):
        table.Rows(tmp_path / "table.parquet")
