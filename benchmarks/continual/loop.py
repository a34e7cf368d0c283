"""GRPO on the toy model, written out: what a selector is tuned with, several times as fast as the trainer.

The same rollouts, rewards, loss and optimizer as `GRPOTrainer` with the settings of the selection table (loss `dapo`,
`beta=0`, one update for each batch), on a Qwen2 of three small layers whose forward pass is written out here. Rows
without an advantage are left out of the backward pass, which changes nothing; prompts are read once for all their
rollouts. `tests/benchmarks/test_continual.py` holds its rollouts and its update against transformers and TRL.

Of what is published, only the choice of constants on development tasks (`continual.table.py --tune`) and the figures
of `belief_quality.py` rest on it; the cells of the table are run by the package's callback (`continual.product.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_learnalign import rng
from trl_learnalign.toy.model import MAX_COMPLETION_LENGTH


class SmallQwen2:
    """A Qwen2 with as many key heads as heads, its weights those of a transformers model.

    Axes: `R` rows, `T` tokens, `A` heads, `D` entries of a head.

    Args:
        model (`PreTrainedModel`): The model; its parameters are used in place.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config
        self.layers = model.model.layers
        self.embeddings = model.model.embed_tokens.weight
        self.final_norm = model.model.norm.weight
        self.epsilon = config.rms_norm_eps
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, self.head_size, 2) / self.head_size
        self.frequencies = config.rope_parameters["rope_theta"] ** -exponents

    def states(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Last hidden states, after the final norm.

        Args:
            tokens (`torch.Tensor`): `(R, T)`.
            positions (`torch.Tensor`): `(R, T)`, counted without padding.
            mask (`torch.Tensor`): `(R, 1, T, C + T)` of booleans: what each token may look at, the cache first.
            cache (`list`, *optional*): Keys and values of earlier tokens, `(2, R, A, C, D)` for each layer.

        Returns:
            `tuple`: `(R, T, H)`, and the cache with these tokens.
        """
        angles = positions.unsqueeze(-1) * self.frequencies
        turn = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        cosines, sines = turn.cos(), turn.sin()
        hidden = functional.embedding(tokens, self.embeddings)
        kept = []
        for number, layer in enumerate(self.layers):
            normed = self._norm(hidden, layer.input_layernorm.weight)
            attention = layer.self_attn
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            query, key, value = (
                self._heads(functional.linear(normed, p.weight, p.bias)) for p in projections
            )
            query, key = _rotated(query, cosines, sines), _rotated(key, cosines, sines)
            if cache is not None:
                key = torch.cat([cache[number][0], key], dim=2)
                value = torch.cat([cache[number][1], value], dim=2)
            kept.append(torch.stack([key, value]))
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            mixed = mixed.transpose(1, 2).reshape(hidden.shape)
            hidden = hidden + functional.linear(mixed, attention.o_proj.weight)
            normed = self._norm(hidden, layer.post_attention_layernorm.weight)
            gate = functional.silu(functional.linear(normed, layer.mlp.gate_proj.weight))
            gate = gate * functional.linear(normed, layer.mlp.up_proj.weight)
            hidden = hidden + functional.linear(gate, layer.mlp.down_proj.weight)
        return self._norm(hidden, self.final_norm), kept

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of the tied head."""
        return functional.linear(states, self.embeddings)

    def _heads(self, values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)

    def _norm(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(values, weight.shape, weight, self.epsilon)


def _rotated(values: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    left, right = values.chunk(2, dim=-1)
    return values * cosines + torch.cat([-right, left], dim=-1) * sines


@dataclass(frozen=True)
class Rollouts:
    """Groups of completions. Axes: `P` prompts, `G` rollouts, `T` tokens of the longest.

    Args:
        rows (`np.ndarray`): `(P,)` rows of the pool.
        prompt_tokens (`torch.Tensor`): `(P, L)`, padded on the left.
        prompt_mask (`torch.Tensor`): `(P, L)`.
        tokens (`torch.Tensor`): `(P, G, T)`, padded on the right.
        mask (`torch.Tensor`): `(P, G, T)`: the end token counts.
        rewards (`torch.Tensor`): `(P, G)`, 0 or 1, or in between if they are graded.
    """

    rows: np.ndarray
    prompt_tokens: torch.Tensor
    prompt_mask: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor

    @property
    def right(self) -> np.ndarray:
        """Right rollouts of each prompt, `(P,)`."""
        return self.rewards.sum(dim=1).numpy().astype(np.int64)

    @property
    def mixed(self) -> np.ndarray:
        """Whether the rewards of a group differ, `(P,)` booleans."""
        return (self.rewards != self.rewards[:, :1]).any(dim=1).numpy()

    @property
    def generated(self) -> np.ndarray:
        """Tokens generated for each prompt, `(P,)`."""
        return self.mask.sum(dim=(1, 2)).numpy()

    @property
    def read(self) -> np.ndarray:
        """Prompt tokens read, once for each rollout, `(P,)`."""
        return (self.prompt_mask.sum(dim=1) * self.rewards.shape[1]).numpy()

    @property
    def row_tokens(self) -> torch.Tensor:
        """Tokens of prompt and completion of each rollout, `(P, G)`."""
        return self.mask.sum(dim=2) + self.prompt_mask.sum(dim=1, keepdim=True)

    def select(self, places: np.ndarray) -> Rollouts:
        """Some of the groups."""
        chosen = torch.from_numpy(np.asarray(places))
        parts = self.prompt_tokens, self.prompt_mask, self.tokens, self.mask, self.rewards
        return Rollouts(self.rows[places], *(part[chosen] for part in parts))

    @staticmethod
    def joined(parts: Sequence[Rollouts]) -> Rollouts:
        """Groups of several batches."""
        before = max(part.prompt_tokens.shape[1] for part in parts)
        after = max(part.tokens.shape[2] for part in parts)
        return Rollouts(
            np.concatenate([part.rows for part in parts]),
            torch.cat([_widened(part.prompt_tokens, before, left=True) for part in parts]),
            torch.cat([_widened(part.prompt_mask, before, left=True) for part in parts]),
            torch.cat([_widened(part.tokens, after, left=False) for part in parts]),
            torch.cat([_widened(part.mask, after, left=False) for part in parts]),
            torch.cat([part.rewards for part in parts]),
        )


def _widened(values: torch.Tensor, width: int, left: bool) -> torch.Tensor:
    missing = width - values.shape[-1]
    return functional.pad(values, (missing, 0) if left else (0, missing))


class Policy:
    """The toy model in training.

    Args:
        folder (`Path`): Checkpoint folder of the base model.
        learning_rate (`float`): Constant.
        seed (`int`): Seed of the rollouts.
    """

    def __init__(self, folder: Path, learning_rate: float, seed: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.hf_model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.model = SmallQwen2(self.hf_model)
        self.optimizer = torch.optim.AdamW(
            self.hf_model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True
        )
        self.seed = seed

    def tokens_of(self, pool: Dataset) -> list[list[int]]:
        """Prompts as tokens."""
        texts = [messages[0]["content"] + "=" for messages in pool["prompt"]]
        return self.tokenizer(texts)["input_ids"]

    def embed(self, prompts: list[list[int]]) -> torch.Tensor:
        """Mean last hidden state of each prompt's tokens, `(P, H)`."""
        tokens, mask = self.padded(prompts)
        with torch.no_grad():
            states, _ = self.model.states(tokens, *_reading(mask))
        weights = mask.unsqueeze(-1).float()
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    @torch.no_grad()
    def roll_out(
        self,
        rows: np.ndarray,
        prompts: list[list[int]],
        answers: list[str],
        group: int,
        number: int | None,
    ) -> Rollouts:
        """Sample completions.

        Args:
            rows (`np.ndarray`): `(P,)`, noted.
            prompts (`list`): Token lists, P of them.
            answers (`list[str]`): The right answers.
            group (`int`): G.
            number (`int`, *optional*): Part of the seed; `None`: greedily.
        """
        tokens, mask = self.padded(prompts)
        completions, there = self._complete(tokens, mask, group, number)
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        wanted = [answer for answer in answers for _ in range(group)]
        rewards = [self.reward(text, answer) for text, answer in zip(texts, wanted, strict=True)]
        shape = len(prompts), group
        return Rollouts(
            np.asarray(rows),
            tokens,
            mask,
            completions.unflatten(0, shape),
            there.unflatten(0, shape),
            torch.tensor(rewards).unflatten(0, shape),
        )

    def reward(self, text: str, answer: str) -> float:
        """1 for the right answer and 0 for any other."""
        return float(text.strip() == answer)

    def _complete(
        self, tokens: torch.Tensor, mask: torch.Tensor, group: int, number: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions and their mask, `(P G, T)` each; rows that have ended are not computed any further."""
        states, cache = self.model.states(tokens, *_reading(mask))
        cache = [part.repeat_interleave(group, dim=1) for part in cache]
        logits = self.model.logits(states[:, -1]).repeat_interleave(group, dim=0)
        seen = mask.repeat_interleave(group, dim=0)
        lengths = seen.sum(dim=1, keepdim=True)
        generator = torch.Generator().manual_seed(rng.key(self.seed, "rollouts", number or 0) >> 1)
        completions = torch.full((len(seen), MAX_COMPLETION_LENGTH), self.tokenizer.pad_token_id)
        there = torch.zeros_like(completions, dtype=torch.bool)
        going = torch.arange(len(seen))
        for step in range(MAX_COMPLETION_LENGTH):
            chosen = logits.argmax(dim=-1) if number is None else _sampled(logits, generator)
            completions[going, step] = chosen
            there[going, step] = True
            left = torch.nonzero(chosen != self.tokenizer.eos_token_id).flatten()
            if not len(left) or step + 1 == MAX_COMPLETION_LENGTH:
                break
            if len(left) < len(going):
                going, chosen, seen, lengths = going[left], chosen[left], seen[left], lengths[left]
                cache = [part[:, left] for part in cache]
            seen = torch.cat([seen, torch.ones_like(lengths)], dim=1)
            states, cache = self.model.states(
                chosen[:, None], lengths + step, seen[:, None, None, :].bool(), cache
            )
            logits = self.model.logits(states[:, -1])
        return completions[:, : step + 1], there[:, : step + 1]

    def update(self, rollouts: Rollouts, advantages: torch.Tensor | None = None) -> None:
        """One optimizer step; rows without an advantage only count in the denominator.

        Args:
            rollouts (`Rollouts`): The rollouts.
            advantages (`torch.Tensor`, *optional*): `(P, G)`; default: those of GRPO.
        """
        loss = self.loss(rollouts, advantages)
        self.optimizer.zero_grad()
        if loss is not None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.hf_model.parameters(), 1.0)
        else:  # as the trainer does: a gradient of zero, and the optimizer's momentum goes on
            for parameter in self.hf_model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def loss(
        self, rollouts: Rollouts, advantages: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """TRL's `dapo` loss of one batch; `None` if no row has an advantage. Arguments as in [`update`]."""
        if advantages is None:
            advantages = group_advantages(rollouts.rewards)
        useful = torch.nonzero(advantages.flatten()).flatten()
        if not len(useful):
            return None
        prompts = useful // advantages.shape[1]
        tokens, there = (
            values.flatten(0, 1)[useful] for values in (rollouts.tokens, rollouts.mask)
        )
        mask = torch.cat([rollouts.prompt_mask[prompts], there.long()], dim=1)
        inputs = torch.cat([rollouts.prompt_tokens[prompts], tokens], dim=1)
        states, _ = self.model.states(inputs, *_reading(mask))
        width = tokens.shape[1]
        logits = self.model.logits(states[:, -width - 1 : -1])
        log_probabilities = -functional.cross_entropy(
            logits.flatten(0, 1), tokens.flatten(), reduction="none"
        )
        ratio = torch.exp(log_probabilities - log_probabilities.detach()).reshape(tokens.shape)
        weights = there * advantages.flatten()[useful].unsqueeze(1)
        return -(ratio * weights).sum() / rollouts.mask.sum()

    def accuracy(self, prompts: list[list[int]], answers: list[str]) -> float:
        """Mean reward of the greedy answers: the share of right ones."""
        rollouts = self.roll_out(np.arange(len(prompts)), prompts, answers, 1, None)
        return float(rollouts.rewards.mean())

    def padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts padded on the left, and their mask, `(P, L)` each."""
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return tokens, mask


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """TRL's advantages of groups, `(P, G)`: exactly 0 where all rewards are 0, or all are 1."""
    deviations = rewards - rewards.mean(dim=1, keepdim=True)
    return deviations / (rewards.std(dim=1, keepdim=True) + 1e-4)


def success_rates(
    policy: Policy, prompts: list[list[int]], answers: list[str], batch: int = 2000
) -> np.ndarray:
    """Probability that a rollout is right, `(P,)` float64: that of the answer and its end, read once.

    Args:
        policy (`Policy`): The policy.
        prompts (`list`): Token lists, P of them.
        answers (`list[str]`): The right answers.
        batch (`int`): Texts of a forward pass.
    """
    end, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
    wanted = [[*answer, end] for answer in policy.tokenizer(list(answers))["input_ids"]]
    width = max(map(len, wanted))
    found = []
    for start in range(0, len(prompts), batch):
        tokens, mask = policy.padded(prompts[start : start + batch])
        answer_tokens = torch.tensor(
            [own + [pad] * (width - len(own)) for own in wanted[start : start + batch]]
        )
        there = torch.tensor(
            [[1] * len(own) + [0] * (width - len(own)) for own in wanted[start : start + batch]]
        )
        mask = torch.cat([mask, there], dim=1)
        with torch.no_grad():
            states, _ = policy.model.states(
                torch.cat([tokens, answer_tokens], dim=1), *_reading(mask)
            )
            logits = policy.model.logits(states[:, -width - 1 : -1])
        losses = functional.cross_entropy(logits.transpose(1, 2), answer_tokens, reduction="none")
        found.append(torch.exp(-(losses * there).double().sum(dim=1)))
    return torch.cat(found).numpy()


def _reading(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and what each token may look at, for whole texts."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    width = mask.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    allowed = causal & mask[:, None, None, :].bool()
    # Padding looks at itself, or the softmax of nothing would be NaN.
    return positions, allowed | torch.eye(width, dtype=torch.bool)


def _sampled(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Tokens drawn at temperature 1, by inverting the distribution function."""
    reached = logits.double().softmax(dim=-1).cumsum(dim=-1)
    draws = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    return torch.searchsorted(reached, draws * reached[:, -1:], right=True).squeeze(1)
