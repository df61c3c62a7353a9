"""A small text-classification task of this project's own: messages to a town library's help desk.

Six intents, 600 training and 180 test messages. Every message is a template filled with words from
lists below; the test messages come from other templates and other words than the training messages,
so that the accuracy says something about unseen phrasing. Several intents share their words on
purpose: a card is renewed like a loan, a room is reserved like a book, and both cost money. No
random numbers are drawn, and the rows are the same everywhere and every time.
"""

from __future__ import annotations

import itertools
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ept_fast.storage.files import write_bytes

__all__ = ["INTENTS", "NEW_MESSAGES", "DemoRow", "demo_rows", "write_demo_task"]

INTENTS = ("card", "fees", "hours", "renew", "reserve", "rooms")


@dataclass(frozen=True)
class DemoRow:
    """A message and its intent, one of :data:`INTENTS`."""

    text: str
    label: str


@dataclass(frozen=True)
class _Split:
    """What one split is made of: words for each slot, templates for each intent."""

    messages_per_intent: int
    openings: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]
    templates: Mapping[str, tuple[str, ...]]


_TRAIN = _Split(
    messages_per_intent=100,
    openings=("", "", "Hello. ", "", "Good morning! ", "", "Hi there. "),
    words={
        "item": (
            "novel",
            "cookbook",
            "travel guide",
            "comic",
            "biography",
            "picture book",
            "songbook",
        ),
        "title": (
            "The Lantern Keeper",
            "A Winter in Oslo",
            "Bread for Beginners",
            "The Glass Orchard",
            "Nine Rivers",
            "Mrs. Alder's Garden",
        ),
        "day": ("Monday", "Tuesday", "Saturday", "Friday"),
        "when": ("this week", "on the weekend", "in the summer", "on public holidays", "at Easter"),
        "span": ("two weeks", "a few days", "another month", "ten days"),
        "person": ("my son", "my mother", "my neighbour", "my wife", "my flatmate", "our au pair"),
        "where": (
            "on the bus",
            "at the market",
            "at school",
            "in the park",
            "in town",
            "on holiday",
        ),
        "reason": ("I was ill", "I have been travelling", "we moved house", "I simply forgot"),
        "sum": ("four euros", "six dollars", "twelve pounds", "a small amount"),
        "place": (
            "the children's library",
            "the reading room",
            "the music section",
            "the branch by the station",
            "the library",
        ),
        "group": ("book club", "choir", "chess circle", "homework group", "parents' group"),
        "people": ("five", "eight", "a dozen", "twenty"),
    },
    templates={
        "renew": (
            "I would like to keep the {item} I borrowed for {span} longer.",
            "The {item} is due on {day}, can I extend the loan?",
            "Please renew {title} for me, I am not done with it.",
            "{reason}, so may I have {span} more with the {item}?",
            "How often can the loan of a {item} be extended?",
            "I have not finished {title} yet and it has to be back on {day}.",
            "Can {person} prolong the {item} without bringing it in?",
            "My loans run out on {day}; I need {span} more.",
            "The website will not let me renew the {item}.",
            "Is it possible to hold on to {title} for {span}?",
            "Please change the due date of my {item}, {person} has only just begun it.",
            "Could you lengthen the loan of {title} to {day}?",
            "May {person} bring the {item} back {span} late if I ask now?",
            "Everything on my list is due soon, please extend it all by {span}.",
            "I want to read the {item} to the end, give me {span} more.",
        ),
        "reserve": (
            "Could you set aside {title} for me?",
            "Someone else has the {item} I want, please put me on the waiting list.",
            "I want to order {title} from another branch.",
            "Is {title} on the shelf, and can you keep it for {person}?",
            "Please let me know as soon as {title} comes back.",
            "How do I place a hold on a {item}?",
            "I reserved a {item} last week, has it arrived?",
            "Do you own a copy of {title} that I could collect on {day}?",
            "How many people are ahead of me in the queue for {title}?",
            "Cancel my request for the {item}, {person} bought it.",
            "{title} is out on loan, can you tell me when I may have it?",
            "Please hold the {item} at the desk until {person} collects it on {day}.",
            "Could you buy or borrow {title} for {person}?",
            "I keep finding {title} on loan to somebody else, can I be next?",
            "You wrote that my {item} is here, where do I pick it up?",
        ),
        "hours": (
            "When does {place} open on {day}?",
            "Is {place} open {when}?",
            "How late does {place} stay open on {day}?",
            "What are the opening times of {place} {when}?",
            "Will {place} be closed {when}?",
            "I can only come after work, do you close before seven on {day}?",
            "Until what time can {person} drop in on {day}?",
            "Is somebody at the desk on {day} morning?",
            "Does {place} keep the same hours {when}?",
            "The door of {place} was locked on {day}, when are you there?",
            "Do you close {place} earlier {when}?",
            "Which days is {place} shut?",
            "Can {person} still come in at eight in the evening on {day}?",
            "Are your times on {day} the same as on other days?",
            "Is the library staffed {when} or only the return box in use?",
        ),
        "card": (
            "I have lost my library card {where}.",
            "How can {person} become a member of the library?",
            "I forgot the PIN of my account and need it on {day}.",
            "My membership ends on {day}, how do I renew my card?",
            "We have a new address from {day} on, please change it in my account.",
            "Which papers does {person} need to get a card?",
            "The machine at the entrance did not accept my card on {day}.",
            "Can {person} use my card to take out a {item}?",
            "The password for the online catalogue does not work since {day}.",
            "Somebody stole my purse with the card in it {where} on {day}.",
            "For how many years does a library card run?",
            "Does {person} have to extend the membership every year?",
            "I would like {person} to join the library on {day}.",
            "The site says that my card number does not exist.",
            "My surname has changed, can I get a new card on {day}?",
        ),
        "fees": (
            "Why do I have to pay {sum}?",
            "I got a letter about an overdue {item} and a fine of {sum}.",
            "What do you charge when a {item} comes back late?",
            "{reason} and now I owe you {sum}, could you waive it?",
            "{person} spilled tea on the {item}, what will it cost us?",
            "Can I pay the late fee for {title} by bank transfer?",
            "I lost {title}, how much is the replacement?",
            "The reminder asks for {sum}, but I returned the {item} in time.",
            "Do I owe you any money for {title}?",
            "Is there a fine if the {item} is one day late?",
            "I was charged {sum} and do not understand the bill.",
            "The {item} got wet {where}, do I have to pay for a new one?",
            "How can {person} pay off the debt on my account?",
            "I disagree with the fee of {sum} on my statement.",
            "How much does each day cost after the due date of a {item}?",
        ),
        "rooms": (
            "Our {group} would like to meet in one of your rooms on {day}.",
            "Is the large hall free on {day} for {people} people?",
            "I want to book a study room for {people} students.",
            "Can the {group} use the projector in the meeting room?",
            "Please reserve the seminar room for us on {day} afternoon.",
            "How many chairs are there in the upstairs room? We are {people}.",
            "What does it cost to hire the hall for a {group}?",
            "We need a quiet room for {people} of us {when}.",
            "The {group} has to cancel its room on {day}.",
            "Who unlocks the meeting room for our {group}?",
            "We want to hold a {group} at the library, where can we sit?",
            "Is there some space for {people} of us to talk without disturbing others?",
            "Can our {group} have the hall with the stage on {day}?",
            "{people} of us are looking for a table in a separate room {when}.",
            "May we move our {group} from {day} to a larger room?",
        ),
    },
)

