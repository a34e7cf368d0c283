"""Captured features against the gradient of TRL's own loss, case by case: the cases and the comparison.

A case is a tiny trainer. TRL rolls out three prompts of different lengths; autograd gives the gradient of TRL's loss
of each prompt's rows as TRL returned them; the capture gives its features, unprojected, with all prompts in one pass,
one prompt at a time, and the rollouts of a prompt split. They are compared parameter by parameter and prompt by
prompt."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import architectures
import cases
import oracles
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

import trl_learnalign
from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.policy import gradient_capture, trainable_sizes
from trl_learnalign.gradients.capture import Coverage
from trl_learnalign.gradients.projection import Unprojected
from trl_learnalign.measuring.generation import RolloutGroup, roll_out
from trl_learnalign.measuring.gradient_features import GradientFeaturizer

PROMPTS, ROLLOUTS, SEED = 3, 4, 0
# Float32 rounding of tiny models stays far below; a parameter whose gradient is less than FLOOR of the whole
# (key biases, which softmax does not see) is measured against that.
TOLERANCE, FLOOR = 1e-3, 1e-3
BATCHINGS = [
    "all prompts in one pass",
    "one prompt a pass",
    "the rollouts of a prompt in two passes",
]


@dataclass(frozen=True)
class Case:
    """A trainer to compare on.

    Args:
        group (`str`): `"architecture"`, `"module"`, `"adapter"` or `"setting"`.
        name (`str`): What it shows.
        build (callable): Folder → trainer.
        up_to_a_factor (`bool`): Whether one positive factor for all prompts is left free.
    """

    group: str
    name: str
    build: Callable[[Path], GRPOTrainer]
    up_to_a_factor: bool = False

    @property
    def key(self) -> str:
        """Group and name."""
        return f"{self.group}/{self.name}"


@dataclass
class Verdict:
    """How a case came out.

    Args:
        status (`str`): `"exact"`; `"direct"`: exact, some parameters through autograd; `"missing"`: exact but for
            parameters that the coverage names; `"refused"`: by the package, with a reason; `"trl"`: TRL alone cannot
            run it; `"wrong"`: differs without a word; `"crash"`: the capture fails where TRL alone runs.
        error (`float`): Largest relative error of a parameter's gradient of one prompt.
        differing (`dict`): The parameters beyond the tolerance, with their errors.
        direct, missing (`list[str]`): As the coverage says.
        alone (`bool`): Whether prompts were captured one at a time.
        equal_lengths (`bool`): Whether the prompts had to be equally long, because padding changes what TRL computes.
        wrong_in (`list[str]`): Which ways of batching give the parameters that differ.
        note (`str`): Message of an error.
    """

    status: str
    error: float = 0.0
    differing: dict[str, float] = field(default_factory=dict)
    direct: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    alone: bool = False
    equal_lengths: bool = False
    wrong_in: list[str] = field(default_factory=list)
    note: str = ""

    def summary(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def mixed_reward(completions: list[Any], **_: Any) -> list[float]:
    """Neither all right nor all wrong in any group, whatever was generated."""
    return [(1.0, 0.0, 0.5, 0.2)[i % ROLLOUTS] for i in range(len(completions))]


def prompts(equal_lengths: bool = False) -> Dataset:
    """Prompts of three to five tokens, or of four."""
    texts = ["abc?", "def?", "ghi?"] if equal_lengths else ["ab?", "cdef?", "ghi?"]
    return Dataset.from_dict({"prompt": texts, "solution": ["1", "2", "3"]})


def trainer(folder: Path, policy: Any, **options: Any) -> GRPOTrainer:
    """A trainer whose completions have different lengths: the end of the text is made likelier in sampling."""
    defaults = dict(
        rewards=mixed_reward,
        data=prompts(),
        num_generations=ROLLOUTS,
        per_device_train_batch_size=ROLLOUTS,
        max_completion_length=4,
        generation_kwargs={"sequence_bias": [[[1], 2.0]]},
    )
    return cases.trainer(folder, policy, **{**defaults, **options})


def moved(made: GRPOTrainer, by: float = 0.05) -> GRPOTrainer:
    """The trainable weights away from where they began: adapters from zero, the policy from its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return made


