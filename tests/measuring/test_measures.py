import logging
import os

import cases
import numpy as np
import oracles
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.trainer import utils as trl_utils

from trl_learnalign import LearnAlignConfig
from trl_learnalign.bridge.inference import reading_model
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring import base
from trl_learnalign.measuring.base import Context, MeasureJob
from trl_learnalign.measuring.measure_pool import measure_pool
from trl_learnalign.measuring.text_measures import (
    RATING_PROMPTS,
    HiddenMeasure,
    LengthMeasure,
    LikelihoodMeasure,
    PromptEncoder,
    RatingMeasure,
    position_weighted_mean,
    solutions,
    text_batches,
)
from trl_learnalign.records.store import StoreError
from trl_learnalign.selectors import find_selector

SOLUTIONS = ["a1b", "2", "abcd 12", "7", "so 3", "x", "4=4", "ab", "9 9 9", "z0"]


def data(conversational=False, texts=SOLUTIONS):
    made = cases.dataset(len(texts), conversational=conversational).remove_columns("solution")
    return made.add_column("reference", texts)


def config(**options):
    return LearnAlignConfig(**{"warmup_samples": 0, "stages": [4], "text_batch_size": 3, **options})


def roomy(family="qwen2", **options):
    """A model that rating prompts fit into, at one token per character."""
    both = {"n_positions": 512} if family == "gpt2" else {}
    return cases.model(family, max_position_embeddings=512, **both, **options)


def likelihoods(trainer, settings, reader=None):
    return LikelihoodMeasure(Context.of(trainer, settings), "reference", reader)


def measured(folder, measure, size=10, shard_size=4):
    work = MeasureJob("stage_1", np.arange(size), folder, {}, shard_size, quiet=True)
    return base.run(work, measure, Ranks())


def ids(text):
    return cases.tokenizer()(text)["input_ids"]


def features_of(found, size=10):
    features = torch.full((size, 16), torch.nan)
    for positions, part in found.features:
        features[positions] = part
    return features


def prompt_ids(trainer, row):
    """The test template writes the contents and "=" where the answer begins."""
    prompt = trainer.train_dataset[row]["prompt"]
    return (
        ids(prompt) if isinstance(prompt, str) else ids("".join(m["content"] for m in prompt) + "=")
    )


# ---- Likelihoods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize(("conversational", "temperature"), [(True, 1.0), (False, 0.3)])
def test_likelihoods_equal_a_direct_computation(tmp_path, family, conversational, temperature):
    policy = cases.model(family)
    trainer = cases.trainer(tmp_path, policy, data=data(conversational), temperature=temperature)
    found = measured(tmp_path, likelihoods(trainer, config())).values
    alone = (
        ids("=") if conversational else [cases.tokenizer().eos_token_id]
    )  # it has no start token
    for row, text in enumerate(SOLUTIONS):
        given = oracles.mean_nll(policy, prompt_ids(trainer, row), ids(text))
        assert found["nll"][row] == pytest.approx(given, rel=1e-5)
        assert found["nll_alone"][row] == pytest.approx(
            oracles.mean_nll(policy, alone, ids(text)), rel=1e-5
        )
    assert found["solution_tokens"].tolist() == [len(text) for text in SOLUTIONS]
    assert not found["truncated"].any()


def test_a_solution_alone_can_follow_the_start_token_only(tmp_path):
    policy = cases.model()
    trainer = cases.trainer(tmp_path, policy, data=data(True))
    found = measured(tmp_path, likelihoods(trainer, config(solution_start="token"))).values
    truth = [oracles.mean_nll(policy, [1], ids(text)) for text in SOLUTIONS]
    np.testing.assert_allclose(found["nll_alone"], truth, rtol=1e-5)


def test_templates_that_begin_with_a_start_token_keep_it():
    class Tokenizer:
        bos_token_id, eos_token_id, chat_template = 5, 1, "there is one"

        def apply_chat_template(self, conversations, add_generation_prompt, **_):
            return {
                "input_ids": [
                    [5, 7, 8, *([9, 10] if add_generation_prompt else [])] for _ in conversations
                ]
            }

    encoder = PromptEncoder.__new__(PromptEncoder)
    encoder.tokenizer, encoder._chat = Tokenizer(), {}
    conversation = [{"role": "user", "content": "a"}]
    assert encoder.before_solution(conversation, "template") == [5, 9, 10]
    assert encoder.before_solution(conversation, "token") == [5]
    assert encoder.before_solution("a", "template") == [5]
    encoder.tokenizer.bos_token_id = None
    assert encoder.before_solution(conversation, "template") == [9, 10]