_TEST = _Split(
    messages_per_intent=30,
    openings=("", "Good evening. ", "", "", "One question: "),
    words={
        "item": ("thriller", "radio play", "poetry collection", "grammar", "magazine"),
        "title": ("Salt and Copper", "The Seventh Ferry", "Understanding Bees", "Harbour Lights"),
        "day": ("Wednesday", "Thursday", "Sunday"),
        "when": ("during the school break", "between Christmas and New Year", "in August"),
        "span": ("one more week", "fourteen days", "a little while"),
        "person": ("my daughter", "a friend", "my grandfather"),
        "where": ("on a hike", "at the swimming pool", "in a taxi"),
        "reason": ("I was in hospital", "the train was cancelled", "I mixed up the dates"),
        "sum": ("nine euros", "three pounds fifty", "this much money"),
        "place": ("the newspaper corner", "the branch in the old mill", "the map room"),
        "group": ("knitting circle", "debating society", "language course"),
        "people": ("six", "ten", "fifteen"),
    },
    templates={
        "renew": (
            "Would you grant me {span} with {title} before I hand it back?",
            "I am halfway through the {item}; may I return it later than {day}?",
            "Can the return date of my {item} be moved?",
            "{reason}: please push back the due date of {title}.",
            "{person} is still reading {title}, we need it a bit longer.",
            "Extension wanted for everything I have out at the moment, {span} if you can.",
        ),
        "reserve": (
            "Another reader has {title}, tell me when it is my turn.",
            "May I ask you to keep a {item} ready for me on {day}?",
            "Please get {title} in for {person}.",
            "I am waiting for {title}, is it ready for pick-up?",
            "All copies of {title} are gone, how do I get the next one?",
            "I should like to request a {item} that your catalogue lists.",
        ),
        "hours": (
            "At what hour do the doors of {place} shut on {day}?",
            "Will I find you open if I come by {when}?",
            "From when can one visit {place} on a {day}?",
            "Do you work shorter days in {place} {when}?",
            "Is {day} evening too late to come to {place}?",
            "Could you tell {person} your schedule {when}?",
        ),
        "card": (
            "{person} would like to sign up with the library on {day}.",
            "I cannot log in since {day}, the system says my number is unknown.",
            "My wallet is gone and my library pass with it, I must have left it {where} on {day}.",
            "How long is a membership valid, and can {person} prolong it?",
            "I got married on {day} and need my new name on the card.",
            "Please send me a new PIN before {day}.",
        ),
        "fees": (
            "You took {sum} from my account, what is that for?",
            "{reason}, do I really have to pay the penalty?",
            "The dog of {person} chewed the {item}, do we pay for it?",
            "What is the daily rate for late returns of a {item}?",
            "I dispute the bill of {sum} for {title}.",
            "Where can {person} settle what I owe?",
        ),
        "rooms": (
            "Where could a {group} of {people} get together in your building?",
            "We are looking for a place to hold our {group} on {day}.",
            "Does the event space have a screen and seats for {people}?",
            "Is there a corner we can have to ourselves {when}, {people} of us?",
            "I wish to rent the lecture hall on {day}.",
            "Our {group} grew to {people}, may we switch to a bigger room?",
        ),
    },
)

