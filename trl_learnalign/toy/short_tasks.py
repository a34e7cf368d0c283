"""Short tasks for small *pretrained* models: a few worked examples, then the question.

    tree -> tree<|im_end|>
    cloud -> cloud<|im_end|>
    bread ->

Each prompt shows how questions of its family are answered, so the model has to find the rule, apply it and stop: a
completion counts if it is the answer and nothing else. Prompts take some 25 tokens and completions eight at most, so
that reinforcement learning of a model of 135 M parameters fits into minutes of one CPU core.

Ten families, in three groups by what SmolLM2-135M-Instruct makes of them at temperature 1: *easy* (right nearly always
from the start), *learnable*, and *hopeless* (hardly ever right, and not to be learned in a run of this length). A
shuffled batch therefore has many groups of rollouts without a gradient, as real pools do.

Questions and answers come from `reasoning_gym` where it has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from datasets import Dataset

try:
    from reasoning_gym import create_dataset
except ImportError as error:  # an optional dependency: the selection itself needs no task generator
    raise ImportError(
        "trl_learnalign.toy needs the package reasoning-gym: pip install 'trl-learnalign[quickstart]'"
    ) from error

MAX_COMPLETION_LENGTH = 8
"""Tokens of a completion at most; right ones take 2 to 5."""

END = "<|im_end|>"
"""What ends an example: the end token of SmolLM2 and Qwen. Pass your tokenizer's `eos_token` for another model."""

SPLITS = {"train": 0.6, "dev": 0.15, "heldout": 0.25}
"""Share of a family's questions in each split. Examples are questions of `"train"` in every split."""

_WORDS = """
apple arm baby bag ball bank bar bear bed bell belt bird board boat body bone book bottle bowl box boy brain branch
bread bridge brother bus butter button cake camera camp card cat chair child church city class clock cloud coat coffee
corn cow cup day desk dinner doctor dog door dress drink duck ear earth egg eye face farm father field finger fire fish
floor flower food foot forest fork friend frog fruit game garden girl glass gold grass green hair hand hat head heart
hill home horse hospital hotel house ice island juice key king kitchen knife lake lamp land leaf leg letter light lion
lunch map market meat milk mirror money monkey moon mother mountain mouse mouth music neck night nose ocean office oil
orange paper park pen pencil picture pig plane plant plate pocket potato queen radio rain ring river road rock roof
room rose salt school sea seat sheep ship shirt shoe shop sister sky sleep snow soap song soup spoon spring star stone
store storm street sugar summer sun table tail tea teacher tent tiger time tooth tower town train tree truck uncle
village voice wall watch water wind window wine winter wolf wood word worker world yard year zoo
"""

_CAPITALS = """
Afghanistan:Kabul Albania:Tirana Algeria:Algiers Angola:Luanda Argentina:Buenos_Aires Armenia:Yerevan
Australia:Canberra Austria:Vienna Azerbaijan:Baku Bahrain:Manama Bangladesh:Dhaka Belarus:Minsk Belgium:Brussels
Bhutan:Thimphu Bolivia:Sucre Bosnia:Sarajevo Brazil:Brasília Bulgaria:Sofia Cambodia:Phnom_Penh Cameroon:Yaoundé
Canada:Ottawa Chad:N'Djamena Chile:Santiago China:Beijing Colombia:Bogotá Croatia:Zagreb Cuba:Havana Cyprus:Nicosia
Denmark:Copenhagen Ecuador:Quito Egypt:Cairo Eritrea:Asmara Estonia:Tallinn Ethiopia:Addis_Ababa Fiji:Suva
Finland:Helsinki France:Paris Gabon:Libreville Georgia:Tbilisi Germany:Berlin Ghana:Accra Greece:Athens Guinea:Conakry
Guyana:Georgetown Haiti:Port-au-Prince Honduras:Tegucigalpa Hungary:Budapest Iceland:Reykjavik India:New_Delhi
Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Ireland:Dublin Italy:Rome Jamaica:Kingston Japan:Tokyo Jordan:Amman
Kazakhstan:Astana Kenya:Nairobi Kyrgyzstan:Bishkek Laos:Vientiane Latvia:Riga Lebanon:Beirut Liberia:Monrovia
Libya:Tripoli Lithuania:Vilnius Madagascar:Antananarivo Malawi:Lilongwe Malaysia:Kuala_Lumpur Mali:Bamako
Malta:Valletta Moldova:Chisinau Mongolia:Ulaanbaatar Morocco:Rabat Mozambique:Maputo Namibia:Windhoek Nepal:Kathmandu
Netherlands:Amsterdam Nicaragua:Managua Niger:Niamey Nigeria:Abuja Norway:Oslo Oman:Muscat Pakistan:Islamabad
Paraguay:Asunción Peru:Lima Philippines:Manila Poland:Warsaw Portugal:Lisbon Qatar:Doha Romania:Bucharest
Russia:Moscow Rwanda:Kigali Senegal:Dakar Serbia:Belgrade Slovakia:Bratislava Slovenia:Ljubljana Somalia:Mogadishu
Spain:Madrid Sudan:Khartoum Sweden:Stockholm Switzerland:Bern Syria:Damascus Tajikistan:Dushanbe Tanzania:Dodoma
Thailand:Bangkok Tunisia:Tunis Turkey:Ankara Uganda:Kampala Ukraine:Kyiv Uruguay:Montevideo Uzbekistan:Tashkent
Venezuela:Caracas Vietnam:Hanoi Yemen:Sana'a Zambia:Lusaka Zimbabwe:Harare
"""

