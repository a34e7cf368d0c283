"""vLLM behind a server: another process, which sees what comes over HTTP and the weights that are sent to it."""

import cases
import pytest
import vllm_cases

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import roll_out, training_rows
from trl_learnalign.bridge.policy import weights_changed
from trl_learnalign.records.notes import SelectionNote

pytestmark = [vllm_cases.SPOKEN, pytest.mark.usefixtures("vllm")]


@pytest.fixture(scope="module")
def server(checkpoint, vllm, tmp_path_factory):
    with vllm_cases.server(checkpoint, tmp_path_factory.mktemp("server") / "log.txt") as started:
        yield started


def trainer_of(folder, checkpoint, server, **options):
    return vllm_cases.trainer(
        folder,
        checkpoint,
        vllm_mode="server",
        vllm_server_base_url=server.url,
        vllm_group_port=vllm_cases.free_port(),
        vllm_server_timeout=cases.HANGS,
        **options,
    )


def greedy_rollouts(trainer, rows=(0, 3, 5)):
    """Completion ids of the likeliest rollouts."""
    trainer.vllm_generation.top_k = 1
    numbers = [row for row in rows for _ in range(trainer.num_generations)]
    given = training_rows(trainer, trainer.train_dataset, numbers)
    with preserve_trainer_state(trainer):
        inputs, _rewards = roll_out(trainer, given, 5)
    lengths = inputs["completion_mask"].sum(dim=1)
    completions = inputs["completion_ids"]
    return [ids[:length].tolist() for ids, length in zip(completions, lengths, strict=True)]


def likeliest(trainer, rows=(0, 3, 5)):
    """The same by transformers."""
    found = []
    for row in rows:
        prompt = cases.tokenizer()(trainer.train_dataset[row]["prompt"], return_tensors="pt")
        tokens = trainer.model.generate(
            **prompt, do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=1
        )
        found += [tokens[0, prompt["input_ids"].shape[1] :].tolist()] * trainer.num_generations
    return found


@pytest.mark.parametrize(
    "after_warmup", [pytest.param("continue", marks=pytest.mark.slow), "restart"]
)
def test_a_server_generates_by_the_weights_of_the_moment(
    tmp_path, checkpoint, server, after_warmup
):
    from vllm.engine.core import digest

    trainer = trainer_of(tmp_path, checkpoint, server)
    before = len(server.log()["rows"])
    moments = []
    generate = trainer.vllm_generation.generate

    def noted(*arguments, **named):
        moments.append(digest(trainer.model.named_parameters()))
        return generate(*arguments, **named)

    trainer.vllm_generation.generate = noted
    settings = dict(stages=[4], shard_size=4, after_warmup=after_warmup, verbose=False)
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(warmup_samples=4, **settings))
    trainer.add_callback(callback)
    trainer.train()
    log = server.log()
    assert log["rows"][before:] == [8, 8, 16, 16, 16, 8, 8]
    assert log["generations"][before:] == moments
    assert len(set(moments)) == 4
    assert (moments[5] == moments[0]) == (after_warmup == "restart")
    checked = callback.record.get("stage_1", SelectionNote).scoring.self_check
    assert checked["relative_error"] < 1e-5
    # And it generates what transformers would, once it has these weights.
    weights_changed(trainer)
    assert greedy_rollouts(trainer) == likeliest(trainer)


def test_more_prompts_than_a_request_holds_are_refused_by_the_server(tmp_path, checkpoint, server):
    """Which is why scoring asks for no more (`generation_batch.REQUEST_PROMPTS`)."""
    trainer = trainer_of(tmp_path, checkpoint, server)
    trainer.vllm_generation.sync_weights()
    client = trainer.vllm_generation.vllm_client
    assert len(client.generate([[5, 6]] * 1024, max_tokens=1)["completion_ids"]) == 1024
    with pytest.raises(Exception, match="prompt list length 1025 exceeds 1024"):
        client.generate([[5, 6]] * 1025, max_tokens=1)
