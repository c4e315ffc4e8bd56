"""A sentiment task generated from a seed, for demonstrations that run offline in minutes."""

import random
from dataclasses import dataclass

from datasets import Dataset, DatasetDict, Features, Value

from .glue import UNLABELED, TextTask


DEMO_TASK = TextTask("demo", ("sentence",), ("negative", "positive"), ("accuracy",), "accuracy")
MAX_ROWS = 20_000  # per split; with far more, new sentences run out
_FEATURES = Features({"sentence": Value("string"), "label": Value("int64")})


@dataclass(frozen=True)
class Vocabulary:
    """The words that one part of the data draws from; `adjectives[label]` carries the sentiment."""

    nouns: tuple[str, ...]
    adjectives: tuple[tuple[str, ...], tuple[str, ...]]

    def __add__(self, other: "Vocabulary") -> "Vocabulary":
        negative, positive = (mine + theirs for mine, theirs in zip(self.adjectives, other.adjectives, strict=True))
        return Vocabulary(self.nouns + other.nouns, (negative, positive))


# The labelled rows show only these words, the validation rows only those of HELD_OUT: who answers right there knows
# the words from pretraining, or from the teacher's answers on the unlabelled rows, which use both.
LABELED = Vocabulary(
    nouns=tuple("film hotel soup teacher phone concert novel garden bus waiter".split()),
    adjectives=(
        tuple("bad awful boring rude ugly broken".split()),
        tuple("good great lovely funny clean friendly".split()),
    ),
)
HELD_OUT = Vocabulary(
    nouns=tuple(
        "play room dessert coach camera band essay park train clerk museum sofa coffee lecture jacket airline doctor "
        "beach salad website".split()
    ),
    adjectives=(
        tuple(
            "terrible horrible dull nasty dreadful disappointing tedious filthy miserable lousy annoying pathetic "
            "mediocre unpleasant shabby clumsy appalling depressing careless worthless unreliable bland tacky hostile "
            "incompetent disgusting useless dishonest repulsive inferior".split()
        ),
        tuple(
            "excellent wonderful brilliant delightful superb charming impressive fantastic amazing splendid enjoyable "
            "remarkable pleasant elegant marvelous outstanding reliable inspiring beautiful perfect terrific gorgeous "
            "magnificent admirable refreshing honest skillful generous adorable superior".split()
        ),
    ),
)

SUBJECTS = ("the {}", "this {}", "my {}", "our {}", "their {}", "that {}")
DEGREES = ("", "", "", "very ", "really ", "quite ", "rather ", "truly ", "so ", "a little ", "somewhat ")
NEGATIONS = (
    "was not {}",
    "was never {}",
    "was hardly {}",
    "was far from {}",
    "was anything but {}",
    "was not at all {}",
)
OPENINGS = ("", "", "", "in the end ", "to be fair ", "yesterday ", "once again ", "we all agreed that ")


def _clause(rng: random.Random, words: Vocabulary, label: int, negation_rate: float) -> str:
    """A clause of the given sentiment; a negated one carries an adjective of the opposite sentiment."""
    is_negated = rng.random() < negation_rate
    adjective = rng.choice(words.adjectives[1 - label if is_negated else label])
    subject = rng.choice(SUBJECTS).format(rng.choice(words.nouns))
    verb = rng.choice(NEGATIONS) if is_negated else "was " + rng.choice(DEGREES) + "{}"
    return f"{subject} {verb.format(adjective)}"


def _comparison(rng: random.Random, words: Vocabulary, label: int) -> str:
    """More of a good thing, or less of a bad one."""
    is_less = rng.random() < 0.5
    adjective = rng.choice(words.adjectives[1 - label if is_less else label])
    first, second = rng.sample(words.nouns, 2)
    return f"the {first} was {'less' if is_less else 'more'} {adjective} than the {second}"