_WITHOUT_PLURAL = """
bread butter child coffee corn earth fish foot gold grass hair ice juice knife leaf meat milk money mouse music oil
potato rain salt sheep snow soap sugar tea tooth water wolf wood
"""

WORDS = _WORDS.split()
WITHOUT_PLURAL = _WITHOUT_PLURAL.split()
CAPITALS = dict(pair.split(":") for pair in _CAPITALS.split())

Questions = Iterator[tuple[str, str]]


# ---- questions and their answers ------------------------------------------------------------------------------------


def _from_reasoning_gym(name: str, field: str, **config: Any) -> Callable[[], Questions]:
    """Tasks of `reasoning_gym` without its instructions: the examples say what is to be done."""

    def questions() -> Questions:
        for entry in create_dataset(name, seed=0, size=2000, **config):
            yield entry["metadata"][field], entry["answer"]

    return questions


def _copied_numbers() -> Questions:
    yield from ((str(number), str(number)) for number in range(10, 100))


def _next_numbers() -> Questions:
    yield from ((str(number), str(number + 1)) for number in range(10, 300))


def _larger_numbers() -> Questions:
    random = Random("larger")
    for _ in range(1500):
        first, second = random.sample(range(10, 100), 2)
        yield f"{first}, {second}", str(max(first, second))


def _last_words() -> Questions:
    random = Random("last_word")
    for _ in range(1500):
        words = random.sample(WORDS, 3)
        yield " ".join(words), words[-1]


def _plurals() -> Questions:
    for word in WORDS:
        if word in WITHOUT_PLURAL:
            continue
        if word.endswith(("s", "sh", "ch", "x")):
            yield word, f"{word}es"
        elif word.endswith("y") and word[-2] not in "aeiou":
            yield word, f"{word[:-1]}ies"
        else:
            yield word, f"{word}s"


def _capitals() -> Questions:
    yield from ((country, capital.replace("_", " ")) for country, capital in CAPITALS.items())


# ---- families -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShortFamily:
    """One kind of question.

    Args:
        questions (`Callable`): All pairs of question and answer.
        examples (`int`): Worked examples in a prompt.
        weight (`float`): Share of the pool, in percent.
        group (`str`): `"easy"`, `"learnable"` or `"hopeless"`, as SmolLM2-135M-Instruct finds it.
    """

    questions: Callable[[], Questions]
    examples: int
    weight: float
    group: str


_SMALL_SUMS = _from_reasoning_gym("chain_sum", "expression", max_terms=2, max_digits=1)
_SMALL_PRODUCTS = _from_reasoning_gym("products", "expression", max_digits=1)
_LARGE_PRODUCTS = _from_reasoning_gym("products", "expression", min_digits=2, max_digits=2)
_BACKWARD = _from_reasoning_gym("spell_backward", "word", min_word_len=5, max_word_len=7)