def test_long_solutions_are_cut_in_both_readings_and_marked(tmp_path):
    policy = cases.model()
    texts = [*SOLUTIONS[:9], "0123456789" * 3]
    trainer = cases.trainer(tmp_path, policy, data=data(texts=texts))
    found = measured(tmp_path, likelihoods(trainer, config(max_text_tokens=16))).values
    assert found["truncated"].tolist() == [False] * 9 + [True]
    assert found["solution_tokens"][9] == 30
    before = prompt_ids(trainer, 9)
    kept = ids(texts[9])[: 16 - len(before)]
    assert found["nll"][9] == pytest.approx(oracles.mean_nll(policy, before, kept), rel=1e-5)
    assert found["nll_alone"][9] == pytest.approx(oracles.mean_nll(policy, [1], kept), rel=1e-5)


def test_no_text_is_longer_than_the_model_allows(tmp_path):
    trainer = cases.trainer(
        tmp_path, cases.model("gpt2"), data=data(texts=[*SOLUTIONS[:9], "1" * 200])
    )
    found = measured(tmp_path, likelihoods(trainer, config())).values
    assert found["truncated"].tolist() == [False] * 9 + [True]
    assert torch.isfinite(found["nll"]).all()


def test_prompts_that_leave_no_room_have_no_likelihood(tmp_path):
    prompts = Dataset.from_dict({"prompt": ["a" * 40, "a?"], "reference": ["12", "12"]})
    trainer = cases.trainer(tmp_path, data=prompts)
    found = measured(tmp_path, likelihoods(trainer, config(max_text_tokens=20)), size=2).values
    assert torch.isnan(found["nll"]).tolist() == [True, False]
    assert found["truncated"].tolist() == [True, False]


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_missing_solutions_are_nan_and_disturb_nobody(tmp_path, empty):
    whole = cases.trainer(tmp_path, data=data())
    gaps = cases.trainer(tmp_path, data=data(texts=[*SOLUTIONS[:3], empty, *SOLUTIONS[4:]]))
    reference = measured(tmp_path / "a", likelihoods(whole, config())).values["nll"]
    found = measured(tmp_path / "b", likelihoods(gaps, config())).values
    assert torch.isnan(found["nll"]).nonzero().flatten().tolist() == [3]
    assert found["solution_tokens"][3] == 0
    others = [i for i in range(10) if i != 3]
    np.testing.assert_allclose(found["nll"][others], reference[others], rtol=1e-5)


def test_solutions_may_be_numbers():
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "solution": [12, None, 3]})
    assert solutions(rows, np.array([0, 1, 2]), "solution") == ["12", None, "3"]


def test_a_named_model_reads_with_its_own_weights_and_tokenizer(tmp_path):
    reader = cases.model("llama", seed=9)
    reader.save_pretrained(tmp_path / "reader")
    spoken = cases.tokenizer()
    spoken.chat_template = None
    spoken.save_pretrained(tmp_path / "reader")
    trainer = cases.trainer(tmp_path, data=data(True), temperature=0.5)
    before = [p.clone() for p in trainer.model.parameters()]
    measure = likelihoods(trainer, config(), str(tmp_path / "reader"))
    found = measured(tmp_path, measure).values
    for row, text in enumerate(SOLUTIONS):
        # Without a chat template: the contents, and an empty line after each.
        prompt = ids(trainer.train_dataset[row]["prompt"][0]["content"] + "\n\n")
        assert found["nll"][row] == pytest.approx(
            oracles.mean_nll(reader, prompt, ids(text)), rel=1e-5
        )
        assert found["nll_alone"][row] == pytest.approx(
            oracles.mean_nll(reader, [1], ids(text)), rel=1e-5
        )
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert measure.fingerprint()["read_by"] == str(tmp_path / "reader")