# The clause with `{main}` decides; the other one, of the opposite sentiment, is conceded.
CONTRASTS = (
    "{other}, but {main}",
    "{other}, yet {main}",
    "although {other}, {main}",
    "{main}, although {other}",
    "{main}, even though {other}",
    "while {other}, {main}",
)


def _sentence(rng: random.Random, words: Vocabulary, label: int, contrast_rate: float, negation_rate: float) -> str:
    kind = rng.random()
    if kind < contrast_rate:
        main = _clause(rng, words, label, negation_rate)
        other = _clause(rng, words, 1 - label, negation_rate)
        body = rng.choice(CONTRASTS).format(main=main, other=other)
    elif kind < contrast_rate + 0.1:
        body = _comparison(rng, words, label)
    else:
        body = _clause(rng, words, label, negation_rate)
    return f"{rng.choice(OPENINGS)}{body} ."


def generate_demo_task(
    seed: int = 0,
    num_labeled: int = 500,
    num_unlabeled: int = 3000,
    num_validation: int = 1000,
    negation_rate: float = 0.3,
    contrast_rate: float = 0.3,
) -> tuple[DatasetDict, TextTask]:
    """
    Generate short sentences about everyday things that are positive or negative as a whole.

    The sentiment follows from an adjective, from negation ("far from lovely"), from which of two clauses decides
    ("although the soup was bland, ...") and from comparison. Validation sentences use nouns and adjectives that no
    labelled sentence has.

    Args:
        seed (`int`, *optional*, defaults to 0): The same seed gives the same rows, on every platform.
        num_labeled (`int`, *optional*, defaults to 500): Rows of `train`.
        num_unlabeled (`int`, *optional*, defaults to 3000): Rows of `unlabeled`, from all words; label `UNLABELED`.
        num_validation (`int`, *optional*, defaults to 1000): Rows of `validation`.
        negation_rate (`float`, *optional*, defaults to 0.3): Share of clauses that are negated, from 0 to 1.
        contrast_rate (`float`, *optional*, defaults to 0.3): Share of sentences with two opposed clauses, from 0 to
            0.9.

    Raises:
        `ValueError`: For a size or a rate outside its range.

    Returns:
        `tuple[DatasetDict, TextTask]`: The three splits, with no sentence twice in or across them; the task. In
        `train` and `validation` both classes are equally frequent, up to one row.
    """
    sizes = {"num_labeled": num_labeled, "num_unlabeled": num_unlabeled, "num_validation": num_validation}
    for name, size in sizes.items():
        if not 2 <= size <= MAX_ROWS:
            raise ValueError(f"{name}={size}; give a number from 2 to {MAX_ROWS}.")
    for name, rate, limit in (("negation_rate", negation_rate, 1.0), ("contrast_rate", contrast_rate, 0.9)):
        if not 0 <= rate <= limit:
            raise ValueError(f"{name}={rate}; give a share from 0 to {limit}.")
    rng = random.Random(seed)
    seen: set[str] = set()

    def generate(words: Vocabulary, size: int) -> Dataset:
        rows: list[tuple[str, int]] = []
        while len(rows) < size:
            label = len(rows) % 2
            sentence = _sentence(rng, words, label, contrast_rate, negation_rate)
            if sentence not in seen:
                seen.add(sentence)
                rows.append((sentence, label))
        rng.shuffle(rows)
        sentences, labels = map(list, zip(*rows, strict=True))
        return Dataset.from_dict({"sentence": sentences, "label": labels}, features=_FEATURES)

    splits = {"train": generate(LABELED, num_labeled), "validation": generate(HELD_OUT, num_validation)}
    unlabeled = generate(LABELED + HELD_OUT, num_unlabeled)["sentence"][:]
    splits["unlabeled"] = Dataset.from_dict(
        {"sentence": unlabeled, "label": [UNLABELED] * len(unlabeled)}, features=_FEATURES
    )
    return DatasetDict(splits), DEMO_TASK