# What the demo predicts at its end; in neither split.
NEW_MESSAGES = (
    "Can I bring the dinosaur book back next Friday instead of tomorrow?",
    "My card expired, what do I do now?",
    "We are four people who want to practise a play, do you have space?",
    "Is anybody in on New Year's Eve?",
)


def _fillings(template: str, words: Mapping[str, tuple[str, ...]]) -> list[str]:
    """A template with every combination of its slots' words, neighbours in the list unlike."""
    slots = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    combinations = list(itertools.product(*(words[slot] for slot in slots)))
    count = len(combinations)
    step = next(s for s in itertools.count(max(1, round(0.618 * count))) if math.gcd(s, count) == 1)
    spread = (combinations[i * step % count] for i in range(count))
    filled = (template.format(**dict(zip(slots, values, strict=True))) for values in spread)
    return [text[0].upper() + text[1:] for text in filled]


def _rows(split: _Split) -> tuple[DemoRow, ...]:
    """The first messages of each intent, its templates taking turns as long as they have any."""
    rows = []
    openings = itertools.cycle(split.openings)
    for label in INTENTS:
        fillings = (_fillings(template, split.words) for template in split.templates[label])
        turns = itertools.chain.from_iterable(itertools.zip_longest(*fillings))
        texts = (text for text in turns if text is not None)
        for text in itertools.islice(texts, split.messages_per_intent):
            rows.append(DemoRow(next(openings) + text, label))
    return tuple(rows)


def demo_rows(split: str) -> tuple[DemoRow, ...]:
    """The messages of a split, grouped by intent.

    Args:
        split: ``"train"`` (600 rows) or ``"test"`` (180 rows).

    Raises:
        ValueError: another name.
    """
    splits = {"train": _TRAIN, "test": _TEST}
    if split not in splits:
        raise ValueError(f"split: expected one of {', '.join(splits)}, got {split!r}")
    return _rows(splits[split])


def write_demo_task(folder: str | Path) -> Path:
    """Write ``train.jsonl`` and ``test.jsonl`` into ``folder``, made where it is missing.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        write_bytes(folder / f"{split}.jsonl", _jsonl(demo_rows(split)))
    return folder


def _jsonl(rows: Sequence[DemoRow]) -> bytes:
    lines = (json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows)
    return "".join(lines).encode()
