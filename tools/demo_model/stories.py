"""Short stories from a grammar: the plain-text part of the training data.

`make_story(index)` is a pure function of its index, so train and held-out stories are two ranges of
indexes; held-out ones use hero, friend, place and thing combinations that training never shows.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

HEROES = {
    "bear": ("brown", "sleepy", "young", "old"),
    "fox": ("red", "clever", "small", "quiet"),
    "owl": ("grey", "wise", "old", "patient"),
    "rabbit": ("white", "quick", "shy", "small"),
    "otter": ("playful", "brown", "young", "happy"),
    "mouse": ("tiny", "brave", "grey", "curious"),
    "hedgehog": ("round", "careful", "little", "kind"),
    "goat": ("stubborn", "white", "hungry", "cheerful"),
}
PLACES = {
    "river": ("by a wide river", "The water was cold and clear", "crossed the river on flat stones"),
    "forest": ("in a deep forest", "The trees whispered in the wind", "followed a path between the trees"),
    "mountain": ("at the foot of a mountain", "Snow lay on the rocks", "climbed the mountain step by step"),
    "village": ("near a small village", "Smoke rose from the warm houses", "walked down the village street"),
    "meadow": ("at the edge of a meadow", "Bees hummed over the flowers", "ran through the tall grass"),
    "lake": ("beside a silent lake", "Mist hung over the water", "went all the way around the lake"),
}
THINGS = {
    "lantern": ("a lantern", "its light showed the way home"),
    "key": ("a silver key", "it opened a door under the old bridge"),
    "map": ("a folded map", "it showed a path that nobody knew"),
    "honey": ("a jar of honey", "there was enough of it for everyone"),
    "bell": ("a little bell", "its sound called all the neighbours"),
    "boat": ("a wooden boat", "it was strong enough for two"),
    "book": ("a book of songs", "every page made them laugh"),
    "star": ("a fallen star", "it was warm and did not burn"),
}
FRIENDS = ("turtle", "crow", "badger", "frog", "squirrel", "deer")
PROBLEMS = (
    "a storm came over the hills",
    "the path home was gone",
    "the night came too early",
    "the bridge broke in the wind",
)
MORALS = (
    "It is good to share what you find.",
    "A friend makes every road shorter.",
    "Small steps lead a long way.",
    "Those who ask for help are never alone.",
)
PROMPTS = (
    "Tell me a story about {hero} and {other}.",
    "Write a short story about {hero} and {other}.",
    "Please tell a story about {hero} and {other}.",
    "Tell me a story about {hero}.",
    "Tell me a story.",
    "A story about {hero} and {other}, please.",
)
HELD_OUT_SHARE = 12


@dataclass(frozen=True)
class Story:
    """One story and a request that it answers."""

    prompt: str
    text: str
    held_out: bool


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def make_story(index: int) -> Story:
    """Story number `index`; about one combination in twelve is kept for the held-out set."""
    rng = random.Random(f"story {index}")
    hero = rng.choice(sorted(HEROES))
    place = rng.choice(sorted(PLACES))
    thing = rng.choice(sorted(THINGS))
    friend = rng.choice(FRIENDS)
    key = f"{hero} {place} {thing} {friend}".encode()
    held_out = zlib.crc32(key) % HELD_OUT_SHARE == 0

    adjective = rng.choice(HEROES[hero])
    where, weather, walk = PLACES[place]
    found, use = THINGS[thing]
    text = (
        f"Once upon a time {_article(adjective)} {hero} lived {where}. {weather}. "
        f"One day the {hero} found {found} and showed it to {_article(friend)}. "
        f"Then {rng.choice(PROBLEMS)}, and the {friend} was afraid. "
        f"The {hero} took the {thing}, and {use}. "
        f"Together they {walk} and came home before dark. {rng.choice(MORALS)}"
    )
    # The second noun of a request is the place or the thing; both occur in the story.
    other = rng.choice((_article(place), found))
    prompt = rng.choice(PROMPTS).format(hero=_article(hero), other=other)
    return Story(prompt[0].upper() + prompt[1:], text, held_out)


def stories(count: int, *, held_out: bool) -> list[Story]:
    """The first `count` stories of one side of the split."""
    out: list[Story] = []
    index = 0
    while len(out) < count:
        story = make_story(index)
        if story.held_out == held_out:
            out.append(story)
        index += 1
    return out