def test_a_named_model_uses_its_own_chat_template(tmp_path):
    reader = cases.model("llama", seed=9)
    reader.save_pretrained(tmp_path / "reader")
    spoken = cases.tokenizer()
    spoken.chat_template = (
        "q:{{ messages[0]['content'] }}{% if add_generation_prompt %}a:{% endif %}"
    )
    spoken.save_pretrained(tmp_path / "reader")
    trainer = cases.trainer(tmp_path, data=data(True))
    found = measured(tmp_path, likelihoods(trainer, config(), str(tmp_path / "reader"))).values
    asked = trainer.train_dataset[4]["prompt"][0]["content"]
    given = oracles.mean_nll(reader, ids(f"q:{asked}a:"), ids(SOLUTIONS[4]))
    assert found["nll"][4] == pytest.approx(given, rel=1e-5)
    assert found["nll_alone"][4] == pytest.approx(
        oracles.mean_nll(reader, ids("a:"), ids(SOLUTIONS[4])), rel=1e-5
    )


def test_a_named_model_is_loaded_whole_under_partitioning(tmp_path, monkeypatch):
    """ZeRO-3 and FSDP tell transformers to load models in parts; that is for the policy."""
    from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled

    class Zero3:
        def is_zero3(self):
            return True

    settings, seen, load = Zero3(), [], AutoModelForCausalLM.from_pretrained
    cases.model().save_pretrained(tmp_path)
    trainer = cases.trainer(tmp_path)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: settings)

    def spy(name):
        seen.append(
            (is_deepspeed_zero3_enabled(), os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING"))
        )
        return load(name)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    with reading_model(trainer, str(tmp_path)) as model:
        assert not any(p.requires_grad for p in model.parameters())
    assert seen == [(False, None)]
    assert is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_lengths_need_no_model(tmp_path):
    trainer = cases.trainer(tmp_path, data=data(texts=[*SOLUTIONS[:9], None]))
    trainer.model.forward = None
    found = measured(tmp_path, LengthMeasure(Context.of(trainer, config()), "reference")).values[
        "solution_tokens"
    ]
    assert found.tolist() == [*map(len, SOLUTIONS[:9]), 0]


# ---- Hidden states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
def test_hidden_features_equal_a_direct_computation(tmp_path, family):
    policy = cases.model(family)
    trainer = cases.trainer(tmp_path, policy, data=data(True), temperature=0.5)
    found = features_of(measured(tmp_path, HiddenMeasure(Context.of(trainer, config()))))
    truth = torch.stack([oracles.rds_plus(policy, prompt_ids(trainer, row)) for row in range(10)])
    np.testing.assert_allclose(found, truth, atol=1e-5)
    np.testing.assert_allclose(found.norm(dim=1), 1, rtol=1e-6)


def test_hidden_features_of_prompt_and_solution(tmp_path):
    policy = cases.model()
    trainer = cases.trainer(tmp_path, policy, data=data(texts=[*SOLUTIONS[:9], None]))
    measure = HiddenMeasure(
        Context.of(trainer, config(hidden_text="prompt_and_solution")), "reference"
    )
    found = measured(tmp_path, measure)
    assert found.values["has_text"].tolist() == [True] * 9 + [False]
    features = features_of(found)
    for row, text in enumerate(SOLUTIONS[:9]):
        truth = oracles.rds_plus(policy, prompt_ids(trainer, row) + ids(text))
        np.testing.assert_allclose(features[row], truth, atol=1e-5)
    assert torch.isnan(features[9]).all()


def test_padding_has_no_weight_even_if_its_states_are_nan():
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 4.0], [torch.nan, torch.nan]]])
    mean = position_weighted_mean(hidden, torch.tensor([[1, 1, 0]]))
    np.testing.assert_allclose(mean, [[1 / 3, 8 / 3]])


# ---- Ratings --------------------------------------------------------------------------------------------------------