# The comparison


def judge(case: Case, folder: Path) -> Verdict:
    """Run one case, whatever happens in it."""
    try:
        made = case.build(folder)
        with preserve_trainer_state(made):
            truth, without_padding = (
                training_gradients(made),
                training_gradients(made, padded=False),
            )
        found = judge_trainer(made, truth, case.up_to_a_factor)
        if found.status == "wrong" and differ(made, truth, without_padding):
            found = judge_without_padding(made, without_padding, case.up_to_a_factor)
    except Exception as error:
        return Verdict("trl", note=describe(error))
    return found


def differ(made: GRPOTrainer, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two gradients of TRL's own are further apart than features may be."""
    return max(parameter_errors([one], other, trainable_sizes(made)).values()) > TOLERANCE


def judge_without_padding(made: GRPOTrainer, truth: torch.Tensor, up_to_a_factor: bool) -> Verdict:
    """Where padding changes what TRL computes: each prompt without any, and all together if equally long."""
    apart = judge_trainer(made, truth, up_to_a_factor, together=False)
    made.train_dataset = prompts(equal_lengths=True)
    with preserve_trainer_state(made):
        truth = training_gradients(made)
    found = apart if apart.status == "wrong" else judge_trainer(made, truth, up_to_a_factor)
    found.error = max(found.error, apart.error)
    found.equal_lengths = True
    return found


def judge_trainer(
    made: GRPOTrainer, truth: torch.Tensor, up_to_a_factor: bool = False, together: bool = True
) -> Verdict:
    """Compare on a trainer with TRL's gradients `(P, parameters)`."""
    try:
        config = LearnAlignConfig(warmup_samples=0, stages=[1], success_reward="mixed_reward")
        LearnAlignCallback(made, config)
        found, coverage, alone = captured_features(made, together)
    except Exception as error:
        refused = isinstance(
            error, (ValueError, NotImplementedError, RuntimeError)
        ) and raised_by_package(error)
        return Verdict("refused" if refused else "crash", note=describe(error))
    if up_to_a_factor:
        found = [
            features * float((features * truth).sum() / features.square().sum())
            for features in found
        ]
    sizes = trainable_sizes(made)
    made_of = verdict(parameter_errors(found, truth, sizes), coverage, alone)
    for way, features in zip(BATCHINGS[-len(found) :], found, strict=True):
        errors = parameter_errors([features], truth, sizes)
        if any(not errors[name] < TOLERANCE for name in made_of.differing):
            made_of.wrong_in.append(way)
    return made_of


def verdict(errors: Mapping[str, float], coverage: Coverage, alone: bool) -> Verdict:
    """What the errors mean beside what the coverage claims."""
    claimed = {name: error for name, error in errors.items() if name not in coverage.missing}
    differing = {name: error for name, error in claimed.items() if not error < TOLERANCE}
    status = "missing" if coverage.missing else "direct" if coverage.direct else "exact"
    return Verdict(
        "wrong" if differing else status,
        max(claimed.values(), default=0.0),
        differing,
        list(coverage.direct),
        list(coverage.missing),
        alone,
    )


def raw_rows(made: GRPOTrainer) -> list[dict[str, torch.Tensor]]:
    """What TRL itself makes of the prompts, cut into the rows of each prompt; nothing of the package is in it."""
    made.model.train()
    set_seed(SEED)
    rows = [row for row in made.train_dataset for _ in range(ROLLOUTS)]
    inputs = made._generate_and_score_completions([dict(row) for row in rows])
    own = [slice(i * ROLLOUTS, (i + 1) * ROLLOUTS) for i in range(len(made.train_dataset))]
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return [
        {name: value[part] if value.ndim else value for name, value in tensors.items()}
        for part in own
    ]


def training_gradients(made: GRPOTrainer, padded: bool = True) -> torch.Tensor:
    """`(P, parameters)`: gradient of TRL's loss of each prompt, its sign turned: the objective.

    Args:
        made (`GRPOTrainer`): The trainer.
        padded (`bool`): With the left padding that TRL gave the rows beside longer prompts, or with none.
    """
    # Load balancing of experts is no part of a prompt's objective.
    made.aux_loss_enabled = False
    rows = raw_rows(made)
    return torch.stack(
        [oracles.trainer_gradient(made, own if padded else unpadded(own)) for own in rows]
    )


def unpadded(rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of one prompt without the columns in which all of them are left padding."""
    first = int(rows["prompt_mask"].any(dim=0).long().argmax())
    return {
        name: value[:, first:] if name.startswith("prompt_") else value
        for name, value in rows.items()
    }


def captured_features(
    made: GRPOTrainer, together: bool = True
) -> tuple[list[torch.Tensor], Coverage, bool]:
    """`(P, parameters)` for each way of batching, and the coverage that the last capture claims."""
    found = []
    with preserve_trainer_state(made):
        groups = roll_out(made, range(len(made.train_dataset)), SEED, oracles.SUCCESS)
        for budget in budgets(groups)[0 if together else 1 :]:
            projection = Unprojected(trainable_sizes(made))
            with gradient_capture(made, projection) as capture:
                found.append(
                    GradientFeaturizer(made, capture, budget, lambda values: values).features(
                        groups
                    )
                )
    return found, capture.coverage, capture.one_prompt_at_a_time


def budgets(groups: list[RolloutGroup]) -> list[int]:
    """Token budgets: everything at once, one prompt at a time, the rollouts of a prompt in several passes."""
    longest = max(group.tokens for group in groups)
    return [10**6, longest * ROLLOUTS, longest * 2]


def parameter_errors(
    found: list[torch.Tensor], truth: torch.Tensor, sizes: Mapping[str, int]
) -> dict[str, float]:
    """Largest relative error of each parameter's gradient, over prompts and ways of batching."""
    assert truth.shape[1] == sum(sizes.values())
    assert float(truth.norm()) > 0, "no prompt has a gradient: nothing is compared"
    floor = FLOOR * float(truth.norm(dim=1).max())
    ends = list(itertools.accumulate(sizes.values()))
    errors = {}
    for name, end, size in zip(sizes, ends, sizes.values(), strict=True):
        own = truth[:, end - size : end]
        scale = own.norm(dim=1).clamp(min=floor)
        errors[name] = max(
            float(((f[:, end - size : end] - own).norm(dim=1) / scale).max()) for f in found
        )
    return errors


def describe(error: BaseException) -> str:
    """Type and message, and the file that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:160]} ({Path(frame.filename).name})"


def raised_by_package(error: BaseException) -> bool:
    """Whether the package's own code raised it, rather than something that it called."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(trl_learnalign.__file__).parent in Path(frame.filename).parents


# The cases


def architecture(family: str) -> Case:
    """Full training of a family."""

    def build(folder: Path) -> GRPOTrainer:
        return trainer(folder, architectures.build(family, len(cases.tokenizer())))

    return Case("architecture", family, build)


PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
# Name → PEFT method, its settings, the family it is put on.
ADAPTERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LoRA": ("LORA", {}, "llama"),
    "rsLoRA": ("LORA", dict(use_rslora=True), "llama"),
    "DoRA": ("LORA", dict(use_dora=True), "llama"),
    "LoRA with bias": ("LORA", dict(lora_bias=True), "llama"),
    "LoRA on every linear layer": ("LORA", dict(target_modules="all-linear"), "llama"),
    "LoRA on the embedding": ("LORA", dict(target_modules=["embed_tokens", "q_proj"]), "llama"),
    "LoRA on the head": ("LORA", dict(target_modules=["lm_head", "q_proj"]), "llama"),
    "LoRA on a tied head": ("LORA", dict(target_modules=["lm_head", "q_proj"]), "gemma"),
    "DoRA on the embedding": (
        "LORA",
        dict(target_modules=["embed_tokens", "q_proj"], use_dora=True),
        "llama",
    ),
    "LoRA, biases trained": ("LORA", dict(bias="all"), "qwen2"),
    "LoRA, head and embedding saved": (
        "LORA",
        dict(modules_to_save=["lm_head", "embed_tokens"]),
        "llama",
    ),
    "LoRA, new tokens": ("LORA", dict(trainable_token_indices=[3, 4, 5]), "llama"),
    "LoRA on GPT-2": (
        "LORA",
        dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "gpt2",
    ),
    "LoRA on fused experts": (
        "LORA",
        dict(target_parameters=["experts.gate_up_proj"], lora_dropout=0.0),
        "mixtral",
    ),
    "LoRA on Mamba": ("LORA", dict(target_modules=["in_proj", "x_proj"]), "mamba"),
    "PiSSA": ("LORA", dict(init_lora_weights="pissa"), "llama"),
    "AdaLoRA": ("ADALORA", dict(total_step=10, init_r=4, target_r=2), "llama"),
    "LoHa": ("LOHA", {}, "llama"),
    "LoKr": ("LOKR", {}, "llama"),
    "OFT": ("OFT", dict(r=0, oft_block_size=4), "llama"),
    "BOFT": ("BOFT", dict(boft_block_size=4), "llama"),
    "IA3": ("IA3", dict(feedforward_modules=["down_proj"]), "llama"),
    "VeRA": ("VERA", {}, "llama"),
    "PVeRA": ("PVERA", {}, "llama"),
    "VB-LoRA": ("VBLORA", dict(num_vectors=8, vector_length=4, topk=2), "llama"),
    "FourierFT": ("FOURIERFT", dict(n_frequency=12), "llama"),
    "WaveFT": ("WAVEFT", dict(n_frequency=12), "llama"),
    "LN tuning": ("LN_TUNING", dict(target_modules=["input_layernorm", "norm"]), "llama"),
    "prompt tuning": ("PROMPT_TUNING", dict(num_virtual_tokens=3), "llama"),
    "p-tuning": ("P_TUNING", dict(num_virtual_tokens=3, encoder_hidden_size=8), "llama"),
    "prefix tuning": ("PREFIX_TUNING", dict(num_virtual_tokens=3), "llama"),
    "HRA": ("HRA", {}, "llama"),
    "MiSS": ("MISS", {}, "llama"),
    "MiSS (bat)": ("MISS", dict(init_weights="bat"), "llama"),
    "RandLoRA": ("RANDLORA", {}, "llama"),
    "RoAd": ("ROAD", dict(group_size=8), "llama"),
    "SHiRA": ("SHIRA", dict(r=1), "llama"),
    "C3A": ("C3A", dict(block_size=4), "llama"),
    "OSF": ("OSF", dict(target_modules=["q_proj"]), "llama"),
    "DeLoRA": ("DELORA", {}, "llama"),
    "GraLoRA": ("GRALORA", dict(gralora_k=2), "llama"),
    "HiRA": ("HIRA", {}, "llama"),
    "TinyLoRA": ("TINYLORA", {}, "llama"),
    "UniLoRA": ("UNILORA", {}, "llama"),
    "PSOFT": ("PSOFT", {}, "llama"),
    "PEANuT": ("PEANUT", {}, "llama"),
    "GLoRA": ("GLORA", {}, "llama"),
    "Lily": ("LILY", {}, "llama"),
    "FRoD": ("FROD", {}, "llama"),
    "BEFT": ("BEFT", {}, "qwen2"),
    "AdaMSS": ("ADAMSS", {}, "llama"),
    "DEFT": ("DEFT", {}, "llama"),
    "SHADOW": ("SHADOW", dict(target_modules=None), "llama"),
    "SuperTuning": ("SUPERTUNING", {}, "llama"),
    "Poly": ("POLY", {}, "llama"),
    "trainable tokens": (
        "TRAINABLE_TOKENS",
        dict(token_indices=[3, 4, 5], target_modules=["embed_tokens"]),
        "llama",
    ),
    "LLaMA-Adapter": (
        "ADAPTION_PROMPT",
        dict(adapter_len=3, adapter_layers=1, target_modules="self_attn"),
        "llama",
    ),
    "CPT": (
        "CPT",
        dict(cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
        "llama",
    ),
    "cartridge": ("CARTRIDGE", dict(num_virtual_tokens=3), "llama"),
    "multitask prompt tuning": (
        "MULTITASK_PROMPT_TUNING",
        dict(num_virtual_tokens=3, num_tasks=1),
        "llama",
    ),
}


def adapter_config(method: str, options: Mapping[str, Any]) -> Any:
    """A PEFT configuration of rank 4 on three projections, wherever the method has such settings."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    defaults = dict(task_type=TaskType.CAUSAL_LM, r=4, target_modules=PROJECTIONS)
    declared = {
        name: value for name, value in defaults.items() if name in kind.__dataclass_fields__
    }
    if "target_parameters" in options:
        declared["target_modules"] = None
    return kind(**{**declared, **options})


def adapter(name: str) -> Case:
    """A PEFT method on a frozen model."""
    method, options, family = ADAPTERS[name]

    def build(folder: Path) -> GRPOTrainer:
        policy = architectures.build(family, len(cases.tokenizer()))
        return moved(trainer(folder, policy, peft_config=adapter_config(method, options)))

    return Case("adapter", name, build)


def xlora(folder: Path) -> GRPOTrainer:
    """X-LoRA mixes adapters that lie on disk."""
    from peft import XLoraConfig, get_peft_model

    vocabulary = len(cases.tokenizer())
    paths = {}
    for i in range(2):
        made = get_peft_model(architectures.build("llama", vocabulary), adapter_config("LORA", {}))
        made.save_pretrained(folder / str(i))
        paths[str(i)] = str(folder / str(i))
    policy = architectures.build("llama", vocabulary)
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        adapters=paths,
        xlora_depth=1,
        use_trainable_adapters=True,
    )
    policy.config.use_cache = False  # X-LoRA asks for it
    return moved(trainer(folder, policy, peft_config=config))


def frozen(keep: Callable[[str], bool], family: str = "qwen2") -> Callable[[Path], GRPOTrainer]:
    """Training of the parameters whose name `keep` accepts."""

    def build(folder: Path) -> GRPOTrainer:
        policy = architectures.build(family, len(cases.tokenizer()))
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(keep(name))
        return trainer(folder, policy)

    return build


def setting(name: str, up_to_a_factor: bool = False, **options: Any) -> Case:
    """Settings of TRL on a Qwen2 with a reference model where one is needed."""

    def build(folder: Path) -> GRPOTrainer:
        cases.model(tie_word_embeddings=False).save_pretrained(folder / "policy")
        return moved(
            trainer(folder, AutoModelForCausalLM.from_pretrained(folder / "policy"), **options),
            0.02,
        )

    return Case("setting", name, build, up_to_a_factor)


class TimeFirst(nn.Module):
    """Works on `(T, B, H)` inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x.transpose(0, 1))).transpose(0, 1)


