"""Tiny models, tokenizers, datasets and trainers: everything a test needs, made on the spot."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout."""

STORED_RUN = ROOT / "tests" / "stored" / "run"
"""A small run, whole and interrupted, that scripts/stored_run.py has written."""

CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(GRPOConfig, "activation_checkpointing")
    else "gradient_checkpointing"
)
"""As in `toy.model`, which needs reasoning-gym; environments of scripts/compatibility.py do not have it."""

ALPHABET = string.ascii_lowercase + string.digits + " ?!.,:\\{}<>/="
HANGS = 1800
"""Seconds after which a process is taken to hang. Not a measure of speed: others may use the machine."""

CHAT_TEMPLATE = """{% for message in messages %}{{ message['content'] }}{% endfor %}\
{% if add_generation_prompt %}={% endif %}"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    special = ["[PAD]", "[EOS]", "[UNK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
    )
    made.chat_template = CHAT_TEMPLATE
    return made


class RoutedList(nn.Module):
    """Experts in a list, each called only if a token goes to it, as older mixtures and custom code have them."""

    def __init__(self, experts: int = 10):
        super().__init__()
        self.router = nn.Linear(16, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(dim=-1).max(dim=-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            tokens = (chosen == i).nonzero().squeeze(-1)
            if len(tokens):
                out = out.index_add(0, tokens, expert(flat[tokens]) * weights[tokens].unsqueeze(-1))
        return out.view_as(x)


class RoutedQwen2(Qwen2ForCausalLM):
    """A mixture of experts whose experts are a list in the first layer."""

    def __init__(self, config: Qwen2Config):
        super().__init__(config)
        self.model.layers[0].mlp = RoutedList()
        self.post_init()


def _skip_where_trl_cannot_train_gemma() -> None:
    """TRL's fused head looks for the backbone where transformers 4 does not have it: its own training fails."""
    is_fused = Version(trl.__version__).release >= (1, 15)
    if is_fused and Version(transformers.__version__).major < 5:
        pytest.skip(f"trl {trl.__version__} cannot train Gemma 3 of transformers 4")


def model(
    family: str = "qwen2", *, hidden: int = 16, layers: int = 2, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """A randomly initialised causal LM of a few thousand parameters."""
    torch.manual_seed(seed)
    shared = dict(
        vocab_size=len(tokenizer()),
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    decoder = dict(
        shared,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    if family == "qwen2":
        made: PreTrainedModel = Qwen2ForCausalLM(
            Qwen2Config(**{**decoder, "tie_word_embeddings": True, **options})
        )
    elif family == "routed":
        made = RoutedQwen2(Qwen2Config(**{**decoder, "tie_word_embeddings": True, **options}))
    elif family == "mixtral":
        made = MixtralForCausalLM(MixtralConfig(**{**decoder, "num_local_experts": 4, **options}))
    elif family == "qwen3":
        made = Qwen3ForCausalLM(Qwen3Config(**{**decoder, "head_dim": 8, **options}))
    elif family == "llama":
        made = LlamaForCausalLM(LlamaConfig(**{**decoder, "tie_word_embeddings": False, **options}))
    elif family == "gpt2":
        made = GPT2LMHeadModel(
            GPT2Config(
                **{
                    **shared,
                    "n_embd": hidden,
                    "n_layer": layers,
                    "n_head": 2,
                    "n_positions": 128,
                    **options,
                }
            )
        )
    elif family == "gemma3":
        _skip_where_trl_cannot_train_gemma()
        made = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **{
                    **decoder,
                    "head_dim": 8,
                    "sliding_window": 32,
                    "final_logit_softcapping": 5.0,
                    **options,
                }
            )
        )
    elif family == "opt":
        opt = dict(
            hidden_size=hidden,
            ffn_dim=2 * hidden,
            word_embed_proj_dim=hidden,
            num_hidden_layers=layers,
        )
        made = OPTForCausalLM(OPTConfig(**{**shared, **opt, "num_attention_heads": 2, **options}))
    elif family == "biogpt":
        made = BioGptForCausalLM(BioGptConfig(**{**decoder, **options}))
    elif family == "xglm":
        xglm = dict(d_model=hidden, ffn_dim=2 * hidden, num_layers=layers, attention_heads=2)
        made = XGLMForCausalLM(XGLMConfig(**{**shared, **xglm, **options}))
    elif family == "bart":
        bart = dict(
            d_model=hidden,
            decoder_ffn_dim=2 * hidden,
            decoder_layers=layers,
            decoder_attention_heads=2,
        )
        made = BartForCausalLM(BartConfig(**{**shared, **bart, "scale_embedding": True, **options}))
    else:
        raise ValueError(family)
    # Norm weights and biases away from 0 and 1, so that a rule that forgets them is found out.
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def dataset(size: int = 12, *, conversational: bool = False) -> Dataset:
    """Prompts of different lengths, with a solution column."""
    texts = [f"{'abcdefgh'[: 1 + i % 5]}{i}?" for i in range(size)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    return Dataset.from_dict({"prompt": prompts, "solution": [str(i % 7) for i in range(size)]})


def text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def accuracy_reward(completions: list[Any], **_: Any) -> list[float]:
    """Right or wrong by a coin that the text throws: about half of random completions are right."""
    return [float(sum(map(ord, text(completion))) % 2) for completion in completions]


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    return [len(text(completion)) / 10 for completion in completions]


def pools_of(callback: Any) -> dict[str, list[int]]:
    """Rows of the dataset that the stages of a run have selected."""
    return {name: pool.tolist() for name, pool in callback.state.pools.items()}


def grpo_config(
    output_dir: Path | str, kind: type[GRPOConfig] = GRPOConfig, **options: Any
) -> GRPOConfig:
    """Settings for a run on one CPU that takes seconds."""
    defaults: dict[str, Any] = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        **{CHECKPOINTING: options.pop("gradient_checkpointing", False)},
        disable_tqdm=True,
        seed=7,
    )
    return kind(**{**defaults, **options})


def trainer(
    output_dir: Path | str, policy: PreTrainedModel | None = None, **options: Any
) -> GRPOTrainer:
    """An unmodified `GRPOTrainer` on a tiny model; `rewards`, `data`, `peft_config`, … are its own arguments.

    With `data=None` it has no dataset.
    """
    rewards = options.pop("rewards", accuracy_reward)
    data = options.pop("data") if "data" in options else dataset()
    peft_config = options.pop("peft_config", None)
    agent = {
        name: options.pop(name) for name in ("tools", "environment_factory") if name in options
    }
    return GRPOTrainer(
        model=policy if policy is not None else model(),
        reward_funcs=rewards,
        args=grpo_config(output_dir, **options),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=peft_config,
        **agent,
    )