def rating_text(question, answer, wording):
    return f"{wording}\n\nInstruction: {question}\nResponse: {answer}\nRating:\n"


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
def test_ratings_equal_a_direct_computation(tmp_path, family):
    policy = roomy(family)
    rows = data(texts=SOLUTIONS[:3]).to_list()
    for row in rows:
        row["prompt"] = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": row["prompt"]},
        ]
    trainer = cases.trainer(tmp_path, policy, data=Dataset.from_list(rows), temperature=0.5)
    found = measured(
        tmp_path, RatingMeasure(Context.of(trainer, config()), "reference"), size=3
    ).values["ratings"]
    assert found.shape == (3, 5, 5)
    digits = [ids(digit)[0] for digit in "12345"]
    for row in range(3):
        question = rows[row]["prompt"][1]["content"]
        for number, wording in enumerate(RATING_PROMPTS):
            text = ids(rating_text(question, SOLUTIONS[row], wording))
            truth = oracles.next_token_probabilities(policy, text, digits)
            np.testing.assert_allclose(found[row, number], truth, rtol=1e-4)


def test_a_long_response_is_cut_but_never_the_question_for_a_rating(tmp_path):
    trainer = cases.trainer(tmp_path, data=data())
    measure = RatingMeasure(Context.of(trainer, config()), "reference")
    text = measure._text("rate", "instruction response " * 20, 60)
    assert len(text) == 60
    assert text[-9:] == ids("\nRating:\n")
    kept = ids("rate\n\ninstruction response ")
    assert text[: len(kept)] == kept


def test_missing_solutions_have_no_ratings(tmp_path):
    policy = roomy()
    trainer = cases.trainer(tmp_path, policy, data=data(texts=["1", None, "2"]))
    found = measured(
        tmp_path, RatingMeasure(Context.of(trainer, config()), "reference"), size=3
    ).values["ratings"]
    assert torch.isnan(found).all(dim=2).all(dim=1).tolist() == [False, True, False]
    assert torch.isfinite(found[[0, 2]]).all()


def test_ratings_that_are_no_five_single_tokens_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "ALPHABET", cases.ALPHABET.replace("5", ""))
    trainer = cases.trainer(tmp_path, data=data())
    with pytest.raises(
        ValueError, match=r"has no five distinct ones \('1': \['1'\].*'5': \['\[UNK\]'\]\).*another"
    ):
        RatingMeasure(Context.of(trainer, config()), "reference")


# ---- What all share -------------------------------------------------------------------------------------------------


MEASURES = {
    "likelihoods": (
        lambda *a: LikelihoodMeasure(*a, "reference"),
        lambda found: found.values["nll"],
    ),
    "hidden": (HiddenMeasure, features_of),
    "ratings": (lambda *a: RatingMeasure(*a, "reference"), lambda found: found.values["ratings"]),
}


@pytest.mark.parametrize("kind", MEASURES)
def test_results_do_not_depend_on_batches_padding_and_shards(tmp_path, kind):
    make, values = MEASURES[kind]
    trainer = cases.trainer(tmp_path, roomy("gpt2"), data=data())
    results = []
    for rows, shard_size in ((1, 10), (3, 4), (7, 1), (100, 10)):
        measure = make(Context.of(trainer, config(text_batch_size=rows)))
        results.append(values(measured(tmp_path / f"{rows}", measure, shard_size=shard_size)))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", MEASURES)
