"""Spelling of made-up words: `Spell the word lamp.` -> `l a m p`.

Words are syllables put together, so there are far more than a model can learn by heart, and they
break into few different tokens, so that a toy model meets each of them often enough to learn its
letters.
"""

from __future__ import annotations

import random

from nanochat.tasks.common import Example, GeneratedTask, Instance, conversation

ONSETS = ("b", "d", "k", "l", "m", "n", "p", "r", "s", "t")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "", "", "l", "m", "n", "r", "s", "t")


class Spelling(GeneratedTask):
    """Spell a word of one or two syllables, letter by letter."""

    name = "spelling"

    def draw(self, rng: random.Random) -> Instance:
        num_syllables = rng.randint(1, 2)
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(num_syllables))
        word += rng.choice(CODAS)
        wording = rng.choice(("Spell the word {}.", "How is {} spelled?", "Spell {}, please."))
        answer = " ".join(word)
        return Instance(word, Example(conversation(wording.format(word), answer), answer))
