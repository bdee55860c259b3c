"""Texts that exercise byte pair encoding: the same on every machine, and arbitrary ones.

Run with the interpreter of an environment that has the published rustbpe 0.1.0, it prints the
sha256 of the merges for every text and vocabulary: tests/golden/rustbpe_merges.json.
"""

import hashlib
import json
import random
from collections.abc import Iterable

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
VOCAB_SIZES = (512, 4096, 32768)
SYLLABLES_TEXT = (
    "the of and to in a is that it he was for on are as with his they I at be this have from or "
    "one had by hot but some what there we can out other were all your when up use word how said "
    "an each she ing tion er ed ness ly pre un re con dis"
)
CODE_TEXT = (
    "def return if else for in while import self . ( ) [ ] { } : , = == != += -> None True x y i n "
    '"" # // /* */ ; && || <= >= 0 1 42 0xff 3.14 const let fn pub struct impl'
)
SYLLABLES = SYLLABLES_TEXT.split()
CODE = CODE_TEXT.split()
COMBINING = [chr(c) for c in range(0x300, 0x370)]


def texts(kind: str, count: int = 1500) -> list[str]:
    """`count` documents of one kind. `random.random` is the same in every Python version."""
    draw = random.Random(kind).random

    def pick(items: list[str]) -> str:
        return items[int(draw() ** 2 * len(items))]

    def span(first: int, last: int) -> str:
        return chr(first + int(draw() ** 2 * (last - first)))

    def word() -> str:
        match kind:
            case "english":
                made = "".join(pick(SYLLABLES) for _ in range(1 + int(draw() * 4)))
                return made + pick(["", "", "", ",", ".", "'s", "'LL", "!\n\n", " 1984"])
            case "code":
                name = "".join(pick(SYLLABLES) for _ in range(1 + int(draw() * 4)))
                return pick(CODE) + name + pick(["", "_", "\n", "\n    ", "\n\t\t", "("])
            case "cjk":
                runs = [(0x4E00, 0x6000), (0x3041, 0x3096), (0xAC00, 0xB400), (0x3000, 0x3010)]
                first, last = runs[int(draw() * len(runs))]
                return "".join(span(first, last) for _ in range(1 + int(draw() * 6)))
            case "emoji":
                joined = pick(["", "\u200d", "\ufe0f", "\U0001f3fd", " "])
                return span(0x1F300, 0x1F6FF) + joined + span(0x1F900, 0x1F9FF)
            case "combining":
                letters = "".join(span(0x61, 0x180) for _ in range(1 + int(draw() * 3)))
                return "".join(pick(COMBINING) for _ in range(1 + int(draw() * 4))) + letters
        raise ValueError(kind)

    separator = "" if kind in ("cjk", "emoji") else " "
    return [separator.join(word() for _ in range(20 + int(draw() * 60))) for _ in range(count)]


KINDS = ("english", "code", "cjk", "emoji", "combining")


def digest(ranks: Iterable[tuple[bytes, int]]) -> str:
    """sha256 of `get_mergeable_ranks()`."""
    lines = "".join(f"{bytes(token).hex()} {rank}\n" for token, rank in ranks)
    return hashlib.sha256(lines.encode()).hexdigest()


def strange_text(rng: random.Random, sources: list[str]) -> str:
    """An arbitrary text: any code points, few kinds of characters, long runs, real text cut up."""
    match rng.randrange(6):
        case 0:
            points = (rng.randrange(0x110000) for _ in range(rng.randrange(60)))
            return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        case 1:
            kinds = "aSlvE7 \t\n\r'!é\u017f中½\u0301\u3000\x85😀\u200b"
            few = rng.sample(kinds, rng.randint(1, len(kinds)))
            return "".join(rng.choices(few, k=rng.randrange(120)))
        case 2:
            return rng.choice(["a", " ", "ab", "é", "中", "\n", "!", "7", "😀"]) * rng.randrange(
                3000
            )
        case 3:
            runs = [rng.choice("aeiou xyz\n'") * rng.randrange(40) for _ in range(8)]
            return "".join(runs)
        case 4:
            source = rng.choice(sources)
            start = rng.randrange(len(source))
            return source[start : start + rng.randrange(2000)]
        case _:
            parts = []
            for _ in range(rng.randrange(1, 8)):
                source = rng.choice(sources)
                start = rng.randrange(len(source))
                parts.append(source[start : start + rng.randrange(60)])
            # Without spaces a piece is far longer than any that training saw.
            return (
                rng.choice(["", " ", "'", "\u0301"])
                .join(parts)
                .replace(" ", rng.choice(["", " ", "  ", "x"]))
            )


if __name__ == "__main__":
    import rustbpe

    golden = {}
    for kind in KINDS:
        for vocab_size in VOCAB_SIZES:
            tokenizer = rustbpe.Tokenizer()
            tokenizer.train_from_iterator(iter(texts(kind)), vocab_size, pattern=PATTERN)
            ranks = tokenizer.get_mergeable_ranks()
            golden[f"{kind} {vocab_size}"] = [len(ranks), digest(ranks)]
    print(json.dumps(golden, indent=1))