def test_a_pass_is_made_whether_or_not_there_is_something_to_read(tmp_path, kind):
    """Passes are collectives where parameters are partitioned: each rank makes as many as the busiest."""
    make, _ = MEASURES[kind]
    trainer = cases.trainer(tmp_path, roomy(), data=data(texts=[None] * 10))
    measure = make(Context.of(trainer, config()))
    passes = []
    handle = trainer.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    needed = measure.calls(np.arange(4))
    assert needed == -(-4 * measure.texts_per_prompt // 3)
    with measure.session():
        measure.measure(0, np.arange(4), needed + 2, True)
        assert len(passes) == needed + 2
        measure.measure(0, np.arange(4), 5, False)
    handle.remove()
    assert len(passes) == needed + 7


def test_batches_are_right_padded_and_longest_first():
    batches = list(text_batches([[4], [5, 6, 7], [8, 9]], 2, 3, 0, torch.device("cpu")))
    assert [batch.texts for batch in batches] == [(1, 2), (0,), ()]
    assert batches[0].input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batches[0].attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batches[2].input_ids.shape == (1, 2)


@pytest.mark.parametrize("kind", MEASURES)
def test_lora_policies_are_read_with_their_adapters(tmp_path, kind):
    make, values = MEASURES[kind]
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    policy = roomy()
    trainer = cases.trainer(tmp_path, policy, data=data(), peft_config=lora)
    fresh = values(measured(tmp_path / "fresh", make(Context.of(trainer, config()))))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    moved = values(measured(tmp_path / "moved", make(Context.of(trainer, config()))))
    trainer.model.merge_adapter()
    merged = values(measured(tmp_path / "merged", make(Context.of(trainer, config()))))
    assert (fresh - moved).abs().max() > 1e-3
    np.testing.assert_allclose(moved, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MEASURES)
@pytest.mark.parametrize("crash", [False, True])
def test_the_trainer_is_left_as_found(tmp_path, kind, crash, monkeypatch):
    make, _ = MEASURES[kind]
    policy = roomy("gpt2", resid_pdrop=0.5)
    trainer = cases.trainer(tmp_path, policy, data=data(), gradient_checkpointing=True)
    trainer.model.train()
    head, state = trl_utils._ChunkedLogProbFunction, torch.get_rng_state()
    measure = make(Context.of(trainer, config()))
    if crash:
        monkeypatch.setattr(trainer.model.base_model, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measured(tmp_path, measure)
    else:
        measured(tmp_path, measure)
    assert trl_utils._ChunkedLogProbFunction is head
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in trainer.model.modules())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules()
    )
    assert all(p.grad is None and p.requires_grad for p in trainer.model.parameters())
    assert torch.is_grad_enabled()


def test_finished_shards_are_not_read_again(tmp_path, monkeypatch):
    trainer = cases.trainer(tmp_path, data=data())
    read = LikelihoodMeasure.read
    numbers = []

    def crash_in_the_third_shard(self, model, prompts, passes):
        numbers.append(prompts[0])
        if len(numbers) == 3:
            raise RuntimeError("power cut")
        return read(self, model, prompts, passes)

    monkeypatch.setattr(LikelihoodMeasure, "read", crash_in_the_third_shard)
    with pytest.raises(RuntimeError, match="power cut"):
        measured(tmp_path, likelihoods(trainer, config()))
    found = measured(tmp_path, likelihoods(trainer, config())).values["nll"]
    assert numbers == [0, 4, 8, 8]
    monkeypatch.undo()
    fresh = measured(tmp_path / "fresh", likelihoods(trainer, config())).values["nll"]
    assert torch.equal(found, fresh)


def test_results_of_other_settings_are_refused(tmp_path):
    trainer = cases.trainer(tmp_path, data=data())
    measured(tmp_path, likelihoods(trainer, config()))
    with pytest.raises(StoreError, match="max_text_tokens: the folder has 2048, this run 64"):
        measured(tmp_path, likelihoods(trainer, config(max_text_tokens=64)))


NEEDED = {
    "random": set(),
    "token_length": {"lengths"},
    "ifd": {"likelihoods"},
    "selectit": {"ratings"},
    "learnability": {"rollouts"},
    "feature_similarity": {"rollouts", "hidden"},
    "learnalign": {"gradients"},
}


@pytest.mark.parametrize("name", NEEDED)
def test_exactly_what_is_needed_is_measured(tmp_path, name, caplog):
    policy = roomy()
    trainer = cases.trainer(tmp_path, policy, data=data(texts=[*SOLUTIONS[:9], None]))
    settings = config(feature_dim=64)
    work = MeasureJob("stage_1", np.arange(10), tmp_path / "stage_1", {}, 10, quiet=True)
    selector = find_selector(name)
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        pool, _ = measure_pool(
            Context.of(trainer, settings, scoring_batch_prompts=2), selector, work
        )
    folder = tmp_path / "stage_1"
    assert (
        {path.name for path in folder.iterdir()} == NEEDED[name]
        if NEEDED[name]
        else not folder.exists()
    )
    assert selector.score(pool).shape == (10,)
    reads_solutions = name in ("token_length", "ifd", "selectit")
    said = "1 of 10 candidates have no solution in column 'reference'. They cannot be scored and rank last"
    assert (said in caplog.text) == reads_solutions
    assert np.isnan(selector.score(pool)[9]) == reads_solutions