SHORT_FAMILIES: dict[str, ShortFamily] = {
    "copy_number": ShortFamily(_copied_numbers, 4, 15, "easy"),
    "sum": ShortFamily(_SMALL_SUMS, 2, 9, "learnable"),
    "product": ShortFamily(_SMALL_PRODUCTS, 2, 9, "learnable"),
    "larger": ShortFamily(_larger_numbers, 2, 9, "learnable"),
    "next_number": ShortFamily(_next_numbers, 2, 9, "learnable"),
    "last_word": ShortFamily(_last_words, 2, 9, "learnable"),
    "capital": ShortFamily(_capitals, 3, 9, "learnable"),
    "plural": ShortFamily(_plurals, 2, 9, "learnable"),
    "large_product": ShortFamily(_LARGE_PRODUCTS, 2, 11, "hopeless"),
    "backward": ShortFamily(_BACKWARD, 2, 11, "hopeless"),
}


def short_split_of(family: str, question: str) -> str:
    """Split a question belongs to: a function of the question alone, so that splits cannot overlap."""
    digest = hashlib.blake2b(f"{family}/{question}".encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little") / 2**64
    for split, share in SPLITS.items():
        if draw < share:
            return split
        draw -= share
    return next(iter(SPLITS))  # reached by rounding only


@cache
def short_questions(family: str, split: str) -> dict[str, str]:
    """Questions of a family in one split and their answers, in a fixed order."""
    pairs = SHORT_FAMILIES[family].questions()
    return {
        question: answer for question, answer in pairs if short_split_of(family, question) == split
    }


# ---- pools ----------------------------------------------------------------------------------------------------------


def build_short_pool(size: int, seed: int = 0, split: str = "train", end: str = END) -> Dataset:
    """Pool of different prompts, in the proportions of the families' weights.

    Args:
        size (`int`): Number of prompts, 20 or more.
        seed (`int`, *optional*, defaults to `0`): Decides questions, examples and their order.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"dev"` or `"heldout"`. No question occurs in two splits; all examples are of `"train"`.
        end (`str`, *optional*, defaults to `END`): The tokenizer's `eos_token`.

    Returns:
        `Dataset`: Columns `prompt` (a string), `answer`, `solution` (the expected completion), `family` and `group`.

    Raises:
        ValueError: If the split is unknown or the pool is too small to hold every family.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(map(repr, SPLITS))}")
    if size < 20:
        raise ValueError(f"size={size}: a pool of ten families needs at least 20 prompts")
    rows = []
    for family, count in _quotas(size).items():
        rows += _prompts(family, count, Random(f"{seed}/{family}/{split}"), split, end)
    Random(f"{seed}/{split}").shuffle(rows)
    return Dataset.from_list(rows)


def _quotas(size: int) -> dict[str, int]:
    """Whole numbers that sum to `size`, by the largest remainders."""
    total = sum(family.weight for family in SHORT_FAMILIES.values())
    shares = {name: size * family.weight / total for name, family in SHORT_FAMILIES.items()}
    counts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    for name in by_remainder[: size - sum(counts.values())]:
        counts[name] += 1
    return counts


def _prompts(family: str, count: int, random: Random, split: str, end: str) -> list[dict[str, str]]:
    """Different prompts of one family. Few questions are asked again with other examples."""
    answers = short_questions(family, split)
    examples = short_questions(family, "train")
    rows: dict[str, dict[str, str]] = {}
    order: list[str] = []
    while len(rows) < count:
        order = order or random.sample(list(answers), len(answers))
        question = order.pop()
        shown = random.sample(
            [other for other in examples if other != question], SHORT_FAMILIES[family].examples
        )
        lines = [f"{other} -> {examples[other]}{end}\n" for other in shown]
        prompt = "".join(lines) + f"{question} ->"
        answer = answers[question]
        group = SHORT_FAMILIES[family].group
        rows[prompt] = {
            "prompt": prompt,
            "answer": answer,
            "solution": answer,
            "family": family,
            "group": group,
        }
    return list(rows.values())


# ---- grading --------------------------------------------------------------------------------------------------------


def short_answer_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """Reward function for TRL's trainers: 1.0 where the completion is the answer and nothing else, else 0.0.

    Args:
        completions (`list`): Conversations (`[{"role": "assistant", "content": ...}]`) or plain strings.
        answer (`list[str]`): The right answer to each.
        **kwargs: The dataset's other columns and the trainer's own arguments, which are not needed.

    Returns:
        `list[float]`: One reward for each completion.
    """
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    return [float(text.strip() == expected) for text, expected in zip(texts, answer, strict=True)]