class OffThePath(nn.Module):
    """A projection of a fixed table, which hangs on no token."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(16))
        self.inner, self.gate = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.gate(self.table)


class OwnEmbedding(nn.Module):
    """An embedding of its own, of what the tokens' states say."""

    def __init__(self, **options: Any):
        super().__init__()
        self.table, self.inner = nn.Embedding(8, 16, **options), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.table((x.sum(dim=-1).abs() * 50).long() % 8)


class Twice(nn.Module):
    """One layer called twice, the second time on what the first gave."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Functional(nn.Module):
    """Weights of a layer used without calling it, and once with: as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(x), self.inner.weight) + self.inner(x)


class Flattened(nn.Module):
    """Packs tokens of all rows into one axis, padding left out or not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x.reshape(1, -1, x.shape[-1]))).view_as(x)


class Convolution(nn.Module):
    """Causal depthwise convolution over time, as state-space models have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(16, 16, 3, groups=16, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Heads(nn.Module):
    """A layer and a norm over the heads, `(B, heads, T, head)` and `(B · heads, T, head)`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.folded = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        y = self.norm(self.inner(heads))
        y = self.folded(y.reshape(-1, *y.shape[2:])).view_as(y)
        return y.transpose(1, 2).flatten(-2)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "experts in a list": cases.RoutedList,
    "time before rows": TimeFirst,
    "layer on a buffer": OffThePath,
    "embedding of states": OwnEmbedding,
    "embedding scaled by frequency": lambda: OwnEmbedding(scale_grad_by_freq=True),
    "embedding with a largest norm": lambda: OwnEmbedding(max_norm=0.5),
    "embedding with padding": lambda: OwnEmbedding(padding_idx=3),
    "layer called twice": Twice,
    "weight used without its module too": Functional,
    "rows packed into one": Flattened,
    "convolution": Convolution,
    "batch of heads": Heads,
}


def module(name: str) -> Case:
    """A Qwen2 with such a module in place of the feed-forward part of its first layer."""

    def build(folder: Path) -> GRPOTrainer:
        policy = architectures.build("qwen2", len(cases.tokenizer()))
        torch.manual_seed(2)
        policy.model.layers[0].mlp = MODULES[name]()
        return moved(trainer(folder, policy))

    return Case("module", name, build)


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


def settings() -> Iterator[Case]:
    """Every loss with and without a KL term, and what else changes the loss."""
    variants: dict[str, dict[str, Any]] = {
        "": {},
        "sequence level": dict(importance_sampling_level="sequence"),
        "entropy_coef": dict(entropy_coef=0.05),
        "top_entropy_quantile": dict(top_entropy_quantile=0.5),
        "top_entropy_quantile and entropy_coef": dict(top_entropy_quantile=0.5, entropy_coef=0.05),
        "num_iterations 2": dict(num_iterations=2, steps_per_generation=2),
        "scale_rewards none": dict(scale_rewards="none"),
        "scale_rewards batch": dict(scale_rewards="batch"),
    }
    for loss, beta, (variant, options) in itertools.product(LOSSES, (0.0, 0.04), variants.items()):
        name = ", ".join(part for part in (loss, f"beta {beta:g}", variant) if part)
        yield setting(name, variant == "scale_rewards batch", loss_type=loss, beta=beta, **options)
    others: dict[str, dict[str, Any]] = {
        "temperature": dict(temperature=0.6),
        "adaptive entropy": dict(use_adaptive_entropy=True),
        "delta": dict(delta=1.5),
        "bias-corrected KL": dict(use_bias_correction_kl=True, beta=0.04),
        "off-policy mask": dict(off_policy_mask_threshold=0.5),
        "truncated completions masked": dict(mask_truncated_completions=True),
        "gradient checkpointing": dict(gradient_checkpointing=True),
        "float32 head": dict(cast_lm_head_to_fp32=True),
        "padding to a multiple": dict(pad_to_multiple_of=8),
        "two rewards": dict(rewards=[mixed_reward, cases.length_reward], reward_weights=[1.0, 0.5]),
        "two rewards, normalized then summed": dict(
            rewards=[mixed_reward, cases.length_reward],
            multi_objective_aggregation="normalize_then_sum",
        ),
    }
    for name, options in others.items():
        # TRL divides these advantages by one deviation over its batch: one factor for all prompts.
        yield setting(name, name.endswith("normalized then summed"), **options)


def every_case() -> list[Case]:
    """All of them."""
    made = [architecture(family) for family in architectures.FAMILIES]
    made += [module(name) for name in MODULES]
    made += [adapter(name) for name in ADAPTERS]
    lora = LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    made += [
        Case("adapter", "X-LoRA", xlora),
        Case("adapter", "biases alone", frozen(lambda name: name.endswith("bias"))),
        Case("adapter", "embedding alone", frozen(lambda name: "embed" in name)),
        Case("adapter", "last layer alone", frozen(lambda name: "layers.1." in name)),
        Case("adapter", "head alone", frozen(lambda name: "lm_head" in name, "llama")),
        Case("adapter", "experts alone", frozen(lambda name: "experts" in name, "mixtral")),
        setting("LoRA, beta 0.04", peft_config=lora, beta=0.04),
    ]
    return made + list(settings())
